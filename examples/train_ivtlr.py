"""Train IVT-LR or Coconut: explicit steps replaced by latents, stage by stage (arXiv 2510.12603, 2412.06769).

    accelerate launch examples/train_ivtlr.py                                                     # mazes, tiny base
    accelerate launch examples/train_ivtlr.py --config hub_configs/ivtlr-qwen2vl-m3cot/sft.yaml --data_path m3cot.json
    accelerate launch examples/train_ivtlr.py --config hub_configs/coconut-prosqa/sft.yaml        # text alone
    python examples/train_ivtlr.py --config hub_configs/ivtlr-qwen2vl-m3cot/sft.yaml --dry_run    # no weights

Without --config and --data_path it follows `hub_configs/maze-tiny/ivtlr.yaml`: a step is one move on a maze. A model
of text is trained on generated questions on graphs when no data is named. Every option of `StagedSFTConfig`,
`LatentModelConfig` and of the script arguments is a YAML key and a command-line flag; flags win. The keys of the
published YAML files are understood too (`hub_configs/methods/ivtlr.md`).
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import set_seed

from modeling_latent.generation_latent import saved_generation_config
from trainers import LatentSFTTrainer, StagedSFTConfig
from trainers.checkpoint_files import checkpoint_of_epoch
from trainers.data.graphs import SMALL_GRAPHS
from trainers.data.step_readers import STEP_READERS, read_steps
from trainers.model_loading import LatentModelConfig, load_for_training
from trainers.published_arguments import PublishedParser
from trainers.scripts import (
    MAZES,
    FirstRun,
    ScriptArguments,
    load_graphs,
    load_mazes,
    load_table,
    parse_recipe,
    run_training,
)

MAZE_RECIPE = MAZES / "ivtlr.yaml"
GRAPH_OPTIONS = ("num_nodes", "num_edges", "num_entities", "path_lengths", "notation")


@dataclass
class StagedScriptArguments(ScriptArguments):
    """What to train on."""

    data_path: str | None = field(
        default=None,
        metadata={"help": "File or Hub id in data_format; default: made mazes, for a model of text alone graphs."},
    )
    data_format: str = field(default="prosqa", metadata={"help": f"Format of data_path: {', '.join(STEP_READERS)}."})
    data_split: str | None = field(default=None, metadata={"help": "Part of a Hub id, e.g. train."})
    num_mazes: int | None = field(
        default=None,
        metadata={"help": "Generated mazes or graphs; default: without end, or 2,000 where a table is needed."},
    )
    eval_data_path: str | None = field(default=None, metadata={"help": "Data of the evaluation loss, same format."})
    eval_data_split: str | None = field(default=None, metadata={"help": "Part of that Hub id, e.g. validation."})
    small: bool = field(default=False, metadata={"help": "Generated graphs have the few names of a tiny model."})
    num_nodes: int | None = field(default=None, metadata={"help": "Entities and concepts of a generated graph."})
    num_edges: int | None = field(default=None, metadata={"help": "Its sentences."})
    num_entities: int | None = field(default=None, metadata={"help": "Its entities, two of them rivals."})
    path_lengths: list[int] | None = field(default=None, metadata={"help": "Its numbers of steps, drawn from these."})
    notation: str | None = field(
        default=None, metadata={"help": "Of generated graphs: 'sentences', or 'pairs' for a tiny model."}
    )
    resume_epoch: int | None = field(
        default=None, metadata={"help": "Go on from the checkpoint that output_dir has of the end of this epoch."}
    )


@dataclass
class TrainStagedConfig(FirstRun, StagedSFTConfig):
    """`StagedSFTConfig` with defaults for a first run on the tiny base; a YAML file sets the real ones."""

    output_dir: str | None = field(default="runs/ivtlr-maze", metadata={"help": "Where the model is saved."})
    max_steps: int = field(default=-1, metadata={"help": "Optimiser steps; -1: num_train_epochs."})


def graph_options(script: StagedScriptArguments, has_images: bool) -> dict[str, Any]:
    """The options of generated graphs that were given.

    Raises:
        ValueError: there are some, and no graphs are generated; names them.
    """
    given = {name: getattr(script, name) for name in GRAPH_OPTIONS if getattr(script, name) is not None}
    named = [*given, *(["small"] if script.small else [])]
    if named and (has_images or script.data_path is not None):
        instead = f"data_path={script.data_path!r} is read" if script.data_path else "the model sees, and gets mazes"
        raise ValueError(f"{', '.join(named)}: options of generated graphs, but {instead}; leave them out")
    return {**(SMALL_GRAPHS if script.small else {}), **given}


def load_data(script: StagedScriptArguments, config: StagedSFTConfig, has_images: bool) -> tuple[Any, Any]:
    """Training and evaluation records."""
    graphs = graph_options(script, has_images)
    if script.data_path is None:
        stream = config.steps_per_stage is not None
        if has_images:
            return load_mazes(script, config, stream)
        return load_graphs(script, config, stream, **graphs)
    options = {"image_folder": script.image_folder, "require_steps": config.staged_mode != "no_cot"}

    def table(path: str | None, split: str | None) -> Dataset | None:
        if path is None:
            return None
        return load_table(
            lambda report: read_steps(script.data_format, path, split, report=report, **options), config.max_bad_share
        )

    return table(script.data_path, script.data_split), table(script.eval_data_path, script.eval_data_split)


def build_trainer(
    script: StagedScriptArguments, config: StagedSFTConfig, model_args: LatentModelConfig, weights: bool = True
) -> LatentSFTTrainer:
    """The trainer of a recipe; the model stays on the meta device without `weights`."""
    set_seed(config.seed)  # before rows are added to an embedding
    model, processor, peft_config = load_for_training(
        model_args, config.latent_method or "ivtlr", weights=weights, trust_remote_code=config.trust_remote_code
    )
    model.generation_config = saved_generation_config(model.generation_config, **config.decoding())
    train, held_out = load_data(script, config, hasattr(processor, "image_processor"))
    if script.resume_epoch and not script.dry_run:
        config.resume_from_checkpoint = str(checkpoint_of_epoch(config.output_dir, script.resume_epoch))
    return LatentSFTTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        peft_config=peft_config,
    )


def main() -> None:
    parser = partial(PublishedParser, stage="staged")
    classes = (StagedScriptArguments, TrainStagedConfig)
    script, config, model_args = parse_recipe(classes, MAZE_RECIPE, sys.argv[1:], parser)
    run_training(build_trainer, script, config, model_args)


if __name__ == "__main__":
    main()
