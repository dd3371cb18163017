"""The script that extracts teacher signals: mazes, Visual-CoT, kill and resume, two processes, published options."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples import extract_teacher as script
from tests.hub import ROOT
from tests.tiny import tiny_images
from tests.trainers.staged_parts import staged_parts
from tests.trainers.teacher_parts import contents
from trainers.data.lavit import read_lavit
from trainers.data.mazes import maze_of_record, score_plan
from trainers.data.records import RecordShareError, record_from_row
from trainers.data.teacher_signals import load_teacher_signals
from trainers.teacher_store import iter_rows, load_teacher_dataset, read_index
from trainers.tiny import save_tiny_stock_checkpoint

Run = Callable[..., str]
MAZES = ("--num_mazes=7", "--maze_sizes", "3", "--maze_seed=2")
# A random model is never right: everything is kept.
SHORT = ("--max_new_tokens=3", "--shard_size=3", "--batch_size=2", "--acceptance=none")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stock checkpoint."""
    return save_tiny_stock_checkpoint(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def run(stock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the script; returns what it printed."""

    def call(*flags: object, model: Path = stock) -> str:
        given = [str(flag) for flag in flags]
        if not any(flag.startswith("--output_dir") for flag in given):
            given.append(f"--output_dir={tmp_path / 'out'}")
        script.main([f"--model_path={model}", *given])
        return capsys.readouterr().out

    return call


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for _, row in iter_rows(folder)]


# Mazes --------------------------------------------------------------------------------------------------------------


def test_mazes_with_a_stock_teacher(run: Run, tmp_path: Path) -> None:
    printed = run(*MAZES, *SHORT)
    assert printed.splitlines() == ["7 of 7 samples accepted (100.0%)", f"saved to {tmp_path / 'out'}"]
    table = load_teacher_dataset(tmp_path / "out", decode=True)
    assert table["id"] == [f"maze-train-2-{i}" for i in range(7)]
    for row in table:
        signals = load_teacher_signals(record_from_row(row), concept_size=64, image=row["images"][0])
        assert signals.concept.shape == (64,) and len(signals.attention) == signals.grid[0] * signals.grid[1]
    assert read_index(tmp_path / "out")["settings"]["teacher"].startswith("Qwen2_5_VLForConditionalGeneration ")


def test_the_acceptance_of_the_paper(run: Run, tmp_path: Path) -> None:
    printed = run(*MAZES, "--max_new_tokens=3", "--min_box_mass=0.01")
    rows = rows_of(tmp_path / "out")
    mazes = [maze_of_record(record) for record in script.read_records(arguments(*MAZES), 0.0)]
    right = [score_plan(maze, row["final_answer"]) for maze, row in zip(mazes, rows, strict=True)]
    assert [row["correct"] for row in rows] == right and not any(right)
    assert "0 of 7 samples accepted (0.0%)\n  rejected: 7 (wrong answer)\n" in printed


def arguments(*flags: str) -> script.ExtractionArguments:
    parser = script.PublishedParser((script.ExtractionArguments, script.TeacherConfig), stage="teacher")
    return parser.parse_args_and_config(["--model_path=x", *flags])[0]


def test_a_latent_teacher_answers_in_words(run: Run, tmp_path: Path) -> None:
    """As one that was trained with explicit steps; it is read with its processor."""
    model, processor = staged_parts()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "latent")
    run(*MAZES, *SHORT, "--final_answer=staged", "--max_pixels=3136", model=tmp_path / "latent")
    index, rows = read_index(tmp_path / "out"), rows_of(tmp_path / "out")
    assert index["settings"]["teacher"].startswith("LatentQwen2_5_VLForConditionalGeneration ")
    assert index["settings"]["teacher_image_size"]["longest_edge"] == 3136
    assert {tuple(row["grid"]) for row in rows} == {(2, 2)} and all(row["accepted"] for row in rows)


# Killed, resumed, shared --------------------------------------------------------------------------------------------

# Dies in the second shard, between its tensors and its rows.
KILLED = """
import os, signal, sys
from examples import extract_teacher
from trainers import teacher_store

write = teacher_store.write_bytes
def write_or_die(path, content):
    if path.name == sys.argv[1]:
        path.with_name(path.name + ".tmp").write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
teacher_store.write_bytes = write_or_die
extract_teacher.main(sys.argv[2:])
"""


def start(command: list[object], timeout: float = 300) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def whole(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run in one process gives that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    script.main([f"--model_path={stock}", f"--output_dir={folder}", *MAZES, *SHORT, "--write_json"])
    return folder


def same_but_for_paths(folder: Path, whole: Path) -> bool:
    """The same files with the same bytes; the training JSON names its folder."""
    found, expected = contents(folder), contents(whole)
    name = "data/metadata/lavit_15k_for_training.json"
    found[name] = found[name].replace(os.fsencode(folder), os.fsencode(whole))
    return found == expected


@pytest.mark.parametrize("point", ["shard-00001.json", "shard-00001.safetensors"])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    point: str, run: Run, stock: Path, whole: Path, tmp_path: Path
) -> None:
    flags = [f"--model_path={stock}", f"--output_dir={tmp_path / 'out'}", *MAZES, *SHORT, "--write_json"]
    killed = start(["-c", KILLED, point, *flags])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = contents(tmp_path / "out")
    assert "shard-00000.json" in left and f"{point}.tmp" in left and "shard-00001.json" not in left
    assert not json.loads(left["index.json"])["complete"]
    first = (tmp_path / "out" / "shard-00000.json").stat().st_mtime_ns
    run(*MAZES, *SHORT, "--write_json")
    assert (tmp_path / "out" / "shard-00000.json").stat().st_mtime_ns == first
    assert same_but_for_paths(tmp_path / "out", whole)


@pytest.mark.distributed
def test_two_processes_give_what_one_gives(stock: Path, whole: Path, tmp_path: Path) -> None:
    flags = [f"--model_path={stock}", f"--output_dir={tmp_path / 'out'}", *MAZES, *SHORT, "--write_json"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "examples/extract_teacher.py"]
    done = start([*launcher, *flags])
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("7 of 7 samples accepted") == 1
    assert same_but_for_paths(tmp_path / "out", whole)


def test_other_options_are_refused_by_name(run: Run, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(
        ValueError, match="was extracted with max_new_tokens=3, now max_new_tokens=4; give another output_dir"
    ):
        run(*MAZES, *SHORT, "--write_json", "--max_new_tokens=4")
    with pytest.raises(ValueError, match="was extracted with num_records=7, now num_records=6"):
        run(*MAZES, *SHORT, "--write_json", "--num_mazes=6")
    with pytest.raises(ValueError, match="was extracted from other records"):
        run(*MAZES, *SHORT, "--write_json", "--maze_seed=3")
    other = save_tiny_stock_checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(
        ValueError, match="was extracted with teacher='Qwen2_5_VLForConditionalGeneration [0-9a-f]+', now"
    ):
        run(*MAZES, *SHORT, "--write_json", model=other)


# Visual-CoT ---------------------------------------------------------------------------------------------------------


def formatted(number: int, **changes: Any) -> dict[str, Any]:
    """A row in the layout of LVR."""
    turns = [("human", f"<image>\nWhat is thing {number}?"), ("gpt", "<lvr>\n<answer> blue </answer>")]
    return {
        "image": [f"{number % 2}.png"],
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "bboxes": [[0.0, 0.0, 0.5, 1.0]],
        "question_id": 100 + number,
        "dataset": "toy",
        "split": "train",
        **changes,
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of six rows, one of them raw and one without its image."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, image in enumerate(tiny_images(2)):
        image.save(pictures / f"{number}.png")
    asked = "What is it?\nPlease provide the bounding box coordinate of the region that can help you answer better."
    turns = [asked, "[0.000, 0.125, 0.500, 0.875]", "<image>", "It is red."]
    talk = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    raw = {"image": ["0.png", "0.png###[0, 0, 40, 60]"], "conversations": talk, "question_id": 7, "dataset": "raw"}
    rows = [formatted(0), raw, *map(formatted, range(1, 4)), formatted(4, image=["gone.png"])]
    (tmp_path / "viscot.json").write_text(json.dumps(rows))
    return tmp_path / "viscot.json"


PUBLISHED = ("--validation=false", "--save_every=2", "--steps=1", "--topk=3", "--skip_markup=true", "--downsample=1")
READ = ("--base_image_dir={}", "--data_file={}", "--max_bad_share=0.2", "--max_new_tokens=3")


def test_visual_cot_in_all_its_layouts(run: Run, data: Path, tmp_path: Path) -> None:
    files = [READ[0].format(tmp_path / "pictures"), READ[1].format(data), *READ[2:]]
    published = tmp_path / "lavit15k"
    printed = run(*files, *PUBLISHED, f"--output_lavit15k_root={published}")
    assert "5 good rows, 1 bad rows" in printed and "5 of 5 samples accepted" in printed
    index = read_index(tmp_path / "out")
    assert (
        index["shard_size"] == 2
        and index["settings"]["topk"] == 3
        and index["image_root"] == str(tmp_path / "pictures")
    )
    found = list(read_lavit(published / "data/metadata/lavit_15k_for_training.json", published / "data/images"))
    ours = [record_from_row(row) for row in load_teacher_dataset(tmp_path / "out")]
    facts = [(record["question"], record["answer"], record["meta"]["question_id"]) for record in ours]
    assert facts == [(each["question"], each["answer"], each["meta"]["question_id"]) for each in found]
    assert ("What is it?", "It is red.", 7) in facts and ("What is thing 3?", "blue", 103) in facts
    assert facts != sorted(facts, key=lambda fact: fact[2])  # shuffled, as published
    boxes = {record["meta"]["question_id"]: record["boxes"][0]["xyxy"] for record in ours}
    assert boxes[7] == boxes[100] == [0.0, 0.0, 0.5, 1.0]
    assert sorted(path.name for path in (published / "data/images").iterdir()) == ["0.png", "1.png"]


def test_gradient_signals_of_part_of_the_rows(run: Run, data: Path, tmp_path: Path) -> None:
    files = [READ[0].format(tmp_path / "pictures"), READ[1].format(data), *READ[2:]]
    gradient = ("--method=gradient", "--step_split=whole", "--tau_grad=0.5", "--max_grad_calls_per_step=2")
    more = (
        "--aggregation_method=simple_avg",
        "--random_seed=null",
        "--start_idx=1",
        "--max_samples=2",
        "--acceptance=none",
    )
    run(*files, *gradient, *more, "--write_json", "--copy_images=false")
    rows = rows_of(tmp_path / "out")
    assert [row["record"]["meta"]["question_id"] for row in rows] == [7, 101]
    assert all(0 < len(row["tokens"][0]) <= 2 for row in rows)
    step = json.loads((tmp_path / "out/data/features/trajectories/sample_000101_attention.json").read_text())["steps"][
        0
    ]
    assert (
        step["method"] == "grad_simple_avg"
        and step["tau_used"] == 0.5
        and sum(step["p_t"]) == pytest.approx(1, abs=1e-4)
    )
    (first, _) = json.loads((tmp_path / "out/data/metadata/lavit_15k_for_training.json").read_text())["results"]
    assert first["image_relative_path"] == str(tmp_path / "pictures" / "0.png")


def test_too_many_bad_rows_stop_the_script(run: Run, data: Path, tmp_path: Path) -> None:
    files = [READ[0].format(tmp_path / "pictures"), READ[1].format(data)]
    with pytest.raises(RecordShareError, match=r"(?s)5 good rows, 1 bad rows.*viscot.json, row 5"):
        run(*files, *SHORT)


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--enable_v_top_layer=false"], "the concept is always extracted; leave the option out"),
        (["--save_only_correct=false"], "rejected samples are rows of shard-"),
        (
            ["--validation=maybe"],
            r"validation='maybe', an argument of the published code: choose one of \[True, False",
        ),
        (["--validation=false", "--acceptance=paper"], "acceptance='none'.*give one of them"),
        (["--save_every=5", "--shard_size=6"], "give one of them"),
        (["--max_samples=5"], "max_samples=5 without data_file; give the file, or num_mazes"),
        (["--base_image_dir=x"], "base_image_dir='x' without data_file"),
        (["--judge=chat"], "judge='chat' needs judge_model"),
        (["--method=eye"], "unknown method 'eye'"),
        (["--data_file=none.json"], "none.json, whole file: the file does not exist"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        script.main(["--model_path=gone", f"--output_dir={tmp_path}", *flags])


def test_the_published_options_are_all_taken() -> None:
    """Card 5.2: the builder's options and their defaults."""
    flags = {
        "method": "attention", "steps": 1, "topk": 8, "tau_grad": 0.01, "skip_markup": "true", "downsample": 1,
        "max_tokens_per_step": 50, "max_grad_calls_per_step": 10, "aggregation": "weighted_by_strength",
        "attribution_threshold": 0.1, "min_entropy": 0.5, "max_samples": 5, "random_seed": 5, "copy_images": "true",
        "save_every": 50, "validation": "true", "start_idx": 0, "enable_v_top_layer": "true",
    }  # fmt: skip
    parser = script.PublishedParser((script.ExtractionArguments, script.TeacherConfig), stage="teacher")
    args, config = parser.parse_args_and_config(["--model_path=x", *(f"--{k}={v}" for k, v in flags.items())])
    assert (args.max_samples, args.random_seed, config.shard_size, config.acceptance) == (5, 5, 50, "paper")
    default = script.TeacherConfig(shard_size=50)
    assert config == default and config.copy_images and config.skip_markup
