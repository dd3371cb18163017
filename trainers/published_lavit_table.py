"""The table of the arguments of the published LaViT training script and its launch scripts (arXiv 2601.10129).

Source: method card of LaViT, sections 2.4, 3, 5.1 and 9.1. How it is used: `published_arguments.py`.
"""

from collections.abc import Mapping
from typing import Any

from .published_rows import PublishedArgument, chosen, renamed, same, warmup_ratio

LAVIT = ("lavit",)


def _loss_scale_traj(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    # Without the head the published code has no such term, whatever its weight.
    absent = settings.get("use_trajectory_supervision") is False
    return {} if value is None or absent else {"attention_loss_weight": value}


def _freeze_vision(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, bool):
        raise ValueError("choose one of [True, False]")
    return {"freeze_vision_tower": value, "freeze_merger": value}


def _training_stage(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, bool) or value not in (0, 1, 2):
        raise ValueError("choose one of [0, 1, 2]")
    return {"training_stage": value}


LAVIT_ARGUMENTS: tuple[PublishedArgument, ...] = (
    # data
    same("data_path", LAVIT, "the training JSON, an object with `results`"),
    renamed("train_json", LAVIT, "data_path", "the same"),
    renamed("image_root", LAVIT, "image_folder", "where `image_relative_path` begins"),
    same("v_top_dir", LAVIT, "where bare names of `v_top_path_abs` begin"),
    same("attention_dir", LAVIT, "where bare names of `attention_path_abs` begin"),
    same("max_samples", LAVIT, "the first so many records"),
    same("min_pixels", LAVIT, "least area of a resized image, in pixels (published default: 200704)"),
    same("max_pixels", LAVIT, "greatest area of a resized image, in pixels (published default: 1003520)"),
    # model
    renamed("num_lavit_tokens", LAVIT, "num_latent_tokens", "latent tokens of a sample, K"),
    renamed("v_top_dim", LAVIT, "concept_head_size", "width of the teacher (published default: 5120)"),
    chosen(
        "use_trajectory_supervision", LAVIT, "attention_head",
        "false: no attention head and `attention_loss_weight: 0`; true: as the options say",
        {True: {}, None: {}, False: {"attention_head": False, "attention_loss_weight": 0.0}},
    ),
    PublishedArgument(
        "freeze_vision", LAVIT, "freeze_vision_tower",
        "with `freeze_merger`, as published (published default: true, here false)", _freeze_vision,
    ),
    same("freeze_llm", LAVIT, "language model as it is; input embeddings and both heads are trained"),
    # loss
    renamed("loss_scale_vtop", LAVIT, "latent_loss_weight", "weight of the concept loss (published default: 1.0)"),
    PublishedArgument(
        "loss_scale_traj", LAVIT, "attention_loss_weight",
        "weight of the attention loss (published default: 1.0); not read without the head", _loss_scale_traj,
    ),
    PublishedArgument(
        "training_stage", LAVIT, "training_stage",
        "0: the gate (published: nothing is hidden, here `latent_visibility: none`), 1: the bottleneck (published: "
        "a mask that hides nothing, `latent_visibility: reference`), 2: nothing is hidden",
        _training_stage,
    ),
    renamed(
        "bottleneck_block_prompt", LAVIT, "block_prompt",
        "whether question rows lose the image, too (published default: true, which also holds here without the gate)",
    ),
    # optimisation
    same("learning_rate", LAVIT, "peak rate"),
    same("lr_scheduler_type", LAVIT, "schedule; linear, as published"),
    renamed("warmup_ratio", LAVIT, "warmup_steps", "a number below 1 is a share of all steps", warmup_ratio),
    same("weight_decay", LAVIT, "what it leaves out: weight_decay_rule"),
    same("adam_beta1", LAVIT, "of AdamW"),
    same("adam_beta2", LAVIT, "of AdamW"),
    same("max_grad_norm", LAVIT, "clipping"),
    same("max_steps", LAVIT, "above 0 it wins over num_train_epochs"),
    same("num_train_epochs", LAVIT, "passes over the data, with max_steps below 1"),
    same("per_device_train_batch_size", LAVIT, "samples of a step and device (published: 1)"),
    same("gradient_accumulation_steps", LAVIT, "micro-batches of an optimiser step"),
    same("bf16", LAVIT, "mixed precision; the weights stay float32 with `dtype: float32`"),
    renamed("gradient_checkpointing", LAVIT, "activation_checkpointing", "recompute activations, not re-entrant"),
    same("dataloader_num_workers", LAVIT, "processes that read data"),
    same("seed", LAVIT, "of weights and order"),
    # output
    same("output_dir", LAVIT, "where checkpoints and the model go"),
    same("save_steps", LAVIT, "steps between two checkpoints"),
    same("save_total_limit", LAVIT, "checkpoints that are kept"),
    same("logging_steps", LAVIT, "steps between two logs"),
    same("report_to", LAVIT, "tensorboard, wandb, none, ..."),
)  # fmt: skip


__all__ = ["LAVIT_ARGUMENTS"]
