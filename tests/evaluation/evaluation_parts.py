"""A small evaluation for the tests: tiny model, a benchmark of a few items, and processes that end with SIGKILL."""

import itertools
import multiprocessing
import os
import signal
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from evaluation.benchmarks.benchmark import AskProtocol, Benchmark, Scored
from evaluation.benchmarks.registry import benchmark
from evaluation.harness import evaluation_run
from evaluation.harness.evaluation_run import EvaluationSettings, run_evaluation
from evaluation.harness.variants import Asked, Variant, variants_of
from evaluation.runner import Prediction, build_prompt
from evaluation.search_runner import Workers
from tests.latent import liven, tiny_latent_model
from tests.tiny import tiny_images, tiny_processor
from trainers.data.records import Record, make_record

SETTINGS = EvaluationSettings("tiny", batch_size=2, max_new_tokens=5, seed=3)


@lru_cache
def parts() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A tiny latent model whose replies differ from item to item, and its processor."""
    return liven(tiny_latent_model(latent_method="laser")), tiny_processor()


def load(name: str = "") -> tuple[PreTrainedModel, ProcessorMixin]:
    return parts()


def letter_records(number: int = 7) -> list[Record]:
    """Questions of different length with pictures of different size; two records share a picture."""
    images = tiny_images(number)
    return [
        make_record(id=f"q{i}", question="Is it safe? " * (1 + i % 3), answer="AB"[i % 2], images=[images[i // 2]],
                    choices=["yes", "no"], meta={"source": "made", "row": i, "ds_name": "letters"})
        for i in range(number)
    ]  # fmt: skip


def read_letter(record: Record, prediction: Prediction) -> Scored:
    """The first of the letters A and B in the raw reply."""
    letter = next((character for character in prediction.raw if character in "AB"), None)
    return Scored(letter == record["answer"], letter)


def never(record: Record, prediction: Prediction) -> Scored:
    return Scored(False, None)


def letters(**changes: Any) -> Benchmark:
    """A benchmark of letters with two protocols: `default`, and `never`, which can read nothing."""
    protocols = {
        name: AskProtocol(name, "test", build_prompt, score, 5, ask=lambda record: record["question"])
        for name, score in (("default", read_letter), ("never", never))
    }
    fields = {
        "name": "letters", "title": "Letters", "sources": (), "reader": lambda *_, **__: letter_records(),
        "protocols": protocols, "group": lambda record: record["answer"],
        "cluster": lambda record: str(record["meta"]["row"] // 2), "answers": lambda record: ("A", "B"),
        "gold": lambda record: record["answer"],
    }  # fmt: skip
    return Benchmark(**{**fields, **changes})


def asked(protocol: str = "default", number: int = 7) -> Asked:
    bench = letters()
    return Asked(bench, bench.protocol(protocol), letter_records(number))


def mazes(number: int = 3) -> Asked:
    bench = benchmark("mazes")
    return Asked(bench, bench.protocol(), bench.read(num=number, seed=5, sizes=(3,)))


def variants() -> list[Variant]:
    """Two strategies, one of them with two caps, and a vote: sampled replies too."""
    return variants_of(["dynamic:force_span", "off"], {"max_latent_steps": [1, 3]}, votes=[3])


def evaluate(folder: Path, workers: Workers | None = None, **options: Any) -> dict[str, Any] | None:
    """The small evaluation."""
    torch.set_num_threads(1)
    given = {"asked": [asked(), mazes()], "variants": variants(), "load": load, "settings": SETTINGS, **options}
    return run_evaluation(folder, workers=workers, **given)


# Processes that die


def _watch(folder: str, number: int, counted: Any = None) -> None:
    """Before the `number`-th file operation in the folder, or batch, the process dies; `counted` is how many came."""
    count = itertools.count(1)

    def point() -> None:
        now = next(count)
        if counted is not None:
            counted.value = now
        if now == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple) -> None:
        if event in ("open", "os.rename", "os.mkdir") and args and str(args[0]).startswith(folder):
            point()

    sys.addaudithook(hook)
    before = evaluation_run.predict

    def predict(*args: Any, **options: Any) -> list[Prediction]:
        point()
        return before(*args, **options)

    evaluation_run.predict = predict


def _run(folder: str, number: int, counted: Any) -> None:
    _watch(folder, number, counted)
    evaluate(Path(folder))


def in_process(folder: Path, number: int = 0) -> tuple[int, int]:
    """Runs the evaluation in a process of its own that dies at a point.

    Returns:
        Its exit code, and the points that it came to.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    counted = context.Value("i", 0)
    process = context.Process(target=_run, args=(str(folder), number, counted))
    process.start()
    process.join()
    return process.exitcode, counted.value
