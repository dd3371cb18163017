"""The limit of a prompt's length: counted exactly, without decoding images, and refused by name."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image
from trl.data_utils import prepare_multimodal_messages

from tests.tiny import tiny_images
from tests.trainers.grpo_parts import build, prompts, rollout
from trainers.data.records import RecordError, make_record, records_to_dataset
from trainers.prompt_lengths import prompt_lengths

STRINGS = Dataset.from_list([{"prompt": "What is it?"}, {"prompt": "Is the path safe?"}])


def records(folder: Path, **options: Any) -> Dataset:
    """Questions with no image, one, and two, in memory and as files."""
    first, second, third = tiny_images(3)
    second.save(folder / "a.png")
    images = [[], [first], [str(folder / "a.png"), third]]
    rows = [make_record(f"r{i}", "What is it?" * (i + 1), "B", part) for i, part in enumerate(images)]
    return records_to_dataset(rows, **options)


@pytest.mark.parametrize("decode", [True, False])
def test_lengths_are_those_of_the_prompts_and_need_no_pixels(
    decode: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(tmp_path, data=records(tmp_path, decode=decode), max_prompt_length=1000)
    rows = list(trainer.train_dataset)
    messages = [prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in rows]
    expected = [len(ids) for ids in trainer._tokenize_prompts(messages)[0]]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("an image was decoded"))
    found = [(row["id"], length) for row, length in prompt_lengths(trainer.train_dataset, trainer)]
    assert found == [(row["id"], length) for row, length in zip(rows, expected, strict=True)]
    assert len(set(expected)) == 3


def test_longer_prompts_are_refused_by_name(tmp_path: Path) -> None:
    data = records(tmp_path)
    trainer = build(tmp_path, data=data)
    lengths = [length for _, length in prompt_lengths(trainer.train_dataset, trainer)]
    assert lengths == sorted(lengths)
    build(tmp_path, data=data, max_prompt_length=lengths[2])
    message = rf"max_prompt_length={lengths[1]}: train_dataset has .*prompts \(.*'r2': {lengths[2]} tokens\).*raise"
    with pytest.raises(ValueError, match=message):
        build(tmp_path, data=data, max_prompt_length=lengths[1])
    for name, part in (("eval_dataset", data), (r"eval_dataset\['x'\]", {"x": data})):
        with pytest.raises(ValueError, match=f"max_prompt_length={lengths[0]}: {name} has .*'r1'.*'r2'"):
            build(tmp_path, data=data.select([0]), eval_dataset=part, max_prompt_length=lengths[0])
    with pytest.raises(ValueError, match="max_prompt_length=2: train_dataset has longer prompts"):
        build(tmp_path, data=STRINGS, max_prompt_length=2)


def test_a_stream_is_refused_when_it_is_met(tmp_path: Path) -> None:
    trainer = build(tmp_path, data=prompts().to_iterable_dataset(), max_prompt_length=20)
    trainer.train_dataset = list(trainer.train_dataset)
    with pytest.raises(ValueError, match=r"max_prompt_length=20: this batch has .* \(id 'r0': \d\d tokens\)"):
        rollout(trainer, 1)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    data = records(tmp_path, decode=False)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(RecordError, match=r"r2.*a\.png"):
        build(tmp_path, data=data, max_prompt_length=1000)
