"""What an evaluation runs: benchmarks with their records, and strategies with their numbers of steps."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modeling_latent.latent_strategies import get_latent_strategy
from trainers.data.records import Record

from ..benchmarks.benchmark import AskProtocol, Benchmark
from ..conditions import parse_strategy

STEP_OPTIONS = ("max_latent_steps", "num_latent_steps")


@dataclass(frozen=True)
class Asked:
    """A benchmark with its records and the way they are asked."""

    benchmark: Benchmark
    protocol: AskProtocol
    records: Sequence[Record]


@dataclass(frozen=True)
class Variant:
    """A strategy with its options.

    Args:
        name: for tables, e.g. `"dynamic, max_latent_steps 8"`.
        options: of `generate`, `latent_strategy` among them.
        votes: replies that are sampled for each item, whose most frequent answer counts; 0 for one reply.
    """

    name: str
    options: Mapping[str, Any]
    votes: int = 0


def variants_of(
    strategies: Sequence[str], steps: Mapping[str, Sequence[int] | None], votes: Sequence[int] = ()
) -> list[Variant]:
    """Every strategy with every number of steps that it reads; votes are added for the first.

    Args:
        strategies: as [`parse_strategy`] reads them.
        steps: `max_latent_steps` and `num_latent_steps` to their numbers, None or empty for the model's own.
        votes: numbers of sampled replies.

    Raises:
        ValueError: an unknown strategy, a number that no strategy reads, a variant that comes twice.
    """
    given = {name: list(numbers) for name, numbers in steps.items() if numbers}
    parsed = [(text, *parse_strategy(text)) for text in strategies]
    for name, numbers in given.items():
        if not any(get_latent_strategy(strategy).accepts(name) for _, strategy, _ in parsed):
            raise ValueError(f"{name}={numbers} is read by none of the strategies {list(strategies)}; leave it out")
    found: list[Variant] = []
    for text, strategy, own in parsed:
        names = [name for name in given if get_latent_strategy(strategy).accepts(name) and name not in own]
        for numbers in itertools.product(*(given[name] for name in names)):
            chosen = dict(zip(names, numbers, strict=True))
            label = ", ".join([text, *(f"{name} {number}" for name, number in chosen.items())])
            found.append(Variant(label, {"latent_strategy": strategy, **chosen, **own}))
    found += [Variant(f"{found[0].name}, most of {number}", found[0].options, number) for number in votes]
    names = [variant.name for variant in found]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"the variants {doubled} are asked for twice; give each once")
    return found


__all__ = ["STEP_OPTIONS", "Asked", "Variant", "variants_of"]
