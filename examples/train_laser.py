"""Train LASER: the latent span of a vision-language model, with the DWAL loss (arXiv 2601.06803).

    accelerate launch examples/train_laser.py                                        # mazes, tiny base, on a CPU
    accelerate launch examples/train_laser.py --config hub_configs/laser-7b/sft.yaml  # the published format and recipe

Without --config and --data_path it follows `hub_configs/maze-tiny/laser.yaml`. Every option of `LatentSFTConfig` and
of the script arguments below is a YAML key and a command-line flag; flags win.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from trl import ModelConfig, TrlParser, get_peft_config

from modeling_latent import LatentProcessor, convert_stock_checkpoint
from trainers import LatentSFTConfig, LatentSFTTrainer
from trainers.data.llava import read_source
from trainers.data.mazes import maze_dataset, maze_stream
from trainers.data.records import RecordReport, records_to_dataset

MAZES = Path(__file__).resolve().parents[1] / "hub_configs" / "maze-tiny"
TINY_BASE, MAZE_RECIPE = str(MAZES / "base"), str(MAZES / "laser.yaml")


@dataclass
class ScriptArguments:
    """What to train on."""

    data_path: str | None = field(
        default=None,
        metadata={"help": "LLaVA JSON or JSONL, or a meta file of several sources; default: generated mazes."},
    )
    image_folder: str | None = field(default=None, metadata={"help": "Folder that relative image paths belong to."})
    freeze_vision_tower: bool = field(
        default=False, metadata={"help": "Keep the vision tower and its merger as they are."}
    )
    min_pixels: int | None = field(
        default=None, metadata={"help": "Least number of pixels of an image after resizing."}
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "Greatest number of pixels of an image after resizing."}
    )
    maze_seed: int = field(default=0, metadata={"help": "Seed of the generated mazes."})
    num_eval_mazes: int = field(default=100, metadata={"help": "Held-out mazes for the evaluation loss."})


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
    report_to: str | None = field(default="none", metadata={"help": "tensorboard, wandb or none."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two logs."})


def load_model(args: ModelConfig, script: ScriptArguments, config: LatentSFTConfig) -> tuple:
    """A latent checkpoint as it is, a stock one with latent tokens added."""
    name = args.model_name_or_path or TINY_BASE
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"model_name_or_path={name!r} has no config.json; give a folder written by save_pretrained")
    if args.load_in_4bit or args.load_in_8bit or args.model_revision != "main":
        raise ValueError("load_in_4bit, load_in_8bit and model_revision are not read by this script; leave them out")
    kwargs = {"dtype": args.dtype or "auto"}
    if args.attn_implementation:
        kwargs["attn_implementation"] = args.attn_implementation
    code = {"trust_remote_code": config.trust_remote_code}
    stock = AutoConfig.from_pretrained(name, **code)
    if stock.model_type.startswith("latent_"):
        model = AutoModelForImageTextToText.from_pretrained(name, **code, **kwargs)
        processor = LatentProcessor.from_pretrained(name)
    else:
        model, processor = convert_stock_checkpoint(name, method=config.latent_method or "laser", **kwargs)
    size = dict(processor.image_processor.size)
    size["shortest_edge"] = script.min_pixels or size["shortest_edge"]
    size["longest_edge"] = script.max_pixels or size["longest_edge"]
    if size["shortest_edge"] > size["longest_edge"]:
        raise ValueError(
            f"min_pixels={size['shortest_edge']} is above max_pixels={size['longest_edge']}; give both, in order"
        )
    processor.image_processor.size = size
    if script.freeze_vision_tower:
        model.model.visual.requires_grad_(False)
    return model, processor


def load_data(script: ScriptArguments, config: LatentSFTConfig) -> tuple:
    """Training and evaluation records."""
    if script.data_path is None:
        mazes = maze_stream(seed=script.maze_seed, split="train")
        number = script.num_eval_mazes
        return mazes, maze_dataset(number, seed=script.maze_seed, split="validation") if number else None
    report = RecordReport(config.max_bad_share)
    records = read_source(
        script.data_path, script.image_folder, require_chain=config.latent_form == "chain", report=report
    )
    data = records_to_dataset(records, decode=False)  # the collator opens the images and names a bad row
    report.check()
    print(report.summary())
    return data, None


def main() -> None:
    parser = TrlParser((ScriptArguments, TrainLaserConfig, ModelConfig))
    arguments = sys.argv[1:]
    if not {"--config", "--data_path"} & {argument.split("=")[0] for argument in arguments}:
        arguments = ["--config", MAZE_RECIPE, *arguments]
    script, config, model_args = parser.parse_args_and_config(arguments)
    model, processor = load_model(model_args, script, config)
    train, held_out = load_data(script, config)
    trainer = LatentSFTTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    if held_out is not None:
        trainer.evaluate()
    trainer.save_model(config.output_dir)
    processor.save_pretrained(config.output_dir)
    print(f"saved to {config.output_dir}")


if __name__ == "__main__":
    main()
