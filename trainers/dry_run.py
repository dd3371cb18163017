"""What a recipe will do, before it costs anything: parameters, groups, memory, steps and the first batch, as text.

The trainer is the one that would train, built by the same calls from the same configuration, with its model on the
meta device: no weight is downloaded, allocated or written. So a recipe that training would refuse is refused here.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from torch import nn
from transformers.initialization import no_init_weights
from transformers.trainer_utils import has_length
from transformers.utils import is_bitsandbytes_available

from .adapters import KEPT_UNQUANTISED
from .batch_preview import FirstBatch, batch_lines, first_batch, prompt_lines, stage_preview
from .configs import LatentSFTConfig
from .curriculum import stage_lines
from .data.dynamic_batching import BalancedBatches, ReferenceBatches, reference_batches
from .dynamic_loader import data_seed
from .grpo_config import LatentGRPOConfig
from .grpo_trainer import LatentGRPOTrainer
from .packed_loader import packing_lines
from .sft_trainer import LatentSFTTrainer

# Parts of a model by the first of these that occurs in the name of a parameter.
_PARTS = {
    "adapter": ("lora_", "trainable_tokens", "modules_to_save"),
    "vision tower": ("visual.", "vqmodel."),
    "latent head": ("latent_head.", "concept_head.", "attention_head."),
    "embedding": ("embed_tokens.", "wte.", "wpe."),
    "LM head": ("lm_head.",),
    "language model": ("",),
}


@contextmanager
def dry_run_settings(args: LatentSFTConfig | LatentGRPOConfig) -> Iterator[None]:
    """Set a configuration so that the trainer built from it writes and uploads nothing.

    Raises:
        ValueError: several processes, or DeepSpeed: a dry run is one process that describes them.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 or "ACCELERATE_USE_DEEPSPEED" in os.environ
    if launched or args.deepspeed or args.fsdp:
        raise ValueError(
            "dry_run=True under a launcher of several processes, DeepSpeed or FSDP: start it with `python`, without "
            "deepspeed and fsdp, and give the number of processes as dry_run_processes"
        )
    kept = {name: getattr(args, name) for name in ("output_dir", "push_to_hub")}
    with TemporaryDirectory() as folder:
        args.output_dir, args.push_to_hub = folder, False
        try:
            with no_init_weights():  # adapters are made on the CPU before they follow their base
                yield
        finally:
            for name, value in kept.items():
                setattr(args, name, value)


@contextmanager
def no_reference(args: LatentGRPOConfig) -> Iterator[None]:
    """Build a GRPO trainer without its reference: a copy of a model on the meta device cannot be placed."""
    beta, args.beta = args.beta, 0.0
    try:
        yield
    finally:
        args.beta = beta


def dry_run_report(
    trainer: LatentSFTTrainer | LatentGRPOTrainer, num_processes: int | None = None, bits: float | None = None
) -> str:
    """Describe the run of a trainer whose model is on the meta device.

    Args:
        trainer: built as for training.
        num_processes: processes of the real run, for the numbers per step; default: those of this one.
        bits: bits of a quantised weight, see [`trainers.adapters.quantised_bits`]; `None` for a base that is not.

    Raises:
        ValueError: whatever training would refuse.
    """
    processes = trainer.args.world_size if num_processes is None else num_processes
    if processes < 1:
        raise ValueError(f"dry_run_processes={num_processes} must be at least 1; leave it out for one process")
    lines = ["dry run: no weights are read, nothing is trained or written", ""]
    lines += _model_lines(trainer) + _group_lines(trainer) + _memory_lines(trainer, processes, bits)
    if isinstance(trainer, LatentGRPOTrainer):
        return "\n".join(lines + _rollout_lines(trainer, processes) + [""] + prompt_lines(trainer))
    batch = first_batch(trainer)
    steps, stages = _step_lines(trainer, processes, batch)
    later = stage_preview(trainer, batch, stages[1:])
    return "\n".join([*lines, *steps, "", *batch_lines(trainer, batch), *later])


# Model ------------------------------------------------------------------------------------------------------------


def _model_lines(trainer: LatentSFTTrainer | LatentGRPOTrainer) -> list[str]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    counts: dict[str, list[int]] = {part: [0, 0] for part in reversed(_PARTS)}
    for name, parameter in model.named_parameters():
        part = next(part for part, marks in _PARTS.items() if any(mark in name for mark in marks))
        counts[part][0] += parameter.numel()
        counts[part][1] += parameter.numel() if parameter.requires_grad else 0
    total, trainable = (sum(column) for column in zip(*counts.values(), strict=True))
    family, method = config.model_type.removeprefix("latent_"), config.latent_method
    lines = [
        f"model       {type(base).__name__} (family {family}, method {method}), {_dtype(base)}, "
        f"attention {config._attn_implementation}, from {base.name_or_path}",
        f"parameters  {total:,} in all, {trainable:,} trainable ({trainable / total:.2%})",
    ]
    return lines + [
        f"  {part:<16} {number:>15,}  {'trainable' if trained == number else f'{trained:,} trainable'}"
        if trained
        else f"  {part:<16} {number:>15,}  frozen"
        for part, (number, trained) in counts.items()
        if number
    ]


