"""Replay inside TRL's fused LM head: log-probabilities of a completion whose latents are put back where they were.

Paper: "Latent Visual Reasoning" (LVR), arXiv 2509.24251, stage 2. [`add_latent_replay`] wraps the forward that TRL
wrapped (`latent_forward.py` does the same for the supervised losses). The recorded latents reach the backbone as
`latent_embeds`, the positions are those of the rollout, and only what predicts the completion meets the LM head. All
parameters, those of a latent head too, are used inside the forward, so that DDP, ZeRO and FSDP find them.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from .grpo_replay import Replay
from .latent_forward import trl_forward


@dataclass
class ReplayOutput(FusedCausalLMOutput):
    """TRL's output over the `C` completion positions, and what the policy would have fed at each recorded latent.

    Args:
        means: `(B, N, H)` latent states at the positions before the recorded latents, with gradient; `None` unless
            asked for.
    """

    means: torch.Tensor | None = None


def add_latent_replay(model: PreTrainedModel) -> None:
    """Wrap the instance's forward (already wrapped by TRL) so that it takes a replay.

    `model(..., fused_lm_head=True, labels=labels, replay_vectors=, replay_index=, position_ids=, num_scored=C)` gives
    a [`ReplayOutput`] with `log_probs` `(B, C)`. Labels are -100 where nothing is scored; 0 is returned there. Further
    arguments: `replay_means=True` for the means, `replay_latents=False` to feed the embedding of the placeholder.

    A head that stands before the LM head (`latent_head_timing="reference"`) is applied at the latents here, as in
    decoding: TRL's path passes the model's own head class by.

    Raises:
        RuntimeError: TRL's fused head is absent or has another form.
    """
    fused_forward = trl_forward(model)

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        replay_vectors: torch.Tensor | None = None,
        replay_index: torch.LongTensor | None = None,
        replay_means: bool = False,
        replay_latents: bool = True,
        num_scored: int = 0,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or replay_index is None:
            if fused_lm_head:
                kwargs["fused_lm_head"] = True
            return fused_forward(*args, **({} if labels is None else {"labels": labels}), **kwargs)
        replay, ids = Replay(replay_vectors, replay_index), kwargs["input_ids"]
        kwargs["latent_mask"] = replay.mask(ids.shape[1])
        if replay_latents:
            kwargs["latent_embeds"] = replay.dense(replay_vectors, ids.shape[1])
        else:
            kwargs["latent_mask"] = torch.zeros_like(kwargs["latent_mask"])
        kept: dict[str, torch.Tensor] = {}
        hook = self.base_model.register_forward_hook(
            _keep_scored(self, kept, replay_index if replay_means else None, num_scored, kwargs)
        )
        try:
            output = fused_forward(*args, fused_lm_head=True, shift_labels=labels[:, -num_scored:], **kwargs)
        finally:
            hook.remove()
        return ReplayOutput(**{name: output[name] for name in output.keys()}, means=kept.get("means"))

    model.forward = types.MethodType(forward, model)


def _keep_scored(
    model: PreTrainedModel,
    kept: dict[str, torch.Tensor],
    index: torch.LongTensor | None,
    num_scored: int,
    inputs: dict[str, Any],
) -> Callable:
    """Hook on the backbone: hands on the states that predict the completion, keeps those that predict latents."""
    latents = (inputs["input_ids"], inputs.get("latent_embeds"), inputs["latent_mask"])

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = model.slot_hidden_states(output.last_hidden_state, *latents)
        if index is not None:
            before = (index - 1).clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
            kept["means"] = model.latent_step(hidden.gather(1, before.to(hidden.device)))
        output.last_hidden_state = hidden[:, -num_scored - 1 : -1]
        return output

    return hook


__all__ = ["ReplayOutput", "add_latent_replay"]
