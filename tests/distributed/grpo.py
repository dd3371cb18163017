"""GRPO_latent in the tests of this folder: a trainer whose completions do not depend on the number of processes."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForImageTextToText, LogitsProcessor, LogitsProcessorList
from trl.trainer import grpo_trainer as trl_grpo

from tests.distributed.data import prompt_data
from tests.tiny import tiny_processor
from tests.trainers.grpo_parts import digit_reward, eager_model
from trainers import LatentGRPOConfig, LatentGRPOTrainer

GROUP = 4
ROWS = 2 * GROUP  # completions of a rollout, over all processes: each of two has a whole group
LIKELY = 12  # ids to sample from: spans and ends are among them
OPTIONS = {
    "num_generations": GROUP,
    "num_generations_eval": 2,
    "per_device_train_batch_size": ROWS,
    "per_device_eval_batch_size": ROWS,
    "max_completion_length": 12,
    "shuffle_dataset": False,
    "max_steps": 2,
    "learning_rate": 0.02,
    "optim": "sgd",
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "disable_tqdm": True,
}


class RowNoise(LogitsProcessor):
    """Sampling from noise that depends on the ids of a row and its place in the group alone: scores so far apart that
    the sampler takes the largest."""

    def __init__(self, group: int, pad: int) -> None:
        self.group, self.pad = group, pad

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = torch.empty_like(scores)
        for row, ids in enumerate(input_ids.tolist()):
            while ids[0] == self.pad:  # how much of it there is depends on the other rows
                ids.pop(0)
            noise[row].exponential_(generator=torch.Generator().manual_seed(hash((row % self.group, *ids))))
        rare = scores < scores.topk(LIKELY).values[:, -1:]
        return 1e8 * (scores.log_softmax(-1) - noise.log()).masked_fill(rare, -torch.inf)


class GRPORecorder(LatentGRPOTrainer):
    """Keeps the ids of each completion of this process with its prompt; rows stay in their order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[list[list[int]]] = []

    def _generate(self, prompts: list) -> tuple:
        group = self.num_generations if self.model.training else self.num_generations_eval
        noise = RowNoise(group, self.processing_class.tokenizer.pad_token_id)
        self.latent_options["logits_processor"] = LogitsProcessorList([noise])
        output = super()._generate(prompts)
        self.seen.append([[*prompt, *completion] for prompt, completion in zip(output[0], output[1], strict=True)])
        return output

    def _prepare_inputs(self, rows: Any) -> dict[str, Any]:
        with mock.patch.object(trl_grpo, "shuffle_sequence_dict", dict):  # a micro-batch is the share of a process
            return super()._prepare_inputs(rows)


def save_grpo_base(folder: Path) -> None:
    """Write a model that opens spans and ends completions by itself, with a latent head and a vector to stop at."""
    eager_model(latent_head="simple", latent_stop_vector=True).save_pretrained(folder)


def build_grpo(data: str, options: dict[str, Any], folder: Path, base: Path, processes: int) -> GRPORecorder:
    """The trainer of a run: `per_device_*` and `gradient_accumulation_steps` are given for one process.

    Several processes share either the rows of a micro-batch or, with accumulation, the micro-batches.
    """
    options = {**OPTIONS, **options}
    micro_batches = "gradient_accumulation_steps" in options
    shared = "gradient_accumulation_steps" if micro_batches else "per_device_train_batch_size"
    for name in (shared, "per_device_eval_batch_size"):
        options[name] //= processes
    args = LatentGRPOConfig(output_dir=str(folder), **options)
    return GRPORecorder(
        model=AutoModelForImageTextToText.from_pretrained(base),
        reward_funcs=digit_reward,
        args=args,
        train_dataset=prompt_data(data),
        eval_dataset=prompt_data(data).select(range(4)),
        processing_class=tiny_processor(),
    )


def bent(step: Any) -> torch.Tensor:
    """In place of noise, which rows draw together: a latent `(R, H)` that is not the policy's own."""
    return step.latent + 0.2 * step.latent.roll(1, dims=-1)
