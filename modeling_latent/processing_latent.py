"""Processor of latent-reasoning models: images and chat to tensors, and token ids back to text that shows the latents.

It needs Pillow only (no torchvision, no video processor), loads straight from a stock folder of Qwen2-VL, Qwen2.5-VL
or Qwen3-VL, and adds the tokens that mark a latent span, e.g. those of LASER ("Forest Before Trees: Latent
Superposition for Efficient Visual Reasoning", arXiv 2601.06803). The file travels with a checkpoint on the Hub: it
imports nothing but transformers, Pillow and the standard library.
"""

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any

from PIL import Image
from transformers import ProcessorMixin
from transformers import __version__ as transformers_version
from transformers.image_utils import is_valid_image, load_image
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

logger = logging.get_logger(__name__)

DEFAULT_LATENT_TOKENS: dict[str, str] = {
    "start": "<|latent_start|>",
    "slot": "<|latent|>",
    "end": "<|latent_end|>",
}
REQUIRED_ROLES = ("start", "slot", "end")
OPTIONAL_ROLES = ("patch", "latent_end")

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
_IMAGE_SOURCES = frozenset({"image", "image_url", "url", "path", "base64"})
_JOINERS = frozenset("-'’_\ufffd")


class LatentProcessorKwargs(ProcessingKwargs, total=False):
    """Options of a call: those of any processor, and `allow_latent_tokens`."""

    allow_latent_tokens: bool


