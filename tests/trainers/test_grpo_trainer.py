"""GRPO_latent: replay against the rollout, the published loss, credit for latents, metrics, what a run survives."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel
from trl import GRPOTrainer

from modeling_latent import load_latent_model
from tests.latent import tiny_latent_model
from tests.tiny import tiny_processor, tiny_stock_model
from tests.trainers.grpo_parts import (
    FIXED,
    build,
    digit_reward,
    eager_model,
    latent_mask,
    naive_logps,
    prompts,
    rollout,
    trained_mask,
)
from trainers.data.mazes import maze_dataset
from trainers.fault_tolerance import NonFiniteError
from trainers.grpo_replay import Replay
from trainers.grpo_trainer import LatentGRPOTrainer
from trainers.grpo_trl import check_trl_grpo
from trainers.losses.grpo_latent import gaussian_latent_logps
from trainers.reward_loading import RewardError

HEADS = [{}, {"latent_head": "simple"}, {"latent_head": "simple", "latent_head_timing": "reference"}]
MEAN = {"latent_policy": "gaussian", "latent_policy_sigma": 0.5}


def policy_logps(trainer: LatentGRPOTrainer, batch: dict[str, Any], **options: Any) -> torch.Tensor:
    """The trainer's own log-probabilities of a batch."""
    trainer._replay = Replay.from_batch(batch)
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    ids, mask = (torch.cat([batch[f"prompt_{k}"], batch[f"completion_{k}"]], dim=1) for k in ("ids", "mask"))
    given = {name: batch.get(name) for name in names}
    length = batch["completion_ids"].shape[1]
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length, **given, **options)[0]


def recorded_logps(trainer: LatentGRPOTrainer, groups: int = 3) -> tuple[dict[str, Any], torch.Tensor]:
    """A rollout, and the log-probabilities at which its tokens were drawn (before top-k and the like)."""
    model, kept = trainer.accelerator.unwrap_model(trainer.model), []
    stock = model.generate

    def spy(**kwargs: Any) -> Any:
        output = stock(**kwargs)
        kept.append(torch.stack(output.logits, dim=1).float())
        return output

    model.generate = spy
    trainer.generation_config.output_logits = True
    batch = rollout(trainer, groups)
    del model.generate
    logits = kept[0][:, : batch["completion_ids"].shape[1]] / trainer.temperature
    return batch, logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)


# Replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", HEADS, ids=["no head", "head", "head as published"])
def test_at_step_0_the_ratio_to_the_rollout_is_1(fields: dict, tmp_path: Path) -> None:
    """Several spans at different places, prompts of different length, with and without image."""
    trainer = build(tmp_path, eager_model(**fields))
    batch, rolled = recorded_logps(trainer, groups=6)
    mask, latents = batch["tool_mask"].bool() & batch["completion_mask"].bool(), latent_mask(batch)
    assert torch.equal(mask, trained_mask(batch))
    starts = {latents[row].int().argmax().item() for row in latents.any(1).nonzero()[:, 0]}
    behind = latents.cumsum(1) > 0
    assert len(starts) > 2 and (latents.sum(1) > 2).any() and (mask & behind).sum() > 10
    ratio = (policy_logps(trainer, batch) - rolled).exp()[mask]
    assert (ratio - 1).abs().max().item() < 1e-5
    alone = naive_logps(trainer.accelerator.unwrap_model(trainer.model), batch)
    assert (alone - rolled)[mask].abs().max().item() < 1e-5


def test_without_replay_the_ratio_is_not_1(tmp_path: Path) -> None:
    trainer = build(tmp_path, latent_replay=False)
    batch, rolled = recorded_logps(trainer)
    mask, behind = trained_mask(batch), latent_mask(batch).cumsum(1) > 0
    ratio = (policy_logps(trainer, batch) - rolled).exp()
    assert (ratio - 1)[mask & behind].abs().max().item() > 1e-2
    assert (ratio - 1)[mask & ~behind].abs().max().item() < 1e-5


def test_reference_of_equal_weights_gives_no_kl_and_shuffled_micro_batches_are_the_same(tmp_path: Path) -> None:
    trainer = build(tmp_path, num_iterations=2, gradient_accumulation_steps=3)
    torch.manual_seed(3)
    trainer.model.train()
    rows = [row for row in trainer.train_dataset for _ in range(4)]
    trainer._prepare_inputs(rows)
    batches = trainer._buffered_inputs
    assert len(batches) == 3 and any(batch["replay_index"].ge(0).any() for batch in batches)
    for batch in batches:
        assert set(batch["num_images"]) == {0, 1}
        logps, mask = policy_logps(trainer, batch), trained_mask(batch)
        for name in ("old", "ref"):
            assert (logps - batch[f"{name}_per_token_logps"])[mask].abs().max().item() < 1e-5
        difference = batch["ref_per_token_logps"] - logps
        assert (difference.exp() - difference - 1)[mask].abs().max().item() < 1e-6
        assert (naive_logps(trainer.accelerator.unwrap_model(trainer.model), batch) - logps)[mask].abs().max() < 1e-5


