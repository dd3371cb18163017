"""Where latents enter a backbone (contract C1) and what the head class returns.

A latent is a position whose embedding is replaced by a vector. `latent_mask` says where, `latent_embeds` says what,
and the ids keep the record: such a position carries `config.latent_token_id` (or `config.latent_patch_token_id` for an
inserted image embedding). One forward serves decoding, teacher forcing, replay and diagnostics.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput


@dataclass
class LatentCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of a latent head class.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, kept, hidden)`): final-norm hidden states at the positions
            kept by
            `logits_to_keep`: the vectors that the LM head read.
        latent_states (`torch.Tensor` of shape `(batch, kept, hidden)`): the vectors that would be fed next if the
            following position were a slot: `last_hidden_state` through the latent head, if the model has one.
        plan_output (`LatentPlanOutput`): output of the backbone for a call with `latent_plan`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    latent_states: torch.FloatTensor | None = None
    plan_output: ModelOutput | None = None


def latent_positions(input_ids: torch.LongTensor, token_ids: tuple[int | None, ...]) -> torch.BoolTensor:
    """Positions that carry one of the latent token ids.

    Args:
        input_ids: `(batch, length)`.
        token_ids: ids of slots and inserted patches; `None` entries match nothing.

    Returns:
        Boolean tensor `(batch, length)`.
    """
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for token_id in token_ids:
        if token_id is not None:
            mask = mask | (input_ids == token_id)
    return mask


def replace_latents(
    inputs_embeds: torch.Tensor, latent_embeds: torch.Tensor, latent_mask: torch.BoolTensor
) -> torch.Tensor:
    """Put `latent_embeds` where `latent_mask` is true; gradients flow into both.

    Args:
        inputs_embeds: token embeddings `(batch, length, hidden)`.
        latent_embeds: dense vectors `(batch, length, hidden)`; read only where the mask is true.
        latent_mask: `(batch, length)`.

    Returns:
        Embeddings `(batch, length, hidden)` in the dtype of `inputs_embeds`.

    Raises:
        ValueError: when shapes disagree.
    """
    if latent_embeds.shape != inputs_embeds.shape or latent_mask.shape != inputs_embeds.shape[:2]:
        raise ValueError(
            f"latent_embeds {tuple(latent_embeds.shape)} and latent_mask {tuple(latent_mask.shape)} must match the "
            f"input embeddings {tuple(inputs_embeds.shape)} (batch, length, hidden); pad or slice them as input_ids"
        )
    return torch.where(latent_mask.unsqueeze(-1), latent_embeds.to(inputs_embeds), inputs_embeds)


def mask_of_prompts(model: nn.Module, ids: torch.LongTensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mask of the prompts; where none is given, padding is what the stock `generate` takes for it."""
    if mask is not None:
        return mask
    pad, eos = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    return torch.ones_like(ids) if pad is None or pad in ends else (ids != pad).long()


