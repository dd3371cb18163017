"""`--dry_run` of every recipe in `hub_configs/`, from a Hub without weights, and of recipes that must be refused."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples import train_laser
from tests.examples.published_models import CHAMELEON, QWEN2_VL, STAGED_MODELS, STAGED_TOTALS, staged_files
from tests.hub import ROOT, LocalHub, Repo, StoredFile
from trainers.graph_model import save_graph_base
from trainers.tiny import STOCK_CHAT_TEMPLATE, TINY_TEXTS, save_tiny_stock_checkpoint, tiny_config
from trainers.tiny_tokenizer import build_tiny_tokenizer

# Folders of hub_configs/ whose YAML files are no recipes of a training script.
OTHER_YAML = {"accelerate", "deepspeed", "datasets"}
RECIPES = sorted(
    path
    for path in (ROOT / "hub_configs").rglob("*.yaml")
    if path.relative_to(ROOT / "hub_configs").parts[0] not in OTHER_YAML
)
NAMES = [path.relative_to(ROOT).as_posix() for path in RECIPES]
# The shapes of the published checkpoints, and the number of their parameters.
SHAPES = {
    "Qwen/Qwen2.5-VL-7B-Instruct": (152064, 3584, 28, 28, 4, 18944, False),
    "Qwen/Qwen2.5-VL-3B-Instruct": (151936, 2048, 36, 16, 2, 11008, True),
}
TOTALS = {"Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656, "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976}
# What a dry run may read of a repository, and what it may ask for in vain.
READ = {"config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.json"}
WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|gguf|index\.json)$")


class AskedFiles(dict):
    """The files of a commit; remembers which were asked for."""

    def __init__(self, files: dict[str, StoredFile]) -> None:
        super().__init__(files)
        self.asked: set[str] = set()

    def __contains__(self, path: object) -> bool:
        self.asked.add(str(path))
        return super().__contains__(path)


def published_files(name: str) -> dict[str, StoredFile]:
    """Configuration of a published checkpoint in its real shape, a tiny tokenizer, and no weights."""
    rows, hidden, layers, heads, kv_heads, intermediate, tied = SHAPES[name]
    tokenizer = build_tiny_tokenizer(TINY_TEXTS)
    config = tiny_config(
        "qwen2_5_vl", rows, tokenizer, hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
        intermediate_size=intermediate, vision_depth=32, vision_hidden_size=1280, vision_num_heads=16,
        vision_intermediate_size=3420, window_size=112, tie_word_embeddings=tied,
    )  # fmt: skip
    config.vision_config.fullatt_block_indexes = [7, 15, 23, 31]
    values = {**config.to_dict(), "architectures": ["Qwen2_5_VLForConditionalGeneration"], "dtype": "bfloat16"}
    image_processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
    texts = {
        "config.json": json.dumps(values),
        "preprocessor_config.json": json.dumps(image_processor),
        "tokenizer.json": tokenizer.backend_tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "clean_up_tokenization_spaces": False,
            }
        ),
        "chat_template.json": json.dumps({"chat_template": STOCK_CHAT_TEMPLATE}),
    }
    return {path: StoredFile(text.encode(), lfs=False) for path, text in texts.items()}


DRY_RUNS = """
import contextlib, io, json, runpy, sys
from pathlib import Path
root, reports = Path(sys.argv[1]), {}
sys.path.insert(0, str(root))
for recipe, (script, model) in json.loads(sys.argv[2]).items():
    sys.argv = [script, "--config", str(root / recipe), "--dry_run", "--num_mazes", "64", "--num_eval_mazes", "2"]
    sys.argv += ["--model_name_or_path", model] if model else []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(root / script), run_name="__main__")
    reports[recipe] = printed.getvalue()
