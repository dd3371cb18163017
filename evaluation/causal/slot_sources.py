"""Where edits of slots get image embeddings and oracle vectors from: the model's own vision tower."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from trainers.data.boxes import region_tokens
from trainers.data.records import Record, record_origin

from .contexts import CleanItem


class ItemImages(NamedTuple):
    """Image embeddings of an item: `(n, H)` rows in the order of the image tokens, rows and columns of every image."""

    embeds: torch.Tensor
    grids: tuple[tuple[int, int], ...]


@torch.no_grad()
def image_embeddings(
    model: PreTrainedModel, processor: ProcessorMixin, records: Sequence[Record], batch_size: int = 16
) -> list[ItemImages | None]:
    """What the model reads at the image tokens of each record, None for a record without images; on the CPU.

    Args:
        model: a latent model with a vision tower.
        processor: its processor.
        records: with open images.
        batch_size: records encoded together.
    """
    found: list[ItemImages | None] = [None] * len(records)
    places = [place for place, record in enumerate(records) if record["images"]]
    if not places or not hasattr(processor, "image_processor"):
        return found
    for first in range(0, len(places), batch_size):
        part = places[first : first + batch_size]
        images = [image for place in part for image in records[place]["images"]]
        inputs = processor.image_processor(images=images, return_tensors="pt").to(model.device)
        encoded = model.model.encode_images(**inputs)
        rows = model.model.image_rows(encoded).float().cpu()
        grids = _grids(inputs, processor, len(images), len(rows))
        start = image = 0
        for place in part:
            own = grids[image : image + len(records[place]["images"])]
            count = sum(height * width for height, width in own)
            found[place] = ItemImages(rows[start : start + count], tuple(own))
            start, image = start + count, image + len(own)
    return found


def _grids(inputs: dict, processor: ProcessorMixin, images: int, rows: int) -> list[tuple[int, int]]:
    """Rows and columns of image tokens of each image; a square where the family has one size."""
    if inputs.get("image_grid_thw") is not None:
        merge = processor.image_processor.merge_size
        return [(height // merge, width // merge) for _, height, width in inputs["image_grid_thw"].tolist()]
    side = round((rows // images) ** 0.5)
    return [(side, side)] * images


def oracle_vectors(item: CleanItem | Record, images: ItemImages | None) -> torch.Tensor | None:
    """`(m, H)` embeddings of the image tokens inside the boxes of a record (LVR's targets, arXiv 2509.24251), in the
    order of the boxes; None without boxes or images."""
    record = item.record if isinstance(item, CleanItem) else item
    if images is None or not record.get("boxes"):
        return None
    grids = [(1, height, width) for height, width in images.grids]
    regions = region_tokens(record["boxes"], grids, 1, origin=record_origin(record))
    return images.embeds[torch.as_tensor(np.concatenate(regions))]


__all__ = ["ItemImages", "image_embeddings", "oracle_vectors"]
