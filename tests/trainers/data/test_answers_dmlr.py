r"""Answers of DMLR: where the strict rules differ from the published ones on purpose, and what both leave alone.

The published rules themselves: tests/golden/dmlr_verify.py.
"""

import pytest

from trainers.data.answers_dmlr import extract_dmlr, parse_score, score_dmlr, stop_reason, verifier_truth

# Extraction ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "strict", "published"),
    [
        ("<answer>A</answer> no: <answer>B</answer>", "B", "A"),
        (r"<answer>so \boxed{B}</answer>", "B", r"so \boxed{B}"),
        ("<think>t</think><answer>B", "B", "<think>t</think><answer>B"),  # cut off by the limit
        (r"\boxed{A} then \boxed{\boxed{3} }", "3", "3"),
        (r"\boxed{1 \boxed{2} 3}", "2", "2"),
        (r"\boxed{x} \boxed{ }", "x", "x"),
        (r"\boxed{\text{A} and \text{B}}", "A and B", r"A} and \text{B"),
        (r"$\boxed{\mathbf{\text{ Yes }}}$", "Yes", r"\mathbf{\text{ Yes }}"),
        (r"\boxed{\left(\dfrac{1}{2},\,-3\right)}", r"(\frac{1}{2}, -3)", r"\left(\dfrac{1}{2},\,-3\right)"),
        (r"\boxed{145^{\circ}}", "145°", r"145^{\circ}"),
        (
            "So **the answer is: 42**, since 6 times 7 is that.",
            "42",
            "So **the answer is: 42**, since 6 times 7 is that.",
        ),
        ("The answer is 3, or 4", "3, or 4", "The answer is 3, or 4"),
        ("answer: 1\nanswer: 2\nDone", "2", "answer: 1\nanswer: 2\nDone"),
        (r"\boxed{\frac{16} unfinished", r"\boxed{\frac{16} unfinished", r"\boxed{\frac{16} unfinished"),
        ("İ<answer>Q</answer>", "Q", "<"),
        ("", "", ""),
    ],
)
def test_the_marked_answer(text: str, strict: str, published: str) -> None:
    assert extract_dmlr(text) == strict
    assert extract_dmlr(text, "reference") == published


# Rule judge ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["B", "b.", "(B)", "B. carp", "B: carp", "(b) carp", r"\boxed{B. carp}", "B) carp"])
@pytest.mark.parametrize(
    ("output", "correct"),
    [
        (r"\boxed{B}", True),
        (r"\boxed{(b)}", True),
        (r"\boxed{\text{Option } B}", True),
        ("<answer>B. carp</answer>", True),
        ("It has barbels, so the answer is (B).", True),
        ("(b) carp I think", True),
        ("B: carp", True),
        (r"\boxed{C}", False),
        (r"\boxed{C. carp}", False),
        ("Both B and C", False),
        ("Big fish", False),
        ("", False),
    ],
)
def test_options(output: str, label: str, correct: bool) -> None:
    assert score_dmlr(output, label) is correct


@pytest.mark.parametrize(
    ("output", "label", "correct"),
    [
        (r"\boxed{carp}", "B. carp", True),
        (r"\boxed{the carp}", "(b) Carp", True),
        (r"\boxed{carp}", "B", False),  # nothing says that B is the carp
        (r"\boxed{vitamin D}", "C. vitamin D", True),
        (r"\boxed{D}", "C. vitamin D", False),
        (r"\boxed{12.0}", "A. 12", True),
        (r"\boxed{-12}", "A. 12", False),
        (r"\boxed{C}", "B. C", False),
        (r"\boxed{h}", "H. eight", True),
        ("I see a cat", "A", False),
        ("A carp", "A", False),
    ],
)
def test_texts_of_options(output: str, label: str, correct: bool) -> None:
    assert score_dmlr(output, label) is correct


@pytest.mark.parametrize(
    ("output", "label", "correct"),
    [
        (r"\boxed{Yes}", r"\boxed{Yes}", True),
        ("The final result is \\boxed{No}", r"\boxed{No}", True),
        (r"\boxed{No}", r"\boxed{Yes}", False),
        ("No, it is not.", "no", True),
        ("No idea", "no", False),
        ("Yes and no", "yes", False),
        ("North", "No", False),
    ],
)
def test_yes_and_no(output: str, label: str, correct: bool) -> None:
    assert score_dmlr(output, label) is correct


