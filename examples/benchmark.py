"""Ratios of two runs side by side in one process: medians and spread over repeats.

    python examples/benchmark.py laser --repeats 7 --json runs/benchmark.json

Random models built in code; nothing is downloaded. A ratio is taken pair by pair, so a slow moment hits both.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional

from modeling_latent import LatentQwen2_5_VLConfig, LatentQwen2_5_VLForConditionalGeneration
from trainers.losses.dwal import DwalOptions, dwal_loss, find_latent_rows, fused_dwal_loss
from trainers.tiny import TINY_TEXTS, build_tiny_tokenizer, tiny_qwen2_5_vl_config


@dataclass
class Row:
    """One line of the table: median and extremes of the ratio, and the medians in seconds."""

    name: str
    ratio: float
    low: float
    high: float
    first_s: float
    second_s: float


def paired(name: str, first: Callable[[], None], second: Callable[[], None], repeats: int) -> Row:
    """Time `first` and `second` in turn; the ratio is first / second."""
    first(), second()
    times = []
    for _ in range(repeats):
        pair = []
        for run in (first, second):
            start = time.perf_counter()
            run()
            pair.append(time.perf_counter() - start)
        times.append(pair)
    ratios = [a / b for a, b in times]
    middle = [statistics.median(column) for column in zip(*times, strict=True)]
    return Row(name, statistics.median(ratios), min(ratios), max(ratios), *middle)


def build_model(hidden_size: int, num_layers: int, vocab_size: int) -> LatentQwen2_5_VLForConditionalGeneration:
    """A random latent Qwen2.5-VL; its last three token ids are the markers."""
    tokenizer = build_tiny_tokenizer(TINY_TEXTS)
    stock = tiny_qwen2_5_vl_config(
        vocab_size, tokenizer, hidden_size=hidden_size, num_layers=num_layers, num_heads=8, num_kv_heads=4
    )
    config = LatentQwen2_5_VLConfig.from_stock(
        stock,
        method="laser",
        latent_start_token_id=vocab_size - 3,
        latent_token_id=vocab_size - 2,
        latent_end_token_id=vocab_size - 1,
    )
    torch.manual_seed(0)
    return LatentQwen2_5_VLForConditionalGeneration(config).eval()


def decode_step(model: LatentQwen2_5_VLForConditionalGeneration, repeats: int, label: str) -> Row:
    """64 latent steps against 64 text steps of the same model without latents, batch 4, dynamic cache."""
    ids = torch.randint(10, 200, (4, 64))
    common = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 65, "min_new_tokens": 65}

    def latent() -> None:
        model.generate(**common, do_sample=False, latent_strategy="fixed", num_latent_steps=64, force_span=True)

    def text() -> None:
        model.generate(**common, do_sample=False, latent_strategy="off")

    return paired(f"latent decode step / text decode step, {label}", latent, text, repeats)


def batched(model: LatentQwen2_5_VLForConditionalGeneration, repeats: int, label: str) -> Row:
    """8 single rows against the same rows as one left-padded batch with spans of 1 to 8 slots."""
    lengths, slots = [20 + 5 * i for i in range(8)], list(range(1, 9))
    prompts = [torch.randint(10, 200, (n,)) for n in lengths]
    width = max(lengths)
    ids = torch.stack([functional.pad(p, (width - len(p), 0), value=0) for p in prompts])
    mask = torch.stack([functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts])
    options = {"do_sample": False, "max_new_tokens": 32, "min_new_tokens": 32, "latent_strategy": "fixed"}

    def single() -> None:
        for prompt, count in zip(prompts, slots, strict=True):
            row = prompt[None]
            model.generate(
                input_ids=row, attention_mask=torch.ones_like(row), num_latent_steps=count, force_span=True, **options
            )

    def batch() -> None:
        model.generate(input_ids=ids, attention_mask=mask, num_latent_steps=slots, force_span=True, **options)

    return paired(f"8 single rows / batch of 8 mixed rows, {label}", single, batch, repeats)


def fused_dwal(repeats: int, vocab_size: int = 152_064, hidden_size: int = 128, tokens: int = 2_048) -> Row:
    """Fused DWAL against the naive form, which builds logits for all positions; one position in ten is a concept."""
    ids = torch.randint(10, vocab_size, (4, tokens // 4))
    for start in (20, 150, 280, 410):
        ids[:, start], ids[:, start + 51] = 3, 5
    rows = find_latent_rows(ids, start_id=3, end_id=5, window_size=16)
    options = DwalOptions(window_size=16)
    hidden = torch.randn(4, tokens // 4, hidden_size, requires_grad=True)
    weight = (torch.randn(vocab_size, hidden_size) * 0.02).requires_grad_()

    def fused() -> None:
        fused_dwal_loss(rows.select(hidden), weight, None, rows, options).loss.backward()

    def naive() -> None:
        logits = functional.linear(hidden, weight).float()
        dwal_loss(rows.select(logits), rows, options).loss.backward()

    return paired("fused DWAL / naive DWAL on full logits", fused, naive, repeats)


def laser(repeats: int) -> list[Row]:
    """The rows that apply to LASER."""
    small, medium = build_model(64, 2, 1_024), build_model(512, 8, 32_000)
    return [
        decode_step(small, repeats, "hidden 64"),
        decode_step(medium, repeats, "hidden 512"),
        batched(small, repeats, "hidden 64"),
        batched(medium, repeats, "hidden 512"),
        fused_dwal(repeats),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["laser"], help="which rows to run")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs per row")
    parser.add_argument("--json", type=Path, default=None, help="write the rows to this file")
    args = parser.parse_args()
    rows = laser(args.repeats)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.repeats} pairs a row")
    for row in rows:
        print(
            f"{row.name:<56} {row.ratio:6.3f}  [{row.low:.3f}, {row.high:.3f}]"
            f"  {row.first_s:8.3f} s / {row.second_s:8.3f} s"
        )
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
