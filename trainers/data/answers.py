"""Short answers: taking them out of a response, and scoring them.

Two modes everywhere:

* `"strict"` (default): an answer counts only if the response names one option (or one polarity) and no other.
* `"laser"`: the scorers of "Forest Before Trees: Latent Superposition for Efficient Visual Reasoning"
  (arXiv 2601.06803) as published, for comparison with published numbers. They read the article "a" as option A, the
  first letter of any word as an option, "incorrect" as yes and "unknown" as no.

Nothing found is `""` (letters) or `UNKNOWN` (yes/no) in both modes, so that a caller can count extraction failures.
"""

import re
import string
from collections.abc import Sequence
from fractions import Fraction

STRICT, LASER = "strict", "laser"
UNKNOWN = -1

_OPEN, _CLOSE = "<answer>", "</answer"
_LAST_WORDS = 10
_SPECIAL_TOKEN = re.compile(r"<\|[^<>|]*\|>")
_LATENT_REGION = re.compile(r"<\|[^<>|]*_start\|>.*?(?:<\|[^<>|]*_end\|>|$)", re.DOTALL)

# laser: substrings, looked up in this order
_YES_PARTS, _NO_PARTS = ("yes", "1", "true", "correct"), ("no", "0", "false", "incorrect")
# strict: whole words
_YES_WORDS, _NO_WORDS = (
    frozenset({"yes", "true", "correct", "right"}),
    frozenset({"no", "false", "incorrect", "wrong"}),
)


def _check_mode(mode: str) -> None:
    if mode not in (STRICT, LASER):
        raise ValueError(f"unknown scorer mode {mode!r}; choose {STRICT!r} or {LASER!r}")


def extract_answer(text: str, require_closed: bool = False) -> str | None:
    """The text inside the last `<answer>...</answer>` (tags in any case), stripped; None when there is no tag.

    Args:
        text: the whole response, special tokens included or not.
        require_closed: give None for a tag that the response never closes; else such an answer ends with the response
            or with the next special token (`<|im_end|>`).
    """
    openings = list(re.finditer(re.escape(_OPEN), text, re.IGNORECASE))
    if not openings:
        return None
    answer = text[openings[-1].end() :]
    closing = re.search(re.escape(_CLOSE), answer, re.IGNORECASE)
    if closing is None and require_closed:
        return None
    return _SPECIAL_TOKEN.split(answer[: closing.start()] if closing else answer)[0].strip()


def extract_answer_laser(text: str) -> str:
    """The published rule: what follows the last `<answer>`, cut at `</answer`; the whole text without a tag."""
    return text.rsplit(_OPEN, 1)[-1].split(_CLOSE, 1)[0].strip()


def _answer_or_text(text: str) -> str:
    """The tagged answer, else the response without its latent regions and special tokens."""
    answer = extract_answer(text)
    return answer if answer is not None else _SPECIAL_TOKEN.sub(" ", _LATENT_REGION.sub(" ", text)).strip()


# Letters


def extract_letter(
    response: str, mode: str = STRICT, choices: Sequence[str] | None = None, letters: str | None = None
) -> str:
    """The option letter that a response names, upper-cased, or `""`.

    Args:
        response: the whole response.
        mode: `"strict"` or `"laser"` (card section 7: over the last ten words from the end the first letter A to D
            that touches no other letter, else the first alphanumeric character).
        choices: texts of the options in order; in strict mode an answer that is exactly one of them names its letter.
        letters: the letters that may be named (strict mode); one for each of `choices`, else `"ABCD"`.

    Raises:
        ValueError: for an unknown mode, or fewer letters than choices.
    """
    _check_mode(mode)
    if mode == LASER:
        answer = extract_answer_laser(response)
        return _standalone_letter(answer) or _first_alphanumeric(answer)
    return _strict_letter(_answer_or_text(response), choices or (), _option_letters(choices, letters))


def _standalone_letter(answer: str) -> str:
    for word in reversed(answer.split()[-_LAST_WORDS:]):
        found = re.search(r"(?<![A-Za-z])[A-Da-d](?![A-Za-z])", word)
        if found:
            return found.group().upper()
    return ""


def _first_alphanumeric(answer: str) -> str:
    found = re.search(r"[A-Za-z0-9]", answer)
    return found.group().upper() if found else ""


def _option_letters(choices: Sequence[str] | None, letters: str | None) -> str:
    letters = letters or string.ascii_uppercase[: len(choices) if choices else 4]
    if choices and len(choices) > len(letters):
        raise ValueError(f"{len(choices)} choices but only the letters {letters!r}; pass a letter for each choice")
    return letters


