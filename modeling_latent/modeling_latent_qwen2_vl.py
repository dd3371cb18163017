"""Qwen2-VL that reasons in latents: stock classes, latents in the backbone's forward, latent decoding."""

from transformers import Qwen2VLForConditionalGeneration, Qwen2VLModel

from .configuration_latent import LatentQwen2VLConfig
from .latent_qwen_vl import LatentQwenVLHeadMixin, LatentQwenVLModelMixin, register_checkpoint_renaming
from .processing_latent import LatentProcessor  # noqa: F401  (travels with the model)


class LatentQwen2VLModel(LatentQwenVLModelMixin, Qwen2VLModel):
    """Qwen2-VL backbone whose forward takes `latent_embeds` and `latent_mask` (contract C1)."""

    config_class = LatentQwen2VLConfig


class LatentQwen2VLForConditionalGeneration(LatentQwenVLHeadMixin, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with latent decoding: `model.generate(**inputs, latent_strategy="dynamic")`."""

    config_class = LatentQwen2VLConfig

    def __init__(self, config: LatentQwen2VLConfig) -> None:
        super(Qwen2VLForConditionalGeneration, self).__init__(config)
        self.model = LatentQwen2VLModel(config)
        self.build_heads(config)


register_checkpoint_renaming("Qwen2VLModel", "Qwen2VLForConditionalGeneration")

__all__ = ["LatentQwen2VLForConditionalGeneration", "LatentQwen2VLModel"]
