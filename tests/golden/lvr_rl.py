"""LVR golden vectors of stage 2: replayed log-probabilities, masks, advantages, loss and gradients (card, 4.4).

The arithmetic that TRL owns is not copied here: the vectors go through `trl.GRPOTrainer`, which gets our mask.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trl import GRPOConfig, GRPOTrainer

from modeling_latent import LatentQwen2_5_VLForConditionalGeneration
from tests.golden.conftest import each, golden_dir, golden_json, tolerance
from tests.golden.lvr_losses import golden_images, load_lvr_model, published_name
from tests.tiny import tiny_processor
from trainers.losses.grpo_latent import (
    completion_mask_until_eos,
    completion_metrics,
    group_reward_std,
    reference_loss_mask,
    sampled_token_mask,
    span_mask,
)

FOLDER = golden_dir("lvr")
TENSOR_FILE = "rl.safetensors"
RL_CASES: dict[str, list[dict]] = golden_json(FOLDER, "rl_cases.json", {}) if (FOLDER / TENSOR_FILE).is_file() else {}
SPECIAL_IDS: dict[str, int] = golden_json(FOLDER, "manifest.json")["special_ids"] if RL_CASES else {}
START, LATENT, END = (SPECIAL_IDS.get(name) for name in ("lvr_start", "lvr", "lvr_end"))
EOS, PAD, IMAGE = (SPECIAL_IDS.get(name) for name in ("eos", "pad", "image"))
TERMS = ("log-probs", "advantages", "loss", "gradients")


@lru_cache(maxsize=1)
def rl_tensors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / TENSOR_FILE)


@lru_cache(maxsize=1)
def rl_tolerance() -> dict[str, float]:
    parts = golden_json(FOLDER, "manifest.json")["tolerance"]["rl"].split(",")
    return {name: tolerance(part.split(name)[1]) for name in TERMS for part in parts if name in part}


# Replay ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rl_model(tmp_path_factory: pytest.TempPathFactory) -> LatentQwen2_5_VLForConditionalGeneration:
    return load_lvr_model(tmp_path_factory.mktemp("lvr_rl"))


def rollout_inputs(name: str) -> dict[str, torch.Tensor]:
    """What the replay of `forward/<name>` takes: prompt and completion with the recorded latents."""
    case = {key.split("/")[2]: value for key, value in rl_tensors().items() if key.startswith(f"forward/{name}/")}
    input_ids = torch.cat([case["prompt_ids"], case["completion_ids"]], dim=1)
    prompt = torch.zeros(*case["prompt_ids"].shape, case["latents"].shape[-1])
    latent_mask = torch.cat([prompt[..., 0].bool(), case["latent_mask"].bool()], dim=1)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "latent_embeds": torch.cat([prompt, case["latents"]], dim=1),
        "latent_mask": latent_mask,
    }
    if "image_ids" in case:
        inputs |= golden_images(case["image_ids"])
        inputs["mm_token_type_ids"] = (input_ids == IMAGE).int()
    return inputs


def replayed_logps(model: torch.nn.Module, name: str, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of every completion id, `(B, C)`, and the logits at the last position."""
    completion = rl_tensors()[f"forward/{name}/completion_ids"]
    logits = model(**rollout_inputs(name), use_cache=False).logits.float()
    predicting = logits[:, -completion.shape[1] - 1 : -1] / temperature
    return predicting.log_softmax(-1).gather(-1, completion.unsqueeze(-1)).squeeze(-1), logits[:, -1]


@each("case", RL_CASES.get("forward", []), ids=lambda case: case["name"])
def test_replay_gives_the_log_probabilities_of_the_rollout(
    case: dict, rl_model: LatentQwen2_5_VLForConditionalGeneration
) -> None:
    name, allowed = case["name"].removeprefix("forward/"), rl_tolerance()["log-probs"]
    want = {key: rl_tensors()[f"{case['name']}/{key}"] for key in ("logps_T1", "rollout_logps_T1", "last_logits")}
    with torch.no_grad():
        logps, last = replayed_logps(rl_model, name)
    assert (logps - want["logps_T1"]).abs().max().item() <= allowed
    sampled = rl_tensors()[f"{case['name']}/completion_ids"] != PAD
    assert (logps - want["rollout_logps_T1"])[sampled].abs().max().item() <= allowed
    assert (last - want["last_logits"]).abs().max().item() <= allowed


# Masks, advantages and metrics -----------------------------------------------------------------------------------


class GoldenTrainer(GRPOTrainer):
    """TRL's trainer with given completions, rewards and log-probabilities in place of its own."""

    given: dict[str, Any] = {}

    def _generate(self, prompts: list) -> tuple:
        prompt_ids, completion_ids = self.given["prompt_ids"], self.given["completion_ids"]
        completions = ["text"] * len(prompts)
        return prompt_ids, completion_ids, self.given["trained"], completions, None, {}, None, []

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.given["rewards"]

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        logps = self.given["logps"]
        return logps, torch.zeros_like(logps), None


