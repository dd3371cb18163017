"""The table of the arguments of the published LVR scripts ("Latent Visual Reasoning", arXiv 2509.24251).

Source: method card of LVR, sections 5.1, 5.2 and 5.6. How it is used: `published_arguments.py`.
"""

from collections.abc import Mapping
from typing import Any

from .published_rows import PublishedArgument
from .published_rows import chosen as _chosen
from .published_rows import dead as _dead
from .published_rows import renamed as _renamed
from .published_rows import same as _same
from .published_rows import warmup_ratio as _warmup_ratio

STAGES = ("sft", "grpo")
BOTH, SFT, GRPO = STAGES, ("sft",), ("grpo",)


# Rows of their own --------------------------------------------------------------------------------------------------


def _lvr_head(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    if value not in (True, False, None):
        raise ValueError("choose one of [True, False]")
    return {"latent_head": settings.get("lvr_head_type") or "simple"} if value else {}


def _lvr_head_type(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    if value not in ("simple", "glu"):
        raise ValueError("choose one of ['simple', 'glu']")
    if "lvr_head" not in settings:
        raise ValueError(f"it says nothing without lvr_head; give both in one place, or latent_head: {value}")
    return {}  # read together with lvr_head


def _model_id(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    warm_start = settings.get("checkpoint_name") is not None
    return {} if value is None or warm_start else {"model_name_or_path": value}


def _bits(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    option = {"4": "load_in_4bit", "8": "load_in_8bit"}.get(str(value))
    if value == 16 or (option is not None and settings.get(option) is True):
        return {}
    if option is None:
        raise ValueError("choose 16, or load_in_8bit: true or load_in_4bit: true, each with use_peft: true")
    raise ValueError(f"the published code never reads it; for a quantised base set {option}: true and use_peft: true")


def _random_seed(value: Any) -> Any:
    if value == 0:
        raise ValueError("0 leaves the data in order in the published code; here it is shuffled: give another number")
    return value


_STRATEGIES = {
    "steps": {"latent_strategy": "fixed"},
    "latent": {"latent_strategy": "end_vector"},
    None: {"latent_strategy": "mode_switch"},
}

PUBLISHED_ARGUMENTS: tuple[PublishedArgument, ...] = (
    # model
    PublishedArgument("model_id", BOTH, "model_name_or_path", "checkpoint of a family with a latent class", _model_id),
    _renamed("checkpoint_name", BOTH, "model_name_or_path", "warm start: weights of this checkpoint, before model_id"),
    _dead(
        "coconut", SFT, "true has no effect, as published; false is refused: latent_form",
        "it has no effect in the published code; for training without latents set latent_form: none", (True, None),
    ),
    PublishedArgument("lvr_head", SFT, "latent_head", "true: lvr_head_type; false: as the checkpoint is", _lvr_head),
    PublishedArgument("lvr_head_type", SFT, "latent_head", "simple or glu, read with lvr_head", _lvr_head_type),
    _chosen(
        "latent_end_token", SFT, "latent_stop_vector", "true: a learned end vector; false: as the checkpoint is",
        {True: {"latent_stop_vector": True}, False: {}, None: {}},
    ),
    _dead(
        "max_lvr_tokens", SFT, "refused: its data module was never published",
        "its data module was never published; bound the image tokens of a region by max_pixels, or leave it out",
    ),
    _same("freeze_vision_tower", BOTH, "vision tower as it is"),
    _same("freeze_merger", BOTH, "merger as it is; left out, it follows freeze_vision_tower (published: trained)"),
    _same("freeze_llm", BOTH, "language model as it is; latent head and end vector are always trained"),
    _chosen(
        "disable_flash_attn2", BOTH, "attn_implementation", "true: sdpa; false: as attn_implementation says",
        {True: {"attn_implementation": "sdpa"}, False: {}, None: {}},
    ),
    PublishedArgument("bits", BOTH, "", "16 only; else refused: load_in_4bit, load_in_8bit with use_peft", _bits),
    # loss
    _renamed("loss_lvr_fct", SFT, "roi_loss_type", "mse, mae or cosine"),
    _renamed("loss_lvr_lambda", SFT, "latent_loss_weight", "weight of the ROI regression"),
    _same("mode_switch_loss", SFT, "train when to leave a region"),
    _renamed("loss_mode_switch_fct", SFT, "mode_switch_loss_type", "distance to the end vector"),
    _renamed("loss_mode_switch_lambda", SFT, "mode_switch_weight", "weight of the mode-switch loss"),
    # data
    _same("data_path", BOTH, "list of records, or a meta file of several lists, with and without packing"),
    _same("image_folder", BOTH, "where relative images are; a meta file has its own"),
    _renamed("image_min_pixels", BOTH, "min_pixels", "least area of a resized image, in pixels"),
    _renamed("image_max_pixels", BOTH, "max_pixels", "greatest area of a resized image, in pixels"),
    _renamed("image_max_pixles", BOTH, "max_pixels", "the same, as the published README spells it"),
    _dead(
        "max_seq_length", BOTH, "refused: never read, and nothing is cut here",
        "the published code never reads it, and here nothing is cut; bound the image tokens by max_pixels",
    ),
    _chosen(
        "enable_data_packing", SFT, "latent_packing", "true: buckets, the published plan",
        {True: {"latent_packing": "buckets"}, False: {}, None: {}},
    ),
    _renamed("max_packed_tokens", SFT, "packing_max_tokens", "tokens of a batch at most"),
    _renamed("long_seq_threshold", SFT, "packing_long_threshold", "a sample of so many tokens is a batch of its own"),
    _renamed("max_instance_per_batch", SFT, "packing_max_instances", "samples of a batch at most"),
    _renamed("random_seed", SFT, "data_seed", "order of the data", _random_seed),
    # optimisation
    _same("learning_rate", BOTH, "peak rate of what has none of its own"),
    _same("vision_lr", BOTH, "rate of the vision tower, a group of its own"),
    _same("merger_lr", BOTH, "rate of the merger, a group of its own"),
    _renamed("lvr_head_lr", SFT, "latent_head_lr", "rate of the latent head, a group of its own"),
    _same("lr_scheduler_type", BOTH, "schedule of all groups"),
    _renamed("warmup_ratio", BOTH, "warmup_steps", "a number below 1 is a share of all steps", _warmup_ratio),
    _same("weight_decay", BOTH, "what it leaves out: weight_decay_rule"),
    _same("max_steps", BOTH, "above 0 it wins over num_train_epochs"),
    _same("num_train_epochs", BOTH, "passes over the data, with max_steps below 1"),
    _same("per_device_train_batch_size", BOTH, "samples of a step and device (stage 2: completions)"),
    _same("gradient_accumulation_steps", BOTH, "micro-batches of an optimiser step"),
    _same("bf16", BOTH, "mixed precision"),
    _same("fp16", BOTH, "mixed precision"),
    _renamed("gradient_checkpointing", BOTH, "activation_checkpointing", "recompute activations, not re-entrant"),
    _same("dataloader_num_workers", BOTH, "processes that read data"),
    _same("deepspeed", BOTH, "JSON of DeepSpeed; refused with an optimizer section and rates of parts"),
    # output
    _same("output_dir", BOTH, "where checkpoints and the model go"),
    _same("save_strategy", BOTH, "when to save"),
    _same("save_steps", BOTH, "steps between two checkpoints"),
    _same("save_total_limit", BOTH, "checkpoints that are kept"),
    _dead(
        "online_checkpoint", BOTH, "false has no effect; true is refused: push_to_hub with hub_strategy",
        "uploads go to the Hub: set push_to_hub: true, hub_model_id and hub_strategy: checkpoint", (False, None),
    ),
    _same("report_to", BOTH, "tensorboard, wandb, none, ..."),
    _same("logging_dir", BOTH, "folder of the TensorBoard files (transformers 5 has no such argument)"),
    _same("logging_steps", BOTH, "steps between two logs"),
    _dead(
        "precompute_ref_log_probs", BOTH, "true is refused: left over from DPO",
        "it is left over from DPO and never read; leave it out", (False, None),
    ),
    _dead("beta", SFT, "refused: left over from DPO", "left over from DPO, stage 1 has no reference; leave it out"),
    # reinforcement learning
    _same("beta", GRPO, "weight of the KL to the reference"),
    _same("temperature", GRPO, "of sampling and of the log-probabilities"),
    _same("top_p", GRPO, "sampling"),
    _same("top_k", GRPO, "sampling"),
    _same("min_p", GRPO, "sampling"),
    _same("repetition_penalty", GRPO, "sampling"),
    _same("max_completion_length", GRPO, "positions of a completion, latents included"),
    _same("max_prompt_length", GRPO, "a longer prompt is refused by name; none is trimmed"),
    _chosen(
        "decoding_strategy", GRPO, "latent_strategy", "steps: fixed; latent: end_vector; none: mode_switch",
        _STRATEGIES,
    ),
    _renamed("lvr_steps", GRPO, "num_latent_steps", "latents of a span"),
    _same("num_generations", GRPO, "completions of a prompt"),
    _same("num_iterations", GRPO, "updates from the same completions"),
    _same("epsilon", GRPO, "lower bound of the clipped ratio"),
    _same("epsilon_high", GRPO, "upper bound; left out: epsilon"),
    _same("loss_type", GRPO, "how the token losses are averaged"),
    _same("scale_rewards", GRPO, "divide advantages by the deviation of the group"),
    _same("reward_weights", GRPO, "one for each reward function"),
    _same("mask_truncated_completions", GRPO, "completions without an end are not trained"),
    _same("sync_ref_model", GRPO, "let the reference follow the policy"),
    _same("log_completions", GRPO, "sampled completions in the log"),
)  # fmt: skip


__all__ = ["BOTH", "PUBLISHED_ARGUMENTS"]
