"""Packing plans: nothing lost, nothing twice, limits kept, ranks in step, and the faults of the published plan."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from torch.utils.data import DataLoader

from trainers.data.packing import (
    Bucket,
    BucketBatches,
    BucketOptions,
    JoinedRows,
    SequenceBatches,
    SequencePlan,
    can_be_cut,
    cut_example,
    pack_sequences,
    padding_share,
    plan_buckets,
    split_rows,
    unpack_rows,
)


def random_lengths(count: int, low: int = 64, high: int = 512, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(low, high + 1, count).tolist()


# The published plan; its streams are compared with the vectors in tests/golden


def workers(lengths: list[list[int]], options: BucketOptions, world_size: int, num_workers: int) -> Iterator[Bucket]:
    places = itertools.product(range(world_size), range(num_workers))
    for rank, worker in places:
        yield from plan_buckets(
            lengths, options, rank=rank, world_size=world_size, worker_id=worker, num_workers=num_workers
        )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("allow_overflow", [True, False])
def test_an_epoch_of_all_workers_holds_every_sample_once(seed: int, allow_overflow: bool) -> None:
    rng = np.random.default_rng(seed)
    lengths = [random_lengths(int(size), 5, 120, seed) for size in rng.integers(20, 90, 2)]
    limit, threshold, most = 100, int(rng.integers(30, 180)), int(rng.integers(1, 6))
    options = BucketOptions(limit, threshold, most, 8, allow_overflow, replacement=False, random_seed=seed)
    buckets = list(workers(lengths, options, world_size=2, num_workers=2))
    found = Counter((segment.dataset, segment.index) for bucket in buckets for segment in bucket)
    assert found == {(d, i): 1 for d, sizes in enumerate(lengths) for i in range(len(sizes))}
    for bucket in buckets:
        assert 1 <= len(bucket) <= most
        assert len(bucket) == 1 or sum(segment.length for segment in bucket) < limit
        assert all(segment.length == lengths[segment.dataset][segment.index] for segment in bucket)


def test_a_worker_gives_the_same_stream_again_and_another_worker_another() -> None:
    lengths = [random_lengths(200), random_lengths(50)]

    def stream(worker: int) -> list[Bucket]:
        return list(itertools.islice(plan_buckets(lengths, worker_id=worker, num_workers=2), 100))

    assert stream(0) == stream(0)
    assert stream(0) != stream(1)


def test_a_threshold_above_the_limit_leaves_no_empty_bucket() -> None:
    """Merging two samples that both exceed the limit left an empty bucket in the published plan."""
    options = BucketOptions(32, 60, 4, 4, replacement=False)
    buckets = list(plan_buckets([[40, 45, 50, 33, 40, 10, 12, 38, 5, 41, 7, 9]], options))
    assert all(buckets)
    assert sorted(segment.index for bucket in buckets for segment in bucket) == list(range(12))


def test_lengths_are_asked_for_when_a_sample_is_drawn() -> None:
    class Counting(list):
        asked = 0

        def __getitem__(self, index: int) -> int:
            type(self).asked += 1
            return super().__getitem__(index)

    lengths = Counting([100] * 1000)
    next(plan_buckets([lengths], BucketOptions(1000, 60)))
    assert Counting.asked == 1


def test_a_data_set_is_drawn_in_proportion_to_its_size_and_begins_again() -> None:
    options = BucketOptions(max_packed_tokens=50, long_seq_threshold=10)
    stream = plan_buckets([[20] * 30, [20] * 10], options)
    drawn = [bucket[0] for bucket in itertools.islice(stream, 2000)]
    assert 0.70 < np.mean([segment.dataset == 0 for segment in drawn]) < 0.80
    assert [segment.index for segment in drawn if segment.dataset == 1][:12] == [*range(10), 0, 1]


def test_over_long_samples(caplog: pytest.LogCaptureFixture) -> None:
    def plan(over_long: str, **options: object) -> list[list[tuple[int, int]]]:
        chosen = BucketOptions(50, 30, replacement=False, over_long=over_long)
        buckets = plan_buckets([[40, 70, 80, 10]], chosen, **options)
        return [[(segment.index, segment.length) for segment in bucket] for bucket in buckets]

    assert plan("keep") == [[(0, 40)], [(1, 70)], [(2, 80)], [(3, 10)]]
    assert plan("cut") == [[(0, 40)], [(1, 50)], [(2, 50)], [(3, 10)]]
    with caplog.at_level(logging.WARNING):
        assert plan("cut", can_cut=lambda dataset, index: index != 2) == [[(0, 40)], [(1, 50)], [(3, 10)]]
    assert "sample 2 of data set 0 has 80 tokens and cannot be cut at max_packed_tokens=50" in caplog.text
    with pytest.raises(ValueError, match="sample 1 of data set 0 has 70 tokens, more than max_packed_tokens=50"):
        plan("refuse")
    with pytest.raises(ValueError, match="sample 2 of data set 0 has 80 tokens"):
        BucketBatches([[40, 70, 80, 10]], BucketOptions(50, 30, over_long="refuse"), num_batches=1)


def test_cutting_loses_no_part_of_an_image() -> None:
    ids = [1, 2, 2, 3, 0, 9, 9, 9, 0]
    example = {"input_ids": ids, "labels": [-100] * 4 + ids[4:], "regions": [4, 5, 6]}
    assert cut_example(example, 6, {1, 2, 3}, 9) == {
        "input_ids": ids[:6],
        "labels": [-100] * 4 + [0, 9],
        "regions": [4],
    }
    assert cut_example(example, 9, {1, 2, 3}, 9) == example
    assert [can_be_cut(ids, length, {1, 2, 3}) for length in (0, 3, 4)] == [False, False, True]
    assert not can_be_cut([0, 0, 0, 1, 2, 3], 2, {1, 2, 3})
    with pytest.raises(ValueError, match="cutting behind 3 tokens would lose a part of an image"):
        cut_example(example, 3, {1, 2, 3}, 9)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_packed_tokens": 0}, "max_packed_tokens=0 must be an integer"),
        ({"max_instance_per_batch": 2.5}, "max_instance_per_batch=2.5"),
        ({"long_seq_threshold": True}, "long_seq_threshold=True"),
        ({"max_buffer_size": None}, "max_buffer_size=None"),
        ({"over_long": "drop"}, "over_long='drop' is unknown; choose one of"),
    ],
)
def test_wrong_options_of_buckets(options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        BucketOptions(**options)


def test_wrong_places_and_lengths_of_buckets() -> None:
    with pytest.raises(ValueError, match=r"worker 3 of 4 has no sample \(\[2, 1\] samples in all\)"):
        plan_buckets([[5, 5], [5]], rank=3, world_size=4)
    with pytest.raises(ValueError, match="rank 2 of 2, worker 0 of 1: count both from 0"):
        plan_buckets([[5] * 9], rank=2, world_size=2)
    with pytest.raises(ValueError, match="sample 1 of data set 0 has the length 0; count the lengths again"):
        list(plan_buckets([[5, 0]], BucketOptions(replacement=False)))


# Real packing


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("multiple_of", [1, 3, 8])
def test_rows_hold_every_sample_once_within_the_limits(seed: int, multiple_of: int) -> None:
    lengths = random_lengths(300, 1, 1300, seed)
    plan = pack_sequences(lengths, 1024, seed=seed, window=64, max_samples=5, multiple_of=multiple_of)
    assert sorted(sample for row in plan.rows for sample in row) == list(range(300))
    assert plan.row_tokens == [sum(lengths[sample] for sample in row) for row in plan.rows]
    assert all(tokens <= 1024 or len(row) == 1 for row, tokens in zip(plan.rows, plan.row_tokens, strict=True))
    assert max(map(len, plan.rows)) <= 5
    assert len(plan.rows) % multiple_of == 0


def test_a_row_takes_no_more_samples_than_allowed() -> None:
    plan = pack_sequences(random_lengths(100, 1, 20), 1024, max_samples=7)
    assert sorted(map(len, plan.rows)) == [2, *[7] * 14]


def naive_best_fit(lengths: list[int], max_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        gaps = [max_tokens - sum(lengths[other] for other in row) for row in rows]
        fitting = [(gap, number) for number, gap in enumerate(gaps) if gap >= lengths[sample]]
        if fitting:
            rows[min(fitting)[1]].append(sample)
        else:
            rows.append([sample])
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_those_of_plain_best_fit(seed: int) -> None:
    """Lengths differ, so that the shuffling decides no tie."""
    lengths = np.random.default_rng(seed).permutation(np.arange(1, 400)).tolist()
    plan = pack_sequences(lengths, 1024, seed=seed)
    naive = naive_best_fit(lengths, 1024)
    assert sorted(map(sorted, plan.rows)) == sorted(map(sorted, naive))


def test_rows_are_full_where_unpacked_batches_are_padded() -> None:
    lengths = random_lengths(4000)
    order = np.random.default_rng(1).permutation(4000).reshape(-1, 4)
    before = padding_share([[lengths[sample] for sample in batch] for batch in order])
    plan = pack_sequences(lengths, 1024)
    assert before > 0.3
    assert plan.padding_share < 0.02
    assert plan.padding_share == pytest.approx(1 - sum(lengths) / (1024 * len(plan.rows)))


def test_rows_follow_seed_and_epoch() -> None:
    lengths = random_lengths(200)

    def rows(**options: int) -> list[list[int]]:
        return pack_sequences(lengths, 1024, **options).rows

    assert rows() == rows()
    assert rows() != rows(epoch=1)
    assert rows() != rows(seed=1)
    assert rows(seed=1, epoch=0) != rows(seed=0, epoch=1)


@pytest.mark.parametrize(
    ("lengths", "options", "reason"),
    [
        ([5, 0], {}, "sample 1 has the length 0; count the lengths again"),
        ([], {}, "there is no sample"),
        ([5], {"max_tokens": 0}, "max_tokens=0 must be an integer"),
        ([5], {"window": 1.5}, "window=1.5 must be"),
        ([5], {"max_samples": 0}, "max_samples=0 must be an integer of at least 1, or None"),
        ([5, 5, 5], {"multiple_of": 4}, "3 samples in 1 rows cannot be dealt to the ranks as 4 rows"),
    ],
)
def test_what_cannot_be_packed(lengths: list[int], options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        pack_sequences(lengths, **{"max_tokens": 100, **options})


def test_splitting_halves_the_rows_of_most_samples() -> None:
    assert split_rows([[1], [2, 3, 4], [5, 6]], 5) == [[1], [2], [5, 6], [4], [3]]
    assert split_rows([[1], [2]], 2) == [[1], [2]]
    for count in (1, 4):
        with pytest.raises(ValueError, match=f"cannot be dealt to the ranks as {count} rows"):
            split_rows([[1], [2, 3]], count)


def test_unpacked_rows_are_the_samples() -> None:
    packed = {"input_ids": [1, 2, 3, 4, 5], "labels": [0, 0, 3, 4, 5]}
    assert unpack_rows(packed, [2, 3]) == [
        {"input_ids": [1, 2], "labels": [0, 0]},
        {"input_ids": [3, 4, 5], "labels": [3, 4, 5]},
    ]
    with pytest.raises(ValueError, match=r"lengths \[2, 2\] add up to 4, but the columns have \{'input_ids': 5"):
        unpack_rows(packed, [2, 2])


def test_padding_share() -> None:
    assert padding_share([[10, 5], [4, 4]]) == pytest.approx(1 - 23 / 28)
    assert padding_share([]) == 0


# Batch samplers


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_of_buckets_gives_every_rank_as_many_batches(epoch: int) -> None:
    lengths = [random_lengths(61), random_lengths(30, seed=1)]
    options = BucketOptions(1024, 500, replacement=False, random_seed=7)
    batches = BucketBatches(lengths, options, world_size=3, num_workers=2)
    batches.set_epoch(epoch)
    found = list(batches)
    assert len(found) == len(batches) and len(found) % 3 == 0
    assert sorted(itertools.chain.from_iterable(found)) == list(range(91))
    assert list(batches) == found
    batches.set_epoch(epoch + 1)
    assert list(batches) != found


def test_a_run_of_buckets_takes_the_streams_of_each_rank_in_turn() -> None:
    lengths = [random_lengths(61), random_lengths(30, seed=1)]
    options = BucketOptions(1024, 500)
    batches = BucketBatches(lengths, options, world_size=2, num_workers=2, num_batches=20)
    found = list(batches)
    assert len(found) == len(batches) == 40
    for rank in range(2):
        streams = [
            plan_buckets(lengths, options, rank=rank, world_size=2, worker_id=worker, num_workers=2)
            for worker in range(2)
        ]
        buckets = [next(streams[turn % 2]) for turn in range(20)]
        assert found[rank::2] == [[61 * segment.dataset + segment.index for segment in b] for b in buckets]
    assert "20 for each of 2 ranks (2 workers each), 91 samples of 2 data sets" in batches.summary()


@pytest.mark.parametrize("options", [{"replacement": True}, {"replacement": False, "num_batches": 3}])
def test_an_endless_stream_needs_a_number_of_batches(options: dict) -> None:
    replacement = options.pop("replacement")
    with pytest.raises(ValueError, match=f"with replacement={replacement}: an endless stream needs the number"):
        BucketBatches([[5] * 9], BucketOptions(replacement=replacement), **options)


def test_a_rank_without_enough_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="has no sample"):
        BucketBatches([[5]], BucketOptions(replacement=False), world_size=2)


def test_rows_are_dealt_to_the_ranks_and_read_by_a_loader() -> None:
    lengths = random_lengths(500)
    data = [{"number": number} for number in range(500)]
    batches = SequenceBatches(lengths, 1024, rows_per_batch=4, world_size=2, seed=3, excluded=[0, 499])
    loader = DataLoader(JoinedRows(data), batch_sampler=batches, collate_fn=lambda rows: rows)
    read = [[[sample["number"] for sample in row] for row in batch] for batch in loader]
    assert read == list(batches) and len(read) == len(batches) and len(read) % 2 == 0
    assert {len(batch) for batch in read} == {4}
    assert sorted(sample for batch in read for row in batch for sample in row) == list(range(1, 499))
    assert all(sum(lengths[sample] for sample in row) <= 1024 for batch in read for row in batch)
    assert f"{len(read)} batches of 4 rows ({len(read) // 2} for each of 2 ranks), 498 samples" in batches.summary()
    batches.set_epoch(1)
    assert list(batches) != read


@pytest.mark.parametrize("option", ["rows_per_batch", "world_size"])
def test_wrong_options_of_rows(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}=0 must be an integer of at least 1"):
        SequenceBatches([5, 5], 100, **{option: 0})


@pytest.mark.parametrize("most", [None, 3])
def test_every_epoch_has_as_many_batches(most: int | None) -> None:
    """Resuming counts batches: they have to be as many in every epoch, whatever the shuffle."""
    lengths = random_lengths(300, 20, 900)
    batches = SequenceBatches(lengths, 1000, rows_per_batch=3, world_size=2, max_samples=most, window=60)
    count, seen = len(batches), []
    for epoch in range(12):
        batches.set_epoch(epoch)
        rows = list(itertools.chain(*batches))
        assert len(batches) == count and len(rows) == 3 * count
        assert sorted(itertools.chain(*rows)) == list(range(300))
        assert all(len(row) == 1 or sum(lengths[i] for i in row) <= 1000 for row in rows)
        seen.append(rows)
    assert len({str(rows) for rows in seen}) == 12
    batches.set_epoch(0)
    assert list(itertools.chain(*batches)) == seen[0]
    plans = [pack_sequences(lengths, 1000, epoch=e, max_samples=most, window=60).rows for e in range(12)]
    assert len(set(map(len, plans))) > 1  # packed on their own they would differ


def test_samples_that_hardly_fit_keep_the_rows_of_the_first_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = SequenceBatches(random_lengths(40), 1024)
    first, packed = batches.plan, batches._pack
    monkeypatch.setattr(batches, "_pack", lambda epoch, attempt: split(packed(epoch, attempt)))

    def split(plan: SequencePlan) -> SequencePlan:
        return SequencePlan([[sample] for row in plan.rows for sample in row], [], plan.max_tokens)

    batches.set_epoch(3)
    assert sorted(batches.plan.rows) == sorted(first.rows) and batches.plan.rows != first.rows
    assert sorted(batches.plan.row_tokens) == sorted(first.row_tokens)


def test_bad_rows_of_buckets_are_left_out_and_messages_name_the_rows(caplog: pytest.LogCaptureFixture) -> None:
    lengths = [[50, 0, 60, 900, 70, 0], [40, 30, 0]]
    asked = []
    batches = BucketBatches(
        lengths,
        BucketOptions(100, 80, 4, over_long="cut", replacement=False),
        can_cut=lambda dataset, index: asked.append((dataset, index)),
        excluded=[[1, 5], [2]],
        row_name=lambda dataset, index: f"file {dataset}, row {index}",
    )
    assert sorted(itertools.chain(*batches)) == [0, 2, 4, 6, 7]
    assert (
        set(asked) == {(0, 3)}
        and "file 0, row 3 has 900 tokens and cannot be cut at max_packed_tokens=100" in caplog.text
    )


def test_a_worker_whose_samples_all_fall_out_is_noticed() -> None:
    options = BucketOptions(50, 30, over_long="cut")
    with pytest.raises(ValueError, match="none of the 2 samples of worker 0 can be cut at max_packed_tokens=50"):
        next(plan_buckets([[70, 80]], options, can_cut=lambda dataset, index: False))
