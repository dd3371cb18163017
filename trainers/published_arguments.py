"""Arguments of published scripts as ours, on the command line and in YAML files.

LVR (arXiv 2509.24251), both stages: the supervised one (`"sft"`) and GRPO_latent (`"grpo"`); IVT-LR and Coconut (arXiv
2510.12603, 2412.06769; `"staged"`); LaViT (arXiv 2601.10129; `"lavit"`, and `"teacher"` for its data builder). A name
that is ours too passes unchanged; an old or published name becomes our field; a dead one is refused, with what to
write instead. The tables (`published_table.py`, `published_staged_table.py`, `published_lavit_table.py`,
`published_teacher_table.py`) are also those of `hub_configs/methods/lvr.md`, `ivtlr.md` and `lavit.md`.
"""

import logging
import sys
from collections.abc import Mapping
from typing import Any

from trl import TrlParser

from .published_lavit_table import LAVIT_ARGUMENTS
from .published_rows import PublishedArgument
from .published_staged_table import STAGED_ARGUMENTS
from .published_table import BOTH, PUBLISHED_ARGUMENTS
from .published_teacher_table import TEACHER_ARGUMENTS

logger = logging.getLogger(__name__)
_LOGGED: set[str] = set()
_TABLES = {
    "sft": PUBLISHED_ARGUMENTS,
    "grpo": PUBLISHED_ARGUMENTS,
    "staged": STAGED_ARGUMENTS,
    "lavit": LAVIT_ARGUMENTS,
    "teacher": TEACHER_ARGUMENTS,
}


def arguments_of(stage: str) -> dict[str, PublishedArgument]:
    """The rows of a stage by published name.

    Raises:
        ValueError: an unknown stage.
    """
    if stage not in _TABLES:
        raise ValueError(f"unknown stage {stage!r}; choose one of {list(_TABLES)}")
    return {row.name: row for row in _TABLES[stage] if stage in row.stages}


def translate_settings(settings: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The settings of a YAML file under our names; names that are not in the table pass unchanged.

    Raises:
        ValueError: a published name that is dead, a value that it cannot have, or the same thing said twice in
            different words; names argument, value and remedy.
    """
    rows, plain = arguments_of(stage), {name: _plain(value) for name, value in settings.items()}
    result: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, value in settings.items():
        row = rows.get(name)
        if row is None or row.translate is None:
            found, shown = {name: value}, name
        else:
            try:
                found = row.translate(plain[name], plain)
            except ValueError as error:
                raise ValueError(f"{name}={value!r}, an argument of the published code: {error}") from error
            shown = f"{name} (published)"
            _log_once(f"{name}={value!r} of the published code is {_shown(found) or 'left out'} here ({row.effect})")
        for ours, new in found.items():
            if ours in result and _plain(result[ours]) != _plain(new):
                raise ValueError(
                    f"{shown} says {ours}={new!r} and {origin[ours]} says {ours}={result[ours]!r}; give one of them"
                )
            result.setdefault(ours, new)
            origin.setdefault(ours, shown)
    return result


def translate_arguments(arguments: list[str], stage: str) -> list[str]:
    """As [`translate_settings`], of a command line: `["--lvr_head", "True"]` gives `["--latent_head=simple"]`."""
    rows = arguments_of(stage)
    words: list[tuple[str | None, list[str]]] = []  # a flag with its values, or words before the first flag
    for word in arguments:
        if word.startswith("--"):
            words.append((word[2:].split("=", 1)[0].replace("-", "_"), [word]))
        elif words:
            words[-1][1].append(word)
        else:
            words.append((None, [word]))
    given = {name: _flag_value(parts) for name, parts in words if name is not None}
    translated = translate_settings(given, stage)
    result: list[str] = []
    for name, parts in words:
        row = rows.get(name or "")
        if row is None or row.translate is None:
            result += parts
    old = {name for name, row in rows.items() if row.translate is not None}
    kept = given.keys() - old
    return result + [f"--{name}={_word(value)}" for name, value in translated.items() if name not in kept]


class PublishedParser(TrlParser):
    """`trl.TrlParser` that takes the published names too, on the command line and in the YAML file of `--config`.

    Args:
        dataclass_types: as for `TrlParser`.
        stage: `"sft"`, `"grpo"`, `"staged"`, `"lavit"` or `"teacher"`.
    """

    def __init__(self, dataclass_types: Any, stage: str, **kwargs: Any) -> None:
        arguments_of(stage)
        self.stage = stage
        super().__init__(dataclass_types, **kwargs)

    def parse_args_and_config(self, args: Any = None, *further: Any, **kwargs: Any) -> tuple:
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_args_and_config(translate_arguments(words, self.stage), *further, **kwargs)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        return super().set_defaults_with_config(**translate_settings(kwargs, self.stage))


def staged_argument_table() -> list[str]:
    """The table of IVT-LR and Coconut as Markdown lines, as in `hub_configs/methods/ivtlr.md`."""
    return _table("published key", STAGED_ARGUMENTS)


def lavit_argument_table() -> list[str]:
    """The table of LaViT as Markdown lines, as in `hub_configs/methods/lavit.md`."""
    return _table("published argument", LAVIT_ARGUMENTS)


def teacher_argument_table() -> list[str]:
    """The table of LaViT's data builder as Markdown lines."""
    return _table("published option", TEACHER_ARGUMENTS)


def _table(title: str, rows: tuple[PublishedArgument, ...]) -> list[str]:
    lines = [f"| {title} | here | effect |", "|---|---|---|"]
    return lines + [f"| `{row.name}` | {f'`{row.ours}`' if row.ours else 'none'} | {row.effect} |" for row in rows]


def argument_table() -> list[str]:
    """The table of LVR as Markdown lines, as in `hub_configs/methods/lvr.md`."""
    lines = ["| published argument | stage | here | effect |", "|---|---|---|---|"]
    for row in PUBLISHED_ARGUMENTS:
        stage = "both" if row.stages == BOTH else row.stages[0]
        here = f"`{row.ours}`" if row.ours else "none"
        lines.append(f"| `{row.name}` | {stage} | {here} | {row.effect} |")
    return lines


def _plain(value: Any) -> Any:
    """A value as Python has it: words of a command line, and numbers like 1e-5 that YAML reads as text."""
    if not isinstance(value, str):
        return value
    named = {"true": True, "false": False, "none": None, "null": None, "": None}
    if value.lower() in named:
        return named[value.lower()]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _flag_value(parts: list[str]) -> Any:
    """The value of `["--name=value"]` or `["--name", "value", ...]`; a flag alone is true."""
    first = parts[0].split("=", 1)[1:]
    values = [*first, *parts[1:]]
    return True if not values else values[0] if len(values) == 1 else values


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _log_once(text: str) -> None:
    if text not in _LOGGED:
        _LOGGED.add(text)
        logger.warning("%s", text)


__all__ = [
    "PUBLISHED_ARGUMENTS",
    "PublishedArgument",
    "PublishedParser",
    "argument_table",
    "arguments_of",
    "lavit_argument_table",
    "staged_argument_table",
    "teacher_argument_table",
    "translate_arguments",
    "translate_settings",
]
