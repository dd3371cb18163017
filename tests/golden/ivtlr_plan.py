"""The vectors of IVT-LR through latent plans and the strategy `staged`: Qwen2-VL and Chameleon.

A set of the reference has slots only; here each gets its block of inserted image embeddings, so columns are those of
the final sequence. No case writes a start marker, whose id stands for the inserted embeddings.
"""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from modeling_latent import LATENT_CLASSES
from modeling_latent.latent_plan import LatentPlan
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
    table,
)

FAMILIES = {"qwen2vl": "qwen2_vl", "chameleon": "chameleon"}
CASES = [(family, name) for family in FAMILIES for name in case_names(family)]
PROMPTS = [(family, number) for family in FAMILIES for number in range(len(table(family).get("generation", [])))]


@pytest.fixture(scope="module")
def latent_models() -> dict[str, Any]:
    return {}


def latent_model(models: dict[str, Any], family: str) -> Any:
    """The latent model with the weights of the set, SDPA attention, in evaluation mode."""
    if family not in models:
        stock, ids = stock_model(family), table(family)["token_ids"]
        config_class, model_class = LATENT_CLASSES[FAMILIES[family]]
        config = config_class.from_stock(
            stock.config,
            method="ivtlr",
            latent_token_id=ids["latent"],
            latent_patch_token_id=ids["start"],
            latent_end_token_id=ids["end"],
            latent_start_token_id=ids["eos"],
            rope_positions="flat",
        )
        config._attn_implementation = "sdpa"
        model = model_class._from_config(config, attn_implementation="sdpa")
        model.load_state_dict(stock.state_dict())
        models[family] = model.float().eval()
    return models[family]


def with_blocks(rows: torch.Tensor, slots: torch.BoolTensor, fill: Any, count: int) -> torch.Tensor:
    """`(B, S)` to `(B, S + n * count)`: `count` times `fill` before every slot; all rows have the same number."""
    made = []
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        made.append([each for value, is_slot in zip(row, slot, strict=True)
                     for each in ([fill] * count if is_slot else []) + [value]])  # fmt: skip
    return torch.tensor(made)


