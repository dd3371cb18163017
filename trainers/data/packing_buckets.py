"""The published packing plan of LVR: batches of samples whose tokens add up to a bounded number.

Paper: "Latent Visual Reasoning", arXiv 2509.24251 (card section 5.4). A bucket is not one row: the collator pads its
samples to the longest again. `BucketBatches` runs the plan as a batch sampler, with the interface of those in
`dynamic_batching.py`: the batches of a step come rank by rank, and every rank gets the same number.

Deviations from the reference, on purpose: a bucket is never empty (there, merging into an empty one crashes when
`long_seq_threshold` exceeds `max_packed_tokens`); a sample above the limit stays whole by default; one that loses an
image by a cut is left out wherever that image stands; a data set that runs out is replaced by a draw from a generator
of the worker, not of the process.
"""

import bisect
import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from .dynamic_batching import is_count
from .packing_rows import split_rows

logger = logging.getLogger(__name__)

OVER_LONG = ("keep", "cut", "refuse")
_ROW_NAME = "sample {1} of data set {0}".format


class Segment(NamedTuple):
    """One sample of a bucket: data set, index there, tokens (after a cut), number of the segment as published."""

    dataset: int
    index: int
    length: int
    number: int


Bucket = list[Segment]


@dataclass(frozen=True)
class BucketOptions:
    """Options of `plan_buckets`, with the published names; the defaults are those of the published run.

    Args:
        max_packed_tokens: a bucket of several samples stays below so many tokens.
        long_seq_threshold: a sample of so many tokens gets a bucket of its own.
        max_instance_per_batch: most samples of a bucket.
        max_buffer_size: so many unfinished buckets are kept back to be filled.
        allow_overflow: once half of these are in use, merge beyond the limit and split again.
        replacement: begin a data set again when it runs out, so that the stream never ends.
        random_seed: shuffles each data set once; None (or 0, as published) for the order of the files.
        over_long: what becomes of a long sample above `max_packed_tokens`: `"keep"` it whole, `"cut"` its end off as
            published (see `cut_example`), or `"refuse"`.
    """

    max_packed_tokens: int = 16384
    long_seq_threshold: int = 4096
    max_instance_per_batch: int = 4
    max_buffer_size: int = 100
    allow_overflow: bool = True
    replacement: bool = True
    random_seed: int | None = None
    over_long: str = "keep"

    def __post_init__(self) -> None:
        for name in ("max_packed_tokens", "long_seq_threshold", "max_instance_per_batch", "max_buffer_size"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} must be an integer of at least 1")
        if self.over_long not in OVER_LONG:
            raise ValueError(f"over_long={self.over_long!r} is unknown; choose one of {list(OVER_LONG)}")


def plan_buckets(
    lengths: Sequence[Sequence[int]],
    options: BucketOptions = BucketOptions(),
    *,
    rank: int = 0,
    world_size: int = 1,
    worker_id: int = 0,
    num_workers: int = 1,
    can_cut: Callable[[int, int], bool] | None = None,
    row_name: Callable[[int, int], str] = _ROW_NAME,
) -> Iterator[Bucket]:
    """The buckets of one loader worker of one rank, as published. Deterministic in the arguments.

    Lengths are asked for one by one, when a sample is drawn: an element of `lengths` may be any object with `len()`
    and an item access that counts the tokens then.

    Args:
        lengths: for each data set the tokens of its samples; data sets are drawn in proportion to their sizes.
        options: see `BucketOptions`.
        rank, world_size: this process and their number.
        worker_id, num_workers: this loader worker and their number in the process.
        can_cut: with `over_long="cut"`, says for `(data set, index)` whether the sample may be cut at
            `max_packed_tokens`; one that may not is left out with a warning.
        row_name: how a message names `(data set, index)`.

    Yields:
        Non-empty lists of segments; without end if `replacement`.

    Raises:
        ValueError: no sample for this worker; while reading, a length below 1, or one to refuse.
    """
    worker, groups = rank * num_workers + worker_id, world_size * num_workers
    if not (0 <= worker_id < num_workers and 0 <= rank < world_size):
        raise ValueError(f"rank {rank} of {world_size}, worker {worker_id} of {num_workers}: count both from 0")
    shards = [_shard(len(dataset), options.random_seed, worker, groups) for dataset in lengths]
    if not any(shards):
        raise ValueError(
            f"worker {worker} of {groups} has no sample ({[len(dataset) for dataset in lengths]} samples in all); use "
            "fewer processes or loader workers"
        )
    return _buckets(lengths, shards, options, worker, can_cut, row_name)