def test_reference_is_a_copy_that_stays(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    kept = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model))
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.1)
    again = rollout(trainer)
    mask = trained_mask(again)
    assert (naive_logps(kept, again) - again["ref_per_token_logps"])[mask].abs().max().item() < 1e-5
    assert (policy_logps(trainer, again) - again["ref_per_token_logps"]).abs().max().item() > 1e-2


def test_beta_0_keeps_no_reference(tmp_path: Path) -> None:
    trainer = build(tmp_path, beta=0.0)
    assert trainer.ref_model is None and "ref_per_token_logps" not in rollout(trainer)


# The loss --------------------------------------------------------------------------------------------------------


def published_loss(batch: dict[str, Any], logps: torch.Tensor, loss_type: str, length: int) -> torch.Tensor:
    """Card, section 4.4, steps 5 and 6, with epsilon 0.2 and beta 0.04."""
    mask, advantages = trained_mask(batch), batch["advantages"][:, None]
    ratio = (logps - batch["old_per_token_logps"]).exp()
    terms = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    difference = batch["ref_per_token_logps"] - logps
    terms = (terms + 0.04 * (difference.exp() - difference - 1)) * mask
    if loss_type == "bnpo":
        return terms.sum() / mask.sum()
    if loss_type == "grpo":
        return (terms.sum(1) / mask.sum(1)).mean()
    return terms.sum() / (len(mask) * length)


@pytest.mark.parametrize("loss_type", ["bnpo", "grpo", "dr_grpo"])
def test_the_defaults_are_the_published_loss(loss_type: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, loss_type=loss_type, num_iterations=2)
    batch = rollout(trainer)
    generator = torch.Generator().manual_seed(1)
    for name in ("old", "ref"):  # far enough that some ratios are clipped
        values = batch[f"{name}_per_token_logps"]
        batch[f"{name}_per_token_logps"] = values + 0.3 * torch.randn(values.shape, generator=generator)
    model = trainer.accelerator.unwrap_model(trainer.model)
    want = published_loss(batch, naive_logps(model, batch), loss_type, 16)
    want.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, rtol=1e-3, atol=1e-5, msg=name)
    assert trainer._metrics["train"]["clip_ratio/region_mean"][-1] > 0


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo", "luspo", "vespo"])
@pytest.mark.parametrize("policy", ["none", "gaussian"])
def test_the_other_losses_give_gradients(loss_type: str, policy: str, tmp_path: Path) -> None:
    level = "sequence" if loss_type == "luspo" else "token"
    credit = MEAN if policy == "gaussian" else {}
    trainer = build(tmp_path, loss_type=loss_type, importance_sampling_level=level, num_iterations=2, **credit)
    batch = rollout(trainer, 2)
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    norm = trainer.model.lm_head.weight.grad.norm()
    assert loss.isfinite() and 0 < norm < float("inf")


def test_no_gradient_reaches_the_recorded_latents(tmp_path: Path) -> None:
    trainer = build(tmp_path, eager_model(latent_head="simple"))
    batch = rollout(trainer)
    assert not batch["replay_vectors"].requires_grad
    trainer._compute_loss(trainer.model, batch).backward()
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.latent_head.parameters())
    assert trainer.model.model.language_model.norm.weight.grad.any()


@pytest.mark.parametrize("options", [{"train_start_token": False}, {"mask_truncated_completions": True}])
def test_what_the_loss_leaves_out(options: dict, tmp_path: Path) -> None:
    trainer = build(tmp_path, **options)
    batch = rollout(trainer)
    mask = batch["tool_mask"] * batch["completion_mask"]
    start, eos = trainer.processing_class.latent_start_token_id, trainer.processing_class.tokenizer.eos_token_id
    is_start = (batch["completion_ids"] == start) & batch["completion_mask"].bool()
    if "train_start_token" in options:
        assert is_start.any() and not mask[is_start].any() and mask.any()
    else:
        ended = (batch["completion_ids"] == eos).any(1)
        assert ended.any() and not ended.all()
        assert torch.equal(mask.any(1), ended)
        shortest = trainer._metrics["train"]["completions/min_length"][-1]
        assert shortest == 0 and trainer._metrics["train"]["completions/clipped_ratio"][-1] < 1


