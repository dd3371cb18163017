"""What the search refuses in `generate`, and how it says so: row, value and remedy."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from modeling_latent.search_generate import generate_with_search, search_decoding
from tests.latent import tiny_pair
from tests.naive_search import padded, prompts

WALK = {"max_num_steps": 2, "sigma": 0.3, "lr": 0.05, "max_new_tokens": 2, "do_sample": False, "eos_token_id": -1}
Given = tuple[dict[str, Any], torch.BoolTensor]


def search(way: str, model: Any, **arguments: Any) -> Any:
    arguments = {**WALK, **arguments}
    if way == "strategy":
        return model.generate(latent_strategy="search", **arguments)
    if way == "loop":
        return model.generate(custom_generate=search_decoding, **arguments)
    return generate_with_search(model, **arguments)


def refused(family: str, arguments: dict[str, Any], words: str, ways: tuple[str, ...]) -> None:
    for way in ways:
        with pytest.raises(ValueError, match=words):
            search(way, tiny_pair(0, 6.0, family)[way == "strategy"], **arguments)


# Masks of thought tokens ---------------------------------------------------------------------------------------------


def moved(mask: torch.Tensor, row: int, *places: int) -> torch.BoolTensor:
    """Other thought tokens in a row."""
    changed = mask.clone()
    changed[row] = False
    changed[row, list(places)] = True
    return changed


MASKS: list[tuple[Callable[[Given], dict[str, Any]], str]] = [
    (
        lambda given: {"thought_mask": given[1][:, 1:]},
        r"thought_mask \(3, 55\) must have the shape of input_ids \(3",
    ),
    (
        lambda given: {"thought_mask": moved(given[1], 1)},
        "thought_mask has no thought token in row 1; mark where",
    ),
    (
        lambda given: {"thought_mask": moved(given[1], 2, 40, 42)},
        "thought tokens of row 2 are not side by side",
    ),
    (
        lambda given: {"thought_mask": moved(given[1], 1, 40, 41)},
        "row 1 has 2 thought tokens, row 0 has 3; a batch",
    ),
    (
        lambda given: {"thought_mask": moved(given[1], 1, 0, 1, 2)},
        "row 1 begins with its thought tokens; put the",
    ),
    (lambda given: {"thought_mask": moved(given[1], 0, 10, 11, 12)}, "row 0 begins with its thought tokens; put the"),
    (
        lambda given: {"thought_mask": moved(given[1], 0, 8, 9, 10)},
        "row 0 has thought tokens where attention_mask is",
    ),
    (lambda given: {"thought_mask": moved(given[1], 1, 3, 4, 5)}, "row 1 has an image behind its thought tokens; put"),
    (
        lambda given: {"thought_mask": given[1], "num_thought_tokens": 2},
        r"num_thought_tokens=2, and thought_mask marks \[3\]; leave num_thought_tokens out, or mark as many",
    ),
    (
        lambda given: {"thought_mask": given[1], "thought_token_id": 5},
        "thought_token_id=5 with thought_mask, which marks tokens that are there; leave one of them out",
    ),
    (
        lambda given: {"thought_mask": moved(given[1], 2, 53, 54, 55), "reward": "answer_entropy"},
        r"row 2 ends with its thought tokens, and reward_rows='answer' reads what.*take.*reward_rows='thoughts'",
    ),
    (
        lambda given: {"mode": "reference", "num_thought_tokens": 2},
        "row 0 ends with its thought tokens, and reward_rows='thoughts_and_end' reads",
    ),
]


@pytest.mark.parametrize(("change", "words"), MASKS, ids=lambda value: str(value)[:50])
def test_thought_tokens(change: Callable[[Given], dict[str, Any]], words: str) -> None:
    inputs, mask = prompts("qwen2_5_vl")
    assert inputs["attention_mask"].sum(1).tolist() == [46, 56, 49]
    refused("qwen2_5_vl", {**inputs, **change((inputs, mask))}, words, ("function", "loop", "strategy"))


# Inputs --------------------------------------------------------------------------------------------------------------


def test_inputs() -> None:
    inputs, mask = prompts("llama")
    ways = ("function", "strategy")
    embeds = tiny_pair(0, 6.0, "llama")[0].get_input_embeddings()(inputs["input_ids"]).detach()
    cache = DynamicCache()
    cache.update(torch.zeros(3, 2, 4, 16), torch.zeros(3, 2, 4, 16), 0)
    positions = torch.arange(mask.shape[1]).expand(3, -1)
    for others, words in (
        ({"inputs_embeds": embeds}, r"lays its thought tokens out in input_ids; .*leave \['inputs_embeds'\] out"),
        ({"position_ids": positions}, r"lays its thought tokens out in input_ids.*leave \['position_ids'\] out"),
        ({"latent_embeds": embeds, "latent_mask": mask}, r"leave \['latent_embeds', 'latent_mask'\] out"),
        ({"past_key_values": cache}, "makes the cache of the prompt itself; leave past_key_values out"),
    ):
        refused("llama", {**inputs, "thought_mask": mask, **others}, words, ways)
    refused("llama", {"inputs_embeds": embeds}, "pass input_ids, and leave", ways)
    kinds = {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
    refused("llama", {**inputs, **kinds}, r"does not know how to run \['token_type_ids'\]; it takes", ways[:1])
    right = padded([[5, 6, 7], [8, 9]], left=False)
    refused("llama", right, r"rows \[1\] are padded on the right; pad prompts on the left, or pass thought_mask", ways)
    for way in ways:  # an empty cache is none
        search(way, tiny_pair(0, 6.0, "llama")[way == "strategy"], **inputs, past_key_values=DynamicCache())


def test_a_token_to_lay_out() -> None:
    inputs, _ = prompts("gpt2")
    model = copy.deepcopy(tiny_pair(0, 6.0, "gpt2")[0])
    rows = model.get_input_embeddings().weight.shape[0]
    with pytest.raises(ValueError, match=f"thought_token_id={rows} is no token of the model.*has {rows} rows"):
        search("function", model, **inputs, thought_token_id=rows)
    model.generation_config.pad_token_id = None
    with pytest.raises(ValueError, match="the model has no padding token to lay thought tokens out with; pass"):
        search("function", model, **inputs)
    search("function", model, **inputs, thought_token_id=rows - 1)


def test_rows_without_an_image() -> None:
    inputs, mask = prompts("qwen2_5_vl", (1, 0, 1))
    words = "row 1 has no image, and step 1 interleaves image tokens; set visual_injection_start_step to 2 or more"
    options = {**inputs, "thought_mask": mask}
    ways = ("function", "loop", "strategy")
    refused("qwen2_5_vl", {**options, "mode": "reference", "visual_injection_start_step": 1}, words, ways)
    refused("qwen2_5_vl", {**options, "visual_only": True}, "visual_only=True: row 1 has no image; leave", ways)
    for way in ways:
        model = tiny_pair(0, 6.0)[way == "strategy"]
        search(way, model, **options, mode="reference", visual_injection_start_step=2)
        search(way, model, **options, mode="reference", visual_injection_start_step=0, max_num_steps=0)


# Rewards and noise ---------------------------------------------------------------------------------------------------


def test_rewards_and_noise() -> None:
    inputs, mask = prompts("llama")
    options, ways = {**inputs, "thought_mask": mask}, ("function", "loop", "strategy")
    for reward, found in (
        (lambda logits: logits.mean(), r"\(\) for 3 candidates"),
        (lambda logits: logits.mean(-1), r"\(3, 3\) for 3 candidates"),
        (lambda logits: [0.0] * 3, "list for 3 candidates"),
    ):
        refused("llama", {**options, "reward": reward}, rf"the reward returned {found}; return one number each", ways)
    for value in (float("nan"), float("inf")):
        bad = {"reward": lambda logits, value=value: torch.tensor([0.0, value, 0.0])}
        refused("llama", {**options, **bad}, rf"step 0, row 1: the reward is \[{value}\], and no step", ways)
    model = copy.deepcopy(tiny_pair(0, 6.0, "llama")[0])
    with torch.no_grad():
        model.get_input_embeddings().weight[inputs["input_ids"][mask]] = 0
    with pytest.raises(ValueError, match=r"relative_sigma=True: the thought tokens of rows \[0, 1, 2\] begin at zero"):
        search("function", model, **options, relative_sigma=True)
    refused("llama", {**options, "seed": [1, 2]}, "seed has 2 entries for 3 prompts; give one, or one", ways)
    refused("llama", {**options, "sigma": -1.0}, "sigma=-1.0 must be a number above 0", ways)


# Models and ways to decode -------------------------------------------------------------------------------------------


def test_models() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1}
    mamba = MambaForCausalLM(MambaConfig(**sizes, state_size=4)).eval()
    t5 = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    for model in (mamba, T5ForConditionalGeneration(t5).eval()):
        words = f"{type(model).__name__} has no cache of keys and values that a step could be cut off again"
        with pytest.raises(ValueError, match=words):
            search("function", model, input_ids=torch.tensor([[5, 6, 7]]), thought_token_id=1)
    inputs, mask = prompts("llama")
    for way in ("function", "strategy"):
        model = copy.deepcopy(tiny_pair(0, 6.0, "llama")[way == "strategy"]).train()
        with pytest.raises(ValueError, match=r"runs on a model in evaluation mode; call model.eval\(\) first"):
            search(way, model, **inputs, thought_mask=mask)
    with pytest.raises(ValueError, match="search_decoding is for stock models; pass latent_strategy='search' instead"):
        search("loop", tiny_pair(0, 6.0, "llama")[1], **inputs, thought_mask=mask)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"use_cache": False}, "use_cache=False: the search keeps the prompt in a cache; leave use_cache out"),
        ({"cache_implementation": "static"}, "cache_implementation='static': the answer goes on in the cache of the"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'.*leave cache_implementation out"),
        (
            {"prefill_chunk_size": 4},
            "prefill_chunk_size=4: the search runs the prompt itself, in one piece; leave",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llama"])
def test_caches(family: str, option: dict[str, Any], words: str) -> None:
    """Also as saved settings of the model."""
    inputs, mask = prompts(family)
    arguments = {**inputs, "thought_mask": mask}
    refused(family, {**arguments, **option}, words, ("function", "loop", "strategy"))
    for way in ("function", "strategy"):
        model = copy.deepcopy(tiny_pair(0, 6.0, family)[way == "strategy"])
        model.generation_config.update(**option)
        with pytest.raises(ValueError, match=words):
            search(way, model, **arguments)


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_several_sequences_in_a_loop(option: dict[str, Any]) -> None:
    inputs, mask = prompts("llama")
    (name,) = (name for name in option if name.startswith("num_"))
    words = rf"{name}=2 with custom_generate=search_decoding.*call generate_with_search\(...\) instead"
    refused("llama", {**inputs, "thought_mask": mask, **option}, words, ("loop",))


def test_options_of_other_strategies() -> None:
    inputs, _ = prompts("llama")
    model = tiny_pair(0, 6.0, "llama")[1]
    for name, value in (("latent_noise", 0.1), ("num_latent_steps", 2), ("latent_ids", "readable")):
        with pytest.raises(ValueError, match=rf"latent_strategy='search' does not read \['{name}'\]; its options are"):
            model.generate(**inputs, latent_strategy="search", **{name: value})
    with pytest.raises(ValueError, match=r"latent_strategy='off' does not read \['sigma'\]"):
        model.generate(**inputs, latent_strategy="off", sigma=0.1)
