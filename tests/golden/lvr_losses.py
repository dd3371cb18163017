"""LVR golden vectors of stage 1: losses on given tensors and on a whole model, and the latent heads (card, 4)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2_5_VLConfig

from modeling_latent import LatentQwen2_5_VLConfig, LatentQwen2_5_VLForConditionalGeneration
from modeling_latent.latent_heads import LATENT_HEADS
from modeling_latent.latent_inputs import replace_latents
from tests.golden.conftest import each, golden_dir, golden_json, tolerance
from trainers.losses.mode_switch import end_token_logits, find_mode_switch_rows, latent_end_loss, mode_switch_loss
from trainers.losses.roi_regression import (
    RoiRegressionOptions,
    apply_latent_head,
    find_roi_rows,
    mask_latent_labels,
    roi_regression_loss,
    roi_token_index,
)

FOLDER = golden_dir("lvr")
TENSOR_FILE = "sft.safetensors"
SFT_CASES = golden_json(FOLDER, "sft_cases.json", []) if (FOLDER / TENSOR_FILE).is_file() else []
PURE_CASES = [case for case in SFT_CASES if case["name"].startswith("pure/")]
MODEL_CASES = [case for case in SFT_CASES if case["name"].startswith("model/")]
HEAD_CASES = [case for case in SFT_CASES if case["name"].startswith("heads/")]
SPECIAL_IDS: dict[str, int] = golden_json(FOLDER, "manifest.json", {}).get("special_ids", {})


@lru_cache(maxsize=1)
def sft_tensors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / TENSOR_FILE)


@lru_cache(maxsize=1)
def sft_tolerance() -> float:
    return tolerance(golden_json(FOLDER, "manifest.json")["tolerance"]["sft"])


@lru_cache(maxsize=1)
def whole_model_tolerance() -> float:
    return tolerance(golden_json(FOLDER, "manifest.json")["tolerance"]["sft"].split("whole model")[1])


def case_tensors(name: str) -> dict[str, torch.Tensor]:
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in sft_tensors().items() if key.startswith(prefix)}


def case_head(kind: str | None, tensors: dict[str, torch.Tensor], prefix: str = "lvr_head.") -> nn.Module | None:
    """The latent head of a case with its weights, in float32."""
    if kind is None:
        return None
    weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    first = weights["gate_proj.weight" if kind == "glu" else "mlp.0.weight"]
    config = SimpleNamespace(hidden_size=first.shape[1], intermediate_size=first.shape[0], hidden_act="silu")
    head = LATENT_HEADS[kind](config)
    head.load_state_dict(weights)
    return head


def region_targets(visual_embeds: torch.Tensor, tensors: dict[str, torch.Tensor], image_id: int) -> torch.Tensor:
    image_tokens = (tensors["input_ids"] == image_id).sum(1)
    index = roi_token_index(tensors["region_index"], tensors["region_count_per_row"], image_tokens)
    return visual_embeds.index_select(0, index)


def stage_one_losses(case: dict, tensors: dict[str, torch.Tensor], leaves: dict, head: nn.Module | None) -> dict:
    """The losses of a case and their total, put together as in the card, section 4.1."""
    ids, input_ids, hidden = case["ids"], tensors["input_ids"], leaves["hidden_raw"]
    has_end_vector = case["variant"].startswith("latent_end")
    is_latent, is_end_vector = input_ids == ids["lvr"], input_ids == ids["lend"]
    rows = find_roi_rows(is_latent)
    headed = find_roi_rows(is_latent | is_end_vector) if case["variant"] == "latent_end_head" else rows
    states = apply_latent_head(hidden, headed, head)

    targets = leaves.get("targets")
    if targets is None:
        targets = region_targets(leaves["visual_embeds"], tensors, ids["image"])
    options = RoiRegressionOptions(loss_type=case["loss_lvr_fct"])
    losses = {"loss_lvr": roi_regression_loss(rows.select(states), targets, rows, options).loss}
    weight = leaves["lm_head"]
    if case["variant"] == "mode_switch":
        switch = find_mode_switch_rows(input_ids, ids["start"], ids["lvr"], ids["end"], reference=True)
        logits = end_token_logits(switch.select(states), weight, ids["end"])
        losses["loss_mode_switch"] = mode_switch_loss(logits, switch.target).loss
    elif has_end_vector:
        before = find_roi_rows(is_end_vector).select(states)
        losses["loss_mode_switch"] = latent_end_loss(
            before, leaves["lvr_latent_end_emb"], case["loss_mode_switch_fct"]
        ).loss
    fed = [ids["lvr"], ids["lend"]] if has_end_vector else [ids["lvr"]]
    labels = mask_latent_labels(tensors["labels"], input_ids, fed)[:, 1:]
    losses["loss_ce"] = F.cross_entropy((states[:, :-1] @ weight.T).flatten(0, 1), labels.flatten(), ignore_index=-100)

    losses["loss_total"] = losses["loss_ce"]
    if case["loss_lvr_lambda"] > 0:
        losses["loss_total"] = losses["loss_ce"] + case["loss_lvr_lambda"] * losses["loss_lvr"]
    if case["mode_switch_loss_flag"]:
        losses["loss_total"] = losses["loss_total"] + case["loss_mode_switch_lambda"] * losses["loss_mode_switch"]
    return losses


@each("case", PURE_CASES, ids=lambda case: case["name"])
def test_stage_one_losses_and_gradients(case: dict) -> None:
    tensors, allowed = case_tensors(case["name"]), sft_tolerance()
    names = {"hidden_raw": "hidden_raw", "visual_embeds": "visual_embeds", "lm_head": "lm_head_weight"}
    names |= {"lvr_latent_end_emb": "lvr_latent_end_emb"} if "lvr_latent_end_emb" in tensors else {}
    leaves = {name: tensors[key].clone().requires_grad_() for name, key in names.items()}
    head = case_head(case["head"], tensors)
    losses = stage_one_losses(case, tensors, leaves, head)
    losses["loss_total"].backward()

    for name, value in losses.items():
        assert abs(value.item() - tensors[name].item()) <= allowed, name
        assert abs(value.item() - case["logged"][name]) <= allowed, name
    wanted = {name.removeprefix("grad_"): value for name, value in tensors.items() if name.startswith("grad_")}
    parameters = {f"lvr_head.{name}": value for name, value in head.named_parameters()} if head else {}
    assert set(wanted) <= set(leaves) | set(parameters)
    for name, value in (leaves | parameters).items():
        grad = torch.zeros_like(value) if value.grad is None else value.grad
        want = wanted.get(name)
        if want is None:  # no gradient is recorded for a tensor that the total does not depend on
            assert not grad.any(), name
        else:
            assert (grad - want).abs().max().item() <= allowed, name


@each("case", [case for case in PURE_CASES if case["variant"] == "mode_switch"], ids=lambda case: case["name"])
def test_published_mode_switch_targets(case: dict) -> None:
    """The published targets are the paper's, unless the latent-end token stands in the text: then they are all 0."""
    ids, input_ids = case["ids"], case_tensors(case["name"])["input_ids"]
    tokens = (input_ids, ids["start"], ids["lvr"], ids["end"])
    published = find_mode_switch_rows(*tokens, reference=True)
    if (input_ids == ids["lend"]).any():
        assert len(published) and not published.target.any()
        with pytest.raises(ValueError, match="latent_end_in_text=False"):
            find_mode_switch_rows(*tokens)
    else:
        rows = find_mode_switch_rows(*tokens)
        assert torch.equal(rows.target, published.target) and torch.equal(rows.position, published.position)
        assert rows.target.sum() == (input_ids == ids["end"]).sum()


