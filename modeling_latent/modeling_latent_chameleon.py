"""Chameleon that reasons in latents: stock classes, latents in the backbone's forward, latent decoding.

An image is a row of discrete tokens here: a frozen VQ encoder names them, and the embedding table gives their vectors.
The stock model never says such a token: its forward sets their logits to the lowest number. A loss that multiplies
states with the LM head itself has to leave them out as well; see [`TextTokenHead`].
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import ChameleonForConditionalGeneration, ChameleonModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

from .configuration_latent import LatentChameleonConfig
from .latent_head_class import LatentHeadClassMixin, register_checkpoint_renaming
from .latent_inputs import LatentCausalLMOutputWithPast, LatentInputsMixin
from .latent_plan import LatentPlan, LatentPlanMixin, run_plan
from .processing_latent_chameleon import LatentChameleonProcessor  # noqa: F401  (travels with the model)

_NO_TOKEN = -1
# Far below any logit, so that the probability is exactly zero, and finite in every precision and at any temperature.
SILENCED_LOGIT = -3e4


class LatentChameleonModel(LatentPlanMixin, LatentInputsMixin, ChameleonModel):
    """Chameleon backbone whose forward takes `latent_embeds` and `latent_mask` (contract C1), or a `latent_plan`."""

    config_class = LatentChameleonConfig

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        latent_embeds: torch.Tensor | None = None,
        latent_mask: torch.BoolTensor | None = None,
        latent_plan: LatentPlan | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        r"""As the stock forward, with latents (contract C1). Image placeholders are found by the ids where there are
        any, also beside `inputs_embeds`, and no latent is taken for one.

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
                "pixel_values": pixel_values,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "past_key_values": past_key_values,
                "inputs_embeds": inputs_embeds,
                "use_cache": use_cache,
                "mm_encoder_outputs": mm_encoder_outputs,
                "latent_embeds": latent_embeds,
                "latent_mask": latent_mask,
            }
            return run_plan(self, latent_plan, {**given, **kwargs})
        embeds = self.embed_with_latents(input_ids, inputs_embeds, latent_embeds, latent_mask)
        if embeds is not None and pixel_values is not None:
            mm_encoder_outputs = self._encoded(pixel_values, mm_encoder_outputs)
            pixel_values = None
        if embeds is not None and mm_encoder_outputs:
            embeds = self._put_images(embeds, mm_encoder_outputs, input_ids, inputs_embeds, latent_mask)
            mm_encoder_outputs = None
        return super().forward(
            input_ids=input_ids if embeds is None else None,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling | tuple:
        """As the stock method. Nothing is kept for a backward through the VQ encoder, which would end at its choice of
        a token anyway, and the pixels may have another precision than the model.

        Args:
            pixel_values: `(images, 3, height, width)`.
            kwargs: those of the stock method.

        Returns:
            Output with `pooler_output`, the `(images, tokens, hidden)` embeddings of the image tokens.
        """
        use_dict = kwargs.pop("return_dict", None)
        with torch.no_grad():
            output = super().get_image_features(pixel_values.to(self.vqmodel.dtype), return_dict=True, **kwargs)
            tokens = self.vocabulary_mapping.convert_img2bpe(output.image_tokens).view(len(pixel_values), -1)
        output.pooler_output = self.get_input_embeddings()(tokens)
        return output if (self.config.return_dict if use_dict is None else use_dict) else output.to_tuple()

    def _encoded(self, pixel_values: torch.Tensor, mm_encoder_outputs: dict[str, Any] | None) -> dict[str, Any]:
        if mm_encoder_outputs is not None:
            raise ValueError("pixel_values and mm_encoder_outputs are the same images twice; pass one of the two")
        return self.encode_images(pixel_values=pixel_values)

    def _put_images(
        self,
        embeds: torch.Tensor,
        encoded: dict[str, Any],
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        latent_mask: torch.BoolTensor | None,
    ) -> torch.Tensor:
        """`(batch, length, hidden)` with the image embeddings at the placeholders: those of the ids, or, without ids,
        of the embeddings as they were given."""
        features = encoded["image"].pooler_output
        if latent_mask is not None and input_ids is not None:
            input_ids = input_ids.masked_fill(latent_mask, _NO_TOKEN)
        elif latent_mask is not None:
            inputs_embeds = inputs_embeds.masked_fill(latent_mask.unsqueeze(-1), float("nan"))  # equal to nothing
        places = self.get_placeholder_mask(input_ids, embeds if inputs_embeds is None else inputs_embeds, features)
        return embeds.masked_scatter(places, features.to(embeds))


class TextTokenHead(nn.Linear):
    """An LM head that never says some tokens; its forward gives them the lowest number, as the stock forward does.

    Losses that never build all logits, TRL's among them, multiply states with `weight` and add `bias` where there is
    one. So this head shows them a bias: `SILENCED_LOGIT` at the silenced tokens, zero elsewhere. It is neither a
    parameter nor a buffer but made from the weight when it is asked for, and follows its size, precision and device:
    nothing of it is saved, trained or sharded.

    Attributes:
        silenced: runs `(first, behind the last)` of token ids.
    """

    silenced: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, head: nn.Linear, silenced: tuple[tuple[int, int], ...]) -> "TextTokenHead":
        """The head itself, from now on silent at some tokens; a bias that it has is dropped."""
        head.register_parameter("bias", None)
        head.__class__, head.silenced = cls, silenced
        return head

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits `(..., vocabulary)` of states `(..., hidden)`."""
        return silence(nn.functional.linear(input, self.weight), self.silenced)

    @property
    def bias(self) -> torch.Tensor | None:
        """`(vocabulary,)` in the precision of the weight, without gradient; `None` when no token is silenced."""
        if not self.silenced:
            return None
        weight = self.weight
        size = getattr(weight, "ds_shape", weight.shape)[0]  # a weight that DeepSpeed sharded has no rows
        bias = torch.zeros(size, dtype=weight.dtype, device=weight.device)
        for start, stop in self.silenced:
            bias[start:stop] = SILENCED_LOGIT
        if hasattr(weight, "ds_status"):
            bias.ds_status = type(weight.ds_status).AVAILABLE  # there is nothing to gather
        if hasattr(weight, "full_tensor"):  # FSDP2: whoever gathers the weight gathers the bias with it
            from torch.distributed.tensor import DTensor, Replicate

            whole = [Replicate()] * weight.device_mesh.ndim
            bias = DTensor.from_local(bias, weight.device_mesh, whole, run_check=False)
        return bias


def silence(logits: torch.Tensor, runs: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Logits `(..., vocabulary)`, in place the lowest number of their precision at the tokens of the runs."""
    for start, stop in runs:
        logits[..., start:stop] = torch.finfo(logits.dtype).min
    return logits


