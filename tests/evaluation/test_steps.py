"""Questions with stepwise rationales: prompts against training's token ids, both scores, reports, prediction files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

import evaluation.benchmarks.steps
from evaluation.benchmarks.step_tasks import NUM_GRAPHS, TASKS, read_task
from evaluation.benchmarks.steps import StepsReport, evaluate_steps, task_format, write_predictions
from evaluation.runner import Prediction
from evaluation.statistics import wilson_interval
from tests.tiny import tiny_images, tiny_processor
from tests.trainers.staged_parts import IMAGE_FAMILIES, staged_parts
from trainers.data.graphs import SMALL_GRAPHS, solve_graph_question
from trainers.data.predictions import read_m3cot_predictions, read_scienceqa_predictions
from trainers.data.records import Record, RecordError, RecordReport, make_record
from trainers.data.staged_formats import STAGED_FORMATS
from trainers.data.staged_text import encode_staged

LETTERS = "ABCD"


def choice(number: int, answer: str = "B", images: list[Image.Image] | None = None, **meta: Any) -> Record:
    return make_record(
        f"q{number}", "Which is hot? " * (number + 1), answer, images or [], choices=["ice", " fire ", "snow"],
        steps=["Ice is cold."] * number, meta={"source": "f.json", "row": number, **meta},
    )  # fmt: skip


# Prompts: what the model is given is what training encodes --------------------------------------------------------


class Generated:
    """Stands before `generate` of a model: keeps the arguments of the calls and what came out."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        self.ids: list[list[int]] = []
        generate = model.generate

        def spy(**options: Any) -> Any:
            self.calls.append(options)
            output = generate(**options)
            self.ids += output.sequences.tolist()
            return output

        monkeypatch.setattr(model, "generate", spy)

    def prompt(self, call: int = 0) -> list[int]:
        """The ids of a prompt, alone in its batch."""
        (ids,) = self.calls[call]["input_ids"].tolist()
        return ids


@pytest.fixture(scope="module")
def parts() -> Callable[[str], tuple]:
    """A tiny model of a family with its processor, built once."""
    built: dict[str, tuple] = {}
    return lambda family: built.setdefault(family, staged_parts(family))


