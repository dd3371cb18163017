"""LVR golden vectors of the optimiser groups: what is in which group, at which rate and decay (card, 5.3)."""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers import Qwen2_5_VLConfig

from modeling_latent import LatentQwen2_5_VLConfig, LatentQwen2_5_VLForConditionalGeneration
from tests.golden.conftest import each, golden_dir, golden_json
from trainers.lvr_config import LVRSFTConfig
from trainers.model_loading import freeze_parts
from trainers.optimizer_groups import optimizer_groups

FOLDER = golden_dir("lvr")
CASES: list[dict] = golden_json(FOLDER, "optimizer_cases.json", [])


@lru_cache(maxsize=2)
def model_with_head(head: str) -> LatentQwen2_5_VLForConditionalGeneration:
    """The model of the cases: a latent head and an end vector."""
    stock = Qwen2_5_VLConfig(**golden_json(FOLDER, "tiny_config.json"))
    fields = {"latent_head": head, "latent_stop_vector": True}
    config = LatentQwen2_5_VLConfig.from_stock(stock, **fields)
    with torch.device("meta"):
        return LatentQwen2_5_VLForConditionalGeneration(config)


def published(name: str) -> str:
    """A name of ours as the published code has it."""
    if name == "latent_stop_vector.weight":
        return "lvr_latent_end_emb"
    for ours, theirs in (
        ("model.language_model.", "model."),
        ("model.visual.", "visual."),
        ("latent_head.", "lvr_head."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


@each(
    "case", CASES, ids=lambda case: f"{case['lvr_head_type']}, head {case['lvr_head_lr']}, merger {case['merger_lr']}"
)
def test_optimizer_groups(case: dict) -> None:
    model = model_with_head(case["lvr_head_type"]).requires_grad_(True)
    parts = {name: case[f"freeze_{name}"] for name in ("vision_tower", "merger", "llm")}
    freeze_parts(model, **parts)
    rates = {name: case[name] for name in ("learning_rate", "weight_decay", "vision_lr", "merger_lr")}
    config = LVRSFTConfig(
        **rates, latent_head_lr=case["lvr_head_lr"], weight_decay_rule="published", use_cpu=True, bf16=False
    )
    groups = optimizer_groups(model, config)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (group["lr"], group["weight_decay"]) for group in case["groups"] if group["params"]
    ]
    for ours, theirs in zip(groups, [group for group in case["groups"] if group["params"]], strict=True):
        assert sorted(map(published, ours["names"])) == sorted(theirs["params"]), ours["name"]
