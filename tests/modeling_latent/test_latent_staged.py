"""Strategy `staged`: how slots are laid out, options, trace, and what is refused."""

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from modeling_latent.latent_strategies import LatentStep
from tests.latent import tiny_pair
from tests.tiny import tiny_inputs, tiny_processor

STAGED = {"latent_strategy": "staged", "max_new_tokens": 4, "return_dict_in_generate": True}


@pytest.fixture
def model() -> Any:
    model = copy.deepcopy(tiny_pair(0, 6.0, "qwen2_5_vl", None)[1])
    model.config.latent_patch_token_id = model.config.get_text_config().vocab_size - 1
    return model


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return dict(tiny_inputs())


def staged(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    return model.generate(**inputs, **{**STAGED, **options})


def kept_ids(output: Any, row: int) -> list[int]:
    """The ids of the prompt of a row with its slots, without padding."""
    trace = output.latent_trace
    return trace.row(row).sequences[0, : trace.row(row).prompt_length].tolist()


def test_layout(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    slot, patch = model.config.latent_token_id, model.config.latent_patch_token_id
    output = staged(model, inputs, num_latent_steps=[1, 2], num_latent_patches=1)
    for row, blocks in enumerate(([patch, slot], [patch, slot] * 2)):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        assert kept_ids(output, row) == prompt + blocks
    behind = staged(model, inputs, num_latent_steps=2, num_latent_patches=1, latent_vision_first=False)
    assert kept_ids(behind, 0)[-4:] == [slot, patch] * 2
    start, end = model.config.latent_start_token_id, model.config.latent_end_token_id
    marked = staged(model, inputs, num_latent_steps=2, latent_markers=True)
    assert kept_ids(marked, 1)[-4:] == [start, slot, slot, end]
    followed = staged(model, inputs, num_latent_steps=1, latent_suffix_ids=[7, 8])
    assert kept_ids(followed, 1)[-3:] == [slot, 7, 8]
    spans = marked.latent_trace.spans
    assert [(span.length, span.reason) for span in spans] == [(2, "num_latent_steps")] * 2
    assert all(span.start == span.first - 1 and span.end == span.first + 2 for span in spans)


def test_without_a_mask_padding_is_found_as_by_the_stock_class(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    pad = tiny_processor().tokenizer.pad_token_id
    config = {"generation_config": GenerationConfig(pad_token_id=pad, eos_token_id=-1)}
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = pad, [-1]
    options = {"num_latent_steps": [1, 3], "num_latent_patches": 1, **config}
    expected = staged(model, inputs, **options)
    without = {name: value for name, value in inputs.items() if name != "attention_mask"}
    assert torch.equal(staged(model, without, **options).sequences, expected.sequences)


def test_prompts_without_padding_are_padded_as_the_model_pads(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Rows of one length whose blocks differ."""
    row = {name: value[1:].repeat(2, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
    row = {name: row[name] for name in ("input_ids", "attention_mask")}
    row["input_ids"][row["input_ids"] == model.config.image_token_id] = 7
    kept = row["attention_mask"][0].bool()
    row = {name: value[:, kept] for name, value in row.items()}
    model.generation_config.pad_token_id = 3
    sequences = staged(model, row, num_latent_steps=[1, 3]).sequences
    assert sequences[0, :2].tolist() == [3, 3] and sequences[1, :2].equal(row["input_ids"][1, :2])


def test_defaults_of_the_methods(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    model.config.latent_generation = {"latent_strategy": "staged", "num_latent_steps": 2, "num_latent_patches": 1}
    output = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    assert output.latent_trace.num_latent_steps.tolist() == [2, 2]
    assert output.latent_trace.info["strategy"] == "staged"


def test_slots_of_the_prompt_are_kept(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """A prompt that ends with slots, as the published code writes it, is a staged prompt."""
    slot = model.config.latent_token_id
    expected = staged(model, inputs, num_latent_steps=2, num_latent_patches=1)
    laid_out = dict(inputs)
    for name, value in (("input_ids", slot), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        laid_out[name] = torch.nn.functional.pad(inputs[name], (0, 2), value=value)
    output = staged(model, laid_out, num_latent_patches=1)
    assert torch.equal(output.sequences, expected.sequences)
    model.config.latent_generation = {"num_latent_steps": 3}  # a default gives way to the prompt
    assert torch.equal(staged(model, laid_out, num_latent_patches=1).sequences, expected.sequences)
    with pytest.raises(ValueError, match="num_latent_steps=2: the prompt holds slots"):
        staged(model, laid_out, num_latent_steps=2, num_latent_patches=1)


def test_trace_keeps_what_slots_said_and_saw(model: Any, inputs: dict[str, torch.Tensor], tmp_path: Any) -> None:
    output = staged(model, inputs, num_latent_steps=2, num_latent_patches=1, latent_topk=3)
    trace = output.latent_trace
    assert trace.num_latent_steps.tolist() == [2, 2] and trace.has_output.all()
    is_slot = trace.sequences[trace.slot_index[:, 0], trace.slot_index[:, 1]] == model.config.latent_token_id
    logits = model.lm_head(trace.slot_inputs[is_slot])
    assert torch.equal(trace.readable_ids[is_slot], logits.argmax(-1))
    assert torch.equal(trace.topk_ids[is_slot], logits.topk(3).indices)
    torch.testing.assert_close(trace.topk_probs[is_slot], logits.softmax(-1).topk(3).values)
    columns = trace.extras["patch_column"]
    assert (columns[is_slot] == -1).all()
    looked_at = trace.sequences[trace.slot_index[~is_slot][:, 0], columns[~is_slot]]
    assert (looked_at == model.config.image_token_id).all()
    trace.save(tmp_path / "trace.safetensors")
    loaded = type(trace).load(tmp_path / "trace.safetensors")
    assert torch.equal(loaded.extras["patch_column"], columns)
    assert loaded.num_latent_steps.tolist() == [2, 2]
    assert torch.equal(trace.row(1).extras["patch_column"], columns[trace.slot_index[:, 0] == 1])


def test_hook_and_noise_reach_every_slot(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    seen: list[LatentStep] = []

    def hook(step: LatentStep) -> torch.Tensor:
        seen.append(step)
        return step.latent * 0

    options = {"num_latent_steps": [1, 2], "num_latent_patches": 1}
    output = staged(model, inputs, latent_hook=hook, **options)
    trace = output.latent_trace
    is_slot = trace.sequences[trace.slot_index[:, 0], trace.slot_index[:, 1]] == model.config.latent_token_id
    assert not trace.slot_inputs[is_slot].any() and trace.slot_inputs[~is_slot].any()
    assert [step.is_slot.tolist() for step in seen] == [[False, True], [True, True]]
    assert [step.position for step in seen] == [trace.prompt_length - 3, trace.prompt_length - 1]
    assert all((step.said == step.scores.argmax(-1)).all() for step in seen)
    plain = staged(model, inputs, **options).latent_trace
    torch.manual_seed(0)
    noisy = staged(model, inputs, latent_noise=0.1, **options).latent_trace
    first = [int(trace.slot_index[is_slot][:, 0].tolist().index(row)) for row in (0, 1)]
    change = (noisy.slot_inputs - plain.slot_inputs)[is_slot][first].norm(dim=-1)
    torch.testing.assert_close(change, 0.1 * plain.slot_inputs[is_slot][first].norm(dim=-1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="latent_hook must return"):
        staged(model, inputs, latent_hook=lambda step: step.latent[:1], **options)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}, {"prefill_chunk_size": 7}])
def test_pause_tokens_are_fed_by_their_own_embedding(
    model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]
) -> None:
    """As training with `staged_mode: pause`: the stock class with the slots as ordinary tokens."""
    slot, stock = model.config.latent_token_id, tiny_pair(0, 6.0, "qwen2_5_vl", None)[0]
    output = staged(model, inputs, num_latent_steps=2, latent_fed="token", **options)
    with_slots = dict(inputs)
    for name, value in (("input_ids", slot), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        with_slots[name] = torch.nn.functional.pad(inputs[name], (0, 2), value=value)
    banned = [slot, model.config.latent_patch_token_id, model.config.latent_start_token_id]
    expected = stock.generate(**with_slots, max_new_tokens=4, suppress_tokens=banned, **options)
    assert torch.equal(output.sequences, expected)
    with pytest.raises(ValueError, match="num_latent_patches=1 with latent_fed='token'"):
        staged(model, inputs, num_latent_steps=2, num_latent_patches=1, latent_fed="token")


def test_first_token_may_be_deaf_to_the_end(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Published: an end of turn right behind the slots does not end the row."""
    options = {"num_latent_steps": 1, "num_latent_patches": 0}
    plain = staged(model, inputs, generation_config=GenerationConfig(eos_token_id=-1, pad_token_id=0), **options)
    first = int(plain.sequences[0, -4])
    ends = GenerationConfig(eos_token_id=first, pad_token_id=0)
    assert staged(model, inputs, generation_config=ends, **options).sequences[0, -4:].tolist() != (
        plain.sequences[0, -4:].tolist()
    )
    deaf = staged(model, inputs, generation_config=ends, stop_on_first_token=False, **options)
    assert deaf.sequences[0, -4:].tolist() == plain.sequences[0, -4:].tolist()
    with pytest.raises(ValueError, match="stop_on_first_token=False works with greedy decoding and sampling only"):
        staged(model, inputs, generation_config=ends, stop_on_first_token=False, num_beams=2, **options)


def test_text_writes_no_latent_id(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    config = model.config
    latent = [config.latent_token_id, config.latent_patch_token_id, config.latent_start_token_id]

    def prefer(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_add(1, torch.tensor(latent), torch.full((len(scores), 3), 1e4))

    options = {"num_latent_steps": 1, "logits_processor": [prefer]}
    written = staged(model, inputs, **options).sequences[:, -4:]
    assert not torch.isin(written, torch.tensor(latent)).any()
    free = staged(model, inputs, latent_ids="readable", **options).sequences[:, -4:]
    assert torch.isin(free, torch.tensor(latent)).all()


def test_more_patches_than_image_tokens_are_said_once(
    model: Any, inputs: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            output = staged(model, inputs, num_latent_steps=3, num_latent_patches=77)
    assert [record.message[:22] for record in caplog.records] == ["num_latent_patches=77:"]
    trace, image = output.latent_trace, model.config.image_token_id
    for row in range(2):
        columns = trace.row(row).extras["patch_column"]
        taken = columns[columns >= 0]
        assert sorted(taken.tolist()) == (trace.row(row).sequences[0] == image).nonzero()[:, 0].tolist()


REFUSED = {
    "no slots said": ({}, "needs num_latent_steps"),
    "above the limit": ({"num_latent_steps": 17}, "num_latent_steps=17 is above the limit max_latent_steps=16"),
    "another number of rows": ({"num_latent_steps": [1, 2, 3]}, "num_latent_steps has 3 entries for 2 prompts"),
    "an unknown order": ({"num_latent_steps": 1, "latent_patch_order": "first"}, "latent_patch_order='first'"),
    "an option of another strategy": ({"num_latent_steps": 1, "force_span": True}, "does not read .'force_span'."),
    "negative": ({"num_latent_steps": 1, "num_latent_patches": -1}, "num_latent_patches=-1 must be at least 0"),
    "positions": ({"num_latent_steps": 1, "position_ids": torch.zeros(2, 5)}, "leave inputs_embeds and position_ids"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        staged(model, inputs, **options)


def test_refused_rows(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    image = model.config.image_token_id
    text = {name: inputs[name].clone() for name in ("input_ids", "attention_mask")}
    text["input_ids"][1][text["input_ids"][1] == image] = 7
    with pytest.raises(ValueError, match="row 1 has no image, and num_latent_patches=1"):
        staged(model, text, num_latent_steps=1, num_latent_patches=1)
    model.config.latent_patch_token_id = None
    with pytest.raises(ValueError, match="the model has no token for inserted image embeddings"):
        staged(model, inputs, num_latent_steps=1, num_latent_patches=1)
    model.config.latent_token_id = None
    with pytest.raises(ValueError, match="has no latent tokens"):
        staged(model, inputs, num_latent_steps=1)
