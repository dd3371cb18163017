"""What the options of an evaluation ask for: prompts against the token ids of training, places of data, numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers.processors import TemplateProcessing

from evaluation.benchmarks.registry import benchmark
from evaluation.benchmarks.step_benchmarks import step_protocol, text_behind
from evaluation.harness.arguments import asked_of, own_strategy, parse_args, settings_of, variants_asked
from evaluation.harness.evaluation_run import EvaluationSettings, run_evaluation
from evaluation.harness.variants import Asked, Variant
from tests.evaluation.choice_files import mmvp_rows, write_blink, write_mmvp, write_vstar
from tests.hub import ROOT
from tests.tiny import tiny_images, tiny_processor
from tests.trainers.staged_parts import IMAGE_FAMILIES, staged_parts
from trainers.data.graphs import SMALL_GRAPHS
from trainers.data.records import Record, make_record
from trainers.data.staged_text import encode_staged


def choice(images: list[Image.Image]) -> Record:
    return make_record(
        "q", "Which is hot? Which is hot?", "B", images, choices=["ice", " fire ", "snow"], steps=["Ice is cold."],
        meta={"source": "f.json", "row": 0, "domain": "science"},
    )  # fmt: skip


class Generated:
    """Stands before `generate` of a model: keeps the arguments of the calls and what came out, of the last call."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs: dict[str, Any] = {}
        self.ids: list[int] = []
        generate = model.generate

        def spy(**options: Any) -> Any:
            output = generate(**options)
            self.inputs, (self.ids,) = options, output.sequences.tolist()
            return output

        monkeypatch.setattr(model, "generate", spy)

    @property
    def prompt(self) -> list[int]:
        (ids,) = self.inputs["input_ids"].tolist()
        return ids


def run_one(folder: Path, given: Asked, model: Any, processor: Any, budget: int, **options: Any) -> dict[str, Any]:
    """The only item of a run."""
    settings = EvaluationSettings("m", max_new_tokens=budget)
    name = options.get("latent_strategy", "own")
    options.setdefault("latent_strategy", "staged")
    found = run_evaluation(folder, [given], [Variant(name, options)], lambda _: (model, processor), settings)
    (item,) = found["conditions"][0]["items"]
    return item


@pytest.fixture(scope="module")
def parts() -> Callable[[str], tuple]:
    """A tiny model of a family with its processor, built once."""
    built: dict[str, tuple] = {}
    return lambda family: built.setdefault(family, staged_parts(family))


