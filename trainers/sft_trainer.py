"""`LatentSFTTrainer`: TRL's `SFTTrainer` with a latent objective computed inside the wrapped forward."""

from typing import Any

import torch
from transformers import PreTrainedModel
from trl import SFTTrainer

from .checkpoints import accept_saved_names
from .collators import LatentSFTCollator
from .configs import LatentSFTConfig
from .data.records import RECORD_FIELDS
from .latent_forward import LatentFusedOutput, add_latent_loss
from .objectives import build_objective


class LatentSFTTrainer(SFTTrainer):
    """Supervised training of latent reasoning, for every method that has an objective (`trainers/objectives.py`).

    Total loss = cross entropy + `latent_loss_weight` * latent loss, both means over the micro-batch, as in the
    published LASER code. Only supervised positions meet the LM head. PEFT, DDP, ZeRO and gradient accumulation work as
    in TRL.

    Logged: `loss_total`, `loss_ce`, `loss_latent` (means over the micro-batches since the last log, over all ranks)
    and the objective's ratios (sums of numerators over sums of denominators), each with prefix `eval_` in evaluation.

    Args:
        model: a latent model, a folder or a Hub id of one.
        args: [`LatentSFTConfig`].
        train_dataset, eval_dataset: records (`trainers/data/records.py`), also streaming.
        processing_class: the model's `LatentProcessor`.
        kwargs: further arguments of `trl.SFTTrainer`, e.g. `peft_config`.

    Raises:
        ValueError: a stock model, a missing column, or an option that cannot work; names it and the remedy.
    """

    _tag_names = ["trl", "sft", "latent-reasoning"]

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: LatentSFTConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, LatentSFTConfig):
            raise ValueError(
                f"args must be a LatentSFTConfig, got {type(args).__name__}; build it from the same options"
            )
        if not hasattr(processing_class, "latent_token_id"):
            raise ValueError(
                f"processing_class must be the LatentProcessor saved beside the model, got "
                f"{type(processing_class).__name__}; load it with LatentProcessor.from_pretrained(folder)"
            )
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would replace the latent loss; register an objective instead")
        if data_collator is None:
            data_collator = LatentSFTCollator(
                processing_class, args.latent_form, args.num_slots, args.pad_to_multiple_of
            )
            for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
                _check_dataset(name, dataset, args, data_collator)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            **kwargs,
        )
        base = self.accelerator.unwrap_model(self.model)
        if hasattr(base, "get_base_model"):
            base = base.get_base_model()
        else:  # PEFT resumes from its adapter files
            accept_saved_names(base)
        self.objective = build_objective(args, base.config)
        _check_token_ids(base.config, processing_class)
        self._latent_totals: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}
        add_latent_loss(base, self.objective, args.exposure())

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        kept: list[LatentFusedOutput] = []
        hook = model.register_forward_hook(lambda module, args, output: kept.append(output))
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            hook.remove()
        ce, output = (result[0] if return_outputs else result), kept[0]
        # With a number of items the terms are parts of a sum over the accumulation steps, else means of their own.
        steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        loss = ce
        if self.args.latent_loss_weight > 0:
            loss = ce + self.args.latent_loss_weight * output.latent_loss / steps
        self._add_totals(loss.detach() * steps, ce.detach() * steps, output.latent_loss.detach(), output.latent_sums)
        return (loss, result[1]) if return_outputs else loss

    def _add_totals(self, total: torch.Tensor, ce: torch.Tensor, latent: torch.Tensor, sums: torch.Tensor) -> None:
        """Add numerators and denominators of one micro-batch; nothing is synchronised here."""
        one = torch.ones_like(total)
        pairs = {"loss_total": (total, one), "loss_ce": (ce, one), "loss_latent": (latent, one)}
        pairs.update(zip(self.objective.sum_names, sums.unbind(0), strict=True))
        totals = self._latent_totals["train" if self.model.training else "eval"]
        for name, pair in pairs.items():
            value = torch.stack([part.float() for part in pair]) if isinstance(pair, tuple) else pair
            totals[name] = totals[name] + value if name in totals else value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        totals = self._latent_totals[mode]
        if totals:
            summed = self.accelerator.reduce(torch.stack(list(totals.values())), reduction="sum").tolist()
            for name, (numerator, denominator) in zip(totals, summed, strict=True):
                self._metrics[mode][name] = [numerator / denominator if denominator else 0.0]
            self._latent_totals[mode] = {}
        super().log(logs, start_time)


def _check_token_ids(config: Any, processor: Any) -> None:
    """Refuse a processor whose latent tokens are not those of the model: no span would be found, without a word."""
    for name in ("latent_start_token_id", "latent_token_id", "latent_end_token_id"):
        expected, found = getattr(config, name), getattr(processor, name)
        if expected != found:
            raise ValueError(
                f"{name} is {expected} in the model and {found} in processing_class; load both from the same folder"
            )


def _check_dataset(name: str, dataset: Any, args: LatentSFTConfig, collator: LatentSFTCollator) -> None:
    """Refuse an empty data set, one without the columns that the collator reads, and one whose first row is bad."""
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            _check_dataset(f"{name}[{key!r}]", part, args, collator)
        return
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        needed = ["images"] + ([] if "messages" in columns else ["question", "answer"])
        needed += ["chain"] if args.latent_form == "chain" else []
        missing, unknown = [c for c in needed if c not in columns], sorted(set(columns) - set(RECORD_FIELDS))
        if missing or unknown:
            raise ValueError(
                f"{name} has the columns {sorted(columns)}: missing {missing} (latent_form={args.latent_form!r}), "
                f"unknown {unknown}; make it with a reader of trainers.data (read_source, maze_dataset), or add, "
                "rename or remove columns"
            )
    if hasattr(dataset, "__iter__"):
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"{name} is empty; look at what its reader reported")
        collator([first])


__all__ = ["LatentSFTTrainer"]
