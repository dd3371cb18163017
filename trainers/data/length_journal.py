"""Counting the lengths of a data file row by row, so that a run that was killed goes on where it stopped.

Every counted row is one line of a journal beside the output. A process that dies loses nothing that it had written:
the next one reads the journal, takes over the rows that are still the same, and counts the others. The output itself
is written at the end, in one step.
"""

import itertools
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .lengths import (
    FORMAT,
    VERSION,
    BadRow,
    LengthTable,
    load_lengths,
    reference_length,
    row_fingerprint,
    save_lengths,
)
from .llava import record_from_llava
from .records import Record, RecordError
from .sources import open_sources

# Rows between two waits for the disk: what a power cut may cost. A killed process loses no row that it had written.
ROWS_PER_SYNC = 1000
_ROWS_PER_TASK = 64


class SourceRow(NamedTuple):
    """One row of a data file, as parsed (or the `RecordError` that parsing gave), and where it is."""

    index: int
    file: str
    row: int
    image_folder: str
    ds_name: str
    value: Any

    def record(self) -> Record:
        """The row as a record; raises a `RecordError` that says what is wrong with it."""
        return record_from_llava(self.value, self.file, self.row, self.image_folder, self.ds_name, self.index)


class LengthEntry(NamedTuple):
    """What counting a row gave: its length, or 0 and what is wrong."""

    index: int
    fingerprint: str | None
    length: int
    bad: BadRow | None = None


def iter_source_rows(path: str | os.PathLike, image_folder: str | os.PathLike | None = None) -> Iterator[SourceRow]:
    """Every row of a data file, or of all sources of a meta file, good or not; the index is that of `read_source`.

    Raises:
        RecordError: as `read_source`.
        ValueError: `image_folder` beside a meta file, which names its own.
    """
    index = itertools.count()
    for source in open_sources(path, image_folder):
        for row, value in source.rows:
            place = (next(index), os.fspath(source.path), row, os.fspath(source.image_folder), source.ds_name)
            yield SourceRow(*place, value)


# Ways to count ------------------------------------------------------------------------------------------------------


@dataclass
class ExactRows:
    """Counts a row as the collator lays it out.

    Args:
        count: record to length (`trainers.sample_lengths.SampleLengths`).
    """

    count: Callable[[Record], int]

    def __call__(self, row: SourceRow) -> int:
        return self.count(row.record())


@dataclass
class ReferenceRows:
    """Counts a row as the published code estimates it (see [`reference_length`])."""

    tokenizer: Any
    min_pixels: int
    max_pixels: int

    def __call__(self, row: SourceRow) -> int:
        if isinstance(row.value, RecordError):
            raise row.value
        try:
            return reference_length(row.value, self.tokenizer, row.image_folder, self.min_pixels, self.max_pixels)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"the estimate fails on this record ({type(error).__name__}: {error}); repair or remove it"
            raise RecordError(row.file, row.row, reason) from error


def count_row(count: Callable[[SourceRow], int], row: SourceRow, known: LengthEntry | None = None) -> LengthEntry:
    """The entry of a row: the known one if the row is still the same, else counted. Bad rows are tried again."""
    try:
        fingerprint = row_fingerprint(row.record())
    except RecordError:
        fingerprint = None
    if known is not None and known.bad is None and known.fingerprint == fingerprint is not None:
        return known
    try:
        return LengthEntry(row.index, fingerprint, count(row))
    except RecordError as error:
        return LengthEntry(row.index, fingerprint, 0, BadRow(error.file, error.row, error.reason))


def count_rows(
    count: Callable[[SourceRow], int],
    rows: Iterable[SourceRow],
    known: Mapping[int, LengthEntry],
    num_proc: int = 1,
) -> Iterator[LengthEntry]:
    """The entries of all rows in their order, counted here or by `num_proc` processes.

    Raises:
        BrokenProcessPool: a process died; what was yielded is in the journal.
    """
    if num_proc == 1:
        yield from (count_row(count, row, known.get(row.index)) for row in rows)
        return
    pairs = ((row, known.get(row.index)) for row in rows)
    context, waiting = multiprocessing.get_context("spawn"), deque()
    with ProcessPoolExecutor(num_proc, context, _set_way, (count,)) as pool:
        while part := list(itertools.islice(pairs, _ROWS_PER_TASK)):
            waiting.append(pool.submit(_count_part, part))
            if len(waiting) > 2 * num_proc:  # no more rows in memory than keep the processes busy
                yield from waiting.popleft().result()
        for task in waiting:
            yield from task.result()


_way: list[Callable[[SourceRow], int]] = []  # of a process of `count_rows`


