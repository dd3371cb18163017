"""Teacher signals on disk: shards that are whole or absent, an index, and the records for training.

    shard-00000.safetensors   tensors of the accepted samples of a shard, see below
    shard-00000.json          one row a record of the shard: the teacher's answer, accepted or why not, grid, box mass
    index.json                settings, fingerprint of the data, counts, and the shard of every accepted record

A shard covers `shard_size` records in a row and depends on nothing but those and the settings; its JSON is written
last and in one step, so that a run that was killed goes on with the shards that have none, and several processes write
what one process writes, byte for byte.

| tensor | shape | content |
|---|---|---|
| `<id>/concept` | `(D,)` | mean over the image tokens of the last decoder layer's output, before the final norm |
| `<id>/concept_full` | `(N, D)` | all of them (only with `save_full_concept`) |
| `<id>/attention` | `(N,)` float32 | attention over the image tokens, row by row, as captured (not normalised); \
`(T, N)` where there are several steps |
| `<id>/scores` | as `attention` | mean attention before its scaling (attention method) |
| `<id>/image` | bytes, uint8 | the image file, where the record has no path |
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

from .atomic_files import json_bytes, read_json, write_bytes, write_json
from .data.maze_rendering import encode_png
from .data.records import RECORD_FIELDS, Record, RecordReport, make_record, records_to_dataset

FORMAT, VERSION = "latent-teacher", 1
INDEX = "index.json"
_UNCOMPARED = ("source",)  # entries of `meta` that move with the folder of the data


@dataclass(frozen=True)
class StorePlan:
    """What a folder of teacher signals is made from: another plan is refused.

    Args:
        settings: name to a value that JSON can hold, of everything that the signals depend on.
        hashes: of each record, in order.
        shard_size: records in a shard.
    """

    settings: dict[str, Any]
    hashes: list[str]
    shard_size: int

    @property
    def num_shards(self) -> int:
        """How many shards hold all records."""
        return -(-len(self.hashes) // self.shard_size)

    def rows(self, shard: int) -> range:
        """The records of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.hashes)))

    def fingerprint(self, shard: int | None = None) -> str:
        """Of the records of a shard with the settings, or of all records without."""
        if shard is None:
            return _digest(self.hashes)
        rows = self.rows(shard)
        return _digest([self.settings, self.shard_size, shard, self.hashes[rows.start : rows.stop]])


def record_hash(record: Mapping[str, Any], image_root: str | os.PathLike | None = None) -> str:
    """Fingerprint of a record or of a table row: its fields, and its images as paths (below `image_root`) or bytes."""
    fields = {name: record[name] for name in RECORD_FIELDS if name not in ("images", "step_images")}
    for name in ("meta", "teacher"):
        fields[name] = json.loads(fields[name]) if isinstance(fields[name], str) else fields[name]
    fields["meta"] = {name: value for name, value in (fields["meta"] or {}).items() if name not in _UNCOMPARED}
    images = [image_path(image, image_root) or _digest_bytes(image_bytes(image)) for image in record["images"]]
    return _digest([fields, images])


def image_path(image: Any, image_root: str | os.PathLike | None = None) -> str | None:
    """The path of a record's image, relative to the root if it lies below it; None for an image that is no file."""
    if isinstance(image, Mapping):
        image = None if image.get("bytes") is not None else image["path"]
    if not isinstance(image, str | os.PathLike):
        return None
    path = Path(image)
    if image_root is not None and path.is_relative_to(image_root):
        path = path.relative_to(image_root)
    return path.as_posix()


def image_bytes(image: Any) -> bytes:
    """The image of a record that is no file, as the bytes of one: those of its row, else a PNG."""
    if isinstance(image, Mapping):
        return image["bytes"]
    if not isinstance(image, Image.Image):
        raise ValueError(f"an image must be a path, bytes or a PIL image, got {type(image).__name__}")
    return encode_png(image if image.mode == "RGB" else image.convert("RGB"))


