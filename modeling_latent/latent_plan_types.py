"""Options, step and output of a latent plan, and what it needs to know of a backbone (see `latent_plan.py`)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from .latent_blocks import PATCH_ORDERS, padded_positions

GRADIENTS = ("detach", "bptt")
PATCH_IMAGES = ("all", "last")


@dataclass(frozen=True)
class LatentPlan:
    """How the slots of a batch are run. Where they are is read from the ids, unless a mask says it: a block is `k`
    inserted image embeddings (`config.latent_patch_token_id`) and a slot (`config.latent_token_id`), or a slot alone.

    Args:
        gradient: `"detach"` (published IVT-LR): the slots are worked out without a graph, then one differentiable pass
            reads the whole sequence; `"bptt"` (Coconut): one pass in segments, gradients go through every slot.
        patch_order: order of the inserted embeddings in their block: `"score"`, highest first, or `"index_then_kth"`
            (published, what a GPU's top-k writes): by column, the lowest score last. Ties go to the lower column.
        patch_images: `"all"` images of a row are looked at, or, as published for Qwen2-VL, the `"last"`.
        vision_first: the embeddings stand before the slot of their block (published), else behind it (paper).
        sync: run as many segments as the process with the most; sharded parameters need it.
        slots: `(B, T)` bool, where the slots are; default: where the ids say so. Other latents may be given as
            `latent_embeds` and `latent_mask` then.
        step: from hidden states `(B, H)` to the vectors that are fed, e.g. `model.latent_step`; default: as they are.
        forced_patches: `(B, T)` column of the image token that each inserted embedding copies, -1 elsewhere; replaces
            the choice.
        edit: called with a [`PlanStep`] before its vectors are fed; returns other vectors `(B, H)`, or `None`.
    """

    gradient: str = "detach"
    patch_order: str = "score"
    patch_images: str = "all"
    vision_first: bool = True
    sync: bool = False
    slots: torch.BoolTensor | None = field(default=None, compare=False)
    step: Callable[[torch.Tensor], torch.Tensor] | None = field(default=None, compare=False)
    forced_patches: torch.LongTensor | None = field(default=None, compare=False)
    edit: Callable[["PlanStep"], torch.Tensor | None] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        options = (("gradient", GRADIENTS), ("patch_order", PATCH_ORDERS), ("patch_images", PATCH_IMAGES))
        for name, allowed in options:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {list(allowed)}")


@dataclass
class PlanStep:
    """One step of the chain, as `LatentPlan.edit` sees it.

    Args:
        vectors: `(B, H)` what the slots of this step are fed.
        active: `(B,)` rows that have a slot at this step.
        position: `(B,)` column of that slot, -1 for the other rows.
        index: `(B,)` how many slots of the row came before.
    """

    vectors: torch.Tensor
    active: torch.BoolTensor
    position: torch.LongTensor
    index: torch.LongTensor


@dataclass
class LatentPlanOutput(BaseModelOutputWithPast):
    """Output of a backbone that ran a plan. `n` is the largest number of slots in a row.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, length, hidden)`): at all positions.
        latent_embeds (`torch.Tensor` of shape `(batch, length, hidden)`): what was fed at slots and inserted
            embeddings, zero elsewhere.
        latent_mask (`torch.BoolTensor` of shape `(batch, length)`): where that is.
        patch_columns (`torch.LongTensor` of shape `(batch, length)`): at an inserted embedding the column of the image
            token that it copies, -1 elsewhere.
        patch_scores (`torch.Tensor` of shape `(batch, n, length)`): attention of the choosing row, mean over layers
            and heads, `None` without inserted embeddings.
    """

    latent_embeds: torch.FloatTensor | None = None
    latent_mask: torch.BoolTensor | None = None
    patch_columns: torch.LongTensor | None = None
    patch_scores: torch.FloatTensor | None = None


class LatentPlanMixin:
    """For a backbone class: what a plan needs to know of the family. The defaults fit a model with plain positions."""

    def plan_positions(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor, **inputs: Any
    ) -> torch.LongTensor:
        """Positions `(batch, length)` or `(channels, batch, length)`; padding does not count."""
        return padded_positions(attention_mask)

    def encode_images(self, **inputs: Any) -> dict[str, Any] | None:
        """The images of the batch, encoded once: the stock `mm_encoder_outputs`; `None` without images."""
        if inputs.get("mm_encoder_outputs"):
            return inputs["mm_encoder_outputs"]
        if inputs.get("pixel_values") is None:
            return None
        given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if inputs.get(name) is not None}
        return {"image": self.get_image_features(**given, return_dict=True)}

    def image_rows(self, encoded: dict[str, Any]) -> torch.Tensor:
        """`(N, hidden)` input embeddings of all image tokens, in the order of the placeholders."""
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in encoded["image"].pooler_output])

    def select_images(self, encoded: dict[str, Any], keep: torch.LongTensor) -> dict[str, Any]:
        """The encoder outputs of some image tokens only, `keep` `(kept,)` in the order of the placeholders."""

        def rows(features: Any) -> Any:
            kept = torch.cat([part.reshape(-1, part.shape[-1]) for part in features]).index_select(0, keep)
            return kept.unsqueeze(0) if torch.is_tensor(features) else [kept]

        output = encoded["image"]
        parts = {"pooler_output": rows(output.pooler_output)}
        deep = output.get("deepstack_features")
        if deep is not None:
            parts["deepstack_features"] = [rows(layer) for layer in deep]
        return {**encoded, "image": type(output)(**parts)}


__all__ = ["GRADIENTS", "PATCH_IMAGES", "LatentPlan", "LatentPlanMixin", "LatentPlanOutput", "PlanStep"]
