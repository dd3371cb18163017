"""LASER golden vectors: text rules, token ids and labels, padding, scorers (method card, sections 2 and 7)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.golden.conftest import each, golden_dir, golden_json
from trainers.data.answers import (
    extract_letter,
    extract_mmvp,
    extract_yes_no,
    score_choice_relaxed,
    score_letter,
    score_yes_no,
    score_yes_no_relaxed,
)
from trainers.data.llava import (
    LASER_TOKENS,
    encode_conversation,
    expand_image_placeholders,
    expand_latent_placeholders,
    expand_slot_placeholders,
    pad_batch,
    record_from_llava,
    render_turns,
)

FOLDER = golden_dir("laser")
DATA: dict[str, Any] = golden_json(FOLDER, "data.json", {})
EVALUATION: dict[str, Any] = golden_json(FOLDER, "evaluation.json", {})
EXAMPLES: list[dict[str, Any]] = DATA.get("examples", [])
COLLATOR: dict[str, Any] = DATA.get("collator", {})
SLOT_RULES = [
    (rule, expected, value)
    for rule in DATA.get("string_rules", [])
    for expected, value in rule.items()
    if expected.startswith("placeholder_mode_")
]


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    path = FOLDER / "tiny_tokenizer.json"
    if not path.is_file():
        pytest.skip("the set has no tiny_tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


def encode(example: dict[str, Any]) -> dict[str, list[int]]:
    record = record_from_llava(example["sample"], "data.json", 0, image_folder=".")
    counts = [frames * height * width // 4 for frames, height, width in example["image_grid_thw"]]
    return encode_conversation(render_turns(record), tokenizer(), counts)


def short(value: Any) -> str:
    return ascii(value)[1:41]


@each("rule", DATA.get("string_rules", []), ids=lambda rule: short(rule["value"]))
def test_chain_placeholder(rule: dict[str, str]) -> None:
    assert expand_latent_placeholders(expand_image_placeholders(rule["value"]), rule["chain_text"]) == rule["dwal"]


@each("case", SLOT_RULES, ids=lambda case: f"{short(case[0]['value'])}-{case[1]}")
def test_slot_placeholder(case: tuple[dict[str, str], str, str]) -> None:
    """The key names the mode: `placeholder_mode_counts_2_1` or `placeholder_mode_fixed_3`."""
    rule, name, expected = case
    mode, *numbers = name.removeprefix("placeholder_mode_").split("_")
    counts = int(numbers[0]) if mode == "fixed" else [int(number) for number in numbers]
    assert expand_slot_placeholders(expand_image_placeholders(rule["value"]), counts) == expected


@each("token", list(DATA.get("special_tokens", {}).items()), ids=lambda token: token[0])
def test_special_token(token: tuple[str, int]) -> None:
    text, token_id = token
    assert tokenizer().convert_tokens_to_ids(text) == token_id
    assert tokenizer().encode(text, add_special_tokens=False) == [token_id]


@each("tokens", [DATA["special_tokens"]] if DATA.get("special_tokens") else [], ids=lambda _: "order")
def test_latent_tokens_are_added_in_the_published_order(tokens: dict[str, int]) -> None:
    ids = [tokens[token] for token in LASER_TOKENS.values()]
    assert ids == list(range(ids[0], ids[0] + len(ids)))


@each("example", EXAMPLES, ids=lambda example: str(example["sample"].get("question_id")))
def test_example_gives_the_published_ids_and_labels(example: dict[str, Any]) -> None:
    encoded = encode(example)
    assert encoded["input_ids"] == example["input_ids"]
    assert encoded["labels"] == example["labels"]


@each("collator", [COLLATOR] if COLLATOR and EXAMPLES else [], ids=lambda _: "batch")
def test_padded_batch(collator: dict[str, Any]) -> None:
    examples = [EXAMPLES[position] for position in collator["sample_positions"]]
    batch = pad_batch([encode(e) for e in examples], collator["pad_token_id"], collator["pad_to_multiple_of"])
    assert list(batch["input_ids"].shape) == collator["shape"]
    for name in ("input_ids", "labels", "attention_mask"):
        assert batch[name].tolist() == collator[name], name
    assert batch["attention_mask"].sum(dim=1).tolist() == collator["original_lengths"]


@each("case", EVALUATION.get("letter", []), ids=lambda case: short(case["response"]))
def test_letter(case: dict[str, str]) -> None:
    assert extract_letter(case["response"], "laser") == case["extracted"]


@each("case", EVALUATION.get("yes_no", []), ids=lambda case: short(case["response"]))
def test_yes_no(case: dict[str, Any]) -> None:
    assert extract_yes_no(case["response"], "laser") == case["extracted"]


@each("case", EVALUATION.get("mmvp", []), ids=lambda case: short(case["response"]))
def test_mmvp(case: dict[str, str]) -> None:
    assert extract_mmvp(case["response"], case["question"], "laser") == case["extracted"]


CORRECTNESS: dict[str, Callable[[str, str], bool]] = {
    "letter_ground_truth": lambda response, label: score_letter(response, label, "laser"),
    "yes_no_ground_truth": lambda response, label: score_yes_no(response, label, "laser"),
    "yes_no_relaxed": score_yes_no_relaxed,
    "choice_relaxed": score_choice_relaxed,
}


@each(
    "case",
    [(table, case) for table in CORRECTNESS for case in EVALUATION.get(table, [])],
    ids=lambda case: f"{case[0]}-{short(case[1]['response'])}-{short(case[1]['ground_truth'])}",
)
def test_correctness_table(case: tuple[str, dict[str, Any]]) -> None:
    table, row = case
    assert CORRECTNESS[table](row["response"], row["ground_truth"]) is row["correct"]
