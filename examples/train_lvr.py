"""Train LVR, first stage: latents that stand for the image regions that matter (arXiv 2509.24251).

    accelerate launch examples/train_lvr.py                                       # mazes, tiny base, on a CPU
    accelerate launch examples/train_lvr.py --config hub_configs/lvr-7b/sft.yaml  # the published format and recipe
    python examples/train_lvr.py --config hub_configs/lvr-7b/sft.yaml --dry_run   # what that would do, no weights

Without --config and --data_path it follows `hub_configs/maze-tiny/lvr.yaml`: the boxes are the cells of a path. Every
option of `LVRSFTConfig`, `LatentModelConfig` and of the script arguments is a YAML key and a command-line flag; flags
win. The names of the published code are understood too (`hub_configs/methods/lvr.md`).
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import set_seed

from modeling_latent.generation_latent import saved_generation_config
from trainers import LatentSFTTrainer, LVRSFTConfig
from trainers.data.lvr import read_lvr
from trainers.model_loading import LatentModelConfig, load_for_training
from trainers.published_arguments import PublishedParser
from trainers.scripts import MAZES, FirstRun, ScriptArguments, load_mazes, load_table, parse_recipe, run_training

MAZE_RECIPE = MAZES / "lvr.yaml"


@dataclass
class LVRScriptArguments(ScriptArguments):
    """What to train on."""

    box_unit: str = field(default="fraction", metadata={"help": "Boxes are a 'fraction' of the image, or 'pixel's."})
    outside: str = field(
        default="refuse", metadata={"help": "A box over the border of its image: 'refuse' the row, or 'clip' it."}
    )
    latent_strategy: str | None = field(
        default=None, metadata={"help": "Decoding strategy saved with the model: fixed, end_vector, mode_switch, ..."}
    )
    num_latent_steps: int | None = field(
        default=None, metadata={"help": "Latents of every span, saved with the model (fixed)."}
    )
    max_latent_steps: int | None = field(
        default=None, metadata={"help": "Most latents of a span, saved with the model (the other strategies)."}
    )

    def decoding(self) -> dict[str, Any]:
        """Options of `generate` that are saved with the model."""
        names = ("latent_strategy", "num_latent_steps", "max_latent_steps")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class TrainLVRConfig(FirstRun, LVRSFTConfig):
    """`LVRSFTConfig` with defaults for a first run on the tiny base; a YAML file sets the real ones."""

    output_dir: str | None = field(default="runs/lvr-maze", metadata={"help": "Where the model is saved."})


def load_data(script: LVRScriptArguments, config: LVRSFTConfig, tokens: dict[str, str]) -> tuple:
    """Training and evaluation records."""
    if script.data_path is None:
        return load_mazes(script, config, stream=not config.plans_batches())
    options = {
        "box_unit": script.box_unit,
        "outside": script.outside,
        "empty_region": config.empty_region,
        "join_regions": config.join_regions,
        "latent_tokens": tokens,
    }
    return load_table(
        lambda report: read_lvr(script.data_path, script.image_folder, report=report, **options), config.max_bad_share
    ), None


def build_trainer(
    script: LVRScriptArguments, config: LVRSFTConfig, model_args: LatentModelConfig, weights: bool = True
) -> LatentSFTTrainer:
    """The trainer of a recipe; the model stays on the meta device without `weights`."""
    set_seed(config.seed)  # before rows are added to an embedding, or a latent head is made
    model, processor, peft_config = load_for_training(
        model_args, config.latent_method or "lvr", weights=weights, trust_remote_code=config.trust_remote_code
    )
    model.generation_config = saved_generation_config(model.generation_config, **script.decoding())
    train, held_out = load_data(script, config, processor.latent_tokens)
    return LatentSFTTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        peft_config=peft_config,
    )


def main() -> None:
    parser = partial(PublishedParser, stage="sft")
    script, config, model_args = parse_recipe((LVRScriptArguments, TrainLVRConfig), MAZE_RECIPE, sys.argv[1:], parser)
    run_training(build_trainer, script, config, model_args)


if __name__ == "__main__":
    main()
