r"""Questions of the data sets that DMLR was evaluated on: from a row as its authors publish it to what is asked, one
pure function a data set.

Paper: "Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623 (card 7.5). The
wording is that of its data files, with real new lines; answers are written as there: `B. carp`, `C: The floor.`,
`(b) Closed`, `\boxed{No}`. `search_tasks.py` reads the data sets.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainers.data.virl39k import unboxed

from .choice_items import INSTRUCTION, letter_of, options_in

YES_NO = "Answer the question based on the image. Give Yes or No and put it inside \\boxed{}.\nQuestion: "
RESULT = "Give the result in the form \\boxed{your answer}.\nQuestion: "
FINAL_CHOICE = "Solve the problem and put the FINAL CHOICE inside \\boxed{}.\nQuestion: "
_POLARITY = {"0": "No", "1": "Yes"}


@dataclass(frozen=True)
class SearchItem:
    """A row as it is asked.

    Args:
        prompt: what the user says.
        solution: the right answer.
        image: as the row has it.
        id: of the row, where it has one.
        choices: texts of the options in order.
        extra: further columns, and `answer_text` of the right option.
    """

    prompt: str
    solution: str
    image: Any
    id: str | None = None
    choices: list[str] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def hallusion_item(row: Mapping[str, Any]) -> SearchItem:
    """HallusionBench, questions with an image: yes or no.

    Raises:
        ValueError: an answer that is neither 0 nor 1.
    """
    answer = _POLARITY.get(str(row["gt_answer"]).strip())
    if answer is None:
        raise ValueError(f"gt_answer must be 0 or 1, got {row['gt_answer']!r:.80}")
    names = ("category", "subcategory", "set_id", "figure_id", "question_id", "visual_input", "gt_answer_details")
    numbers = [str(row[name]) for name in ("category", "subcategory", "set_id", "figure_id", "question_id")]
    return SearchItem(
        prompt=f"{YES_NO}{row['question']}",
        solution=f"\\boxed{{{answer}}}",
        image=row["image"],
        id="-".join(numbers),
        extra=_kept(row, names),
    )


def math_vision_item(row: Mapping[str, Any]) -> SearchItem:
    """MATH-Vision: a letter where there are options with a text, else a value.

    Raises:
        ValueError: a letter that none of the options has.
    """
    options = row["options"] or []
    options = _texts(options, "options") if all(map(str.strip, options)) else []
    prompt, solution, extra = f"{RESULT}{row['question']}", f"\\boxed{{{row['answer']}}}", {}
    if options:
        letter = letter_of(row["answer"])
        solution, extra = _lettered(letter, options, row["answer"])
        prompt += "\nOptions: " + ", ".join(f"{string.ascii_uppercase[i]}. {text}" for i, text in enumerate(options))
    extra |= _kept(row, ("level", "subject", "image"))
    return SearchItem(prompt, solution, row["decoded_image"], str(row["id"]), options or None, extra)


def math_vista_item(row: Mapping[str, Any]) -> SearchItem:
    """MathVista: the published query with its hint; the answer of a multiple-choice question is one of the texts.

    Raises:
        ValueError: an answer that is none of the choices.
    """
    choices, answer, extra = _texts(row["choices"], "choices"), row["answer"], {}
    solution = answer
    if choices:
        letter = string.ascii_uppercase[choices.index(answer)] if answer in choices else ""
        solution, extra = _lettered(letter, choices, answer)
    extra |= _kept(row, ("question_type", "answer_type", "unit", "precision", "metadata", "image"))
    return SearchItem(row["query"], solution, row["decoded_image"], str(row["pid"]), choices or None, extra)


def scienceqa_item(row: Mapping[str, Any]) -> SearchItem:
    """ScienceQA: options by letter; option A is an answer like any other. The hint is kept, and not asked, as there.

    Raises:
        ValueError: an answer that is not the index of a choice.
    """
    choices, index = _texts(row["choices"], "choices"), row["answer"]
    number = index if isinstance(index, int) and not isinstance(index, bool) else -1
    letter = string.ascii_uppercase[number] if 0 <= number < len(choices) else ""
    solution, extra = _lettered(letter, choices, index)
    listed = "\n".join(f"{string.ascii_uppercase[i]}. {text}" for i, text in enumerate(choices))
    extra |= _kept(row, ("hint", "task", "grade", "subject", "topic", "category", "skill"))
    return SearchItem(f"{row['question']}\n\nOptions:\n{listed}", solution, row["image"], None, choices, extra)


def mm_math_item(row: Mapping[str, Any]) -> SearchItem:
    r"""MM-MATH: the answer is the last `\boxed{...}` of the worked solution.

    Raises:
        ValueError: a solution without one.
    """
    worked = row["solution"]
    answer = unboxed(worked) if "\\boxed" in worked else None
    if not answer:
        raise ValueError(f"the solution has no \\boxed{{...}} with an answer: {worked[-80:]!r}")
    extra = {"worked_solution": worked, **_kept(row, ("year", "difficult", "knowledge"))}
    return SearchItem(row["question"], answer, row["image"], extra={**extra, "file_name": row["file_name"]})


def mmstar_item(question: str, letter: str, choices: Sequence[str] | None) -> tuple[str, str]:
    """Prompt and solution of MMStar from those of `choice_items`: without its request for a letter alone, which the
    prompts of the search contradict."""
    prompt = question.removesuffix(INSTRUCTION).rstrip()
    label = letter_of(letter)
    return prompt, f"{label}: {choices[ord(label) - ord('A')]}" if choices else label


def mmvp_item(row: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and solution of MMVP from a line of its table."""
    choices, label = options_in(row["Options"]), letter_of(row["Correct Answer"])
    text = f" {choices[ord(label) - ord('A')]}" if choices else ""
    return f"{FINAL_CHOICE}{row['Question']}\nOptions: {row['Options']}", f"({label.lower()}){text}"


def _lettered(letter: str, choices: Sequence[str], answer: Any) -> tuple[str, dict[str, Any]]:
    """`B. carp`, and the text of the option."""
    place = string.ascii_uppercase.find(letter) if letter else -1
    if not 0 <= place < len(choices):
        raise ValueError(f"the answer {answer!r:.80} is none of the {len(choices)} choices {list(choices)!r:.120}")
    return f"{letter}. {choices[place]}", {"answer_text": choices[place]}


def _texts(value: Any, name: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str) or not all(isinstance(each, str) and each.strip() for each in value):
        raise ValueError(f"{name} must be a list of texts, got {value!r:.80}")
    return list(value)


def _kept(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in names if row.get(name) not in (None, "")}


__all__ = [
    "SearchItem",
    "hallusion_item",
    "math_vision_item",
    "math_vista_item",
    "mm_math_item",
    "mmstar_item",
    "mmvp_item",
    "scienceqa_item",
]
