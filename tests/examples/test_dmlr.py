"""The script of DMLR: flags, runs of stock, latent and text models, kills, processes, verdicts, bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.search_arguments import PUBLISHED_FLAGS, parse_args
from evaluation.verifier import VerifierError
from examples import dmlr as script
from modeling_latent.configuration_latent import LATENT_TOKEN_FIELDS
from tests.chat_server import ChatServer, Reply
from tests.evaluation.choice_files import write_mmvp
from tests.hub import ROOT
from tests.latent import liven, tiny_latent_model
from tests.tiny import tiny_images, tiny_processor, tiny_stock_model
from trainers.data.records import RecordError, RecordShareError

SHORT = ("--max_new_tokens=4", "--max_num_steps=2", "--num_thought_tokens=2", "--verbose=0")
PIXELS = ("--min_pixels=1", "--max_pixels=4")
REFERENCE = ("--mode=reference", *PIXELS, "--sigma=1")
YES = '{"equivalent": true}'

Run = Callable[..., str]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stock checkpoint that says different things of different images."""
    folder = tmp_path_factory.mktemp("stock")
    liven(tiny_stock_model()).save_pretrained(folder)
    processor = tiny_processor()
    for part in (processor.tokenizer, processor.image_processor):
        part.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": processor.chat_template}))
    return folder


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal language model without images, with the files of a stock one."""
    folder = tmp_path_factory.mktemp("llama")
    liven(tiny_stock_model(family="llama")).save_pretrained(folder)
    tiny_processor("llama").tokenizer.save_pretrained(folder)
    return folder


def row(number: int, **changes: Any) -> dict[str, Any]:
    facts = {"prompt": f"Which is thing {number}?\nOptions: A. newt, B. carp", "solution": "B. carp"}
    return {**facts, "image_path": f"img/{number % 3}.png", "idx": number, **changes}


def write_data(folder: Path, *rows: dict[str, Any]) -> Path:
    """A data file beside three images."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(tiny_images(3)):
        image.save(folder / "img" / f"{number}.png")
    (folder / "toy.json").write_text(json.dumps(list(rows)))
    return folder / "toy.json"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path, *(row(i) for i in range(5)))


