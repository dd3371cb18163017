"""Blocks that were laid out in a sequence: where they are, which image tokens they copy, and rows moved side by side.

A block is a latent step of IVT-LR (arXiv 2510.12603): `k` inserted image embeddings and a slot; in Coconut (arXiv
2412.06769) the slot alone. `latent_plan.py` runs them.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

PATCH_ORDERS = ("score", "index_then_kth")


def padded_positions(attention_mask: torch.LongTensor) -> torch.LongTensor:
    """`(batch, length)` index of each position among those that are no padding; 0 at padding before them."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


class AlignedRows:
    """Rows moved to the right by `shift` `(batch,)`, cut or filled with zeros to `width`."""

    def __init__(self, shift: torch.LongTensor, width: int) -> None:
        self.shift, self.width = shift, width
        self.source = torch.arange(width, device=shift.device) - shift.unsqueeze(1)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """`(batch, length[, hidden])`, or `(channels, batch, length)` flattened over the first two, to `width`."""
        return _gathered(values, self.source.repeat(values.shape[0] // len(self.shift), 1))

    def undo(self, values: torch.Tensor, length: int) -> torch.Tensor:
        """Rows `(batch, width[, hidden])` moved back, `length` positions of each."""
        source = torch.arange(length, device=values.device) + self.shift.to(values.device).unsqueeze(1)
        return _gathered(values, source)


def _gathered(values: torch.Tensor, source: torch.LongTensor) -> torch.Tensor:
    inside = (source >= 0) & (source < values.shape[1])
    index = source.clamp(0, values.shape[1] - 1)
    rows = torch.arange(len(values), device=values.device).unsqueeze(1)
    inside = inside.unsqueeze(-1) if values.dim() == 3 else inside
    return torch.where(inside, values[rows, index], torch.zeros((), dtype=values.dtype, device=values.device))


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of a batch are; `N` blocks in the order of rows and columns, all tensors on the CPU.

    Args:
        row, index: `(N,)` row, and number of blocks before it in its row.
        start, slot: `(N,)` first column of the block, and column of its slot.
        patch: `(N,)` first column of its inserted embeddings.
        count: `(N,)` how many there are.
    """

    row: torch.LongTensor
    index: torch.LongTensor
    start: torch.LongTensor
    slot: torch.LongTensor
    patch: torch.LongTensor
    count: torch.LongTensor


def find_blocks(slots: torch.BoolTensor, patches: torch.BoolTensor, vision_first: bool = True) -> Blocks:
    """The blocks of a batch.

    Args:
        slots, patches: `(B, T)` where slots are, and inserted image embeddings.
        vision_first: the embeddings stand before the slot of their block, else behind it.

    Raises:
        ValueError: an inserted embedding without its slot, or a row that begins with a block; names row and position.
    """
    slot, patch, length = slots.cpu(), patches.cpu(), slots.shape[1]
    if not vision_first:
        slot, patch = slot.flip(1), patch.flip(1)
    before = pad(patch[:, :-1], (1, 0))
    starts = (slot | patch) & ~before  # the end of the block that is nearer to its inserted embeddings
    alone = patch & ~pad((slot | patch)[:, 1:], (0, 1))
    if bool(alone.any()):
        row, position = alone.nonzero()[0].tolist()
        position = position if vision_first else length - 1 - position
        side = "before" if vision_first else "behind"
        raise ValueError(
            f"row {row}, position {position}: an inserted image embedding does not stand {side} "
            "a slot; lay out blocks of inserted embeddings and one slot"
        )
    row, near = starts.nonzero(as_tuple=True)
    far = slot.nonzero(as_tuple=True)[1]
    count = far - near
    if not vision_first:  # columns and order are those of the mirrored rows
        order = (row * length + (length - 1 - far)).argsort()
        row, near, far, count = row[order], length - 1 - near[order], length - 1 - far[order], count[order]
    start = near if vision_first else far
    if bool((start == 0).any()):
        raise ValueError(f"row {int(row[start == 0][0])} begins with a latent; nothing comes before it")
    new_row = pad(row[1:] != row[:-1], (1, 0), value=True)
    place = torch.arange(len(row))
    index = place - torch.where(new_row, place, 0).cummax(0).values if len(row) else place
    return Blocks(row, index, start, far, near if vision_first else far + 1, count)


def choose_patches(
    scores: torch.Tensor, free: torch.BoolTensor, counts: torch.LongTensor, order: str = "score"
) -> torch.LongTensor:
    """The `counts` best free columns of each row; ties go to the lower column.

    Args:
        scores: `(B, T)`.
        free: `(B, T)` columns that may be chosen, at least `counts` in each row.
        counts: `(B,)` how many.
        order: `"score"`, or `"index_then_kth"`: those above the lowest chosen score by column, then those equal to it.

    Returns:
        `(B, max(counts))` columns, -1 behind those of a row with fewer.

    Example:
        >>> scores = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
        >>> choose_patches(scores, scores > 0, torch.tensor([3]))[0].tolist()
        [1, 3, 2]
        >>> choose_patches(scores, scores > 0, torch.tensor([3]), "index_then_kth")[0].tolist()
        [1, 3, 2]
        >>> choose_patches(scores, scores > 0, torch.tensor([4]), "index_then_kth")[0].tolist()
        [1, 2, 3, 0]
    """
    most, length = int(counts.max()) if counts.device.type == "cpu" else scores.shape[1], scores.shape[1]
    counts = counts.to(scores.device)
    ranked = scores.float().masked_fill(~free, -float("inf")).sort(dim=1, descending=True, stable=True)
    values, columns = ranked.values[:, :most], ranked.indices[:, :most]
    kept = torch.arange(most, device=scores.device) < counts.unsqueeze(1)
    if order == "index_then_kth" and most:
        kth = values.gather(1, (counts - 1).clamp(min=0).unsqueeze(1))
        key = columns + length * (values == kth) + 2 * length * ~kept
        columns = columns.gather(1, key.argsort(dim=1))
    return columns.masked_fill(~kept, -1)


def lay_out_blocks(
    num_steps: int,
    num_patches: int,
    num_image_tokens: int,
    slot_id: int,
    patch_id: int | None,
    vision_first: bool = True,
) -> list[int]:
    """Ids of the blocks of one row: every block copies `num_patches` image tokens while there are any left.

    Example:
        >>> lay_out_blocks(3, 2, 5, slot_id=9, patch_id=8)
        [8, 8, 9, 8, 8, 9, 8, 9]
    """
    ids, left = [], num_image_tokens
    for _ in range(num_steps):
        patches = [patch_id] * min(num_patches, left)
        left -= len(patches)
        ids += [*patches, slot_id] if vision_first else [slot_id, *patches]
    return ids


__all__ = [
    "PATCH_ORDERS",
    "AlignedRows",
    "Blocks",
    "choose_patches",
    "find_blocks",
    "lay_out_blocks",
    "padded_positions",
]
