"""Batches of a curriculum: layout by stage in every family, image tokens, bad rows named, what the options refuse."""

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from PIL import Image

from tests.trainers.staged_parts import IMAGE_FAMILIES, QWEN_FAMILIES, TEXT_FAMILIES, scenes, staged_args, staged_parts
from trainers import StagedCollator
from trainers.data.llava_text import IGNORE_INDEX
from trainers.data.records import RecordError
from trainers.data.staged_text import encode_staged
from trainers.data.stages import StageLayout
from trainers.distributed import first_rows
from trainers.staged_collator import image_token_counts, stage_tokens

TEXT_ROW = {**scenes(images=False)[0], "meta": {"source": "data.json", "row": 7}}


def collator(family: str = "qwen2_5_vl", tmp_path: Any = "unused", **options: Any) -> StagedCollator:
    args = staged_args(tmp_path, family, **options)
    return args.build_collator(staged_parts(family, args.latent_method)[1])


@pytest.mark.parametrize("family", [*IMAGE_FAMILIES, *TEXT_FAMILIES])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_batch_of_a_stage(family: str, stage: int) -> None:
    """Every row is question, blocks, remaining steps and answer; labels on the last two; padding on the right."""
    made, records = collator(family), scenes(family not in TEXT_FAMILIES)
    made.stage = stage
    batch, ids = made(records), made.tokens
    assert batch["input_ids"].shape[1] % 8 == 0
    features = {name: value for name, value in batch.items() if name in ("pixel_values", "image_grid_thw")}
    counts = image_token_counts(made.processor, features, len(records)) if features else [0] * len(records)
    for row, (record, count) in enumerate(zip(records, counts, strict=True)):
        per_image = [count] * len(record["images"])
        example = encode_staged(record, made.processor, made.fmt, per_image)
        blocks, left = [], count
        for _ in range(stage):
            taken = min(made.layout.num_patches, left)
            left -= taken
            blocks += [ids.patch] * taken + [ids.slot]
        prompt = example.question + ([ids.start, *blocks, ids.end] if family in TEXT_FAMILIES else blocks)
        rest = [token for step in example.steps[stage:] for token in step] + example.answer
        length = len(prompt) + len(rest)
        assert batch["input_ids"][row, :length].tolist() == prompt + rest
        assert batch["labels"][row].tolist() == (
            [IGNORE_INDEX] * len(prompt) + rest + [IGNORE_INDEX] * (batch["labels"].shape[1] - length)
        )
        assert batch["attention_mask"][row].sum() == length and batch["attention_mask"][row, :length].all()
    if family in QWEN_FAMILIES:
        is_image = batch["input_ids"] == made.processor.image_token_id
        assert torch.equal(batch["mm_token_type_ids"], is_image.int())
        assert is_image.sum(dim=1).tolist() == counts  # an inserted embedding is no image token
    else:
        assert "mm_token_type_ids" not in batch


def test_a_prepared_batch_travels_between_processes_and_keeps_what_is_not_its_own() -> None:
    made = collator()
    prepared = made.prepare(scenes())
    travelled = pickle.loads(pickle.dumps(prepared))
    travelled["record_labels"] = torch.zeros(4, 8)
    made.stage = 1
    found, expected = made.finish(travelled, epoch=0), made(scenes())
    assert found.pop("record_labels").shape == (4, 8)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    made.stage = 3
    assert not torch.equal(made.finish(prepared, epoch=0)["input_ids"], expected["input_ids"])


def test_other_stages_are_mixed_into_training_batches_alone() -> None:
    made = collator(uniform_prob=1.0)
    made.stage, slot = 1, made.tokens.slot
    prepared = made.prepare(scenes())

    def counts(batch: dict) -> tuple:
        return tuple((batch["input_ids"] == slot).sum(dim=1).tolist())

    assert counts(made(scenes())) == (1, 1, 1, 1)
    drawn = {counts(made.finish(dict(prepared), epoch)) for epoch in range(8)}
    assert len(drawn) > 3 and all(
        count <= len(s["steps"]) for row in drawn for count, s in zip(row, scenes(), strict=True)
    )
    assert counts(made.finish(dict(prepared), 3)) == counts(made.finish(dict(prepared), 3))
    other = copy.copy(made)
    other.seed = 5
    assert {counts(other.finish(dict(prepared), epoch)) for epoch in range(8)} != drawn


def test_too_few_image_tokens_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    made = collator(num_latent_patches=5)
    with caplog.at_level(logging.WARNING, logger="trainers.staged_collator"):
        made(scenes())
        assert not caplog.records
        made.stage = 2
        made(scenes())
        made.stage = 3
        made(scenes())
    (said,) = caplog.messages
    assert "num_latent_patches=5: the 2 latents of scenes.json, row 0 (id 's0') ask for 10 image embeddings" in said