def run_case(model: Any, case: Case, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Output of the plan, and the batch with its blocks."""
    config, count = model.config, case.info["K"] if case.info["n_latent"] else 0
    slots = case.batch["input_ids"] == config.latent_token_id
    fills = {"input_ids": config.latent_patch_token_id, "attention_mask": 1, "labels": -100}
    batch = {name: with_blocks(case.batch[name], slots, fill, count) for name, fill in fills.items()}
    if case.info["order"] not in ORDERS:
        options["forced_patches"] = forced(case, batch["input_ids"], config)
    order = ORDERS.get(case.info["order"], "score")
    plan = LatentPlan(gradient=case.gradient, patch_order=order, patch_images="last", **options)
    output = model(**batch, **images(case.family, case.info["samples"]), latent_plan=plan)
    return output, batch


def forced(case: Case, ids: torch.LongTensor, config: Any) -> torch.LongTensor:
    """The columns that the reference chose, in the blocks; image columns come before all of these."""
    chosen = case.expected["selected_abs"].transpose(0, 1).flatten(1)
    columns = torch.full_like(ids, -1)
    return columns.masked_scatter(ids == config.latent_patch_token_id, chosen)


@each("key", CASES, ids="-".join)
def test_plan_reproduces_a_case(key: tuple[str, str], latent_models: dict[str, Any]) -> None:
    case = Case.read(*key)
    model = latent_model(latent_models, case.family)
    with torch.no_grad():
        output, batch = run_case(model, case)
    mask = batch["attention_mask"]
    if "final_attention_mask" in case.expected:
        assert torch.equal(mask, case.expected["final_attention_mask"])
    assert_final_logits(case, output.logits, mask)
    if case.info["labels_in_loss"]:
        torch.testing.assert_close(output.loss, case.expected["loss"][0], atol=bound("loss"), rtol=0)
    if not case.info["n_latent"]:
        return
    plan = output.plan_output
    rows, steps, patches = len(mask), case.info["n_latent"], case.info["K"]
    is_slot = batch["input_ids"] == model.config.latent_token_id
    text = plan.latent_embeds[is_slot].view(rows, steps, -1).transpose(0, 1)
    torch.testing.assert_close(text, case.expected["latent_text"], atol=bound("logits"), rtol=0)
    chosen = plan.patch_columns[plan.patch_columns >= 0].view(rows, steps, patches).transpose(0, 1)
    assert torch.equal(chosen, case.expected["selected_abs"])
    source = case.expected["final_source"]
    torch.testing.assert_close(-1 - plan.patch_columns[source < 0], source[source < 0], rtol=0, atol=0)
    if plan.patch_scores is not None:
        is_image = batch["input_ids"] == model.config.image_token_id
        scores = torch.stack([plan.patch_scores[row][:, is_image[row]] for row in range(rows)], dim=1)
        torch.testing.assert_close(scores, case.expected["image_attention"], atol=bound("image_attention"), rtol=0)
    if "final_inputs_embeds" in case.expected:
        given, latent = case.expected["final_inputs_embeds"], plan.latent_mask
        torch.testing.assert_close(plan.latent_embeds[latent], given[latent], atol=bound("logits"), rtol=0)


@each("key", [key for key in CASES if Case.read(*key).gradients], ids="-".join)
def test_plan_has_the_gradients_of_the_reference(key: tuple[str, str], latent_models: dict[str, Any]) -> None:
    case = Case.read(*key)
    model = latent_model(latent_models, case.family).train()  # no dropout in these models
    try:
        output, _ = run_case(model, case)
        torch.testing.assert_close(output.loss, case.expected["loss"][0], atol=bound("loss"), rtol=0)
        output.loss.backward()
        for name, expected in case.gradients.items():
            assert_gradient(parameter_gradient(model, name, case.family), expected, name)
        if case.gradient == "detach":  # the leak of the reference into this row is not repeated
            assert not model.get_input_embeddings().weight.grad[model.config.latent_token_id].any()
    finally:
        model.zero_grad()
        model.eval()


def prompt_of(family: str, entry: dict[str, Any], steps: int) -> list[int]:
    """The prompt without its slots."""
    ids = table(family)["token_ids"]
    if "prompt_ids" in entry:
        return [token for token in entry["prompt_ids"] if token != ids["latent"]]
    sample = table(family)["base_samples"][entry["sample"]]
    return [*sample["before"], *[ids["image"]] * table(family)["n_image_tokens"], *sample["after"]]


@each("key", PROMPTS, ids=lambda key: f"{key[0]}-{key[1]}")
def test_staged_generates_the_tokens(key: tuple[str, int], latent_models: dict[str, Any]) -> None:
    family, number = key
    entry = table(family)["generation"][number]
    model = latent_model(latent_models, family)
    calls = []
    backbone = type(model.model)
    forward = backbone.forward
    prompt = torch.tensor([prompt_of(family, entry, entry["n_latent"])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))
        output = model.generate(
            input_ids=prompt,
            **images(family, [entry["sample"]]),
            latent_strategy="staged",
            num_latent_steps=entry["n_latent"],
            num_latent_patches=entry["K"],
            latent_patch_order="index_then_kth",
            latent_patch_images="last",
            latent_ids="readable",
            stop_on_first_token=False,
            generation_config=GenerationConfig(eos_token_id=entry["eos_token_id"], pad_token_id=entry["eos_token_id"]),
            max_new_tokens=entry["max_new_tokens"],
        )
    length = prompt.shape[1] + entry["n_latent"] * (entry["K"] + 1)
    assert output[0, length:].tolist() == entry["new_tokens"]
    # One call for each segment, one for the plan around them, one for each further token.
    assert len(calls) == entry["n_latent"] + 1 + 1 + len(entry["new_tokens"]) - 1


@each("family", [family for family in FAMILIES if table(family).get("generation")])
def test_staged_batches_equal_single_rows(family: str, latent_models: dict[str, Any]) -> None:
    """Prompts of different length and numbers of slots, padded on the left."""
    entries = [entry for entry in table(family)["generation"] if "note" not in entry]
    model, pad = latent_model(latent_models, family), table(family)["token_ids"]["pad"]
    prompts = [prompt_of(family, entry, 0) for entry in entries]
    width = max(map(len, prompts))
    count = min(entry["K"] for entry in entries)
    options = {
        "latent_strategy": "staged",
        "num_latent_patches": count,
        "max_new_tokens": 6,
        "generation_config": GenerationConfig(eos_token_id=-1, pad_token_id=pad),
    }
    together = model.generate(
        input_ids=torch.tensor([[pad] * (width - len(one)) + one for one in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts]),
        **images(family, [entry["sample"] for entry in entries]),
        num_latent_steps=[entry["n_latent"] for entry in entries],
        **options,
    )
    for row, (entry, prompt) in enumerate(zip(entries, prompts, strict=True)):
        alone = model.generate(
            input_ids=torch.tensor([prompt]),
            **images(family, [entry["sample"]]),
            num_latent_steps=entry["n_latent"],
            **options,
        )
        assert torch.equal(together[row, -6:], alone[0, -6:]), row
