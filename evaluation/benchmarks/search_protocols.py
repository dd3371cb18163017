r"""How DMLR (arXiv 2512.12623, card 2.2 and 7.1) asks and scores, as protocols of benchmarks.

| protocol | user's turn | system turn | score |
|---|---|---|---|
| `dmlr` | published: template, the question as the `repr` of a list | published | equal, or contains the label |
| `dmlr_strict` | the same template, the question as text | published | letter, value or words |
| `default` | as `dmlr_strict` | of the chat template | as `dmlr_strict` |

The thought block of the published prompt counts its placeholders, so it is no part of a protocol: an evaluation puts
placeholders at the end of the user's turn (`evaluation/thoughts.py`), `examples/dmlr.py` asks with the whole block.
"""

import string
from collections.abc import Callable
from functools import partial

from transformers import ProcessorMixin

from modeling_latent.search_messages import COT_TEMPLATES, SYSTEM_PROMPT
from trainers.data.answers import STRICT
from trainers.data.answers_dmlr import extract_dmlr, score_dmlr
from trainers.data.answers_staged import REFERENCE
from trainers.data.records import Record
from trainers.data.staged_formats import chat_prompt
from trainers.data.virl39k import unboxed

from ..runner import Prediction
from .benchmark import DEFAULT_PROTOCOL, AskProtocol, Scored
from .choice_protocols import choice_letter
from .search_items import YES_NO, mmstar_item, mmvp_item

Item = Callable[[Record], tuple[str, str]]
SOURCE = "2512.12623, card 2.2 and 7.1"
MAX_NEW_TOKENS = 1024
_MODES = {DEFAULT_PROTOCOL: STRICT, "dmlr": REFERENCE, "dmlr_strict": STRICT}


def search_protocols(item: Item, names: tuple[str, ...] = tuple(_MODES)) -> dict[str, AskProtocol]:
    """Protocols by name.

    Args:
        item: from a record to question and label as DMLR's data files have them.
        names: of the table above.
    """
    return {name: _protocol(name, item) for name in names}


def as_record(record: Record) -> tuple[str, str]:
    """Question and label of a record of `search_tasks.py`, which has them as DMLR's data files do."""
    return record["question"], record["answer"]


def _protocol(name: str, item: Item) -> AskProtocol:
    mode = _MODES[name]
    ask = partial(_user_text, mode, item)
    prompt = partial(_prompt, ask) if name == DEFAULT_PROTOCOL else partial(_prompt_with_system, ask)
    score = partial(score_search, mode, item)
    return AskProtocol(name, SOURCE, prompt, score, MAX_NEW_TOKENS, "\\boxed{{answer}}", ask=ask)


def _user_text(mode: str, item: Item, record: Record) -> str:
    question = item(record)[0]
    return COT_TEMPLATES[0] + (repr([question]) if mode == REFERENCE else question)


def _prompt(ask: Callable[[Record], str], processor: ProcessorMixin, record: Record) -> str:
    return chat_prompt(processor, ask(record), len(record["images"]))


def _prompt_with_system(ask: Callable[[Record], str], processor: ProcessorMixin, record: Record) -> str:
    """The chat prompt behind DMLR's system message; a template without system turns gets it in the user's turn."""
    text, images = ask(record), len(record["images"])
    try:
        found = chat_prompt(processor, text, images, system=SYSTEM_PROMPT)
    except Exception as error:  # whatever a template raises about a system message
        if "system" not in str(error).lower():
            raise
        found = ""
    return found if SYSTEM_PROMPT in found else chat_prompt(processor, f"{SYSTEM_PROMPT}\n\n{text}", images)


# Scores


def score_search(mode: str, item: Item, record: Record, prediction: Prediction) -> Scored:
    """Whether the marked answer of a reply is the label; of a question with options the answer is a letter."""
    label = item(record)[1]
    right, found = score_dmlr(prediction.text, label, mode), extract_dmlr(prediction.text, mode)
    if mode == REFERENCE or not record["choices"]:
        return Scored(right, found or None)
    return Scored(right, gold_of(label, record) if right else choice_letter(found, record["choices"]))


def gold_of(label: str, record: Record) -> str:
    """The answer that a label says: of an option its letter, else the text without its box."""
    text = (unboxed(label) if "\\boxed" in label else label.strip()) or label
    letter = text.lstrip("(")[:1].upper()
    return letter if record["choices"] and letter in string.ascii_uppercase else text


# Sets that `choice_sets.py` reads, as DMLR's data files have them


_ITEMS: dict[str, Item] = {
    "hallusionbench": lambda record: (f"{YES_NO}{record['question']}", f"\\boxed{{{record['answer']}}}"),
    "mmstar": lambda record: mmstar_item(record["question"], record["answer"], record["choices"]),
    "mmvp": lambda record: mmvp_item(record["meta"]["fields"]),
}


def dmlr_protocols(name: str) -> dict[str, AskProtocol]:
    """`dmlr` and `dmlr_strict` of HallusionBench, MMStar and MMVP; of another set none."""
    return search_protocols(_ITEMS[name], ("dmlr", "dmlr_strict")) if name in _ITEMS else {}


__all__ = ["as_record", "dmlr_protocols", "gold_of", "score_search", "search_protocols"]
