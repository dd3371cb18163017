"""Texts of LaViT: the answer letter of an output, the teacher's final answer, the judge's reply, the data's turns.

Paper: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129 (card 5.2, 7.1, 7.3, 7.4).

Two modes, as in `answers.py`:

* `"strict"` (default): an answer counts only if it names one option and no other; a judge's reply counts only if its
  first word is yes or no, and is no verdict otherwise, so that the caller can ask again.
* `"reference"`: the published rules, for comparison with published numbers. They read "I see a cat" as a, "left" as e
  and "It is not B. It is A" as a; of a judge they take "Yesterday" as yes and "**YES**" as no.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .answers import STRICT, score_letter
from .answers_staged import REFERENCE
from .boxes import checked_option
from .llava_text import IMAGE_PLACEHOLDER

MODES = (STRICT, REFERENCE)
LEARNED_TOKEN = re.compile(r"<lvr\d*>")  # `<lvr1>` .. of the training, `<lvr>` of the published evaluation

_TURN_END = re.compile(r"<\|im_end\|>\n?\Z")
_IN_BRACKETS = re.compile(r"\(([a-h])\)", re.IGNORECASE)
_STATED = [
    re.compile(rule, re.IGNORECASE | re.DOTALL)
    for rule in (
        r"answer\s*:?\s*([a-h])\b",
        r"choice\s*:?\s*([a-h])\b",
        r"conclusion\s*:?\s*([a-h])\b",
        r"final answer\s*:?\s*([a-h])\b",
        r"therefore.*?is\s+([a-h])\b",
        r"the correct answer is\s+([a-h])\b",
        r"([a-h])\s+is the correct answer",
    )
]
_ALONE = re.compile(r"\b([a-h])\b", re.IGNORECASE)
_ANY_LETTER = re.compile(r"[a-h]", re.IGNORECASE)
_SHORT = 10  # characters; only below, any letter of a word counts

_FINAL_ANSWER = re.compile(r"final\s+answer\s*:?\s*", re.IGNORECASE)
_NO_ANSWER_LINES, _RULERS = ("<step", "REASONING"), ("---", "===")

_LEADING_IMAGE = re.compile(rf"\A{re.escape(IMAGE_PLACEHOLDER)}\n?")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

_VERDICTS = {"yes": True, "no": False}


# Answers of an evaluation


def extract_letter_lavit(text: str) -> str | None:
    """The option letter (a to h, lower case) by the published rules, None when no rule applies (card 7.3).

    The first rule that applies decides, by its last match: a letter in brackets; behind "answer" and the like; alone
    between word boundaries, where a lower-case a counts only if no other letter stands alone; in a text of fewer than
    ten characters the first of these letters anywhere.

    Args:
        text: the decoded output, special tokens included or not.
    """
    text = _TURN_END.sub("", text).strip()
    for rule in (_IN_BRACKETS, *_STATED):
        found = rule.findall(text)
        if found:
            return found[-1].lower()
    alone = _ALONE.findall(text)
    if alone:
        return ([letter for letter in alone if letter != "a"] or alone)[-1].lower()
    anywhere = _ANY_LETTER.search(text) if len(text) < _SHORT else None
    return anywhere.group().lower() if anywhere else None


def score_lavit(text: str, gold: str, mode: str = STRICT, choices: Sequence[str] | None = None) -> bool:
    """Whether an output names the option of the ground truth.

    Args:
        text: the decoded output.
        gold: the right option, `"B"` or `"(b)"`; in reference mode any text in which the published rules find one.
        mode: `"strict"` (see `answers.score_letter`) or `"reference"` (see [`extract_letter_lavit`]).
        choices: texts of the options in order (strict mode); without them the letters are A to D.

    Raises:
        ValueError: in strict mode, when `gold` is not the letter of a choice; for an unknown mode.
    """
    checked_option("scorer mode", mode, MODES)
    if mode == REFERENCE:
        letter = extract_letter_lavit(gold)
        return letter is not None and extract_letter_lavit(text) == letter
    return score_letter(LEARNED_TOKEN.sub("", text), gold, STRICT, choices)


def accuracy_lavit(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The published summary of `(output, ground truth)` pairs, scored by the published rules.

    Returns:
        `total`, `correct`, `wrong` (all others), `accuracy` in percent (0 without pairs), and `failed_extraction`: the
        outputs without a letter, which are among the wrong ones.
    """
    total = correct = failed = 0
    for text, gold in pairs:
        total += 1
        correct += score_lavit(text, gold, REFERENCE)
        failed += extract_letter_lavit(text) is None
    accuracy = 100.0 * correct / total if total else 0.0
    counts = {"total": total, "correct": correct, "wrong": total - correct}
    return {**counts, "accuracy": accuracy, "failed_extraction": failed}


def count_learned_tokens(text: str) -> int:
    """How often a learned token (`<lvr>`, `<lvr1>`, `<lvr2>`, ...) stands in a decoded output (card 7.1)."""
    return len(LEARNED_TOKEN.findall(text))


# Answers of a teacher, and what a judge says of them


def extract_final_answer(text: str) -> str | None:
    """The final answer of a teacher's reply, None when there is none and the whole reply is to be judged (card 7.4).

    It is what follows the first "final answer", up to the first ruler (`---` or `===`, which stays), without steps,
    and without brackets and quotation marks at its ends. Where that is empty or missing, it is the last line that is
    no step and does not mention "final".
    """
    marker = _FINAL_ANSWER.search(text)
    if marker:
        kept = []
        for line in _answer_lines(text[marker.end() :]):
            kept.append(line)
            if line.startswith(_RULERS):
                break
        answer = " ".join(kept).removeprefix("[").removesuffix("]").removeprefix('"').removesuffix('"').strip()
        if answer:
            return answer
    return next((line for line in reversed(_answer_lines(text)) if "final" not in line.lower()), None)


def _answer_lines(text: str) -> list[str]:
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith(_NO_ANSWER_LINES)]


def judge_verdict(reply: str | None, mode: str = STRICT) -> bool | None:
    """Whether a judge accepts an answer.

    Args:
        reply: what it said to a question of yes or no; None when it could not be asked.
        mode: `"strict"`: the first word, whatever marks stand around it, is yes or no, and not one of two that are
            named ("yes or no"); None for no verdict: ask again. `"reference"`: yes if the reply begins with "yes" in
            any case; all else, a judge that could not be asked too, is no.

    Raises:
        ValueError: for an unknown mode.
    """
    checked_option("judge mode", mode, MODES)
    if mode == REFERENCE:
        return reply is not None and reply.strip().upper().startswith("YES")
    words = re.findall(r"[^\W_]+", (reply or "").lower())
    undecided = len(words) > 2 and words[1] in ("or", "and") and words[2] in _VERDICTS
    return None if not words or undecided else _VERDICTS.get(words[0])


# Turns of the data


def parse_question(text: str) -> str:
    """The question of the first turn: without one leading `<image>` (and one newline behind it), stripped."""
    return _LEADING_IMAGE.sub("", text.strip()).strip()


def parse_answer(text: str) -> str:
    """The answer of the second turn: inside the first `<answer>...</answer>` (lower case), else all; stripped."""
    tagged = _ANSWER.search(text)
    return (tagged.group(1) if tagged else text).strip()
