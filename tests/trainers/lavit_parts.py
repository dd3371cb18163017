"""A tiny LaViT student with its processor, records with made signals, and its trainer."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from modeling_latent import LATENT_CLASSES, learned_tokens
from trainers import LatentSFTTrainer, LavitSFTConfig, tiny
from trainers.data.records import Record, make_record, records_to_dataset

TEACHER_WIDTH = 12
SIZES = ((84, 56), (56, 84), (112, 56), (84, 84))
ANSWERS = ("a cat", "no", "two red kites", "B")


def teacher_signals(size: tuple[int, int], seed: int) -> dict[str, Any]:
    """Random signals on the grid of image tokens of 28 pixels."""
    random, (columns, rows) = np.random.default_rng(seed), (size[0] // 28, size[1] // 28)
    return {
        "concept": {"values": random.normal(size=TEACHER_WIDTH).tolist()},
        "attention": {"values": random.random(rows * columns).tolist()},
        "grid": [rows, columns],
        "image": 0,
    }


def lavit_records(number: int = 4) -> list[Record]:
    """Images of different size, questions and answers of different length."""
    records = []
    for index in range(number):
        size = SIZES[index % len(SIZES)]
        noise = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        records.append(
            make_record(
                f"r{index}",
                "Which one is it?" if index % 2 else "What?",
                ANSWERS[index % len(ANSWERS)],
                [Image.fromarray(noise)],
                teacher=teacher_signals(size, index),
            )
        )
    return records


def lavit_processor(family: str = "qwen2_5_vl", number: int = 4) -> Any:
    """A processor with learned tokens; images may be as small as 2 x 2 image tokens."""
    return tiny.build_tiny_processor(latent_tokens=learned_tokens(number), family=family, max_pixels=112 * 112)


def lavit_parts(family: str = "qwen2_5_vl", number: int = 4, attention_head: bool = True) -> tuple[Any, Any]:
    """Model and processor."""
    processor = lavit_processor(family, number)
    stock = tiny.build_tiny_stock_model(tiny.tiny_config(family, None, processor.tokenizer), 0)
    config_class, model_class = LATENT_CLASSES[family]
    config = config_class.from_stock(
        stock.config,
        method="lavit",
        latent_learned_token_ids=processor.latent_learned_token_ids,
        concept_head_size=TEACHER_WIDTH,
        attention_head=attention_head,
    )
    torch.manual_seed(3)
    model = model_class(config)
    model.load_state_dict(stock.state_dict(), strict=False)
    return model, processor


def lavit_args(folder: Path, **options: Any) -> LavitSFTConfig:
    base: dict[str, Any] = {
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none", "activation_checkpointing": False,
        "per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "save_strategy": "no",
        "learning_rate": 1e-3, "warmup_steps": 0, "gate_steps": 4,
    }  # fmt: skip
    return LavitSFTConfig(output_dir=str(folder), **{**base, **options})


def lavit_trainer(folder: Path, parts: tuple[Any, Any] | None = None, data: Any = None, **options: Any) -> Any:
    model, processor = parts or lavit_parts()
    more = {name: options.pop(name) for name in ("peft_config", "eval_dataset") if name in options}
    data = records_to_dataset(lavit_records()) if data is None else data
    args = lavit_args(folder, **options)
    return LatentSFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor, **more)
