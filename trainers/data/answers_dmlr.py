r"""Answers of DMLR: extraction, the rule judge, scores a model gives itself, the verifier's truth, why decoding ended.

Paper: "Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623 (card 4.6, 6.3,
7.1 and 7.4).

Two modes, as in `answers.py`:

* `"strict"` (default): an answer is the last tagged, boxed or stated one, and is compared by what the label is: an
  option (`B`, `B. carp`, `B: carp`, `(b) carp`) by its letter or its text, yes or no by polarity, a number by its
  value, anything else by its words (formulas by their characters). No ground truth is never right.
* `"reference"`: the published rules, for comparison with published numbers. A label that occurs anywhere in the answer
  is right, so that `\boxed{112}` is 12 and any text with a capital A is A, while a boxed letter is wrong for
  `B. carp` and `\boxed{Yes}` is wrong for the label `\boxed{Yes}`.
"""

import re
import string
from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from typing import Any

from .answers import STRICT, answer_number, answer_words, extract_answer, extract_letter, extract_yes_no
from .answers_staged import REFERENCE
from .boxes import checked_option

MODES = (STRICT, REFERENCE)
STOP_REASONS = ("length", "eos_token", "pad_token", "other")

_OPEN, _CLOSE = "<answer>", "</answer>"
_BOX = re.compile(r"\\boxed\s*\{")
_DISPLAY = re.compile(r"\\displaystyle\s*")

_STYLED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_REWRITTEN = (
    (re.compile(r"\\boxed\s*\{\s*\}|\\[()\[\]]|\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!|\*\*|\$"), ""),
    (re.compile(r"\\[,;: ]|~"), " "),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))"), "°"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"[−–](?=\s*[\d.\\])"), "-"),
)
_STATED = re.compile(r"\b(?:answer|result|value)\s*(?:is|are|:|=)\s*[:*]*\s*(\S.*)", re.IGNORECASE)
_CLAUSE_END = re.compile(r"[,;.]\s+(?=[A-Za-z])(?!(?:or|and)\b)", re.IGNORECASE)
_OPTION = re.compile(r"(?:\(([a-jA-J])\)|([a-jA-J])(?=[).:]?\s*\Z|[).:]\s)[).:]?)\s*(.*)", re.DOTALL)
_FEWEST_OPTIONS = 5  # A to E are read as options of any question, further letters only up to that of the label
_YES_NO = ("yes", "no", "true", "false")
_NO_ANSWER = re.compile(r"\bno\s+(?:idea|clue|answer|information|way\s+to)\b", re.IGNORECASE)
_FRACTION = re.compile(r"([+-]?)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d+)\s*/\s*(\d+))")
_MEASURED = re.compile(
    r"(?:[$€£]\s*)?([+-]?\d[\d,]*(?:\.\d+)?)(?:\s*(?:°\s*[CF]?|%|(?:[cmk]?m|[mk]?g|m?s|h|min|m?[lL]|in|ft)(?:[²³]|\^[23])?)"
    r"|(?:\s+(?!(?:or|and|to|more|less|than|not|dozen|hundred|thousand|million|billion|trillion)\b)[a-zA-Z]{2,}){0,2})"
)
_FORMULA = re.compile(r"[-+*/=^<>|\\_{}]|[\[(][^\])]*\d")

_SCORE = re.compile(
    r"(?:THE SCORE IS:?|THE SCORES ARE:?|\*\*Score:?\*\*|\*Score:?\*|Score:?)\s*(\d+(?:\.\d+)?)", re.IGNORECASE
)


# Extraction


def extract_dmlr(text: str, mode: str = STRICT) -> str:
    r"""The answer in an output; where none is marked, the whole output.

    Args:
        text: the decoded output.
        mode: `"reference"`: what stands between the first `<answer>` and the first `</answer>` (any case), else the
            last `\boxed{...}` that is not empty, inner boxes too, else all (never empty for an output that is not).
            The tags' offsets are those of the lower-cased text: a character whose lower case is longer shifts the
            content. `"strict"`: the last `<answer>`, closed or not, and a box inside of it; else the last outermost
            box; else what is stated behind "the answer is", "answer:" and the like, up to the end of the clause; else
            all. Without dollar signs, asterisks of bold text, empty boxes, `\text{}` and other commands of layout.

    Raises:
        ValueError: for an unknown mode.
    """
    checked_option("scorer mode", mode, MODES)
    return _published_answer(text) if mode == REFERENCE else _marked_answer(text)[0]


