"""Decoding against the vectors of the LaViT reference code (arXiv 2601.10129; method card, section 6).

The published evaluator has two switches that never reach its `generate`: with all of them it decodes freely, and one
cuts the first words off the answer. Free decoding is `force_latents=False` here. What the switches were to do are the
cases `intended_*`: the learned tokens behind the prompt (the default here), and counted as padding
(`mask_latents="padding"`). Both the naive decoder and `generate` must give their positions, logits and ids.

Collected by `test_lavit.py`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BatchFeature, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from evaluation.runner import build_prompt, predict
from modeling_latent import LatentQwen2_5_VLForConditionalGeneration as LatentModel
from tests.golden.conftest import each, golden_dir, golden_json
from tests.golden.lavit_data import IDS, processor
from tests.golden.lavit_trainer import golden_config, golden_model
from tests.naive_learned import NaiveQwenVL, naive_learned, naive_learned_generate
from trainers.data.answers_lavit import LEARNED_TOKEN
from trainers.data.llava_text import IMAGE_PLACEHOLDER
from trainers.data.records import Record, make_record

FOLDER = golden_dir("lavit")
MANIFEST: dict[str, Any] = golden_json(FOLDER, "manifest.json", {})
WEIGHT_FILE, _path = FOLDER / "student.safetensors", FOLDER / "eval.safetensors"
TENSORS: dict[str, torch.Tensor] = load_file(_path) if _path.is_file() and WEIGHT_FILE.is_file() else {}
EVALUATION: dict[str, Any] = MANIFEST.get("evaluation", {}) if TENSORS else {}
SENT: list[dict[str, Any]] = EVALUATION.get("cases", [])  # the published switches and what reached `generate`
# Case of the vectors to the options that give it, by our names and by the published ones.
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "plain": ({"force_latents": False}, {"force_lvr": False}),
    "intended_force": ({}, {"force_latents": True}, {"force_lvr": True, "mask_lvr": False}),
    "intended_force_mask": ({"mask_latents": "padding"}, {"mask_lvr": "padding"}),
}
DECODED = [name for name in OPTIONS if f"{name}.next_token_logits" in TENSORS]
INTENDED = [name for name in DECODED if f"{name}.position_ids" in TENSORS]
FORMS = {name: "padding" if name.endswith("_mask") else None for name in INTENDED}


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the tolerance of the manifest for logits, "abs 1e-3, rel 1e-4"."""
    atol, rtol = (float(part.split()[1]) for part in MANIFEST["tolerances"]["hidden_and_logits"].split(","))
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


@lru_cache
def record() -> Record:
    question = EVALUATION["question"].replace(IMAGE_PLACEHOLDER, "").strip()
    picture = Image.fromarray(TENSORS["image_uint8"].numpy())
    return make_record(id="0", question=question, answer="", images=[picture])


@lru_cache
def inputs() -> BatchFeature:
    text = build_prompt(processor(), record())
    return processor()(text=[text], images=[record()["images"]], return_tensors="pt")


@lru_cache
def model(implementation: str) -> LatentModel:
    case = {"use_trajectory_supervision": True, "attn_implementation": implementation, "module_mode": "eval"}
    return golden_model(case, IDS["lvr_ids"])


@lru_cache
def stock_model() -> Qwen2_5_VLForConditionalGeneration:
    made = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**golden_config()))
    made.set_attn_implementation("eager")
    weights = {name: value.float() for name, value in load_file(WEIGHT_FILE).items() if "_head." not in name}
    missing, unexpected = made.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return made.eval()


def generate_options(**options: Any) -> dict[str, Any]:
    return {
        "max_new_tokens": EVALUATION["max_new_tokens"],
        "do_sample": EVALUATION["do_sample"],
        "repetition_penalty": EVALUATION["repetition_penalty"],
        "eos_token_id": EVALUATION["eos_ids"],
        "pad_token_id": EVALUATION["pad_id"],
        **options,
    }


def prompt_of(name: str) -> torch.LongTensor:
    """`(1, L)` ids that the model is given, with the learned tokens that stand behind the prompt."""
    return TENSORS[f"{name}.input_ids" if name in INTENDED else f"{name}.sent.input_ids"]


# What the published evaluator sends and reports ----------------------------------------------------------------------


@each("case", SENT, ids=lambda case: case["name"])
def test_what_is_sent(case: dict[str, Any]) -> None:
    """The same prompt for all switches, and it is the one that our runner makes of the question."""
    name, ours = case["name"], inputs()
    for key in ("input_ids", "attention_mask"):
        assert ours[key].tolist() == TENSORS[f"{name}.sent.{key}"].tolist(), key
    assert ours["input_ids"].shape[1] == case["prompt_len"]
    assert ours["image_grid_thw"].tolist() == TENSORS["image_grid_thw"].tolist()
    torch.testing.assert_close(ours["pixel_values"], TENSORS["pixel_values"], atol=1e-5, rtol=0)
    # The published mask looks for a token that is not one of the trained ones, so it hides nothing.
    added = EVALUATION["evaluator_added_token"]
    assert added["id"] not in ours["input_ids"] and added["id"] not in IDS["lvr_ids"] == EVALUATION["lvr_ids"]
    assert LEARNED_TOKEN.fullmatch(added["text"]), "the published count knows it, too"
    assert not case["mask_lvr"] or TENSORS[f"{name}.sent.attention_mask"].all()


