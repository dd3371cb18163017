"""From records to model inputs: text with spans, pixels, labels (card 2.3 and 2.4 of the LASER method page)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from modeling_latent import LatentProcessor

from .data.llava import check_conversation
from .data.llava_text import encode_conversation, expand_latent_placeholders, pad_batch, render_turns
from .data.records import RecordError, record_from_row, record_origin


@dataclass
class LatentSFTCollator:
    """Collates records (see `trainers/data/records.py`) for supervised training.

    A record needs `images`, `question` and `answer`, or `messages`; with `latent_form="chain"` also `chain`.

    Args:
        processor: tokenizer, image processor and latent tokens.
        latent_form: `"chain"` writes the concepts between the markers, `"slots"` writes slots, `"none"` leaves spans
            out (the same data without latents, for a baseline).
        num_slots: slots per span for `"slots"`; default: as many as the record has.
        pad_to_multiple_of: length of a batch is rounded up to a multiple of this.

    Returns (call):
        `input_ids`, `attention_mask`, `labels`, `mm_token_type_ids` `(batch, length)` padded on the right,
        `pixel_values`
        and `image_grid_thw` when there are images, and for `"slots"` an all-false `latent_mask`: there the slots are
        fed by their own embedding.

    Raises:
        RecordError: names file and row, e.g. a missing chain or an unreadable image.
    """

    processor: LatentProcessor
    latent_form: str = "chain"
    num_slots: int | None = None
    pad_to_multiple_of: int | None = 8

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        records = [record_from_row(row) for row in rows]
        if self.latent_form == "none":
            records = [_without_spans(record) for record in records]
        images = [self._open(image, record) for record in records for image in record["images"]]
        features = dict(self.processor.image_processor(images=images, return_tensors="pt")) if images else {}
        merge = self.processor.image_processor.merge_size**2 if images else 1
        counts = iter((features["image_grid_thw"].prod(dim=-1) // merge).tolist() if images else [])
        tokenizer = self.processor.tokenizer
        examples = [self._encode(record, [next(counts) for _ in record["images"]]) for record in records]
        batch = pad_batch(examples, tokenizer.pad_token_id, self.pad_to_multiple_of or 1)
        batch["mm_token_type_ids"] = (batch["input_ids"] == self.processor.image_token_id).int()
        if self.latent_form == "slots":
            batch["latent_mask"] = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
            slots = batch["input_ids"] == self.processor.latent_token_id
            batch["labels"] = batch["labels"].masked_fill(slots, -100)
        return {**batch, **features}

    def _encode(self, record: Any, num_image_tokens: list[int]) -> dict[str, list[int]]:
        source, row = record_origin(record)
        tokens = self.processor.latent_tokens
        if record["messages"] is None:
            if self.latent_form == "chain" and not record["chain"]:
                raise RecordError(source, row, "column 'chain' is missing; DWAL trains on its concepts: add the list")
            check_conversation(record, source, row, require_chain=self.latent_form == "chain", latent_tokens=tokens)
        form = "slots" if self.latent_form == "slots" else "chain"
        turns = render_turns(record, tokens, form, self.num_slots)
        try:
            return encode_conversation(turns, self.processor.tokenizer, num_image_tokens)
        except ValueError as error:
            raise RecordError(source, row, str(error)) from error

    @staticmethod
    def _open(image: Any, record: Any) -> Image.Image:
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        source, row = record_origin(record)
        try:
            with Image.open(image) as file:
                return file.convert("RGB")
        except (OSError, ValueError) as error:
            raise RecordError(
                source, row, f"image {image!r} cannot be read ({error}); fix the path or the file"
            ) from error


def _without_spans(record: Any) -> Any:
    messages = record["messages"]
    if messages is not None:
        messages = [{**turn, "content": expand_latent_placeholders(turn["content"], "", "", "")} for turn in messages]
    return {**record, "chain": None, "messages": messages}
