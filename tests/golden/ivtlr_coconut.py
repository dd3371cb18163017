"""The vectors of Coconut, the base case of IVT-LR without images, through latent plans and the strategy `staged`.

Collected by `test_ivtlr.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from modeling_latent import LatentCausalLM, LatentCausalLMConfig
from modeling_latent.latent_plan import LatentPlan
from tests.golden.conftest import each
from tests.golden.ivtlr_stock import Case, assert_gradient, bound, case_names, stock_model, stock_name, table
from tests.latent import named_as_latent

COCONUT = table("coconut")
NAMES = case_names("coconut")
PROMPTS = COCONUT.get("generation", [])


@pytest.fixture(scope="module")
def coconut() -> LatentCausalLM:
    """The latent model with the weights of the set, in evaluation mode: no dropout, as in the reference."""
    stock, ids = stock_model("coconut"), COCONUT["token_ids"]
    config = LatentCausalLMConfig.from_stock(
        stock.config,
        method="coconut",
        latent_token_id=ids["latent"],
        latent_start_token_id=ids["start"],
        latent_end_token_id=ids["end"],
    )
    model = LatentCausalLM._from_config(config, attn_implementation="sdpa")
    model.load_state_dict(named_as_latent(stock))
    return model.float().eval()


@contextmanager
def calls(model: LatentCausalLM) -> Iterator[list[list[int]]]:
    """Numbers of queries and of keys of every call of the stock model."""
    found: list[list[int]] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = kwargs["input_ids"] if kwargs["inputs_embeds"] is None else kwargs["inputs_embeds"]
        cache = kwargs["past_key_values"]
        past = 0 if cache is None else cache.get_seq_length()
        found.append([given.shape[1], past + given.shape[1]])

    handle = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@each("key", [(name, gradient) for name in NAMES for gradient in ("bptt", "detach")], ids="-".join)
def test_coconut_plan(key: tuple[str, str], coconut: LatentCausalLM) -> None:
    """Loss, logits and latents of a batch whose rows may have different numbers of slots; without gradients the two
    kinds of plan are one, and every pass has the length that the reference gave it."""
    name, gradient = key
    case = Case.read("coconut", name)
    with torch.no_grad(), calls(coconut) as passes:
        output = coconut(**case.batch, latent_plan=LatentPlan(gradient=gradient))
    assert passes == case.info["query_len_and_kv_len_per_pass"]
    real = case.batch["attention_mask"].bool()
    columns = output.logits[..., COCONUT["logit_cols"]]
    for ours, key in ((columns, "logits_cols"), (output.logits.logsumexp(-1), "logits_lse")):
        torch.testing.assert_close(ours[real], case.expected[key][real], atol=bound("logits"), rtol=0)
    torch.testing.assert_close(output.loss, case.expected["loss"][0], atol=bound("loss"), rtol=0)
    plan = output.plan_output
    is_slot = case.batch["input_ids"] == COCONUT["token_ids"]["latent"]
    assert torch.equal(plan.latent_mask, is_slot) and is_slot.sum(1).tolist() == case.info["n_latents"]
    latents = plan.latent_embeds[is_slot]
    torch.testing.assert_close(latents, case.expected["latent_embeds"], atol=bound("logits"), rtol=0)


@each("name", [name for name in NAMES if Case.read("coconut", name).gradients])
def test_coconut_gradients_go_through_every_slot(name: str, coconut: LatentCausalLM) -> None:
    case = Case.read("coconut", name)
    coconut.zero_grad()
    output = coconut(**case.batch, latent_plan=LatentPlan(gradient="bptt"))
    torch.testing.assert_close(output.loss, case.expected["loss"][0], atol=bound("loss"), rtol=0)
    output.loss.backward()
    try:
        for published, expected in case.gradients.items():
            assert_gradient(rows_of_gradient(coconut, published, case), expected, published)
        for published, norm in case.info.get("grad_norms", {}).items():
            found = float(gradient_of(coconut, published).norm())
            assert found == pytest.approx(norm, rel=bound("gradients")), published
    finally:
        coconut.zero_grad()


def gradient_of(model: LatentCausalLM, published: str) -> torch.Tensor:
    name = stock_name(published, "coconut").removeprefix("transformer.")
    return model.get_parameter(f"model.language_model.{name}").grad


def rows_of_gradient(model: LatentCausalLM, published: str, case: Case) -> torch.Tensor:
    """What the set has of a gradient: of the embedding some rows."""
    gradient = gradient_of(model, published)
    return gradient[case.info["wte_grad_rows"]] if published.endswith("wte.weight") else gradient


def chained(name: str) -> bool:
    """Whether a case has gradients that go through a slot."""
    case = Case.read("coconut", name)
    return bool(case.gradients) and max(case.info["n_latents"]) > 0


@each("name", [name for name in NAMES if chained(name)])
def test_coconut_detached_has_other_gradients(name: str, coconut: LatentCausalLM) -> None:
    """The same loss, but no gradient is that of the chain."""
    case = Case.read("coconut", name)
    coconut.zero_grad()
    output = coconut(**case.batch, latent_plan=LatentPlan(gradient="detach"))
    torch.testing.assert_close(output.loss, case.expected["loss"][0], atol=bound("loss"), rtol=0)
    output.loss.backward()
    ours = {published: rows_of_gradient(coconut, published, case) for published in case.gradients}
    errors = [float((ours[one] - each).abs().max() / each.abs().max()) for one, each in case.gradients.items()]
    coconut.zero_grad()
    assert min(errors) > 10 * bound("gradients")


def generated(model: LatentCausalLM, ids: list[int], entry: dict[str, Any], **options: Any) -> tuple[list[int], int]:
    """The new ids behind a prompt without those that end it, and the number of calls of the stock model."""
    eos = entry["eos_token_id"]
    with calls(model) as passes:
        output = model.generate(
            input_ids=torch.tensor([ids]),
            latent_ids="readable",
            stop_on_first_token=False,
            max_new_tokens=entry["max_new_tokens"],
            generation_config=GenerationConfig(eos_token_id=eos, pad_token_id=COCONUT["token_ids"]["pad"]),
            **options,
        )
    first, *rest = output[0, len(entry["prompt_ids"]) :].tolist()
    return [first, *[token for token in rest if token != eos]], len(passes)


@each("number", list(range(len(PROMPTS))))
def test_coconut_generates_the_tokens(number: int, coconut: LatentCausalLM) -> None:
    """On a prompt that holds its slots, and on one that `generate` lays them out behind; the first token is not asked
    whether it ends the text, as in the reference, and a cache saves every further pass over the whole."""
    entry = PROMPTS[number]
    prompt, steps = entry["prompt_ids"], entry["n_latent"]
    laid_out = {} if steps else {"num_latent_steps": 0}
    new, passes = generated(coconut, prompt, entry, latent_strategy="staged", latent_markers=False, **laid_out)
    assert new == entry["new_tokens"]
    if "synced_gpus" not in entry.get("note", ""):
        assert passes == entry["gen_forward_cnt"]
    question, markers = question_of(prompt)
    options = {"latent_strategy": "staged", "num_latent_steps": steps, "latent_markers": markers}
    assert generated(coconut, question, entry, **options) == (new, passes)


def question_of(prompt: list[int]) -> tuple[list[int], bool]:
    """A prompt without its slots, and whether these stand between markers."""
    ids = COCONUT["token_ids"]
    slots = [ids["latent"]] * prompt.count(ids["latent"])
    markers = ids["start"] in prompt
    if markers:
        slots = [ids["start"], *slots, ids["end"]]
    question = prompt[: len(prompt) - len(slots)]
    assert prompt == [*question, *slots]
    return question, markers


def prompts_with_markers() -> list[dict[str, Any]]:
    """The different prompts whose slots stand between markers and that are decoded to the end."""
    whole = [entry for entry in PROMPTS if entry["eos_token_id"] == -1 and question_of(entry["prompt_ids"])[1]]
    return list({tuple(entry["prompt_ids"]): entry for entry in whole}.values())


MARKED = prompts_with_markers()


@each("entries", [MARKED] if len(MARKED) > 1 else [], ids=lambda entries: f"{len(entries)} rows")
def test_coconut_prompts_padded_on_the_left_are_decoded_alike(
    entries: list[dict[str, Any]], coconut: LatentCausalLM
) -> None:
    """All prompts of the set in one batch: different lengths, different numbers of slots, learned positions."""
    ids = COCONUT["token_ids"]
    questions = [question_of(entry["prompt_ids"])[0] for entry in entries]
    width = max(map(len, questions))
    short = min(entry["max_new_tokens"] for entry in entries)
    output = coconut.generate(
        input_ids=torch.tensor([[ids["pad"]] * (width - len(one)) + one for one in questions]),
        attention_mask=torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in questions]),
        latent_strategy="staged",
        latent_ids="readable",
        num_latent_steps=[entry["n_latent"] for entry in entries],
        latent_markers=True,
        max_new_tokens=short,
        generation_config=GenerationConfig(eos_token_id=-1, pad_token_id=ids["pad"]),
    )
    assert output[:, -short:].tolist() == [entry["new_tokens"][:short] for entry in entries]
