"""LASER: cross entropy outside the chain, DWAL on it (arXiv 2601.06803)."""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..configs import LatentSFTConfig
from ..latent_forward import LatentLoss, LatentObjective, check_plain_logits, gathered_lm_head
from ..losses.dwal import DwalOptions, DwalRows, count_terms, find_latent_rows, fused_dwal_loss, mask_region_labels
from . import register_objective


@register_objective("laser")
class LaserObjective(LatentObjective):
    """LASER: cross entropy outside the chain, DWAL on it (arXiv 2601.06803).

    With `latent_form="slots"` there is no chain: the slots are fed by their own embedding, carry no label, and only
    the cross entropy is trained.
    """

    sum_names = ("confused_ratio", "last_concept_ratio")

    def __init__(self, args: LatentSFTConfig, config: PreTrainedConfig) -> None:
        if args.latent_form == "regions":
            raise ValueError("latent_form='regions' is LVR's; LASER trains 'chain', 'slots' or 'none'")
        if args.latent_loss_weight > 0:
            check_plain_logits(config)
        self.options: DwalOptions = args.dwal_options()
        self._found: tuple[torch.Tensor, DwalRows] | None = None
        self.start_id, self.end_id = config.latent_start_token_id, config.latent_end_token_id
        self.slot_id = config.latent_token_id

    def _rows(self, input_ids: torch.LongTensor) -> DwalRows:
        """Rows of the batch: found once a step, in `ce_labels`, and dropped in `loss`."""
        if self._found is None or self._found[0] is not input_ids:
            rows = find_latent_rows(input_ids, self.start_id, self.end_id, self.options.window_size, self.slot_id)
            self._found = input_ids, rows
        return self._found[1]

    def ce_labels(self, input_ids: torch.LongTensor, labels: torch.LongTensor) -> torch.LongTensor:
        self._found = None
        return mask_region_labels(labels, self._rows(input_ids))

    def count_terms(self, input_ids: torch.LongTensor, labels: torch.LongTensor) -> torch.LongTensor:
        supervised = self.ce_labels(input_ids, labels)[:, 1:] != -100
        return torch.stack([supervised.sum(), count_terms(self._rows(input_ids), self.options)])

    def fed_positions(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        return self._rows(input_ids).region_mask & (input_ids != self.end_id)

    def loss(self, model: PreTrainedModel, hidden_states: torch.Tensor, inputs: dict[str, Any]) -> LatentLoss:
        rows, self._found = self._rows(inputs["input_ids"]), None
        with gathered_lm_head(model) as (weight, bias):
            out = fused_dwal_loss(rows.select(hidden_states), weight, bias, rows, self.options)
        pairs = ((out.confused_count, out.num_wide_rows), (out.last_concept_count, out.num_wide_rows))
        return LatentLoss(out.loss, dict(zip(self.sum_names, pairs, strict=True)), out.dwal_count)
