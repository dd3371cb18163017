"""Graph questions: that the answer is right, that only the path gives it, splits, tables and streams."""

import itertools
import json
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from trainers.data import graph_generation
from trainers.data.graph_generation import CONCEPTS, ENTITIES, SMALL_GRAPHS, GraphGenerator, GraphQuestion, distances
from trainers.data.graphs import (
    check_graph_question,
    graph_dataset,
    graph_record,
    graph_stream,
    solve_graph_question,
)
from trainers.data.maze_generation import split_of
from trainers.data.records import record_from_row, validate_record

SIZES: dict[str, dict[str, Any]] = {"default": {}, "small": SMALL_GRAPHS}
QUESTIONS = {"default": 700, "small": 2000}


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[GraphQuestion]]:
    return {
        name: [GraphGenerator(**options).question(index) for index in range(QUESTIONS[name])]
        for name, options in SIZES.items()
    }


def test_the_first_questions_of_seed_0_never_change() -> None:
    """Published numbers rest on these draws; a change here is a change of every data set."""
    pinned = {
        "default-train": ["50d9e47a44dfd20a", "7a50b649c619a850"],
        "default-validation": ["d57a884b53f9e51f", "d4ef0a12622fb3c5"],
        "default-test": ["d764ee7987132459", "14bdc69a368f30a0"],
        "small-train": ["d417ea9e7800ac5a", "bbaa548a1bf1141c"],
        "small-validation": ["55313d0af78f4063", "cd83d05ec35802ef"],
        "small-test": ["c2626347cc26d967", "a84e2c5639e8b22a"],
    }
    found = {
        f"{size}-{split}": [GraphGenerator(0, split, **options).question(i).identity for i in range(2)]
        for size, options in SIZES.items()
        for split in ("train", "validation", "test")
    }
    assert found == pinned


@pytest.mark.parametrize("size", SIZES)
def test_every_question_has_exactly_its_answer(drawn: dict[str, list[GraphQuestion]], size: str) -> None:
    generator = GraphGenerator(**SIZES[size])
    for question in drawn[size]:
        record = graph_record(question)
        check_graph_question(record["question"], record["answer"], record["steps"])
        validate_record(record, "graphs", 0)
        nodes = set(itertools.chain.from_iterable(question.edges))
        assert len(nodes) == generator.num_nodes and set(question.entities) <= nodes
        assert len(set(question.edges)) == len(question.edges) == generator.num_edges
        assert len(record["steps"]) in generator.path_lengths
        assert {len(question.entities), len(nodes & set(ENTITIES))} == {generator.num_entities}
        assert not any(node in distances(question.edges, node) and cycle(question, node) for node in nodes)


def cycle(question: GraphQuestion, node: str) -> bool:
    above = [parent for child, parent in question.edges if child == node]
    return any(node in distances(question.edges, parent) for parent in above)


@pytest.mark.parametrize("size", SIZES)
def test_the_wrong_option_lies_as_deep_below_another_entity(drawn: dict[str, list[GraphQuestion]], size: str) -> None:
    for question in drawn[size]:
        rivals = [entity for entity in question.entities if entity != question.subject]
        found = [distances(question.edges, entity) for entity in rivals]
        assert any(row.get(question.wrong) == len(question.path) - 1 and question.answer not in row for row in found)
        assert question.wrong not in distances(question.edges, question.subject)


# What a reader could guess from without following the path; each must be right half the time.
Feature = Callable[[GraphQuestion, str], float]


def backwards(question: GraphQuestion, option: str) -> dict[str, int]:
    return distances([(parent, child) for child, parent in question.edges], option)


def places(question: GraphQuestion, name: str) -> list[int]:
    return [place for place, edge in enumerate(question.edges) if name in edge]


def next_to_subject(question: GraphQuestion, option: str) -> float:
    own, others = places(question, question.subject), places(question, option)
    return -min(abs(a - b) for a in own for b in others)


