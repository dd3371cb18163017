"""Both JSON formats of LVR and ViRL39K: reading, every bad input, text and targets of regions, prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainers.data.llava import encode_conversation
from trainers.data.lvr import check_regions, read_lvr, read_lvr_grpo
from trainers.data.lvr_text import (
    LVR_TOKENS,
    REFERENCE_LAYOUT,
    RegionLayout,
    grpo_example,
    region_messages,
    render_region_turns,
    render_regions,
)
from trainers.data.maze_planning import Maze
from trainers.data.mazes import maze_record
from trainers.data.records import (
    RecordError,
    RecordReport,
    RecordShareError,
    make_record,
    record_from_row,
    records_to_dataset,
)
from trainers.data.virl39k import read_virl39k, unboxed

START, SLOT, LAST, END = LVR_TOKENS.values()


def talk(*values: str) -> list[dict[str, str]]:
    """Turns of human and gpt in alternation."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def item(**changes: Any) -> dict[str, Any]:
    """A good item of the first stage; a change to None drops the field."""
    value = {
        "dataset": "cub",
        "split": "train",
        "question_id": 5,
        "image": ["a.png"],
        "conversations": talk("<image>\nWhat colour?", "<lvr>\n<answer> blue </answer>"),
        "bboxes": [[0.25, 0.5, 0.75, 1.0]],
        **changes,
    }
    return {name: content for name, content in value.items() if content is not None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, size in (("a.png", (8, 6)), ("b.png", (10, 20))):
        Image.new("RGB", size).save(tmp_path / "images" / name)
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "data.json") -> Path:
        path = folder / name
        lines = path.suffix == ".jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows) if lines else json.dumps(rows), encoding="utf-8")
        return path

    return write


def read(path: Path, reader: Callable = read_lvr, **options: Any) -> tuple[list[dict], RecordReport]:
    report = RecordReport()
    return list(reader(path, path.parent / "images", report=report, **options)), report


# First stage


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_an_item_becomes_a_record(write: Callable[..., Path], folder: Path, name: str) -> None:
    (record,), report = read(write([item()], name))
    assert record["images"] == [str(folder / "images" / "a.png")]
    assert (record["question"], record["answer"]) == ("What colour?", "blue")
    assert record["boxes"] == [{"image": 0, "xyxy": [0.25, 0.5, 0.75, 1.0]}]
    assert record["messages"][1] == {"role": "assistant", "content": "<lvr>\n<answer> blue </answer>"}
    facts = {"source": str(folder / name), "row": 0, "index": 0, "ds_name": "data", "question_id": 5}
    assert record["meta"] == facts
    assert (report.num_good, report.num_bad) == (1, 0)
    assert record_from_row(records_to_dataset([record], decode=False)[0])["boxes"] == record["boxes"]


def test_an_answer_without_tags_is_the_reply_without_its_region(write: Callable[..., Path]) -> None:
    (record,), _ = read(write([item(conversations=talk("<image>\nQ", "<lvr>\nit is blue"))]))
    assert record["answer"] == "it is blue"


def test_a_meta_file_joins_its_data_sets(write: Callable[..., Path], folder: Path) -> None:
    write([item(question_id=1), item(question_id=2, image="none.png")], "first.json")
    write([item(question_id=3)], "second.jsonl")
    entries = [
        {"ds_name": "one", "data_path": "first.json", "image_folder": "images"},
        {"ds_name": "two", "data_path": "second.jsonl", "image_folder": str(folder / "images")},
    ]
    report = RecordReport()
    records = list(read_lvr(write(entries, "meta.json"), report=report, question_id_blacklist=[1]))
    assert [(r["meta"]["question_id"], r["meta"]["ds_name"], r["meta"]["index"]) for r in records] == [(3, "two", 2)]
    assert report.num_bad == 1 and "first.json, row 1" in report.summary()
    assert "skipped on request: 1 (question_id_blacklist)" in report.summary()


def test_text_and_images_without_regions_are_good_rows(write: Callable[..., Path]) -> None:
    plain = item(bboxes=None, conversations=talk("<image>\nQ", "<answer>B</answer>"))
    text = item(bboxes=[], image=None, conversations=talk("1 + 1?", "2"))
    records, report = read(write([plain, text]))
    assert [record["boxes"] for record in records] == [None, []] and report.num_bad == 0


