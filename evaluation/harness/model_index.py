"""The `model-index` entry of a model card from the results of an evaluation, and a figure of the accuracies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..benchmarks.registry import BENCHMARKS
from ..causal.card_style import BLUE, GREY, INK, RED, new_figure, plain_axes, save_figure

_COLOURS = (BLUE, RED, INK, GREY, "#2f855a", "#b7791f", "#6b46c1", "#b83280")


def eval_results(results: Mapping[str, Any], task: str = "visual-question-answering") -> list[EvalResult]:
    """The results of the run's own model as the metadata of a model card has them.

    Args:
        results: content of `results.json`.
        task: type of the task, as the Hub names it.
    """
    return [
        EvalResult(
            task_type=task,
            dataset_type=_dataset(each["benchmark"]),
            dataset_name=each["title"],
            dataset_config=each["variant"],  # what tells apart two entries of a data set
            dataset_args={"protocol": each["protocol"], "n": each["n"], **each["options"], "votes": each["votes"]},
            metric_type="accuracy",
            metric_value=round(each["accuracy"], 2),
            metric_name="accuracy, %",
            metric_args={"wilson_95": [round(each["low"], 2), round(each["high"], 2)]},
        )
        for each in results["conditions"]
        if each["model"] == results["model"]
    ]


def _dataset(name: str) -> str:
    """Hub id of a benchmark, or its name where it has none."""
    sources = BENCHMARKS[name].sources if name in BENCHMARKS else ()
    return sources[0] if sources else name


def model_index(results: Mapping[str, Any], task: str = "visual-question-answering") -> str:
    """The `model-index` as YAML, as it stands between the `---` lines of a model card."""
    name = Path(str(results["model"])).name
    return ModelCardData(model_name=name, eval_results=eval_results(results, task)).to_yaml()


def write_model_card(path: str | Path, results: Mapping[str, Any], task: str = "visual-question-answering") -> Path:
    """Put the results into the metadata of a model card, which is made when absent; its text stays as it is.

    Args:
        path: the `README.md` of a model.
        results: content of `results.json`.
        task: type of the task, as the Hub names it.
    """
    target = Path(path)
    text = target.read_text(encoding="utf-8") if target.is_file() else f"# {Path(str(results['model'])).name}\n"
    card = ModelCard(text)
    card.data.model_name = card.data.model_name or Path(str(results["model"])).name
    card.data.eval_results = eval_results(results, task)
    target.parent.mkdir(parents=True, exist_ok=True)
    card.save(target)
    return target


def draw_accuracies(results: Mapping[str, Any], path: str | Path) -> Path:
    """Accuracy of every variant on every benchmark with 95 % Wilson intervals."""
    conditions: Sequence[Mapping[str, Any]] = results["conditions"]
    benchmarks = list(dict.fromkeys(each["title"] for each in conditions))
    variants = list(dict.fromkeys(each["variant"] for each in conditions))
    legend = 0.19 * (len(variants) + 1)  # inches below the axes
    rows = 0.26 * len(benchmarks) * len(variants) + 0.2 * len(benchmarks)
    height = 0.9 + rows + legend
    figure = new_figure(7.5, height)
    axes = figure.add_axes((0.22, (0.7 + legend) / height, 0.74, rows / height))
    step = len(variants) + 1
    for each in conditions:
        number = variants.index(each["variant"])
        place = benchmarks.index(each["title"]) * step + number
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot([each["low"], each["high"]], [place, place], color=colour, lw=1.8)
        label = each["variant"] if each["title"] == benchmarks[0] else None
        axes.plot(each["accuracy"], place, "o", ms=5, color=colour, label=label)
        if each["chance"] is not None and number == 0:
            ends = [place - 0.5, place + len(variants) - 0.5]
            axes.plot([each["chance"]] * 2, ends, color=GREY, lw=1, ls=":", label="chance" if label else None)
    axes.set_yticks([number * step + (len(variants) - 1) / 2 for number in range(len(benchmarks))], benchmarks)
    axes.set_ylim(len(benchmarks) * step - 1, -1)
    axes.set_xlabel("accuracy, % (95 % Wilson)", fontsize=8)
    plain_axes(axes)
    figure.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0.2, 0))
    return save_figure(figure, path)


__all__ = ["draw_accuracies", "eval_results", "model_index", "write_model_card"]