@pytest.fixture
def run(stock: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the script; returns what it printed."""

    def call(*flags: object, model: Path = stock, out: str = "out", source: Path = data) -> str:
        given = [f"--dataset={source}", f"--model_name_or_path={model}", f"--output_dir={tmp_path / out}"]
        script.main([*given, *SHORT, *map(str, flags)])
        return capsys.readouterr().out

    return call


def results(folder: Path, name: str = "results.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


# Flags --------------------------------------------------------------------------------------------------------------

# Card 5: the published flags with their defaults, in the order of a published result file.
CARD = {
    "dataset": "data/mathverse.json", "model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct", "output_dir": None,
    "start_data_idx": 0, "end_data_idx": 100, "max_new_tokens": 2048, "device": "cuda", "solver_prompt_idx": 0,
    "seed": 42, "num_thought_tokens": 8, "sigma": 20.0, "sigma_decay": 0.95, "lr": 0.005, "max_num_steps": 20,
    "reward_threshold": -1, "top_k": 10, "disable_conf_reward": False, "disable_best_reward": False, "resume": False,
    "ckpt_suffix": "", "use_auto_grad": False, "verbose": 1, "disable_save_logistics": False, "use_llm_verify": False,
    "verify_only": False, "min_pixels": 200704, "max_pixels": 1003520, "num_workers": 1,
    "worker_device_round_robin": False, "num_selected_patches": None, "visual_token_viz": False,
    "visual_token_viz_dir": "visual_token_viz", "visual_only": False, "visual_insert_stride": 1,
    "visual_injection_start_step": 0, "visual_injection_interval": 1, "initial_patch_count": None,
    "patch_increment": 0, "save_reward_csv": True,
}  # fmt: skip
# Card 4.7: what the paper has instead.
PAPER = {
    "num_thought_tokens": 4, "sigma": 0.1, "lr": 1e-3, "max_num_steps": 15, "num_selected_patches": 16,
    "initial_patch_count": 2, "patch_increment": 2, "end_data_idx": 1000, "min_pixels": 128, "max_pixels": 256,
}  # fmt: skip
DEAD = ("disable_conf_reward", "disable_best_reward", "ckpt_suffix", "visual_token_viz", "visual_token_viz_dir")


def test_the_published_flags_and_their_defaults() -> None:
    assert [flag.name for flag in PUBLISHED_FLAGS] == list(CARD)
    assert {flag.name: flag.reference for flag in PUBLISHED_FLAGS} == CARD
    assert {flag.name: flag.paper for flag in PUBLISHED_FLAGS} == {**CARD, **PAPER}
    for mode, expected in (("reference", CARD), ("paper", {**CARD, **PAPER})):
        args = vars(parse_args("", [f"--mode={mode}", "--output_dir=out"]))
        if not script.torch.cuda.is_available():
            expected = {**expected, "device": "cpu"}
        assert {name: args[name] for name in CARD} == {**expected, "output_dir": "out"}
    assert vars(parse_args("", ["--output_dir=out"]))["mode"] == "paper"


def test_every_flag_takes_its_published_default() -> None:
    """Also the dead ones."""
    words = []
    for name, value in CARD.items():
        if value is not None and not isinstance(value, bool) and name != "device":
            words.append(f"--{name}={value}")
    args = parse_args("", [*words, "--save_reward_csv", "--output_dir=out", "--device=cpu"])
    assert args.sigma == 20.0 and args.num_thought_tokens == 8 and args.save_reward_csv is True
    assert parse_args("", ["--save_reward_csv=false", "--output_dir=o"]).save_reward_csv is False


@pytest.mark.parametrize("name", DEAD)
def test_a_dead_flag_is_refused_by_name(name: str) -> None:
    flag = next(flag for flag in PUBLISHED_FLAGS if flag.name == name)
    assert flag.dead
    words = [f"--{name}"] if flag.kind is None else [f"--{name}=x"]
    with pytest.raises(ValueError, match=rf"--{name} \S+ has no effect in the published code: \w+"):
        parse_args("", [*words, "--output_dir=out"])


def test_flags_reach_the_search(run: Run, tmp_path: Path) -> None:
    run(
        "--top_k=3",
        "--seed=7",
        "--num_noise_samples=2",
        "--baseline=mean",
        "--no-inject_in_decode",
        "--end_data_idx=1",
    )
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    expected = {"reward_top_k": 3, "seed": 7, "num_noise_samples": 2, "baseline": "mean", "inject_in_decode": False}
    assert {name: settings[name] for name in expected} == expected
    assert (settings["sigma"], settings["lr"], settings["max_num_steps"]) == (0.1, 1e-3, 2)
    assert results(tmp_path / "out")["args"]["top_k"] == 3


# Runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_with_the_papers_settings(run: Run, tmp_path: Path) -> None:
    printed = run("--end_data_idx=3")
    assert "5 good rows" not in printed and printed.startswith("3 good rows, 0 bad rows")
    assert "of 3 right by the strict rule" in printed and f"saved to {tmp_path / 'out'}" in printed
    found = results(tmp_path / "out")
    assert found["config"] == {"max_new_tokens": 4, "solver_prompt_idx": 0, "min_pixels": 128, "max_pixels": 256}
    assert list(found["args"]) == list(CARD) and found["total"] == 3
    assert [entry["data_idx"] for entry in found["entries"]] == [0, 1, 2]
    rich = results(tmp_path / "out", "results_v1.json")
    assert all(128 <= entry["num_image_tokens"] <= 256 for entry in rich["entries"])
    assert rich["settings"]["mode"] == "paper" and rich["settings"]["noise_stream"] == "item"


def test_a_slice_keeps_the_places_of_the_file(run: Run, tmp_path: Path) -> None:
    run(*PIXELS)
    run(*PIXELS, "--start_data_idx=3", out="slice")
    whole, part = (results(tmp_path / name)["entries"] for name in ("out", "slice"))
    assert [entry["data_idx"] for entry in part] == [3, 4]
    names = ("data_idx", "model_output", "best_reward_step")
    assert [[entry[name] for name in names] for entry in part] == [
        [entry[name] for name in names] for entry in whole[3:]
    ]
    logs = sorted(path.name for path in (tmp_path / "slice" / "reward_logs").iterdir())
    assert logs == ["reward_steps_000003.csv", "reward_steps_000004.csv"]


@pytest.mark.parametrize("strategy", ["greedy", "sample"])
def test_baselines(run: Run, tmp_path: Path, strategy: str) -> None:
    flags = ("--temperature=2", "--top_p=0.9") if strategy == "sample" else ()
    printed = run(*PIXELS, f"--strategy={strategy}", *flags)
    assert "of 5 right" in printed and not (tmp_path / "out" / "reward_logs").exists()
    assert all(entry["best_reward"] is None for entry in results(tmp_path / "out")["entries"])


def test_a_latent_model_and_a_set_by_name(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "latent"
    processor = tiny_processor()
    ids = {name: getattr(processor, name) for name in LATENT_TOKEN_FIELDS}
    liven(tiny_latent_model(**ids)).save_pretrained(folder)
    processor.save_pretrained(folder)
    mmvp = write_mmvp(tmp_path / "mmvp")
    printed = run(*PIXELS, f"--image_root={mmvp}", model=folder, source=Path("mmvp"))
    assert "of 4 right" in printed
    entries = results(tmp_path / "out")["entries"]
    assert [entry["data_idx"] for entry in entries] == [0, 1, 2, 3] and entries[0]["best_reward"] > 0
    assert entries[0]["ground_truth"].startswith("(")


def test_questions_of_text_on_a_causal_language_model(run: Run, text_model: Path, tmp_path: Path) -> None:
    source = write_data(tmp_path / "text", *(row(i, image_path="") for i in range(2)))
    printed = run(model=text_model, source=source)
    assert "of 2 right" in printed
    late = ("--mode=reference", "--sigma=1", "--visual_injection_start_step=2")
    run(*late, model=text_model, source=source, out="published")  # its bounds of images do not matter
    assert all(entry["best_reward"] > 0 for entry in results(tmp_path / "published")["entries"])
    with pytest.raises(ValueError, match="2 questions have no image .the first is 0., and in mode='reference' step 0"):
        run("--mode=reference", "--sigma=1", model=text_model, source=source, out="refused")


def test_a_run_that_saves_nothing_but_its_logs(run: Run, tmp_path: Path) -> None:
    printed = run(*PIXELS, "--disable_save_logistics", "--end_data_idx=2")
    assert "of 2 right" in printed and "saved to" not in printed
    found = [path.relative_to(tmp_path / "out").as_posix() for path in sorted((tmp_path / "out").rglob("*.*"))]
    assert found == ["reward_logs/reward_steps_000000.csv", "reward_logs/reward_steps_000001.csv"]
    run(*PIXELS, "--save_reward_csv=false", "--end_data_idx=1", out="no_logs")
    assert not (tmp_path / "no_logs" / "reward_logs").exists()


def test_what_published_options_do_not_do_is_told(run: Run) -> None:
    """Card 9.1, 13 and 4."""
    printed = run(*REFERENCE, "--num_selected_patches=0", "--use_auto_grad", "--end_data_idx=1")
    assert "--num_selected_patches 0 is no cap in mode reference" in printed
    assert "--visual_injection_start_step 2 interleaves none" in printed
    assert "--use_auto_grad moves nothing in mode reference" in printed
    assert "--" not in run(*PIXELS, "--num_selected_patches=0", "--max_new_tokens=3", out="paper").replace(
        "--max_new", ""
    )


def test_answers_that_are_cut_off_are_counted(run: Run) -> None:
    printed = run(*PIXELS, "--max_new_tokens=1", "--end_data_idx=2")
    assert "2 answers were cut off at --max_new_tokens 1; raise it" in printed


# Killed, resumed, shared --------------------------------------------------------------------------------------------

# Dies at the n-th batch, within its lines, or when the results are written.
KILLED = """
import os, signal, sys
from pathlib import Path
from evaluation import run_folder, search_runner, search_store
from examples import dmlr

point, number = sys.argv[1], int(sys.argv[2])
append, write, calls = search_store.RunFolder.append, search_store.write_whole, []

def append_or_die(self, worker, lines):
    calls.append(1)
    if point == "lines" and len(calls) == number:
        path = self.folder / "items" / f"worker-{worker:03d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as file:
            file.write(b'{"data_idx": 1, "status"')
            os.fsync(file.fileno())
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, worker, lines)