@each("case", SENT, ids=lambda case: case["name"])
def test_what_is_reported(case: dict[str, Any]) -> None:
    """The runner reports the whole answer; the published evaluator cuts as many tokens as it meant to force."""
    written = TENSORS[f"{case['name']}.output_ids"][0, case["prompt_len"] :]
    assert len(written) == case["returned_tokens"]
    cut = case["tokens_dropped_from_output"]
    assert cut == (len(IDS["lvr_ids"]) if case["force_lvr"] else 0)
    assert processor().decode(written[cut:]) == case["decoded"]
    options = generate_options(latent_strategy="learned", force_latents=False)
    (found,) = predict(model("eager"), processor(), [record()], **options)
    assert found.raw == processor().decode(written)
    assert found.num_latent_steps == sum(token in IDS["lvr_ids"] for token in written.tolist())
    assert found.num_prefilled == 0 and found.num_steps == found.num_tokens <= len(written)


# Decoding -----------------------------------------------------------------------------------------------------------


@each("name", DECODED)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_library_reproduces_the_vectors(name: str, implementation: str) -> None:
    want, length = TENSORS[f"{name}.output_ids"], prompt_of(name).shape[1]
    for options in OPTIONS[name]:
        output = model(implementation).generate(
            **inputs(), **generate_options(return_dict_in_generate=True, output_logits=True, **options)
        )
        assert output.sequences.tolist() == want.tolist(), options
        near(output.logits[0][0], TENSORS[f"{name}.next_token_logits"])
        trace = output.latent_trace
        assert trace.prompt_length == length and output.sequences[:, :length].tolist() == prompt_of(name).tolist()
        if name not in INTENDED:
            assert not trace.latent_mask.any()
            continue
        laid_out = trace.sequences[trace.latent_mask].tolist()
        assert laid_out == IDS["lvr_ids"] and trace.latent_mask[0, length - len(laid_out) : length].all()
        mask = torch.ones(1, length).long() if trace.attention_mask is None else trace.attention_mask
        assert mask.tolist() == TENSORS[f"{name}.attention_mask"].tolist()
        positions, steps = trace.position_ids[-3:], want.shape[1] - length
        assert positions[..., :length].tolist() == TENSORS[f"{name}.position_ids"].tolist()
        first = length + TENSORS[f"{name}.rope_deltas"]  # of the first new token
        expected = (first + torch.arange(steps)).expand(3, -1, -1)
        assert positions[..., length:].tolist() == expected.tolist()


@each("name", INTENDED)
def test_the_runner_reports_the_whole_answer(name: str) -> None:
    written = TENSORS[f"{name}.output_ids"][0, prompt_of(name).shape[1] :]
    options = generate_options(latent_strategy="learned", **OPTIONS[name][0])
    (found,) = predict(model("eager"), processor(), [record()], **options)
    assert found.raw == processor().decode(written)
    assert found.num_prefilled == len(IDS["lvr_ids"]) and found.num_steps <= len(written)


@each("name", INTENDED)
def test_naive_decoder_reproduces_the_vectors(name: str) -> None:
    """Up to the first image placeholder that is written, which a pass without a cache takes for an image."""
    backbone = NaiveQwenVL(stock_model(), TENSORS["pixel_values"], TENSORS["image_grid_thw"])
    ids, number = prompt_of(name)[0].tolist(), len(IDS["lvr_ids"])
    run = naive_learned(backbone, ids, range(len(ids) - number, len(ids)), FORMS[name])
    near(run.logits[-1], TENSORS[f"{name}.next_token_logits"])
    assert run.positions.tolist() == TENSORS[f"{name}.position_ids"][:, 0].tolist()
    written = TENSORS[f"{name}.output_ids"][0, len(ids) :].tolist()
    count = written.index(IDS["image_pad"]) + 1 if IDS["image_pad"] in written else len(written)
    found = naive_learned_generate(
        backbone,
        ids[:-number],
        ids[-number:],
        max_new_tokens=count,
        form=FORMS[name],
        eos_ids=EVALUATION["eos_ids"],
        process_scores=RepetitionPenaltyLogitsProcessor(EVALUATION["repetition_penalty"]),
    )
    assert found == written[:count]


@each("name", INTENDED)
def test_the_vectors_tell_the_ways_apart(name: str) -> None:
    """Forced, hidden as padding, hidden by visibility and free decoding begin with other logits."""
    others = [{"force_latents": False}, {"mask_latents": "visibility"}]
    others += [OPTIONS[other][0] for other in INTENDED if other != name]
    for options in others:
        output = model("eager").generate(
            **inputs(), **generate_options(return_dict_in_generate=True, output_logits=True, **options)
        )
        with pytest.raises(AssertionError):
            near(output.logits[0][0], TENSORS[f"{name}.next_token_logits"])
