"""The commands of `examples/evaluate.py`: run, score again, merge."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from modeling_latent import load_latent_model

from ..run_folder import RUN, RunFolder, read_json, write_whole
from ..search_runner import Workers
from .arguments import asked_of, parse_args, settings_of, variants_asked
from .evaluation_run import RUN_FORMAT, description, run_evaluation
from .model_index import draw_accuracies, model_index, write_model_card
from .published_outputs import PUBLISHED_FORMS, laser_path, merge_ranks, merged_summary, write_published
from .replies import digest_of, predictions_of
from .results import TIMINGS, write_results
from .tables import condition_line, difference_line
from .variants import Asked, Variant

RUNS = Path("runs/evaluation")
ARGUMENTS, FIGURE, MODEL_INDEX = "arguments.json", "accuracy.png", "model_index.yaml"


def run(words: Sequence[str], workers: Workers, device: str | None = None, about: str | None = None) -> Path:
    """Runs what the options ask for and prints a line a condition on the first process.

    Args:
        words: of the command line.
        workers: the processes.
        device: of this one, where there are several.
        about: text of the help.

    Returns:
        The folder of the run.
    """
    args = parse_args(words, about)
    asked = asked_of(args, print if workers.index == 0 else lambda _: None)
    variants, settings = variants_asked(args), settings_of(args)
    folder = Path(args.output_dir or _own_folder(args.model, description(asked, variants, settings)))
    place = args.device or device or ("cuda" if torch.cuda.is_available() else "cpu")

    def load(name: str) -> tuple[Any, Any]:
        revision = None if name else args.revision
        options = {"method": args.method, "adapter": "merge", "revision": revision, "trust_remote_code": True}
        model, processor = load_latent_model(name or args.model, **options)
        return model.to(place), processor

    results = run_evaluation(
        folder, asked, variants, load, settings, resume=not args.no_resume, workers=workers, progress=True
    )
    if results is not None:
        write_whole(folder / ARGUMENTS, json.dumps(list(words), indent=1) + "\n")
        _report(args, folder, asked, variants, results)
    return folder


def _own_folder(model: str, settings: dict[str, Any]) -> Path:
    """A folder that no other settings have."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return RUNS / f"{Path(model).name}-{digest}"


def _report(
    args: argparse.Namespace,
    folder: Path,
    asked: Sequence[Asked],
    variants: Sequence[Variant],
    results: dict[str, Any],
) -> None:
    seconds = read_json(folder / TIMINGS)["conditions"]
    for condition in results["conditions"]:
        print(condition_line(condition, seconds[f"{condition['benchmark']}/{condition['variant']}"]))
    for condition in results["conditions"]:
        if "against_first" in condition:
            print(difference_line(condition))
    for name, chance in {each["benchmark"]: each["chance"] for each in results["conditions"]}.items():
        if chance is not None:
            print(f"{name}: chance {chance:.1f} %")
    draw_accuracies(results, folder / FIGURE)
    write_whole(folder / MODEL_INDEX, model_index(results) + "\n")
    if args.model_card:
        print(f"metadata: {write_model_card(args.model_card, results)}")
    if args.output_file:
        print(f"predictions: {_write_predictions(args, folder, asked[0], variants[0])}")
    print(f"results: {folder / 'results.json'}, {folder / 'results.md'}, {folder / FIGURE}")


def _write_predictions(args: argparse.Namespace, folder: Path, asked: Asked, variant: Variant) -> Path:
    """The predictions of the first condition; of LASER's form a path without suffix is the root of its folders."""
    protocol, path = asked.protocol.name, Path(args.output_file)
    form = args.output_form or {"laser_plain": "laser", "default": "lavit", "dmlr_strict": "dmlr",
                                "ivtlr_chameleon": "ivtlr"}.get(protocol, protocol)  # fmt: skip
    if asked.benchmark.name in ("m3cot", "scienceqa") and args.output_form is None:
        form = "ivtlr"
    if form not in PUBLISHED_FORMS:
        raise ValueError(f"the protocol {protocol!r} has no published form; give --output_form")
    if form == "laser" and not path.suffix:
        path = laser_path(path, asked.benchmark.name, args.model, variant.options, protocol == "laser")
    predictions = predictions_of(asked, variant, RunFolder(folder, {}, RUN_FORMAT).items())
    return write_published(form, path, str(args.model), asked, predictions)


def rescore(words: Sequence[str]) -> Path:
    """`evaluate.py rescore FOLDER [options]`: scores a finished run again, without running it.

    The options of the run are kept; those that are given win, e.g. `--protocol` for another scorer.

    Raises:
        ValueError: no folder of a run, other data than were asked, a condition that was not run.
    """
    if not words or words[0].startswith("-"):
        raise ValueError("rescore needs the folder of a run: evaluate.py rescore FOLDER [--protocol NAME]")
    folder = Path(words[0])
    if not (folder / ARGUMENTS).is_file():
        raise ValueError(f"{folder} has no {ARGUMENTS}: no run was finished there; call the command of the run")
    args = parse_args([*read_json(folder / ARGUMENTS), *words[1:]])
    asked, variants = asked_of(args), variants_asked(args)
    known = read_json(folder / RUN)["settings"]["benchmarks"]
    for each in asked:
        found = known.get(each.benchmark.name, {}).get("digest")
        if found != digest_of(each.records):
            raise ValueError(f"{folder} has replies to other items of {each.benchmark.name} than these; run it again")
    lines = RunFolder(folder, {}, RUN_FORMAT).items()
    results = write_results(folder, asked, variants, str(args.model), lines)
    _report(args, folder, asked, variants, results)
    return folder


def merge(words: Sequence[str]) -> list[Path]:
    """`evaluate.py merge PATH --num_ranks N`: merges the files of the ranks of a published run, and scores them."""
    parser = argparse.ArgumentParser(prog="evaluate.py merge", description=merge.__doc__)
    parser.add_argument("path", type=Path, help="file without a rank, e.g. .../dynamic.json, or its folder")
    parser.add_argument("--num_ranks", type=int, required=True, help="number of ranks; a missing one is an error")
    parser.add_argument("--benchmark", default=None, help="whose scorer is taken; default: by the published folders")
    args = parser.parse_args(list(words))
    files = _unranked(args.path) if args.path.is_dir() else [args.path]
    for file in files:
        entries = merge_ranks(file, args.num_ranks)
        name = args.benchmark or (file.parents[2].name if len(file.resolve().parents) > 2 else "")
        print("\n".join([f"{file}: {len(entries)} entries", *merged_summary(entries, name)]))
    return files


def _unranked(folder: Path) -> list[Path]:
    """The files that the files of ranks in a folder belong to.

    Raises:
        ValueError: there are none.
    """
    names = sorted({path.name.rpartition("_rank")[0] for path in folder.glob("*_rank*.json")})
    if not names:
        raise ValueError(f"{folder} has no file of a rank, *_rank0.json; check the path")
    return [folder / f"{name}.json" for name in names]


__all__ = ["ARGUMENTS", "FIGURE", "MODEL_INDEX", "merge", "rescore", "run"]
