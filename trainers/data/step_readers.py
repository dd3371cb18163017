"""The data sets with steps by name: M3CoT, ScienceQA (IVT-LR, arXiv 2510.12603) and the sets of Coconut (arXiv
2412.06769), for scripts that take the name as an option."""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .boxes import checked_option
from .m3cot import read_m3cot
from .prosqa import read_gsm8k_steps, read_prontoqa, read_prosqa
from .records import Record, RecordReport
from .scienceqa import read_scienceqa


class StepReader(NamedTuple):
    """A reader, and which of the two optional arguments it has."""

    read: Callable[..., Iterator[Record]]
    has_split: bool = True
    has_images: bool = False


STEP_READERS: dict[str, StepReader] = {
    "m3cot": StepReader(read_m3cot, has_images=True),
    "scienceqa": StepReader(read_scienceqa, has_images=True),
    "prosqa": StepReader(read_prosqa),
    "gsm8k": StepReader(read_gsm8k_steps, has_split=False),
    "prontoqa": StepReader(read_prontoqa),
}


def read_steps(
    data_format: str,
    path: str | os.PathLike,
    split: str | None = None,
    *,
    image_folder: str | os.PathLike | None = None,
    require_steps: bool = False,
    report: RecordReport | None = None,
) -> Iterator[Record]:
    """The records of a data set.

    Args:
        data_format: name in `STEP_READERS`.
        path: file, or folder or Hub id where the reader takes one.
        split: part of a folder, of a Hub id, or of ProntoQA's one file.
        image_folder: where image paths begin; default: the folder of the file.
        require_steps: a row without steps is bad.
        report: collects the rows; without one, reading ends with an error above 1 % bad rows.

    Raises:
        ValueError: an unknown format, or an option that its data do not have.
        RecordError, RecordShareError: see the reader.
    """
    reader = STEP_READERS[checked_option("data_format", data_format, tuple(STEP_READERS))]
    options: dict[str, Any] = {"require_steps": require_steps, "report": report}
    for name, value, known in (
        ("split", split, reader.has_split),
        ("image_folder", image_folder, reader.has_images),
    ):
        if value is not None and not known:
            raise ValueError(f"{name}={os.fspath(value)!r}: {data_format} has none; leave it out")
        if known:
            options[name] = value
    return reader.read(path, **options)


__all__ = ["STEP_READERS", "StepReader", "read_steps"]
