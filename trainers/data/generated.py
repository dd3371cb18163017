"""Streams of generated examples: their numbers, in shards, so that a stream can be split and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import IterableDataset


def generated_numbers(num: int | None, num_shards: int) -> IterableDataset:
    """The numbers 0, 1, 2, ... as a stream with the column `index`; whoever generates maps them to examples.

    Args:
        num: how many; endless by default.
        num_shards: shard s of k holds the numbers s, s + k, s + 2k, ...

    Raises:
        ValueError: `num` or `num_shards` out of its range.
    """
    from datasets import IterableDataset

    if num is not None and num < 1:
        raise ValueError(f"num is {num}; ask for at least one, or None for no end")
    if num_shards < 1 or (num is not None and num_shards > num):
        raise ValueError(f"num_shards is {num_shards} for {num or 'endless'} examples; use 1 up to their number")
    return IterableDataset.from_generator(
        _numbers, gen_kwargs={"shards": list(range(num_shards)), "num_shards": num_shards, "num": num}
    )


def _numbers(shards: list[int], num_shards: int, num: int | None) -> Iterator[dict[str, int]]:
    for shard in shards:
        index = shard
        while num is None or index < num:
            yield {"index": index}
            index += num_shards
