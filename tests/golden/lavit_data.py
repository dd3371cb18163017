"""LaViT golden vectors: text layout, labels and indices, targets and padding, grids and resizing (card 2.2 to 2.5)."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

from modeling_latent import LatentProcessor
from tests.golden.conftest import each, golden_dir, golden_json, tolerance
from trainers.data.records import Record, RecordError, make_record
from trainers.data.teacher_signals import find_best_grid, load_teacher_signals, resize_signal
from trainers.lavit_collator import LavitCollator

FOLDER = golden_dir("lavit")
MANIFEST: dict[str, Any] = golden_json(FOLDER, "manifest.json", {})
DATASET: dict[str, Any] = MANIFEST.get("dataset", {})
IDS: dict[str, Any] = golden_json(FOLDER, "tokenizer/ids.json", {})
_path = FOLDER / "dataset.safetensors"
TENSORS: dict[str, torch.Tensor] = load_file(_path) if _path.is_file() else {}
SAMPLES: list[dict[str, Any]] = DATASET.get("samples", []) if TENSORS else []
INDICES = ("vision_start_idx", "vision_end_idx", "lavit_start_idx", "lavit_token_idx")


def group(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a dataset item or of the batch, by field."""
    return {key.removeprefix(f"{name}."): value for key, value in TENSORS.items() if key.startswith(f"{name}.")}