def _strict_letter(answer: str, choices: Sequence[str], letters: str) -> str:
    """The one option that an answer names: by its text, a bare letter, a statement, a label or a mention."""
    same = [letters[i] for i, choice in enumerate(choices) if _plain(choice) == _plain(answer) != ""]
    if len(same) == 1:
        return same[0]
    upper, either = f"[{letters}]", f"[{letters}{letters.lower()}]"
    bare = re.fullmatch(rf"\W*({either})\W*", answer)
    if bare:
        return bare.group(1).upper()
    # "the answer is (B) ...", "answer: d"; a lower-case letter only in brackets or at the end
    said = re.findall(rf"(?i:answer)(?:\W+(?i:is|option))*\W+({upper}(?![\w'’]|\s+[a-z])|{either}(?=\)|\W*$))", answer)
    if said:
        return _the_one(said)
    # "B. a cat", "(b) a cat": the option's text may mention other letters ("C. vitamin D"), but no other label
    label = re.match(rf"\W*({either})(?:[)\]]|[.:]\s)", answer)
    if label:
        rest = answer[label.end() :]
        other = re.search(rf"(?<![\w'’])(?:{either}[)\]]|{upper}[.:]\s)", rest) or re.fullmatch(
            rf"\W*{either}\W*", rest
        )
        return "" if other else label.group(1).upper()
    return _the_one(_mentioned_letters(answer, upper, either))


def _the_one(letters: Sequence[str]) -> str:
    distinct = {letter.upper() for letter in letters}
    return distinct.pop() if len(distinct) == 1 else ""


def _mentioned_letters(answer: str, upper: str, either: str) -> list[str]:
    """Letters alone in upper case or in brackets, unless "not" stands before (the A of "A dog" is an article)."""
    alone = r"(?<!\bnot )(?<![\w'’])"
    mentioned = re.findall(rf"(?i:option)\W+({upper}(?!\w)|{either}(?=\W*$))|{alone}({either})(?=[)\]])", answer)
    found = [letter for pair in mentioned for letter in pair if letter]
    for match in re.finditer(rf"{alone}({upper})(?![\w'’])", answer):
        article = match.group(1) == "A" and re.match(r"\s+(?!(?:or|and|but|nor)\b)[a-z]", answer[match.end() :])
        if not article:
            found.append(match.group(1))
    return found


def _plain(text: str) -> str:
    """Lower-cased words without punctuation at their ends."""
    return " ".join(word.strip(string.punctuation) for word in text.lower().split()).strip()


def _label_letter(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "", label).upper()


def _strict_label_letter(label: str, letters: str) -> str:
    letter = _label_letter(label)
    if len(letter) != 1 or letter not in letters:
        raise ValueError(
            f"label {label!r} is not one of the option letters {letters!r}; pass letters= or repair the data"
        )
    return letter


def score_letter(
    response: str,
    label: str,
    mode: str = STRICT,
    choices: Sequence[str] | None = None,
    letters: str | None = None,
) -> bool:
    """Whether the response names the option of the label (`"A"`, `"(a)"`, `" A. "`).

    Raises:
        ValueError: in strict mode, when the label is not one of `letters`; for an unknown mode.
    """
    _check_mode(mode)
    if mode == LASER:
        return extract_letter(response, LASER) == _label_letter(label)
    letters = _option_letters(choices, letters)
    return extract_letter(response, mode, choices, letters) == _strict_label_letter(label, letters)


# MMVP: options (a) and (b) inside the question


def extract_mmvp(response: str, question: str, mode: str = STRICT) -> str:
    """The option letter of an MMVP answer, where yes and no are mapped by the options in the question.

    Args:
        response: the whole response.
        question: the question with its options, e.g. `"Is the door open? (a) Yes (b) No"`.
        mode: see `extract_letter`.

    Raises:
        ValueError: for an unknown mode.
    """
    _check_mode(mode)
    if mode == LASER:
        answer = extract_answer_laser(response)
        return _standalone_letter(answer) or _mmvp_yes_no(answer, question) or _first_alphanumeric(answer)
    options = dict(re.findall(r"\(([a-zA-Z])\)\s*([^()]+)", question))
    letters = "".join(options).upper() or "AB"
    letter = _strict_letter(_answer_or_text(response), list(options.values()), letters)
    polarity = {_strict_yes_no(text): key.upper() for key, text in options.items()}
    if not letter and {0, 1} <= set(polarity):
        letter = polarity.get(_strict_yes_no(_answer_or_text(response)), "")
    return letter


def _mmvp_yes_no(answer: str, question: str) -> str:
    answer = answer.lower()
    if answer not in ("yes", "no"):
        return ""
    if "(a) Yes" in question or "(a) yes" in question:
        return "A" if answer == "yes" else "B"
    if "(b) Yes" in question or "(b) yes" in question:
        return "B" if answer == "yes" else "A"
    return ""


