"""From a record to the text of its turns, and from text to token ids and labels, in the layout of the LASER data.

Paper: "Forest Before Trees: Latent Superposition for Efficient Visual Reasoning", arXiv 2601.06803 (card 2.3, 2.4).

The one deviation from the reference: the chain replaces `<laser>` literally (there it is a regex template).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from .records import Record, RecordError, record_origin

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


# Role to token, in the order in which the tokens are added (equal to the table of methods in modeling_latent).
LASER_TOKENS: dict[str, str] = {"start": "<|laser_start|>", "slot": "<|laser|>", "end": "<|laser_end|>"}
LATENT_PLACEHOLDER = "<laser>"
IMAGE_PLACEHOLDER = "<image>"
IMAGE_PAD = "<|image_pad|>"
IMAGE_TEXT = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"
DEFAULT_SYSTEM_MESSAGE = "You are a helpful assistant."
IGNORE_INDEX = -100

_IMAGE = re.compile(r"\n?<image>\n?")
_LATENT = re.compile(r"\n?<laser>\n?")


def expand_image_placeholders(text: str, image_text: str = IMAGE_TEXT) -> str:
    """Replaces each `<image>`, with at most one newline on each side, by the vision block."""
    return _IMAGE.sub(lambda _: image_text, text)


def expand_latent_placeholders(
    text: str, chain_text: str, start: str = LASER_TOKENS["start"], end: str = LASER_TOKENS["end"]
) -> str:
    """Replaces each `<laser>`, with at most one newline on each side, by start + chain_text + end, literally.

    The whole chain stands at every placeholder; no space follows the start marker.
    """
    return _LATENT.sub(lambda _: start + chain_text + end, text)


def expand_slot_placeholders(
    text: str,
    counts: int | Sequence[int | None],
    latent_tokens: Mapping[str, str] = LASER_TOKENS,
    placeholder: str = LATENT_PLACEHOLDER,
    keep_text_before: bool = False,
    drop_surplus: bool = False,
) -> str:
    """The references' placeholder mode: the i-th placeholder becomes start + counts[i] slots + end.

    As published, text before the first placeholder is dropped and newlines around placeholders stay.

    Args:
        text: one turn.
        counts: number of slots for each placeholder, or one number for all; None leaves a span out.
        latent_tokens: role to token; a token of the role `latent_end` stands between the last slot and the end.
        placeholder: what stands for a span.
        keep_text_before: keep what stands before the first placeholder.
        drop_surplus: leave out placeholders without a count, each with the text behind it (the published LVR layout).

    Raises:
        ValueError: when a count is missing (without `drop_surplus`) or negative.
    """
    first, *following = text.split(placeholder)
    if not following:
        return first
    counts = [counts] * len(following) if isinstance(counts, int) else list(counts)[: len(following)]
    if (len(counts) < len(following) and not drop_surplus) or any(k is not None and k < 0 for k in counts):
        raise ValueError(f"{len(following)} {placeholder} placeholders need as many counts >= 0, got {counts}")
    spans = (_slots(k, latent_tokens) + part for k, part in zip(counts, following, strict=False))
    return (first if keep_text_before else "") + "".join(spans)


def _slots(count: int | None, latent_tokens: Mapping[str, str]) -> str:
    if count is None:
        return ""
    last = latent_tokens.get("latent_end", "")
    return latent_tokens["start"] + latent_tokens["slot"] * count + last + latent_tokens["end"]


def slot_run(latent_tokens: Mapping[str, str]) -> re.Pattern:
    """`<start><laser>...<laser><end>`, the form of the README sample (card 2.3)."""
    start, end = re.escape(latent_tokens["start"]), re.escape(latent_tokens["end"])
    return re.compile(rf"{start}\s*((?:{LATENT_PLACEHOLDER}\s*)+){end}")


def record_messages(record: Record) -> list[dict[str, str]]:
    """The record's turns; for a record that was not published as a conversation, one pair as in the LASER data."""
    if record["messages"] is not None:
        return record["messages"]
    images = IMAGE_PLACEHOLDER * len(record["images"]) + ("\n" if record["images"] else "")
    region = LATENT_PLACEHOLDER if record["chain"] is not None else ""
    return [
        {"role": "user", "content": images + record["question"]},
        {"role": "assistant", "content": f"{region}<answer>{record['answer']}</answer>"},
    ]


