"""Several processes: what makes losses, metrics and the end of an epoch those of one process.

| question | answer here |
|---|---|
| what a loss is divided by (`loss_average`) | the count of its micro-batch, or one of the whole optimizer step |
| a stream that ends on one process first | all processes stop after the same number of batches |
| an evaluation set that does not divide evenly | repeated rows are taken out of losses and metrics |
| only text on one process, images on another | a row with a blank image: all processes run the vision tower |

The last point matters where parameters are gathered when a module runs (ZeRO-3, FSDP): a process that skips the tower
leaves the others waiting for ever.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import has_length
from transformers.utils import logging

from .adapters import save_latent_settings
from .tensor_names import accept_saved_names

logger = logging.get_logger(__name__)

LOSS_AVERAGES = ("batch", "token", "sample")


class LatentSavingMixin:
    """Mixin of a trainer of latent models: what is saved, and resumed from."""

    def trained_base(self) -> PreTrainedModel:
        """The head class that is trained, also inside an adapter; it reads and writes the names of checkpoints."""
        model = self.accelerator.unwrap_model(self.model)
        is_peft = hasattr(model, "get_base_model")
        base = model.get_base_model() if is_peft else model
        drop_unused_renamings(base)
        if not is_peft:  # PEFT resumes from its adapter files
            accept_saved_names(base)
        return base

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Without the copies of tied tensors that are made when DeepSpeed and FSDP gather a model, and with what an
        adapter's folder needs."""
        model = self.accelerator.unwrap_model(self.model)
        tied = getattr(model, "all_tied_weights_keys", None)
        if state_dict and tied:
            state_dict = {name: value for name, value in state_dict.items() if tied.get(name) not in state_dict}
        super()._save(output_dir, state_dict)
        save_latent_settings(model, output_dir or self.args.output_dir)


class DistributedMixin(LatentSavingMixin):
    """Mixin of a trainer with an `objective` ([`LatentObjective`]) and the option `loss_average`."""

    _step_terms: torch.Tensor | None = None
    batch_weight: float = 1.0  # of a batch in the logged means: 0 for one that only repeats rows

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """The micro-batches of an optimizer step, as many on every process; terms counted except for `"batch"`."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.accelerator.num_processes > 1 and not has_length(self.train_dataset):
            batches = self._as_many_as_all(batches)
        self._step_terms = None
        if self.args.loss_average != "batch":
            terms = torch.zeros(2 + len(self.objective.auxiliary), dtype=torch.long, device=device)
            for batch in batches:
                counts = self.objective.count_terms(batch["input_ids"], batch["labels"])
                if self.args.loss_average == "sample":
                    counts[0] = self._labelled(batch).any(dim=1).sum()
                terms += counts
            self._step_terms = self.accelerator.reduce(terms, reduction="sum")
        return batches, None

    def _as_many_as_all(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        count = torch.tensor([len(batches)], device=self.accelerator.device)
        fewest = int(self.accelerator.gather(count).min())
        if fewest < len(batches):
            logger.warning(
                f"the stream has ended on another process: {len(batches) - fewest} batches of process "
                f"{self.accelerator.process_index} are left out; shards of equal length, as many as processes times "
                "loader workers, leave out none"
            )
        return batches[:fewest]

    def _labelled(self, inputs: dict[str, Any]) -> torch.BoolTensor:
        """Positions `(batch, length - 1)` that predict a label of the cross entropy."""
        return self.objective.ce_labels(inputs["input_ids"], inputs["labels"])[:, 1:] != -100

    def sample_mean(
        self, ce: torch.Tensor, log_probs: torch.Tensor, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy averaged over the labels of each sample, then over the samples; and their number.

        Args:
            ce: 0-dim mean over all labels, returned when there are none.
            log_probs: `(1, N)` of the labels, sample by sample.
            inputs: the batch.
        """
        labelled = self._labelled(inputs)
        labels, rows = labelled.sum(dim=1), labelled.nonzero()[:, 0]
        samples = (labels > 0).sum()
        if not rows.numel():
            return ce, samples
        return -(log_probs[0] / labels[rows]).sum() / samples, samples

    def loss_factors(self, *counts: torch.Tensor | None) -> list[Any]:
        """What the means of a micro-batch are multiplied by, loss by loss.

        Except for `"batch"` a step's loss becomes the sum of all terms over their global count. The trainer divides by
        the number of micro-steps and averages gradients over processes; both are undone here. In evaluation every
        batch weighs the same.

        Args:
            counts: terms of each loss in the micro-batch: labels (or samples) of the cross entropy, terms of the
                latent loss and of the auxiliary ones, 0-dim; None: there is no such loss.
        """
        if self._step_terms is None or not self.model.training:
            return [1.0] * len(counts)
        parts = self.accelerator.num_processes * self.current_gradient_accumulation_steps
        totals = self._step_terms.clamp(min=1).unbind()
        return [None if count is None else count * parts / total for count, total in zip(counts, totals, strict=False)]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.accelerator.num_processes > 1 and "pixel_values" not in inputs:
            inputs = with_blank_image(inputs, self.processing_class, self.model.config)
        return inputs

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """As the trainer's, without the rows that accelerate repeats to fill the last batches."""
        rows = real_rows(self.accelerator, inputs["input_ids"].shape[0])
        self.batch_weight = float(rows > 0)
        try:
            inputs = first_rows(inputs, rows, self.processing_class)
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self.batch_weight = 1.0


