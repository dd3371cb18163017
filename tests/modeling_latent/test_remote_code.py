"""A saved latent model in fresh processes that have transformers but not this library, from a folder and from a Hub.

Processes are slow to start, so the module's fixture runs three of them once and the tests read what they reported:
one with the library pushes the folder to the local Hub; one without it loads folder and Hub repository, decodes, and
saves what it loaded; another one without it loads that. That is done with Qwen2.5-VL; one more process loads a folder
of each family, with the code in it and with the stock class.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_latent import convert_stock_checkpoint
from tests.hub import ROOT, LocalHub, run_python
from tests.latent import liven
from tests.tiny import CHAMELEON, FAMILIES, tiny_images, tiny_prompts
from trainers.tiny import save_tiny_stock_checkpoint
from trainers.tiny_chameleon import save_tiny_chameleon_checkpoint

OUR_PACKAGES = ("modeling_latent", "trainers", "evaluation")
SHARED = {
    "configuration_latent.py",
    "generation_latent.py",
    "latent_attention.py",
    "latent_blocks.py",
    "latent_decoding.py",
    "latent_head_class.py",
    "latent_heads.py",
    "latent_inputs.py",
    "latent_lavit.py",
    "latent_learned.py",
    "latent_lvr.py",
    "latent_masks.py",
    "latent_plan.py",
    "latent_plan_types.py",
    "latent_staged.py",
    "latent_state.py",
    "latent_strategies.py",
    "latent_tokens.py",
    "latent_trace.py",
    "processing_latent_images.py",
    "search_answer.py",
    "search_generate.py",
    "search_latent.py",
    "search_options.py",
    "search_patches.py",
    "search_prefix.py",
    "search_rewards.py",
    "search_state.py",
    "search_strategy.py",
}
QWEN = {"latent_patch_embed.py", "latent_qwen_vl.py", "processing_latent.py"}
TRAVELLING = SHARED | QWEN | {"modeling_latent_qwen2_5_vl.py"}
REPOSITORY = "org/tiny-latent"
CALLS: dict[str, dict[str, Any]] = {
    "saved defaults": {},
    "off": {"latent_strategy": "off"},
    "fixed": {"latent_strategy": "fixed", "num_latent_steps": [2, 3], "force_span": True},
    "dynamic": {"latent_strategy": "dynamic", "max_latent_steps": 4, "latent_answer_ids": [40]},
    "search": {"latent_strategy": "search", "num_thought_tokens": 2, "max_num_steps": 2, "sigma": 0.3},
    "beams": {"latent_strategy": "dynamic", "max_latent_steps": 2, "num_beams": 2},
}

PUSH = """
import sys
sys.path.insert(0, sys.argv[1])
import modeling_latent
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(sys.argv[2])
assert type(model) is modeling_latent.LatentQwen2_5_VLForConditionalGeneration
model.push_to_hub(sys.argv[3])
AutoProcessor.from_pretrained(sys.argv[2]).push_to_hub(sys.argv[3])
"""

LOAD = """
import json
import sys
from pathlib import Path

from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

case = json.loads(Path(sys.argv[1]).read_text())
report = {}
for source in case["sources"]:
    try:
        AutoModel.from_pretrained(source, trust_remote_code=False)
        raise SystemExit("code of the repository was run without leave")
    except ValueError as error:
        refusal = str(error)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": Image.open(file)}, {"type": "text", "text": text}]}]
        for file, text in case["prompts"]
    ]
    inputs = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    entry = report[source] = {"input_ids": inputs["input_ids"].tolist(), "refusal": refusal, "models": {}}
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    entry["config"] = [type(config).__module__, config.model_type, config.latent_method, config.latent_token_id]
    entry["processor"] = [type(processor).__module__, processor.latent_tokens]
    for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForCausalLM):
        model = auto.from_pretrained(source, trust_remote_code=True)
        found = entry["models"][auto.__name__] = {"module": type(model).__module__, "ids": {}, "sums": {}}
        for name in case["calls"] if auto is AutoModel else ["saved defaults"]:
            output = model.generate(
                **inputs, max_new_tokens=9, do_sample=False, return_dict_in_generate=True, **case["calls"][name]
            )
            found["ids"][name] = output.sequences.tolist()
            found["sums"][name] = output.latent_trace.slot_inputs.double().sum(-1).tolist()
    entry["text"] = processor.batch_decode_latent(output.sequences, output.latent_trace.readable_sequences)
    if case["save"]:
        model.save_pretrained(f"{case['save']}/{len(report)}")
        processor.save_pretrained(f"{case['save']}/{len(report)}")
