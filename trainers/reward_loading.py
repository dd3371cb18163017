"""Finding reward functions in a module or file that the user names, and checking what they return.

Paper: "Latent Visual Reasoning" (LVR), arXiv 2509.24251, stage 2 (method card, section 4.6): a reward function is one
whose name ends with `_reward`. Deviation from the reference, on purpose: a function counts only in the module that
defines it, not where it is imported.
"""

import functools
import importlib
import importlib.util
import inspect
import logging
import math
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

SUFFIX = "_reward"
BUILTIN = "trainers.rewards"
_SHOWN = 120  # characters of a completion in an error
RewardFunction = Callable[..., Any]


class RewardError(ValueError):
    """A reward function that cannot be found or used, or that fails: function, sample and remedy."""


# Finding


def discover_rewards(source: str | Path | ModuleType) -> list[RewardFunction]:
    """All reward functions of a module, in the order of its source.

    Args:
        source: a module, its dotted name, or the path of a `.py` file.

    Raises:
        RewardError: the module cannot be imported, or defines no function whose name ends with `_reward`.
    """
    module = source if isinstance(source, ModuleType) else _import(str(source))
    named = {name: value for name, value in vars(module).items() if name.endswith(SUFFIX)}
    found = {name: v for name, v in named.items() if inspect.isfunction(v) and v.__module__ == module.__name__}
    others = sorted(set(named) - set(found))
    where = getattr(module, "__file__", None) or module.__name__
    if not found:
        hint = f" ({', '.join(others)}: not a function defined there)" if others else ""
        raise RewardError(f"{where} defines no function whose name ends with {SUFFIX!r}{hint}; define one there")
    if others:
        logger.warning("%s: %s not used as rewards: no functions defined there", where, ", ".join(others))
    return sorted(found.values(), key=lambda function: inspect.unwrap(function).__code__.co_firstlineno)


def load_rewards(sources: str | Path | ModuleType | Sequence[str | Path | ModuleType]) -> list[RewardFunction]:
    """Reward functions ready for a trainer: found, and checked at every call ([`checked_reward`]).

    Args:
        sources: one or several of: the name of a function of `trainers.rewards` (`"maze_reward"`); a module, dotted
            name or `.py` file, for all its functions; `"module:function"` or `"file.py:function"`, for one.

    Raises:
        RewardError: a source without that function, a function named twice, or one whose library is not installed.
    """
    sources = [sources] if isinstance(sources, str | Path | ModuleType) else list(sources)
    functions = [function for source in sources for function in _functions_of(source)]
    names = [function.__name__ for function in functions]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise RewardError(f"reward functions named twice: {twice}" if twice else "no reward function was named")
    for function in functions:
        for library in getattr(function, "requires", ()):
            if importlib.util.find_spec(library) is None:
                package = library.replace("_", "-")
                raise RewardError(
                    f"{function.__name__} needs {package}, which is not installed: pip install {package}"
                )
    return [checked_reward(function) for function in functions]


def _functions_of(source: str | Path | ModuleType) -> list[RewardFunction]:
    if not isinstance(source, str):
        return discover_rewards(source)
    if source.isidentifier() and source.endswith(SUFFIX):
        source = f"{BUILTIN}:{source}"
    place, colon, name = source.rpartition(":")
    if not colon or not name.isidentifier():
        return discover_rewards(source)
    functions = {function.__name__: function for function in discover_rewards(place)}
    if name not in functions:
        raise RewardError(f"{place} has no reward function {name!r}; choose one of {sorted(functions)}")
    return [functions[name]]


def _import(source: str) -> ModuleType:
    path = Path(source)
    if path.suffix == ".py" and not path.is_file():
        raise RewardError(f"reward file {source!r} does not exist; give the path of a .py file")
    try:
        return _import_file(path) if path.is_file() else importlib.import_module(source)
    except Exception as error:
        raise RewardError(
            f"reward module {source!r} cannot be imported ({type(error).__name__}: {error}); give a function of "
            f"{BUILTIN}, the dotted name of a module on the path, or the path of a .py file"
        ) from error


