"""What stands before the thought tokens of the search over latents: run once, with its images, and kept as a cache.

Every step of the search appends a few rows to it and cuts them off again, so that a step costs these rows alone.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

# Inputs of the forward that are images or videos, as pixels or as what the vision tower made of them.
VISION_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "image_sizes",
    "pixel_attention_mask",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
    "mm_encoder_outputs",
)


@dataclass(frozen=True)
class Prefix:
    """A batch of prefixes of width `P`, padded on the left.

    Args:
        model: the model that ran them.
        cache: their keys and values.
        mask: `(B, P)` 0 at padding.
        embeds: `(B, P, H)` as the first layer read them, image embeddings included.
        hidden: `(B, P, H)` after the final norm.
        positions: `(B, P)`, or `(3, B, P)` for a model with rotary axes.
    """

    model: nn.Module
    cache: DynamicCache
    mask: torch.Tensor
    embeds: torch.Tensor
    hidden: torch.Tensor
    positions: torch.Tensor

    def positions_behind(self, valid: torch.Tensor) -> torch.Tensor:
        """`(N, n)` or `(3, N, n)` positions of rows behind the prefixes: on all axes one behind the largest of the
        prefix, and so on.

        Args:
            valid: `(N, n)` 0 at padding, `N` a multiple of the batch: the rows of a prefix stand side by side.
        """
        largest = self.positions if self.positions.dim() == 2 else self.positions.amax(dim=0)
        first = largest.masked_fill(self.mask == 0, 0).amax(dim=1, keepdim=True) + 1
        first = first.repeat_interleave(len(valid) // len(first), dim=0)
        positions = first + (valid.long().cumsum(1) - 1).clamp(min=0)
        return positions if self.positions.dim() == 2 else positions.expand(3, -1, -1)

    @contextmanager
    def expanded(self, samples: int) -> Iterator[DynamicCache]:
        """The cache, repeated for noise samples."""
        if samples == 1:
            yield self.cache
            return
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(samples)
        yield cache

    def forward(self, cache: DynamicCache, rows: torch.Tensor, valid: torch.Tensor, keep: Any) -> torch.Tensor:
        """Run rows behind the prefixes; the cache grows by them.

        Args:
            cache: of [`expanded`], or a copy.
            rows: `(N, n, H)` vectors.
            valid: `(N, n)` 0 at padding, which stands on the right.
            keep: `logits_to_keep` of the forward.

        Returns:
            Logits `(N, kept, V)`.
        """
        mask = self.mask.repeat_interleave(len(rows) // len(self.mask), dim=0)
        return self.model(
            inputs_embeds=rows,
            attention_mask=torch.cat([mask, valid.long()], dim=1),
            position_ids=self.positions_behind(valid),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits

    def cut(self, cache: DynamicCache) -> None:
        """Cut a cache back to the prefixes."""
        surplus = cache.get_seq_length() - self.mask.shape[1]
        if surplus > 0:
            cache.crop(-surplus)
        if torch.is_grad_enabled():  # what is left was there before
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()


@torch.no_grad()
def run_prefix(
    model: nn.Module,
    ids: torch.LongTensor,
    mask: torch.Tensor,
    vision: dict[str, Any],
    positions: torch.LongTensor | None = None,
) -> Prefix:
    """Run prefixes.

    Args:
        ids: `(B, P)`.
        mask: `(B, P)` 0 at padding.
        vision: `VISION_INPUTS` and `mm_token_type_ids`; without any an image token is its placeholder's embedding.
        positions: `(B, P)`, or `(3, B, P)` or `(4, B, P)` where the last three are the rotary axes. Default: those of
            the model's images, without images the number of the token.
    """
    cache, seen, decoder = DynamicCache(), {}, model.get_decoder()

    def before_decoder(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.update(embeds=kwargs.get("inputs_embeds"), positions=kwargs.get("position_ids"))

    def before_layer(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if seen["embeds"] is None:  # the decoder puts the images in itself (Chameleon)
            seen["embeds"] = args[0] if args else kwargs["hidden_states"]

    def after_decoder(module: nn.Module, args: tuple, output: Any) -> None:
        seen["hidden"] = output[0]

    inputs = {"input_ids": ids, **vision} if vision else {"inputs_embeds": model.get_input_embeddings()(ids)}
    if positions is None and not (vision and has_rotary_axes(model)):
        positions = flat_positions(model, mask)
    if positions is not None:
        inputs["position_ids"] = positions
    handles = [
        decoder.register_forward_pre_hook(before_decoder, with_kwargs=True),
        decoder.register_forward_hook(after_decoder),
    ]
    layers = getattr(decoder, "layers", None)
    if layers is not None:
        handles.append(layers[0].register_forward_pre_hook(before_layer, with_kwargs=True))
    try:
        model(**inputs, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    positions = positions if seen["positions"] is None else seen["positions"]
    positions = positions[-3:] if positions.dim() == 3 else positions
    return Prefix(model, cache, mask, seen["embeds"], seen["hidden"], positions)


def has_rotary_axes(model: nn.Module) -> bool:
    """Whether a position of the model has a time, a row and a column."""
    return hasattr(getattr(model, "model", model), "get_rope_index")


def flat_positions(model: nn.Module, mask: torch.Tensor) -> torch.LongTensor:
    """`(B, P)` or `(3, B, P)` the number of each token, padding left out, as the published code has it."""
    flat = (mask.cumsum(-1) - 1).clamp(min=0)
    return flat.expand(3, -1, -1) if has_rotary_axes(model) else flat


__all__ = ["VISION_INPUTS", "Prefix", "flat_positions", "has_rotary_axes", "run_prefix"]
