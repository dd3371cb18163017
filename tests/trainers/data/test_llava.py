"""The conversation format of LASER: reading, every bad input, rendering, labels, and writing mazes in it."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modeling_latent.configuration_latent import LATENT_METHODS
from trainers.data.llava import (
    LASER_TOKENS,
    encode_conversation,
    expand_image_placeholders,
    expand_latent_placeholders,
    expand_slot_placeholders,
    pad_batch,
    read_llava,
    read_source,
    record_form,
    render_turns,
    write_llava,
)
from trainers.data.maze_planning import Maze
from trainers.data.mazes import maze_of_record, maze_record
from trainers.data.records import (
    RecordError,
    RecordReport,
    RecordShareError,
    make_record,
    record_from_row,
    records_to_dataset,
)

START, SLOT, END = LASER_TOKENS.values()


def row(**changes: Any) -> dict[str, Any]:
    """A good record of the published form; a change to None drops the field."""
    value = {
        "question_id": 5,
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is worn?"},
            {"from": "gpt", "value": "<laser><answer>Jeans</answer>"},
        ],
        "reasoning_chain": ["Skatepark", "the Helmet", "Jeans"],
        **changes,
    }
    return {name: content for name, content in value.items() if content is not None}


def talk(*values: str) -> list[dict[str, str]]:
    """Turns of human and gpt in alternation."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for name, colour in (("a.png", (255, 0, 0)), ("b.png", (0, 255, 0))):
        Image.new("RGB", (8, 6), colour).save(images / name)
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "data.json") -> Path:
        path = folder / name
        lines = path.suffix == ".jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows) if lines else json.dumps(rows), encoding="utf-8")
        return path

    return write


def read(path: Path, **options: Any) -> tuple[list[dict], RecordReport]:
    report = RecordReport()
    return list(read_llava(path, path.parent / "images", report=report, **options)), report


# Reading


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_good_row_becomes_a_record(write: Callable[..., Path], folder: Path, name: str) -> None:
    (record,), report = read(write([row(bboxes=[[0.1, 0.2, 0.5, 0.6]])], name))
    image = str(folder / "images" / "a.png")
    assert record["images"] == [image]
    assert (record["question"], record["answer"]) == ("What is worn?", "Jeans")
    assert record["chain"] == ["Skatepark", "the Helmet", "Jeans"]
    assert record["boxes"] == [{"image": 0, "xyxy": [0.1, 0.2, 0.5, 0.6]}]
    assert record["messages"] == [
        {"role": "user", "content": "<image>\nWhat is worn?"},
        {"role": "assistant", "content": "<laser><answer>Jeans</answer>"},
    ]
    source = str(folder / name)
    assert record["meta"] == {"source": source, "row": 0, "index": 0, "ds_name": "data", "question_id": 5}
    assert (report.num_good, report.num_bad) == (1, 0)


def test_ids_questions_and_answers_are_taken_from_where_they_are(write: Callable[..., Path]) -> None:
    several = talk("<image>\nFirst?", "<laser><answer>1</answer>", "Second?", "<laser>\nit is two")
    records, _ = read(write([row(id="x7"), row(conversations=several, question_id=None)]))
    assert [record["id"] for record in records] == ["x7", "data-1"]
    assert (records[1]["question"], records[1]["answer"]) == ("First?", "it is two")
    assert records[1]["meta"]["question_id"] == -1


def test_other_roles_pass_through(write: Callable[..., Path]) -> None:
    turns = [{"from": "system", "value": "Be brief."}, *row()["conversations"]]
    (record,), _ = read(write([row(conversations=turns)]))
    assert [turn["role"] for turn in record["messages"]] == ["system", "user", "assistant"]


def test_image_paths(write: Callable[..., Path], folder: Path) -> None:
    direct = str(folder / "images" / "b.png")
    two = talk("<image><image>\nSame?", "<laser><answer>no</answer>")
    url = "https://example.org/x.png"
    records, _ = read(write([row(image=direct), row(image=["a.png", direct], conversations=two), row(image=url)]))
    expected = [[direct], [str(folder / "images" / "a.png"), direct], [url]]
    assert [record["images"] for record in records] == expected


def test_text_only_rows_are_good(write: Callable[..., Path]) -> None:
    (record,), _ = read(write([row(image=None, conversations=talk("1 + 1?", "<laser><answer>2</answer>"))]))
    assert record["images"] == []


