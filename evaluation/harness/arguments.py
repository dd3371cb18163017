"""The options of `examples/evaluate.py`, with the spellings of published scripts, and what they ask for."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from modeling_latent import load_latent_model
from trainers.data.graphs import SMALL_GRAPHS
from trainers.data.records import Record, RecordReport, open_square_image
from trainers.data.staged_formats import PROMPTS, STAGED_FORMATS

from ..benchmarks.benchmark import DEFAULT_PROTOCOL, AskProtocol, Benchmark
from ..benchmarks.registry import BENCHMARKS, benchmark
from ..benchmarks.step_benchmarks import step_protocol, text_behind
from ..benchmarks.step_tasks import GRAPHS
from ..benchmarks.step_tasks import TASKS as STEP_TASKS
from ..thoughts import PLACES
from .evaluation_run import EvaluationSettings
from .preflight import strategy_of
from .published_outputs import PUBLISHED_FORMS
from .variants import Asked, Variant, variants_of

PUBLISHED_SWITCHES = {"force_lvr": "force_latents", "mask_lvr": "mask_latents"}  # options of the strategy `learned`
GRAPH_SIZES = ("num_nodes", "num_edges", "num_entities", "path_lengths")
MAZES, VSP = "mazes", "vsp"
_READ_BY = {
    "num_mazes": (MAZES,),
    "split": tuple(STEP_TASKS),
    "num": tuple(STEP_TASKS),
    "seed": (MAZES, *STEP_TASKS),
    **dict.fromkeys((*GRAPH_SIZES, "notation"), (GRAPHS,)),
}
_STRATEGIES_HELP = (
    "conditions, the first is the reference; options of one behind a colon: name:option=value,option2=value (an "
    "option alone is true); default: that of the model, and off"
)


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The options of an evaluation."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", "--checkpoint", required=True, help="folder or Hub id of a latent, published or "
                        "stock model, or of an adapter")  # fmt: skip
    parser.add_argument("--revision", default=None, help="branch, tag or commit of a Hub id")
    _add_conditions(parser.add_argument_group("conditions").add_argument)
    _add_data(parser.add_argument_group("data").add_argument)
    _add_generated(parser.add_argument_group("generated mazes and graphs").add_argument)
    _add_files(parser.add_argument_group("results").add_argument)
    return parser


def _add_conditions(add: Callable[..., Any]) -> None:
    add("--strategies", "--strategy", nargs="+", default=None, help=_STRATEGIES_HELP)
    add("--max_latent_steps", nargs="+", type=int, default=None, help="caps on the slots of a span, a condition each")
    add("--num_latent_steps", nargs="+", type=int, default=None, help="slots or learned tokens, a condition each")
    add("--num_latent_patches", nargs="+", type=int, default=None, help="image embeddings a slot, a condition each")
    for switch, option in PUBLISHED_SWITCHES.items():
        add(f"--{switch}", action="store_true", help=f"published spelling of --strategies learned:{option}")
    add("--compare", default=None, help="another model on the same items")
    add("--compare_strategy", default=None, help="its strategy; default: the first of --strategies")
    add("--max_new_tokens", type=int, default=None, help="budget of a reply; default: of the protocol")
    add("--temperature", type=float, default=0.0, help="sample one reply an item; 0 is greedy")
    add("--vote", type=int, nargs="+", default=[], metavar="N", help="also the answer that most of N sampled replies "
        "give (at --temperature, or 1), of the first condition")  # fmt: skip
    add("--thoughts", choices=PLACES, default=PLACES[0], help="thought tokens of the strategy search: placeholders at "
        "the end of the user's turn, last tokens of the question, or behind the prompt")  # fmt: skip
    add("--batch_size", type=int, default=32, help="prompts per call of generate")
    add("--device", default=None, help="where the models run; default: a GPU where there is one")
    add("--method", default=None, help="that a stock model is made latent for; default: laser, of steps their own")


def _add_data(add: Callable[..., Any]) -> None:
    add("--benchmark", "--benchmarks", "--dataset", "--task", nargs="+", default=None, metavar="NAME",
        help=f"what is asked: {', '.join(BENCHMARKS)}; default: {MAZES}")  # fmt: skip
    add("--data_root", "--data_path", nargs="+", default=None, help="folder, file or Hub id of each benchmark, or one "
        "folder that holds a folder of each name; default: the published source")  # fmt: skip
    add("--vsp_dir", default=None, help="folder of the published VSP mazes; adds the benchmark vsp")
    add("--task_name", nargs="+", default=None, help="tasks of a benchmark that has some (BLINK)")
    add("--split", default=None, help="part of a folder or Hub id of stepwise questions; default: test")
    add("--image_folder", default=None, help="where relative paths of images begin; default: the folder of the file")
    add("--max_samples", type=int, default=None, help="only the first so many items of each")
    add("--max_bad_share", type=float, default=0.01, help="share of bad rows above which the script stops")
    add("--protocol", nargs="+", default=None, help="how items are asked and scored, one for all or one a benchmark: "
        "default, laser, laser_plain, lvr, lavit, ivtlr, coconut, dmlr, ...")  # fmt: skip
    add("--with_inst", action="store_true", help="published spelling of --protocol laser: with its instruction")
    add("--format", default=None, choices=tuple(STAGED_FORMATS), help="how stepwise questions are written")
    add("--prompt", default=PROMPTS[0], choices=PROMPTS, help="of stepwise questions; the second for weights as "
        "published")  # fmt: skip
    add("--image_size", type=int, default=None, help="resize images to such a square (published for Qwen2-VL: 280)")


def _add_generated(add: Callable[..., Any]) -> None:
    add("--num_mazes", type=int, default=None, help="generated mazes of the test split; default: 200")
    add("--num", type=int, default=None, help="so many stepwise questions, drawn; of graphs, generated")
    add("--seed", type=int, default=None, help="of generated items, of the draw, and of sampling")
    add("--small", action="store_true", help="graphs of the size for tiny models")
    for name in GRAPH_SIZES:
        add(f"--{name}", type=int, nargs="+" if name == "path_lengths" else None, default=None, help="of a graph")
    add("--notation", default=None, choices=("sentences", "pairs"), help="of a graph; pairs for a tiny model")


def _add_files(add: Callable[..., Any]) -> None:
    add("--output_dir", "--output", default=None, help="folder of the run, which is gone on with after a kill; "
        "default: one below runs/evaluation, named after model and settings")  # fmt: skip
    add("--no_resume", action="store_true", help="refuse a folder that has replies already")
    add("--output_file", "--predictions", default=None, help="also the first condition's predictions as published")
    add("--output_form", choices=PUBLISHED_FORMS, default=None, help="their form; default: that of the protocol")
    add("--model_card", default=None, help="README.md of a model whose metadata get the results (model-index)")


def parse_args(words: Sequence[str], description: str | None = None) -> argparse.Namespace:
    """The options, checked against each other, with `strategies` and `method` filled in where they are known."""
    parser = build_parser(description)
    args = parser.parse_args(list(words))
    switches = [option for switch, option in PUBLISHED_SWITCHES.items() if getattr(args, switch)]
    if switches and args.strategies:
        parser.error("--force_lvr and --mask_lvr stand for a strategy; write it into --strategies, or leave that out")
    if switches:
        args.strategies = [f"learned:{','.join(switches)}"]
    if args.with_inst and args.protocol not in (None, ["laser"]):
        parser.error(f"--with_inst stands for --protocol laser, not {args.protocol}; leave one out")
    args.benchmark = _names(args)
    args.protocol = args.protocol or ["laser" if args.with_inst else DEFAULT_PROTOCOL]
    if len(args.protocol) not in (1, len(args.benchmark)):
        parser.error(f"--protocol {args.protocol} for {args.benchmark}; give one for all, or one a benchmark")
    args.protocol *= len(args.benchmark) // len(args.protocol)
    if args.output_file and len(args.benchmark) > 1:
        parser.error(f"--output_file is of one benchmark, and there are {args.benchmark}; the run's folder has all")
    first = STEP_TASKS.get(args.benchmark[0])
    args.method = args.method or (first.method if first else "laser")
    return args


def _names(args: argparse.Namespace) -> list[str]:
    names = [benchmark(name).name for name in args.benchmark or [MAZES]]
    return names + [VSP] if args.vsp_dir and VSP not in names else names


# What they ask for


def asked_of(args: argparse.Namespace, say: Callable[[str], Any] = print) -> list[Asked]:
    """The benchmarks of the options with their records; says which rows were left out.

    Raises:
        ValueError: an option that none of the benchmarks reads, an unknown protocol; see also `Benchmark.read`.
        RecordError, RecordShareError: see `Benchmark.read`.
    """
    names = args.benchmark
    benches = [benchmark(name) for name in names]
    protocols = [_protocol(*pair, args) for pair in zip(benches, args.protocol, strict=True)]
    options = _read_options(args, names)
    found = []
    for bench, root, (protocol, behind) in zip(benches, _roots(args, names), protocols, strict=True):
        report = RecordReport(args.max_bad_share)
        tasks = args.task_name if bench.tasks or not any(each.tasks for each in benches) else None
        records = bench.read(
            root, tasks=tasks, image_folder=args.image_folder, report=report, max_samples=args.max_samples,
            **options[bench.name],
        )  # fmt: skip
        report.check()
        if root is not None and report.num_good:
            say(f"{bench.name}: {report.summary()}")
        found.append(Asked(bench, protocol, records, behind))
    return found


def _protocol(bench: Benchmark, name: str, args: argparse.Namespace) -> tuple[AskProtocol, str]:
    """How a benchmark is asked, and what stands behind the latents."""
    if name not in bench.protocols:
        raise ValueError(f"{bench.name} has no protocol {name!r}; choose one of {list(bench.protocols)}")
    protocol, behind = bench.protocol(name), ""
    if args.format is not None or args.prompt != PROMPTS[0]:
        if bench.name not in STEP_TASKS:
            raise ValueError(f"--format and --prompt are of {sorted(STEP_TASKS)}, not of {bench.name}; leave them out")
        options = {"fmt": args.format, "prompt": args.prompt}
        protocol = step_protocol(bench.name, protocol.name, **options)
        behind = text_behind(bench.name, protocol.name, **options)
    if args.image_size is not None:
        protocol = replace(protocol, prepare=partial(_squared, args.image_size, protocol.prepare))
    return protocol, behind


def _squared(side: int, before: Callable[[Record], Record] | None, record: Record) -> Record:
    record = record if before is None else before(record)
    return {**record, "images": [open_square_image(image, record, side) for image in record["images"]]}


def _read_options(args: argparse.Namespace, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each benchmark the options of its reader."""
    given = {name: getattr(args, name) for name in _READ_BY if getattr(args, name) is not None}
    if args.small:
        given = {**SMALL_GRAPHS, **given}
    for option, value in given.items():
        readers = _READ_BY.get(option, (GRAPHS,))
        samples = option == "seed" and (args.temperature > 0 or args.vote)
        if not samples and not set(readers) & set(names):
            raise ValueError(f"--{option} {value} is of {', '.join(readers)}, not of {', '.join(names)}; leave it out")
    return {
        name: {
            "num" if option == "num_mazes" else option: value
            for option, value in given.items()
            if name in _READ_BY.get(option, (GRAPHS,))
        }
        for name in names
    }


