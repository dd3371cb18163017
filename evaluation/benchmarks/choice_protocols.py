"""How multiple-choice and yes/no records are asked and scored: as published by LASER, LVR and LaViT, and corrected.

LASER: arXiv 2601.06803, card 7; LVR: arXiv 2509.24251, card 7; LaViT: arXiv 2601.10129, card 7. The corrected protocol
(`"default"`) lists the options one way for all sets and reads answers strictly: a reply that names no option, or two,
is no answer.
"""

import string
from collections.abc import Callable, Sequence

from trainers.data.answers import (
    LASER,
    LETTER_INSTRUCTION,
    STRICT,
    extract_letter,
    extract_letter_lvr,
    extract_mmvp,
    extract_yes_no,
    score_choice_relaxed,
    score_letter,
    score_letter_lvr,
    score_mmvp,
    score_yes_no,
    score_yes_no_relaxed,
)
from trainers.data.answers_lavit import REFERENCE, extract_letter_lavit, score_lavit
from trainers.data.records import Record
from trainers.data.staged_formats import chat_prompt

from ..runner import Prediction
from .benchmark import DEFAULT_PROTOCOL, AskProtocol, Scored
from .choice_items import INSTRUCTION
from .choice_sets import CHOICE_SETS

Ask = Callable[[Record], str]
Score = Callable[[Record, Prediction], Scored]
TAGGED = "<answer>{answer}</answer>"
# What stands behind the latents in the replies of training: of LASER at once, of LVR on a new line, of LaViT behind a
# blank.
REPLIES = {"laser": TAGGED, "lvr": f"\n{TAGGED}", "lavit": " {answer}"}
PUBLISHED: dict[str, tuple[str, tuple[str, ...]]] = {  # paper, and the sets that it was evaluated on
    "laser": (
        "2601.06803",
        ("blink", "mmvp", "mmstar", "seedbench2plus", "hallusionbench", "hrbench4k", "hrbench8k", "vsr", "cub"),
    ),
    "lvr": ("2509.24251", ("vstar", "mmvp", "blink")),
    "lavit": ("2601.10129", ("mmvp", "blink", "mmstar", "vstar")),
}
_YES_NO_INSTRUCTION = "\nPlease answer Yes or No."
_BLINK_INSTRUCTION = LETTER_INSTRUCTION.strip() + " Give your final answer in <answer>X</answer> format."
_POLARITY = {1: "Yes", 0: "No"}
_LENGTH = 512


def choice_protocols(name: str) -> dict[str, AskProtocol]:
    """The protocols of a set in `CHOICE_SETS`, by name."""
    yes_no = CHOICE_SETS[name].yes_no
    default = (_yes_no_question, _score_yes_no) if yes_no else (_default_question, _score_letter)
    if name == "mmvp":
        default = (_default_question, _score_mmvp)
    laser, lvr, lavit = (_source(method, name) for method in ("laser", "lvr", "lavit"))
    protocols = [
        _protocol(DEFAULT_PROTOCOL, "corrected", *default, reply="{answer}"),
        _protocol("laser", laser, _laser(name, True), _laser_score(name), REPLIES["laser"]),
        _protocol("laser_plain", laser, _laser(name, False), _laser_score(name), REPLIES["laser"]),
    ]
    if not yes_no:
        protocols.append(_protocol("lvr", lvr, _lvr(name), _score_lvr, REPLIES["lvr"]))
        protocols.append(_protocol("lavit", lavit, _lavit(name), _score_lavit, REPLIES["lavit"]))
    return {protocol.name: protocol for protocol in protocols}


def _source(method: str, name: str) -> str:
    """Where a method asks a set, or that it is asked in the form of the sets that the paper has."""
    paper, sets = PUBLISHED[method]
    return f"{paper}, card 7" + ("" if name in sets else "; the form of its other sets")


def _protocol(name: str, source: str, ask: Ask, score: Score, reply: str) -> AskProtocol:
    return AskProtocol(
        name, source, lambda processor, record: chat_prompt(processor, ask(record), len(record["images"])), score,
        _LENGTH, reply, ask=ask,
    )  # fmt: skip


# Questions


def _options(record: Record, form: str) -> str:
    """The options one a line, `form` with letter and text."""
    lines = (form.format(*pair) for pair in zip(string.ascii_uppercase, record["choices"] or (), strict=False))
    return "".join(f"\n{line}" for line in lines)


def _default_question(record: Record) -> str:
    listed = "" if record["meta"]["inside"] else _options(record, "{}. {}")
    return f"{record['question']}{listed}{LETTER_INSTRUCTION}"


