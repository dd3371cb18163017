"""LaViT golden vectors that need no backbone: both losses and their heads on stored states, and the gate (card, 4)."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file

from modeling_latent.latent_lavit import AttentionHead, ConceptHead
from tests.golden.conftest import each, golden_dir, golden_json, tolerance
from trainers.losses.attention_alignment import (
    AttentionAlignmentOptions,
    attention_alignment_loss,
    attention_log_scores,
)
from trainers.losses.concept_alignment import concept_alignment_loss
from trainers.sensory_gate import gate_gamma

FOLDER = golden_dir("lavit")
MANIFEST = golden_json(FOLDER, "manifest.json", {})
TENSOR_FILE, WEIGHT_FILE = FOLDER / "losses.safetensors", FOLDER / "student.safetensors"
CASES = MANIFEST.get("loss_cases", []) if TENSOR_FILE.is_file() and WEIGHT_FILE.is_file() else []
NAMES = set(MANIFEST.get("tensors", {}).get("losses.safetensors", {})) if TENSOR_FILE.is_file() else set()
CONCEPT_CASES = [case for case in CASES if f"{case['name']}.loss_v_top" in NAMES]
GRADIENT_CASES = [
    case for case in CONCEPT_CASES if any(name.startswith(f"{case['name']}.grad.v_top_head") for name in NAMES)
]
# Runs without a target keep what the head predicts, too.
UNTRAINED_CASES = [case for case in CASES if case not in CONCEPT_CASES and f"{case['name']}.v_pred" in NAMES]
NO_LABELS = [case for case in CONCEPT_CASES if "labels" in case["dropped_inputs"]]
ATTENTION_INPUTS = [case for case in CASES if f"{case['name']}.in.traj_tensor" in NAMES]
# Target of the vectors, and options that make it of the min-max target.
HEAD_VARIANTS = {
    "minmax": AttentionAlignmentOptions.reference(),
    "normalised": AttentionAlignmentOptions(top_k=None),
    **{
        found[1]: AttentionAlignmentOptions(top_k=int(found[2]))
        for found in (re.fullmatch(r"variant\.kl_head_(top(\d+))", name) for name in sorted(NAMES))
        if found
    },
}
VARIANTS = [name for name in HEAD_VARIANTS if f"variant.kl_head_{name}" in NAMES]


@lru_cache(maxsize=1)
def loss_tensors() -> dict[str, torch.Tensor]:
    return load_file(TENSOR_FILE)


@lru_cache(maxsize=1)
def head_weights() -> dict[str, torch.Tensor]:
    weights = load_file(WEIGHT_FILE)
    return {name: value.float() for name, value in weights.items() if "_head." in name and name != "lm_head.weight"}


def allowed(kind: str) -> float:
    return tolerance(MANIFEST["tolerances"][kind])


def concept_head() -> ConceptHead:
    weights = {name.removeprefix("v_top_head."): v for name, v in head_weights().items() if name.startswith("v_top_")}
    head = ConceptHead(weights["mlp.0.weight"].shape[1], weights["mlp.2.weight"].shape[0])
    head.load_state_dict(weights)
    return head


def attention_head() -> AttentionHead:
    weights = {name.removeprefix("traj_head."): v for name, v in head_weights().items() if name.startswith("traj_")}
    head = AttentionHead(weights["query_proj.weight"].shape[0])
    head.load_state_dict(weights)
    return head


def concept_target(case: dict) -> torch.Tensor:
    tensors, own = loss_tensors(), f"{case['name']}.in.v_top_tensor"
    return tensors[own] if own in tensors else tensors[f"batch.{case['batch']}.v_top_tensor"]


# The concept loss ---------------------------------------------------------------------------------------------------


@each("case", CONCEPT_CASES, ids=lambda case: case["name"])
def test_concept_loss(case: dict) -> None:
    tensors = loss_tensors()
    predicted = tensors[f"{case['name']}.v_pred"]
    output = concept_alignment_loss(predicted, concept_target(case))
    want = tensors[f"{case['name']}.loss_v_top"].item()
    assert abs(output.loss.item() - want) <= allowed("losses")
    assert abs(1 - output.cosine_sum.item() / output.count.item() - want) <= allowed("losses")
    made = concept_head()(tensors[f"{case['name']}.h_anchor"])
    assert (made - predicted).abs().max().item() <= allowed("hidden_and_logits")


@each("case", UNTRAINED_CASES, ids=lambda case: case["name"])
def test_the_concept_head_without_a_target(case: dict) -> None:
    tensors, name = loss_tensors(), case["name"]
    made = concept_head()(tensors[f"{name}.h_anchor"])
    assert (made - tensors[f"{name}.v_pred"]).abs().max().item() <= allowed("hidden_and_logits")


@each("case", GRADIENT_CASES, ids=lambda case: case["name"])
def test_gradients_of_the_concept_head(case: dict) -> None:
    """Only the concept loss reaches this head, so the gradients of the total are those of its part."""
    tensors, head = loss_tensors(), concept_head()
    predicted = head(tensors[f"{case['name']}.h_anchor"])
    loss = concept_alignment_loss(predicted, concept_target(case)).loss
    (case["loss_scale_vtop"] * loss).backward()
    gradients = {f"v_top_head.{name}": value.grad for name, value in head.named_parameters()}
    compared = 0
    for name, gradient in gradients.items():
        want = tensors.get(f"{case['name']}.grad.{name}")
        if want is not None:
            compared += 1
            scale = max(want.abs().max().item(), 1e-6)
            assert (gradient - want).abs().max().item() <= allowed("gradients") * scale, name
        norm = case.get("grad_l2_norm", {}).get(name)
        if norm is not None:
            assert gradient.norm().item() == pytest.approx(norm, rel=allowed("gradients"), abs=1e-6), name
    assert compared


@each("case", CONCEPT_CASES, ids=lambda case: case["name"])
def test_padding_and_scale_of_the_concept_target(case: dict) -> None:
    predicted, target = loss_tensors()[f"{case['name']}.v_pred"], concept_target(case)
    want = concept_alignment_loss(predicted, target).loss.item()
    if target.dim() == 3:
        padded = torch.cat([target, torch.zeros_like(target)], 1)
        assert abs(concept_alignment_loss(predicted, padded).loss.item() - want) <= allowed("losses")
        assert abs(concept_alignment_loss(predicted, target.mean(1)).loss.item() - want) <= allowed("losses")
    for scale in (0.01, 250.0):
        assert abs(concept_alignment_loss(predicted, target * scale).loss.item() - want) <= allowed("losses")
    zero = predicted.clone().requires_grad_()
    output = concept_alignment_loss(zero, torch.zeros_like(target)).loss
    assert output.item() == 1 and not torch.autograd.grad(output, zero)[0].any()


@each("case", NO_LABELS, ids=lambda case: case["name"])
def test_without_labels_the_total_is_the_weighted_sum(case: dict) -> None:
    tensors, name = loss_tensors(), case["name"]
    concept = concept_alignment_loss(tensors[f"{name}.v_pred"], concept_target(case)).loss
    total = case["loss_scale_vtop"] * concept + case["loss_scale_traj"] * tensors[f"{name}.loss_traj"]
    assert abs(total.item() - tensors[f"{name}.loss_total"].item()) <= 2 * allowed("losses")


# The attention loss -------------------------------------------------------------------------------------------------


@each("case", ATTENTION_INPUTS, ids=lambda case: case["name"])
def test_a_missing_file_as_published(case: dict) -> None:
    """Zeros in place of a target: the loss of the reference options is the recorded one, ours refuses the row."""
    target = loss_tensors()[f"{case['name']}.in.traj_tensor"]
    assert not target.any()
    scores, keys = torch.randn(target.shape), torch.ones_like(target, dtype=torch.bool)
    output = attention_alignment_loss(scores, target, keys, AttentionAlignmentOptions.reference())
    assert abs(output.loss.item() - loss_tensors()[f"{case['name']}.loss_traj"].item()) <= allowed("losses")
    with pytest.raises(ValueError, match="row 0: the target sums to zero"):
        attention_alignment_loss(scores, target, keys)


@each("variant", VARIANTS)
def test_attention_loss_of_the_head_on_image_tokens(variant: str) -> None:
    tensors = loss_tensors()
    scores, target = tensors["variant.head_scores_image_tokens"], tensors["variant.in.target_minmax_merged_grid"]
    keys, options = torch.ones_like(target, dtype=torch.bool), HEAD_VARIANTS[variant]
    want = tensors[f"variant.kl_head_{variant}"].item()
    output = attention_alignment_loss(scores, target, keys, options)
    assert abs(output.loss.item() - want) <= allowed("losses")
    prepared = tensors.get(f"variant.target_{variant}", tensors.get(f"variant.target_{variant}_renormalised"))
    if prepared is not None:
        again = attention_alignment_loss(scores, prepared, keys, AttentionAlignmentOptions.reference())
        assert abs(again.loss.item() - want) <= allowed("losses")


@each("variant", VARIANTS)
def test_rows_of_other_lengths_are_as_alone(variant: str) -> None:
    """Rows cut to different lengths and padded again, what stands in the padding not being read."""
    tensors, options = loss_tensors(), HEAD_VARIANTS[variant]
    scores, target = tensors["variant.head_scores_image_tokens"], tensors["variant.in.target_minmax_merged_grid"]
    lengths = scores.shape[1] - torch.arange(len(scores)).clamp(max=scores.shape[1] - 3)
    keys = torch.arange(scores.shape[1]) < lengths[:, None]
    batch = attention_alignment_loss(scores.masked_fill(~keys, 1e4), target * keys, keys, options)
    alone = [
        attention_alignment_loss(*(tensor[row : row + 1, :length] for tensor in (scores, target, keys)), options)
        for row, length in enumerate(lengths.tolist())
    ]
    assert abs(batch.loss.item() - sum(part.loss.item() for part in alone) / len(alone)) <= allowed("losses")


if "variant.student_attention_latent_to_image" in NAMES:

    def test_attention_loss_of_the_students_own_attention() -> None:
        """Of the last latent, and of all of them, where the divergences are summed."""
        tensors = loss_tensors()
        weights, target = (tensors[f"variant.{n}"] for n in ("student_attention_latent_to_image", "target_normalised"))
        rows, latents, _ = weights.shape
        keys, options = torch.ones_like(target, dtype=torch.bool), HEAD_VARIANTS["normalised"]
        last = attention_alignment_loss(attention_log_scores(weights[:, -1], keys), target, keys, options)
        assert abs(last.loss.item() - tensors["variant.kl_attention_last_latent"].item()) <= allowed("losses")
        flat = [tensor.repeat_interleave(latents, 0) for tensor in (target, keys)]
        every = attention_alignment_loss(attention_log_scores(weights.flatten(0, 1), flat[1]), *flat, options)
        want = tensors["variant.kl_attention_sum_over_latents"].item()
        assert abs(every.kl_sum.item() / rows - want) <= allowed("losses")


# The heads, and the gate --------------------------------------------------------------------------------------------

if "heads.in.state" in NAMES and WEIGHT_FILE.is_file():

    def test_heads_on_given_states() -> None:
        tensors = loss_tensors()
        state, keys = tensors["heads.in.state"], tensors["heads.in.image_features"]
        for found, name in (
            (concept_head()(state), "v_top_head"),
            (attention_head()(state, keys), "traj_scores"),
        ):
            want = tensors[f"heads.{name}"]
            assert (found - want).abs().max().item() <= allowed("hidden_and_logits") * max(
                1.0, want.abs().max().item()
            )


@each("row", MANIFEST.get("paper_gate_table", []), ids=lambda row: f"{row['t']}-{row['Tw']}")
def test_gate(row: dict) -> None:
    assert gate_gamma(row["t"], row["Tw"], row["eps"]) == pytest.approx(row["gamma"], rel=1e-9, abs=0)