def _set_way(count: Callable[[SourceRow], int]) -> None:
    _way[:] = [count]


def _count_part(pairs: Sequence[tuple[SourceRow, LengthEntry | None]]) -> list[LengthEntry]:
    return [count_row(_way[0], row, known) for row, known in pairs]


# The journal --------------------------------------------------------------------------------------------------------


class LengthJournal:
    """Entries of a length file that is being made, and its journal `<output>.partial`; a context manager.

    Args:
        output: the length file. One that exists is gone over again: rows that are still the same are taken over.
        formula, settings: how rows are counted. What was counted in another way is refused.
        force: begin anew, whatever is there.

    Raises:
        ValueError: `output` or its journal is no length file, or was counted with other settings: names the option,
            both values and the remedy.
    """

    def __init__(
        self, output: str | os.PathLike, formula: str, settings: Mapping[str, Any], force: bool = False
    ) -> None:
        self.output = Path(output)
        self.partial = self.output.with_name(self.output.name + ".partial")
        self.formula, self.settings = formula, dict(settings)
        self.header = {"format": f"{FORMAT}-partial", "version": VERSION}
        self.header.update(formula=formula, settings=self.settings)
        self.known: dict[int, LengthEntry] = {}
        self.entries: list[LengthEntry] = []
        self.output.parent.mkdir(parents=True, exist_ok=True)
        if force:
            self.partial.unlink(missing_ok=True)
        else:
            self._take_over_output()
            self._take_over_journal()
        self._file = self._open()

    def _take_over_output(self) -> None:
        if not self.output.exists():
            return
        remedy = "give another --output_path, or --force to begin anew"
        table = load_lengths(self.output)
        if table.fingerprints is None:
            raise ValueError(f"{self.output} is a file of the published form; {remedy}")
        self._check(self.output, table.formula, table.settings)
        for index, (fingerprint, length) in enumerate(zip(table.fingerprints, table.lengths, strict=True)):
            self.known[index] = LengthEntry(index, fingerprint, length, table.bad.get(index))

    def _take_over_journal(self) -> None:
        if not self.partial.exists():
            return
        with self.partial.open("rb") as file:
            lines = file.read().split(b"\n")
        parsed = [value for line in lines if (value := _parsed(line)) is not None]
        if not parsed:  # killed while it wrote the first line
            self.partial.unlink()
            return
        header, *rows = parsed
        if not isinstance(header, dict) or header.get("format") != self.header["format"]:
            raise ValueError(f"{self.partial} is no journal of lengths; remove it, or give another --output_path")
        self._check(self.partial, header["formula"], header["settings"])
        for index, fingerprint, length, bad in rows:
            self.known[index] = LengthEntry(index, fingerprint, length, BadRow(*bad) if bad else None)

    def _check(self, path: Path, formula: str, settings: Mapping[str, Any]) -> None:
        found, wanted = {"formula": formula, **settings}, {"formula": self.formula, **self.settings}
        for name in dict.fromkeys([*found, *wanted]):
            if found.get(name) != wanted.get(name):
                raise ValueError(
                    f"{path} was counted with {name}={found.get(name)!r}, now {name}={wanted.get(name)!r}; give "
                    "another --output_path, or --force to begin anew"
                )

    def _open(self) -> Any:
        """The journal, opened to append: behind a header, and on a line of its own if the last one was cut."""
        file = self.partial.open("ab")
        if file.tell():
            file.write(b"\n")
        else:
            file.write(_line(self.header))
        file.flush()
        return file

    def __enter__(self) -> "LengthJournal":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, entry: LengthEntry) -> None:
        """Keep an entry; a row that was counted now reaches the journal before this returns."""
        self.entries.append(entry)
        if entry != self.known.get(entry.index):
            self._file.write(_line(entry))
            self._file.flush()
            if len(self.entries) % ROWS_PER_SYNC == 0:
                os.fsync(self._file.fileno())

    def finish(self) -> LengthTable:
        """Write the length file from the entries, which must be those of all rows in order, and drop the journal."""
        table = LengthTable(
            lengths=[entry.length for entry in self.entries],
            bad={entry.index: entry.bad for entry in self.entries if entry.bad is not None},
            formula=self.formula,
            settings=self.settings,
            fingerprints=[entry.fingerprint for entry in self.entries],
            path=str(self.output),
        )
        save_lengths(table, self.output)
        self._file.close()
        self.partial.unlink(missing_ok=True)
        return table


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _parsed(line: bytes) -> Any:
    """The value of a line; None for an empty one and for one that was cut."""
    try:
        return json.loads(line) if line.strip() else None
    except ValueError:
        return None