@each("case", PURE_CASES, ids=lambda case: case["name"])
def test_inputs_of_stage_one(case: dict) -> None:
    """The embeddings that the language model receives: images, regions and the end vector put in exactly."""
    tensors, ids = case_tensors(case["name"]), case["ids"]
    input_ids, visual = tensors["input_ids"], tensors["visual_embeds"]
    embeds = F.embedding(input_ids, tensors["embed_table"])
    feeds = [(input_ids == ids["image"], visual)]
    feeds.append((input_ids == ids["lvr"], region_targets(visual, tensors, ids["image"])))
    if case["variant"].startswith("latent_end"):
        is_end = input_ids == ids["lend"]
        feeds.append((is_end, tensors["lvr_latent_end_emb"].expand(int(is_end.sum()), -1)))
    for mask, vectors in feeds:
        dense = torch.zeros_like(embeds).masked_scatter(mask.unsqueeze(-1), vectors)
        embeds = replace_latents(embeds, dense, mask)
    assert torch.equal(embeds, tensors["inputs_embeds"])


@each("case", HEAD_CASES, ids=lambda case: case["name"])
def test_latent_head(case: dict) -> None:
    tensors, allowed = case_tensors(case["name"]), sft_tolerance()
    head = case_head(case["kind"], tensors)
    x = tensors["x"].clone().requires_grad_()
    output = head(x)
    assert (output - tensors["y"]).abs().max().item() <= allowed * max(1.0, tensors["y"].abs().max().item())
    output.square().sum().backward()
    grads = {f"grad_lvr_head.{name}": value.grad for name, value in head.named_parameters()}
    for name, grad in {**grads, "grad_x_of_sum_sq": x.grad}.items():
        want = tensors[name]
        assert (grad - want).abs().max().item() <= allowed * want.abs().max().item(), name


