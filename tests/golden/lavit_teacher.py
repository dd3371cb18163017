"""LaViT golden vectors of the teacher: prompts, concept, attention, gradients, greedy answers, steps (card 5.2, 5.3).

The reference ran eager attention, and so does most of this; the attention method is compared with fused attention too.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from modeling_latent import LatentProcessor
from tests.golden.conftest import each, golden_dir, golden_json, tolerance
from trainers.teacher_capture import (
    CapturedSignals,
    GradientOptions,
    aggregate_tokens,
    capture_attention,
    capture_gradient,
    generate_answers,
    gradient_prompts,
    split_steps,
    teacher_prompt,
    topk_indices,
)
from trainers.teacher_parts import encode_batch

FOLDER = golden_dir("lavit")
MANIFEST: dict[str, Any] = golden_json(FOLDER, "manifest.json", {})
TEACHER: dict[str, Any] = MANIFEST.get("teacher", {})
ATTENTION, TWO_STEPS = TEACHER.get("attention", {}), TEACHER.get("attention_two_steps", {})
GRADIENTS: list[dict[str, Any]] = TEACHER.get("gradient_cases", [])
FACTS = ("max", "mean", "sum", "entropy", "strength")
_IMPLEMENTATIONS = ["eager", "sdpa"] if ATTENTION else []


@lru_cache
def vectors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "teacher_vectors.safetensors")


def has(name: str) -> bool:
    return (FOLDER / "teacher_vectors.safetensors").is_file() and any(key.startswith(name) for key in vectors())


def bound() -> dict[str, float]:
    return {"atol": tolerance(MANIFEST["tolerances"]["teacher"]), "rtol": 0.0}


def rounding(expected: torch.Tensor) -> dict[str, float]:
    """The same at the size of the values: float32 rounds relative to it, and processors differ by that."""
    return {"atol": bound()["atol"] * max(1.0, float(expected.abs().max())), "rtol": 0.0}


@lru_cache
def processor() -> LatentProcessor:
    """Of the set's tokenizer, image limits and chat template."""
    names, folder = golden_json(FOLDER / "tokenizer", "ids.json"), FOLDER / "tokenizer"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=names["eos"], pad_token=names["pad"]
    )
    images = MANIFEST["dataset"]["image_processor"]
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return LatentProcessor(Qwen2VLImageProcessorPil(**images), tokenizer, chat_template=template)


