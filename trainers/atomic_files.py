"""Files that are whole at every moment, whatever kills the process that writes them."""

import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step: whoever looks sees the old one or the whole new one, whatever kills the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """A value as JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "surrogatepass")


def write_json(path: Path, value: Any) -> None:
    """[`write_bytes`] of a value as JSON."""
    write_bytes(path, json_bytes(value, indent=1) + b"\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file that a run left.

    Raises:
        ValueError: it is damaged; names the file.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and start again") from error


__all__ = ["json_bytes", "read_json", "write_bytes", "write_json"]