def write_or_die(path, text):
    if path.name == point:
        path.parent.mkdir(exist_ok=True)
        path.with_name(path.name + ".partial").write_text(text[:40])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, text)

search_store.RunFolder.append = append_or_die
run_folder.write_whole = search_runner.write_whole = search_store.write_whole = write_or_die
dmlr.main(sys.argv[3:])
"""


def start(command: list[object], timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def command(stock: Path, folder: Path, out: str, *flags: str) -> list[str]:
    """The flags of a run of five questions in batches of two."""
    source = write_data(folder, *(row(i) for i in range(5)))
    given = [f"--dataset={source}", f"--model_name_or_path={stock}", f"--output_dir={folder / out}"]
    return [*given, *SHORT, *PIXELS, "--batch_size=2", *flags]


def contents(folder: Path) -> dict[str, bytes]:
    """All result files, without the name of their folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "items")
    kept = (path for path in files if path.name != "timings.json")
    return {str(path.relative_to(folder)): path.read_bytes().replace(os.fsencode(folder), b"OUT") for path in kept}


def indexes(folder: Path) -> list[int]:
    """`data_idx` of every whole line."""
    found = []
    for path in sorted((folder / "items").iterdir()):
        found += [json.loads(line)["data_idx"] for line in path.read_text().splitlines() if line.endswith("}")]
    return found


