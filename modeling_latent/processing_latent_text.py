"""Processor of causal language models that reason in latents: text and chat to tensors, and ids back to text.

A processor of a tokenizer alone, so that scripts, trainers and `AutoProcessor` treat models without images as they
treat the others. It loads straight from a stock folder and travels with a checkpoint on the Hub.
"""

from typing import Any

from transformers import ProcessorMixin

from .latent_tokens import LatentTokensMixin, check_transformers

_HOOKS = ("prepare_inputs_layout", "validate_inputs", "unused_input_names")


class LatentTextProcessor(LatentTokensMixin, ProcessorMixin):
    """A tokenizer with latent tokens.

    `processor(text=...)` returns `input_ids` and `attention_mask`, each `[batch, length]`. It pads on the left, as
    batched decoding needs; training collators pass `padding_side="right"`. A tokenizer without padding token (GPT-2)
    pads with its end token.

    Args:
        tokenizer: a fast tokenizer. The latent tokens are added to it, and it pads on the left from now on.
        chat_template: default that of the tokenizer; a base model has none, and then `apply_chat_template` needs one.
            Put `{% generation %}` tags around the text of the assistant for assistant masks.
        latent_tokens: see [`LatentTokensMixin`]; default `DEFAULT_LATENT_TOKENS`.

    Raises:
        ValueError: for a wrong `latent_tokens`, or a tokenizer that has neither padding nor end token.
        ImportError: when the installed transformers is too old.

    Example:
        ```python
        tokens = {"start": "<|start-latent|>", "end": "<|end-latent|>", "slot": "<|latent|>"}
        processor = LatentTextProcessor.from_pretrained("openai-community/gpt2", latent_tokens=tokens)
        processor.latent_token_id  # 50259
        ```
    """

    unused_input_names = ["token_type_ids"]  # GPT-2 would add embeddings for them

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | dict[str, str] | None = None,
        latent_tokens: dict[str, str] | None = None,
    ) -> None:
        check_transformers("LatentTextProcessor", _HOOKS)
        super().__init__(tokenizer, chat_template=chat_template)
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ValueError(
                    f"the tokenizer ({type(tokenizer).__name__}) has neither a padding nor an end token; set "
                    "tokenizer.eos_token first"
                )
            tokenizer.pad_token = tokenizer.eos_token
        self.set_latent_tokens(latent_tokens)
        if self.chat_template is None:
            self.chat_template = tokenizer.chat_template
        tokenizer.chat_template = self.chat_template

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple[None, list | None, None, None]:
        """Make `text` a list, and refuse everything else.

        Raises:
            ValueError: images, videos or sound.
        """
        for name, value in (("images", images), ("videos", videos), ("audio", audio)):
            if value is not None:
                raise ValueError(f"{type(self).__name__} takes text alone; got {name}={type(value).__name__}")
        if isinstance(text, str):
            text = [text]
        if text is not None and not isinstance(text, (list, tuple)):
            raise ValueError(f"text must be a string or a list of strings, got {type(text).__name__}")
        return None, None if text is None else list(text), None, None

    def validate_inputs(self, text: list | None = None, **kwargs: Any) -> None:
        """Check that every text is a string without a latent token that nobody allowed.

        Raises:
            ValueError: names the row of the text, the token, and the remedy.
        """
        for row, sample in enumerate(text or []):
            if not isinstance(sample, str):
                raise ValueError(f"text {row} must be a string, got {type(sample).__name__}")
        if text is not None:
            self.refuse_latent_tokens(text, bool(kwargs.get("allow_latent_tokens")))
        super().validate_inputs(text=text, **kwargs)


__all__ = ["LatentTextProcessor"]
