"""Train LaViT: learned tokens that say what and where a larger model looks (arXiv 2601.10129).

    accelerate launch examples/train_lavit.py                                     # mazes: teacher, signals, student
    accelerate launch examples/train_lavit.py --config hub_configs/lavit-3b/sft.yaml --teacher_dir signals
    accelerate launch examples/train_lavit.py --config hub_configs/lavit-3b/single_stage.yaml \\
        --data_path lavit_15k_for_training.json --image_folder images             # the published data set
    python examples/train_lavit.py --config hub_configs/lavit-3b/sft.yaml --dry_run   # what that would do, no weights

Without data it follows `hub_configs/maze-tiny/lavit.yaml`: the tiny base is trained to write all its steps (the
teacher, `lavit_teacher.yaml`), what it sees and where it looks is extracted, and a student learns both. Teacher and
signals are kept beside the student and used again; a run that was stopped goes on. Every option of `LavitSFTConfig`,
`LatentModelConfig` and of the script arguments is a YAML key and a command-line flag; flags win. The arguments of the
published script are understood too (`hub_configs/methods/lavit.md`).
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, set_seed

from modeling_latent import learned_tokens, load_latent_model
from modeling_latent.generation_latent import saved_generation_config
from trainers import LatentSFTTrainer, LavitSFTConfig
from trainers.data.lavit import CHECKS, read_lavit
from trainers.data.mazes import maze_dataset, published_identities
from trainers.data.records import record_from_row, records_to_dataset
from trainers.data.teacher_signals import load_teacher_signals
from trainers.model_loading import LatentModelConfig, load_for_training
from trainers.published_arguments import PublishedParser
from trainers.scripts import (
    MAZES,
    TABLE_OF_MAZES,
    TINY_BASE,
    FirstRun,
    ScriptArguments,
    load_table,
    parse_recipe,
    run_training,
)
from trainers.teacher_store import describe_teacher_folder, load_teacher_dataset
from trainers.teachers import TeacherConfig, extract_teacher

MAZE_RECIPE = MAZES / "lavit.yaml"
TEACHER_RECIPE = MAZES / "lavit_teacher.yaml"
# Of a process that a launcher started; the teacher is trained by one that knows of no others.
LAUNCHER = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "GROUP_", "ROLE_")
LAUNCHER_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class LavitScriptArguments(ScriptArguments):
    """What to train on."""

    data_path: str | None = field(
        default=None, metadata={"help": "The published training JSON (an object with `results`); default: made mazes."}
    )
    teacher_dir: str | None = field(
        default=None, metadata={"help": "Folder that examples/extract_teacher.py wrote, in place of data_path."}
    )
    v_top_dir: str | None = field(
        default=None, metadata={"help": "Where relative paths of concepts begin, where image_folder does not say."}
    )
    attention_dir: str | None = field(default=None, metadata={"help": "The same of the attention."})
    max_samples: int | None = field(
        default=None, metadata={"help": "The first so many rows of data_path, or samples of teacher_dir."}
    )
    check: str = field(
        default="content",
        metadata={"help": f"Of the signals in data_path, before the run: one of {', '.join(CHECKS)}."},
    )
    maze_teacher: str | None = field(
        default=None,
        metadata={"help": "Teacher of the mazes, trained if the folder is absent; default: <output_dir>-teacher."},
    )


@dataclass
class TrainLavitConfig(FirstRun, LavitSFTConfig):
    """`LavitSFTConfig` with defaults for a first run on the tiny base; a YAML file sets the real ones."""

    output_dir: str | None = field(default="runs/lavit-maze", metadata={"help": "Where the model is saved."})


# Data ---------------------------------------------------------------------------------------------------------------


def load_data(
    script: LavitScriptArguments, config: LavitSFTConfig, model_args: LatentModelConfig
) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation records, with the signals of a teacher.

    Raises:
        ValueError: options that contradict each other, or a folder of signals that is not complete.
        RecordShareError: too many rows of the file are bad.
    """
    given = [name for name in ("data_path", "teacher_dir") if getattr(script, name) is not None]
    if len(given) == 2:
        raise ValueError(f"data_path={script.data_path!r} and teacher_dir={script.teacher_dir!r}: give one of them")
    if script.data_path is None:
        idle = [name for name in ("v_top_dir", "attention_dir") if getattr(script, name) is not None]
        if idle:
            raise ValueError(f"{idle[0]}={getattr(script, idle[0])!r} is read with data_path only; leave it out")
    if script.teacher_dir is not None:
        table = load_teacher_dataset(script.teacher_dir, image_root=script.image_folder)
        return table.select(range(min(len(table), script.max_samples or len(table)))), None
    if script.data_path is not None:
        options = {
            "v_top_dir": script.v_top_dir,
            "attention_dir": script.attention_dir,
            "max_samples": script.max_samples,
            "check": script.check,
            "need": config.needed_signals(),
            "concept_size": model_args.concept_head_size,
        }
        folder = script.image_folder or Path(script.data_path).parent
        return load_table(
            lambda report: read_lavit(script.data_path, folder, report=report, **options), config.max_bad_share
        ), None
    return maze_data(script, config, model_args)


