"""Reward functions of GRPO, and the system prompts that ask for the form they check.

Paper: "Latent Visual Reasoning" (LVR), arXiv 2509.24251, stage 2 (method card, section 4.6).

A reward function takes `completions` and the columns of the data set by name, each a list with one entry a completion,
and gives a list of numbers. `reward_loading` finds functions by the suffix `_reward`, here or in a file of the user.

The first two are as published. Known faults of theirs: `accuracy_reward` gives math-verify its arguments in the wrong
order and does not see a plain number that touches its tags (`12` and `<answer>12</answer>`, or `1,000` and `1000`,
differ); `format_reward` fails on a newline inside the region or the answer. `verified_accuracy_reward` and
`span_format_reward` are the ones to train with.

Completions must hold their latent tokens as text, and neither EOS nor padding.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import ModuleType
from typing import Any

from .data.answers import extract_answer, score_letter
from .data.llava_text import DEFAULT_SYSTEM_MESSAGE
from .data.maze_planning import score_plan
from .data.mazes import maze_of_record

SYSTEM_PROMPTS: dict[str, str | None] = {
    "default": DEFAULT_SYSTEM_MESSAGE,
    "answer": f"{DEFAULT_SYSTEM_MESSAGE} Give your final answer between <answer> and </answer>.",
    "none": None,
}

_PUBLISHED_FORMAT = re.compile(r"<\|lvr_start\|>.*?<\|lvr_end\|>\s*<answer>.*?</answer>$")
_PUBLISHED_ANSWER = re.compile(r"<answer>(.*?)</answer>")
_SPAN = re.compile(r"<\|(?!vision_)([^<>|]+)_start\|>.*?<\|\1_end\|>", re.DOTALL)
_ONE_ANSWER = re.compile(r"(?:(?!<answer>).)*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")
_RATIO = re.compile(r"([-+]?\d+)\s*/\s*(\d*[1-9]\d*)")


def system_prompt(name: str) -> str | None:
    """A system prompt by its name in `SYSTEM_PROMPTS`, or given itself (a text with a space in it).

    `None`, of the name `"none"`, means no system turn.

    Raises:
        ValueError: an unknown name.
    """
    if name in SYSTEM_PROMPTS:
        return SYSTEM_PROMPTS[name]
    if " " in name.strip():
        return name
    raise ValueError(
        f"unknown system_prompt {name!r}; choose one of {sorted(SYSTEM_PROMPTS)}, or write the prompt out"
    )


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion: a string, or a conversation whose first turn is the model's.

    Raises:
        ValueError: neither of them.
    """
    if isinstance(completion, str):
        return completion
    if completion and isinstance(completion[0], Mapping) and isinstance(completion[0].get("content"), str):
        return completion[0]["content"]
    raise ValueError(f"completion {completion!r} is neither a text nor a list of messages with text content")


# As published


def accuracy_reward(completions: Sequence[Any], assistant: Sequence[Any], **columns: Any) -> list[float]:
    """1 for a right answer, as published: by math-verify on the whole texts, else by equality of the tagged answers.

    Args:
        completions: one a sample, see [`completion_text`].
        assistant: column with the solution, as a message or a text.
        columns: ignored.

    Raises:
        ImportError: math-verify is not installed.
    """
    library = _math_verify()
    texts, golds = [completion_text(c) for c in completions], _solutions(None, assistant)
    return [float(_published_match(library, text, gold)) for text, gold in zip(texts, golds, strict=True)]


accuracy_reward.requires = ("math_verify",)


def _published_match(library: ModuleType, text: str, gold: str) -> bool:
    try:
        if library.verify(library.parse(text), library.parse(gold)):
            return True
    except Exception:  # as published: whatever goes wrong there is a wrong answer
        pass
    return _published_answer(text) == _published_answer(gold)


def _published_answer(text: str) -> str:
    found = _PUBLISHED_ANSWER.search(text)
    return (found.group(1) if found else text).strip()


