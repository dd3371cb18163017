"""Qwen3-VL that reasons in latents: stock classes, latents in the backbone's forward, latent decoding.

Qwen3-VL adds features of several layers of the vision tower to the first text layers, and interleaves the rotary axes.
"""

from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel

from .configuration_latent import LatentQwen3VLConfig
from .latent_qwen_vl import LatentQwenVLHeadMixin, LatentQwenVLModelMixin, register_checkpoint_renaming
from .processing_latent import LatentProcessor  # noqa: F401  (travels with the model)


class LatentQwen3VLModel(LatentQwenVLModelMixin, Qwen3VLModel):
    """Qwen3-VL backbone whose forward takes `latent_embeds` and `latent_mask` (contract C1)."""

    config_class = LatentQwen3VLConfig


class LatentQwen3VLForConditionalGeneration(LatentQwenVLHeadMixin, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with latent decoding: `model.generate(**inputs, latent_strategy="dynamic")`."""

    config_class = LatentQwen3VLConfig

    def __init__(self, config: LatentQwen3VLConfig) -> None:
        super(Qwen3VLForConditionalGeneration, self).__init__(config)
        self.model = LatentQwen3VLModel(config)
        self.build_heads(config)


register_checkpoint_renaming("Qwen3VLModel", "Qwen3VLForConditionalGeneration")

__all__ = ["LatentQwen3VLForConditionalGeneration", "LatentQwen3VLModel"]
