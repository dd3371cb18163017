"""What a benchmark is: where its items are, how they are asked, how a reply is scored.

A benchmark is data and pure functions, no loop: [`AskProtocol`] is one published (or the corrected) way to ask and to
score its records, [`Benchmark`] the table of them beside the reader. `registry.py` lists all benchmarks.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import ProcessorMixin

from trainers.data.boxes import checked_option
from trainers.data.records import Record, RecordReport

from ..runner import Prediction

DEFAULT_PROTOCOL = "default"


class Scored(NamedTuple):
    """What was read out of a reply: whether it is right, and the answer, None when none could be read."""

    correct: bool
    answer: str | None


class GoldReply(NamedTuple):
    """A reply as the model would write it behind its latents: `before + content + after`.

    Only the tokens of `content` are scored when a reply is teacher-forced: no template, no end of the turn.
    """

    before: str
    content: str
    after: str = ""


@dataclass(frozen=True)
class AskProtocol:
    """One way to ask the records of a benchmark and to score the replies.

    Args:
        name: `"default"` for the corrected one, else the method it was published with (`"laser"`, `"lvr"`, ...).
        source: paper and section.
        prompt: from processor and record to the whole chat prompt, an image token for each image.
        score: from record and prediction to what was read.
        max_new_tokens: budget of a reply, slots and markers included.
        reply: template of a right reply with `{answer}` where the answer's content stands, e.g.
            `"<answer>{answer}</answer>"`; used to teacher-force the gold answer and the options.
        processor_options: of the processor's call, e.g. `{"add_special_tokens": False}`.
        prepare: changes a record before it is asked (e.g. resizes its pictures), or None.
        ask: what the user says, without the chat template, where the prompt is that alone.
    """

    name: str
    source: str
    prompt: Callable[[ProcessorMixin, Record], str]
    score: Callable[[Record, Prediction], Scored]
    max_new_tokens: int
    reply: str = "{answer}"
    processor_options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Record], Record] | None = None
    ask: Callable[[Record], str] | None = None

    def gold_reply(self, answer: str) -> GoldReply:
        """The reply that says `answer`, cut at its content."""
        before, after = self.reply.split("{answer}")
        return GoldReply(before, answer, after)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: name, published sources, reader, protocols, groups.

    Args:
        name: as on the command line (`"blink"`).
        title: as in papers (`"BLINK"`).
        sources: Hub ids that hold it, the published one first, then the copies of evaluation harnesses.
        reader: see [`Benchmark.read`].
        protocols: by name; `"default"` is always there.
        group: the category of a record, for accuracy by group.
        cluster: what records share that are not independent (the image, MMVP's pair, HR-Bench's cycle, BLINK's
            item), for the bootstrap; None: every record alone.
        answers: of a record, the answer strings of its options (letters, `"Yes"` and `"No"`), None for open answers.
        gold: the right answer string of a record, one of `answers` where there are some.
        tasks: names of sub-tasks that can be picked, empty for none.
        columns: what a row must hold.
    """

    name: str
    title: str
    sources: tuple[str, ...]
    reader: Callable[..., list[Record]]
    protocols: Mapping[str, AskProtocol]
    group: Callable[[Record], str]
    cluster: Callable[[Record], str] | None
    answers: Callable[[Record], Sequence[str] | None]
    gold: Callable[[Record], str]
    tasks: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def read(
        self,
        source: str | os.PathLike | None = None,
        *,
        tasks: Sequence[str] | None = None,
        image_folder: str | os.PathLike | None = None,
        report: RecordReport | None = None,
        max_samples: int | None = None,
        **options: Any,
    ) -> list[Record]:
        """The records of the benchmark from a folder, a file (parquet, JSON, JSON lines, CSV, TSV) or a Hub id.

        Args:
            source: default: the first of `sources` (a generated benchmark needs none).
            tasks: only these sub-tasks.
            image_folder: where relative paths of images begin; default: the folder of the file.
            report: collects good, bad and skipped rows; without one, reading ends with an error above 1 % bad rows.
            max_samples: only the first so many records.
            options: of the benchmark, e.g. `num`, `seed`, `sizes` of generated mazes.

        Raises:
            RecordError: a missing file, folder or column; names it.
            RecordShareError: too many bad rows.
            ValueError: an unknown task, `max_samples` below 1, or no record at all.
        """
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples={max_samples!r} must be at least 1; leave it out for all")
        for task in tasks or ():
            if not self.tasks:
                raise ValueError(f"tasks={list(tasks or ())}: {self.name} has no tasks; leave them out")
            checked_option("tasks", task, self.tasks)
        own = RecordReport() if report is None else report
        records = self.reader(
            source, tasks=tasks, image_folder=image_folder, report=own, max_samples=max_samples, **options
        )
        if report is None:
            own.check()
        if not records:
            where = os.fspath(source) if source is not None else ", ".join(self.sources)
            raise ValueError(f"{where} has no record for {self.name}: {own.summary()}")
        return records

    def protocol(self, name: str = DEFAULT_PROTOCOL) -> AskProtocol:
        """A protocol by name.

        Raises:
            ValueError: none of that name; lists those there are.
        """
        return self.protocols[checked_option("protocol", name, tuple(self.protocols))]


__all__ = ["DEFAULT_PROTOCOL", "AskProtocol", "Benchmark", "GoldReply", "Scored"]