print(json.dumps({"reports": reports, "left": [str(path) for path in Path.cwd().rglob("*") if path.is_file()]}))
"""


def script_of(path: Path) -> str:
    """The script that a recipe says it is for, with its own path as --config."""
    name = path.relative_to(ROOT).as_posix()
    text = " ".join(line.lstrip("# ").removesuffix("\\") for line in path.read_text().splitlines())
    found = re.search(rf"(examples/\w+\.py)\s+--config {re.escape(name)}", re.sub(r"\s+", " ", text))
    assert found, f"{name} does not say its command, `examples/<script>.py --config {name}`"
    return found[1]


def start_of(path: Path, made: dict[str, Path]) -> str | None:
    """For a recipe that goes on from a folder of `runs/`: where it is, or the model that the recipe of this folder
    starts from.

    Args:
        made: folders that a script makes, by the name that recipes have for them.
    """
    folder = yaml.safe_load(path.read_text()).get("model_name_or_path", "")
    if not folder.startswith("runs/"):
        return None
    if folder in made:
        return str(made[folder])
    before = next(other for other in RECIPES if yaml.safe_load(other.read_text()).get("output_dir") == folder)
    return yaml.safe_load(before.read_text()).get("model_name_or_path", str(ROOT / "hub_configs/maze-tiny/base"))


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the dry run of each recipe prints, all in one process, and which files of the Hub were asked for."""
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        asked = {}
        for name in (*SHAPES, *STAGED_MODELS):
            repo = hub.repos["models", name] = Repo()
            commit = repo.add(published_files(name) if name in SHAPES else staged_files(name))
            asked[name] = repo.commits[commit] = AskedFiles(repo.commits[commit])
        made = {"runs/graph-base": save_graph_base(tmp_path_factory.mktemp("made") / "graph-base")}
        scripts = {name: (script_of(path), start_of(path, made)) for name, path in zip(NAMES, RECIPES, strict=True)}
        printed = hub.run(DRY_RUNS, str(ROOT), json.dumps(scripts), timeout=600)
        result = json.loads(printed.strip().splitlines()[-1])
        return {**result, "made": made, "asked": {name: files.asked for name, files in asked.items()}}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_would_do(name: str, dry_runs: dict[str, Any]) -> None:
    report, values = dry_runs["reports"][name], yaml.safe_load((ROOT / name).read_text())
    assert "dry run: no weights are read" in report
    if "grpo" in name:
        assert "\nfirst prompt " in report and "\nrollouts    " in report and "\nrewards     " in report
        assert f"beta {values.get('beta', 0.04):g} (reference: " in report or values.get("beta") == 0
    else:
        check_first_batch(report, values)
    model = start_of(ROOT / name, dry_runs["made"]) or values.get("model_name_or_path")
    totals = {**TOTALS, **STAGED_TOTALS}
    if model in totals:
        has_more = values.get("use_peft") or values.get("latent_method") == "lavit"  # counted by the tests below
        assert f"parameters  {totals[model]:,} in all" in report or has_more
        assert f", from {model}" in report
    if values["max_steps"] > 0:
        assert f"steps       {values['max_steps']:,} (" in report
    else:
        assert f"({values['num_train_epochs']:.2f} epochs of " in report
    assert f"peak lr {values['learning_rate']:g}" in report
    processes = values.get("dry_run_processes", 1)
    assert f"x {values.get('gradient_accumulation_steps', 1)} accumulated x {processes} processes" in report


def check_first_batch(report: str, values: dict[str, Any]) -> None:
    """Text and labels of a sample; of a curriculum a sample at each of its stages."""
    method, mode = values["latent_method"], values.get("staged_mode", "latent")
    assert "\nfirst batch " in report
    if method in ("laser", "lvr"):
        start = {"laser": "<|laser_start|>", "lvr": "<|lvr_start|>"}[method]
        assert "latent loss   | " in report and f"cross entropy | {start}" in report
        return
    if method == "lavit":
        block = "<lvr1><lvr2><lvr3><lvr4> " if values.get("latent_form", "learned") == "learned" else r"\n"
        assert f"cross entropy | {block}" in report.replace("\\n", r"\n") and "latent loss   | " not in report
        return
    last = values.get("num_stages", 10) - 1 if mode == "latent" else 0  # without an end: 50 epochs of 5 a stage
    assert f"stage {last}: steps " in report and f"stage {last + 1}: steps " not in report
    most = min(last, values.get("max_latent_stage", 5)) * values.get("latents_per_step", 1)
    behind = report.split(f"sample 0 at stage {last}")[-1]
    assert ("<|latent|>" in behind) == (most > 0)
    coconut = rf"<\|start-latent\|><\|latent\|>x{most}<\|end-latent\|>"
    if not values.get("latent_markers", True):
        coconut = " ".join([r"<\|latent\|>"] * most)
    block = {"ivtlr": r"<\|latent-patch\|>x\d+<\|latent\|>", "coconut": coconut}[method]
    assert most == 0 or re.search(block, behind)


def test_the_adapters_of_ivtlr_have_the_published_size(dry_runs: dict[str, Any]) -> None:
    """Rank 64 on seven projections (card 3.1), and here the four rows of the latent tokens, of both ends."""
    for folder, published, hidden in (("qwen2vl", 161_480_704, 3584), ("chameleon", 159_907_840, 4096)):
        for data in ("m3cot", "scienceqa"):
            report = dry_runs["reports"][f"hub_configs/ivtlr-{folder}-{data}/sft.yaml"]
            trained = int(re.search(r"adapter +([\d,]+)  trainable", report)[1].replace(",", ""))
            assert trained == published + 2 * 4 * hidden
            if folder == "qwen2vl":
                assert f"parameters  {STAGED_TOTALS[QWEN2_VL] + trained:,} in all" in report
    assert f"from {QWEN2_VL}" in dry_runs["reports"]["hub_configs/ivtlr-qwen2vl-m3cot/sft.yaml"]
    assert f"from {CHAMELEON}" in dry_runs["reports"]["hub_configs/ivtlr-chameleon-m3cot/sft.yaml"]


