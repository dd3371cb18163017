"""LVR golden vectors of stage 1 through the trainer's wrapped forward: as in a run of a user (card, section 4)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2_5_VLConfig
from trl.trainer.utils import add_fused_lm_head

from modeling_latent import LatentQwen2_5_VLConfig, LatentQwen2_5_VLForConditionalGeneration
from tests.golden.conftest import each, golden_json
from tests.golden.lvr_losses import (
    FOLDER,
    MODEL_CASES,
    SPECIAL_IDS,
    case_tensors,
    golden_images,
    published_name,
    whole_model_tolerance,
)
from trainers.latent_forward import add_latent_loss
from trainers.losses.roi_regression import roi_token_index
from trainers.lvr_config import LVRSFTConfig
from trainers.objectives import build_objective

# Targets of re-encoded crops have no data code, in the published repository neither (card 4.2).
TRAINED = [case for case in MODEL_CASES if "reencode" not in case["name"]]


def trained_model(case: dict, folder: Path) -> LatentQwen2_5_VLForConditionalGeneration:
    """The model of a case in the library's class, with its latent head and end vector."""
    weights = load_file(FOLDER / "tiny_model.safetensors")
    if case["head"]:
        head = load_file(FOLDER / f"tiny_lvr_head_{case['head']}.safetensors")
        weights |= {f"latent_head.{name.removeprefix('lvr_head.')}": value for name, value in head.items()}
    if case["latent_end_param"]:
        weights["latent_stop_vector.weight"] = load_file(FOLDER / "tiny_latent_end.safetensors")["lvr_latent_end_emb"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    LatentQwen2_5_VLConfig.from_stock(
        Qwen2_5_VLConfig(**golden_json(FOLDER, "tiny_config.json")),
        latent_token_id=SPECIAL_IDS["lvr"],
        latent_start_token_id=SPECIAL_IDS["lvr_start"],
        latent_stop_token_id=SPECIAL_IDS["lvr_latent_end"],
        latent_end_token_id=SPECIAL_IDS["lvr_end"],
        latent_method="lvr",
        latent_head=case["head"],
        latent_stop_vector=case["latent_end_param"],
    ).save_pretrained(folder)
    model, info = LatentQwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.train()


def options(case: dict) -> LVRSFTConfig:
    switch = case["mode_switch_loss_flag"] or case["variant"] == "mode_switch" or case["latent_end_param"]
    return LVRSFTConfig(
        output_dir="unused",
        use_cpu=True,
        bf16=False,
        latent_loss_weight=case["loss_lvr_lambda"],
        roi_loss_type=case["loss_lvr_fct"],
        roi_detach_targets=False,
        mode_switch_loss=switch,
        mode_switch_weight=case["loss_mode_switch_lambda"] if case["mode_switch_loss_flag"] else 0.0,
        mode_switch_loss_type=case["loss_mode_switch_fct"],
        mode_switch_targets="reference",
    )


def inputs_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch as the collator gives it."""
    ids = tensors["input_ids"]
    images = (ids == SPECIAL_IDS["image"]).sum(1)
    index = roi_token_index(tensors["region_index"], tensors["region_count_per_row"], images)
    return {
        "input_ids": ids,
        "attention_mask": tensors["attention_mask"],
        "labels": tensors["labels"],
        "mm_token_type_ids": (ids == SPECIAL_IDS["image"]).int(),
        "region_index": torch.full(ids.shape, -1).masked_scatter(ids == SPECIAL_IDS["lvr"], index),
        **golden_images(tensors["image_ids"]),
    }


def losses_of(model: nn.Module, args: LVRSFTConfig, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    output = model(**inputs, fused_lm_head=True)
    ce = -output.log_probs.sum() / output.label_mask.sum()
    total = ce + args.latent_loss_weight * output.latent_loss
    losses = {"loss_ce": ce, "loss_lvr": output.latent_loss}
    if output.auxiliary_losses is not None:
        losses["loss_mode_switch"] = output.auxiliary_losses[0]
        total = total + args.mode_switch_weight * output.auxiliary_losses[0]
    return losses | {"loss_total": total}


@each("case", TRAINED, ids=lambda case: case["name"])
def test_stage_one_in_the_trainers_forward(case: dict, tmp_path: Path) -> None:
    tensors, allowed, args = case_tensors(case["name"]), whole_model_tolerance(), options(case)
    model = trained_model(case, tmp_path)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    add_latent_loss(model, build_objective(args, model.config))
    losses = losses_of(model, args, inputs_of(tensors))
    losses["loss_total"].backward()
    for name, value in losses.items():
        assert abs(value.item() - case["logged"][name]) <= allowed, name
    renamed = {"latent_head.": "lvr_head.", "latent_stop_vector.weight": "lvr_latent_end_emb"}
    parameters = {}
    for name, parameter in model.named_parameters():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        parameters[published_name(name)] = parameter
    assert set(case["grad_norms"]) <= set(parameters)
    for name, norm in case["grad_norms"].items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name