def _dtype(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _group_lines(trainer: LatentSFTTrainer | LatentGRPOTrainer) -> list[str]:
    args = trainer.args
    # also refuses an optimiser that is not installed
    optimiser, kwargs = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    lines = [f"optimiser   {getattr(args.optim, 'value', args.optim)}, by group:"]
    groups = kwargs.get("params")
    if not isinstance(groups, list) or "name" not in groups[0]:
        return [f"{lines[0]} as {getattr(optimiser, '__name__', optimiser)} arranges them itself"]
    for group in groups:
        number = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"  {group['name']:<18} {len(group['params']):>5} tensors {number:>15,} parameters  "
            f"lr {group['lr']:g}  weight decay {group['weight_decay']:g}"
        )
    return lines


def _memory_lines(trainer: LatentSFTTrainer | LatentGRPOTrainer, processes: int, bits: float | None) -> list[str]:
    """Weights, gradients and the two moments of Adam; what grows with the batch is not known without running it."""
    quantised = _quantised_weights(trainer.model) if bits else set()
    weights = gradients = masters = 0.0
    for parameter in trainer.model.parameters():
        size = bits / 8 if bits and id(parameter) in quantised else parameter.element_size()
        weights += parameter.numel() * size
        if parameter.requires_grad:
            gradients += parameter.numel() * parameter.element_size()
            masters += 12 * parameter.numel()
    lines = [
        "memory      a process, without activations and the buffers of kernels, for AdamW:",
        f"  weights {_size(weights)} + gradients {_size(gradients)} + moments {_size(2 * gradients)} = "
        f"{_size(weights + 3 * gradients)}, when each process holds all",
    ]
    if bits and not is_bitsandbytes_available():
        lines.append("  bitsandbytes is not installed here; training with a quantised base needs it")
    if not bits:
        sharded = (weights + gradients + masters) / processes
        lines.append(f"  {_size(sharded)} with ZeRO-3 over {processes} processes (moments and copies in float32)")
    return lines


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def _quantised_weights(model: nn.Module) -> set[int]:
    """Ids of the weights that a quantised base holds in few bits: matrices of the language model."""
    kept = re.compile(rf"(^|\.)({'|'.join(map(re.escape, KEPT_UNQUANTISED))})(\.|$)|lora_")
    linear = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {id(module.weight) for name, module in linear if not kept.search(name)}


# Steps ------------------------------------------------------------------------------------------------------------


def _step_lines(trainer: LatentSFTTrainer, processes: int, batch: FirstBatch) -> tuple[list[str], list[int]]:
    """Data, batches and schedule, and the stages of a curriculum."""
    args = trainer.args
    if trainer.train_batches is None:
        lines, samples, epoch = _plain_lines(trainer, processes, batch)
    elif trainer.packing_plan is not None:
        lines, samples, epoch = packing_lines(trainer.packing_plan, processes)
    else:
        lines, samples, epoch = _dynamic_lines(trainer, processes)
    plan = [] if trainer.curriculum is None else _stages(trainer, epoch)
    staged = [f"stages      {'; '.join(stage_lines(plan))}"] if plan else []
    return [_data_line(trainer), *lines, *_schedule_lines(args, samples, epoch), *staged], [part[0] for part in plan]


def _stages(trainer: LatentSFTTrainer, epoch: float) -> list[tuple[int, int, int]]:
    """[`Curriculum.plan`] of the run, from the steps of an epoch."""
    per_epoch = None if epoch == math.inf else math.ceil(epoch)
    return trainer.curriculum.plan(_number_of_steps(trainer.args, epoch), per_epoch)


def _number_of_steps(args: LatentSFTConfig | LatentGRPOConfig, epoch: float) -> int:
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)


def _schedule_lines(args: LatentSFTConfig | LatentGRPOConfig, samples: float, epoch: float) -> list[str]:
    """Steps and learning rate, from the mean samples of an optimiser step and the steps of an epoch."""
    steps = _number_of_steps(args, epoch)
    share = "the data has no end" if epoch == math.inf else f"{steps / epoch:.2f} epochs of {epoch:,.0f} steps"
    warmup = args.get_warmup_steps(steps)
    return [
        f"steps       {steps:,} ({share}), {round(steps * samples):,} samples",
        f"schedule    {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}, warm-up {warmup:,} steps "
        f"({warmup / steps:.1%}), peak lr {args.learning_rate:g}",
    ]