def _shard(size: int, seed: int | None, worker: int, groups: int) -> list[int]:
    order = np.arange(size)
    if seed:
        np.random.default_rng(seed).shuffle(order)
    return order[worker::groups].tolist()


def _draws(sizes: Sequence[int], shards: Sequence[list[int]], replacement: bool, worker: int) -> Iterator[tuple]:
    """`(data set, index)` in the order in which the worker takes them."""
    rng, substitute = np.random.default_rng(worker), np.random.default_rng([worker, 1])
    left = [(number, iter(shard)) for number, shard in enumerate(shards)]
    shares = _shares(sizes, left)
    while left:
        position = int(rng.choice(len(left), p=shares))
        while left:
            number, samples = left[position]
            index = next(samples, None)
            if index is None and replacement and shards[number]:
                left[position] = (number, iter(shards[number]))
            elif index is None:
                del left[position]
                shares = _shares(sizes, left)
                position = int(substitute.integers(len(left))) if left else 0
            else:
                yield number, index
                break


def _shares(sizes: Sequence[int], left: Sequence[tuple[int, Any]]) -> np.ndarray:
    weights = np.array([sizes[number] for number, _ in left], dtype=np.float64)
    return weights / weights.sum()


def _buckets(
    lengths: Sequence[Sequence[int]],
    shards: Sequence[list[int]],
    options: BucketOptions,
    worker: int,
    can_cut: Callable[[int, int], bool] | None,
    row_name: Callable[[int, int], str],
) -> Iterator[Bucket]:
    waiting: list[tuple[int, Bucket]] = []  # (tokens, bucket), most tokens first
    dropped: set[tuple[int, int]] = set()
    for dataset, index in _draws([len(d) for d in lengths], shards, options.replacement, worker):
        length = int(lengths[dataset][index])
        if length < 1:
            raise ValueError(f"{row_name(dataset, index)} has the length {length}; count the lengths again")
        bucket = _join(waiting, Segment(dataset, index, length, 0), options)
        single = bucket[-1].number == 0
        if single and length >= options.long_seq_threshold:
            kept = _long(bucket[0], options, can_cut, row_name)
            if kept is None and (dataset, index) not in dropped:
                dropped.add((dataset, index))
                logger.warning(
                    "%s has %d tokens and cannot be cut at max_packed_tokens=%d without losing a part of an image; it "
                    "is left out",
                    row_name(dataset, index),
                    length,
                    options.max_packed_tokens,
                )
                if len(dropped) == sum(map(len, shards)):  # an endless stream would look for a sample for ever
                    raise ValueError(
                        f"none of the {len(dropped)} samples of worker {worker} can be cut at max_packed_tokens="
                        f"{options.max_packed_tokens}; raise it, or choose over_long='keep'"
                    )
            ready, rest = ([[kept]] if kept is not None else []), None
        else:
            ready, rest = ([], bucket) if single else _divide(bucket, options)
        if rest is not None:
            tokens = _tokens(rest)
            waiting.insert(bisect.bisect_right(waiting, -tokens, key=lambda entry: -entry[0]), (tokens, rest))
        yield from ready
        while len(waiting) > options.max_buffer_size:
            yield waiting.pop(0)[1]
    yield from (bucket for _, bucket in waiting)


def _tokens(bucket: Bucket) -> int:
    return sum(segment.length for segment in bucket)


def _join(waiting: list[tuple[int, Bucket]], sample: Segment, options: BucketOptions) -> Bucket:
    """The bucket that the sample joins, taken out of the waiting ones; a new one if it fits in none."""
    chosen = None
    if sample.length < options.long_seq_threshold:
        overflow = options.allow_overflow and len(waiting) >= options.max_buffer_size // 2
        for position, (tokens, bucket) in enumerate(waiting):
            if len(bucket) >= options.max_instance_per_batch:
                continue
            if tokens + sample.length <= options.max_packed_tokens:
                chosen = position
                break
            if overflow:
                chosen = position
    if chosen is None:
        return [sample]
    _, bucket = waiting.pop(chosen)
    return [*bucket, sample._replace(number=bucket[-1].number + 1)]


