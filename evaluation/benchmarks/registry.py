"""All benchmarks by name; `hub_configs/benchmarks.md` is their table, made by `page.py`.

from evaluation.benchmarks.registry import benchmark
records = benchmark("blink").read("data/blink", tasks=["Counting"])
protocol = benchmark("blink").protocol("laser")
"""

from .benchmark import Benchmark
from .choice_benchmarks import CHOICE_BENCHMARKS
from .math_benchmarks import MATH_BENCHMARKS
from .maze_benchmarks import MAZE_BENCHMARKS
from .step_benchmarks import STEP_BENCHMARKS

BENCHMARKS: dict[str, Benchmark] = {
    each.name: each for each in (*CHOICE_BENCHMARKS, *MATH_BENCHMARKS, *STEP_BENCHMARKS, *MAZE_BENCHMARKS)
}
ALIASES = {
    "v*": "vstar", "vbench": "vstar", "vstarbench": "vstar", "hrbench": "hrbench4k", "hallusion": "hallusionbench",
    "maze": "mazes",
}  # fmt: skip
_BY_LETTERS = {"".join(filter(str.isalnum, name)): name for name in BENCHMARKS}


def benchmark(name: str) -> Benchmark:
    """A benchmark by name or alias; case, blanks, `-` and `_` make no difference (`"HR-Bench 4K"`).

    Raises:
        ValueError: an unknown one; lists those there are.
    """
    key = name.strip().lower()
    key = ALIASES.get(key, key)
    plain = "".join(filter(str.isalnum, key))
    found = key if key in BENCHMARKS else _BY_LETTERS.get(ALIASES.get(plain, plain))
    if found is None:
        raise ValueError(f"unknown benchmark {name!r}; choose one of {sorted(BENCHMARKS)}")
    return BENCHMARKS[found]


__all__ = ["ALIASES", "BENCHMARKS", "benchmark"]
