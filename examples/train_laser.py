"""Train LASER: the latent span of a vision-language model, with the DWAL loss (arXiv 2601.06803).

    accelerate launch examples/train_laser.py                                         # mazes, tiny base, on a CPU
    accelerate launch examples/train_laser.py --config hub_configs/laser-7b/sft.yaml  # the published format and recipe
    python examples/train_laser.py --config hub_configs/laser-7b/sft.yaml --dry_run   # what that would do, no weights

Without --config and --data_path it follows `hub_configs/maze-tiny/laser.yaml`. Every option of `LatentSFTConfig`,
`LatentModelConfig` and `ScriptArguments` (trainers/scripts.py) is a YAML key and a command-line flag; flags win.
"""

import sys
from dataclasses import dataclass, field

from transformers import set_seed

from trainers import LatentSFTConfig, LatentSFTTrainer
from trainers.data.llava import read_source
from trainers.model_loading import LatentModelConfig, load_for_training
from trainers.scripts import MAZES, FirstRun, ScriptArguments, load_mazes, load_table, parse_recipe, run_training

MAZE_RECIPE = MAZES / "laser.yaml"


@dataclass
class TrainLaserConfig(FirstRun, LatentSFTConfig):
    """`LatentSFTConfig` with defaults for a first run on the tiny base; a YAML file sets the real ones."""

    output_dir: str | None = field(default="runs/laser-maze", metadata={"help": "Where the model is saved."})


def load_data(script: ScriptArguments, config: LatentSFTConfig) -> tuple:
    """Training and evaluation records."""
    if script.data_path is None:
        return load_mazes(script, config, stream=not config.plans_batches())
    needs_chain = config.latent_form == "chain"
    return load_table(
        lambda report: read_source(script.data_path, script.image_folder, require_chain=needs_chain, report=report),
        config.max_bad_share,
    ), None


def build_trainer(
    script: ScriptArguments, config: LatentSFTConfig, model_args: LatentModelConfig, weights: bool = True
) -> LatentSFTTrainer:
    """The trainer of a recipe; the model stays on the meta device without `weights`."""
    set_seed(config.seed)  # before rows are added to an embedding
    model, processor, peft_config = load_for_training(
        model_args, config.latent_method or "laser", weights=weights, trust_remote_code=config.trust_remote_code
    )
    train, held_out = load_data(script, config)
    return LatentSFTTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        peft_config=peft_config,
    )


def main() -> None:
    script, config, model_args = parse_recipe((ScriptArguments, TrainLaserConfig), MAZE_RECIPE, sys.argv[1:])
    run_training(build_trainer, script, config, model_args)


if __name__ == "__main__":
    main()
