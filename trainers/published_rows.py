"""Rows of a table of published arguments: the name of a published script, and what it is here.

The tables: `published_table.py` (LVR), `published_staged_table.py` (IVT-LR and Coconut), `published_lavit_table.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# `(value, all settings of the same source)` to our settings; raises ValueError with the remedy alone.
Translation = Callable[[Any, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class PublishedArgument:
    """One row of the table.

    Args:
        name: of the published scripts.
        stages: that have it.
        ours: the field here; `""` where there is none.
        effect: what it does here, for the method page.
        translate: `None` where name and values are ours already.
    """

    name: str
    stages: tuple[str, ...]
    ours: str
    effect: str
    translate: Translation | None = None


# Kinds of rows ------------------------------------------------------------------------------------------------------


def same(name: str, stages: tuple[str, ...], effect: str) -> PublishedArgument:
    return PublishedArgument(name, stages, name, effect)


def renamed(
    name: str, stages: tuple[str, ...], ours: str, effect: str, convert: Callable[[Any], Any] | None = None
) -> PublishedArgument:
    """Our name for the same thing; `None`, the published default of many, leaves ours as it is."""

    def translate(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {} if value is None else {ours: value if convert is None else convert(value)}

    return PublishedArgument(name, stages, ours, effect, translate)


def chosen(
    name: str, stages: tuple[str, ...], ours: str, effect: str, values: Mapping[Any, dict[str, Any]]
) -> PublishedArgument:
    """A fixed set of values, each with settings of ours."""

    def translate(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(value, bool | str | None) or value not in values:
            raise ValueError(f"choose one of {list(values)}")
        return dict(values[value])

    return PublishedArgument(name, stages, ours, effect, translate)


def dead(
    name: str, stages: tuple[str, ...], effect: str, remedy: str, harmless: tuple[Any, ...] = (None,)
) -> PublishedArgument:
    """No field here: dropped at values that changed nothing in the published code either, else refused."""

    def translate(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        if value in harmless:
            return {}
        raise ValueError(remedy)

    return PublishedArgument(name, stages, "", effect, translate)


# Values -------------------------------------------------------------------------------------------------------------


def warmup_ratio(value: Any) -> Any:
    """A share of all steps, which `warmup_steps` of transformers 5 takes as it is.

    Raises:
        ValueError: no share.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError("a ratio is at least 0 and below 1; for a number of steps set warmup_steps")
    return value


__all__ = ["PublishedArgument", "Translation", "chosen", "dead", "renamed", "same", "warmup_ratio"]
