"""Plans of batches: every sample once, the same number of batches for every rank, no batch above the cap."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import DataLoader

from trainers.data.dynamic_batching import (
    BalancedBatches,
    ReferenceBatches,
    check_dynamic_batching,
    reference_batches,
    reference_skips,
)

CAP, MAX_BS = 1000, 7


def draw(seed: int, count: int = 61, longest: int = 480) -> list[int]:
    return np.random.default_rng(seed).integers(1, longest, count).tolist()


def padded(lengths: list[int], batch: list[int], multiple: int) -> int:
    """Tokens of a batch once it is padded, counted as the collator pads."""
    return len(batch) * math.ceil(max(lengths[i] for i in batch) / multiple) * multiple


def loaded(batches: Any, rank: int, world_size: int, workers: int, skip: int = 0) -> list[list[int]]:
    """What a rank reads: the stock loader over accelerate's shard of the plan."""
    sampler = BatchSamplerShard(batches, world_size, rank)
    sampler = SkipBatchSampler(sampler, skip) if skip else sampler
    count = max(itertools.chain(*batches)) + 1
    return list(DataLoader(range(count), batch_sampler=sampler, num_workers=workers, collate_fn=list))


# Balanced ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("seed", range(5))
def test_an_epoch_holds_every_sample_once(seed: int, multiple: int | None, world_size: int) -> None:
    lengths = draw(seed)
    batches = BalancedBatches(lengths, CAP, MAX_BS, world_size, seed, multiple)
    orders = []
    for epoch in range(3):
        steps = list(batches.steps(epoch))
        assert all(len(step) == world_size for step in steps)
        flat = list(itertools.chain(*steps))
        assert sorted(itertools.chain(*flat)) == list(range(len(lengths)))
        assert max(padded(lengths, batch, multiple or 1) for batch in flat) <= CAP
        assert 1 <= min(map(len, flat)) and max(map(len, flat)) <= MAX_BS
        batches.set_epoch(epoch)
        assert list(batches) == flat and len(batches) == len(flat)
        again = BalancedBatches(lengths, CAP, MAX_BS, world_size, seed, multiple)
        assert list(again.steps(epoch)) == steps
        orders.append(flat)
    assert orders[0] != orders[1] != orders[2]
    assert next(BalancedBatches(lengths, CAP, MAX_BS, world_size, seed + 1, multiple).steps(0)) != orders[0][0]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_read_the_plan_through_the_stock_loader(workers: int) -> None:
    lengths = draw(7)
    batches = BalancedBatches(lengths, CAP, MAX_BS, world_size=2, seed=3)
    batches.set_epoch(4)
    first, second = (loaded(batches, rank, 2, workers) for rank in (0, 1))
    assert len(first) == len(second) == len(batches) // 2 == len(BatchSamplerShard(batches, 2, 1))
    assert sorted(itertools.chain(*first, *second)) == list(range(len(lengths)))
    assert [list(pair) for pair in zip(first, second, strict=True)] == list(batches.steps(4))
    assert loaded(batches, 1, 2, workers, skip=3) == second[3:]


@pytest.mark.parametrize("world_size", [2, 8])
def test_the_ranks_of_a_step_hold_similar_numbers_of_tokens(world_size: int) -> None:
    lengths = draw(1, 400)
    steps = list(BalancedBatches(lengths, CAP, MAX_BS, world_size).steps(0))
    tokens = np.array([[padded(lengths, batch, 8) for batch in step] for step in steps])
    # Batches sorted by tokens and cut into steps: the ranges of the steps do not overlap.
    assert np.ptp(tokens, axis=1).sum() <= np.ptp(tokens)
    by_place = [[step[rank] for step in steps] for rank in range(world_size)]
    shares = [sum(padded(lengths, batch, 8) for batch in batches) for batches in by_place]
    assert max(shares) - min(shares) <= CAP


