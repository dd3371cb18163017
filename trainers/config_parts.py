"""Options that the trainers of every stage share, as a part of their configs."""

import math
import os
from dataclasses import dataclass, field
from typing import Any

from .data.records import DEFAULT_MAX_BAD_SHARE
from .fault_tolerance import check_precision
from .optimizer_groups import DECAY_RULES, PART_RATES, check_deepspeed_optimizer


def is_number(value: Any, low: float, high: float) -> bool:
    """Whether a value is a finite number between two others, both allowed."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and low <= value <= high


@dataclass
class LatentRunOptions:
    """Part of a config, before one of `trl`: learning rates of parts, resuming, what stops a run, the log."""

    vision_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower; default: learning_rate."}
    )
    merger_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the merger after the vision tower; default: learning_rate."}
    )
    latent_head_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the latent head; default: learning_rate."}
    )
    weight_decay_rule: str = field(
        default="transformers",
        metadata={
            "help": "What weight_decay leaves out: 'transformers' biases and norms; 'published' (LVR code) biases and "
            "LayerNorm, so that RMS norms and the end vector decay."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "'true': the newest complete checkpoint; 'auto': the same if there is one; or a folder."},
    )
    stop_on_nan: bool = field(
        default=True,
        metadata={"help": "Stop, with the records named, before a loss or gradient that is not finite is applied."},
    )
    logging_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the TensorBoard files (sets TENSORBOARD_LOGGING_DIR); default: in output_dir."},
    )
    max_bad_share: float = field(
        default=DEFAULT_MAX_BAD_SHARE, metadata={"help": "The run stops when more than this share of records is bad."}
    )

    def check_run_options(self) -> None:
        """Called before the `__post_init__` of `trl`.

        Raises:
            ValueError: names option, value and remedy.
        """
        if not is_number(self.max_bad_share, 0, 1):
            raise ValueError(
                f"max_bad_share={self.max_bad_share!r} must be between 0 and 1; 0.01 allows one bad row in a hundred"
            )
        if not isinstance(self.stop_on_nan, bool):
            raise ValueError(f"stop_on_nan={self.stop_on_nan!r} must be true or false")
        if self.weight_decay_rule not in DECAY_RULES:
            raise ValueError(
                f"weight_decay_rule={self.weight_decay_rule!r} is unknown; choose one of {list(DECAY_RULES)}"
            )
        for name in PART_RATES.values():
            value = getattr(self, name)
            if value is not None and not (is_number(value, 0, math.inf) and value > 0):
                raise ValueError(f"{name}={value!r} must be above 0; to keep that part as it is, freeze it")
        check_precision(self)
        check_deepspeed_optimizer(self)
        if self.logging_dir is not None:  # transformers 5 reads the variable alone
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir


__all__ = ["LatentRunOptions", "is_number"]