def _published_answer(text: str) -> str:
    lowered = text.lower()
    start, end = lowered.find(_OPEN), lowered.find(_CLOSE)
    if 0 <= start < end:
        tagged = _cleaned(text[start + len(_OPEN) : end])
        if tagged:
            return tagged
    for _, _, content in reversed(list(_boxes(text))):
        boxed = _cleaned(content)
        if boxed.startswith(r"\text{") and boxed.endswith("}"):
            boxed = boxed[len(r"\text{") : -1].strip()
        if boxed:
            return boxed
    return text.strip()


def _cleaned(text: str) -> str:
    return " ".join(_DISPLAY.sub("", text.strip().strip("$")).split())


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    r"""Start, end and content of every `\boxed{...}` whose braces are balanced, inner ones behind their outer one."""
    for opening in _BOX.finditer(text):
        depth = 1
        for brace in re.finditer(r"[{}]", text[opening.end() :]):
            depth += 1 if brace.group() == "{" else -1
            if not depth:
                end = opening.end() + brace.start()
                yield opening.start(), end + 1, text[opening.end() : end]
                break


def _last_box(text: str) -> str | None:
    """Content of the last outermost box that is not empty, boxes inside of it opened too; None without one."""
    last, covered = None, 0
    for start, end, content in _boxes(text):
        if start >= covered:
            covered = end
            last = (_last_box(content) or content) if content.strip() else last
    return last


def _marked_answer(text: str) -> tuple[str, str]:
    """The final answer by the strict rules, and the text in which a letter or a polarity is looked for."""
    tagged = extract_answer(text)
    boxed = _last_box(tagged or text)
    if boxed or tagged:
        answer = _plain(boxed or tagged or "")
        return answer, answer
    text = _plain(text, lines=True)
    stated = _STATED.findall(text)
    return _CLAUSE_END.split(stated[-1])[0].strip() if stated else " ".join(text.split()), text


def _plain(text: str, lines: bool = False) -> str:
    """Without commands of layout, on one line unless `lines`."""
    while (simpler := _STYLED.sub(r"\1", text)) != text:
        text = simpler
    for pattern, new in _REWRITTEN:
        text = pattern.sub(new, text)
    return text.strip() if lines else " ".join(text.split())


# Rule judge


def score_dmlr(output: str, label: Any, mode: str = STRICT) -> bool:
    r"""Whether an output gives the answer of the label.

    Args:
        output: the decoded output.
        label: the ground truth as the data files write it: an option (`B`, `B. carp`, `B: carp`, `(b) carp`), a word
            or a number, in `\boxed{}` or not; None is always wrong, and in strict mode so is an empty one.
        mode: `"strict"`: by letter or text of the option, polarity, value or words of [`extract_dmlr`]'s answer (a
            number may have a unit that the label lacks). `"reference"`: the published answer is the label, case
            aside, or contains it.

    Raises:
        ValueError: for an unknown mode.
    """
    checked_option("scorer mode", mode, MODES)
    if label is None:
        return False
    label = str(label).strip()
    if mode == REFERENCE:
        answer = _published_answer(output).strip()
        return answer.upper() == label.upper() or bool(label) and label in answer
    gold = _plain(_last_box(label) or label)
    answer, context = _marked_answer(output)
    return bool(gold and answer) and _is_right(answer, context, gold)


def _is_right(answer: str, context: str, gold: str) -> bool:
    option = _OPTION.fullmatch(gold)
    if option:
        letter, text = (option[1] or option[2]).upper(), option[3]
        if len(text) > 1 and _same(answer, text):
            return True  # before any letter is looked for: "vitamin D" names C, if that is its text
        letters = string.ascii_uppercase[: max(_FEWEST_OPTIONS, string.ascii_uppercase.index(letter) + 1)]
        return extract_letter(context, STRICT, None, letters) == letter
    if gold.lower().strip(".") in _YES_NO:
        return extract_yes_no(_NO_ANSWER.sub("", context)) == extract_yes_no(gold)
    labelled = _OPTION.fullmatch(answer)
    return _same(answer, gold) or labelled is not None and _same(labelled[3], gold)


