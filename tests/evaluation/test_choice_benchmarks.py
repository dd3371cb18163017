"""Choice and yes/no sets: what each protocol asks and reads of every set, its groups and clusters."""

from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.benchmark import Benchmark
from evaluation.benchmarks.choice_protocols import PUBLISHED
from evaluation.benchmarks.choice_sets import CHOICE_SETS
from evaluation.benchmarks.registry import benchmark
from evaluation.runner import Prediction
from tests.evaluation.choice_files import LETTER, ROWS, table, write_lines
from tests.tiny import tiny_images
from trainers.data.llava_text import record_messages
from trainers.data.lvr_text import region_messages
from trainers.data.records import Record, make_record

LAVIT = "\nAnswer with the option letter from the given choices directly."
TAGS = "Give your final answer in <answer>X</answer> format."

LISTED = "\nA. a1\nB. b1\nC. c1\nD. d1"
ANIMALS = "\nA. cat\nB. dog\nC. cow\nD. pig"
STAR = "What?\nOptions: A: one, B: two, C: three, D: four"
VSR = "Is this statement about the image true? The cat is on the mat."
ASKED = {
    ("blink", "default"): f"How many?\nA. 0\nB. 3{LETTER}",
    ("blink", "laser"): f"How many?\nOptions:\nA. 0\nB. 3{LETTER} {TAGS}",
    ("blink", "laser_plain"): "How many?\nOptions:\nA. 0\nB. 3\n",
    ("blink", "lvr"): f"How many?\nOptions:\nA. 0\nB. 3\n{LETTER}",
    ("blink", "lavit"): f"How many?\nOptions:\n(A) 0\n(B) 3{LAVIT}",
    ("mmvp", "default"): f"Is it open?\nA. Yes\nB. No{LETTER}",
    ("mmvp", "laser"): f"Is it open? (a) Yes (b) No{LETTER}",
    ("mmvp", "laser_plain"): "Is it open? (a) Yes (b) No",
    ("mmvp", "lvr"): f"Is it open?\nOptions:\nA. Yes B. No{LETTER}",
    ("mmvp", "lavit"): f"Is it open?\n(a) Yes (b) No{LAVIT}",
    ("mmstar", "default"): STAR + LETTER,
    ("mmstar", "laser"): STAR + LETTER,
    ("mmstar", "laser_plain"): STAR,
    ("mmstar", "lvr"): STAR + LETTER,
    ("mmstar", "lavit"): STAR + LAVIT,
    ("seedbench2plus", "default"): f"What is shown?{LISTED}{LETTER}",
    ("seedbench2plus", "laser"): f"What is shown?{LISTED}{LETTER}",
    ("seedbench2plus", "laser_plain"): f"What is shown?{LISTED}",
    ("seedbench2plus", "lvr"): f"What is shown?\nOptions:{LISTED}\n{LETTER}",
    ("seedbench2plus", "lavit"): f"What is shown?\nOptions:\n(A) a1\n(B) b1\n(C) c1\n(D) d1{LAVIT}",
    ("hallusionbench", "default"): "Is it red?\nPlease answer Yes or No.",
    ("hallusionbench", "laser"): "Is it red?\nPlease answer Yes or No.",
    ("hallusionbench", "laser_plain"): "Is it red?",
    ("hrbench4k", "default"): f"What is it?{ANIMALS}{LETTER}",
    ("hrbench4k", "laser"): f"What is it?{ANIMALS}{LETTER}",
    ("hrbench4k", "laser_plain"): f"What is it?{ANIMALS}",
    ("hrbench4k", "lvr"): f"What is it?\nOptions:{ANIMALS}\n{LETTER}",
    ("hrbench4k", "lavit"): f"What is it?\nOptions:\n(A) cat\n(B) dog\n(C) cow\n(D) pig{LAVIT}",
    ("vstar", "default"): f"Of what? (A) wood (B) stone{LETTER}",
    ("vstar", "laser"): f"Of what? (A) wood (B) stone{LETTER}",
    ("vstar", "laser_plain"): "Of what? (A) wood (B) stone",
    ("vstar", "lvr"): f"Of what? (A) wood (B) stone{LETTER}{LETTER}",
    ("vstar", "lavit"): f"Of what? (A) wood (B) stone{LETTER}",
    ("vsr", "default"): f"{VSR}\nPlease answer Yes or No.",
    ("vsr", "laser"): f"{VSR}\nPlease answer Yes or No.",
    ("vsr", "laser_plain"): VSR,
    ("cub", "default"): f"Which bird?\nA. crow\nB. gull{LETTER}",
    ("cub", "laser"): f"Which bird?\nA. crow\nB. gull{LETTER}",
    ("cub", "laser_plain"): "Which bird?\nA. crow\nB. gull",
    ("cub", "lvr"): f"Which bird?\nOptions:\nA. crow\nB. gull\n{LETTER}",
    ("cub", "lavit"): f"Which bird?\nOptions:\n(A) crow\n(B) gull{LAVIT}",
}
ASKED |= {("hrbench8k", protocol): text for (name, protocol), text in ASKED.items() if name == "hrbench4k"}
GROUPS = {"blink": ("Counting", "val_Counting_1"), "mmvp": ("MMVP", "1"), "mmstar": ("math", "7"),
          "seedbench2plus": ("Chart", "text_rich/1.png"), "hallusionbench": ("VD", "VD-chart-0"),
          "hrbench4k": ("single", "What is it?|cat|cow|dog|pig"), "vstar": ("relative_position", "115"),
          "vsr": ("on", "vsr-0"), "cub": ("CUB", "cub-0")}  # fmt: skip
