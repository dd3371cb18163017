"""LaViT's collator: text against the chat template, targets against the signals, and every record that it refuses."""

import logging
import pickle
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from modeling_latent import LatentProcessor
from tests.tiny import FAMILIES, tiny_images, tiny_processor
from trainers.collators import LatentSFTCollator
from trainers.data.mazes import maze_dataset
from trainers.data.records import Record, RecordError, make_record, record_to_row, records_to_dataset
from trainers.data.teacher_signals import image_fingerprint, resize_signal
from trainers.lavit_collator import LavitCollator
from trainers.sample_lengths import SampleLengths
from trainers.tiny import build_tiny_processor

LEARNED = {f"learned_{i}": f"<lvr{i}>" for i in range(1, 5)}
TEXT = "<lvr1><lvr2><lvr3><lvr4>"
WIDTH = 3
MAX_PIXELS = 112 * 112


@lru_cache
def processor(family: str = "qwen2_5_vl") -> LatentProcessor:
    return build_tiny_processor(latent_tokens=LEARNED, family=family, max_pixels=MAX_PIXELS)


def signals(rows: int, columns: int, seed: int = 0) -> dict[str, Any]:
    """A teacher with random signals on a grid, in the record itself."""
    random = np.random.default_rng(seed)
    return {
        "concept": {"values": random.normal(size=(rows * columns, WIDTH)).tolist()},
        "attention": {"values": random.random(rows * columns).tolist()},
        "grid": [rows, columns],
        "image": 0,
    }


def scene(teacher: dict[str, Any] | None = None, **changes: Any) -> Record:
    """A record with an image of 112 x 84 pixels, three rows of four tokens, and signals of a teacher that saw them."""
    image = Image.fromarray(np.random.default_rng(7).integers(0, 256, (84, 112, 3), dtype=np.uint8))
    teacher = signals(3, 4) if teacher is None else {**signals(3, 4), **teacher}
    values = {"id": "s", "question": "What is it?", "answer": "A dog", "images": [image], "teacher": teacher}
    return make_record(**{**values, "meta": {"source": "scenes.json", "row": 12}, **changes})


def small(**changes: Any) -> Record:
    """Another record, of 56 x 56 pixels, two by two tokens."""
    image = Image.new("RGB", (56, 56), "green")
    return scene(**{"images": [image], "teacher": signals(2, 2, seed=1), "id": "small", **changes})