assert not {"modeling_latent", "trainers", "evaluation"} & {name for name, module in sys.modules.items() if module}
print(json.dumps(report))
"""


FAMILY = """
import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoModel, AutoProcessor

report = {}
for family, (folder, stock_folder, stock_name) in json.loads(Path(sys.argv[1]).read_text()).items():
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    content = [{"type": "image", "image": Image.open(sys.argv[2])}, {"type": "text", "text": "What?"}]
    chat = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    stock_class = getattr(transformers, stock_name)
    ours, theirs = (stock_class.from_pretrained(source).state_dict() for source in (folder, stock_folder))
    report[family] = {
        "module": type(model).__module__,
        "ids": ids.tolist(),
        "missing": sorted(set(theirs) ^ set(ours)),
        "different": [name for name in theirs if not torch.equal(ours[name], theirs[name])],
        "tensors": len(theirs),
    }
assert not {"modeling_latent", "trainers", "evaluation"} & {name for name, module in sys.modules.items() if module}
print(json.dumps(report))
"""


def test_every_family(tmp_path: Path) -> None:
    """Its folder decodes without the library, and the stock class finds every tensor of the stock folder in it."""
    (image,) = tiny_images(1)
    image.save(tmp_path / "image.png")
    cases, expected = {}, {}
    for family in (*FAMILIES, CHAMELEON):
        folder, stock_folder = tmp_path / family, tmp_path / f"stock-{family}"
        own = QWEN
        if family == CHAMELEON:
            save_tiny_chameleon_checkpoint(stock_folder)
            own = {"processing_latent_chameleon.py"}
        else:
            save_tiny_stock_checkpoint(stock_folder, family=family)
        model, processor = convert_stock_checkpoint(stock_folder)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        code = {path.name for path in folder.glob("*.py")}
        assert code == SHARED | own | {f"modeling_latent_{family}.py"}
        chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
        inputs = processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        expected[family] = model.generate(**inputs, max_new_tokens=12, do_sample=False).tolist()
        assert expected[family][0].count(processor.latent_token_id) == 8
        stock_name = type(model).__name__.removeprefix("Latent")
        cases[family] = (str(folder), str(stock_folder), stock_name)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {"PYTHONPATH": "", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    arguments = [str(tmp_path / "cases.json"), str(tmp_path / "image.png")]
    printed = run_python(FAMILY, *arguments, blocked=OUR_PACKAGES, env=environment, cwd=elsewhere)
    report = json.loads(printed.splitlines()[-1])
    assert list(report) == [*FAMILIES, CHAMELEON]
    for family, found in report.items():
        assert found["module"].startswith("transformers_modules.")
        assert found["ids"] == expected[family], family
        assert found["tensors"] > 50 and not found["missing"] and not found["different"], family


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A saved model with its processor, prompts as files, and what this process decodes."""
    root = tmp_path_factory.mktemp("remote")
    model, processor = convert_stock_checkpoint(save_tiny_stock_checkpoint(root / "stock"))
    liven(model, 6.0)
    model.save_pretrained(root / "latent")
    processor.save_pretrained(root / "latent")
    prompts = []
    for number, chat in enumerate(tiny_prompts()):
        image, text = (part[part["type"]] for part in chat[0]["content"])
        image.save(root / f"{number}.png")
        prompts.append((str(root / f"{number}.png"), text))
    inputs = processor.apply_chat_template(
        tiny_prompts(),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    ids, sums = {}, {}
    for name, options in CALLS.items():
        output = model.generate(**inputs, max_new_tokens=9, do_sample=False, return_dict_in_generate=True, **options)
        ids[name] = output.sequences.tolist()
        sums[name] = output.latent_trace.slot_inputs.double().sum(-1).tolist()
        if name == "saved defaults":
            text = processor.batch_decode_latent(output.sequences, output.latent_trace.readable_sequences)
    config = ["latent_qwen2_5_vl", "laser", processor.latent_token_id]
    expected = {"input_ids": inputs["input_ids"].tolist(), "ids": ids, "sums": sums, "text": text, "config": config}
    return {"root": root, "prompts": prompts, "expected": expected, "tokens": processor.latent_tokens}


@pytest.fixture(scope="module")
def reports(case: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the processes report, by where the model came from; `"files"` holds the names in each place."""
    root, home = case["root"], tmp_path_factory.mktemp("hub")
    with LocalHub(home) as hub:
        hub.run(PUSH, str(ROOT), str(root / "latent"), REPOSITORY)
        stored = hub.repo("models", REPOSITORY)
        files = {"hub": sorted(stored.commits[stored.head])}
        first, second = [str(root / "latent"), REPOSITORY], [f"{root}/again/1", f"{root}/again/2"]
        results = []
        for sources, save in ((first, f"{root}/again"), (second, "")):
            request = {"sources": sources, "save": save, "prompts": case["prompts"], "calls": CALLS}
            (root / "request.json").write_text(json.dumps(request))
            printed = hub.run(LOAD, str(root / "request.json"), blocked=OUR_PACKAGES)
            results.extend(json.loads(printed.splitlines()[-1]).values())
    for name, folder in (("folder", root / "latent"), ("again 1", root / "again/1"), ("again 2", root / "again/2")):
        files[name] = sorted(path.name for path in folder.iterdir())
    names = ("folder", "hub", "saved after the folder", "saved after the hub")
    return {**dict(zip(names, results, strict=True)), "files": files}


SOURCES = ("folder", "hub", "saved after the folder", "saved after the hub")


@pytest.mark.parametrize("source", SOURCES)
def test_fresh_process_decodes_the_same(case: dict[str, Any], reports: dict[str, Any], source: str) -> None:
    """Prompts, ids and slot vectors of every strategy, through every Auto class."""
    report, expected = reports[source], case["expected"]
    assert report["input_ids"] == expected["input_ids"] and report["text"] == expected["text"]
    assert list(report["models"]) == ["AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM"]
    for auto, found in report["models"].items():
        assert found["ids"].items() <= expected["ids"].items(), auto
        assert len(found["ids"]) == (len(CALLS) if auto == "AutoModel" else 1)
        for name, sums in found["sums"].items():
            torch.testing.assert_close(torch.tensor(sums), torch.tensor(expected["sums"][name]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("source", SOURCES)
def test_the_code_is_that_of_the_repository(case: dict[str, Any], reports: dict[str, Any], source: str) -> None:
    report = reports[source]
    modules = [report["config"][0], report["processor"][0], *(found["module"] for found in report["models"].values())]
    assert all(module.startswith("transformers_modules.") for module in modules), modules
    assert report["config"][1:] == case["expected"]["config"] and report["processor"][1] == case["tokens"]
    assert "trust_remote_code=True" in report["refusal"]


def test_the_same_files_travel(reports: dict[str, Any]) -> None:
    """A folder, a repository, and what is saved from either have all the code, and none has more."""
    for name, files in reports["files"].items():
        assert {file for file in files if file.endswith(".py")} == TRAVELLING, name
        assert {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"} <= set(files), (
            name
        )


def test_the_expectation_has_latents_and_differences(case: dict[str, Any]) -> None:
    """The strategies decode different ids here, so that equality above says something."""
    ids, sums = case["expected"]["ids"], case["expected"]["sums"]
    assert len({json.dumps(ids[name]) for name in ("off", "fixed", "dynamic", "saved defaults")}) == 4
    assert not sums["off"] and len(sums["fixed"]) >= 5 and len(sums["dynamic"]) >= 8