GROUPS["hrbench8k"] = GROUPS["hrbench4k"]


def read_one(name: str, folder: Path, **changes: Any) -> tuple[Benchmark, Record]:
    (record,) = benchmark(name).read(table(folder / "table.parquet", {**ROWS[name], **changes}))
    return benchmark(name), record


def scored(bench: Benchmark, record: Record, raw: str, protocol: str) -> tuple[bool, str | None]:
    return tuple(bench.protocol(protocol).score(record, Prediction("", raw, raw, 0, 1, (), raw=raw)))


@pytest.mark.parametrize("name", CHOICE_SETS)
def test_what_every_protocol_asks_and_reads(name: str, tmp_path: Path) -> None:
    bench, record = read_one(name, tmp_path)
    assert {"blink": 2, "mmvp": 2, "vstar": 2, "cub": 2}.get(name, 4 if not CHOICE_SETS[name].yes_no else 2) == len(
        bench.answers(record)
    )
    gold = "No" if CHOICE_SETS[name].yes_no else "B"
    other = {"No": "Yes", "B": "A"}[gold]
    assert bench.gold(record) == gold and (bench.group(record), bench.cluster(record)) == GROUPS[name]
    own = [protocol for protocol in bench.protocols if not protocol.startswith("dmlr")]
    assert {(name, protocol) for protocol in own} == {key for key in ASKED if key[0] == name}
    for protocol in own:
        assert bench.protocol(protocol).ask(record) == ASKED[name, protocol], protocol
    for protocol in bench.protocols:
        for answer in (gold, other):
            reply = "".join(bench.protocol(protocol).gold_reply(answer))
            if protocol != "dmlr":  # whose labels are texts of options
                assert scored(bench, record, reply, protocol) == (answer == gold, answer), (protocol, reply)


@pytest.mark.parametrize(
    ("name", "reply", "protocol", "wanted"),
    [
        ("blink", "It is a dog", "default", (False, None)),
        ("blink", "It is a dog", "laser", (False, "A")),  # the article
        ("blink", "It is B, not A", "default", (True, "B")),
        ("blink", "3", "default", (True, "B")),  # the text of an option
        ("blink", "(B)", "lvr", (False, "(")),
        ("blink", "The answer is B", "lvr", (False, "T")),
        ("blink", "<answer>B</answer>", "lvr", (True, "B")),
        ("blink", "blue", "lavit", (True, "B")),  # the first letter of a short text
        ("blink", "It is not A. It is B", "lavit", (True, "B")),
        ("mmvp", "<answer>No</answer>", "laser", (True, "B")),
        ("mmvp", "no", "lavit", (False, None)),
        ("mmvp", "no, it is closed", "default", (True, "B")),
        ("mmstar", "A or B", "default", (False, None)),
        ("hallusionbench", "incorrect", "laser", (False, "Yes")),
        ("hallusionbench", "incorrect", "default", (True, "No")),
        ("vsr", "wrong", "laser", (True, None)),  # only the relaxed scorer knows the word
        ("vsr", "wrong", "default", (True, "No")),
        ("cub", "<answer>gull</answer>", "laser", (False, "G")),
        ("cub", "<answer>gull</answer>", "default", (True, "B")),
    ],
)  # fmt: skip
def test_published_and_strict_scores(
    name: str, reply: str, protocol: str, wanted: tuple[bool, str | None], tmp_path: Path
) -> None:
    bench, record = read_one(name, tmp_path)
    assert scored(bench, record, reply, protocol) == wanted


