"""The script of evaluations: every kind of benchmark with tiny models, published spellings, files, bad input, and two
processes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from examples import evaluate as script
from modeling_latent.configuration_latent import LATENT_METHODS, LATENT_TOKEN_FIELDS
from tests.evaluation.choice_files import mmvp_rows, write_blink, write_mmvp, write_vsp, write_vstar
from tests.hub import ROOT
from tests.latent import liven, tiny_latent_model
from tests.tiny import tiny_images, tiny_processor, tiny_stock_model
from tests.trainers.staged_parts import staged_parts
from trainers.data.predictions import read_m3cot_predictions, read_scienceqa_predictions
from trainers.data.records import RecordShareError
from trainers.tiny import build_tiny_processor
from trainers.tiny_text import save_tiny_text_checkpoint

Run = Callable[..., str]
BASE = ROOT / "hub_configs/maze-tiny/base"
SHORT = ("--max_new_tokens=4", "--batch_size=3")
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "examples/evaluate.py")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `main()` with words; returns what was printed."""

    def call(*words: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        script.main()
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def lavit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with learned tokens."""
    folder = tmp_path_factory.mktemp("lavit")
    processor = build_tiny_processor(latent_tokens=LATENT_METHODS["lavit"].tokens)
    ids = {name: getattr(processor, name) for name in LATENT_TOKEN_FIELDS}
    fields = {"latent_generation": dict(LATENT_METHODS["lavit"].generation)}
    liven(tiny_latent_model(latent_method="lavit", **fields, **ids)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family with the tokens of its method, written once."""
    folder = tmp_path_factory.mktemp("staged")

    def of_family(family: str) -> Path:
        if not (folder / family).exists():
            model, processor = staged_parts(family)
            if family not in ("gpt2", "llama"):
                model.generation_config.latent_strategy, model.generation_config.num_latent_patches = "staged", 1
            model.save_pretrained(folder / family)
            processor.save_pretrained(folder / family)
        return folder / family

    return of_family


def conditions(folder: Path) -> dict[str, dict[str, Any]]:
    """The conditions of a run by `benchmark, condition`."""
    found = json.loads((folder / "results.json").read_text())["conditions"]
    return {f"{each['benchmark']}, {each['variant']}": each for each in found}


def column(condition: dict[str, Any], name: str) -> list[Any]:
    return [item[name] for item in condition["items"]]


# Mazes, votes, search


def test_mazes_are_what_is_asked_without_a_benchmark(run: Run, lavit: Path, tmp_path: Path) -> None:
    """Strategies with options of their own; the first is compared with every other."""
    strategies = ["learned", "learned:mask_latents", "learned:num_latent_steps=1", "off"]
    printed = run("--model", lavit, "--num_mazes=3", *SHORT, "--output", tmp_path, "--strategies", *strategies)
    found = conditions(tmp_path)
    names = [f"mazes, {each}" for each in strategies]
    assert list(found) == names and all(f"  {name} minus learned: " in printed for name in names[1:])
    assert [set(column(found[name], "prefilled")) for name in names] == [{4}, {4}, {1}, {0}]
    texts = [column(found[name], "text") for name in names]
    assert texts[0] != texts[1] and found[names[0]]["chance"] > 0
    assert f"mazes: chance {found[names[0]]['chance']:.1f} %" in printed


def test_the_models_own_strategy_is_the_default(run: Run, lavit: Path, tmp_path: Path) -> None:
    run("--model", lavit, "--num_mazes=2", *SHORT, "--output", tmp_path / "latent")
    assert list(conditions(tmp_path / "latent")) == ["mazes, learned", "mazes, off"]
    run("--model", BASE, "--num_mazes=2", *SHORT, "--output", tmp_path / "stock")
    assert list(conditions(tmp_path / "stock")) == ["mazes, off"]


def test_a_stock_model_searches_and_votes(run: Run, tmp_path: Path) -> None:
    """Thought tokens in the user's turn; where the question's last tokens are taken, no step changes nothing."""
    strategies = ["off", "search:num_thought_tokens=2,max_num_steps=0", "search:mode=reference,max_num_steps=1"]
    words = ["--model", BASE, "--num_mazes=3", "--max_new_tokens=20", "--vote", "1", "3", "--strategies", *strategies]
    for place in ("turn", "question"):
        printed = run(*words, f"--thoughts={place}", "--output", tmp_path / place)
        found = conditions(tmp_path / place)
        names = [f"mazes, {each}" for each in (*strategies, "off, most of 1", "off, most of 3")]
        assert list(found) == names and all(f"  {name} minus off: " in printed for name in names[1:])
        assert [set(column(found[name], "prefilled")) for name in names] == [{0}, {2}, {8}, {0}, {0}]
        texts = [column(found[name], "text") for name in names[:2]]
        assert (texts[0] == texts[1]) == (place == "question")


def test_published_mazes_are_added(run: Run, tmp_path: Path) -> None:
    words = ("--model", BASE, "--num_mazes=2", "--vsp_dir", write_vsp(tmp_path / "vsp"), *SHORT)
    run(*words, "--output", tmp_path / "run")
    found = conditions(tmp_path / "run")
    assert {name: each["n"] for name, each in found.items()} == {"mazes, off": 2, "vsp, off": 1}


# Multiple choice


def test_conditions_differences_and_files(run: Run, lavit: Path, tmp_path: Path) -> None:
    strategies = ["learned", "learned:mask_latents,num_latent_steps=3", "off"]
    data = ("--dataset=mmvp", "--data_root", write_mmvp(tmp_path / "mmvp"), "--protocol=lavit")
    files = ("--predictions", tmp_path / "lines.jsonl", "--output", tmp_path / "run")
    printed = run("--model", lavit, *data, *SHORT, "--strategies", *strategies, "--num_latent_steps", 2, 4, *files)
    assert "4 good rows, 0 bad rows" in printed
    found = conditions(tmp_path / "run")
    names = ["learned, num_latent_steps 2", "learned, num_latent_steps 4", *strategies[1:]]
    assert list(found) == [f"mmvp, {name}" for name in names]
    assert [set(column(each, "prefilled")) for each in found.values()] == [{2}, {4}, {3}, {0}]
    assert all("strict_accuracy" in each and each["clusters"] == 2 for each in found.values())
    written = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [line["meta"] for line in written] == mmvp_rows()
    assert [line["model_output"] for line in written] == column(found["mmvp, learned, num_latent_steps 2"], "raw")
    for name in ("results.md", "timings.json", "accuracy.png", "model_index.yaml", "run.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0


def test_options_that_do_not_go_together_are_refused_before_anything_runs(
    run: Run, lavit: Path, tmp_path: Path
) -> None:
    """Only the model's layout of its tokens knows that; the first condition could be run, and is not."""
    strategies = ("--strategies", "learned", "learned:force_latents=false", "--num_latent_steps", 2)
    message = "the condition 'learned:force_latents=false, num_latent_steps 2' cannot be run: num_latent_steps=2 with"
    with pytest.raises(ValueError, match=message):
        run("--model", lavit, "--num_mazes=2", *SHORT, *strategies, "--output", tmp_path)
    assert not (tmp_path / "items").exists()


@pytest.mark.parametrize(
    ("switches", "strategies"),
    [
        ([], ["learned", "off"]),
        (["--force_lvr"], ["learned:force_latents"]),
        (["--mask_lvr"], ["learned:mask_latents"]),
        (["--mask_lvr", "--force_lvr"], ["learned:force_latents,mask_latents"]),
    ],
)
def test_published_spellings(
    switches: list[str], strategies: list[str], run: Run, lavit: Path, tmp_path: Path
) -> None:
    write_blink(tmp_path, "Counting")
    write_blink(tmp_path, "IQ_Test")
    files = ("--output_file", tmp_path / "lines.jsonl", "--output", tmp_path / "run")
    data = ("--dataset=blink", "--data_root", tmp_path, "--task_name=IQ_Test", "--max_samples=1", "--protocol=lavit")
    run("--checkpoint", lavit, *data, *SHORT, *switches, *files)
    found = conditions(tmp_path / "run")
    assert list(found) == [f"blink, {each}" for each in strategies]
    first = found[f"blink, {strategies[0]}"]
    assert set(column(first, "prefilled")) == {4} and list(first["by_group"]) == ["IQ_Test"]
    (line,) = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert line["id"] == "val_IQ_Test_0" and line["meta"]["task"] == "IQ_Test"
    assert [line["model_output"]] == column(first, "raw")


def test_folders_of_laser_and_a_model_card(run: Run, tmp_path: Path) -> None:
    """A place without suffix holds the published folders; the card of a model gets the results beside its text."""
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n# Text\n")
    data = ("--benchmark=mmvp", "--data_root", write_mmvp(tmp_path / "mmvp"), "--with_inst", "--strategies", "off")
    files = ("--output_file", tmp_path / "published", "--model_card", card, "--output", tmp_path / "run")
    run("--model", BASE, *data, *SHORT, *files)
    (path,) = (tmp_path / "published").rglob("*.json")
    assert path.relative_to(tmp_path / "published").as_posix() == (
        "mmvp/decoding_by_off_with_inst/maze-tiny_base/off000.json"
    )
    found = conditions(tmp_path / "run")["mmvp, off"]
    rows = json.loads(path.read_text())
    assert [row["prediction"] for row in rows] == [[raw] for raw in column(found, "raw")]
    assert [row["label"] for row in rows] == [row["Correct Answer"] for row in mmvp_rows()]
    text = card.read_text()
    assert "license: mit" in text and "type: MMVP/MMVP" in text and text.endswith("# Text\n")


def test_several_benchmarks_in_one_folder(run: Run, lavit: Path, tmp_path: Path) -> None:
    """A folder of each name below one root; a place each; generated mazes need none."""
    write_mmvp(tmp_path / "data" / "mmvp")
    write_vstar(tmp_path / "data" / "vstar")
    words = ("--model", lavit, "--strategies", "off", "--num_mazes=2", *SHORT, "--benchmark", "mmvp", "mazes", "vstar")
    run(*words, "--data_root", tmp_path / "data", "--output", tmp_path / "one")
    run(*words, "--data_root", tmp_path / "data/mmvp", tmp_path / "data/vstar", "--output", tmp_path / "two")
    found = conditions(tmp_path / "one")
    assert list(found) == ["mmvp, off", "mazes, off", "vstar, off"] and found == conditions(tmp_path / "two")
    with pytest.raises(ValueError, match="give one place a benchmark, or one folder that holds a folder of each name"):
        run(*words, "--data_root", tmp_path / "data/mmvp", "--output", tmp_path / "three")


def test_a_stock_model_is_compared_without_latents(run: Run, lavit: Path, tmp_path: Path) -> None:
    tiny_stock_model().save_pretrained(tmp_path / "stock")
    tiny_processor().save_pretrained(tmp_path / "stock")
    data = ("--dataset=mmvp", "--data_root", write_mmvp(tmp_path / "mmvp"), "--strategies=learned")
    other = ("--compare", tmp_path / "stock", "--compare_strategy=off", "--output", tmp_path / "run")
    printed = run("--model", lavit, *data, *SHORT, *other)
    assert "  mmvp, off, stock minus learned: " in printed
    assert conditions(tmp_path / "run")["mmvp, off, stock"]["model"] == str(tmp_path / "stock")


def test_rows_left_out_are_told_and_too_many_stop_the_script(run: Run, lavit: Path, tmp_path: Path) -> None:
    rows = mmvp_rows()
    write_mmvp(tmp_path, [*rows[:3], {**rows[3], "Correct Answer": "(e)"}])
    words = ("--model", lavit, "--dataset=mmvp", "--data_root", tmp_path, "--strategies=off", *SHORT)
    with pytest.raises(RecordShareError, match=r"3 good rows, 1 bad rows[\s\S]*row 3"):
        run(*words)
    printed = run(*words, "--max_bad_share=0.5", "--output", tmp_path / "run")
    assert "3 good rows, 1 bad rows" in printed and "n=3" in printed


# Stepwise questions


def rows(task: str, number: int = 3) -> list[dict[str, Any]]:
    """Rows as published, the images beside the file."""
    kinds = {
        "m3cot": {"answer": "B", "rationale": "It is cold. So.", "domain": "science", "topic": "physics"},
        "scienceqa": {"answer": 1, "lecture": "Ice is cold.", "solution": None, "subject": "natural science"},
    }
    shared = {"choices": ["ice", "fire"], **kinds[task]}
    questions = ["Which is hot? " * (i + 1) for i in range(number)]
    return [{**shared, "id": f"r{i}", "question": each, "image": f"{i % 2}.png"} for i, each in enumerate(questions)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, and files of rows."""
    for number, image in enumerate(tiny_images(2)):
        image.save(tmp_path / f"{number}.png")
    for task in ("m3cot", "scienceqa"):
        (tmp_path / f"{task}.json").write_text(json.dumps(rows(task)))
    return tmp_path


STEPS = ("--max_new_tokens=4", "--num_latent_steps=2", "--batch_size=2")


def test_m3cot_with_its_files(run: Run, staged: Callable[[str], Path], folder: Path) -> None:
    files = ("--predictions", folder / "p.jsonl", "--output", folder / "run")
    data = ("--task=m3cot", "--data_path", folder / "m3cot.json")
    other = ("--compare", staged("qwen2_vl"), "--num_latent_patches=1")
    printed = run("--model", staged("qwen2_5_vl"), *data, *STEPS, *other, *files)
    found = conditions(folder / "run")
    first = "m3cot, staged, num_latent_steps 2, num_latent_patches 1"
    assert list(found) == [first, "m3cot, off", f"{first}, qwen2_vl"]
    assert [each["latent_steps"] for each in found.values()] == [2, 0, 2] and "3 good rows, 0 bad rows" in printed
    lines = read_m3cot_predictions(folder / "p.jsonl")
    assert [line["messages"][1] for line in lines] == column(found[first], "text")
    assert [line["id"] for line in lines] == ["r0", "r1", "r2"]


@pytest.mark.parametrize("strategy", ["staged", "off"])
def test_published_prompts_of_chameleon(
    strategy: str, run: Run, staged: Callable[[str], Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the published prompt has behind its latents stands behind slots that are laid out, else in the prompt."""
    from evaluation.harness import evaluation_run

    asked, before = [], evaluation_run.predict

    def predict(model: Any, processor: Any, records: Any, **options: Any) -> Any:
        asked.extend((options["prompt"](record), options.get("latent_suffix_ids")) for record in records)
        return before(model, processor, records, **options)

    monkeypatch.setattr(evaluation_run, "predict", predict)
    words = ("--task=scienceqa", "--data_path", folder / "scienceqa.json", "--num=2", "--protocol=ivtlr_chameleon")
    words += ("--prompt=published_inference", "--strategies", strategy, *STEPS[::2])
    numbers = ("--num_latent_steps=2",) if strategy == "staged" else ()
    files = ("--predictions", folder / "p.json", "--output", folder / "run")
    run("--model", staged("chameleon"), *words, *numbers, *files)
    found = read_scienceqa_predictions(folder / "p.json")
    assert len(found) == 2 and set(found.values()) <= {-1, 0, 1}
    assert len(asked) == 2
    for prompt, behind in asked:
        assert prompt.startswith("<s><racm3:break><image><eoss>[Question]:{Which is hot?") or "Which is hot" in prompt
        assert prompt.endswith("<reserved08706>") == (strategy == "off") and (behind is None) == (strategy == "off")


def test_graphs_with_stock_and_latent_models_of_text(run: Run, staged: Callable[[str], Path], tmp_path: Path) -> None:
    stock = save_tiny_text_checkpoint(tmp_path / "stock")
    model = ("--model", staged("gpt2"), "--strategies", "staged", "off", "--compare", stock, "--compare_strategy=off")
    small = ("--task=graphs", "--small", "--num=3", "--seed=7")
    printed = run(*model, *small, *STEPS, "--output", tmp_path / "run")
    assert "  graphs, off, stock minus staged, num_latent_steps 2: " in printed and "good rows" not in printed
    found = conditions(tmp_path / "run")
    one, off, other = found.values()
    assert column(one, "id") == [f"graph-test-7-{i}" for i in range(3)]
    assert set(column(one, "latent_steps")) == {2} and not any(
        column(off, "latent_steps") + column(other, "latent_steps")
    )
    run(*model, *small, *STEPS, "--path_lengths", 2, "--output", tmp_path / "long")
    sizes = conditions(tmp_path / "long")["graphs, off"]["by_group"]
    assert set(sizes) == {"2 steps"} != set(off["by_group"])


def test_images_of_a_given_size(run: Run, staged: Callable[[str], Path], folder: Path) -> None:
    """Blocks run out of image tokens where the picture is small: the size that is asked for is what the model sees."""
    data = ("--model", staged("qwen2_5_vl"), "--task=m3cot", "--data_path", folder / "m3cot.json")
    paths = {}
    for size in (28, 84):
        words = (*STEPS, "--strategies=staged", "--image_size", size, "--num_latent_patches=5")
        run(*data, *words, "--output", folder / str(size))
        (found,) = conditions(folder / str(size)).values()
        paths[size] = {path.split("]")[0] for path in column(found, "latent_path")}
    assert paths == {28: {"⟨[1 patch"}, 84: {"⟨[5 patches"}}
    assert Image.open(folder / "0.png").size == (80, 60)


# Resume, scores made anew, merge, processes


def test_a_run_goes_on_and_other_settings_are_refused(run: Run, tmp_path: Path) -> None:
    words = ("--model", BASE, "--num_mazes=3", "--output", tmp_path)
    run(*words, *SHORT)
    before = (tmp_path / "results.json").read_bytes()
    (path,) = (tmp_path / "items").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    run(*words, *SHORT)
    assert (tmp_path / "results.json").read_bytes() == before
    with pytest.raises(ValueError, match="was begun with max_new_tokens=4, now max_new_tokens=5"):
        run(*words, "--max_new_tokens=5", "--batch_size=3")
    with pytest.raises(ValueError, match="holds questions of an earlier run"):
        run(*words, *SHORT, "--no_resume")


def test_settings_have_a_folder_of_their_own(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--model", BASE, "--num_mazes=2", *SHORT)
    run(*words)
    run(*words)
    run(*words, "--seed=1")
    names = sorted(path.name for path in (tmp_path / "runs/evaluation").iterdir())
    assert len(names) == 2 and all(name.startswith("base-") for name in names)


def test_scores_are_made_anew(run: Run, lavit: Path, tmp_path: Path) -> None:
    """By the scorer of another protocol, without a model; other data than were asked are refused."""
    data = write_mmvp(tmp_path / "mmvp")
    run("--model", lavit, "--benchmark=mmvp", "--data_root", data, *SHORT, "--output", tmp_path / "run")
    before = conditions(tmp_path / "run")
    shutil.move(lavit, tmp_path / "moved")
    try:
        run("rescore", tmp_path / "run", "--protocol=lavit", "--strategies", "learned", "off")
    finally:
        shutil.move(tmp_path / "moved", lavit)
    after = conditions(tmp_path / "run")
    assert {each["protocol"] for each in after.values()} == {"lavit"}
    for name, each in after.items():
        assert column(each, "raw") == column(before[name], "raw")
        assert each["strict_accuracy"] == before[name]["accuracy"]
    write_mmvp(tmp_path / "mmvp", mmvp_rows()[:3])
    with pytest.raises(ValueError, match="has replies to other items of mmvp than these"):
        run("rescore", tmp_path / "run")
    for words, message in (([], "needs the folder of a run"), ([tmp_path], "no run was finished there")):
        with pytest.raises(ValueError, match=message):
            run("rescore", *words)


def test_ranks_of_a_published_run_are_merged(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "mmvp" / "decoding_by_dynamic" / "run_ck"
    folder.mkdir(parents=True)
    for rank, reply in enumerate(("yes", "no")):
        rows = [{"id": str(rank), "question": "q (a) Yes (b) No", "prediction": [reply], "label": "(a)"}]
        (folder / f"dynamic_rank{rank}.json").write_text(json.dumps(rows))
    for path in (folder, folder / "dynamic.json"):
        printed = run("merge", path, "--num_ranks", 2)
        assert "dynamic.json: 2 entries\nAccuracy: 1/2 = 50.00%" in printed  # the scorer of MMVP, by the folder's name
    with pytest.raises(ValueError, match=r"lacks \['dynamic_rank2.json'\] of 3"):
        run("merge", folder, "--num_ranks", 3)
    with pytest.raises(ValueError, match="has no file of a rank"):
        run("merge", tmp_path, "--num_ranks", 3)


@pytest.mark.distributed
def test_two_processes_give_what_one_gives(run: Run, tmp_path: Path) -> None:
    words = ["--model", str(BASE), "--num_mazes=7", "--batch_size=2", "--max_new_tokens=12", "--strategies", "off",
             "search:mode=reference,max_num_steps=1", "--vote", "2"]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *LAUNCH, *words, "--output", str(tmp_path / "two")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("mazes: chance") == 1, "one process reports"
    counts = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "two/items").iterdir()}
    assert counts == {"worker-000.jsonl": 12, "worker-001.jsonl": 9}, "two processes answered, batch about"
    run(*words, "--output", tmp_path / "one")
    assert (tmp_path / "one/results.json").read_bytes() == (tmp_path / "two/results.json").read_bytes()


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strategies", "dynamic:mask_latents"], r"strategy 'dynamic:mask_latents': .* not read \['mask_latents'\]"),
        (["--strategies", "dynamic:max_latent_steps=no"], "max_latent_steps=False must be at least 1"),
        (["--strategies", "learned", "learned:mask_latents=holes"], "mask_latents='holes' is unknown"),
        (["--strategies", "off:mask_latents"], r"latent_strategy='off' does not read \['mask_latents'\]"),
        (["--strategies", "slow"], "latent_strategy='slow' is unknown"),
        (["--strategies", "off", "--num_latent_steps=3"], r"num_latent_steps=\[3\] is read by none of"),
        (["--strategies", "off", "--vote", "4", "0"], "give numbers of replies, 1 or more"),
        (["--benchmark", "gqa"], "unknown benchmark 'gqa'; choose one of"),
        (["--benchmark", "mmvp", "--data_root=gone"], "gone"),
        (["--benchmark", "mmvp", "--task_name=IQ_Test"], "mmvp has no tasks; leave them out"),
        (["--protocol", "coco"], r"mazes has no protocol 'coco'; choose one of \['default'"),
        (["--max_samples=0"], "max_samples=0 must be at least 1"),
        (["--num=3"], "--num 3 is of .*, not of mazes; leave it out"),
        (["--split=test"], "--split test is of"),
        (["--small"], "is of graphs, not of mazes"),
        (["--prompt=published_inference"], "--format and --prompt are of"),
        (["--benchmark=graphs", "--data_path=x.json"], "graphs are generated"),
        (["--benchmark=prosqa", "--data_path=gone.json"], "gone.json"),
        (["--benchmark=graphs", "--num_nodes=3"], "num_nodes is 3"),
        (["--strategies", "off", "off"], "are asked for several times"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_a_model_is_loaded(
    words: list[str], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    strategies = [] if "--strategies" in words else ["--strategies", "off"]
    with pytest.raises(ValueError, match=message):
        run("--model=gone", *words, *strategies)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask_lvr", "--strategies=off"], "write it into --strategies"),
        (["--with_inst", "--protocol=lvr"], "--with_inst stands for --protocol laser, not"),
        (
            ["--benchmark", "mmvp", "mazes", "vsp", "--protocol", "lvr", "laser"],
            "give one for all, or one a benchmark",
        ),
        (["--benchmark", "mmvp", "mazes", "--output_file=x"], "--output_file is of one benchmark"),
        (["--prompt=test"], "argument --prompt: invalid choice: 'test'"),
        (["--format=llava"], "argument --format: invalid choice: 'llava'"),
    ],
)
def test_wrong_arguments(words: list[str], message: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--model=gone", *words)
    assert message in capsys.readouterr().err


def test_a_model_is_needed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--benchmark=mmvp")
    assert "the following arguments are required: --model" in capsys.readouterr().err
