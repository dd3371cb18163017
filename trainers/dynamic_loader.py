"""Planned batches in the Trainer (`enable_dynamic_batch`, `latent_packing`): the training loader, and what resuming
from them needs."""

import dataclasses
import logging
from functools import partial
from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from .data.dynamic_batching import BalancedBatches, ReferenceBatches, check_dynamic_batching
from .data.packing import BucketBatches, SequenceBatches
from .packed_loader import PackingPlan, SampleCuts, check_packing_options, image_token_ids, packed_data
from .run_facts import RunFacts, check_run_facts
from .sample_lengths import DatasetLengths, dataset_lengths, row_name

logger = logging.getLogger(__name__)

# Options that say which samples make a batch, and their value when they say nothing.
_OTHER_BATCHES = {
    "train_sampling_strategy": "random",
    "auto_find_batch_size": False,
    "dataloader_drop_last": False,
}


def check_dynamic_options(args: Any) -> None:
    """Check the options of dynamic batching and packing, and those of the Trainer that contradict them.

    Args:
        args: a complete `LatentSFTConfig`.

    Raises:
        ValueError: names the option, its value and the remedy.
    """
    check_dynamic_batching(
        args.dynamic_batch_token_cap, args.dynamic_batch_max_bs, args.dynamic_batch_plan, "dynamic_batch_"
    )
    if not isinstance(args.enable_dynamic_batch, bool):
        raise ValueError(f"enable_dynamic_batch={args.enable_dynamic_batch!r} must be true or false")
    check_packing_options(args)
    if not args.enable_dynamic_batch:
        _check_without(args)
    if planned_by(args) is None:
        return
    given = {name: getattr(args, name) for name in _OTHER_BATCHES}
    given |= {f"accelerator_config.{name}": getattr(args.accelerator_config, name) for name in ("split_batches",)}
    for name, value in given.items():
        if value != _OTHER_BATCHES.get(name, False):
            raise ValueError(
                f"{name}={value!r} with {planned_by(args)}: the lengths alone say which samples make a batch; "
                f"leave {name} out, or {_WITHOUT[args.latent_packing is not None]}"
            )
    if args.enable_dynamic_batch and args.dynamic_batch_plan == "reference":
        _check_endless(args, "dynamic_batch_plan='reference'", "dynamic_batch_plan='balanced'")
    elif args.latent_packing == "buckets":
        _check_endless(args, planned_by(args), "latent_packing: sequence")


_WITHOUT = ("set enable_dynamic_batch=False", "leave latent_packing out")


def planned_by(args: Any) -> str | None:
    """The option, with its value, that says which samples make a batch; None for batches of one number of samples."""
    if args.latent_packing is not None:
        return f"latent_packing={args.latent_packing!r}"
    return "enable_dynamic_batch=True" if args.enable_dynamic_batch else None


def _check_without(args: Any) -> None:
    """Say which options do nothing; a file of lengths would not be given for nothing."""
    if args.lengths_path is not None and args.latent_packing is None:
        raise ValueError(
            f"lengths_path={args.lengths_path!r} is read only with enable_dynamic_batch=True or latent_packing; set "
            "one of them, or leave lengths_path out"
        )
    fields = {field.name: field for field in dataclasses.fields(args) if field.name.startswith("dynamic_batch_")}
    idle = [
        f"{name}={getattr(args, name)!r}" for name in sorted(fields) if getattr(args, name) != fields[name].default
    ]
    if idle:
        logger.warning("%s have no effect without enable_dynamic_batch=True", ", ".join(idle))


def _check_endless(args: Any, option: str, other: str) -> None:
    """The published plans."""
    if args.max_steps <= 0:
        raise ValueError(
            f"max_steps={args.max_steps} with {option}: that plan has no end and no common epoch, as published; set "
            f"max_steps, or {other}"
        )
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            raise ValueError(f"{name}='epoch' with {option}, which has no epochs; set {name}='steps', or {other}")


