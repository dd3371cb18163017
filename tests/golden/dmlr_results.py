"""Command-line runs of DMLR as published, repeated by the script: result files, reward logs, resume, the structure of
runs with several workers, results judged anew (card 7.2, 7.3).

On purpose `data_idx` and the numbers of the logs are positions in the file, where published runs in one process count
from `start_data_idx`; and a resumed run gives the file of an uninterrupted one.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.search_store import results_text
from evaluation.verifier import PROMPT
from examples import dmlr as script
from tests.chat_server import ChatServer
from tests.golden.conftest import each, golden_dir, golden_json

FOLDER = golden_dir("dmlr")
TOLERANCE: dict[str, Any] = golden_json(FOLDER, "manifest.json", {}).get("tolerance", {})
ROWS: list[dict[str, Any]] = golden_json(FOLDER, "results/toy_dataset.json", [])


def run_of(name: str, path: str = "") -> list[dict[str, Any]]:
    """A recorded run with its data, as a list of one; empty when the set lacks it."""
    run = golden_json(FOLDER, f"results/{name}") if ROWS and (FOLDER / "model").is_dir() else None
    return [] if run is None else [run]


SINGLE = run_of("single_process_results.json")
LOGS = run_of("single_process_reward_logs.json") if SINGLE else []
RESUMED = run_of("resume_single_process.json")
WORKERS = run_of("multi_process_results_structure.json")
VERIFIED = run_of("verify_only.json")
RANDOM = ("model_output", "answer", "best_reward", "best_reward_step")  # of workers, which published code never seeds


def once(_: Any) -> str:
    return "recorded"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a working directory with the names that the arguments of a run have."""

    def make(args: dict[str, Any], rows: list[dict[str, Any]] = ROWS) -> None:
        monkeypatch.chdir(tmp_path)
        shutil.copytree(FOLDER / "results" / "img", "img", dirs_exist_ok=True)
        data, model = Path(args["dataset"]), Path(args["model_name_or_path"])
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text(json.dumps(rows), encoding="utf-8")
        model.symlink_to(FOLDER / "model")

    return make


def flags(args: dict[str, Any], **changes: Any) -> list[str]:
    """The command line that a run was started with."""
    words = ["--mode=reference", "--attn_implementation=eager"]
    for name, value in {**args, **changes}.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words.append(f"--{name}={value}")
    return words