def groups(name: str) -> list[dict[str, torch.Tensor]]:
    """`[group(name)]` when the file has it, so that a set without it yields no test."""
    return [group(name)] if group(name) else []


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    atol = tolerance(MANIFEST["tolerances"]["resize"])
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@lru_cache
def processor() -> LatentProcessor:
    names = {name: IDS[name] for name in ("pad", "eos")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(FOLDER / "tokenizer" / "tokenizer.json"),
        **{f"{name}_token": token for name, token in names.items()},
    )
    template = (FOLDER / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8")
    learned = tokenizer.convert_ids_to_tokens(IDS["lvr_ids"])
    made = LatentProcessor(
        Qwen2VLImageProcessorPil(**DATASET["image_processor"]),
        tokenizer,
        chat_template=template,
        latent_tokens={f"learned_{i}": token for i, token in enumerate(learned, 1)},
    )
    assert made.added_latent_tokens == 0 and made.latent_learned_token_ids == IDS["lvr_ids"]
    return made


def record(sample: dict[str, Any], folder: Path) -> Record:
    """The record of a sample, its signals in files of the published kinds."""
    index = sample["index"]
    tensors = group(f"data.{index}")
    concept, attention = folder / f"{index}_v_top_layer.pth", folder / f"{index}_attention.json"
    torch.save(tensors["teacher_v_top"], concept)
    attention.write_text(json.dumps({"steps": [{"p_t": tensors["teacher_p_t"].tolist()}]}))
    return make_record(
        id=str(index),
        question=sample["question"],
        answer=sample["ground_truth_enriched"],
        images=[Image.fromarray(tensors["image_uint8"].numpy())],
        teacher={"concept": {"path": str(concept)}, "attention": {"path": str(attention)}, "image": 0},
    )


def collator(**options: Any) -> LavitCollator:
    number = DATASET["num_lavit_tokens"]
    return LavitCollator(processor(), **{"num_latent_tokens": number, "pad_to_multiple_of": None, **options})


def indices(ids: list[int]) -> dict[str, int]:
    """The published index fields, from token ids."""
    latent = [place for place, token in enumerate(ids) if token in IDS["lvr_ids"]]
    vision = [ids.index(IDS[name]) if IDS[name] in ids else 0 for name in ("vision_start", "vision_end")]
    return dict(zip(INDICES, (*vision, min(latent), max(latent)), strict=True))


@each("sample", SAMPLES, ids=lambda sample: str(sample["index"]))
def test_sample(sample: dict[str, Any], tmp_path: Path) -> None:
    expected = group(f"data.{sample['index']}")
    batch = collator(teacher_grid="patch")([record(sample, tmp_path)])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert ids == expected["input_ids"].tolist()
    assert labels == expected["labels"].tolist()
    assert batch["attention_mask"][0].tolist() == expected["attention_mask"].tolist()
    assert indices(ids) == {name: int(expected[name]) for name in INDICES}
    assert [label != -100 for label in labels].index(True) == int(expected["lavit_start_idx"])
    assert batch["image_grid_thw"][0].tolist() == expected["image_grid_thw"].tolist()
    near(batch["pixel_values"][0], expected["pixel_values_row0"])
    torch.testing.assert_close(batch["pixel_values"].sum(), expected["pixel_values_sum"], rtol=1e-4, atol=1e-2)
    near(batch["attention_target"][0], expected["traj_tensor"])
    near(batch["concept_target"][0], expected["v_top_tensor"].mean(0))


@each("sample", SAMPLES, ids=lambda sample: str(sample["index"]))
def test_resized_signals_of_a_sample(sample: dict[str, Any], tmp_path: Path) -> None:
    expected = group(f"data.{sample['index']}")
    signals = load_teacher_signals(record(sample, tmp_path), concept_size=DATASET["feature_dim"])
    assert signals.num_tokens == sample["teacher_tokens"]
    target = tuple(expected["image_grid_thw"].tolist()[1:])
    options = {"source": signals.grid, "image_size": tuple(sample["image_size_wh"])}
    near(resize_signal(signals.concept, target, **options), expected["v_top_tensor"])
    near(resize_signal(signals.attention, target, **options), expected["traj_tensor"])


@each("expected", groups("batch"), ids=lambda _: "samples")
def test_batch(expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    batch = collator(teacher_grid="patch")([record(sample, tmp_path) for sample in SAMPLES])
    for name in ("input_ids", "attention_mask", "labels", "image_grid_thw"):
        assert batch[name].tolist() == expected[name].tolist(), name
    found = [indices(ids) for ids in batch["input_ids"].tolist()]
    assert {name: [row[name] for row in found] for name in INDICES} == {
        name: expected[name].tolist() for name in INDICES
    }
    assert list(batch["pixel_values"].shape) == expected["pixel_values_shape"].tolist()
    assert batch["attention_length"].tolist() == expected["patch_lens"].tolist()
    near(batch["attention_target"], expected["traj_tensor"])
    sums, lengths = expected["v_top_tensor"].sum(1), expected["patch_lens"][:, None]
    near(batch["concept_target"], sums / lengths)


@each("sample", SAMPLES, ids=lambda sample: str(sample["index"]))
def test_default_targets_are_on_the_image_tokens(sample: dict[str, Any], tmp_path: Path) -> None:
    """Where teacher and student see the same grid, nothing is resized, and the pooled concept is the published one."""
    expected = group(f"data.{sample['index']}")
    _, height, width = expected["image_grid_thw"].tolist()
    merged = height * width // DATASET["image_processor"]["merge_size"] ** 2
    batch = collator()([record(sample, tmp_path)])
    assert batch["attention_length"].tolist() == [merged]
    assert batch["attention_target"].shape == (1, merged)
    if sample["teacher_tokens"] == merged:
        assert torch.equal(batch["attention_target"][0], expected["teacher_p_t"])
        near(batch["concept_target"][0], expected["v_top_tensor"].mean(0))


@each("expected", groups("data_two_latents"), ids=lambda _: "sample 0")
def test_two_latent_tokens(expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    batch = collator(num_latent_tokens=2)([record(SAMPLES[0], tmp_path)])
    ids = batch["input_ids"][0].tolist()
    assert ids == expected["input_ids"].tolist()
    assert batch["labels"][0].tolist() == expected["labels"].tolist()
    assert indices(ids) == {name: int(expected[name]) for name in INDICES}


@each("expected", groups("textonly.0"), ids=lambda _: "sample 0")
def test_text_only_baseline(expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    batch = collator(latent_form="none", num_latent_tokens=None)([{**record(SAMPLES[0], tmp_path), "teacher": None}])
    assert batch["input_ids"][0].tolist() == expected["input_ids"].tolist()
    assert batch["labels"][0].tolist() == expected["labels"].tolist()
    assert not {"concept_target", "attention_target"} & set(batch)


@pytest.mark.parametrize("name", ["concept", "attention"])
@each("missing", [DATASET["missing_files"]] if "missing_files" in DATASET else [], ids=lambda _: "zeros")
def test_a_missing_file_is_an_error(missing: dict[str, Any], name: str, tmp_path: Path) -> None:
    """The reference logs an error and trains on zeros."""
    assert missing["v_top_all_zero"] and missing["traj_all_zero"]
    made = record(SAMPLES[0], tmp_path)
    path = Path(made["teacher"][name]["path"])
    path.unlink()
    with pytest.raises(RecordError, match=f"record '{made['id']}'.*{name}: file .*{path.name} does not exist"):
        collator(teacher_grid="patch")([made])


@each("row", MANIFEST.get("find_best_grid", {}).get("rows", []))
def test_find_best_grid(row: list[int]) -> None:
    columns = dict(zip(MANIFEST["find_best_grid"]["columns"], row, strict=True))
    found = find_best_grid(columns["n_tokens"], columns["image_width"], columns["image_height"])
    assert found == (columns["grid_h"], columns["grid_w"])


@each("case", MANIFEST.get("resize", []) if TENSORS else [], ids=lambda case: case["name"])
def test_resize(case: dict[str, Any]) -> None:
    tensors, target = group(case["name"]), (case["target_h"], case["target_w"])
    size = case["image_width"], case["image_height"]
    for form in ("1d", "2d"):
        values, expected = tensors[f"in_{form}"], tensors[f"out_{form}"]
        near(resize_signal(values, target, source=None, image_size=size), expected)
        if case["source_grid"] is not None:
            near(resize_signal(values, target, source=tuple(case["source_grid"])), expected)