def format_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 for a text that is, from its first character, one region of LVR and one answer, as published.

    Nothing may stand before the region, only blanks between the two, and no newline inside either.
    """
    return [float(_PUBLISHED_FORMAT.match(completion_text(c)) is not None) for c in completions]


# Recommended


def verified_accuracy_reward(
    completions: Sequence[Any],
    answer: Sequence[str] | None = None,
    assistant: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float]:
    """1 if the content of the last closed `<answer>` equals the solution: as words, as a number or as mathematics.

    Words are compared without regard to case and blanks; plain numbers (`1,000`, `50%`, `1/2`, `1e3`) exactly; what
    holds LaTeX by math-verify, the solution first. Words with a number in them (`12 cm`) are words.

    Args:
        completions: one a sample, see [`completion_text`].
        answer: column with the solution, bare or in tags; wins over `assistant`.
        assistant: the same as a message, as in the published data.
        columns: ignored.

    Raises:
        ValueError: neither column is there.
        ImportError: math-verify is not installed and an answer holds LaTeX.
    """
    golds = _solutions(answer, assistant)
    given = [extract_answer(completion_text(c), require_closed=True) for c in completions]
    return [float(text is not None and _same_answer(gold, text)) for text, gold in zip(given, golds, strict=True)]


verified_accuracy_reward.requires = ("math_verify",)


def letter_reward(
    completions: Sequence[Any],
    answer: Sequence[str] | None = None,
    assistant: Sequence[Any] | None = None,
    choices: Sequence[Sequence[str] | None] | None = None,
    **columns: Any,
) -> list[float]:
    """1 if the last closed `<answer>` names the option of the solution and no other (`answers.score_letter`, strict).

    Args:
        completions, answer, assistant: see [`verified_accuracy_reward`]; the solution is a letter.
        choices: column with the texts of the options, which may stand for their letters.
        columns: ignored.

    Raises:
        ValueError: no column with the solution, or a solution that is not an option's letter.
    """
    golds = _solutions(answer, assistant)
    rewards = []
    for place, (completion, gold) in enumerate(zip(completions, golds, strict=True)):
        text, options = completion_text(completion), choices[place] if choices else None
        right = score_letter(text, gold, choices=options)  # first, so that a wrong label is an error in any case
        rewards.append(float(right and extract_answer(text, require_closed=True) is not None))
    return rewards


def span_format_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 for a text with a latent region, closed, and after it exactly one `<answer>...</answer>` at the end.

    The region may be of any method (`<|..._start|>` and its `<|..._end|>`), text may stand before and after it, and
    newlines anywhere.
    """
    rewards = []
    for completion in completions:
        text = completion_text(completion)
        spans = list(_SPAN.finditer(text))
        before, after = (text[: spans[0].start()], text[spans[-1].end() :]) if spans else ("", "")
        rewards.append(float(_ONE_ANSWER.fullmatch(after) is not None and "<answer>" not in before.lower()))
    return rewards


def maze_reward(completions: Sequence[Any], meta: Sequence[Any], **columns: Any) -> list[float]:
    """1 if following the plan of the answer takes the player to the goal (`maze_planning.score_plan`).

    Args:
        completions: one a sample, see [`completion_text`].
        meta: column `meta` of the maze records.
        columns: ignored.
    """
    mazes = [maze_of_record({"meta": entry}) for entry in meta]
    return [float(score_plan(maze, completion_text(c))) for c, maze in zip(completions, mazes, strict=True)]


# Answers


def _solutions(answer: Sequence[str] | None, assistant: Sequence[Any] | None) -> list[str]:
    """The solutions as written, without tags when they come from `answer`."""
    if answer is None and assistant is None:
        raise ValueError("no solution: the data set needs a column 'answer' (text) or 'assistant' (message)")
    if answer is not None:
        return [_untagged(gold) for gold in answer]
    return [completion_text([gold] if isinstance(gold, Mapping) else gold) for gold in assistant]


def _untagged(text: str) -> str:
    tagged = extract_answer(text)
    return text.strip() if tagged is None else tagged


def _same_answer(gold: str, given: str) -> bool:
    gold = _untagged(gold)
    if _words(gold) == _words(given):
        return True
    numbers = _number(gold), _number(given)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if not re.search(r"[\\$]", gold + given):
        return False
    library = _math_verify()
    # Its timeouts use signals, which only the main thread may set.
    main = threading.current_thread() is threading.main_thread()
    seconds = 5 if main else None
    parsed = [library.parse(_as_latex(text), parsing_timeout=seconds) for text in (gold, given)]
    return bool(all(parsed) and library.verify(*parsed, timeout_seconds=seconds))


def _words(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def _number(text: str) -> Fraction | None:
    text = text.strip()
    percent = text.endswith("%")
    text = text[:-1].rstrip() if percent else text
    ratio = _RATIO.fullmatch(text)
    if ratio:
        value = Fraction(int(ratio.group(1)), int(ratio.group(2)))
    elif _NUMBER.fullmatch(text):
        value = Fraction(text.replace(",", ""))
    else:
        return None
    return value / 100 if percent else value


def _as_latex(text: str) -> str:
    return text if "$" in text else f"${text}$"


def _math_verify() -> ModuleType:
    try:
        import math_verify
    except ImportError as error:
        raise ImportError("this reward needs math-verify: pip install math-verify") from error
    return math_verify