def same(found: Any, expected: Any) -> None:
    """Equal, in order of keys too; floats up to the tolerance of rewards."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, value in expected.items():
            same(found[name], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=TOLERANCE["cli_reward"])
    else:
        assert (isinstance(found, bool), found) == (isinstance(expected, bool), expected)


def results(folder: str) -> dict[str, Any]:
    """A result file, whose layout is that of the published code."""
    text = (Path(folder) / "results.json").read_bytes().decode()
    assert text == results_text(json.loads(text))
    return json.loads(text)


def from_file(run: dict[str, Any]) -> dict[str, Any]:
    """A published result of one process, its entries by their positions in the file."""
    first = run["args"]["start_data_idx"]
    return {**run, "entries": [{**entry, "data_idx": entry["data_idx"] + first} for entry in run["entries"]]}


@each("expected", SINGLE, ids=once)
def test_results_of_one_process(expected: dict[str, Any], place: Callable[..., None]) -> None:
    args = expected["args"]
    place(args)
    script.main(flags(args))
    same(results(args["output_dir"]), from_file(expected))
    published = (FOLDER / "results" / "single_process_results.json").read_bytes().decode()
    assert published == results_text(json.loads(published)), "the layout that results() asserts is the published one"


@each("logs", LOGS, ids=once)
def test_reward_logs(logs: dict[str, Any], place: Callable[..., None]) -> None:
    args = SINGLE[0]["args"]
    place(args)
    script.main(flags(args))
    folder, pattern = Path(args["output_dir"]), logs["file_name_pattern"]
    texts = {}
    for name, rows in logs["files"].items():
        texts[name] = (folder / (pattern % (int(name) + args["start_data_idx"]))).read_bytes().decode()
        found = list(csv.DictReader(io.StringIO(texts[name], newline="")))
        assert len(found) == len(rows)
        for one, other in zip(found, rows, strict=True):
            assert list(one) == list(other)
            assert float(one["reward"]) == pytest.approx(float(other["reward"]), abs=TOLERANCE["cli_reward"])
            assert {**one, "reward": ""} == {**other, "reward": ""}
    assert len(list((folder / "reward_logs").iterdir())) == len(texts)
    if "raw_first_file" in logs:
        raw = logs["raw_first_file"].splitlines(keepends=True)
        lines = texts[next(iter(logs["files"]))].splitlines(keepends=True)
        assert [line[-2:] for line in lines] == [line[-2:] for line in raw] and lines[0] == raw[0]


@each("expected", RESUMED, ids=once)
def test_a_resumed_run_gives_the_file_of_an_uninterrupted_one(
    expected: dict[str, Any], place: Callable[..., None]
) -> None:
    after, done = expected["results_after"], expected["logistics_before"]["n_entries"]
    args = after["args"]
    place(args)
    first = args["start_data_idx"]
    script.main(flags(args, resume=False, end_data_idx=first + done))
    before = results(args["output_dir"])
    assert before["total"] == len(before["entries"]) == done
    same(before["entries"], from_file(after)["entries"][:done])
    script.main(flags(args, resume=True))
    resumed = results(args["output_dir"])
    assert resumed["total"] == len(resumed["entries"]) == len(after["entries"]), "totals never double"
    script.main(flags(args, resume=False, output_dir="whole"))
    whole = results("whole")
    assert {**whole, "args": {**whole["args"], "output_dir": args["output_dir"]}} == resumed
    head = {name: value for name, value in after.items() if name != "entries"}
    same({name: resumed[name] for name in head}, {**head, "args": {**args, "resume": False}})


@each("expected", WORKERS, ids=once)
def test_the_structure_of_results_of_several_workers(expected: dict[str, Any], place: Callable[..., None]) -> None:
    """Here of one process with noise by question, which any number of processes gives."""
    args, rows = expected["args"], [dict(row) for row in ROWS]
    for entry in expected["entries"]:
        row = rows[entry["data_idx"]]
        row["image_path"] = entry["image_path"]
        if entry["stop_reason"] == "skipped_no_gt":
            row["solution"] = None
    place(args, rows)
    alone = {"num_workers": 1, "noise_stream": "item", "max_bad_share": 1, "image_root": "."}
    script.main(flags(args, **alone))
    found = results(args["output_dir"])
    assert [list(entry) for entry in found["entries"]] == [list(entry) for entry in expected["entries"]]
    for one, other in zip(found["entries"], expected["entries"], strict=True):
        if other["stop_reason"] == "exception":
            assert one["model_output"].startswith("[GENERATION_ERROR] ")
            assert other["model_output"].startswith("[GENERATION_ERROR] ")
            kept = [name for name in other if name != "model_output"]
        else:
            random = RANDOM if other["stop_reason"] != "skipped_no_gt" else ()
            kept = [name for name in other if name not in random]
        same({name: one[name] for name in kept}, {name: other[name] for name in kept})
    head = {name: value for name, value in expected.items() if name != "entries"}
    same({name: found[name] for name in head}, {**head, "args": {**args, "num_workers": 1}})


# Judged anew --------------------------------------------------------------------------------------------------------

VERIFY_RUNS = [run for case in VERIFIED for run in case["runs"]]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    made = ChatServer()
    for name, value in {"NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": "k", "OPENAI_API_BASE_URL": made.url}.items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()


@each("case", VERIFY_RUNS, ids=lambda case: case["mode"])
def test_results_judged_anew(case: dict[str, Any], endpoint: ChatServer, tmp_path: Path) -> None:
    """Published files count from the start of the slice; fields that nobody knows are kept."""
    data, out = tmp_path / "toy.json", tmp_path / "out"
    shutil.copytree(FOLDER / "results" / "img", tmp_path / "img")
    data.write_text(json.dumps(ROWS), encoding="utf-8")
    out.mkdir()
    (out / "results.json").write_text(results_text(VERIFIED[0]["input"]), encoding="utf-8")
    asked = case.get("candidate_and_truth_sent", [])
    endpoint.replies = [json.dumps({"equivalent": number % 2 == 0}) for number in range(len(asked) + 1)]
    place = [f"--{name}={case[name]}" for name in ("start_data_idx", "end_data_idx")]
    judge = ["--use_llm_verify", "--verifier_workers=1"] if asked else []
    main = ["--mode=reference", "--verify_only", "--published_index", f"--dataset={data}", f"--output_dir={out}"]
    script.main([*main, *place, *judge])
    same(results(str(out)), case["output"])
    assert [seen["text"] for seen in endpoint.seen] == [PROMPT.format(candidate=c, truth=t) for c, t in asked]