def test_batches_are_as_few_as_sorted_lengths_allow() -> None:
    lengths = draw(2, 200)
    rising = sorted(math.ceil(length / 8) * 8 for length in lengths)
    best = [0]  # fewest batches of the shortest n samples: each batch is a run of the sorted lengths
    for end in range(1, len(rising) + 1):
        sizes = range(1, min(MAX_BS, CAP // rising[end - 1], end) + 1)
        best.append(1 + min(best[end - size] for size in sizes))
    assert len(BalancedBatches(lengths, CAP, MAX_BS)) == best[-1]


def test_the_largest_batches_are_split_for_the_ranks() -> None:
    batches = BalancedBatches([10] * 12, 64, 16, world_size=4, pad_to_multiple_of=None)
    assert sorted(map(len, batches)) == [3, 3, 3, 3]  # 6 + 6 samples fit into two batches
    uneven = BalancedBatches([10] * 13, 64, 16, world_size=2, pad_to_multiple_of=None)
    assert sorted(map(len, uneven)) == [1, 3, 3, 6]


def test_excluded_samples_are_left_out_and_nothing_else() -> None:
    lengths = [0, 50, 60, 0, 70, 80]
    batches = BalancedBatches(lengths, 200, 2, world_size=2, excluded={0, 3})
    assert sorted(itertools.chain(*batches)) == [1, 2, 4, 5]
    assert "4 samples" in batches.summary() and "1 for each of 2 ranks" in batches.summary()


def test_samples_of_one_padded_length_change_company() -> None:
    batches = BalancedBatches([30, 31, 25, 32, 26, 29], 64, 2)
    pairs = set()
    for epoch in range(30):
        pairs |= {frozenset(batch) for step in batches.steps(epoch) for batch in step}
    assert pairs == {frozenset(pair) for pair in itertools.combinations(range(6), 2)}


WRONG_BALANCED: list[tuple[dict[str, Any], str]] = [
    ({"token_cap": 0}, "token_cap=0 must be an integer of at least 1"),
    ({"token_cap": 8.5}, "token_cap=8.5 must be"),
    ({"max_batch_size": 0}, "max_bs=0 must be an integer of at least 1"),
    ({"max_batch_size": True}, "max_bs=True must be"),
    ({"world_size": 0}, "world_size=0 must be"),
    ({"lengths": [8, -3, 8]}, "row 1 has the length -3; count the lengths again"),
    ({"lengths": [8, 0, 8]}, "row 1 has the length 0; count the lengths again"),
    ({"lengths": []}, "no sample is left of 0"),
    ({"excluded": range(3)}, "no sample is left of 3"),
    (
        {"lengths": [8, 97, 90], "token_cap": 100},
        r"dynamic_batch_token_cap=100 is smaller than one sample: row 1 has 97 tokens, 104 after padding \(1 samples "
        r"are above the cap\); raise the cap to at least 104",
    ),
    ({"world_size": 4}, "3 samples make at least 1 batches, and 4 ranks need a multiple of 4.*use fewer processes"),
    (
        {"lengths": [90] * 5, "world_size": 4, "token_cap": 100},
        "5 samples make at least 5 batches, and 4 ranks need a multiple of 4.*remove 1 of them",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG_BALANCED, ids=lambda value: str(value)[:50])
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedBatches(**{"lengths": [8, 9, 10], "token_cap": 100, "max_batch_size": 4, **options})


def test_the_prefix_names_the_option() -> None:
    with pytest.raises(ValueError, match="dynamic_batch_plan='greedy' is unknown; choose 'balanced' or 'reference'"):
        check_dynamic_batching(8, 8, "greedy", "dynamic_batch_")


# The plan of the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_the_reference_goes_on_for_every_rank(workers: int) -> None:
    lengths, groups = [0, *draw(5, 30), 0], 2 * max(workers, 1)
    batches = ReferenceBatches(lengths, CAP, MAX_BS, 2, 42, workers, num_batches=23)
    assert len(batches) == 46 and "23 batches for each of 2 ranks" in batches.summary()
    for rank in (0, 1):
        streams = []
        for worker in range(max(workers, 1)):
            epochs = (
                reference_batches(lengths, CAP, MAX_BS, 42, epoch, rank * max(workers, 1) + worker, groups)
                for epoch in range(30)
            )
            streams.append(list(itertools.chain(*epochs)))
        in_turn = list(itertools.chain(*zip(*streams, strict=False)))[:23]
        assert loaded(batches, rank, 2, workers) == in_turn
        assert loaded(batches, rank, 2, workers, skip=9) == in_turn[9:]


def test_the_shares_of_the_reference_make_up_the_data_set() -> None:
    lengths = [0, *draw(6, 50, longest=1500)]
    for epoch in (0, 1):
        shares = [reference_batches(lengths, CAP, MAX_BS, 1, epoch, group, 4) for group in range(4)]
        seen = sorted(itertools.chain(*itertools.chain(*shares)))
        assert seen == list(range(1, 51))
        for batch in itertools.chain(*shares):
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= CAP


def test_skips_of_the_reference() -> None:
    assert reference_skips([3, 1, 2], 0) == [0, 0, 0]
    assert reference_skips([3, 1, 2], 4) == [2, 1, 1]
    assert reference_skips([3, 1, 2], 100) == [3, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [5, 0, 5], "num_workers": 3}, "2 samples for 1 ranks times 3 loader workers"),
        ({"lengths": [5, -1]}, "lengths hold the negative number -1"),
        ({"token_cap": 0}, "token_cap=0 must be"),
    ],
)
def test_refused_by_the_reference(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReferenceBatches(**{"lengths": [5, 6], "token_cap": 100, "max_batch_size": 4, **options})


def test_long_samples_of_the_reference_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    ReferenceBatches([50, 150], 100, 4)
    assert "1 samples are longer than dynamic_batch_token_cap=100" in caplog.text
