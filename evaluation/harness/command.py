"""The benchmark side of `examples/evaluate.py`: options, and what they run."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modeling_latent import load_latent_model
from trainers.data.answers import LASER, score_letter, score_yes_no
from trainers.data.records import RecordReport

from ..benchmarks.benchmark import DEFAULT_PROTOCOL, Benchmark
from ..benchmarks.registry import BENCHMARKS, benchmark
from ..run_folder import RunFolder, write_whole
from ..runner import Prediction
from ..search_runner import Workers
from .evaluation_run import RUN_FORMAT, EvaluationSettings, item_key, run_evaluation
from .model_index import draw_accuracies, model_index
from .published_outputs import PUBLISHED_FORMS, merge_ranks, merged_summary, write_published
from .results import condition_line, write_results
from .variants import Asked, Variant, variants_of

PUBLISHED_SWITCHES = {"force_lvr": "learned:force_latents", "mask_lvr": "learned:mask_latents"}


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of an evaluation on benchmarks; published spellings are aliases."""
    add = parser.add_argument
    add("--benchmark", "--benchmarks", "--dataset", nargs="+", default=None, metavar="NAME",
        help=f"benchmarks: {', '.join(BENCHMARKS)}")  # fmt: skip
    add("--data_root", "--data_path", nargs="+", default=None, help="folder, file or Hub id of each benchmark; one "
        "folder for several holds a folder of each name; default: its published source")  # fmt: skip
    add("--task_name", nargs="+", default=None, help="tasks of a benchmark that has some (BLINK)")
    add("--image_folder", default=None, help="where relative paths of images begin")
    add("--max_samples", type=int, default=None, help="only the first so many items of each")
    add("--max_bad_share", type=float, default=0.01, help="share of bad rows above which the script stops")
    add(
        "--protocol", default=None, help="how items are asked and scored: default, laser, lvr, lavit, ivtlr, dmlr, ..."
    )
    add(
        "--with_inst",
        action="store_true",
        help="published spelling of --protocol laser (its queries with instruction)",
    )
    add("--max_latent_steps", nargs="+", type=int, default=None, help="caps on the slots of a span, a run for each")
    add("--output_dir", default="runs/evaluation", help="folder of the run; it is gone on with after a kill")
    add("--overwrite", action="store_true", help="refuse to go on with a folder that has results already")
    add("--output_file", default=None, help="also the first condition's predictions as published")
    add("--output_form", choices=PUBLISHED_FORMS, default=None, help="their form; default: of the protocol, or laser")
    for switch, meaning in PUBLISHED_SWITCHES.items():
        add(f"--{switch}", action="store_true", help=f"published spelling of --strategies {meaning}")


def run_benchmarks(args: argparse.Namespace, workers: Workers) -> dict[str, Any] | None:
    """Runs the benchmarks that the options ask for; prints a line a condition on the first process."""
    asked, variants = asked_of(args), _variants(args)
    settings = EvaluationSettings(
        str(args.model), args.batch_size, args.max_new_tokens, args.temperature, args.seed, args.thoughts
    )

    def load() -> tuple[Any, Any]:
        options = {"method": args.method, "adapter": "merge", "revision": args.revision, "trust_remote_code": True}
        model, processor = load_latent_model(args.model, **options)
        return model.to(args.device), processor

    results = run_evaluation(
        args.output_dir, asked, variants, load, settings, resume=not args.overwrite, workers=workers, progress=True
    )
    if results is not None:
        _report(args, asked, variants, results)
    return results


def asked_of(args: argparse.Namespace) -> list[Asked]:
    """The benchmarks of the options with their records; says which rows were left out."""
    names = [benchmark(name).name for name in args.benchmark]
    roots = _roots(names, args.data_root)
    protocol = args.protocol or ("laser" if args.with_inst else DEFAULT_PROTOCOL)
    found = []
    for name, root in zip(names, roots, strict=True):
        bench = benchmark(name)
        chosen = bench.protocol(protocol)
        report = RecordReport(args.max_bad_share)
        records = _read(bench, root, args, report)
        report.check()
        if report.num_bad or report.skip_reasons:
            print(f"{name}: {report.summary()}")
        found.append(Asked(bench, chosen, records))
    return found


