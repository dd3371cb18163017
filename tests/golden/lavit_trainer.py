"""LaViT golden vectors through the trainer's wrapped forward: losses, states and gradients of every case, the masks of
stage 1 as meant and as executed, the gate of the paper (card, section 4)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig
from trl.trainer.utils import add_fused_lm_head

from modeling_latent import LatentQwen2_5_VLForConditionalGeneration, convert_stock_checkpoint, load_latent_model
from modeling_latent.latent_masks import allowed_pairs, image_visibility
from tests.golden.conftest import each
from tests.golden.lavit_losses import CASES, FOLDER, MANIFEST, NAMES, allowed, loss_tensors
from tests.tiny import tiny_processor
from trainers.latent_forward import add_latent_loss
from trainers.lavit_config import LavitSFTConfig
from trainers.objectives import build_objective
from trainers.objectives.lavit import LavitObjective

MASK_CASES = MANIFEST.get("mask_cases", []) if "mask.0.out" in NAMES else []
BATCHES = sorted({name.split(".")[1] for name in NAMES if name.startswith("batch.")})
BATCH_MASKS = sorted(name for name in NAMES if name.startswith("mask01."))
PUBLISHED_NAMES = {"concept_head.": "v_top_head.", "attention_head.": "traj_head."}


@lru_cache(maxsize=1)
def golden_config() -> dict[str, Any]:
    import json

    return json.loads((FOLDER / "student_config.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def learned_ids() -> list[int]:
    return loss_tensors()["probe.lvr_ids"].tolist()


def golden_model(case: dict, learned: list[int] | None = None) -> LatentQwen2_5_VLForConditionalGeneration:
    """The student of a case in the library's class, with both heads, or one; `learned` token ids, by default those of
    the losses' file."""
    stock = Qwen2_5_VLConfig(**golden_config())
    config_class = LatentQwen2_5_VLForConditionalGeneration.config_class
    config = config_class.from_stock(
        stock,
        method="lavit",
        latent_learned_token_ids=learned or learned_ids(),
        concept_head_size=golden_config()["v_top_dim"],
        attention_head=case["use_trajectory_supervision"],
    )
    config._attn_implementation = case["attn_implementation"]
    model = LatentQwen2_5_VLForConditionalGeneration(config)
    weights = {name: value.float() for name, value in load_file(FOLDER / "student.safetensors").items()}
    for ours, theirs in PUBLISHED_NAMES.items():
        weights = {name.replace(theirs, ours): value for name, value in weights.items()}
    if not case["use_trajectory_supervision"]:
        weights = {name: value for name, value in weights.items() if not name.startswith("attention_head.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model.train(case["module_mode"] == "train")


def options(case: dict) -> LavitSFTConfig:
    """The options of a run like the case: published form of the attention target, visibility by the kind."""
    visibility = {"intended": "bottleneck", "reference_defect": "reference", "paper_formula": "gate"}.get(case["kind"])
    if visibility is None:  # as shipped: a stage-1 mask outside of training mode, or none
        visibility = "reference" if case["stage"] == 1 else "none"
    has_teacher = "v_top_tensor" not in case["dropped_inputs"]
    traces = has_teacher and case["use_trajectory_supervision"]
    return LavitSFTConfig(
        output_dir="unused",
        use_cpu=True,
        bf16=False,
        latent_loss_weight=case["loss_scale_vtop"] if has_teacher else 0.0,
        attention_loss_weight=case["loss_scale_traj"] if traces else 0.0,
        training_stage=case["stage"],
        latent_visibility=visibility,
        block_prompt=False if visibility == "gate" else case["bottleneck_block_prompt"],
        gate_floor=case.get("gamma", 1e-6),
        attention_keys="reference",
        attention_target="reference",
        teacher_grid="patch",
    )


def batch_of(case: dict, row: int | None = None) -> dict[str, torch.Tensor]:
    """The batch of a case, or one row of it, as the collator gives it; the concept is what the published batch has,
    (B, P, D)."""
    tensors, name = loss_tensors(), case["batch"]
    batch = {key.split(".", 2)[2]: value for key, value in tensors.items() if key.startswith(f"batch.{name}.")}
    for key in case["overrides"]:
        batch[key.split(".in.")[1]] = tensors[key]
    items = {"B1": (0,), "B3": (0, 1, 2), "B2": (2, 3)}[name]
    if row is not None:
        batch, items = {key: value[row : row + 1] for key, value in batch.items()}, items[row : row + 1]
    ids = batch["input_ids"]
    labels = batch["labels"]
    return {
        "input_ids": ids,
        "attention_mask": batch["attention_mask"],
        "labels": torch.full_like(labels, -100) if "labels" in case["dropped_inputs"] else labels,
        "mm_token_type_ids": (ids == golden_config()["image_token_id"]).int(),
        "pixel_values": torch.cat([tensors[f"items.{index}.pixel_values"] for index in items]),
        "image_grid_thw": batch["image_grid_thw"],
        "concept_target": batch["v_top_tensor"],
        "attention_target": batch["traj_tensor"],
        "attention_length": batch["patch_lens"],
    }


class Run:
    """One forward of the trainer with everything that the vectors name."""

    def __init__(self, case: dict, row: int | None = None) -> None:
        self.case, self.args, self.model = case, options(case), golden_model(case)
        self.objective: LavitObjective = build_objective(self.args, self.model.config)
        self.objective.bind(self.model)
        inputs = batch_of(case, row)
        add_fused_lm_head(self.model, outputs=("log_probs", "entropy", "is_top1"))
        add_latent_loss(self.model, self.objective, with_loss=self.objective.has_latent_loss)
        kept: dict[str, torch.Tensor] = {}
        hook = self.model.base_model.register_forward_hook(
            lambda module, args, output: kept.update(hidden=output.last_hidden_state)
        )
        output = self.model(**inputs, fused_lm_head=True)
        hook.remove()
        self.hidden, self.inputs, self.output = kept["hidden"], inputs, output
        ce = -output.log_probs.sum() / output.label_mask.sum().clamp(min=1)
        self.concept = output.latent_loss if self.args.uses_concept else None
        self.attention = output.auxiliary_losses[0] if output.auxiliary_losses is not None else None
        self.total = ce
        if self.concept is not None:
            self.total = self.total + self.args.latent_loss_weight * self.concept
        if self.attention is not None:
            self.total = self.total + self.args.attention_loss_weight * self.attention


@each("case", CASES, ids=lambda case: case["name"])
def test_case_in_the_trainers_forward(case: dict) -> None:
    tensors, run, name = loss_tensors(), Run(case), case["name"]
    assert abs(run.total.item() - tensors[f"{name}.loss_total"].item()) <= allowed("losses")
    for ours, theirs in ((run.concept, "loss_v_top"), (run.attention, "loss_traj")):
        want = tensors.get(f"{name}.{theirs}")
        if ours is None:  # not trained, so not there, or zero
            assert want is None or theirs == "loss_traj" and want.item() == 0
        else:
            assert abs(ours.item() - want.item()) <= allowed("losses")
    anchor = run.objective._anchor(run.inputs["input_ids"])
    rows = torch.arange(len(anchor))
    assert (run.hidden[rows, anchor] - tensors[f"{name}.h_anchor"]).abs().max() <= allowed("hidden_and_logits")
    real = run.inputs["attention_mask"].bool()
    sums = (run.hidden.sum(-1) - tensors[f"{name}.last_hidden_row0_sum"])[real]
    assert sums.abs().max() <= 10 * allowed("hidden_and_logits")  # sums over all channels
    first = run.objective._learned(run.inputs["input_ids"]).float().argmax(dim=1)
    logits = run.model.head_logits(run.hidden[rows, first])
    assert (logits - tensors[f"{name}.logits_anchor_next"]).abs().max() <= allowed("hidden_and_logits")


@each("case", [case for case in CASES if case.get("grad_l2_norm")], ids=lambda case: case["name"])
def test_gradients_in_the_trainers_forward(case: dict) -> None:
    run, tensors, name = Run(case), loss_tensors(), case["name"]
    run.total.backward()
    found = {}
    for parameter_name, parameter in run.model.named_parameters():
        for ours, theirs in PUBLISHED_NAMES.items():
            parameter_name = parameter_name.replace(ours, theirs)
        found[parameter_name] = parameter.grad
    for parameter_name, norm in case["grad_l2_norm"].items():
        gradient = found[parameter_name]
        value = 0.0 if gradient is None else gradient.norm().item()
        assert value == pytest.approx(norm, rel=allowed("gradients"), abs=1e-6), parameter_name
    prefix = f"{name}.grad."
    for key in (key for key in tensors if key.startswith(prefix)):
        want = tensors[key]
        if key == prefix + "embed_rows_lvr1_to_lvr4":
            gradient = found["model.language_model.embed_tokens.weight"][learned_ids()]
        else:
            gradient = found[key.removeprefix(prefix)]
        gradient = torch.zeros_like(want) if gradient is None else gradient
        scale = max(want.abs().max().item(), 1e-6)
        assert (gradient - want).abs().max().item() <= allowed("gradients") * scale, key


# The recommended forms, on image tokens --------------------------------------------------------------------------

# Value of the vectors to the options that give it; the student runs as in the case s0_b3.
VARIANTS: dict[str, dict[str, Any]] = {
    "kl_head_normalised": {"attention_top_k": 0},
    "kl_head_top3": {"attention_top_k": 3},
    "kl_head_minmax": {"attention_target": "reference"},
    "kl_attention_last_latent": {"attention_predictor": "attention", "attention_top_k": 0},
    "kl_attention_sum_over_latents": {
        "attention_predictor": "attention",
        "attention_top_k": 0,
        "attention_latents": "all",
    },
}
PLAIN = [case for case in CASES if case["name"] == "s0_b3"]


@each("variant", [name for name in VARIANTS if PLAIN and f"variant.{name}" in NAMES])
def test_recommended_forms_in_the_trainers_forward(variant: str) -> None:
    tensors, case = loss_tensors(), PLAIN[0]
    model, target = golden_model(case), tensors["variant.in.target_minmax_merged_grid"]
    common = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "latent_visibility": "none"}
    args = LavitSFTConfig(output_dir="unused", **common, **VARIANTS[variant])
    objective = build_objective(args, model.config)
    batch = {**batch_of(case), "attention_target": target}
    batch["attention_length"] = torch.full((len(target),), target.shape[1])
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    add_latent_loss(model, objective)
    loss = model(**batch, fused_lm_head=True).auxiliary_losses[0]
    assert abs(loss.item() - tensors[f"variant.{variant}"].item()) <= allowed("losses")


@each("case", MASK_CASES, ids=lambda case: case["name"])
def test_allowed_pairs(case: dict) -> None:
    """Markers of the published function as image and learned tokens of ours."""
    tensors = loss_tensors()
    mask, want = tensors[f"{case['name']}.attention_mask"], tensors[f"{case['name']}.out"]
    places = torch.arange(mask.shape[1])

    def column(name: str) -> torch.Tensor:
        return torch.tensor(case[name]).unsqueeze(1)

    images = (places > column("vision_start")) & (places < column("vision_end"))
    learned = (places >= column("lvr_start")) & (places <= column("lvr_end"))
    rule = image_visibility(images, learned, -float("inf"), case["block_prompt"])
    assert torch.equal(allowed_pairs([rule], mask), want.bool())


@each("name", BATCH_MASKS)
def test_allowed_pairs_of_a_batch(name: str) -> None:
    tensors, (_, batch, block) = loss_tensors(), name.split(".")
    ids, mask = tensors[f"batch.{batch}.input_ids"], tensors[f"batch.{batch}.attention_mask"]
    learned = torch.isin(ids, torch.tensor(learned_ids()))
    images = ids == golden_config()["image_token_id"]
    rule = image_visibility(images, learned, -float("inf"), block_prompt=block == "block1")
    assert torch.equal(allowed_pairs([rule], mask), tensors[name].bool())


# Batches -------------------------------------------------------------------------------------------------------------


@each("name", BATCHES)
def test_index_fields_of_a_batch(name: str) -> None:
    """They follow from ids and grid: first and last learned token, markers of the image, where labels begin."""
    tensors, prefix = loss_tensors(), f"batch.{name}"
    ids, labels = tensors[f"{prefix}.input_ids"], tensors[f"{prefix}.labels"]
    is_learned = torch.isin(ids, torch.tensor(learned_ids()))
    places = torch.arange(ids.shape[1]).expand_as(ids)
    found = {
        "lavit_start_idx": is_learned.int().argmax(dim=1),
        "lavit_token_idx": torch.where(is_learned, places, -1).amax(dim=1),
        "vision_start_idx": (ids == golden_config()["vision_start_token_id"]).int().argmax(dim=1),
        "vision_end_idx": (ids == golden_config()["vision_end_token_id"]).int().argmax(dim=1),
        "patch_lens": tensors[f"{prefix}.image_grid_thw"].prod(dim=1),
    }
    for key, value in found.items():
        assert value.tolist() == tensors[f"{prefix}.{key}"].tolist(), key
    supervised = (places >= found["lavit_start_idx"][:, None]) & tensors[f"{prefix}.attention_mask"].bool()
    assert torch.equal(labels, torch.where(supervised, ids, -100))


@each("name", BATCHES if PLAIN else [])
def test_a_batch_is_the_mean_of_its_rows(name: str) -> None:
    case = {**PLAIN[0], "batch": name}
    together = Run(case)
    alone = [Run(case, row) for row in range(len(together.hidden))]
    for part in ("concept", "attention"):
        mean = sum(getattr(run, part).item() for run in alone) / len(alone)
        assert abs(getattr(together, part).item() - mean) <= allowed("losses"), part
    anchors = together.objective._anchor(together.inputs["input_ids"]).tolist()
    assert anchors == loss_tensors()[f"batch.{name}.lavit_token_idx"].tolist()
    for row, run in enumerate(alone):
        real = run.inputs["attention_mask"][0].bool()
        distance = (together.hidden[row] - run.hidden[0])[real].abs().max()
        assert distance <= allowed("hidden_and_logits")


# A published folder --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not CASES, reason="the set lacks the student")
def test_a_published_folder_loads_and_goes_on(tmp_path: Path) -> None:
    """Legacy tensor names, both heads, no token id in config.json; the stock class loads it, too."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    weights = {}
    for name, value in load_file(FOLDER / "student.safetensors").items():
        legacy = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        weights[legacy] = value.float()
    published = tmp_path / "published"
    published.mkdir()
    save_file(weights, published / "model.safetensors", metadata={"format": "pt"})
    config = Qwen2_5_VLConfig(**golden_config())
    config.architectures = ["LaViTQwen2VL"]
    config.save_pretrained(published)
    AutoTokenizer.from_pretrained(FOLDER / "tokenizer").save_pretrained(published)
    tiny_processor().image_processor.save_pretrained(published)
    model, processor = convert_stock_checkpoint(published, dtype=torch.float32)
    assert model.config.latent_method == "lavit" and model.config.latent_learned_token_ids == learned_ids()
    assert processor.latent_learned_token_ids == learned_ids()
    assert model.config.attention_head and model.config.concept_head_size == golden_config()["v_top_dim"]
    assert not hasattr(model.config, "v_top_dim")
    for name, value in load_file(FOLDER / "student.safetensors").items():
        for ours, theirs in PUBLISHED_NAMES.items():
            name = name.replace(theirs, ours)
        assert torch.equal(model.get_parameter(name), value.float()), name
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    again, _ = load_latent_model(tmp_path / "ours", dtype=torch.float32)
    for name, value in model.named_parameters():
        assert torch.equal(again.get_parameter(name), value), name
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(published, dtype=torch.float32)
    assert torch.equal(stock.model.language_model.norm.weight, model.model.language_model.norm.weight)
