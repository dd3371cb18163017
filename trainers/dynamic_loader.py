"""Batches of a bounded number of tokens in the Trainer: the training loader, and what resuming from them needs."""

import dataclasses
import logging
from functools import partial
from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from .data.dynamic_batching import BalancedBatches, ReferenceBatches, check_dynamic_batching
from .run_facts import RunFacts, check_run_facts
from .sample_lengths import dataset_lengths, row_name

logger = logging.getLogger(__name__)

# Options that say which samples make a batch, and their value when they say nothing.
_OTHER_BATCHES = {
    "train_sampling_strategy": "random",
    "auto_find_batch_size": False,
    "dataloader_drop_last": False,
}


def check_dynamic_options(args: Any) -> None:
    """Check the options of dynamic batching, and those of the Trainer that contradict them.

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
    if not args.enable_dynamic_batch:
        _check_without(args)
        return
    given = {name: getattr(args, name) for name in _OTHER_BATCHES}
    given |= {f"accelerator_config.{name}": getattr(args.accelerator_config, name) for name in ("split_batches",)}
    for name, value in given.items():
        if value != _OTHER_BATCHES.get(name, False):
            raise ValueError(
                f"{name}={value!r} with enable_dynamic_batch=True: the lengths alone say which samples make a batch; "
                f"leave {name} out, or set enable_dynamic_batch=False"
            )
    if args.dynamic_batch_plan == "reference":
        _check_reference_plan(args)


def _check_without(args: Any) -> None:
    """Say which options do nothing; a file of lengths would not be given for nothing."""
    if args.lengths_path is not None:
        raise ValueError(
            f"lengths_path={args.lengths_path!r} is read only with enable_dynamic_batch=True; set that, or leave "
            "lengths_path out"
        )
    fields = {field.name: field for field in dataclasses.fields(args) if field.name.startswith("dynamic_batch_")}
    idle = [
        f"{name}={getattr(args, name)!r}" for name in sorted(fields) if getattr(args, name) != fields[name].default
    ]
    if idle:
        logger.warning("%s have no effect without enable_dynamic_batch=True", ", ".join(idle))


def _check_reference_plan(args: Any) -> None:
    if args.max_steps <= 0:
        raise ValueError(
            f"max_steps={args.max_steps} with dynamic_batch_plan='reference': that plan has no end and no common "
            "epoch, as published; set max_steps, or dynamic_batch_plan='balanced'"
        )
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            raise ValueError(
                f"{name}='epoch' with dynamic_batch_plan='reference', which has no epochs; set {name}='steps', or "
                "dynamic_batch_plan='balanced'"
            )


class DynamicBatchTrainer(Trainer):
    """Replaces the training loader when `enable_dynamic_batch` is set, and keeps and compares the facts of a run.

    The loader is a stock one over a batch sampler, prepared by accelerate: workers, pinning, skipping batches when a
    run resumes and moving batches to the device are as always. `per_device_train_batch_size` then only fills what
    DeepSpeed wants to know.

    Raises:
        ValueError: lengths of other data, a sample above the cap, a streaming data set, or a checkpoint of another
            run; names option, value and remedy.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_batches: BalancedBatches | ReferenceBatches | None = None
        facts: dict[str, Any] = {}
        if self.args.enable_dynamic_batch and self.train_dataset is not None:
            facts = self._plan_batches()
        self.run_facts = RunFacts({**self._loop_facts(), **facts})
        self.add_callback(self.run_facts)

    def _plan_batches(self) -> dict[str, Any]:
        """Set `train_batches`; returns what they follow from."""
        args, processes = self.args, self.accelerator.num_processes
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
        options = {
            "lengths": found.lengths,
            "token_cap": args.dynamic_batch_token_cap,
            "max_batch_size": args.dynamic_batch_max_bs,
            "world_size": processes,
            "seed": data_seed(args),
            "excluded": found.bad,
        }
        facts = {name: getattr(args, name) for name in ("dynamic_batch_token_cap", "dynamic_batch_max_bs")}
        facts.update(dynamic_batch_plan=args.dynamic_batch_plan, data_hash=found.data_hash)
        if args.dynamic_batch_plan == "reference":
            workers = facts["dataloader_num_workers"] = args.dataloader_num_workers
            number = args.max_steps * args.gradient_accumulation_steps
            self.train_batches = ReferenceBatches(**options, num_workers=workers, num_batches=number)
        else:
            multiple = facts["pad_to_multiple_of"] = args.pad_to_multiple_of
            name = partial(row_name, self.train_dataset)
            self.train_batches = BalancedBatches(**options, pad_to_multiple_of=multiple, row_name=name)
        if self.is_world_process_zero():
            logger.info("dynamic batches: %s", self.train_batches.summary())
        return facts

    def _loop_facts(self) -> dict[str, Any]:
        """What the place in the data follows from, with any kind of batches."""
        args = self.args
        facts = {
            "world_size": self.accelerator.num_processes,
            "seed": data_seed(args),
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "enable_dynamic_batch": args.enable_dynamic_batch,
        }
        if not args.enable_dynamic_batch:
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
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.train_batches,
            collate_fn=self.data_collator,
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
                    f"enable_dynamic_batch=True with {self.train_batches.world_size} processes of which only "
                    f"{shard.num_processes} read different data (tensor or context parallelism) is not planned for; "
                    "use data parallelism only, or set enable_dynamic_batch=False"
                )
            # accelerate's shard of a batch sampler does not pass the epoch on, nor does its skipping of batches.
            shard.set_epoch = self.train_batches.set_epoch
        return prepared


def data_seed(args: Any) -> int:
    """The seed that the order of the data follows from."""
    return args.seed if args.data_seed is None else args.data_seed
