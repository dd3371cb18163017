"""M3CoT, ScienceQA and the text sets as benchmarks: what is read, prompts and scores by hand, wrong input."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, Features, Image, List, Value

from evaluation.benchmarks.registry import benchmark
from evaluation.benchmarks.step_benchmarks import step_protocol, text_behind
from evaluation.benchmarks.step_tasks import NUM_GRAPHS
from evaluation.runner import Prediction
from tests.evaluation.choice_files import encoded
from tests.tiny import tiny_images, tiny_processor
from trainers.data.graphs import SMALL_GRAPHS, solve_graph_question
from trainers.data.records import Record, RecordError, RecordReport, RecordShareError, make_record

TEXT, NUMBER = Value("string"), Value("int64")
M3COT = Features({"id": TEXT, "question": TEXT, "choices": List(TEXT), "answer": TEXT, "rationale": TEXT,
                  "image": Image(), "domain": TEXT})  # fmt: skip
SCIENCEQA = Features({"question": TEXT, "choices": List(TEXT), "answer": NUMBER, "image": Image(), "subject": TEXT,
                      "hint": TEXT})  # fmt: skip
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def said(text: str) -> Prediction:
    return Prediction("0", text, text, 0, 1, ())


def question(answer: str = "B", choices: list[str] | None = None) -> Record:
    choices = ["ice", " fire ", "snow"] if choices is None else choices
    return make_record("q", "Which is hot? ", answer, tiny_images(1), choices=choices)


def m3cot_row(**changes: Any) -> dict[str, Any]:
    row = {"id": "m-1", "question": "Which is hot?", "choices": ["ice", "fire"], "answer": "B",
           "rationale": "Ice is cold. So fire.", "image": "a.png", "domain": "science"}  # fmt: skip
    return {**row, **changes}


def scienceqa_row(**changes: Any) -> dict[str, Any]:
    row = {"question": "Which is hot?", "choices": ["ice", "fire"], "answer": 1, "image": "a.png",
           "subject": "natural science", "hint": "Touch."}  # fmt: skip
    return {**row, **changes}


ROWS = {"m3cot": m3cot_row, "scienceqa": scienceqa_row}


def write(folder: Path, *rows: Any, name: str = "test.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tiny_images(1)[0].save(folder / "a.png")
    lines = name.endswith("l")
    (folder / name).write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(list(rows)))
    return folder / name


def write_parquet(path: Path, features: Features, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = {"bytes": encoded(tiny_images(1)[0]), "path": None}
    rows = [{**row, "image": row["image"] and packed} for row in rows]
    Dataset.from_list([{name: row[name] for name in features} for row in rows], features).to_parquet(path)
    return path


# Reading


@pytest.mark.parametrize("name", ["m3cot", "scienceqa"])
def test_files_with_the_published_columns(name: str, tmp_path: Path) -> None:
    bench, row = benchmark(name), ROWS[name]
    rows = [row(), row(image=None), row(question="Which is cold?")]
    features = M3COT if name == "m3cot" else SCIENCEQA
    report = RecordReport()
    found = bench.read(write(tmp_path, *rows), report=report)
    assert (report.num_good, report.skip_reasons["row without image"]) == (2, 1)
    assert [each["question"] for each in found] == ["Which is hot?", "Which is cold?"]
    assert bench.gold(found[0]) == ("B" if name == "m3cot" else "1")
    assert bench.group(found[0]) == ("science" if name == "m3cot" else "natural science")
    for path in (write(tmp_path, *rows, name="test.jsonl"), write_parquet(tmp_path / "t.parquet", features, *rows)):
        assert [each["question"] for each in bench.read(path)] == ["Which is hot?", "Which is cold?"]
    assert [each["question"] for each in bench.read(path, max_samples=1)] == ["Which is hot?"]
    assert bench.read(path, num=1, seed=3) == bench.read(path, num=1, seed=3)


def test_a_folder_and_a_hub_id_have_the_split_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "set/test-00000-of-00001.parquet", M3COT, m3cot_row())
    write_parquet(tmp_path / "set/train-00000-of-00001.parquet", M3COT, m3cot_row(question="Trained on?"))
    assert [each["question"] for each in benchmark("m3cot").read(tmp_path / "set")] == ["Which is hot?"]
    assert benchmark("m3cot").read(tmp_path / "set", split="train")[0]["question"] == "Trained on?"
    calls = []

    def load(name: str, *arguments: Any, **options: Any) -> Dataset:
        calls.append((name, *arguments, options.get("split")))
        return Dataset.from_parquet(str(path)).cast_column("answer", Value("string"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert benchmark("m3cot").read()[0]["question"] == "Which is hot?"
    assert set(calls) == {("LightChen2333/M3CoT", "test")}


def test_the_copy_of_scienceqa_is_read_in_its_part_with_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = write_parquet(tmp_path / "t.parquet", SCIENCEQA, scienceqa_row()), []

    def load(*arguments: Any, **options: Any) -> Dataset:
        calls.append((*arguments, options["split"]))
        return Dataset.from_parquet(str(path))

    monkeypatch.setattr(datasets, "load_dataset", load)
    published, copy = benchmark("scienceqa").sources
    (record,) = benchmark("scienceqa").read(copy)
    assert record["answer"] == "1" and calls == [("lmms-lab-encoder/ScienceQA", "ScienceQA-IMG", "test")]
    assert published == "derek-thomas/ScienceQA"


def test_text_sets(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"question": "Is A b?", "steps": ["x", "y"], "answer": "A is b."}]))
    (record,) = benchmark("prosqa").read(path)
    assert benchmark("prosqa").group(record) == "2 steps" and benchmark("prosqa").gold(record) == "A is b."
    (tmp_path / "g.txt").write_text("How many?||<<1+1=2>>##2\nAnd?||<<2+1=3>>##3\n")
    assert [each["answer"] for each in benchmark("gsm8k").read(tmp_path / "g.txt")] == ["2", "3"]
    with pytest.raises(ValueError, match="gsm8k has no public source; give its file as data_root"):
        benchmark("gsm8k").read()
    with pytest.raises(RecordError, match="gone.txt"):
        benchmark("gsm8k").read(tmp_path / "gone.txt")


def test_graphs_take_the_options_of_the_generator() -> None:
    graphs = benchmark("graphs")
    found = graphs.read(num=3, seed=5, **SMALL_GRAPHS)
    assert [each["id"] for each in found] == [f"graph-test-5-{i}" for i in range(3)]
    assert all(solve_graph_question(each["question"]) == graphs.gold(each) for each in found)
    assert graphs.read(num=9, seed=5, max_samples=3, **SMALL_GRAPHS) == found
    assert len(graphs.read(**SMALL_GRAPHS)) == NUM_GRAPHS == len(graphs.read(max_samples=999, **SMALL_GRAPHS))
    assert graphs.read(num=1, split="validation", **SMALL_GRAPHS)[0]["meta"]["split"] == "validation"
    assert {graphs.group(each) for each in graphs.read(num=5, **{**SMALL_GRAPHS, "path_lengths": [2]})} == {"2 steps"}
    pairs = graphs.read(num=1, seed=5, **{**SMALL_GRAPHS, "notation": "pairs"})[0]["question"]
    assert pairs != graphs.read(num=1, seed=5, **{**SMALL_GRAPHS, "notation": "sentences"})[0]["question"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("graphs", {"source": "x.json"}, "data_path='x.json': graphs are generated.*'prosqa'"),
        ("graphs", {"image_folder": "x"}, "image_folder='x': graphs are generated"),
        ("graphs", {"num": 0}, "num=0 must be at least 1"),
        ("m3cot", {"source": "gone.json"}, "gone.json"),
        ("m3cot", {"tasks": ["algebra"]}, "m3cot has no tasks"),
        ("m3cot", {"source": "test.json", "num": 2}, "num=2 of 1 records"),
        ("m3cot", {"source": "test.json", "num_nodes": 9}, r"\['num_nodes'\]: sizes of generated graphs"),
        ("m3cot", {"source": "test.json", "split": "test"}, "split='test'"),
        ("m3cot", {"source": "empty.json"}, "has no record for m3cot"),
    ],
)
def test_wrong_options(
    name: str, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, m3cot_row())
    write(tmp_path, name="empty.json")
    with pytest.raises(ValueError, match=message):
        benchmark(name).read(**options)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("m3cot", {"answer": "C"}, r"test.json, row 0: answer 'C' is not one of the letters 'AB' of its choices"),
        ("m3cot", {"choices": []}, "choices are empty"),
        ("m3cot", {"question": " "}, "question"),
        ("m3cot", {"image": "b.png"}, "b.png"),
        ("scienceqa", {"answer": 2}, "answer 2 is not the index of one of the 2 choices"),
        ("scienceqa", {"answer": "B"}, "'answer' must be the index of a choice, got 'B'"),
    ],
)
def test_wrong_rows(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, ROWS[name](**changes), ROWS[name]())
    for options in ({}, {"max_samples": 1}):
        with pytest.raises(RecordShareError, match=message):
            benchmark(name).read(path, **options)
    report = RecordReport(0.5)
    assert len(benchmark(name).read(path, report=report)) == report.num_bad == 1
    with pytest.raises(ValueError, match=f"(?s)has no record for {name}; .*{message}"):
        benchmark(name).read(write(tmp_path, ROWS[name](**changes)))


@pytest.mark.parametrize(
    ("name", "column"), [(n, c) for n in ROWS for c in ("question", "choices", "answer", "image")]
)
def test_missing_columns(name: str, column: str, tmp_path: Path) -> None:
    row = ROWS[name]()
    del row[column]
    with pytest.raises(RecordError, match=rf"test.json, whole file: lacks the columns \['{column}'\], it has \['"):
        benchmark(name).read(write(tmp_path, row))


# Prompts


@pytest.mark.parametrize(
    ("label", "prompt", "asked"),
    [
        ("ivtlr", "training", "[Question]:{Which is hot?}\n[Options]:\n(A).{ice}\n(B).{fire}\n(C).{snow}\nAnswer:\n"),
        (
            "ivtlr",
            "published_inference",
            "[Question]:{Which is hot?}\n[Options]:\nA.{ice}\nB.{fire}\nC.{snow}\nAnswer:",
        ),
    ],
)
@pytest.mark.parametrize("name", ["m3cot", "scienceqa"])
def test_prompts_of_qwen(name: str, label: str, prompt: str, asked: str) -> None:
    for made in (step_protocol(name, label, prompt=prompt), step_protocol(name, prompt=prompt)):
        assert made.prompt(tiny_processor(), question()) == CHAT.format(PICTURE + asked)
        assert made.ask(question()) == asked and made.processor_options == {"add_special_tokens": False}
        assert made.max_new_tokens == 512
    assert text_behind(name, label, prompt=prompt) == ""


def test_prompts_of_chameleon() -> None:
    options = "[Options]:\n(A).{ice}\n(B).{fire}\n(C).{snow}"
    label, processor = "ivtlr_chameleon", tiny_processor("chameleon")
    made = benchmark("scienceqa").protocol(label)
    assert made.prompt(processor, question()) == f"[Question]:{{<image>Which is hot?}}\n{options}"
    assert made.processor_options == {"add_special_tokens": False, "image_markers": False}
    published = step_protocol("scienceqa", label, prompt="published_inference")
    assert published.prompt(processor, question()) == (
        f"<s><racm3:break><image><eoss>[Question]:{{Which is hot?}}\n{options}\nAnswer:"
    )
    assert text_behind("scienceqa", label) == ""
    assert text_behind("scienceqa", label, prompt="published_inference") == "<reserved08706>"
    strict = step_protocol("scienceqa", fmt="ivtlr-chameleon")  # the corrected score of the same question
    assert strict.prompt(processor, question()) == made.prompt(processor, question())
    assert not strict.score(question("1"), said("Therefore, the answer is 12")).correct


def test_prompts_of_text_sets() -> None:
    record = make_record("p", "Is A b or c?", "A is b.")
    processor = tiny_processor("llama")
    made = benchmark("prosqa").protocol("coconut")
    assert made.prompt(processor, record) == "Is A b or c?\n" and made.processor_options == {
        "add_special_tokens": True
    }
    assert (made.max_new_tokens, benchmark("gsm8k").protocol("coconut").max_new_tokens) == (128, 64)
    assert "".join(made.gold_reply("A is b.")) == "### A is b."
    plain = step_protocol("prosqa", fmt="plain")
    assert plain.ask(record) == "Is A b or c?" and "".join(plain.gold_reply("x")) == "Therefore, the answer is x"
    assert plain.score(record, said("Therefore, the answer is A is b.")) == (True, "A is b.")
    assert made.score(record, said("Therefore, the answer is A is b."))[0] is False


def test_protocols_by_name() -> None:
    names = {name: tuple(benchmark(name).protocols) for name in ("m3cot", "scienceqa", "prosqa", "gsm8k", "graphs")}
    assert names["m3cot"] == names["scienceqa"] == ("default", "ivtlr", "ivtlr_chameleon")
    assert names["prosqa"] == names["gsm8k"] == names["graphs"] == ("default", "coconut")
    with pytest.raises(ValueError, match="protocol 'laser'; choose one of .'default', 'ivtlr', 'ivtlr_chameleon'"):
        benchmark("m3cot").protocol("laser")
    with pytest.raises(ValueError, match="unknown staged format 'llava'"):
        step_protocol("m3cot", fmt="llava")
    with pytest.raises(ValueError, match="prompt='test' is unknown"):
        step_protocol("m3cot", prompt="test")


# Scores


@pytest.mark.parametrize(
    ("text", "strict", "published"),
    [
        ("Therefore, the answer is B", (True, "B"), (True, "B")),
        ("B", (True, "B"), (True, "B")),
        ("The answer is (B).", (True, "B"), (False, "T")),  # the prompt's "Answer:" takes the T
        ("bees are hot", (False, None), (True, "B")),
        ("Therefore, the answer is B. No, the answer is C", (False, None), (True, "C")),
        ("Therefore, the answer is C", (False, "C"), (False, "C")),
        ("fire", (True, "B"), (False, "F")),
        ("42", (False, None), (False, None)),
        ("", (False, None), (False, None)),
    ],
)
def test_scores_of_m3cot(text: str, strict: tuple, published: tuple) -> None:
    assert tuple(benchmark("m3cot").protocol().score(question(), said(text))) == strict
    assert tuple(benchmark("m3cot").protocol("ivtlr").score(question(), said(text))) == published


def test_letters_of_the_question_are_no_answer() -> None:
    """The published rule reads the prompt too, where it may find the right letter; what was read is of the reply."""
    record = make_record("q", "Tom says: the answer is B. Who?", "B", tiny_images(1), choices=["x", "y"])
    found = benchmark("m3cot").protocol("ivtlr").score(record, said("A"))
    assert tuple(found) == (True, "A")


def test_a_fifth_option_is_one() -> None:
    record = question("E", ["a1", "b1", "c1", "d1", "e1"])
    bench = benchmark("m3cot")
    assert tuple(bench.protocol().score(record, said("The answer is E."))) == (True, "E")
    assert bench.answers(record) == ("A", "B", "C", "D", "E") and bench.gold(record) == "E"


@pytest.mark.parametrize(
    ("text", "strict", "published"),
    [
        ("Therefore, the answer is 1", (True, "1"), (True, "1")),
        ("Therefore, the answer is B", (True, "1"), (True, "1")),
        ("Therefore, the answer is 12", (False, None), (True, "1")),
        ("The answer is because", (False, None), (True, "1")),
        ("1", (True, "1"), (False, None)),
        ("Therefore, the answer is 9", (False, None), (False, "9")),
        ("Therefore, the answer is z", (False, None), (False, "25")),
        ("Therefore, the answer is 0", (False, "0"), (False, "0")),
    ],
)
def test_scores_of_scienceqa(text: str, strict: tuple, published: tuple) -> None:
    record, bench = question("1"), benchmark("scienceqa")
    assert tuple(bench.protocol().score(record, said(text))) == strict
    assert tuple(bench.protocol("ivtlr").score(record, said(text))) == published


@pytest.mark.parametrize(
    ("text", "strict", "published"),
    [
        ("### 1200", (True, "1200"), (True, "1200")),
        ("### 1,200", (True, "1200"), (True, "1200")),
        ("### 12,00", (False, "12,00"), (True, "1200")),
        ("1200", (False, None), (False, "1200")),
        ("### 3 ### 1200", (False, None), (True, "1200")),
        ("### 1200 apples", (False, "1200 apples"), (False, "1200 apples")),
        ("", (False, None), (False, None)),
    ],
)
def test_scores_of_text_sets(text: str, strict: tuple, published: tuple) -> None:
    record = make_record("g", "How many?", "1200")
    for name in ("gsm8k", "prosqa", "prontoqa", "graphs"):
        assert tuple(benchmark(name).protocol().score(record, said(text))) == strict
        assert tuple(benchmark(name).protocol("coconut").score(record, said(text))) == published


def test_gold_replies_are_those_of_training() -> None:
    """ScienceQA's models are trained to say the number of the option."""
    for name, gold in (("m3cot", "B"), ("scienceqa", "1")):
        bench, record = benchmark(name), question(gold)
        for label in bench.protocols:
            before, content, after = bench.protocol(label).gold_reply(bench.gold(record))
            assert (before, content, after) == ("Therefore, the answer is ", gold, "")
            assert bench.protocol(label).score(record, said(before + content)).correct
        assert bench.gold(record) in bench.answers(record) and len(bench.answers(record)) == 3
    assert benchmark("prosqa").answers(make_record("p", "?", "x")) is None
