"""IVT-LR and Coconut: cross entropy behind latents that the model works out itself, one after the other.

Papers: "Reasoning in the Dark: Interleaved Vision-Text Reasoning in Latent Space", arXiv 2510.12603 (IVT-LR; card 4.3,
4.4), and "Training Large Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769 (Coconut; card
11.3). Both are one plan of segments over one cache (`modeling_latent/latent_plan.py`); in Coconut nothing is inserted,
and gradients go through the latents.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_latent.latent_plan import LatentPlan

from ..latent_forward import LatentLoss, LatentObjective
from ..staged_config import StagedSFTConfig
from . import register_objective


@register_objective("ivtlr")
@register_objective("coconut")
class StagedObjective(LatentObjective):
    """Cross entropy on the steps that are left and on the answer; there is no latent loss.

    With `staged_mode="pause"` the slots are fed by their own embedding; in the modes without latents the forward is
    the plain one.

    Raises:
        ValueError: another configuration, or a model without the tokens that the options need.
    """

    exposures = ("staged",)
    has_latent_loss = False

    def __init__(self, args: StagedSFTConfig, config: PreTrainedConfig) -> None:
        if not isinstance(args, StagedSFTConfig):
            raise ValueError(
                f"latent_method={args.latent_method or config.latent_method!r} is trained with a StagedSFTConfig "
                f"(trainers/staged_config.py), got {type(args).__name__}; build it from the same options"
            )
        self.mode = args.staged_mode
        self.slot_id, self.patch_id = config.latent_token_id, config.latent_patch_token_id
        self.plan_options: dict[str, Any] = {
            "gradient": args.latent_gradient,
            "patch_order": args.latent_patch_order,
            "patch_images": args.latent_patch_images,
            "vision_first": args.latent_vision_first,
        }
        if args.layout().num_patches and self.patch_id is None:
            raise ValueError(
                f"num_latent_patches={args.num_latent_patches}, but the model has no token for inserted image "
                "embeddings (latent_patch_token_id); make it with method='ivtlr', or set num_latent_patches: 0"
            )

    def _latents(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        slots = input_ids == self.slot_id
        return slots if self.patch_id is None else slots | (input_ids == self.patch_id)

    def ce_labels(self, input_ids: torch.LongTensor, labels: torch.LongTensor) -> torch.LongTensor:
        return labels.masked_fill(self._latents(input_ids), -100)

    def fed_positions(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        latents = self._latents(input_ids)
        return torch.zeros_like(latents) if self.mode == "pause" else latents

    def count_terms(self, input_ids: torch.LongTensor, labels: torch.LongTensor) -> torch.LongTensor:
        supervised = (self.ce_labels(input_ids, labels)[:, 1:] != -100).sum()
        return torch.stack([supervised, torch.zeros_like(supervised)])

    def prepare(self, model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
        """The plan of the batch; every process runs as many segments as the one with the most."""
        if self.mode == "pause":
            return {"latent_mask": self.fed_positions(inputs["input_ids"])}
        if self.mode != "latent":
            return {}
        return {"latent_plan": LatentPlan(**self.plan_options, sync=True, step=model.latent_step)}

    def loss(self, model: PreTrainedModel, hidden_states: torch.Tensor, inputs: dict[str, Any]) -> LatentLoss:
        return LatentLoss(hidden_states.new_zeros(()), {})