@pytest.mark.parametrize(
    ("point", "number", "left"),
    [("run.json", 0, []), ("lines", 2, [0, 1]), ("results_v1.json", 0, [0, 1, 2, 3, 4]), ("results.json", 0, None)],
)
def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    point: str, number: int, left: list[int] | None, stock: Path, tmp_path: Path
) -> None:
    killed = start(["-c", KILLED, point, number, *command(stock, tmp_path, "killed")])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / "results.json").exists()
    if left is not None:
        assert (indexes(tmp_path / "killed") if (tmp_path / "killed" / "items").exists() else []) == left
    script.main(command(stock, tmp_path, "killed", "--resume"))
    assert sorted(indexes(tmp_path / "killed")) == [0, 1, 2, 3, 4], "no item lost, none twice"
    script.main(command(stock, tmp_path, "whole"))
    found, expected = contents(tmp_path / "killed"), contents(tmp_path / "whole")
    assert {name for name in found if name.endswith(".partial")} == set()
    assert found == expected


@pytest.mark.distributed
def test_two_processes_give_what_one_gives(stock: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "examples/dmlr.py"]
    done = start([*launcher, *command(stock, tmp_path, "two")])
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("of 5 right by the strict rule") == 1
    assert sorted(path.name for path in (tmp_path / "two" / "items").iterdir()) == [
        "worker-000.jsonl",
        "worker-001.jsonl",
    ]
    timed = results(tmp_path / "two", "timings.json")["questions"]
    assert [each["worker"] for each in timed.values()] == [0, 0, 1, 1, 0], "both processes answered"
    script.main(command(stock, tmp_path, "one"))
    two = results(tmp_path / "two")
    assert two["args"]["num_workers"] == 2
    changed = {**two["args"], "num_workers": 1, "output_dir": str(tmp_path / "one")}
    assert {**two, "args": changed} == results(tmp_path / "one")
    for name in ("results.json", "results_v1.json"):
        texts = [(tmp_path / folder / name).read_text() for folder in ("one", "two")]
        texts[1] = texts[1].replace(str(tmp_path / "two"), str(tmp_path / "one"))
        assert texts[1].replace('"num_workers": 2', '"num_workers": 1') == texts[0]
    # A second resumed start in one process finds nothing to do.
    lines = indexes(tmp_path / "two")
    script.main(command(stock, tmp_path, "two", "--resume"))
    assert indexes(tmp_path / "two") == lines and len(lines) == 5


