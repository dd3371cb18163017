"""Train LASER: the latent span of a vision-language model, with the DWAL loss (arXiv 2601.06803).

    accelerate launch examples/train_laser.py                                         # mazes, tiny base, on a CPU
    accelerate launch examples/train_laser.py --config hub_configs/laser-7b/sft.yaml  # the published format and recipe
    python examples/train_laser.py --config hub_configs/laser-7b/sft.yaml --dry_run   # what that would do, no weights

Without --config and --data_path it follows `hub_configs/maze-tiny/laser.yaml`. Every option of `LatentSFTConfig`,
`LatentModelConfig` and of the script arguments below is a YAML key and a command-line flag; flags win.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import set_seed
from trl import TrlParser

from trainers import LatentSFTConfig, LatentSFTTrainer
from trainers.adapters import quantised_bits
from trainers.data.llava import read_source
from trainers.data.mazes import maze_dataset, maze_stream, published_identities
from trainers.data.records import RecordReport, records_to_dataset
from trainers.dry_run import dry_run_report, dry_run_settings
from trainers.model_loading import LatentModelConfig, load_for_training

MAZES = Path(__file__).resolve().parents[1] / "hub_configs" / "maze-tiny"
TINY_BASE, MAZE_RECIPE = str(MAZES / "base"), str(MAZES / "laser.yaml")
DYNAMIC_MAZES = 2000  # lengths of an endless stream are not known before training


@dataclass
class ScriptArguments:
    """What to train on."""

    data_path: str | None = field(
        default=None,
        metadata={"help": "LLaVA JSON or JSONL, or a meta file of several sources; default: generated mazes."},
    )
    image_folder: str | None = field(default=None, metadata={"help": "Folder that relative image paths belong to."})
    num_mazes: int | None = field(
        default=None, metadata={"help": "Generated mazes; default: without end, with enable_dynamic_batch 2,000."}
    )
    maze_seed: int | None = field(default=None, metadata={"help": "Seed of the generated mazes; default: seed."})
    num_eval_mazes: int = field(default=100, metadata={"help": "Held-out mazes for the evaluation loss."})
    vsp_dir: str | None = field(
        default=os.environ.get("LATENT_VSP_DIR"),
        metadata={"help": "Folder of the published VSP mazes: none of them is trained on. Default: LATENT_VSP_DIR."},
    )
    dry_run: bool = field(default=False, metadata={"help": "Say what the recipe would do; read no weights."})
    dry_run_processes: int | None = field(
        default=None, metadata={"help": "Processes of the real run, for the numbers of --dry_run."}
    )


@dataclass
class TrainLaserConfig(LatentSFTConfig):
    """`LatentSFTConfig` with defaults for a first run on the tiny base; a YAML file sets the real ones."""

    output_dir: str | None = field(default="runs/laser-maze", metadata={"help": "Where the model is saved."})
    max_steps: int = field(default=300, metadata={"help": "Optimiser steps; -1: num_train_epochs."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Samples per step and device."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    bf16: bool | None = field(default=torch.cuda.is_available(), metadata={"help": "Train in bfloat16."})
    use_cpu: bool = field(default=not torch.cuda.is_available(), metadata={"help": "Train on the CPU."})
    activation_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations in the backward."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two logs."})


def load_data(script: ScriptArguments, config: LatentSFTConfig) -> tuple:
    """Training and evaluation records."""
    if script.data_path is None:
        exclude = published_identities(script.vsp_dir) if script.vsp_dir else frozenset()
        seed = config.seed if script.maze_seed is None else script.maze_seed
        options = {"seed": seed, "exclude": exclude}
        number = script.num_mazes or (DYNAMIC_MAZES if config.enable_dynamic_batch else None)
        if number:
            train = maze_dataset(number, split="train", **options)
        else:  # every process and loader worker draws mazes of its own
            shards = config.world_size * max(1, config.dataloader_num_workers)
            train = maze_stream(split="train", num_shards=shards, **options)
        held_out = script.num_eval_mazes
        return train, maze_dataset(held_out, split="validation", **options) if held_out else None
    report = RecordReport(config.max_bad_share)
    records = read_source(
        script.data_path, script.image_folder, require_chain=config.latent_form == "chain", report=report
    )
    data = records_to_dataset(records, decode=False)  # the collator opens the images and names a bad row
    report.check()
    print(report.summary())
    return data, None


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
    parser = TrlParser((ScriptArguments, TrainLaserConfig, LatentModelConfig))
    arguments = sys.argv[1:]
    if not {"--config", "--data_path"} & {argument.split("=")[0] for argument in arguments}:
        arguments = ["--config", MAZE_RECIPE, *arguments]
    script, config, model_args = parser.parse_args_and_config(arguments)
    model_args.model_name_or_path = model_args.model_name_or_path or TINY_BASE
    if script.dry_run:
        with dry_run_settings(config):
            trainer = build_trainer(script, config, model_args, weights=False)
            print(dry_run_report(trainer, script.dry_run_processes, quantised_bits(model_args)))
        return
    trainer = build_trainer(script, config, model_args)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.save_model(config.output_dir)
    trainer.accelerator.print(f"saved to {config.output_dir}")


if __name__ == "__main__":
    main()