@lru_cache
def teacher(implementation: str = "eager") -> Qwen2_5_VLForConditionalGeneration:
    """The stock class, float32; do not change it."""
    config = Qwen2_5_VLConfig(**golden_json(FOLDER, "teacher_config.json"))
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=implementation)
    state = {name: value.float() for name, value in load_file(FOLDER / "teacher.safetensors").items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    names = golden_json(FOLDER / "tokenizer", "ids.json")
    model.generation_config.eos_token_id = [names["eos_id"], names["pad_id"]]
    model.generation_config.pad_token_id = names["pad_id"]
    return model.float().eval()


def picture() -> Image.Image:
    return Image.fromarray(vectors()["image_uint8"].numpy())


def encoded(text: str) -> torch.LongTensor:
    return encode_batch(teacher(), processor(), [text], [picture()]).inputs["input_ids"]


def attention(answer: str | list[str], implementation: str = "eager", **options: Any) -> CapturedSignals:
    given = teacher(implementation), processor(), [picture()], [ATTENTION["question"]], [answer]
    return capture_attention(*given, **options)[0]


def check_attention(signals: CapturedSignals, name: str) -> None:
    expected = vectors()
    torch.testing.assert_close(signals.scores, expected[f"{name}.raw"], **bound())
    torch.testing.assert_close(signals.attention, expected[f"{name}.p_t"], **bound())
    indices = expected[f"{name}.topk_idx"]
    assert torch.equal(topk_indices(signals.attention, len(indices)), indices)


# Prompts and the concept


@each("key", ["image_grid_thw"] if ATTENTION else [])
def test_teacher_prompts_and_image(key: str) -> None:
    """The texts of the manifest and their ids, where the image tokens are, and the pixels."""
    expected, question = vectors(), ATTENTION["question"]
    texts = {
        ("prompt_full", "attn"): teacher_prompt(processor(), question, ATTENTION["teacher_text"]),
        ("prompt_vtop", "vtop"): teacher_prompt(processor(), question),
    }
    for (name, ids), text in texts.items():
        assert text == ATTENTION[name] and torch.equal(encoded(text), expected[f"{ids}.input_ids"])
    batch = encode_batch(teacher(), processor(), [ATTENTION["prompt_full"]], [picture()])
    assert torch.equal(batch.image_index[0], expected["attn.image_mask"].nonzero()[:, 0])
    assert torch.equal(batch.inputs[key], expected[key])
    torch.testing.assert_close(batch.inputs["pixel_values"], expected["pixel_values"], **bound())
    _, height, width = expected[key][0].tolist()
    merge = MANIFEST["dataset"]["image_processor"]["merge_size"]
    assert batch.grids == [(height // merge, width // merge)]


@each("implementation", _IMPLEMENTATIONS)
def test_teacher_concept_and_attention(implementation: str) -> None:
    """Both from one forward; the concept to the rounding of float32 at its size."""
    signals, features = attention(ATTENTION["teacher_text"], implementation), vectors()["vtop.features"]
    check_attention(signals, "attn")
    torch.testing.assert_close(signals.concept, features, **rounding(features))
    for text in ("", "A longer answer changes nothing before it. " * 3):
        concept = attention(text, implementation).concept
        torch.testing.assert_close(concept, signals.concept, **rounding(features))


@each("name", ["attn.raw_all_layers"] if ATTENTION else [])
def test_teacher_attention_of_all_layers(name: str) -> None:
    found = attention(ATTENTION["teacher_text"], num_layers=None)
    torch.testing.assert_close(found.scores, vectors()[name], **bound())


@each("implementation", _IMPLEMENTATIONS if TWO_STEPS else [])
def test_teacher_attention_of_each_step(implementation: str) -> None:
    """The pieces up to a step; alone, and all steps as one batch of rows of different length."""
    pieces = TWO_STEPS["pieces"]
    answers = [pieces[: step + 1] for step in range(len(pieces))]
    given = [picture()] * len(pieces), [TWO_STEPS["question"]] * len(pieces)
    together = capture_attention(teacher(implementation), processor(), *given, answers)
    for step, answer in enumerate(answers):
        text = teacher_prompt(processor(), TWO_STEPS["question"], "\n".join(answer))
        assert text == TWO_STEPS["prompts"][step]
        assert torch.equal(encoded(text), vectors()[f"attn2.step{step}.input_ids"])
        for signals in (attention(answer, implementation), together[step]):
            check_attention(signals, f"attn2.step{step}")


# Gradients


def system_message(num_pieces: int) -> str:
    """Read off the prompt without pieces."""
    prefix = "grad" if num_pieces > 1 else "grad1"
    text = processor().tokenizer.decode(vectors()[f"{prefix}.prefix0.input_ids"][0])
    return re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", text, re.DOTALL)[1]


def options_of(case: dict[str, Any]) -> GradientOptions:
    args = case["args"]
    return GradientOptions(
        tau=args["tau_grad"],
        skip_markup=args["skip_markup"],
        downsample=args["downsample"],
        max_tokens_per_step=args["max_tokens_per_step"],
        max_grad_calls_per_step=args["max_grad_calls_per_step"],
        aggregation=args["aggregation_method"],
        attribution_threshold=args["attribution_threshold"],
        min_entropy=args["min_entropy"],
        system_message=system_message(len(case["pieces"])),
    )


@each("case", GRADIENTS, ids=lambda case: case["name"])
def test_teacher_gradients(case: dict[str, Any]) -> None:
    """Prompts, processed tokens, their distributions and facts, and the aggregated map of each piece."""
    options, pieces, question = options_of(case), case["pieces"], ATTENTION["question"]
    prefix = "grad" if len(pieces) > 1 else "grad1"
    for count, text in enumerate(gradient_prompts(processor(), question, pieces, options)):
        assert torch.equal(encoded(text), vectors()[f"{prefix}.prefix{count}.input_ids"])
    found = capture_gradient(teacher(), processor(), picture(), question, pieces, options)
    assert len(found) == len(pieces) == len(case["steps"])
    for step, (signals, about) in enumerate(zip(found, case["steps"], strict=True)):
        expected = {
            key: vectors()[f"grad.{case['name']}.step{step}.{key}"]
            for key in ("target_pos", "target_id", "token_p", "meta", "p_t", "topk_idx")
        }
        assert [each["position"] for each in signals.steps] == expected["target_pos"].tolist()
        assert [each["token_id"] for each in signals.steps] == expected["target_id"].tolist()
        facts = torch.tensor([[each[name] for name in FACTS] for each in signals.steps])
        torch.testing.assert_close(facts, expected["meta"], **rounding(expected["meta"]))
        normalised = {"atol": 5 * bound()["atol"], "rtol": 0.0}  # maps over their largest value, which rounds, too
        torch.testing.assert_close(signals.token_attention, expected["token_p"], **normalised)
        torch.testing.assert_close(signals.attention, expected["p_t"], **normalised)
        indices = expected["topk_idx"]
        assert torch.equal(topk_indices(signals.attention, len(indices)), indices)
        features = vectors()["vtop.features"]
        torch.testing.assert_close(signals.concept, features, **rounding(features))
        assert (options.tau, options.downsample, options.skip_markup) == (
            about["tau_used"], about["downsample"], about["skip_markup"],
        )  # fmt: skip
        assert about["method"] == f"grad_{options.aggregation}" and len(signals.steps) == about["span_token_count"]


# Name of the result -> method, attribution threshold, minimal entropy (manifest).
AGGREGATED = {
    "simple_avg": ("simple_avg", 0.1, 0.5),
    "weighted_by_strength": ("weighted_by_strength", 0.1, 0.5),
    "filter_by_threshold": ("filter_by_threshold", 0.1, 0.5),
    "entropy_weighted": ("entropy_weighted", 0.1, 0.5),
    "filter_none_pass": ("filter_by_threshold", 0.9, 0.5),
    "entropy_none_pass": ("entropy_weighted", 0.1, 9.0),
}


@each("name", [name for name in AGGREGATED if has(f"aggr.{name}")])
def test_teacher_aggregation(name: str) -> None:
    p, strength, entropy = (vectors()[f"aggr.in.{key}"] for key in ("p", "max_normalized", "entropy"))
    method, threshold, least = AGGREGATED[name]
    found = aggregate_tokens(p, strength, entropy, method, attribution_threshold=threshold, min_entropy=least)
    torch.testing.assert_close(found, vectors()[f"aggr.{name}"], **bound())


# Answers


@each("case", [TEACHER["teacher_generate"]] if "teacher_generate" in TEACHER else [], ids=lambda _: "greedy")
def test_teacher_answers(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of prompt and answer, and the text."""
    model, seen = teacher(), []
    generate = type(model).generate

    def observed(self: Any, **options: Any) -> torch.LongTensor:
        seen.append(generate(self, **options))
        return seen[-1]

    monkeypatch.setattr(type(model), "generate", observed)
    options = {name: case[name] for name in ("max_new_tokens", "repetition_penalty")}
    assert generate_answers(model, processor(), [picture()], [ATTENTION["question"]], **options) == case["text"]
    assert not case["do_sample"] and torch.equal(seen[0], vectors()["teacher_generate.ids"])


@each("case", TEACHER.get("split_steps", []), ids=lambda case: repr(case["text"]))
def test_steps_of_an_answer(case: dict[str, Any]) -> None:
    if case["result"] == "ValueError":
        with pytest.raises(ValueError, match="steps are asked for"):
            split_steps(case["text"], case["T"])
    else:
        assert split_steps(case["text"], case["T"]) == case["result"]


# What the tests above compare; names of gradient cases come from the manifest.
_TESTED = (
    r"image_uint8|pixel_values|image_grid_thw|vtop\.(features|input_ids)|teacher_generate\.ids",
    r"attn\.(image_mask|input_ids|p_t|raw|raw_all_layers|topk_idx)|attn2\.step\d+\.(input_ids|p_t|raw|topk_idx)",
    r"grad1?\.prefix\d+\.input_ids|aggr\.in\.(entropy|max_normalized|p)",
    *(re.escape(f"aggr.{name}") for name in AGGREGATED),
    *(rf"grad\.{re.escape(case['name'])}\.step\d+\.\w+" for case in GRADIENTS),
)


@each("tested", [_TESTED] if has("") else [], ids=lambda _: "all")
def test_every_vector_of_the_teacher_is_compared(tested: tuple[str, ...]) -> None:
    unknown = [name for name in vectors() if not re.fullmatch("|".join(tested), name)]
    assert not unknown, f"no test compares {unknown}; add one to lavit_teacher.py"