class DynamicBatchTrainer(Trainer):
    """Replaces the training loader for `enable_dynamic_batch` and `latent_packing`, and keeps and compares the facts
    of a run.

    The loader is a stock one over a batch sampler, prepared by accelerate: workers, pinning, skipping batches when a
    run resumes and moving batches to the device are as always. `per_device_train_batch_size` is the number of rows of
    a batch for `latent_packing="sequence"`; else it only fills what DeepSpeed wants to know.

    Raises:
        ValueError: lengths of other data, a sample above the cap, a streaming data set, or a checkpoint of another
            run; names option, value and remedy.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_batches: BalancedBatches | ReferenceBatches | BucketBatches | SequenceBatches | None = None
        self.packing_plan: PackingPlan | None = None
        facts: dict[str, Any] = {}
        if planned_by(self.args) is not None and self.train_dataset is not None:
            facts = self._plan_batches()
        self.run_facts = RunFacts({**self._loop_facts(), **facts})
        self.add_callback(self.run_facts)

    def _plan_batches(self) -> dict[str, Any]:
        """Set `train_batches`; returns what they follow from."""
        args, processes = self.args, self.accelerator.num_processes
        if not (hasattr(self.train_dataset, "__len__") and hasattr(self.train_dataset, "__getitem__")):
            raise ValueError(
                f"{planned_by(args)} needs a data set with a length, got {type(self.train_dataset).__name__} "
                f"(streaming); load it as a table, or {_WITHOUT[args.latent_packing is not None]}"
            )
        found = dataset_lengths(
            self.train_dataset,
            self.data_collator,
            args.lengths_path,
            args.max_bad_share,
            self.accelerator.process_index,
            processes,
            progress=not args.disable_tqdm,
        )
        found.check(args.max_bad_share)
        facts = self._plan_packing(found) if args.latent_packing else self._plan_dynamic(found)
        if self.is_world_process_zero():
            logger.info("%s: %s", planned_by(args), self.train_batches.summary())
        return {**facts, "data_hash": found.data_hash}

    def _plan_packing(self, found: DatasetLengths) -> dict[str, Any]:
        args, data = self.args, self.train_dataset
        self.packing_plan = PackingPlan(
            args,
            data_seed(args),
            found.lengths,
            found.bad,
            row_name=partial(row_name, data),
            can_cut=SampleCuts(data, self.data_collator, args.packing_max_tokens, image_token_ids(self.model.config)),
            log=self.is_world_process_zero(),
        )
        self.train_batches = self.packing_plan.batches(self.accelerator.num_processes)
        return self.packing_plan.facts()

    def _plan_dynamic(self, found: DatasetLengths) -> dict[str, Any]:
        args = self.args
        options = {
            "lengths": found.lengths,
            "token_cap": args.dynamic_batch_token_cap,
            "max_batch_size": args.dynamic_batch_max_bs,
            "world_size": self.accelerator.num_processes,
            "seed": data_seed(args),
            "excluded": found.bad,
        }
        facts = {name: getattr(args, name) for name in ("dynamic_batch_token_cap", "dynamic_batch_max_bs")}
        facts.update(dynamic_batch_plan=args.dynamic_batch_plan)
        if args.dynamic_batch_plan == "reference":
            workers = facts["dataloader_num_workers"] = args.dataloader_num_workers
            number = args.max_steps * args.gradient_accumulation_steps
            self.train_batches = ReferenceBatches(**options, num_workers=workers, num_batches=number)
        else:
            multiple = facts["pad_to_multiple_of"] = args.pad_to_multiple_of
            name = partial(row_name, self.train_dataset)
            self.train_batches = BalancedBatches(**options, pad_to_multiple_of=multiple, row_name=name)
        return facts

    def _loop_facts(self) -> dict[str, Any]:
        """What the place in the data follows from, with any kind of batches."""
        args = self.args
        facts = {
            "world_size": self.accelerator.num_processes,
            "seed": data_seed(args),
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "enable_dynamic_batch": args.enable_dynamic_batch,
            "latent_packing": args.latent_packing,
        }
        if not args.enable_dynamic_batch and args.latent_packing != "buckets":
            facts["per_device_train_batch_size"] = args.per_device_train_batch_size
        return facts

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, from a checkpoint folder of the same run."""
        if isinstance(resume_from_checkpoint, str):
            check_run_facts(resume_from_checkpoint, self.run_facts.facts)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The stock loader, or one over the planned batches."""
        if self.train_batches is None:
            return super().get_train_dataloader()
        args = self.args
        dataset, collator = packed_data(args, self.train_dataset, self.data_collator)
        loader = DataLoader(
            dataset,
            batch_sampler=self.train_batches,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )
        prepared = self.accelerator.prepare(loader)
        shard = prepared.batch_sampler
        if shard is not self.train_batches:
            if shard.num_processes != self.train_batches.world_size:
                raise ValueError(
                    f"{planned_by(args)} with {self.train_batches.world_size} processes of which only "
                    f"{shard.num_processes} read different data (tensor or context parallelism) is not planned for; "
                    f"use data parallelism only, or {_WITHOUT[args.latent_packing is not None]}"
                )
            # accelerate's shard of a batch sampler does not pass the epoch on, nor does its skipping of batches.
            shard.set_epoch = self.train_batches.set_epoch
        return prepared


def data_seed(args: Any) -> int:
    """The seed that the order of the data follows from."""
    return args.seed if args.data_seed is None else args.data_seed
