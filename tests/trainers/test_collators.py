"""The collator against the processor's own chat template, its padding and forms, and every record that it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from modeling_latent import LatentProcessor
from tests.tiny import tiny_images, tiny_processor
from trainers.collators import LatentSFTCollator
from trainers.data.llava import read_source, write_llava
from trainers.data.mazes import maze_dataset
from trainers.data.records import Record, RecordError, make_record, record_from_row, records_to_dataset

START, SLOT, END = "<|laser_start|>", "<|laser|>", "<|laser_end|>"
README_REPLY = f"{START}{'<laser>' * 4}{END}<answer>B</answer>"


@pytest.fixture(scope="module")
def processor() -> LatentProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def mazes() -> list[dict[str, Any]]:
    """Rows of a table of mazes of two sizes."""
    return list(maze_dataset(3, seed=5, sizes=(3, 4)))


def scene(**changes: Any) -> Record:
    """A record without conversation: one image, a chain of three concepts."""
    values = {"id": "s", "question": "What is it?", "answer": "A dog", "images": tiny_images(1)}
    origin = {"source": "scenes.json", "row": 12}
    return make_record(**{**values, "chain": ["Street", "red bicycle", "A dog"], "meta": origin, **changes})


def talk(*turns: str, **changes: Any) -> Record:
    """A record as published: turns of user and assistant in alternation."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return scene(**{"messages": messages, **changes})


def from_template(processor: LatentProcessor, images: list[Image.Image], *turns: str) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation by the chat template and its assistant mask; images stand before the text."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    parts = [{"type": "image", "image": image} for image in images]
    messages[0]["content"] = [*parts, {"type": "text", "text": turns[0]}]
    out = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, allow_latent_tokens=True
    )
    ids, mask = out["input_ids"][0], out["assistant_masks"][0]
    return list(ids), [token if kept else -100 for token, kept in zip(ids, mask, strict=True)]


def unpadded(batch: dict[str, torch.Tensor], row: int) -> tuple[list[int], list[int]]:
    """Ids and labels of a row; the padding behind them is checked on the way."""
    length = int(batch["attention_mask"][row].sum())
    assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
    assert set(batch["labels"][row, length:].tolist()) <= {-100}
    return batch["input_ids"][row, :length].tolist(), batch["labels"][row, :length].tolist()


# Against the chat template -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["row", "record", "few columns"])
def test_mazes_equal_the_chat_template(form: str, mazes: list[dict[str, Any]], processor: LatentProcessor) -> None:
    records = [record_from_row(row) for row in mazes]
    needed = ("images", "question", "answer", "chain")
    given = {"row": mazes, "record": records, "few columns": [{name: r[name] for name in needed} for r in records]}
    batch = LatentSFTCollator(processor)(given[form])
    for index, record in enumerate(records):
        reply = f"{START}{' '.join(record['chain'])}{END}<answer>{record['answer']}</answer>"
        assert unpadded(batch, index) == from_template(processor, record["images"], record["question"], reply)
    pixels = processor.image_processor(images=[image for r in records for image in r["images"]], return_tensors="pt")
    torch.testing.assert_close(batch["pixel_values"], pixels["pixel_values"], rtol=0, atol=0)
    assert batch["image_grid_thw"].tolist() == pixels["image_grid_thw"].tolist()


def test_conversations_equal_the_chat_template(processor: LatentProcessor) -> None:
    question, more = "What is the boy wearing?", "Is it safe?"
    reply = "Let me look.\n<laser>\n<answer>Jeans</answer>"
    record = talk(f"<image>\n{question}", reply, more, "Yes.", chain=["Skatepark", "Jeans"])
    batch = LatentSFTCollator(processor)([record])
    spoken = f"Let me look.{START}Skatepark Jeans{END}<answer>Jeans</answer>"
    expected = from_template(processor, record["images"], question, spoken, more, "Yes.")
    assert unpadded(batch, 0) == expected
    assert processor.tokenizer.decode([i for i in expected[1] if i != -100]).count("<|im_end|>\n") == 2


def test_a_published_file_of_mazes_equals_its_records(
    mazes: list[dict[str, Any]], processor: LatentProcessor, tmp_path: Path
) -> None:
    records = [record_from_row(row) for row in mazes]
    write_llava(records, tmp_path / "mazes.json", tmp_path)
    again = list(read_source(tmp_path / "mazes.json"))
    assert [record["messages"][1]["content"][:7] for record in again] == ["<laser>"] * 3
    first, second = (LatentSFTCollator(processor)(rows) for rows in (records, again))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


def test_training_and_evaluation_share_the_prompt(mazes: list[dict[str, Any]], processor: LatentProcessor) -> None:
    from evaluation.runner import build_prompt

    record = record_from_row(mazes[0])
    prompt = processor(text=[build_prompt(processor, record)], images=record["images"])["input_ids"][0]
    ids, labels = unpadded(LatentSFTCollator(processor)([record]), 0)
    assert ids[: len(prompt)] == list(prompt)
    assert labels[: len(prompt)] == [-100] * len(prompt) and -100 not in labels[len(prompt) :]


