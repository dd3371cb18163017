"""Curricula: training in stages, for any method whose collator lays a record out by stage.

The stage of an optimizer step follows from the number of the step alone, so a resumed run goes on in the middle of a
stage with the batches that it would have seen. Loader workers read ahead, and an endless stream has no epochs; so a
batch of training is made in two halves: workers *prepare* it (images, token ids), whatever the stage, and the training
process *finishes* it when the step begins that trains on it.

Used by the curricula of "Training Large Language Models to Reason in a Continuous Latent Space" (Coconut, arXiv
2412.06769) and "Reasoning in the Dark: Interleaved Vision-Text Reasoning in Latent Space" (IVT-LR, arXiv 2510.12603).
"""

import logging
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from .data.dynamic_batching import is_count

logger = logging.getLogger(__name__)

UNITS = ("epoch", "step")
RESETS = ("never", "stage", "epoch")


@dataclass(frozen=True)
class Curriculum:
    """Which stage is trained when, and when the optimizer is a new one.

    Args:
        lengths: of the stages, in turn; a single one is that of every stage. The last stage goes on to the end.
        unit: of the lengths: `"epoch"`, or optimizer `"step"`s, for data without a length.
        num_stages: the last stage is `num_stages - 1`; `None` for as many as `lengths`, or, with a single length, one
            after the other without end.
        start_stage: that the run begins with; the lengths of those before it are left out.
        reset_optimizer: forget the moments of the optimizer at the first step of each `"stage"` or `"epoch"`. The
            schedule of the learning rate runs on.
        save_ends: save a checkpoint behind the last step of each stage.

    Raises:
        ValueError: names the option of the configuration, its value and the remedy.
    """

    lengths: tuple[int, ...]
    unit: str = "epoch"
    num_stages: int | None = None
    start_stage: int = 0
    reset_optimizer: str = "never"
    save_ends: bool = False

    def __post_init__(self) -> None:
        name = f"{self.unit}s_per_stage"
        if self.unit not in UNITS or not self.lengths or not all(map(is_count, self.lengths)):
            raise ValueError(
                f"{name}={list(self.lengths)} must be integers of at least 1: one for all stages, or one each"
            )
        if self.reset_optimizer not in RESETS:
            raise ValueError(f"reset_optimizer={self.reset_optimizer!r} is unknown; choose one of {list(RESETS)}")
        if self.reset_optimizer == "epoch" and self.unit == "step":
            raise ValueError("reset_optimizer='epoch' with steps_per_stage: there may be no epochs; set it to 'stage'")
        if self.num_stages is not None and not is_count(self.num_stages):
            raise ValueError(f"num_stages={self.num_stages!r} must be an integer of at least 1, or left out")
        if len(self.lengths) > 1 and self.num_stages not in (None, len(self.lengths)):
            raise ValueError(
                f"num_stages={self.num_stages} with {name}={list(self.lengths)}; give a length for each stage, or one "
                "for all"
            )
        last = self.last_stage
        if self.start_stage != 0 and not is_count(self.start_stage) or (last is not None and self.start_stage > last):
            raise ValueError(
                f"start_stage={self.start_stage!r} must be an integer from 0 to "
                f"{'the last stage' if last is None else last}"
            )

    @property
    def last_stage(self) -> int | None:
        """The stage that goes on to the end; `None` when there is no last one."""
        if self.num_stages is not None:
            return self.num_stages - 1
        return len(self.lengths) - 1 if len(self.lengths) > 1 else None

    @property
    def is_one_stage(self) -> bool:
        """Whether there is no other stage."""
        return self.start_stage == self.last_stage

    def stage_at(self, step: int, steps_per_epoch: int | None = None) -> int:
        """The stage of an optimizer step, counted from 0.

        Args:
            step: number of steps before it.
            steps_per_epoch: for lengths in epochs.
        """
        if self.is_one_stage:
            return self.start_stage
        stage, behind = self.start_stage, step
        while stage != self.last_stage and behind >= self._length(stage, steps_per_epoch):
            behind -= self._length(stage, steps_per_epoch)
            stage += 1
        return stage

    def resets_at(self, step: int, steps_per_epoch: int | None = None) -> bool:
        """Whether the optimizer is a new one from this step on; at the first of a run it is anyway."""
        if step == 0 or self.reset_optimizer == "never":
            return False
        if self.reset_optimizer == "epoch":
            return step % _known(steps_per_epoch) == 0
        return self.stage_at(step, steps_per_epoch) != self.stage_at(step - 1, steps_per_epoch)

    def plan(self, steps: int, steps_per_epoch: int | None = None) -> list[tuple[int, int, int]]:
        """`(stage, first step, step behind the last)` of a run of so many steps."""
        stages, first = [], 0
        while first < steps:
            stage = self.stage_at(first, steps_per_epoch)
            end = steps if stage == self.last_stage else min(first + self._length(stage, steps_per_epoch), steps)
            stages.append((stage, first, end))
            first = end
        return stages

    def _length(self, stage: int, steps_per_epoch: int | None) -> int:
        """Of a stage in steps."""
        length = self.lengths[min(stage, len(self.lengths) - 1)]
        return length if self.unit == "step" else length * _known(steps_per_epoch)

    def facts(self) -> dict[str, Any]:
        """What the stage of a step follows from, to be compared when a run is resumed."""
        return {
            f"{self.unit}s_per_stage": list(self.lengths),
            "num_stages": self.num_stages,
            "start_stage": self.start_stage,
            "reset_optimizer": self.reset_optimizer,
        }


