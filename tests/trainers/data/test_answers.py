"""Short answers: extraction, and where the strict scorers differ from the published ones on purpose."""

import pytest

from trainers.data.answers import (
    UNKNOWN,
    extract_answer,
    extract_answer_laser,
    extract_letter,
    extract_mmvp,
    extract_yes_no,
    score_letter,
    score_mmvp,
    score_yes_no,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer> Jeans </answer>", "Jeans"),
        ("<answer>a</answer> wait <answer>b</answer>", "b"),
        ("<Answer>C</ANSWER>", "C"),
        ("<answer>B<|im_end|>\n", "B"),
        ("<answer></answer>", ""),
        ("no tag", None),
        ("<|laser_start|>Sky<|laser_end|><answer>two\nlines</answer><|im_end|>", "two\nlines"),
    ],
)
def test_extract_answer(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


def test_an_answer_that_is_never_closed_can_be_refused() -> None:
    assert extract_answer("<answer>B", require_closed=True) is None
    assert extract_answer("<answer>A</answer> <answer>B", require_closed=True) is None
    assert extract_answer("<answer>B</answer>", require_closed=True) == "B"


def test_the_published_extraction_keeps_the_whole_text_without_a_tag() -> None:
    assert extract_answer_laser(" so, C ") == "so, C"
    assert extract_answer_laser("x <answer> D </answer> y") == "D"


@pytest.mark.parametrize(
    ("answer", "strict", "laser"),
    [
        ("D. a red car", "D", "A"),
        ("It is a dog", "", "A"),
        ("Apple", "", "A"),
        ("A or B", "", "B"),
        ("A, B", "", "B"),
        ("B, not a", "B", "A"),
        ("(a) a dog", "A", "A"),
        ("b. cat", "B", "B"),
        ("A) cat or B) dog", "", "B"),
        ("both A and B", "", "B"),
        ("C. vitamin D", "C", "D"),
        ("Option A is wrong, option B is right", "", "B"),
        ("The answer is not A", "", "A"),
        ("**C**", "C", "C"),
        ("Answer: d", "D", "D"),
        ("D'Artagnan", "", "D"),
        ("E", "", "E"),
        ("12", "", "1"),
        ("---", "", ""),
    ],
)
def test_letter_strict_and_published(answer: str, strict: str, laser: str) -> None:
    response = f"<answer>{answer}</answer>"
    assert extract_letter(response) == strict
    assert extract_letter(response, "laser") == laser


def test_letter_reads_text_after_the_region_when_there_is_no_tag() -> None:
    assert extract_letter("<|laser_start|>A cup<|laser_end|>The answer is B<|im_end|>") == "B"
    assert extract_letter("<|laser_start|>A B<|laser_end|><|im_end|>") == ""
    assert extract_letter("<|laser_start|>C and no end") == ""


def test_letter_by_the_text_of_a_choice() -> None:
    choices = ["a dog", "a cat", "None of the above"]
    assert extract_letter("<answer>A cat.</answer>", choices=choices) == "B"
    assert extract_letter("<answer>none of the above</answer>", choices=choices) == "C"
    assert extract_letter("<answer>a cow</answer>", choices=choices) == ""
    assert extract_letter("<answer>D</answer>", choices=choices) == ""
    assert extract_letter("<answer>E</answer>", choices=[*choices, "x", "y"]) == "E"
    with pytest.raises(ValueError, match="3 choices but only the letters 'AB'"):
        extract_letter("<answer>A</answer>", choices=choices, letters="AB")


@pytest.mark.parametrize("label", ["B", "(b)", " b. "])
def test_letter_labels(label: str) -> None:
    assert score_letter("<answer>B</answer>", label)
    assert not score_letter("<answer>A</answer>", label)
    assert not score_letter("<answer></answer>", label)


@pytest.mark.parametrize("label", ["", "AB", "E", "7"])
def test_a_label_that_is_no_option_is_an_error_in_strict_mode(label: str) -> None:
    with pytest.raises(ValueError, match="is not one of the option letters 'ABCD'"):
        score_letter("<answer>A</answer>", label)
    assert score_letter("<answer>A</answer>", label, "laser") is False


@pytest.mark.parametrize(
    ("answer", "strict", "laser"),
    [
        ("Yes, it is", 1, 1),
        ("No, it is not.", 0, 0),
        ("incorrect", 0, 1),
        ("not correct", 0, 1),
        ("It isn't true", 0, 1),
        ("unknown", UNKNOWN, 0),
        ("10", UNKNOWN, 1),
        ("1", 1, 1),
        ("true but no", UNKNOWN, 1),
        ("eyes", UNKNOWN, 1),
        ("maybe", UNKNOWN, UNKNOWN),
    ],
)
def test_yes_no_strict_and_published(answer: str, strict: int, laser: int) -> None:
    response = f"<answer>{answer}</answer>"
    assert extract_yes_no(response) == strict
    assert extract_yes_no(response, "laser") == laser


def test_yes_no_labels() -> None:
    assert score_yes_no("<answer>yes</answer>", 1) and score_yes_no("<answer>yes</answer>", "Yes")
    assert score_yes_no("<answer>no</answer>", 0) and score_yes_no("<answer>no</answer>", "false")
    assert not score_yes_no("<answer>maybe</answer>", "no")
    with pytest.raises(ValueError, match="label '2' is neither yes nor no"):
        score_yes_no("<answer>yes</answer>", "2")


@pytest.mark.parametrize(
    ("answer", "question", "expected"),
    [
        ("Yes.", "Is it open? (a) Yes (b) No", "A"),
        ("No, a closed door", "Is it open? (a) Yes (b) No", "B"),
        ("no", "Is it open? (a) No (b) Yes", "A"),
        ("(a) Yes", "Is it open? (a) No (b) Yes", "A"),
        ("blue", "Which? (a) Red (b) Blue", "B"),
        ("No", "Which? (a) Red (b) Blue", ""),
    ],
)
def test_mmvp_strict(answer: str, question: str, expected: str) -> None:
    assert extract_mmvp(f"<answer>{answer}</answer>", question) == expected
    assert score_mmvp(f"<answer>{answer}</answer>", "(a)", question) is (expected == "A")


@pytest.mark.parametrize("score", [extract_letter, extract_yes_no])
def test_an_unknown_mode_is_refused(score) -> None:
    with pytest.raises(ValueError, match="unknown scorer mode 'loose'; choose 'strict' or 'laser'"):
        score("<answer>A</answer>", "loose")
