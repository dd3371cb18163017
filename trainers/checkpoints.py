"""The one file that touches private methods of `transformers.Trainer`: checkpoints that survive a kill, and resuming.

[`FaultTolerantTrainer`] is mixed into the trainers. It lets the stock Trainer write a checkpoint into a folder beside
its final place and renames it when it is whole (`checkpoint_files.py`), picks the newest complete one to resume from,
and stops a run whose loss is not finite before the parameters are changed (`fault_tolerance.py`).
"""

import inspect
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel, Trainer

from .checkpoint_files import (
    INCOMPLETE,
    checkpoint_step,
    complete_checkpoints,
    describe,
    holds_weights,
    list_checkpoints,
    missing_parts,
    move_into,
    publish,
    recover,
    remove,
    rotate,
)
from .fault_tolerance import LabelledCollator, LossGuard, NonFiniteError, failure_message, non_finite_weights
from .tensor_names import not_loaded

logger = logging.getLogger(__name__)

# Methods of the Trainer that are overridden here, with parameters that are relied on.
_OVERRIDDEN = {
    "_finalize_training": ("trial",),
    "_get_grad_norm": ("model", "grad_norm"),
    "_get_output_dir": ("trial",),
    "_issue_warnings_after_load": ("load_result",),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_run_epoch": (),
    "_save_checkpoint": ("model", "trial"),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "save_model": ("output_dir", "_internal_call"),
    "train": ("resume_from_checkpoint",),
}
# What a method of the Trainer must still do, in this order, for the overrides to be called at the right moment.
_RELIED_ON = {
    "_run_epoch": ("self.get_batch_samples(", "self.training_step(", "self._get_grad_norm(", "self.optimizer.step()"),
    "_save_checkpoint": ("self._get_output_dir(", "self.save_model(", "self._push_from_checkpoint("),
    "_load_from_checkpoint": ("load_state_dict(", "self._issue_warnings_after_load("),
    "_load_best_model": ("load_state_dict(", "self._issue_warnings_after_load("),
    "_finalize_training": ("self._load_best_model()",),
}


def check_trainer_methods() -> None:
    """Check what this file relies on in the installed transformers.

    Raises:
        RuntimeError: names the version whose Trainer has another form, and what is missing.
    """
    wrong = []
    for name, parameters in _OVERRIDDEN.items():
        method = getattr(Trainer, name, None)
        if method is None or not set(parameters) <= set(inspect.signature(method).parameters):
            wrong.append(f"Trainer.{name}{parameters}")
    for name, calls in _RELIED_ON.items():
        source = inspect.getsource(getattr(Trainer, name)) if hasattr(Trainer, name) else ""
        places = [source.find(call) for call in calls]
        if -1 in places or places != sorted(places):
            wrong.append(f"Trainer.{name} calling {', '.join(calls)}")
    if wrong:
        raise RuntimeError(
            f"transformers {transformers.__version__} changed its Trainer (not found: {'; '.join(wrong)}); install a "
            "version in the range of pyproject.toml"
        )


# The trainer -----------------------------------------------------------------------------------------------------


def resume_request(value: str | os.PathLike | bool | None) -> str | None:
    """What `resume_from_checkpoint` asks for: None, `"last"`, `"auto"` or a folder.

    `True`, `"true"` and `"last"` mean the newest complete checkpoint of the output folder, `"auto"` the same if there
    is one, `False`, `"false"`, `"none"` and `None` a fresh start; YAML and command line give text.
    """
    text = "none" if value is None else str(value)
    known = {"true": "last", "last": "last", "auto": "auto", "false": None, "none": None, "": None}
    return known.get(text.strip().lower(), text)


