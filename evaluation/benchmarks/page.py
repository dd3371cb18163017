"""The table of benchmarks in `hub_configs/benchmarks.md`; `python -m evaluation.benchmarks.page` prints it."""

from collections.abc import Iterable

from .benchmark import Benchmark
from .registry import BENCHMARKS

GENERATED = ("graphs", "mazes")
ALONE = "every question alone"
# Of every benchmark: what its groups and its clusters are.
GROUPS_AND_CLUSTERS: dict[str, tuple[str, str]] = {
    "blink": ("task", ALONE),
    "mmvp": ("none", "the pair"),
    "mmstar": ("category", ALONE),
    "seedbench2plus": ("type of image", "the image"),
    "hallusionbench": ("category", "the figure and its edited copies"),
    "hrbench4k": ("category", "the rotated copies"),
    "hrbench8k": ("category", "the rotated copies"),
    "vstar": ("category", ALONE),
    "vsr": ("relation", "the image"),
    "cub": ("category, where there is one", "the image"),
    "mathvista": ("type of question", ALONE),
    "mathvision": ("subject", ALONE),
    "mm_math": ("difficulty", ALONE),
    "m3cot": ("domain", ALONE),
    "scienceqa": ("subject", ALONE),
    "prosqa": ("number of steps", ALONE),
    "prontoqa": ("number of steps", ALONE),
    "gsm8k": ("number of steps", ALONE),
    "graphs": ("number of steps", ALONE),
    "mazes": ("size", ALONE),
    "vsp": ("size", ALONE),
}


def benchmark_table() -> list[str]:
    """Lines of the table, a row a benchmark, in the order of the registry."""
    lines = [
        "| name | title | sources | columns | protocols | group | cluster |",
        "|---|---|---|---|---|---|---|",
    ]
    return lines + [_line(each) for each in BENCHMARKS.values()]


def _line(bench: Benchmark) -> str:
    group, cluster = GROUPS_AND_CLUSTERS[bench.name]
    place = "generated" if bench.name in GENERATED else _names(bench.sources) or "a local file"
    names = (_names(bench.columns), _names(bench.protocols))
    cells = [f"`{bench.name}`", bench.title, place, *names, group, cluster]
    return f"| {' | '.join(cells)} |"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    print("\n".join(benchmark_table()))