def degree_of_subject_and_reach(question: GraphQuestion, option: str) -> float:
    """Entities with many sentences go with options that many nodes reach."""
    degree = Counter(child for child, _ in question.edges)
    mean = sum(degree[entity] for entity in question.entities) / len(question.entities)
    return len(backwards(question, option)) * (degree[question.subject] - mean)


SHORTCUTS: dict[str, Feature] = {
    "asked first": lambda q, o: q.options[0] == o,
    "mentioned first": lambda q, o: -min(places(q, o)),
    "mentioned last": lambda q, o: max(places(q, o)),
    "close to the subject": next_to_subject,
    "sentences": lambda q, o: len(places(q, o)),
    "sentences as kind": lambda q, o: sum(parent == o for _, parent in q.edges),
    "reached by nodes": lambda q, o: len(backwards(q, o)),
    "reached by entities": lambda q, o: len(set(q.entities) & set(backwards(q, o))),
    "depth": lambda q, o: min(backwards(q, o)[entity] for entity in set(q.entities) & set(backwards(q, o))),
    "name": lambda q, o: CONCEPTS.index(o),
    "parents' sentences": lambda q, o: sum(len(places(q, child)) for child, parent in q.edges if parent == o),
    "subject's sentences": degree_of_subject_and_reach,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SHORTCUTS)
def test_no_shortcut_gives_the_answer(drawn: dict[str, list[GraphQuestion]], size: str, name: str) -> None:
    """Three standard errors of chance, ties counted half."""
    feature, questions = SHORTCUTS[name], drawn[size]
    hits = 0.0
    for question in questions:
        right, wrong = feature(question, question.answer), feature(question, question.wrong)
        hits += 0.5 if right == wrong else right > wrong
    assert abs(hits / len(questions) - 0.5) < 3 * 0.5 / len(questions) ** 0.5, hits / len(questions)


def test_default_sizes_are_those_of_the_paper(drawn: dict[str, list[GraphQuestion]]) -> None:
    lengths = [len(question.path) - 1 for question in drawn["default"]]
    assert 3.7 < sum(lengths) / len(lengths) < 3.9
    assert Counter(lengths).keys() == {3, 4, 5, 6}


def test_sizes_are_options() -> None:
    generator = GraphGenerator(num_nodes=14, num_edges=18, num_entities=3, path_lengths=(4,), depth_gap=2)
    questions = [generator.question(index) for index in range(60)]
    lengths = Counter(len(question.path) - 1 for question in questions)
    assert set(lengths) == {2, 3, 4} and lengths[4] > 20
    for question in questions:
        record = graph_record(question)
        check_graph_question(record["question"], record["answer"], record["steps"])
        assert record["meta"]["num_nodes"] == 14 and record["meta"]["num_edges"] == 18
    named = GraphGenerator(**{**SMALL_GRAPHS, "concepts": [f"k{c}" for c in "abcdefgh"], "entities": ["Ann", "Ben"]})
    assert set(itertools.chain.from_iterable(named.question(0).edges)) <= {*named.concepts, *named.entities}


def test_splits_share_no_graph_and_depend_on_it_alone() -> None:
    seen: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        for seed in (0, 1):
            generator = GraphGenerator(seed, split, **SMALL_GRAPHS)
            seen.setdefault(split, set()).update(generator.question(index).identity for index in range(100))
        assert all(split_of(identity) == split for identity in seen[split])
    assert not any(a & b for a, b in itertools.combinations(seen.values(), 2))
    question = GraphGenerator().question(0)
    other = GraphQuestion(question.edges[::-1], question.entities, "Bob", question.options[::-1], question.path)
    assert other.identity == question.identity
    assert GraphGenerator(seed=1).question(0).identity != question.identity


def test_graphs_to_avoid() -> None:
    generator = GraphGenerator(**SMALL_GRAPHS)
    first = generator.question(5)
    assert generator.question(5, {first.identity}).identity != first.identity
    assert generator.question(5) == first


