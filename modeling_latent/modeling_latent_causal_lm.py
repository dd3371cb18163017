"""Causal language models that reason in latents: any stock one of the kind of Llama, Qwen, Mistral or GPT-2.

The stock base model is held, not copied: the backbone embeds the ids, puts the latents in and calls it. So one file
serves all of these families, and Coconut ("Training Large Language Models to Reason in a Continuous Latent Space",
arXiv 2412.06769), whose base is GPT-2, is IVT-LR without images.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming, WeightTransform
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_latent import LatentCausalLMConfig
from .latent_blocks import padded_positions
from .latent_head_class import LatentHeadClassMixin
from .latent_inputs import LatentCausalLMOutputWithPast, LatentInputsMixin
from .latent_plan import LatentPlan, LatentPlanMixin, run_plan
from .processing_latent_text import LatentTextProcessor  # noqa: F401  (travels with the model)


class LatentCausalLMPreTrainedModel(PreTrainedModel):
    """What backbone and head class share; what a family supports is said by the stock model that they hold."""

    config_class = LatentCausalLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class LatentCausalLMModel(LatentPlanMixin, LatentInputsMixin, LatentCausalLMPreTrainedModel):
    """Backbone: a stock base model (`language_model`) whose forward takes latents (contract C1)."""

    def __init__(self, config: LatentCausalLMConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self._can_compile_fullgraph = self.language_model._can_compile_fullgraph
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        latent_embeds: torch.Tensor | None = None,
        latent_mask: torch.BoolTensor | None = None,
        latent_plan: LatentPlan | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        r"""As the stock forward, with latents. Padding does not count in the positions, which a model with learned
        ones (GPT-2) must be told.

        latent_embeds (`torch.Tensor` of shape `(batch, length, hidden)`, *optional*):
            Vectors that replace token embeddings where `latent_mask` is true.
        latent_mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*):
            Latent positions; default `input_ids == config.latent_token_id`.
        latent_plan (`LatentPlan`, *optional*):
            Work the latents out, one after the other (contract C4); the output is a [`LatentPlanOutput`].
        """
        if latent_plan is not None:
            given = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "past_key_values": past_key_values,
                "inputs_embeds": inputs_embeds,
                "use_cache": use_cache,
                "latent_embeds": latent_embeds,
                "latent_mask": latent_mask,
            }
            return run_plan(self, latent_plan, {**given, **kwargs})
        embeds = self.embed_with_latents(input_ids, inputs_embeds, latent_embeds, latent_mask)
        if position_ids is None and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            length = (input_ids if embeds is None else embeds).shape[1]
            position_ids = padded_positions(attention_mask)[:, -length:]
        return self.language_model(
            input_ids=input_ids if embeds is None else None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=embeds,
            use_cache=use_cache,
            **kwargs,
        )


class LatentCausalLM(LatentHeadClassMixin, LatentCausalLMPreTrainedModel, GenerationMixin):
    """Causal language model with latent decoding: `model.generate(**inputs, latent_strategy="staged")`.

    Tensors of the stock model are named `model.language_model.*` and `lm_head.*`. A stock checkpoint is loaded with
    the names that it has; what is saved has ours.
    """

    def __init__(self, config: LatentCausalLMConfig) -> None:
        super().__init__(config)
        self.model = LatentCausalLMModel(config)
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self._can_compile_fullgraph = self.model._can_compile_fullgraph
        self.build_heads(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        latent_embeds: torch.Tensor | None = None,
        latent_mask: torch.BoolTensor | None = None,
        latent_plan: LatentPlan | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> LatentCausalLMOutputWithPast | tuple:
        r"""As the stock forward, with latents.

        latent_embeds (`torch.Tensor` of shape `(batch, length, hidden)`, *optional*):
            Vectors that replace token embeddings where `latent_mask` is true.
        latent_mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*):
            Latent positions; default `input_ids == config.latent_token_id`.
        latent_plan (`LatentPlan`, *optional*):
            Work the latents out, one after the other (contract C4); what they are is in `plan_output`.

        In train mode with `labels` the output has no logits: only labelled rows meet the LM head.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            latent_embeds=latent_embeds,
            latent_mask=latent_mask,
            **self.plan_inputs(latent_plan),
            **kwargs,
        )
        return self.latent_output(
            outputs,
            input_ids=input_ids,
            latent_embeds=latent_embeds,
            latent_mask=latent_mask,
            latent_plan=latent_plan,
            labels=labels,
            logits_to_keep=logits_to_keep,
            num_items_in_batch=num_items_in_batch,
            return_dict=return_dict,
        )


class OneWayRenaming(WeightRenaming):
    """A renaming of checkpoint tensors that saving does not turn back."""

    __slots__ = ()

    def reverse_transform(self) -> WeightTransform:
        return WeightRenaming(r"^(?!.)", "")  # matches no name


_OWN_NAMES = r"(?!model\.language_model\.|lm_head\.|latent_head\.|latent_stop_vector\.)"
# Stock names, `model.layers.*`, `transformer.h.*`, or `h.*` of a bare base model, to ours. A saved folder has ours,
# whichever family is in it.
register_checkpoint_conversion_mapping(
    "LatentCausalLM",
    [
        OneWayRenaming(r"^embed_out\.", "lm_head."),
        OneWayRenaming(rf"^{_OWN_NAMES}(?:model\.|transformer\.|gpt_neox\.)?", "model.language_model."),
    ],
    overwrite=True,
)

__all__ = ["LatentCausalLM", "LatentCausalLMModel"]