# The whole model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lvr_model(tmp_path_factory: pytest.TempPathFactory) -> LatentQwen2_5_VLForConditionalGeneration:
    """The model of the vectors in the library's class, from the published checkpoint format."""
    return load_lvr_model(tmp_path_factory.mktemp("lvr_tiny"))


def load_lvr_model(folder: Path) -> LatentQwen2_5_VLForConditionalGeneration:
    save_file(load_file(FOLDER / "tiny_model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"})
    config = LatentQwen2_5_VLConfig.from_stock(
        Qwen2_5_VLConfig(**golden_json(FOLDER, "tiny_config.json")),
        latent_token_id=SPECIAL_IDS["lvr"],
        latent_start_token_id=SPECIAL_IDS["lvr_start"],
        latent_end_token_id=SPECIAL_IDS["lvr_end"],
    )
    config.save_pretrained(folder)
    model, info = LatentQwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def published_name(name: str) -> str:
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def golden_images(image_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """`pixel_values` and `image_grid_thw` of a case's images."""
    images = load_file(FOLDER / "images.safetensors")
    names = [f"image_{index}" for index in image_ids.tolist()]
    pixels = [images[f"{name}/pixel_values_q"].float() / 64 for name in names]
    return {
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.stack([images[f"{name}/grid_thw"] for name in names]),
    }


def whole_model_leaves(
    case: dict, tensors: dict[str, torch.Tensor], model: nn.Module, end_vector: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Run the backbone on the inputs of a case: what `stage_one_losses` takes."""
    input_ids, images = tensors["input_ids"], golden_images(tensors["image_ids"])
    visual = torch.cat(model.get_image_features(**images).pooler_output)
    if "crop_image_ids" in tensors:
        targets = torch.cat(model.get_image_features(**golden_images(tensors["crop_image_ids"])).pooler_output)
    else:
        targets = region_targets(visual, tensors, SPECIAL_IDS["image"])
    latent_mask = input_ids == SPECIAL_IDS["lvr"]
    empty = torch.zeros(*input_ids.shape, visual.shape[-1])
    latents = empty.masked_scatter(latent_mask.unsqueeze(-1), targets)
    if end_vector is not None:
        is_end = input_ids == SPECIAL_IDS["lvr_latent_end"]
        latents, latent_mask = torch.where(is_end.unsqueeze(-1), end_vector, latents), latent_mask | is_end
    hidden = model.model(
        input_ids=input_ids,
        attention_mask=tensors["attention_mask"],
        mm_token_type_ids=(input_ids == SPECIAL_IDS["image"]).int(),
        latent_embeds=latents,
        latent_mask=latent_mask,
        use_cache=False,
        **images,
    ).last_hidden_state
    leaves = {"hidden_raw": hidden, "targets": targets, "lm_head": model.lm_head.weight}
    return leaves | ({} if end_vector is None else {"lvr_latent_end_emb": end_vector})


@each("case", MODEL_CASES, ids=lambda case: case["name"])
def test_stage_one_of_the_whole_model(case: dict, lvr_model: LatentQwen2_5_VLForConditionalGeneration) -> None:
    tensors, allowed = case_tensors(case["name"]), whole_model_tolerance()
    head = end_vector = None
    if case["head"]:
        head = case_head(case["head"], load_file(FOLDER / f"tiny_lvr_head_{case['head']}.safetensors"))
    if case["latent_end_param"]:
        end_vector = load_file(FOLDER / "tiny_latent_end.safetensors")["lvr_latent_end_emb"].requires_grad_()
    lvr_model.zero_grad()
    ids = {"start": "lvr_start", "lvr": "lvr", "lend": "lvr_latent_end", "end": "lvr_end", "image": "image"}
    named = {**case, "ids": {name: SPECIAL_IDS[special] for name, special in ids.items()}}
    leaves = whole_model_leaves(named, tensors, lvr_model, end_vector)
    losses = stage_one_losses(named, tensors, leaves, head)
    losses["loss_total"].backward()

    for name, value in losses.items():
        assert abs(value.item() - case["logged"][name]) <= allowed, name
    parameters = {published_name(name): value for name, value in lvr_model.named_parameters()}
    parameters |= {f"lvr_head.{name}": value for name, value in head.named_parameters()} if head else {}
    parameters |= {} if end_vector is None else {"lvr_latent_end_emb": end_vector}
    for name, norm in case["grad_norms"].items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name
    special = {"latent_end": "lvr_latent_end"}
    rows = [SPECIAL_IDS[special.get(name, name)] for name in case["embed_rows_order"]]
    for name in (key.removeprefix("grad.") for key in tensors if key.startswith("grad.")):
        embeds = name == "embed_rows_special"
        grad = parameters["model.embed_tokens.weight"].grad[rows] if embeds else parameters[name].grad
        assert (grad - tensors[f"grad.{name}"]).abs().max().item() <= allowed, name
