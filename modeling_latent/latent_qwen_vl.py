"""What the Qwen-VL families share: the forward of the backbone with latents, and the forward of the head class.

The families differ inside the stock classes (windows in the vision tower, deep-stack features, layout of the rotary
axes), which are called, never copied. One recipe is exact for all: embed the ids, put the latents in, compute the
rotary positions from the ids, and call the stock backbone with embeddings and positions. The ids stay aside for one
purpose: the stock backbone would otherwise find image placeholders by comparing embeddings, and might take a latent,
or another token of the same embedding, for one.
"""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .latent_blocks import padded_positions
from .latent_head_class import LatentHeadClassMixin, register_checkpoint_renaming
from .latent_inputs import LatentCausalLMOutputWithPast, LatentInputsMixin
from .latent_patch_embed import use_linear_patch_embed
from .latent_plan import LatentPlan, LatentPlanMixin, run_plan

_PLACEHOLDERS: ContextVar[torch.LongTensor | None] = ContextVar("latent_placeholders", default=None)
_NO_TOKEN = -1


class LatentQwenVLModelMixin(LatentPlanMixin, LatentInputsMixin):
    """For a backbone class, before the stock one: `class LatentQwen3VLModel(LatentQwenVLModelMixin, Qwen3VLModel)`.

    Class attributes:
        position_inputs: names of further arguments that the rotary positions of the family are computed from.
    """

    position_inputs: tuple[str, ...] = ()

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.patch_embed_fp32:
            use_linear_patch_embed(self.visual)

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
        mm_encoder_outputs: dict[str, Any] | None = None,
        latent_embeds: torch.Tensor | None = None,
        latent_mask: torch.BoolTensor | None = None,
        latent_plan: LatentPlan | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        r"""As the stock forward, with latents (contract C1).

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
                "pixel_values": pixel_values,
                "pixel_values_videos": pixel_values_videos,
                "image_grid_thw": image_grid_thw,
                "video_grid_thw": video_grid_thw,
                "mm_token_type_ids": mm_token_type_ids,
                "mm_encoder_outputs": mm_encoder_outputs,
                "latent_embeds": latent_embeds,
                "latent_mask": latent_mask,
            }
            return run_plan(self, latent_plan, {**given, **kwargs})
        embeds = self.embed_with_latents(input_ids, inputs_embeds, latent_embeds, latent_mask)
        has_images = not (pixel_values is None and pixel_values_videos is None and not mm_encoder_outputs)
        placeholders = None
        if embeds is not None and has_images and (input_ids is not None or latent_embeds is not None):
            placeholders = self._placeholder_ids(input_ids, inputs_embeds, latent_mask)
        if self.config.rope_positions == "flat" and position_ids is None:
            position_ids = _flat_positions(input_ids if embeds is None else embeds, attention_mask, past_key_values)
        elif embeds is not None and input_ids is not None and position_ids is None:
            position_ids = self.compute_3d_position_ids(
                input_ids=input_ids,
                inputs_embeds=embeds,
                image_grid_thw=image_grid_thw,
                video_grid_thw=video_grid_thw,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                mm_token_type_ids=mm_token_type_ids,
                **{name: kwargs.get(name) for name in self.position_inputs},
            )
            if position_ids is None:  # text alone; said here, or positions of an earlier call would be taken up
                position_ids = _plain_positions(embeds, past_key_values)
        stock_forward = functools.partial(
            super().forward,
            input_ids=input_ids if embeds is None else None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        if placeholders is None:
            return stock_forward()
        token = _PLACEHOLDERS.set(placeholders)
        try:
            return stock_forward()
        finally:
            _PLACEHOLDERS.reset(token)

    def plan_positions(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor, **inputs: Any
    ) -> torch.LongTensor:
        """`(3, batch, length)` rotary positions; inserted image embeddings are counted like text."""
        found = None
        if self.config.rope_positions == "mrope":
            names = ("image_grid_thw", "mm_token_type_ids", *self.position_inputs)
            found = self.compute_3d_position_ids(
                input_ids=input_ids,
                inputs_embeds=None,
                attention_mask=attention_mask,
                past_key_values=None,
                video_grid_thw=None,
                **{name: inputs.get(name) for name in names},
            )
        return padded_positions(attention_mask).expand(3, -1, -1) if found is None else found

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.BoolTensor, torch.BoolTensor]:
        """Image and video placeholders, each `(batch, length, 1)`, by the ids of the running forward if it has any."""
        input_ids = _PLACEHOLDERS.get() if input_ids is None else input_ids
        return super().get_placeholder_mask(input_ids, inputs_embeds, *args, **kwargs)

    def _placeholder_ids(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        latent_mask: torch.BoolTensor | None,
    ) -> torch.LongTensor:
        """`(batch, length)` ids in which no latent is a placeholder, whatever id or vector it has."""
        if input_ids is None:
            image, video = super().get_placeholder_mask(None, inputs_embeds)
            input_ids = torch.full(inputs_embeds.shape[:2], _NO_TOKEN, device=inputs_embeds.device)
            input_ids = input_ids.masked_fill(video[..., 0], self.config.video_token_id)
            input_ids = input_ids.masked_fill(image[..., 0], self.config.image_token_id)
        return input_ids if latent_mask is None else input_ids.masked_fill(latent_mask, _NO_TOKEN)


class LatentQwenVLHeadMixin(LatentHeadClassMixin):
    """For a head class, before the stock one; its `__init__` builds the backbone and calls `build_heads`."""

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict) -> torch.Tensor:
        if self.config.rope_positions == "flat":  # without them the stock method takes the plain index for all axes
            model_kwargs = {k: v for k, v in model_kwargs.items() if k != "mm_token_type_ids"}
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

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


def forward_with(forward: Callable[..., Any], **annotations: Any) -> Callable[..., Any]:
    """A forward of this file whose signature names further arguments of one family.

    `generate` and the Trainer refuse, or drop, what the signature does not name. The values travel in `**kwargs`.

    Args:
        forward: the forward of a mixin.
        annotations: name of the argument (default `None`) to its type.
    """

    @functools.wraps(forward)
    def family_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    *named, rest = signature.parameters.values()
    kind = inspect.Parameter.KEYWORD_ONLY
    further = [inspect.Parameter(name, kind, default=None, annotation=type_) for name, type_ in annotations.items()]
    family_forward.__signature__ = signature.replace(parameters=[*named, *further, rest])
    return family_forward


def _flat_positions(
    inputs: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
) -> torch.LongTensor:
    """`(batch, length)` plain positions of all tokens, images included; padding does not count."""
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        return padded_positions(attention_mask)[:, -inputs.shape[1] :]
    return _plain_positions(inputs, past_key_values)


def _plain_positions(embeds: torch.Tensor, past_key_values: Cache | None) -> torch.LongTensor:
    """`(batch, length)` positions that go on after the cache, as the stock text models count them."""
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    return (torch.arange(embeds.shape[1], device=embeds.device) + past).expand(embeds.shape[0], -1)


__all__ = ["LatentQwenVLHeadMixin", "LatentQwenVLModelMixin", "forward_with", "register_checkpoint_renaming"]
