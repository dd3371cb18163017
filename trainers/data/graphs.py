"""Graph questions as records: generated in the manner of ProsQA, with steps, answer and a checker.

Task: ProsQA of "Training Large Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769 (Coconut):

    Every zumpus is a lempus. Alex is a zumpus. Bob is a gorpus. ... Is Alex a lempus or a gorpus?

Steps are the sentences of a shortest path ("Alex is a zumpus.", "Every zumpus is a lempus."), the answer is "Alex is a
lempus.". How the graphs are drawn, and why nothing but the path gives the answer, is in `graph_generation.py`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .generated import generated_numbers
from .graph_generation import CONCEPTS, ENTITIES, SMALL_GRAPHS, Edge, GraphGenerator, GraphQuestion, distances
from .records import Record, make_record, record_features

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


__all__ = [
    "CONCEPTS",
    "ENTITIES",
    "SMALL_GRAPHS",
    "GraphGenerator",
    "GraphQuestion",
    "check_graph_question",
    "distances",
    "graph_dataset",
    "graph_record",
    "graph_stream",
    "solve_graph_question",
]

_SENTENCE = re.compile(r"(Every )?(\w+) is an? (\w+)\.")
_ASKED = re.compile(r"Is (\w+) an? (\w+) or (?:an? )?(\w+)\?")


def graph_record(
    question: GraphQuestion,
    *,
    id: str | None = None,
    sentences: str = " ",
    notation: str = "sentences",
    meta: dict[str, Any] | None = None,
) -> Record:
    """A graph question with its steps.

    Args:
        question: what to write.
        id: of the record; `graph-{identity}` by default.
        sentences: what separates two sentences of the question.
        notation: `"sentences"`, or `"pairs"` for tiny models: "zumpus lempus ; Alex zumpus ; Alex ? lempus gorpus",
            the answer "lempus".
        meta: more entries for `meta`, which has `identity`, `options` (in the order asked), `right` (0 or 1, which of
            them is right), `subject`, `path`, `num_nodes` and `num_edges`.
    """
    first, second = question.options
    path = list(itertools.pairwise(question.path))
    if notation == "pairs":
        asked = " ; ".join([*map(" ".join, question.edges), f"{question.subject} ? {first} {second}"])
        answer, steps = question.answer, list(map(" ".join, path))
    elif notation == "sentences":
        persons = set(question.entities)
        edges = [_sentence(edge, persons) for edge in question.edges]
        asked = sentences.join([*edges, f"Is {question.subject} a {first} or a {second}?"])
        answer, steps = f"{question.subject} is a {question.answer}.", [_sentence(edge, persons) for edge in path]
    else:
        raise ValueError(f"notation={notation!r} is unknown; choose 'sentences' or 'pairs'")
    facts = {
        "identity": question.identity,
        "subject": question.subject,
        "options": list(question.options),
        "right": question.options.index(question.answer),
        "path": list(question.path),
        "num_nodes": len(set(itertools.chain.from_iterable(question.edges))),
        "num_edges": len(question.edges),
    }
    return make_record(
        id=id or f"graph-{question.identity}",
        question=asked,
        answer=answer,
        steps=steps,
        meta={**facts, **(meta or {})},
    )


def _sentence(edge: Edge, persons: set[str]) -> str:
    child, parent = edge
    return f"{child} is a {parent}." if child in persons else f"Every {child} is a {parent}."


# The checker reads the text alone, generated or published ("Is Tom a lempus or scrompus?")


def solve_graph_question(question: str) -> str:
    """The answer of a question, found by breadth-first search: `"Alex is a lempus."`.

    Raises:
        ValueError: a sentence of another form, no question at the end, or not exactly one option that is reached.
    """
    edges, subject, options = _parse(question)
    found = distances(edges, subject)
    reached = [option for option in options if option in found]
    if len(reached) != 1:
        raise ValueError(f"{subject} reaches {reached} of the options {options}; a question needs exactly one")
    return f"{subject} is a {reached[0]}."


def check_graph_question(question: str, answer: str, steps: Sequence[str] | None = None) -> None:
    """Checks that a question has exactly the stated answer, and that the steps are a shortest way to it.

    Raises:
        ValueError: what is wrong: question, answer, or a step; see also [`solve_graph_question`].
    """
    found = solve_graph_question(question)
    if answer != found:
        raise ValueError(f"the answer is {found!r}, not {answer!r}: {question!r:.200}")
    if steps is None:
        return
    edges, subject, _ = _parse(question)
    way = [_edge(step) for step in steps]
    target = _edge(answer)[1]
    missing = [step for step, edge in zip(steps, way, strict=True) if edge not in edges]
    ends = [subject, *(parent for _, parent in way)]
    if missing or [child for child, _ in way] != ends[:-1] or ends[-1] != target:
        raise ValueError(
            f"the steps {list(steps)} do not lead from {subject} to {target} by sentences of the question"
        )
    if len(way) != distances(edges, subject)[target]:
        raise ValueError(f"{len(way)} steps, but a shorter way leads from {subject} to {target}")


def _parse(question: str) -> tuple[list[Edge], str, list[str]]:
    parts = re.findall(r"[^.?]+[.?]", question)
    asked = _ASKED.fullmatch(parts[-1].strip()) if parts else None
    if asked is None:
        raise ValueError(f"no question 'Is X a Y or a Z?' at the end of {question[-80:]!r}")
    return [_edge(part) for part in parts[:-1]], asked[1], [asked[2], asked[3]]


def _edge(sentence: str) -> Edge:
    found = _SENTENCE.fullmatch(sentence.strip())
    if found is None:
        raise ValueError(f"{sentence!r} is not a sentence 'Every X is a Y.' or 'X is a Y.'")
    return found[2], found[3]


# Tables and streams


def graph_dataset(
    num: int,
    seed: int = 0,
    split: str = "train",
    *,
    unique: bool | None = None,
    notation: str = "sentences",
    **graph_options: Any,
) -> Dataset:
    """`num` generated questions as a table.

    Args:
        num: number of questions.
        seed, split: see [`GraphGenerator`].
        unique: whether a graph may occur only once; by default for `"validation"` and `"test"`.
        notation: see [`graph_record`].
        graph_options: sizes and names, see [`GraphGenerator`], e.g. `**SMALL_GRAPHS`.

    Returns:
        `Dataset` with the columns of `record_features()`; `meta` is a JSON string. The first k rows of a longer table
        are the table of k rows. Without `unique`, row i is element i of [`graph_stream`].

    Raises:
        ValueError: an option out of its range, or fewer different graphs than asked for.
    """
    from datasets import Dataset

    if num < 1:
        raise ValueError(f"num is {num}; ask for at least one question")
    make_row = _GeneratedRow(GraphGenerator(seed, split, **graph_options), notation)
    unique = split != "train" if unique is None else unique
    taken: set[str] = set()
    rows = []
    for index in range(num):
        question = make_row.generator.question(index, taken)
        if unique:
            taken.add(question.identity)
        rows.append(make_row.of_question(index, question))
    return Dataset.from_list(rows, features=record_features())


def graph_stream(
    seed: int = 0,
    split: str = "train",
    *,
    num: int | None = None,
    num_shards: int = 1,
    notation: str = "sentences",
    **graph_options: Any,
) -> IterableDataset:
    """Generated questions without end (or `num` of them), drawn when they are asked for; shards as in `maze_stream`.

    Args:
        seed, split: see [`GraphGenerator`].
        num: number of questions in all; endless by default.
        num_shards: number of shards, at least processes times loader workers.
        notation: see [`graph_record`].
        graph_options: sizes and names, see [`GraphGenerator`].

    Returns:
        `IterableDataset` with the columns of `record_features()`; `meta` is a JSON string.

    Raises:
        ValueError: an option out of its range.
    """
    make_row = _GeneratedRow(GraphGenerator(seed, split, **graph_options), notation)
    make_row({"index": 0})  # refuses wrong options here, not in a worker
    return generated_numbers(num, num_shards).map(make_row, remove_columns=["index"], features=record_features())


@dataclass(frozen=True)
class _GeneratedRow:
    """From the number of a question to its row (`meta` as JSON); a class, so that it can be pickled."""

    generator: GraphGenerator
    notation: str = "sentences"

    def __call__(self, example: dict[str, int]) -> dict[str, Any]:
        return self.of_question(example["index"], self.generator.question(example["index"]))

    def of_question(self, index: int, question: GraphQuestion) -> dict[str, Any]:
        seed, split = self.generator.seed, self.generator.split
        origin = {"ds_name": "generated graphs", "split": split, "seed": seed, "row": index}
        row = graph_record(question, id=f"graph-{split}-{seed}-{index}", notation=self.notation, meta=origin)
        return {**row, "meta": json.dumps(row["meta"])}