def test_the_heads_of_lavit_have_the_published_size(dry_runs: dict[str, Any]) -> None:
    """Two layers to the width of the teacher, and a query (card 3); the baseline without latents has neither."""
    heads = (2048 * 2048 + 2048) + (2048 * 5120 + 5120) + (2048 * 2048 + 2048)
    for name in ("sft", "single_stage", "stage1"):  # the second stage has those of its checkpoint
        report = dry_runs["reports"][f"hub_configs/lavit-3b/{name}.yaml"]
        assert f"latent head      {heads:>15,}  trainable" in report
        assert f"parameters  {TOTALS['Qwen/Qwen2.5-VL-3B-Instruct'] + heads:,} in all" in report
    assert "latent head" not in dry_runs["reports"]["hub_configs/lavit-3b/textonly.yaml"]


def test_the_totals_of_the_published_models(dry_runs: dict[str, Any]) -> None:
    seven, three = (dry_runs["reports"][f"hub_configs/laser-{size}/sft.yaml"] for size in ("7b", "3b"))
    vision = re.compile(r"vision tower +([\d,]+)  frozen")
    for report, total in ((seven, 8_292_166_656), (three, 3_754_622_976)):
        frozen = int(vision.search(report)[1].replace(",", ""))
        assert f"parameters  {total:,} in all, {total - frozen:,} trainable ({1 - frozen / total:.2%})" in report
    assert "LM head              544,997,376  trainable" in seven and "LM head" not in three
    for kind in ("lora", "qlora"):
        report = dry_runs["reports"][f"hub_configs/laser-7b/{kind}.yaml"]
        trained = int(re.search(r"adapter +([\d,]+)  trainable", report)[1].replace(",", ""))
        # rank 64 on seven projections of 28 layers, and three rows of both ends
        widths = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
        assert trained == 64 * 28 * widths + 2 * 3 * 3584
        assert f"parameters  {8_292_166_656 + trained:,} in all, {trained:,} trainable" in report
    weights = {kind: dry_runs["reports"][f"hub_configs/laser-7b/{kind}.yaml"] for kind in ("sft", "lora", "qlora")}
    size = {kind: float(re.search(r"weights ([\d.]+) GiB", report)[1]) for kind, report in weights.items()}
    assert size["sft"] == 15.4 and size["qlora"] < size["sft"] / 2 < size["lora"]


def test_no_weight_was_asked_for_and_nothing_was_written(dry_runs: dict[str, Any]) -> None:
    for name, asked in dry_runs["asked"].items():
        assert ({"config.json"} if name in STAGED_MODELS else READ) <= asked, name
        assert not [path for path in asked if WEIGHTS.search(path)], name
    left = [path for path in dry_runs["left"] if "/hub/" not in path and "/modules/" not in path]
    assert not [path for path in left if "runs" in Path(path).parts], left


def test_every_recipe_is_covered() -> None:
    known = ("laser-7b/sft", "laser-7b/lora", "laser-7b/qlora", "laser-3b/sft", "maze-tiny/laser")
    assert {f"hub_configs/{name}.yaml" for name in known} <= set(NAMES)
    assert set(SHAPES) == set(TOTALS)


# Recipes that training would refuse -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_stock_checkpoint(tmp_path_factory.mktemp("model") / "base")


BAD = {
    "adapter of no module": (["--use_peft=true", "--lora_target_modules", "x_proj"], "x_proj"),
    "adapter of the LM head": (["--use_peft=true", "--lora_target_modules", "lm_head", "q_proj"], "lm_head"),
    "pixels in the wrong order": (["--min_pixels=7840", "--max_pixels=784"], "min_pixels=7840 is above"),
    "cap below a sample": (["--enable_dynamic_batch=true", "--dynamic_batch_token_cap=40"], "token_cap=40 is smaller"),
    "unknown method": (["--latent_method=lasre"], "lasre"),
    "float16 weights": (["--dtype=float16"], "float16"),
    "optimiser that is not installed": (["--optim=galore_adamw"], "galore"),
    "data that is not there": (["--data_path=gone.json"], "gone.json"),
    "quantised without adapter": (["--load_in_4bit=true"], "load_in_4bit=true"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_training_refuses_is_refused(
    case: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, message = BAD[case]
    options = {"model_name_or_path": base, "output_dir": tmp_path / "out", "max_steps": 1, "num_mazes": 4}
    speed = {"per_device_train_batch_size": 2, "num_eval_mazes": 0, "use_cpu": True, "bf16": False}
    common = [f"--{name}={value}" for name, value in {**options, **speed, "save_strategy": "no"}.items()]
    errors = []
    for mode in ([], ["--dry_run"]):
        monkeypatch.setattr(sys, "argv", ["train_laser.py", *common, *flags, *mode])
        with pytest.raises(Exception, match=message) as caught:
            train_laser.main()
        errors.append(caught.value)
    assert type(errors[0]) is type(errors[1]) and str(errors[0]) == str(errors[1])
    assert not list(tmp_path.rglob("*.safetensors"))