def _rollout_lines(trainer: LatentGRPOTrainer, processes: int) -> list[str]:
    """Data, rollouts, rewards, decoding and steps of the second stage."""
    args = trainer.args
    completions = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    rollout = args.per_device_train_batch_size * args.steps_per_generation * processes
    if rollout % args.num_generations:
        raise ValueError(
            f"num_generations={args.num_generations} does not divide the {rollout} completions of a rollout over "
            f"{processes} processes; change per_device_train_batch_size or gradient_accumulation_steps"
        )
    groups = rollout // args.num_generations
    steps_per_rollout = args.num_iterations * rollout / completions
    epoch = len(trainer.train_dataset) // groups * steps_per_rollout
    options = ", ".join(f"{name}={value}" for name, value in trainer.latent_options.items() if name != "latent_topk")
    weights = zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True)
    return [
        _data_line(trainer),
        f"batches     {args.per_device_train_batch_size} completions x {args.gradient_accumulation_steps} accumulated "
        f"x {processes} processes = {completions} completions a step",
        f"rollouts    {groups} prompts x {args.num_generations} completions of at most {args.max_completion_length} "
        f"tokens, for {steps_per_rollout:g} steps; {options}; temperature {args.temperature:g}",
        f"rewards     {', '.join(f'{name} x {weight:g}' for name, weight in weights)}",
        f"loss        {args.loss_type}, epsilon {args.epsilon:g}, beta {args.beta:g}{_reference(trainer)}",
        *_schedule_lines(args, completions / args.num_generations, max(epoch, 1)),
    ]


def _reference(trainer: LatentGRPOTrainer) -> str:
    if not trainer.args.beta:
        return " (no reference)"
    adapted = hasattr(trainer.accelerator.unwrap_model(trainer.model), "get_base_model")
    return " (reference: the base without the adapter)" if adapted else " (reference: a second copy of the weights)"


def _plain_lines(trainer: LatentSFTTrainer, processes: int, batch: FirstBatch) -> tuple[list[str], float, float]:
    """Lines, mean samples of an optimiser step and steps of an epoch, with batches of one number of samples."""
    args, data = trainer.args, trainer.train_dataset
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    samples, epoch = float(size * accumulation * processes), math.inf
    if has_length(data):
        batches = len(data) / (size * processes)
        batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
        epoch = max(math.ceil(batches / accumulation), 1)
        samples = min(samples, len(data) / epoch)
    real = samples * int(batch.tensors["attention_mask"].sum()) / len(batch.rows)
    padded = samples * batch.tensors["input_ids"].shape[1]
    lines = [
        f"batches     {size} samples x {accumulation} accumulated x {processes} processes = "
        f"{size * accumulation * processes} samples a step",
        f"  about {real:,.0f} tokens a step, {padded:,.0f} with padding, at the lengths of the first batch",
    ]
    return lines, samples, epoch


def _data_line(trainer: LatentSFTTrainer | LatentGRPOTrainer) -> str:
    data = trainer.train_dataset
    number = f"{len(data):,} records" if has_length(data) else "a stream of records"
    evaluated = trainer.eval_dataset
    held_out = "" if evaluated is None else f", {len(evaluated):,} for evaluation"
    return f"data        {number}{held_out}"


def _dynamic_lines(trainer: LatentSFTTrainer, processes: int) -> tuple[list[str], float, float]:
    """Lines, mean samples of an optimiser step and steps of an epoch, of the plan for this number of processes."""
    args, planned = trainer.args, trainer.train_batches
    accumulation = args.gradient_accumulation_steps
    options = {
        "lengths": planned.lengths,
        "token_cap": args.dynamic_batch_token_cap,
        "max_batch_size": args.dynamic_batch_max_bs,
        "world_size": processes,
        "seed": data_seed(args),
    }
    head = (
        f"batches     dynamic ({args.dynamic_batch_plan}): at most {args.dynamic_batch_max_bs} samples and "
        f"{args.dynamic_batch_token_cap:,} tokens, x {accumulation} accumulated x {processes} processes"
    )
    per_step = accumulation * processes
    if isinstance(planned, ReferenceBatches):
        workers = args.dataloader_num_workers
        plan = ReferenceBatches(**options, num_workers=workers, num_batches=planned.num_batches)
        groups = processes * plan.num_workers
        settings = (plan.lengths, plan.token_cap, plan.max_batch_size, plan.seed)
        batches = [batch for g in range(groups) for batch in reference_batches(*settings, 0, g, groups)]
        tokens = sum(len(batch) * max(plan.lengths[i] for i in batch) for batch in batches)
        epoch = len(batches) / per_step
    else:
        plan = BalancedBatches(**options, pad_to_multiple_of=args.pad_to_multiple_of)
        tokens = int(plan.tokens.sum())
        epoch = math.ceil(len(plan) / per_step)
    samples, real = sum(length > 0 for length in plan.lengths) / epoch, sum(plan.lengths) / epoch
    lines = [
        head,
        f"  {plan.summary()}",
        f"  about {samples:.0f} samples, {real:,.0f} tokens, {tokens / epoch:,.0f} with padding a step",
    ]
    return lines, samples, epoch


__all__ = ["dry_run_report", "dry_run_settings", "no_reference"]
