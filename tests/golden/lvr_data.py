"""LVR golden vectors: boxes to tokens, text layout, prompts of the second stage, packing streams (card 2 and 5.4)."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.golden.conftest import each, golden_dir, golden_json
from trainers.data.boxes import box_tokens, reference_box_tokens, reference_pixel_tokens, region_tokens, tokens_box
from trainers.data.llava import encode_conversation, pad_batch, record_from_llava
from trainers.data.lvr import record_from_lvr_grpo
from trainers.data.lvr_text import LVR_TOKENS, REFERENCE_LAYOUT, grpo_example, render_region_turns
from trainers.data.packing import BucketOptions, Segment, can_be_cut, cut_example, plan_buckets, unpack_rows

FOLDER = golden_dir("lvr")
CASES: dict[str, Any] = golden_json(FOLDER, "data_cases.json", {})
SPECIAL_IDS: dict[str, int] = golden_json(FOLDER, "manifest.json", {}).get("special_ids", {})
_path = FOLDER / "data.safetensors"
TENSORS: dict[str, np.ndarray] = load_file(_path) if _path.is_file() else {}


def sets(name: str) -> list[str]:
    """`[name]` when the tensor file has that group, so that a set without it yields no test."""
    return [name] if any(key.startswith(f"{name}/") for key in TENSORS) else []


def box_cases(name: str, size: str) -> list[tuple[list[float], tuple[int, int], list[int]]]:
    """`(box, size, token indices)` of a group."""
    counts = TENSORS[f"{name}/count"]
    tokens = np.split(TENSORS[f"{name}/flat_index"], np.cumsum(counts)[:-1])
    sizes = [tuple(pair) for pair in TENSORS[f"{name}/{size}"].tolist()]
    return list(zip(TENSORS[f"{name}/boxes"].tolist(), sizes, [t.tolist() for t in tokens], strict=True))


@each("name", sets("bbox_grid"))
def test_boxes_on_the_patch_grid(name: str) -> None:
    for box, grid, expected in box_cases(name, "grid_hw"):
        assert reference_box_tokens(box, grid).tolist() == expected, (box, grid)


@each("name", sets("bbox_grid"))
def test_the_default_mapper_differs_only_where_it_should(name: str) -> None:
    """It refuses what is no box in the image, and gives a box that covers no token the one where it lies."""
    same = 0
    for box, grid, expected in box_cases(name, "grid_hw"):
        x0, y0, x1, y1 = box
        if not (0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1):
            continue
        found = box_tokens(box, (1, *grid)).tolist()
        assert found == expected if expected else len(found) == 1, (box, grid)
        same += bool(expected)
    assert same


@each("name", sets("bbox_pixel"))
def test_boxes_on_the_pixel_grid_and_back(name: str) -> None:
    inverse = TENSORS["bbox_pixel/inverse_box"].tolist()
    for (box, (height, width), expected), back in zip(box_cases(name, "image_hw"), inverse, strict=True):
        found = reference_pixel_tokens(box, (width, height))
        assert found.tolist() == expected, (box, height, width)
        assert tokens_box(found, (1, height // 28, width // 28), merge_size=1) == back, (box, height, width)


@each("case", CASES.get("bbox_multi", []), ids=lambda case: str(case["grid_thw"]))
def test_several_boxes(case: dict[str, Any]) -> None:
    regions = region_tokens([{"image": 0, "xyxy": box} for box in case["boxes"]], case["grid_thw"])
    assert [region.tolist() for region in regions] == case["result"]


@each("tokens", [SPECIAL_IDS] if "lvr" in SPECIAL_IDS else [], ids=lambda _: "order")
def test_latent_tokens_are_added_in_the_published_order(tokens: dict[str, int]) -> None:
    names = [token.strip("<|>") for token in LVR_TOKENS.values()]
    ids = [tokens[name] for name in names]
    assert ids == list(range(ids[0], ids[0] + len(ids)))


class CharacterTokenizer:
    """One token a special token, else one a character; ids are drawn as the tokens are met."""

    def __init__(self) -> None:
        self.tokens: list[str] = []

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        found = re.findall(r"<\|[a-z_]+\|>|.", text, re.DOTALL)
        self.tokens += [token for token in dict.fromkeys(found) if token not in self.tokens]
        return [self.tokens.index(token) for token in found]

    def text(self, ids: list[int]) -> str:
        return "".join(self.tokens[i] for i in ids)


@each("case", CASES.get("layout", []), ids=lambda case: case["note"])
def test_layout(case: dict[str, Any]) -> None:
    item, grid = case["item"], case["grid_hw"]
    regions = [reference_box_tokens(box, grid) for box in item["bboxes"]]
    assert [region.tolist() for region in regions] == case["region_indices"]
    messages = record_from_llava(item, "data.json", 0, image_folder=".")["messages"]
    turns = render_region_turns(messages, [len(region) for region in regions], REFERENCE_LAYOUT)
    num_images = sum(turn["content"].count("<image>") for turn in messages)
    tokenizer = CharacterTokenizer()
    encoded = encode_conversation(turns, tokenizer, [grid[0] * grid[1] // 4] * num_images)
    labelled = [place for place, label in enumerate(encoded["labels"]) if label != -100]
    assert tokenizer.text(encoded["input_ids"]) == case["full_text"]
    assert tokenizer.text([encoded["labels"][place] for place in labelled]) == case["trained_text"]
    assert (labelled[0], len(encoded["input_ids"])) == (case["first_trained_index"], case["n_tokens"])


@each("case", CASES.get("grpo_items", []), ids=lambda case: case["item"]["conversations"][0]["value"])
def test_second_stage_item(case: dict[str, Any]) -> None:
    item, expected = case["item"], case["result"]
    images = [part for turn in expected["prompt"] for part in turn["content"] if isinstance(part, dict)]
    first = next((part for part in images if part["type"] == "image"), {"image": ""})
    names = [item["image"]] if isinstance(item.get("image"), str) else item.get("image", [""])
    folder = first["image"].removesuffix(names[0])
    record = record_from_lvr_grpo(item, "data.json", 0, folder)
    bounds = {name: first.get(name) for name in ("min_pixels", "max_pixels")}
    assert grpo_example(record, **bounds) == expected


# Packing

# Ids of the synthetic samples: text, start, embedding and end of an image, slot.
TEXT, START, PATCH, END, SLOT = 0, 1, 2, 3, 4
IMAGE = {START, PATCH, END}


def synthetic(sample: list[int]) -> dict[str, list[int]]:
    """A sample as the manifest describes it."""
    _, length, image_start, image_tokens, latent_start, latents, _, _ = sample
    ids = [TEXT] * length
    ids[image_start : image_start + image_tokens + 2] = [START, *[PATCH] * image_tokens, END]
    ids[latent_start : latent_start + latents] = [SLOT] * latents
    return {"input_ids": ids, "labels": ids, "regions": list(range(latents))}


@each("case", CASES.get("packing", []), ids=lambda case: case["name"])
def test_packing_stream(case: dict[str, Any]) -> None:
    params, datasets = dict(case["params"]), case["datasets"]
    taken, limit = params.pop("taken"), params["max_packed_tokens"]
    place = {name: params.pop(f"data_{name}") for name in ("rank", "world_size")}
    place |= {name: params.pop(name) for name in ("worker_id", "num_workers")}
    options = BucketOptions(**params, over_long="cut")

    def cuttable(dataset: int, index: int) -> bool:
        return can_be_cut(synthetic(datasets[dataset][index])["input_ids"], limit, IMAGE)

    def kept(segment: Segment) -> int:
        example = synthetic(datasets[segment.dataset][segment.index])
        if segment.length < len(example["input_ids"]):
            example = cut_example(example, segment.length, IMAGE, SLOT)
        assert len(example["input_ids"]) == len(example["labels"]) == segment.length
        return len(example["regions"])

    lengths = [[sample[1] for sample in dataset] for dataset in datasets]
    stream = plan_buckets(lengths, options, **place, can_cut=cuttable)
    found = []
    for bucket in itertools.islice(stream, taken):
        samples = [datasets[segment.dataset][segment.index] for segment in bucket]
        found.append(
            {
                "sample_ids": [sample[0] for sample in samples],
                "lengths": [segment.length for segment in bucket],
                "kept_lvr": [kept(segment) for segment in bucket],
                "pixel_rows": sum(sample[6] * sample[7] for sample in samples),
                "data_index_first_last": [bucket[0].number, bucket[-1].number],
            }
        )
    assert found == case["batches"]


@each("name", sets("collate"))
def test_collated_bucket(name: str) -> None:
    tensors = {key.split("/")[1]: value for key, value in TENSORS.items() if key.startswith(f"{name}/")}
    packed = {column: tensors[f"in_{column}"].tolist() for column in ("input_ids", "labels")}
    rows = unpack_rows(packed, tensors["in_input_lengths"].tolist())
    pad = int(tensors["input_ids"][tensors["attention_mask"] == 0][0])
    batch = pad_batch(rows, pad, multiple_of=1)
    for column in ("input_ids", "labels", "attention_mask"):
        assert batch[column].tolist() == tensors[column].tolist(), column
