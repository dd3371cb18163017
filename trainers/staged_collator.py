"""From records to the batches of a stage curriculum (IVT-LR, arXiv 2510.12603; Coconut, arXiv 2412.06769).

A batch is made in two halves (`curriculum.py`): images and token ids do not depend on the stage, the layout does.
"""

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch.utils.data import get_worker_info

from .collators import completed_row, image_token_count, pixel_features
from .data.dynamic_batching import is_count
from .data.llava_text import pad_batch
from .data.records import Record, RecordError, open_image, open_square_image, record_from_row, record_origin
from .data.staged_text import StagedExample, StagedFormat, encode_staged
from .data.stages import StageLayout, StageTokens, expand_stage, lacks_patches, mixed_stage

logger = logging.getLogger(__name__)

PREPARED = "prepared"


@dataclass(frozen=True)
class PreparedRecord:
    """A record before it is laid out.

    Args:
        example: its token ids in pieces.
        num_image_tokens: that its blocks may copy.
        name: what draws of other stages follow from: file, row and id.
    """

    example: StagedExample
    num_image_tokens: int
    name: tuple[Any, ...]


@dataclass
class StagedCollator:
    """Collates records (see `trainers/data/records.py`) for training and evaluation at a stage.

    A record needs `question`, `answer`, `steps` (not for direct answers), and `images` for a method that looks at one.

    Args:
        processor: tokenizer, latent tokens and, for a model that sees, an image processor.
        layout: how a stage is laid out.
        fmt: how a record is written, or the name of that.
        max_length: limit in tokens, see [`encode_staged`].
        image_size: side of the square that every image is resized to before the image processor, on white where it is
            transparent (published: 280 for Qwen2-VL); `None` leaves images as they are.
        patch_images: `"all"` or `"last"` images of a record have the tokens that blocks may copy.
        needs_images: refuse records without an image.
        needs_steps: refuse records without steps.
        uniform_prob: share of records of a training batch at a stage drawn anew, see [`mixed_stage`].
        seed: of these draws.
        pad_to_multiple_of: length of a batch is rounded up to a multiple of this.
        stage: that the next batch is laid out for; a curriculum sets it.

    Returns (call):
        `input_ids`, `attention_mask`, `labels` `(batch, length)` padded on the right, `mm_token_type_ids` where the
        family has them, and what the image processor makes of the images. Latents are blocks of `patch` and `slot`
        tokens; what they are fed is worked out by the model (`latent_plan`).

    Raises:
        ValueError: a latent token that is a word of the tokenizer or missing, or an option out of its range.
        RecordError: a record without steps, without image, or with one that the model cannot see; names file and row.
    """

    processor: Any
    layout: StageLayout = field(default_factory=StageLayout)
    fmt: StagedFormat | str = "plain"
    max_length: int | str | None = "format"
    image_size: int | None = None
    patch_images: str = "all"
    needs_images: bool = False
    needs_steps: bool = True
    uniform_prob: float = 0.0
    seed: int = 0
    pad_to_multiple_of: int | None = 8
    stage: int = 0

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of is not None and not is_count(self.pad_to_multiple_of):
            raise ValueError(
                f"pad_to_multiple_of={self.pad_to_multiple_of!r} must be an integer of at least 1, or None"
            )
        if self.image_size is not None and not is_count(self.image_size):
            raise ValueError(f"image_size={self.image_size!r} must be an integer of at least 1, or None")
        self.tokens = stage_tokens(self.processor)
        if self.layout.num_patches and self.tokens.patch is None:
            raise ValueError(
                f"num_latent_patches={self.layout.num_patches}, but the processor has no token for inserted image "
                "embeddings (role 'patch'); make the model with method='ivtlr', or set num_latent_patches: 0"
            )
        self._said = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return self._batch(self.prepare(rows), epoch=None)

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Images and token ids; nothing of it depends on the stage."""
        records = [record_from_row(completed_row(row)) for row in rows]
        for record in records:
            self._check(record)
        images = [self._image(image, record) for record in records for image in record["images"] or []]
        features = pixel_features(self.processor, images, records)
        counts = iter(image_token_counts(self.processor, features, len(images)))
        per_record = [[next(counts) for _ in record["images"] or []] for record in records]
        made = [self._encoded(record, counts) for record, counts in zip(records, per_record, strict=True)]
        return {PREPARED: made, **features}

    def _image(self, image: Any, record: Record) -> Image.Image:
        if self.image_size is None:
            return open_image(image, record)
        return open_square_image(image, record, self.image_size)

    def finish(self, prepared: MutableMapping[str, Any], epoch: int) -> dict[str, torch.Tensor]:
        """The training batch of the current stage, other stages mixed in, from what [`prepare`] made."""
        return self._batch(prepared, epoch)

    def facts(self) -> dict[str, Any]:
        """What draws of other stages follow from, beside the seed: compared when a run is resumed."""
        return {"uniform_prob": self.uniform_prob}

    def _batch(self, prepared: Mapping[str, Any], epoch: int | None) -> dict[str, Any]:
        examples = [self._laid_out(record, epoch) for record in prepared[PREPARED]]
        batch = pad_batch(examples, self.processor.tokenizer.pad_token_id, self.pad_to_multiple_of or 1)
        if "mm_token_type_ids" in self.processor.model_input_names:
            batch["mm_token_type_ids"] = (batch["input_ids"] == self.processor.image_token_id).int()
        return {**batch, **{name: value for name, value in prepared.items() if name != PREPARED}}

    def _laid_out(self, record: PreparedRecord, epoch: int | None) -> dict[str, list[int]]:
        steps, stage = len(record.example.steps), self.stage
        if epoch is not None:
            stage = mixed_stage(stage, steps, self.uniform_prob, (self.seed, epoch, *record.name))
        self._say_once(record, self.layout.count(steps, stage)[1])
        return expand_stage(record.example, stage, self.layout, self.tokens, record.num_image_tokens)

    def _say_once(self, record: PreparedRecord, latents: int) -> None:
        if self._said or get_worker_info() is not None:
            return
        if lacks_patches(self.layout, latents, record.num_image_tokens):
            self._said = True
            source, row, identity = record.name
            logger.warning(
                "num_latent_patches=%s: the %s latents of %s, row %s (id %r) ask for %s image embeddings, and it has "
                "%s; all are inserted, the last latents get fewer or none (said once)",
                self.layout.num_patches, latents, source, row, identity,
                latents * self.layout.num_patches, record.num_image_tokens,
            )  # fmt: skip

    def _check(self, record: Record) -> None:
        origin = record_origin(record)
        if self.needs_steps and not record["steps"]:
            raise RecordError(
                *origin,
                f"steps is {record['steps']!r}: there is nothing that latents could replace; add the reasoning steps, "
                "drop the row, or train direct answers (staged_mode: no_cot)",
            )
        if self.needs_images and not record["images"]:
            raise RecordError(
                *origin,
                "it has no image, and the method looks at one; drop the row, or train text alone (latent_method: "
                "coconut)",
            )
        if record["images"] and getattr(self.processor, "image_processor", None) is None:
            raise RecordError(
                *origin,
                f"it has {len(record['images'])} images, and {type(self.processor).__name__} reads text alone; drop "
                "them, or take a model that sees",
            )

    def _encoded(self, record: Record, counts: Sequence[int]) -> PreparedRecord:
        example = encode_staged(record, self.processor, self.fmt, counts, max_length=self.max_length)
        free = counts[-1:] if self.patch_images == "last" else counts
        return PreparedRecord(example, sum(free), (*record_origin(record), record["id"]))


def stage_tokens(processor: Any) -> StageTokens:
    """Ids of the latent tokens of a processor.

    Raises:
        ValueError: one that is a word of the tokenizer; names role, token and remedy.
    """
    added = processor.tokenizer.get_added_vocab()
    for role, token in processor.latent_tokens.items():
        if token not in added:
            found = processor.tokenizer.convert_tokens_to_ids(token)
            raise ValueError(
                f"latent_tokens[{role!r}] = {token!r} (id {found}) is a word of the tokenizer, not a token added for "
                "latents: text would be taken for latents; give the role a token of its own"
            )
    return StageTokens(
        slot=processor.latent_token_id,
        patch=processor.latent_patch_token_id,
        start=processor.latent_start_token_id,
        end=processor.latent_end_token_id,
    )


def image_token_counts(processor: Any, features: Mapping[str, torch.Tensor], num_images: int) -> list[int]:
    """Image tokens of each image of a batch, from the output of its image processor."""
    if "image_grid_thw" in features:
        return [image_token_count(processor, grid) for grid in features["image_grid_thw"].tolist()]
    return [processor.image_seq_length] * num_images if num_images else []


__all__ = ["PreparedRecord", "StagedCollator", "image_token_counts", "stage_tokens"]
