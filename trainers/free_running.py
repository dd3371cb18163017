"""Latents as decoding would make them, for a batch of training sequences: step by step over one cache.

Each row is fed its own latents where `own` says so and the teacher's inputs elsewhere. With gradients this is
back-propagation through time; without, it says how far free-running latents are from their targets. The steps are a
plan of segments (`modeling_latent/latent_plan.py`), as many as there are columns with own latents once the rows are
moved side by side; all processes run the same number, so that parameters gathered module by module (ZeRO-3, FSDP) do
not hang.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from modeling_latent.latent_plan import LatentPlan, plan_latents


def free_running_latents(model: PreTrainedModel, own: torch.BoolTensor, inputs: dict[str, Any]) -> torch.Tensor:
    """The vectors `(batch, length, hidden)` that free-running decoding feeds at `own`; zero elsewhere.

    Gradients flow through every step where they are enabled. The model may be in train mode, but activation
    checkpointing would drop the cache: switch it off.

    Args:
        model: the head class; its backbone is run and its `latent_step` applied.
        own: `(batch, length)` bool, positions that are fed the model's own latents.
        inputs: what the backbone takes: `input_ids`, `attention_mask`, image inputs, and the teacher's
            `latent_embeds` and `latent_mask`, if any.

    Raises:
        ValueError: activation checkpointing in train mode, or an own latent at the beginning of a row.
    """
    if model.training and model.is_activation_checkpointing:
        raise ValueError(
            "free-running latents need the cache, which activation checkpointing drops; set activation_checkpointing: "
            "false, or latent_exposure: own"
        )
    plan = LatentPlan(gradient="bptt", slots=own, sync=True, step=model.latent_step)
    latents = plan_latents(model.base_model, plan, inputs)
    return torch.where(own.unsqueeze(-1), latents, 0)


__all__ = ["free_running_latents"]
