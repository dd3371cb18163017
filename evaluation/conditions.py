"""How a strategy with its options is written on a command line, and an accuracy in print."""

from collections.abc import Sequence
from typing import Any

import yaml

from modeling_latent.latent_strategies import get_latent_strategy, resolve_latent_options

from .statistics import wilson_interval


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


def accuracy_text(correct: Sequence[bool]) -> str:
    """A share in per cent with its 95 % Wilson interval."""
    low, high = wilson_interval(sum(correct), len(correct))
    return f"{100 * sum(correct) / len(correct):5.1f} % [{100 * low:4.1f}, {100 * high:4.1f}]"


__all__ = ["accuracy_text", "parse_strategy"]
