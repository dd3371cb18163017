"""Exposure: which vectors are fed at latent positions in training.

LASER feeds the concept tokens in training and its own hidden states at inference; that gap is part of the published
method. With `latent_exposure="own"` the latent positions of a share of the rows are fed as at inference: a first pass
without gradients gives the hidden states, and those, shifted by one position, replace the embeddings in the trained
pass. After `n` passes the first `n` latents of a span are exactly those of free-running decoding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

EXPOSURES = ("text", "own")


@dataclass(frozen=True)
class LatentExposure:
    """Options of the exposure.

    Args:
        kind: `"text"` feeds the tokens (published method), `"own"` the model's own latents.
        prob: share of rows, drawn per row and step, that are fed their own latents.
        passes: passes without gradients; every rank runs the same number.
    """

    kind: str = "text"
    prob: float = 1.0
    passes: int = 1

    def __post_init__(self) -> None:
        if self.kind not in EXPOSURES:
            raise ValueError(f"latent_exposure={self.kind!r} is unknown; choose one of {list(EXPOSURES)}")
        if isinstance(self.prob, bool) or not isinstance(self.prob, (int, float)) or not 0 < self.prob <= 1:
            raise ValueError(f"latent_exposure_prob={self.prob!r} must be above 0 and at most 1; use 'text' for 0")
        if isinstance(self.passes, bool) or not isinstance(self.passes, int) or self.passes < 1:
            raise ValueError(f"latent_exposure_passes={self.passes!r} must be an integer of at least 1")

    def inputs(
        self, model: PreTrainedModel, positions: torch.BoolTensor, inputs: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """`latent_embeds` and `latent_mask` `(batch, length[, hidden])` for the trained pass; empty for `"text"`.

        Args:
            model: the head class; its backbone is run.
            positions: `(batch, length)` bool, positions that are fed by a latent at inference.
            inputs: what the backbone takes.
        """
        if self.kind == "text" or not model.training:
            return {}
        rows = torch.rand(positions.shape[0], 1, device=positions.device) < self.prob
        mask = positions & rows
        latents: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for _ in range(self.passes):
                hidden = model.base_model(**{**inputs, **latents, "use_cache": False}).last_hidden_state
                embeds = torch.zeros_like(hidden)
                embeds[:, 1:] = model.latent_step(hidden[:, :-1])
                latents = {"latent_embeds": embeds, "latent_mask": mask}
        return latents