BAD_ROWS = {
    "reversed": (item(bboxes=[[0.7, 0.2, 0.3, 0.4]]), r"region 0: box \[0.7, 0.2, 0.3, 0.4\] is reversed"),
    "outside": (item(bboxes=[[1.2, 0.2, 1.3, 0.4]]), "region 0: box .* lies outside the image"),
    "over the border": (item(bboxes=[[0.2, 0.2, 1.3, 0.4]]), "reaches outside the image; .* outside='clip'"),
    "no token": (item(bboxes=[[0.5, 0.2, 0.5, 0.4]]), "covers no token; repair it, or read with empty_region="),
    "nan": (item(bboxes=[[float("nan"), 0.2, 0.3, 0.4]]), "has a value that is not finite"),
    "pixels": (item(bboxes=[[1, 2, 7, 5]]), "is in pixels, fractions of the image are expected.*box_unit='pixel'"),
    "three numbers": (item(bboxes=[[0.1, 0.2, 0.3]]), "is not a list of four numbers"),
    "boxes no list": (item(bboxes={"a": 1}), "'bboxes' must be a list"),
    "more boxes": (item(bboxes=[[0, 0, 1, 1]] * 2), "1 <lvr> placeholders but 2 regions"),
    "fewer boxes": (
        item(conversations=talk("<image>\nQ", "<lvr> and <lvr>\nA")),
        r"2 <lvr> placeholders but 1 regions \('bboxes'\); write one placeholder for each box",
    ),
    "boxes missing": (item(bboxes=None), "1 <lvr> placeholders but 0 regions"),
    "unused box": (item(conversations=talk("<image>\nQ", "A")), "0 <lvr> placeholders but 1 regions"),
    "missing image": (item(image="none.png"), r"image file '.*none\.png' does not exist; check image_folder"),
    "more images": (item(image=["a.png", "b.png"]), "1 <image> placeholders but 2 images"),
    "region in a prompt": (
        item(conversations=talk("<image>\n<lvr>Q", "A")),
        "the user turn contains <lvr>, which only responses may hold",
    ),
    "latent token in a prompt": (item(conversations=talk(f"<image>\nQ{END}", "<lvr>A")), "the user turn contains"),
    "region written out": (
        item(bboxes=[], conversations=talk("<image>\nQ", f"{START}{SLOT}{END}A")),
        r"a response contains the latent token <\|lvr_start\|>; write <lvr>",
    ),
    "no reply": (item(conversations=talk("<image>\nQ")), "the last turn must be the assistant's"),
    "malformed extra boxes": (item(record_fields={"boxes": [7]}), "region 0: 7 needs 'image' and 'xyxy'"),
    "not an object": (3, "a record must be a JSON object, got 3"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_left_out_and_named(write: Callable[..., Path], case: str) -> None:
    bad, reason = BAD_ROWS[case]
    records, report = read(write([item(), bad, item(question_id=9)]))
    assert [record["meta"]["question_id"] for record in records] == [5, 9]
    with pytest.raises(RecordShareError, match=rf"(?s)data\.json, row 1: .*{reason}"):
        report.check()


def test_boxes_in_pixels_are_divided_by_the_size_of_their_image(write: Callable[..., Path]) -> None:
    path = write([item(bboxes=[[2, 3, 6, 6]]), item(bboxes=[[2, 3, 6, 9]]), item(image="none.png")])
    (record,), report = read(path, box_unit="pixel")
    assert record["boxes"] == [{"image": 0, "xyxy": [0.25, 0.5, 0.75, 1.0]}]
    assert "row 1: region 0: box [2, 3, 6, 9] reaches outside the image" in report.summary()
    assert "row 2: box_unit='pixel' needs the size of image 0, which cannot be read" in report.summary()
    clipped, _ = read(path, box_unit="pixel", outside="clip")
    assert clipped[1]["boxes"][0]["xyxy"] == [0.25, 0.5, 0.75, 1.0]


def test_policies_for_a_box_without_area(write: Callable[..., Path]) -> None:
    boxes = [[0.5, 0.5, 0.5, 1.0], [0, 0, 0.5, 0.5], [1, 1, 1, 1]]
    path = write([item(bboxes=boxes, conversations=talk("<image>\nQ", "a <lvr> b <lvr> c", "Q", "<lvr> d"))])
    (kept,), report = read(path, empty_region="one_token")
    assert report.num_bad == 0 and len(kept["boxes"]) == 3
    _, regions = render_regions(kept, [(1, 8, 8)], empty_region="refuse")
    assert [region.tolist() for region in regions] == [[10, 14], [0, 1, 4, 5], [15]]
    (dropped,), _ = read(path, empty_region="drop")
    assert [box["xyxy"] for box in dropped["boxes"]] == [[0, 0, 0.5, 0.5]]
    assert [turn["content"] for turn in dropped["messages"]] == ["<image>\nQ", "a  b <lvr> c", "Q", " d"]


def test_joined_boxes_need_one_placeholder(write: Callable[..., Path]) -> None:
    boxes = [[0.5, 0.5, 0.5, 1.0], [0, 0, 0.5, 0.5], [0, 0.5, 0.5, 1]]
    path = write([item(bboxes=boxes), item(bboxes=boxes[:1])])
    records, _ = read(path, join_regions=True, empty_region="drop")
    assert [len(record["boxes"]) for record in records] == [2, 0]
    _, (region,) = render_regions(records[0], [(1, 4, 4)], join_regions=True)
    assert region.tolist() == [0, 2]
    assert records[1]["messages"][1]["content"] == "\n<answer> blue </answer>"
    two = item(conversations=talk("<image>\nQ", "<lvr><lvr>A"), bboxes=boxes[1:])
    _, report = read(write([two]), join_regions=True)
    assert "2 <lvr> placeholders but 1 regions" in report.summary()


@pytest.mark.parametrize("option", ["box_unit", "outside", "empty_region"])
def test_an_unknown_option_is_refused_at_once(write: Callable[..., Path], option: str) -> None:
    with pytest.raises(ValueError, match=f"unknown {option} 'x'; choose one of"):
        read_lvr(write([item()]), **{option: "x"})


# Text and targets


def record(*replies: str, boxes: int = 2, images: int = 1) -> dict[str, Any]:
    corners = [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0.5, 0.5, 1]][:boxes]
    turns = [("user", "<image>" * images + "\nQ"), ("assistant", replies[0])]
    turns += [turn for reply in replies[1:] for turn in (("user", "Q"), ("assistant", reply))]
    return make_record(
        "r",
        "Q",
        "A",
        images=["a.png"] * images,
        boxes=[{"image": images - 1, "xyxy": box} for box in corners],
        messages=[{"role": role, "content": text} for role, text in turns],
        meta={"source": "f.json", "row": 2},
    )


def test_regions_are_written_with_as_many_slots_as_tokens() -> None:
    turns, regions = render_regions(record("see <lvr>\nand <lvr> so"), [(1, 4, 8)])
    span = f"{START}{SLOT * 2}{LAST}{END}"
    assert turns[1] == ("assistant", f"see {span}\nand {span} so")
    assert turns[0] == ("user", "<|vision_start|><|image_pad|><|vision_end|>Q")
    assert [region.tolist() for region in regions] == [[0, 1], [6, 7]]


def test_targets_point_behind_the_tokens_of_earlier_images() -> None:
    _, regions = render_regions(record("<lvr><lvr>", images=2), [(1, 4, 8), (1, 4, 4)])
    assert [region.tolist() for region in regions] == [[8], [11]]


def test_flags_of_the_layout() -> None:
    messages = record("see <lvr>\nand <lvr> so", "now <lvr>")["messages"]

    def reply(counts: list[int | None], **flags: bool) -> list[str]:
        return [text for role, text in render_region_turns(messages, counts, RegionLayout(**flags)) if role != "user"]

    def span(count: int) -> str:
        return f"{START}{SLOT * count}{LAST}{END}"

    assert reply([1, 2, 3]) == [f"see {span(1)}\nand {span(2)} so", f"now {span(3)}"]
    assert reply([1, 0, None]) == [f"see {span(1)}\nand {span(0)} so", "now "]
    assert reply([1, 2, 3], keep_text_before=False) == [f"{span(1)}\nand {span(2)} so", span(3)]
    assert reply([1, 2], restart_regions=True)[1] == f"now {span(1)}"
    assert reply([1], drop_surplus=True) == [f"see {span(1)}\nand ", "now "]
    assert reply([1, 2, 3], latent_end_in_text=False)[1] == f"now {START}{SLOT * 3}{END}"
    assert [t for _, t in render_region_turns(messages, [4], REFERENCE_LAYOUT)][1::2] == [f"{span(4)}\nand ", span(4)]
    for counts in ([1, 2], [1, 2, 3, 4]):
        with pytest.raises(ValueError, match=f"3 <lvr> placeholders but {len(counts)} regions"):
            reply(counts)
    with pytest.raises(ValueError, match="counts >= 0"):
        reply([1, -1, 2])


def test_rendering_names_file_and_row() -> None:
    with pytest.raises(RecordError, match=r"^f\.json, row 2: 1 <lvr> placeholders but 2 regions"):
        render_regions(record("<lvr>"), [(1, 4, 4)])
    with pytest.raises(RecordError, match=r"^f\.json, row 2: boxes are defined on images, got a grid of 2 frames"):
        render_regions(record("<lvr><lvr>"), [(2, 4, 4)])


def test_a_dropped_region_leaves_text_and_targets() -> None:
    """Positive area, but thinner than the distance within which an edge counts as lying on a line."""
    thin = {
        **record("a <lvr> b <lvr>"),
        "boxes": [{"image": 0, "xyxy": [0.5, 0.5, 0.5 + 1e-9, 1]}, record("")["boxes"][0]],
    }
    turns, regions = render_regions(thin, [(1, 4, 4)], empty_region="drop")
    assert turns[1][1] == f"a  b {START}{SLOT}{LAST}{END}" and [r.tolist() for r in regions] == [[0]]
    turns, regions = render_regions(thin, [(1, 4, 4)])
    assert [r.tolist() for r in regions] == [[3], [0]]
    with pytest.raises(RecordError, match=r"^f\.json, row 2: .*covers no token"):
        render_regions(thin, [(1, 4, 4)], empty_region="refuse")


def test_slots_of_the_encoded_text_are_the_targets() -> None:
    """What a collator does: text, then ids; as many slots as indices, in order."""

    class Words:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [int(token == SLOT) for token in text.replace("<|", "\n<|").replace("|>", "|>\n").split("\n")]

    turns, regions = render_regions(record("x <lvr> y <lvr> z", boxes=2), [(1, 8, 12)])
    encoded = encode_conversation(turns, Words(), [24])
    assert sum(encoded["input_ids"]) == sum(map(len, regions)) == 12
    assert np.concatenate(regions).max() == 23


# Records that were not published as conversations: mazes

MAZE = Maze(4, (0, 0), (2, 1), frozenset({(1, 0)}))


def test_a_maze_has_one_region_for_each_cell_of_its_path() -> None:
    maze = maze_record(MAZE)
    check_regions(maze, "mazes", 0)
    turns, regions = render_regions(maze, [(1, 8, 8)])
    cells = [row * 4 + column for row, column in maze["meta"]["path_cells"]]
    assert [region.tolist() for region in regions] == [[cell] for cell in cells]
    assert turns[1][1] == f"{START}{SLOT}{LAST}{END}" * len(cells) + f"\n<answer>{maze['answer']}</answer>"


def test_a_maze_may_have_its_path_as_one_region() -> None:
    maze = maze_record(MAZE)
    check_regions(maze, "mazes", 0, join_regions=True)
    turns, (region,) = render_regions(maze, [(1, 8, 8)], join_regions=True)
    cells = [row * 4 + column for row, column in maze["meta"]["path_cells"]]
    assert region.tolist() == cells
    assert turns[1][1] == f"{START}{SLOT * len(cells)}{LAST}{END}\n<answer>{maze['answer']}</answer>"
    assert region_messages({**maze, "boxes": None})[1]["content"] == f"<answer>{maze['answer']}</answer>"


# Second stage


def question(**changes: Any) -> dict[str, Any]:
    talked = talk("<image>\nHow many <image>pairs?", "<answer>4</answer>")
    value = {"dataset": "virl", "id": 7, "image": ["a.png", "b.png"], "conversations": talked, **changes}
    return {name: content for name, content in value.items() if content is not None}


def test_the_prompt_is_the_same_with_and_without_placeholders(write: Callable[..., Path], folder: Path) -> None:
    bare = question(conversations=talk("How many pairs?", "<answer>4</answer>", "more", "turns"))
    records, report = read(write([question(), bare]), read_lvr_grpo)
    assert report.num_bad == 0
    first, second = (grpo_example(record, min_pixels=4, max_pixels=9) for record in records)
    assert first == second
    images = [
        {"type": "image", "image": str(folder / "images" / name), "min_pixels": 4, "max_pixels": 9}
        for name in ("a.png", "b.png")
    ]
    assert first["prompt"] == [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [*images, {"type": "text", "text": "How many pairs?"}]},
    ]
    assert first["assistant"] == {"role": "assistant", "content": "<answer>4</answer>"}
    assert [record["meta"]["ignored_turns"] for record in records] == [0, 2]
    assert (records[0]["id"], records[0]["answer"]) == ("7", "4")
    assert records[0]["messages"][0]["content"] == "<image><image>\nHow many pairs?"


