"""Mazes: generated ones, and the published ones of VSP. A plan is right when it reaches the goal in simulation.

The protocols ask alike, and differ in the reply that models trained on mazes by a method have learned to write.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from trainers.data.maze_planning import parse_plan, score_plan, shortest_plan
from trainers.data.mazes import maze_dataset, maze_of_record, read_published_mazes
from trainers.data.records import Record, RecordReport, record_from_row

from ..runner import Prediction, build_prompt
from .benchmark import DEFAULT_PROTOCOL, AskProtocol, Benchmark, Scored
from .choice_protocols import REPLIES as CHOICE_REPLIES
from .choice_protocols import TAGGED
from .vsp_lines import LINES, read_vsp_lines

NUM_MAZES, SEED = 200, 123  # held out: no training script draws this seed's test split
CELL_PIXELS = 28  # of the generated mazes; published pictures are resized to it
# What stands behind the latents in the replies of training, of IVT-LR behind the words of the staged formats.
REPLIES = {DEFAULT_PROTOCOL: TAGGED, **CHOICE_REPLIES, "ivtlr": "Therefore, the answer is {answer}"}


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
    """Generated mazes of the test split.

    Args:
        num: so many; default: 200.
        seed: of the draw.
        sizes: sides; default: those of the generator.

    Raises:
        ValueError: a source, which they do not have; `num` below 1 or sizes that the generator refuses.
    """
    for name, value in (("data_root", source), ("image_folder", image_folder)):
        if value is not None:
            raise ValueError(f"{name}={os.fspath(value)!r}: these mazes are generated; for published ones take 'vsp'")
    options = {} if sizes is None else {"sizes": tuple(sizes)}
    number = NUM_MAZES if num is None else num
    number = number if max_samples is None else min(number, max_samples)  # the first ones of a longer table
    table = maze_dataset(number, seed=seed, split="test", **options)
    return [record_from_row(row) for row in table]


def read_vsp(
    source: str | os.PathLike | None = None,
    *,
    tasks: Sequence[str] | None = None,
    image_folder: str | os.PathLike | None = None,
    report: RecordReport | None = None,
    max_samples: int | None = None,
    cell_pixels: int = CELL_PIXELS,
    levels: Sequence[int] | None = None,
) -> list[Record]:
    """The published mazes: maps with pictures, or the lines of `test_direct.jsonl`, which say what is asked.

    Args:
        source: the folder of `level3/table`, `level3/img`, ..., or that of `test_direct.jsonl`, or this file.
        image_folder: of the lines' pictures; default: the folder of the file.
        cell_pixels: side of a cell to which pictures of maps are resized.
        levels: sizes to read, of maps; default: all.

    Raises:
        ValueError: no source, an option that its form does not have, a map that is none.
        RecordError: a missing file or column, a bad line; names file and row.
    """
    if source is None:
        raise ValueError(f"vsp needs data_root: the folder with level3/table, level3/img, ..., or that of {LINES}")
    path = Path(source)
    if path.is_file() or (path / LINES).is_file():
        if levels is not None:
            raise ValueError(f"levels={list(levels)}: {path} holds lines of mazes; leave levels out")
        return read_vsp_lines(path, image_folder=image_folder, report=report, max_samples=max_samples)
    if image_folder is not None:
        raise ValueError(f"image_folder={os.fspath(image_folder)!r}: the pictures of {path} are beside its maps")
    return read_published_mazes(path, levels, cell_pixels=cell_pixels)[:max_samples]


def score_maze(record: Record, prediction: Prediction) -> Scored:
    """Whether the plan of a reply reaches the goal; no move is no answer."""
    plan = parse_plan(prediction.text)
    return Scored(bool(score_plan(maze_of_record(record), prediction.text)), " ".join(plan) if plan else None)


def _protocol(name: str, reply: str) -> AskProtocol:
    source = "VSP, arXiv 2407.01863; the reply is that of models trained here"
    return AskProtocol(name, source, build_prompt, score_maze, 64, reply, ask=lambda record: record["question"])


def _benchmark(name: str, title: str, reader: Callable[..., list[Record]], sources: tuple[str, ...]) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        sources=sources,
        reader=reader,
        protocols={name: _protocol(name, reply) for name, reply in REPLIES.items()},
        group=lambda record: f"{maze_of_record(record).size}x{maze_of_record(record).size}",
        cluster=None,
        answers=lambda record: None,
        gold=_gold,
    )


def _gold(record: Record) -> str:
    """A shortest plan, of equally short ones that of the record's rule."""
    return " ".join(shortest_plan(maze_of_record(record), record["meta"].get("tie_seed", 0)))


MAZE_BENCHMARKS = (
    _benchmark("mazes", "Mazes (generated)", read_mazes, ()),
    _benchmark("vsp", "VSP mazes", read_vsp, ("UCSB-NLP-Chang/Visual-Spatial-Planning",)),
)

__all__ = ["CELL_PIXELS", "MAZE_BENCHMARKS", "NUM_MAZES", "REPLIES", "SEED", "read_mazes", "read_vsp", "score_maze"]
