"""The LLM verifier of DMLR: a chat model says whether an answer and the ground truth are the same final result.

Paper: "Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623 (card 7.4). The
request is the published one to the byte, in both modes: temperature 0, one user message, a strict JSON schema.

Deviations from the published code, on purpose; `mode="reference"` takes back the first two:

* an error is no wrong answer: such a pair is unverified (`correct` is None) and carries the reason;
* a reply that cannot be read is asked again, and after several pairs without any verdict the rest is not asked;
* without a key nothing falls back to the rule judge: it is an error that says which variable to set;
* verdicts may be kept in a file, so that a second run asks nothing; equal pairs of one call are asked once;
* a `.env` file is looked for from the working directory upwards (published: from the package's folder), and only the
  three variables of the verifier are read from it;
* redirects are not followed, and a token of the Hub is sent to the Hub only.
"""

import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.data.answers import STRICT
from trainers.data.answers_dmlr import MODES
from trainers.data.answers_staged import REFERENCE
from trainers.data.boxes import checked_option
from trainers.data.chat_client import ChatClient, ChatError, Judgement, chat_endpoint, with_retries

logger = logging.getLogger(__name__)

KEY_VARIABLE, URL_VARIABLE, MODEL_VARIABLE = "OPENAI_API_KEY", "OPENAI_API_BASE_URL", "MODEL_TYPE"
DEFAULT_URL = "https://api.openai.com/v1"
DEFAULT_MODEL = "gpt-4o-2024-08-06"
RETRIES = {STRICT: 4, REFERENCE: 2}

PROMPT = (
    "Compare the following two answers and decide if they express the same final result. "
    "Return True if they are the same, False otherwise."
    "Candidate answer: {candidate}\n\nGround truth: {truth}\n\n"
)
_FIELD = "equivalent"
_TRUE, _FALSE = ("true", "t", "yes", "y", "on", "1"), ("false", "f", "no", "n", "off", "0")


class VerifierError(RuntimeError):
    """A verifier that cannot be set up."""


# Where it is, and with which key


@dataclass(frozen=True)
class VerifierSettings:
    """The endpoint of a verifier.

    Args:
        key: of the service; any word for a server that asks for none.
        url: of the API, as OpenAI's clients take it: `/chat/completions` is appended and nothing else.
        model: its name there.
    """

    key: str = field(repr=False)
    url: str = DEFAULT_URL
    model: str = DEFAULT_MODEL


def verifier_settings(
    folder: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None
) -> VerifierSettings:
    """The settings that `OPENAI_API_KEY`, `OPENAI_API_BASE_URL` and `MODEL_TYPE` give.

    Args:
        folder: where the search for a `.env` file begins, which goes upwards and ends at the first one; by default the
            working directory. It has lines `KEY=VALUE` (quotes and `export` allowed) and comments with `#`. The
            environment wins.
        environ: the environment; by default that of the process, which is not changed.

    Raises:
        VerifierError: no key anywhere.
    """
    environ = os.environ if environ is None else environ
    path = _env_file(Path.cwd() if folder is None else Path(folder).absolute())
    found = {**(_read_env(path) if path else {}), **environ}
    if not found.get(KEY_VARIABLE, "").strip():
        where = f"neither in the environment nor in {path}" if path else "and there is no .env file here or above"
        raise VerifierError(
            f"the LLM verifier has no key: {KEY_VARIABLE} is not set, {where}. Export it, write "
            f"{KEY_VARIABLE}=... into a .env file (any word for a server that asks for none; {URL_VARIABLE} is its "
            "address), or use the rule judge"
        )
    return VerifierSettings(
        found[KEY_VARIABLE].strip(),
        found.get(URL_VARIABLE, "").strip() or DEFAULT_URL,
        found.get(MODEL_VARIABLE, "").strip() or DEFAULT_MODEL,
    )


def _env_file(folder: Path) -> Path | None:
    return next((each / ".env" for each in (folder, *folder.parents) if (each / ".env").is_file()), None)


def _read_env(path: Path) -> dict[str, str]:
    values: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VerifierError(f"{path} cannot be read ({error}); repair it or move it away") from error
    for line in lines:
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        name, value = name.strip(), value.strip()
        if not equals or name not in (KEY_VARIABLE, URL_VARIABLE, MODEL_VARIABLE):
            continue
        quote = value[:1]
        if quote in ("'", '"') and quote in value[1:]:
            value = value[1:].partition(quote)[0]
        else:
            value = re.split(r"(?:^|\s)#", value)[0].strip()
        values.setdefault(name, value)
    return values


# Request and reply


