"""A folder of a run: its settings, and finished items as they come, so that a run can be gone on with after a kill.

    run.json                  settings of the run: a folder is gone on with only under the same ones
    items/worker-000.jsonl    one line a finished item, appended by one process

A line is on disk before the next item begins, and a line that a kill cut off is passed over, so that whatever ends a
run costs the items of one batch, and no item counts twice. Files other than lines appear whole.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RUN, RESULTS, ITEMS, VERSION = "run.json", "results.json", "items", 1
DONE, FAILED, SKIPPED = "done", "failed", "skipped"


class RunFolder:
    """A folder that a run is written to.

    Args:
        folder: made when absent.
        settings: what the results depend on, name to a value that JSON can hold.
        kind: of the run, written into its settings.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any], kind: str) -> None:
        self.folder, self.settings, self.kind = Path(folder), json.loads(json.dumps(dict(settings))), kind

    def check(self, resume: bool) -> None:
        """Refuse a folder that is not this run's.

        Raises:
            ValueError: finished questions and no `resume`; questions of another configuration; names the folder, the
                first setting that differs, both values and the remedy.
        """
        path = self.folder / RUN
        if not path.exists():
            if (self.folder / RESULTS).exists():
                raise ValueError(f"{self.folder} holds the {RESULTS} of another program; give another output_dir")
            if self.has_items():
                raise ValueError(f"{self.folder} holds questions and no {RUN}; restore it, or give another output_dir")
            return
        run = read_json(path)
        found = run.get("settings") if isinstance(run, Mapping) else None
        if not isinstance(found, Mapping) or run.get("format") != self.kind or run.get("version") != VERSION:
            raise ValueError(
                f"{path} is not of this version of the library (format {self.kind!r}, version {VERSION}); give "
                "another output_dir"
            )
        if not resume and self.has_items():
            raise ValueError(
                f"{self.folder} holds questions of an earlier run; go on with it with resume, or give another "
                "output_dir"
            )
        for name in dict.fromkeys([*found, *self.settings]) if self.has_items() else ():
            if found.get(name) != self.settings.get(name):
                raise ValueError(
                    f"{self.folder} was begun with {name}={found.get(name)!r}, now {name}="
                    f"{self.settings.get(name)!r}; give another output_dir, or the same as before"
                )

    def has_items(self) -> bool:
        """Whether a question was finished, or failed, in an earlier run."""
        return any(path.stat().st_size for path in self._item_files())

    def begin(self) -> None:
        """Write the settings; for one process."""
        head = {"format": self.kind, "version": VERSION, "settings": self.settings}
        write_whole(self.folder / RUN, json.dumps(head, indent=1) + "\n")

    def append(self, worker: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Put finished questions on disk, all in one write.

        Args:
            worker: of this process; no two processes have one file.
            lines: see [`items`].
        """
        path = self.folder / ITEMS / f"worker-{worker:03d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = b"".join(json.dumps(dict(line)).encode() + b"\n" for line in lines)
        with path.open("a+b") as file:
            if file.tell() and not _ends_with_newline(file):
                data = b"\n" + data  # behind a line that a kill cut off
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def items(self) -> dict[Any, dict[str, Any]]:
        """The finished questions by `data_idx` (a number or a text), each once: a finished one before a failed one,
        else the last line.

        A line that cannot be read is what a kill left; its question is not finished.
        """
        found: dict[Any, dict[str, Any]] = {}
        for path in self._item_files():
            for data in path.read_bytes().split(b"\n"):
                try:
                    line = json.loads(data)
                    key, status = line["data_idx"], line["status"]
                except (ValueError, TypeError, KeyError):
                    continue
                if key not in found or found[key]["status"] == FAILED or status != FAILED:
                    found[key] = line
        return found

    def _item_files(self) -> list[Path]:
        return sorted((self.folder / ITEMS).glob("worker-*.jsonl"))


def write_whole(path: Path, text: str) -> None:
    """A file in UTF-8 that appears under its name when all of it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read_json(path: Path) -> Any:
    """The value of a file that a run left.

    Raises:
        ValueError: it cannot be read; names the file.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); restore it, or run again into another output_dir"
        ) from error


__all__ = ["DONE", "FAILED", "ITEMS", "RESULTS", "RUN", "SKIPPED", "VERSION", "RunFolder", "read_json", "write_whole"]
