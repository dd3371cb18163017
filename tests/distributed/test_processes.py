"""Two processes on this machine, by DDP, ZeRO-2 and ZeRO-3, give the losses, metrics and parameters of one process.

One launch for each way, with several short trainings (`worker.py`), then tests of what they wrote. The launches are
those of a user: `torchrun`, and `accelerate launch` with files of `hub_configs/accelerate`. Adam is torch's own under
DeepSpeed, too, because those files have no optimizer section and offload nothing: so the parameters can be compared.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from modeling_latent import LatentProcessor
from tests.distributed.data import train_data
from tests.distributed.worker import RUNS, load_base, run, save_bases
from tests.hub import ROOT
from tests.tiny import tiny_inputs, tiny_processor
from tests.trainers.staged_parts import staged_processor
from trainers import LatentSFTCollator

pytestmark = pytest.mark.distributed

LVR = ("lvr", "lvr, text on one process", "lvr, free")
STAGED = ("ivtlr", "ivtlr, bptt", "coconut, new optimizers")
LAVIT = ("lavit", "lavit, own attention")
GRPO = tuple(name for name in RUNS if RUNS[name].base == "grpo")
COMPARED = ("adamw", "own", "token", "text on one process", "dynamic", *LVR, *LAVIT, *STAGED)
METRICS = ("loss", "loss_total", "loss_ce", "grad_norm")
LASER_METRICS = (*METRICS, "loss_latent", "confused_ratio", "last_concept_ratio")
LVR_METRICS = (*METRICS, "loss_latent", "loss_mode_switch", "latent_cosine", "latent_cosine_free")
LAVIT_METRICS = (*METRICS, "loss_concept", "loss_attention", "concept_cosine", "attention_overlap")
STAGED_METRICS = (*METRICS, "stage")
TIMES = ("step_time", "runtime", "per_second")
BATCH_MEANS = ("kl", "entropy", "clip_ratio", "eval_loss")  # of bnpo, over the tokens of a batch of all processes
TIMEOUT = 600  # seconds for all runs of a launch: processes that wait for each other do so for ever

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("accelerate.commands.launch", "--main_process_port", "0", "--config_file")


@dataclass(frozen=True)
class Way:
    """A way to run two processes: launcher, trainings, and what accelerate and DeepSpeed must say of them."""

    launcher: tuple[str, ...]
    runs: tuple[str, ...]
    kind: str
    stage: int | None
    optimizer: str


WAYS = {
    "ddp": Way(TORCHRUN, (*COMPARED, *GRPO, "stream", "fsdp2"), "MULTI_CPU", None, "AdamW"),
    "zero2": Way(
        launcher=(*ACCELERATE, "hub_configs/accelerate/cpu_zero2.yaml"),
        runs=("adamw", "token", "dynamic", *LVR, *LAVIT, *STAGED, *GRPO),
        kind="DEEPSPEED",
        stage=2,
        optimizer="DeepSpeedZeroOptimizer",
    ),
    "zero3": Way(
        launcher=(*ACCELERATE, "hub_configs/accelerate/cpu_zero3.yaml"),
        runs=("adamw", "own", "token", "text on one process", *LVR, *LAVIT, *STAGED, *GRPO, "script"),
        kind="DEEPSPEED",
        stage=3,
        optimizer="DeepSpeedZeroOptimizer_Stage3",
    ),
}
NO_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def by_way(*names: str) -> pytest.MarkDecorator:
    """A test for each way and, where there are several, each of these runs that it has; ZeRO takes longer."""
    marks = {name: [NO_DEEPSPEED, pytest.mark.slow] if way.stage else [] for name, way in WAYS.items()}
    pairs = [
        pytest.param(way, name, marks=marks[way], id=f"{way}-{name}")
        for way in WAYS
        for name in names
        if name in WAYS[way].runs
    ]
    return pytest.mark.parametrize(("way", "name"), pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the models that all runs start from, and a folder for each way."""
    path = tmp_path_factory.mktemp("processes")
    save_bases(path)
    return path


@pytest.fixture(scope="module")
def one(folder: Path) -> Callable[[str], dict[str, Any]]:
    """The result of a run in one process, by its name; each is trained once."""
    (folder / "one").mkdir()
    return cache(lambda name: run(name, folder / "one"))


