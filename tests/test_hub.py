"""Models, tokenizers and datasets go to the local Hub and come back in fresh processes with empty caches."""

import json
from pathlib import Path

import pytest

from tests.hub import LocalHub

PUSH_MODEL = """
import sys
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=64, **shape))
words = Tokenizer(models.WordLevel({"<unk>": 0, "left": 1, "right": 2, "up": 3, "down": 4}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
model.push_to_hub("org/tiny-llama")
tokenizer.push_to_hub("org/tiny-llama")
save_file(model.model.state_dict(), sys.argv[1])
"""

LOAD_MODEL = """
import sys
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("org/tiny-llama")
expected, got = load_file(sys.argv[1]), model.state_dict()
assert sorted(expected) == sorted(got), set(expected) ^ set(got)
different = [name for name in expected if not expected[name].equal(got[name])]
assert not different, different
print(type(model).__name__, AutoTokenizer.from_pretrained("org/tiny-llama")("left down sideways")["input_ids"])
"""

PUSH_DATASET = """
from datasets import Dataset, Image
from PIL import Image as Picture

pictures = [Picture.new("RGB", (6 + i, 4), (20 * i, 0, 255)) for i in range(5)]
rows = {"image": pictures, "question": [f"which {i}?" for i in range(5)], "answer": list("abcde")}
Dataset.from_dict(rows).cast_column("image", Image()).push_to_hub("org/pictures", split="train")
"""

LOAD_DATASET = """
import json
import sys
from datasets import load_dataset

rows = load_dataset("org/pictures", split="train", streaming=sys.argv[1] == "streaming")
seen = [[row["image"].size, row["image"].getpixel((0, 0)), row["question"], row["answer"]] for row in rows]
print(json.dumps([type(rows).__name__, seen]))
"""

FILES = """
import requests
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

api, repo = HfApi(), "org/files"

def read(path, revision="main"):
    with open(hf_hub_download(repo, path, revision=revision), "rb") as file:
        return file.read()

def refused(error, action, *args, **kwargs):
    try:
        action(*args, **kwargs)
    except error as caught:
        return caught
    raise RuntimeError(f"{action} was not refused with {error}")

api.create_repo(repo)
assert refused(HfHubHTTPError, api.create_repo, repo).response.status_code == 409
api.create_repo(repo, exist_ok=True)
blob = bytes(range(256)) * 40
add = [CommitOperationAdd("notes/a.txt", b"first"), CommitOperationAdd("notes/deep/big.bin", blob)]
first = api.create_commit(repo, add, commit_message="one").oid
gone = CommitOperationDelete("notes/deep/big.bin")
change = [CommitOperationAdd("notes/a.txt", b"second"), gone]
second = api.create_commit(repo, change, commit_message="two", parent_commit=first).oid

assert [read("notes/a.txt", at) for at in ("main", first, second)] == [b"second", b"first", b"second"]
assert read("notes/deep/big.bin", first) == blob
refused(EntryNotFoundError, read, "notes/deep/big.bin")
refused(RevisionNotFoundError, read, "notes/a.txt", "no-such-revision")
refused(RepositoryNotFoundError, api.model_info, "org/nothing")
refused(RepositoryNotFoundError, api.dataset_info, repo)
late = refused(HfHubHTTPError, api.create_commit, repo, [gone], commit_message="late", parent_commit=first)
assert late.response.status_code == 412
refused(EntryNotFoundError, api.create_commit, repo, [gone], commit_message="again")

entries = api.list_repo_tree(repo, revision=first, recursive=True)
listed = {entry.path: getattr(entry, "size", None) for entry in entries}
assert listed == {"notes": None, "notes/a.txt": 5, "notes/deep": None, "notes/deep/big.bin": len(blob)}, listed
assert [entry.path for entry in api.list_repo_tree(repo, "notes", revision=first)] == ["notes/deep", "notes/a.txt"]
assert api.model_info(repo).sha == second and api.list_repo_files(repo) == ["notes/a.txt"]
assert [info.path for info in api.get_paths_info(repo, ["notes", "none.txt"])] == ["notes"]
folder = snapshot_download(repo, revision=first)
assert open(f"{folder}/notes/deep/big.bin", "rb").read() == blob

address = f"{api.endpoint}/{repo}/resolve/{first}/notes/deep/big.bin"
for header, part in {"bytes=10-19": blob[10:20], "bytes=10200-": blob[10200:], "bytes=-7": blob[-7:]}.items():
    answer = requests.get(address, headers={"Range": header})
    assert (answer.status_code, answer.content) == (206, part), (header, answer.status_code)
assert requests.get(address, headers={"Range": "bytes=99999-"}).status_code == 416
head = requests.head(address)
assert head.headers["X-Repo-Commit"] == first and int(head.headers["Content-Length"]) == len(blob)
"""


def test_model_and_tokenizer_return_with_equal_tensors(hub: LocalHub, tmp_path: Path) -> None:
    tensors = str(tmp_path / "pushed.safetensors")
    hub.run(PUSH_MODEL, tensors)
    assert hub.run(LOAD_MODEL, tensors).split("\n")[0] == "LlamaModel [1, 4, 0]"
    stored = hub.repo("models", "org/tiny-llama")
    files = stored.commits[stored.head]
    assert files["model.safetensors"].lfs and not files["config.json"].lfs
    assert {"tokenizer.json", "generation_config.json"} <= set(files)


def test_dataset_with_images_returns_whole_and_streamed(hub: LocalHub) -> None:
    hub.run(PUSH_DATASET)
    expected = [[[6 + i, 4], [20 * i, 0, 255], f"which {i}?", "abcde"[i]] for i in range(5)]
    assert json.loads(hub.run(LOAD_DATASET, "whole")) == ["Dataset", expected]
    assert json.loads(hub.run(LOAD_DATASET, "streaming")) == ["IterableDataset", expected]
    stored = hub.repo("datasets", "org/pictures")
    assert "data/train-00000-of-00001.parquet" in stored.commits[stored.head]


def test_commits_revisions_ranges_and_errors(hub: LocalHub) -> None:
    hub.run(FILES)
    assert set(hub.unknown) <= {"GET /api/agent-harnesses"}


def test_a_failing_process_is_reported_with_its_output(hub: LocalHub) -> None:
    with pytest.raises(AssertionError, match="no entrance"):
        hub.run("raise SystemExit('no entrance')")


def test_blocked_packages_look_as_if_not_installed(hub: LocalHub) -> None:
    code = """
    import importlib.util
    assert importlib.util.find_spec("safetensors") is None
    try:
        import safetensors.torch
    except ImportError:
        print("blocked")
    """
    assert hub.run(code, blocked=("safetensors",)) == "blocked\n"