def _same(answer: str, gold: str) -> bool:
    """Whether a number is the same number, a formula the same formula, a text the same words."""
    wanted = _value(gold)
    if wanted is not None:
        measured = _MEASURED.fullmatch(answer.rstrip("."))
        return wanted == _value(measured[1] if measured else answer)
    if _FORMULA.search(answer) or _FORMULA.search(gold):
        return _compact(answer) == _compact(gold) != ""
    return answer_words(answer) == answer_words(gold) != []


def _value(text: str) -> Fraction | None:
    fraction = _FRACTION.fullmatch(text.strip().rstrip("."))
    if fraction is None:
        return answer_number(text)
    sign, above, below = fraction[1], int(fraction[2] or fraction[4]), int(fraction[3] or fraction[5])
    return (Fraction(above, below) * (-1 if sign == "-" else 1)) if below else None


def _compact(text: str) -> str:
    return "".join(text.casefold().split()).strip(".,;:'\"")


# Scores, truths, stops


def parse_score(text: str) -> float:
    """The score that a model writes for an answer, by the last match of the published pattern; 0.0 without one.

    The pattern is "the score is", "the scores are" or "score" (also in asterisks) in any case, a colon or none,
    blanks, and a decimal without sign. Behind a closing asterisk no colon is read: `*Score*: 0.2` gives 0.0. Nothing
    keeps the score within [0, 1]. (The published option that would use it, `--disable_conf_reward`, always fails.)
    """
    found = _SCORE.findall(text)
    return float(found[-1]) if found else 0.0


def verifier_truth(solution: Any, text: str | None = None, mode: str = STRICT) -> str:
    r"""The ground truth that a verifier is told.

    Args:
        solution: the label of the record.
        text: of the right option, where a result file has one (`ground_truth_text`).
        mode: `"reference"`: with a text, `X:text`, where X is the first letter of the solution, upper-cased (B for
            `\boxed{No}`). `"strict"`: `X:text` only if the solution is an option, else the solution.

    Raises:
        ValueError: for an unknown mode.
    """
    checked_option("scorer mode", mode, MODES)
    solution = "" if solution is None else str(solution)
    if not text:
        return solution
    if mode == REFERENCE:
        letter = next((character for character in solution if character.isalpha()), "")
    else:
        option = _OPTION.fullmatch(_plain(_last_box(solution) or solution))
        letter = (option[1] or option[2]) if option else ""
    return f"{letter.upper()}:{text}" if letter else solution


def stop_reason(
    output_ids: Sequence[int],
    max_new_tokens: int,
    eos: int | Collection[int] | None,
    pad: int | None = None,
    *,
    input_length: int = 0,
    mode: str = STRICT,
) -> str:
    """Why decoding ended: `"eos_token"`, `"length"`, `"pad_token"` or `"other"`.

    Args:
        output_ids: the new ids of one sample, without the prompt.
        max_new_tokens: the limit under which they were decoded.
        eos: id or ids that end an output.
        pad: the id that fills up the rows of a batch.
        input_length: length of the prompt; only the reference mode uses it.
        mode: `"strict"`: `eos_token` if the last id, padding aside, ends an output; else `length` if the limit is
            reached. `"reference"`: `length` comes first, and the prompt's length is subtracted although the ids do not
            hold the prompt, so that an output cut off by the limit is called `other` (card 6.3).

    Raises:
        ValueError: for an unknown mode.
    """
    checked_option("stop mode", mode, MODES)
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    ids = [int(token) for token in output_ids]
    last = ids[-1] if ids else None
    if mode == REFERENCE:
        if len(ids) - input_length >= max_new_tokens:
            return "length"
        return "eos_token" if last in ends else "pad_token" if ids and last == pad else "other"
    unpadded = len(ids)
    while unpadded and ids[unpadded - 1] == pad and pad not in ends:
        unpadded -= 1
    if unpadded and ids[unpadded - 1] in ends:
        return "eos_token"
    if len(ids) >= max_new_tokens:
        return "length"
    return "pad_token" if ids and last == pad else "other"
