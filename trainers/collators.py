"""From records to model inputs: text with spans, pixels, labels (card 2.3 and 2.4 of the LASER method page)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from modeling_latent import LatentProcessor

from .data.llava import check_conversation
from .data.llava_text import encode_conversation, expand_latent_placeholders, pad_batch, render_turns
from .data.records import RECORD_FIELDS, RecordError, open_image, record_from_row, record_origin

LATENT_FORMS = ("chain", "slots", "none")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_layout(latent_form: str, num_slots: int | None, pad_to_multiple_of: int | None) -> None:
    """Check the options that config and collator share.

    Raises:
        ValueError: names the option, its value and the remedy.
    """
    if latent_form not in LATENT_FORMS:
        raise ValueError(f"latent_form={latent_form!r} is unknown; choose 'chain', 'slots' or 'none'")
    if num_slots is not None and not (latent_form == "slots" and _is_count(num_slots)):
        raise ValueError(
            f"num_slots={num_slots!r} with latent_form={latent_form!r}: give an integer of at least 1 and "
            "latent_form='slots', or leave it out"
        )
    if pad_to_multiple_of is not None and not _is_count(pad_to_multiple_of):
        raise ValueError(
            f"pad_to_multiple_of={pad_to_multiple_of!r} must be an integer of at least 1, or None for no padding "
            "beyond the longest sequence"
        )


@dataclass
class LatentSFTCollator:
    """Collates records (see `trainers/data/records.py`) for supervised training.

    A record needs `images`, and `question` and `answer`, or `messages`; with `latent_form="chain"` also `chain`. It is
    a record or a row of a table; the other columns may be left out.

    Args:
        processor: tokenizer, image processor and latent tokens.
        latent_form: `"chain"` writes the concepts between the markers, `"slots"` writes slots, `"none"` leaves spans
            out (the same data without latents, for a baseline).
        num_slots: slots per span for `"slots"`; default: as many as the record has.
        pad_to_multiple_of: length of a batch is rounded up to a multiple of this.

    Returns (call):
        `input_ids`, `attention_mask`, `labels`, `mm_token_type_ids` `(batch, length)` padded on the right,
        `pixel_values` and `image_grid_thw` when there are images, and for `"slots"` an all-false `latent_mask`: there
        the slots are fed by their own embedding.

    Raises:
        ValueError: an option out of its range, or a row with a column that the schema does not have.
        RecordError: names file and row, e.g. a missing chain or an unreadable image.
    """

    processor: LatentProcessor
    latent_form: str = "chain"
    num_slots: int | None = None
    pad_to_multiple_of: int | None = 8

    def __post_init__(self) -> None:
        check_layout(self.latent_form, self.num_slots, self.pad_to_multiple_of)
        self._system_message = self.processor.default_system_message  # as the chat template writes it in decoding

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        records = [self.record(row) for row in rows]
        images = [open_image(image, record) for record in records for image in record["images"] or []]
        features = self._pixels(images, records)
        merge = self.processor.image_processor.merge_size**2 if images else 1
        counts = iter((features["image_grid_thw"].prod(dim=-1) // merge).tolist() if images else [])
        tokenizer = self.processor.tokenizer
        examples = [self.encode(record, [next(counts) for _ in record["images"] or []]) for record in records]
        batch = pad_batch(examples, tokenizer.pad_token_id, self.pad_to_multiple_of or 1)
        batch["mm_token_type_ids"] = (batch["input_ids"] == self.processor.image_token_id).int()
        if self.latent_form == "slots":
            batch["latent_mask"] = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
            slots = batch["input_ids"] == self.processor.latent_token_id
            batch["labels"] = batch["labels"].masked_fill(slots, -100)
        return {**batch, **features}

    def record(self, row: Mapping[str, Any]) -> Any:
        """The record of a row, columns that it lacks filled in; for `latent_form="none"` without its spans."""
        record = record_from_row(completed_row(row))
        return self._without_spans(record) if self.latent_form == "none" else record

    def encode(self, record: Any, num_image_tokens: list[int]) -> dict[str, list[int]]:
        """`input_ids` and `labels` of a record, whose images become `num_image_tokens` tokens each.

        Raises:
            RecordError: names file and row.
        """
        source, row = record_origin(record)
        tokens = self.processor.latent_tokens
        if self.latent_form == "chain" and record["messages"] is None and not record["chain"]:
            raise RecordError(source, row, "column 'chain' is missing; DWAL trains on its concepts: add the list")
        check_conversation(record, source, row, require_chain=self.latent_form == "chain", latent_tokens=tokens)
        form = "slots" if self.latent_form == "slots" else "chain"
        turns = render_turns(record, tokens, form, self.num_slots)
        try:
            return encode_conversation(turns, self.processor.tokenizer, num_image_tokens, self._system_message)
        except ValueError as error:
            raise RecordError(source, row, str(error)) from error

    def _pixels(self, images: list[Image.Image], records: list[Any]) -> dict[str, torch.Tensor]:
        """Output of the image processor for all images of the batch; nothing for a batch of text."""
        if not images:
            return {}
        try:
            return dict(self.processor.image_processor(images=images, return_tensors="pt"))
        except ValueError:
            owners = [record for record in records for _ in record["images"] or []]
            for image, record in zip(images, owners, strict=True):
                try:
                    self.processor.image_processor(images=[image], return_tensors="pt")
                except ValueError as error:
                    reason = f"an image of {image.width}x{image.height} pixels cannot be processed ({error}); drop it"
                    raise RecordError(*record_origin(record), reason) from error
            raise

    def _without_spans(self, record: Any) -> Any:
        """The record with responses that hold neither placeholders nor written-out spans."""
        messages = record["messages"]
        if messages is not None:
            start, end = (re.escape(self.processor.latent_tokens[role]) for role in ("start", "end"))
            span = re.compile(f"{start}.*?{end}", re.DOTALL)
            messages = [
                {**turn, "content": expand_latent_placeholders(span.sub("", turn["content"]), "", "", "")}
                if turn["role"] == "assistant"
                else turn
                for turn in messages
            ]
        return {**record, "chain": None, "messages": messages}


def completed_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the columns that it lacks; a conversation needs no question and answer beside it."""
    empty = dict.fromkeys(RECORD_FIELDS) | {"id": ""}
    if row.get("messages") is not None:
        empty.update(question="", answer="")
    return {**empty, **row}
