"""The metrics of the `evaluate` package, without network."""

import evaluate
import pytest

from evaluation.metrics import AccuracyWithInterval, PairedComparisonMetric
from evaluation.statistics import mcnemar_exact, wilson_interval


def test_accuracy_with_interval_and_unread_replies() -> None:
    found = AccuracyWithInterval().compute(predictions=["A", "B", "", ""], references=["A", "A", "A", ""])
    low, high = wilson_interval(1, 4)
    assert found == {"accuracy": 0.25, "low": low, "high": high, "parse_rate": 0.5, "n": 4}


def test_batches_are_added_up() -> None:
    metric = AccuracyWithInterval()
    for own, gold in ((["A"], ["A"]), (["B", "C"], ["B", "B"])):
        metric.add_batch(predictions=own, references=gold)
    assert metric.compute()["accuracy"] == pytest.approx(2 / 3)
    assert evaluate.combine([AccuracyWithInterval()]).compute(predictions=["A"], references=["A"])["accuracy"] == 1


def test_a_paired_comparison_is_that_of_the_statistics() -> None:
    first, second = [1] * 30 + [0] * 70, [0] * 10 + [1] * 20 + [1] * 4 + [0] * 66
    found = PairedComparisonMetric().compute(predictions=second, references=first, margin=5)
    assert found["difference"] == pytest.approx(-6) and found["n"] == 100 and found["margin"] == 5
    assert found["p_mcnemar"] == mcnemar_exact(first, second).p_value
    assert found["low"] < -6 < found["high"] and not found["equivalent"]
    wide = PairedComparisonMetric().compute(
        predictions=second, references=first, clusters=[n // 10 for n in range(100)]
    )
    assert wide["low"] < found["low"]
    with pytest.raises(ValueError, match="predictions has 2; give 1 for a right item"):
        PairedComparisonMetric().compute(predictions=[2], references=[1])
