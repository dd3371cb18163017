"""From records to model inputs: text with spans, pixels, labels (card 2.3 and 2.4 of the LASER method page)."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from modeling_latent import LatentProcessor

from .data.dynamic_batching import is_count
from .data.llava import check_conversation
from .data.llava_text import encode_conversation, expand_latent_placeholders, pad_batch, render_turns
from .data.lvr import check_regions
from .data.lvr_text import RegionLayout, render_regions
from .data.records import RECORD_FIELDS, RecordError, open_image, record_from_row, record_origin
from .losses.roi_regression import roi_token_index

LATENT_FORMS = ("chain", "slots", "regions", "learned", "none")


def check_layout(latent_form: str, num_slots: int | None, pad_to_multiple_of: int | None) -> None:
    """Check the options that config and collator share.

    Raises:
        ValueError: names the option, its value and the remedy.
    """
    if latent_form not in LATENT_FORMS:
        raise ValueError(
            f"latent_form={latent_form!r} is unknown; choose 'chain', 'slots', 'regions', 'learned' or 'none'"
        )
    if num_slots is not None and not (latent_form == "slots" and is_count(num_slots)):
        raise ValueError(
            f"num_slots={num_slots!r} with latent_form={latent_form!r}: give an integer of at least 1 and "
            "latent_form='slots', or leave it out"
        )
    if pad_to_multiple_of is not None and not is_count(pad_to_multiple_of):
        raise ValueError(
            f"pad_to_multiple_of={pad_to_multiple_of!r} must be an integer of at least 1, or None for no padding "
            "beyond the longest sequence"
        )


@dataclass
class LatentSFTCollator:
    """Collates records (see `trainers/data/records.py`) for supervised training.

    A record needs `images`, and `question` and `answer`, or `messages`; with `latent_form="chain"` also `chain`, with
    `"regions"` also `boxes`. It is a record or a row of a table; the other columns may be left out.

    Args:
        processor: tokenizer, image processor and latent tokens.
        latent_form: `"chain"` writes the concepts between the markers, `"slots"` writes slots, `"regions"` a slot for
            each image token of a box, `"none"` leaves spans out (the same data without latents, for a baseline).
        num_slots: slots per span for `"slots"`; default: as many as the record has.
        pad_to_multiple_of: length of a batch is rounded up to a multiple of this.
        region_layout, empty_region, join_regions: for `"regions"`, see `data/lvr_text.render_regions`.

    Returns (call):
        `input_ids`, `attention_mask`, `labels`, `mm_token_type_ids` `(batch, length)` padded on the right,
        `pixel_values` and `image_grid_thw` when there are images, for `"slots"` an all-false `latent_mask`: there
        the slots are fed by their own embedding, and for `"regions"` `region_index` `(batch, length)`: at a slot the
        place of its image token among all image embeddings of the batch, in order, elsewhere -1.

    Raises:
        ValueError: an option out of its range, a processor without the chat format of the Qwen-VL families, or a row
            with a column that the schema does not have.
        RecordError: names file and row, e.g. a missing chain or an unreadable image.
    """

    forms: ClassVar[tuple[str, ...]] = ("chain", "slots", "regions", "none")

    processor: LatentProcessor
    latent_form: str = "chain"
    num_slots: int | None = None
    pad_to_multiple_of: int | None = 8
    region_layout: RegionLayout = RegionLayout()
    empty_region: str = "one_token"
    join_regions: bool = False

    def __post_init__(self) -> None:
        check_layout(self.latent_form, self.num_slots, self.pad_to_multiple_of)
        if self.latent_form not in self.forms:
            raise ValueError(
                f"{type(self).__name__} does not lay out latent_form={self.latent_form!r}; choose one of "
                f"{list(self.forms)}, or the config of the method that has it ('learned': LavitSFTConfig)"
            )
        if not hasattr(type(self.processor), "default_system_message"):
            raise ValueError(
                f"latent_form={self.latent_form!r} is written in the chat format of the Qwen-VL families, which "
                f"{type(self.processor).__name__} does not have; train a model of one of them, or use the stages of "
                "StagedSFTConfig (latent_method: ivtlr or coconut)"
            )
        self._system_message = self.processor.default_system_message  # as the chat template writes it in decoding

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        records = [self.record(row) for row in rows]
        images = [open_image(image, record) for record in records for image in record["images"] or []]
        features = pixel_features(self.processor, images, records)
        grids = iter(features["image_grid_thw"].tolist() if images else [])
        per_record = [[next(grids) for _ in record["images"] or []] for record in records]
        examples = [self.encode(record, grids) for record, grids in zip(records, per_record, strict=True)]
        batch = pad_batch(examples, self.processor.tokenizer.pad_token_id, self.pad_to_multiple_of or 1)
        batch["mm_token_type_ids"] = (batch["input_ids"] == self.processor.image_token_id).int()
        slots = batch["input_ids"] == self.processor.latent_token_id
        if self.latent_form == "slots":
            batch["latent_mask"] = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
            batch["labels"] = batch["labels"].masked_fill(slots, -100)
        if self.latent_form == "regions":
            batch["region_index"] = self._region_index(examples, per_record, slots)
        return {**batch, **features}

    def _region_index(
        self, examples: Sequence[Mapping[str, Any]], grids: Sequence[Sequence[Sequence[int]]], slots: torch.BoolTensor
    ) -> torch.LongTensor:
        """`(batch, length)`: where the image token of each slot lies among the image embeddings of the batch."""
        regions = [np.concatenate([np.zeros(0, np.int64), *example["regions"]]) for example in examples]
        index = roi_token_index(
            torch.from_numpy(np.concatenate(regions)),
            torch.tensor([len(region) for region in regions]),
            torch.tensor([sum(image_token_count(self.processor, grid) for grid in row) for row in grids]),
        )
        return torch.full(slots.shape, -1).masked_scatter(slots, index)

    def record(self, row: Mapping[str, Any]) -> Any:
        """The record of a row, columns that it lacks filled in; for `latent_form="none"` without its spans."""
        record = record_from_row(completed_row(row))
        return self._without_spans(record) if self.latent_form == "none" else record

    def encode(self, record: Any, grids_thw: Sequence[Sequence[int]]) -> dict[str, Any]:
        """`input_ids` and `labels` of a record whose images have these grids of patches; for `"regions"` also
        `regions`, for each span the image tokens (counted over all images of the record) that its slots stand for.

        Raises:
            RecordError: names file and row.
        """
        source, row = record_origin(record)
        turns, more = self._regions(record, grids_thw) if self.latent_form == "regions" else (self._turns(record), {})
        counts = [image_token_count(self.processor, grid) for grid in grids_thw]
        try:
            return {**encode_conversation(turns, self.processor.tokenizer, counts, self._system_message), **more}
        except ValueError as error:
            raise RecordError(source, row, str(error)) from error

    def _turns(self, record: Any) -> list[tuple[str, str]]:
        source, row = record_origin(record)
        tokens = self.processor.latent_tokens
        if self.latent_form == "chain" and record["messages"] is None and not record["chain"]:
            raise RecordError(source, row, "column 'chain' is missing; DWAL trains on its concepts: add the list")
        check_conversation(record, source, row, require_chain=self.latent_form == "chain", latent_tokens=tokens)
        form = "slots" if self.latent_form == "slots" else "chain"
        return render_turns(record, tokens, form, self.num_slots)

    def _regions(
        self, record: Any, grids_thw: Sequence[Sequence[int]]
    ) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        source, row = record_origin(record)
        tokens = self.processor.latent_tokens
        if record["messages"] is None and record["boxes"] is None:
            raise RecordError(
                source, row, "column 'boxes' is missing; LVR trains on regions: add them, or [] for a record without"
            )
        if not (self.region_layout.restart_regions or self.region_layout.drop_surplus):
            check_regions(record, source, row, tokens, self.join_regions)
        merge = self.processor.image_processor.merge_size
        layout, options = self.region_layout, (self.empty_region, self.join_regions)
        turns, regions = render_regions(record, grids_thw, merge, layout, tokens, *options)
        return turns, {"regions": regions}

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


def image_token_count(processor: Any, grid_thw: Sequence[int]) -> int:
    """Tokens of an image of so many patches (frames, rows, columns)."""
    return math.prod(grid_thw) // processor.image_processor.merge_size**2


def pixel_features(processor: Any, images: list[Image.Image], records: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Output of the image processor for all images of a batch; nothing for a batch of text.

    Args:
        processor: of the model.
        images: of all records, in order.
        records: whose they are, for messages.

    Raises:
        RecordError: an image that cannot be processed; names file and row.
    """
    if not images:
        return {}
    try:
        return dict(processor.image_processor(images=images, return_tensors="pt"))
    except ValueError:
        owners = [record for record in records for _ in record["images"] or []]
        for image, record in zip(images, owners, strict=True):
            try:
                processor.image_processor(images=[image], return_tensors="pt")
            except ValueError as error:
                reason = f"an image of {image.width}x{image.height} pixels cannot be processed ({error}); drop it"
                raise RecordError(*record_origin(record), reason) from error
        raise


def completed_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the columns that it lacks; a conversation needs no question and answer beside it."""
    empty = dict.fromkeys(RECORD_FIELDS) | {"id": ""}
    if row.get("messages") is not None:
        empty.update(question="", answer="")
    return {**empty, **row}
