"""The table of the keys of the published YAML files of IVT-LR (arXiv 2510.12603) and Coconut (arXiv 2412.06769).

Source: method card of IVT-LR, sections 6.1 and 11.5. How it is used: `published_arguments.py`.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from .data.dynamic_batching import is_count
from .published_rows import PublishedArgument, dead, renamed, same

STAGED = ("staged",)


def _save_path(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    if value is None:
        return {}
    name = settings.get("name")
    return {"output_dir": str(value) if name is None else str(PurePath(str(value)) / str(name))}


def _name(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    if value is not None and settings.get("save_path") is None:
        raise ValueError("it is a folder in save_path; give both in one place, or output_dir")
    return {}


def _load_model_path(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    if value is None:
        return {}
    if str(value).endswith((".pth", ".pt", ".bin")):
        raise ValueError("convert the file first (examples/convert_checkpoint.py) and give the folder")
    return {"model_name_or_path": value}


def _model_id(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    warm_start = settings.get("load_model_path") is not None
    return {} if value is None or warm_start else {"model_name_or_path": value}


def _behind(value: Any, settings: Mapping[str, Any]) -> int:
    """Epochs of the schedule that other weights have behind them."""
    if settings.get("load_model_path") is None or not settings.get("resume"):
        return 0
    return settings["resume"]


def _resume(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    if value in (None, 0):
        return {}
    if not is_count(value):
        raise ValueError("give the number of epochs that are behind")
    if settings.get("load_model_path") is None:
        return {"resume_epoch": value}
    length = settings.get("epochs_per_stage")
    if not is_count(length) or value % length:
        raise ValueError(
            f"with load_model_path a run begins with a stage, and {value} epochs are no whole number of stages of "
            f"epochs_per_stage={length!r}; leave load_model_path out to go on from a checkpoint"
        )
    return {"start_stage": value // length}


def _num_epochs(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    if value is None:
        return {}
    left = value - _behind(value, settings)
    if left <= 0:
        raise ValueError(f"resume={settings['resume']!r} leaves none of them; give more, or a smaller resume")
    return {"num_train_epochs": left}


def _reset_optimizer(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    known = {True: "epoch", False: "never", None: None}
    found = known[value] if isinstance(value, bool | None) else value
    return {} if found is None else {"reset_optimizer": found}


def _debug(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    if value is True:
        raise ValueError("for a short run set max_steps")
    return {} if value in (None, False) else {"debug": value}


def _mode(name: str, setting: dict[str, Any], effect: str) -> PublishedArgument:
    """One of the published switches `coconut`, `cot`, `no_cot`, `no_thoughts`, of which one is true."""

    def translate(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        if value not in (True, False, None):
            raise ValueError("choose one of [True, False]")
        return dict(setting) if value else {}

    return PublishedArgument(name, STAGED, next(iter(setting)), effect, translate)


def _c_thought(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    if value is None:
        return {}
    if value == 0:
        if any(settings.get(name) is True for name in ("cot", "no_cot", "no_thoughts")):
            return {}
        raise ValueError("no latents at all are no_thoughts: true, or staged_mode: no_thoughts")
    return {"latents_per_step": value}


STAGED_ARGUMENTS: tuple[PublishedArgument, ...] = (
    # run
    PublishedArgument("save_path", STAGED, "output_dir", "with name: the folder save_path/name", _save_path),
    PublishedArgument("name", STAGED, "output_dir", "read with save_path", _name),
    PublishedArgument(
        "resume", STAGED, "resume_epoch",
        "goes on from the checkpoint of that epoch in the output folder (published: only shifts the epoch counter); "
        "with load_model_path: start_stage, from these weights",
        _resume,
    ),
    PublishedArgument(
        "load_model_path", STAGED, "model_name_or_path", "weights to begin with, a folder or Hub id", _load_model_path
    ),
    PublishedArgument("model_id", STAGED, "model_name_or_path", "base model, without load_model_path", _model_id),
    renamed("train_path", STAGED, "data_path", "training data"),
    renamed("val_path", STAGED, "eval_data_path", "data of the evaluation loss"),
    same("project", STAGED, "read by trackio; for wandb set WANDB_PROJECT"),
    dead(
        "only_eval", STAGED, "true is refused: examples/evaluate.py", "evaluate with examples/evaluate.py",
        (False, None),
    ),
    PublishedArgument("debug", STAGED, "debug", "true is refused: max_steps; a word is transformers' own", _debug),
    dead(
        "save_only_improve", STAGED, "true is refused: save_strategy: best",
        "set save_strategy: best with metric_for_best_model, e.g. loss_ce", (False, None),
    ),
    # curriculum
    same("epochs_per_stage", STAGED, "length of every stage"),
    same("max_latent_stage", STAGED, "greatest stage whose steps are counted"),
    same("pad_latent_to_max", STAGED, "above that stage all records have as many latents"),
    PublishedArgument("c_thought", STAGED, "latents_per_step", "latents in place of a step", _c_thought),
    same("uniform_prob", STAGED, "share of samples at another stage"),
    PublishedArgument(
        "reset_optimizer", STAGED, "reset_optimizer", "true: epoch, as the published code does; false: never",
        _reset_optimizer,
    ),
    renamed("num_selected_patches", STAGED, "num_latent_patches", "image embeddings at each latent (K)"),
    _mode("coconut", {"staged_mode": "latent"}, "true: latents, the default"),
    _mode("cot", {"staged_mode": "cot"}, "true: all steps, explicit"),
    _mode("no_cot", {"staged_mode": "no_cot"}, "true: direct answers"),
    _mode("no_thoughts", {"staged_mode": "no_thoughts"}, "true: steps left out, nothing in their place"),
    # optimisation
    renamed("lr", STAGED, "learning_rate", "constant in the recipes, without warm-up"),
    renamed("batch_size_training", STAGED, "per_device_train_batch_size", "samples of a micro-batch"),
    same("gradient_accumulation_steps", STAGED, "micro-batches of an optimiser step"),
    PublishedArgument("num_epochs", STAGED, "num_train_epochs", "epochs in all, those behind resume too", _num_epochs),
    same("weight_decay", STAGED, "what it leaves out: weight_decay_rule"),
    same("seed", STAGED, "of weights, draws and order"),
    same("bf16", STAGED, "mixed precision"),
)  # fmt: skip


__all__ = ["STAGED_ARGUMENTS"]
