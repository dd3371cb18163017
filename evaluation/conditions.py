"""What the evaluation scripts share: models and strategies measured on the same items, one line and one entry each."""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from transformers import PreTrainedModel, ProcessorMixin

from modeling_latent import load_latent_model
from modeling_latent.latent_strategies import get_latent_strategy, resolve_latent_options

from .statistics import paired_bootstrap_difference, wilson_interval


class Report(Protocol):
    """Result of one condition: its name, what it got right, in the order of the items, and all of it as JSON."""

    name: str

    @property
    def correct(self) -> Sequence[bool]: ...

    def summary(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Condition:
    """A model with a strategy.

    Args:
        model, revision: see [`load_latent_model`].
        strategy: value of `latent_strategy`, with options of its own as [`parse_strategy`] reads them.
        label: for the report.
    """

    model: str
    revision: str | None
    strategy: str
    label: str


_STRATEGIES_HELP = (
    "conditions, the first is the reference; options of one behind a colon: name:option=value,option2=value "
    "(an option alone is true)"
)


def add_condition_arguments(
    parser: argparse.ArgumentParser, strategies: Sequence[str], max_new_tokens: int | None, batch_size: int
) -> None:
    """The options that every evaluation script has; the arguments are defaults."""
    add = parser.add_argument
    add("--model", "--checkpoint", required=True, help="folder or Hub id of a latent or stock model, or of an adapter")
    add("--revision", default=None, help="branch, tag or commit of a Hub id")
    add("--strategies", "--strategy", nargs="+", default=list(strategies), help=_STRATEGIES_HELP)
    add("--num_latent_steps", type=int, default=None, help="slots, or learned tokens; default: of the model")
    add("--max_new_tokens", type=int, default=max_new_tokens, help="budget of a reply")
    add("--compare", default=None, help="another model on the same items")
    add("--compare_strategy", default=None, help="its strategy; default: the first of --strategies")
    add("--batch_size", type=int, default=batch_size, help="prompts per call of generate")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the models run")
    add("--output", default=None, help="write predictions and accuracies to this JSON file")


def parse_strategy(text: str) -> tuple[str, dict[str, Any]]:
    """A strategy and the options behind its colon, e.g. `learned:mask_latents=padding` or `learned:mask_latents`.

    Args:
        text: `name[:option[=value][,option[=value]]...]`; a value is a YAML scalar, an option without one is `True`.

    Returns:
        The name and the options of `generate`, checked as the strategy checks them.

    Raises:
        ValueError: an unknown strategy, something that is no option, a value that the strategy refuses.
    """
    name, colon, rest = text.partition(":")
    strategy, options = get_latent_strategy(name), {}
    for part in rest.split(",") if colon else ():
        option, equals, value = part.partition("=")
        if not option or option in options or (equals and not value):
            wrong = f"{option!r} is given twice" if option in options else f"{part!r} is no option"
            raise ValueError(f"strategy {text!r}: {wrong}; write name:option=value,option2=value")
        options[option] = _scalar(value, text) if equals else True
    # What a strategy needs and this text does not give may be in the model's folder.
    stand_ins = dict.fromkeys(strategy.required, 1)
    try:
        resolve_latent_options(name, options, [stand_ins])
    except ValueError as error:
        raise ValueError(f"strategy {text!r}: {error}") from error
    return name, options


def _scalar(value: str, text: str) -> Any:
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or error
        raise ValueError(f"strategy {text!r}: {value!r} is no YAML value ({reason})") from error
    if isinstance(found, list | dict):
        raise ValueError(f"strategy {text!r}: {value!r} is a list or a mapping; give one value")
    return found


def conditions_of(args: argparse.Namespace) -> list[Condition]:
    """The conditions that the options ask for, the reference first.

    Raises:
        ValueError: an unknown strategy, a wrong option of one (see [`parse_strategy`]), a condition given twice.
    """
    found = [Condition(args.model, args.revision, each, f"latents {each}") for each in args.strategies]
    if args.compare:
        strategy = args.compare_strategy or args.strategies[0]
        found.append(Condition(args.compare, None, strategy, f"latents {strategy}, {Path(args.compare).name}"))
    for label, count in Counter(condition.label for condition in found).items():
        if count > 1:
            raise ValueError(f"the condition {label!r} is asked for {count} times; give it once")
    for condition in found:
        parse_strategy(condition.strategy)
    return found


def strategy_options(conditions: Iterable[Condition], **values: Any) -> dict[str, dict[str, Any]]:
    """Options of `generate` for each strategy: its own, and of those given (not None) the ones that it reads.

    Args:
        conditions: whose strategies are looked up.
        values: options for all strategies; what a strategy says of its own wins.

    Raises:
        ValueError: an option that no strategy reads.
    """
    strategies = {condition.strategy: parse_strategy(condition.strategy) for condition in conditions}
    given = {name: value for name, value in values.items() if value is not None}
    for option, value in given.items():
        if not any(get_latent_strategy(name).accepts(option) for name, _ in strategies.values()):
            raise ValueError(f"{option}={value!r} is read by none of the strategies {list(strategies)}; leave it out")
    return {
        text: {
            "latent_strategy": name,
            **{key: value for key, value in given.items() if get_latent_strategy(name).accepts(key)},
            **own,
        }
        for text, (name, own) in strategies.items()
    }


def load_models(
    conditions: Iterable[Condition], method: str, device: str | torch.device
) -> dict[str, tuple[PreTrainedModel, ProcessorMixin]]:
    """Model and processor of each condition, every model once; a stock one is made latent, for the strategy `off`.

    Args:
        conditions: whose models are loaded.
        method: that a stock model is made for.
        device: where they are put.
    """
    models = {}
    for condition in conditions:
        if condition.model not in models:
            model, processor = load_latent_model(
                condition.model, method=method, adapter="merge", revision=condition.revision, trust_remote_code=True
            )
            models[condition.model] = model.to(device), processor
    return models


def accuracy_text(correct: Sequence[bool]) -> str:
    """A share in per cent with its 95 % Wilson interval."""
    low, high = wilson_interval(sum(correct), len(correct))
    return f"{100 * sum(correct) / len(correct):5.1f} % [{100 * low:4.1f}, {100 * high:4.1f}]"


def print_differences(reports: Sequence[Report]) -> None:
    """Difference of the first condition to every other on the same items, with its paired bootstrap interval."""
    first, *others = reports
    for other in others:
        diff = paired_bootstrap_difference(first.correct, other.correct)
        points = [100 * value for value in diff]
        print(f"  {first.name} minus {other.name}: {points[0]:+.1f} points [{points[1]:+.1f}, {points[2]:+.1f}]")


def write_reports(path: str | Path | None, reports: Iterable[Report]) -> None:
    """Write all conditions to a JSON file, by name; without a path nothing is written."""
    if path is not None:
        results = {report.name: report.summary() for report in reports}
        Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


__all__ = [
    "Condition",
    "Report",
    "accuracy_text",
    "add_condition_arguments",
    "conditions_of",
    "load_models",
    "parse_strategy",
    "print_differences",
    "strategy_options",
    "write_reports",
]