def record_form(record: Record, latent_tokens: Mapping[str, str] = LASER_TOKENS) -> str:
    """How the record says where its latent regions are.

    Returns:
        `"chain"`: a reasoning chain is given, `<laser>` stands for it.
        `"slots"`: no chain; explicit markers with several `<laser>` between them (the README sample of card 2.4).
        `"placeholder"`: no chain; bare `<laser>` without markers.
        `"explicit"`: no chain and no `<laser>`; the markers are written out in an assistant turn.
        `"plain"`: none of these, ordinary text.
    """
    if record["chain"] is not None:
        return "chain"
    replies = [turn["content"] for turn in record_messages(record) if turn["role"] == "assistant"]
    if any(slot_run(latent_tokens).search(text) for text in replies):
        return "slots"
    if any(LATENT_PLACEHOLDER in text for text in replies):
        return "placeholder"
    if any(token in text for text in replies for token in latent_tokens.values()):
        return "explicit"
    return "plain"


def missing_chain_reason(form: str) -> str:
    return (
        f"required column 'reasoning_chain' is missing or empty (record form {form!r}); DWAL trains on its concepts: "
        "add the list, or read with require_chain=False and train with latent_form='slots' on k fixed slots"
    )


def render_turns(
    record: Record,
    latent_tokens: Mapping[str, str] = LASER_TOKENS,
    latent_form: str = "chain",
    num_slots: int | None = None,
) -> list[tuple[str, str]]:
    """The fully expanded text of every turn, as `(role, text)`.

    Args:
        record: a record with or without `messages`.
        latent_tokens: role (`start`, `slot`, `end`) to token string.
        latent_form: `"chain"` writes the concepts between the markers (DWAL); `"slots"` writes `num_slots` slots.
        num_slots: slots of each region in form `"slots"`; None takes the number of `<laser>` between explicit markers.

    Raises:
        RecordError: when the record does not have what the form needs (a chain, or a number of slots).
        ValueError: for an unknown form or a negative number of slots.
    """
    if latent_form not in ("chain", "slots"):
        raise ValueError(f"unknown latent_form {latent_form!r}; choose 'chain' (DWAL) or 'slots' (k fixed slots)")
    if num_slots is not None and num_slots < 0:
        raise ValueError(f"num_slots must be 0 or more, got {num_slots!r}")
    form, origin = record_form(record, latent_tokens), record_origin(record)
    if latent_form == "chain" and form in ("slots", "placeholder"):
        raise RecordError(*origin, missing_chain_reason(form))
    turns = []
    for turn in record_messages(record):
        text = expand_image_placeholders(turn["content"])
        if latent_form == "slots":
            text = _render_slots(text, latent_tokens, num_slots, origin)
        elif form == "chain":
            text = expand_latent_placeholders(
                text, " ".join(record["chain"]), latent_tokens["start"], latent_tokens["end"]
            )
        turns.append((turn["role"], text))
    return turns


def _render_slots(
    text: str, latent_tokens: Mapping[str, str], num_slots: int | None, origin: tuple[str, int | None]
) -> str:
    def explicit(match: re.Match) -> str:
        count = match.group(1).count(LATENT_PLACEHOLDER) if num_slots is None else num_slots
        return _slots(count, latent_tokens)

    text = slot_run(latent_tokens).sub(explicit, text)
    if LATENT_PLACEHOLDER in text and num_slots is None:
        raise RecordError(
            *origin, f"a bare {LATENT_PLACEHOLDER} does not say how many slots it stands for; give num_slots"
        )
    return _LATENT.sub(lambda _: _slots(num_slots, latent_tokens), text)


# From text to ids and labels (card 2.4)


