r"""MathVista, MATH-Vision and MM-MATH as benchmarks: what is read, prompts and scores by hand, wrong input."""

from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.registry import benchmark
from evaluation.runner import Prediction
from tests.evaluation.choice_files import encoded
from tests.evaluation.test_search_tasks import row, write_mm_math, write_table
from tests.tiny import tiny_images, tiny_processor
from trainers.data.records import Record, RecordError, RecordReport, RecordShareError, make_record

KEYS = {"mathvista": "math_vista", "mathvision": "math_vision", "mm_math": "mm_math"}
STEPS = (
    "Please analyze the image carefully and solve this problem step by step.\nShow your reasoning process clearly, "
    "then put your final answer within \\boxed{}.\n\nQuestion: "
)
SYSTEM = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think><answer> answer here </answer>"
)
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def said(text: str) -> Prediction:
    return Prediction("0", text, text, 0, 1, ())


def question(label: str, choices: list[str] | None = None, asked: str = "How long?") -> Record:
    return make_record("q", asked, label, tiny_images(1), choices=choices)


def write(name: str, folder: Path, *rows: dict[str, Any]) -> Path:
    if name == "mm_math":
        return write_mm_math(folder, *rows)
    split = "testmini" if name == "mathvista" else "test"
    write_table(KEYS[name], folder / f"data/{split}-00000-of-00001.parquet", *rows)
    return folder


# Reading


@pytest.mark.parametrize(
    ("name", "gold", "options", "group", "columns"),
    [
        ("mathvista", "A", ("A", "B"), "multi_choice", ("query", "answer", "pid", "choices", "decoded_image")),
        ("mathvision", "B", ("A", "B"), "geometry", ("question", "answer", "id", "options", "decoded_image")),
        ("mm_math", r"\frac{1}{2}", None, "easy", ("question", "solution", "file_name")),
    ],
)
def test_the_published_columns(
    name: str, gold: str, options: tuple | None, group: str, columns: tuple, tmp_path: Path
) -> None:
    bench = benchmark(name)
    folder = write(name, tmp_path / "set", row(KEYS[name]), row(KEYS[name]))
    first, second = bench.read(folder)
    assert bench.columns == columns and len(first["images"]) == 1 and first["question"] == second["question"]
    assert (bench.gold(first), bench.answers(first), bench.group(first)) == (gold, options, group)
    assert bench.read(folder, max_samples=1) == [first] and bench.cluster is None
    assert tuple(bench.protocols) == ("default", "dmlr", "dmlr_strict")


def test_the_first_records_are_asked_for_whatever_rows_are_bad(tmp_path: Path) -> None:
    bad = row("math_vista", answer="90°")
    folder = write("mathvista", tmp_path / "set", bad, row("math_vista", pid="2"), row("math_vista", pid="3"))
    report = RecordReport(0.5)
    (found,) = benchmark("mathvista").read(folder, max_samples=1, report=report)
    assert found["id"] == "2" and (report.num_bad, report.num_good) == (1, 2)


def test_names_and_sources() -> None:
    assert benchmark("Math_Vista") is benchmark("mathvista") and benchmark("mm-math") is benchmark("mm_math")
    sources = {name: benchmark(name).sources for name in KEYS}
    assert sources == {
        "mathvista": ("AI4Math/MathVista",), "mathvision": ("MathLLMs/MathVision",), "mm_math": ("THU-KEG/MM_Math",),
    }  # fmt: skip


def test_wrong_files(tmp_path: Path) -> None:
    bench = benchmark("mathvista")
    with pytest.raises(RecordError, match="gone.*neither a file nor a folder; check data_root"):
        bench.read(tmp_path / "gone")
    with pytest.raises(ValueError, match="image_folder='x': pictures of mathvista are in its table"):
        bench.read(tmp_path, image_folder="x")
    with pytest.raises(ValueError, match="mathvista has no tasks"):
        bench.read(tmp_path, tasks=["algebra"])
    good, bad = row("math_vista"), row("math_vista", answer="90°")
    with pytest.raises(RecordShareError, match="'90°' is none of the 2 choices"):
        bench.read(write("mathvista", tmp_path / "one", good, bad))
    with pytest.raises(ValueError, match="(?s)no record.*'90°' is none of the 2 choices"):
        bench.read(write("mathvista", tmp_path / "all", bad), report=RecordReport(1.0))
    with pytest.raises(ValueError, match="no record"):
        bench.read(write_empty(tmp_path / "empty.jsonl"))
    with pytest.raises(RecordError, match=r"lacks the columns \['query', 'pid', 'decoded_image'\]"):
        (tmp_path / "other.jsonl").write_text('{"question": "?", "answer": "1", "choices": null}\n')
        bench.read(tmp_path / "other.jsonl")


def write_empty(path: Path) -> Path:
    path.write_text("")
    return path


# Prompts


