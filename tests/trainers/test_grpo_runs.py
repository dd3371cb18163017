"""GRPO_latent: data and rewards, metrics, what a run survives, what is refused."""

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
    policy_logps,
    prompts,
    recorded_logps,
    rollout,
    trained_mask,
)
from trainers.data.mazes import maze_dataset
from trainers.fault_tolerance import NonFiniteError
from trainers.grpo_trainer import LatentGRPOTrainer
from trainers.grpo_trl_check import check_trl_grpo
from trainers.reward_loading import RewardError

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
