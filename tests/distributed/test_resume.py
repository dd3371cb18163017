"""Runs of two processes (DDP, ZeRO-2 and 3) that are killed and resumed, or stopped by a bad loss of one of them."""

import json
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.hub import ROOT
from tests.trainers.killed_runs import STEPS, start
from trainers.checkpoint_files import complete_checkpoints, missing_parts

pytestmark = pytest.mark.distributed


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def two(folder: Path, points: tuple[str | None, str | None], **options: Any) -> list[int | None]:
    """Run two processes with the environment that torchrun gives; returns their exit codes.

    When one has failed, the other is killed, as torchrun does.
    """
    port, processes = free_port(), []
    for rank, point in enumerate(points):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(start(folder, point, env=env, **options))
    while all(process.exitcode is None for process in processes):
        processes[0].join(0.2)
    for process in processes:
        if any(other.exitcode for other in processes) and process.exitcode is None:
            process.join(20)  # it may be about to say what is wrong
            process.kill()
        process.join()
    return [process.exitcode for process in processes]


def facts(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"facts-{rank}.json").read_text())


def assert_same_end(found: Path, expected: Path, processes: int = 2) -> None:
    """Weights, and losses of every step, are equal, bit by bit."""
    assert facts(found) == facts(expected)
    assert facts(found)["processes"] == processes and len(facts(found)["losses"]) == STEPS
    weights, wanted = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert set(weights) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(weights[name], value), name


def zero(stage: int) -> dict[str, Any]:
    """Options of a run under DeepSpeed."""
    sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    stages = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    return {"deepspeed": {"zero_optimization": stages, **dict.fromkeys(sizes, "auto")}}


KINDS = {
    "ddp": ("DistributedType.MULTI_CPU", {}),
    "zero-2": ("DistributedType.DEEPSPEED", zero(2)),
    "zero-3": ("DistributedType.DEEPSPEED", zero(3)),
}
absent = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
by_deepspeed = [pytest.mark.compiler, pytest.mark.slow, absent]
all_kinds = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=by_deepspeed if "zero" in k else []) for k in KINDS]
)


@all_kinds
def test_two_killed_processes_resume_to_the_same_end(kind: str, tmp_path: Path) -> None:
    name, options = KINDS[kind]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert two(whole, (None, None), **options) == [0, 0]
    assert facts(whole)["type"] == name
    codes = two(part, (None, "between files"), **options)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    assert (part / "_incomplete" / "checkpoint-4").is_dir()
    assert complete_checkpoints(part) == [part / "checkpoint-2"]
    codes = two(part, ("in training", None), resume="auto", **options)
    assert codes[0] == -signal.SIGKILL and codes[1] != 0
    assert complete_checkpoints(part) == [part / "checkpoint-4"] and not list(part.glob("_*"))
    if kind != "ddp":
        (shard,) = (part / "checkpoint-4").glob("global_step*/*pp_rank_1_*optim_states.pt")
        content = shard.read_bytes()
        shard.write_bytes(content[: len(content) // 2])
        assert missing_parts(part / "checkpoint-4") == [f"{shard.name} is cut off ({len(content) // 2} bytes)"]
        shard.write_bytes(content)
    assert two(part, (None, None), resume="auto", **options) == [0, 0]
    assert_same_end(part, whole)


@pytest.mark.slow
def test_a_run_of_torchrun_resumes_too(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert two(whole, (None, None)) == [0, 0]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--module"]
    for point, newest in (("in training", 4), ("none", STEPS)):
        command = [*launcher, "tests.trainers.killed_runs", str(part), point, "auto"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert (done.returncode == 0) == (point == "none"), done.stderr
        assert ("Signal 9 (SIGKILL)" in done.stderr) == (point != "none"), done.stderr
        assert complete_checkpoints(part) == [part / f"checkpoint-{newest}"]
    assert_same_end(part, whole)


@all_kinds
def test_a_bad_loss_of_one_rank_stops_both_before_the_step(kind: str, tmp_path: Path) -> None:
    assert two(tmp_path, (None, "bad loss"), **KINDS[kind][1]) == [1, 1]
    texts = [(tmp_path / f"error-{rank}.txt").read_text() for rank in (0, 1)]
    assert texts[0] == texts[1]
    assert "the loss is not finite at optimiser step 3; the step was not taken\n  rank 1, micro-batch 2" in texts[0]
    assert "loss_latent=nan (loss_latent not finite); records: row " in texts[0] and "rank 0" not in texts[0]
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-2'};" in texts[0]
    if kind == "zero-3":  # a rank has parts of the weights only
        return
    stopped = torch.load(tmp_path / "stopped.pt")
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    for name, value in saved.items():
        assert torch.equal(stopped[name], value), name
