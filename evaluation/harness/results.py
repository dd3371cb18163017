"""Results of an evaluation, from the lines of its folder.

    results.json    every condition: accuracy with intervals, by group, rates, tokens, differences, every item
    results.md      the same as tables, with the seconds of an item
    timings.json    seconds of each item and their means: with the column of the tables all that differs between two
                    equal runs

Scores are made here and not while replies are generated, so that a run can be scored again without running it.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling_latent.latent_strategies import get_latent_strategy
from trainers.data.mazes import chance_level, maze_of_record
from trainers.data.records import Record

from ..benchmarks.benchmark import DEFAULT_PROTOCOL, Scored
from ..paired_comparison import compare_paired
from ..paired_tests import holm
from ..run_folder import RESULTS, write_whole
from ..runner import Prediction
from ..statistics import wilson_interval
from .replies import item_key, predictions_of, scores
from .tables import results_markdown
from .variants import Asked, Variant

FORMAT, VERSION = "latent-evaluation-results", 1
TIMINGS, MARKDOWN = "timings.json", "results.md"
MARGIN = 2.0  # points
FORCED = ("max_latent_steps", "cap_since_start", "repetition", "open")
logger = logging.getLogger(__name__)


def write_results(
    folder: str | Path, asked: Sequence[Asked], variants: Sequence[Variant], model: str, lines: Mapping[str, Any]
) -> dict[str, Any]:
    """Score the lines of a run and write its result files.

    Args:
        folder: of the run.
        asked, variants: what was run.
        model: its name.
        lines: of [`RunFolder.items`].

    Raises:
        ValueError: an item that is not finished; names it.
    """
    conditions = [each for one in asked for each in _conditions(one, variants, model, lines)]
    results = {"format": FORMAT, "version": VERSION, "model": model, "conditions": conditions}
    timings = _timings(asked, variants, lines)
    target = Path(folder)
    write_whole(target / TIMINGS, json.dumps(timings, indent=0) + "\n")
    write_whole(target / MARKDOWN, results_markdown(results, timings["conditions"]))
    write_whole(target / RESULTS, json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    return results


def _conditions(
    asked: Asked, variants: Sequence[Variant], model: str, lines: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One benchmark under all variants, each but the first compared with the first."""
    found = []
    for variant in variants:
        predictions = predictions_of(asked, variant, lines)
        scored = scores(asked, predictions)
        if all(each.answer is None for each in scored):
            shown = [prediction.raw[:200] for prediction in predictions[:3]]
            logger.warning(
                "%s under %s: NO REPLY COULD BE READ, the accuracy means nothing; the first are %r; check protocol, "
                "strategy and max_new_tokens", asked.benchmark.name, variant.name, shown,
            )  # fmt: skip
        found.append(_summary(asked, variant, predictions, scored) | {"model": variant.model or model})
    first, *others = found
    for other in others:
        rights = [[item["correct"] for item in each["items"]] for each in (first, other)]
        comparison = compare_paired(*rights, asked.clusters, MARGIN)
        other["against_first"] = {
            "variant": first["variant"], **comparison._asdict(), "equivalent": comparison.equivalent
        }  # fmt: skip
    corrected = holm([other["against_first"]["p_mcnemar"] for other in others])
    for other, p_value in zip(others, corrected, strict=True):
        other["against_first"]["p_holm"] = p_value
    return found


def _summary(
    asked: Asked, variant: Variant, predictions: Sequence[Prediction], scored: Sequence[Scored]
) -> dict[str, Any]:
    bench, count = asked.benchmark, len(scored)
    right = sum(each.correct for each in scored)
    low, high = wilson_interval(right, count)
    latent = [prediction.num_latent_steps for prediction in predictions]
    text = [prediction.num_tokens - prediction.num_latent_steps - prediction.num_markers for prediction in predictions]
    return {
        "benchmark": bench.name,
        "title": bench.title,
        "protocol": asked.protocol.name,
        "variant": variant.name,
        "options": dict(variant.options),
        "votes": variant.votes,
        "n": count,
        "accuracy": 100 * right / count,
        "low": 100 * low,
        "high": 100 * high,
        "chance": chance_of(asked),
        **_strictly(asked, predictions),
        **_clustered(asked, scored),
        "by_group": _by_group(asked, scored),
        "parse_rate": 100 * sum(each.answer is not None for each in scored) / count,
        "trigger_rate": 100 * sum(steps > 0 for steps in latent) / count,
        "forced_close_rate": forced_close_rate(predictions, variant.options["latent_strategy"]),
        "latent_steps": sum(latent) / count,
        "text_tokens": sum(text) / count,
        "ar_steps": sum(prediction.num_steps for prediction in predictions) / count,
        "items": [_item(*row, bench.gold(row[0])) for row in zip(asked.records, predictions, scored, strict=True)],
    }


