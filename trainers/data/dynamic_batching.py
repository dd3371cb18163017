"""Batches of a bounded number of tokens, for samples whose lengths are known before training.

`BalancedBatches` plans one epoch for all ranks at once: every rank gets the same number of batches, each sample occurs
exactly once, and the batches that the ranks work on at the same time hold about the same number of tokens.
`ReferenceBatches` is the plan of the published LASER code ("Forest Before Trees: Latent Superposition for Efficient
Visual Reasoning", arXiv 2601.06803; card 5.2), where every loader worker of every rank packs its own share.

Both are batch samplers for `torch.utils.data.DataLoader`. They yield the batches of a step rank by rank: batch number
`step * world_size + rank` belongs to `rank`, which is how accelerate hands out batches.
"""

import heapq
import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

PLANS = ("balanced", "reference")


def is_count(value: Any) -> bool:
    """Whether a value is an integer of at least 1."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 1


def check_dynamic_batching(token_cap: int, max_batch_size: int, plan: str, prefix: str = "") -> None:
    """Check the options of a plan.

    Args:
        token_cap, max_batch_size, plan: the options.
        prefix: what the option's names begin with in the message.

    Raises:
        ValueError: names the option, its value and the remedy.
    """
    for name, value in (("token_cap", token_cap), ("max_bs", max_batch_size)):
        if not is_count(value):
            raise ValueError(f"{prefix}{name}={value!r} must be an integer of at least 1")
    if plan not in PLANS:
        raise ValueError(f"{prefix}plan={plan!r} is unknown; choose 'balanced' or 'reference'")


class BalancedBatches:
    """The batches of an epoch: samples times longest length, rounded up as in padding, never exceeds the cap.

    The *shapes* of the batches follow from the sorted lengths alone: cut from the longest sample down into batches as
    large as cap and `max_batch_size` allow, split the largest until their number divides the world size, and put
    batches of similar token counts into one step. An epoch draws only which of the samples of one padded length fills
    which place, the order of the steps, and which rank takes which batch of a step. So the number of batches, and with
    it the length of the loader, is the same in every epoch.

    Deterministic in (lengths, options, `world_size`, `seed`, epoch); all ranks build the same plan without talking to
    each other.

    Args:
        lengths: tokens of each sample before padding, by position in the data set.
        token_cap: most tokens of a batch, padding included.
        max_batch_size: most samples of a batch.
        world_size: number of ranks.
        seed: of the shuffling.
        pad_to_multiple_of: what the collator rounds lengths up to; None or 1 for no rounding.
        excluded: positions to leave out (bad rows).
        row_name: how a message names a position.

    Raises:
        ValueError: an option out of range, no sample, a length below 1, a sample above the cap, or a number of samples
            that cannot be dealt to the ranks without dropping or repeating one.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        token_cap: int,
        max_batch_size: int,
        world_size: int = 1,
        seed: int = 0,
        pad_to_multiple_of: int | None = 8,
        excluded: Collection[int] = (),
        row_name: Callable[[int], str] = "row {}".format,
    ) -> None:
        check_dynamic_batching(token_cap, max_batch_size, "balanced")
        if not is_count(world_size):
            raise ValueError(f"world_size={world_size!r} must be an integer of at least 1")
        self.world_size, self.seed, self.epoch = world_size, seed, 0
        kept = np.ones(len(lengths), dtype=bool)
        kept[list(excluded)] = False
        self.positions = np.flatnonzero(kept)
        self.lengths = np.asarray(lengths, dtype=np.int64)[self.positions]
        if not len(self.lengths):
            raise ValueError(f"no sample is left of {len(lengths)}; look at the report of bad rows")
        if self.lengths.min() < 1:
            worst = int(self.positions[self.lengths.argmin()])
            raise ValueError(f"{row_name(worst)} has the length {self.lengths.min()}; count the lengths again")
        multiple = pad_to_multiple_of or 1
        self.padded = -(-self.lengths // multiple) * multiple
        self._check_cap(token_cap, row_name)
        starts, sizes = self._cut(token_cap, max_batch_size)
        # The samples of a batch are the places [start, start + size) of the order from long to short.
        tokens = sizes * np.sort(self.padded)[::-1][starts]
        by_tokens = np.argsort(-tokens, kind="stable").reshape(-1, world_size)
        self.starts, self.sizes, self.tokens = starts[by_tokens], sizes[by_tokens], tokens[by_tokens]

    def _check_cap(self, token_cap: int, row_name: Callable[[int], str]) -> None:
        longest = int(self.padded.argmax())
        if self.padded[longest] > token_cap:
            name, size = row_name(int(self.positions[longest])), self.padded[longest]
            raise ValueError(
                f"dynamic_batch_token_cap={token_cap} is smaller than one sample: {name} has {self.lengths[longest]} "
                f"tokens, {size} after padding ({int((self.padded > token_cap).sum())} samples are above the cap); "
                f"raise the cap to at least {size}, lower max_pixels, or remove these records"
            )

    def _cut(self, token_cap: int, max_batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """First place and size of each batch; as many batches as a multiple of the world size."""
        falling, count = np.sort(self.padded)[::-1], len(self.padded)
        batches, start = [], 0
        while start < count:
            size = min(max_batch_size, token_cap // int(falling[start]), count - start)
            batches.append((-size, start))
            start += size
        missing = -len(batches) % self.world_size
        if len(batches) + missing > count:
            remove = f"remove {count % self.world_size} of them, " if count > self.world_size else ""
            raise ValueError(
                f"{count} samples make at least {len(batches)} batches, and {self.world_size} ranks need a multiple "
                f"of {self.world_size}, at most one a sample, so that none is dropped or repeated; add samples, "
                f"{remove}use fewer processes, or raise dynamic_batch_token_cap or dynamic_batch_max_bs"
            )
        heapq.heapify(batches)
        for _ in range(missing):
            negative, start = heapq.heappop(batches)
            half = -negative // 2
            heapq.heappush(batches, (negative + half, start))
            heapq.heappush(batches, (-half, start - negative - half))
        batches.sort(key=lambda batch: batch[1])
        sizes, starts = np.array(batches, dtype=np.int64).T
        return starts, -sizes

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.sizes.size

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps(self.epoch):
            yield from step

    def steps(self, epoch: int) -> Iterator[list[list[int]]]:
        """The batches of each step of an epoch, one a rank, as positions in the data set."""
        random = np.random.default_rng([self.seed, epoch])
        drawn = random.permutation(len(self.padded))
        order = self.positions[drawn[np.argsort(-self.padded[drawn], kind="stable")]]
        ranks = random.permuted(np.tile(np.arange(self.world_size), (len(self.sizes), 1)), axis=1)
        for step in random.permutation(len(self.sizes)):
            first, size = self.starts[step, ranks[step]], self.sizes[step, ranks[step]]
            yield [order[a : a + n].tolist() for a, n in zip(first, size, strict=True)]

    def summary(self) -> str:
        """Batches, samples and padding of an epoch, as one line."""
        tokens = int(self.tokens.sum())
        return (
            f"{len(self)} batches of {self.sizes.min()} to {self.sizes.max()} samples "
            f"({self.sizes.shape[0]} for each of {self.world_size} ranks), {len(self.lengths)} samples, "
            f"{tokens / len(self):.0f} tokens a batch, {1 - int(self.lengths.sum()) / tokens:.1%} padding"
        )


# The plan of the reference (card 5.2) ------------------------------------------------------------------------------


def reference_batches(
    lengths: Sequence[int],
    token_cap: int,
    max_batch_size: int,
    seed: int,
    epoch: int,
    group: int,
    num_groups: int,
    unloadable: Collection[int] = (),
) -> list[list[int]]:
    """The batches of one loader worker in one epoch, exactly as published (card 5.2).

    Args:
        lengths: tokens by position in the data set; 0 for one that is skipped.
        token_cap: most samples times longest length; a longer sample makes a batch of its own.
        max_batch_size: most samples of a batch.
        seed, epoch: of the shuffling.
        group: `rank * workers + worker`.
        num_groups: `world_size * workers`.
        unloadable: samples that fail to load: left out after planning, and with them a batch that has no other.
    """
    order = list(range(len(lengths)))
    np.random.default_rng(seed + 1000 * epoch).shuffle(order)
    mine = sorted((i for i in order[group::num_groups] if lengths[i] > 0), key=lambda i: lengths[i])
    batches: list[list[int]] = []
    for index in mine:
        # Lengths rise, so the newest sample is the longest of its batch.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= token_cap and len(batches[-1]) < max_batch_size:
            batches[-1].append(index)
        else:
            batches.append([index])
    np.random.default_rng(seed + 1000 * epoch + group).shuffle(batches)
    loaded = ([index for index in batch if index not in unloadable] for batch in batches)
    return [batch for batch in loaded if batch]


def reference_skips(counts: Sequence[int], consumed: int) -> list[int]:
    """How many batches each worker of a rank skips when the published code resumes (card 5.2).

    Args:
        counts: batches of each worker in epoch 0.
        consumed: batches that the rank had consumed: steps times gradient accumulation.
    """
    skips = [0] * len(counts)
    while consumed > 0 and any(skip < count for skip, count in zip(skips, counts, strict=True)):
        for worker, count in enumerate(counts):
            if consumed > 0 and skips[worker] < count:
                skips[worker] += 1
                consumed -= 1
    return skips


class ReferenceBatches:
    """The published plan as one batch sampler: each rank takes the batches of its workers in turn, without end.

    The ranks have unequal numbers of batches in an epoch of the plan. As published there is no common epoch: a worker
    that has gone through its share begins its next one, and the run ends after a given number of steps. So every rank
    always has a batch, and ranks may be in different epochs of the data.

    Args:
        lengths: tokens by position in the data set; those in `excluded`, and those of length 0, are skipped.
        token_cap, max_batch_size, world_size, seed, excluded: as in [`BalancedBatches`].
        num_workers: loader workers of a rank (0 counts as 1).
        num_batches: batches of each rank in the whole run: steps times gradient accumulation.

    Raises:
        ValueError: an option out of range, a negative length, or a worker without any sample, which would wait for
            ever.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        token_cap: int,
        max_batch_size: int,
        world_size: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        num_batches: int = 1,
        excluded: Collection[int] = (),
    ) -> None:
        check_dynamic_batching(token_cap, max_batch_size, "reference")
        left_out = set(excluded)
        self.lengths = [0 if i in left_out else int(length) for i, length in enumerate(lengths)]
        self.token_cap, self.max_batch_size, self.seed = token_cap, max_batch_size, seed
        self.world_size, self.num_workers, self.num_batches = world_size, max(num_workers, 1), num_batches
        if min(self.lengths, default=0) < 0:
            raise ValueError(f"lengths hold the negative number {min(self.lengths)}; count the lengths again")
        groups, usable = world_size * self.num_workers, sum(length > 0 for length in self.lengths)
        if usable < groups:
            raise ValueError(
                f"{usable} samples for {world_size} ranks times {self.num_workers} loader workers: a worker without "
                "samples would wait for ever; add samples, or use fewer processes or dataloader_num_workers"
            )
        above = sum(length > token_cap for length in self.lengths)
        if above:
            logger.warning(
                "%d samples are longer than dynamic_batch_token_cap=%d; each makes a batch of its own, as published",
                above,
                token_cap,
            )

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the run is one stream, whose epochs the plan counts itself."""

    def __len__(self) -> int:
        return self.num_batches * self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        streams = [self._rank(rank) for rank in range(self.world_size)]
        for _ in range(self.num_batches):
            yield from map(next, streams)

    def _rank(self, rank: int) -> Iterator[list[int]]:
        workers = [self._worker(rank * self.num_workers + worker) for worker in range(self.num_workers)]
        return (next(worker) for worker in itertools.cycle(workers))

    def _worker(self, group: int) -> Iterator[list[int]]:
        for epoch in itertools.count():
            yield from reference_batches(
                self.lengths,
                self.token_cap,
                self.max_batch_size,
                self.seed,
                epoch,
                group,
                self.world_size * self.num_workers,
            )

    def summary(self) -> str:
        """What the run will take, as one line."""
        return (
            f"the published plan: {self.num_batches} batches for each of {self.world_size} ranks "
            f"({self.num_workers} workers each), {sum(length > 0 for length in self.lengths)} samples"
        )
