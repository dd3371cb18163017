"""The search over thought tokens: whole published loops, replayed in reference mode; rewards and their gradients.

Each loop is one search of the library, with the set's noise, on the cache of its prefix: rewards, thought tokens,
selections, budgets, fed blocks and the decoded answer are those of the published code, which runs every prompt whole.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, GenerationConfig

from modeling_latent.search_latent import LatentSearch, SearchResult, SearchTrace
from modeling_latent.search_options import search_settings
from modeling_latent.search_rewards import published_confidence
from modeling_latent.search_strategy import generate_with_search
from tests.golden.conftest import each, golden_dir, golden_json

FOLDER = golden_dir("dmlr")
META: dict[str, Any] = golden_json(FOLDER, "loop_meta.json", {})
REWARDS: dict[str, Any] = golden_json(FOLDER, "reward_init_meta.json", {}).get("reward", {})
TOLERANCE: dict[str, Any] = golden_json(FOLDER, "manifest.json", {}).get("tolerance", {})
LOOPS = [name for name, case in META.items() if "hyper" in case]
GRADIENTS = [name for name in META if name.startswith("confidence_grad")]
STEPPED = [name for name in LOOPS if META[name]["hyper"].get("max_rl_steps")]
OURS = {"max_rl_steps": "max_num_steps", "top_k": "reward_top_k"}
NOT_OURS = ("data_name", "max_new_tokens", "verbose", "save_reward_csv")


@cache
def tensors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "loop.safetensors")


@cache
def model(attention: str = "sdpa") -> Any:
    return AutoModelForImageTextToText.from_pretrained(
        FOLDER / "model", dtype=torch.float32, attn_implementation=attention
    ).eval()


def prompt(name: str) -> dict[str, torch.Tensor]:
    """Inputs of the forward."""
    ids, image = tensors()[f"{name}/input_ids"].long().unsqueeze(0), META[name].get("image")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if image:
        inputs["pixel_values"] = tensors()[f"image_{image}/pixel_values"]
        inputs["image_grid_thw"] = tensors()[f"image_{image}/grid_thw"].long().view(1, 3)
        inputs["mm_token_type_ids"] = (ids == model().config.image_token_id).long()
    return inputs


def thought_mask(name: str, ids: torch.Tensor) -> torch.Tensor:
    places, (start, stop) = torch.arange(ids.shape[1]), META[name]["thought_idx"]
    return ((places >= start) & (places < stop)).unsqueeze(0)


def options(name: str) -> dict[str, Any]:
    hyper = {key: value for key, value in META[name]["hyper"].items() if key not in NOT_OURS}
    found = {OURS.get(key, key): value for key, value in hyper.items()}
    return {**found, "mode": "reference", "seed": META[name].get("noise_seed", 0)}


@cache
def search(name: str, attention: str = "sdpa") -> tuple[LatentSearch, SearchResult, SearchTrace]:
    inputs, trace = prompt(name), SearchTrace()
    with torch.no_grad():
        loop = LatentSearch(
            model(attention), inputs, thought_mask(name, inputs["input_ids"]), search_settings(**options(name))
        )
        return loop, loop.run(trace), trace


def close(actual: torch.Tensor, expected: torch.Tensor, kind: str) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[kind], rtol=0)


@each("name", LOOPS)
def test_where_a_loop_begins(name: str) -> None:
    _, result, _ = search(name)
    close(result.initial[0], tensors()[f"{name}/init_thought"], "init")


@each("name", STEPPED)
def test_noise_thoughts_and_rewards(name: str) -> None:
    _, result, trace = search(name)
    stored = {key: tensors()[f"{name}/{key}"] for key in ("epsilon", "thought_before", "candidate", "thought_after")}
    steps = len(stored["epsilon"])
    assert len(trace.rewards) == steps
    assert torch.equal(torch.stack(trace.noise)[:, 0, 0], stored["epsilon"])
    close(torch.stack(trace.before)[:, 0], stored["thought_before"], "thought_rows")
    close(torch.stack(trace.candidate)[:, 0, 0], stored["candidate"], "thought_rows")
    close(torch.stack(trace.after)[:, 0], stored["thought_after"], "thought_rows")
    close(torch.stack(trace.rewards)[:, 0, 0], tensors()[f"{name}/reward"], "reward")
    by_position = torch.stack([published_confidence(each[0, 0].unsqueeze(1), _top_k(name)) for each in trace.logits])
    close(by_position, tensors()[f"{name}/position_confidence"], "position_confidence")
    close(result.thoughts[0], tensors()[f"{name}/best_thought"], "thought_rows")
    assert result.best_reward[0] == pytest.approx(META[name]["best_reward"], abs=TOLERANCE["reward"])
    assert result.best_step[0] == META[name]["best_reward_step"]


def _top_k(name: str) -> int:
    return META[name]["hyper"].get("top_k", 10)


@each("name", STEPPED)
def test_the_closed_form(name: str) -> None:
    """Without a gradient the walk is along the drawn noise; the reward sets lengths alone."""
    _, result, trace = search(name)
    hyper = META[name]["hyper"]
    expected = result.initial[0].clone()
    for step in range(result.best_step[0] + 1 if not hyper["use_auto_grad"] else 0):
        sigma = hyper["sigma"] * hyper["sigma_decay"] ** step
        expected += hyper["lr"] * trace.rewards[step][0, 0] * trace.noise[step][0, 0] / sigma**2
    close(result.thoughts[0], expected, "thought_rows")


@each("name", STEPPED)
def test_selections_budgets_and_what_is_fed(name: str) -> None:
    loop, result, trace = search(name)
    case = META[name]
    for step, row in enumerate(case.get("csv_rows", [])):
        found = result.steps[0][step]
        assert found.step == int(row["step"])
        assert found.reward == pytest.approx(float(row["reward"]), abs=TOLERANCE["reward"])
        assert found.sigma == pytest.approx(float(row["sigma"]), rel=1e-6)
        assert (int(found.is_new_best), found.patch_count, found.patch_budget) == tuple(
            int(row[key]) for key in ("is_new_best", "patch_count", "patch_budget")
        )
    for step, selected in enumerate(case.get("selected_abs", [])):
        expected = {int(offset): places for offset, places in (selected or {}).items()}
        assert {offset: places for offset, places in trace.selections[step][0][0].items() if places} == {
            offset: places for offset, places in expected.items() if places
        }
    fed = tensors()[f"{name}/region_src_fed"]
    for step, codes in enumerate(fed.tolist()):
        assert trace.blocks[step][0][0] == [code for code in codes if code != -99]
    attention = tensors().get(f"{name}/attn_to_image")
    if attention is not None:
        columns = loop.image_positions(0)
        for step, found in enumerate(trace.attention):
            if found is None:
                assert not attention[step].any()
            else:
                close(found[0, 0][:, columns], attention[step], "attention")
        hidden = tensors()[f"{name}/hidden_image_rows"]
        if trace.attention and any(each is not None for each in trace.attention):
            close(loop.with_image.hidden[0, columns], hidden, "hidden_image_rows")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@each("name", LOOPS)
def test_the_answer(name: str, attention: str) -> None:
    stored, case = tensors()[f"{name}/output_ids"].tolist(), META[name]
    base = model(attention).generation_config.to_dict()
    config = GenerationConfig(**{**base, **case.get("generation_config_overrides", {})})
    inputs = prompt(name)
    output = generate_with_search(
        model(attention),
        **inputs,
        **options(name),
        thought_mask=thought_mask(name, inputs["input_ids"]),
        generation_config=config,
        do_sample=False,
        max_new_tokens=case["hyper"]["max_new_tokens"],
        return_dict_in_generate=True,
    )
    assert output.sequences[0, inputs["input_ids"].shape[1] :].tolist() == stored


# Rewards ------------------------------------------------------------------------------------------------------------


@each("name", list(REWARDS))
def test_the_reward_of_logits_and_its_gradient(name: str) -> None:
    stored, case = load_file(FOLDER / "reward.safetensors"), REWARDS[name]
    logits = stored[f"{name}/logits"].clone().requires_grad_()
    start, stop = case["thought_idx"]
    reward = published_confidence(logits[start : stop + 1], case["top_k"])
    close(reward.detach().view(1), stored[f"{name}/reward"], "reward_table")
    close(torch.autograd.grad(reward, logits)[0], stored[f"{name}/grad_logits"], "reward_table")


@each("name", GRADIENTS)
def test_the_gradient_of_the_reward_by_a_candidate(name: str) -> None:
    """Through the cache of a prefix without an image."""
    stored = {key: tensors()[f"{name}/{key}"] for key in ("candidate", "grad", "reward")}
    inputs = {key: value for key, value in prompt(name).items() if key in ("input_ids", "attention_mask")}
    top_k = META[name].get("top_k", META[name].get("hyper", {}).get("top_k", 10))
    settings = search_settings(mode="reference", max_num_steps=0, reward_top_k=top_k)
    with torch.no_grad():
        loop = LatentSearch(model(), inputs, thought_mask(name, inputs["input_ids"]), settings)
    candidate = stored["candidate"].clone().requires_grad_()
    with loop.plain.expanded(1) as cache_of_prefix:
        block = [[-1 - offset for offset in range(loop.num_thoughts)]]
        logits = loop.reward_logits(loop.plain, cache_of_prefix, block, candidate.unsqueeze(0), "thoughts_and_end")
    reward = settings.reward.function(logits, top_k)
    close(reward.detach(), stored["reward"], "confidence_grad")
    close(torch.autograd.grad(reward.sum(), candidate)[0], stored["grad"], "confidence_grad")