def test_the_system_turn_and_the_bounds_may_be_left_out() -> None:
    example = grpo_example(maze_record(MAZE), system_message=None)
    (turn,) = example["prompt"]
    assert set(turn["content"][0]) == {"type", "image"}
    assert example["assistant"]["content"] == f"<answer>{maze_record(MAZE)['answer']}</answer>"


BAD_QUESTIONS = {
    "no reply": (question(conversations=talk("Q")), r"the first two turns must be 'human' and 'gpt', got \['user'\]"),
    "wrong order": (
        question(conversations=[{"from": "gpt", "value": "A"}, {"from": "human", "value": "Q"}]),
        "the first two turns must be 'human' and 'gpt'",
    ),
    "empty answer": (question(conversations=talk("Q", "<answer> </answer>")), "answer is empty"),
    "empty question": (question(conversations=talk("<image>", "4")), "question is empty"),
    "missing image": (question(image="none.png"), "does not exist; check image_folder"),
    "image a number": (question(image=3), "'image' must be a path or a list of paths, got 3"),
    "video": (question(video="a.mp4"), "a video, which is not supported"),
    "latent token": (question(conversations=talk(f"Q {SLOT}", "4")), r"the user turn contains <\|lvr\|>"),
    "image token": (question(conversations=talk("Q <|image_pad|>", "4")), "contains the image token"),
}


