"""What stops a run before harm is done: losses that are not finite, and precisions that the device does not have."""

import json
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from .data.records import record_origin

RECORD_LABELS = "record_labels"
_LABEL_BYTES = 192
_LISTED_BATCHES = 16


class NonFiniteError(FloatingPointError):
    """A loss, a gradient or a weight is NaN or infinite; the message says where, and how to go on."""


# Which records a batch holds ----------------------------------------------------------------------------------------


class LabelledCollator:
    """A collator whose batches also say which records they hold, for error messages.

    The labels travel as a tensor of bytes, `record_labels` `(rows, 192)` uint8: text in a batch does not survive the
    concatenation, slicing and broadcasting of batches in accelerate. They never reach the model
    ([`LossGuard.start`] takes them out).
    """

    def __init__(self, collator: Callable[[Sequence[Any]], MutableMapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Any]) -> MutableMapping[str, Any]:
        rows = list(rows)
        batch = self.collator(rows)
        labels = torch.zeros(len(rows), _LABEL_BYTES, dtype=torch.uint8)
        for label, row in zip(labels, rows, strict=True):
            text = record_label(row).encode()[-_LABEL_BYTES:]  # the end of a path says more than its beginning
            label[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        batch[RECORD_LABELS] = labels
        return batch


def record_label(row: Any) -> str:
    """File, row and id of a record or of a row of a table, e.g. `"data.json, row 3, id 'x7'"`."""
    if not isinstance(row, Mapping):
        return f"a {type(row).__name__} without id"
    meta = row.get("meta")
    if isinstance(meta, str):
        meta = json.loads(meta) if meta else None
    source, number = record_origin({**row, "meta": meta})
    named = [source] if isinstance(meta, dict) and "source" in meta else []
    return ", ".join([*named, *([] if number is None else [f"row {number}"]), f"id {row.get('id')!r}"])


def decode_labels(labels: torch.Tensor) -> list[str]:
    """The labels of a batch as text."""
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in labels.cpu().tolist()]


# Losses ----------------------------------------------------------------------------------------------------------


class LossGuard:
    """Keeps the terms of the loss of each micro-batch of one optimiser step, on their device, until they are checked.

    `start` at the first micro-batch, `note` in each, `flags` once a step: one synchronisation a step, and none here.

    Attributes:
        terms: names of the terms.
    """

    terms: tuple[str, ...] = ("loss_ce", "loss_latent")

    def __init__(self) -> None:
        self._labels: list[torch.Tensor | None] = []
        self._losses: list[torch.Tensor] = []

    def start(self, batches: Sequence[Any]) -> None:
        """Begin an optimiser step: take the labels out of its micro-batches."""
        self._losses = []
        self._labels = [
            batch.pop(RECORD_LABELS, None) if isinstance(batch, MutableMapping) else None for batch in batches
        ]

    def note(self, *terms: torch.Tensor) -> None:
        """Keep the terms of a micro-batch, 0-dim tensors, in the order of their names."""
        if len(self._losses) < max(len(self._labels), 1):  # outside of a training loop nothing piles up
            self._losses.append(torch.stack([term.detach().float() for term in terms]))

    def flags(self, grad_norm: torch.Tensor | float | None, device: torch.device) -> torch.Tensor:
        """`(2,)` float: whether a loss, and whether the gradient of the step is not finite (None: not looked at)."""
        losses = torch.stack(self._losses) if self._losses else torch.zeros(1, device=device)
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=device)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return torch.stack([~losses.to(device).isfinite().all(), ~norm.isfinite().all()]).float()

    def report(self, rank: int, every_batch: bool) -> list[str]:
        """A line for each micro-batch of this rank with a bad term, or for all of them."""
        lines = []
        for index, losses in enumerate(self._losses):
            terms = dict(zip(self.terms, losses.tolist(), strict=True))
            bad = [name for name, value in terms.items() if not math.isfinite(value)]
            if bad or every_batch:
                labels = self._labels[index] if index < len(self._labels) else None
                records = "not known" if labels is None else "; ".join(decode_labels(labels))
                values = ", ".join(f"{name}={value:g}" for name, value in terms.items())
                what = f" ({' and '.join(bad)} not finite)" if bad else ""
                lines.append(
                    f"rank {rank}, micro-batch {index + 1} of {len(self._losses)}: {values}{what}; records: {records}"
                )
        return lines


