"""LVR: cross entropy on the text, ROI regression of the states that predict latents, and the losses of its stop rules
("Latent Visual Reasoning", arXiv 2509.24251; card sections 2.6, 4.1 and 4.3).

The images are encoded once, before the backbone runs: the same embeddings stand at the image placeholders, are fed at
the slots (oracle exposure) and are the targets.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..free_running import free_running_latents
from ..latent_forward import LatentLoss, LatentObjective, check_plain_logits, gathered_lm_head
from ..losses.mode_switch import (
    ModeSwitchRows,
    end_token_logits,
    find_mode_switch_rows,
    latent_end_loss,
    mode_switch_loss,
)
from ..losses.roi_regression import (
    RoiRows,
    apply_latent_head,
    find_roi_rows,
    mask_latent_labels,
    roi_regression_loss,
)
from ..lvr_config import LVRSFTConfig
from . import register_objective

_Pair = tuple[torch.Tensor, torch.Tensor]


@register_objective("lvr")
class LVRObjective(LatentObjective):
    """ROI regression, and with `mode_switch_loss` one of two losses on the end of a region: for a model with a learned
    end vector the distance to it, else cross entropy on the end token's logit.

    Logged besides the losses: `latent_cosine`, the cosine of the vectors that would be fed and their targets, under
    the exposure of training; in evaluation `latent_cosine_free`, the same when the model is fed its own latents. The
    difference is the gap between training on the oracle and free-running decoding. For the mode switch
    `mode_switch_recall` (ends that are found) and `mode_switch_false` (share of the other places taken for ends).

    Raises:
        ValueError: options that cannot train what they name; names the option and the remedy.
    """

    batch_inputs = ("region_index", "sample_ids")
    exposures = ("oracle", "own", "free")

    def __init__(self, args: LVRSFTConfig, config: PreTrainedConfig) -> None:
        if not isinstance(args, LVRSFTConfig):
            raise ValueError(
                f"LVR is trained with an LVRSFTConfig (trainers/lvr_config.py), got {type(args).__name__}; build it "
                "from the same options"
            )
        self.args, self.options = args, args.roi_options()
        self.slot_id, self.start_id = config.latent_token_id, config.latent_start_token_id
        self.end_id, self.stop_id = config.latent_end_token_id, config.latent_stop_token_id
        self.has_stop_vector = bool(config.latent_stop_vector)
        self.sum_names: tuple[str, ...] = ("latent_cosine",)
        if args.mode_switch_loss:
            self._check_mode_switch(config)
            self.auxiliary = {"loss_mode_switch": args.mode_switch_weight}
            if not self.has_stop_vector:
                self.sum_names += ("mode_switch_recall", "mode_switch_false")
        if args.eval_free_running:
            self.eval_sum_names = ("latent_cosine_free",)
        self._targets: torch.Tensor | None = None

    def _check_mode_switch(self, config: PreTrainedConfig) -> None:
        in_text, targets = self.args.latent_end_in_text, self.args.mode_switch_targets
        if self.has_stop_vector and not in_text:
            raise ValueError(
                "latent_end_in_text=False writes no latent-end token, so the model's learned end vector would never "
                "be trained; set latent_end_in_text: true"
            )
        if not self.has_stop_vector:
            check_plain_logits(config)
            if in_text and targets == "paper":
                raise ValueError(
                    "mode_switch_loss=True with latent_end_in_text=True: the latent-end token stands between the last "
                    "latent and the end token, so the model would be taught never to stop; set latent_end_in_text: "
                    "false (layout of the paper), train a model with a learned end vector (latent_stop_vector: true), "
                    "or take the published targets (mode_switch_targets: reference)"
                )

    def _fed_ids(self) -> list[int]:
        return [self.slot_id, self.stop_id] if self.has_stop_vector else [self.slot_id]

    def ce_labels(self, input_ids: torch.LongTensor, labels: torch.LongTensor) -> torch.LongTensor:
        return mask_latent_labels(labels, input_ids, self._fed_ids())

    def fed_positions(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        return input_ids == self.slot_id

    def count_terms(self, input_ids: torch.LongTensor, labels: torch.LongTensor) -> torch.LongTensor:
        slots = input_ids == self.slot_id
        counts = [
            (self.ce_labels(input_ids, labels)[:, 1:] != -100).sum(),
            slots.any(dim=1).sum() if self.options.row_average == "example" else slots.sum(),
        ]
        if self.auxiliary:
            ends = (input_ids == self.stop_id).sum() if self.has_stop_vector else len(self._switch_rows(input_ids))
            counts.append(ends)
        return torch.stack([torch.as_tensor(count, device=input_ids.device) for count in counts])

    def prepare(self, model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
        """The images encoded, and the vectors of the regions at the slots."""
        ids = inputs["input_ids"]
        slots, size = self.fed_positions(ids), model.config.get_text_config().hidden_size
        changed: dict[str, Any] = {"latent_mask": slots}
        targets = torch.zeros(0, size, device=ids.device)
        if inputs.get("pixel_values") is not None and self.args.latent_form == "regions":
            if "region_index" not in inputs:
                raise ValueError("the batch has no region_index; collate it with latent_form='regions'")
            encoded = model.base_model.get_image_features(
                inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
            )
            targets = torch.cat(encoded.pooler_output).index_select(0, inputs["region_index"][slots])
            changed.update(pixel_values=None, mm_encoder_outputs={"image": encoded})
        latents = targets.new_zeros(*ids.shape, size).index_put(slots.nonzero(as_tuple=True), targets)
        if self.has_stop_vector:
            stops = ids == self.stop_id
            latents = torch.where(stops.unsqueeze(-1), model.latent_stop_vector(latents), latents)
            changed["latent_mask"] = slots | stops
        changed["latent_embeds"] = latents
        self._targets = targets.detach() if self.args.roi_detach_targets else targets
        return changed

    def loss(self, model: PreTrainedModel, hidden_states: torch.Tensor, inputs: dict[str, Any]) -> LatentLoss:
        ids, targets = inputs["input_ids"], self._targets
        self._targets = None
        rows = find_roi_rows(self.fed_positions(ids), inputs.get("sample_ids"))
        head = model.latent_head
        states = rows.select(hidden_states)
        states = states if head is None else head(states)
        out = roi_regression_loss(states, targets, rows, self.options)
        sums: dict[str, _Pair] = {"latent_cosine": (out.cosine_sum, out.num_rows)}
        auxiliary: tuple[_Pair, ...] = ()
        if self.auxiliary:
            auxiliary, further = self._mode_switch(model, hidden_states, rows, inputs)
            sums.update(further)
        if not model.training and self.eval_sum_names:
            sums["latent_cosine_free"] = self._free_cosine(model, targets, inputs)
        return LatentLoss(out.loss, sums, out.loss_count, auxiliary)

    def _switch_rows(self, ids: torch.LongTensor) -> ModeSwitchRows:
        reference = self.args.mode_switch_targets == "reference"
        return find_mode_switch_rows(ids, self.start_id, self.slot_id, self.end_id, reference=reference)

    def _mode_switch(
        self, model: PreTrainedModel, hidden_states: torch.Tensor, rows: RoiRows, inputs: dict[str, Any]
    ) -> tuple[tuple[_Pair, ...], dict[str, _Pair]]:
        ids = inputs["input_ids"]
        if self.has_stop_vector:
            states = find_roi_rows(ids == self.stop_id).select(hidden_states)
            states = states if model.latent_head is None else model.latent_head(states)
            end = latent_end_loss(states, model.latent_stop_vector(states), self.args.mode_switch_loss_type)
            return ((end.loss, end.loss_count),), {}
        switch = self._switch_rows(ids)
        if self.args.mode_switch_targets == "reference":
            states = apply_latent_head(hidden_states, rows, model.latent_head)
        else:  # what the LM head reads in decoding
            states = model.slot_hidden_states(hidden_states, ids, inputs["latent_embeds"], inputs["latent_mask"])
        states = switch.select(states)
        with gathered_lm_head(model) as (weight, bias):
            logits = end_token_logits(states, weight, self.end_id, bias)
        out = mode_switch_loss(logits, switch.target)
        found = {
            "mode_switch_recall": (out.hit_count, out.num_ends),
            "mode_switch_false": (out.false_count, out.num_rows - out.num_ends),
        }
        return ((out.loss, out.num_rows),), found

    def _free_cosine(self, model: PreTrainedModel, targets: torch.Tensor, inputs: dict[str, Any]) -> _Pair:
        """Sum over the slots of the cosine of free-running latents and their targets, and the number of slots."""
        slots = self.fed_positions(inputs["input_ids"])
        with torch.no_grad():
            latents = free_running_latents(model, slots, inputs)[slots]
            cosine = torch.nn.functional.cosine_similarity(latents.float(), targets.float(), dim=-1, eps=1e-8)
        return cosine.sum(), torch.full((), len(targets), device=cosine.device)