@pytest.mark.parametrize("name", list(KEYS))
def test_prompts(name: str) -> None:
    record = question("3", asked="How long is the 'cut'?\nGive cm.")
    spoken = {
        "default": f"{STEPS}How long is the 'cut'?\nGive cm.",
        "dmlr": STEPS + """["How long is the 'cut'?\\nGive cm."]""",  # the published form: a list as Python writes it
        "dmlr_strict": f"{STEPS}How long is the 'cut'?\nGive cm.",
    }
    for label, asked in spoken.items():
        system = "You are a helpful assistant." if label == "default" else SYSTEM
        protocol = benchmark(name).protocol(label)
        assert protocol.ask(record) == asked and protocol.max_new_tokens == 1024
        assert protocol.prompt(tiny_processor(), record) == (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{PICTURE}{asked}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


@pytest.mark.parametrize("refusal", ["{{ raise_exception('System role not supported') }}", ""])
def test_a_template_without_system_turns(refusal: str) -> None:
    """The system message stands before the user's text, whether the template refuses it or leaves it out."""
    processor = tiny_processor()
    processor.chat_template = (
        "{% for message in messages %}{% if message.role == 'system' %}" + refusal + "{% else %}"
        "<u>{% for part in message.content %}{% if part.type == 'image' %}<i>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}</u>{% endif %}{% endfor %}"
    )
    protocol = benchmark("mathvista").protocol("dmlr_strict")
    assert protocol.prompt(processor, question("3")) == f"<u><i>{SYSTEM}\n\n{STEPS}How long?</u>"
    assert benchmark("mathvista").protocol().prompt(processor, question("3")) == f"<u><i>{STEPS}How long?</u>"


def test_another_error_of_a_template_is_none_of_the_system_message() -> None:
    processor = tiny_processor()
    processor.chat_template = "{{ raise_exception('no images here') }}"
    with pytest.raises(Exception, match="no images here"):
        benchmark("mathvista").protocol("dmlr").prompt(processor, question("3"))


# Scores


@pytest.mark.parametrize(
    ("label", "choices", "text", "strict", "published"),
    [
        ("12", None, "So \\boxed{12}", (True, "12"), (True, "12")),
        ("12", None, "\\boxed{112}", (False, "112"), (True, "112")),
        ("12", None, "\\boxed{12.0}", (True, "12.0"), (True, "12.0")),
        ("12.0", None, "\\boxed{12}", (True, "12"), (False, "12")),
        ("12", None, "The answer is 12 cm.", (True, "12 cm."), (True, "The answer is 12 cm.")),
        ("B. carp", ["newt", "carp"], "\\boxed{B}", (True, "B"), (False, "B")),
        ("B. carp", ["newt", "carp"], "\\boxed{carp}", (True, "B"), (False, "carp")),
        ("B. carp", ["newt", "carp"], "\\boxed{B. carp}", (True, "B"), (True, "B. carp")),
        ("B. carp", ["newt", "carp"], "<answer>A</answer>", (False, "A"), (False, "A")),
        ("B. carp", ["newt", "carp"], "A carp or a newt?", (False, None), (False, "A carp or a newt?")),
        ("\\boxed{No}", None, "\\boxed{No}", (True, "No"), (False, "No")),
        ("\\frac{1}{2}", None, "\\boxed{\\frac{1}{2}}", (True, "\\frac{1}{2}"), (True, "\\frac{1}{2}")),
        ("12", None, "", (False, None), (False, None)),
    ],
)
def test_scores(label: str, choices: list[str] | None, text: str, strict: tuple, published: tuple) -> None:
    for name in KEYS:
        bench, record = benchmark(name), question(label, choices)
        assert tuple(bench.protocol("dmlr").score(record, said(text))) == published
        for corrected in ("default", "dmlr_strict"):
            assert tuple(bench.protocol(corrected).score(record, said(text))) == strict


@pytest.mark.parametrize(
    ("label", "choices", "gold"),
    [
        ("B. carp", ["newt", "carp"], "B"),
        ("(b) Closed", ["Open", "Closed"], "B"),
        ("\\boxed{B}", ["x", "y"], "B"),
        ("B: The floor.", ["The wall.", "The floor."], "B"),
        ("\\boxed{No}", None, "No"),
        ("\\frac{1}{2}", None, "\\frac{1}{2}"),
        ("\\boxed{\\frac{1}{2}}", None, "\\frac{1}{2}"),
        ("Area", None, "Area"),
        (" 145 ", None, "145"),
    ],
)
def test_gold_replies_are_right(label: str, choices: list[str] | None, gold: str) -> None:
    bench, record = benchmark("mathvision"), question(label, choices)
    assert bench.gold(record) == gold
    for name in ("default", "dmlr_strict"):
        reply = bench.protocol(name).gold_reply(gold)
        assert tuple(reply) == ("\\boxed{", gold, "}") and bench.protocol(name).score(record, said("".join(reply)))[0]


def test_pictures_of_rows_are_bytes_that_a_processor_takes(tmp_path: Path) -> None:
    (found,) = benchmark("mathvision").read(write("mathvision", tmp_path / "set", row("math_vision")))
    assert found["images"] == [{"bytes": encoded(tiny_images(1)[0]), "path": None}]
