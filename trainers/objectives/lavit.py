"""LaViT: cross entropy on learned tokens and answer, and two alignments of the state at the last learned token with a
teacher: with what it sees, and with where it looks; the way from the answer to the image is narrowed meanwhile.

Paper: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129 (card 4).
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_latent.latent_attention import capture_attention_rows
from modeling_latent.latent_masks import (
    Visibility,
    allowed_pairs,
    check_visibility,
    image_visibility,
    visible_attention,
)

from ..latent_forward import LatentLoss, LatentObjective
from ..lavit_config import LavitSFTConfig
from ..losses.attention_alignment import (
    AttentionAlignment,
    attention_alignment_loss,
    attention_log_scores,
    first_positions_keys,
)
from ..losses.concept_alignment import concept_alignment_loss
from ..sensory_gate import gate_gamma
from . import register_objective


@register_objective("lavit")
class LavitObjective(LatentObjective):
    """See the module.

    Raises:
        ValueError: another configuration, a model without learned tokens or without a head that is to be trained, or
            an attention implementation that cannot be narrowed.
    """

    main_loss = "loss_concept"
    batch_inputs = ("concept_target", "attention_target", "attention_length")
    exposures = ("text",)

    def __init__(self, args: LavitSFTConfig, config: PreTrainedConfig) -> None:
        if not isinstance(args, LavitSFTConfig):
            raise ValueError(
                f"latent_method={args.latent_method or config.latent_method!r} is trained with a LavitSFTConfig "
                f"(trainers/lavit_config.py), got {type(args).__name__}; build it from the same options"
            )
        config.require_latent_tokens("learned")
        self.args, self.image_id = args, getattr(config, "image_token_id", None)
        self.learned_ids = list(config.latent_learned_token_ids)
        self.watched = {"grad_norm_concept_head": "concept_head."} if args.uses_concept else {}
        if args.uses_attention:
            read = args.attention_predictor == "attention"
            name, piece = ("attention", ".q_proj.") if read else ("attention_head", "attention_head.")
            self.watched[f"grad_norm_{name}"] = piece
        self.has_latent_loss = args.uses_concept or args.uses_attention
        self.auxiliary = {"loss_attention": args.attention_loss_weight} if args.uses_attention else {}
        self.sum_names = (*(("concept_cosine",) if args.uses_concept else ()),)
        if args.uses_attention:
            self.sum_names += ("attention_overlap", "attention_entropy")
        wanted = (
            ("concept_head", args.uses_concept and config.concept_head_size is None, "concept_head_size: its width"),
            (
                "attention_head",
                args.uses_attention and args.attention_predictor == "head" and not config.attention_head,
                "attention_head: true",
            ),
        )
        for name, lacks, remedy in wanted:
            if lacks:
                raise ValueError(
                    f"the model has no {name}, which the alignment with a teacher trains; make it of a stock "
                    f"checkpoint with {remedy}, or set the weight of that loss to 0"
                )
        if args.latent_visibility != "none":
            check_visibility(config.get_text_config()._attn_implementation or "sdpa")

    def bind(self, model: PreTrainedModel) -> None:
        """A head whose loss is not trained gets no gradient, and no decay."""
        used = {
            "concept_head": self.args.uses_concept,
            "attention_head": self.args.uses_attention and self.args.attention_predictor == "head",
        }
        for name, trained in used.items():
            head: nn.Module | None = getattr(model, name, None)
            if head is not None and not trained:
                head.requires_grad_(False)

    # --- where is what ---

    def _learned(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        return torch.isin(input_ids, torch.tensor(self.learned_ids, device=input_ids.device))

    def _anchor(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """`(batch,)` place of the last learned token."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return torch.where(self._learned(input_ids), places, -1).amax(dim=1)

    def _queries(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """`(batch, n)` places of the learned tokens that predict the teacher's attention."""
        if self.args.attention_latents == "last":
            return self._anchor(input_ids).unsqueeze(1)
        learned = self._learned(input_ids)
        return (~learned).long().argsort(dim=1, stable=True)[:, : int(learned.sum(dim=1).amax())]

    def ce_labels(self, input_ids: torch.LongTensor, labels: torch.LongTensor) -> torch.LongTensor:
        return labels

    def fed_positions(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        return torch.zeros_like(input_ids, dtype=torch.bool)  # learned tokens are fed their own embedding

    def count_terms(self, input_ids: torch.LongTensor, labels: torch.LongTensor) -> torch.LongTensor:
        rows = torch.full((), len(input_ids), device=input_ids.device)
        return torch.stack([(labels[:, 1:] != -100).sum(), rows, *(rows for _ in self.auxiliary)])

    # --- visibility ---

    def rules(self, input_ids: torch.LongTensor, training: bool) -> list[Visibility]:
        """Who sees the image in a step; evaluation and decoding are never narrowed."""
        args = self.args
        if not training or args.latent_visibility in ("none", "reference"):
            return []
        bias = -math.inf
        if args.latent_visibility == "gate":
            bias = math.log(gate_gamma(self.global_step, args.gate_steps, args.gate_floor))
            if bias == 0:
                return []
        return [image_visibility(input_ids == self.image_id, self._learned(input_ids), bias, args.blocks_prompt)]

    def prepare(self, model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
        """Of the published stage 1 only: its mask of zeros and ones, added to the logits as it is. It hides nothing,
        and everybody sees everything, padding and later tokens included."""
        if self.args.latent_visibility != "reference" or not model.training:
            return {}
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        rule = image_visibility(ids == self.image_id, self._learned(ids), -math.inf, self.args.blocks_prompt)
        names = ("image_grid_thw", "mm_token_type_ids")
        found = {name: inputs[name] for name in names if name in inputs}
        return {
            "attention_mask": allowed_pairs([rule], mask).to(model.dtype),
            "position_ids": model.base_model.plan_positions(ids, torch.ones_like(mask), **found),
        }

    @contextmanager
    def during_forward(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        ids, found = inputs["input_ids"], {}
        with ExitStack() as stack:
            stack.enter_context(visible_attention(model, self.rules(ids, model.training)))
            if self.args.uses_attention and self.args.attention_predictor == "attention":
                found["captured"] = stack.enter_context(capture_attention_rows(model, self._queries(ids)))
            yield found

    # --- losses ---

    def loss(self, model: PreTrainedModel, hidden_states: torch.Tensor, inputs: dict[str, Any]) -> LatentLoss:
        ids, args = inputs["input_ids"], self.args
        anchor = self._anchor(ids)
        states = hidden_states[torch.arange(len(ids), device=ids.device), anchor]
        loss, count, sums = hidden_states.new_zeros(()), None, {}
        if args.uses_concept:
            concept = concept_alignment_loss(model.concept_head(states), inputs["concept_target"])
            loss, count = concept.loss, concept.count
            sums["concept_cosine"] = (concept.cosine_sum, concept.count)
        auxiliary = ()
        if args.uses_attention:
            attention, latents = self._attention(model, hidden_states, inputs)
            auxiliary = ((attention.loss * latents, attention.count / latents),)
            sums["attention_overlap"] = (attention.overlap_sum, attention.count)
            sums["attention_entropy"] = (attention.entropy_sum, attention.count)
        return LatentLoss(loss, sums, count, auxiliary)

    def _attention(
        self, model: PreTrainedModel, hidden_states: torch.Tensor, inputs: dict[str, Any]
    ) -> tuple[AttentionAlignment, int]:
        """The loss over all pairs of a sample and a learned token, and how many tokens a sample has."""
        ids, target, lengths = inputs["input_ids"], inputs["attention_target"], inputs["attention_length"]
        queries = self._queries(ids)
        latents = queries.shape[1]
        states = hidden_states.gather(1, queries.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))
        if self.args.attention_keys == "reference":
            keys, mask = first_positions_keys(hidden_states, lengths)
        else:
            places, mask = image_places(ids == self.image_id, lengths, target.shape[1])
            keys = hidden_states.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))
        target, mask = (each.repeat_interleave(latents, dim=0) for each in (target, mask))
        if self.args.attention_predictor == "attention":
            weights = inputs["captured"].mean().gather(2, places.unsqueeze(1).expand(-1, latents, -1))
            scores = attention_log_scores(weights.flatten(0, 1), mask)
        else:
            scores = model.attention_head(states.flatten(0, 1), keys.repeat_interleave(latents, dim=0))
        return attention_alignment_loss(scores, target, mask, self.args.attention_options()), latents


def image_places(
    images: torch.BoolTensor, lengths: torch.LongTensor, width: int
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """Where the image tokens of each row are.

    Args:
        images: `(batch, length)`.
        lengths: `(batch,)` how many a row must have.
        width: of the result.

    Returns:
        Places `(batch, width)` in order, and which of them are real.

    Raises:
        ValueError: a row has another number of image tokens than its target has values.
    """
    counts = images.sum(dim=1)
    if not torch.equal(counts, lengths.to(counts)):
        row = int((counts != lengths.to(counts)).nonzero()[0])
        raise ValueError(
            f"row {row} has {int(counts[row])} image tokens and a teacher's attention on {int(lengths[row])}; resize "
            "it to the grid of the image tokens (teacher_grid: merged)"
        )
    places = (~images).long().argsort(dim=1, stable=True)[:, :width]
    return places, torch.arange(width, device=images.device) < counts.unsqueeze(1)


__all__ = ["LavitObjective", "image_places"]
