"""The naive staged schedule, beside the naive decoder of this folder.

It lives in `evaluation`, because `examples/benchmark.py` measures the plan of segments against it and may not import
tests.
"""

from evaluation.naive_backbones import NaiveBackbone, NaiveChameleon, NaiveQwenVL
from evaluation.naive_staged import NaiveStaged, NaiveStagedGeneration, naive_staged, naive_staged_generate

__all__ = [
    "NaiveBackbone",
    "NaiveChameleon",
    "NaiveQwenVL",
    "NaiveStaged",
    "NaiveStagedGeneration",
    "naive_staged",
    "naive_staged_generate",
]
