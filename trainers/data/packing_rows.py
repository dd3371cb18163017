"""Real packing: short samples joined into one row, long ones left alone, and the rows dealt to the ranks.

Planned on lengths alone. `SequenceBatches` runs the plan as a batch sampler, with the interface of those in
`dynamic_batching.py`: the batches of a step come rank by rank, and every rank gets the same number.
"""

import bisect
import heapq
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from .dynamic_batching import is_count

T = TypeVar("T")

_ATTEMPTS = 8  # shuffles of an epoch that has to go into as many rows as the first one


@dataclass(frozen=True)
class SequencePlan:
    """Rows of joined samples.

    Args:
        rows: positions of the samples of each row; every position occurs once.
        row_tokens: tokens of each row.
        max_tokens: what a row was filled up to; only a row of one sample may be longer.
    """

    rows: list[list[int]]
    row_tokens: list[int]
    max_tokens: int

    @property
    def padding_share(self) -> float:
        """Share of padding if every row is padded to `max_tokens`; rows that are not padded have none."""
        return 1 - sum(self.row_tokens) / sum(max(tokens, self.max_tokens) for tokens in self.row_tokens)


def pack_sequences(
    lengths: Sequence[int],
    max_tokens: int,
    *,
    seed: int | Sequence[int] = 0,
    epoch: int = 0,
    window: int = 4096,
    max_samples: int | None = None,
    multiple_of: int = 1,
) -> SequencePlan:
    """Joins short samples into rows of at most `max_tokens` tokens; a longer sample is a row of its own.

    The samples are shuffled, and each window of them is packed best fit first, from long to short; so a row holds
    samples that are random but for their lengths, and the cost is O(n log n). The rows of a window are shuffled too.
    Deterministic in the arguments.

    Args:
        lengths: tokens of each sample.
        max_tokens: of a row.
        seed, epoch: of the shuffling.
        window: samples that are packed together; more fill rows better, fewer keep the order more random.
        max_samples: most samples of a row.
        multiple_of: the number of rows is made a multiple of this (ranks times rows of a batch) by splitting rows of
            several samples, so that every rank gets the same number and nothing is lost or repeated.

    Raises:
        ValueError: an option or length out of range, or fewer samples than rows are needed.

    Example:
        >>> plan = pack_sequences([300, 700, 900, 100, 5000], 1000)
        >>> sorted(sorted(row) for row in plan.rows)
        [[0, 1], [2, 3], [4]]
    """
    for name, value in (("max_tokens", max_tokens), ("window", window), ("multiple_of", multiple_of)):
        if not is_count(value):
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    if max_samples is not None and not is_count(max_samples):
        raise ValueError(f"max_samples={max_samples!r} must be an integer of at least 1, or None")
    sizes = np.asarray(lengths, dtype=np.int64)
    if not sizes.size or sizes.min() < 1:
        what = (
            f"sample {int(sizes.argmin())} has the length {int(sizes.min())}" if sizes.size else "there is no sample"
        )
        raise ValueError(f"{what}; count the lengths again")
    rng = np.random.default_rng([*np.atleast_1d(seed).tolist(), epoch])
    order, listed = rng.permutation(sizes.size), sizes.tolist()
    rows: list[list[int]] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        falling = part[np.argsort(-sizes[part], kind="stable")].tolist()
        packed = _best_fit(falling, listed, max_tokens, max_samples)
        rows += [packed[row] for row in rng.permutation(len(packed))]
    rows = split_rows(rows, math.ceil(len(rows) / multiple_of) * multiple_of)
    return SequencePlan(rows, [sum(listed[sample] for sample in row) for row in rows], max_tokens)


