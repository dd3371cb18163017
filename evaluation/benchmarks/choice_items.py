"""What readers, questions and scorers of multiple-choice sets share: options in a text, letters of labels."""

import json
import re
import string
from collections.abc import Mapping
from typing import Any

INSTRUCTION = "Answer with the option letter from the given choices directly."  # of LaViT's evaluation

_LETTER = re.compile(r"\s*\(?([A-Ha-h])\)?[.:]?\s*")
_OPTION = re.compile(r"(?<![A-Za-z0-9])(?:\(([A-Ha-h])\)|([A-H])[.:)])\s*")
_MOST_OPTIONS = 8


def options_in(text: str) -> list[str] | None:
    """The options that a text lists as `(a) ... (b) ...`, `A: ..., B: ...` or `A. ...`, each up to the next or to the
    end of its line; None unless it lists two.

    Example: `options_in("(a) Yes (b) No")` is `["Yes", "No"]`.
    """
    found: list[re.Match] = []
    for match in _OPTION.finditer(text):
        expected = string.ascii_uppercase[len(found)]
        if len(found) < _MOST_OPTIONS and (match[1] or match[2]).upper() == expected:
            found.append(match)
    starts = [*(match.start() for match in found), len(text)]
    spans = [text[match.end() : end] for match, end in zip(found, starts[1:], strict=True)]
    options = [span.split("\n")[0].strip().rstrip(",;") for span in spans]
    return options if len(options) > 1 and all(options) else None


def letter_of(label: str) -> str:
    """The upper-case letter of a label such as `"(a)"`, `"A"` or `"A."`; empty when it is none."""
    found = _LETTER.fullmatch(label)
    return found[1].upper() if found else ""


def mmstar_facts(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Categories and source of a row of MMStar, whose `meta_info` is an object or JSON text.

    Raises:
        ValueError: `meta_info` is neither.
    """
    facts = fields.get("meta_info")
    facts = json.loads(facts) if isinstance(facts, str) else facts
    if not isinstance(facts, Mapping | None):
        raise ValueError(f"meta_info must be an object, got {facts!r:.80}")
    return {**{key: fields.get(key) for key in ("category", "l2_category")}, "source": (facts or {}).get("source")}


__all__ = ["INSTRUCTION", "letter_of", "mmstar_facts", "options_in"]
