"""The prompt of the answer behind a search over latents: what was found stands in it, and the cache has it already."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from .search_latent import LatentSearch
from .search_patches import interleaved
from .search_state import SearchResult


@torch.no_grad()
def answer_inputs(search: LatentSearch, result: SearchResult) -> dict[str, Any]:
    """Inputs of `generate` for the answer, padded on the left.

    Args:
        search: that was run.
        result: what it found, or another one of its prompts, edited.

    Returns:
        `input_ids`, `attention_mask` and `latent_mask` `(B, L)`, `latent_embeds` `(B, L, H)`, `position_ids` `(B, L)`,
        or `(4, B, L)` with rotary axes behind the number of the token, and `past_key_values` of all but the last
        position. A thought token and a copy of an image token carry the id of the slot and are latents.
    """
    blocks, tails = [], search.suffixes
    for row, selection in enumerate(result.patches):
        moved = {offset: [place + search.shift[row] for place in each] for offset, each in selection.items()}
        blocks.append(interleaved(search.num_thoughts, moved if search.settings.inject_in_decode else {}))
    fed, valid = search.vectors(blocks, tails, result.thoughts.to(search.model.dtype))
    prefix, cache = search.with_image, copy.deepcopy(search.with_image.cache)
    prefix.forward(cache, fed, valid, keep=1)
    # Prefix and what was fed side by side; then the padding between and behind them moves to the left.
    start, slots = search.prefix_ids.shape[1], search.slots[:, :1]
    lengths = torch.tensor([[len(block)] for block in blocks], device=search.device)
    is_latent = torch.arange(fed.shape[1], device=search.device) < lengths
    text = [[0] * len(block) + tail for block, tail in zip(blocks, tails, strict=True)]
    text = torch.tensor([row + [0] * (fed.shape[1] - len(row)) for row in text], device=search.device)
    ids = torch.cat([search.prefix_ids, torch.where(is_latent, slots, text)], dim=1)
    mask = torch.cat([search.prefix_mask, valid], dim=1)
    positions = torch.cat([prefix.positions, prefix.positions_behind(valid)], dim=-1)
    order = mask.argsort(dim=1, stable=True)[:, int((mask == 0).sum(dim=1).min()) :]  # zeros first, ones in order
    _gather(cache, order[:, :-1])
    mask = mask.gather(1, order)
    pad = search.model.generation_config.pad_token_id
    positions = positions.gather(-1, order.expand(*positions.shape[:-1], -1)).masked_fill(mask == 0, 0)
    if positions.dim() == 3:  # the stock loop of Qwen has a channel that counts tokens, before the others
        positions = torch.cat([(mask.cumsum(1) - 1).clamp(min=0).unsqueeze(0), positions])
    is_latent = nn.functional.pad(is_latent, (start, 0)).gather(1, order)
    wide = order.unsqueeze(-1).expand(-1, -1, fed.shape[-1])
    embeds = nn.functional.pad(fed, (0, 0, start, 0)).gather(1, wide)
    return {
        "input_ids": ids.gather(1, order).masked_fill(mask == 0, 0 if pad is None else pad),
        "attention_mask": mask,
        "position_ids": positions,
        "latent_embeds": embeds * is_latent.unsqueeze(-1),
        "latent_mask": is_latent,
        "past_key_values": cache,
    }


def _gather(cache: DynamicCache, order: torch.LongTensor) -> None:
    """Put the positions of a cache into another order `(B, L)`."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            value = getattr(layer, name)
            index = order.view(*order.shape[:1], 1, -1, 1).expand(-1, value.shape[1], -1, value.shape[-1])
            setattr(layer, name, value.gather(2, index))


__all__ = ["answer_inputs"]
