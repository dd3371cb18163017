"""Lines of a run and the replies in them: every raw reply is kept, what counts is read out of them anew."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from trainers.data.records import Record

from ..benchmarks.benchmark import AskProtocol, Scored
from ..run_folder import DONE
from ..runner import Prediction
from .variants import Asked, Variant


def item_key(benchmark: str, variant: str, number: int) -> str:
    """What names an item in the lines of a run."""
    return f"{benchmark}/{variant}/{number}"


def line_of(key: str, replies: Sequence[Prediction], seconds: float) -> dict[str, Any]:
    """One line of a run: all replies to an item, and the seconds that it took."""
    return {"data_idx": key, "status": DONE, "replies": [asdict(reply) for reply in replies], "seconds": seconds}


def replies_in(line: Mapping[str, Any]) -> list[Prediction]:
    """The replies of a line."""
    return [Prediction(**{**values, "closed_by": tuple(values["closed_by"])}) for values in line["replies"]]


def predictions_of(asked: Asked, variant: Variant, lines: Mapping[str, Any]) -> list[Prediction]:
    """What counts for every record, in order.

    Raises:
        ValueError: an item that is not finished; names it.
    """
    found = []
    for number, record in enumerate(asked.records):
        key = item_key(asked.benchmark.name, variant.name, number)
        if key not in lines:
            raise ValueError(
                f"item {number} ({record['id']!r}) of {asked.benchmark.name} under {variant.name!r} is not finished: "
                "a process of this run ended early; call the same command again"
            )
        found.append(chosen_reply(replies_in(lines[key]), record, asked.protocol))
    return found


def chosen_reply(replies: Sequence[Prediction], record: Record, protocol: AskProtocol) -> Prediction:
    """The only reply, or of several one with the most frequent answer (the one that came first of two that are as
    frequent), with the steps and positions of all of them."""
    if len(replies) == 1:
        return replies[0]
    answers = [protocol.score(record, reply).answer for reply in replies]
    winner = replies[answers.index(Counter(answers).most_common(1)[0][0])]
    steps, tokens, markers, prefilled = (
        sum(getattr(reply, name) for reply in replies)
        for name in ("num_latent_steps", "num_tokens", "num_markers", "num_prefilled")
    )
    return replace(winner, num_latent_steps=steps, num_tokens=tokens, num_markers=markers, num_prefilled=prefilled)


def scores(asked: Asked, predictions: Sequence[Prediction], protocol: AskProtocol | None = None) -> list[Scored]:
    """What a protocol (that of the run) reads in the replies."""
    score = (protocol or asked.protocol).score
    return [score(record, prediction) for record, prediction in zip(asked.records, predictions, strict=True)]


def digest_of(records: Sequence[Record]) -> str:
    """Of ids, questions, options and answers: changed data are another run."""
    facts = [[record[name] for name in ("id", "question", "choices", "answer")] for record in records]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


__all__ = ["chosen_reply", "digest_of", "item_key", "line_of", "predictions_of", "replies_in", "scores"]
