"""The `model-index` entry of a model card from the results of an evaluation, and a figure of the accuracies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..causal.card_style import BLUE, GREY, INK, RED, new_figure, plain_axes, save_figure


def model_index(results: Mapping[str, Any], task: str = "visual-question-answering") -> list[dict[str, Any]]:
    """The `model-index` of a model card.

    Args:
        results: content of `results.json`.
        task: type of the task, as the Hub names it.

    Example: `ModelCardData(**{"model-index": model_index(results)})`, or `metadata_update` of huggingface_hub.
    """
    entries = [
        EvalResult(
            task_type=task,
            dataset_type=each["benchmark"],
            dataset_name=each["title"],
            dataset_config=each["variant"],
            metric_type="accuracy",
            metric_value=round(each["accuracy"], 2),
            metric_name=f"accuracy, protocol {each['protocol']}, n={each['n']}, "
            f"95 % [{each['low']:.1f}, {each['high']:.1f}]",
        )
        for each in results["conditions"]
    ]
    return eval_results_to_model_index(str(results["model"]), entries)


def draw_accuracies(results: Mapping[str, Any], path: str | Path) -> Path:
    """Accuracy of every variant on every benchmark with 95 % Wilson intervals."""
    conditions: Sequence[Mapping[str, Any]] = results["conditions"]
    benchmarks = list(dict.fromkeys(each["title"] for each in conditions))
    variants = list(dict.fromkeys(each["variant"] for each in conditions))
    colours = (BLUE, RED, INK, GREY, "#2f855a", "#b7791f", "#6b46c1", "#b83280")
    height = 1.3 + 0.26 * len(benchmarks) * len(variants) + 0.2 * len(benchmarks)
    figure = new_figure(7.5, height)
    axes = figure.add_axes((0.2, 0.6 / height, 0.5, 1 - 0.9 / height))
    step = len(variants) + 1
    for each in conditions:
        number = variants.index(each["variant"])
        place = benchmarks.index(each["title"]) * step + number
        colour = colours[number % len(colours)]
        axes.plot([each["low"], each["high"]], [place, place], color=colour, lw=1.8)
        label = each["variant"] if each["title"] == benchmarks[0] else None
        axes.plot(each["accuracy"], place, "o", ms=5, color=colour, label=label)
    axes.set_yticks([number * step + (len(variants) - 1) / 2 for number in range(len(benchmarks))], benchmarks)
    axes.set_ylim(len(benchmarks) * step - 1, -1)
    axes.set_xlabel("accuracy, % (95 % Wilson)", fontsize=8)
    plain_axes(axes)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    return save_figure(figure, path)


__all__ = ["draw_accuracies", "model_index"]