@pytest.mark.parametrize("case", BAD_QUESTIONS)
def test_a_bad_question_is_left_out_and_named(write: Callable[..., Path], case: str) -> None:
    bad, reason = BAD_QUESTIONS[case]
    records, report = read(write([question(), bad]), read_lvr_grpo)
    assert len(records) == 1
    with pytest.raises(RecordShareError, match=rf"(?s)data\.json, row 1: .*{reason}"):
        report.check()


# ViRL39K


def virl(**changes: Any) -> dict[str, Any]:
    return {
        "question": "<image>Which one?",
        "answer": "\\boxed{A}",
        "image": ["images/a.png"],
        "PassRate_32BTrained": 0.5,
        "PassRate_7BBase": -1.0,
        "category": "Spatial",
        "source": "M3CoT",
        "qid": "q-1",
        **changes,
    }


def test_virl39k_as_published(folder: Path) -> None:
    from datasets import Dataset

    rows = [virl(), virl(question="Lost placeholder?", qid="q-2", answer="\\boxed{\\frac{1}{2}}"), virl(image=[])]
    Dataset.from_list(rows).to_parquet(folder / "virl.parquet")
    report = RecordReport()
    records = list(read_virl39k(folder / "virl.parquet", report=report))
    assert report.num_bad == 0
    assert [record["question"] for record in records] == ["Which one?", "Lost placeholder?", "Which one?"]
    assert [record["answer"] for record in records] == ["A", "\\frac{1}{2}", "A"]
    assert [len(record["images"]) for record in records] == [1, 1, 0]
    assert records[1]["id"] == "q-2" and records[1]["messages"][1]["content"] == "<answer>\\frac{1}{2}</answer>"
    meta = records[0]["meta"]
    assert (meta["origin"], meta["category"], meta["PassRate_7BBase"], meta["row"]) == ("M3CoT", "Spatial", -1.0, 0)
    assert grpo_example(records[1])["prompt"][1]["content"][0]["image"] == str(folder / "images" / "a.png")


def test_bad_rows_of_virl39k_are_named(write: Callable[..., Path], folder: Path) -> None:
    path = write([virl(), virl(answer="\\boxed{A"), virl(question=None), virl(image=["images/none.png"])], "v.jsonl")
    report = RecordReport()
    assert len(list(read_virl39k(path, report=report))) == 1
    for reason in ("row 1: the braces of the answer", "row 2: a row needs the strings", "row 3: image file"):
        assert f"v.jsonl, {reason}" in report.summary()
    with pytest.raises(RecordError, match="the file does not exist"):
        read_virl39k(folder / "none.parquet")
    with pytest.raises(RecordError, match="image_folder '.*none' does not exist"):
        read_virl39k(path, folder / "none")


@pytest.mark.parametrize(
    ("text", "answer"),
    [("\\boxed{ 3 }", "3"), ("so \\boxed{1} or \\boxed{x^{2}} ", "x^{2}"), (" 7 ", "7"), ("\\boxed{{1}", None)],
)
def test_unboxed(text: str, answer: str | None) -> None:
    assert unboxed(text) == answer