def maze_data(
    script: LavitScriptArguments, config: LavitSFTConfig, model_args: LatentModelConfig
) -> tuple[Dataset, Dataset | None]:
    """Mazes with what the teacher of the mazes sees in them; the last `num_eval_mazes` are held out."""
    exclude = published_identities(script.vsp_dir) if script.vsp_dir else frozenset()
    seed = config.seed if script.maze_seed is None else script.maze_seed
    records = maze_dataset(script.num_mazes or TABLE_OF_MAZES, seed=seed, split="train", exclude=exclude)
    if not config.needed_signals():
        table = records
    elif script.dry_run:
        width = model_args.concept_head_size or teacher_width()
        table = records_to_dataset({**record_from_row(row), "teacher": stand_in(width)} for row in records)
    else:
        if config.uses_concept and model_args.concept_head_size not in (None, teacher_width()):
            raise ValueError(
                f"concept_head_size={model_args.concept_head_size}, but the teacher of the mazes is {teacher_width()} "
                "wide; give data_path or teacher_dir, or leave concept_head_size out"
            )
        table = load_teacher_dataset(maze_signals(script, config, records))
    held_out = min(script.num_eval_mazes, len(table) // 2)
    cut = len(table) - held_out
    return table.select(range(cut)), table.select(range(cut, len(table))) if held_out else None


def stand_in(width: int) -> dict:
    """Signals of no teacher, for a dry run: uniform."""
    return {"concept": {"values": [1.0] * width}, "attention": {"values": [1.0]}, "grid": [1, 1], "image": 0}


def teacher_width() -> int:
    """Width of the teacher of the mazes."""
    return AutoConfig.from_pretrained(TINY_BASE).get_text_config().hidden_size


def maze_signals(script: LavitScriptArguments, config: LavitSFTConfig, records: Dataset) -> Path:
    """The folder of what the teacher of the mazes sees in these; what is there already is used."""
    state = PartialState()
    folder = Path(script.maze_teacher or f"{config.output_dir}-teacher")
    if state.is_main_process and not folder.exists():
        train_maze_teacher(folder, config, script)
    state.wait_for_everyone()
    options = TeacherConfig(output_dir=f"{config.output_dir}-signals", max_new_tokens=128, batch_size=64)
    model, processor = load_latent_model(folder)
    signals = extract_teacher(options, model.to(state.device).eval(), processor, records)
    if state.is_main_process:
        print(f"{describe_teacher_folder(signals)}\nsignals of the teacher in {signals}")
    state.wait_for_everyone()  # the index is written by the main process
    return signals


def train_maze_teacher(folder: Path, config: LavitSFTConfig, script: LavitScriptArguments) -> None:
    """Train the tiny base to write all its steps: one process, whatever this run is. The folder appears when the
    teacher is complete.

    Raises:
        subprocess.CalledProcessError: the training failed; its error is printed above.
    """
    partial_folder = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    flags = {"output_dir": partial_folder, "use_cpu": config.use_cpu, "bf16": config.bf16, "num_eval_mazes": 0}
    flags |= {"vsp_dir": script.vsp_dir} if script.vsp_dir else {}
    command = [sys.executable, Path(__file__).with_name("train_ivtlr.py"), "--config", TEACHER_RECIPE]
    command += [f"--{name}={value}" for name, value in flags.items()]
    alone = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_NAMES and not name.startswith(LAUNCHER)
    }
    print(f"training the teacher of the mazes, kept in {folder}", flush=True)
    subprocess.run([str(word) for word in command], env=alone, check=True)
    os.replace(partial_folder, folder)


# Model --------------------------------------------------------------------------------------------------------------


def complete_model_options(config: LavitSFTConfig, model_args: LatentModelConfig, data: Dataset) -> None:
    """The heads that the losses need, where the options do not say: the concept head is as wide as the teacher."""
    if config.uses_concept and model_args.concept_head_size is None:
        first = load_teacher_signals(record_from_row(data[0]), need=("concept",))
        model_args.concept_head_size = first.concept.shape[-1]
    if config.uses_attention and config.attention_predictor == "head" and model_args.attention_head is None:
        model_args.attention_head = True


def build_trainer(
    script: LavitScriptArguments, config: LavitSFTConfig, model_args: LatentModelConfig, weights: bool = True
) -> LatentSFTTrainer:
    """The trainer of a recipe; the model stays on the meta device without `weights`."""
    train, held_out = load_data(script, config, model_args)
    if not len(train):
        raise ValueError("there is no record to train on; the summary above says why rows or samples were left out")
    complete_model_options(config, model_args, train)
    set_seed(config.seed)  # before rows are added to an embedding, or a head is made
    model, processor, peft_config = load_for_training(
        model_args,
        config.latent_method or "lavit",
        weights=weights,
        trust_remote_code=config.trust_remote_code,
        latent_tokens=None if config.num_latent_tokens is None else learned_tokens(config.num_latent_tokens),
    )
    if config.uses_concept:
        config.concept_size = model.config.concept_head_size
    model.generation_config = saved_generation_config(model.generation_config, **config.decoding())
    return LatentSFTTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        peft_config=peft_config,
    )


def main() -> None:
    parser = partial(PublishedParser, stage="lavit")
    classes = (LavitScriptArguments, TrainLavitConfig)
    script, config, model_args = parse_recipe(classes, MAZE_RECIPE, sys.argv[1:], parser)
    run_training(build_trainer, script, config, model_args)


if __name__ == "__main__":
    main()