def runs_of(token_ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ascending ids as runs.

    Example:
        >>> runs_of([4, 5, 6, 9])
        ((4, 7), (9, 10))
    """
    runs: list[tuple[int, int]] = []
    for token_id in token_ids:
        if runs and runs[-1][1] == token_id:
            runs[-1] = (runs[-1][0], token_id + 1)
        else:
            runs.append((token_id, token_id + 1))
    return tuple(runs)


class LatentChameleonForConditionalGeneration(LatentHeadClassMixin, ChameleonForConditionalGeneration):
    """Chameleon with latent decoding: `model.generate(**inputs, latent_strategy="dynamic")`."""

    config_class = LatentChameleonConfig

    def __init__(self, config: LatentChameleonConfig) -> None:
        super(ChameleonForConditionalGeneration, self).__init__(config)
        self.model = LatentChameleonModel(config)
        self.vocab_size = config.vocab_size
        self.image_token_runs = runs_of(self.model.vocabulary_mapping.image_tokens)
        self.build_heads(config)

    def build_lm_head(self, hidden_size: int, vocab_size: int) -> nn.Linear:
        """That of the stock class, silent at the image tokens."""
        return TextTokenHead.of(super().build_lm_head(hidden_size, vocab_size), self.image_token_runs)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """As the stock method; a head that comes from a change of the vocabulary is silenced as well."""
        if type(new_embeddings) is nn.Linear:
            new_embeddings = TextTokenHead.of(new_embeddings, self.image_token_runs)
        super().set_output_embeddings(new_embeddings)

    def head_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(..., vocabulary)` as in the stock forward, also when an adapter has wrapped the LM head."""
        return silence(super().head_logits(hidden_states), self.image_token_runs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
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
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
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


register_checkpoint_renaming("ChameleonModel", "ChameleonForConditionalGeneration")

__all__ = ["LatentChameleonForConditionalGeneration", "LatentChameleonModel", "TextTokenHead"]
