"""Train the tiny base model of the maze task: a stock Qwen2.5-VL of about one million parameters, from scratch.

    python examples/train_tiny_base.py --output_dir hub_configs/maze-tiny/base --vsp_dir ../shared/data/vsp_maze

It learns direct plans (picture and question to answer, no chain) and stands in for the stock checkpoint that a real
run starts from. It is committed in `hub_configs/maze-tiny/base`, so the quickstart downloads nothing.
"""

import argparse
import itertools
import tempfile

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Trainer, TrainingArguments

from modeling_latent import LatentProcessor
from trainers import LatentSFTCollator
from trainers.data.mazes import QUESTION, cell_name, maze_stream, published_identities
from trainers.tiny import (
    build_tiny_image_processor,
    build_tiny_tokenizer,
    save_tiny_stock_checkpoint,
    tiny_qwen2_5_vl_config,
)

MAX_SIZE = 6
CELLS = [cell_name(cell) for cell in itertools.product(range(MAX_SIZE), repeat=2)]
TEXT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n<answer>D R R</answer><|im_end|>\n"
)


def save_untrained_base(folder: str, seed: int) -> None:
    """A stock checkpoint folder with random weights: cell names and moves are single tokens."""
    tokenizer = build_tiny_tokenizer([TEXT] * 50, vocab_size=560, words=[*CELLS, *"LRUD"])
    image_processor = build_tiny_image_processor(min_pixels=28 * 28, max_pixels=28 * 28 * MAX_SIZE**2)
    config = tiny_qwen2_5_vl_config(
        None, tokenizer, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=4, intermediate_size=256,
        vision_depth=1, vision_hidden_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    save_tiny_stock_checkpoint(folder, tokenizer, image_processor, config, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="hub_configs/maze-tiny/base", help="stock checkpoint folder to write")
    parser.add_argument("--max_steps", type=int, default=900, help="optimiser steps")
    parser.add_argument("--batch_size", type=int, default=64, help="mazes per step")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak learning rate (cosine)")
    parser.add_argument("--vsp_dir", default=None, help="folder of published VSP mazes, none of which is trained on")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and mazes")
    args = parser.parse_args()

    save_untrained_base(args.output_dir, args.seed)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.output_dir, dtype=torch.float32)
    processor = LatentProcessor.from_pretrained(args.output_dir)
    with tempfile.TemporaryDirectory() as scratch:
        training = TrainingArguments(
            output_dir=scratch, max_steps=args.max_steps, per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=100, adam_beta2=0.98,
            weight_decay=0.01, logging_steps=50, save_strategy="no", report_to="none", seed=args.seed,
            use_cpu=not torch.cuda.is_available(), remove_unused_columns=False, dataloader_num_workers=1,
            bf16=False, accelerator_config={"dispatch_batches": False},
        )  # fmt: skip
        exclude = published_identities(args.vsp_dir) if args.vsp_dir else frozenset()
        mazes = maze_stream(seed=args.seed, split="train", exclude=exclude)
        collator = LatentSFTCollator(processor, latent_form="none")
        Trainer(model, training, train_dataset=mazes, data_collator=collator).train()
    model.save_pretrained(args.output_dir)
    print(f"saved {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters to {args.output_dir}")


if __name__ == "__main__":
    main()
