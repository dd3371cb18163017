"""Parts of the tests of GRPO: models that open spans by themselves, records, and a trainer on the CPU."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from tests.latent import liven, tiny_latent_model
from tests.tiny import tiny_images, tiny_processor
from trainers.data.records import make_record, records_to_dataset
from trainers.grpo_config import LatentGRPOConfig
from trainers.grpo_replay import Replay
from trainers.grpo_trainer import LatentGRPOTrainer
from trainers.losses.grpo_latent import sampled_token_mask

FIXED = {"latent_strategy": "fixed", "num_latent_steps": 2}


def eager_model(scale: float = 2.0, **fields: Any) -> PreTrainedModel:
    """A tiny model that opens spans and ends completions often, at different places."""
    torch.manual_seed(0)
    model = liven(tiny_latent_model(**{"latent_generation": FIXED, **fields}), scale)
    if model.latent_head is not None:
        liven(model.latent_head, 1 / scale)
    with torch.no_grad():
        head = model.lm_head.weight
        start = head[model.config.latent_start_token_id].mul_(4)
        head[tiny_processor().tokenizer.eos_token_id] = 0.8 * start
    return model


def prompts() -> Dataset:
    """Records with prompts of different length, two with an image of their own and one without."""
    first, second = tiny_images(2)
    rows = [("What is it?", [first]), ("Is the path safe? Say yes or no.", [second]), ("How many?", [])]
    return records_to_dataset([make_record(f"r{i}", q, "B", images) for i, (q, images) in enumerate(rows)])


def digit_reward(completions: list, **columns: Any) -> list[float]:
    """Differs between completions."""
    return [float(len(completion[0]["content"]) % 7) for completion in completions]


def build(folder: Path, model: PreTrainedModel | None = None, data: Any = None, **options: Any) -> LatentGRPOTrainer:
    """A trainer on the CPU; arguments of the trainer itself go by their names, all others to the config."""
    given = {name: options.pop(name) for name in ("peft_config", "callbacks", "eval_dataset") if name in options}
    rewards = options.pop("rewards", digit_reward)
    fixed = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none"}
    small = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 16, "max_steps": 1}
    quiet = {"logging_steps": 1, "save_strategy": "no", "seed": 5}
    args = LatentGRPOConfig(**{**fixed, **small, **quiet, **options})
    model = eager_model() if model is None else model
    data = prompts() if data is None else data
    return LatentGRPOTrainer(model, rewards, args, data, processing_class=tiny_processor(), **given)


def rollout(trainer: LatentGRPOTrainer, groups: int = 3, seed: int = 0) -> dict[str, Any]:
    """The batch of some groups, as TRL's scoring leaves it: not shuffled."""
    torch.manual_seed(seed)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [trainer.train_dataset[i % len(trainer.train_dataset)] for i in range(groups)]
    return trainer._generate_and_score_completions([row for row in rows for _ in range(trainer.num_generations)])


def latent_mask(batch: dict[str, Any]) -> torch.Tensor:
    """`(B, C)` recorded latents of a batch."""
    length, prompt = batch["completion_ids"].shape[1], batch["prompt_ids"].shape[1]
    mask = torch.zeros(len(batch["prompt_ids"]), prompt + length, dtype=torch.bool)
    for row, places in enumerate(batch["replay_index"].tolist()):
        mask[row, [place for place in places if place >= 0]] = True
    return mask[:, prompt:]


def naive_logps(model: PreTrainedModel, batch: dict[str, Any], temperature: float = 0.9, **changed: Any) -> Any:
    """Log-probabilities `(B, C)` from the logits of the head class itself, one row and its images at a time."""
    rows, first = [], 0
    for row in range(len(batch["prompt_ids"])):
        real = torch.cat([batch["prompt_mask"][row], torch.ones_like(batch["completion_ids"][row])]).bool()
        ids = torch.cat([batch["prompt_ids"][row], batch["completion_ids"][row]])[real].unsqueeze(0)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        count = batch["num_images"][row] if "num_images" in batch else 0
        if count:
            grids = batch["image_grid_thw"]
            start = int(grids[:first].prod(-1).sum())
            inputs["image_grid_thw"] = grids[first : first + count]
            inputs["pixel_values"] = batch["pixel_values"][
                start : start + int(inputs["image_grid_thw"].prod(-1).sum())
            ]
            inputs["mm_token_type_ids"] = batch["mm_token_type_ids"][row][real].unsqueeze(0)
            first += count
        embeds, mask = torch.zeros(1, len(real), batch["replay_vectors"].shape[-1]), torch.zeros(1, len(real)).bool()
        for vector, place in zip(batch["replay_vectors"][row], batch["replay_index"][row].tolist(), strict=True):
            if place >= 0:
                embeds[0, place], mask[0, place] = vector, True
        model.model.rope_deltas = None
        logits = type(model).forward(model, **inputs, latent_embeds=embeds[:, real], latent_mask=mask[:, real]).logits
        length = batch["completion_ids"].shape[1]
        chosen = (logits[0, -length - 1 : -1] / temperature).log_softmax(-1)
        rows.append(chosen.gather(-1, ids[0, -length:, None])[:, 0])
    return torch.stack(rows)


def trained_mask(batch: dict[str, Any]) -> torch.Tensor:
    """The loss mask of a batch whose decoding forced nothing."""
    return sampled_token_mask(batch["completion_mask"], latent_mask(batch))


def policy_logps(trainer: LatentGRPOTrainer, batch: dict[str, Any], **options: Any) -> torch.Tensor:
    """The trainer's own log-probabilities of a batch."""
    trainer._replay = Replay.from_batch(batch)
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    ids, mask = (torch.cat([batch[f"prompt_{k}"], batch[f"completion_{k}"]], dim=1) for k in ("ids", "mask"))
    given = {name: batch.get(name) for name in names}
    length = batch["completion_ids"].shape[1]
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length, **given, **options)[0]


def recorded_logps(trainer: LatentGRPOTrainer, groups: int = 3) -> tuple[dict[str, Any], torch.Tensor]:
    """A rollout, and the log-probabilities at which its tokens were drawn (before top-k and the like)."""
    model, kept = trainer.accelerator.unwrap_model(trainer.model), []
    stock = model.generate

    def spy(**kwargs: Any) -> Any:
        output = stock(**kwargs)
        kept.append(torch.stack(output.logits, dim=1).float())
        return output

    model.generate = spy
    trainer.generation_config.output_logits = True
    batch = rollout(trainer, groups)
    del model.generate
    logits = kept[0][:, : batch["completion_ids"].shape[1]] / trainer.temperature
    return batch, logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
