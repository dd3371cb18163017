"""Train LVR, second stage: GRPO_latent, reinforcement learning with the latents of the rollout (arXiv 2509.24251).

    accelerate launch examples/train_lvr_grpo.py                                        # mazes, on a CPU
    accelerate launch examples/train_lvr_grpo.py --config hub_configs/lvr-7b/grpo.yaml  # published format and recipe

Without --config and --data_path it follows `hub_configs/maze-tiny/lvr_grpo.yaml`: it goes on from what
`examples/train_lvr.py` saved in runs/lvr-maze, and rewards plans that reach the goal. Every option of
`LatentGRPOConfig`, `LatentModelConfig` and of the script arguments is a YAML key and a command-line flag; flags win.
The names of the published code are understood too (`hub_configs/methods/lvr.md`).
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import set_seed

from trainers import LatentGRPOConfig, LatentGRPOTrainer
from trainers.data.lvr import read_lvr_grpo
from trainers.data.virl39k import read_virl39k
from trainers.dry_run import no_reference
from trainers.model_loading import LatentModelConfig, load_for_training
from trainers.published_arguments import PublishedParser
from trainers.scripts import MAZES, ScriptArguments, load_mazes, load_table, parse_recipe, run_training

MAZE_RECIPE = MAZES / "lvr_grpo.yaml"


@dataclass
class TrainGRPOConfig(LatentGRPOConfig):
    """`LatentGRPOConfig` with defaults for a first run on mazes; a YAML file sets the real ones."""

    output_dir: str | None = field(default="runs/lvr-maze-grpo", metadata={"help": "Where the model is saved."})
    bf16: bool | None = field(default=torch.cuda.is_available(), metadata={"help": "Train in bfloat16."})
    use_cpu: bool = field(default=not torch.cuda.is_available(), metadata={"help": "Train on the CPU."})
    activation_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations in the backward."})


def load_data(script: ScriptArguments, config: LatentGRPOConfig, tokens: dict[str, str]) -> tuple:
    """Training and evaluation records: questions with answers that can be verified."""
    if script.data_path is None:
        return load_mazes(script, config, stream=False)
    read = read_virl39k if script.data_path.endswith(".parquet") else read_lvr_grpo
    return load_table(
        lambda report: read(script.data_path, script.image_folder, latent_tokens=tokens, report=report),
        config.max_bad_share,
    ), None


def default_rewards(script: ScriptArguments, config: LatentGRPOConfig) -> list[str] | None:
    """Rewards when none is named: of right answers in the right form."""
    if config.reward_sources():
        return None
    return ["maze_reward" if script.data_path is None else "verified_accuracy_reward", "span_format_reward"]


def build_trainer(
    script: ScriptArguments, config: LatentGRPOConfig, model_args: LatentModelConfig, weights: bool = True
) -> LatentGRPOTrainer:
    """The trainer of a recipe; the model stays on the meta device without `weights`."""
    set_seed(config.seed)
    model, processor, peft_config = load_for_training(
        model_args, "lvr", weights=weights, trust_remote_code=config.trust_remote_code
    )
    train, held_out = load_data(script, config, processor.latent_tokens)
    with nullcontext() if weights else no_reference(config):
        return LatentGRPOTrainer(
            model=model,
            reward_funcs=default_rewards(script, config),
            args=config,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=processor,
            peft_config=peft_config,
        )


def main() -> None:
    parser = partial(PublishedParser, stage="grpo")
    script, config, model_args = parse_recipe((ScriptArguments, TrainGRPOConfig), MAZE_RECIPE, sys.argv[1:], parser)
    run_training(build_trainer, script, config, model_args)


if __name__ == "__main__":
    main()
