"""The text-only sets of Coconut: rows of ProsQA, lines of GSM8K, examples of ProntoQA."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainers.data.prosqa import read_gsm8k_steps, read_prontoqa, read_prosqa
from trainers.data.records import Record, RecordError, RecordReport


def prosqa(**changes: Any) -> dict[str, Any]:
    steps = ["Tom is a terpus.", "Every terpus is a lempus."]
    return {"question": "Is Tom a lempus?", "steps": steps, "answer": "Tom is a lempus.", "edges": [[0, 1]], **changes}


def read(reader: Any, *args: Any, **options: Any) -> tuple[list[Record], RecordReport]:
    report = RecordReport()
    return list(reader(*args, report=report, **options)), report


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_prosqa(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [prosqa(), prosqa(steps=[])]
    path.write_text(json.dumps(rows) if name == "data.json" else "\n".join(map(json.dumps, rows)))
    records, report = read(read_prosqa, path)
    assert [record["steps"] for record in records] == [prosqa()["steps"], []]
    assert (records[0]["id"], records[0]["answer"], records[0]["images"]) == ("data-0", "Tom is a lempus.", [])
    assert records[1]["meta"] == {"source": str(path), "row": 1, "index": 1, "ds_name": "data"}
    records, report = read(read_prosqa, path, require_steps=True)
    assert len(records) == 1 and "row 1: the row has no steps; remove it" in report.summary()


BAD_ROWS = {
    "steps a text": (prosqa(steps="a b"), "steps must be a list of non-empty strings or None, got 'a b'"),
    "a step a number": (prosqa(steps=["a", 3]), r"steps must be a list of non-empty strings or None, got \['a', 3\]"),
    "a blank step": (prosqa(steps=[" "]), "steps must be a list of non-empty strings"),
    "no question": (prosqa(question=None), "a row needs the string 'question', got None"),
    "empty question": (prosqa(question=""), "question is empty"),
    "empty answer": (prosqa(answer=" "), "answer is empty"),
    "answer a number": (prosqa(answer=7), "a row needs the string 'answer', got 7"),
    "latent token": (prosqa(answer="<|start-latent|>"), r"contains the token <\|start-latent\|>"),
    "no object": ("text", "a row must be an object with columns, got 'text'"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_of_prosqa_is_left_out_and_named(tmp_path: Path, case: str) -> None:
    bad, reason = BAD_ROWS[case]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([prosqa(), bad, prosqa()]))
    records, report = read(read_prosqa, path)
    assert [record["meta"]["row"] for record in records] == [0, 2]
    with pytest.raises(ValueError, match=rf"(?s)data\.json, row 1: .*{reason}"):
        report.check()


def test_gsm8k(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(
        b"A has 3. How many?||<<1+2=3>> <<3*1=3>> #### 3\n"
        b"\n"
        b"B?||<<2*2=4>>##1,200\r\n"
        b"C?||##5\n"
        b"no bars ## 5\n"
        b"no answer||<<1=1>>\n"
        b"empty answer||<<1=1>>##\n"
        b"\xff||##1\n"
    )
    records, report = read(read_gsm8k_steps, path)
    assert [(r["question"], r["steps"], r["answer"]) for r in records] == [
        ("A has 3. How many?", ["<<1+2=3>>", "<<3*1=3>>"], "3"),
        ("B?", ["<<2*2=4>>"], "1,200"),
        ("C?", [], "5"),
    ]
    assert [record["meta"]["row"] for record in records] == [0, 1, 2]
    for reason in (
        "row 3: the line is not 'question||steps##answer': 'no bars ## 5'",
        "row 4: the line is not 'question||steps##answer'",
        "row 5: answer is empty",
        "row 6: the line is not UTF-8",
    ):
        assert f"train.txt, {reason}" in report.summary()
    records, report = read(read_gsm8k_steps, path, require_steps=True)
    assert len(records) == 2 and report.num_bad == 5


def prontoqa(number: int) -> dict[str, Any]:
    return {
        "question": f"Every {number} is small. Max is a {number}.",
        "query": "True or false: Max is small.",
        "chain_of_thought": ["Max is it.", "It is small.", "Max is small."],
        "answer": "True",
    }


def test_prontoqa(tmp_path: Path) -> None:
    path = tmp_path / "pronto.json"
    examples = {"example1": {"in_context_example0": {}, "test_example": prontoqa(1)}, "example2": prontoqa(2)}
    path.write_text(json.dumps({**examples, "example3": {**prontoqa(3), "chain_of_thought": "x"}}))
    records, report = read(read_prontoqa, path)
    assert records[0]["question"] == "Every 1 is small. Max is a 1. True or false: Max is small."
    assert records[0]["steps"] == ["Max is it. It is small.", "Max is small."]
    assert [record["answer"] for record in records] == ["True", "True"]
    assert "pronto.json, row 2: 'chain_of_thought' must be a list of sentences, got 'x'" in report.summary()


def test_splits_of_prontoqa(tmp_path: Path) -> None:
    path = tmp_path / "pronto.json"
    path.write_text(json.dumps({f"example{number}": prontoqa(number) for number in range(9203)}))
    rows = {split: [r["meta"]["row"] for r in read_prontoqa(path, split)] for split in ("train", "validation", "test")}
    assert [(split[0], split[-1]) for split in rows.values()] == [(0, 8999), (9000, 9199), (9200, 9202)]
    assert sum(rows.values(), []) == list(range(9203))
    with pytest.raises(ValueError, match="unknown split 'dev'; choose one of train, validation, test, or None"):
        read_prontoqa(path, "dev")


@pytest.mark.parametrize(("text", "reason"), [("[1]", "must be one JSON object of examples"), ("{", "not one JSON")])
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "pronto.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=reason):
        read_prontoqa(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for reader in (read_prosqa, read_gsm8k_steps, read_prontoqa):
        with pytest.raises(RecordError, match="the file does not exist; check the path"):
            reader(tmp_path / "none.json")
