"""Packing in the Trainer: the options of `latent_packing`, its batches, and what collates them.

* `"buckets"`, as published for LVR ("Latent Visual Reasoning", arXiv 2509.24251; card section 5.4): a batch holds
  samples whose tokens add up to `packing_max_tokens` at most, and is padded to the longest of them.
* `"sequence"`: a batch holds `per_device_train_batch_size` rows of joined samples, each of `packing_max_tokens` at
  most. The collator pads the samples as always; the layers of the model see them end to end, without padding
  (`packed_forward.py`).

The plans themselves are in `data/packing.py`; how they replace the training loader, in `dynamic_loader.py`.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from .data.dynamic_batching import is_count
from .data.packing import BucketBatches, BucketOptions, JoinedRows, SequenceBatches, can_be_cut
from .data.packing_buckets import OVER_LONG
from .fault_tolerance import RECORD_LABELS

logger = logging.getLogger(__name__)

PACKING = ("buckets", "sequence")
# Options, and the kinds of packing that read them.
_READ_BY = {
    "packing_max_tokens": PACKING,
    "packing_over_long": PACKING,
    "packing_long_threshold": ("buckets",),
    "packing_max_instances": ("buckets",),
    "packing_max_samples": ("sequence",),
}


def check_packing_options(args: Any) -> None:
    """Check the options of packing.

    Args:
        args: a complete `LatentSFTConfig`.

    Raises:
        ValueError: names the option, its value and the remedy.
    """
    if args.latent_packing not in (None, *PACKING):
        raise ValueError(f"latent_packing={args.latent_packing!r} is unknown; choose 'buckets' or 'sequence'")
    for name in ("packing_max_tokens", "packing_long_threshold", "packing_max_instances"):
        if not is_count(getattr(args, name)):
            raise ValueError(f"{name}={getattr(args, name)!r} must be an integer of at least 1")
    if args.packing_max_samples is not None and not is_count(args.packing_max_samples):
        raise ValueError(
            f"packing_max_samples={args.packing_max_samples!r} must be an integer of at least 1, or None for no limit"
        )
    if args.packing_over_long not in OVER_LONG:
        raise ValueError(f"packing_over_long={args.packing_over_long!r} is unknown; choose one of {list(OVER_LONG)}")
    idle = _idle_options(args)
    if idle:
        kind = "without latent_packing" if args.latent_packing is None else f"with {args.latent_packing!r} packing"
        logger.warning("%s have no effect %s", ", ".join(idle), kind)
    if args.latent_packing is None:
        return
    if args.enable_dynamic_batch:
        raise ValueError(
            f"enable_dynamic_batch=True with latent_packing={args.latent_packing!r}: each says on its own which "
            "samples make a batch; set one of them"
        )
    if args.packing_over_long == "cut":
        _check_cut(args)


def _idle_options(args: Any) -> list[str]:
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    return [
        f"{name}={getattr(args, name)!r}"
        for name, kinds in _READ_BY.items()
        if args.latent_packing not in kinds and getattr(args, name) != defaults[name]
    ]


def _check_cut(args: Any) -> None:
    if args.latent_packing == "sequence":
        raise ValueError(
            "packing_over_long='cut' with latent_packing='sequence': a longer sample gets a row of its own there; set "
            "packing_over_long: keep or refuse"
        )
    if args.latent_form == "chain":
        raise ValueError(
            "packing_over_long='cut' with latent_form='chain': what is left of a chain without its end marker would "
            "be trained as plain text; set packing_over_long: keep or refuse"
        )


# The plan -----------------------------------------------------------------------------------------------------------


@dataclass
class PackingPlan:
    """Builds the batches of a run.

    Args:
        args: of the trainer.
        seed: that the order of the data follows from.
        lengths: tokens of each row of the data set.
        excluded: positions of bad rows.
        row_name: how a message names a position.
        can_cut: whether the sample at a position can be cut at `packing_max_tokens`.
        log: whether to say what becomes of long samples.
    """

    args: Any
    seed: int
    lengths: Sequence[int]
    excluded: Collection[int]
    row_name: Callable[[int], str]
    can_cut: Callable[[int], bool]
    log: bool = True

    def batches(self, world_size: int) -> BucketBatches | SequenceBatches:
        """The batch sampler for a number of processes.

        Raises:
            ValueError: a sample above the limit with `packing_over_long="refuse"`, or samples that cannot be dealt to
                the processes.
        """
        args = self.args
        self._long_samples()
        if args.latent_packing == "sequence":
            return SequenceBatches(
                self.lengths,
                args.packing_max_tokens,
                args.per_device_train_batch_size,
                world_size,
                self.seed,
                max_samples=args.packing_max_samples,
                excluded=self.excluded,
            )
        return BucketBatches(
            [self.lengths],
            self._bucket_options(),
            world_size,
            args.dataloader_num_workers,
            num_batches=args.max_steps * args.gradient_accumulation_steps,
            can_cut=lambda dataset, index: self.can_cut(index),
            excluded=[self.excluded] if self.excluded else None,
            row_name=lambda dataset, index: self.row_name(index),
        )

    def facts(self) -> dict[str, Any]:
        """What the batches follow from, beside data, seed and processes."""
        args = self.args
        names = [name for name, kinds in _READ_BY.items() if args.latent_packing in kinds]
        names += ["dataloader_num_workers"] if args.latent_packing == "buckets" else []
        return {name: getattr(args, name) for name in names}

    def _bucket_options(self) -> BucketOptions:
        args = self.args
        return BucketOptions(
            max_packed_tokens=args.packing_max_tokens,
            long_seq_threshold=args.packing_long_threshold,
            max_instance_per_batch=args.packing_max_instances,
            random_seed=self.seed,
            over_long=args.packing_over_long,
        )

    def _long_samples(self) -> None:
        """Say how many samples are above the limit, and what becomes of them."""
        args, left_out = self.args, set(self.excluded)
        limit = _cut_from(args) - 1 if args.latent_packing == "buckets" else args.packing_max_tokens
        long = [i for i, length in enumerate(self.lengths) if length > limit and i not in left_out]
        if not long:
            return
        head = (
            f"{len(long)} of {len(self.lengths)} samples are longer than packing_max_tokens={args.packing_max_tokens}"
        )
        if args.packing_over_long == "refuse":
            worst = max(long, key=lambda position: self.lengths[position])
            raise ValueError(
                f"{head}, the longest is {self.row_name(worst)} with {self.lengths[worst]} tokens; raise "
                "packing_max_tokens, lower max_pixels, remove these records, or set packing_over_long: keep"
            )
        what = "each stays whole, alone in its batch or row"
        if args.packing_over_long == "cut":
            lost = [position for position in long if not self.can_cut(position)]
            names = "; ".join(self.row_name(position) for position in lost[:10])
            what = f"{len(long) - len(lost)} are cut, {len(lost)} would lose a part of an image and are left out"
            what += f" ({names}{'; ...' if len(lost) > 10 else ''})" if lost else ""
        if self.log:
            logger.warning("%s: %s", head, what)


def _cut_from(args: Any) -> int:
    """Tokens from which on a sample of the published plan is cut: alone in its bucket, and above the limit."""
    return max(args.packing_max_tokens + 1, args.packing_long_threshold)


def packing_lines(plan: PackingPlan, world_size: int) -> tuple[list[str], float, float]:
    """Lines about the batches, mean samples of an optimiser step, and steps of an epoch; for a dry run."""
    args = plan.args
    planned, per_step = plan.batches(world_size), args.gradient_accumulation_steps * world_size
    if isinstance(planned, SequenceBatches):
        samples, epoch = len(planned.lengths), math.ceil(len(planned) / per_step)
    else:
        samples, once = len(planned.positions[0]), dataclasses.replace(planned.options, replacement=False)
        epoch = len(BucketBatches(planned.lengths, once, world_size, args.dataloader_num_workers)) / per_step
    real = sum(map(sum, planned.lengths)) if isinstance(planned, BucketBatches) else sum(planned.lengths)
    head = (
        f"batches     packing ({args.latent_packing}), x {args.gradient_accumulation_steps} accumulated x "
        f"{world_size} processes"
    )
    about = f"  about {samples / epoch:.0f} samples, {real / epoch:,.0f} tokens a step"
    return [head, f"  {planned.summary()}", about], samples / epoch, epoch


# What collates the batches ------------------------------------------------------------------------------------------


@dataclass
class JoinedRowsCollator:
    """Collates rows of joined samples as one batch of all their samples, row after row.

    Args:
        collator: of samples.
    """

    collator: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
        return self.collator([sample for row in rows for sample in row])


@dataclass
class CutCollator:
    """Cuts the end off a long sample, which is alone in its batch; its slots lose their targets with it.

    Args:
        collator: of samples.
        max_tokens: what is left of a sample.
        threshold: tokens from which on a sample is cut.
    """

    collator: Callable[[list[Any]], dict[str, Any]]
    max_tokens: int
    threshold: int

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch = self.collator(list(rows))
        if len(rows) > 1 or int(batch["attention_mask"].sum()) < self.threshold:
            return batch
        shape = batch["input_ids"].shape
        return {
            name: value[:, : self.max_tokens] if value.shape[:2] == shape and name != RECORD_LABELS else value
            for name, value in batch.items()
        }


class SampleCuts:
    """Whether samples can be cut without losing a part of an image; each is collated once, when it is asked for.

    Args:
        dataset: rows by position.
        collator: of the run.
        max_tokens: what is left of a sample.
        image_token_ids: ids of an image embedding and of its start and end markers.
    """

    def __init__(self, dataset: Any, collator: Any, max_tokens: int, image_token_ids: Collection[int]) -> None:
        self.dataset, self.collator, self.max_tokens = dataset, collator, max_tokens
        self.image_token_ids = set(image_token_ids)
        self._known: dict[int, bool] = {}

    def __call__(self, position: int) -> bool:
        if position not in self._known:
            ids = self.collator([self.dataset[position]])["input_ids"][0].tolist()
            self._known[position] = can_be_cut(ids, self.max_tokens, self.image_token_ids)
        return self._known[position]


def image_token_ids(config: Any) -> set[int]:
    """Ids of an image embedding and of its markers, as far as the configuration of a model names them."""
    names = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
    return {token for name in names if (token := getattr(config, name, None)) is not None}


def packed_data(args: Any, dataset: Any, collator: Any) -> tuple[Any, Any]:
    """Data set and collator of the training loader."""
    if args.latent_packing == "sequence":
        return JoinedRows(dataset), JoinedRowsCollator(collator)
    if args.latent_packing == "buckets" and args.packing_over_long == "cut":
        return dataset, CutCollator(collator, args.packing_max_tokens, _cut_from(args))
    return dataset, collator


__all__ = [
    "PACKING",
    "CutCollator",
    "JoinedRowsCollator",
    "PackingPlan",
    "SampleCuts",
    "check_packing_options",
    "image_token_ids",
    "packed_data",
    "packing_lines",
]
