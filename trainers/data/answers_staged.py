"""Answers of M3CoT, ScienceQA and the text-only sets of Coconut: taking them out of an output, and scoring them.

Papers: "Reasoning in the Dark: Interleaved Vision-Text Reasoning in Latent Space", arXiv 2510.12603 (IVT-LR; card 7),
and "Training Large Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769 (Coconut; card 11.5).

Two modes, as in `answers.py`:

* `"strict"` (default): the new text alone; an answer counts only if it is named as a whole and no other is named.
* `"reference"`: the published scorers, for comparison with published numbers. That of M3CoT reads the whole output,
  prompt included: the first letter behind the prompt's `Answer:` counts as an answer, so does that of any word behind
  "the answer is", and one hit among several is enough. That of ScienceQA prefers digits to letters, and reads 12 as 1
  and "because" as B. That of Coconut takes what follows the last `#`, or all when there is none.
"""

import re
import string
from collections.abc import Sequence

from .answers import STRICT, UNKNOWN, extract_letter, score_letter

REFERENCE = "reference"

_ROLE_WORD = re.compile(r"(answer:)\s*assistant", re.IGNORECASE)
_M3COT = re.compile(r"(?:the\s*answer\s*is|answer:)\s*([a-z])", re.IGNORECASE)
_LEADS = (r"therefore,?\s*the\s*answer\s*is\s+", r"the\s*answer\s*is\s+", r"answer\s*is:?\s*")
_SCIENCEQA = [re.compile(lead + part, re.IGNORECASE) for part in (r"(\d)", r"([a-z])") for lead in _LEADS]
_NUMBER = re.compile(r"answer(?:\s+is)?\s*:?\s*\(?(-?\d+)(?![\w%]|\.\d)", re.IGNORECASE)


def _check_mode(mode: str) -> None:
    if mode not in (STRICT, REFERENCE):
        raise ValueError(f"unknown scorer mode {mode!r}; choose {STRICT!r} or {REFERENCE!r}")


# M3CoT


def m3cot_letters(text: str) -> list[str]:
    """All letters that the published rule finds in a whole output (prompt included), upper-cased, in order."""
    return [letter.upper() for letter in _M3COT.findall(_ROLE_WORD.sub(r"\1", text))]


def score_m3cot(text: str, gold: str, mode: str = STRICT, choices: Sequence[str] | None = None) -> bool:
    """Whether an output names the right option.

    Args:
        text: in strict mode the new text, in reference mode the decoded whole output, prompt included.
        gold: the right letter.
        mode: `"strict"` (see `answers.score_letter`) or `"reference"`.
        choices: texts of the options in order (strict mode); without them the letters are A to D.

    Raises:
        ValueError: in strict mode, when `gold` is not the letter of a choice; for an unknown mode.
    """
    _check_mode(mode)
    if mode == REFERENCE:
        return gold.upper() in m3cot_letters(text)
    return score_letter(text, gold, STRICT, choices)


# ScienceQA


def extract_scienceqa(text: str, mode: str = STRICT, choices: Sequence[str] | None = None) -> int:
    """The index of the option that the new text names, `UNKNOWN` (-1) for none.

    Args:
        text: the new text.
        mode: `"reference"`: a digit, else a letter, each behind "Therefore, the answer is", "the answer is" or "answer
            is". `"strict"`: a whole number behind "answer" or alone, or a letter (see `answers.extract_letter`), below
            the number of choices; none when two different ones are named.
        choices: texts of the options in order (strict mode); without them there are four options. An answer that is
            the text of one of them names it, if there is no digit in it.

    Raises:
        ValueError: for an unknown mode.
    """
    _check_mode(mode)
    if mode == STRICT:
        return _strict_index(text, choices)
    hits = (pattern.search(text) for pattern in _SCIENCEQA)
    hit = next((hit[1] for hit in hits if hit), None)
    if hit is None:
        return UNKNOWN
    return int(hit) if hit.isdigit() else string.ascii_uppercase.index(hit.upper())


def _strict_index(text: str, choices: Sequence[str] | None) -> int:
    letters = string.ascii_uppercase[: len(choices) if choices else 4]
    bare = re.fullmatch(r"\W*?(-?\d+)\W*", text)
    named = {int(number) for number in ([bare[1]] if bare else _NUMBER.findall(text))}
    by_text = choices if choices and not re.search(r"\d", text) else None
    letter = extract_letter(text, STRICT, by_text, letters)
    if letter:
        named.add(letters.index(letter))
    index = named.pop() if len(named) == 1 else UNKNOWN
    return index if 0 <= index < len(letters) else UNKNOWN


def score_scienceqa(text: str, gold: int, mode: str = STRICT, choices: Sequence[str] | None = None) -> bool:
    """Whether the new text names the option with the index `gold`; see [`extract_scienceqa`].

    Raises:
        ValueError: in strict mode, when `gold` is not the index of a choice; for an unknown mode.
    """
    _check_mode(mode)
    number = len(choices) if choices else 4
    if mode == STRICT and gold not in range(number):
        raise ValueError(f"gold is {gold!r} with {number} choices; it must be an index of them: repair the data")
    return extract_scienceqa(text, mode, choices) == gold


# Coconut: GSM8K, ProsQA, ProntoQA


def extract_coconut(text: str, mode: str = STRICT, marker: str = "###") -> str | None:
    """The answer in an output.

    Args:
        text: the output; in reference mode the decoded whole output, question included.
        mode: `"reference"`: what follows the last `#` (all without one), without commas. `"strict"`: the rest of the
            line behind the marker, without commas inside numbers; None unless the marker occurs once.
        marker: what announces the answer in strict mode, e.g. `"Therefore, the answer is"`.

    Raises:
        ValueError: for an unknown mode.
    """
    _check_mode(mode)
    if mode == REFERENCE:
        return text.rsplit("#", 1)[-1].replace(",", "").strip()
    _, *following = text.split(marker)
    if len(following) != 1:
        return None
    return _plain(following[0].strip().split("\n")[0])


def _plain(answer: str) -> str:
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", " ".join(answer.split()))


def score_coconut(text: str, gold: str, mode: str = STRICT, marker: str = "###") -> bool:
    """Whether the answer in an output is exactly `gold`, both written as [`extract_coconut`] does.

    Raises:
        ValueError: for an unknown mode.
    """
    found = extract_coconut(text, mode, marker)
    return found == (_plain(gold) if mode == STRICT else gold.replace(",", "").strip())


def cot_matches(text: str, steps: Sequence[str]) -> bool:
    """The published "CoT match": the text from the first line break to the first `#` is the gold steps, one a line.

    Always false for an output whose steps were latent.

    Args:
        text: the decoded whole output, question included (it ends with the first line break).
        steps: the gold steps.
    """
    return text.partition("\n")[2].split("#", 1)[0].strip() == "\n".join(steps).strip()
