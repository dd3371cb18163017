"""Processor of latent Chameleon models: images and text or chat to tensors, and ids back to text that shows latents.

It is the stock processor with latent tokens, Pillow alone, and two options of a call: the markers around an image and
the separator behind a text. Published prompts have both, the training prompts of IVT-LR (arXiv 2510.12603) neither.
"""

from collections.abc import Mapping
from typing import Any

from transformers import ChameleonProcessor
from transformers.processing_utils import ImagesKwargs

from .latent_tokens import LatentProcessorKwargs, LatentTokensMixin, check_transformers
from .processing_latent_images import IMAGE_HOOKS, LatentImagesMixin

# The published checkpoints have no template. A turn that is no answer ends with the separator, as the stock processor
# writes it behind a prompt; an answer ends with the end of text and is what `return_assistant_tokens_mask=True` marks.
LATENT_CHAT_TEMPLATE_CHAMELEON = (
    "{% macro render(content) %}"
    "{% if content is string %}{{ content }}"
    "{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}<image>"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "{{ raise_exception('Chameleon takes images and text, no videos') }}"
    "{% elif 'text' in part %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{% endmacro %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ render(message['content']) }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ render(message['content']) }}{{ sep_token }}"
    "{% endif %}"
    "{% endfor %}"
)


class LatentChameleonImagesKwargs(ImagesKwargs, total=False):
    """Options of the images of a call: those of the image processor, and `image_markers`."""

    image_markers: bool


class LatentChameleonProcessorKwargs(LatentProcessorKwargs, total=False):
    """Options of a call: those of any latent processor, `image_markers` and `return_for_text_completion`."""

    images_kwargs: LatentChameleonImagesKwargs
    return_for_text_completion: bool


class LatentChameleonProcessor(LatentTokensMixin, LatentImagesMixin, ChameleonProcessor):
    """Image processor and tokenizer of Chameleon in one, with latent tokens.

    `processor(images=..., text=...)` returns `input_ids` and `attention_mask`, each `[batch, length]`, and
    `pixel_values` `[images, 3, height, width]`. It pads on the left, as batched decoding needs; training collators
    pass `padding_side="right"`. Options of a call beside those of any processor:

    * `image_markers` (default true): each `<image>` of a text becomes begin-of-image, `image_seq_length` placeholders,
      end-of-image; without, the placeholders alone.
    * `return_for_text_completion` (default true, unlike the stock processor): write no separator behind the text. What
      follows a prompt here are latents, or an answer in the same turn; the chat template writes its separators itself.
    * `allow_latent_tokens`: accept slot and patch tokens in a text.

    Args:
        image_processor: without torchvision transformers loads `ChameleonImageProcessorPil`.
        tokenizer: a fast tokenizer. The latent tokens are added to it, and it pads on the left from now on.
        image_seq_length: tokens of an image.
        image_token: placeholder, where the tokenizer does not name one.
        chat_template: default `LATENT_CHAT_TEMPLATE_CHAMELEON`.
        latent_tokens: see [`LatentTokensMixin.set_latent_tokens`].

    Raises:
        ValueError: wrong `latent_tokens`, or a tokenizer that lacks the image tokens or the separator.
        ImportError: when the installed transformers is too old.
    """

    valid_processor_kwargs = LatentChameleonProcessorKwargs
    return_for_text_completion = True
    text_kwargs: dict[str, Any] = {}  # ids are lists unless `return_tensors` is given, as of every latent processor

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        image_seq_length: int = 1024,
        image_token: str = "<image>",
        chat_template: str | dict[str, str] | None = None,
        latent_tokens: dict[str, str] | None = None,
    ) -> None:
        check_transformers("LatentChameleonProcessor", IMAGE_HOOKS)
        super().__init__(image_processor, tokenizer, image_seq_length, image_token)
        known = tokenizer.get_vocab()
        missing = [
            token
            for token in (self.image_token, self.image_start_token, self.image_end_token, tokenizer.sep_token)
            if token not in known
        ]
        if missing:
            raise ValueError(
                f"the tokenizer ({type(tokenizer).__name__}, {len(tokenizer)} entries) lacks {missing} (None: no "
                "separator is named); pass the tokenizer of a Chameleon checkpoint, or add the tokens to it"
            )
        self.set_latent_tokens(latent_tokens)
        self.chat_template = LATENT_CHAT_TEMPLATE_CHAMELEON if chat_template is None else chat_template
        tokenizer.chat_template = self.chat_template

    def _process_images(
        self, images: list, image_markers: bool = True, **kwargs: Any
    ) -> tuple[Mapping[str, Any], list[str]]:
        processed, replacements = super()._process_images(images, **kwargs)
        if not image_markers:
            replacements = [self.image_token * self.image_seq_length for _ in replacements]
        return processed, replacements


__all__ = ["LATENT_CHAT_TEMPLATE_CHAMELEON", "LatentChameleonProcessor"]
