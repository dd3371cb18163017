"""Judges of a teacher's answers: final answers, comparison, and a chat model behind a server on this machine."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import pytest

from trainers.data.maze_planning import Maze
from trainers.data.mazes import maze_record
from trainers.data.records import Record, make_record
from trainers.judges import NO_KEY, ChatJudge, JudgeError, Judgement, MatchJudge, build_judge, final_answer

# Final answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "how", "answer"),
    [
        ("It is a duck.\n", "auto", "It is a duck."),
        ("<step>x</step>\nFINAL ANSWER:\nseven", "auto", "seven"),
        ("Move down to A2.\nTherefore, the answer is D R\n", "auto", "D R"),
        ("So <answer> B </answer> then", "auto", "B"),
        ("One.\nTwo.", "auto", "One.\nTwo."),
        ("One.\nTwo.", "published", "Two."),
        ("<step>only</step>", "published", "<step>only</step>"),  # none: the whole reply is judged
        ("Therefore, the answer is B", "published", "Therefore, the answer is B"),
        ("Therefore, the answer is B", "whole", "Therefore, the answer is B"),
        ("a <answer>b</answer> Therefore, the answer is c", "staged", "c"),
        ("a <answer>b</answer> Therefore, the answer is c", "tagged", "b"),
    ],
)
def test_final_answers(text: str, how: str, answer: str) -> None:
    assert final_answer(text, how) == answer


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown final_answer 'last'"):
        final_answer("x", "last")


# By comparison ------------------------------------------------------------------------------------------------------


def right(answer: str, gold: str, choices: list[str] | None = None, match: str = "exact") -> bool:
    (verdict,) = MatchJudge(match)([make_record("r", "q", gold, choices=choices)], [answer])
    assert (verdict.reply, verdict.error) == (None, None)
    return verdict.correct


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("The blue kite.", "blue kite", True),
        ("blue", "blue kite", False),
        ("not a blue kite", "blue kite", False),
        ("7.0", "7", True),
        ("1,200", "1200", True),
        ("8", "7", False),
        ("-7", "7", False),
        ("No, it is not", "No", True),
        ("There is none", "No", False),
        ("", "blue", False),
        ("yes or no", "yes", False),
        ("...", "!", False),  # no words at all
    ],
)
def test_short_answers(answer: str, gold: str, expected: bool) -> None:
    assert right(answer, gold) is expected


def test_contained_answers() -> None:
    assert right("It is a blue kite over the sea", "the blue kite", match="contained")
    assert not right("blue and a kite", "blue kite", match="contained")
    assert not right("anything", "", match="contained")
    with pytest.raises(ValueError, match="unknown judge_match 'fuzzy'"):
        MatchJudge("fuzzy")


def test_options_by_letter_or_text() -> None:
    choices = ["red", "blue", "green"]
    assert right("(B)", "B", choices) and right("blue", "B", choices) and right("B", "blue", choices)
    assert not right("C", "B", choices) and not right("B or C", "B", choices)
    assert right("purple", "purple", choices) and not right("red", "purple", choices)  # no option: by words


def test_a_maze_is_judged_by_walking_it() -> None:
    record = maze_record(Maze.from_text("@__\n___\n__*"))
    judge = MatchJudge()
    answers = [record["answer"], "R R D D", "R D D R", "R R D", "left"]
    assert [each.correct for each in judge([record] * 5, answers)] == [True, True, True, False, False]


# By a chat model ----------------------------------------------------------------------------------------------------


class Server:
    """An endpoint of the OpenAI protocol; `replies` are given out in order, the last one for ever.

    A reply is a text, or the status of an error.
    """

    def __init__(self) -> None:
        self.replies: list[str | int] = ["YES"]
        self.seen: list[dict[str, Any]] = []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
                    reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                content = reply
                if reply == "echo":  # yes to those answers that say so
                    content = "YES" if "Answer: right" in body["messages"][0]["content"] else "NO"
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
                answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                data = json.dumps(answer if isinstance(reply, str) else {"error": "broken"}).encode()
                self.send_response(200 if isinstance(reply, str) else reply)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the one server is on this machine
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def record(name: str = "r7") -> Record:
    return make_record(name, "How many {ducks}?", "seven")


def ask(server: Server, answer: str = "7 ducks", **options: Any) -> Judgement:
    judge = ChatJudge("tiny", server.url, wait=0.0, **options)
    (verdict,) = judge([record()], [answer])
    return verdict


def test_what_is_asked(server: Server) -> None:
    assert ask(server, "about {7}", key="secret", max_tokens=5) == Judgement(True, "YES")
    (request,) = server.seen
    assert request["path"] == "/v1/chat/completions" and request["key"] == "Bearer secret"
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("tiny", 0.0, 5)
    (message,) = request["messages"]
    for part in ("Question: How many {ducks}?\n", "Reference answer: seven\n", "Answer: about {7}\n", "YES or NO"):
        assert part in message["content"]


def test_no_token_of_the_hub_goes_to_a_server_without_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    ask(server)
    assert server.seen[0]["key"] == f"Bearer {NO_KEY}"


@pytest.mark.parametrize(
    ("parse", "reply", "correct", "tries"),
    [
        ("strict", "No, it is not.", False, 1),
        ("strict", "**YES**", True, 1),
        ("strict", "Yesterday", None, 3),
        ("reference", "Yesterday", True, 1),
        ("reference", "**YES**", False, 1),
        ("reference", "", False, 1),
    ],
)
def test_verdicts(server: Server, parse: str, reply: str, correct: bool | None, tries: int) -> None:
    server.replies = [reply]
    verdict = ask(server, parse=parse, failure="reject", retries=2)
    assert (verdict.correct, verdict.reply, len(server.seen)) == (correct, reply, tries)


def test_a_failure_is_tried_again_after_a_pause(server: Server) -> None:
    server.replies, pauses = [500, "perhaps", 429, "NO"], []
    judge = ChatJudge("tiny", server.url, wait=0.5, sleep=pauses.append)
    assert judge([record()], ["x"]) == [Judgement(False, "NO")]
    assert pauses == [0.5, 1.0, 2.0] and len(server.seen) == 4


def test_after_all_retries_it_is_an_error_or_a_rejection_and_never_a_wrong_answer(server: Server) -> None:
    server.replies = [500]
    message = "'tiny' gave no verdict on record 'r7' in 2 tries; .*500.*or choose judge_failure='reject'"
    with pytest.raises(JudgeError, match=message):
        ask(server, retries=1)
    verdict = ask(server, retries=1, failure="reject")
    assert verdict.correct is None and "no verdict on record 'r7'" in verdict.error
    server.replies = ["maybe"]
    with pytest.raises(JudgeError, match="its reply is neither YES nor NO: 'maybe'"):
        ask(server, retries=0)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(JudgeError, match="record 'r7' in 1 tries"):
        ask(server, retries=0)


def test_verdicts_come_in_the_order_of_the_answers(server: Server) -> None:
    server.replies = ["echo"]
    answers = ["right" if i % 3 else "wrong" for i in range(20)]
    verdicts = ChatJudge("tiny", server.url, workers=5)([record(f"r{i}") for i in range(20)], answers)
    assert [each.correct for each in verdicts] == [bool(i % 3) for i in range(20)] and len(server.seen) == 20


def test_an_empty_answer_is_wrong_without_a_question(server: Server) -> None:
    assert ask(server, " \n") == Judgement(False) and not server.seen


# Options ------------------------------------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_JUDGE_KEY", "from there")
    judge = build_judge("chat", model="tiny", url=server.url, key_env="OUR_JUDGE_KEY")
    judge([record()], ["x"])
    assert server.seen[0]["key"] == "Bearer from there"
    monkeypatch.delenv("OUR_JUDGE_KEY")
    with pytest.raises(ValueError, match="judge_key_env='OUR_JUDGE_KEY': this environment variable is not set"):
        build_judge("chat", model="tiny", url=server.url, key_env="OUR_JUDGE_KEY")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": "human"}, r"unknown judge 'human'; choose one of \['match', 'chat'\]"),
        ({"judge": "match", "url": "http://x"}, "judge_url and judge_key_env are of judge='chat'"),
        ({"judge": "chat", "url": "http://x"}, "needs judge_model"),
        (
            {"judge": "chat", "model": "m"},
            "without judge_url asks the inference providers of the Hub, which need a key",
        ),
        ({"judge": "chat", "model": "m", "url": "http://x", "parse": "loose"}, "unknown judge_parse 'loose'"),
        ({"judge": "chat", "model": "m", "url": "http://x", "failure": "skip"}, "unknown judge_failure 'skip'"),
        ({"judge": "chat", "model": "m", "url": "http://x", "retries": -1}, "judge_retries=-1"),
        ({"judge": "chat", "model": "m", "url": "http://x"}, "HF_HUB_OFFLINE set"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_judge(**options)