def _long(
    sample: Segment,
    options: BucketOptions,
    can_cut: Callable[[int, int], bool] | None,
    row_name: Callable[[int, int], str],
) -> Segment | None:
    if sample.length <= options.max_packed_tokens or options.over_long == "keep":
        return sample
    if options.over_long == "refuse":
        raise ValueError(_over_long_reason(row_name(sample.dataset, sample.index), sample.length, options))
    if can_cut is not None and not can_cut(sample.dataset, sample.index):
        return None
    return sample._replace(length=options.max_packed_tokens)


def _over_long_reason(name: str, length: int, options: BucketOptions) -> str:
    return (
        f"{name} has {length} tokens, more than max_packed_tokens="
        f"{options.max_packed_tokens}; raise it, lower image_max_pixels, remove the sample, or choose "
        "over_long='keep' or 'cut'"
    )


def _refuse_over_long(
    lengths: Sequence[Sequence[int]], options: BucketOptions, row_name: Callable[[int, int], str]
) -> None:
    limit = max(options.max_packed_tokens, options.long_seq_threshold - 1)
    for dataset, sizes in enumerate(lengths):
        index = max(range(len(sizes)), key=lambda sample: sizes[sample], default=None)
        if index is not None and sizes[index] > limit:
            raise ValueError(_over_long_reason(row_name(dataset, index), sizes[index], options))


def _divide(bucket: Bucket, options: BucketOptions) -> tuple[list[Bucket], Bucket | None]:
    """What of a merged bucket is ready, and what waits on."""
    if _tokens(bucket) < options.max_packed_tokens:
        return ([bucket], None) if len(bucket) == options.max_instance_per_batch else ([], bucket)
    ready = []
    while _tokens(bucket) >= options.max_packed_tokens:
        if len(bucket) == 1:
            return [*ready, bucket], None
        left, last = bucket[:-1], bucket[-1:]
        first, bucket = (left, last) if _tokens(left) >= _tokens(last) else (last, left)
        ready.append(first)
    return ready, bucket


# What the collator does with a bucket


def can_be_cut(input_ids: Sequence[int], max_tokens: int, image_token_ids: Collection[int]) -> bool:
    """Whether a sample can be cut behind `max_tokens` tokens without losing a part of an image.

    Args:
        input_ids: of the sample.
        max_tokens: tokens that stay.
        image_token_ids: ids of an image embedding and of its start and end markers.
    """
    return not any(token in image_token_ids for token in input_ids[max_tokens:])


def cut_example(
    example: Mapping[str, Sequence[int]], max_tokens: int, image_token_ids: Collection[int], slot_token_id: int
) -> dict[str, Sequence[int]]:
    """A sample cut on the right, with the targets of its lost slots, as published for `over_long="cut"`.

    Args:
        example: `input_ids`, other sequences of the same length, and `regions`, the target of each slot in order.
        max_tokens: tokens that stay.
        image_token_ids: see `can_be_cut`.
        slot_token_id: id of a slot.

    Raises:
        ValueError: when a part of an image would be lost.
    """
    if not can_be_cut(example["input_ids"], max_tokens, image_token_ids):
        raise ValueError(f"cutting behind {max_tokens} tokens would lose a part of an image; leave the sample out")
    lost = sum(token == slot_token_id for token in example["input_ids"][max_tokens:])
    kept = {name: values[:max_tokens] for name, values in example.items() if name != "regions"}
    return {**kept, "regions": example["regions"][: len(example["regions"]) - lost]}