# Shape of a batch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("multiple", "rounded"), [(8, 8), (5, 5), (None, 1)])
def test_padding_on_the_right_to_a_multiple(multiple: int | None, rounded: int, processor: LatentProcessor) -> None:
    records = [scene(), scene(question="Is it? " * 9, chain=["Street"])]
    batch = LatentSFTCollator(processor, pad_to_multiple_of=multiple)(records)
    lengths = [len(unpadded(batch, row)[0]) for row in range(2)]
    assert lengths[0] < lengths[1]
    assert batch["input_ids"].shape == (2, -(-max(lengths) // rounded) * rounded)
    assert set(batch["input_ids"][0, lengths[0] :].tolist()) == {processor.tokenizer.pad_token_id}
    image = batch["input_ids"] == processor.image_token_id
    assert torch.equal(batch["mm_token_type_ids"].bool(), image)
    tokens = (batch["image_grid_thw"].prod(1) // 4).tolist()
    assert image.sum(1).tolist() == tokens


def test_several_images_in_their_order(processor: LatentProcessor) -> None:
    first, second, third = tiny_images(3)
    records = [scene(images=[third, first]), scene(images=[second])]
    batch = LatentSFTCollator(processor)(records)
    for row, record in enumerate(records):
        reply = f"{START}Street red bicycle A dog{END}<answer>A dog</answer>"
        assert unpadded(batch, row) == from_template(processor, record["images"], record["question"], reply)
    pixels = processor.image_processor(images=[third, first, second], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], pixels, rtol=0, atol=0)


def test_text_only_and_mixed_batches(processor: LatentProcessor) -> None:
    text = scene(images=[])
    reply = f"{START}Street red bicycle A dog{END}<answer>A dog</answer>"
    batch = LatentSFTCollator(processor)([text])
    assert set(batch) == {"input_ids", "labels", "attention_mask", "mm_token_type_ids"}
    assert unpadded(batch, 0) == from_template(processor, [], text["question"], reply)
    mixed = LatentSFTCollator(processor)([text, scene()])
    assert unpadded(mixed, 0) == unpadded(batch, 0) and len(mixed["image_grid_thw"]) == 1


def test_images_from_paths_and_bytes_and_other_modes(processor: LatentProcessor, tmp_path: Path) -> None:
    (image,) = tiny_images(1)
    image.save(tmp_path / "a.png")
    reference = LatentSFTCollator(processor)([scene()])["pixel_values"]
    path = scene(images=[str(tmp_path / "a.png")])
    for row in (path, *records_to_dataset([path, scene()]), *records_to_dataset([path, scene()], decode=False)):
        torch.testing.assert_close(LatentSFTCollator(processor)([row])["pixel_values"], reference, rtol=0, atol=0)
    transparent = scene(images=[image.convert("RGBA")])
    torch.testing.assert_close(LatentSFTCollator(processor)([transparent])["pixel_values"], reference)


# Forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [None, 1, 3])
def test_slots_are_fed_by_their_embedding_and_carry_no_label(
    num_slots: int | None, processor: LatentProcessor
) -> None:
    record = talk("<image>\nWhich option?", README_REPLY, chain=None)
    batch = LatentSFTCollator(processor, "slots", num_slots)([record])
    assert batch["latent_mask"].dtype == torch.bool and batch["latent_mask"].shape == batch["input_ids"].shape
    assert not batch["latent_mask"].any()
    reply = f"{START}{SLOT * (num_slots or 4)}{END}<answer>B</answer>"
    ids, labels = from_template(processor, record["images"], "Which option?", reply)
    labels = [-100 if token == processor.latent_token_id else token for token in labels]
    assert unpadded(batch, 0) == (ids, labels)
    assert {processor.latent_start_token_id, processor.latent_end_token_id} < set(labels)


def test_mazes_as_slots_need_their_number(mazes: list[dict[str, Any]], processor: LatentProcessor) -> None:
    with pytest.raises(RecordError, match="record 'maze-train-5-0', row 0: .*give num_slots"):
        LatentSFTCollator(processor, "slots")(mazes)
    batch = LatentSFTCollator(processor, "slots", 5)(mazes)
    assert (batch["input_ids"] == processor.latent_token_id).sum(1).tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("record", "reply"),
    [
        (scene(), "<answer>A dog</answer>"),
        (talk("<image>\nWhat is it?", "I see. <laser><answer>A dog</answer>"), "I see. <answer>A dog</answer>"),
        (talk("<image>\nWhat is it?", README_REPLY, chain=None), "<answer>B</answer>"),
        (talk("<image>\nWhat is it?", f"{START}Street Dog{END}A dog.", chain=None), "A dog."),
    ],
    ids=["question", "placeholder", "readme", "written out"],
)
def test_form_none_has_no_span(record: Record, reply: str, processor: LatentProcessor) -> None:
    batch = LatentSFTCollator(processor, "none")([record])
    assert unpadded(batch, 0) == from_template(processor, record["images"], "What is it?", reply)
    assert "latent_mask" not in batch


# What is refused ---------------------------------------------------------------------------------------------


def damaged(folder: Path) -> str:
    """A picture file cut in the middle."""
    tiny_images(1)[0].save(folder / "cut.png")
    data = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    return str(folder / "cut.png")


BAD: dict[str, tuple[Callable[[Path], Record], str]] = {
    "no chain": (lambda _: scene(chain=None), "column 'chain' is missing.*add the list"),
    "no chain in a conversation": (
        lambda _: talk("<image>\nq", "<laser><answer>B</answer>", chain=None),
        "required column 'reasoning_chain' is missing.*latent_form='slots'",
    ),
    "the sample of the README": (
        lambda _: talk("<image>\nq", README_REPLY, chain=None),
        r"required column 'reasoning_chain' is missing or empty \(record form 'slots'\).*latent_form='slots'",
    ),
    "missing image": (lambda folder: scene(images=[str(folder / "x.png")]), "x.png' cannot be read.*fix the path"),
    "damaged image": (lambda folder: scene(images=[damaged(folder)]), "cut.png' cannot be read.*fix the path"),
    "impossible shape": (lambda _: scene(images=[Image.new("RGB", (900, 3))]), "900x3 pixels cannot be processed"),
    "more images than placeholders": (
        lambda _: talk("<image>\nq", "<laser>a", images=tiny_images(2)),
        "1 <image> placeholders but 2 images",
    ),
    "more placeholders than images": (lambda _: scene(question="<image> q"), "2 <image> placeholders but 1 images"),
    "latent token in the question": (
        lambda _: scene(question=f"What {START}?"),
        r"user turn contains <\|laser_start\|>.*remove it",
    ),
    "placeholder in the prompt": (lambda _: talk("<image>\n<laser>q", "<laser>a"), "user turn contains <laser>"),
    "marker in a concept": (
        lambda _: scene(chain=["Street", f"dog{END}"]),
        r"concept 'dog<\|laser_end\|>' of the chain contains <\|laser_end\|>",
    ),
    "image token in the text": (lambda _: scene(question="a <|image_pad|>"), r"image token <\|image_pad\|>"),
    "no answer": (lambda _: scene(answer=None), "answer must be a string, got None"),
    "no images column": (lambda _: {**scene(), "images": None}, "images must be a list"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_by_file_and_row(name: str, processor: LatentProcessor, tmp_path: Path) -> None:
    make, reason = BAD[name]
    with pytest.raises(RecordError, match=f"scenes.json, row 12: .*{reason}") as caught:
        LatentSFTCollator(processor)([scene(), make(tmp_path)])
    assert (caught.value.file, caught.value.row) == ("scenes.json", 12)


def test_damaged_bytes_in_a_table_are_named(processor: LatentProcessor, tmp_path: Path) -> None:
    (row,) = records_to_dataset([scene()], decode=False)
    row["images"][0]["bytes"] = Path(damaged(tmp_path)).read_bytes()
    with pytest.raises(RecordError, match="scenes.json, row 12: the bytes of an image cannot be read"):
        LatentSFTCollator(processor)([row])


def test_a_record_without_origin_is_named_by_its_id(processor: LatentProcessor) -> None:
    with pytest.raises(RecordError, match="record 's'.*column 'chain' is missing"):
        LatentSFTCollator(processor)([scene(chain=[], meta={})])


def test_a_column_that_the_schema_lacks_is_refused(processor: LatentProcessor) -> None:
    with pytest.raises(ValueError, match=r"unknown columns \['label'\]"):
        LatentSFTCollator(processor)([{**scene(), "label": 3}])


def test_a_processor_of_another_chat_format_is_refused() -> None:
    with pytest.raises(ValueError, match="'chain' is written in the chat format .* LatentChameleonProcessor does not"):
        LatentSFTCollator(tiny_processor("chameleon"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"latent_form": "roi"},
            "latent_form='roi' is unknown; choose 'chain', 'slots', 'regions', 'learned' or 'none'",
        ),
        ({"num_slots": 3}, "num_slots=3 with latent_form='chain'.*latent_form='slots'"),
        ({"latent_form": "slots", "num_slots": 0}, "num_slots=0.*at least 1"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0 must be an integer of at least 1"),
    ],
)
def test_a_wrong_option_is_refused_when_built(
    options: dict[str, Any], message: str, processor: LatentProcessor
) -> None:
    with pytest.raises(ValueError, match=message):
        LatentSFTCollator(processor, **options)