def test_the_default_image_folder_is_that_of_the_file(folder: Path) -> None:
    path = folder / "images" / "data.json"
    path.write_text(json.dumps([row()]))
    assert next(read_llava(path))["images"] == [str(folder / "images" / "a.png")]


def test_json_lines_are_streamed(write: Callable[..., Path]) -> None:
    """Reading the first record must not touch the rows behind it, here a damaged one."""
    path = write([row()], "data.jsonl")
    path.write_text(path.read_text() + "{broken\n")
    report = RecordReport()
    records = read_llava(path, path.parent / "images", report=report)
    assert next(records)["answer"] == "Jeans"
    assert report.num_bad == 0
    assert list(records) == [] and report.num_bad == 1


def test_blacklisted_questions_are_left_out_and_counted(write: Callable[..., Path]) -> None:
    path = write([row(question_id=1), row(question_id=2), row(question_id=3)])
    blacklist = write([{"question_id": 2}, {"question_id": 3}], "bad.jsonl")
    for given in (blacklist, [2, 3]):
        records, report = read(path, question_id_blacklist=given)
        assert [record["meta"]["question_id"] for record in records] == [1]
        assert "skipped on request: 2 (question_id_blacklist)" in report.summary()
        assert report.num_bad == 0
    with pytest.raises(RecordError, match=r"bad\.jsonl, row 0: a blacklist line must be"):
        read(path, question_id_blacklist=write([7], "bad.jsonl"))


# Meta files


def test_a_meta_file_joins_its_sources_in_order(write: Callable[..., Path], folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "second.jsonl").write_text("".join(json.dumps(row(question_id=q)) + "\n" for q in (20, 21)))
    write([row(question_id=10), row(image="none.png"), row(question_id=12)], "first.json")
    meta = write(
        [
            {"data_path": "first.json", "image_folder": "images", "ds_name": "one"},
            {"data_path": "sub/second.jsonl", "image_folder": str(folder / "images")},
        ],
        "meta.json",
    )
    report = RecordReport()
    records = list(read_source(meta, report=report))
    facts = [(r["meta"]["question_id"], r["meta"]["index"], r["meta"]["row"], r["meta"]["ds_name"]) for r in records]
    assert facts == [(10, 0, 0, "one"), (12, 2, 2, "one"), (20, 3, 0, "second"), (21, 4, 1, "second")]
    assert report.num_bad == 1 and "first.json, row 1" in report.summary()


def test_paths_of_a_meta_file_may_be_relative_to_the_working_directory(
    write: Callable[..., Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write([row()], "first.json")
    (folder / "elsewhere").mkdir()
    meta = write([{"data_path": "first.json", "image_folder": "images", "ds_name": "one"}], "elsewhere/meta.json")
    monkeypatch.chdir(folder)
    assert len(list(read_source(meta))) == 1


def test_read_source_takes_a_data_file_too(write: Callable[..., Path], folder: Path) -> None:
    path = write([row(), row(question_id=6)])
    records = list(read_source(path, folder / "images"))
    assert [record["meta"]["question_id"] for record in records] == [5, 6]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"image_folder": "images"}, "row 1: a source needs 'data_path'"),
        ({"data_path": "none.json"}, "row 1: data_path 'none.json' does not exist"),
        ({"data_path": "first.json", "image_folder": "none"}, "row 1: image_folder 'none' does not exist"),
        ({"data_path": "images"}, "row 1: data_path 'images' is not a file"),
    ],
)
def test_a_wrong_meta_entry_is_named(write: Callable[..., Path], entry: dict, reason: str) -> None:
    write([row()], "first.json")
    meta = write([{"data_path": "first.json", "image_folder": "images", "ds_name": "one"}, entry], "meta.json")
    with pytest.raises(RecordError, match=rf"meta\.json, {reason}"):
        read_source(meta)


def test_an_image_folder_beside_a_meta_file_is_refused(write: Callable[..., Path], folder: Path) -> None:
    write([row()], "first.json")
    meta = write([{"data_path": "first.json"}], "meta.json")
    with pytest.raises(ValueError, match="image_folder=.*with the meta file.*name the folders inside it"):
        read_source(meta, folder / "images")


def test_a_meta_file_given_to_read_llava_is_explained(write: Callable[..., Path]) -> None:
    _, report = read(write([{"data_path": "first.json"}], "meta.json"))
    assert "read the file with read_source" in report.summary()


# Bad input


