"""Vectors of IVT-LR that only Chameleon has: tokens of the VQ encoder, the loss of a head that never says an image
token, an adapter kept as one, and the batches that the reference gets wrong.

The cases themselves run in `ivtlr_plan.py`.
"""

from functools import lru_cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from modeling_latent.latent_plan import LatentPlan
from tests.golden.conftest import each
from tests.golden.ivtlr_plan import latent_model, run_case
from tests.golden.ivtlr_stock import Case, assert_gradient, bound, case_names, images, table, tensors

NAME = "chameleon"
CASES = case_names(NAME)
LOSSES = [name for name in CASES if Case.read(NAME, name).info["labels_in_loss"]]
ADAPTED = [name for name in CASES if Case.read(NAME, name).gradients]
SAMPLES = table(NAME).get("base_samples", [])


@lru_cache(maxsize=1)
def shared_model() -> Any:
    """The latent model with the adapter merged; do not change it."""
    return latent_model({}, NAME)


@each("family", [NAME] if CASES else [])
def test_the_vq_encoder_names_the_tokens(family: str) -> None:
    indices = sorted({sample["image_index"] for sample in SAMPLES})
    samples = [next(i for i, sample in enumerate(SAMPLES) if sample["image_index"] == index) for index in indices]
    pixels = images(family, samples)["pixel_values"]
    expected = tensors(family)["vq_token_ids"][indices]
    model = shared_model().model
    assert torch.equal(model.get_image_tokens(pixels).long(), expected)
    features = model.get_image_features(pixels).pooler_output
    assert torch.equal(features, model.embed_tokens(expected))


class Fused:
    """A model whose forward is that of TRL's fused head, as a trainer calls it."""

    def __init__(self, model: Any, config: Any) -> None:
        self.model, self.config = model, config

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs, fused_lm_head=True)


@each("name", LOSSES)
def test_the_fused_head_has_the_loss_of_the_reference(name: str) -> None:
    """TRL multiplies states with the head itself; the columns of image tokens must not count there, either."""
    case, model = Case.read(NAME, name), latent_model({}, NAME)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    with torch.no_grad():
        output, batch = run_case(Fused(model, model.config), case)
    torch.testing.assert_close(output.loss, case.expected["loss"][0], atol=bound("loss"), rtol=0)
    labelled = batch["labels"][:, 1:] != -100
    assert torch.isfinite(output.entropy).all() and bool((output.entropy[labelled] > 0).all())


def adapted_model() -> Any:
    """The model of the weight file with its adapter beside the weights, under TRL's fused head."""
    model, published, settings = latent_model({}, NAME), tensors(NAME, "weights"), table(NAME)["lora"]
    add_fused_lm_head(model)
    targets = [target.split(".")[-1] for target in settings["target_modules"]]
    config = LoraConfig(r=settings["r"], lora_alpha=settings["lora_alpha"], target_modules=targets, lora_dropout=0.0)
    assert config.lora_alpha / config.r == settings["scaling"]
    adapted = get_peft_model(model, config)
    ours = adapted.state_dict()
    state = {name.removeprefix("base_causallm."): value for name, value in published.items()}
    state.pop("embedding.weight", None)
    assert state.keys() <= ours.keys(), sorted(state.keys() - ours.keys())[:3]
    adapted.load_state_dict(state, strict=False)
    return adapted.train()


@each("name", ADAPTED)
def test_an_adapter_has_the_gradients_of_the_reference(name: str) -> None:
    case, adapted = Case.read(NAME, name), adapted_model()
    output, _ = run_case(Fused(adapted, adapted.config), case)
    torch.testing.assert_close(output.loss, case.expected["loss"][0], atol=bound("loss"), rtol=0)
    output.loss.backward()
    compared = 0
    for published, expected in case.gradients.items():
        gradient = adapted.get_parameter(published.removeprefix("base_causallm.")).grad
        if gradient is not None:  # the adapter is trained, nothing else
            assert_gradient(gradient, expected, published)
            compared += 1
    assert compared == sum("lora_" in published for published in case.gradients) > 0


@each("count", [16] if len(SAMPLES) > 1 else [])
def test_questions_of_different_length_in_one_batch(count: int) -> None:
    """The reference takes the image start of the wrong row here; a row must be what it is alone."""
    model, ids = shared_model(), table(NAME)["token_ids"]
    block = [model.config.latent_patch_token_id] * count + [ids["latent"]]
    rows = []
    for number, sample in enumerate(SAMPLES):
        question = [*sample["before"], *[ids["image"]] * table(NAME)["n_image_tokens"], *sample["after"]]
        steps = [token for step in sample["steps_tokenized"] for token in step]
        rows.append([*question, *block * (number % 3 + 1), *steps, *sample["answer_tokenized"]])
    width = max(map(len, rows))
    assert min(map(len, rows)) < width
    padded = {
        "input_ids": torch.tensor([row + [ids["pad"]] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }
    plan, everything = LatentPlan(patch_order="index_then_kth"), list(range(len(rows)))
    with torch.no_grad():
        together = model(**padded, **images(NAME, everything), latent_plan=plan)
        for number, row in enumerate(rows):
            alone = model(input_ids=torch.tensor([row]), **images(NAME, [number]), latent_plan=plan)
            torch.testing.assert_close(
                together.logits[number, : len(row)], alone.logits[0], atol=bound("logits"), rtol=0
            )
            chosen = together.plan_output.patch_columns[number, : len(row)]
            assert torch.equal(chosen, alone.plan_output.patch_columns[0])