# Credit for latents ----------------------------------------------------------------------------------------------


def head_gradient(trainer: LatentGRPOTrainer, batch: dict[str, Any]) -> float:
    """Norm of the gradient at the latent head, which only latent positions can reach."""
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, batch).backward()
    return sum(float(p.grad.norm()) for p in trainer.model.latent_head.parameters() if p.grad is not None)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_latents_are_trained_only_with_the_gaussian_policy(reduction: str, tmp_path: Path) -> None:
    model = eager_model(latent_head="simple")
    options = {"latent_noise": 0.2, "beta": 0.0}
    plain = build(tmp_path, copy.deepcopy(model), **options)
    assert head_gradient(plain, rollout(plain)) == 0
    credit = {**MEAN, "latent_policy_reduction": reduction}
    trainer = build(tmp_path, copy.deepcopy(model), **options, **credit)
    batch = rollout(trainer)
    assert head_gradient(trainer, batch) > 0
    assert batch["tool_mask"].bool()[latent_mask(batch)].all()
    quiet = build(tmp_path, copy.deepcopy(model), beta=0.0, **credit)  # a = mu: the first update gives them nothing
    assert head_gradient(quiet, rollout(quiet)) < 1e-4 * head_gradient(trainer, batch)


def test_gaussian_credit_has_the_value_of_the_formula(tmp_path: Path) -> None:
    """Loss of a batch with an old policy and a reference, from the log-likelihoods themselves."""
    trainer = build(tmp_path, eager_model(latent_head="simple"), latent_noise=0.3, num_iterations=2, **MEAN)
    batch = rollout(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad():
        for parameter in model.latent_head.parameters():
            parameter.mul_(1.05)
    mask, replay = latent_mask(batch), Replay.from_batch(batch)
    prompt, length = batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]
    trainer._batch, values = None, {}
    trainer._scored_means = []
    text = policy_logps(trainer, batch)  # also keeps the means
    means = {"now": trainer._scored_means[-1], "old": replay.old_means, "ref": replay.ref_means}
    for name, states in means.items():
        packed = gaussian_latent_logps(replay.vectors, states, 0.5)
        values[name] = replay.dense(packed, length, prompt)
    full = {"now": text, "old": batch["old_per_token_logps"], "ref": batch["ref_per_token_logps"]}
    full = {name: torch.where(mask, values[name], logps) for name, logps in full.items()}
    both = dict(batch, old_per_token_logps=full["old"], ref_per_token_logps=full["ref"])
    ratio = (full["now"] - full["old"]).exp()
    assert (ratio - 1)[mask].abs().max() > 1e-3
    trained = batch["tool_mask"] * batch["completion_mask"]
    advantages = both["advantages"][:, None]
    terms = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    gap = full["ref"] - full["now"]
    want = ((terms + 0.04 * (gap.exp() - gap - 1)) * trained).sum() / trained.sum()
    torch.testing.assert_close(trainer._compute_loss(trainer.model, batch), want, rtol=1e-5, atol=1e-6)


# Data and rewards ------------------------------------------------------------------------------------------------


def test_records_reach_the_model_and_the_rewards(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def spy_reward(
        completions: list, prompts: list, assistant: list, answer: list, meta: list, **columns: Any
    ) -> list:
        seen.update(completions=completions, prompts=prompts, assistant=assistant, answer=answer)
        return [0.0, 1.0] * (len(completions) // 2)

    data = maze_dataset(2, seed=1, sizes=(3,))
    trainer = build(tmp_path, data=data, rewards=[spy_reward, "maze_reward"], system_prompt="Answer with a plan.")
    batch = rollout(trainer, 2)
    system, user = seen["prompts"][0]
    assert system["content"][0]["text"] == "Answer with a plan." and user["content"][0]["type"] == "image"
    assert user["content"][1]["text"] == data[0]["question"]
    answer = f"<answer>{data[0]['answer']}</answer>"
    assert seen["assistant"][0] == {"role": "assistant", "content": answer} and seen["answer"][4] == data[1]["answer"]
    assert batch["num_images"] == [1] * 8
    tokenizer, eos = trainer.processing_class.tokenizer, trainer.processing_class.tokenizer.eos_token
    texts = [completion[0]["content"] for completion in seen["completions"]]
    assert not any(eos in text or tokenizer.pad_token in text for text in texts)
    counted = sum(text.count("<|laser|>") for text in texts)
    assert counted == int(latent_mask(batch).sum()) > 0
    assert {"rewards/spy_reward/mean", "rewards/maze_reward/std"} <= set(trainer._metrics["train"])


def test_prompts_in_trl_format_and_a_reward_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def brief_reward(completions, **columns):\n    return [1.0 / (1 + len(c)) for c in completions]\n"
    )
    rows = Dataset.from_list([{"prompt": "What is it?"}, {"prompt": "Is the path safe?"}])
    trainer = build(tmp_path, data=rows, rewards=None, reward_module=str(file))
    assert trainer.reward_func_names == ["brief_reward"]
    assert rollout(trainer, 2)["advantages"].abs().sum() > 0
    assert isinstance(trainer._logs["completion"][0], str)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions, **c: 1 / 0, "raised ZeroDivisionError: division by zero; for sample 0 .id 'r0'."),
        (lambda completions, **c: [0.0, float("nan"), 0.0, 0.0], "returned nan for sample 1 .id 'r0'."),
        (lambda completions, **c: [0.0], "returned 1 rewards for 4 completions"),
    ],
)
def test_bad_rewards_name_function_and_sample(reward: Any, message: str, tmp_path: Path) -> None:
    reward.__name__ = "bad_reward"
    with pytest.raises(RewardError, match=f"'bad_reward' {message}"):
        rollout(build(tmp_path, rewards=reward), 1)


