"""Options of GRPO_latent: published defaults and names, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from trl import TrlParser

from trainers.grpo_config import LatentGRPOConfig

CPU = {"use_cpu": True, "bf16": False}


def config(folder: Path, **options: Any) -> LatentGRPOConfig:
    return LatentGRPOConfig(output_dir=str(folder), **CPU, **options)


def test_defaults_are_the_published_ones(tmp_path: Path) -> None:
    args = config(tmp_path)
    published = {
        "temperature": 0.9, "top_k": 50, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0, "beta": 0.04,
        "max_completion_length": 256, "loss_type": "bnpo", "num_generations": 8, "epsilon": 0.2, "epsilon_high": None,
        "num_iterations": 1, "learning_rate": 5e-6, "scale_rewards": "group", "mask_truncated_completions": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published
    assert not args.use_bias_correction_kl and args.disable_dropout and args.latent_replay and args.train_start_token
    assert args.latent_policy == "none" and args.latent_options() == {}


def test_published_names_and_yaml(tmp_path: Path) -> None:
    file = tmp_path / "grpo.yaml"
    lines = ["decoding_strategy: steps", "lvr_steps: 8", "latent_noise: 0.1", "scale_rewards: true"]
    lines += ["latent_generation_kwargs: {force_span: true}", "reward_funcs: [maze_reward]", "reward_module: mine.py"]
    file.write_text("\n".join([f"output_dir: {tmp_path}", "use_cpu: true", "bf16: false", *lines]))
    (args,) = TrlParser(LatentGRPOConfig).parse_args_and_config(["--config", str(file), "--max_steps", "3"])
    assert args.latent_strategy == "steps" and args.max_steps == 3 and args.scale_rewards == "group"
    assert args.latent_options() == {"force_span": True, "num_latent_steps": 8, "latent_noise": 0.1}
    assert args.reward_sources() == ["mine.py", "maze_reward"]


GAUSSIAN = {"latent_policy": "gaussian", "latent_policy_sigma": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_vllm": True}, "use_vllm=True: vLLM returns ids alone"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True: replaces the forward"),
        ({"use_transformers_continuous_batching": True}, "continuous batching keeps logits alone"),
        ({"use_transformers_paged": True}, "use_transformers_paged=True: continuous batching"),
        ({"max_prompt_length": 0}, "max_prompt_length=0 must be an integer of at least 1, or None: no limit"),
        ({"loss_type": "ppo"}, r"unknown loss_type 'ppo'; choose one of \['bnpo'"),
        ({"loss_type": "luspo"}, "loss_type='luspo' with importance_sampling_level='token'.* set .*: sequence"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "loss_type='vespo' .*: token"),
        ({"latent_policy": "beta"}, "unknown latent_policy 'beta'"),
        ({"latent_policy": "gaussian"}, "latent_policy_sigma=None: .* needs a number above 0"),
        ({"latent_policy_sigma": 1.0}, "latent_policy_sigma=1.0 is read with latent_policy: gaussian only"),
        ({**GAUSSIAN, "latent_policy_sigma": -1}, "latent_policy_sigma=-1: "),
        ({**GAUSSIAN, "latent_replay": False}, "latent_replay=False: latent_policy='gaussian' scores"),
        ({**GAUSSIAN, "entropy_coef": 0.1}, "read the entropy of tokens"),
        ({**GAUSSIAN, "latent_policy_reduction": "max"}, "unknown latent_policy_reduction 'max'"),
        ({"decoding_strategy": "steps", "latent_strategy": "dynamic"}, "decoding_strategy='steps' is the published"),
        ({"latent_generation_kwargs": {"budget": 3}}, r"latent_generation_kwargs\['budget'\] is unknown"),
        ({"latent_generation_kwargs": {"latent_ids": "readable"}}, "latent_ids='readable' writes ids"),
        (
            {"latent_generation_kwargs": {"num_latent_steps": [1, 2]}},
            r"num_latent_steps=\[1, 2\]: completions of a group",
        ),
        ({"latent_generation_kwargs": {"latent_noise": 1}, "latent_noise": 0.5}, "latent_noise is given twice"),
        ({"num_latent_steps": -1}, "num_latent_steps=-1 must be at least 0"),
        ({"generation_kwargs": {"latent_strategy": "off"}}, r"generation_kwargs\['latent_strategy'\]='off': set"),
        ({"generation_kwargs": {"num_beams": 2}}, r"generation_kwargs\['num_beams'\]=2: GRPO samples"),
        ({"generation_kwargs": {"temperature": 0.5}}, "the log-probabilities are divided by the trainer's"),
        ({"system_prompt": "lrv"}, "unknown system_prompt 'lrv'; choose one of"),
        ({"stop_on_nan": "yes"}, "stop_on_nan='yes' must be true or false"),
        ({"max_bad_share": 2}, "max_bad_share=2 must be between 0 and 1"),
        ({"vision_lr": 0}, "vision_lr=0 must be above 0"),
        ({"latent_head_lr": -1}, "latent_head_lr=-1 must be above 0"),
        ({"weight_decay_rule": "none"}, "weight_decay_rule='none' is unknown; choose one of"),
        (
            {"deepspeed": {"optimizer": {"type": "AdamW"}}, "vision_lr": 1e-6},
            r"section.*ignores \['vision_lr",
        ),
        ({"bf16": True, "use_cpu": False}, "bf16=True needs a GPU"),
    ],
)
def test_refusals(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        LatentGRPOConfig(output_dir=str(tmp_path), **{**CPU, **options})
