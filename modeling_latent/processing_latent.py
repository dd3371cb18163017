"""Processor of latent-reasoning models: images and chat to tensors, and token ids back to text that shows the latents.

It needs Pillow only (no torchvision, no video processor), loads straight from a stock folder of Qwen2-VL, Qwen2.5-VL
or Qwen3-VL, and adds the tokens that mark a latent span, e.g. those of LASER ("Forest Before Trees: Latent
Superposition for Efficient Visual Reasoning", arXiv 2601.06803). The file travels with a checkpoint on the Hub: beside
its siblings it imports nothing but transformers, Pillow and the standard library.
"""

import re
from collections.abc import Mapping
from typing import Any

from transformers import ProcessorMixin
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from .latent_tokens import DEFAULT_LATENT_TOKENS, LatentTokensMixin, check_transformers
from .processing_latent_images import IMAGE_HOOKS, LatentImagesMixin

logger = logging.get_logger(__name__)

_DEFAULT_SYSTEM_TURN = (
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
)
# Renders what the template of Qwen2-VL and Qwen2.5-VL renders. The text of an assistant turn, its `<|im_end|>` and the
# newline after it are wrapped in generation tags, so that `return_assistant_tokens_mask=True` marks what is learnt.
LATENT_CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% macro render(content) %}"
    "{% if content is string %}{{ content }}"
    "{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{% endmacro %}"
    "{% for message in messages %}" + _DEFAULT_SYSTEM_TURN + "<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ render(message['content']) }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ render(message['content']) }}<|im_end|>\n"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The same for Qwen3-VL, whose template has no default system message; what it does with tools is refused here.
LATENT_CHAT_TEMPLATE_QWEN3 = LATENT_CHAT_TEMPLATE.replace(
    _DEFAULT_SYSTEM_TURN,
    "{% if tools or message['tool_calls'] or message['role'] == 'tool' %}"
    "{{ raise_exception('this chat template renders no tools; leave them out or pass chat_template=...') }}"
    "{% endif %}",
)

# Conversations on which a template without generation tags is compared with ours (see `_resolve_template`).
_PROBES: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "a"}],
    [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " b\n"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": [{"type": "text", "text": "d"}, {"type": "image"}]},
    ],
    [{"role": "system", "content": "e"}, {"role": "user", "content": "f"}, {"role": "assistant", "content": "g"}],
]