class LatentInputsMixin:
    """For a backbone class: turns ids, embeddings and latents into the embeddings that the first layer reads."""

    def embed_with_latents(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        latent_embeds: torch.Tensor | None,
        latent_mask: torch.BoolTensor | None,
    ) -> torch.Tensor | None:
        """Embed `input_ids` (unless embeddings are given) and put the latents in.

        Args:
            input_ids: `(batch, length)` or `None`.
            inputs_embeds: `(batch, length, hidden)` or `None`.
            latent_embeds: `(batch, length, hidden)` or `None`.
            latent_mask: `(batch, length)`; default: where `input_ids` carries a latent token id. An all-false mask
                feeds the latent tokens by their own embedding.

        Returns:
            `(batch, length, hidden)`, or `inputs_embeds` untouched (possibly `None`) when the batch has no latent.

        Raises:
            ValueError: a latent position without a vector, or a mask that cannot be derived.
        """
        token_ids = (self.config.latent_token_id, self.config.latent_patch_token_id)
        if latent_embeds is None:
            ids_alone = input_ids is not None and inputs_embeds is None  # embeddings of the caller are vectors, too
            if latent_mask is None and ids_alone and not torch.compiler.is_compiling():
                latent_mask = latent_positions(input_ids, token_ids)
            if latent_mask is not None and bool(latent_mask.any()):
                row, position = latent_mask.nonzero()[0].tolist()
                raise ValueError(
                    f"position {position} of row {row} is a latent (token id {token_ids[0]}) but no vector was given; "
                    "pass latent_embeds (for a decoded sequence: `trace.latent_embeds`), or latent_mask of zeros to "
                    "feed the token's own embedding"
                )
            return inputs_embeds
        if latent_mask is None:
            if input_ids is None:
                raise ValueError(
                    "latent_embeds without input_ids needs an explicit latent_mask of shape (batch, length)"
                )
            latent_mask = latent_positions(input_ids, token_ids)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        return replace_latents(inputs_embeds, latent_embeds, latent_mask)


class LatentHeadMixin:
    """For a head class: logits at the kept positions, the loss on labelled rows only, and the latent states.

    Class attributes:
        head_at_slots: the latent head stands before the LM head, at slots only (`config.latent_head_timing ==
            "reference"`); otherwise it stands before the next input.
    """

    head_at_slots: bool = False

    def slot_hidden_states(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.LongTensor | None,
        latent_embeds: torch.Tensor | None,
        latent_mask: torch.BoolTensor | None,
    ) -> torch.Tensor:
        """Hidden states `(batch, length, hidden)` as the LM head reads them, given the latents of this forward."""
        if not self.head_at_slots or latent_embeds is None:
            return hidden_states
        if latent_mask is None:
            latent_mask = latent_positions(input_ids, (self.config.latent_token_id, self.config.latent_patch_token_id))
        return torch.where(latent_mask.unsqueeze(-1), self.latent_head(hidden_states), hidden_states)

    def project_hidden_states(
        self,
        hidden_states: torch.Tensor,
        labels: torch.LongTensor | None,
        logits_to_keep: int | torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """Apply the LM head.

        Args:
            hidden_states: `(batch, length, hidden)`.
            labels: `(batch, length)`, -100 where there is no loss. Only labelled rows meet the LM head for the loss.
            logits_to_keep: number of last positions, or an index tensor, for which logits are returned; 0 keeps all.
            num_items_in_batch: divisor of the summed loss; default the number of labelled rows.

        Returns:
            `(loss, logits, kept hidden states)`. In train mode with labels `logits` is `None`: full-sequence logits
            are never built there.
        """
        loss = None
        if labels is not None:
            targets = labels[:, 1:].to(hidden_states.device)
            rows = targets != -100
            logits = self.head_logits(hidden_states[:, :-1][rows]).float()
            total = nn.functional.cross_entropy(logits, targets[rows], reduction="sum")
            divisor = rows.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = total / divisor
        index = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        kept = hidden_states[:, index, :]
        logits = None if labels is not None and self.training else self.head_logits(kept)
        return loss, logits, kept

    def head_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(..., vocabulary)` of final-norm states `(..., hidden)`, as the stock forward makes them."""
        return self.lm_head(hidden_states)

    def plan_inputs(self, latent_plan: Any) -> dict[str, Any]:
        """`latent_plan` for the backbone: its slots are fed through the latent head, too."""
        if latent_plan is None:
            return {}
        return {"latent_plan": replace(latent_plan, step=latent_plan.step or self.latent_step)}

    def latent_step(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The vector that one latent step feeds: hidden state(s) `(..., hidden)` through the latent head, if any.

        With `latent_head_timing="reference"` the head has had its turn where it belongs, and states are fed as they
        are."""
        return hidden_states if self.latent_head is None or self.head_at_slots else self.latent_head(hidden_states)
