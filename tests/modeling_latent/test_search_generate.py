"""The search in `generate`: as the strategy of latent models, as a function and as a decoding loop of stock ones, with
every way to decode; trace, saved options, and what is refused."""

import copy
import json
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, TextIteratorStreamer

from modeling_latent import LatentTrace
from modeling_latent.generation_latent import saved_generation_config
from modeling_latent.search_generate import generate_with_search, search_decoding
from tests.latent import ScriptProcessor, eager_assistant, tiny_pair
from tests.naive_search import prompts
from tests.tiny import CHAMELEON, FAMILIES, TEXT_FAMILIES, tiny_processor

WALK = {"max_num_steps": 3, "sigma": 0.3, "lr": 0.05}
FEW = {"num_selected_patches": 4, "initial_patch_count": 1, "patch_increment": 1}
NEW = 5
ENDS = {"eos_token_id": -1, "pad_token_id": 0}
PLAIN = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
WAYS = ("function", "loop", "strategy")


def call(way: str, family: str, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    """A search and its answer by one of three ways."""
    stock, latent = tiny_pair(0, 6.0, family)
    options = {**ENDS, **PLAIN, **WALK, **options}
    if way == "function":
        return generate_with_search(stock, **inputs, **options)
    if way == "loop":
        return stock.generate(**inputs, custom_generate=search_decoding, **options)
    return latent.generate(**inputs, latent_strategy="search", **options)


def written(output: Any, prompt: int) -> torch.Tensor:
    """`(B, n)` what was generated; of prompts that grew by as much as the first row's."""
    return output.sequences[:, prompt:]


def same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


def whole_prompts(family: str, output: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    """The answer of a latent model without the search: the prompts with the vectors that were found, run whole."""
    trace, latent = output.latent_trace, tiny_pair(0, 6.0, family)[1]
    start, rows = trace.prompt_length, len(inputs["input_ids"])
    step = len(trace) // rows
    ids = trace.sequences[::step, :start]
    given: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids) if trace.attention_mask is None else trace.attention_mask[::step],
        "latent_embeds": trace.latent_embeds[::step, :start],
        "latent_mask": trace.latent_mask[::step, :start],
    }
    given |= {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    if "mm_token_type_ids" in inputs:
        given["mm_token_type_ids"] = (ids == latent.config.image_token_id).long()
    return latent.generate(**given, latent_strategy="off", **{**ENDS, **PLAIN, **options})


# Ways to call it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["paper", "reference"])
@pytest.mark.parametrize("family", [*FAMILIES, CHAMELEON, *TEXT_FAMILIES])
def test_every_way_is_the_same_search(family: str, mode: str) -> None:
    """With thought tokens that stand in the prompt (the search against the naive one: `test_search_latent.py`)."""
    inputs, mask = prompts(family)
    options = {"mode": mode, **FEW, "thought_mask": mask}
    if family in TEXT_FAMILIES and mode == "reference":
        options["visual_injection_start_step"] = 3
    expected = call("function", family, inputs, **options)
    for way in ("loop", "strategy"):
        found = call(way, family, inputs, **options)
        same(found, expected)
        assert found.search.best_step == expected.search.best_step
        assert found.search.patches == expected.search.patches
        torch.testing.assert_close(found.search.thoughts, expected.search.thoughts, atol=2e-5, rtol=0)
    stock, latent = tiny_pair(0, 6.0, family)
    # The function, given a latent model, is its strategy; ids may come first, as in `generate`.
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    for model in (stock, latent):
        same(generate_with_search(model, inputs["input_ids"], **others, **ENDS, **PLAIN, **WALK, **options), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", CHAMELEON, "gpt2"])
def test_thought_tokens_behind_the_prompt(family: str, way: str) -> None:
    """Laid out, with the padding token in a stock model and the latent token in ours, or with a token of choice."""
    processor = tiny_processor(family)
    inputs, mask = prompts(family)
    slot = (
        processor.latent_token_id if way == "strategy" else tiny_pair(0, 6.0, family)[0].generation_config.pad_token_id
    )
    slot = 0 if slot is None else slot
    given = {} if family != "gpt2" or way == "strategy" else {"thought_token_id": slot}
    for options, token in ((given, slot), ({"thought_token_id": 40}, 40)):
        found = call(way, family, inputs, num_thought_tokens=2, **FEW, **options)
        grown = {name: value.clone() for name, value in inputs.items()}
        for name, value in (("input_ids", token), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in grown:
                grown[name] = torch.nn.functional.pad(grown[name], (0, 2), value=value)
        behind = torch.nn.functional.pad(torch.zeros_like(mask), (0, 2), value=True)
        same(found, call(way, family, grown, thought_mask=behind, **FEW))
        assert found.search.initial.shape == (3, 2, 64)
        table = tiny_pair(0, 6.0, family)[0].get_input_embeddings().weight
        assert torch.equal(found.search.initial, table[token].expand(3, 2, -1))


def test_prompts_are_as_they_were() -> None:
    inputs, mask = prompts("qwen2_5_vl")
    before = {name: value.clone() for name, value in inputs.items()}
    for way in WAYS:
        call(way, "qwen2_5_vl", inputs, num_thought_tokens=2)
        call(way, "qwen2_5_vl", inputs, thought_mask=mask)
    assert all(torch.equal(inputs[name], before[name]) for name in before)


# Ways to decode ------------------------------------------------------------------------------------------------------

DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "returned sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "returned beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "no repetition": {"no_repeat_ngram_size": 2, "min_new_tokens": 3},
}


@pytest.mark.parametrize("name", list(DECODINGS))
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", CHAMELEON, "llama"])
def test_decoding(family: str, name: str) -> None:
    """From the cache of the search as from whole prompts, by latent and stock models."""
    inputs, mask = prompts(family)
    config, outputs = tiny_pair(0, 6.0, family)[1].config, {}
    # A latent model says no id that would be read as a latent; here the stock model does not either.
    options = {**DECODINGS[name], "suppress_tokens": [config.latent_token_id, config.latent_start_token_id]}
    for way in ("strategy", "function"):
        torch.manual_seed(1)
        outputs[way] = call(way, family, inputs, **FEW, thought_mask=mask, **options)
    torch.manual_seed(1)
    expected = whole_prompts(family, outputs["strategy"], inputs, **options)
    for found in outputs.values():
        same(found, expected)
    if "num_return_sequences" in DECODINGS[name]:
        assert len(expected.sequences) == 6 and len(outputs["function"].search.best_reward) == 3


@pytest.mark.parametrize("name", ["greedy", "sampling", "no repetition"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llama"])
def test_decoding_in_a_loop_of_the_stock_model(family: str, name: str) -> None:
    inputs, mask = prompts(family)
    outputs = []
    for way in ("loop", "function"):
        torch.manual_seed(1)
        outputs.append(call(way, family, inputs, **FEW, thought_mask=mask, **DECODINGS[name]))
    same(*outputs)


@pytest.mark.parametrize("way", WAYS)
def test_ends_and_budgets(way: str) -> None:
    """Thought and image tokens are of the prompt: they cost no new token, and processors that count from the prompt
    begin behind them. Every id that ends a row does."""
    inputs, mask = prompts("qwen2_5_vl", (1,))
    options = {**FEW, "thought_mask": mask}
    plain = call(way, "qwen2_5_vl", inputs, **options)
    start = plain.sequences.shape[1] - NEW
    assert start > inputs["input_ids"].shape[1]
    answer = plain.sequences[0, start:].tolist()
    for at in (1, 3):
        ends = [answer[at], 1] if answer[at] not in answer[:at] else None
        if ends is not None:
            found = call(way, "qwen2_5_vl", inputs, **options, eos_token_id=ends)
            assert found.sequences[0, start:].tolist() == answer[: at + 1]
    first = answer[0]
    least = call(way, "qwen2_5_vl", inputs, **options, eos_token_id=[first, 1], min_new_tokens=3)
    text = least.sequences[0, start:].tolist()
    assert not {first, 1} & set(text[:3]) and len(text) >= 3
    assert written(call(way, "qwen2_5_vl", inputs, **options, max_new_tokens=2), start).shape[1] == 2


@pytest.mark.parametrize("way", WAYS)
def test_repetition_penalty(way: str) -> None:
    """Of what is generated alone in reference mode, as the published code has no ids of the prompt; else of both."""
    inputs, mask = prompts("llama", (0,))
    start = mask.shape[1]
    stock = tiny_pair(0, 6.0, "llama")[0]
    for mode in ("paper", "reference"):
        options = {"mode": mode, "visual_injection_start_step": 3, "thought_mask": mask}
        found = call(way, "llama", inputs, **options, repetition_penalty=3.0, output_scores=True)
        assert written(found, start).shape[1] == NEW
        for step in range(NEW):
            seen = found.sequences[0, start if mode == "reference" else 0 : start + step].unique()
            logits = found.logits[step][0].clone()
            logits[seen] = torch.where(logits[seen] < 0, logits[seen] * 3.0, logits[seen] / 3.0)
            said = found.scores[step][0]
            kept = said > -1e30  # a latent model never says an id that would be read as a latent
            torch.testing.assert_close(said[kept], logits[kept])
    assert stock.generation_config.repetition_penalty in (None, 1.0)


@pytest.mark.parametrize("way", ["function", "strategy"])
def test_streamer(way: str) -> None:
    """The prompt with its thought tokens first, as ids, then the answer, id by id."""
    inputs, mask = prompts("llama", (0,))
    tokenizer = tiny_processor("llama").tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    found: list[Any] = []
    thread = Thread(target=lambda: found.append(call(way, "llama", inputs, thought_mask=mask, streamer=streamer)))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(written(found[0], mask.shape[1])[0]) and text


@pytest.mark.parametrize("way", WAYS)
def test_without_a_dictionary(way: str) -> None:
    inputs, mask = prompts("qwen2_5_vl")
    found = call(way, "qwen2_5_vl", inputs, thought_mask=mask, return_dict_in_generate=False, output_logits=False)
    assert torch.equal(found, call(way, "qwen2_5_vl", inputs, thought_mask=mask).sequences)


@pytest.mark.parametrize("drafts", ["prompt lookup", "assistant"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llama"])
def test_assisted_decoding(family: str, drafts: str) -> None:
    """A latent model checks drafts behind thought tokens, at the end of a prompt or before it."""
    inputs, mask = prompts(family, (1,))
    stock, model = tiny_pair(0, 6.0, family)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    known = int(inputs["input_ids"][0, 1])  # of the prompt, so that there is something to look up
    if drafts == "assistant":
        options = {"assistant_model": eager_assistant(copy.deepcopy(stock))}
    checked: list[int] = []

    def note(module: Any, args: tuple, kwargs: dict) -> None:
        if isinstance(kwargs.get("logits_to_keep"), int):
            checked.append(kwargs["logits_to_keep"] - 1)

    for layout in ({"thought_mask": mask}, {"num_thought_tokens": 2}):
        start = call("strategy", family, inputs, **FEW, **layout).latent_trace.prompt_length
        processors = LogitsProcessorList([ScriptProcessor([{1: known, 4: known}], start)])
        common = {**FEW, **layout, "max_new_tokens": 16, "logits_processor": processors}
        expected = call("strategy", family, inputs, **common)
        checked.clear()
        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        found = call("strategy", family, inputs, **common, **options)
        handle.remove()
        assert torch.equal(found.sequences, expected.sequences)
        assert max(checked) >= (3 if drafts == "assistant" else 1), "drafts were checked"
    words = (
        "assisted decoding .*assistant_model, prompt_lookup_num_tokens.* in a stock model; leave it out, or convert"
    )
    with pytest.raises(ValueError, match=words):
        call("function", family, inputs, thought_mask=mask, **options)
    if drafts == "prompt lookup":
        with pytest.raises(ValueError, match=words):
            call("loop", family, inputs, thought_mask=mask, **options)


# Trace and saved options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["paper", "reference"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", CHAMELEON, "llama"])
def test_trace_and_replay(family: str, mode: str, tmp_path: Path) -> None:
    inputs, mask = prompts(family)
    options = {"mode": mode, **FEW, "thought_mask": mask, "visual_injection_start_step": 3 * (family == "llama")}
    output = call("strategy", family, inputs, **options, reward=largest_share)
    trace, found = output.latent_trace, output.search
    start = trace.prompt_length
    copies = [sum(map(len, each.values())) if mode == "paper" else 0 for each in found.patches]
    assert trace.num_latent_steps.tolist() == [3 + each for each in copies]
    assert not trace.latent_mask[:, start:].any() and trace.info["strategy"] == "search"
    assert trace.info["options"]["sigma"] == WALK["sigma"] and trace.info["options"]["reward"] == "largest_share"
    for row in range(3):
        vectors = trace.latent_embeds[row, trace.latent_mask[row]]
        block = [0]
        for offset in range(2):
            block.append(block[-1] + 1 + (len(found.patches[row].get(offset, [])) if mode == "paper" else 0))
        torch.testing.assert_close(vectors[block], found.thoughts[row])
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    if "mm_token_type_ids" in inputs:
        images["mm_token_type_ids"] = (trace.sequences == tiny_pair(0, 6.0, family)[1].config.image_token_id).long()
    trace.save(tmp_path / "trace.safetensors")
    for each in (trace, LatentTrace.load(tmp_path / "trace.safetensors")):
        logits = tiny_pair(0, 6.0, family)[1].replay(each, **images).logits
        decoded = torch.stack(output.logits, dim=1)
        torch.testing.assert_close(logits[:, start - 1 : -1], decoded, atol=1e-4, rtol=1e-4)


def largest_share(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1).amax(-1).mean(-1)


def test_defaults_are_saved_with_the_model(tmp_path: Path) -> None:
    """In generation_config.json; an argument of the call wins, `False` and 0 included."""
    inputs, mask = prompts("qwen2_5_vl")
    saved = {"num_thought_tokens": 2, "sigma": 0.3, "max_num_steps": 2, "inject_in_decode": False,
             "reward": "published_confidence", "reward_rows": "thoughts"}  # fmt: skip
    model = copy.deepcopy(tiny_pair(0, 6.0)[1])
    config = saved_generation_config(model.generation_config, latent_strategy="search", **saved)
    config.update(eos_token_id=-1)
    model.generation_config = config
    model.save_pretrained(tmp_path)
    written_config = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: written_config[name] for name in saved} == saved and written_config["latent_strategy"] == "search"
    loaded = type(model).from_pretrained(tmp_path).eval()
    walk = {"lr": WALK["lr"]}
    same(loaded.generate(**inputs, **PLAIN, **walk), call("strategy", "qwen2_5_vl", inputs, **saved))
    changed = {"inject_in_decode": True, "max_num_steps": 0, "reward": "confidence"}
    expected = call("strategy", "qwen2_5_vl", inputs, **{**saved, **changed})
    same(loaded.generate(**inputs, **PLAIN, **walk, **changed), expected)
    # A mask of thought tokens wins over the saved number of them; one that is given beside it does not agree.
    loaded.generation_config.thought_token_id = 40
    found = loaded.generate(**inputs, **PLAIN, **walk, thought_mask=mask)
    expected = call("strategy", "qwen2_5_vl", inputs, **{**saved, "num_thought_tokens": 3}, thought_mask=mask)
    same(found, expected)
    with pytest.raises(ValueError, match=r"num_thought_tokens=2, and thought_mask marks \[3\]"):
        loaded.generate(**inputs, **PLAIN, thought_mask=mask, num_thought_tokens=2)
    off = loaded.generate(**inputs, **PLAIN, latent_strategy="off")
    assert off.sequences.shape[1] == mask.shape[1] + NEW and "search" not in off
    for name in ("thought_mask", "seed"):
        with pytest.raises(ValueError, match=f"'{name}' is no option that can be saved"):
            saved_generation_config(model.generation_config, latent_strategy="search", **{name: 1})
    with pytest.raises(ValueError, match="sigma=-1 must be a number above 0"):
        saved_generation_config(model.generation_config, latent_strategy="search", sigma=-1)
