"""The files that teacher signals lie in, and the values in a record in place of a file (LaViT, card 2.4 and 5.2).

Kinds: `.safetensors` with a key, `.pt` and `.pth` with one tensor or a dictionary and a key, and of an attention the
published `.json`: `{"steps": [{"p_t": [...]}, ...]}`.
"""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

EXTRACT_AGAIN = "extract the signals again (examples/extract_teacher.py), or leave the record out"


class SignalError(ValueError):
    """What is wrong with a signal, and what to do; the record is added by who knows it."""


def read_signal(reference: Any, name: str) -> tuple["Tensor", str]:
    """The values that a record refers to.

    Args:
        reference: `{"path", "key", "step"}`, `{"values"}` or a bare list, see `teacher_signals.py`.
        name: of the signal, `"concept"` or `"attention"`.

    Returns:
        A float32 tensor of any shape on the CPU, and how errors name it.

    Raises:
        SignalError: no reference, a file that is missing, of an unknown kind or unreadable, or values that are no
            numbers.
    """
    import torch

    if isinstance(reference, list | tuple):
        reference = {"values": reference}
    given = [key for key in ("path", "values") if isinstance(reference, Mapping) and reference.get(key) is not None]
    if len(given) != 1:
        raise SignalError(
            f"no {name} ({reference!r:.80}), which the training needs; give {{'path': file, 'key': name}} or "
            "{'values': [...]}, or set the weight of its loss to 0"
        )
    where, values = f"{name} in the record", reference.get("values")
    if given == ["path"]:
        where = f"{name} in {os.fspath(reference['path'])}"
        values = _from_file(Path(reference["path"]), reference, name)
    try:
        return torch.as_tensor(values).detach().to(torch.float32), where
    except (TypeError, ValueError, RuntimeError) as error:
        raise SignalError(f"{where} is no tensor of numbers ({error}); {EXTRACT_AGAIN}") from error


def _from_file(path: Path, reference: Mapping[str, Any], name: str) -> Any:
    from safetensors import SafetensorError

    readers = {".safetensors": _from_safetensors, ".pt": _from_pickle, ".pth": _from_pickle}
    if name == "attention":
        readers[".json"] = _from_json
    if path.suffix not in readers:
        raise SignalError(f"{name} in {path}: unknown kind of file; give one of {', '.join(readers)}")
    if not path.is_file():
        raise SignalError(f"{name}: file {path} does not exist; correct the path, or {EXTRACT_AGAIN}")
    unreadable = (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError)
    try:
        return readers[path.suffix](path, reference)
    except (*unreadable, pickle.UnpicklingError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {str(error):.120}"
        raise SignalError(f"{name} in {path} cannot be read ({reason}); {EXTRACT_AGAIN}") from error


def _from_safetensors(path: Path, reference: Mapping[str, Any]) -> Any:
    from safetensors import safe_open

    if reference.get("key") is None:
        raise ValueError("no key is given; it names the tensor in the file")
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(reference["key"])


def _from_pickle(path: Path, reference: Mapping[str, Any]) -> Any:
    import torch

    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return loaded if reference.get("key") is None else loaded[reference["key"]]


def _from_json(path: Path, reference: Mapping[str, Any]) -> Any:
    """Published layout of a trajectory: `{"steps": [{"p_t": [...]}, ...]}`."""
    step = reference.get("step") or 0
    if not is_index(step):
        raise ValueError(f"step={step!r} is not the index of a step")
    return json.loads(path.read_text(encoding="utf-8"))["steps"][step]["p_t"]


def is_index(value: Any) -> bool:
    """Whether a value from JSON is an integer, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