def test_record_of_a_question() -> None:
    edges = (("zumpus", "lempus"), ("Alex", "zumpus"), ("Bob", "gorpus"))
    question = GraphQuestion(edges, ("Alex", "Bob"), "Alex", ("gorpus", "lempus"), ("Alex", "zumpus", "lempus"))
    record = graph_record(question, meta={"split": "test"})
    assert record["question"] == (
        "Every zumpus is a lempus. Alex is a zumpus. Bob is a gorpus. Is Alex a gorpus or a lempus?"
    )
    assert record["steps"] == ["Alex is a zumpus.", "Every zumpus is a lempus."]
    assert (record["answer"], record["choices"], record["images"]) == ("Alex is a lempus.", None, [])
    assert record["id"] == f"graph-{question.identity}"
    assert record["meta"] == {
        "identity": question.identity,
        "subject": "Alex",
        "options": ["gorpus", "lempus"],
        "right": 1,
        "path": ["Alex", "zumpus", "lempus"],
        "num_nodes": 5,
        "num_edges": 3,
        "split": "test",
    }
    assert question.wrong == "gorpus"
    assert graph_record(question, sentences="\n")["question"].count("\n") == 3


# The checker

TEXT = "Every zumpus is a lempus. Tom is a zumpus. Tom is a yumpus. Every yumpus is a zumpus. Bob is a gorpus."
ASKED = f"{TEXT} Is Tom a gorpus or a lempus?"
STEPS = ["Tom is a zumpus.", "Every zumpus is a lempus."]


def test_the_checker_solves_by_search() -> None:
    assert solve_graph_question(ASKED) == "Tom is a lempus."
    assert solve_graph_question(f"{TEXT} Is Bob a gorpus or lempus?") == "Bob is a gorpus."
    check_graph_question(ASKED, "Tom is a lempus.")
    check_graph_question(ASKED, "Tom is a lempus.", STEPS)