def test_only_the_last_image_is_copied_when_it_alone_is_looked_at() -> None:
    first, second = scenes()[0], scenes()[3]
    both = {**first, "images": [first["images"][0], second["images"][0]]}
    for images, expected in (("all", 8), ("last", 2)):
        made = collator(num_latent_patches=9, latent_patch_images=images)
        made.stage = 1
        assert int((made([both])["input_ids"] == made.tokens.patch).sum()) == expected


@pytest.mark.parametrize("family", ["qwen3_vl", "chameleon", "gpt2"])
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_the_first_rows_of_a_batch_keep_their_images(family: str, kept: int) -> None:
    """Of the last batch of an evaluation on several processes; rows may have several images, or none."""
    made, records = collator(family), scenes(family != "gpt2")
    if family != "gpt2":
        records[1]["images"] = [*records[1]["images"], *records[0]["images"]]
    made.stage = 1
    found, alone = first_rows(made(records), kept, made.processor), made(records[:kept])
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        is_image = name in ("pixel_values", "image_grid_thw")
        assert torch.equal(found[name] if is_image else found[name][:, : value.shape[1]], value), name


def test_images_become_squares_on_white_when_asked() -> None:
    transparent = Image.new("RGBA", (90, 30), (0, 0, 0, 0))
    record = {**scenes()[0], "images": [transparent]}
    square, plain = collator(image_size=56)([record]), collator()([record])
    assert square["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert plain["image_grid_thw"].tolist() != [[1, 4, 4]]
    white = collator()([{**record, "images": [Image.new("RGB", (56, 56), "white")]}])
    assert torch.equal(square["pixel_values"], white["pixel_values"])


def test_controls_lay_out_what_they_say() -> None:
    found = {}
    for mode in ("latent", "pause", "no_thoughts", "no_cot"):
        made = collator(staged_mode=mode)
        made.stage = 1
        ids = made(scenes()[2:3])["input_ids"]
        found[mode] = tuple(int((ids == token).sum()) for token in (made.tokens.slot, made.tokens.patch))
        kept = made.processor.tokenizer.decode(ids[0].tolist())
        assert ("The dog runs." in kept, "It is on the street." in kept) == (False, mode != "no_cot")
    assert found == {"latent": (1, 2), "pause": (1, 0), "no_thoughts": (0, 0), "no_cot": (0, 0)}


def test_the_length_limit_leaves_out_steps() -> None:
    whole, short = collator(), collator(max_staged_length=90)
    length = int(whole([scenes()[2]])["attention_mask"].sum())
    assert length > 90 >= int(short([scenes()[2]])["attention_mask"].sum())
    assert collator(staged_format="ivtlr-qwen", max_staged_length=0).max_length is None
    assert collator(staged_format="ivtlr-qwen").max_length == "format"


BAD = {
    "no image": (TEXT_ROW, "it has no image, and the method looks at one"),
    "no steps": ({**scenes()[0], "steps": None}, "steps is None: there is nothing that latents could replace"),
    "empty steps": ({**scenes()[0], "steps": []}, r"steps is \[\].*staged_mode: no_cot"),
    "a latent in the text": ({**scenes()[0], "question": "a <|latent|> b"}, r"contains the token <\|latent\|>"),
    "no answer": ({**scenes()[0], "answer": " "}, "answer holds ' '"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named(case: str) -> None:
    row, message = BAD[case]
    with pytest.raises(RecordError, match=message) as caught:
        collator()([{**row, "meta": {"source": "data.json", "row": 7}}])
    assert str(caught.value).startswith("data.json, row 7: ")


def test_an_image_is_refused_by_a_model_that_reads_text() -> None:
    with pytest.raises(RecordError, match="scenes.json, row 0: it has 1 images, and LatentTextProcessor reads text"):
        collator("gpt2")(scenes())
    assert collator("qwen2_5_vl", latent_method="coconut", num_latent_patches=0)([TEXT_ROW])["labels"].any()


def test_direct_answers_need_no_steps() -> None:
    made = collator(staged_mode="no_cot")
    assert (made([{**scenes()[0], "steps": None}])["labels"] != IGNORE_INDEX).any()


def test_a_latent_token_that_is_a_word_is_refused() -> None:
    processor = staged_parts()[1]
    (word, index) = next((w, i) for w, i in processor.tokenizer.get_vocab().items() if len(w) == 1)
    processor.latent_tokens = {**processor.latent_tokens, "slot": word}
    with pytest.raises(ValueError, match=rf"latent_tokens\['slot'\] = .* \(id {index}\) is a word of the tokenizer"):
        stage_tokens(processor)


def test_wrong_options_are_refused() -> None:
    processor = staged_parts("qwen2_5_vl", "coconut")[1]
    with pytest.raises(ValueError, match="num_latent_patches=2, but the processor has no token for inserted"):
        StagedCollator(processor, StageLayout(num_patches=2))
    with pytest.raises(ValueError, match="image_size=-3 must be an integer of at least 1"):
        StagedCollator(processor, image_size=-3)
    with pytest.raises(ValueError, match="pad_to_multiple_of=0 must be an integer of at least 1"):
        StagedCollator(processor, pad_to_multiple_of=0)
