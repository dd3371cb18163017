"""Qwen2.5-VL that reasons in latents: stock classes, latents in the backbone's forward, latent decoding."""

from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_latent import LatentQwen2_5_VLConfig
from .generation_latent import LatentGenerationMixin
from .latent_heads import build_latent_head
from .latent_inputs import LatentCausalLMOutputWithPast, LatentHeadMixin, LatentInputsMixin
from .processing_latent import LatentProcessor  # noqa: F401  (travels with the model)


class LatentQwen2_5_VLModel(LatentInputsMixin, Qwen2_5_VLModel):
    """Qwen2.5-VL backbone whose forward takes `latent_embeds` and `latent_mask` (contract C1)."""

    config_class = LatentQwen2_5_VLConfig

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        latent_embeds: torch.Tensor | None = None,
        latent_mask: torch.BoolTensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        r"""
        latent_embeds (`torch.Tensor` of shape `(batch, length, hidden)`, *optional*):
            Vectors that replace token embeddings where `latent_mask` is true.
        latent_mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*):
            Latent positions; default `input_ids == config.latent_token_id`.
        """
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=self.embed_with_latents(input_ids, inputs_embeds, latent_embeds, latent_mask),
            use_cache=use_cache,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            second_per_grid_ts=second_per_grid_ts,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )


class LatentQwen2_5_VLForConditionalGeneration(
    LatentGenerationMixin, LatentHeadMixin, Qwen2_5_VLForConditionalGeneration
):
    """Qwen2.5-VL with latent decoding: `model.generate(**inputs, latent_strategy="dynamic")`."""

    config_class = LatentQwen2_5_VLConfig

    def __init__(self, config: LatentQwen2_5_VLConfig) -> None:
        super(Qwen2_5_VLForConditionalGeneration, self).__init__(config)
        self.model = LatentQwen2_5_VLModel(config)
        text = config.get_text_config()
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.latent_head = build_latent_head(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        latent_embeds: torch.Tensor | None = None,
        latent_mask: torch.BoolTensor | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> LatentCausalLMOutputWithPast | tuple:
        r"""As the stock forward, with latents.

        latent_embeds (`torch.Tensor` of shape `(batch, length, hidden)`, *optional*):
            Vectors that replace token embeddings where `latent_mask` is true.
        latent_mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*):
            Latent positions; default `input_ids == config.latent_token_id`.

        In train mode with `labels` the output has no logits: only labelled rows meet the LM head.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            second_per_grid_ts=second_per_grid_ts,
            mm_encoder_outputs=mm_encoder_outputs,
            latent_embeds=latent_embeds,
            latent_mask=latent_mask,
            **kwargs,
        )
        loss, logits, kept = self.project_hidden_states(outputs[0], labels, logits_to_keep, num_items_in_batch)
        output = LatentCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            last_hidden_state=kept,
            latent_states=self.latent_step(kept),
        )
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return output if use_dict else output.to_tuple()


# Stock checkpoints name their tensors `visual.*` and `model.layers.*`; the renaming of the stock classes is looked up
# by class
# name and skips custom classes, so it is registered for ours. A family without a mapping needs none.
for _name in ("Qwen2_5_VLModel", "Qwen2_5_VLForConditionalGeneration"):
    _mapping = get_checkpoint_conversion_mapping(_name)
    if _mapping is not None:
        register_checkpoint_conversion_mapping("Latent" + _name, _mapping, overwrite=True)