def encode_conversation(
    turns: Sequence[tuple[str, str]],
    tokenizer: "PreTrainedTokenizerBase",
    num_image_tokens: Sequence[int] = (),
    system_message: str | None = DEFAULT_SYSTEM_MESSAGE,
    image_pad: str = IMAGE_PAD,
) -> dict[str, list[int]]:
    """Token ids and labels of a conversation in the ChatML layout of the Qwen-VL models.

    The prefix (system message), each prompt (up to and with `<|im_start|>assistant\\n`) and each response (with its
    `<|im_end|>\\n`) are tokenised separately and joined, no token added. Only responses have labels.

    Args:
        turns: `(role, text)` with image placeholders expanded; a first turn `system` replaces `system_message`.
        tokenizer: the tokenizer with the latent tokens added.
        num_image_tokens: for each image in order, how many copies its image pad expands to (t * h * w / 4).
        system_message: text of the prefix; `None` for none, as in Qwen3-VL (`LatentProcessor.default_system_message`).
        image_pad: token of an image embedding.

    Returns:
        `{"input_ids": [length], "labels": [length]}`, labels -100 outside responses.

    Raises:
        ValueError: when image pads and `num_image_tokens` differ in number, or no response ends the conversation.
    """
    counts = iter(num_image_tokens)
    found = sum(text.count(image_pad) for _, text in turns)
    if found != len(num_image_tokens):
        raise ValueError(
            f"{found} image pads in the text but {len(num_image_tokens)} images; give one count an image pad"
        )
    input_ids: list[int] = []
    labels: list[int] = []
    for text, is_response in _pieces(turns, system_message):
        first, *rest = text.split(image_pad)
        text = first + "".join(image_pad * next(counts) + part for part in rest)
        ids = tokenizer.encode(text, add_special_tokens=False)
        input_ids += ids
        labels += ids if is_response else [IGNORE_INDEX] * len(ids)
    return {"input_ids": input_ids, "labels": labels}


def _pieces(turns: Sequence[tuple[str, str]], system_message: str | None) -> Iterator[tuple[str, bool]]:
    """The separately tokenised texts, and whether each is trained on."""
    turns = list(turns)
    if turns and turns[0][0] == "system":
        system_message = turns.pop(0)[1]
    if not turns or turns[-1][0] != "assistant":
        raise ValueError(
            f"the last turn must be of role 'assistant', got {[role for role, _ in turns]}; add the response"
        )
    if system_message is not None:
        yield f"<|im_start|>system\n{system_message}<|im_end|>\n", False
    prompt = ""
    for role, text in turns:
        if role == "assistant":
            yield prompt + "<|im_start|>assistant\n", False
            yield f"{text}<|im_end|>\n", True
            prompt = ""
        else:
            prompt += f"<|im_start|>{role}\n{text}<|im_end|>\n"


def pad_batch(
    examples: Sequence[Mapping[str, Sequence[int]]], pad_token_id: int, multiple_of: int = 8
) -> dict[str, "torch.Tensor"]:
    """Pads encoded conversations on the right to one length, a multiple of `multiple_of`.

    Returns:
        `input_ids` (padding `pad_token_id`), `labels` (padding -100) and `attention_mask` (padding 0), each
        `[batch, length]` int64.

    Raises:
        ValueError: for an empty batch, or `multiple_of` below 1.
    """
    import torch

    if not examples or multiple_of < 1:
        raise ValueError(f"need at least one example and multiple_of >= 1, got {len(examples)} and {multiple_of}")
    longest = max(len(example["input_ids"]) for example in examples)
    length = -(-longest // multiple_of) * multiple_of
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for example in examples:
        size = len(example["input_ids"])
        columns["input_ids"].append([*example["input_ids"], *[pad_token_id] * (length - size)])
        columns["labels"].append([*example["labels"], *[IGNORE_INDEX] * (length - size)])
        columns["attention_mask"].append([1] * size + [0] * (length - size))
    return {name: torch.tensor(rows, dtype=torch.long) for name, rows in columns.items()}
