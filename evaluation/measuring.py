"""Measurements side by side: ratios of runs that take turns in one process, and what a fresh process takes.

A ratio says more than a time: both sides meet the same machine in the same state. Each round runs in an order that
alternates, so that a drift (frequency, cache, other processes) hits both alike.

The clock on a CPU is, with one thread, the processor time of this process: it does not count the moments in which the
system ran somebody else. With several threads it would count waiting threads as work; then, and on an accelerator,
the wall clock is read, after the device has finished.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Clock:
    """Seconds on a device.

    Args:
        device: what runs.
        kind: `"cpu"` for processor time, `"wall"` for the wall clock.
    """

    device: torch.device
    kind: str

    @classmethod
    def of(cls, device: torch.device | str) -> "Clock":
        """The clock for a device with the present number of threads."""
        device = torch.device(device)
        return cls(device, "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall")

    def now(self) -> float:
        """Seconds since some fixed moment, all work given to the device before included."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.kind == "cpu" else time.perf_counter()


class StepClock:
    """A streamer for `generate` that notes when each id comes out: the duration of the steps without the prefill."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.moments: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with the ids of each step."""
        self.moments.append(self.clock.now())

    def end(self) -> None:
        """Called at the end; there is nothing to do."""

    def median_step(self) -> float:
        """Seconds of the median decode step; the prompt, the first id and the step after it are left out."""
        moments = self.moments[3:]
        return statistics.median(later - earlier for earlier, later in zip(moments, moments[1:], strict=False))


def take_turns(
    arms: Mapping[str, Callable[[], float | None]], repeats: int, clock: Clock, warmup: int = 1
) -> dict[str, list[float]]:
    """Run every arm once a round, in an order that turns around each time.

    Args:
        arms: name to a function that does the work and returns what it measured itself, or `None` to be timed whole.
        repeats: rounds that count.
        clock: what times a function that returns `None`.
        warmup: rounds before, which do not count.

    Returns:
        One number per arm and round.
    """
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(warmup + repeats):
        for name in list(arms)[:: -1 if index % 2 else 1]:
            start = clock.now()
            value = arms[name]()
            value = clock.now() - start if value is None else value
            if index >= warmup:
                taken[name].append(value)
    return taken


@dataclass
class Ratio:
    """One line of a table: the ratio of two medians, and the bar that it has to meet.

    Args:
        name: what is divided by what.
        first, second: the measurements, one of each a round.
        bar: what the ratio has to meet, `None` for a line that is only reported.
        at_least: the bar is a lower bound.
        unit: of the measurements: `"s"`, `"MiB"` or `"tokens/s"`.
        clock: `Clock.kind`, or how else the measurements were made.
        details: shapes and counts, for the record.
    """

    name: str
    first: list[float]
    second: list[float]
    bar: float | None = None
    at_least: bool = False
    unit: str = "s"
    clock: str = "wall"
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Median of `first` over median of `second`."""
        return statistics.median(self.first) / statistics.median(self.second)

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile of the ratios of the rounds (least and greatest of fewer than four)."""
        ratios = sorted(a / b for a, b in zip(self.first, self.second, strict=True))
        if len(ratios) < 4:
            return ratios[0], ratios[-1]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
        return quartiles[0], quartiles[2]

    @property
    def met(self) -> bool | None:
        """Whether the ratio meets the bar; `None` without one."""
        if self.bar is None:
            return None
        return self.ratio >= self.bar if self.at_least else self.ratio <= self.bar

    def line(self) -> str:
        """The line of the table: name, ratio, quartiles, bar, verdict, the two medians."""
        low, high = self.spread
        bar = "no bar" if self.bar is None else f"{'>=' if self.at_least else '<='} {self.bar:g}"
        verdict = {None: "", True: "met", False: "NOT MET"}[self.met]
        medians = " / ".join(f"{statistics.median(values):.4g}" for values in (self.first, self.second))
        return (
            f"{self.name:<80} {self.ratio:6.3f} [{low:.3f}, {high:.3f}]  {bar:<8}{verdict:<8} "
            f"{medians} {self.unit} ({self.clock})"
        )

    def record(self) -> dict[str, Any]:
        """Everything as JSON-able values, raw measurements included."""
        return {**asdict(self), "ratio": self.ratio, "spread": list(self.spread), "met": self.met}


def peak_memory(device: torch.device | str) -> float:
    """Most memory that this process has held so far, in MiB: resident on a CPU, allocated on an accelerator."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss may be that of the process which started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def fresh_process(arguments: Sequence[str]) -> Any:
    """Run `python arguments...` and return the JSON value of its last line.

    Raises:
        RuntimeError: the process failed; with the end of what it wrote.
    """
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=os.environ.copy())
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def processor_seconds(code: str) -> float:
    """Processor seconds of a fresh Python process that runs `code`, start of the interpreter included.

    Raises:
        subprocess.CalledProcessError: the process failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