BAD_ROWS = {
    "missing image file": (row(image="none.png"), r"image file '.*none\.png' does not exist; check image_folder"),
    "chain missing": (row(reasoning_chain=None), r"required column 'reasoning_chain' is missing.*latent_form='slots'"),
    "chain empty": (row(reasoning_chain=[]), "required column 'reasoning_chain' is missing or empty"),
    "chain a string": (row(reasoning_chain="a b"), "chain must be a list of non-empty strings or None, got 'a b'"),
    "chain with an empty concept": (
        row(reasoning_chain=["a", ""]),
        r"list of non-empty strings or None, got \['a', ''\]",
    ),
    "chain with a number": (row(reasoning_chain=["a", 3]), r"list of non-empty strings or None, got \['a', 3\]"),
    "start marker in a concept": (
        row(reasoning_chain=["a", f"b{START}"]),
        r"the concept 'b<\|laser_start\|>' of the chain",
    ),
    "slot in a concept": (row(reasoning_chain=[SLOT]), r"concept '<\|laser\|>' of the chain contains <\|laser\|>"),
    "placeholder in a concept": (row(reasoning_chain=["<laser>"]), "of the chain contains <laser>; remove the marker"),
    "latent token in a prompt": (
        row(conversations=talk(f"<image>\nx{END}", "<laser>y")),
        r"the user turn contains <\|laser_end\|>.*remove it",
    ),
    "region in a prompt": (row(conversations=talk("<image>\n<laser>x", "<laser>y")), "the user turn contains <laser>"),
    "more images than placeholders": (row(image=["a.png", "b.png"]), "1 <image> placeholders but 2 images"),
    "more placeholders than images": (row(image=None), "1 <image> placeholders but 0 images"),
    "images in two turns": (
        row(image=["a.png", "b.png"], conversations=talk("<image>\nx", "<laser>y", "<image>\nz", "<laser>w")),
        "<image> stands in 2 turns; all images must sit in one turn",
    ),
    "image in a response": (row(conversations=talk("x", "<image><laser>y")), "<image> stands in a response"),
    "image token in the text": (
        row(conversations=talk("<|image_pad|>x", "<laser>y")),
        r"the image token <\|image_pad\|>",
    ),
    "empty conversation": (row(conversations=[]), r"'conversations' must be a list of at least one turn, got \[\]"),
    "no conversation": (row(conversations=None), "'conversations' must be a list of at least one turn, got None"),
    "turn without value": (row(conversations=[{"from": "human"}]), r"turn 0 must be \{'from': str, 'value': str\}"),
    "last turn not the assistant's": (
        row(conversations=[*row()["conversations"], {"from": "human", "value": "and?"}]),
        r"the last turn must be the assistant's \('gpt'\), got roles \['user', 'assistant', 'user'\]",
    ),
    "two responses in a row": (
        row(conversations=[*row()["conversations"], {"from": "gpt", "value": "more"}]),
        "a response must follow a prompt",
    ),
    "chain without placeholder": (
        row(conversations=talk("<image>\nx", "y")),
        "a chain is given but no response contains <laser>",
    ),
    "chain beside written markers": (
        row(conversations=talk("<image>\nx", f"{START}<laser><laser>{END}y")),
        "a chain is given but a response contains .* so regions nest",
    ),
    "box in pixels": (row(bboxes=[[0, 0, 224, 224]]), "divide pixels by the image size"),
    "image a number": (row(image=3), "'image' must be a path or a list of paths, got 3"),
    "question id a list": (row(question_id=[3]), "'question_id' must be a number or a string"),
    "not an object": (["a"], r"a record must be a JSON object, got \['a'\]"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_bad_row_is_left_out_and_listed(write: Callable[..., Path], case: str, name: str) -> None:
    bad, reason = BAD_ROWS[case]
    records, report = read(write([row(), bad, row(question_id=9)], name))
    assert [record["meta"]["question_id"] for record in records] == [5, 9]
    assert (report.num_good, report.num_bad) == (2, 1)
    with pytest.raises(RecordShareError, match=rf"(?s)max_bad_share=0\.01.*{name}, row 1: .*{reason}"):
        report.check()


def test_reading_stops_above_one_percent_bad_rows(write: Callable[..., Path], folder: Path) -> None:
    many = [row() for _ in range(99)]
    with pytest.raises(RecordShareError, match="99 good rows, 2 bad rows"):
        list(read_llava(write([*many, row(image="x.png"), row(image="y.png")]), folder / "images"))


def test_reading_warns_below_one_percent_bad_rows(
    write: Callable[..., Path], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    many = [row() for _ in range(99)]
    with caplog.at_level(logging.WARNING):
        assert len(list(read_llava(write([*many, row(image="x.png")]), folder / "images"))) == 99
    assert "99 good rows, 1 bad rows" in caplog.text and "x.png" in caplog.text


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_json_list_that_was_cut_names_the_byte(write: Callable[..., Path], folder: Path, bom: bytes) -> None:
    path = write([row(id="é"), row()])
    data = bom + json.dumps([row(id="é"), row()], indent=1, ensure_ascii=False).encode()
    path.write_bytes(data)
    assert len(list(read_llava(path, folder / "images"))) == 2
    cut = data[: data.rindex(b"Skatepark") + 4]
    path.write_bytes(cut)
    start = len(cut) - len(b'"Skat')
    line = cut.count(b"\n") + 1
    expected = rf"data\.json, whole file: not valid JSON at line {line}, byte {start} of {len(cut)}: .*fetch it again"
    with pytest.raises(RecordError, match=expected):
        list(read_llava(path, folder / "images"))


def test_a_file_cut_inside_a_character_names_the_byte(folder: Path) -> None:
    path = folder / "data.json"
    data = json.dumps([row(id="é")], ensure_ascii=False).encode()
    end = data.index("é".encode()) + 1
    path.write_bytes(data[:end])
    with pytest.raises(RecordError, match=rf"byte {end - 1} of {end}: not UTF-8"):
        list(read_llava(path, folder / "images"))


def test_json_lines_that_were_cut_name_line_and_byte(write: Callable[..., Path]) -> None:
    path = write([row(), row()], "data.jsonl")
    first = path.read_bytes().index(b"\n") + 1
    path.write_bytes(b"\n" + path.read_bytes()[: first + 30])
    records, report = read(path)
    assert len(records) == 1
    assert rf"data.jsonl, row 1: line 3 (byte {first + 1}) is not one JSON object" in report.summary()


@pytest.mark.parametrize("content", ["", "hello", "42"])
def test_a_file_that_is_no_json_is_refused(folder: Path, content: str) -> None:
    path = folder / "data.json"
    path.write_text(content)
    with pytest.raises(RecordError, match="neither a JSON list nor JSON lines"):
        list(read_llava(path))


def test_missing_paths_are_refused_at_once(write: Callable[..., Path], folder: Path) -> None:
    with pytest.raises(RecordError, match=r"none\.json, whole file: the file does not exist"):
        read_llava(folder / "none.json")
    with pytest.raises(RecordError, match="image_folder '.*none' does not exist; check the option"):
        read_llava(write([row()]), folder / "none")


# Forms of records


def record(reply: str, chain: list[str] | None = None) -> dict[str, Any]:
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": reply}]
    return make_record("r", "What?", "x", chain=chain, messages=messages, meta={"source": "f.json", "row": 2})


FORMS = {
    "chain": record("<laser>x", ["a"]),
    "slots": record(f"{START}<laser><laser><laser>{END}<answer>x</answer>"),
    "placeholder": record("<laser>x"),
    "explicit": record(f"{START}a b{END}x"),
    "plain": record("x"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_told_apart(form: str) -> None:
    assert record_form(FORMS[form]) == form


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"chain"}))
def test_only_rows_with_a_chain_go_to_dwal(write: Callable[..., Path], form: str) -> None:
    reply = FORMS[form]["messages"][1]["content"]
    path = write([row(reasoning_chain=None, conversations=talk("<image>\nWhat?", reply))])
    records, report = read(path)
    assert not records
    assert f"required column 'reasoning_chain' is missing or empty (record form '{form}')" in report.summary()
    assert len(read(path, require_chain=False)[0]) == 1


@pytest.mark.parametrize("form", ["slots", "placeholder"])
def test_rendering_a_chain_that_is_not_there_names_the_column(form: str) -> None:
    with pytest.raises(RecordError, match=r"^f\.json, row 2: required column 'reasoning_chain' is missing"):
        render_turns(FORMS[form])


def test_the_slot_form_writes_slots() -> None:
    def reply(form: str, num_slots: int | None = None) -> str:
        return render_turns(FORMS[form], latent_form="slots", num_slots=num_slots)[-1][1]

    assert reply("slots") == f"{START}{SLOT * 3}{END}<answer>x</answer>"
    assert reply("slots", 5) == f"{START}{SLOT * 5}{END}<answer>x</answer>"
    assert reply("placeholder", 2) == f"{START}{SLOT * 2}{END}x"
    assert reply("chain", 1) == f"{START}{SLOT}{END}x"
    assert reply("plain", 4) == "x"
    with pytest.raises(
        RecordError, match=r"^f\.json, row 2: a bare <laser> does not say how many slots.*give num_slots"
    ):
        reply("placeholder")


def test_other_forms_are_written_as_they_are() -> None:
    assert render_turns(FORMS["explicit"])[-1] == ("assistant", f"{START}a b{END}x")
    assert render_turns(FORMS["plain"])[-1] == ("assistant", "x")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"latent_form": "free"}, "unknown latent_form 'free'"),
        ({"num_slots": -1}, "num_slots must be 0 or more, got -1"),
    ],
)
def test_wrong_options_of_rendering(options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        render_turns(FORMS["chain"], **options)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (f"x{END}y", "latent markers do not pair"),
        (f"{START}x", "latent markers do not pair"),
        (f"{START}a{START}b{END}c", "latent markers do not pair"),
        (f"{START}a <laser>{END}c", "mixed"),
        (f"x{SLOT}", "latent markers do not pair"),
    ],
)
def test_written_markers_must_pair(write: Callable[..., Path], reply: str, reason: str) -> None:
    bad = row(reasoning_chain=None, conversations=talk("<image>\nWhat?", reply))
    records, report = read(write([bad]), require_chain=False)
    assert not records and reason in report.summary()


