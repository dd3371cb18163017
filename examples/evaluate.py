"""Accuracy of a latent model: on benchmarks, or, without --benchmark, on held-out mazes.

    accelerate launch examples/evaluate.py --model org/laser-7b --benchmark blink mmvp --data_root data \\
        --protocol laser --strategies dynamic off --max_latent_steps 4 8     # each strategy with each number of steps
    python examples/evaluate.py --checkpoint org/lavit-3b --benchmark mmvp --data_root data/mmvp --protocol lavit \\
        --force_lvr --output_file lines.jsonl                                # published spellings, published file
    python examples/evaluate.py rescore --model org/laser-7b --benchmark mmvp --data_root data/mmvp ...
    python examples/evaluate.py merge results/.../dynamic.json --num_ranks 4
    python examples/evaluate.py --model runs/quickstart/laser-maze --vsp_dir ../shared/data/vsp_maze
    python examples/evaluate.py --model runs/lvr-maze-grpo --strategies fixed --compare runs/lvr-maze  # paired
    python examples/evaluate.py --model runs/lavit-maze --strategies learned learned:mask_latents off
    python examples/evaluate.py --model hub_configs/maze-tiny/base --strategies off search:max_num_steps=5 --vote 32

On benchmarks a run is a folder (--output_dir): killed, it goes on where it was; several processes share the items,
and their result is that of one. Accuracies have 95 % Wilson intervals, differences to the first condition on the same
items a bootstrap interval over clusters, McNemar's test, and a test of equivalence. On mazes every condition is one
line, with accuracy by size; --compare measures another model on the same ones.
"""

import argparse
import sys

import torch

from evaluation.benchmarks.mazes import MazeReport, evaluate_mazes, vote_on_mazes
from evaluation.conditions import (
    add_condition_arguments,
    conditions_of,
    load_models,
    print_differences,
    strategy_options,
    write_reports,
)
from evaluation.harness.command import add_benchmark_arguments, merge, rescore, run_benchmarks
from evaluation.search_runner import Workers
from evaluation.thoughts import PLACES
from trainers.data.mazes import maze_dataset, read_published_mazes
from trainers.teachers import teacher_processes


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_condition_arguments(parser, ("dynamic", "off"), max_new_tokens=None, batch_size=50)
    parser.add_argument("--num_mazes", type=int, default=200, help="generated mazes of the test split")
    parser.add_argument("--seed", type=int, default=123, help="seed of the generated mazes")
    parser.add_argument("--vsp_dir", default=None, help="folder of the published VSP mazes")
    parser.add_argument("--temperature", type=float, default=0.0, help="sample one reply a maze; 0 is greedy")
    parser.add_argument("--vote", type=int, nargs="+", default=[], metavar="N", help="also the plan that most of N "
        "sampled replies say (at --temperature, or 1), of the first strategy")  # fmt: skip
    parser.add_argument("--thoughts", choices=PLACES, default=PLACES[0], help="thought tokens of the strategy search: "
        "placeholders at the end of the user's turn, last tokens of the question, or behind the prompt")  # fmt: skip
    parser.add_argument("--method", default="laser", help="method that a stock model is made latent for")
    add_benchmark_arguments(parser)
    return parser


def main() -> None:
    command = sys.argv[1] if sys.argv[1:2] in (["merge"], ["rescore"]) else "run"
    if command == "merge":
        merge(sys.argv[2:])
        return
    args = build_parser().parse_args(sys.argv[2:] if command == "rescore" else sys.argv[1:])
    if any(number < 1 for number in args.vote):
        raise ValueError(f"--vote {args.vote}: give numbers of replies, 1 or more")
    if command == "rescore":
        rescore(args)
    elif args.benchmark:
        state = teacher_processes()
        args.device = str(state.device) if state.num_processes > 1 and args.device == "cuda" else args.device
        run_benchmarks(args, Workers(state.process_index, state.num_processes, state.wait_for_everyone))
    else:
        evaluate_on_mazes(args)


def evaluate_on_mazes(args: argparse.Namespace) -> None:
    """Held-out mazes, and the published ones where their folder is given."""
    conditions = conditions_of(args)
    latents = strategy_options(conditions, num_latent_steps=args.num_latent_steps)
    models = load_models(conditions, "laser", args.device)
    sets = {"held-out": list(maze_dataset(args.num_mazes, seed=args.seed, split="test"))}
    if args.vsp_dir:
        sets["published"] = read_published_mazes(args.vsp_dir, cell_pixels=28)
    all_reports = []
    for name, records in sets.items():
        reports: list[MazeReport] = []
        for condition, votes in [*((each, 0) for each in conditions), *((conditions[0], each) for each in args.vote)]:
            options = {"max_new_tokens": args.max_new_tokens or 64, "thoughts": args.thoughts}
            options |= latents[condition.strategy]
            if args.temperature > 0 or votes:
                options |= {"do_sample": True, "temperature": args.temperature or 1.0, "top_k": 0}
                torch.manual_seed(args.seed)
            label = f"{name}, {condition.label}"
            setting = (*models[condition.model], records)
            if votes:
                label += f", most of {votes}"
                reports.append(vote_on_mazes(label, *setting, votes, args.batch_size, **options))
            else:
                reports.append(evaluate_mazes(label, *setting, args.batch_size, **options))
            print(reports[-1].line(), flush=True)
        print_differences(reports)
        print(f"{name}: chance {100 * reports[0].chance:.1f} %")
        all_reports += reports
    write_reports(args.output, all_reports)


if __name__ == "__main__":
    main()