class TeacherStore:
    """A folder of teacher signals that is being made.

    Args:
        folder: made when absent.
        plan: of this run.
        image_root: folder that the paths of images are kept relative to.

    Raises:
        ValueError: the folder was begun with other settings or other data; names the first of them and the remedy.
    """

    def __init__(
        self, folder: str | os.PathLike, plan: StorePlan, image_root: str | os.PathLike | None = None
    ) -> None:
        self.folder, self.plan = Path(folder), plan
        self.image_root = None if image_root is None else Path(image_root)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check()

    def _head(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.plan.settings,
            "shard_size": self.plan.shard_size,
            "num_records": len(self.plan.hashes),
            "data": self.plan.fingerprint(),
            "image_root": None if self.image_root is None else str(self.image_root),
        }

    def _check(self) -> None:
        if not (self.folder / INDEX).exists():
            return
        index, head = read_index(self.folder), self._head()
        found = {**index["settings"], **{name: index[name] for name in ("shard_size", "num_records")}}
        wanted = {**head["settings"], **{name: head[name] for name in ("shard_size", "num_records")}}
        for name in dict.fromkeys([*found, *wanted]):
            if found.get(name) != wanted.get(name):
                raise ValueError(
                    f"{self.folder} was extracted with {name}={found.get(name)!r}, now {name}={wanted.get(name)!r}; "
                    "give another output_dir, or the same as before"
                )
        if index["data"] != head["data"]:
            raise ValueError(
                f"{self.folder} was extracted from other records (as many, but not the same); give another output_dir"
            )

    def begin(self) -> None:
        """Write the index of a folder that has none; for one process."""
        if not (self.folder / INDEX).exists():
            write_json(self.folder / INDEX, {**self._head(), "complete": False})

    def rows(self, shard: int) -> list[dict[str, Any]] | None:
        """The rows of a finished shard; None when it is still to be made.

        Raises:
            ValueError: the file is of another run.
        """
        path = self.path(shard)
        if not path.exists() or not path.with_suffix(".safetensors").exists():
            return None
        content = read_json(path)
        if content.get("fingerprint") != self.plan.fingerprint(shard):
            raise ValueError(f"{path} is of other settings or other records; remove it, or give another output_dir")
        return content["rows"]

    def path(self, shard: int) -> Path:
        """Of the rows of a shard; its tensors are beside it."""
        return self.folder / f"shard-{shard:05d}.json"

    def write(self, shard: int, rows: Sequence[Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]) -> None:
        """Put a finished shard in place: its tensors, then its rows."""
        contiguous = {name: tensors[name].contiguous() for name in sorted(tensors)}
        write_bytes(self.path(shard).with_suffix(".safetensors"), save(contiguous))
        head = {"shard": shard, "fingerprint": self.plan.fingerprint(shard)}
        lines = b",\n".join(json_bytes(row) for row in rows)  # a line each: to be read with grep, too
        write_bytes(self.path(shard), json_bytes(head)[:-1] + b', "rows": [\n' + lines + b"\n]}\n")

    def merge(self, report: RecordReport | None = None) -> dict[str, Any]:
        """Count the rows of all shards and complete the index; for one process, when all shards are there.

        Args:
            report: counts bad rows, and good ones, whether accepted or not.

        Returns:
            The index.

        Raises:
            ValueError: a shard is missing.
        """
        counts, place = Counter(), {}
        for shard in range(self.plan.num_shards):
            rows = self.rows(shard)
            if rows is None:
                raise ValueError(f"{self.path(shard)} is missing; start the extraction again, it goes on there")
            for row in rows:
                counts[row["reason"] if row["reason"] is not None else "accepted"] += 1
                if row["accepted"]:
                    place[row["id"]] = shard
            if report is not None:
                report_rows(rows, report)
        accepted = counts.pop("accepted", 0)
        bad = counts.pop(BAD, 0)
        index = {
            **self._head(),
            "complete": True,
            "counts": {"accepted": accepted, "bad": bad, "rejected": dict(sorted(counts.items()))},
            "rows": place,
        }
        write_json(self.folder / INDEX, index)
        return index


BAD = "bad row"


