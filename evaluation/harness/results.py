"""Results of an evaluation, from the lines of its folder: JSON, Markdown, and one line a condition.

    results.json    every condition: accuracy with intervals, by group, rates, tokens, differences, every item
    results.md      the same as tables
    timings.json    seconds of each item: all that differs between two equal runs

Scores are made here and not while replies are generated, so that a run can be scored again without running it.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainers.data.records import Record

from ..benchmarks.benchmark import Scored
from ..cluster_bootstrap import resampled_means
from ..paired_tests import equivalence_test, holm, minimum_detectable_effect
from ..run_folder import RESULTS, write_whole
from ..runner import Prediction
from ..statistics import mcnemar_exact, wilson_interval
from .variants import Asked, Variant

FORMAT, VERSION = "latent-evaluation-results", 1
TIMINGS, MARKDOWN = "timings.json", "results.md"
MARGIN = 2.0  # points
FORCED = ("max_latent_steps", "repetition", "open")
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
    conditions, seconds = [], {}
    for each in asked:
        found = [_condition(each, variant, lines, seconds) for variant in variants]
        for other, p_value in zip(
            found[1:], holm([_compared(found[0], other, each) for other in found[1:]]), strict=True
        ):
            other["against_first"]["p_holm"] = p_value
        conditions += found
    results = {"format": FORMAT, "version": VERSION, "model": model, "conditions": conditions}
    target = Path(folder)
    write_whole(target / RESULTS, json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    write_whole(target / MARKDOWN, results_markdown(results))
    write_whole(target / TIMINGS, json.dumps(seconds, indent=0) + "\n")
    return results


def _condition(asked: Asked, variant: Variant, lines: Mapping[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """One benchmark under one variant."""
    name, predictions = asked.benchmark.name, []
    for number, record in enumerate(asked.records):
        key = f"{name}/{variant.name}/{number}"
        if key not in lines:
            raise ValueError(
                f"item {number} ({record['id']!r}) of {name} under {variant.name!r} is not finished; resume"
            )
        values = lines[key]["prediction"]
        predictions.append(Prediction(**{**values, "closed_by": tuple(values["closed_by"])}))
        seconds[key] = lines[key]["seconds"]
    scored = [asked.protocol.score(*pair) for pair in zip(asked.records, predictions, strict=True)]
    if all(each.answer is None for each in scored):
        shown = [prediction.raw[:200] for prediction in predictions[:3]]
        logger.warning("%s under %s: no reply could be read; the first are %r", name, variant.name, shown)
    return _summary(asked, variant, predictions, scored)


def _summary(
    asked: Asked, variant: Variant, predictions: Sequence[Prediction], scored: Sequence[Scored]
) -> dict[str, Any]:
    bench, count = asked.benchmark, len(scored)
    right = sum(each.correct for each in scored)
    low, high = wilson_interval(right, count)
    spans = [reason for prediction in predictions for reason in prediction.closed_by]
    latent = [prediction.num_latent_steps for prediction in predictions]
    text = [prediction.num_tokens - prediction.num_latent_steps - prediction.num_markers for prediction in predictions]
    return {
        "benchmark": bench.name,
        "title": bench.title,
        "protocol": asked.protocol.name,
        "variant": variant.name,
        "options": dict(variant.options),
        "n": count,
        "accuracy": 100 * right / count,
        "low": 100 * low,
        "high": 100 * high,
        **_clustered(asked, scored),
        "by_group": _by_group(asked, scored),
        "parse_rate": 100 * sum(each.answer is not None for each in scored) / count,
        "trigger_rate": 100 * sum(steps > 0 for steps in latent) / count,
        "forced_close_rate": 100 * sum(reason in FORCED for reason in spans) / len(spans) if spans else 0.0,
        "latent_steps": sum(latent) / count,
        "text_tokens": sum(text) / count,
        "items": [_item(*row, bench.gold(row[0])) for row in zip(asked.records, predictions, scored, strict=True)],
    }


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
        "tokens": prediction.num_tokens,
        "closed_by": list(prediction.closed_by),
    }


def _clustered(asked: Asked, scored: Sequence[Scored]) -> dict[str, float]:
    """Share of clusters (MMVP's pairs, HR-Bench's cycles) that are right as a whole, where there are some."""
    if asked.benchmark.cluster is None:
        return {}
    clusters: dict[str, bool] = {}
    for record, each in zip(asked.records, scored, strict=True):
        name = asked.benchmark.cluster(record)
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
        for name, rights in sorted(groups.items())
    }


def _compared(first: dict[str, Any], other: dict[str, Any], asked: Asked) -> float:
    """Difference of a condition to the first on the same items, put into the condition; returns McNemar's p."""
    before, after = (np.array([float(item["correct"]) for item in each["items"]]) for each in (first, other))
    cluster, count = asked.benchmark.cluster, len(before)
    clusters = [str(place) if cluster is None else cluster(record) for place, record in enumerate(asked.records)]
    means = 100 * resampled_means(after - before, clusters)[:, 0]
    test = mcnemar_exact(before, after)
    discordant = (test.only_a + test.only_b) / count
    equal = equivalence_test(test.only_a, test.only_b, count, MARGIN / 100)
    other["against_first"] = {
        "variant": first["variant"],
        "difference": 100 * float((after - before).mean()),
        "low": float(np.quantile(means, 0.025)),
        "high": float(np.quantile(means, 0.975)),
        "p_mcnemar": test.p_value,
        "discordant": discordant,
        "mde": minimum_detectable_effect(discordant, count),
        "margin": MARGIN,
        "p_equivalence": equal.p_value,
        "equivalent": equal.equivalent,
    }
    return test.p_value