def from_template(made: LatentProcessor, images: list[Image.Image], *turns: str, system: str = "") -> list[list[int]]:
    """Ids, and labels of the replies, of a conversation by the chat template."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    parts = [{"type": "image", "image": image} for image in images]
    messages += [{"role": "user", "content": [*parts, {"type": "text", "text": turns[0]}]}]
    messages += [{"role": "assistant", "content": turns[1]}]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    out = made.apply_chat_template(messages, **options)
    ids, mask = out["input_ids"][0], out["assistant_masks"][0]
    return [list(ids), [token if kept else -100 for token, kept in zip(ids, mask, strict=True)]]


def unpadded(batch: dict[str, torch.Tensor], row: int = 0) -> list[list[int]]:
    """Ids and labels of a row; the padding behind them is checked on the way."""
    length = int(batch["attention_mask"][row].sum())
    assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
    assert set(batch["labels"][row, length:].tolist()) <= {-100}
    return [batch[name][row, :length].tolist() for name in ("input_ids", "labels")]


# Text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_text_equals_the_chat_template(family: str) -> None:
    made, record = processor(family), scene()
    batch = LavitCollator(made, needs=())([record])
    assert unpadded(batch) == from_template(made, record["images"], "What is it?", f"{TEXT} A dog")
    image = batch["input_ids"] == made.image_token_id
    assert torch.equal(batch["mm_token_type_ids"].bool(), image)
    assert int(image.sum()) == int(batch["image_grid_thw"].prod()) // 4
    pixels = made.image_processor(images=record["images"], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], pixels)


@pytest.mark.parametrize("number", [1, 2, 4, None])
def test_labels_begin_with_the_first_learned_token(number: int | None) -> None:
    (ids, labels), learned = unpadded(LavitCollator(processor(), num_latent_tokens=number)([scene()])), LEARNED
    latent = processor().tokenizer.convert_tokens_to_ids(list(learned.values()))[:number]
    start = ids.index(latent[0])
    assert ids[start : start + len(latent)] == latent
    assert labels == [-100] * start + ids[start:]
    assert processor().tokenizer.decode(ids[start + len(latent) :]) == " A dog<|im_end|>\n"
    assert [token for token in ids if token in latent] == latent


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answer", ["A dog", "", "\nyes"])
def test_the_baseline_has_no_latents_and_trains_the_newline_before_the_answer(family: str, answer: str) -> None:
    made, record = processor(family), scene(answer=answer)
    batch = LavitCollator(made, "none")([{**record, "teacher": None}])
    assert set(batch).isdisjoint({"concept_target", "attention_target", "attention_length"})
    ids, labels = unpadded(batch)
    expected, reply = from_template(made, record["images"], "What is it?", answer)
    assert made.tokenizer.decode(ids) == made.tokenizer.decode(expected)
    header = made.tokenizer.encode("<|im_start|>assistant", add_special_tokens=False)
    start = next(i for i in range(len(ids)) if ids[i : i + len(header)] == header) + len(header)
    assert labels == [-100] * start + ids[start:]
    if answer != "\nyes":  # there the template joins the two newlines into one token
        assert ids == expected and sum(label != -100 for label in labels) == 1 + sum(label != -100 for label in reply)


def test_an_empty_answer_leaves_latents_and_space() -> None:
    ids, labels = unpadded(LavitCollator(processor(), needs=())([scene(answer="")]))
    assert processor().tokenizer.decode([label for label in labels if label != -100]) == f"{TEXT} <|im_end|>\n"


def test_a_question_keeps_its_blanks_and_stands_right_behind_the_image() -> None:
    ids, _ = unpadded(LavitCollator(processor(), needs=())([scene(question="\n What?\n")]))
    assert "<|vision_end|>\n What?\n<|im_end|>" in processor().tokenizer.decode(ids)


def test_system_messages() -> None:
    record = scene()
    for family, default in (("qwen2_5_vl", "You are a helpful assistant."), ("qwen3_vl", "")):
        made = processor(family)
        texts = [
            made.tokenizer.decode(unpadded(LavitCollator(made, needs=(), system_message=message)([record]))[0])
            for message in ("processor", "You see.", None)
        ]
        tails = [text.split("<|im_start|>user")[1] for text in texts]
        assert len(set(tails)) == 1
        heads = [text.split("<|im_start|>user")[0] for text in texts]
        system = "<|im_start|>system\n{}<|im_end|>\n"
        assert heads == [system.format(default) if default else "", system.format("You see."), ""]
    batch = LavitCollator(processor(), needs=(), system_message="You see.")([record])
    expected = from_template(processor(), record["images"], "What is it?", f"{TEXT} A dog", system="You see.")
    assert unpadded(batch) == expected


def test_a_conversation_of_one_reply_equals_question_and_answer() -> None:
    turns = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A dog"}]
    said = scene(messages=turns, question="", answer="")
    collator = LavitCollator(processor())
    assert unpadded(collator([said])) == unpadded(collator([scene()]))
    system = scene(messages=[{"role": "system", "content": "You see."}, *turns])
    assert processor().tokenizer.decode(unpadded(collator([system]))[0]).startswith("<|im_start|>system\nYou see.<")


def test_rows_of_tables_and_paths_give_the_same_batch(tmp_path: Path) -> None:
    record, collator = scene(), LavitCollator(processor())
    record["images"][0].save(tmp_path / "a.png")
    path = {**record, "images": [str(tmp_path / "a.png")]}
    reference = collator([record])
    for row in (path, record_to_row(path), *records_to_dataset([record, path], decode=False)):
        batch = collator([row])
        assert batch.keys() == reference.keys()
        assert all(torch.equal(batch[name], reference[name]) for name in batch)


def test_an_image_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = scene()
    record["images"][0].save(tmp_path / "a.png")
    opened: list[str] = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *rest: opened.append(str(path)) or real(path, *rest))
    hashed = {**record["teacher"], "image_sha256": image_fingerprint(record["images"][0])}
    LavitCollator(processor())([{**record, "images": [str(tmp_path / "a.png")], "teacher": hashed}])
    assert opened == [str(tmp_path / "a.png")]


def test_lengths_are_counted_without_teacher_and_pixels() -> None:
    record = {**scene(), "teacher": None}
    for options in ({}, {"num_latent_tokens": 2}, {"latent_form": "none"}, {"system_message": None}):
        collator = LavitCollator(processor(), needs=(), **options)
        assert SampleLengths(collator)(record) == len(unpadded(collator([record]))[0])


# Targets --------------------------------------------------------------------------------------------------------


def test_targets_on_the_image_tokens() -> None:
    records = [scene(), small()]
    batch = LavitCollator(processor(), concept_size=WIDTH)(records)
    assert batch["image_grid_thw"].tolist() == [[1, 6, 8], [1, 4, 4]]
    assert batch["attention_length"].tolist() == [12, 4]
    assert batch["attention_target"].shape == (2, 12) and batch["concept_target"].shape == (2, WIDTH)
    for row, record in enumerate(records):
        teacher, length = record["teacher"], int(batch["attention_length"][row])
        attention = torch.tensor(teacher["attention"]["values"])
        assert torch.equal(batch["attention_target"][row, :length], attention)
        assert not batch["attention_target"][row, length:].any()
        torch.testing.assert_close(batch["concept_target"][row], torch.tensor(teacher["concept"]["values"]).mean(0))
    counts = (batch["input_ids"] == processor().image_token_id).sum(1)
    assert counts.tolist() == batch["attention_length"].tolist()


def test_targets_on_patches_as_published() -> None:
    records = [scene(), small()]
    batch = LavitCollator(processor(), teacher_grid="patch")(records)
    assert batch["attention_length"].tolist() == [48, 16]
    for row, (record, grid) in enumerate(zip(records, ((6, 8), (4, 4)), strict=True)):
        teacher, cells = record["teacher"], grid[0] * grid[1]
        source = tuple(teacher["grid"])
        expected = resize_signal(torch.tensor(teacher["attention"]["values"]), grid, source=source)
        assert torch.equal(batch["attention_target"][row, :cells], expected)
        rows = resize_signal(torch.tensor(teacher["concept"]["values"]), grid, source=source)
        torch.testing.assert_close(batch["concept_target"][row], rows.mean(0))


def test_only_what_is_needed() -> None:
    mazes = list(maze_dataset(2, seed=3, sizes=(3,), attention="one_hot"))
    batch = LavitCollator(processor(), needs=["attention"])(mazes)
    assert "concept_target" not in batch and batch["attention_target"].shape[0] == 2
    assert torch.equal(batch["attention_length"], batch["image_grid_thw"].prod(1) // 4)
    concept = LavitCollator(processor(), needs=("concept",))([scene({"attention": None})])
    assert "attention_target" not in concept and concept["concept_target"].shape == (1, WIDTH)
    nothing = LavitCollator(processor(), needs=())([{**scene(), "teacher": None}])
    assert set(nothing) == {
        "input_ids", "labels", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"
    }  # fmt: skip


def test_a_stored_mean_is_taken_as_it_is(tmp_path: Path) -> None:
    save_file({"s/concept": torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)}, str(tmp_path / "shard.safetensors"))
    stored = {"concept": {"path": str(tmp_path / "shard.safetensors"), "key": "s/concept"}}
    for grid in ("merged", "patch"):
        batch = LavitCollator(processor(), teacher_grid=grid)([scene(stored)])
        assert batch["concept_target"].tolist() == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize("known", [True, False])
def test_a_teacher_of_another_grid_is_resized_and_logged(known: bool, caplog: pytest.LogCaptureFixture) -> None:
    other = {**signals(6, 8, seed=4), **({} if known else {"grid": None})}
    records = [scene(), scene(other, id="t"), scene(other, id="u")]
    collator = LavitCollator(processor())
    with caplog.at_level(logging.DEBUG, logger="trainers.lavit_collator"):
        batch = collator(records)
    assert batch["attention_length"].tolist() == [12, 12, 12]
    expected = resize_signal(torch.tensor(other["attention"]["values"]), (3, 4), source=(6, 8))
    assert torch.equal(batch["attention_target"][1], expected)
    torch.testing.assert_close(batch["concept_target"][1], torch.tensor(other["concept"]["values"]).mean(0))
    said = [(entry.levelname, entry.getMessage()) for entry in caplog.records]
    assert [level for level, _ in said] == ["WARNING", "DEBUG"]
    guess = "" if known else " (guessed)"
    for (_, text), name in zip(said, "tu", strict=True):
        assert f"record '{name}': the teacher's signals lie on 6x8 image tokens{guess}, the student has 3x4" in text


def test_no_warning_where_nothing_is_resized(caplog: pytest.LogCaptureFixture) -> None:
    LavitCollator(processor(), teacher_grid="patch")([scene(), scene({"grid": None})])
    LavitCollator(processor())([scene({"grid": None})])
    LavitCollator(processor(), needs=("concept",))([scene(signals(6, 8))])
    assert not caplog.records


def test_workers_and_pickling() -> None:
    collator = LavitCollator(processor())
    loader = DataLoader([scene(), small()], batch_size=2, collate_fn=collator, num_workers=1)
    (found,) = list(loader)
    again = pickle.loads(pickle.dumps(collator))([scene(), small()])
    for name, value in collator([scene(), small()]).items():
        assert torch.equal(found[name], value) and torch.equal(again[name], value)


# What is refused ------------------------------------------------------------------------------------------------


def spike() -> dict[str, Any]:
    """Attention on one cell that no sample of a grid of 3 x 4 falls on."""
    values = [0.0] * (12 * 16)
    values[0] = 1.0
    return {"attention": {"values": values}, "concept": {"values": [1.0] * WIDTH}, "grid": [12, 16]}


BAD: dict[str, tuple[Callable[[], Record], str]] = {
    "no teacher": (lambda: {**scene(), "teacher": None}, "teacher of record 's': the record has none"),
    "missing signal": (lambda: scene({"attention": None}), "teacher of record 's': no attention"),
    "missing file": (lambda: scene({"concept": {"path": "/no/a.pth"}}), "teacher of record 's': .*does not exist"),
    "another width": (
        lambda: scene({"concept": {"values": [[1.0] * 5] * 12}}),
        "teacher of record 's': concept in the record is 5 wide, not 3",
    ),
    "NaN": (
        lambda: scene({"concept": {"values": [[float("nan")] * WIDTH] * 12}}),
        "teacher of record 's': concept in the record has 36 of 36 values NaN",
    ),
    "zero attention": (
        lambda: scene({"attention": {"values": [0.0] * 12}}),
        "teacher of record 's': attention in the record sums to zero",
    ),
    "zero after resizing": (lambda: scene(spike()), "record 's': .*resized from 12x16 to 3x4, sums to zero"),
    "another number of tokens": (
        lambda: scene({"grid": [4, 4]}),
        "teacher of record 's': concept has 12 tokens, its grid of 4x4 has 16",
    ),
    "another image": (
        lambda: scene({"image_sha256": image_fingerprint(tiny_images(1)[0])}),
        "teacher of record 's': the image .* is not the one that the signals were extracted from",
    ),
    "two images": (lambda: scene(images=tiny_images(2)), "record 's': LaViT needs exactly one image a record, got 2"),
    "no image": (lambda: scene(images=[]), "record 's': LaViT needs exactly one image a record, got 0"),
    "no images column": (lambda: {**scene(), "images": None}, "record 's': LaViT needs exactly one image .*, got 0"),
    "learned token in the question": (
        lambda: scene(question="Is <lvr2> a dog?"),
        "record 's': the user turn contains the latent token <lvr2>.*remove it",
    ),
    "learned token in the answer": (
        lambda: scene(answer="<lvr1> a dog"),
        "record 's': the assistant turn contains the latent token <lvr1>.*remove it",
    ),
    "image token in the question": (lambda: scene(question="<|image_pad|>"), "record 's': .*image token"),
    "placeholder in the question": (lambda: scene(question="<image> q"), "record 's': 2 <image> placeholders but 1"),
    "two replies": (
        lambda: scene(
            messages=[
                {"role": role, "content": text}
                for role, text in (("user", "<image>a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
            ]
        ),
        "record 's': LaViT trains one prompt and one reply, got the roles",
    ),
    "no reply": (
        lambda: scene(messages=[{"role": "user", "content": "<image>a"}]),
        "record 's': the last turn must be the assistant's",
    ),
    "no answer": (lambda: scene(answer=None), "answer must be a string, got None"),
    "missing image file": (lambda: scene(images=["/no/x.png"]), "image '/no/x.png' cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_by_file_row_and_id(name: str) -> None:
    make, reason = BAD[name]
    good = scene(meta={"source": "other.json", "row": 0})
    with pytest.raises(RecordError, match=f"scenes.json, row 12: {reason}") as caught:
        LavitCollator(processor())([good, make()])
    assert (caught.value.file, caught.value.row) == ("scenes.json", 12)


def test_the_width_is_that_of_the_model_or_of_the_first_record() -> None:
    with pytest.raises(RecordError, match="is 3 wide, not 5"):
        LavitCollator(processor(), concept_size=5)([scene()])
    wide = scene({"concept": {"values": [[1.0] * 5] * 12}})
    assert LavitCollator(processor(), concept_size=5)([wide])["concept_target"].shape == (1, 5)


def test_an_unchanged_image_passes_and_pixels_that_changed_do_not() -> None:
    record = scene()
    record["teacher"]["image_sha256"] = image_fingerprint(record["images"][0])
    assert len(LavitCollator(processor())([record])["concept_target"]) == 1
    record["images"][0].putpixel((0, 0), (1, 2, 3))
    with pytest.raises(RecordError, match="restore it, or extract the signals again"):
        LavitCollator(processor())([record])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_form": "chain"}, r"LavitCollator does not lay out latent_form='chain'; choose one of \['learned'"),
        ({"latent_form": "roi"}, "latent_form='roi' is unknown"),
        ({"num_latent_tokens": 5}, "num_latent_tokens=5 must be an integer from 1 to 4"),
        ({"num_latent_tokens": 0}, "num_latent_tokens=0 must be an integer from 1 to 4"),
        ({"num_latent_tokens": True}, "num_latent_tokens=True must be an integer"),
        ({"teacher_grid": "pixel"}, r"unknown teacher_grid 'pixel'; choose one of \['merged', 'patch'\]"),
        ({"concept_size": 0}, "concept_size=0 must be an integer of at least 1, or None"),
        ({"needs": ("gaze",)}, r"unknown target in needs 'gaze'; choose one of \['concept', 'attention'\]"),
        ({"num_slots": 3}, "num_slots=3 with latent_form='learned'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0 must be an integer"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LavitCollator(processor(), **options)


def test_processors_without_learned_tokens() -> None:
    with pytest.raises(ValueError, match=r"processor has no learned tokens .*make the model with method='lavit'"):
        LavitCollator(tiny_processor())
    stock = build_tiny_processor(max_pixels=MAX_PIXELS)
    batch = LavitCollator(stock, "none")([scene()])
    assert unpadded(batch)[0] == unpadded(LavitCollator(processor(), "none")([scene()]))[0]
    with pytest.raises(ValueError, match="LatentChameleonProcessor does not have"):
        LavitCollator(tiny_processor("chameleon"))


def test_the_other_collator_leaves_learned_tokens_to_this_one() -> None:
    with pytest.raises(ValueError, match="LatentSFTCollator does not lay out latent_form='learned'.*LavitSFTConfig"):
        LatentSFTCollator(processor(), "learned")
