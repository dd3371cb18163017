"""The LLM verifier: settings, replies, failures that are no wrong answers, verdicts of earlier runs, whole files."""

import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.verifier import (
    DEFAULT_MODEL,
    DEFAULT_URL,
    LLMVerifier,
    VerdictFile,
    VerifierError,
    VerifierSettings,
    read_verdict,
    verifier_settings,
    verifier_summary,
)
from tests.chat_server import ChatServer, Reply
from trainers.data.chat_client import Judgement

YES, NO = '{"equivalent": true}', '{"equivalent": false}'


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = ChatServer(YES)
    yield made
    made.close()


def verifier(server: ChatServer, **options: Any) -> LLMVerifier:
    options = {"wait": 0.0, "retries": 1, **options}
    return LLMVerifier(VerifierSettings("a secret key", server.url, "tiny"), **options)


# Settings -----------------------------------------------------------------------------------------------------------


def test_settings_of_the_environment(tmp_path: Path) -> None:
    environ = {"OPENAI_API_KEY": "k", "OPENAI_API_BASE_URL": "http://h/v1", "MODEL_TYPE": "m"}
    assert verifier_settings(tmp_path, environ) == VerifierSettings("k", "http://h/v1", "m")
    assert verifier_settings(tmp_path, {"OPENAI_API_KEY": "k"}) == VerifierSettings("k", DEFAULT_URL, DEFAULT_MODEL)


def test_settings_of_a_file_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text(
        "# the verifier\n\nexport OPENAI_API_KEY='of # the file'\nOPENAI_API_BASE_URL = http://file/v1  # ours\n"
        'MODEL_TYPE="file model"\nMODEL_TYPE=later\nHF_TOKEN=hf_other\n#MODEL_TYPE=x\nnonsense\n',
        encoding="utf-8",
    )
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    expected = VerifierSettings("of # the file", "http://file/v1", "file model")
    assert verifier_settings(below, {}) == expected
    monkeypatch.chdir(below)
    for name in ("OPENAI_API_KEY", "OPENAI_API_BASE_URL", "MODEL_TYPE"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    assert verifier_settings() == expected and dict(os.environ) == before
    monkeypatch.setenv("MODEL_TYPE", "of the environment")
    assert verifier_settings().model == "of the environment"
    (below / ".env").write_text("OPENAI_API_KEY=nearer\n", encoding="utf-8")  # the first one found, and no other
    assert verifier_settings() == VerifierSettings("nearer", DEFAULT_URL, "of the environment")


@pytest.mark.parametrize("content", [None, "", "OPENAI_API_KEY=\n", "OPENAI_API_KEY= # none\n", "MODEL_TYPE=m\n"])
def test_without_a_key_it_says_what_to_set(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / ".env").write_text(content, encoding="utf-8")
    where = "no .env file here or above" if content is None else r"nor in .*\.env"
    with pytest.raises(VerifierError, match=rf"OPENAI_API_KEY is not set, .*{where}.*OPENAI_API_KEY=\.\.\. into"):
        verifier_settings(tmp_path, {"OPENAI_API_BASE_URL": "http://h/v1", "HF_TOKEN": "hf_of_the_user"})


def test_an_empty_variable_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("OPENAI_API_KEY=k\n", encoding="utf-8")
    with pytest.raises(VerifierError, match="OPENAI_API_KEY is not set"):
        verifier_settings(tmp_path, {"OPENAI_API_KEY": ""})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"OPENAI_API_KEY=\xff\n")
    with pytest.raises(VerifierError, match=r"\.env cannot be read .*; repair it or move it away"):
        verifier_settings(tmp_path, {})


def test_the_key_is_not_shown() -> None:
    assert "secret" not in repr(VerifierSettings("secret"))