def request_body(model: str, candidate: str, truth: str) -> dict[str, Any]:
    """The published request, its fields in the published order."""
    schema = {
        "properties": {_FIELD: {"title": "Equivalent", "type": "boolean"}},
        "required": [_FIELD],
        "title": "EquivalenceResult",
        "type": "object",
        "additionalProperties": False,
    }
    text = PROMPT.format(candidate=candidate, truth=truth)
    return {
        "model": model,
        "stream": False,
        "messages": [{"role": "user", "content": text}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"schema": schema, "name": "EquivalenceResult", "strict": True},
        },
        "temperature": 0,
    }


def read_verdict(reply: str) -> bool | None:
    """What a reply says in its field `equivalent`; None for anything that is no verdict.

    As the published client, it takes for a boolean also 1 and 0, and the words true, t, yes, y, on, 1 and their
    opposites in any case.
    """
    try:
        said = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    value = said.get(_FIELD) if isinstance(said, dict) else None
    if isinstance(value, str):
        value = True if value.lower() in _TRUE else False if value.lower() in _FALSE else None
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


# Verdicts of earlier runs


class VerdictFile:
    """Verdicts by model, candidate and truth in a file of JSON lines, written one by one.

    A line that cannot be read (cut off when a run was killed) is passed over and asked anew. Runs side by side may
    share the file: each asks what was not there when it began.

    Raises:
        VerifierError: the path is a folder, or the file cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str, str], bool] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                file.seek(0)
                lines = file.read().split(b"\n")
        except OSError as error:
            raise VerifierError(
                f"verdicts cannot be kept in {self.path} ({error}); name a file that may be read and written"
            ) from error
        self._whole = not lines[-1]  # it ends with a line break, or is empty
        damaged = 0
        for line in filter(bytes.strip, lines):
            try:
                row = json.loads(line)
                key, verdict = (row["model"], row["candidate"], row["truth"]), row[_FIELD]
                if not isinstance(verdict, bool) or not all(isinstance(part, str) for part in key):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                damaged += 1
                continue
            self._known[key] = verdict
        if damaged:
            logger.warning("%s: %d damaged lines passed over", self.path, damaged)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, model: str, candidate: str, truth: str) -> bool | None:
        """The verdict, None for a pair that was never asked."""
        return self._known.get((model, candidate, truth))

    def put(self, model: str, candidate: str, truth: str, verdict: bool) -> None:
        """Keep a verdict; a file that cannot be written (a full disk) is a warning, and stops no run."""
        row = {"model": model, "candidate": candidate, "truth": truth, _FIELD: verdict}
        line = json.dumps(row).encode() + b"\n"
        with self._lock:
            self._known[model, candidate, truth] = verdict
            try:
                with self.path.open("ab") as file:
                    file.write(line if self._whole else b"\n" + line)
                self._whole = True
            except OSError as error:
                logger.warning("a verdict was not kept in %s: %s", self.path, error)


# The verifier


class LLMVerifier:
    """Asks a chat model whether answers are equal to their ground truths; may be used by several threads.

    Args:
        settings: where to ask; by default [`verifier_settings`].
        mode: `"strict"`, or `"reference"`: whatever fails is a wrong answer (`correct` is False, the reason is kept).
        cache: file of verdicts, see [`VerdictFile`]; None for none. Only verdicts are kept, no failures.
        retries: how often a pair is asked again; by default 4, in reference mode the published 2. In reference mode
            only errors of connection and status are asked again, in strict mode also replies without verdict.
        timeout: seconds of one request.
        workers: requests at a time.
        wait: seconds before the first retry, twice as long before each further one; longer if the server says so.
        give_up: after so many pairs in a row without verdict, the rest of a call is not asked (strict mode).
        sleep: for tests.

    Raises:
        VerifierError: no key, or a file of verdicts that cannot be read.
        ValueError: an unknown mode, a number out of its range, a wrong address, or a token of the Hub for another
            server.
    """

    def __init__(
        self,
        settings: VerifierSettings | None = None,
        *,
        mode: str = STRICT,
        cache: str | os.PathLike[str] | None = None,
        retries: int | None = None,
        timeout: float = 60.0,
        workers: int = 4,
        wait: float = 1.0,
        give_up: int = 8,
        sleep: Callable[[float], Any] = time.sleep,
    ) -> None:
        self.mode = checked_option("verifier mode", mode, MODES)
        self.settings = verifier_settings() if settings is None else settings
        self.retries = RETRIES[mode] if retries is None else retries
        if self.retries < 0 or workers < 1 or timeout <= 0 or wait < 0 or give_up < 1:
            raise ValueError(
                f"retries={retries!r}, workers={workers!r}, timeout={timeout!r}, wait={wait!r}, give_up={give_up!r}: "
                "at least 0, at least 1, above 0, at least 0, at least 1"
            )
        self.workers, self.wait, self.give_up, self.sleep = workers, wait, give_up, sleep
        self.cache = None if cache is None else VerdictFile(cache)
        names = {"url_name": URL_VARIABLE, "key_name": KEY_VARIABLE}
        endpoint = chat_endpoint(self.settings.url)
        self.client = ChatClient(endpoint, self.settings.key, timeout=timeout, **names)

    def __call__(self, candidates: Sequence[Any], truths: Sequence[Any]) -> list[Judgement]:
        """One judgement for each pair, in order; see [`verify`][LLMVerifier.verify]. Equal pairs are asked once.

        Raises:
            ValueError: not as many truths as candidates.
        """
        pairs = [(_text(candidate), _text(truth)) for candidate, truth in zip(candidates, truths, strict=True)]
        streak = _Streak(self.give_up if self.mode == STRICT else None)
        distinct = list(dict.fromkeys(pairs))
        pool = ThreadPoolExecutor(self.workers)
        try:
            judged = dict(zip(distinct, pool.map(lambda pair: self._judge(*pair, streak), distinct), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupted call asks no more
        return [judged[pair] for pair in pairs]

    def verify(self, candidate: Any, truth: Any) -> Judgement:
        """Whether an answer is equal to the ground truth.

        Args:
            candidate, truth: texts; an empty one (None; in strict mode also blanks) is wrong, and nothing is asked.

        Returns:
            `correct`: True, False, or None where there is no verdict, and then `error`; `reply`: the model's words,
            None from the file of verdicts.
        """
        return self._judge(_text(candidate), _text(truth), _Streak(None))

    def _judge(self, candidate: str, truth: str, streak: "_Streak") -> Judgement:
        if not _asked(candidate, self.mode) or not _asked(truth, self.mode):
            return Judgement(False)
        model = self.settings.model
        known = self.cache.get(model, candidate, truth) if self.cache is not None else None
        if known is not None:
            return Judgement(known)
        if streak.problem:
            return Judgement(None, None, f"not asked, because {streak.limit} pairs before it failed; {streak.problem}")
        try:
            verdict, reply = with_retries(lambda: self._ask(candidate, truth), self.retries, self.wait, self.sleep)
        except ChatError as error:
            problem = f"the verifier {model!r} gave no verdict in {error.tries} tries; {error}"
            streak.failed(problem)
            wrong = self.mode == REFERENCE
            logger.warning("%s: counted as %s", problem, "wrong" if wrong else "unverified")
            return Judgement(False if wrong else None, error.reply, problem)
        streak.answered()
        if self.cache is not None:
            self.cache.put(model, candidate, truth, verdict)
        return Judgement(verdict, reply)

    def _ask(self, candidate: str, truth: str) -> tuple[bool, str]:
        reply, reason = self.client.complete(request_body(self.settings.model, candidate, truth))
        verdict = None if reply is None else read_verdict(reply)
        if verdict is None or reply is None:
            said = f"{self.client.shown} sent no verdict: "
            if reply is not None:
                said += f"its reply is {' '.join(reply.split())!r:.120}, not {{'{_FIELD}': true or false}}"
                said += f" ({reason})" if reason else ""
            else:
                said += str(reason)
            said += f"; does the server know response_format json_schema, and is {MODEL_VARIABLE} the right model?"
            raise ChatError(said, status=200, again=self.mode == STRICT and reply is not None, reply=reply)
        return verdict, reply


class _Streak:
    """Failures in a row; `problem` is the last of them once there are `limit`."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.problem = limit, None
        self._failures, self._lock = 0, threading.Lock()

    def failed(self, problem: str) -> None:
        with self._lock:
            self._failures += 1
            if self.limit is not None and self._failures >= self.limit:
                self.problem = problem

    def answered(self) -> None:
        with self._lock:
            self._failures = 0


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _asked(text: str, mode: str) -> bool:
    return bool(text if mode == REFERENCE else text.strip())


def verifier_summary(judgements: Iterable[Judgement]) -> dict[str, Any]:
    """Counts of judgements, failures apart.

    Returns:
        `total`, `correct`, `wrong`, `unverified`; `accuracy`: the share of the correct among those with a verdict,
        None if there is none; `errors`: how often each reason occurs.
    """
    judgements = list(judgements)
    counts = Counter(judgement.correct for judgement in judgements)
    verified = counts[True] + counts[False]
    return {
        "total": len(judgements),
        "correct": counts[True],
        "wrong": counts[False],
        "unverified": counts[None],
        "accuracy": counts[True] / verified if verified else None,
        "errors": dict(Counter(judgement.error for judgement in judgements if judgement.error).most_common()),
    }


__all__ = [
    "LLMVerifier",
    "VerdictFile",
    "VerifierError",
    "VerifierSettings",
    "read_verdict",
    "request_body",
    "verifier_settings",
    "verifier_summary",
]