# Runs ------------------------------------------------------------------------------------------------------------


def test_a_run_logs_published_metrics_and_latent_paths(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rewards: list[list[float]] = []

    def kept_reward(completions: list, **columns: Any) -> list[float]:
        rewards.append(digit_reward(completions))
        return rewards[-1]

    options = {"max_steps": 2, "gradient_accumulation_steps": 2, "log_completions": True}
    trainer = build(tmp_path, rewards=kept_reward, eval_dataset=prompts(), **options)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 2
    groups = torch.tensor(rewards[0]).view(-1, 4)
    assert logs[0]["reward_std"] == pytest.approx(groups.std(1).mean().item(), abs=1e-5)
    assert logs[0]["reward_std_batch"] == pytest.approx(groups.std().item(), abs=1e-5)
    assert logs[0]["rewards/kept_reward/mean"] == pytest.approx(groups.mean().item(), abs=1e-5)
    names = {"kl", "clip_ratio/region_mean", "completions/mean_length", "latent/steps_mean", "latent/trigger_rate"}
    assert names | {"latent/forced_close_rate", "rewards/kept_reward/std", "entropy"} <= set(logs[0])
    assert 0 < logs[0]["latent/trigger_rate"] <= 1 and logs[0]["latent/steps_mean"] > 0
    assert 0 < logs[1]["kl"] < 1 and logs[1]["grad_norm"] > 0
    printed = capsys.readouterr().out
    assert "latent path" in printed and "⟨" in printed
    values = trainer.evaluate()
    assert "eval_latent/trigger_rate" in values and "eval_loss" in values
    assert trainer.model.training is False


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_killed_run_resumes_as_if_it_had_not_been(checkpointing: bool, tmp_path: Path) -> None:
    options = {"activation_checkpointing": checkpointing, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole = build(tmp_path / "a", copy.deepcopy(eager_model()), **options)
    whole.train()
    again = build(tmp_path / "a", copy.deepcopy(eager_model()), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    for (name, one), two in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=name)
    first, second = (run.state.log_history[1]["reward"] for run in (whole, again))
    assert first == second
    model, processor = load_latent_model(tmp_path / "a" / "checkpoint-2")
    assert torch.equal(model.lm_head.weight, whole.model.lm_head.weight)
    assert model.config.latent_start_token_id == processor.latent_start_token_id
    named = build(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(named.model.lm_head.weight, model.lm_head.weight) and named.ref_model is not None


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_records(tmp_path: Path) -> None:
    model = eager_model()
    trainer = build(tmp_path, model, stop_on_nan=True)
    before = model.lm_head.weight.clone()
    stock = GRPOTrainer._compute_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_compute_loss", lambda self, *args: stock(self, *args) * float("nan"))
        with pytest.raises(NonFiniteError, match=r"(?s)the loss is not finite.*loss=nan.*records: .*id 'r\d'"):
            trainer.train()
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_are_trained_against_the_model_without_them(tied: bool, tmp_path: Path) -> None:
    model = eager_model(tie_word_embeddings=tied)
    base = copy.deepcopy(model)
    ids = [model.config.latent_start_token_id, model.config.latent_end_token_id]
    layers = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    lora = LoraConfig(
        r=2, target_modules=r".*language_model.*\.(q|v)_proj", lora_dropout=0.3,
        trainable_token_indices=dict.fromkeys(layers, ids),
    )  # fmt: skip
    trainer = build(tmp_path, model, peft_config=lora, max_steps=2, learning_rate=0.05)
    assert trainer.ref_model is None
    trainer.train()
    batch, rolled = recorded_logps(trainer)
    mask = trained_mask(batch)
    assert (policy_logps(trainer, batch) - rolled)[mask].abs().max().item() < 1e-5
    reference = naive_logps(base, batch)
    assert (batch["ref_per_token_logps"] - reference)[mask].abs().max().item() < 1e-5
    assert (batch["ref_per_token_logps"] - rolled)[mask].abs().max().item() > 1e-2
    trainer.save_model(str(tmp_path / "adapter"))
    saved = json.loads((tmp_path / "adapter" / "config.json").read_text())
    assert saved["latent_generation"] == FIXED


def test_published_names_and_rollout_options(tmp_path: Path) -> None:
    trainer = build(tmp_path, decoding_strategy="steps", lvr_steps=3, latent_generation_kwargs={"force_span": True})
    expected = {"latent_strategy": "steps", "num_latent_steps": 3, "force_span": True, "latent_topk": 0}
    assert trainer.latent_options == expected
    batch = rollout(trainer)
    assert latent_mask(batch)[:, :4].tolist() == [[False, True, True, True]] * 12
    assert not batch["tool_mask"][:, 0].any()  # forced, not sampled
    text = build(tmp_path, latent_strategy="off")
    batch = rollout(text)
    assert not latent_mask(batch).any() and batch["replay_vectors"].shape[1] == 0
    text._compute_loss(text.model, batch).backward()


# Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": [digit_reward]}, "tools: a tool's turns would be generated anew"),
        ({"rollout_func": digit_reward}, "rollout_func: its completions have no recorded latents"),
        ({"environment_factory": dict}, "environment_factory: "),
        ({"args": None}, "args must be a LatentGRPOConfig, got NoneType"),
        ({"processing_class": tiny_processor().tokenizer}, "processing_class must be the LatentProcessor"),
        ({"model": tiny_stock_model()}, "Qwen2_5_VLForConditionalGeneration is no latent model"),
        ({"model": tiny_latent_model()}, "the model has no decoding strategy of its own; set latent_strategy"),
        ({"reward_funcs": None}, "no reward: pass reward_funcs"),
        ({"reward_funcs": [digit_reward, digit_reward]}, r"named twice: \['digit_reward'\]"),
        ({"reward_funcs": 3}, "reward 3 is no function with a name"),
        ({"train_dataset": Dataset.from_list([{"text": "x"}])}, r"neither prompts .* nor records"),
        ({"train_dataset": prompts().select([])}, "train_dataset is empty"),
        ({"train_dataset": prompts().select([0])}, "train_dataset has 1 prompts, and one rollout takes 2"),
        ({"train_dataset": [{"prompt": "x"}]}, "train_dataset is a list; give a datasets.Dataset"),
    ],
)
def test_refusals(change: dict, message: str, tmp_path: Path) -> None:
    args = build_args(tmp_path)
    given = {"model": eager_model(), "reward_funcs": digit_reward, "args": args, "train_dataset": prompts()}
    given |= {"processing_class": tiny_processor(), **change}
    with pytest.raises(ValueError, match=message):
        LatentGRPOTrainer(**given)


def build_args(folder: Path, **options: Any) -> Any:
    """The configuration of [`build`]."""
    from trainers.grpo_config import LatentGRPOConfig

    small = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 1}
    return LatentGRPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", **small, **options)


def test_options_that_the_strategy_does_not_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"latent_strategy='fixed' does not read \['max_latent_steps'\]"):
        build(tmp_path, max_latent_steps=3)
    with pytest.raises(ValueError, match="system_prompt='none': the prompts of train_dataset are written already"):
        build(tmp_path, data=Dataset.from_list([{"prompt": "x"}]), system_prompt="none")


def test_another_trl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trl_grpo()

    def _generate_single_turn(self: Any, prompt_ids: list) -> None:
        return None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", _generate_single_turn)
    with pytest.raises(RuntimeError, match=r"trl \d+\.\d+.* changed its GRPOTrainer .*_generate_single_turn"):
        check_trl_grpo()


def test_parameters_of_a_model_are_those_of_its_class(tmp_path: Path) -> None:
    """The wrapped forward still takes what `generate` asks the signature for."""
    model: PreTrainedModel = eager_model()
    build(tmp_path, model)
    inputs = tiny_processor()(text=["What is it?"], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
