"""Texts of LaViT: the published letter rules and the strict form, final answers, verdicts of a judge, turns."""

import pytest

from trainers.data.answers_lavit import (
    accuracy_lavit,
    count_learned_tokens,
    extract_final_answer,
    extract_letter_lavit,
    judge_verdict,
    parse_answer,
    parse_question,
    score_lavit,
)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # brackets come before all other rules, and the last of them counts
        ("(c) no, (E). Answer: B", "e"),
        ("( c ) F", "f"),
        ("(i) (3)", None),
        # each statement before those behind it, whatever comes last in the text
        ("answer\n:\n g. Choice: B", "g"),
        ("my choice: d, in conclusion e", "d"),
        ("Conclusion h. I stand by C", "h"),
        ("Therefore it is not C, it is F now", "f"),
        ("therefore he is c and therefore she is d", "d"),
        ("G is the correct answer, B is not", "g"),
        ("Answer: Bee", None),
        # alone
        ("It is not B. It is A", "a"),
        ("a guess: the D one", "d"),
        ("I took a look and a picture", "a"),
        ("A look", "a"),
        # anywhere, below ten characters only
        ("no hue", "h"),
        ("noun head", "h"),
        ("noun heads", None),
        ("", None),
        # the end of the turn
        ("B<|im_end|>\n", "b"),
        ("  teal <|im_end|>", "e"),
        ("I <|im_end|>", None),
    ],
)
def test_published_letter_rules(text: str, letter: str | None) -> None:
    assert extract_letter_lavit(text) == letter


@pytest.mark.parametrize(
    ("text", "gold", "strict", "reference"),
    [
        ("<lvr1><lvr2><lvr3><lvr4> (B)<|im_end|>", "(b)", True, True),
        ("<lvr1><lvr2> B<|im_end|>", "B", True, True),
        ("A or B", "B", False, True),
        ("I see a cat", "A", False, True),
        ("left", "D", False, False),
        ("bed", "B", False, True),
        ("", "A", False, False),
    ],
)
def test_scores(text: str, gold: str, strict: bool, reference: bool) -> None:
    assert score_lavit(text, gold) is strict
    assert score_lavit(text, gold, "reference") is reference


def test_an_option_may_be_named_by_its_text_in_strict_mode() -> None:
    assert score_lavit("<lvr1> teal", "B", choices=["red", "teal"])
    with pytest.raises(ValueError, match="not one of the option letters"):
        score_lavit("E", "teal kite")
    assert not score_lavit("A", "I say no to it", "reference")  # no letter in the ground truth: always wrong
    with pytest.raises(ValueError, match="scorer mode 'laser'"):
        score_lavit("A", "A", "laser")


def test_accuracy_counts_failures_among_the_wrong() -> None:
    pairs = [("(A)", "A"), ("B", "A"), ("nothing at all", "A"), ("", "unknown to us")]
    assert accuracy_lavit(pairs) == {
        "total": 4,
        "correct": 1,
        "wrong": 3,
        "accuracy": 25.0,
        "failed_extraction": 2,
    }
    assert accuracy_lavit([])["accuracy"] == 0.0


def test_learned_tokens_are_counted() -> None:
    assert count_learned_tokens("<lvr><lvr1> <lvr25>") == 3
    assert count_learned_tokens("<|lvr|> <lvr x> <LVR1> lvr1") == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<step>x</step>\nFinal Answer :\n\n [ 'two' ]", "'two'"),
        ("FINAL ANSWER: one\n<step>no</step>\nREASONING\ntwo\n=== end\nthree", "one two === end"),
        ('final\tanswer "a" and "b"', 'a" and "b'),
        ("I say red.\nFINAL ANSWER:\n<step>no</step>\n\n", "I say red."),
        ("FINAL ANSWER: []\nlast", "] last"),
        ("FINAL ANSWER: []", None),
        ("one\nthe finals\n<step>s</step>\n", "one"),
        ("reasoning\n", "reasoning"),
        ("FINAL only", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert extract_final_answer(text) == answer


@pytest.mark.parametrize(
    ("reply", "strict", "reference"),
    [
        ("YES", True, True),
        (" yes, the same thing", True, True),
        ("No, yes is wrong", False, False),
        ("**YES**", True, False),
        ("`no`", False, False),
        ("Yesterday", None, True),
        ("Yes or no? Hard to say", None, True),
        ("Maybe YES", None, False),
        ("yes and right", True, True),
        ("", None, False),
        (None, None, False),
    ],
)
def test_judge(reply: str | None, strict: bool | None, reference: bool) -> None:
    assert judge_verdict(reply) is strict
    assert judge_verdict(reply, "reference") is reference


def test_an_unknown_judge_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="judge mode 'lax'"):
        judge_verdict("yes", "lax")


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("\n<image>\nWhy?\n", "Why?"),
        ("<image> Why?", "Why?"),
        ("Why <image>?", "Why <image>?"),
        ("<image><image>\nWhy?", "<image>\nWhy?"),
    ],
)
def test_question(text: str, question: str) -> None:
    assert parse_question(text) == question


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<lvr>\n<answer>\nred\ngreen </answer> <answer>blue</answer>", "red\ngreen"),
        (" <Answer>red</Answer>", "<Answer>red</Answer>"),
        ("<answer></answer>", ""),
    ],
)
def test_answer(text: str, answer: str) -> None:
    assert parse_answer(text) == answer