@pytest.fixture(scope="module")
def two(folder: Path) -> Callable[[str, str], list[dict[str, Any]]]:
    """The results of both processes, by way and run; each way is launched once, with all its runs."""

    @cache
    def launch(way: str) -> tuple[Path, str | None]:
        out = folder / way
        out.mkdir()
        worker = ["tests/distributed/worker.py", str(out), *WAYS[way].runs]
        command = [sys.executable, "-m", *WAYS[way].launcher, *worker]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=ROOT, env=env, **pipes) as launcher:
            try:
                outputs = launcher.communicate(timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                launcher.terminate()  # it ends its workers
                outputs = launcher.communicate()
        end = "".join(output[-8000:] for output in outputs)
        return out, f"{' '.join(command)}\nexit code {launcher.returncode}\n{end}" if launcher.returncode else None

    def results(way: str, name: str) -> list[dict[str, Any]]:
        out, failure = launch(way)
        if failure is not None:
            pytest.fail(failure)
        return [json.loads(path.read_text()) for path in sorted(out.glob(f"{name}-?.json"))]

    return results


def names_in(folder: Path) -> set[str]:
    """Names of the tensors in a saved model, as they are in the file."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def base_of(name: str, folder: Path) -> Path:
    """The model that a run starts from."""
    return folder / RUNS[name].base


def samples(result: dict[str, Any]) -> list[tuple[int, ...]]:
    """The token ids of all samples that a process trained on, without padding."""
    pad = tiny_processor().tokenizer.pad_token_id
    rows = [row for batch in result["seen"] for row in batch]
    return [tuple(row[: len(row) - next(i for i, token in enumerate(reversed(row)) if token != pad)]) for row in rows]


@by_way(*RUNS)
def test_the_processes_are_those_asked_for(way: str, name: str, two: Any) -> None:
    assert len(two(way, name)) == 2
    for result in two(way, name):
        found = result["distributed_type"], result["num_processes"], result["zero_stage"]
        assert found == (WAYS[way].kind, 2, WAYS[way].stage)
        assert name != "adamw" or result["optimizer"] == WAYS[way].optimizer


@by_way(*COMPARED)
def test_losses_and_metrics_are_those_of_one_process(way: str, name: str, one: Any, two: Any) -> None:
    whole, parts = one(name), two(way, name)
    assert whole["num_processes"] == 1
    if name == "dynamic":  # planned anew for two processes: each sample still once
        assert sorted(samples(parts[0]) + samples(parts[1])) == sorted(samples(whole))
        assert len(parts[0]["seen"]) == len(parts[1]["seen"]) < len(whole["seen"])
    else:
        assert [part["seen"] for part in parts] == [whole["seen"][0::2], whole["seen"][1::2]]
        shapes = [[len(batch[0]) for batch in part["seen"]] for part in parts]
        assert shapes[0] != shapes[1]
    steps = [entry for entry in whole["log"] if "loss" in entry]
    of_base = {"lvr": LVR_METRICS, "lavit": LAVIT_METRICS, "ivtlr": STAGED_METRICS, "coconut": STAGED_METRICS}
    compared = of_base.get(RUNS[name].base, LASER_METRICS)
    assert all(math.isfinite(entry[metric]) for entry in steps for metric in METRICS)
    assert name in LVR + LAVIT + STAGED or any(0 < entry["confused_ratio"] < 1 for entry in steps)
    for found, expected in zip(parts[0]["log"], whole["log"], strict=True):
        metrics = [metric for metric in expected if metric.removeprefix("eval_") in compared]
        assert {m: found[m] for m in metrics} == pytest.approx({m: expected[m] for m in metrics}, rel=1e-4)
    assert ("eval_loss_latent" in whole["log"][-1]) == (name not in STAGED + LAVIT)
    assert ("eval_loss_concept" in whole["log"][-1]) == (name in LAVIT)
    assert name not in LVR or "eval_latent_cosine_free" in whole["log"][-1]


@by_way(*STAGED)
def test_the_processes_had_different_numbers_of_latents(way: str, name: str, two: Any) -> None:
    """In some micro-batch: so they ran as many segments as the other one."""
    parts = two(way, name)
    slot = staged_processor("gpt2" if RUNS[name].base == "coconut" else "qwen2_5_vl").latent_token_id
    latents = [[max(row.count(slot) for row in batch) for batch in part["seen"]] for part in parts]
    assert sum(one != other for one, other in zip(*latents, strict=True)) > 1
    assert [entry["stage"] for entry in parts[0]["log"] if "stage" in entry][:2] == [1, 2]


@by_way(*GRPO)
def test_completions_rewards_and_losses_are_those_of_one_process(way: str, name: str, one: Any, two: Any) -> None:
    whole, parts = one(name), two(way, name)
    both = zip(*(part["seen"] for part in parts), strict=True)
    assert whole["seen"] == [first + second for first, second in both]
    steps = [entry for entry in whole["log"] if "reward" in entry]
    assert all(entry["latent/steps_mean"] > 0 and entry["reward_std"] > 0 for entry in steps)
    assert all(entry["grad_norm"] > 0 for entry in whole["log"] if "loss" in entry)
    left_out = (*TIMES, *(BATCH_MEANS if "gradient_accumulation_steps" in RUNS[name].options else ()))
    for found, expected in zip(parts[0]["log"], whole["log"], strict=True):
        metrics = [metric for metric in expected if not any(part in metric for part in left_out)]
        found = {metric: found[metric] for metric in metrics}
        assert found == pytest.approx({metric: expected[metric] for metric in metrics}, rel=1e-4, abs=1e-6)
    assert "eval_reward" in whole["log"][-1]


@by_way(*COMPARED, *GRPO)
def test_parameters_are_those_of_one_process(way: str, name: str, folder: Path, one: Any, two: Any) -> None:
    one(name), two(way, name)
    wanted, found = (load_file(folder / part / f"{name}.safetensors") for part in ("one", way))
    before = dict(load_base(base_of(name, folder)).named_parameters())
    assert set(found) == set(wanted) == set(before)
    moved = {key: (value - before[key]).abs().max().item() for key, value in wanted.items()}
    assert sum(change > 0 for change in moved.values()) > (20 if RUNS[name].base == "coconut" else 40)
    # Adam takes full steps also where a gradient is nearly nothing; rounding shows there first.
    tolerance = 1e-3 * max(moved.values())
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


@by_way("adamw", "own", "dynamic", "grpo, adamw")
def test_the_saved_folder_loads_in_one_process_and_generates(way: str, name: str, folder: Path, two: Any) -> None:
    two(way, name)
    saved = folder / way / name
    assert names_in(saved) == names_in(base_of(name, folder))  # those of the published checkpoints
    model = AutoModelForImageTextToText.from_pretrained(saved).eval()
    trained = load_file(folder / way / f"{name}.safetensors")
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(trained)
    for key, value in trained.items():
        assert torch.equal(parameters[key], value), key
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**tiny_inputs(), latent_strategy="dynamic", max_latent_steps=3, **options)
    assert output.latent_trace.num_latent_steps.tolist() == [3, 3]


@by_way("adamw")
def test_parameter_groups_survive(way: str, name: str, one: Any, two: Any) -> None:
    expected = one(name)["groups"]
    rates = [(group["name"], group["initial_lr"], group["weight_decay"]) for group in expected]
    assert rates == [
        ("main", 2e-3, 0.01),
        ("main, no decay", 2e-3, 0.0),
        ("vision", 5e-4, 0.01),
        ("vision, no decay", 5e-4, 0.0),
        ("merger", 1e-3, 0.01),
        ("merger, no decay", 1e-3, 0.0),
    ]
    for result in two(way, name):
        assert result["groups"] == expected


@by_way("stream")
def test_each_process_reads_its_own_share_of_a_stream(way: str, name: str, two: Any) -> None:
    collate = LatentSFTCollator(tiny_processor())
    even, odd = [], []  # the stream has two shards of four and three mazes
    for row in train_data("stream"):
        (odd if json.loads(row["meta"])["row"] % 2 else even).append(collate([row])["input_ids"].tolist())
    assert (len(even), len(odd)) == (4, 3)
    # The epoch ends for both when the shorter share does, and the next begins.
    assert [result["seen"] for result in two(way, name)] == [even[:3] + even[:2], odd[:3] + odd[:2]]


@by_way("script")
def test_the_example_script_trains_a_stock_checkpoint(way: str, name: str, folder: Path, two: Any) -> None:
    two(way, name)
    base, saved = ROOT / "hub_configs" / "maze-tiny" / "base", folder / way / name
    assert names_in(saved) == names_in(base)
    before, after = (load_file(path / "model.safetensors") for path in (base, saved))
    assert all(value.shape == after[key].shape for key, value in before.items())
    assert sum(not torch.equal(value, after[key]) for key, value in before.items()) > 40
    model, processor = AutoModelForImageTextToText.from_pretrained(saved), LatentProcessor.from_pretrained(saved)
    prompt = processor.tokenizer("Find a path", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert output.latent_trace.num_latent_steps.item() > 0


@by_way("fsdp2")
def test_fsdp2_gives_the_losses_and_gradients_of_the_whole_model(way: str, name: str, two: Any) -> None:
    for result in two(way, name):
        assert result["sharded"] == pytest.approx(result["whole"], rel=1e-6)
        assert len(result["gradients"]) > 50 and max(result["gradients"].values()) < 1e-5
    first, second = two(way, name)
    assert first["whole"] != pytest.approx(second["whole"], rel=1e-3)  # each process has its own batch