@pytest.mark.parametrize("strategy", ["staged", "off"])
@pytest.mark.parametrize("prompt", ["training", "published_inference"])
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_prompts_are_the_token_ids_of_training(
    family: str, prompt: str, strategy: str, parts: Callable[[str], tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = parts(family)
    generated, record = Generated(model, monkeypatch), choice(1, images=[tiny_images(1)[0]])
    options = {"num_latent_steps": 2, "num_latent_patches": 1} if strategy == "staged" else {}
    report = evaluate_steps(
        "x", "m3cot", model, processor, [record], prompt=prompt, latent_strategy=strategy, max_new_tokens=3, **options
    )
    fmt = "ivtlr-chameleon" if family == "chameleon" else "ivtlr-qwen"
    count = generated.prompt().count(processor.image_token_id)
    wanted = encode_staged(record, processor, fmt, [count], prompt=prompt)
    behind = wanted.after_latents
    assert bool(behind) == (family == "chameleon" and prompt == "published_inference") and count > 1
    slot, patch = processor.latent_token_id, processor.latent_patch_token_id
    latents = [patch, slot] * 2 if strategy == "staged" else []
    assert generated.prompt() == wanted.question + ([] if latents else behind)
    assert generated.ids[0][:-3] == [*wanted.question, *latents, *behind]
    (prediction,) = report.predictions
    assert (prediction.num_latent_steps, prediction.num_steps) == (len(latents) // 2, len(latents) // 2 + 3)
    new = processor.tokenizer.decode(generated.ids[0][-3:], skip_special_tokens=True).strip()
    assert prediction.text == new and report.replies[0].whole.endswith(new)
    assert "Which is hot?" in report.replies[0].whole and "<image>" not in report.replies[0].whole


@pytest.mark.parametrize(("family", "fmt"), [("gpt2", "coconut"), ("llama", "coconut"), ("llama", "plain")])
def test_prompts_of_text_models(family: str, fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer's own first token stands in Coconut's format, and not where a chat template writes the text."""
    model, processor = staged_parts(family)
    processor.chat_template = tiny_processor(family).chat_template
    first = ("<|endoftext|>", processor.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    processor.tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    generated, (record,) = Generated(model, monkeypatch), read_task("graphs", num=1, **SMALL_GRAPHS)
    options = {"num_latent_steps": 2, "latent_markers": True, "max_new_tokens": 2}
    report = evaluate_steps("x", "graphs", model, processor, [record], fmt=fmt, latent_strategy="staged", **options)
    wanted = encode_staged(record, processor, fmt)
    start, end = processor.latent_start_token_id, processor.latent_end_token_id
    assert generated.prompt() == wanted.question and (wanted.question[0] == first[1]) == (fmt == "coconut")
    assert generated.ids[0][:-2] == [*wanted.question, start, *[processor.latent_token_id] * 2, end]
    assert report.predictions[0].num_tokens == 6 and report.ar_steps == 4  # the markers are no steps
    assert solve_graph_question(report.replies[0].question.strip()) == record["answer"]


def test_the_models_own_strategy_takes_what_stands_behind_latents(
    parts: Callable[[str], tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = parts("chameleon")
    generated, record = Generated(model, monkeypatch), choice(1, images=tiny_images(1))
    saved = {"latent_strategy": "staged", "num_latent_steps": 1, "num_latent_patches": 1}
    for name, value in saved.items():
        monkeypatch.setattr(model.generation_config, name, value, raising=False)
    evaluate_steps("x", "m3cot", model, processor, [record], prompt="published_inference", max_new_tokens=2)
    separator = processor.tokenizer.sep_token_id
    assert generated.ids[0][-5:-2] == [processor.latent_patch_token_id, processor.latent_token_id, separator]
    assert separator not in generated.prompt()


def test_images_become_squares_on_white(parts: Callable[[str], tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = parts("qwen2_5_vl")
    generated = Generated(model, monkeypatch)
    records = [choice(0, images=[Image.new("RGBA", (90, 30), (0, 0, 0, 0))])]
    for size in (None, 56):
        evaluate_steps("x", "m3cot", model, processor, records, image_size=size, latent_strategy="off",
                       max_new_tokens=1)  # fmt: skip
    own, square = (call["image_grid_thw"][0].tolist() for call in generated.calls)
    assert own[1] < own[2] and square == [1, 4, 4]
    black, white = (call["pixel_values"].unique() for call in generated.calls)
    assert len(white) <= 3 and white.min() > black.max()


# Scores -----------------------------------------------------------------------------------------------------------


def answered(
    monkeypatch: pytest.MonkeyPatch, task: str, records: list[Record], texts: list[str], **options: Any
) -> StepsReport:
    """The report where these texts were generated."""

    def fake(model: Any, processor: Any, records: Any, batch_size: int, **options: Any) -> list[Prediction]:
        return [
            Prediction(record["id"], text, text, 3, 10 + i, (), 2)
            for i, (record, text) in enumerate(zip(records, texts, strict=True))
        ]

    monkeypatch.setattr(evaluation.benchmarks.steps, "predict", fake)
    processor = tiny_processor("llama" if records[0]["choices"] is None else "qwen2_5_vl")
    model = torch.nn.Module()
    model.config = model.generation_config = None
    return evaluate_steps("latents on", task, model, processor, records, **options)


M3COT = {  # text: strict, published rule, with the gold letter B
    "Therefore, the answer is B": (True, True),
    "B": (True, True),
    "The answer is (B).": (True, False),
    "the answer is B": (True, False),  # the prompt's "Answer:" takes the t, and with it "the answer is"
    "bees are hot": (False, True),  # the first letter behind the prompt's "Answer:"
    "Therefore, the answer is B. No, the answer is C": (False, True),
    "Therefore, the answer is C": (False, False),
    "fire": (True, False),
    "": (False, False),
}
SCIENCEQA = {  # with the gold index 1
    "Therefore, the answer is 1": (True, True),
    "Therefore, the answer is B": (True, True),
    "Therefore, the answer is 12": (False, True),
    "The answer is because": (False, True),
    "1": (True, False),
    "Therefore, the answer is 0": (False, False),
}
COCONUT = {  # with the gold answer "1200"
    "### 1200": (True, True),
    "### 1,200": (True, True),
    "### 12,00": (False, True),
    "1200": (False, False),
    "### 3 ### 1200": (False, True),
    "### 1200 apples": (False, False),
}


@pytest.mark.parametrize(
    ("task", "cases", "gold"),
    [("m3cot", M3COT, "B"), ("scienceqa", SCIENCEQA, "1"), ("gsm8k", COCONUT, "1200"), ("prosqa", COCONUT, "1200")],
)
def test_both_scores(task: str, cases: dict, gold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [choice(i, gold) for i in range(len(cases))]
    if cases is COCONUT:
        records = [{**record, "choices": None} for record in records]
    report = answered(monkeypatch, task, records, list(cases))
    assert dict(zip(cases, zip(report.correct, report.reference, strict=True), strict=True)) == cases


def test_the_marker_is_that_of_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = read_task("graphs", num=1, **SMALL_GRAPHS)
    texts = [f"Therefore, the answer is {record['answer']}", f"### {record['answer']}"]
    for fmt, right in (("plain", [True, False]), ("coconut", [False, True])):
        report = answered(monkeypatch, "graphs", [record, record], texts, fmt=fmt)
        assert report.correct == right
    assert report.reference == right


def test_the_report_and_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [choice(i, "B", domain="science" if i < 3 else "mathematics") for i in range(4)]
    texts = ["B", "The answer is (B).", "C", "C"]
    report = answered(monkeypatch, "m3cot", records, texts)
    assert report.by_group() == {"science": 2 / 3, "mathematics": 0.0}
    assert (report.accuracy, report.reference_accuracy, report.ar_steps) == (0.5, 0.25, 9.5)  # 11.5 less 2 markers
    (low, high), (lowest, highest) = ([100 * end for end in wilson_interval(n, 4)] for n in (2, 1))
    assert report.line() == (
        f"{'latents on':<34} strict  50.0 % [{low:4.1f}, {high:4.1f}]  published rule  25.0 % [{lowest:4.1f}, "
        f"{highest:4.1f}]  n=4  science  66.7  mathematics   0.0  latent steps 3.0  AR steps 9.5"
    )
    summary = json.loads(json.dumps(report.summary()))
    assert summary["accuracy"] == 0.5 and summary["by_group"]["mathematics"] == 0.0
    assert [(each["text"], each["correct"], each["reference"]) for each in summary["predictions"]] == [
        ("B", True, True), ("The answer is (B).", True, False), ("C", False, False), ("C", False, False),
    ]  # fmt: skip
    steps = answered(monkeypatch, "prosqa", [{**record, "choices": None} for record in records], texts)
    assert list(steps.by_group()) == ["0 steps", "1 steps", "2 steps", "3 steps"]


# Prediction files -------------------------------------------------------------------------------------------------


def test_prediction_files_are_as_published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records = [choice(i, "B", domain="science", topic="physics", position=10 + i) for i in range(2)]
    report = answered(monkeypatch, "m3cot", records, ["B", "C"], prompt="published_inference")
    path = tmp_path / "files" / "m3cot.jsonl"
    assert write_predictions(path, "m3cot", records, report) == 2
    first, second = read_m3cot_predictions(path)
    asked = "[Question]:{Which is hot?}\n[Options]:\nA.{ice}\nB.{fire}\nC.{snow}\nAnswer:"
    assert first["messages"] == [asked, "B"] and second["messages"][1] == "C"
    assert (first["id"], first["answer"], first["domain"], first["topic"]) == ("q0", "B", "science", "physics")
    records = [{**record, "answer": "1"} for record in records]
    report = answered(monkeypatch, "scienceqa", records, ["Therefore, the answer is 12", "no idea"])
    assert write_predictions(tmp_path / "s.json", "scienceqa", records, report) == 2
    assert read_scienceqa_predictions(tmp_path / "s.json") == {10: 1, 11: -1}
    with pytest.raises(ValueError, match="no published form of prediction files of gsm8k"):
        write_predictions(tmp_path / "g.json", "gsm8k", records, report)
    assert not (tmp_path / "g.json").exists()


# Records ----------------------------------------------------------------------------------------------------------


def gsm8k_file(folder: Path, number: int = 9) -> Path:
    path = folder / "gsm8k.txt"
    path.write_text("".join(f"How many are {i} and 1?||<<{i}+1={i + 1}>> ok##{i + 1}\n" for i in range(number)))
    return path


def test_records_of_files(tmp_path: Path) -> None:
    tiny_images(1)[0].save(tmp_path / "a.png")
    row = {"id": "m", "question": "Which?", "choices": ["ice", "fire"], "answer": "B", "rationale": "It burns. So.",
           "image": "a.png", "domain": "science"}  # fmt: skip
    (tmp_path / "m3cot.json").write_text(json.dumps([row, {**row, "id": "n", "image": None}, {**row, "answer": "Z"}]))
    report = RecordReport(0.5)
    (record,) = read_task("m3cot", tmp_path / "m3cot.json", report=report)
    assert (record["answer"], record["meta"]["domain"], record["steps"]) == ("B", "science", ["It burns", "So."])
    assert (report.num_good, report.num_bad, report.skip_reasons["row without image"]) == (1, 1, 1)
    (tmp_path / "prosqa.json").write_text(json.dumps([{"question": "Is A b?", "steps": ["x"], "answer": "A is b."}]))
    assert read_task("prosqa", tmp_path / "prosqa.json")[0]["answer"] == "A is b."
    every = read_task("gsm8k", gsm8k_file(tmp_path))
    assert [record["answer"] for record in every] == [str(i + 1) for i in range(9)]
    drawn = read_task("gsm8k", gsm8k_file(tmp_path), num=4, seed=1)
    rows = [record["meta"]["row"] for record in drawn]
    assert rows == sorted(set(rows)) and len(rows) == 4 and rows != [0, 1, 2, 3]
    assert drawn == read_task("gsm8k", gsm8k_file(tmp_path), num=4, seed=1)
    assert drawn != read_task("gsm8k", gsm8k_file(tmp_path), num=4, seed=3)


def test_graphs_are_generated() -> None:
    records = read_task("graphs", num=3, seed=5, **SMALL_GRAPHS)
    assert [record["id"] for record in records] == [f"graph-test-5-{i}" for i in range(3)]
    assert all(solve_graph_question(record["question"]) == record["answer"] for record in records)
    assert read_task("graphs", split="validation", num=1)[0]["meta"]["split"] == "validation"
    assert NUM_GRAPHS == len(read_task("graphs", **SMALL_GRAPHS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "mmvp"}, "unknown task 'mmvp'; choose one of .'m3cot', 'scienceqa'"),
        ({"task": "m3cot"}, "task 'm3cot' needs data_path"),
        ({"task": "graphs", "data_path": "x.json"}, "data_path='x.json': graphs are generated.*'prosqa'"),
        ({"task": "graphs", "image_folder": "x"}, "image_folder='x': graphs are generated"),
        ({"task": "graphs", "num": 0}, "num=0 must be at least 1"),
        ({"task": "gsm8k", "num": 10}, "num=10 of 9 records"),
        ({"task": "gsm8k", "split": "test"}, "split='test': gsm8k has none"),
        ({"task": "gsm8k", "image_folder": "x"}, "image_folder='x': gsm8k has none"),
        ({"task": "gsm8k", "num_nodes": 9}, r"\['num_nodes'\]: sizes of generated graphs, and gsm8k is read"),
        ({"task": "gsm8k", "number": 0}, "has no record for gsm8k"),
        ({"task": "prosqa", "data_path": "gone.json"}, "gone.json"),
    ],
)
def test_wrong_options_of_reading(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    task, number = options.pop("task"), options.pop("number", 9)
    if task == "gsm8k":
        options["data_path"] = gsm8k_file(tmp_path, number)
    with pytest.raises(ValueError, match=message):
        read_task(task, **options)


def test_wrong_options_of_evaluation(parts: Callable[[str], tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = parts("qwen2_5_vl")
    records = [choice(0, images=tiny_images(1))]
    for options, message in (
        (
            {"fmt": "ivtlr-chameleon"},
            "writes an image as '<image>', LatentProcessor as '<.image_pad",
        ),
        ({"fmt": "llava"}, "unknown staged format 'llava'"),
        ({"prompt": "test"}, "prompt='test' is unknown"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"latent_strategy": "slow"}, "latent_strategy='slow' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_steps("x", "m3cot", model, processor, records, **options)
    with pytest.raises(ValueError, match="no records of m3cot; give at least one"):
        evaluate_steps("x", "m3cot", model, processor, [])
    text_model, text_processor = parts("gpt2")
    with pytest.raises(ValueError, match="the format 'plain' writes the question through the chat template"):
        evaluate_steps("x", "prosqa", text_model, text_processor, [choice(0)], fmt="plain")
    with pytest.raises(RecordError, match=r"f.json, row 0: 1 images, and LatentTextProcessor reads text alone"):
        evaluate_steps("x", "m3cot", text_model, text_processor, records, fmt="coconut")


def test_default_formats() -> None:
    for task, entry in TASKS.items():
        names = [task_format(task, tiny_processor(family)).name for family in ("qwen2_vl", "chameleon", "gpt2")]
        assert names == [entry.fmt, entry.chameleon or entry.fmt, entry.fmt] and set(names) <= set(STAGED_FORMATS)
    assert task_format("m3cot", tiny_processor(), "plain").name == "plain"
