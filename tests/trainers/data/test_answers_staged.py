"""Answers of M3CoT, ScienceQA and Coconut: the strict form, the published one, and where they differ."""

import pytest

from trainers.data.answers_staged import (
    cot_matches,
    extract_coconut,
    extract_scienceqa,
    m3cot_letters,
    score_coconut,
    score_m3cot,
    score_scienceqa,
)

PROMPT = "user\n[Question]:{Q}\n[Options]:\nA.{x}\nB.{y}\nAnswer:\nassistant\n"
CHOICES = ["one", "two", "three"]


@pytest.mark.parametrize(
    ("output", "gold", "strict", "reference"),
    [
        ("Therefore, the answer is B", "B", True, True),
        ("Therefore, the answer is A", "B", False, False),
        ("the answer is B", "B", True, False),  # published: its first letter is taken by the prompt's "Answer:"
        ("Because it is so. the answer is A", "B", False, True),
        ("Therefore, the answer is (B)", "B", True, False),
        ("Therefore, the answer is A. No, the answer is B", "B", False, True),
        ("Therefore, the answer is apple", "A", False, True),
        ("", "A", False, False),
    ],
)
def test_m3cot(output: str, gold: str, strict: bool, reference: bool) -> None:
    assert score_m3cot(output, gold, choices=CHOICES) is strict
    assert score_m3cot(PROMPT + output, gold, "reference") is reference


def test_letters_of_the_published_rule() -> None:
    assert m3cot_letters("Answer: b. The Answer\nIS c. answer:d theanswerisE") == ["B", "C", "D", "E"]
    assert m3cot_letters("ANSWER:\n assistant: x") == []
    assert m3cot_letters("the answer is\nassistant") == ["A"]


@pytest.mark.parametrize(
    ("output", "strict", "reference"),
    [
        ("Therefore, the answer is 2", 2, 2),
        ("the answer is B.", 1, 1),
        ("answer is: c", 2, 2),
        ("2", 2, -1),
        ("(0)", 0, -1),
        ("I think it is B", 1, -1),
        ("the answer is 12", -1, 1),
        ("the answer is 2.5", -1, 2),
        ("the answer is because", -1, 1),
        ("The answer is A. Therefore, the answer is 2", -1, 2),
        ("The answer is C. Therefore, the answer is 2", 2, 2),
        ("the answer is 7", -1, 7),
        ("two", 1, -1),
        ("", -1, -1),
    ],
)
def test_scienceqa(output: str, strict: int, reference: int) -> None:
    assert extract_scienceqa(output, choices=CHOICES) == strict
    assert extract_scienceqa(output, "reference") == reference
    for gold in range(3):
        assert score_scienceqa(output, gold, choices=CHOICES) is (gold == strict)
        assert score_scienceqa(output, gold, "reference") is (gold == reference)


def test_choices_that_are_numbers_are_meant_by_index() -> None:
    assert extract_scienceqa("Therefore, the answer is 1", choices=["2", "1", "0"]) == 1
    assert extract_scienceqa("1", choices=["2", "1", "0"]) == 1
    assert extract_scienceqa("3") == 3
    assert extract_scienceqa("4") == -1


@pytest.mark.parametrize(
    ("output", "gold", "strict", "reference"),
    [
        ("Q?\n<<1+1=2>>\n### 2", "2", True, True),
        ("Q?\n### 1,200", "1200", True, True),
        ("Q?\n### Alex is a lempus.", "Alex is a lempus.", True, True),
        ("Q?\n### 2\nand so on", "2", True, False),
        ("Q?\n### 3 ### 2", "2", False, True),
        ("2", "2", False, True),
        ("Q?\n### 12", "2", False, False),
    ],
)
def test_coconut(output: str, gold: str, strict: bool, reference: bool) -> None:
    assert score_coconut(output, gold) is strict
    assert score_coconut(output, gold, "reference") is reference


def test_marker_of_coconut() -> None:
    assert extract_coconut("so. Therefore, the answer is D R  R", marker="Therefore, the answer is") == "D R R"
    assert extract_coconut("D R", marker="Therefore, the answer is") is None
    assert extract_coconut("### a,b 1,000,000 1,5") == "a,b 1000000 1,5"
    assert extract_coconut("### a,b", "reference") == "ab"


def test_cot_match() -> None:
    steps = ["<<1+1=2>>", "<<2+2=4>>"]
    assert cot_matches("Q?\n<<1+1=2>>\n<<2+2=4>>\n### 4", steps)
    assert not cot_matches("Q?\n<<1+1=2>>\n### 4", steps)
    assert not cot_matches("Q?\n### 4", steps)
    assert cot_matches("Q?\n### 4", [])
    assert not cot_matches("no line break", steps)


def test_wrong_options_are_refused() -> None:
    for score, gold in ((score_m3cot, "A"), (score_scienceqa, 0), (score_coconut, "x")):
        with pytest.raises(ValueError, match="unknown scorer mode 'loose'; choose 'strict' or 'reference'"):
            score("x", gold, "loose")
    with pytest.raises(ValueError, match="label 'D' is not one of the option letters 'ABC'"):
        score_m3cot("the answer is D", "D", choices=CHOICES)
    with pytest.raises(ValueError, match="gold is 3 with 3 choices"):
        score_scienceqa("3", 3, choices=CHOICES)
