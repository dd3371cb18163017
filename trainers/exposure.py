"""Exposure: which vectors are fed at latent positions in training.

At inference a model is fed its own hidden states; the published methods train on something else: LASER on the concept
tokens (`"text"`), LVR on image embeddings of the region (`"oracle"`). That gap is part of them. Two kinds close it,
for a share of rows or of latents, and behind the first `forced` latents of a span:

* `"own"`: passes without gradients give hidden states, and those, shifted by one position, replace the embeddings in
  the trained pass. After `n` passes the first `n` latents of a span are exactly those of free-running decoding.
* `"free"`: the latents are decoded step by step, over one cache and with gradients, so that the loss of the trained
  pass reaches every earlier step (back-propagation through time). See `free_running.py`.

A method whose latents are worked out inside the forward (IVT-LR, Coconut) is `"staged"`: its objective asks for that,
and nothing is left to do here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .data.dynamic_batching import is_count
from .free_running import free_running_latents

TEACHER_EXPOSURES = ("text", "oracle")
OWN_EXPOSURES = ("own", "free")
EXPOSURES = (*TEACHER_EXPOSURES, *OWN_EXPOSURES, "staged")
EXPOSURE_UNITS = ("row", "latent")


@dataclass(frozen=True)
class LatentExposure:
    """Options of the exposure.

    Args:
        kind: `"text"` feeds the tokens, `"oracle"` the objective's vectors, `"own"` and `"free"` the model's own, and
            with `"staged"` the forward feeds them itself.
        prob: share, drawn per step, that is fed the model's own latents; the rest is fed as without.
        passes: of `"own"`: passes without gradients; every rank runs the same number.
        unit: what the share is of: `"row"`, or each single `"latent"`.
        forced: latents at the beginning of every span that are never fed by the model's own.
    """

    kind: str = "text"
    prob: float = 1.0
    passes: int = 1
    unit: str = "row"
    forced: int = 0

    def __post_init__(self) -> None:
        if self.kind not in EXPOSURES:
            raise ValueError(f"latent_exposure={self.kind!r} is unknown; choose one of {list(EXPOSURES)}")
        if isinstance(self.prob, bool) or not isinstance(self.prob, (int, float)) or not 0 < self.prob <= 1:
            raise ValueError(
                f"latent_exposure_prob={self.prob!r} must be above 0 and at most 1; use "
                f"{' or '.join(map(repr, TEACHER_EXPOSURES))} for 0"
            )
        if not is_count(self.passes):
            raise ValueError(f"latent_exposure_passes={self.passes!r} must be an integer of at least 1")
        if self.unit not in EXPOSURE_UNITS:
            raise ValueError(f"latent_exposure_unit={self.unit!r} is unknown; choose one of {list(EXPOSURE_UNITS)}")
        if self.forced != 0 and not is_count(self.forced):
            raise ValueError(f"latent_exposure_forced={self.forced!r} must be an integer, 0 or more")

    def inputs(
        self, model: PreTrainedModel, positions: torch.BoolTensor, inputs: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """`latent_embeds` and `latent_mask` `(batch, length[, hidden])` for the trained pass; empty when nothing of it
        is the model's own.

        Args:
            model: the head class; its backbone is run.
            positions: `(batch, length)` bool, positions that are fed by a latent at inference.
            inputs: what the backbone takes, with the objective's own `latent_embeds` and `latent_mask`, if it has any.
        """
        if self.kind not in OWN_EXPOSURES or not model.training:
            return {}
        own = self._drawn(positions)
        if self.kind == "free":
            return _merged(free_running_latents(model, own, inputs), own, inputs)
        latents: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for _ in range(self.passes):
                hidden = model.base_model(**{**inputs, **latents, "use_cache": False}).last_hidden_state
                embeds = torch.zeros_like(hidden)
                embeds[:, 1:] = model.latent_step(hidden[:, :-1])
                latents = _merged(embeds, own, inputs)
        return latents

    def _drawn(self, positions: torch.BoolTensor) -> torch.BoolTensor:
        shape = (positions.shape[0], 1) if self.unit == "row" else positions.shape
        drawn = positions & (torch.rand(shape, device=positions.device) < self.prob)
        return drawn & (rank_in_span(positions) >= self.forced) if self.forced else drawn


def rank_in_span(positions: torch.BoolTensor) -> torch.LongTensor:
    """How many latents of the same span stand before each position `(batch, length)`; meaningless outside spans.

    Example:
        >>> rank_in_span(torch.tensor([[False, True, True, False, True]]))[0].tolist()
        [0, 0, 1, 0, 0]
    """
    places = torch.arange(positions.shape[1], device=positions.device).expand(positions.shape)
    previous = torch.nn.functional.pad(positions[:, :-1], (1, 0))
    starts = torch.where(positions & ~previous, places, 0).cummax(dim=1).values
    return torch.where(positions, places - starts, 0)


def _merged(embeds: torch.Tensor, own: torch.BoolTensor, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's own latents where they are fed, the objective's elsewhere; no gradient of `inputs` is lost."""
    given, mask = inputs.get("latent_embeds"), inputs.get("latent_mask")
    if given is None:
        return {"latent_embeds": embeds, "latent_mask": own}
    return {"latent_embeds": torch.where(own.unsqueeze(-1), embeds.to(given.dtype), given), "latent_mask": own | mask}
