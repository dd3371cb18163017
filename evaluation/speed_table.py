"""The table behind `examples/benchmark.py`: rows by method, how they are measured, the command line and the JSON.

A method adds its lines with `@row("method")`, on a function of [`Settings`] that returns [`Ratio`]s; the name of the
function is the name of the row. What has to run in a process of its own (peak memory) is a function with
`@in_process`, called through [`in_fresh_process`]. Nothing else is edited.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from .measuring import Clock, Ratio, fresh_process


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        repeats: rounds per row.
        device: `"cpu"` or `"cuda"`.
        threads: of torch on a CPU.
        quick: small shapes, to see that the rows run; the bars say nothing then.
        paper: also time what a paper describes, where the rows compare what its code does (`dmlr`).
    """

    repeats: int = 7
    device: str = "cpu"
    threads: int = 1
    quick: bool = False
    paper: bool = False

    @property
    def clock(self) -> Clock:
        """What times a run."""
        return Clock.of(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of models and losses: float32 on a CPU, bfloat16 on an accelerator."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def small(self, value: Any, quick: Any) -> Any:
        """`value`, or in quick mode `quick`."""
        return quick if self.quick else value


RowFunction = Callable[[Settings], list[Ratio]]
Measurement = Callable[[Settings, str], float]
ROWS: dict[str, dict[str, RowFunction]] = {}
IN_PROCESS: dict[str, Measurement] = {}


def row(method: str) -> Callable[[RowFunction], RowFunction]:
    """Decorator: lines of the table of a method, under the name of the function."""

    def add(function: RowFunction) -> RowFunction:
        ROWS.setdefault(method, {})[function.__name__] = function
        return function

    return add


def in_process(function: Measurement) -> Measurement:
    """Decorator: a measurement `(settings, arm) -> number` for [`in_fresh_process`]."""
    IN_PROCESS[function.__name__] = function
    return function


def in_fresh_process(function: Measurement, settings: Settings, arm: str) -> float:
    """The measurement of one arm, by the script (or module of this package) that defines `function`, in a process of
    its own.

    Raises:
        RuntimeError: the process failed.
    """
    module = function.__module__
    script = ["-m", module] if module.startswith(f"{__package__}.") else [sys.modules[module].__file__]
    call = {"function": function.__name__, "arm": arm, "settings": asdict(settings)}
    return fresh_process([*script, "--in_process", json.dumps(call)])


def environment(settings: Settings) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    import trl  # the rows of training run on it

    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    gpu = torch.cuda.get_device_name() if settings.device == "cuda" else None
    return {
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"system": platform.platform(), "gpu": gpu},
        "dtype": str(settings.dtype),
        **asdict(settings),
    }


def run(arguments: list[str] | None = None, description: str | None = None) -> list[Ratio]:
    """The command line: run the rows of a method, print the table, write the JSON.

    Args:
        arguments: of the command; default those of this process.
        description: for `--help`.

    Returns:
        The lines of the table; empty in the fresh process of one measurement, which prints its result.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--in_process"]:
        call = json.loads(arguments[1])
        settings = _begin(Settings(**call["settings"]))
        print(json.dumps(IN_PROCESS[call["function"]](settings, call["arm"])))
        return []
    args = _parse(arguments, description)
    settings = _begin(Settings(args.repeats, args.device, args.threads, args.quick, args.paper))
    facts, lines = environment(settings), []
    print(json.dumps(facts))
    for name in args.rows or ROWS[args.method]:
        torch.manual_seed(0)
        for line in ROWS[args.method][name](settings):
            line.bar = None if settings.quick else line.bar
            lines.append(line)
            print(line.line(), flush=True)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"method": args.method, "environment": facts, "rows": [line.record() for line in lines]}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return lines


def _begin(settings: Settings) -> Settings:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    return settings


def _parse(arguments: list[str], description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=sorted(ROWS), help="whose rows to run")
    parser.add_argument("--rows", nargs="+", default=None, metavar="ROW", help="only these rows")
    parser.add_argument("--repeats", type=int, default=Settings.repeats, help="rounds per row")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=Settings.device)
    parser.add_argument("--threads", type=int, default=Settings.threads, help="threads of torch on a CPU")
    parser.add_argument("--quick", action="store_true", help="small shapes: see that the rows run")
    parser.add_argument("--paper", action="store_true", help='dmlr: also mode="paper", with 1 and 8 noise samples')
    parser.add_argument("--json", type=Path, default=None, help="write everything measured to this file")
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.rows or ()) - set(ROWS[args.method]))
    if unknown:
        parser.error(f"--rows: {args.method} has no {unknown}; choose from {list(ROWS[args.method])}")
    for name in ("repeats", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; give 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device was found; leave it out to measure on the CPU")
    return args
