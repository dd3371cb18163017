"""What the training scripts in `examples/` share: arguments, data, defaults of a first run, the run itself."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import TrlParser

from .adapters import quantised_bits
from .data.graphs import graph_dataset, graph_stream
from .data.mazes import maze_dataset, maze_stream, published_identities
from .data.records import Record, RecordReport, records_to_dataset
from .dry_run import dry_run_report, dry_run_settings
from .model_loading import LatentModelConfig

MAZES = Path(__file__).resolve().parents[1] / "hub_configs" / "maze-tiny"
TINY_BASE = str(MAZES / "base")
TABLE_OF_MAZES = 2000  # where an endless stream will not do
TABLE_OF_GRAPHS = 2000


@dataclass
class ScriptArguments:
    """What to train on."""

    data_path: str | None = field(
        default=None,
        metadata={"help": "JSON or JSONL in the method's format, or a meta file of several; default: made mazes."},
    )
    image_folder: str | None = field(default=None, metadata={"help": "Folder that relative image paths belong to."})
    num_mazes: int | None = field(
        default=None, metadata={"help": "Generated mazes; default: without end, or 2,000 where a table is needed."}
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
class FirstRun:
    """Defaults of a training config for a first run on the tiny base; a YAML file sets the real ones."""

    max_steps: int = field(default=300, metadata={"help": "Optimiser steps; -1: num_train_epochs."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Samples per step and device."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    bf16: bool | None = field(default=torch.cuda.is_available(), metadata={"help": "Train in bfloat16."})
    use_cpu: bool = field(default=not torch.cuda.is_available(), metadata={"help": "Train on the CPU."})
    activation_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations in the backward."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two logs."})


def load_mazes(script: ScriptArguments, config: Any, stream: bool = True) -> tuple[Any, Dataset | None]:
    """Generated mazes to train on, and held-out ones; none of the published when their folder is given.

    Args:
        stream: mazes without end unless `num_mazes` is set; False: a table, where samples are planned or repeated.
    """
    exclude = published_identities(script.vsp_dir) if script.vsp_dir else frozenset()
    seed = config.seed if script.maze_seed is None else script.maze_seed
    options = {"seed": seed, "exclude": exclude}
    if script.num_mazes or not stream:
        train = maze_dataset(script.num_mazes or TABLE_OF_MAZES, split="train", **options)
    else:  # every process and loader worker draws mazes of its own
        shards = config.world_size * max(1, config.dataloader_num_workers)
        train = maze_stream(split="train", num_shards=shards, **options)
    held_out = script.num_eval_mazes
    return train, maze_dataset(held_out, split="validation", **options) if held_out else None


def load_graphs(script: ScriptArguments, config: Any, stream: bool = True, **sizes: Any) -> tuple[Any, Dataset | None]:
    """Generated questions on graphs to train on, and held-out ones; `num_mazes`, `num_eval_mazes` and `maze_seed` say
    how many and which.

    Args:
        stream: questions without end unless `num_mazes` is set; False: a table.
        sizes: of a graph, see `GraphGenerator`.
    """
    seed = config.seed if script.maze_seed is None else script.maze_seed
    if script.num_mazes or not stream:
        train = graph_dataset(script.num_mazes or TABLE_OF_GRAPHS, seed, **sizes)
    else:
        train = graph_stream(seed, num_shards=config.world_size * max(1, config.dataloader_num_workers), **sizes)
    held_out = script.num_eval_mazes
    return train, graph_dataset(held_out, seed, "validation", **sizes) if held_out else None


def load_table(read: Callable[[RecordReport], Iterable[Record]], max_bad_share: float) -> Dataset:
    """The records of a reader as a table; says which rows were left out.

    Args:
        read: from a report to records.
        max_bad_share: the share of bad rows above which the script stops.

    Raises:
        RecordShareError: too many bad rows.
    """
    report = RecordReport(max_bad_share)
    data = records_to_dataset(read(report), decode=False)  # the collator opens the images and names a bad row
    report.check()
    print(report.summary())
    return data


def parse_recipe(
    configs: Sequence[type], recipe: Path, arguments: Sequence[str], parser: Callable[[Any], TrlParser] = TrlParser
) -> tuple[Any, ...]:
    """The dataclasses of a script and [`LatentModelConfig`], from flags and `--config`; without `--config` and
    `--data_path` from the maze recipe. The model is the tiny base when none is named."""
    if not {"--config", "--data_path"} & {argument.split("=")[0] for argument in arguments}:
        arguments = ["--config", str(recipe), *arguments]
    *parsed, model_args = parser((*configs, LatentModelConfig)).parse_args_and_config(list(arguments))
    model_args.model_name_or_path = model_args.model_name_or_path or TINY_BASE
    return *parsed, model_args


def run_training(
    build_trainer: Callable[..., Any], script: ScriptArguments, config: Any, model_args: LatentModelConfig
) -> None:
    """Train, evaluate and save; with `--dry_run` only say what that would be.

    Args:
        build_trainer: from the three argument classes and `weights=` to a trainer.
    """
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
