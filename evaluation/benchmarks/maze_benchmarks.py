"""Mazes: generated ones, and the published ones of VSP. A plan is right when it reaches the goal in simulation."""

import os
from collections.abc import Sequence

from trainers.data.maze_planning import parse_plan, score_plan
from trainers.data.mazes import maze_dataset, maze_of_record, read_published_mazes
from trainers.data.records import Record, RecordReport, record_from_row

from ..runner import Prediction, build_prompt
from .benchmark import DEFAULT_PROTOCOL, AskProtocol, Benchmark, Scored
from .choice_protocols import TAGGED

NUM_MAZES, SEED = 200, 123  # held out: no training script draws this seed's test split
CELL_PIXELS = 28  # of the generated mazes; published pictures are resized to it
STATED = "Therefore, the answer is {answer}"  # of models trained on step sentences


def read_mazes(
    source: str | os.PathLike | None = None,
    *,
    tasks: Sequence[str] | None = None,
    image_folder: str | os.PathLike | None = None,
    report: RecordReport | None = None,
    max_samples: int | None = None,
    num: int | None = None,
    seed: int = SEED,
    sizes: Sequence[int] | None = None,
) -> list[Record]:
    """Generated mazes of the test split, `num` of them (default 200, or `max_samples`).

    Raises:
        ValueError: a source, which they do not have.
    """
    if source is not None:
        raise ValueError(f"data_root={os.fspath(source)!r}: these mazes are generated; for published ones take 'vsp'")
    options = {} if sizes is None else {"sizes": tuple(sizes)}
    table = maze_dataset(num or max_samples or NUM_MAZES, seed=seed, split="test", **options)
    return [record_from_row(row) for row in table]


def read_vsp(
    source: str | os.PathLike | None = None,
    *,
    tasks: Sequence[str] | None = None,
    image_folder: str | os.PathLike | None = None,
    report: RecordReport | None = None,
    max_samples: int | None = None,
    cell_pixels: int = CELL_PIXELS,
) -> list[Record]:
    """The published mazes from their folder.

    Raises:
        ValueError: no folder.
    """
    if source is None:
        raise ValueError("vsp needs data_root: the folder with level3/table, level3/img, ...")
    return read_published_mazes(source, cell_pixels=cell_pixels)[:max_samples]


def score_maze(record: Record, prediction: Prediction) -> Scored:
    """Whether the plan of a reply reaches the goal; no move is no answer."""
    plan = parse_plan(prediction.text)
    return Scored(bool(score_plan(maze_of_record(record), prediction.text)), " ".join(plan) if plan else None)


def _protocol(name: str, reply: str) -> AskProtocol:
    source = "VSP, arXiv 2407.01863; the reply is that of models trained here"
    ask = lambda record: record["question"]  # noqa: E731
    return AskProtocol(name, source, build_prompt, score_maze, 64, reply, ask=ask)


_PROTOCOLS = {
    name: _protocol(name, reply)
    for name, reply in (
        (DEFAULT_PROTOCOL, TAGGED),
        ("laser", TAGGED),
        ("lvr", TAGGED),
        ("lavit", TAGGED),
        ("ivtlr", STATED),
    )  # fmt: skip
}


def _benchmark(name: str, title: str, reader: object, sources: tuple[str, ...]) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        sources=sources,
        reader=reader,
        protocols=_PROTOCOLS,
        group=lambda record: f"{maze_of_record(record).size}x{maze_of_record(record).size}",
        cluster=None,
        answers=lambda record: None,
        gold=lambda record: record["answer"],
    )


MAZE_BENCHMARKS = (
    _benchmark("mazes", "Mazes (generated)", read_mazes, ()),
    _benchmark("vsp", "VSP mazes", read_vsp, ("UCSB-NLP-Chang/Visual-Spatial-Planning",)),
)

__all__ = ["CELL_PIXELS", "MAZE_BENCHMARKS", "NUM_MAZES", "SEED", "read_mazes", "read_vsp", "score_maze"]