@pytest.mark.parametrize(
    ("output", "label", "correct"),
    [
        (r"\boxed{12}", "12.0", True),
        (r"\boxed{112}", "12", False),
        (r"\boxed{12}", "2", False),
        (r"\boxed{-3}", "3", False),
        (r"\boxed{−3}", "-3", True),
        (r"\boxed{1,200}", 1200, True),
        (r"\boxed{\dfrac{1}{2}}", "0.5", True),
        (r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", True),
        ("1/0", "1/0", True),  # no number: the same text
        (r"\boxed{145^\circ}", "145", True),
        (r"\boxed{12 \text{ cm}}", "12", True),
        (r"\boxed{$5}", "5", True),
        (r"\boxed{3 \text{ million}}", "3", False),
        (r"\boxed{7 or more}", "7", False),
        (r"\boxed{12x}", "12", False),
        ("The answer is 42.", "42", True),
        ("Of the 42 fish 40 are carps", "42", False),
    ],
)
def test_numbers(output: str, label: str | int, correct: bool) -> None:
    assert score_dmlr(output, label) is correct


@pytest.mark.parametrize(
    ("output", "label", "correct"),
    [
        (r"\boxed{The Blue Kite.}", "blue kite", True),
        (r"\boxed{kite}", "blue kite", False),
        (r"\boxed{B. blue kite}", "blue kite", True),
        (r"\boxed{x^2 - 1}", r"\boxed{x^2-1}", True),
        (r"\boxed{x^2 + 1}", "x^2-1", False),
        (r"\boxed{3\sqrt{2}}", r"$3\sqrt{2}$", True),
        (r"\boxed{(2, 3)}", "(2,3)", True),
        (r"\boxed{[1, 2)}", "(1, 2]", False),
        ("...", "!", False),  # no words at all
        ("x", None, False),
        ("", "", False),
        (r"\boxed{}", r"\boxed{}", False),
    ],
)
def test_other_texts_and_missing_labels(output: str, label: str | None, correct: bool) -> None:
    assert score_dmlr(output, label) is correct


# Truths, stops, modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solution", "text", "strict", "published"),
    [
        ("B. carp", None, "B. carp", "B. carp"),
        ("B. carp", "", "B. carp", "B. carp"),
        ("(b) Closed", "Closed", "B:Closed", "B:Closed"),
        (r"\boxed{No}", "No", r"\boxed{No}", "B:No"),
        ("12", "twelve", "12", "12"),
        (None, None, "", ""),
    ],
)
def test_truth_of_the_verifier(solution: str | None, text: str | None, strict: str, published: str) -> None:
    assert verifier_truth(solution, text) == strict
    assert verifier_truth(solution, text, "reference") == published


@pytest.mark.parametrize(
    ("ids", "limit", "reason"),
    [
        ([5, 6, 7], 3, "length"),
        ([5, 6, 2], 3, "eos_token"),
        ([5, 3], 9, "eos_token"),  # a further id that ends an output
        ([5, 2, 0, 0], 4, "eos_token"),  # a row that ended before the others of its batch
        ([5, 0, 0], 9, "pad_token"),
        ([5, 6, 0], 3, "length"),
        ([0, 0], 9, "pad_token"),
        ([5], 9, "other"),
        ([], 9, "other"),
    ],
)
def test_why_decoding_ended(ids: list[int], limit: int, reason: str) -> None:
    assert stop_reason(ids, limit, (2, 3), 0) == reason


def test_padding_that_is_the_end_token_ends_an_output() -> None:
    assert stop_reason([5, 2, 2], 3, 2, 2) == "eos_token"
    assert stop_reason([5, 6], 9, None) == "other"


def test_the_prompt_is_subtracted_only_by_the_reference() -> None:
    assert stop_reason([5, 6, 7], 3, 2, 0, input_length=10) == "length"
    assert stop_reason([5, 6, 7], 3, 2, 0, input_length=10, mode="reference") == "other"


def test_the_last_score_counts() -> None:
    assert parse_score("Score: 0.1\nTHE SCORE IS: 0.8") == 0.8
    assert parse_score("no number") == 0.0


@pytest.mark.parametrize(
    "call", [extract_dmlr, lambda t, m: score_dmlr(t, t, m), lambda t, m: verifier_truth(t, t, m)]
)
def test_unknown_modes(call) -> None:
    with pytest.raises(ValueError, match="unknown scorer mode 'laser'"):
        call("x", "laser")
    with pytest.raises(ValueError, match="unknown stop mode 'laser'"):
        stop_reason([1], 1, 2, mode="laser")
