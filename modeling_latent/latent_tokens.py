"""Latent tokens of a processor: their roles and ids, and texts and chats that may not contain them (contract C1).

Every processor of the library is this mixin over `ProcessorMixin`, whatever else it takes: images or text alone.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import ProcessorMixin
from transformers import __version__ as transformers_version
from transformers.processing_utils import ProcessingKwargs

from .latent_decoding import LatentDecodingMixin

DEFAULT_LATENT_TOKENS: dict[str, str] = {
    "start": "<|latent_start|>",
    "slot": "<|latent|>",
    "end": "<|latent_end|>",
}
REQUIRED_ROLES = ("start", "slot", "end")
OPTIONAL_ROLES = ("patch", "latent_end")
LEARNED_ROLE = "learned_"  # learned_1, learned_2, ... in the order in which they stand

_IMAGE_SOURCES = frozenset({"image", "image_url", "url", "path", "base64"})


class LatentProcessorKwargs(ProcessingKwargs, total=False):
    """Options of a call: those of any processor, and `allow_latent_tokens`."""

    allow_latent_tokens: bool


class LatentTokensMixin(LatentDecodingMixin):
    """For a processor class, before `ProcessorMixin`: latent tokens, their ids, refusals, and readable decoding.

    The `__init__` of the class calls `set_latent_tokens` once it has its tokenizer.

    Attributes:
        latent_tokens: role to token string, in the order of the ids. The roles are `"start"` and `"end"` (they open
            and close a span), `"slot"` (a position fed by a vector) and, where a method inserts image embeddings into
            the span, `"patch"`; where it writes a token between the last slot and the end, `"latent_end"`. Tokens with
            an embedding of their own in place of slots have the roles `"learned_1"`, `"learned_2"`, ...
        added_latent_tokens: how many of them the tokenizer did not have; they are its last ones.
    """

    valid_processor_kwargs = LatentProcessorKwargs
    allow_latent_tokens = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load from a saved processor or from a stock folder or repository.

        Args:
            pretrained_model_name_or_path: folder or repository id.
            kwargs: those of `ProcessorMixin.from_pretrained`, and `latent_tokens`, `chat_template`, `padding_side`.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if kwargs.get("padding_side") is not None:
            processor.tokenizer.padding_side = kwargs["padding_side"]
        return processor

    def set_latent_tokens(self, latent_tokens: Mapping[str, str] | None = None) -> None:
        """Check a table of latent tokens, add them to the tokenizer, and let it pad on the left from now on.

        Args:
            latent_tokens: role to token string, in the order in which new tokens are added (the order fixes the ids).
                Default: `DEFAULT_LATENT_TOKENS`.

        Raises:
            ValueError: a missing or unknown role, an empty token, one token for two roles, or a token that has another
                use in this tokenizer.
        """
        self.latent_tokens = _checked_latent_tokens(latent_tokens)
        self.added_latent_tokens = self.add_latent_tokens()
        self.tokenizer.padding_side = "left"
        # `from_pretrained` hands its arguments to the tokenizer too, which would save this one a second time.
        self.tokenizer.init_kwargs.pop("latent_tokens", None)

    def add_latent_tokens(self) -> int:
        """Add the latent tokens that the tokenizer lacks, as special tokens, and return how many were added.

        Calling it again changes nothing. Afterwards `latent_tokens` is in the order of the ids (JSON files forget the
        order of their keys, the ids do not).

        Raises:
            ValueError: when a token has another use in this tokenizer: an ordinary word or the image token.
        """
        tokenizer = self.tokenizer
        taken = {getattr(self, name, None) for name in ("image_token", "video_pad_token")}
        taken |= {tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token}
        added_vocabulary = tokenizer.get_added_vocab()
        for role, token in self.latent_tokens.items():
            index = tokenizer.convert_tokens_to_ids(token)
            known = index is not None and tokenizer.convert_ids_to_tokens(index) == token
            ordinary = known and token not in added_vocabulary
            if token in taken or ordinary:
                use = "an ordinary word" if ordinary else "another special token"
                raise ValueError(
                    f"latent_tokens[{role!r}] = {token!r} is already {use} of this tokenizer; choose another string"
                )
        before = len(tokenizer)
        for token in self.latent_tokens.values():
            tokenizer.add_tokens(token, special_tokens=True)
        order = sorted(self.latent_tokens, key=self._latent_id)
        self.latent_tokens = {role: self.latent_tokens[role] for role in order}
        return len(tokenizer) - before

    def _latent_id(self, role: str) -> int | None:
        token = self.latent_tokens.get(role)
        return None if token is None else self.tokenizer.convert_tokens_to_ids(token)

    @property
    def latent_start_token_id(self) -> int:
        """Id of the token that opens a span."""
        return self._latent_id("start")

    @property
    def latent_token_id(self) -> int:
        """Id that a latent position carries in `input_ids`."""
        return self._latent_id("slot")

    @property
    def latent_end_token_id(self) -> int:
        """Id of the token that closes a span."""
        return self._latent_id("end")

    @property
    def latent_patch_token_id(self) -> int | None:
        """Id of an image embedding inserted into a span; `None` for methods without."""
        return self._latent_id("patch")

    @property
    def latent_stop_token_id(self) -> int | None:
        """Id of the token between the last slot and the end; `None` for methods without."""
        return self._latent_id("latent_end")

    @property
    def latent_learned_token_ids(self) -> list[int] | None:
        """Ids of the learned tokens in the order in which they stand; `None` for methods without."""
        return [self._latent_id(role) for role in learned_roles(self.latent_tokens)] or None

    # Refusals

    def refuse_latent_tokens(self, text: Sequence[str], allow_latent_tokens: bool = False) -> None:
        """Refuse texts with a latent token that stands for a vector (contract C1: user text cannot be a slot). Markers
        and learned tokens have embeddings of their own, and are text.

        Args:
            text: one text a row.
            allow_latent_tokens: nothing is refused: a collator lays out latent positions.

        Raises:
            ValueError: names the row, the token and the remedy.
        """
        for row, sample in enumerate(text):
            for role, token in self.latent_tokens.items():
                if _is_fed(role) and token in sample and not allow_latent_tokens:
                    raise ValueError(
                        f"text {row} contains the latent token {token!r}, which stands for a vector and not for text; "
                        "remove it, or pass allow_latent_tokens=True where a collator lays out latent positions"
                    )

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        allow_latent_tokens: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation, or several, and tokenize with `tokenize=True`; as in `ProcessorMixin`.

        Only an assistant turn may contain the start and the end token and learned tokens, and the slot and the patch
        token as well with `allow_latent_tokens=True` (contract C1: user text cannot open a span).

        Args:
            conversation: list of messages `{"role", "content"}`, or a list of such lists.
            chat_template: another template for this call.
            allow_latent_tokens: accept slot and patch tokens in assistant turns.
            processor_kwargs: arguments of the call of the processor (`padding`, `padding_side`, `truncation`, ...).
            sanitize_control_tokens: encode control tokens of the messages, the latent ones included, as plain text.
            kwargs: those of `ProcessorMixin.apply_chat_template` (`tokenize`, `return_dict`, `return_tensors`,
                `return_assistant_tokens_mask`, `add_generation_prompt`, ...).

        Raises:
            ValueError: for a latent token where none may stand: conversation, message, token and remedy.
        """
        if isinstance(conversation, (list, tuple)) and not conversation:
            raise ValueError("the conversation is empty; pass at least one message {'role': ..., 'content': ...}")
        processor_kwargs = dict(processor_kwargs or {})
        allowed = processor_kwargs.pop("allow_latent_tokens", False) or allow_latent_tokens
        if not sanitize_control_tokens:
            self._refuse_in_messages(conversation, allowed)
        if allowed:
            processor_kwargs["allow_latent_tokens"] = True
        return super().apply_chat_template(
            conversation,
            chat_template,
            processor_kwargs=processor_kwargs,
            sanitize_control_tokens=sanitize_control_tokens,
            **kwargs,
        )

    def _refuse_in_messages(self, conversation: Sequence[Any], slots_allowed: bool) -> None:
        batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
        rows = [getattr(row, "messages", row) for row in conversation] if batched else [conversation]
        fed = [token for role, token in self.latent_tokens.items() if _is_fed(role)]
        for row_index, messages in enumerate(rows):
            for index, message in enumerate(messages):
                role = message.get("role") if isinstance(message, Mapping) else None
                refused = list(self.latent_tokens.values())
                remedy = (
                    "remove it, or pass sanitize_control_tokens=True with tokenize=True to encode it as plain text"
                )
                if role == "assistant":
                    refused = [] if slots_allowed else fed
                    remedy = "latent positions are laid out by a collator, which passes allow_latent_tokens=True"
                token = next((t for t in refused if any(t in string for string in _strings(message))), None)
                if token is not None:
                    where = f"message {index}" + (f" of conversation {row_index}" if batched else "")
                    raise ValueError(f"{where} (role {role!r}) contains the latent token {token!r}; {remedy}")