def _known(steps_per_epoch: int | None) -> int:
    if steps_per_epoch is None:
        raise ValueError("epochs_per_stage needs data with a length, and this is a stream; set steps_per_stage")
    return steps_per_epoch


class StagedBatches(Protocol):
    """A collator of a curriculum. Called, it makes a batch of the current stage, as in evaluation.

    Attributes:
        stage: that the next batch is laid out for.
    """

    stage: int

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """A batch of the current stage, nothing mixed in."""

    def prepare(self, rows: Sequence[Any]) -> MutableMapping[str, Any]:
        """The half of a batch that does not depend on the stage; tensors and picklable objects by name."""

    def finish(self, prepared: MutableMapping[str, Any], epoch: int) -> dict[str, torch.Tensor]:
        """The batch of the current stage, from what [`prepare`] made; entries that are not its own are kept."""

    def facts(self) -> dict[str, Any]:
        """What batches follow from beside the stage, to be compared when a run is resumed."""


class _Preparing:
    """The collator of the training loader: the first half."""

    def __init__(self, collator: StagedBatches) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Any]) -> MutableMapping[str, Any]:
        return self.collator.prepare(rows)


class CurriculumTrainer(Trainer):
    """Mixin of a trainer whose configuration has a method `curriculum()`; without a curriculum it changes nothing.

    Logged: `stage` (`eval_stage` in evaluation), that of the last step. Evaluation is at the current stage: that of
    the last step, before training the first one of the run, after it the last.

    Raises:
        ValueError: a curriculum in epochs for a stream, a collator without stages, an optimizer that cannot be reset.
    """

    curriculum: Curriculum | None = None
    steps_per_epoch: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args") or next((arg for arg in args if hasattr(arg, "curriculum")), None)
        self.curriculum = given.curriculum() if hasattr(given, "curriculum") else None
        if self.curriculum is not None:
            _check_collator(kwargs.get("data_collator"))
        super().__init__(*args, **kwargs)
        if self.curriculum is None:
            return
        self._check_curriculum()
        self.data_collator.stage = self.curriculum.start_stage
        self.add_callback(_StageBorders(self))

    def _check_curriculum(self) -> None:
        data = self.train_dataset
        in_epochs = self.curriculum.unit == "epoch" and not self.curriculum.is_one_stage
        if data is not None and in_epochs and not has_length(data):
            raise ValueError(
                f"epochs_per_stage={list(self.curriculum.lengths)} with a {type(data).__name__}, whose epochs have no "
                "known length; set steps_per_stage"
            )
        if self.curriculum.reset_optimizer != "never" and self.is_deepspeed_enabled:
            check_deepspeed_reset(self.accelerator.state.deepspeed_plugin.deepspeed_config)

    def _loop_facts(self) -> dict[str, Any]:
        facts = super()._loop_facts()
        return facts if self.curriculum is None else {**facts, **self.curriculum.facts(), **self.data_collator.facts()}

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple:
        values = super().set_initial_training_values(args, dataloader)
        if self.curriculum is not None:
            self.steps_per_epoch = values[1] if has_length(dataloader) else None
            self._say_stages(values[-1])
        return values

    def _say_stages(self, max_steps: int) -> None:
        stages = self.curriculum.plan(max_steps, self.steps_per_epoch)
        if self.is_world_process_zero():
            logger.info("curriculum: %s", ", ".join(stage_lines(stages)))
        last = self.curriculum.last_stage
        if last is not None and stages and stages[-1][0] < last:
            ends = f"the run of {max_steps} steps ends in stage {stages[-1][0]} of {last}"
            logger.warning("%s; for the later ones give more num_train_epochs or max_steps", ends)

    def get_train_dataloader(self) -> Any:
        collator = self.data_collator
        if self.curriculum is None or not hasattr(collator, "prepare"):
            return super().get_train_dataloader()
        self.data_collator = _Preparing(collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        if self.curriculum is not None:
            step, collator = self.state.global_step, self.data_collator
            collator.stage = self.curriculum.stage_at(step, self.steps_per_epoch)
            epoch = step // self.steps_per_epoch if self.steps_per_epoch else 0
            epoch_iterator = (send_to_device(collator.finish(batch, epoch), device) for batch in epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.curriculum is not None and "loss" in logs:
            logs["stage"] = self.data_collator.stage
        elif self.curriculum is not None and "train_runtime" not in logs:
            logs["eval_stage"] = self.data_collator.stage
        super().log(logs, start_time)


def _check_collator(collator: Any) -> None:
    missing = [name for name in ("stage", "prepare", "finish", "facts") if not hasattr(collator, name)]
    if missing:
        raise ValueError(
            f"{type(collator).__name__} has no {', '.join(missing)}, which a curriculum needs (see StagedBatches); "
            "leave data_collator out"
        )


class _StageBorders(TrainerCallback):
    """Sets the stage before training; where a stage ends it saves, and where one begins it forgets the moments of the
    optimizer, when the curriculum says so."""

    def __init__(self, trainer: CurriculumTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.data_collator.stage = trainer.curriculum.stage_at(state.global_step, trainer.steps_per_epoch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.curriculum.resets_at(state.global_step, trainer.steps_per_epoch):
            reset_optimizer_state(trainer.optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        curriculum, step, epoch = self.trainer.curriculum, state.global_step, self.trainer.steps_per_epoch
        if curriculum.save_ends and curriculum.stage_at(step, epoch) != curriculum.stage_at(step - 1, epoch):
            control.should_save = True


def reset_optimizer_state(optimizer: Any) -> None:
    """Forget the moments and step counts of an optimizer, as if it were made anew; groups and rates stay.

    Args:
        optimizer: one of torch, maybe inside of accelerate's and DeepSpeed's.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    optimizer.state.clear()


def check_deepspeed_reset(settings: dict[str, Any]) -> None:
    """Refuse to reset an optimizer whose moments DeepSpeed keeps elsewhere.

    Raises:
        ValueError: names the setting and the remedy.
    """
    offload = (settings.get("zero_optimization") or {}).get("offload_optimizer") or {}
    device = offload.get("device", "none")
    if device != "none":
        raise ValueError(
            f"reset_optimizer with offload_optimizer.device={device!r} of DeepSpeed: the moments cannot be set back; "
            "use a DeepSpeed file without offload_optimizer, or reset_optimizer: never and a run for each stage"
        )


def check_curriculum_loader(args: Any) -> None:
    """Refuse options of the Trainer that would leave batches at an old stage.

    Raises:
        ValueError: names the option, its value and the remedy.
    """
    if args.dataloader_persistent_workers:
        raise ValueError(
            "dataloader_persistent_workers=True: workers that live on would evaluate at the stage in which they were "
            "started; leave it out"
        )


def stage_lines(stages: Sequence[tuple[int, int, int]]) -> list[str]:
    """`"stage 0: steps 1-20"` for each of [`Curriculum.plan`]."""
    return [f"stage {stage}: steps {first + 1:,}-{end:,}" for stage, first, end in stages]


__all__ = [
    "RESETS",
    "Curriculum",
    "CurriculumTrainer",
    "StagedBatches",
    "check_curriculum_loader",
    "check_deepspeed_reset",
    "reset_optimizer_state",
    "stage_lines",
]