def _best_fit(order: Sequence[int], sizes: Sequence[int], max_tokens: int, max_samples: int | None) -> list[list[int]]:
    """Each sample goes to the fullest row that it fits into."""
    rows: list[list[int]] = []
    gaps: list[tuple[int, int]] = []  # (free tokens, row), ascending, of the rows that take more
    for sample in order:
        place = bisect.bisect_left(gaps, (sizes[sample], -1))
        gap, row = gaps.pop(place) if place < len(gaps) else (max_tokens, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        if gap > sizes[sample] and len(rows[row]) != max_samples:
            bisect.insort(gaps, (gap - sizes[sample], row))
    return rows


def split_rows(rows: Sequence[list[T]], count: int) -> list[list[T]]:
    """As many rows as asked for: those of most samples are halved, the new halves stand at the end.

    Raises:
        ValueError: when there are more rows already, or fewer samples than rows.
    """
    rows = list(rows)
    samples = sum(map(len, rows))
    if not len(rows) <= count <= samples:
        raise ValueError(
            f"{samples} samples in {len(rows)} rows cannot be dealt to the ranks as {count} rows without dropping or "
            "repeating one; add samples, or use fewer processes or rows a batch"
        )
    largest = [(-len(row), number) for number, row in enumerate(rows)]
    heapq.heapify(largest)
    while len(rows) < count:
        _, number = heapq.heappop(largest)
        half = -(-len(rows[number]) // 2)
        rows.append(rows[number][half:])
        rows[number] = rows[number][:half]
        for changed in (number, len(rows) - 1):
            heapq.heappush(largest, (-len(rows[changed]), changed))
    return rows


def padding_share(batches: Iterable[Sequence[int]]) -> float:
    """Share of padding when the rows of each batch are padded to the longest of them.

    Args:
        batches: tokens of each row, batch by batch.
    """
    tokens = size = 0
    for batch in batches:
        tokens += sum(batch)
        size += len(batch) * max(batch, default=0)
    return 1 - tokens / size if size else 0.0


def unpack_rows(packed: Mapping[str, Sequence[T]], lengths: Sequence[int]) -> list[dict[str, Sequence[T]]]:
    """The samples of a packed row, cut apart again; `pad_batch` makes a padded batch of them.

    Args:
        packed: columns of one length, the samples one after the other.
        lengths: tokens of each sample.

    Raises:
        ValueError: when the lengths do not add up to a column's.
    """
    wrong = {name: len(values) for name, values in packed.items() if len(values) != sum(lengths)}
    if wrong:
        raise ValueError(f"lengths {list(lengths)} add up to {sum(lengths)}, but the columns have {wrong}")
    ends = list(itertools.accumulate(lengths))
    return [
        {name: values[end - length : end] for name, values in packed.items()}
        for end, length in zip(ends, lengths, strict=True)
    ]


class SequenceBatches:
    """Runs `pack_sequences` for all ranks: yields batches of rows, a row being a list of positions.

    Read by a loader over `JoinedRows(dataset)`. Every epoch packs anew, into as many rows as the first one, so that
    the number of batches is the same in every epoch and for every rank: rows are split where there are fewer, and the
    samples shuffled again where there are more.

    Args:
        lengths: tokens of each sample.
        max_tokens: of a row.
        rows_per_batch: rows of a batch of one rank.
        world_size: number of ranks.
        seed, window, max_samples: see `pack_sequences`.
        excluded: positions to leave out (bad rows).

    Raises:
        ValueError: see `pack_sequences`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        rows_per_batch: int = 1,
        world_size: int = 1,
        seed: int = 0,
        window: int = 4096,
        max_samples: int | None = None,
        excluded: Collection[int] = (),
    ) -> None:
        for name, value in (("rows_per_batch", rows_per_batch), ("world_size", world_size)):
            if not is_count(value):
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        left_out = set(excluded)
        self.positions = [position for position in range(len(lengths)) if position not in left_out]
        self.lengths = [int(lengths[position]) for position in self.positions]
        self.max_tokens, self.rows_per_batch, self.world_size = max_tokens, rows_per_batch, world_size
        self.seed, self.options = seed, {"window": window, "max_samples": max_samples}
        self.epoch, self.plan = 0, self._pack(0, 0)
        self._first = self.plan

    def _pack(self, epoch: int, attempt: int) -> SequencePlan:
        step = self.rows_per_batch * self.world_size
        seeds: dict[str, Any] = {"seed": self.seed if not attempt else [self.seed, attempt], "epoch": epoch}
        return pack_sequences(self.lengths, self.max_tokens, multiple_of=step, **seeds, **self.options)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        if epoch == self.epoch:
            return
        self.epoch, wanted = epoch, len(self._first.rows)
        if epoch == 0:
            self.plan = self._first
            return
        for attempt in range(_ATTEMPTS):
            plan = self._pack(epoch, attempt)
            if len(plan.rows) <= wanted:
                rows = split_rows(plan.rows, wanted)
                break
        else:  # samples that hardly go into so few rows: those of the first epoch, in another order
            order = np.random.default_rng([self.seed, epoch]).permutation(wanted)
            rows = [self._first.rows[row] for row in order]
        tokens = [sum(self.lengths[sample] for sample in row) for row in rows]
        self.plan = SequencePlan(rows, tokens, self.max_tokens)

    def __len__(self) -> int:
        return len(self.plan.rows) // self.rows_per_batch

    def __iter__(self) -> Iterator[list[list[int]]]:
        rows = [[self.positions[sample] for sample in row] for row in self.plan.rows]
        for start in range(0, len(rows), self.rows_per_batch):
            yield rows[start : start + self.rows_per_batch]

    def summary(self) -> str:
        """Rows, samples and padding of the epoch, as one line."""
        plan, tokens = self.plan, self.plan.row_tokens
        batches = [tokens[start : start + self.rows_per_batch] for start in range(0, len(tokens), self.rows_per_batch)]
        return (
            f"{len(self)} batches of {self.rows_per_batch} rows ({len(self) // self.world_size} for each of "
            f"{self.world_size} ranks), {len(self.lengths)} samples in {len(plan.rows)} rows of up to "
            f"{plan.max_tokens} tokens, {padding_share(batches):.1%} padding if padded to the longest row"
        )


class JoinedRows:
    """A data set whose index is a row of positions, and whose item is the list of their samples.

    Args:
        dataset: a map-style data set.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: Sequence[int]) -> list[Any]:
        return [self.dataset[position] for position in row]
