"""Accuracy of a latent model on questions with stepwise rationales: M3CoT, ScienceQA, and the text sets of Coconut.

    python examples/evaluate_steps.py --model runs/ivtlr --task m3cot --data_path LightChen2333/M3CoT --split test
    python examples/evaluate_steps.py --model runs/ivtlr-qwen2vl --task scienceqa --data_path scienceqa_test.json \\
        --prompt published_inference --image_size 280 --predictions predictions.json   # weights as published
    python examples/evaluate_steps.py --model runs/coconut-graphs --task graphs --small --compare runs/cot-graphs

Every condition is one line: accuracy scored strictly and by the published rule with 95 % Wilson intervals, accuracy by
group (domain, subject or number of steps), mean latent steps and autoregressive steps; differences to the first
condition, and to another model, with a paired bootstrap interval. Graph questions are generated.
"""

import argparse

from evaluation.benchmarks.step_tasks import GRAPHS, NUM_GRAPHS, TASKS, read_task
from evaluation.benchmarks.steps import evaluate_steps, write_predictions
from evaluation.conditions import (
    add_condition_arguments,
    conditions_of,
    load_models,
    print_differences,
    strategy_options,
    write_reports,
)
from trainers.data.graphs import SMALL_GRAPHS
from trainers.data.records import Record, RecordReport
from trainers.data.staged_formats import PROMPTS, STAGED_FORMATS

GRAPH_SIZES = ("num_nodes", "num_edges", "num_entities", "path_lengths")
NOTATIONS = ("sentences", "pairs")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_condition_arguments(parser, ("staged", "off"), max_new_tokens=None, batch_size=32)
    add = parser.add_argument
    add("--num_latent_patches", type=int, default=None, help="image embeddings a slot; default: of the model")
    add("--task", required=True, choices=tuple(TASKS), help="what is asked")
    add("--data_path", default=None, help=f"file, folder or Hub id; none for {GRAPHS}")
    add("--split", default=None, help="part of a folder or Hub id, e.g. test")
    add("--image_folder", default=None, help="folder that relative image paths belong to")
    add("--max_bad_share", type=float, default=0.01, help="share of bad rows above which the script stops")
    add("--num", type=int, default=None, help=f"so many records, drawn; default: all, or {NUM_GRAPHS} graphs")
    add("--seed", type=int, default=0, help="of the draw, or of the graphs")
    add("--small", action="store_true", help="graphs of the size for tiny models")
    for name in GRAPH_SIZES:
        add(f"--{name}", type=int, nargs="+" if name == "path_lengths" else None, default=None, help="of a graph")
    add("--notation", default=None, choices=NOTATIONS, help="of a graph; pairs for a tiny model")
    add("--format", default=None, choices=tuple(STAGED_FORMATS), help="how a question is written; default: the task's")
    add("--prompt", default="training", choices=PROMPTS, help="'published_inference' for weights as published")
    add("--image_size", type=int, default=None, help="resize images to such a square (published for Qwen2-VL: 280)")
    add("--predictions", default=None, help="write the first condition's predictions in the published form")
    return parser


def read_records(args: argparse.Namespace) -> list[Record]:
    """The records that the options ask for; says which rows were left out."""
    sizes = {name: getattr(args, name) for name in (*GRAPH_SIZES, "notation") if getattr(args, name) is not None}
    report = RecordReport(args.max_bad_share)
    records = read_task(
        args.task, args.data_path, args.split, num=args.num, seed=args.seed, image_folder=args.image_folder,
        report=report, **{**(SMALL_GRAPHS if args.small else {}), **sizes},
    )  # fmt: skip
    if args.task != GRAPHS:
        report.check()
        print(report.summary())
    return records


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    task = TASKS[args.task]
    if args.predictions and task.write is None:
        parser.error(f"--predictions: {args.task} has no published form of predictions; use --output")
    conditions = conditions_of(args)
    latents = strategy_options(
        conditions, num_latent_steps=args.num_latent_steps, num_latent_patches=args.num_latent_patches
    )
    records = read_records(args)
    models = load_models(conditions, task.method, args.device)
    reports = []
    for condition in conditions:
        reports.append(
            evaluate_steps(
                f"{args.task}, {condition.label}",
                args.task,
                *models[condition.model],
                records,
                fmt=args.format,
                prompt=args.prompt,
                image_size=args.image_size,
                batch_size=args.batch_size,
                max_new_tokens=args.max_new_tokens or task.max_new_tokens,
                **latents[condition.strategy],
            )  # fmt: skip
        )
        print(reports[-1].line())
    print_differences(reports)
    if args.predictions:
        print(f"{write_predictions(args.predictions, args.task, records, reports[0])} predictions: {args.predictions}")
    write_reports(args.output, reports)


if __name__ == "__main__":
    main()
