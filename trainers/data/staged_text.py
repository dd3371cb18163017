"""From a record to token ids in pieces (question, steps, answer), as the stage curricula of IVT-LR and Coconut need.

Papers: "Reasoning in the Dark: Interleaved Vision-Text Reasoning in Latent Space", arXiv 2510.12603 (IVT-LR; card 2.2,
2.3), and "Training Large Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769 (Coconut; card
11.2). How the texts read is in `staged_formats.py`. Pieces are encoded one by one; nothing stands between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .records import Record, RecordError, record_origin
from .staged_formats import (
    PROMPTS,
    STAGED_FORMATS,
    PromptStyle,
    StagedFormat,
    image_token_of,
    question_text,
    staged_format,
    user_text,
)

__all__ = [
    "COCONUT_TOKENS",
    "IVTLR_TOKENS",
    "PROMPTS",
    "STAGED_FORMATS",
    "PromptStyle",
    "StagedExample",
    "StagedFormat",
    "check_texts",
    "encode_staged",
    "question_text",
    "staged_format",
    "truncated_steps",
    "user_text",
]

# Role to token, in the order in which the tokens are added (equal to the table of methods in modeling_latent).
COCONUT_TOKENS: dict[str, str] = {"start": "<|start-latent|>", "end": "<|end-latent|>", "slot": "<|latent|>"}
IVTLR_TOKENS: dict[str, str] = {**COCONUT_TOKENS, "patch": "<|latent-patch|>"}


@dataclass(frozen=True)
class StagedExample:
    """Token ids of one record; the input of a stage is `question`, latents, some of `steps`, `answer`.

    Args:
        question: with the image tokens expanded.
        steps: one list a step, those that the length limit left.
        answer: ends with the end token.
        after_latents: what a published inference prompt has behind its latents (Chameleon: the separator); else empty.
        num_dropped_steps: steps that the length limit took away.
    """

    question: list[int]
    steps: list[list[int]]
    answer: list[int]
    after_latents: list[int] = field(default_factory=list)
    num_dropped_steps: int = 0


def encode_staged(
    record: Record,
    processor: Any,
    fmt: str | StagedFormat,
    num_image_tokens: Sequence[int] = (),
    *,
    prompt: str = "training",
    max_length: int | str | None = "format",
) -> StagedExample:
    """Token ids of a record, in pieces.

    Length limit (card 2.2): when question, steps and answer exceed it by `excess` tokens, steps are kept from the
    front while their running length stays at most `total step length - excess`; the first that does not fit ends the
    steps, shorter ones behind it go too. Question and answer are never cut, so an example may stay longer than that.

    Args:
        record: `question`, `answer`, `images` (only their number is read), `steps` (None is none), `choices`.
        processor: a processor, or a tokenizer (with the chat template for the formats that use it).
        fmt: the format or its name.
        num_image_tokens: for each image in order, how many image tokens it is.
        prompt: `"training"`, or `"published_inference"` for the prompt of the published evaluation scripts, which
            published weights are evaluated with. Latents stand between `question` and `after_latents`.
        max_length: in tokens; `"format"` for that of the format, None for none.

    Raises:
        RecordError: names file and row: an empty question or answer, a number of images that differs from
            `num_image_tokens`, an image or latent token in a text, steps that are not strings, too many choices.
        ValueError: an unknown format or kind of prompt, no chat template, no end token, a token of the format that the
            tokenizer lacks, a limit below 1.
    """
    fmt = staged_format(fmt)
    tokenizer = getattr(processor, "tokenizer", processor)
    image_token = image_token_of(processor, fmt)
    _check_record(record, num_image_tokens, image_token)
    style, limit = fmt.style(prompt), _limit(fmt, max_length)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token, with which every answer ends; set tokenizer.eos_token")
    _check_tokens(tokenizer, style, image_token if record["images"] else "")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    text = question_text(record, processor, fmt, prompt=prompt)
    text = _expand_images(text, image_token, num_image_tokens)
    question = tokenizer.encode(text, add_special_tokens=fmt.special_tokens)
    steps = [encode(step + fmt.step_end) for step in record["steps"] or []]
    answer = [*encode(fmt.answer_prefix + record["answer"]), tokenizer.eos_token_id]
    kept = truncated_steps(steps, len(question) + len(answer), limit)
    after_latents = encode(style.after_latents) if style.after_latents else []
    return StagedExample(question, kept, answer, after_latents, len(steps) - len(kept))


def truncated_steps(steps: Sequence[Sequence[int]], num_others: int, max_length: int | None) -> list[list[int]]:
    """The steps that a length limit leaves (see [`encode_staged`]).

    Args:
        steps: ids of each step.
        num_others: tokens of question and answer.
        max_length: the limit, None for none.
    """
    total = sum(map(len, steps))
    excess = 0 if max_length is None else max(num_others + total - max_length, 0)
    kept: list[list[int]] = []
    running = 0
    for step in steps:
        running += len(step)
        if running > total - excess:
            break
        kept.append(list(step))
    return kept


def _limit(fmt: StagedFormat, max_length: int | str | None) -> int | None:
    limit = fmt.max_length if max_length == "format" else max_length
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"max_length={max_length!r} must be 'format', None (no limit) or an integer of at least 1")
    return limit


def _expand_images(text: str, image_token: str, num_image_tokens: Sequence[int]) -> str:
    first, *rest = text.split(image_token)
    return first + "".join(image_token * count + part for count, part in zip(num_image_tokens, rest, strict=True))


def _check_record(record: Record, num_image_tokens: Sequence[int], image_token: str) -> None:
    origin, images = record_origin(record), record["images"] or []
    if len(images) != len(num_image_tokens):
        raise RecordError(
            *origin, f"{len(images)} images but {len(num_image_tokens)} counts of image tokens; give one an image"
        )
    for name, texts in (
        ("question", [record["question"]]),
        ("answer", [record["answer"]]),
        ("steps", record["steps"]),
    ):
        for text in texts or []:
            if not isinstance(text, str) or not text.strip():
                raise RecordError(*origin, f"{name} holds {text!r}; it must be text that is not empty: repair the row")
    check_texts(record, origin, (image_token,))


def check_texts(
    record: Record, origin: tuple[Any, int | None], image_tokens: Sequence[str] = ("<|image_pad|>", "<image>")
) -> None:
    """Checks that no text of a record holds an image token or a latent token, which would be taken for one.

    Args:
        record: `question`, `answer`, `steps` and `choices` are looked at.
        origin: file and row that errors name.
        image_tokens: tokens of image embeddings.

    Raises:
        RecordError: for the first text that does.
    """
    for text in (record["question"], record["answer"], *(record["steps"] or []), *(record["choices"] or [])):
        token = next((token for token in (*image_tokens, *IVTLR_TOKENS.values()) if token in text), None)
        if token is not None:
            raise RecordError(*origin, f"the text {text!r:.80} contains the token {token}; remove it from the text")


def _check_tokens(tokenizer: Any, style: PromptStyle, image_token: str) -> None:
    """Image and other special tokens of a format must be single tokens of the tokenizer."""
    around = style.image.split("{image}") if image_token else []
    for token in (image_token, style.opening, *around, style.after_latents):
        if token and len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            raise ValueError(
                f"{token!r} is not one token of {type(tokenizer).__name__} ({len(tokenizer)} entries); take the "
                "tokenizer of the format's backbone or another format"
            )
