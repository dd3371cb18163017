"""The plugin of lmms-eval: on a local task where lmms-eval is installed, its refusals everywhere."""

import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import datasets
import pytest
import torch

from evaluation.benchmarks.benchmark import AskProtocol, Scored
from evaluation.causal.contexts import CleanItem, clean_items
from evaluation.lmms_eval_plugin import HOST, host_module, manifests
from evaluation.runner import build_prompt, predict
from tests.evaluation.intervention_parts import METHODS, parts
from tests.hub import ROOT
from tests.tiny import tiny_images
from trainers.data.records import make_record

INSTALLED = importlib.util.find_spec(HOST) is not None
needs_host = pytest.mark.skipif(not INSTALLED, reason="needs lmms-eval (README, section 'Evaluate')")
OPTIONS = METHODS["fixed"].options
ARGUMENTS = ",".join(f"{name}={value}" for name, value in OPTIONS.items())

TASK = """
task: tiny_task
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {table}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: 9
  temperature: 0
  until: ["zzz"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
def visual(doc):
    return [doc["image"].convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


def test_the_entry_point_names_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"]["lmms_eval.models"].items()
    assert (name, value) == ("latent", "evaluation.lmms_eval_plugin:manifests")
    assert importlib.metadata.EntryPoint(name, value, "lmms_eval.models").load() is manifests


@pytest.mark.skipif(INSTALLED, reason="lmms-eval is installed")
def test_without_lmms_eval_it_says_how_to_install_it() -> None:
    with pytest.raises(
        ImportError, match="lmms_eval.api.model cannot be imported .*install it: pip install --no-deps"
    ):
        host_module("api.model")
    with pytest.raises(ImportError, match="lmms_eval.models.registry_v2 cannot be imported"):
        manifests()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its processor."""
    target = tmp_path_factory.mktemp("model")
    for part in parts("fixed"):
        part.save_pretrained(target)
    return target


RECORDS = [make_record(str(n), f"What is it? {'Say it. ' * n}", "A", [tiny_images(4)[n % 4]]) for n in range(5)]


@needs_host
def test_a_task_of_lmms_eval_gives_the_replies_of_predict(folder: Path, tmp_path: Path) -> None:
    rows = []
    for record in RECORDS:
        data = io.BytesIO()
        record["images"][0].save(data, "png")
        rows.append({"image": {"bytes": data.getvalue(), "path": None}, "question": record["question"], "answer": "A"})
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "test.parquet")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_task.yaml").write_text(TASK.format(table=tmp_path / "test.parquet"))
    (tmp_path / "tasks" / "utils.py").write_text(UTILS)
    model_args = f"pretrained={folder},{ARGUMENTS}"
    command = [sys.executable, "-m", "lmms_eval", "--model", "latent", "--model_args", model_args, "--device", "cpu",
               "--tasks", "tiny_task", "--include_path", str(tmp_path / "tasks"), "--batch_size", "2",
               "--log_samples", "--output_path", str(tmp_path / "out")]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    written = list((tmp_path / "out").rglob("*samples*tiny_task*.jsonl"))
    assert len(written) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    (samples,) = written
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    expected = predict(*parts("fixed"), RECORDS, max_new_tokens=9, **OPTIONS)
    replies = [line["filtered_resps"] for line in lines]  # a list of one, or the text itself
    assert [each if isinstance(each, str) else each[0] for each in replies] == [each.text for each in expected]


def naive_log_prob(item: CleanItem, text: str) -> float:
    """Log-probability of a text behind the latents of an item, by one forward."""
    model, processor = parts("fixed")
    reply = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.cat([item.prefix, item.ids, torch.tensor(reply)])[None]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, len(item.prefix) : len(item.prefix) + len(item.ids)] = item.latent
    embeds = torch.zeros(1, ids.shape[1], item.inputs.shape[1])
    embeds[mask] = item.inputs
    inputs = processor(text=[item.prompt], images=[item.record["images"]], return_tensors="pt")
    types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, ids.shape[1] - inputs["input_ids"].shape[1]))
    vision = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        output = model(input_ids=ids, latent_embeds=embeds, latent_mask=mask, mm_token_type_ids=types, **vision)
    logs = output.logits.log_softmax(-1)[0, -len(reply) - 1 : -1]
    return float(logs.gather(1, torch.tensor(reply)[:, None]).sum())


@needs_host
def test_log_likelihoods_rounds_and_refusals(folder: Path) -> None:
    from evaluation.lmms_eval_model import LatentVLM

    with pytest.raises(ValueError, match=r"model_args \['latents'\] are unknown; known are pretrained"):
        LatentVLM(str(folder), latents=4)
    host = LatentVLM(str(folder), device="cpu", max_new_tokens=9, **OPTIONS)
    host.task_dict = {"t": {"test": dict(enumerate(RECORDS))}}
    model, processor = parts("fixed")

    class Request:
        def __init__(self, *args: object) -> None:
            self.args = args

    def visual(record: dict) -> list:
        return record["images"]

    protocol = AskProtocol("p", "", build_prompt, lambda *_: Scored(False, None), 9)
    (item,) = clean_items(model, processor, [RECORDS[1]], protocol, **OPTIONS)
    word = processor.tokenizer.decode(item.reply_ids[:1])
    asked = [Request(RECORDS[1]["question"], text, visual, 1, "t", "test") for text in ("A dog", word)]
    (own, is_greedy), (first, is_first) = host.loglikelihood(asked)
    assert own == pytest.approx(naive_log_prob(item, "A dog"), abs=1e-3) and not is_greedy
    if processor.tokenizer(word, add_special_tokens=False)["input_ids"] == list(item.reply_ids[:1]):
        assert is_first and first > -20

    def asks(doc: dict, previous_output: list, round_idx: int, previous_round_info: object) -> tuple:
        assert len(previous_output) == round_idx
        return None, f"Sure? {previous_output[-1]}", round_idx == 2, previous_output, None

    request = Request(RECORDS[0]["question"], {"max_new_tokens": 9}, visual, asks, 0, "t", "test")
    (rounds,) = host.generate_until_multi_round([request])
    first = predict(model, processor, RECORDS[:1], max_new_tokens=9, **OPTIONS)[0].text
    assert len(rounds) == 2 and rounds[0] == first
