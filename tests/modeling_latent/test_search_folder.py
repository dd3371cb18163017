"""The folder for `custom_generate`: a fresh process that has transformers but not this library searches with it, from
a folder, from a Hub repository, and from the repository of the model."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from modeling_latent import generate_with_search, save_search_folder
from modeling_latent.search_folder import FOLDER, REQUIREMENTS
from tests.hub import ROOT, LocalHub
from tests.latent import tiny_pair
from tests.naive_search import prompts

OUR_PACKAGES = ("modeling_latent", "trainers", "evaluation")
FILES = {
    "generate.py",
    "latent_attention.py",
    "latent_inputs.py",
    "requirements.txt",
    "search_answer.py",
    "search_generate.py",
    "search_latent.py",
    "search_options.py",
    "search_patches.py",
    "search_prefix.py",
    "search_rewards.py",
    "search_state.py",
}
OPTIONS = {"num_thought_tokens": 4, "max_num_steps": 3, "sigma": 0.3, "lr": 0.05, "max_new_tokens": 5,
           "do_sample": False}  # fmt: skip
REPOSITORY = "org/search"

PUSH = """
import sys
from huggingface_hub import HfApi

HfApi().create_repo(sys.argv[2])
HfApi().upload_folder(repo_id=sys.argv[2], folder_path=sys.argv[1])
"""

SEARCH = """
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

case = json.loads(Path(sys.argv[1]).read_text())
report = {}
for name, (folder, auto, inputs, source) in case["models"].items():
    own = {"trust_remote_code": True} if source is None else {}
    model = globals()[auto].from_pretrained(folder, **own).eval()
    inputs = torch.load(inputs)
    if source is not None:
        try:
            model.generate(**inputs, custom_generate=source, trust_remote_code=False, **case["options"])
            raise SystemExit("code of the folder was run without leave")
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        inputs |= {"custom_generate": source, "trust_remote_code": True}
    ids = model.generate(**inputs, **case["options"])
    output = model.generate(
        **inputs, **case["options"], num_beams=2, return_dict_in_generate=True, mode="reference",
        reward_rows="thoughts", visual_injection_start_step=3,
    )
    found = output.search
    report[name] = {
        "ids": ids.tolist(),
        "beams": output.sequences.tolist(),
        "rewards": [[step.reward for step in row] for row in found.steps],
        "module": type(found).__module__,
    }
    try:
        model.generate(**inputs, **case["options"], baseline="mean")
        raise SystemExit("an impossible search ran")
    except ValueError as error:
        report[name]["refusal"] = str(error)
assert not {"modeling_latent", "trainers", "evaluation"} & {name for name, module in sys.modules.items() if module}
print(json.dumps(report))
"""


def test_the_files(tmp_path: Path) -> None:
    """Those that the search needs and nothing else; written again, what is beside them stays."""
    assert save_search_folder(tmp_path / "new") == tmp_path / "new"
    folder = tmp_path / "new" / FOLDER
    assert {path.name for path in folder.iterdir()} == FILES and [path.name for path in folder.parent.iterdir()] == [
        FOLDER
    ]
    (folder / "generate.py").write_text("old")
    (tmp_path / "new" / "README.md").write_text("mine")
    save_search_folder(str(tmp_path / "new"))
    assert "generate_with_search as generate" in (folder / "generate.py").read_text()
    assert (tmp_path / "new" / "README.md").read_text() == "mine"
    for name in FILES - {"generate.py", "requirements.txt"}:
        assert (folder / name).read_bytes() == (ROOT / "modeling_latent" / name).read_bytes()


def test_the_requirements(tmp_path: Path) -> None:
    """The lower bounds of this project, each in the one form that transformers reads."""
    written = (save_search_folder(tmp_path) / FOLDER / "requirements.txt").read_text().splitlines()
    assert written == list(REQUIREMENTS)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = {Requirement(line).name: Requirement(line).specifier for line in project}
    for line in written:
        (bound,) = Requirement(line).specifier
        assert bound.operator == ">=" and bound in set(bounds[Requirement(line).name])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Folders of stock models with what this process finds, and what a fresh one reports."""
    root = tmp_path_factory.mktemp("search")
    source = str(save_search_folder(root / "search"))
    models, expected = {}, {}
    kinds = {"llama": AutoModelForCausalLM, "qwen2_5_vl": AutoModelForImageTextToText}
    for family, auto in kinds.items():
        inputs, _ = prompts(family)
        folder = root / family
        tiny_pair(0, 6.0, family)[0].save_pretrained(folder)
        torch.save(inputs, root / f"{family}.pt")
        model = auto.from_pretrained(folder).eval()
        ids = generate_with_search(model, **inputs, **OPTIONS)
        beams = generate_with_search(
            model, **inputs, **OPTIONS, num_beams=2, return_dict_in_generate=True, mode="reference",
            reward_rows="thoughts", visual_injection_start_step=3,
        )  # fmt: skip
        rewards = [[step.reward for step in row] for row in beams.search.steps]
        expected[family] = {"ids": ids.tolist(), "beams": beams.sequences.tolist(), "rewards": rewards}
        common = (auto.__name__, str(root / f"{family}.pt"))
        models[f"{family}, folder"] = (str(folder), *common, source)
        models[f"{family}, repository"] = (str(folder), *common, REPOSITORY)
        own = shutil.copytree(folder, root / f"{family}-own")
        save_search_folder(own)
        models[f"{family}, its own"] = (str(own), *common, None)
    (root / "case.json").write_text(json.dumps({"models": models, "options": OPTIONS}))
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        hub.run(PUSH, source, REPOSITORY)
        printed = hub.run(SEARCH, str(root / "case.json"), blocked=OUR_PACKAGES)
    return {"expected": expected, "found": json.loads(printed.splitlines()[-1])}


@pytest.mark.parametrize("place", ["folder", "repository", "its own"])
@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_a_process_without_the_library_searches(case: dict[str, Any], family: str, place: str) -> None:
    found, expected = case["found"][f"{family}, {place}"], case["expected"][family]
    assert found["ids"] == expected["ids"] and found["beams"] == expected["beams"]
    torch.testing.assert_close(torch.tensor(found["rewards"]), torch.tensor(expected["rewards"]), atol=1e-4, rtol=0)
    assert found["module"].startswith("transformers_modules.") and found["module"].endswith(".search_state")
    assert found["refusal"].startswith("baseline='mean' with num_noise_samples=1")
