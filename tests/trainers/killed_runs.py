"""Runs in processes of their own that end with SIGKILL, at a named point or when the test says so.

The processes are forked from one that has imported everything, so that each costs the training only.
"""

import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from transformers import Trainer, TrainerCallback

from tests.latent import tiny_latent_model
from tests.tiny import tiny_processor
from trainers import LatentSFTConfig, LatentSFTTrainer, checkpoint_files, checkpoints
from trainers.data.mazes import maze_dataset, maze_stream
from trainers.fault_tolerance import NonFiniteError
from trainers.tiny import DEFAULT_FAMILY

STEPS = 7
# The rows are not a multiple of the batch, so that the run has unequal steps and crosses into further epochs.
DATA: dict[str, Callable[[], Any]] = {
    "table": lambda: maze_dataset(7, seed=3, sizes=(3,)),
    "stream": lambda: maze_stream(seed=1, sizes=(3,), num_shards=2),
}


def let_deepspeed_use_gloo() -> None:
    """Without this DeepSpeed first compiles an operator for shared memory, which only its inference calls."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def build_run(
    folder: Path, data: str = "table", model: Any = None, family: str = DEFAULT_FAMILY, **options: Any
) -> LatentSFTTrainer:
    """A short run whose every random part counts: sampler, scheduler, accumulation, momenta, exposure."""
    if "deepspeed" in options:
        let_deepspeed_use_gloo()
    given = {name: options.pop(name) for name in ("callbacks", "eval_dataset", "peft_config") if name in options}
    fixed = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none"}
    shape = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS}
    saves = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "logging_steps": 1}
    recipe = {"learning_rate": 1e-2, "latent_exposure": "own", "latent_exposure_prob": 0.5, "warmup_steps": 2}
    quiet = {"activation_checkpointing": False, "lr_scheduler_type": "cosine"}
    model = tiny_latent_model(latent_method="laser", family=family) if model is None else model
    args = LatentSFTConfig(**{**fixed, **shape, **saves, **recipe, **quiet, **options})
    return LatentSFTTrainer(
        model=model, args=args, train_dataset=DATA[data](), processing_class=tiny_processor(family), **given
    )


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _AtStep(TrainerCallback):
    """Calls a function after an optimiser step, before anything is saved."""

    def __init__(self, step: int, call: Callable[[], None]) -> None:
        self.step, self.call = step, call

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.call()


def _half_deleted(folder: Any, **kwargs: Any) -> None:
    """Instead of `shutil.rmtree`: dies when half of a checkpoint is gone."""
    if Path(folder).is_dir() and Path(folder).parent.name == checkpoint_files.DELETED:
        files = sorted(Path(folder).iterdir())
        for file in files[: len(files) // 2]:
            file.unlink()
        die()
    shutil.rmtree(folder, **kwargs)


def _torn_weights(*args: Any, **kwargs: Any) -> None:
    """Instead of saving the optimizer: dies with the weights written to half of their length."""
    (weights,) = Path(args[1]).glob("model.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    die()


def _spoil_losses(trainer: LatentSFTTrainer) -> None:
    """From now on the second micro-batch of a step has a NaN for its latent loss, in this process."""
    watch, calls = trainer.watch_losses, []

    def spoiled(cross_entropy: torch.Tensor, latent: torch.Tensor) -> None:
        calls.append(latent)
        watch(cross_entropy, latent * math.nan if len(calls) % 2 == 0 else latent)

    trainer.watch_losses = spoiled


# Where a process dies while `checkpoint-4` is made: what is replaced, and by what. `checkpoint-2` is there before.
POINTS: dict[str, tuple[Any, str, Any]] = {
    "inside a file": (Trainer, "_save_optimizer_and_scheduler", lambda self, folder: _torn_weights(self, folder)),
    "between files": (Trainer, "_save_rng_state", die),
    "before the rename": (checkpoint_files, "sync_to_disk", die),
    "after the rename": (checkpoints, "rotate", die),
    "while the old one is deleted": (checkpoint_files, "shutil", SimpleNamespace(rmtree=_half_deleted)),
}


def _die_at_file_operation(folder: str, number: int) -> None:
    """The process dies just before it opens, makes, renames or removes a file of the run for the `number`-th time."""
    count = itertools.count(1)

    def hook(event: str, args: tuple) -> None:
        if event == "open" or event.startswith(("os.", "shutil.")):
            if args and str(args[0]).startswith(folder) and next(count) == number:
                die()

    sys.addaudithook(hook)


def _run(
    folder: str, point: str | int | None, resume: str | None, data: str, env: dict[str, str], options: dict[str, Any]
) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    # Not the method by which this process was started: loader workers of that kind outlive a killed parent.
    multiprocessing.set_start_method("fork", force=True)
    trainer = build_run(Path(folder), data, **options)
    if isinstance(point, int):
        _die_at_file_operation(folder, point)
    elif point == "in training":
        trainer.add_callback(_AtStep(5, die))
    elif point == "bad loss":
        trainer.add_callback(_AtStep(2, lambda: _spoil_losses(trainer)))
    elif point is not None:
        owner, name, replacement = POINTS[point]
        trainer.add_callback(_AtStep(4, lambda: mock.patch.object(owner, name, replacement).start()))
    try:
        trainer.train(resume_from_checkpoint=resume)
    except NonFiniteError as error:
        Path(folder, f"error-{trainer.args.process_index}.txt").write_text(str(error))
        torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), Path(folder, "stopped.pt"))
        raise
    trainer.save_model(trainer.args.output_dir)
    # What a test compares and asserts on: losses by step, and how the processes were joined.
    losses = {entry["step"]: entry["loss_total"] for entry in trainer.state.log_history if "grad_norm" in entry}
    state = trainer.accelerator.state
    facts = {"losses": losses, "type": str(state.distributed_type), "processes": state.num_processes}
    Path(folder, f"facts-{state.process_index}.json").write_text(json.dumps(facts))


def start(
    folder: Path,
    point: str | int | None = None,
    resume: str | None = None,
    data: str = "table",
    env: dict[str, str] | None = None,
    **options: Any,
) -> multiprocessing.process.BaseProcess:
    """Start a run in a process of its own.

    Args:
        folder: output folder.
        point: where it dies: `"in training"`, `"bad loss"`, a key of `POINTS`, the number of a file operation, or
            None for never.
        resume: `resume_from_checkpoint`.
        data: key of `DATA`.
        env: environment variables, e.g. those that torchrun sets.
        options: of the configuration.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run, args=(str(folder), point, resume, data, env or {}, options))
    process.start()
    return process


def main(folder: str, point: str, resume: str) -> None:
    """For torchrun: the process of rank 1 dies at the point (`none` for never)."""
    dies = os.environ["RANK"] == "1" and point != "none"
    _run(folder, point if dies else None, resume, "table", {}, {})


if __name__ == "__main__":
    main(*sys.argv[1:])
