"""The whole path in a few minutes on a CPU: a vision-language model learns to reason in latent steps on mazes.

    python examples/quickstart.py

Loads the committed tiny base (a stock Qwen2.5-VL), makes it a latent model, trains it with LASER (arXiv 2601.06803),
saves
it, loads the saved folder in a fresh process in which this library cannot be imported, scores it on held-out mazes
(and on the published ones when their folder is there), and draws one picture.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from evaluation.benchmarks.mazes import MazeReport, evaluate_mazes
from evaluation.figures import draw_maze_page
from evaluation.statistics import paired_bootstrap_difference
from modeling_latent import convert_stock_checkpoint
from trainers import LatentSFTConfig, LatentSFTTrainer
from trainers.data.mazes import maze_dataset, maze_of_record, maze_stream, published_identities, read_published_mazes
from trainers.data.records import record_from_row

ROOT = Path(__file__).resolve().parents[1]
VSP_DIR = os.environ.get("LATENT_VSP_DIR", str(ROOT.parent / "shared" / "data" / "vsp_maze"))

# Runs in a fresh process: transformers, torch and pillow only; importing the library fails there.
LOAD_ELSEWHERE = """
import json, sys
for name in ("modeling_latent", "trainers", "evaluation"):
    sys.modules[name] = None
from PIL import Image
from transformers import AutoModel, AutoProcessor
folder, picture, question = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
ids = model.generate(**inputs, latent_strategy="dynamic", max_new_tokens=64, do_sample=False)
print(json.dumps(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()))
"""


def train(model: torch.nn.Module, processor: object, args: argparse.Namespace, exclude: frozenset[str]) -> None:
    """LASER on generated mazes, none of which is published or held out."""
    config = LatentSFTConfig(
        output_dir=str(args.output_dir / "training"),
        max_steps=args.max_steps,
        per_device_train_batch_size=16,
        latent_exposure="own",
        latent_exposure_prob=0.75,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.01,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        activation_checkpointing=False,
        dataloader_num_workers=1,
    )
    mazes = maze_stream(seed=args.seed, split="train", exclude=exclude)
    trainer = LatentSFTTrainer(model=model, args=config, train_dataset=mazes, processing_class=processor)
    trainer.train()


def load_elsewhere(folder: Path, record: dict) -> str:
    """What the saved folder answers in a fresh process without the library."""
    picture = folder.parent / "one_maze.png"
    record["images"][0].save(picture)
    command = [sys.executable, "-c", LOAD_ELSEWHERE, str(folder), str(picture), record["question"]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    if done.returncode:
        raise RuntimeError(f"loading {folder} in a fresh process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(name: str, first: MazeReport, second: MazeReport) -> None:
    """Paired difference of two conditions on the same mazes."""
    diff = [100 * value for value in paired_bootstrap_difference(first.correct, second.correct)]
    print(f"  {name}: {diff[0]:+.1f} points, 95 % interval [{diff[1]:+.1f}, {diff[2]:+.1f}]")


def typical(records: list[dict], sizes: list[int], size: int) -> int:
    """Index of a maze of a size whose plan has the median length: what is shown is not picked by its score."""
    indices = sorted((i for i, n in enumerate(sizes) if n == size), key=lambda i: len(records[i]["answer"]))
    return indices[len(indices) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", default=str(ROOT / "hub_configs" / "maze-tiny" / "base"), help="stock checkpoint folder"
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "quickstart", help="where to write")
    parser.add_argument("--max_steps", type=int, default=600, help="optimiser steps of 16 mazes")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--num_mazes", type=int, default=200, help="held-out mazes to score")
    parser.add_argument("--vsp_dir", default=VSP_DIR, help="folder of the published VSP mazes; skipped when absent")
    parser.add_argument("--seed", type=int, default=0, help="seed of training data and batches")
    args = parser.parse_args()
    started = time.time()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))  # one core draws mazes

    model, processor = convert_stock_checkpoint(args.base, method="laser", dtype=torch.float32)
    published = read_published_mazes(args.vsp_dir, cell_pixels=28) if Path(args.vsp_dir).is_dir() else []
    exclude = published_identities(args.vsp_dir) if published else frozenset()
    held_out = [record_from_row(row) for row in maze_dataset(args.num_mazes, seed=123, split="test", exclude=exclude)]
    options = {"latent_strategy": "dynamic", "max_latent_steps": 16}
    untrained = evaluate_mazes("held-out, before training", model, processor, held_out, **options)

    train(model, processor, args, exclude)
    folder = args.output_dir / "laser-maze"
    model.generation_config.max_latent_steps = 16
    model.save_pretrained(folder)
    processor.save_pretrained(folder)

    trained = evaluate_mazes("held-out, latents on", model, processor, held_out, **options)
    switched_off = evaluate_mazes("held-out, span switched off", model, processor, held_out, latent_strategy="off")
    reports = [untrained, trained, switched_off]
    if published:
        reports.append(evaluate_mazes("published, latents on", model, processor, published, **options))
        reports.append(
            evaluate_mazes("published, span switched off", model, processor, published, latent_strategy="off")
        )
    print()
    for report in reports:
        print(report.line())
    print(f"{'chance (random shortest plans)':<34} {100 * trained.chance:5.1f} %")
    compare("trained minus before training", trained, untrained)
    compare("latents on minus span switched off", trained, switched_off)

    again = load_elsewhere(folder, held_out[0])
    same = "the same" if again == trained.predictions[0].text else "ANOTHER"
    print(f"\nloaded with AutoModel in a fresh process without the library: {again!r} ({same} answer)")
    shown = [typical(held_out, trained.sizes, size) for size in sorted(set(trained.sizes))]
    picture = draw_maze_page(
        [maze_of_record(held_out[i]) for i in shown],
        [trained.predictions[i].text for i in shown],
        [trained.predictions[i].latent_path for i in shown],
        [trained.correct[i] for i in shown],
        args.output_dir / "mazes.png",
    )
    print(f"model: {folder}\npicture: {picture}\n{time.time() - started:.0f} seconds")


if __name__ == "__main__":
    main()
