"""Packed training: the layers of the text model run on all samples of a batch in one row, without padding.

A batch comes padded, as the collator makes it, and everything outside the layers sees it so: token embeddings, image
features, latents, rotary positions (each sample its own), exposure, objectives and averages. Only the forward of the
text model is packed: [`pack_decoder`] takes the padding out before the first layer, keeps the samples apart in the
attention (block-diagonal and causal), and puts the hidden states back into the padded layout. So packed and unpacked
losses agree whatever a method computes from hidden states.

Attention: flash kernels get the boundaries of the samples (varlen); SDPA runs sample by sample, at a cost of the sum
of the squared lengths. The vision tower keeps its own attention.
"""

import functools
import types
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

PACKED_SDPA = "sdpa_packed"


class SampleLengths(list):
    """Tokens of the samples of a row, in order, on their way to the attention of every layer."""

    arrived = False


def packed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sample_lengths: SampleLengths | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA; given the lengths of the samples of a row, causal attention within each of them.

    Args:
        query, key, value: `(1, heads, tokens, dim)` of a packed row; any batch without `sample_lengths`.
        attention_mask: of the stock function; not read for a packed row.
        sample_lengths: they add up to `tokens`.
    """
    if sample_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    sample_lengths.arrived = True
    samples = zip(*(states.split(sample_lengths, dim=2) for states in (query, key, value)), strict=True)
    parts = [sdpa_attention_forward(module, *states, None, **kwargs)[0] for states in samples]
    return torch.cat(parts, dim=1), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def pack_decoder(model: PreTrainedModel) -> None:
    """Let the text model of `model` run packed in train mode, without padding between the samples of a batch.

    Passes in evaluation mode, over a cache, or without a 2-D attention mask run as before.

    Args:
        model: the unwrapped head class; its text model gets another `forward`, and SDPA by sample.

    Raises:
        ValueError: an attention implementation, or a kind of layer, that would mix the samples of a row.
    """
    decoder = model.get_decoder()
    _check_attention(decoder)
    if decoder.config._attn_implementation == "sdpa":
        decoder.config._attn_implementation = PACKED_SDPA
    wrapped = vars(decoder).get("forward")  # by accelerate, say; else that of the class, also in a copy of the model

    @functools.wraps(type(decoder).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stock_forward = wrapped or functools.partial(type(self).forward, self)
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        whole = kwargs.get("past_key_values") is None and not kwargs.get("use_cache")
        padded = embeds is not None and torch.is_tensor(mask) and mask.shape == embeds.shape[:2]
        if args or not (self.training and whole and padded):
            return stock_forward(*args, **kwargs)
        return _packed(self, stock_forward, kwargs)

    decoder.forward = types.MethodType(forward, decoder)


def _check_attention(decoder: nn.Module) -> None:
    config, name = decoder.config, decoder.config._attn_implementation
    flash = is_flash_attention_requested(config)
    if not flash and name not in ("sdpa", PACKED_SDPA):
        raise ValueError(
            f"latent_packing='sequence' with attn_implementation={name!r}, which cannot keep the samples of a row "
            "apart; load the model with attn_implementation='sdpa' or 'flash_attention_2', or set latent_packing: "
            "buckets"
        )
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    mixed = sorted(layers - {"full_attention"} - ({"sliding_attention"} if flash else set()))
    if mixed:
        raise ValueError(
            f"latent_packing='sequence' with layers of the kind {mixed} and attn_implementation={name!r}: they would "
            "mix the samples of a row; use a model with full attention, or set latent_packing: buckets"
        )


def _packed(decoder: nn.Module, stock_forward: Any, kwargs: dict[str, Any]) -> Any:
    """The stock forward on one row of all samples; its hidden states in the padded layout again."""
    embeds, mask, positions = (kwargs[name] for name in ("inputs_embeds", "attention_mask", "position_ids"))
    batch, length = mask.shape
    index = mask.flatten().nonzero()[:, 0].to(embeds.device)
    lengths = SampleLengths(tokens for tokens in mask.sum(dim=1).tolist() if tokens)
    if positions is None:
        positions = torch.arange(length, device=embeds.device).expand(batch, -1)
    if positions.dim() == 2:
        positions = positions.expand(3, -1, -1)
    # The last three channels are time, height and width. A fourth one, of the text, stands before them; the stock
    # forward would make a mask of rows x rows from it.
    positions = positions[-3:].flatten(1, 2)[:, None, index]
    rows = {
        name: _joined(value, index)
        for name, value in kwargs.items()
        if torch.is_tensor(value) and value.shape[:2] == mask.shape
    }
    flash = is_flash_attention_requested(decoder.config)
    apart = _boundaries(lengths, embeds.device) if flash else {"sample_lengths": lengths}
    output = stock_forward(**{**kwargs, **rows, "attention_mask": None, "position_ids": positions, **apart})
    if not (flash or lengths.arrived):
        raise RuntimeError(
            f"{type(decoder).__name__} does not hand its arguments on to the attention interface, so that the samples "
            "of a row would be mixed; set latent_packing: buckets"
        )
    output.last_hidden_state = _apart(output.last_hidden_state, index, batch, length)
    if output.hidden_states is not None:
        output.hidden_states = tuple(_apart(states, index, batch, length) for states in output.hidden_states)
    return output


def _joined(values: torch.Tensor, index: torch.LongTensor) -> torch.Tensor:
    return values.flatten(0, 1).index_select(0, index.to(values.device)).unsqueeze(0)


def _apart(states: torch.Tensor, index: torch.LongTensor, batch: int, length: int) -> torch.Tensor:
    """`(1, tokens, hidden)` as `(batch, length, hidden)`, with zeros as padding."""
    padded = states.new_zeros(batch * length, states.shape[-1])
    return padded.index_copy(0, index.to(states.device), states[0]).unflatten(0, (batch, length))


def _boundaries(lengths: SampleLengths, device: torch.device) -> dict[str, Any]:
    """What flash kernels take: where the samples begin and end, and the longest of them."""
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths)}


__all__ = ["PACKED_SDPA", "SampleLengths", "pack_decoder", "packed_sdpa"]