def report_rows(rows: Sequence[Mapping[str, Any]], report: RecordReport) -> None:
    """Count the rows of a shard in a report: bad ones with their file, row and reason, all others as good."""
    for row in rows:
        if row["reason"] == BAD:
            report.bad(*row["bad"])
        else:
            report.good()


# Reading ------------------------------------------------------------------------------------------------------------


def read_index(folder: str | os.PathLike) -> dict[str, Any]:
    """The index of a folder of teacher signals.

    Raises:
        ValueError: there is none, or it is damaged or of another kind.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise ValueError(f"{folder} has no {INDEX}: no folder of teacher signals; make one with extract_teacher.py")
    index = read_json(path)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path} is no index of teacher signals (format {FORMAT!r}); give another folder")
    if index.get("version") != VERSION:
        raise ValueError(f"{path} has version {index.get('version')!r}, this library reads {VERSION}; extract again")
    return index


def iter_rows(folder: str | os.PathLike) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every row of a complete folder with the file of its tensors, in the order of the records.

    Raises:
        ValueError: the folder is not complete.
    """
    folder = Path(folder)
    index = read_index(folder)
    if not index["complete"]:
        raise ValueError(f"{folder} is not complete; start the extraction again with the same options, it goes on")
    for shard in range(-(-index["num_records"] // index["shard_size"])):
        path = folder / f"shard-{shard:05d}.json"
        for row in read_json(path)["rows"]:
            yield path.with_suffix(".safetensors"), row


def describe_teacher_folder(folder: str | os.PathLike) -> str:
    """What became of the records of a complete folder, as text: accepted, rejected by reason, bad rows."""
    index = read_index(folder)
    counts, total = index["counts"], index["num_records"]
    lines = [f"{counts['accepted']} of {total} samples accepted ({counts['accepted'] / max(total, 1):.1%})"]
    lines += [f"  rejected: {count} ({reason})" for reason, count in counts["rejected"].items()]
    return "\n".join([*lines, *([f"  bad rows: {counts['bad']}"] if counts["bad"] else [])])


def load_teacher_dataset(
    folder: str | os.PathLike, *, image_root: str | os.PathLike | None = None, decode: bool = False
) -> Dataset:
    """The accepted records of a folder, with `teacher` filled, for training.

    Args:
        folder: written by [`trainers.teachers.extract_teacher`].
        image_root: folder of the images, where it is not the one of the extraction any more.
        decode: see `record_features`; by default the collator opens the images.

    Returns:
        Rows of the record schema, in the order of the data. `teacher` refers to the tensors of the folder, with the
        teacher's grid and the fingerprint of the image (see `trainers/data/teacher_signals.py`).

    Raises:
        ValueError: no such folder, or not complete.
    """
    root = image_root if image_root is not None else read_index(folder)["image_root"]
    return records_to_dataset(_records(Path(folder), root), decode)


def _records(folder: Path, root: str | os.PathLike | None) -> Iterator[Record]:
    tensors, opened = None, None
    for path, row in iter_rows(folder):
        if not row["accepted"]:
            continue
        if path != opened:
            tensors, opened = safe_open(path, framework="pt"), path
        name, image = row["id"], row["image"]
        if image is None:
            source: Any = {"bytes": tensors.get_tensor(f"{name}/image").numpy().tobytes(), "path": None}
        else:
            source = image if root is None else os.path.join(root, image)
        place = {"path": os.path.abspath(path)}
        teacher = {
            "concept": {**place, "key": f"{name}/concept"},
            "attention": {**place, "key": f"{name}/attention"},
            "grid": row["grid"],
            "image": 0,
            "image_sha256": row["image_sha256"],
        }
        yield make_record(images=[source], teacher=teacher, **row["record"])


def _digest(value: Any) -> str:
    return _digest_bytes(json.dumps(value, sort_keys=True).encode())


def _digest_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


__all__ = [
    "BAD",
    "StorePlan",
    "TeacherStore",
    "describe_teacher_folder",
    "image_bytes",
    "image_path",
    "iter_rows",
    "load_teacher_dataset",
    "read_index",
    "record_hash",
    "report_rows",
]