# Text rules beyond the vectors


def test_the_chain_is_replaced_literally() -> None:
    chain = r"C:\new \1 \g<0>"
    assert expand_latent_placeholders("\n<laser>\n\nx", chain) == f"{START}{chain}{END}\nx"
    assert expand_image_placeholders("<image>", r"\1") == r"\1"


def test_the_chain_reaches_every_turn_with_single_spaces() -> None:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "<laser>a<laser>b"}]
    rendered = render_turns({**record("", ["the sky", "blue"]), "messages": turns})
    assert rendered == [("user", "What?"), ("assistant", f"{START}the sky blue{END}a{START}the sky blue{END}b")]


@pytest.mark.parametrize("counts", [[1], [1, -1], -2])
def test_slot_counts_must_be_given_for_every_placeholder(counts: int | list[int]) -> None:
    with pytest.raises(ValueError, match="2 <laser> placeholders need as many counts >= 0"):
        expand_slot_placeholders("<laser><laser>", counts)


def test_the_tokens_are_those_of_the_table_of_methods() -> None:
    tokens = LATENT_METHODS["laser"].tokens
    assert list(LASER_TOKENS.items()) == list(tokens.items())


# Labels


class CharTokenizer:
    """One id a character, so that labels can be read as text."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]


def trained_text(turns: list[tuple[str, str]], **options: Any) -> tuple[str, str]:
    encoded = encode_conversation(turns, CharTokenizer(), **options)
    assert all(label in (-100, token) for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True))
    everything = "".join(map(chr, encoded["input_ids"]))
    return everything, "".join(chr(label) for label in encoded["labels"] if label != -100)


def test_only_responses_are_trained_with_their_end_and_newline() -> None:
    text, trained = trained_text([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
    assert trained == "b<|im_end|>\nd<|im_end|>\n"
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
    )


def test_a_system_turn_replaces_the_system_message_and_other_roles_stay() -> None:
    text, trained = trained_text([("system", "s"), ("user", "a"), ("tool", "t"), ("assistant", "b")])
    assert text.startswith(
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>tool\nt<|im_end|>\n"
    )
    assert "helpful" not in text and trained == "b<|im_end|>\n"


def test_image_pads_expand_in_order() -> None:
    text, _ = trained_text([("user", "<|image_pad|>x<|image_pad|>"), ("assistant", "b")], num_image_tokens=[3, 1])
    assert "<|image_pad|>" * 3 + "x" + "<|image_pad|><|im_end|>" in text


@pytest.mark.parametrize("counts", [[], [4, 4]])
def test_image_pads_and_images_must_agree(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"1 image pads in the text but {len(counts)} images"):
        encode_conversation([("user", "<|image_pad|>"), ("assistant", "b")], CharTokenizer(), counts)


@pytest.mark.parametrize("turns", [[], [("user", "a")], [("system", "s")]])
def test_a_conversation_ends_with_a_response(turns: list[tuple[str, str]]) -> None:
    with pytest.raises(ValueError, match="the last turn must be of role 'assistant'"):
        encode_conversation(turns, CharTokenizer())


def test_batches_are_padded_on_the_right() -> None:
    examples = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = pad_batch(examples, pad_token_id=9, multiple_of=4)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100], [4, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    with pytest.raises(ValueError, match="at least one example"):
        pad_batch([], 0)


# Writing


MAZE = maze_record(Maze.from_text("@_\n_*"), attention="one_hot", meta={"level": 2})


@pytest.mark.parametrize("name", ["mazes.json", "mazes.jsonl"])
def test_mazes_are_written_in_the_published_format_and_read_back(tmp_path: Path, name: str) -> None:
    path, images = tmp_path / "out" / name, tmp_path / "images"
    assert write_llava([MAZE, MAZE], path, images) == 2
    text = path.read_text()
    first = json.loads(text.splitlines()[0]) if name.endswith("l") else json.loads(text)[0]
    assert first["image"] == "mazes/000000_0.png"
    assert first["conversations"] == [
        {"from": "human", "value": f"<image>\n{MAZE['question']}"},
        {"from": "gpt", "value": f"<laser><answer>{MAZE['answer']}</answer>"},
    ]
    assert first["reasoning_chain"] == MAZE["chain"]
    assert "bboxes" not in first

    records = list(read_source(path, images))
    assert len(records) == 2
    for field in ("id", "question", "answer", "chain", "steps", "boxes", "teacher"):
        assert records[0][field] == MAZE[field], field
    assert records[0]["meta"]["level"] == 2 and records[0]["meta"]["row"] == 0
    assert maze_of_record(records[0]).to_text() == maze_of_record(MAZE).to_text()
    with Image.open(records[1]["images"][0]) as image:
        assert image.format == "PNG"
        assert image.convert("RGB").tobytes() == MAZE["images"][0].convert("RGB").tobytes()
    assert render_turns(records[0]) == render_turns(MAZE)


def test_what_was_read_can_be_tabled_and_written_again(write: Callable[..., Path], folder: Path) -> None:
    rows = [row(), row(image=["a.png", "b.png"], conversations=talk("<image><image>\nx", "<laser><answer>y</answer>"))]
    records, _ = read(write(rows))
    write_llava(records, folder / "again.json", folder / "images")
    again = json.loads((folder / "again.json").read_text())
    for before, after in zip(rows, again, strict=True):
        assert {name: after[name] for name in before} == before  # same paths: the images lie in the folder already
    tabled = [record_from_row(r) for r in records_to_dataset(records)]
    write_llava(tabled, folder / "tabled.jsonl", folder / "other")
    assert [r["messages"] for r in read_llava(folder / "tabled.jsonl", folder / "other")] == [
        r["messages"] for r in records
    ]


def test_images_outside_the_folder_are_saved_into_it(folder: Path) -> None:
    Image.new("CMYK", (4, 4), (0, 10, 20, 30)).save(folder / "c.jpg")
    other = make_record("o", "What?", "x", images=[str(folder / "c.jpg"), "https://example.org/x.png"])
    write_llava([other], folder / "o.json", folder / "saved")
    (back,) = read_llava(folder / "o.json", folder / "saved", require_chain=False)
    assert back["images"] == [str(folder / "saved" / "o" / "000000_0.png"), "https://example.org/x.png"]
    with Image.open(back["images"][0]) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")


def test_step_images_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        write_llava([{**MAZE, "step_images": MAZE["images"]}], tmp_path / "m.json", tmp_path)
    assert "no field for step_images; those of 1 records were left out" in caplog.text


def test_a_record_that_could_not_be_read_back_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"m\.json, row 1: .*the user turn contains <laser>"):
        write_llava([MAZE, {**MAZE, "question": "What is <laser>?"}], tmp_path / "m.json", tmp_path)
    assert not list(tmp_path.glob("m.json*"))


@pytest.mark.parametrize("name", ["m.json", "m.jsonl"])
def test_no_records_give_a_file_without_records(tmp_path: Path, name: str) -> None:
    assert write_llava([], tmp_path / name, tmp_path) == 0
    assert (tmp_path / name).read_text() == ("[]\n" if name == "m.json" else "")
    assert list(read_source(tmp_path / name, tmp_path)) == []