def test_num_workers_starts_processes(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def launch(words: list[str], check: bool) -> types.SimpleNamespace:
        started.append(words)
        return types.SimpleNamespace(returncode=3 * (len(started) - 1))

    monkeypatch.setattr(script.subprocess, "run", launch)
    flags = command(stock, tmp_path, "out", "--num_workers=2")
    script.main(flags)
    assert started[0][1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert Path(started[0][6]).name == "dmlr.py" and started[0][7:] == flags
    with pytest.raises(SystemExit, match="3"):
        script.main(flags)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="--num_workers 2, and the launcher started 4 processes"):
        script.main(flags)


def test_processes_that_do_not_know_of_each_other_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="the launcher started 2 processes, accelerate knows 1"):
        run(*PIXELS)


def test_reference_mode_in_several_processes_has_noise_by_question() -> None:
    args = parse_args("", ["--mode=reference", "--output_dir=o"])
    assert [script.plan_of(args, None, None, number).noise_stream for number in (1, 2)] == ["run", "item"]
    args = parse_args("", ["--mode=reference", "--output_dir=o", "--noise_stream=item"])
    assert script.plan_of(args, None, None, 1).noise_stream == "item"


def test_another_configuration_is_refused(run: Run, data: Path, tmp_path: Path) -> None:
    run(*PIXELS)
    with pytest.raises(ValueError, match="out holds questions of an earlier run; go on with it with resume"):
        run(*PIXELS)
    with pytest.raises(ValueError, match="was begun with sigma=0.1, now sigma=3.0"):
        run(*PIXELS, "--resume", "--sigma=3")
    with pytest.raises(ValueError, match="was begun with mode='paper', now mode='reference'|was begun with \\w+="):
        run(*REFERENCE, "--resume")
    data.write_text(json.dumps([row(i, solution="A. newt") for i in range(5)]))
    with pytest.raises(ValueError, match="has an answer to another question 0 .*the data were changed"):
        run(*PIXELS, "--resume")
    shutil.rmtree(tmp_path / "out")
    run(*PIXELS, "--resume")  # nothing to go on with


# Verdicts -----------------------------------------------------------------------------------------------------------


def test_judged_anew_by_the_verifier_without_a_model(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*PIXELS)
    server = ChatServer(YES)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(f"OPENAI_API_KEY=k\nOPENAI_API_BASE_URL={server.url}\nMODEL_TYPE=tiny-judge\n")
    for name in ("OPENAI_API_KEY", "OPENAI_API_BASE_URL", "MODEL_TYPE"):
        monkeypatch.delenv(name, raising=False)
    gone = Path("no such model")
    printed = run("--verify_only", "--use_llm_verify", model=gone)
    assert "100.0 %" in printed and "of 5 right by the LLM verifier" in printed
    assert {seen["body"]["model"] for seen in server.seen} == {"tiny-judge"} and server.seen[0]["key"] == "Bearer k"
    assert results(tmp_path / "out")["correct"] == 5 and results(tmp_path / "out", "results_v1.json")["accuracy"] == 1
    asked = len(server.seen)
    run("--verify_only", "--use_llm_verify", model=gone)
    assert len(server.seen) == asked, "verdicts are kept"
    server.replies = [Reply(raw=b"<html>Log in</html>")]
    flags = ("--verify_only", "--use_llm_verify", "--verifier_cache", tmp_path / "other.jsonl")
    printed = run(*flags, "--verifier_retries=0", model=gone)
    assert "no verdict on any" in printed and "5 unverified; --verify_only --use_llm_verify asks again" in printed
    assert "answered with a web page instead of JSON" in printed
    server.close()
    printed = run("--verify_only", model=gone)
    assert "of 5 right by the strict rule" in printed
    printed = run(*flags, "--verifier_retries=0", model=gone)
    assert "5 unverified" in printed and "cannot be reached" in printed


def test_the_verifier_needs_its_key_before_anything_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(VerifierError, match="OPENAI_API_KEY is not set"):
        run("--use_llm_verify", model=Path("no such model"))


