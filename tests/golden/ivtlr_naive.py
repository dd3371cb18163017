"""The naive staged schedule against the vectors: selection, latents, logits, loss, gradients, generated tokens.

What it gives is then the yardstick of the plan of segments on any other model and shape. Collected by `test_ivtlr.py`.
"""

from typing import Any

import pytest
import torch

from evaluation.naive_backbones import NaiveBackbone, NaiveChameleon, NaiveQwenVL
from evaluation.naive_staged import NaiveStaged, naive_staged, naive_staged_generate
from tests.golden.conftest import each
from tests.golden.ivtlr_stock import (
    ORDERS,
    Case,
    assert_final_logits,
    assert_gradient,
    bound,
    case_names,
    images,
    parameter_gradient,
    stock_model,
    stock_name,
    table,
)

IVTLR = [(family, name) for family in ("qwen2vl", "chameleon") for name in case_names(family)]
GENERATION = [
    (family, number)
    for family in ("qwen2vl", "chameleon", "coconut")
    for number in range(len(table(family).get("generation", [])))
]
PATCH = -1


@pytest.fixture(scope="module")
def naive_models() -> dict[str, Any]:
    return {}


def backbone_of(models: dict[str, Any], family: str, samples: list[int]) -> NaiveBackbone:
    if family not in models:
        models[family] = stock_model(family)
    model = models[family]
    if family == "coconut":
        return NaiveBackbone(model)
    inputs = images(family, samples)
    if family == "chameleon":
        return NaiveChameleon(model, **inputs)
    return NaiveQwenVL(model, **inputs, rope_positions="flat")


def run_case(models: dict[str, Any], case: Case, **options: Any) -> tuple[NaiveBackbone, NaiveStaged]:
    order = case.info["order"]
    if order not in ORDERS:
        options["selected"] = list(case.expected["selected_abs"])
    backbone = backbone_of(models, case.family, case.info["samples"])
    run = naive_staged(
        backbone,
        **case.batch,
        slot_id=table(case.family)["token_ids"]["latent"],
        patch_id=PATCH,
        num_patches=case.info["K"],
        patch_order=ORDERS.get(order, "score"),
        patch_images="last",
        gradient=case.gradient,
        **options,
    )
    return backbone, run


@each("key", IVTLR, ids="-".join)
def test_naive_schedule_reproduces_a_case(key: tuple[str, str], naive_models: dict[str, Any]) -> None:
    case = Case.read(*key)
    with torch.no_grad():
        _, run = run_case(naive_models, case)
    assert run.pass_lengths == case.info["pass_lengths"]
    assert_final_logits(case, run.logits, run.attention_mask)
    if case.info["labels_in_loss"]:
        torch.testing.assert_close(run.loss, case.expected["loss"][0], atol=bound("loss"), rtol=0)
    else:
        assert run.loss is None
    if not case.info["n_latent"]:
        return
    assert torch.equal(torch.stack(run.selected), case.expected["selected_abs"])
    assert torch.equal(run.source, case.expected["final_source"])
    assert torch.equal(run.attention_mask, case.expected["final_attention_mask"])
    latents = torch.stack(run.latents)
    torch.testing.assert_close(latents, case.expected["latent_text"], atol=bound("logits"), rtol=0)
    used = torch.stack(run.scores)
    columns = used[0] != 0
    attention = torch.stack([scores[columns].view(len(columns), -1) for scores in used])
    torch.testing.assert_close(attention, case.expected["image_attention"], atol=bound("image_attention"), rtol=0)
    if "final_inputs_embeds" in case.expected:
        given = case.expected["final_inputs_embeds"]
        torch.testing.assert_close(run.inputs_embeds, given, atol=bound("logits"), rtol=0)