def check_token_average(loss_average: str, objective: Any) -> None:
    """Refuse `"token"` and `"sample"` for an objective that cannot count its terms, and `"sample"` for one that does
    not average over samples.

    Raises:
        ValueError: names the objective and what it lacks, or the option.
    """
    if loss_average == "batch":
        return
    if not hasattr(objective, "count_terms"):
        raise ValueError(
            f"loss_average={loss_average!r} needs {type(objective).__name__}.count_terms(input_ids, labels) "
            "(trainers/latent_forward.py); add it, or set loss_average: batch"
        )
    if loss_average == "token" or not objective.has_latent_loss:
        return
    average = getattr(getattr(objective, "options", None), "row_average", None)
    if average != "example":
        raise ValueError(
            f"loss_average='sample' with a latent loss of row_average={average!r}: samples of many latents would "
            "weigh more; set dwal_row_average (LASER) or roi_row_average (LVR) to example, or loss_average: token"
        )
    if objective.auxiliary:
        raise ValueError(
            f"loss_average='sample' with {sorted(objective.auxiliary)}, which has no average over the terms of a "
            "sample; set mode_switch_loss: false, or loss_average: token"
        )


def drop_unused_renamings(model: PreTrainedModel) -> None:
    """Forget the renamings of tensors that matched nothing when the checkpoint was read, as a plain load does.

    A load under ZeRO-3 keeps them all; a model would be saved with names (`model.model.*`) that no other tool knows.
    """
    renamings = getattr(model, "_weight_conversions", None)
    if renamings:
        model._weight_conversions = [renaming for renaming in renamings if renaming.was_used()]


def real_rows(accelerator: Any, batch_size: int) -> int:
    """How many rows of this process's evaluation batch are no repeats; they come first.

    accelerate fills the last batches with rows from the start: of `processes * batch_size` rows, process after
    process, the first `remainder` are real.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return batch_size
    return min(max(state.remainder - accelerator.process_index * batch_size, 0), batch_size)


def first_rows(inputs: dict[str, Any], rows: int, processor: Any) -> dict[str, Any]:
    """The first rows of a batch with their images. With none left, the whole batch without labels: it still runs."""
    ids = inputs["input_ids"]
    if rows == len(ids):
        return inputs
    if rows == 0:
        return {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    kept = {name: value[:rows] for name, value in inputs.items() if len(value) == len(ids)}
    if "pixel_values" not in inputs:
        return kept
    tokens, pixels = (kept["input_ids"] == processor.image_token_id).sum(), inputs["pixel_values"]
    if "image_grid_thw" not in inputs:  # images of one size
        kept["pixel_values"] = pixels[: int(tokens) // processor.image_seq_length]
    else:
        grids = inputs["image_grid_thw"]
        patches = grids.prod(dim=-1)
        images = int((patches.cumsum(0) <= tokens * processor.image_processor.merge_size**2).sum())
        kept.update(image_grid_thw=grids[:images], pixel_values=pixels[: int(patches[:images].sum())])
    return kept


def with_blank_image(inputs: dict[str, Any], processor: Any, config: Any) -> dict[str, Any]:
    """A batch of text with one more row, which has a blank image of one token, no labels and no span."""
    images, start = getattr(processor, "image_processor", None), getattr(config, "vision_start_token_id", None)
    if start is None or not hasattr(images, "merge_size"):
        return inputs  # a family without images, or one whose images are no patches of a tower
    ids = inputs["input_ids"]
    row = {name: torch.zeros_like(value[:1]) for name, value in inputs.items() if value.shape[:2] == ids.shape}
    written = torch.tensor([start, processor.image_token_id, config.vision_end_token_id], device=ids.device)
    row["input_ids"].fill_(processor.tokenizer.pad_token_id)[0, :3] = written
    row["labels"].fill_(-100)
    row["attention_mask"][0, :3] = 1
    row["mm_token_type_ids"][0, 1] = 1
    size = images.merge_size
    width = 3 * images.temporal_patch_size * images.patch_size**2
    return {
        **{name: torch.cat([value, row[name]]) if name in row else value for name, value in inputs.items()},
        "pixel_values": torch.zeros(size**2, width, device=ids.device),
        "image_grid_thw": torch.tensor([[1, size, size]], device=ids.device),
    }