def test_a_token_of_the_hub_is_no_key(server: ChatServer) -> None:
    message = "OPENAI_API_KEY holds a token of the Hub, and OPENAI_API_BASE_URL is a server at 127.0.0.1"
    with pytest.raises(ValueError, match=message):
        LLMVerifier(VerifierSettings("hf_of_the_user", server.url))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "laser"}, "unknown verifier mode 'laser'"),
        ({"retries": -1}, "retries=-1"),
        ({"workers": 0}, "workers=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"give_up": 0}, "give_up=0"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLMVerifier(VerifierSettings("k"), **options)


def test_an_address_without_scheme() -> None:
    with pytest.raises(ValueError, match="OPENAI_API_BASE_URL: 'localhost:8000/chat/completions' is no address"):
        LLMVerifier(VerifierSettings("k", "localhost:8000"))


# Replies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        (YES, True),
        (NO, False),
        ('{"equivalent": "TRUE"}', True),
        ('{"equivalent": "off"}', False),
        ('{"equivalent": 1.0}', True),
        ('{"equivalent": 0}', False),
        ('{"equivalent": 2}', None),
        ('{"equivalent": "true "}', None),
        ('{"equivalent": null}', None),
        ('{"equivalent": []}', None),
        ('{"Equivalent": true}', None),
        ('{"equivalent": true', None),
        (YES + " I think", None),
        ("[true]", None),
        ("true", None),
        ("", None),
        ("[" * 100_000, None),
    ],
)
def test_what_counts_as_a_verdict(reply: str, verdict: bool | None) -> None:
    assert read_verdict(reply) is verdict


def test_the_answers_are_sent_as_they_are(server: ChatServer) -> None:
    assert verifier(server).verify("{0} {truth} é\n", 12) == Judgement(True, YES)
    (seen,) = server.seen
    assert seen["key"] == "Bearer a secret key" and seen["path"] == "/v1/chat/completions"
    assert seen["text"].endswith("Candidate answer: {0} {truth} é\n\n\nGround truth: 12\n\n")


@pytest.mark.parametrize(("candidate", "truth"), [("", "B"), ("B", ""), (None, "B"), ("B", None), (" \n", "B")])
def test_nothing_to_compare_is_wrong_and_not_asked(server: ChatServer, candidate: str | None, truth: str) -> None:
    assert verifier(server).verify(candidate, truth) == Judgement(False) and not server.seen


# Failures -----------------------------------------------------------------------------------------------------------

HTML = Reply(raw=b"<!DOCTYPE html><title>Log in</title>", headers={"Content-Type": "text/html"})
SHORT = Reply(raw=b'{"choices": [{"message": {"content": "{')
FAILURES = [
    # what the server does, tries of two that are allowed, words of the message
    (Reply("wait", 429), 2, r"status 429 \(wait\): too many requests, or no quota left"),
    (Reply("oops", 500), 2, r"status 500 \(oops\): the server failed; look at its log"),
    (Reply(raw=b"", status=503), 2, r"status 503: the server failed"),
    (Reply("no such field", 400), 1, r"status 400 \(no such field\): does the server know the model 'tiny' and the "),
    (Reply("bad a secret key", 401), 1, r"status 401 \(bad \*\*\*\): is the key in OPENAI_API_KEY right\?"),
    (
        Reply(raw=b'{"detail": "Not Found"}', status=404),
        1,
        r"status 404 \(Not Found\): is the model's name right, and",
    ),
    (HTML, 1, r"a web page instead of JSON \(<!DOCTYPE html>.*: is OPENAI_API_BASE_URL the address of the API"),
    (SHORT, 2, r"is no JSON \({\"choices\""),
    (Reply(raw=b""), 2, r"is no JSON \(empty\)"),
    (Reply(YES, lost=20), 2, r"broke off after \d+ bytes"),
    (Reply(raw=b'{"object": "list"}'), 2, r"is no chat completion \({\"object\": \"list\"}\)"),
    (Reply(raw=b"[" * 100_000), 2, r"is no JSON"),
    (Reply(hang_up=True), 2, r"cannot be reached \(.*\): is the server running"),
    (Reply(YES, delay=1.0), 2, r"did not answer within 0.2 s: is the server overloaded\?"),
    (Reply(YES, drip=0.05), 2, r"did not answer within 0.2 s"),
    (Reply(None, message={"refusal": "I cannot."}), 1, r"no verdict: the model refused: I cannot\.; does the server"),
    (Reply(None, finish="content_filter"), 1, r"holds no text \(finish_reason 'content_filter'\)"),
    (
        Reply('{"equival', finish="length"),
        2,
        r"its reply is '{\"equival', not .* \(the reply was cut off at its limit",
    ),
    (
        Reply("True"),
        2,
        r"its reply is 'True', not {'equivalent': true or false}; does the server know response_format",
    ),
]