class BucketBatches:
    """Runs `plan_buckets` for all ranks: yields positions in the joined data sets, a bucket a batch.

    A rank takes the buckets of its loader workers in turn, as the published loader does.

    Args:
        lengths: for each data set the tokens of its samples.
        options: see `BucketOptions`. With `over_long="cut"` the collator cuts (see `cut_example`).
        world_size, num_workers: ranks, and loader workers of a rank (0 counts as 1).
        num_batches: batches of each rank in a run, needed with `replacement`, whose streams do not end. Without,
            an epoch holds every sample once; the buckets of ranks that have fewer are split until all have as many.
        can_cut, row_name: see `plan_buckets`.
        excluded: for each data set positions to leave out (bad rows); the lengths there do not count.

    Raises:
        ValueError: `num_batches` does not go with `replacement`, too few samples (see `plan_buckets`), or a sample
            above the limit with `over_long="refuse"` (all lengths are looked at).
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        options: BucketOptions = BucketOptions(),
        world_size: int = 1,
        num_workers: int = 0,
        num_batches: int | None = None,
        can_cut: Callable[[int, int], bool] | None = None,
        excluded: Sequence[Collection[int]] | None = None,
        row_name: Callable[[int, int], str] = _ROW_NAME,
    ) -> None:
        if options.replacement != is_count(num_batches):
            raise ValueError(
                f"num_batches={num_batches!r} with replacement={options.replacement}: an endless stream needs the "
                "number of batches (max_steps times gradient_accumulation_steps), an epoch must not have one"
            )
        self.options = options
        self.world_size, self.num_workers, self.num_batches = world_size, max(num_workers, 1), num_batches
        offsets = [0, *itertools.accumulate(map(len, lengths))]
        kept = [
            [index for index in range(len(sizes)) if index not in left_out]
            for sizes, left_out in zip(lengths, map(set, excluded or [()] * len(lengths)), strict=True)
        ]
        # The plan knows the kept samples alone, numbered anew in each data set.
        self.positions = [[start + index for index in part] for start, part in zip(offsets, kept, strict=False)]
        self.lengths = lengths
        if excluded is not None:
            self.lengths = [[sizes[index] for index in part] for sizes, part in zip(lengths, kept, strict=True)]
        self.can_cut = can_cut and (lambda dataset, index: can_cut(dataset, kept[dataset][index]))
        self.row_name = lambda dataset, index: row_name(dataset, kept[dataset][index])
        self.epoch = 0
        if options.over_long == "refuse":
            _refuse_over_long(self.lengths, options, self.row_name)
        self._streams()  # refuses what cannot work here, not in the first step

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields: without replacement, each shuffles anew."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches * self.world_size if self.num_batches else sum(map(len, self._epoch()))

    def __iter__(self) -> Iterator[list[int]]:
        if self.num_batches:
            ranks = [itertools.islice(stream, self.num_batches) for stream in self._streams()]
        else:
            ranks = self._epoch()
        for step in zip(*ranks, strict=True):
            yield from step

    def summary(self) -> str:
        """What the run, or the epoch, will take, as one line."""
        return (
            f"buckets of up to {self.options.max_packed_tokens} tokens and {self.options.max_instance_per_batch} "
            f"samples: {len(self) // self.world_size} for each of {self.world_size} ranks ({self.num_workers} workers "
            f"each), {sum(map(len, self.positions))} samples of {len(self.lengths)} data sets"
        )

    def _epoch(self) -> list[list[list[int]]]:
        ranks = [list(stream) for stream in self._streams()]
        return [split_rows(buckets, max(map(len, ranks))) for buckets in ranks]

    def _streams(self) -> list[Iterator[list[int]]]:
        options = self.options
        if options.random_seed and not options.replacement:
            options = replace(options, random_seed=options.random_seed + self.epoch)
        return [
            _in_turn(
                [
                    plan_buckets(
                        self.lengths,
                        options,
                        rank=rank,
                        world_size=self.world_size,
                        worker_id=worker,
                        num_workers=self.num_workers,
                        can_cut=self.can_cut,
                        row_name=self.row_name,
                    )
                    for worker in range(self.num_workers)
                ],
                self.positions,
            )
            for rank in range(self.world_size)
        ]


def _in_turn(workers: Sequence[Iterator[Bucket]], positions: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """One bucket of each worker after the other, as positions; a worker that has ended is passed over."""
    running = list(workers)
    while running:
        for worker in list(running):
            bucket = next(worker, None)
            if bucket is None:
                running.remove(worker)
            else:
                yield [positions[segment.dataset][segment.index] for segment in bucket]