def _yes_no_question(record: Record) -> str:
    return record["question"] + _YES_NO_INSTRUCTION


def _laser(name: str, instruction: bool) -> Ask:
    """The published query; the paper's script has the instruction."""

    def ask(record: Record) -> str:
        question, fields = record["question"], record["meta"]["fields"]
        if name == "blink":
            text = f"{question}\nOptions:{_options(record, '{}. {}')}\n"
            return text + (_BLINK_INSTRUCTION if instruction else "")
        if name == "mmvp":
            text = f"{question} {fields['Options']}"
        elif record["meta"]["inside"] or CHOICE_SETS[name].yes_no:
            text = fields.get("question", question)
        else:
            text = question + _options(record, "{}. {}")
        further = _YES_NO_INSTRUCTION if CHOICE_SETS[name].yes_no else LETTER_INSTRUCTION
        return text + (further if instruction else "")

    return ask


def _lvr(name: str) -> Ask:
    def ask(record: Record) -> str:
        fields = record["meta"]["fields"]
        if name == "vstar":
            text = fields["text"]  # has the instruction already, which is repeated as published
        elif name == "mmvp":
            options = fields["Options"].replace("(a)", "A.").replace("(b)", "B.")
            text = f"{record['question']}\nOptions:\n{options}"
        elif record["meta"]["inside"]:
            text = record["question"]
        else:
            text = f"{record['question']}\nOptions:{_options(record, '{}. {}')}\n"
        return text + LETTER_INSTRUCTION

    return ask


def _lavit(name: str) -> Ask:
    def ask(record: Record) -> str:
        fields = record["meta"]["fields"]
        if name == "vstar":
            return fields["text"]
        if name == "mmvp":
            return f"{record['question']}\n{fields['Options']}\n{INSTRUCTION}"
        if name == "blink" and fields.get("prompt"):
            return fields["prompt"]
        if record["meta"]["inside"]:
            return (
                record["question"] if "Answer with" in record["question"] else f"{record['question']}\n{INSTRUCTION}"
            )
        return f"{record['question']}\nOptions:{_options(record, '({}) {}')}\n{INSTRUCTION}"

    return ask


# Scores


def _named(letter: str | None) -> str | None:
    return letter.upper() if letter else None


def choice_letter(text: str, choices: Sequence[str] | None) -> str | None:
    """The letter that a text names strictly, None for none or several."""
    return extract_letter(text, STRICT, choices) or None


def _score_letter(record: Record, prediction: Prediction) -> Scored:
    letter = choice_letter(prediction.text, record["choices"])
    return Scored(letter == record["answer"], letter)


def _score_mmvp(record: Record, prediction: Prediction) -> Scored:
    letter = extract_mmvp(prediction.text, f"{record['question']} {record['meta']['fields']['Options']}", STRICT)
    return Scored(bool(letter) and letter == record["answer"], _named(letter))


def _score_yes_no(record: Record, prediction: Prediction) -> Scored:
    said = extract_yes_no(prediction.text, STRICT)
    return Scored(_POLARITY.get(said) == record["answer"], _POLARITY.get(said))


def _laser_score(name: str) -> Score:
    """The published scorers, on the reply with its special tokens."""
    relaxed = {"vsr": score_yes_no_relaxed, "cub": score_choice_relaxed}.get(name)

    def score(record: Record, prediction: Prediction) -> Scored:
        raw, label = prediction.raw, record["answer"]
        if CHOICE_SETS[name].yes_no:
            answer = _POLARITY.get(extract_yes_no(raw, LASER))
            return Scored((relaxed or (lambda r, t: score_yes_no(r, t, LASER)))(raw, label), answer)
        if name == "mmvp":
            question = f"{record['question']} {record['meta']['fields']['Options']}"
            return Scored(score_mmvp(raw, label, question, LASER), _named(extract_mmvp(raw, question, LASER)))
        right = relaxed(raw, label) if relaxed else score_letter(raw, label, LASER)
        return Scored(right, _named(extract_letter(raw, LASER)))

    return score


def _score_lvr(record: Record, prediction: Prediction) -> Scored:
    return Scored(score_letter_lvr(prediction.text, record["answer"]), extract_letter_lvr(prediction.text) or None)


def _score_lavit(record: Record, prediction: Prediction) -> Scored:
    found = extract_letter_lavit(prediction.raw)
    return Scored(score_lavit(prediction.raw, record["answer"], REFERENCE), _named(found))


__all__ = ["PUBLISHED", "REPLIES", "TAGGED", "choice_letter", "choice_protocols"]
