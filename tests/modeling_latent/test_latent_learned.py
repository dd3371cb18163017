"""Strategy `learned`: how the tokens are laid out, options, trace, hook, saved defaults, and what is refused."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from modeling_latent import LatentTrace, convert_stock_checkpoint
from modeling_latent.generation_latent import saved_generation_config
from modeling_latent.latent_learned import MASK_FORMS, visibility
from modeling_latent.latent_strategies import LatentStep
from tests.hub import run_python
from tests.latent import liven, tiny_pair
from tests.test_matrix import Prefer
from tests.tiny import tiny_images, tiny_inputs, tiny_processor
from trainers.tiny import save_tiny_stock_checkpoint

BUDGET = 5
FREE = {"force_latents": False}


def with_learned_tokens(family: str) -> Any:
    """A model whose only latents are learned tokens, not in the order of their ids, and whose default they are."""
    model = copy.deepcopy(tiny_pair(0, 6.0, family, None)[1])
    config, size = model.config, model.config.get_text_config().vocab_size
    config.latent_learned_token_ids = [size - 1, size - 4, size - 2, size - 3]
    config.latent_token_id = config.latent_start_token_id = config.latent_end_token_id = None
    config.latent_method, config.latent_generation = "lavit", {"latent_strategy": "learned"}
    return model


@pytest.fixture
def model() -> Any:
    return with_learned_tokens("qwen2_5_vl")


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Two rows with an image, the first one padded on the left."""
    return dict(tiny_inputs())


@pytest.fixture
def row(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The second row alone, without padding."""
    patches = int(inputs["image_grid_thw"][0].prod())
    kept = {name: value[1:] for name, value in inputs.items() if name != "pixel_values"}
    return {**kept, "pixel_values": inputs["pixel_values"][patches:]}


def learned(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    common = {"max_new_tokens": BUDGET, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    config = {"generation_config": GenerationConfig(eos_token_id=-1, pad_token_id=0)}
    return model.generate(**inputs, **{**common, **config, **options})


def kept_ids(output: Any, row: int) -> list[int]:
    """The ids of a row's prompt with the learned tokens, without padding."""
    trace = output.latent_trace.row(row)
    return trace.sequences[0, : trace.prompt_length].tolist()


def prompts(inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    kept = inputs["attention_mask"].bool()
    return [ids[mask].tolist() for ids, mask in zip(inputs["input_ids"], kept, strict=True)]


def ending_with(inputs: dict[str, torch.Tensor], *endings: list[int]) -> dict[str, torch.Tensor]:
    """The prompts with some ids behind them, padded on the left."""
    rows = [[*ids, *more] for ids, more in zip(prompts(inputs), endings, strict=True)]
    length, changed = max(map(len, rows)), dict(inputs)
    changed["input_ids"] = torch.tensor([[0] * (length - len(ids)) + ids for ids in rows])
    changed["attention_mask"] = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows])
    changed["mm_token_type_ids"] = (changed["input_ids"] == tiny_image_id()).to(inputs["mm_token_type_ids"])
    return changed


def tiny_image_id() -> int:
    return tiny_processor().tokenizer.convert_tokens_to_ids("<|image_pad|>")


def same(found: Any, expected: Any) -> None:
    """Two outputs wrote the same behind the same prompts, by the same logits."""
    for number in range(len(expected.sequences)):
        assert kept_ids(found, number) == kept_ids(expected, number)
    written = [one.sequences[:, one.latent_trace.prompt_length :] for one in (found, expected)]
    assert torch.equal(*written)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


# Layout --------------------------------------------------------------------------------------------------------------