def condition_line(condition: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    line = (
        f"{condition['benchmark']}, {condition['variant']}: {condition['accuracy']:.1f} % "
        f"[{condition['low']:.1f}, {condition['high']:.1f}]  n={condition['n']}  read {condition['parse_rate']:.0f} %"
        f"  latent steps {condition['latent_steps']:.1f} in {condition['trigger_rate']:.0f} % of replies  text tokens "
        f"{condition['text_tokens']:.1f}"
    )
    other = condition.get("against_first")
    if other:
        line += f"  minus {other['variant']}: {other['difference']:+.1f} [{other['low']:+.1f}, {other['high']:+.1f}]"
    return line


def results_markdown(results: Mapping[str, Any]) -> str:
    """Tables of all conditions."""
    head = ("benchmark", "variant", "n", "accuracy", "95 %", "against the first", "p (Holm)", "equal", "read",
            "latents", "forced", "latent steps", "text tokens")  # fmt: skip
    rows = [head, ("---",) * len(head)]
    for each in results["conditions"]:
        other = each.get("against_first")
        against = "" if not other else f"{other['difference']:+.1f} [{other['low']:+.1f}, {other['high']:+.1f}]"
        p_value, equal = ("", "") if not other else (f"{other['p_holm']:.3f}", "yes" if other["equivalent"] else "")
        rows.append((
            each["title"], each["variant"], str(each["n"]), f"{each['accuracy']:.1f}",
            f"[{each['low']:.1f}, {each['high']:.1f}]", against, p_value, equal, f"{each['parse_rate']:.0f} %",
            f"{each['trigger_rate']:.0f} %", f"{each['forced_close_rate']:.0f} %", f"{each['latent_steps']:.1f}",
            f"{each['text_tokens']:.1f}",
        ))  # fmt: skip
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    groups = [
        f"- {each['title']}, {each['variant']}: "
        + ", ".join(f"{name} {group['accuracy']:.1f} (n={group['n']})" for name, group in each["by_group"].items())
        for each in results["conditions"]
        if len(each["by_group"]) > 1
    ]
    parts = [f"# {results['model']}", table, *(["## By group", "\n".join(groups)] if groups else [])]
    return "\n\n".join(parts) + "\n"


__all__ = ["FORMAT", "MARGIN", "condition_line", "results_markdown", "write_results"]