def learned_roles(latent_tokens: Mapping[str, str]) -> list[str]:
    """The roles of learned tokens, by their numbers."""
    numbered = [role for role in latent_tokens if role.startswith(LEARNED_ROLE)]
    return sorted(numbered, key=lambda role: (len(role), role))


def _is_fed(role: str) -> bool:
    """Whether a token of this role stands for a vector; the others have an embedding of their own."""
    return role not in ("start", "end") and not role.startswith(LEARNED_ROLE)


def check_transformers(processor_class: str, hooks: Sequence[str]) -> None:
    """Say which version is at fault when a hook of `ProcessorMixin` that a processor overrides is missing.

    Args:
        processor_class: name of the class, for the message.
        hooks: names of the hooks.

    Raises:
        ImportError: the installed transformers is too old.
    """
    missing = [name for name in hooks if not hasattr(ProcessorMixin, name)]
    if missing:
        raise ImportError(
            f"{processor_class} needs transformers >= 5.23; version {transformers_version} lacks "
            f"ProcessorMixin.{missing[0]}. Run `pip install -U transformers`"
        )


def _checked_latent_tokens(latent_tokens: Mapping[str, str] | None) -> dict[str, str]:
    """A copy of the table of latent tokens.

    Raises:
        ValueError: for a missing or unknown role, an empty token, or one token for two roles.
    """
    tokens = dict(DEFAULT_LATENT_TOKENS if latent_tokens is None else latent_tokens)
    learned = learned_roles(tokens)
    missing = [role for role in REQUIRED_ROLES if role not in tokens and not learned]
    missing += [name for name in (f"{LEARNED_ROLE}{i}" for i in range(1, len(learned) + 1)) if name not in tokens]
    unknown = [role for role in tokens if role not in (*REQUIRED_ROLES, *OPTIONAL_ROLES, *learned)]
    if missing or unknown:
        raise ValueError(
            f"latent_tokens {tokens} lacks the roles {missing} and has the unknown roles {unknown}; give a token "
            f"string for each of {list(REQUIRED_ROLES)}, and for {list(OPTIONAL_ROLES)} where the method needs it, or "
            f"learned tokens from {LEARNED_ROLE}1 on"
        )
    for role, token in tokens.items():
        if not isinstance(token, str) or not token.strip():
            raise ValueError(f"latent_tokens[{role!r}] must be a token string such as '<|latent|>', got {token!r}")
    if len(set(tokens.values())) != len(tokens):
        raise ValueError(f"latent_tokens {tokens} gives one token to two roles; each role needs its own")
    return tokens


def _strings(value: Any) -> Iterator[str]:
    """Every string of a message that a template could render: not the sources of images."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        image = value.get("type") in ("image", "image_url")
        for key, inner in value.items():
            if not (image and key in _IMAGE_SOURCES):
                yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


__all__ = [
    "DEFAULT_LATENT_TOKENS",
    "LatentProcessorKwargs",
    "LatentTokensMixin",
    "check_transformers",
    "learned_roles",
]
