"""Thought tokens in the prompts of an evaluation, against prompts made by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evaluation.runner import build_prompt, predict
from evaluation.thoughts import ThoughtPlace
from modeling_latent.configuration_latent import LATENT_METHODS
from tests.latent import liven, tiny_latent_model
from tests.tiny import tiny_images
from trainers.data.records import Record, make_record
from trainers.tiny import build_tiny_processor

SEARCH = {"latent_strategy": "search", "max_num_steps": 2, "max_new_tokens": 5}
PLACEHOLDER = "<|endoftext|>"


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    processor = build_tiny_processor(latent_tokens=LATENT_METHODS["laser"].tokens)
    names = ("latent_start_token_id", "latent_token_id", "latent_end_token_id")
    ids = {name: getattr(processor, name) for name in names}
    model = liven(tiny_latent_model(latent_method="laser", **ids)).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model, processor


@pytest.fixture(scope="module")
def records() -> list[Record]:
    images = tiny_images(3)
    return [make_record(f"r{i}", "What is it? " * (1 + 3 * i % 5), "A dog", [images[i]]) for i in range(3)]


def inputs_of(processor: Any, record: Record, prompt: str) -> dict[str, torch.Tensor]:
    return processor(text=[prompt], images=[record["images"]], return_tensors="pt")


@pytest.mark.parametrize("options", [{}, {"mode": "reference", "num_thought_tokens": 2}, {"num_selected_patches": 0}])
def test_placeholders_at_the_end_of_the_users_turn(
    options: dict[str, Any], parts: tuple[Any, Any], records: list[Record]
) -> None:
    """A batch says what each prompt says alone; thought tokens count as latents, copies of image tokens do not."""
    model, processor = parts
    number = options.get("num_thought_tokens", 4)
    found = predict(model, processor, records, batch_size=2, **SEARCH, **options)
    for record, prediction in zip(records, found, strict=True):
        prompt = build_prompt(processor, record).replace(
            f"{record['question']}<|im_end|>", f"{record['question']}{PLACEHOLDER * number}<|im_end|>"
        )
        inputs = inputs_of(processor, record, prompt)
        mask = inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        assert int(mask.sum()) == number
        output = model.generate(**inputs, thought_mask=mask, do_sample=False, **SEARCH, **options)
        assert prediction.raw == processor.decode(output[0, -5:])
        assert (prediction.num_latent_steps, prediction.num_prefilled) == (number, number)
        assert (prediction.num_tokens, prediction.num_steps, prediction.num_markers) == (number + 5, 5, 0)
        assert record["question"][:6] not in prediction.text


@pytest.mark.parametrize("number", [1, 3])
def test_the_last_tokens_of_the_question(number: int, parts: tuple[Any, Any], records: list[Record]) -> None:
    """Nothing is added: without a step of the search the reply is that of the prompt."""
    model, processor = parts
    options = {**SEARCH, "thoughts": "question", "num_thought_tokens": number}
    plain = predict(model, processor, records, max_new_tokens=5, latent_strategy="off")
    still = predict(model, processor, records, **{**options, "max_num_steps": 0})
    assert [each.raw for each in still] == [each.raw for each in plain]
    assert {each.num_latent_steps for each in still} == {number}
    place = ThoughtPlace.of(model, processor, options, "question")
    inputs = inputs_of(processor, records[0], build_prompt(processor, records[0]))
    mask, end = place.mask(inputs)[0], processor.tokenizer.eos_token_id
    stop = inputs["input_ids"][0].tolist()[::-1].index(end)
    assert mask.nonzero()[:, 0].tolist() == [len(mask) - 1 - stop - back for back in range(number, 0, -1)]
    moved = predict(model, processor, records, **{**options, "sigma": 30.0, "num_selected_patches": 0})
    assert [each.raw for each in moved] != [each.raw for each in plain]


def test_a_prompt_without_the_end_of_a_turn(parts: tuple[Any, Any], records: list[Record]) -> None:
    model, processor = parts
    place = ThoughtPlace.of(model, processor, {**SEARCH, "num_thought_tokens": 2})
    assert place.in_prompt("Where?") == "Where?" + 2 * PLACEHOLDER
    inputs = processor(text=["Where?" + 2 * PLACEHOLDER], return_tensors="pt")
    assert place.mask(inputs)[0].tolist() == [False] * (inputs["input_ids"].shape[1] - 2) + [True] * 2


def test_which_options_count(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    assert ThoughtPlace.of(model, processor, {}) is None
    assert ThoughtPlace.of(model, processor, {"latent_strategy": "off"}) is None
    marked = {"latent_strategy": "search", "thought_mask": torch.ones(1, 2)}
    assert ThoughtPlace.of(model, processor, marked) is None, "the caller marks them"
    asked = {"latent_strategy": "search"}
    assert ThoughtPlace.of(model, processor, asked).number == 4
    assert ThoughtPlace.of(model, processor, {**asked, "mode": "reference"}).number == 8
    saved = SimpleNamespace(
        config=SimpleNamespace(latent_generation={"num_thought_tokens": 5, "latent_strategy": "search"}),
        generation_config=SimpleNamespace(num_thought_tokens=3),
    )
    assert ThoughtPlace.of(saved, processor, {}).number == 3
    other = processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    place = ThoughtPlace.of(model, processor, {**asked, "thought_token_id": other})
    assert (place.token, place.token_id) == ("<|im_start|>", other)


def test_another_placeholder(parts: tuple[Any, Any], records: list[Record]) -> None:
    model, processor = parts
    token = processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    options = {**SEARCH, "max_num_steps": 0, "num_thought_tokens": 2}
    (found,) = predict(model, processor, records[:1], thought_token_id=token, **options)
    prompt = build_prompt(processor, records[0])
    stop = prompt.rindex("<|im_end|>")
    inputs = inputs_of(processor, records[0], prompt[:stop] + 2 * "<|im_start|>" + prompt[stop:])
    ids = model.generate(**inputs, latent_strategy="off", do_sample=False, max_new_tokens=5)[0]
    assert found.raw == processor.decode(ids[-5:])


def test_behind_the_prompt(parts: tuple[Any, Any], records: list[Record]) -> None:
    """`generate` lays latent tokens out; another id is taken as given."""
    model, processor = parts
    options = {**SEARCH, "num_thought_tokens": 2}
    inputs = inputs_of(processor, records[0], build_prompt(processor, records[0]))
    for more in ({}, {"thought_token_id": processor.tokenizer.convert_tokens_to_ids("<|im_start|>")}):
        (found,) = predict(model, processor, records[:1], thoughts="reply", **options, **more)
        ids = model.generate(**inputs, do_sample=False, **options, **more)[0]
        assert ids[-7:-5].tolist() == [more.get("thought_token_id", model.config.latent_token_id)] * 2
        assert found.raw == processor.decode(ids[-5:])
        assert (found.num_latent_steps, found.num_prefilled, found.num_tokens) == (2, 2, 7)


def test_what_is_refused(parts: tuple[Any, Any], records: list[Record]) -> None:
    model, processor = parts
    with pytest.raises(ValueError, match="thoughts='slots' is unknown; choose one of"):
        predict(model, processor, records, thoughts="slots", **SEARCH)
    place = ThoughtPlace.of(model, processor, {**SEARCH, "num_thought_tokens": 9}, "question")
    with pytest.raises(ValueError, match="row 0: no 9 thought tokens before the end of the user's turn; take fewer"):
        place.mask(processor(text=["Hi"], return_tensors="pt"))
    bare = SimpleNamespace(get_vocab=dict, pad_token_id=None)
    with pytest.raises(ValueError, match="SimpleNamespace has no <|endoftext|> and no padding token"):
        ThoughtPlace.of(model, SimpleNamespace(tokenizer=bare), SEARCH)