def forced_close_rate(predictions: Sequence[Prediction], strategy: str) -> float | None:
    """Share of spans in per cent that a cap, a repetition or the budget closed; None without a span, and for
    strategies that lay their latents out and close nothing."""
    spans = [reason for prediction in predictions for reason in prediction.closed_by]
    if not spans or not get_latent_strategy(strategy).stops:
        return None
    return 100 * sum(reason in FORCED for reason in spans) / len(spans)


def chance_of(asked: Asked) -> float | None:
    """Expected accuracy of guesses in per cent: among the options, or of random plans; None for open answers."""
    options = [asked.benchmark.answers(record) for record in asked.records]
    if all(options):
        return 100 * sum(1 / len(each) for each in options) / len(options)
    if asked.benchmark.name in ("mazes", "vsp"):
        return 100 * chance_level(maze_of_record(record) for record in asked.records)
    return None


def _strictly(asked: Asked, predictions: Sequence[Prediction]) -> dict[str, float]:
    """Accuracy by the corrected scorer beside that of a published one."""
    if asked.protocol.name == DEFAULT_PROTOCOL:
        return {}
    strict = scores(asked, predictions, asked.benchmark.protocol())
    return {"strict_accuracy": 100 * sum(each.correct for each in strict) / len(strict)}


def _item(record: Record, prediction: Prediction, scored: Scored, gold: str) -> dict[str, Any]:
    return {
        "id": record["id"],
        "gold": gold,
        "answer": scored.answer,
        "correct": scored.correct,
        "text": prediction.text,
        "raw": prediction.raw,
        "latent_path": prediction.latent_path,
        "latent_steps": prediction.num_latent_steps,
        "prefilled": prediction.num_prefilled,
        "tokens": prediction.num_tokens,
        "closed_by": list(prediction.closed_by),
    }


def _clustered(asked: Asked, scored: Sequence[Scored]) -> dict[str, float]:
    """Share of clusters (MMVP's pairs, HR-Bench's cycles) that are right as a whole, where there are some."""
    clusters: dict[str, bool] = {}
    for name, each in zip(asked.clusters, scored, strict=True):
        clusters[name] = clusters.get(name, True) and each.correct
    if len(clusters) == len(scored):
        return {}
    return {"cluster_accuracy": 100 * sum(clusters.values()) / len(clusters), "clusters": len(clusters)}


def _by_group(asked: Asked, scored: Sequence[Scored]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[bool]] = {}
    for record, each in zip(asked.records, scored, strict=True):
        groups.setdefault(asked.benchmark.group(record), []).append(each.correct)
    return {
        name: {"n": len(rights), "accuracy": 100 * sum(rights) / len(rights)}
        for name, rights in sorted(groups.items(), key=lambda pair: (len(pair[0]), pair[0]))
    }


def _timings(asked: Sequence[Asked], variants: Sequence[Variant], lines: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of each item, and their mean for each benchmark and variant."""
    items, means = {}, {}
    for each in asked:
        for variant in variants:
            keys = [item_key(each.benchmark.name, variant.name, number) for number in range(len(each.records))]
            items |= {key: lines[key]["seconds"] for key in keys}
            means[f"{each.benchmark.name}/{variant.name}"] = sum(items[key] for key in keys) / len(keys)
    return {"conditions": means, "items": items}


__all__ = ["FORCED", "FORMAT", "MARGIN", "chance_of", "forced_close_rate", "write_results"]