class FaultTolerantTrainer(Trainer):
    """What a run has to survive: kills at any moment, torn checkpoints, losses that are not finite.

    Checkpoints are written in `<run>/_incomplete/` by all ranks, brought to the disk, renamed by the main process and
    only then older ones are rotated out; all nodes must share the folder. Uploads to the Hub begin after the rename.
    The trainer's `compute_loss` calls [`watch_losses`] with the terms of each micro-batch.

    Raises:
        RuntimeError: transformers changed what this relies on (at construction).
        NonFiniteError: with `stop_on_nan`, a loss, gradient or weight that is NaN or infinite.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_trainer_methods()
        self._guard = LossGuard()
        self._staging = False
        self._folders_to_push: list[str] = []
        super().__init__(*args, **kwargs)

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`.

        Args:
            resume_from_checkpoint: see [`resume_request`].

        Raises:
            ValueError: no complete checkpoint, or a folder that is not complete; names what is missing.
        """
        if self.args.should_save:
            for line in recover(self.args.output_dir):
                logger.warning(line)
        self.accelerator.wait_for_everyone()
        return super().train(self._checkpoint_to_resume(resume_from_checkpoint), *args, **kwargs)

    def _checkpoint_to_resume(self, value: str | bool | None) -> str | None:
        """The folder that every rank resumes from, or None."""
        request, run = resume_request(value), self.args.output_dir
        torn = {folder: problems for folder in list_checkpoints(run) if (problems := missing_parts(folder))}
        # What counts is complete for every rank, also on a network disk that is slow to show files.
        views = gather_object([[checkpoint_step(folder) for folder in complete_checkpoints(run)]])
        steps = sorted(set.intersection(*map(set, views)))
        newest = os.path.join(run, f"checkpoint-{steps[-1]}") if steps else None
        if request not in (None, "last", "auto"):
            problems = gather_object(
                [missing_parts(request) if os.path.isdir(request) else ["there is no such folder"]]
            )
            problem = describe(sorted(set().union(*problems)))
            if problem:
                remedy = f"resume_from_checkpoint={newest} is complete" if newest else f"{run} has no complete one"
                raise ValueError(f"resume_from_checkpoint={request}: {problem}; {remedy}")
            return request
        newer = [f for f in torn if checkpoint_step(f) > (steps[-1] if steps else -1)]
        listed = "; ".join(f"{folder} is not complete: {describe(torn[folder])}" for folder in newer)
        if request == "last" and newest is None:
            raise ValueError(
                f"resume_from_checkpoint={value}: no complete checkpoint in {run}{f' ({listed})' if listed else ''}; "
                "give 'auto' to start afresh when there is none, or the folder of another run's checkpoint"
            )
        if request is None or newest is None:
            self._say_afresh(request, newest, listed)
            return None
        if listed:
            logger.warning("%s; resuming from %s", listed, newest)
        return newest

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing when the run is over: resumed from its last checkpoint, the stock loop takes one step too many."""
        if self.state.global_step >= self.state.max_steps:
            logger.warning("all %s steps are done: there is nothing left to train", self.state.max_steps)
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _say_afresh(self, request: str | None, newest: str | None, listed: str) -> None:
        if request == "auto":
            torn = f" ({listed})" if listed else ""
            logger.warning("no complete checkpoint in %s%s: training starts afresh", self.args.output_dir, torn)
        elif newest is not None:
            logger.warning("training starts afresh beside %s; resume_from_checkpoint=true goes on from it", newest)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """An error, where the stock method warns: a run must not go on with part of its weights."""
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PreTrainedModel):
            return super()._issue_warnings_after_load(load_result)
        left_out = not_loaded(model, load_result.missing_keys, load_result.unexpected_keys)
        if left_out:
            raise ValueError(
                f"the checkpoint has no values for {len(left_out)} of {len(model.state_dict())} tensors of "
                f"{type(model).__name__} (first: {left_out[0]}); it belongs to another model"
            )

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, INCOMPLETE) if self._staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_weights()
        run, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        staged, target = run / INCOMPLETE / name, run / name
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging, self._folders_to_push = True, []
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        best = run / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == target or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(staged / "trainer_state.json"))  # names the best one's final place
            publish(staged, target)
        self.accelerator.wait_for_everyone()
        if not target.is_dir():
            rank = self.args.process_index
            logger.warning("rank %s does not see %s: resuming needs an output_dir that all nodes share", rank, target)
        for _ in self._folders_to_push:
            super()._push_from_checkpoint(str(target))
        if self.args.should_save:
            keep = {target} | ({Path(self.state.best_model_checkpoint)} if self.state.best_model_checkpoint else set())
            rotate(run, self.args.save_total_limit, keep)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Called by the stock method before the folder is in its place: the upload has to wait for that."""
        self._folders_to_push.append(checkpoint_folder)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """With `save_total_limit=1` the stock method deletes all but the best checkpoint; here each in one step."""
        best = self.state.best_model_checkpoint
        only_best = self.args.save_total_limit == 1 and best is not None and holds_weights(best)
        if self.args.should_save and only_best:
            for folder in list_checkpoints(self._get_output_dir(trial)):
                if not folder.samefile(best):
                    remove(folder)
        return super()._finalize_training(trial, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; a kill leaves the old model, the new one, or a folder that does not load."""
        if self._staging:
            return super().save_model(output_dir, _internal_call=True)
        target = Path(output_dir or self.args.output_dir)
        staged = target / INCOMPLETE / "model"
        # Elsewhere the main process may save alone: no barrier then.
        every_rank = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            if (target / "README.md").is_file():  # peft adds to the card that is there
                shutil.copy(target / "README.md", staged)
        if every_rank:
            self.accelerator.wait_for_everyone()
        super().save_model(str(staged), _internal_call=True)
        if every_rank:
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            move_into(staged, target)
        if every_rank:
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # Losses

    def get_train_dataloader(self) -> Any:
        collator, self.data_collator = self.data_collator, LabelledCollator(self.data_collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._guard.start(batches)
        return batches, num_items

    def watch_losses(self, *terms: torch.Tensor) -> None:
        """Keep the terms of a micro-batch, 0-dim tensors; they are checked once, before the optimiser's step.

        DeepSpeed takes its step inside the last backward: there the check comes before that.
        """
        self._guard.note(*terms)
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self._check_step(None)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # Infinite gradients are the daily business of float16: its scaler leaves the step out.
        self._check_step(None if self.accelerator.mixed_precision == "fp16" else norm)
        return norm

    def _check_step(self, grad_norm: Any) -> None:
        """Stop all ranks when a loss of the step, or its gradient, is not finite on any of them."""
        flags = self.accelerator.reduce(self._guard.flags(grad_norm, self.args.device), reduction="sum")
        bad_loss, bad_gradient = flags.tolist()
        if not bad_loss and not bad_gradient:
            return
        lines = gather_object(self._guard.report(self.args.process_index, every_batch=not bad_loss))
        what = "the loss is not finite" if bad_loss else f"the gradient is not finite (norm {float(grad_norm)})"
        late = self.is_deepspeed_enabled and not bad_loss
        taken = "DeepSpeed has already taken the step" if late else "the step was not taken"
        self._fail(f"{what} at optimiser step {self.state.global_step + 1}; {taken}", lines)

    def _check_weights(self) -> None:
        """Refuse to save, and so to rotate the good checkpoints out for, weights that are not finite."""
        if self.args.stop_on_nan and self.accelerator.reduce(non_finite_weights(self.model), reduction="sum").item():
            self._fail(f"the weights are not finite after optimiser step {self.state.global_step}; not saved", [])

    def _fail(self, what: str, lines: list[str]) -> None:
        folders = complete_checkpoints(self.args.output_dir)
        done = [folder for folder in folders if checkpoint_step(folder) <= self.state.global_step]
        message = failure_message(what, lines, done[-1] if done else None)
        if self.args.stop_on_nan:
            raise NonFiniteError(f"{message} stop_on_nan=False would train on, as transformers does.")
        logger.warning(message)
