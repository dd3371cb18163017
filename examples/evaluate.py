"""Accuracy of a latent model on mazes: generated held-out ones, and the published ones when their folder is given.

    python examples/evaluate.py --model runs/quickstart/laser-maze --vsp_dir ../shared/data/vsp_maze
    python examples/evaluate.py --model runs/lvr-maze-grpo --strategies fixed --compare runs/lvr-maze  # paired

Every condition is one line: accuracy with its 95 % Wilson interval, accuracy by size, mean latent steps and generated
positions; differences to the first condition, and to another model, with a paired bootstrap interval.
"""

import argparse
import json
from pathlib import Path

import torch

from evaluation.benchmarks.mazes import MazeReport, evaluate_mazes
from evaluation.statistics import paired_bootstrap_difference
from modeling_latent import load_latent_model
from trainers.data.mazes import maze_dataset, read_published_mazes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a latent or stock model, or of an adapter")
    parser.add_argument("--revision", default=None, help="branch, tag or commit of a Hub id")
    parser.add_argument("--num_mazes", type=int, default=200, help="generated mazes of the test split")
    parser.add_argument("--seed", type=int, default=123, help="seed of the generated mazes")
    parser.add_argument("--vsp_dir", default=None, help="folder of the published VSP mazes")
    parser.add_argument(
        "--strategies", nargs="+", default=["dynamic", "off"], help="conditions, the first is the reference"
    )
    parser.add_argument("--num_latent_steps", type=int, default=None, help="slots of a span for 'fixed'")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="budget of a reply, slots included")
    parser.add_argument("--temperature", type=float, default=0.0, help="sample one reply a maze; 0 is greedy")
    parser.add_argument("--compare", default=None, help="another model on the same mazes")
    parser.add_argument("--compare_strategy", default=None, help="its strategy; default: the first of --strategies")
    parser.add_argument("--batch_size", type=int, default=50, help="prompts per call of generate")
    parser.add_argument("--output", default=None, help="write predictions and accuracies to this JSON file")
    args = parser.parse_args()

    conditions = [(args.model, args.revision, strategy) for strategy in args.strategies]
    if args.compare:
        conditions.append((args.compare, None, args.compare_strategy or args.strategies[0]))
    models = {}
    for name, revision, _ in conditions:
        if name not in models:  # a stock model is made latent, for `--strategies off`
            models[name] = load_latent_model(
                name, method="laser", adapter="merge", revision=revision, trust_remote_code=True
            )
    sets = {"held-out": list(maze_dataset(args.num_mazes, seed=args.seed, split="test"))}
    if args.vsp_dir:
        sets["published"] = read_published_mazes(args.vsp_dir, cell_pixels=28)
    results = {}
    for name, records in sets.items():
        reports = []
        for model, _, strategy in conditions:
            options = {"max_new_tokens": args.max_new_tokens, "latent_strategy": strategy}
            if strategy == "fixed" and args.num_latent_steps:
                options["num_latent_steps"] = args.num_latent_steps
            if args.temperature > 0:
                options |= {"do_sample": True, "temperature": args.temperature, "top_k": 0}
                torch.manual_seed(args.seed)
            other = f", {Path(model).name}" if model != args.model else ""
            report = evaluate_mazes(
                f"{name}, latents {strategy}{other}", *models[model], records, args.batch_size, **options
            )
            print(report.line())
            reports.append(report)
            results[report.name] = summary(report)
        print_differences(reports)
        print(f"{name}: chance {100 * reports[0].chance:.1f} %")
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n")


def print_differences(reports: list[MazeReport]) -> None:
    """Difference of the first condition to every other, on the same mazes."""
    first, *others = reports
    for other in others:
        diff = paired_bootstrap_difference(first.correct, other.correct)
        points = [100 * value for value in diff]
        print(f"  {first.name} minus {other.name}: {points[0]:+.1f} points [{points[1]:+.1f}, {points[2]:+.1f}]")


def summary(report: MazeReport) -> dict:
    """A report as JSON."""
    return {
        "accuracy": report.accuracy,
        "by_size": report.by_size(),
        "chance": report.chance,
        "predictions": [vars(p) | {"correct": c} for p, c in zip(report.predictions, report.correct, strict=True)],
    }


if __name__ == "__main__":
    main()