def score_mmvp(response: str, label: str, question: str, mode: str = STRICT) -> bool:
    """Whether the response names the option of the label (`"(a)"`) of an MMVP question.

    Raises:
        ValueError: in strict mode, when the label is not a letter; for an unknown mode.
    """
    _check_mode(mode)
    label = _label_letter(label) if mode == LASER else _strict_label_letter(label, string.ascii_uppercase)
    return extract_mmvp(response, question, mode) == label


# Yes and no


def extract_yes_no(response: str, mode: str = STRICT) -> int:
    """1 for yes, 0 for no, `UNKNOWN` (-1) when neither (or in strict mode both) is said.

    Args:
        response: the whole response.
        mode: `"strict"` (whole words; "not correct" is no; 1 and 0 only as the whole answer) or `"laser"` (substrings
            of the lower-cased answer: any of yes, 1, true, correct first, then any of no, 0, false, incorrect).

    Raises:
        ValueError: for an unknown mode.
    """
    _check_mode(mode)
    if mode == LASER:
        return _substring_yes_no(extract_answer_laser(response).lower(), _YES_PARTS, _NO_PARTS)
    return _strict_yes_no(_answer_or_text(response))


def _substring_yes_no(answer: str, yes_parts: Sequence[str], no_parts: Sequence[str]) -> int:
    if any(part in answer for part in yes_parts):
        return 1
    return 0 if any(part in answer for part in no_parts) else UNKNOWN


def _strict_yes_no(answer: str) -> int:
    words = [word.strip(string.punctuation) for word in answer.lower().split()]
    if words in (["1"], ["0"]):
        return int(words[0])
    said = set()
    for previous, word in zip(["", *words], words, strict=False):
        if word in _YES_WORDS or word in _NO_WORDS:
            negated = previous == "not" or previous.endswith(("n't", "n’t"))
            said.add(int((word in _YES_WORDS) != negated))
    return said.pop() if len(said) == 1 else UNKNOWN


def score_yes_no(response: str, label: str | int, mode: str = STRICT) -> bool:
    """Whether the response says the label; an unknown answer is wrong.

    Args:
        response: the whole response.
        label: 1, 0, "1", "0", "yes" or "no" (any case; strict mode also true/false). In laser mode digits are read as
            a number and any other label but "yes" is no.
        mode: see `extract_yes_no`.

    Raises:
        ValueError: in strict mode, for a label that is none of these; for an unknown mode.
    """
    _check_mode(mode)
    text = str(label).strip().lower()
    if mode == LASER:
        return extract_yes_no(response, LASER) == (int(text) if text.isdigit() else int(text == "yes"))
    if text not in ("1", "0", "yes", "no", "true", "false"):
        raise ValueError(
            f"label {label!r} is neither yes nor no; use 1, 0, yes, no, true or false, or repair the data"
        )
    return extract_yes_no(response, mode) == _strict_yes_no(text)


# The relaxed scorers of the reference (VSR, CUB): an unknown answer equals an unknown label.


def score_yes_no_relaxed(response: str, label: str) -> bool:
    """The published relaxed yes/no scorer: `"laser"` with right and wrong added, the label read by the same lists."""
    return _relaxed_yes_no(extract_answer_laser(response)) == _relaxed_yes_no(label)


def _relaxed_yes_no(text: str) -> int:
    text = text.lower().strip(string.punctuation + string.whitespace)
    return _substring_yes_no(text, (*_YES_PARTS, "right"), (*_NO_PARTS, "wrong"))


def score_choice_relaxed(response: str, label: str) -> bool:
    """The published relaxed choice scorer: `"laser"` letters, but the fallback character counts only from A to D."""
    return _relaxed_choice(extract_answer_laser(response)) == _relaxed_choice(label)


def _relaxed_choice(text: str) -> str:
    fallback = _first_alphanumeric(text)
    return _standalone_letter(text) or (fallback if fallback in "ABCD" else "")


# Short texts


def answer_words(text: str) -> list[str]:
    """The words of a short answer without case, punctuation at their ends, and articles."""
    words = [word.strip(string.punctuation) for word in text.casefold().split()]
    return [word for word in words if word and word not in ("a", "an", "the")]


def answer_number(text: str) -> Fraction | None:
    """The number that a short answer is (`"7"`, `"-1,200.50"`, `"3."`), None when it is anything else."""
    text = text.strip().rstrip(".").replace(",", "")
    return Fraction(text) if re.fullmatch(r"[+-]?\d+(\.\d+)?", text) else None


# The published scorer of LVR ("Latent Visual Reasoning", arXiv 2509.24251; card section 7)

LETTER_INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."


def extract_letter_lvr(text: str) -> str:
    """The published rule of LVR: the first character of [`extract_answer_laser`]'s answer, `""` when it is empty."""
    return extract_answer_laser(text)[:1]


def score_letter_lvr(response: str, label: str) -> bool:
    """Whether that character is the label, case and blanks included: "(C)" and "the answer is C" are wrong."""
    return extract_letter_lvr(response) == label