def _import_file(path: Path) -> ModuleType:
    """The module of a file, imported once as long as the file stays the same."""
    path = path.resolve()
    name = f"_rewards_{path.stem}_{zlib.crc32(f'{path}:{path.stat().st_mtime_ns}'.encode()):08x}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


# Checking


def checked_reward(function: RewardFunction) -> RewardFunction:
    """The function, whose errors name it and the sample; what it returns is checked.

    It must give one number for each completion, or None where it does not apply (TRL leaves such an entry out). The
    wrapper keeps the name, and is asynchronous if the function is.

    Raises:
        RewardError: when called: the function raises; gives another number of rewards; gives NaN, an infinite number
            or something else.
    """
    name = function.__name__

    @functools.wraps(function)
    def wrapper(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        try:
            rewards = function(completions=completions, **columns)
        except Exception as error:
            raise _raised(
                name, error, _failing_sample(function, completions, columns), completions, columns
            ) from error
        return _checked(name, rewards, completions, columns)

    @functools.wraps(function)
    async def async_wrapper(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        try:
            rewards = await function(completions=completions, **columns)
        except Exception as error:
            index = await _failing_sample_async(function, completions, columns)
            raise _raised(name, error, index, completions, columns) from error
        return _checked(name, rewards, completions, columns)

    return async_wrapper if inspect.iscoroutinefunction(function) else wrapper


def _failing_sample(function: RewardFunction, completions: Sequence[Any], columns: dict[str, Any]) -> int | None:
    """The first sample for which the function raises when it is called with that sample alone."""
    for index, sample in enumerate(_samples(completions, columns)):
        try:
            function(**sample)
        except Exception:
            return index
    return None


async def _failing_sample_async(
    function: RewardFunction, completions: Sequence[Any], columns: dict[str, Any]
) -> int | None:
    for index, sample in enumerate(_samples(completions, columns)):
        try:
            await function(**sample)
        except Exception:
            return index
    return None


def _samples(completions: Sequence[Any], columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of a call for each sample alone; what is no column is handed on as it is."""
    size = len(completions)
    return [
        {"completions": completions[i : i + 1]}
        | {k: v[i : i + 1] if isinstance(v, list) and len(v) == size else v for k, v in columns.items()}
        for i in range(size)
    ]


def _sample(index: int, completions: Sequence[Any], columns: dict[str, Any]) -> str:
    ids = columns.get("id")
    text = str(completions[index])
    shown = repr(text[:_SHOWN]) + ("..." if len(text) > _SHOWN else "")
    named = f" (id {ids[index]!r})" if isinstance(ids, list) and len(ids) == len(completions) else ""
    return f"sample {index}{named}, completion {shown}"


def _raised(
    name: str, error: Exception, index: int | None, completions: Sequence[Any], columns: dict[str, Any]
) -> RewardError:
    where = f"a batch of {len(completions)}, and no sample of it alone"
    where = where if index is None else _sample(index, completions, columns)
    return RewardError(f"reward function {name!r} raised {type(error).__name__}: {error}; for {where}")


def _checked(name: str, rewards: Any, completions: Sequence[Any], columns: dict[str, Any]) -> list[float | None]:
    rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards
    if not isinstance(rewards, Sequence) or isinstance(rewards, str):
        raise RewardError(f"reward function {name!r} returned {type(rewards).__name__}; return a list of numbers")
    if len(rewards) != len(completions):
        raise RewardError(
            f"reward function {name!r} returned {len(rewards)} rewards for {len(completions)} completions; return one "
            "for each, None where it does not apply"
        )
    checked: list[float | None] = []
    for index, reward in enumerate(rewards):
        try:
            value = None if reward is None else float(reward)
        except (TypeError, ValueError):
            value = math.nan
        if isinstance(reward, str) or (value is not None and not math.isfinite(value)):
            raise RewardError(
                f"reward function {name!r} returned {reward!r} for {_sample(index, completions, columns)}; return a "
                "finite number, or None where it does not apply"
            )
        checked.append(value)
    return checked
