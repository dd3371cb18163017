"""What an evaluation runs: benchmarks with their records, and strategies with their numbers of steps."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_latent.latent_strategies import get_latent_strategy
from trainers.data.records import Record

from ..benchmarks.benchmark import AskProtocol, Benchmark
from ..conditions import parse_strategy


@dataclass(frozen=True)
class Asked:
    """A benchmark with its records and the way they are asked.

    Args:
        benchmark: of the registry.
        protocol: one of its protocols.
        records: what is asked.
        behind: text behind the latents: behind slots that are laid out, else at the end of the prompt.
    """

    benchmark: Benchmark
    protocol: AskProtocol
    records: Sequence[Record]
    behind: str = ""

    @property
    def clusters(self) -> list[str]:
        """What each record shares with others for the bootstrap; its number where there is nothing."""
        if self.benchmark.cluster is None:
            return [str(number) for number in range(len(self.records))]
        return [self.benchmark.cluster(record) for record in self.records]


@dataclass(frozen=True)
class Variant:
    """A model with a strategy and its options.

    Args:
        name: for tables, e.g. `"dynamic, max_latent_steps 8"`.
        options: of `generate`, `latent_strategy` among them.
        votes: replies that are sampled for each item, whose most frequent answer counts; 0 for one reply.
        model: folder or Hub id; empty for the model of the run.
    """

    name: str
    options: Mapping[str, Any]
    votes: int = 0
    model: str = ""


def variants_of(
    strategies: Sequence[str],
    numbers: Mapping[str, Sequence[int] | None] | None = None,
    votes: Sequence[int] = (),
    compare: str | Path | None = None,
    compare_strategy: str | None = None,
) -> list[Variant]:
    """Every strategy with every number that it reads; another model and votes are added.

    Args:
        strategies: as [`parse_strategy`] reads them, the first is the reference.
        numbers: options such as `max_latent_steps` to their numbers, None or empty for the model's own. What a
            strategy says of its own wins.
        votes: numbers of sampled replies, of the first strategy.
        compare: another model on the same items.
        compare_strategy: its strategy; default: the first.

    Raises:
        ValueError: an unknown strategy, a number that no strategy reads, a variant that comes twice.
    """
    given = {name: list(values) for name, values in (numbers or {}).items() if values}
    other = [] if compare is None else [compare_strategy or strategies[0]]
    for name, values in given.items():
        if not any(get_latent_strategy(parse_strategy(text)[0]).accepts(name) for text in (*strategies, *other)):
            raise ValueError(f"{name}={values} is read by none of the strategies {list(strategies)}; leave it out")
    found = [variant for text in strategies for variant in _with_numbers(text, given)]
    for text in other:
        for variant in _with_numbers(text, given):
            name = f"{variant.name}, {Path(str(compare)).name}"
            found.append(Variant(name, variant.options, model=str(compare)))
    if any(number < 1 for number in votes):
        raise ValueError(f"votes={list(votes)}: give numbers of replies, 1 or more")
    found += [Variant(f"{found[0].name}, most of {number}", found[0].options, number) for number in votes]
    names = [variant.name for variant in found]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"the conditions {doubled} are asked for several times; give each once")
    return found


def _with_numbers(text: str, given: Mapping[str, Sequence[int]]) -> list[Variant]:
    strategy, own = parse_strategy(text)
    names = [name for name in given if get_latent_strategy(strategy).accepts(name) and name not in own]
    found = []
    for values in itertools.product(*(given[name] for name in names)):
        chosen = dict(zip(names, values, strict=True))
        label = ", ".join([text, *(f"{name} {value}" for name, value in chosen.items())])
        found.append(Variant(label, {"latent_strategy": strategy, **chosen, **own}))
    return found


__all__ = ["Asked", "Variant", "variants_of"]
