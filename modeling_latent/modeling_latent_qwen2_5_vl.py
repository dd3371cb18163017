"""Qwen2.5-VL that reasons in latents: stock classes, latents in the backbone's forward, latent decoding."""

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from .configuration_latent import LatentQwen2_5_VLConfig
from .latent_qwen_vl import LatentQwenVLHeadMixin, LatentQwenVLModelMixin, forward_with, register_checkpoint_renaming
from .processing_latent import LatentProcessor  # noqa: F401  (travels with the model)


class LatentQwen2_5_VLModel(LatentQwenVLModelMixin, Qwen2_5_VLModel):
    """Qwen2.5-VL backbone whose forward takes `latent_embeds` and `latent_mask` (contract C1)."""

    config_class = LatentQwen2_5_VLConfig
    position_inputs = ("second_per_grid_ts",)
    forward = forward_with(LatentQwenVLModelMixin.forward, second_per_grid_ts=torch.Tensor | None)


class LatentQwen2_5_VLForConditionalGeneration(LatentQwenVLHeadMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with latent decoding: `model.generate(**inputs, latent_strategy="dynamic")`."""

    config_class = LatentQwen2_5_VLConfig
    forward = forward_with(LatentQwenVLHeadMixin.forward, second_per_grid_ts=torch.Tensor | None)

    def __init__(self, config: LatentQwen2_5_VLConfig) -> None:
        super(Qwen2_5_VLForConditionalGeneration, self).__init__(config)
        self.model = LatentQwen2_5_VLModel(config)
        self.build_heads(config)


register_checkpoint_renaming("Qwen2_5_VLModel", "Qwen2_5_VLForConditionalGeneration")

__all__ = ["LatentQwen2_5_VLForConditionalGeneration", "LatentQwen2_5_VLModel"]