def _roots(args: argparse.Namespace, names: Sequence[str]) -> list[str | None]:
    """Where each benchmark is.

    Raises:
        ValueError: another number of places than benchmarks.
    """
    given = list(args.data_root or ())
    generated = [name for name in names if name in (MAZES, GRAPHS) or name == VSP and args.vsp_dir]
    placed = names if given and len(names) == len(generated) else [each for each in names if each not in generated]
    found: Mapping[str, str] = {}
    if given and len(given) == len(placed):
        found = dict(zip(placed, given, strict=True))
    elif given:
        folders = {name: Path(given[0]) / name for name in placed}
        missing = [str(folder) for folder in folders.values() if not folder.exists()]
        if len(given) > 1 or missing:
            raise ValueError(
                f"--data_root {given} for the benchmarks {list(placed)}: give one place a benchmark, or one folder "
                f"that holds a folder of each name (missing: {missing})"
            )
        found = {name: str(folder) for name, folder in folders.items()}
    if args.vsp_dir:
        found = {VSP: args.vsp_dir, **found}
    return [found.get(name) for name in names]


def variants_asked(args: argparse.Namespace) -> list[Variant]:
    """The conditions of the options; without strategies that of the model, and `off`."""
    strategies = args.strategies
    if strategies is None:
        own = own_strategy(args.model, args.revision)
        strategies = [own] if own == "off" else [own, "off"]
    numbers = {name: getattr(args, name) for name in ("max_latent_steps", "num_latent_steps", "num_latent_patches")}
    return variants_of(strategies, numbers, args.vote, args.compare, args.compare_strategy)


def own_strategy(name: str, revision: str | None = None) -> str:
    """The strategy of a model's folder, read without its weights; `off` for a stock model."""
    try:
        model, _ = load_latent_model(name, weights=False, revision=revision, trust_remote_code=True)
    except ValueError:  # a stock model: it has no method
        return "off"
    return strategy_of(model)


def settings_of(args: argparse.Namespace) -> EvaluationSettings:
    """How replies are generated."""
    return EvaluationSettings(
        str(args.model), args.batch_size, args.max_new_tokens, args.temperature, args.seed or 0, args.thoughts
    )


__all__ = ["PUBLISHED_SWITCHES", "asked_of", "build_parser", "own_strategy", "parse_args", "settings_of",
           "variants_asked"]  # fmt: skip