@pytest.mark.parametrize(
    ("question", "answer", "steps", "reason"),
    [
        (ASKED, "Tom is a gorpus.", None, "the answer is 'Tom is a lempus.', not 'Tom is a gorpus.'"),
        (ASKED, "lempus", None, "not 'lempus'"),
        (f"{TEXT} Is Tom a zumpus or a lempus?", "x", None, r"Tom reaches \['zumpus', 'lempus'\] of the options"),
        (f"{TEXT} Is Bob a zumpus or a lempus?", "x", None, r"Bob reaches \[\] of the options"),
        (TEXT, "x", None, "no question 'Is X a Y or a Z.' at the end"),
        ("", "x", None, "no question"),
        (f"Some are. {ASKED}", "x", None, "'Some are.' is not a sentence 'Every X is a Y.' or 'X is a Y.'"),
        (ASKED, "Tom is a lempus.", STEPS[:1], "do not lead from Tom to lempus by sentences of the question"),
        (ASKED, "Tom is a lempus.", STEPS[1:], "do not lead from Tom"),
        (ASKED, "Tom is a lempus.", ["Tom is a lempus."], "do not lead from Tom"),
        (ASKED, "Tom is a lempus.", [], "do not lead from Tom"),
        (
            ASKED,
            "Tom is a lempus.",
            ["Tom is a yumpus.", "Every yumpus is a zumpus.", STEPS[1]],
            "3 steps, but a shorter way leads from Tom to lempus",
        ),
    ],
)
def test_the_checker_names_what_is_wrong(question: str, answer: str, steps: list[str] | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_graph_question(question, answer, steps)


# Tables and streams


def test_a_table_and_a_stream_hold_the_same_questions() -> None:
    table = graph_dataset(6, seed=3, **SMALL_GRAPHS)
    assert list(graph_stream(seed=3, num=6, **SMALL_GRAPHS)) == list(table)
    assert list(graph_dataset(4, seed=3, **SMALL_GRAPHS)) == list(table)[:4]
    record = record_from_row(table[2])
    assert record["id"] == "graph-train-3-2"
    facts = {name: record["meta"][name] for name in ("ds_name", "split", "seed", "row")}
    assert facts == {"ds_name": "generated graphs", "split": "train", "seed": 3, "row": 2}
    check_graph_question(record["question"], record["answer"], record["steps"])
    endless = graph_stream(seed=3, num_shards=2, **SMALL_GRAPHS)
    assert [json.loads(row["meta"])["row"] for row in itertools.islice(endless, 3)] == [0, 2, 4]


def test_a_graph_occurs_once_in_a_test_table() -> None:
    few = {"num_nodes": 6, "num_edges": 4, "num_entities": 2, "path_lengths": (2,)}
    few |= {"concepts": CONCEPTS[:4], "entities": ENTITIES[:2]}
    rows = graph_dataset(3, split="test", **few)
    assert len({json.loads(meta)["identity"] for meta in rows["meta"]}) == 3
    with pytest.raises(ValueError, match=r"no new graph in 2000 draws \(index \d+, \d+ already taken\)"):
        graph_dataset(60, split="test", **few)
    train = graph_dataset(60, split="test", unique=False, **few)
    assert len({json.loads(meta)["identity"] for meta in train["meta"]}) < 60


def test_a_generator_travels_to_a_worker() -> None:
    generator = GraphGenerator(seed=2, **SMALL_GRAPHS)
    assert pickle.loads(pickle.dumps(generator)).question(1) == generator.question(1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"split": "dev"}, "split is 'dev'; use one of train, validation, test"),
        ({"path_lengths": ()}, r"path_lengths is \(\); give whole numbers of at least 1"),
        ({"path_lengths": (0, 2)}, r"path_lengths is \(0, 2\); give whole numbers of at least 1"),
        ({"depth_gap": -1}, "depth_gap is -1; use 0 or more"),
        ({"num_entities": 1}, "num_entities is 1; use 2 to 20"),
        ({"num_entities": 21, "num_nodes": 60}, "num_entities is 21; use 2 to 20"),
        ({"num_nodes": 10}, "num_nodes is 10, 6 of them concepts; .* use 12 to 96 concepts"),
        ({"num_nodes": 200}, "num_nodes is 200, 196 of them concepts"),
        ({"num_edges": 18}, "num_edges is 18; 19 concepts need 19 to 247 edges"),
        ({"num_edges": 248}, "num_edges is 248"),
        ({"concepts": [*CONCEPTS[:30], "zumpus"]}, "entities and concepts must be different words of letters only"),
        ({"concepts": [*CONCEPTS[:30], "two words"]}, "entities and concepts must be different words"),
    ],
)
def test_wrong_sizes_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        GraphGenerator(**options)
    for make in (graph_dataset, graph_stream):
        with pytest.raises(ValueError, match=reason):
            make(**{"num": 2, **options})


def test_wrong_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="num is 0; ask for at least one"):
        graph_dataset(0)
    with pytest.raises(ValueError, match="num is 0; ask for at least one, or None for no end"):
        graph_stream(num=0)
    with pytest.raises(ValueError, match="num_shards is 3 for 2 examples"):
        graph_stream(num=2, num_shards=3)
    monkeypatch.setattr(graph_generation, "MAX_DRAWS", 20)
    with pytest.raises(ValueError, match="use shorter paths, more nodes, fewer edges or more names"):
        GraphGenerator(num_edges=240).question(0)


def test_notation_in_pairs() -> None:
    question = GraphGenerator(**SMALL_GRAPHS).question(0)
    record = graph_record(question, notation="pairs")
    *pairs, asked = record["question"].split(" ; ")
    assert [tuple(pair.split()) for pair in pairs] == list(question.edges)
    assert asked == f"{question.subject} ? {' '.join(question.options)}" and record["answer"] == question.answer
    assert [step.split()[1] for step in record["steps"]] == list(question.path[1:])
    row = graph_dataset(1, notation="pairs", **SMALL_GRAPHS)[0]
    assert " ; " in row["question"] and row["answer"] in json.loads(row["meta"])["options"]
    with pytest.raises(ValueError, match="notation='graph' is unknown"):
        graph_record(question, notation="graph")