@each("every", [False, True], ids=["last pass", "logits of every pass"])
@each("key", [key for key in IVTLR if Case.read(*key).gradients], ids="-".join)
def test_naive_schedule_has_the_gradients_of_the_reference(
    key: tuple[str, str], every: bool, naive_models: dict[str, Any]
) -> None:
    case = Case.read(*key)
    backbone, run = run_case(naive_models, case, logits_of_every_pass=every)
    torch.testing.assert_close(run.loss, case.expected["loss"][0], atol=bound("loss"), rtol=0)
    backbone.model.zero_grad()
    run.loss.backward()
    for name, expected in case.gradients.items():
        assert_gradient(parameter_gradient(backbone.model, name, case.family), expected, name)
    backbone.model.zero_grad()


@each("name", case_names("coconut"))
def test_naive_schedule_without_copies_is_coconut(name: str, naive_models: dict[str, Any]) -> None:
    """Row by row, as rows of a case have different numbers of latents; the loss is the mean over all labels."""
    case = Case.read("coconut", name)
    backbone = backbone_of(naive_models, "coconut", [])
    backbone.model.zero_grad()
    slot, columns = table("coconut")["token_ids"]["latent"], table("coconut")["logit_cols"]
    runs, latents = [], []
    for row in range(len(case.batch["input_ids"])):
        one = {key: value[row : row + 1] for key, value in case.batch.items()}
        runs.append(naive_staged(backbone, **one, slot_id=slot, gradient="bptt"))
        latents += [latent[0] for latent in runs[-1].latents]
        real = one["attention_mask"].bool()
        for ours, key in (
            (runs[-1].logits[..., columns], "logits_cols"),
            (runs[-1].logits.logsumexp(-1), "logits_lse"),
        ):
            expected = case.expected[key][row : row + 1]
            torch.testing.assert_close(ours[real], expected[real], atol=bound("logits"), rtol=0)
    if latents:
        torch.testing.assert_close(torch.stack(latents), case.expected["latent_embeds"], atol=bound("logits"), rtol=0)
    counts = [int((row[1:] != -100).sum()) for row in case.batch["labels"]]
    loss = sum(run.loss * count for run, count in zip(runs, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(loss, case.expected["loss"][0], atol=bound("loss"), rtol=0)
    loss.backward()
    for parameter, expected in case.gradients.items():
        gradient = backbone.model.get_parameter(stock_name(parameter, "coconut")).grad
        if parameter.endswith("wte.weight"):
            gradient = gradient[case.info["wte_grad_rows"]]
        assert_gradient(gradient, expected, parameter)


def prompt_of(family: str, entry: dict[str, Any]) -> list[int]:
    if "prompt_ids" in entry:
        return entry["prompt_ids"]
    sample, ids = table(family)["base_samples"][entry["sample"]], table(family)["token_ids"]
    image = [ids["image"]] * table(family)["n_image_tokens"]
    return [*sample["before"], *image, *sample["after"], *[ids["latent"]] * entry["n_latent"]]


@each("key", GENERATION, ids=lambda key: f"{key[0]}-{key[1]}")
def test_naive_schedule_generates_the_tokens(key: tuple[str, int], naive_models: dict[str, Any]) -> None:
    family, number = key
    entry = table(family)["generation"][number]
    backbone = backbone_of(naive_models, family, [entry["sample"]] if "sample" in entry else [])
    done = naive_staged_generate(
        backbone,
        torch.tensor([prompt_of(family, entry)]),
        max_new_tokens=entry["max_new_tokens"],
        eos_ids=[entry["eos_token_id"]],
        use_cache=family != "coconut",
        slot_id=table(family)["token_ids"]["latent"],
        patch_id=PATCH,
        num_patches=entry.get("K", 0),
        patch_order="index_then_kth",
        patch_images="last",
    )
    if family != "coconut":
        assert done.new_tokens == entry["new_tokens"]
        assert done.calls == entry["n_latent"] + len(done.new_tokens)
    else:  # the reference drops the id that ends the text
        first, *rest = done.new_tokens
        assert [first, *[token for token in rest if token != entry["eos_token_id"]]] == entry["new_tokens"]
