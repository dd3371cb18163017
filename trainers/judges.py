"""Judges of a teacher's answers: by comparison with the short answer of the record, or by a chat model.

Paper: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129 (card 5.2, step 3, and 9.1,
row 16). Deviations from the published code, on purpose: the key of the service comes from the environment, a service
that fails is not a wrong answer, and a verdict is YES or NO and nothing else (`parse="reference"` reads as published:
"Yesterday" is a yes, a bold YES is a no).
"""

import logging
import os
import re
import string
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from huggingface_hub import constants

from .data.answers import (
    UNKNOWN,
    answer_number,
    answer_words,
    extract_answer,
    extract_yes_no,
    score_letter,
)
from .data.answers_lavit import extract_final_answer, judge_verdict
from .data.answers_staged import extract_coconut
from .data.boxes import checked_option
from .data.chat_client import HUB_ROUTER, ChatClient, ChatError, Judgement, chat_endpoint, with_retries
from .data.mazes import maze_of_record, score_plan
from .data.records import Record

logger = logging.getLogger(__name__)

JUDGES = ("match", "chat")
MATCHES = ("exact", "contained")
PARSES = ("strict", "reference")
FAILURES = ("error", "reject")
FINAL_ANSWERS = ("auto", "published", "staged", "tagged", "whole")
STAGED_MARKER = "Therefore, the answer is"

JUDGE_PROMPT = (
    "Compare an answer with the reference answer of a question about an image. Judge the meaning, not the wording.\n\n"
    "Question: {question}\nReference answer: {reference}\nAnswer: {answer}\n\n"
    "Does the answer say the same as the reference answer? Reply with one word, YES or NO."
)


class JudgeError(RuntimeError):
    """A judge that could not be asked, or whose verdict cannot be read, after all retries."""


class Judge(Protocol):
    """Judges final answers of a teacher, one for each record, in order."""

    def __call__(self, records: Sequence[Record], answers: Sequence[str]) -> list[Judgement]: ...


def final_answer(text: str, how: str = "auto") -> str:
    """The final answer in a teacher's reply; the whole reply where there is none to be found.

    Args:
        text: the reply.
        how: `"published"` (behind FINAL ANSWER, else the last line; card 7.4), `"staged"` (behind "Therefore, the
            answer is": models trained with explicit steps), `"tagged"` (in `<answer>`), `"whole"`, or `"auto"`: tagged
            or staged if the reply is so written, published if it has the words FINAL ANSWER, else whole.

    Raises:
        ValueError: an unknown way.
    """
    checked_option("final_answer", how, FINAL_ANSWERS)
    found: str | None = None
    if how in ("auto", "tagged"):
        found = extract_answer(text)
    if not found and how in ("auto", "staged"):
        found = extract_coconut(text, marker=STAGED_MARKER)
    if not found and (how == "published" or (how == "auto" and re.search(r"final\s+answer", text, re.IGNORECASE))):
        found = extract_final_answer(text)
    return (found or text).strip()


# By comparison ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatchJudge:
    """Compares with the record's answer: a maze by simulating the moves, options by letter or text, yes and no by
    polarity, other short answers by their words or as numbers.

    Args:
        match: of other short answers: `"exact"` (the same words, articles, case and punctuation aside), or
            `"contained"` (the reference's words occur in a row in the answer).

    Raises:
        ValueError: an unknown `match`.
    """

    match: str = "exact"

    def __post_init__(self) -> None:
        checked_option("judge_match", self.match, MATCHES)

    def __call__(self, records: Sequence[Record], answers: Sequence[str]) -> list[Judgement]:
        return [Judgement(self._right(record, answer)) for record, answer in zip(records, answers, strict=True)]

    def _right(self, record: Record, answer: str) -> bool:
        gold = record["answer"].strip()
        if "maze" in record["meta"]:
            return score_plan(maze_of_record(record), answer)
        if record["choices"]:
            return _right_option(answer, gold, record["choices"])
        if gold.lower().strip(".") in ("yes", "no"):
            return extract_yes_no(answer) == extract_yes_no(gold) != UNKNOWN
        words, wanted = answer_words(answer), answer_words(gold)
        numbers = answer_number(answer), answer_number(gold)
        if None not in numbers:  # not by words, which have no sign
            return numbers[0] == numbers[1]
        if words == wanted:
            return bool(wanted)
        starts = range(len(words) - len(wanted) + 1) if self.match == "contained" and wanted else ()
        return any(words[i : i + len(wanted)] == wanted for i in starts)


def _right_option(answer: str, gold: str, choices: Sequence[str]) -> bool:
    letters = string.ascii_uppercase[: len(choices)]
    same = [letters[i] for i, choice in enumerate(choices) if answer_words(choice) == answer_words(gold)]
    label = same[0] if len(same) == 1 else gold
    try:
        return score_letter(answer, label, choices=choices)
    except ValueError:  # the record's answer is neither a letter nor one of the options
        return answer_words(answer) == answer_words(gold) != []


# By a chat model ----------------------------------------------------------------------------------------------------


