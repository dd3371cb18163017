"""`LatentSFTTrainer`: TRL's `SFTTrainer` with a latent objective computed inside the wrapped forward."""

from typing import Any

import torch
from transformers import PreTrainedModel
from trl import SFTTrainer

from .checkpoints import FaultTolerantTrainer
from .configs import LatentSFTConfig
from .curriculum import CurriculumTrainer
from .data.records import RECORD_FIELDS
from .distributed import DistributedMixin, check_token_average
from .dynamic_loader import DynamicBatchTrainer
from .fault_tolerance import check_model_precision
from .gradient_norms import GradientNorms
from .latent_forward import LatentFusedOutput, add_latent_loss
from .model_loading import check_processor, check_token_ids
from .objectives import build_objective
from .optimizer_groups import optimizer_groups, with_optimizer_groups
from .packed_forward import pack_decoder


class LatentSFTTrainer(CurriculumTrainer, FaultTolerantTrainer, DynamicBatchTrainer, DistributedMixin, SFTTrainer):
    """Supervised training of latent reasoning, for every method that has an objective (`trainers/objectives/`).

    Total loss = `ce_weight` * cross entropy + `latent_loss_weight` * latent loss, both means over the micro-batch, as
    in the published LASER code, or with `loss_average="token"` (`"sample"`: per sample first) over the whole optimizer
    step.
    Only supervised positions meet the LM head. PEFT, DDP, ZeRO and gradient accumulation work as in TRL. With
    `latent_packing="sequence"` the layers see several samples in a row, without padding (`packed_forward.py`). A
    configuration with a `curriculum()` trains in stages (`curriculum.py`).

    Logged: `loss_total`, `loss_ce`, `loss_latent` (LaViT: `loss_concept`) and the objective's auxiliary losses (means
    over the micro-batches since the last log, over all ranks), unweighted, the objective's ratios (sums of numerators
    over sums of denominators), each with prefix `eval_` in evaluation, and gradient norms of the parts that it names.
    When all their weights are 0 the latent losses are not computed, and nothing of them is logged.

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
        check_processor(processing_class)
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would replace the latent loss; register an objective instead")
        if data_collator is None:
            data_collator = args.build_collator(processing_class)
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
        base = self.trained_base()
        self.objective = build_objective(args, base.config)
        self.objective.bind(base)
        check_token_average(args.loss_average, self.objective)
        optimizer_groups(self.model, args)  # refuses a learning rate for a part that is not trained
        check_token_ids(base.config, processing_class)
        check_model_precision(self.model, self.args, self.is_deepspeed_enabled)
        self._gradient_norms = GradientNorms(self.model, self.objective.watched) if self.objective.watched else None
        if self._gradient_norms is not None:
            self.add_callback(self._gradient_norms)
        self._latent_totals: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}
        with_loss = args.latent_loss_weight > 0 or any(weight > 0 for weight in self.objective.auxiliary.values())
        add_latent_loss(base, self.objective, args.exposure(), with_loss=with_loss)
        if args.latent_packing == "sequence":
            pack_decoder(base)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.objective.global_step = self.state.global_step
        kept: list[LatentFusedOutput] = []
        hook = model.register_forward_hook(lambda module, args, output: kept.append(output))
        try:
            result = super().compute_loss(model, inputs, return_outputs)
        finally:
            hook.remove()
        ce, output = (result[0] if return_outputs else result), kept[0]
        auxiliary = {} if output.auxiliary_losses is None else self.objective.auxiliary
        losses = [output.latent_loss, *(output.auxiliary_losses.unbind() if auxiliary else ())]
        counts = [output.latent_count, *(output.auxiliary_counts.unbind() if auxiliary else ())]
        ce_terms = output.label_mask.sum()
        if self.args.loss_average == "sample":
            ce, ce_terms = self.sample_mean(ce, output.log_probs, inputs)
        ce_factor, *factors = self.loss_factors(ce_terms, *counts)
        ce = ce * ce_factor
        loss = self.args.ce_weight * ce
        latent: dict[str, torch.Tensor] = {}
        if output.latent_loss is not None:
            weights = {self.objective.main_loss: self.args.latent_loss_weight, **auxiliary}
            latent = {name: each * factor for name, each, factor in zip(weights, losses, factors, strict=True)}
            loss = self.args.ce_weight * ce + sum(weights[name] * each for name, each in latent.items())
        if self.model.training:
            self.watch_losses(ce, sum(latent.values(), torch.zeros_like(ce)))
        self._add_totals({"loss_total": loss, "loss_ce": ce, **latent}, output)
        return (loss, result[1]) if return_outputs else loss

    def _add_totals(self, losses: dict[str, torch.Tensor], output: LatentFusedOutput) -> None:
        """Add numerators and denominators of one micro-batch; nothing is synchronised here."""
        one = torch.ones((), device=losses["loss_total"].device)
        pairs = {name: torch.stack([loss.detach().float(), one]) for name, loss in losses.items()}
        mode = "train" if self.model.training else "eval"
        if output.latent_sums is not None:
            names = self.objective.sum_names + (self.objective.eval_sum_names if mode == "eval" else ())
            pairs.update(zip(names, output.latent_sums.unbind(0), strict=True))
        totals = self._latent_totals[mode]
        for name, pair in pairs.items():
            value = pair * self.batch_weight
            totals[name] = totals[name] + value if name in totals else value

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: LatentSFTConfig, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        return with_optimizer_groups(*SFTTrainer.get_optimizer_cls_and_kwargs(args, model), args, model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        totals = self._latent_totals[mode]
        if totals:
            summed = self.accelerator.reduce(torch.stack(list(totals.values())), reduction="sum").tolist()
            for name, (numerator, denominator) in zip(totals, summed, strict=True):
                self._metrics[mode][name] = [numerator / denominator if denominator else 0.0]
            self._latent_totals[mode] = {}
        if mode == "train" and self._gradient_norms is not None:
            self._metrics[mode].update({name: [norm] for name, norm in self._gradient_norms.take().items()})
        super().log(logs, start_time)


def _check_dataset(name: str, dataset: Any, args: LatentSFTConfig, collator: Any) -> None:
    """Refuse an empty data set, one without the columns that the collator reads, and one whose first row is bad."""
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            _check_dataset(f"{name}[{key!r}]", part, args, collator)
        return
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        missing = [column for column in args.required_columns(columns) if column not in columns]
        unknown = sorted(set(columns) - set(RECORD_FIELDS))
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