def _read(bench: Benchmark, root: str | None, args: argparse.Namespace, report: RecordReport) -> list[Any]:
    options: dict[str, Any] = {"tasks": args.task_name if bench.tasks else None, "image_folder": args.image_folder}
    if bench.name == "mazes":
        options |= {"num": args.num_mazes, "seed": args.seed}
    return bench.read(root, report=report, max_samples=args.max_samples, **options)


def _roots(names: Sequence[str], given: Sequence[str] | None) -> list[str | None]:
    """Where each benchmark is.

    Raises:
        ValueError: another number of places than benchmarks.
    """
    if not given:
        return [None] * len(names)
    if len(given) == len(names):
        return list(given)
    folders = [Path(given[0]) / name for name in names]
    missing = [str(folder) for folder in folders if not folder.exists()]
    if len(given) > 1 or missing:
        raise ValueError(
            f"--data_root {list(given)} for the benchmarks {list(names)}: give one place a benchmark, or one folder "
            f"that holds a folder of each name (missing: {missing})"
        )
    return [str(folder) for folder in folders]


def _variants(args: argparse.Namespace) -> list[Variant]:
    switches = [switch for switch in PUBLISHED_SWITCHES if getattr(args, switch)]
    strategies = args.strategies
    if switches:
        options = [PUBLISHED_SWITCHES[switch].partition(":")[2] for switch in switches]
        strategies = [f"learned:{','.join(options)}"]
    numbers = None if args.num_latent_steps is None else [args.num_latent_steps]
    steps = {"max_latent_steps": args.max_latent_steps, "num_latent_steps": numbers}
    return variants_of(strategies, steps, args.vote)


def _report(
    args: argparse.Namespace, asked: Sequence[Asked], variants: Sequence[Variant], results: dict[str, Any]
) -> None:
    folder = Path(args.output_dir)
    for condition in results["conditions"]:
        print(condition_line(condition))
    draw_accuracies(results, folder / "accuracy.png")
    write_whole(folder / "model_index.json", json.dumps(model_index(results), indent=1) + "\n")
    if args.output_file:
        first, lines = asked[0], RunFolder(folder, {}, RUN_FORMAT).items()
        predictions = _predictions(first, variants[0], lines)
        form = args.output_form or (first.protocol.name if first.protocol.name in PUBLISHED_FORMS else "laser")
        path = write_published(
            form, args.output_file, str(args.model), first.benchmark.name, first.protocol, first.records, predictions
        )
        print(f"predictions as {form} writes them: {path}")
    print(f"results: {folder / 'results.json'}, table: {folder / 'results.md'}, figure: {folder / 'accuracy.png'}")


def _predictions(asked: Asked, variant: Variant, lines: dict[Any, Any]) -> list[Prediction]:
    keys = [item_key(asked.benchmark.name, variant.name, number) for number in range(len(asked.records))]
    values = [lines[key]["prediction"] for key in keys]
    return [Prediction(**{**value, "closed_by": tuple(value["closed_by"])}) for value in values]


def rescore(args: argparse.Namespace) -> dict[str, Any]:
    """Scores a finished run again, without running it: another protocol's scorer, or a mended one."""
    asked, variants = asked_of(args), _variants(args)
    lines = RunFolder(args.output_dir, {}, RUN_FORMAT).items()
    results = write_results(args.output_dir, asked, variants, str(args.model), lines)
    _report(args, asked, variants, results)
    return results


def merge(arguments: Sequence[str]) -> None:
    """`evaluate.py merge FILE --num_ranks N`: merges the files of the ranks of a published run, and scores them."""
    parser = argparse.ArgumentParser(description=merge.__doc__)
    parser.add_argument("file", type=Path, help="the file without a rank, e.g. .../dynamic.json")
    parser.add_argument(
        "--num_ranks", type=int, required=True, help="number of ranks; one that is missing is an error"
    )
    parser.add_argument("--scorer", choices=("letter", "yes_no"), default="letter", help="of the benchmark")
    args = parser.parse_args(arguments)
    scorers: dict[str, Callable[[str, str], bool]] = {
        "letter": lambda reply, label: score_letter(reply, label, LASER),
        "yes_no": lambda reply, label: score_yes_no(reply, label, LASER),
    }
    entries = merge_ranks(args.file, args.num_ranks)
    print("\n".join(merged_summary(entries, scorers[args.scorer])))
    print(f"{len(entries)} entries: {args.file}")


__all__ = ["add_benchmark_arguments", "asked_of", "merge", "rescore", "run_benchmarks"]
