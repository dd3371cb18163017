"""The statistics of this package as `evaluate.Metric`s that need no network.

    from evaluation.metrics import AccuracyWithInterval, PairedComparisonMetric
    AccuracyWithInterval().compute(predictions=[1, 0, 1], references=[1, 1, 1])

Metrics of the `evaluate` package are fetched by name; these are made here, and have its whole interface (`add_batch`,
several processes, `combine`).
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from .paired_comparison import compare_paired
from .statistics import wilson_interval

_CITATION = "Wilson, JASA 1927; McNemar, Psychometrika 1947; Tango, Statistics in Medicine 1998"


class AccuracyWithInterval(evaluate.Metric):
    """Share of predictions that equal their reference, with the 95 % Wilson interval; all in 0..1.

    Predictions and references are text; `""` is a reply that could not be read: wrong, and not in `parse_rate`.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=self.__doc__, citation=_CITATION, features=features)

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        right = sum(own == gold and own != "" for own, gold in zip(predictions, references, strict=True))
        low, high = wilson_interval(right, len(references))
        read = sum(own != "" for own in predictions)
        return {"accuracy": right / len(references), "low": low, "high": high, "parse_rate": read / len(references),
                "n": len(references)}  # fmt: skip


class PairedComparisonMetric(evaluate.Metric):
    """Two conditions on the same items: `predictions` minus `references`, both 0 or 1 (right or wrong).

    The result has difference and 95 % interval in points, McNemar's exact p, the discordant share, the minimum
    detectable effect and the p of equivalence within `margin` points.

    Args of `compute`: `clusters`, of each item what it shares with others (default: nothing), `margin`, `seed`.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description=self.__doc__, citation=_CITATION, features=features)

    def _compute(
        self,
        predictions: Sequence[int],
        references: Sequence[int],
        clusters: Sequence[Any] | None = None,
        margin: float = 2.0,
        seed: int = 0,
    ) -> dict[str, Any]:
        for name, values in (("predictions", predictions), ("references", references)):
            wrong = [value for value in values if value not in (0, 1)]
            if wrong:
                raise ValueError(f"{name} has {wrong[0]!r}; give 1 for a right item and 0 for a wrong one")
        clusters = list(range(len(predictions))) if clusters is None else clusters
        found = compare_paired([bool(v) for v in references], [bool(v) for v in predictions], clusters, margin, seed)
        return {**found._asdict(), "equivalent": found.equivalent}


__all__ = ["AccuracyWithInterval", "PairedComparisonMetric"]
