"""Accuracy of a latent model on mazes: generated held-out ones, and the published ones when their folder is given.

    python examples/evaluate.py --model runs/quickstart/laser-maze --vsp_dir ../shared/data/vsp_maze
    python examples/evaluate.py --model runs/lvr-maze-grpo --strategies fixed --compare runs/lvr-maze  # paired
    python examples/evaluate.py --model runs/lavit-maze --strategies learned learned:mask_latents off
    python examples/evaluate.py --model hub_configs/maze-tiny/base --strategies off search:max_num_steps=5 --vote 32

Every condition is one line: accuracy with its 95 % Wilson interval, accuracy by size, mean latent steps and generated
positions; differences to the first condition, and to another model, with a paired bootstrap interval.
"""

import argparse

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
from evaluation.thoughts import PLACES
from trainers.data.mazes import maze_dataset, read_published_mazes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_condition_arguments(parser, ("dynamic", "off"), max_new_tokens=64, batch_size=50)
    parser.add_argument("--num_mazes", type=int, default=200, help="generated mazes of the test split")
    parser.add_argument("--seed", type=int, default=123, help="seed of the generated mazes")
    parser.add_argument("--vsp_dir", default=None, help="folder of the published VSP mazes")
    parser.add_argument("--temperature", type=float, default=0.0, help="sample one reply a maze; 0 is greedy")
    parser.add_argument("--vote", type=int, nargs="+", default=[], metavar="N", help="also the plan that most of N "
        "sampled replies say (at --temperature, or 1), of the first strategy")  # fmt: skip
    parser.add_argument("--thoughts", choices=PLACES, default=PLACES[0], help="thought tokens of the strategy search: "
        "placeholders at the end of the user's turn, last tokens of the question, or behind the prompt")  # fmt: skip
    args = parser.parse_args()
    if any(number < 1 for number in args.vote):
        raise ValueError(f"--vote {args.vote}: give numbers of replies, 1 or more")

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
            options = {"max_new_tokens": args.max_new_tokens, "thoughts": args.thoughts}
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
