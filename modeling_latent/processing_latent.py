"""Processor of latent-reasoning models: images and chat to tensors, and token ids back to text that shows the latents.

It needs Pillow only (no torchvision, no video processor), loads straight from a stock folder of Qwen2-VL, Qwen2.5-VL
or Qwen3-VL, and adds the tokens that mark a latent span, e.g. those of LASER ("Forest Before Trees: Latent
Superposition for Efficient Visual Reasoning", arXiv 2601.06803). The file travels with a checkpoint on the Hub: beside
its siblings it imports nothing but transformers, Pillow and the standard library.
"""

import os
import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from PIL import Image
from transformers import ProcessorMixin
from transformers.image_utils import is_valid_image, load_image
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from .latent_tokens import DEFAULT_LATENT_TOKENS, LatentTokensMixin, check_transformers

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
_HOOKS = ("prepare_inputs_layout", "validate_inputs", "replace_image_token", "_process_images")


class LatentProcessor(LatentTokensMixin, ProcessorMixin):
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
        check_transformers("LatentProcessor", _HOOKS)
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

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple[list | None, list | None, None, None]:
        """Make `text` a list, read the images (flat, or one list a text), and refuse videos and sound.

        Raises:
            ValueError: names the image that cannot be read.
        """
        for name, value in (("videos", videos), ("audio", audio)):
            if value is not None:
                raise ValueError(f"{type(self).__name__} takes images and text; got {name}={type(value).__name__}")
        if isinstance(text, str):
            text = [text]
        if text is not None and not isinstance(text, (list, tuple)):
            raise ValueError(f"text must be a string or a list of strings, got {type(text).__name__}")
        return _read_images(images), None if text is None else list(text), None, None

    def validate_inputs(
        self,
        images: list | None = None,
        text: list | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check that every text has as many placeholders as images, and no latent token that nobody allowed.

        Raises:
            ValueError: names the row of the text, the counts or the token, and the remedy.
        """
        for row, sample in enumerate(text or []):
            if not isinstance(sample, str):
                raise ValueError(f"text {row} must be a string, got {type(sample).__name__}")
            if self.video_pad_token in sample:
                raise ValueError(f"text {row} contains {self.video_pad_token!r}; videos are not supported, remove it")
        if text is not None:
            self.refuse_latent_tokens(text, bool(kwargs.get("allow_latent_tokens")))
            _check_counts([sample.count(self.image_token) for sample in text], images, self.image_token)
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _process_images(self, images: list, **kwargs: Any) -> tuple[Any, list[str]]:
        flat = _flatten(images)
        try:
            return super()._process_images(flat, **kwargs)
        except (ValueError, TypeError, ArithmeticError, OSError):
            for index, image in enumerate(flat):
                try:
                    self.image_processor([image], **kwargs)
                except (ValueError, TypeError, ArithmeticError, OSError) as reason:
                    size = getattr(image, "size", getattr(image, "shape", None))
                    raise ValueError(
                        f"image {index} of this call ({type(image).__name__}, size {size}) was refused by "
                        f"{type(self.image_processor).__name__}: {reason}; resize, convert or drop it"
                    ) from reason
            raise

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


def _read_images(images: Any) -> list | None:
    """Images as a list, or as one list a text when they came so; `None` when there is none.

    Raises:
        ValueError: names the image that cannot be read.
    """
    if images is None:
        return None
    if getattr(images, "ndim", None) == 4:
        images = list(images)
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if all(image is None for image in images):
        return None
    if not any(isinstance(row, (list, tuple)) for row in images):
        return [_read_image(image, f"images[{i}]") for i, image in enumerate(images)]
    for row, inner in enumerate(images):
        if inner is not None and not isinstance(inner, (list, tuple)):
            raise ValueError(
                f"images[{row}] is a {type(inner).__name__} among lists; give one list a text, an empty one for a "
                "text without image"
            )
    rows = [
        [_read_image(image, f"images[{row}][{i}]") for i, image in enumerate(inner or [])]
        for row, inner in enumerate(images)
    ]
    return rows if any(rows) else None


def _read_image(image: Any, where: str) -> Any:
    reason = "not an image"
    try:
        if isinstance(image, (str, os.PathLike)):
            return load_image(os.fspath(image))
        if isinstance(image, Image.Image):
            image.load()
            return image
        if is_valid_image(image):
            return image
    except Exception as error:  # whatever Pillow or the download raises, the caller needs to know which image it was
        reason = f"{type(error).__name__}: {str(error)[:200]}"
    raise ValueError(
        f"{where} cannot be read ({reason}): {repr(image)[:100]}; pass a PIL image, an array, or the path or URL of a "
        "file that Pillow opens"
    )


def _flatten(images: list) -> list:
    return [image for row in images for image in row] if isinstance(images[0], list) else images


def _check_counts(placeholders: list[int], images: list | None, token: str) -> None:
    """Compare the placeholders of each text with its images.

    Raises:
        ValueError: names the first row of the texts where they differ, and both counts.
    """
    remedy = f"put one {token} (a {{'type': 'image'}} part of a message) in the text for each of its images"
    if images is not None and not isinstance(images[0], list):
        if sum(placeholders) != len(images):
            ends = list(accumulate(placeholders))
            row = next((row for row, end in enumerate(ends) if end > len(images)), len(ends) - 1)
            raise ValueError(
                f"{len(images)} images for {sum(placeholders)} image placeholders ({placeholders} a text); text {row} "
                f"is the first that does not fit; {remedy}"
            )
        return
    given = [0] * len(placeholders) if images is None else [len(row) for row in images]
    if len(given) != len(placeholders):
        raise ValueError(f"{len(given)} lists of images for {len(placeholders)} texts; give one list a text")
    for row, (wanted, got) in enumerate(zip(placeholders, given, strict=True)):
        if wanted != got:
            raise ValueError(f"text {row} has {wanted} image placeholders and {got} images; {remedy}")


__all__ = ["DEFAULT_LATENT_TOKENS", "LATENT_CHAT_TEMPLATE", "LATENT_CHAT_TEMPLATE_QWEN3", "LatentProcessor"]