def test_the_tokens_stand_behind_the_prompt_in_their_order(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    tokens = model.config.latent_learned_token_ids
    for options, counts in (({}, (4, 4)), ({"num_latent_steps": 2}, (2, 2)), ({"num_latent_steps": [3, 0]}, (3, 0))):
        output = learned(model, inputs, **options)
        assert output.latent_trace.info["strategy"] == "learned"
        for number, count in enumerate(counts):
            assert kept_ids(output, number) == prompts(inputs)[number] + tokens[:count]
        assert output.sequences.shape[1] - output.latent_trace.prompt_length == BUDGET, "they cost no step"


def test_a_list_of_one_number_is_for_one_prompt(model: Any, row: dict[str, torch.Tensor]) -> None:
    one, other = (learned(model, row, num_latent_steps=count) for count in ([2], 2))
    assert torch.equal(one.sequences, other.sequences) and one.latent_trace.num_latent_steps.tolist() == [2]


@pytest.mark.parametrize("mask_latents", [False, *MASK_FORMS])
def test_tokens_that_stand_in_the_prompt_are_kept(
    model: Any, inputs: dict[str, torch.Tensor], mask_latents: bool | str
) -> None:
    """The first of them are completed, all are left as they are, each row by itself."""
    tokens = model.config.latent_learned_token_ids
    expected = learned(model, inputs, mask_latents=mask_latents)
    for endings in ([tokens[:2], []], [[], tokens], [tokens[:1], tokens[:3]], [tokens, tokens]):
        found = learned(model, ending_with(inputs, *endings), mask_latents=mask_latents)
        same(found, expected)
        assert found.latent_trace.num_latent_steps.tolist() == [4, 4]


def test_tokens_elsewhere_in_the_prompt_are_text(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    tokens = model.config.latent_learned_token_ids
    output = learned(model, ending_with(inputs, [tokens[0], 40], [*tokens, 41]))
    assert kept_ids(output, 0) == [*prompts(inputs)[0], tokens[0], 40, *tokens]
    assert kept_ids(output, 1) == [*prompts(inputs)[1], *tokens, 41, *tokens]
    assert output.latent_trace.num_latent_steps.tolist() == [4, 4]


def test_without_a_mask_padding_is_found_as_by_the_stock_class(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    pad = tiny_processor().tokenizer.pad_token_id
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = pad, [-1]
    config = {"generation_config": GenerationConfig(pad_token_id=pad, eos_token_id=-1)}
    options = {"num_latent_steps": [1, 3], **config}
    without = {name: value for name, value in inputs.items() if name != "attention_mask"}
    assert torch.equal(learned(model, without, **options).sequences, learned(model, inputs, **options).sequences)


def test_a_cache_of_the_prompts_is_gone_on_with() -> None:
    """What stands behind the cached positions is fed, learned tokens included; their states are in the trace."""
    model = with_learned_tokens("llama")
    inputs = {"input_ids": torch.tensor([[7, 8, 9, 10, 11], [12, 13, 14, 15, 16]])}
    for mask_latents in (False, True):
        expected, cache = learned(model, inputs, mask_latents=mask_latents), DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=inputs["input_ids"][:, :3], past_key_values=cache, use_cache=True)
        found = learned(model, inputs, past_key_values=cache, mask_latents=mask_latents)
        same(found, expected)
        for name in ("slot_inputs", "slot_outputs", "readable_ids", "has_output"):
            torch.testing.assert_close(getattr(found.latent_trace, name), getattr(expected.latent_trace, name))
    other = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=inputs["input_ids"], past_key_values=other, use_cache=True)
    with pytest.raises(ValueError, match="past_key_values holds prompts whose padding changes.*or leave past"):
        learned(model, inputs, past_key_values=other, num_latent_steps=[1, 2])


# Options -------------------------------------------------------------------------------------------------------------


def test_hiding_and_free_decoding_differ(model: Any, row: dict[str, torch.Tensor]) -> None:
    first = {
        str(options): learned(model, row, **options).logits[0]
        for options in ({}, {"mask_latents": "visibility"}, {"mask_latents": "padding"}, FREE)
    }
    for name, logits in first.items():
        for other, theirs in first.items():
            assert name == other or (logits - theirs).abs().max() > 1e-2, (name, other)
    same(learned(model, row, mask_latents=True), learned(model, row, mask_latents="visibility"))
    stock = copy.deepcopy(tiny_pair(0, 6.0, "qwen2_5_vl", None)[0])
    with torch.no_grad():
        expected = stock(**row).logits[:, -1]
    torch.testing.assert_close(first[str(FREE)], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(learned(model, row, num_latent_steps=0).logits[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ({"force_lvr": False}, {"force_latents": False}),
        ({"force_lvr": True, "mask_lvr": False}, {"force_latents": True, "mask_latents": False}),
        ({"mask_lvr": True}, {"mask_latents": True}),
        ({"mask_lvr": "padding"}, {"mask_latents": "padding"}),
    ],
    ids=str,
)
def test_published_names(
    model: Any, row: dict[str, torch.Tensor], published: dict, ours: dict, caplog: pytest.LogCaptureFixture
) -> None:
    expected = learned(model, row, **ours)
    with caplog.at_level(logging.INFO, logger="modeling_latent.generation_latent"):
        found = learned(model, row, **published)
    same(found, expected)
    assert found.latent_trace.info["options"] == expected.latent_trace.info["options"]
    for theirs, name in zip(published, ours, strict=True):
        assert f"{theirs} is called {name!r} here" in caplog.text


def test_defaults_are_saved_with_the_model(model: Any, row: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """In generation_config.json; an argument of the call wins, `False` included."""
    saved = {"mask_latents": "padding", "num_latent_steps": 3}
    expected, plain, free = (learned(model, row, **each) for each in (saved, {"num_latent_steps": 2}, FREE))
    config = saved_generation_config(model.generation_config, latent_strategy="learned", **saved)
    config.update(eos_token_id=-1, pad_token_id=0)
    model.generation_config = config
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: written[name] for name in saved} == saved and written["latent_strategy"] == "learned"
    loaded = type(model).from_pretrained(tmp_path).eval()
    kwargs = {"max_new_tokens": BUDGET, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    same(loaded.generate(**row, **kwargs), expected)
    same(loaded.generate(**row, **kwargs, mask_latents=False, num_latent_steps=2), plain)
    # A number that is a default is no contradiction to tokens that the model writes itself; hiding them is.
    same(loaded.generate(**row, **kwargs, **FREE, mask_latents=False), free)
    with pytest.raises(ValueError, match="mask_latents='padding' with force_latents=False"):
        loaded.generate(**row, **kwargs, **FREE)


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 1}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str
)
def test_off_writes_no_learned_token(model: Any, row: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    """However much the model would like to; with the strategy it may, and they are text."""
    tokens = model.config.latent_learned_token_ids
    processors = LogitsProcessorList([Prefer(*tokens)])
    start = row["input_ids"].shape[1]
    output = learned(model, row, latent_strategy="off", logits_processor=processors, **options)
    assert not torch.isin(output.sequences[:, start:], torch.tensor(tokens)).any()
    assert not output.latent_trace.latent_mask.any()
    for strategy, count in ((FREE, 0), ({"num_latent_steps": 2}, 2)):
        output = learned(model, row, logits_processor=processors, **strategy, **options)
        assert torch.isin(output.sequences[:, start:], torch.tensor(tokens)).all()
        mask = output.latent_trace.latent_mask
        assert mask.sum() == count and not mask[:, start + count :].any()


# Trace, noise and hook -----------------------------------------------------------------------------------------------


def test_trace(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    tokens = model.config.latent_learned_token_ids
    output = learned(model, inputs, num_latent_steps=[1, 3], latent_topk=2)
    trace = output.latent_trace
    start = trace.prompt_length
    assert trace.slot_index.tolist() == [[0, start - 1], [1, start - 3], [1, start - 2], [1, start - 1]]
    expected = model.get_input_embeddings().weight[[tokens[0], *tokens[:3]]]
    assert torch.equal(trace.slot_inputs, expected)
    assert trace.has_output.all() and trace.topk_ids.shape == trace.topk_probs.shape == (4, 2)
    assert torch.equal(trace.topk_ids[:, 0], trace.readable_ids) and (trace.topk_probs[:, 0] > 0).all()
    assert [(span.row, span.first, span.length, span.reason) for span in trace.spans] == [
        (0, start - 1, 1, "num_latent_steps"),
        (1, start - 3, 3, "num_latent_steps"),
    ]
    # A learned token is what it is in the ids; what it would have said is beside it.
    assert trace.sequences[trace.latent_mask].tolist() == [tokens[0], *tokens[:3]]
    assert trace.info["options"]["force_latents"] is True and trace.info["options"]["mask_latents"] is False
    assert learned(model, inputs, latent_topk=0).latent_trace.topk_ids.shape == (8, 0)


def test_without_a_trace_the_prefill_keeps_one_state(model: Any, row: dict[str, torch.Tensor]) -> None:
    """With one, those at the learned tokens and before the first of them; the ids are the same."""
    kept, found = [], []
    handle = model.register_forward_hook(lambda module, args, output: kept.append(output.logits.shape[1]))
    for returns_dict in (False, True):
        output = learned(model, row, return_dict_in_generate=returns_dict, output_logits=returns_dict)
        found.append(output.sequences if returns_dict else output)
    handle.remove()
    assert torch.equal(*found) and kept == [1] * BUDGET + [5] + [1] * (BUDGET - 1)


def test_what_a_chunk_does_not_keep_is_marked(model: Any, row: dict[str, torch.Tensor]) -> None:
    """The last chunk has two of the four tokens: the others have no output, and are read by their own ids."""
    length, whole = row["input_ids"].shape[1], learned(model, row).latent_trace
    trace = learned(model, row, prefill_chunk_size=length + 2).latent_trace
    assert trace.has_output.tolist() == [False, False, True, True]
    torch.testing.assert_close(trace.slot_outputs[2:], whole.slot_outputs[2:], atol=1e-4, rtol=0)
    own = model.config.latent_learned_token_ids[:3]
    assert trace.readable_ids.tolist() == [*own, int(whole.readable_ids[3])]
    assert (trace.topk_ids[:3] == -1).all() and torch.equal(trace.topk_ids[3], whole.topk_ids[3])
    assert torch.equal(trace.slot_inputs, whole.slot_inputs)


@pytest.mark.parametrize("mask_latents", [False, *MASK_FORMS])
def test_hidden_tokens_change_no_later_row(model: Any, row: dict[str, torch.Tensor], mask_latents: bool | str) -> None:
    """With the answer as it was, other vectors in their place change only the prediction made at the last of them."""
    trace = learned(model, row, mask_latents=mask_latents).latent_trace
    images = {name: row[name] for name in ("pixel_values", "image_grid_thw")}
    torch.manual_seed(0)
    other = trace.replace_slots(trace.slot_inputs + 3 * torch.randn_like(trace.slot_inputs))
    start = trace.prompt_length
    if mask_latents == "padding":
        assert trace.attention_mask.tolist() == [[1] * (start - 4) + [0] * 4]
    before, after = (model.replay(each, **images).logits[0] for each in (trace, other))
    changed = (before - after).abs().amax(dim=-1)
    assert (changed[start - 4 : start] > 1e-2).all() and (changed[: start - 4] < 1e-5).all()
    if mask_latents:
        assert (changed[start:] < 1e-4).all()
    else:
        assert (changed[start:] > 1e-2).all()


def test_hook_sees_one_token_after_the_other(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Of all prompts at once, from the first position at which one has a token; what it returns is fed."""
    tokens, steps = model.config.latent_learned_token_ids, []

    def edit(step: LatentStep) -> torch.Tensor | None:
        steps.append(step)
        return None if len(steps) == 2 else step.latent * 0.5 + step.count[:, None]

    output = learned(model, inputs, num_latent_steps=[1, 3], latent_hook=edit)
    trace, plain = output.latent_trace, learned(model, inputs, num_latent_steps=[1, 3])
    start, table = trace.prompt_length, model.get_input_embeddings().weight
    assert [step.is_slot.tolist() for step in steps] == [[False, True], [False, True], [True, True]]
    assert [int(step.count[1]) for step in steps] == [0, 1, 2] and int(steps[2].count[0]) == 0
    for number, step in enumerate(steps):
        assert torch.equal(step.input_ids, trace.sequences[:, : start - 3 + number])
        assert torch.equal(step.latent[1], table[tokens[number]]) and step.position == start - 3 + number
        torch.testing.assert_close(step.scores, model.head_logits(step.latent))
        assert torch.equal(step.said, step.scores.argmax(-1)) and step.prompt_length == start
    expected = torch.stack([
        table[tokens[0]] * 0.5, table[tokens[0]] * 0.5, table[tokens[1]], table[tokens[2]] * 0.5 + 2
    ])  # fmt: skip
    assert torch.equal(trace.slot_inputs, expected)
    assert (output.logits[0] - plain.logits[0]).abs().amax(dim=-1).min() > 1e-2, "what is returned is fed"
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    logits = model.replay(trace, **images).logits
    decoded = torch.stack(output.logits, dim=1)
    torch.testing.assert_close(logits[:, start - 1 : -1], decoded, atol=1e-4, rtol=1e-4)
    # The same vectors given as an edited trace.
    again = model.replay(plain.latent_trace.replace_slots(expected), **images).logits[:, start - 1]
    torch.testing.assert_close(again, output.logits[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"latent_hook must return \(2, 64\) or None, got \(2, 1\)"):
        learned(model, inputs, latent_hook=lambda step: step.latent[:, :1])


def test_noise_has_the_length_that_is_asked_for(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    plain = learned(model, inputs).latent_trace.slot_inputs
    noisy = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        noisy.append(learned(model, inputs, latent_noise=0.3).latent_trace.slot_inputs)
        ratio = (noisy[-1] - plain).norm(dim=-1) / plain.norm(dim=-1)
        torch.testing.assert_close(ratio, torch.full_like(ratio, 0.3), atol=1e-4, rtol=0)
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])


def test_the_rule_is_there_only_for_tokens_that_are_hidden_by_visibility() -> None:
    mask = torch.tensor([[False, True, False]])
    (rule,) = visibility({"mask_latents": "visibility"}, mask)
    assert torch.equal(rule.keys, mask) and rule.queries.all() and rule.bias == -float("inf")
    for form, latents in (("visibility", None), ("padding", mask), (False, mask)):
        assert visibility({"mask_latents": form}, latents) == []


# What is refused -----------------------------------------------------------------------------------------------------


def do_nothing(step: LatentStep) -> None:
    return None


LEAVE_OUT = "leave force_latents out, or {}"
REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"mask_latents": "fog"}, ("mask_latents='fog' is unknown", "choose False, True or one of ['visibility', 'padd")),
    ({"mask_latents": 1.0}, ("mask_latents=1.0 is unknown", "choose False, True or one of")),
    ({"force_latents": "yes"}, ("force_latents='yes' must be True or False",)),
    ({"force_latents": True, "force_lvr": True}, ("force_latents and force_lvr are one option; give one of them",)),
    ({"mask_latents": True, "mask_lvr": True}, ("mask_latents and mask_lvr are one option",)),
    ({"num_latent_steps": 5}, ("num_latent_steps=5: the model has 4 learned tokens", "ask for as many at most")),
    ({"num_latent_steps": [1, 7]}, ("num_latent_steps=7: the model has 4 learned tokens",)),
    ({"num_latent_steps": [1, 2, 3]}, ("num_latent_steps has 3 entries for 2 prompts", "give one, or one per prompt")),
    ({"num_latent_steps": -1}, ("num_latent_steps=-1 must be at least 0",)),
    ({**FREE, "mask_latents": True}, ("mask_latents='visibility' with force_latents=False", "mask_latents")),
    ({**FREE, "mask_latents": "padding"}, ("mask_latents='padding' with force_latents=False", "mask_latents")),
    ({**FREE, "num_latent_steps": 2}, ("num_latent_steps=2 with force_latents=False", "num_latent_steps")),
    ({**FREE, "latent_noise": 0.1}, ("latent_noise=0.1 with force_latents=False", "latent_noise")),
    ({**FREE, "latent_hook": do_nothing}, ("latent_hook=<function do_nothing", "latent_hook")),
    ({"max_latent_steps": 3}, ("latent_strategy='learned' does not read ['max_latent_steps']", "'mask_latents'")),
    ({"latent_ids": "readable"}, ("latent_strategy='learned' does not read ['latent_ids']",)),
    ({"latent_strategy": "off", "mask_latents": True}, ("latent_strategy='off' does not read ['mask_latents']",)),
    ({"latent_strategy": "fixed", "num_latent_steps": 2}, ("has learned tokens and no slots", "'learned'", "'off'")),
    ({"num_beams": 2, "use_cache": False}, ("beam search over latents needs the cache", "drop use_cache=False")),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_options_that_are_refused(
    model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as refused:
        learned(model, inputs, **options)
    for expected in words:
        assert expected in str(refused.value)
    if options.get("force_latents") is False:
        assert LEAVE_OUT.format(words[-1]) in str(refused.value)


@pytest.mark.parametrize("name", ["position_ids", "latent_embeds", "inputs_embeds"])
def test_inputs_that_are_refused(model: Any, row: dict[str, torch.Tensor], name: str) -> None:
    """They end where the learned tokens would begin. Free decoding takes them."""
    length = row["input_ids"].shape[1]
    values = {
        "position_ids": torch.arange(length).expand(3, 1, -1),
        "latent_embeds": torch.zeros(1, length, 64),
        "inputs_embeds": model.get_input_embeddings()(row["input_ids"]),
    }
    with pytest.raises(ValueError) as refused:
        learned(model, {**row, name: values[name]})
    for words in ("latent_strategy='learned'", "pass input_ids, and leave inputs_embeds, position_ids and latent_emb"):
        assert words in str(refused.value)
    if name == "position_ids":
        assert learned(model, {**row, name: values[name]}, **FREE).sequences.shape[1] == length + BUDGET


def test_a_prompt_that_ends_with_other_learned_tokens(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Not the first in order; more than are asked for; all and one again."""
    tokens = model.config.latent_learned_token_ids
    wrong = ([tokens[1]], [tokens[0], tokens[2]], [tokens[2], tokens[1]], [*tokens, tokens[0]], tokens[::-1])
    for ending, options in (*((each, {}) for each in wrong), (tokens, {"num_latent_steps": 2})):
        for number in range(2):
            endings = [[], []]
            endings[number] = list(ending)
            with pytest.raises(ValueError) as refused:
                learned(model, ending_with(inputs, *endings), **options)
            wanted = tokens[: options.get("num_latent_steps", 4)]
            for words in (
                f"the prompt of row {number} ends with the learned tokens {list(ending)}",
                f"and {wanted} are to be laid out",
                "end it with the first of these, with all, or with none",
            ):
                assert words in str(refused.value)
    learned(model, ending_with(inputs, list(wrong[0]), []), **FREE)  # they are text there


def test_a_model_with_slots_has_no_learned_tokens(row: dict[str, torch.Tensor]) -> None:
    model = copy.deepcopy(tiny_pair(0, 6.0, "qwen2_5_vl", None)[1])
    with pytest.raises(ValueError, match="has slots and no learned tokens; take a strategy of its method.*or 'off'"):
        learned(model, row, latent_strategy="learned")


def test_hiding_by_visibility_needs_dense_masks(model: Any, row: dict[str, torch.Tensor]) -> None:
    config = model.get_decoder().config
    for name in ("flash_attention_2", "flex_attention"):
        config._attn_implementation = name
        with pytest.raises(ValueError, match=f"attn_implementation='{name}' takes no mask by position.*'sdpa' or 'e"):
            learned(model, row, mask_latents="visibility")
    config._attn_implementation = "sdpa"
    learned(model, row, mask_latents="visibility")


# In a process without the library ------------------------------------------------------------------------------------

CALLS: dict[str, dict[str, Any]] = {
    "saved defaults": {},
    "by row": {"num_latent_steps": [1, 3]},
    "hidden": {"mask_latents": True},
    "as padding": {"mask_latents": "padding"},
    "written by the model": FREE,
    "off": {"latent_strategy": "off"},
    "beams": {"num_beams": 2, "mask_latents": True},
}

REMOTE = """
import json
import sys
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

case = json.loads(Path(sys.argv[1]).read_text())
processor = AutoProcessor.from_pretrained(case["folder"], trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(case["folder"], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
text = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in case["chats"]]
images = [[Image.open(file)] for file in case["images"]]
inputs = processor(text=text, images=images, padding=True, padding_side="left", return_tensors="pt")
report = {"input_ids": inputs["input_ids"].tolist(), "tokens": processor.latent_learned_token_ids}
for name, options in case["calls"].items():
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, **options)
    report[name] = [output.sequences.tolist(), output.latent_trace.slot_outputs.double().sum(-1).tolist()]
output.latent_trace.save(case["trace"])
assert not {"modeling_latent", "trainers", "evaluation"} & {name for name, module in sys.modules.items() if module}
print(json.dumps(report))
"""


def test_remote_code_decodes_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model, processor = convert_stock_checkpoint(save_tiny_stock_checkpoint(tmp_path / "stock"), method="lavit")
    liven(model, 6.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    chats, files = [], []
    for number, question in enumerate(("What is it?", "Is the path safe? Answer with the option's letter.")):
        chats.append([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}])
        files.append(str(tmp_path / f"{number}.png"))
        tiny_images(2)[number].save(files[-1])
    text = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    inputs = processor(
        text=text,
        images=[[image] for image in tiny_images(2)],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    expected, options = {}, {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    for name, call in CALLS.items():
        output = model.generate(**inputs, **options, **call)
        expected[name] = [output.sequences.tolist(), output.latent_trace.slot_outputs.double().sum(-1)]
    written = {json.dumps(ids) for ids, _ in expected.values()}
    assert len(written) >= len(CALLS) - 1, "the ways decode different ids, so that equality below says something"
    trace_file = tmp_path / "trace.safetensors"
    case = {"folder": str(folder), "chats": chats, "images": files, "calls": CALLS, "trace": str(trace_file)}
    (tmp_path / "case.json").write_text(json.dumps(case))
    (tmp_path / "elsewhere").mkdir()
    environment = {"PYTHONPATH": "", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    printed = run_python(
        REMOTE,
        str(tmp_path / "case.json"),
        blocked=("modeling_latent", "trainers", "evaluation"),
        env=environment,
        cwd=tmp_path / "elsewhere",
    )
    report = json.loads(printed.splitlines()[-1])
    assert report["input_ids"] == inputs["input_ids"].tolist()
    assert report["tokens"] == model.config.latent_learned_token_ids
    for name, (ids, sums) in expected.items():
        assert report[name][0] == ids, name
        torch.testing.assert_close(torch.tensor(report[name][1], dtype=sums.dtype), sums, atol=1e-3, rtol=0)
    assert torch.equal(LatentTrace.load(trace_file).sequences, output.sequences)
