"""LASER golden vectors: the DWAL loss, its gradient and its metrics (method card, section 4)."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.golden.conftest import each, golden_dir, golden_json, tolerance
from trainers.losses import DwalOptions, dwal_loss, find_latent_rows, fused_dwal_loss, mask_region_labels

FOLDER = golden_dir("laser")
TENSOR_FILE = "dwal.safetensors"
DWAL_CASES = golden_json(FOLDER, "dwal_cases.json", []) if (FOLDER / TENSOR_FILE).is_file() else []


@lru_cache(maxsize=1)
def dwal_tensors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / TENSOR_FILE)


@lru_cache(maxsize=1)
def dwal_manifest() -> dict:
    return golden_json(FOLDER, "manifest.json")["files"][TENSOR_FILE]


def case_options(case: dict) -> DwalOptions:
    hyper = {name.removeprefix("dwal_"): value for name, value in case["hyper"].items()}
    return DwalOptions.reference(time_aware=case["mode"] == "time_aware", **hyper)


@each("case", DWAL_CASES, ids=lambda case: case["case"])
@pytest.mark.parametrize("path", ["full", "fused"])
def test_dwal_case(case: dict, path: str) -> None:
    tensors, ids = dwal_tensors(), dwal_manifest()["ids"]
    logits, input_ids, labels = (tensors[f"{case['batch']}.{name}"] for name in ("logits", "input_ids", "labels"))
    logits = logits.clone().requires_grad_()
    options = case_options(case)
    rows = find_latent_rows(input_ids, ids["laser_start_id"], ids["laser_end_id"], options.window_size)

    selected = rows.select(logits)
    if path == "full":
        dwal = dwal_loss(selected, rows, options)
    else:
        dwal = fused_dwal_loss(selected, torch.eye(logits.shape[-1]), None, rows, options, chunk_size=4)
    targets = mask_region_labels(labels, rows)[:, 1:]
    loss_ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    total = loss_ce + case["lambda"] * dwal.loss if case["lambda"] > 0 else loss_ce
    total.backward()

    allowed = {kind: tolerance(text) for kind, text in dwal_manifest()["tolerance"].items()}
    for name, value in {"loss_ce": loss_ce, "loss_laser": dwal.loss, "loss_total": total}.items():
        assert abs(value.item() - case[name]) <= allowed["losses"] * max(1.0, abs(case[name])), name
    for name, value in {
        "confused_ratio": dwal.confused_ratio,
        "laser_end_max_ratio": dwal.last_concept_ratio,
    }.items():
        assert abs(value.item() - case[name]) <= allowed["metrics"], name
    difference = (logits.grad - tensors[f"{case['case']}.grad_total"]).abs().max().item()
    assert difference <= allowed["gradient"]
