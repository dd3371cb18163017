"""Train the tiny base model of the maze task: a stock Qwen2.5-VL of about one million parameters, from scratch.

    python examples/train_tiny_base.py --output_dir hub_configs/maze-tiny/base --vsp_dir ../shared/data/vsp_maze

It learns to describe a map, to name the cells of a path and to answer with a plan (each directly), on 3x3 mazes
first and up to 6x6. It stands in for the stock checkpoint that a real run starts from, and is committed in
`hub_configs/maze-tiny/base`, so that the quickstart downloads nothing.
"""

import argparse
import itertools
import random
import tempfile
from collections.abc import Iterator

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Trainer, TrainingArguments

from modeling_latent import LatentProcessor
from trainers import LatentSFTCollator
from trainers.data.mazes import QUESTION, Maze, MazeGenerator, cell_name, maze_record, published_identities
from trainers.data.records import Record
from trainers.tiny import (
    build_tiny_image_processor,
    build_tiny_tokenizer,
    save_tiny_stock_checkpoint,
    tiny_qwen2_5_vl_config,
)

SIZES = (3, 4, 5, 6)
CELLS = [cell_name(cell) for cell in itertools.product(range(max(SIZES)), repeat=2)]
TILES = ["elf", "gift", "hole", "ice"]
DESCRIBE = "Describe the map row by row."
NAME_CELLS = "Name the cells of a path from the elf to the gift."
DIALOGUE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "{}<|im_end|>\n<|im_start|>assistant\n<answer>D R R</answer><|im_end|>\n"
)


def save_untrained_base(folder: str, seed: int) -> None:
    """A stock checkpoint folder with random weights; cell names, tiles and moves are single tokens."""
    texts = [DIALOGUE.format(question) for question in (QUESTION, DESCRIBE, NAME_CELLS)] * 50
    tokenizer = build_tiny_tokenizer(texts, vocab_size=560, words=[*CELLS, *TILES, *"LRUD"])
    image_processor = build_tiny_image_processor(min_pixels=28 * 28, max_pixels=28 * 28 * max(SIZES) ** 2)
    image_processor.image_mean, image_processor.image_std = [0.84, 0.92, 0.97], [0.2, 0.1, 0.1]  # of the tiles
    config = tiny_qwen2_5_vl_config(
        None,
        tokenizer,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        intermediate_size=256,
        vision_depth=1,
        vision_hidden_size=64,
        rope_theta=10.0,
        initializer_range=0.06,
        tie_word_embeddings=True,
    )
    save_tiny_stock_checkpoint(folder, tokenizer, image_processor, config, seed=seed)


def description(maze: Maze) -> str:
    """The map in words, row by row."""
    names = {"@": "elf", "*": "gift", "#": "hole", "_": "ice"}
    return "; ".join(" ".join(names[symbol] for symbol in row) for row in maze.rows())


class Lessons(torch.utils.data.IterableDataset):
    """Records in training order: a batch holds mazes of one size, to describe or to solve."""

    def __init__(self, batch_size: int, max_steps: int, seed: int, exclude: frozenset[str]) -> None:
        self.batch_size, self.max_steps, self.seed = batch_size, max_steps, seed
        self.generators = {
            size: MazeGenerator(seed=seed, split="train", sizes=(size,), exclude=exclude) for size in SIZES
        }

    def __iter__(self) -> Iterator[Record]:
        rng = random.Random(self.seed)
        for step in range(self.max_steps):
            progress = step / self.max_steps
            size = rng.randint(3, 3 if progress < 0.12 else 4 if progress < 0.3 else 6)
            weights = (4, 2, 4) if progress < 0.5 else (2, 4, 4)
            for index in range(step * self.batch_size, (step + 1) * self.batch_size):
                maze = self.generators[size].maze(index)
                record = maze_record(maze)
                lesson = rng.choices(("describe", "cells", "plan"), weights)[0]
                if lesson == "describe":
                    record.update(question=DESCRIBE, answer=description(maze))
                elif lesson == "cells":
                    record.update(question=NAME_CELLS, answer=" ".join(record["chain"]))
                yield record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="hub_configs/maze-tiny/base", help="stock checkpoint folder to write")
    parser.add_argument("--max_steps", type=int, default=1600, help="optimiser steps")
    parser.add_argument("--batch_size", type=int, default=32, help="mazes per step")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--vsp_dir", default=None, help="folder of published VSP mazes, none of which is trained on")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and mazes")
    args = parser.parse_args()

    save_untrained_base(args.output_dir, args.seed)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.output_dir, dtype=torch.float32)
    processor = LatentProcessor.from_pretrained(args.output_dir)
    exclude = published_identities(args.vsp_dir) if args.vsp_dir else frozenset()
    with tempfile.TemporaryDirectory() as scratch:
        training = TrainingArguments(
            output_dir=scratch,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": args.max_steps // 2},
            warmup_steps=50,
            adam_beta2=0.98,
            weight_decay=0.01,
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            remove_unused_columns=False,
            accelerator_config={"dispatch_batches": False},
        )
        lessons = Lessons(args.batch_size, args.max_steps, args.seed, exclude)
        collator = LatentSFTCollator(processor, latent_form="none")
        Trainer(model, training, train_dataset=lessons, data_collator=collator).train()
    model.save_pretrained(args.output_dir)
    print(f"saved {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters to {args.output_dir}")


if __name__ == "__main__":
    main()
