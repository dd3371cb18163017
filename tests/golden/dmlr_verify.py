"""DMLR golden vectors: extraction, rule judge, scores, stop reasons, and the LLM verifier before a server that replies
as recorded (card 4.6, 6.3, 7.1, 7.4)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from evaluation.verifier import LLMVerifier, VerifierError, VerifierSettings, verifier_settings
from tests.chat_server import ChatServer, Reply
from tests.golden.conftest import each, golden_dir, golden_json
from trainers.data.answers_dmlr import extract_dmlr, parse_score, score_dmlr, stop_reason

FOLDER = golden_dir("dmlr")
VERIFY: dict[str, Any] = golden_json(FOLDER, "verify.json", {})
VERIFIER: dict[str, Any] = VERIFY.get("llm_verifier", {})
KEY = "a key"


def table(name: str) -> list[Any]:
    return VERIFY.get(name, [])


def shown(*fields: str) -> Callable[[dict[str, Any]], str]:
    """Names a case by some of its fields."""
    return lambda case: " | ".join(repr(case[field])[:40] for field in fields)


@each("case", table("extract_answer"), ids=shown("text"))
def test_extraction(case: dict[str, Any]) -> None:
    assert extract_dmlr(case["text"], "reference") == case["answer"]


@each("case", table("judge_answer"), ids=shown("output", "label"))
def test_rule_judge(case: dict[str, Any]) -> None:
    assert score_dmlr(case["output"], case["label"], "reference") is case["correct"]


@each("case", table("scorer_extract"), ids=shown("text"))
def test_score_of_a_reply(case: dict[str, Any]) -> None:
    assert parse_score(case["text"]) == case["score"]


def stopped(case: dict[str, Any], mode: str) -> str:
    ends = case["output_ids"], case["max_new_tokens"], case["eos"], case["pad"]
    return stop_reason(*ends, input_length=case["input_length"], mode=mode)


@each("case", table("stop_reason"), ids=shown("output_ids", "max_new_tokens"))
def test_stop_reason(case: dict[str, Any]) -> None:
    assert stopped(case, "reference") == case["stop_reason"]


@each("case", table("stop_reason"), ids=shown("output_ids", "max_new_tokens"))
def test_the_strict_stop_reason_is_length_only_at_the_limit_and_without_an_end(case: dict[str, Any]) -> None:
    ids = case["output_ids"]
    unpadded = [i for i, token in enumerate(ids, 1) if token != case["pad"] or token == case["eos"]]
    ended = bool(unpadded) and ids[unpadded[-1] - 1] == case["eos"]
    assert (stopped(case, "strict") == "length") is (len(ids) >= case["max_new_tokens"] and not ended)
    assert (stopped(case, "strict") == "eos_token") is ended


# The LLM verifier


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = ChatServer()
    yield made
    made.close()


def asked(server: ChatServer, case: dict[str, Any], mode: str, model: str = "m", **options: Any) -> LLMVerifier:
    """A verifier before the server of a case."""
    server.replies = [
        Reply(content, status=status, raw=None if status == 200 else (content or "").encode())
        for status, content in case["server"]
    ]
    settings = VerifierSettings(KEY, server.url, model)
    return LLMVerifier(settings, mode=mode, sleep=lambda seconds: None, **options)


@each("case", VERIFIER.get("calls", []), ids=shown("solution", "ground_truth", "server"))
def test_outcome_of_the_verifier(case: dict[str, Any], server: ChatServer) -> None:
    verdict = asked(server, case, "reference").verify(case["solution"], case["ground_truth"])
    assert verdict.correct is case["result"]
    assert len(server.seen) == case["requests"]


@each("case", VERIFIER.get("calls", []), ids=shown("solution", "ground_truth", "server"))
def test_the_strict_verifier_differs_only_where_nothing_was_said(case: dict[str, Any], server: ChatServer) -> None:
    """The same verdict where there is one; none where the published one was made of an error."""
    published = asked(server, case, "reference").verify(case["solution"], case["ground_truth"])
    strict = asked(server, case, "strict").verify(case["solution"], case["ground_truth"])
    if published.error is None:
        assert (strict.correct, strict.error) == (case["result"], None)
    elif len(case["server"]) <= case["requests"]:  # else strict mode may ask until there is a verdict
        assert strict.correct is None and strict.error


FIRST = [case for case in VERIFIER.get("calls", []) if case["requests"]][:1] if "first_request" in VERIFIER else []


@each("case", FIRST, ids=lambda _: "first")
@pytest.mark.parametrize("mode", ["strict", "reference"])
def test_first_request_of_the_verifier(case: dict[str, Any], mode: str, server: ChatServer) -> None:
    """To the byte: the fields in the recorded order."""
    expected = VERIFIER["first_request"]
    asked(server, case, mode, expected["body"]["model"]).verify(case["solution"], case["ground_truth"])
    seen = server.seen[0]
    assert seen["path"] == expected["path"]
    assert seen["key"] == expected["authorization"].replace("<OPENAI_API_KEY>", KEY)
    assert json.loads(seen["data"]) == expected["body"]
    assert seen["data"] == json.dumps(expected["body"], ensure_ascii=False, separators=(",", ":")).encode()


@each("outcome", [VERIFIER["no_api_key"]] if "no_api_key" in VERIFIER else [])
def test_a_verifier_without_key(outcome: str, tmp_path: Any) -> None:
    assert outcome.startswith("raises")
    with pytest.raises(VerifierError, match="OPENAI_API_KEY is not set"):
        verifier_settings(tmp_path, environ={})