class LatentProcessor(ProcessorMixin):
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

    valid_processor_kwargs = LatentProcessorKwargs
    return_mm_token_type_ids = True
    allow_latent_tokens = False

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str | dict[str, str] | None = None,
        latent_tokens: dict[str, str] | None = None,
    ) -> None:
        _check_transformers()
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = getattr(tokenizer, "image_token", None) or "<|image_pad|>"
        self.video_pad_token = getattr(tokenizer, "video_token", None) or "<|video_pad|>"
        if self.image_token not in tokenizer.get_added_vocab():
            raise ValueError(
                f"the tokenizer ({type(tokenizer).__name__}, {len(tokenizer)} entries) has no image token "
                f"{self.image_token!r}; pass the tokenizer of a Qwen-VL checkpoint, or add the token to it"
            )
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.latent_tokens = _checked_latent_tokens(latent_tokens)
        self.add_latent_tokens()
        self.chat_template = self._resolve_template(self.chat_template)
        tokenizer.chat_template = self.chat_template
        tokenizer.padding_side = "left"
        # `from_pretrained` hands its arguments to the tokenizer too, which would save this one a second time.
        tokenizer.init_kwargs.pop("latent_tokens", None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "LatentProcessor":
        """Load from a saved processor or from a stock folder or repository.

        Args:
            pretrained_model_name_or_path: folder or repository id.
            kwargs: those of `ProcessorMixin.from_pretrained`, and `latent_tokens`, `chat_template`, `padding_side`.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if kwargs.get("padding_side") is not None:
            processor.tokenizer.padding_side = kwargs["padding_side"]
        return processor

    # Latent tokens

    def add_latent_tokens(self) -> int:
        """Add the latent tokens that the tokenizer lacks, as special tokens, and return how many were added.

        Calling it again changes nothing. Afterwards `latent_tokens` is in the order of the ids (JSON files forget the
        order of their keys, the ids do not).

        Raises:
            ValueError: when a token has another use in this tokenizer: an ordinary word or the image token.
        """
        tokenizer = self.tokenizer
        taken = {self.image_token, self.video_pad_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token}
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

        Only an assistant turn may contain the start and the end token, and the slot and the patch token as well with
        `allow_latent_tokens=True` (contract C1: user text cannot open a span).

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
        fed = [token for role, token in self.latent_tokens.items() if role not in ("start", "end")]
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
            for role, token in self.latent_tokens.items():
                if role not in ("start", "end") and token in sample and not kwargs.get("allow_latent_tokens"):
                    raise ValueError(
                        f"text {row} contains the latent token {token!r}, which stands for a vector and not for text; "
                        "remove it, or pass allow_latent_tokens=True where a collator lays out latent positions"
                    )
        if text is not None:
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

    # Decoding

    def decode_latent(self, sequence_ids: Any, readable_ids: Any = None, latent_mask: Any = None) -> str:
        """Text of one sequence with every latent span shown as the words that its slots would have said.

        `decode(ids, skip_special_tokens=True)` hides the latents; here a span reads `⟨Seats·Fence·Outside⟩`. Items are
        separated by `·`. A slot starts a new item when its token begins with a space or when a word boundary lies
        between it and the slot before; otherwise it is the rest of that word (`Snow` + `board` read `⟨Snowboard⟩`). A
        special token that a slot said stays literal, an unknown one is `?`, white space alone `␣`, and a run of
        inserted image embeddings `[2 patches]`. With no readable id in the span it reads `⟨3 latents⟩`. Outside the
        spans the start, end and all other special tokens are dropped.

        Args:
            sequence_ids: `[length]` ids (tensor, array or list).
            readable_ids: `[length]` ids, at a latent position the arg-max id that the slot would have said, negative
                where unknown; other positions are not read. A row of `trace.dense("readable_ids")` or of
                `trace.readable_sequences` is such a list.
            latent_mask: `[length]` booleans, true at latent positions (a row of `trace.latent_mask`). Default: where
                the id is the slot or the patch token. When only the mask is given, the ids under it are taken as what
                the slots said.

        Raises:
            ValueError: for a batch, or lengths that differ.
        """
        ids = _as_list(sequence_ids)
        if any(isinstance(i, list) for i in ids):
            raise ValueError("decode_latent takes one sequence; use batch_decode_latent for a batch")
        placeholders = {self.latent_token_id, self.latent_patch_token_id}
        mask = [i in placeholders for i in ids] if latent_mask is None else [bool(m) for m in _as_list(latent_mask)]
        if readable_ids is not None:
            said = _as_list(readable_ids)
        else:
            said = [-1 if i in placeholders else i for i in ids]
        for name, values in (("readable_ids", said), ("latent_mask", mask)):
            if len(values) != len(ids):
                raise ValueError(f"{name} has {len(values)} entries for {len(ids)} ids; give one a position")
        pieces = []
        for latent, group in groupby(range(len(ids)), key=mask.__getitem__):
            positions = list(group)
            if latent:
                pieces.append(self._show_span([(ids[i], said[i]) for i in positions]))
            else:
                pieces.append(self._text([ids[i] for i in positions], skip_special_tokens=True))
        return "".join(pieces)

    def batch_decode_latent(self, sequences: Any, readable_ids: Any = None, latent_mask: Any = None) -> list[str]:
        """[`decode_latent`] for each row of a batch.

        Args:
            sequences: `[batch, length]` ids, or a list of sequences.
            readable_ids: `None`, or one row a sequence.
            latent_mask: `None`, or one row a sequence.

        Raises:
            ValueError: when the numbers of rows differ.
        """
        size = len(sequences)
        for name, values in (("readable_ids", readable_ids), ("latent_mask", latent_mask)):
            if values is not None and len(values) != size:
                raise ValueError(f"{name} has {len(values)} rows for {size} sequences")
        readable_ids = [None] * size if readable_ids is None else readable_ids
        latent_mask = [None] * size if latent_mask is None else latent_mask
        return [self.decode_latent(*row) for row in zip(sequences, readable_ids, latent_mask, strict=True)]

    def _text(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def _show_span(self, slots: list[tuple[int, int]]) -> str:
        """One span from pairs (id in the sequence, readable id)."""
        patch_id = self.latent_patch_token_id
        readable = any(said >= 0 for i, said in slots if i != patch_id)
        items: list[str | list[int]] = []  # a literal, or the ids of one word
        for patches, group in groupby(slots, key=lambda slot: slot[0] == patch_id):
            run = [said for _, said in group]
            if patches:
                items.append(f"[{len(run)} patch{'es' if len(run) > 1 else ''}]")
            elif not readable:
                items.append(f"{len(run)} latent{'s' if len(run) > 1 else ''}")
            else:
                for said in run:
                    if said < 0:
                        items.append("?")
                    elif items and isinstance(items[-1], list) and self._continues(items[-1][-1], said):
                        items[-1].append(said)
                    else:
                        items.append([said])
        words = [item if isinstance(item, str) else self._text(item).strip() or "␣" for item in items]
        return "⟨" + "·".join(words) + "⟩"

    def _continues(self, left: int, right: int) -> bool:
        """Whether token `right` is the rest of the word that token `left` belongs to."""
        return _in_word(self._text([left])[-1:]) and _in_word(self._text([right])[:1])


def _in_word(character: str) -> bool:
    """Letters, digits, combining marks, hyphens, apostrophes, and the replacement character of an incomplete byte."""
    return bool(character) and (
        character.isalnum() or character in _JOINERS or unicodedata.category(character).startswith("M")
    )


def _check_transformers() -> None:
    """Say which version is at fault when a hook of `ProcessorMixin` that this file overrides is missing."""
    hooks = ("prepare_inputs_layout", "validate_inputs", "replace_image_token", "_process_images")
    missing = [name for name in hooks if not hasattr(ProcessorMixin, name)]
    if missing:
        raise ImportError(
            f"LatentProcessor needs transformers >= 5.23; version {transformers_version} lacks "
            f"ProcessorMixin.{missing[0]}. Run `pip install -U transformers`"
        )


def _checked_latent_tokens(latent_tokens: Mapping[str, str] | None) -> dict[str, str]:
    """A copy of the table of latent tokens.

    Raises:
        ValueError: for a missing or unknown role, an empty token, or one token for two roles.
    """
    tokens = dict(DEFAULT_LATENT_TOKENS if latent_tokens is None else latent_tokens)
    missing = [role for role in REQUIRED_ROLES if role not in tokens]
    unknown = [role for role in tokens if role not in REQUIRED_ROLES + OPTIONAL_ROLES]
    if missing or unknown:
        raise ValueError(
            f"latent_tokens {tokens} lacks the roles {missing} and has the unknown roles {unknown}; give a token "
            f"string for each of {list(REQUIRED_ROLES)}, and for {list(OPTIONAL_ROLES)} where the method needs it"
        )
    for role, token in tokens.items():
        if not isinstance(token, str) or not token.strip():
            raise ValueError(f"latent_tokens[{role!r}] must be a token string such as '<|latent|>', got {token!r}")
    if len(set(tokens.values())) != len(tokens):
        raise ValueError(f"latent_tokens {tokens} gives one token to two roles; each role needs its own")
    return tokens


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


def _as_list(values: Any) -> list:
    return values.tolist() if hasattr(values, "tolist") else list(values)


__all__ = ["DEFAULT_LATENT_TOKENS", "LATENT_CHAT_TEMPLATE", "LATENT_CHAT_TEMPLATE_QWEN3", "LatentProcessor"]
