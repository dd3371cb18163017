"""Accuracy of a latent model on multiple-choice sets as published: MMVP, BLINK, MMStar, V*, and VSP's maze questions.

    python examples/evaluate_choices.py --model runs/lavit-3b --dataset mmvp --data_root data/mmvp \\
        --strategies learned learned:mask_latents learned:force_latents=false off
    python examples/evaluate_choices.py --checkpoint Svard/LaViT-3B --dataset blink --data_root data/blink \\
        --task_name IQ_Test Relative_Depth --output_file lines.jsonl --force_lvr   # published spellings

Every condition is one line: accuracy scored strictly and by the published letter rules with 95 % Wilson intervals, the
replies in which no answer was found, accuracy by category or task, latent steps and the share of replies that have
some; differences to the first condition, and to another model, with a paired bootstrap interval.
"""

import argparse

from evaluation.benchmarks.choice_records import read_choices
from evaluation.benchmarks.choice_tasks import TASKS
from evaluation.benchmarks.choices import MAX_NEW_TOKENS, evaluate_choices, write_choices
from evaluation.conditions import (
    add_condition_arguments,
    conditions_of,
    load_models,
    print_differences,
    strategy_options,
    write_reports,
)
from trainers.data.records import RecordReport

STRATEGIES = ("learned", "off")
PUBLISHED = {"force_lvr": "force_latents", "mask_lvr": "mask_latents"}  # switches to options of `learned`


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_condition_arguments(parser, STRATEGIES, max_new_tokens=MAX_NEW_TOKENS, batch_size=32)
    parser.set_defaults(strategies=None)  # STRATEGIES, unless a published switch asks for one
    add = parser.add_argument
    add("--dataset", "--task", required=True, choices=tuple(TASKS), help="what is asked")
    add("--data_root", "--data_path", required=True, help="folder of its file, or of BLINK's tasks, or the file")
    add("--task_name", nargs="+", default=None, help="tasks of BLINK; default: all that data_root has")
    add("--image_folder", default=None, help="folder that relative image paths belong to; default: of the file")
    add("--max_samples", type=int, default=None, help="only the first so many records; default: all")
    add("--max_bad_share", type=float, default=0.01, help="share of bad rows above which the script stops")
    add("--predictions", "--output_file", default=None, help="write the first condition's JSON lines as published")
    for switch, option in PUBLISHED.items():
        add(f"--{switch}", action="store_true", help=f"published spelling of --strategies learned:{option}")
    return parser


def parse_args() -> argparse.Namespace:
    """The options, with `strategies` filled in."""
    parser = build_parser()
    args = parser.parse_args()
    switches = [option for switch, option in PUBLISHED.items() if getattr(args, switch)]
    if switches and args.strategies:
        parser.error("--force_lvr and --mask_lvr stand for a strategy; write it into --strategies, or leave that out")
    args.strategies = [f"learned:{','.join(switches)}"] if switches else args.strategies or list(STRATEGIES)
    return args


def main() -> None:
    args = parse_args()
    conditions = conditions_of(args)
    latents = strategy_options(conditions, num_latent_steps=args.num_latent_steps)
    report = RecordReport(args.max_bad_share)
    records = read_choices(
        args.dataset, args.data_root, args.task_name, max_samples=args.max_samples, image_folder=args.image_folder,
        report=report,
    )  # fmt: skip
    report.check()
    print(report.summary())
    models = load_models(conditions, "lavit", args.device)
    reports = []
    for condition in conditions:
        reports.append(
            evaluate_choices(
                f"{args.dataset}, {condition.label}",
                args.dataset,
                *models[condition.model],
                records,
                batch_size=args.batch_size,
                max_new_tokens=args.max_new_tokens,
                **latents[condition.strategy],
            )
        )
        print(reports[-1].line())
    print_differences(reports)
    if args.predictions:
        print(f"{write_choices(args.predictions, records, reports[0])} predictions: {args.predictions}")
    write_reports(args.output, reports)


if __name__ == "__main__":
    main()