def test_files_of_the_published_code_count_from_their_slice(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    entries = [{"data_idx": 0, "model_output": "\\boxed{B}"}, {"data_idx": 9, "model_output": "\\boxed{B}"}]
    (tmp_path / "out" / "results.json").write_text(json.dumps({"entries": entries}))
    run("--verify_only", "--start_data_idx=4")
    assert "is_correct" not in results(tmp_path / "out")["entries"][0]
    printed = run("--verify_only", "--start_data_idx=4", "--published_index")
    assert "of 1 right" in printed and results(tmp_path / "out")["entries"][0]["is_correct"] is True
    assert "is_correct" not in results(tmp_path / "out")["entries"][1]


def test_the_published_name_of_the_hub_token(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HUGGING_FACE_TOKEN", "hf_published")
    seen = []
    monkeypatch.setattr(script, "run", lambda args, folder: seen.append(os.environ["HF_TOKEN"]))
    run()
    monkeypatch.setenv("HF_TOKEN", "hf_own")
    run()
    assert seen == ["hf_published", "hf_own"]


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_thought_tokens=0"], "num_thought_tokens=0 must be an integer of at least 1; for none decode without"),
        (["--sigma=0"], "sigma=0.0 must be a number above 0: without noise there is no estimate"),
        (["--top_k=0"], "^top_k=0 must be an integer of at least 1"),
        (["--visual_insert_stride=0"], "visual_insert_stride=0 must be an integer of at least 1"),
        (["--max_new_tokens=0"], "max_new_tokens=0 must be a whole number of at least 1"),
        (["--lr=-1"], "lr=-1.0 must be a number above 0"),
        (["--num_workers=0"], "--num_workers=0 must be 1 or more"),
        (["--strategy=greedy", "--temperature=1"], "--temperature is of --strategy sample"),
        (["--published_index"], "--published_index is of --verify_only"),
        (["--disable_save_logistics", "--resume"], "--disable_save_logistics writes nothing"),
        (["--baseline=mean"], "baseline='mean' with num_noise_samples=1"),
        (["--reward=luck"], "reward='luck' is unknown"),
        (
            ["--mode=reference"],
            "--min_pixels 200704, the published default, is in merged image tokens",
        ),
        (["--min_pixels=100352"], "--min_pixels 100352 is in merged image tokens"),
        (["--dataset=luck"], "dataset='luck' is neither a file nor one of the names .'hallusion'"),
        (["--start_data_idx=9"], "start_data_idx=9, end_data_idx=1000: no row of the 5"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(flags: list[str], message: str, run: Run) -> None:
    with pytest.raises(ValueError, match=message):
        run(*flags, model=Path("no such model"))


def test_the_output_folder_is_needed() -> None:
    with pytest.raises(ValueError, match="--output_dir is needed"):
        parse_args("", [])
    assert parse_args("", ["--disable_save_logistics", "--save_reward_csv=false"]).output_dir is None


def test_empty_answers_are_listed(run: Run, tmp_path: Path) -> None:
    source = write_data(tmp_path / "empty", *(row(i, solution="" if i % 2 else "B. carp") for i in range(4)))
    with pytest.raises(RecordError, match="2 of 4 rows have an empty solution.*rows 1, 3; .*skip"):
        run(*PIXELS, source=source)
    printed = run(*PIXELS, "--empty_answers=skip", source=source)
    assert "skipped on request: 2 (solution is empty)" in printed and "of 2 right" in printed
    assert [entry["data_idx"] for entry in results(tmp_path / "out")["entries"]] == [0, 2]


def test_an_unreadable_image_is_named(run: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "img" / "1.png").write_bytes(b"no image")
    with pytest.raises(RecordShareError, match=r"(?s)toy.json, row 1: image .*1.png' cannot be read"):
        run(*PIXELS)
    printed = run(*PIXELS, "--max_bad_share=0.5")
    assert "2 failed: see the entries with stop_reason exception" in printed and "of 3 right" in printed
    # The head of this one is whole: it fails when it is opened.
    whole = tiny_images(1)[0].resize((300, 300))
    whole.save(tmp_path / "img" / "1.png")
    content = (tmp_path / "img" / "1.png").read_bytes()
    (tmp_path / "img" / "1.png").write_bytes(content[: len(content) // 2])
    printed = run(*PIXELS, out="cut")
    assert "2 failed" in printed and "of 3 right" in printed
    failed = results(tmp_path / "cut")["entries"][1]
    assert failed["model_output"].startswith("[GENERATION_ERROR]") and "row 1" in failed["model_output"]


def test_the_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    named = set(re.findall(r"--(\w+)", text))
    assert set(CARD) <= named and {"mode", "strategy", "noise_stream", "judge", "published_index"} <= named