class ChatJudge:
    """Asks a chat model whether an answer means the reference answer; any server with the OpenAI protocol.

    Args:
        model: its name, as the server knows it.
        url: of the server, e.g. `http://127.0.0.1:8000/v1`; None for the inference providers of the Hub.
        key: of the service; None where the server needs none.
        parse: how a verdict is read, see `judge_verdict`: `"strict"` (the first word is YES or NO; anything else is
            asked again) or `"reference"` (a reply that begins with YES is a yes, all others are a no).
        failure: what follows when all retries fail: `"error"` ([`JudgeError`]) or `"reject"` (`correct` is None).
        retries: how often a question is asked again.
        timeout: seconds of one request.
        max_tokens: of a verdict; more for a model that thinks aloud first.
        workers: requests at a time.
        prompt: with `{question}`, `{reference}` and `{answer}`.
        wait: seconds before the first retry; twice as long before each further one.

    Errors that cannot pass (a wrong key, an unknown model) are not asked again.

    Raises:
        ValueError: an unknown option, a number out of its range, no key for the Hub, the Hub in offline mode, or a
            token of the Hub for another server.
    """

    def __init__(
        self,
        model: str,
        url: str | None = None,
        key: str | None = None,
        *,
        parse: str = "strict",
        failure: str = "error",
        retries: int = 3,
        timeout: float = 60.0,
        max_tokens: int = 16,
        workers: int = 4,
        prompt: str = JUDGE_PROMPT,
        wait: float = 1.0,
        sleep: Callable[[float], Any] = time.sleep,
    ) -> None:
        checked_option("judge_parse", parse, PARSES)
        checked_option("judge_failure", failure, FAILURES)
        if retries < 0 or workers < 1 or timeout <= 0:
            raise ValueError(
                f"judge_retries={retries!r}, judge_workers={workers!r}, judge_timeout={timeout!r}: at least 0, at "
                "least 1, above 0"
            )
        if url is None and not key:
            raise ValueError(
                "judge='chat' without judge_url asks the inference providers of the Hub, which need a key: name the "
                "environment variable that holds it (judge_key_env), or give the judge_url of your server"
            )
        if url is None and constants.is_offline_mode():
            raise ValueError(
                "judge='chat' with HF_HUB_OFFLINE set asks nothing of the Hub: unset it, or give the judge_url of "
                "your server"
            )
        self.model, self.parse, self.failure, self.retries = model, parse, failure, retries
        self.workers, self.prompt, self.wait, self.sleep = workers, prompt, wait, sleep
        self.max_tokens = max_tokens
        names = {"url_name": "judge_url", "key_name": "judge_key_env"}
        endpoint = chat_endpoint(url or HUB_ROUTER, add_version=True)
        self.client = ChatClient(endpoint, key, timeout=timeout, **names)

    def __call__(self, records: Sequence[Record], answers: Sequence[str]) -> list[Judgement]:
        """One verdict for each answer.

        Raises:
            JudgeError: `failure="error"` and a question without verdict; names the record.
        """
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._judge, records, answers))

    def _judge(self, record: Record, answer: str) -> Judgement:
        if not answer.strip():
            return Judgement(False, None, None)  # nothing to ask about
        text = self.prompt.format(question=record["question"], reference=record["answer"], answer=answer)
        try:
            return with_retries(lambda: self._ask(text), self.retries, self.wait, self.sleep)
        except ChatError as error:
            tries, reply, reason = error.tries, error.reply, " ".join(str(error).split())
        problem = f"the judge {self.model!r} gave no verdict on record {record['id']!r} in {tries} tries; {reason}"
        if self.failure == "error":
            raise JudgeError(
                f"{problem}; see to the server and start again (finished shards are kept), or choose "
                "judge_failure='reject' to leave such samples out"
            )
        logger.warning("%s: rejected", problem)
        return Judgement(None, reply, problem)

    def _ask(self, text: str) -> Judgement:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0.0,
            "max_tokens": self.max_tokens,
            "stream": False,
        }
        reply = self.client.complete(body).content or ""
        verdict = judge_verdict(reply, self.parse)
        if verdict is None:
            raise ChatError(f"its reply is neither YES nor NO: {reply!r:.80}", again=True, reply=reply)
        return Judgement(verdict, reply)


def build_judge(
    judge: str = "match",
    *,
    match: str = "exact",
    model: str | None = None,
    url: str | None = None,
    key_env: str | None = None,
    **options: Any,
) -> Judge:
    """The judge that options ask for.

    Args:
        judge: `"match"` or `"chat"`.
        match: see [`MatchJudge`].
        model, url: see [`ChatJudge`].
        key_env: name of the environment variable that holds the key of the service.
        options: more of [`ChatJudge`].

    Raises:
        ValueError: an unknown judge, a chat judge without model, or a variable that is not set.
    """
    checked_option("judge", judge, JUDGES)
    if judge == "match":
        if model or url or key_env:
            raise ValueError(
                "judge_model, judge_url and judge_key_env are of judge='chat'; leave them out, or choose it"
            )
        return MatchJudge(match)
    if not model:
        raise ValueError("judge='chat' needs judge_model, the name by which the server knows its model")
    key = None if key_env is None else os.environ.get(key_env)
    if key_env is not None and not key:
        raise ValueError(
            f"judge_key_env={key_env!r}: this environment variable is not set; export the key of the service in it, "
            "or leave the option out for a server that needs none"
        )
    return ChatJudge(model, url, key, **options)


__all__ = ["ChatJudge", "Judge", "JudgeError", "Judgement", "MatchJudge", "build_judge", "final_answer"]
