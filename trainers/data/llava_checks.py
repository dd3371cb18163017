"""Checks of a record in the conversation format of LASER: what makes a row bad, and what to do about it.

Paper: "Forest Before Trees: Latent Superposition for Efficient Visual Reasoning", arXiv 2601.06803 (card 2.2 to 2.4).
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .llava_text import (
    IMAGE_PAD,
    IMAGE_PLACEHOLDER,
    IMAGE_TEXT,
    LASER_TOKENS,
    LATENT_PLACEHOLDER,
    missing_chain_reason,
    record_form,
    record_messages,
    slot_run,
)
from .records import Record, RecordError, validate_record


def is_url(name: str | os.PathLike) -> bool:
    """Whether an image name is a URL (which is never joined to a folder, and never looked up by the reader)."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(name)) is not None


def check_conversation(
    record: Record,
    source: str | os.PathLike,
    row: int | None,
    require_chain: bool = True,
    latent_tokens: Mapping[str, str] = LASER_TOKENS,
) -> None:
    """Checks that a record can be rendered and trained on as the method means it.

    Raises:
        RecordError: for wrong field types; turns that do not end with, or alternate towards, the assistant; images and
            `<image>` placeholders that differ in number, lie in several turns or in a response; a missing image file;
            a latent token or placeholder in a prompt; a missing or empty chain (with `require_chain`); a marker inside
            a concept; a chain without `<laser>` in any response; markers that do not pair.
    """
    validate_record(record, source, row)
    messages = record_messages(record)
    problems = itertools.chain(
        turn_problems(messages),
        image_problems(messages, record["images"]),
        prompt_problems(messages, latent_tokens),
        _chain_problems(record, require_chain, latent_tokens),
        _response_problems(record, messages, latent_tokens),
    )
    problem = next(problems, None)
    if problem is not None:
        raise RecordError(source, row, problem)


def turn_problems(messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Turns that do not end with the assistant's, or responses without a prompt."""
    roles = [turn["role"] for turn in messages]
    if not roles or roles[-1] != "assistant":
        yield f"the last turn must be the assistant's ('gpt'), got roles {roles}; add the response or drop the turn"
    for previous, role in zip([None, *roles], roles, strict=False):
        if role == "assistant" and previous in (None, "system", "assistant"):
            yield f"a response must follow a prompt, got roles {roles}; join or drop turns"


def image_problems(messages: Sequence[Mapping[str, str]], images: Sequence[Any]) -> Iterator[str]:
    """Images and `<image>` that do not match or stand in the wrong place, image tokens in the text, missing files."""
    for turn in messages:
        written = next(
            (token for token in (IMAGE_PAD, *IMAGE_TEXT.split(IMAGE_PAD)) if token in turn["content"]), None
        )
        if written:
            yield f"the text contains the image token {written}; write {IMAGE_PLACEHOLDER}: {turn['content']!r:.80}"
    holding = [turn for turn in messages if IMAGE_PLACEHOLDER in turn["content"]]
    found = sum(turn["content"].count(IMAGE_PLACEHOLDER) for turn in holding)
    if found != len(images):
        yield f"{found} {IMAGE_PLACEHOLDER} placeholders but {len(images)} images; write one for each image"
    if len(holding) > 1:
        yield (
            f"{IMAGE_PLACEHOLDER} stands in {len(holding)} turns; all images must sit in one turn, because the "
            "processor gets all images of a record together with that turn; move the placeholders to the first prompt"
        )
    if any(turn["role"] == "assistant" for turn in holding):
        yield f"{IMAGE_PLACEHOLDER} stands in a response; images belong to a prompt"
    for image in images:
        if isinstance(image, str | os.PathLike) and not is_url(image) and not os.path.isfile(image):
            yield f"image file {os.fspath(image)!r} does not exist; check image_folder, or remove the record"


def prompt_problems(
    messages: Sequence[Mapping[str, str]], latent_tokens: Mapping[str, str], placeholder: str = LATENT_PLACEHOLDER
) -> Iterator[str]:
    """Latent tokens or placeholders in a turn that is not the assistant's."""
    for turn in messages:
        marker = _marker_in(turn["content"], latent_tokens, placeholder) if turn["role"] != "assistant" else None
        if marker:
            yield (
                f"the {turn['role']} turn contains {marker}, which only responses may hold (a region in a prompt "
                f"would be trained and hand out the answer); remove it: {turn['content']!r:.80}"
            )


def _marker_in(text: str, latent_tokens: Mapping[str, str], placeholder: str = LATENT_PLACEHOLDER) -> str | None:
    return next((marker for marker in (*latent_tokens.values(), placeholder) if marker in text), None)


def _chain_problems(record: Record, require_chain: bool, latent_tokens: Mapping[str, str]) -> Iterator[str]:
    chain = record["chain"]
    if require_chain and not chain:
        yield missing_chain_reason(record_form(record, latent_tokens))
    for concept in chain or []:
        marker = _marker_in(concept, latent_tokens) or (IMAGE_PLACEHOLDER if IMAGE_PLACEHOLDER in concept else None)
        if marker:
            yield f"the concept {concept!r} of the chain contains {marker}; remove the marker from 'reasoning_chain'"


def _response_problems(
    record: Record, messages: Sequence[Mapping[str, str]], latent_tokens: Mapping[str, str]
) -> Iterator[str]:
    replies = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    start, end = re.escape(latent_tokens["start"]), re.escape(latent_tokens["end"])
    if record["chain"] is not None:
        if not any(LATENT_PLACEHOLDER in text for text in replies):
            yield f"a chain is given but no response contains {LATENT_PLACEHOLDER}; write it where the region belongs"
        written = next((token for token in latent_tokens.values() for text in replies if token in text), None)
        if written:
            yield f"a chain is given but a response contains {written}, so regions nest; write {LATENT_PLACEHOLDER}"
        return
    for text in replies:
        rest = slot_run(latent_tokens).sub("", text)
        if LATENT_PLACEHOLDER in rest and any(token in rest for token in latent_tokens.values()):
            yield f"{LATENT_PLACEHOLDER} and written-out latent tokens are mixed; use one of them: {text!r:.120}"
        unpaired = re.sub(rf"{start}(?:(?!{start}).)*?{end}", "", text, flags=re.DOTALL)
        if any(token in unpaired for token in latent_tokens.values()):
            yield f"latent markers do not pair ({latent_tokens['start']} ... {latent_tokens['end']}): {text!r:.120}"