@pytest.mark.parametrize(
    ("name", "question", "label", "reply"),
    [
        ("mmvp", "Solve the problem and put the FINAL CHOICE inside \\boxed{}.\nQuestion: Is it open?\nOptions: "
         "(a) Yes (b) No", "(b) No", "\\boxed{b}"),
        ("mmstar", STAR, "B: two", "\\boxed{B}"),
        ("hallusionbench", "Answer the question based on the image. Give Yes or No and put it inside \\boxed{}.\n"
         "Question: Is it red?", "\\boxed{No}", "\\boxed{no}"),
    ],
)  # fmt: skip
def test_questions_of_dmlr(name: str, question: str, label: str, reply: str, tmp_path: Path) -> None:
    """The published turn has the `repr` of a list; only the strict judge takes a boxed answer for right."""
    bench, record = read_one(name, tmp_path)
    assert bench.protocol("dmlr").ask(record).endswith(repr([question]))
    assert bench.protocol("dmlr_strict").ask(record).endswith(question)
    assert (
        scored(bench, record, f"<answer>{label}</answer>", "dmlr")[0] and not scored(bench, record, reply, "dmlr")[0]
    )
    assert scored(bench, record, reply, "dmlr_strict")[0]
    assert not scored(bench, record, "\\boxed{A}", "dmlr_strict")[0]


def test_replies_are_those_of_training() -> None:
    """LASER and LVR against the texts that their collators encode; of LaViT a blank stands before the answer."""
    record = make_record("0", "?", "B", ["x.png"], boxes=[{"image": 0, "xyxy": [0.0, 0.0, 1.0, 1.0]}])
    protocols = benchmark("blink").protocols
    reply = {name: "".join(protocols[name].gold_reply("B")) for name in ("laser", "lvr", "lavit")}
    assert f"<laser>{reply['laser']}" == record_messages({**record, "chain": ["a"]})[-1]["content"]
    assert f"<lvr>{reply['lvr']}" == region_messages(record)[-1]["content"]
    assert reply["lavit"] == " B"


def test_sources_of_protocols_say_what_was_published() -> None:
    for method, (paper, sets) in PUBLISHED.items():
        for name in CHOICE_SETS:
            protocol = benchmark(name).protocols.get(method)
            if protocol is not None:
                assert protocol.source == f"{paper}, card 7" + ("" if name in sets else "; the form of its other sets")
            assert protocol is not None or name not in sets


# Rows that lack what is not needed


def test_rows_without_ids_and_categories(tmp_path: Path) -> None:
    few = {key: ROWS["hallusionbench"][key] for key in ("question", "gt_answer", "image")}
    found = benchmark("hallusionbench").read(table(tmp_path / "h.parquet", few, few))
    assert [each["id"] for each in found] == ["hallusionbench-0", "hallusionbench-1"]
    assert [each["meta"]["cluster"] for each in found] == [each["id"] for each in found]
    assert {each["meta"]["group"] for each in found} == {"unknown"}
    rows = [{**ROWS["vstar"], "question_id": number} for number in (0, 114, 115)]
    for row in rows:
        del row["category"]
    found = benchmark("vstar").read(table(tmp_path / "v.parquet", *rows))
    groups = ["direct_attributes", "direct_attributes", "relative_position"]
    assert [each["meta"]["group"] for each in found] == groups and [each["id"] for each in found] == [
        "0",
        "114",
        "115",
    ]
    bench, record = read_one("hrbench4k", tmp_path, category=None)
    assert bench.group(record) == "none"
    bench, record = read_one("mmstar", tmp_path, question="Which? A: up, B: down", answer="D")
    assert record["choices"] is None and bench.answers(record) == ("A", "B", "C", "D")


def test_statements_about_one_picture_are_a_cluster(tmp_path: Path) -> None:
    for name, picture in zip("ab", tiny_images(2), strict=True):
        picture.save(tmp_path / f"{name}.png")
    rows = [{**ROWS["vsr"], "image": f"{name}.png"} for name in "aab"]
    found = benchmark("vsr").read(write_lines(tmp_path / "rows.jsonl", rows) / "rows.jsonl")
    assert [each["meta"]["cluster"] for each in found] == ["a.png", "a.png", "b.png"]
    assert len({each["id"] for each in found}) == 3