@pytest.mark.parametrize("strategy", ["staged", "off"])
@pytest.mark.parametrize("prompt", ["training", "published_inference"])
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_prompts_are_the_token_ids_of_training(
    family: str, prompt: str, strategy: str, parts: Callable[[str], tuple], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    """What the published prompt has behind its latents stands behind slots that are laid out, else at its end."""
    (model, processor), record = parts(family), choice([tiny_images(1)[0]])
    generated = Generated(model, monkeypatch)
    label, fmt = ("ivtlr_chameleon", "ivtlr-chameleon") if family == "chameleon" else ("ivtlr", "ivtlr-qwen")
    given = Asked(
        benchmark("m3cot"), step_protocol("m3cot", label, prompt=prompt), [record],
        text_behind("m3cot", label, prompt=prompt),
    )  # fmt: skip
    numbers = {"num_latent_steps": 2, "num_latent_patches": 1} if strategy == "staged" else {}
    item = run_one(tmp_path, given, model, processor, 3, latent_strategy=strategy, **numbers)
    wanted = encode_staged(record, processor, fmt, [generated.prompt.count(processor.image_token_id)], prompt=prompt)
    behind = wanted.after_latents
    assert bool(behind) == (family == "chameleon" and prompt == "published_inference")
    slot, patch = processor.latent_token_id, processor.latent_patch_token_id
    latents = [patch, slot] * 2 if strategy == "staged" else []
    assert generated.prompt == wanted.question + ([] if latents else behind)
    assert generated.ids[:-3] == [*wanted.question, *latents, *behind]
    assert item["latent_steps"] == len(latents) // 2
    assert item["text"] == processor.tokenizer.decode(generated.ids[-3:], skip_special_tokens=True).strip()


@pytest.mark.parametrize(("family", "fmt"), [("gpt2", "coconut"), ("llama", "coconut"), ("llama", "plain")])
def test_prompts_of_text_models(family: str, fmt: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tokenizer's own first token stands in Coconut's format, and not where a chat template writes the text."""
    model, processor = staged_parts(family)
    processor.chat_template = tiny_processor(family).chat_template
    first = ("<|endoftext|>", processor.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    processor.tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    graphs = benchmark("graphs")
    given = Asked(graphs, step_protocol("graphs", fmt=fmt), graphs.read(num=1, **SMALL_GRAPHS))
    generated = Generated(model, monkeypatch)
    item = run_one(tmp_path, given, model, processor, 2, num_latent_steps=2, latent_markers=True)
    wanted = encode_staged(given.records[0], processor, fmt)
    start, end = processor.latent_start_token_id, processor.latent_end_token_id
    assert generated.prompt == wanted.question and (wanted.question[0] == first[1]) == (fmt == "coconut")
    assert generated.ids[:-2] == [*wanted.question, start, *[processor.latent_token_id] * 2, end]
    assert item["tokens"] == 6


def test_images_become_squares_on_white(
    parts: Callable[[str], tuple], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Image.new("RGBA", (90, 30), (0, 0, 0, 0)).save(tmp_path / "a.png")
    row = {"id": "m", "question": "Which?", "choices": ["ice", "fire"], "answer": "B", "rationale": "It burns. So.",
           "image": "a.png", "domain": "science"}  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    model, processor = parts("qwen2_5_vl")
    grids, values = [], []
    for size in ([], ["--image_size=56"]):
        args = parse_args(["--model=m", "--benchmark=m3cot", f"--data_path={tmp_path / 'rows.jsonl'}", *size])
        (given,) = asked_of(args, lambda _: None)
        generated = Generated(model, monkeypatch)
        run_one(tmp_path / str(len(grids)), given, model, processor, 1, latent_strategy="off")
        grids.append(generated.inputs["image_grid_thw"][0].tolist())
        values.append(generated.inputs["pixel_values"].unique())
    assert grids[0][1] < grids[0][2] and grids[1] == [1, 4, 4]
    assert len(values[1]) <= 3 and values[1].min() > values[0].max()


# Data


def asked(*words: str) -> list[Asked]:
    return asked_of(parse_args(["--model=m", *words]), lambda _: None)


def test_mazes_are_the_default(tmp_path: Path) -> None:
    """200 of them with the held-out seed, or as many as are asked for."""
    (given,) = asked("--num_mazes=3")
    assert given.benchmark.name == "mazes" and given.records == benchmark("mazes").read(num=3)
    assert asked("--num_mazes=3", "--seed=4")[0].records == benchmark("mazes").read(num=3, seed=4)
    assert len(asked("--max_samples=2")[0].records) == 2 and given.protocol.name == "default"


def test_protocols(tmp_path: Path) -> None:
    """One for all, or one a benchmark; the published switch of LASER."""
    folder = write_mmvp(tmp_path / "mmvp").parent
    write_vstar(tmp_path / "vstar")
    words = ("--benchmark", "mmvp", "vstar", f"--data_root={folder}")
    for more, names in (
        ([], ["default", "default"]),
        (["--protocol", "lvr"], ["lvr", "lvr"]),
        (["--protocol", "lvr", "lavit"], ["lvr", "lavit"]),
        (["--with_inst"], ["laser", "laser"]),
    ):
        assert [each.protocol.name for each in asked(*words, *more)] == names


def test_rows_are_told(tmp_path: Path) -> None:
    told: list[str] = []
    asked_of(parse_args(["--model=m", "--benchmark=mmvp", f"--data_root={write_mmvp(tmp_path)}"]), told.append)
    assert told == [f"mmvp: {len(mmvp_rows())} good rows, 0 bad rows (0.00% bad)"]


def test_tasks_are_those_of_the_benchmark_that_has_some(tmp_path: Path) -> None:
    for name in ("Counting", "IQ_Test"):
        write_blink(tmp_path / "blink", name)
    write_mmvp(tmp_path / "mmvp")
    words = ("--benchmark", "mmvp", "blink", f"--data_root={tmp_path}")
    first, second = asked(*words, "--task_name", "IQ_Test")
    assert len(first.records) == 4 and {second.benchmark.group(record) for record in second.records} == {"IQ_Test"}
    with pytest.raises(ValueError, match="mmvp has no tasks; leave them out"):
        asked("--benchmark", "mmvp", f"--data_root={tmp_path / 'mmvp'}", "--task_name", "IQ_Test")


def test_graphs_take_sizes_and_notation() -> None:
    words = ("--benchmark=graphs", "--small", "--num=2", "--seed=3")
    (given,) = asked(*words, "--num_nodes=8", "--num_edges=6", "--path_lengths", "3", "--notation=pairs")
    sizes = {**SMALL_GRAPHS, "num_nodes": 8, "num_edges": 6, "path_lengths": [3], "notation": "pairs"}
    assert given.records == benchmark("graphs").read(num=2, seed=3, **sizes)
    assert asked(*words)[0].records == benchmark("graphs").read(num=2, seed=3, **SMALL_GRAPHS)


def test_the_seed_of_sampling_needs_no_generated_benchmark(tmp_path: Path) -> None:
    words = ("--benchmark=mmvp", f"--data_root={write_mmvp(tmp_path)}", "--seed=4")
    assert len(asked(*words, "--vote", "2")) == len(asked(*words, "--temperature=1")) == 1
    with pytest.raises(ValueError, match="--seed 4 is of mazes, .*, not of mmvp; leave it out"):
        asked(*words)
    assert settings_of(
        parse_args(["--model=m", *words, "--temperature=0.5", "--thoughts=reply"])
    ) == EvaluationSettings("m", 32, None, 0.5, 4, "reply")


# Conditions


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--strategies", "fixed", "off", "--num_latent_steps", "4", "8"],
         ["fixed, num_latent_steps 4", "fixed, num_latent_steps 8", "off"]),
        (["--strategy", "staged", "--num_latent_patches", "2"], ["staged, num_latent_patches 2"]),
        (["--mask_lvr", "--num_latent_steps", "3"], ["learned:mask_latents, num_latent_steps 3"]),
        (["--strategies", "off", "--vote", "2", "6"], ["off", "off, most of 2", "off, most of 6"]),
        (["--strategies", "dynamic", "--compare", "runs/other"], ["dynamic", "dynamic, other"]),
        (["--strategies", "dynamic", "--compare", "o", "--compare_strategy", "fixed:num_latent_steps=2",
          "--max_latent_steps", "8"], ["dynamic, max_latent_steps 8", "fixed:num_latent_steps=2, o"]),
    ],
)  # fmt: skip
def test_conditions(words: list[str], names: list[str]) -> None:
    assert [each.name for each in variants_asked(parse_args(["--model=m", *words]))] == names


def test_the_strategy_of_a_folder(tmp_path: Path) -> None:
    """Read without weights: that of the method, or the saved one; a stock model has none."""
    model, processor = staged_parts("gpt2")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert own_strategy(str(tmp_path)) == "staged"
    assert own_strategy(str(ROOT / "hub_configs/maze-tiny/base")) == "off"