class LatentProcessor(LatentTokensMixin, LatentImagesMixin, ProcessorMixin):
    """Image processor and tokenizer in one, with latent tokens.

    `processor(images=..., text=...)` returns `input_ids`, `attention_mask` and `mm_token_type_ids` (1 at image tokens,
    0 elsewhere), each `[batch, length]`, `pixel_values` `[patches, patch values]` and `image_grid_thw` `[images, 3]`
    (time, height and width in patches). Each image placeholder of the text becomes t·h·w / merge_size² of them. It
    pads on the left, as batched decoding needs; training collators pass `padding_side="right"`.

    Args:
        image_processor: any image processor that returns `image_grid_thw`; without torchvision transformers loads
            `Qwen2VLImageProcessorPil`.
        tokenizer: a fast tokenizer. The latent tokens are added to it, and it pads on the left from now on.
        chat_template: `None` means `LATENT_CHAT_TEMPLATE`. A template that lacks generation tags and renders the same
            text as one of ours (the stock ones of the Qwen-VL families) is replaced by it; one that renders another
            text is kept with a warning.
        latent_tokens: role to token string, in the order in which new tokens are added (the order fixes the ids). The
            roles are `"start"` and `"end"` (they open and close a span), `"slot"` (a position fed by a vector) and,
            where a method inserts image embeddings into the span, `"patch"`; where it writes a token between the last
            slot and the end, `"latent_end"`. Default: `DEFAULT_LATENT_TOKENS`.

    Raises:
        ValueError: for a wrong `latent_tokens` or a tokenizer without image token.
        ImportError: when the installed transformers is too old.

    Example:
        ```python
        tokens = {"start": "<|laser_start|>", "slot": "<|laser|>", "end": "<|laser_end|>"}
        processor = LatentProcessor.from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct", latent_tokens=tokens)
        processor.latent_token_id  # 151666
        ```
    """

    return_mm_token_type_ids = True

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str | dict[str, str] | None = None,
        latent_tokens: dict[str, str] | None = None,
    ) -> None:
        check_transformers("LatentProcessor", IMAGE_HOOKS)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = getattr(tokenizer, "image_token", None) or "<|image_pad|>"
        self.video_pad_token = getattr(tokenizer, "video_token", None) or "<|video_pad|>"
        if self.image_token not in tokenizer.get_added_vocab():
            raise ValueError(
                f"the tokenizer ({type(tokenizer).__name__}, {len(tokenizer)} entries) has no image token "
                f"{self.image_token!r}; pass the tokenizer of a Qwen-VL checkpoint, or add the token to it"
            )
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.set_latent_tokens(latent_tokens)
        self.chat_template = self._resolve_template(self.chat_template)
        tokenizer.chat_template = self.chat_template

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call can return."""
        return [*super().model_input_names, "mm_token_type_ids"]

    # Chat

    def _resolve_template(self, template: str | dict[str, str] | None) -> str | dict[str, str]:
        """The template in use: ours for `None` and for one that renders the same text without generation tags."""
        if isinstance(template, dict):
            return {**template, "default": self._resolve_template(template.get("default"))}
        if template is None:
            return LATENT_CHAT_TEMPLATE
        if re.search(r"\{%-?\s*generation\s*-?%\}", template):
            return template
        rendered = _render_probes(template)
        for ours in (LATENT_CHAT_TEMPLATE, LATENT_CHAT_TEMPLATE_QWEN3):
            if rendered == _render_probes(ours):
                return ours
        logger.warning(
            "the chat template of this checkpoint has no {% generation %} tags and renders another text than those of "
            "the Qwen-VL families, so it is kept as it is and assistant masks will be all zero; put the tags around "
            "the text of the assistant and pass it as chat_template=..., or pass chat_template=LATENT_CHAT_TEMPLATE"
        )
        return template

    @property
    def default_system_message(self) -> str | None:
        """What the template says first when a conversation has no system message; `None` for nothing (Qwen3-VL)."""
        rendered = super().apply_chat_template([{"role": "user", "content": ""}])
        found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", rendered, re.DOTALL)
        return None if found is None else found[1]

    # Call

    def validate_inputs(self, images: list | None = None, text: list | None = None, **kwargs: Any) -> None:
        """As every processor with images; no text may contain a video placeholder.

        Raises:
            ValueError: names the row of the text and the remedy.
        """
        for row, sample in enumerate(text or []):
            if isinstance(sample, str) and self.video_pad_token in sample:
                raise ValueError(f"text {row} contains {self.video_pad_token!r}; videos are not supported, remove it")
        super().validate_inputs(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The t·h·w / merge_size² placeholders that stand for image `image_idx`."""
        patches = int(image_inputs["image_grid_thw"][image_idx].prod())
        return self.image_token * (patches // getattr(self.image_processor, "merge_size", 1) ** 2)


def _render_probes(template: str) -> list[str] | None:
    """What a template makes of the probe conversations, with and without generation prompt; `None` if it fails."""
    try:
        return [
            text
            for prompt in (False, True)
            for text in render_jinja_template(
                conversations=_PROBES, chat_template=template, add_generation_prompt=prompt
            )[0]
        ]
    except Exception:  # whatever a foreign template raises: it is not the stock one
        return None


__all__ = ["DEFAULT_LATENT_TOKENS", "LATENT_CHAT_TEMPLATE", "LATENT_CHAT_TEMPLATE_QWEN3", "LatentProcessor"]