def failure_message(what: str, lines: Sequence[str], checkpoint: Any) -> str:
    """The text of a [`NonFiniteError`]: what happened, in which batches, and from where to go on.

    Args:
        what: which quantity, at which optimiser step, and what became of the step.
        lines: the batches, see [`LossGuard.report`].
        checkpoint: folder of the last complete checkpoint, or None.
    """
    listed = [f"  {line}" for line in lines[:_LISTED_BATCHES]]
    listed += [f"  and {len(lines) - _LISTED_BATCHES} more"] if len(lines) > _LISTED_BATCHES else []
    last = f"The last good checkpoint is {checkpoint}; go on from it with resume_from_checkpoint={checkpoint}"
    if checkpoint is None:
        last = "No checkpoint was saved yet; start again"
    remedy = "once these records are repaired or left out, or with a lower learning_rate or another seed"
    return "\n".join([what, *listed, f"{last}, {remedy}."])


def non_finite_weights(model: torch.nn.Module) -> torch.Tensor:
    """0-dim float: 1 when a trained parameter (under ZeRO-3 this rank's part of it) has a NaN or an infinity."""
    tensors = [getattr(p, "ds_tensor", p).detach() for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.get_total_norm([t for t in tensors if t.numel()], norm_type=math.inf)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return (~norm.isfinite()).float()


# Precisions ------------------------------------------------------------------------------------------------------


def check_precision(args: TrainingArguments) -> None:
    """Refuse precisions that the device of the run does not have, before anything is built.

    Args:
        args: the arguments, also before their own `__post_init__` (`bf16=None` stands for TRL's default, true unless
            `fp16` is).

    Raises:
        ValueError: names the option, its value, the device and the remedy.
    """
    default = " (the default of trl)" if args.bf16 is None else ""
    wanted = {"bf16": not args.fp16 if args.bf16 is None else args.bf16, "bf16_full_eval": args.bf16_full_eval}
    wanted |= {name: getattr(args, name) for name in ("fp16", "fp16_full_eval", "tf32")}
    wanted = {name: f"{name}=True{default if name == 'bf16' else ''}" for name, value in wanted.items() if value}
    accelerator = None if args.use_cpu else torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        device = "the CPU (use_cpu=True)" if args.use_cpu else "the CPU (no GPU was found)"
        remedies = dict.fromkeys(("fp16", "fp16_full_eval"), "needs a GPU{}; leave it out, or set bf16: true (slow)")
        remedies["tf32"] = "needs a GPU of the Ampere generation or later{}; leave it out"
        if not args.use_cpu:
            remedies["bf16"] = remedies["bf16_full_eval"] = (
                "needs a GPU{}; set use_cpu: true with bf16: false (float32) or bf16: true (bfloat16, slow)"
            )
    elif accelerator.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        device = f"{torch.cuda.get_device_name()} (compute capability {torch.cuda.get_device_capability()})"
        ampere = "needs a GPU of the Ampere generation or later{}; "
        remedies = dict.fromkeys(("bf16", "bf16_full_eval"), ampere + "set bf16: false and fp16: true")
        remedies["tf32"] = ampere + "leave it out"
    else:
        return
    for name, remedy in remedies.items():
        if name in wanted:
            raise ValueError(f"{wanted[name]} {remedy.format(f', and this run is on {device}')}")


def check_model_precision(model: PreTrainedModel, args: TrainingArguments, deepspeed: bool = False) -> None:
    """Refuse weights and attention kernels that cannot be trained in the precision and on the device of the run.

    Args:
        model: the model that is trained, adapters included.
        args: complete arguments of the run.
        deepspeed: whether DeepSpeed keeps float32 copies of float16 weights.

    Raises:
        ValueError: names the option or parameter, its value, the device and the remedy.
    """
    configs = [model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)]
    kernels = {getattr(config, "_attn_implementation", None) for config in configs if config is not None}
    flash = sorted(name for name in kernels if isinstance(name, str) and "flash_attention" in name)
    if flash and args.device.type == "cpu":
        raise ValueError(f"attn_implementation={flash[0]!r} does not run on {args.device}; set it to 'sdpa'")
    if flash and not (args.bf16 or args.fp16) and model.dtype == torch.float32:
        raise ValueError(
            f"attn_implementation={flash[0]!r} does not take float32 (dtype={model.dtype}, bf16=False, fp16=False, "
            f"on {args.device}); set bf16: true, dtype: bfloat16, or attn_implementation: sdpa"
        )
    halves = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if halves and not deepspeed:
        raise ValueError(
            f"dtype=float16: {len(halves)} trained parameters are float16 (first: {halves[0]}), on {args.device}; a "
            "float16 weight cannot be updated safely: load the model with dtype: float32 and set fp16: true, or use "
            "bfloat16"
        )