@pytest.fixture(scope="module")
def trl_trainer(
    rl_model: LatentQwen2_5_VLForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory
) -> GoldenTrainer:
    args = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("grpo")), per_device_train_batch_size=2, num_generations=2,
        report_to="none", use_cpu=True, bf16=False, use_bias_correction_kl=False,
    )  # fmt: skip
    rewards = [named_reward("accuracy_reward"), named_reward("format_reward")]
    rows = Dataset.from_list([{"prompt": "x"}])
    model = copy.deepcopy(rl_model)  # TRL replaces its forward
    trainer = GoldenTrainer(model, rewards, args, train_dataset=rows, processing_class=tiny_processor().tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def named_reward(name: str) -> Any:
    def reward(completions: list, **columns: Any) -> list[float]:
        raise AssertionError("the vectors hold the rewards")

    reward.__name__ = name
    return reward


def mask_case(case: dict) -> dict[str, torch.Tensor]:
    tensors = rl_tensors()
    names = ("completion_mask", "final_mask", "rewards_per_func", "advantages")
    return {name: tensors[f"{case['name']}/{name}"] for name in names} | {
        name: tensors[f"masks/{name}"] for name in ("prompt_ids", "completion_ids", "span_start", "span_end")
    }


@each("case", RL_CASES.get("score", []), ids=lambda case: case["name"])
def test_masks(case: dict) -> None:
    want = mask_case(case)
    mask, terminated = completion_mask_until_eos(want["completion_ids"], EOS)
    if case["mask_truncated_completions"]:
        mask = mask & terminated[:, None]
    assert torch.equal(mask, want["completion_mask"].bool())
    final = reference_loss_mask(want["prompt_ids"], want["completion_ids"], mask, START, END)
    assert torch.equal(final, want["final_mask"].bool())
    prompt_length, length = want["prompt_ids"].shape[1], want["completion_ids"].shape[1]
    for row, spans in enumerate(span_mask(want["completion_ids"], START, END).tolist()):
        start = spans.index(True) if True in spans else length
        end = spans.index(False, start) if False in spans[start:] else length
        assert (start + prompt_length, end + prompt_length) == (want["span_start"][row], want["span_end"][row])


def trl_scores(
    trainer: GoldenTrainer, case: dict, want: dict[str, torch.Tensor], rewards: torch.Tensor
) -> tuple[dict[str, Any], dict[str, float]]:
    """What TRL makes of given completions and rewards, and what it logs."""
    mask, _ = completion_mask_until_eos(want["completion_ids"], EOS)
    kept = [ids[row].tolist() for ids, row in zip(want["completion_ids"], mask, strict=True)]
    trained = [[1] * len(ids) for ids in kept]
    trainer.given = {"prompt_ids": want["prompt_ids"].tolist(), "completion_ids": kept, "trained": trained}
    trainer.given["rewards"] = rewards
    trainer.num_generations, trainer.beta, trainer.eos_token_ids = case["num_generations"], 0.0, [EOS]
    trainer.scale_rewards = "group" if case["scale_rewards"] else "none"
    trainer.reward_weights = torch.tensor(case["reward_weights"])
    trainer.mask_truncated_completions = case["mask_truncated_completions"]
    trainer._metrics["train"].clear()
    output = trainer._generate_and_score_completions([{"prompt": "x"}] * len(mask))
    return output, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@each("case", RL_CASES.get("score", []), ids=lambda case: case["name"])
def test_advantages_and_metrics(case: dict, trl_trainer: GoldenTrainer) -> None:
    want, allowed = mask_case(case), rl_tolerance()["advantages"]
    given = want["rewards_per_func"]
    _, by_function = trl_scores(trl_trainer, case, want, given)
    # A completion that no function scores: TRL leaves it out of its group, the reference counts it as 0.
    rewards = torch.where(given.isnan().all(1, keepdim=True), 0.0, given)
    output, logged = trl_scores(trl_trainer, case, want, rewards)
    assert (output["advantages"] - want["advantages"]).abs().max().item() <= allowed
    assert torch.equal(output["completion_mask"].bool(), want["completion_mask"].bool())

    _, terminated = completion_mask_until_eos(want["completion_ids"], EOS)
    total = (rewards * torch.tensor(case["reward_weights"])).nansum(1)
    values = {name: value for name, value in by_function.items() if name.startswith("rewards/")}
    values |= completion_metrics(want["completion_mask"], terminated)
    values |= {"reward": logged["reward"], "reward_std": group_reward_std(total, case["num_generations"])}
    values["num_tokens"] = want["prompt_ids"].numel() + want["completion_mask"].sum().item()
    for name, (value,) in case["metrics"].items():
        assert values[name] == pytest.approx(value, abs=allowed), name


# Loss and gradients ----------------------------------------------------------------------------------------------


def loss_mask(rollout: str) -> torch.Tensor:
    """The reference's mask of a rollout, which the vectors hold."""
    prompt, completion = (rl_tensors()[f"forward/{rollout}/{name}"] for name in ("prompt_ids", "completion_ids"))
    mask, _ = completion_mask_until_eos(completion, EOS)
    assert torch.equal(mask, rl_tensors()[f"loss/{rollout}/completion_mask"].bool())
    final = reference_loss_mask(prompt, completion, mask, START, END)
    assert torch.equal(final, rl_tensors()[f"loss/{rollout}/final_mask"].bool())
    return final


def trl_loss(trainer: GoldenTrainer, case: dict, logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """TRL's loss of a case, with its options set and its log-probabilities given."""
    tensors, rollout = rl_tensors(), case["rollout"]
    trainer.given = {"logps": logps}
    trainer.loss_type, trainer.beta = case["loss_type"], case["beta"]
    trainer.epsilon_low, trainer.epsilon_high = case["epsilon_low"], case["epsilon_high"]
    trainer.max_completion_length = case["max_completion_length"]
    trainer._metrics["train"].clear()
    completion, prompt = (tensors[f"forward/{rollout}/{name}"] for name in ("completion_ids", "prompt_ids"))
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": tensors[f"loss/{rollout}/completion_mask"].long(),
        "tool_mask": mask.long(),
        "advantages": tensors[f"loss/{rollout}/advantages"],
    }
    for name in ("old", "ref"):
        if f"{case['name']}/{name}_logps" in tensors:
            inputs[f"{name}_per_token_logps"] = tensors[f"{case['name']}/{name}_logps"]
    return trainer._compute_loss(trainer.model, inputs)


@each("case", RL_CASES.get("loss", []), ids=lambda case: case["name"])
def test_loss_and_gradients_of_the_whole_model(
    case: dict, trl_trainer: GoldenTrainer, rl_model: LatentQwen2_5_VLForConditionalGeneration
) -> None:
    tensors, allowed = rl_tensors(), rl_tolerance()
    mask = loss_mask(case["rollout"])
    given = trl_loss(trl_trainer, case, tensors[f"{case['name']}/per_token_logps"], mask)
    assert abs(given.item() - tensors[f"{case['name']}/loss"].item()) <= allowed["loss"]
    for name, (value,) in case["metrics"].items():
        if name.endswith(("_min", "_max")):  # over devices in the vectors, over completions in TRL
            continue
        assert trl_trainer._metrics["train"][name][-1] == pytest.approx(value, abs=1e-6), name

    rl_model.zero_grad()
    logps, _ = replayed_logps(rl_model, case["rollout"], case["temperature"])
    assert (logps - tensors[f"{case['name']}/per_token_logps"])[mask].abs().max().item() <= allowed["log-probs"]
    trl_loss(trl_trainer, case, logps, mask).backward()
    grads = {published_name(name): p.grad for name, p in rl_model.named_parameters()}
    for name, norm in case["grad_norms"].items():
        grad = grads[name]
        assert grad is None if norm is None else grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name
    norm_grad = tensors[f"{case['name']}/grad.model.norm.weight"]
    assert (grads["model.norm.weight"] - norm_grad).abs().max().item() <= allowed["gradients"]
    rows = [SPECIAL_IDS[name] for name in case["embed_rows_order"]]
    want = tensors[f"{case['name']}/grad.embed_rows_special"]
    assert (grads["model.embed_tokens.weight"][rows] - want).abs().max().item() <= allowed["gradients"]


@each("name", [case["name"].removeprefix("forward/") for case in RL_CASES.get("forward", [])])
def test_the_recommended_mask_differs_where_the_scan_is_wrong(name: str) -> None:
    """Recorded latents are out, start tokens and what follows a region that no end token closes are in."""
    completion, latents = (rl_tensors()[f"forward/{name}/{key}"] for key in ("completion_ids", "latent_mask"))
    latents = latents.bool()
    mask, _ = completion_mask_until_eos(completion, EOS, latents)
    ours = sampled_token_mask(mask, latents)
    theirs = loss_mask(name)
    assert not ours[latents].any() and not torch.equal(ours, theirs)
    opened = (completion == START) & ~latents & mask
    assert ours[opened].all() and not theirs[opened].any()
    without = sampled_token_mask(mask, latents, completion, START, train_start_token=False)
    assert torch.equal(without, ours & ~opened)
    assert torch.equal(ours, mask & ~latents)
