"""The naive decoder for learned tokens behind the prompt: one row, no cache, no padding, a dense mask for every pass.

A step is one pass over the whole row with eager attention, whose mask `(1, 1, L, L)` is written out pair by pair. The
backbones are those of the naive staged schedule. Nothing here is shared with the code of the library.

Source: LaViT, "Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129, and the two ways of
hiding its latent tokens from the answer: by visibility, and as padding.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from evaluation.naive_backbones import NaiveBackbone, NaiveChameleon, NaiveQwenVL


@dataclass(frozen=True)
class NaiveLearned:
    """One pass over a row of `L` ids.

    Attributes:
        ids: the row.
        embeds: `(L, H)` what each position is fed.
        hidden: `(L, H)` states after the final norm.
        logits: `(L, V)` of these states.
        positions: `(L,)` or `(3, L)`.
    """

    ids: list[int]
    embeds: torch.Tensor
    hidden: torch.Tensor
    logits: torch.Tensor
    positions: torch.Tensor


def dense_mask(length: int, hidden: range, form: str | None) -> torch.Tensor:
    """`(length, length)` bool, who may look at whom.

    Args:
        length: of the row.
        hidden: positions of the learned tokens.
        form: `None`: whoever is behind may look. `"visibility"`: a learned token is seen by itself alone.
            `"padding"`: by nobody, itself included.
    """
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(query + 1):
            is_hidden = form is not None and key in hidden and (form == "padding" or key != query)
            allowed[query, key] = not is_hidden
    return allowed


@torch.no_grad()
def naive_learned(backbone: NaiveBackbone, ids: list[int], learned: range, form: str | None = None) -> NaiveLearned:
    """One pass over prompt, learned tokens and what was written behind them.

    Args:
        backbone: stock model with eager attention, with the images of the row.
        ids: of the row, learned tokens included.
        learned: where these stand.
        form: see [`dense_mask`]. As padding the learned tokens have position 1, and the others the positions that they
            have in the row without them.
    """
    row = torch.tensor([ids])
    embeds = backbone.embed(row)
    if form == "padding":
        others = [place for place in range(len(ids)) if place not in learned]
        kept = backbone.positions(row[:, others], torch.ones(1, len(others), dtype=torch.long))
        positions = torch.ones(*kept.shape[:-1], len(ids), dtype=torch.long)
        positions[..., others] = kept
    else:
        positions = backbone.positions(row, torch.ones_like(row))
    allowed = dense_mask(len(ids), learned, form)
    added = torch.zeros(1, 1, len(ids), len(ids)).masked_fill(~allowed, torch.finfo(torch.float32).min)
    hidden = backbone.run(embeds, row, added, positions).last_hidden_state
    return NaiveLearned(ids, embeds[0], hidden[0], backbone.logits(hidden)[0], positions[..., 0, :])


def naive_learned_generate(
    backbone: NaiveBackbone,
    prompt: list[int],
    learned: list[int],
    *,
    max_new_tokens: int,
    form: str | None = None,
    eos_ids: Collection[int] = (),
    script: dict[int, int] | None = None,
    process_scores: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda ids, scores: scores,
) -> list[int]:
    """Ids that greedy decoding writes behind prompt and learned tokens; one pass over everything for each.

    Args:
        backbone, form: see [`naive_learned`].
        prompt: ids of the prompt.
        learned: ids laid out behind it.
        eos_ids: ids that end the row.
        script: step -> id that is written there whatever the scores are.
        process_scores: `(ids (1, n), scores (1, V)) -> scores`.
    """
    written: list[int] = []
    start = [*prompt, *learned]
    while len(written) < max_new_tokens and not (written and written[-1] in eos_ids):
        run = naive_learned(backbone, [*start, *written], range(len(prompt), len(start)), form)
        scores = process_scores(torch.tensor([run.ids]), run.logits[-1:])
        written.append((script or {}).get(len(written), int(scores.argmax())))
    return written


__all__ = [
    "NaiveBackbone",
    "NaiveChameleon",
    "NaiveLearned",
    "NaiveQwenVL",
    "dense_mask",
    "naive_learned",
    "naive_learned_generate",
]