@pytest.mark.parametrize(("reply", "tries", "message"), FAILURES, ids=[message[:30] for _, _, message in FAILURES])
def test_a_failure_is_no_wrong_answer(
    server: ChatServer, reply: Reply, tries: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.replies = [reply]
    with caplog.at_level(logging.WARNING):
        verdict = verifier(server, timeout=0.2 if reply.delay or reply.drip else 5.0).verify("B", "B")
    assert verdict.correct is None and len(server.seen) == tries
    assert re.search(rf"'tiny' gave no verdict in {tries} tries; .*{message}", verdict.error), verdict.error
    assert server.url in verdict.error and "secret" not in verdict.error and "\n" not in verdict.error
    assert "counted as unverified" in caplog.text


@pytest.mark.parametrize(
    ("reply", "tries", "message"), FAILURES[:4], ids=[message[:30] for _, _, message in FAILURES[:4]]
)
def test_in_reference_mode_it_is_one_and_the_reason_is_kept(
    server: ChatServer, reply: Reply, tries: int, message: str
) -> None:
    server.replies = [reply]
    verdict = verifier(server, mode="reference").verify("B", "B")
    assert verdict.correct is False and re.search(message, verdict.error) and len(server.seen) == tries


def test_a_reply_without_verdict_is_asked_again_in_strict_mode_only(server: ChatServer) -> None:
    server.replies = ["not json", YES]
    assert verifier(server, mode="reference").verify("B", "B").correct is False
    server.replies = ["not json", YES]
    assert verifier(server).verify("B", "B") == Judgement(True, YES)
    assert len(server.seen) == 3


def test_pauses_double(server: ChatServer) -> None:
    server.replies, pauses = [500, 429, YES], []
    assert verifier(server, retries=None, wait=0.5, sleep=pauses.append).verify("B", "B").correct is True
    assert pauses == [0.5, 1.0]


def test_a_server_that_is_down() -> None:
    with socket.socket() as free:  # a port without a listener
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        verdict = LLMVerifier(VerifierSettings("k", url), wait=0.0, retries=1).verify("B", "B")
    assert verdict.correct is None
    message = rf"{url}/chat/completions cannot be reached \(.*refused\): .* is OPENAI_API_BASE_URL its address\?"
    assert re.search(message, verdict.error), verdict.error


def test_a_name_that_does_not_exist() -> None:
    settings = VerifierSettings("k", "http://no-such-host.invalid/v1")
    verdict = LLMVerifier(settings, wait=0.0, retries=0, timeout=10.0).verify("B", "B")
    assert verdict.correct is None and "no-such-host.invalid/v1/chat/completions" in verdict.error


def test_offline_mode_of_the_hub_does_not_matter(server: ChatServer) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert verifier(server).verify("B", "B").correct is True


# Many pairs ---------------------------------------------------------------------------------------------------------


def says_what_is_equal(text: str) -> str:
    candidate, truth = re.fullmatch(r"(?s).*Candidate answer: (.*)\n\nGround truth: (.*)\n\n", text).groups()
    return YES if candidate == truth else NO


def test_verdicts_come_in_the_order_of_the_pairs_and_equal_pairs_are_asked_once(server: ChatServer) -> None:
    def slowly(text: str) -> Reply:
        return Reply(says_what_is_equal(text), delay=0.05 if "answer: 0\n" in text else 0.0)

    server.replies = [slowly]
    candidates = [str(i % 10) for i in range(40)]
    truths = [str(i % 10) if i % 3 else "x" for i in range(40)]
    verdicts = verifier(server, workers=5)(candidates, truths)
    assert [verdict.correct for verdict in verdicts] == [bool(i % 3) for i in range(40)]
    assert len(server.seen) == len(set(zip(candidates, truths, strict=True))) == 20


def test_requests_run_side_by_side_up_to_the_number_of_workers(server: ChatServer) -> None:
    lock, running, most = threading.Lock(), 0, 0

    def count(text: str) -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return YES

    server.replies = [count]
    verifier(server, workers=3)([str(i) for i in range(9)], ["x"] * 9)
    assert most == 3


def test_as_many_truths_as_candidates(server: ChatServer) -> None:
    with pytest.raises(ValueError, match="shorter"):
        verifier(server)(["a", "b"], ["a"])


def test_after_some_failures_in_a_row_the_rest_is_not_asked(server: ChatServer) -> None:
    server.replies = [500]
    verdicts = verifier(server, retries=0, workers=1, give_up=3)([str(i) for i in range(10)] + [""], ["x"] * 11)
    assert [verdict.correct for verdict in verdicts] == [None] * 10 + [False]
    assert len(server.seen) == 3
    assert re.search("not asked, because 3 pairs before it failed; .*status 500", verdicts[9].error)
    server.replies = [500, 500, YES, 500, 500, YES, 500]
    assert len(verifier(server, retries=0, workers=1, give_up=3)(list("abcdef"), ["x"] * 6)) == 6
    assert len(server.seen) == 9  # never three in a row, and a new call begins anew


def test_the_reference_asks_every_pair(server: ChatServer) -> None:
    server.replies = [400]
    verdicts = verifier(server, mode="reference", give_up=3)([str(i) for i in range(10)], ["x"] * 10)
    assert [verdict.correct for verdict in verdicts] == [False] * 10 and len(server.seen) == 10


def test_failures_are_counted_apart() -> None:
    judgements = [Judgement(True), Judgement(True), Judgement(False), Judgement(None, None, "down")]
    assert verifier_summary(judgements) == {
        "total": 4,
        "correct": 2,
        "wrong": 1,
        "unverified": 1,
        "accuracy": 2 / 3,
        "errors": {"down": 1},
    }
    assert verifier_summary([])["accuracy"] is None


# Verdicts of earlier runs -------------------------------------------------------------------------------------------


def test_a_second_run_asks_nothing(server: ChatServer, tmp_path: Path) -> None:
    server.replies = [says_what_is_equal]
    path = tmp_path / "kept" / "verdicts.jsonl"
    pairs = ["é\n", "b", "", "c"], ["é\n", "x", "x", "c"]
    first = verifier(server, cache=path)(*pairs)
    assert [verdict.correct for verdict in first] == [True, False, False, True] and len(server.seen) == 3
    second = verifier(server, cache=path)
    server.close()
    assert len(second.cache) == 3
    assert [verdict.correct for verdict in second(*pairs)] == [True, False, False, True]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {"model": "tiny", "candidate": "b", "truth": "x", "equivalent": False} in rows


def test_another_model_is_asked_anew_and_failures_are_not_kept(server: ChatServer, tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    server.replies = [400]
    for mode in ("strict", "reference"):
        verifier(server, cache=path, mode=mode).verify("a", "a")
    assert path.read_bytes() == b""
    server.replies = [YES]
    verifier(server, cache=path).verify("a", "a")
    LLMVerifier(VerifierSettings("k", server.url, "other"), cache=path).verify("a", "a")
    assert len(server.seen) == 4 and len(VerdictFile(path)) == 2


def test_a_damaged_line_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "verdicts.jsonl"
    whole = VerdictFile(path)
    whole.put("m", "a", "a", True)
    kept = path.read_bytes()
    path.write_bytes(kept + b'[1]\n{"model": "m"}\n' + kept.replace(b"true", b'"yes"') + kept[:-20])  # killed
    with caplog.at_level(logging.WARNING):
        file = VerdictFile(path)
    assert "verdicts.jsonl: 4 damaged lines passed over" in caplog.text
    assert (len(file), file.get("m", "a", "a"), file.get("m", "b", "b")) == (1, True, None)
    file.put("m", "b", "b", False)
    file.put("m", "c", "c", True)
    again = VerdictFile(path)
    assert (again.get("m", "b", "b"), again.get("m", "c", "c")) == (False, True)


def test_a_path_that_holds_no_file(server: ChatServer, tmp_path: Path) -> None:
    with pytest.raises(VerifierError, match="verdicts cannot be kept in .*; name a file that may be read and written"):
        verifier(server, cache=tmp_path)


def test_a_file_that_can_no_longer_be_written_stops_no_run(
    server: ChatServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = verifier(server, cache=tmp_path / "verdicts.jsonl")
    (tmp_path / "verdicts.jsonl").unlink()
    (tmp_path / "verdicts.jsonl").mkdir()
    with caplog.at_level(logging.WARNING):
        assert made.verify("a", "a") == Judgement(True, YES)
    assert "a verdict was not kept in" in caplog.text
    assert made.verify("a", "a") == Judgement(True) and len(server.seen) == 1
