"""Judges of a teacher's answers: final answers, comparison, and a chat model behind a server on this machine."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.chat_server import ChatServer
from trainers.data.chat_client import NO_KEY
from trainers.data.maze_planning import Maze
from trainers.data.mazes import maze_record
from trainers.data.records import Record, make_record
from trainers.judges import ChatJudge, JudgeError, Judgement, MatchJudge, build_judge, final_answer

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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = ChatServer("YES")
    yield made
    made.close()


def record(name: str = "r7") -> Record:
    return make_record(name, "How many {ducks}?", "seven")


def ask(server: ChatServer, answer: str = "7 ducks", **options: Any) -> Judgement:
    judge = ChatJudge("tiny", server.url, wait=0.0, **options)
    (verdict,) = judge([record()], [answer])
    return verdict


def test_what_is_asked(server: ChatServer) -> None:
    assert ask(server, "about {7}", key="secret", max_tokens=5) == Judgement(True, "YES")
    (request,) = server.seen
    assert request["path"] == "/v1/chat/completions" and request["key"] == "Bearer secret"
    body = request["body"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0.0, 5)
    (message,) = body["messages"]
    for part in ("Question: How many {ducks}?\n", "Reference answer: seven\n", "Answer: about {7}\n", "YES or NO"):
        assert part in message["content"]


def test_no_token_of_the_hub_goes_to_a_server_without_key(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_verdicts(server: ChatServer, parse: str, reply: str, correct: bool | None, tries: int) -> None:
    server.replies = [reply]
    verdict = ask(server, parse=parse, failure="reject", retries=2)
    assert (verdict.correct, verdict.reply, len(server.seen)) == (correct, reply, tries)


def test_a_failure_is_tried_again_after_a_pause(server: ChatServer) -> None:
    server.replies, pauses = [500, "perhaps", 429, "NO"], []
    judge = ChatJudge("tiny", server.url, wait=0.5, sleep=pauses.append)
    assert judge([record()], ["x"]) == [Judgement(False, "NO")]
    assert pauses == [0.5, 1.0, 2.0] and len(server.seen) == 4


def test_after_all_retries_it_is_an_error_or_a_rejection_and_never_a_wrong_answer(server: ChatServer) -> None:
    server.replies = [500]
    message = "'tiny' gave no verdict on record 'r7' in 2 tries; .*500.*or choose judge_failure='reject'"
    with pytest.raises(JudgeError, match=message):
        ask(server, retries=1)
    verdict = ask(server, retries=1, failure="reject")
    assert verdict.correct is None and "no verdict on record 'r7'" in verdict.error
    server.replies = ["maybe"]
    with pytest.raises(JudgeError, match="its reply is neither YES nor NO: 'maybe'"):
        ask(server, retries=0)
    server.close()
    with pytest.raises(JudgeError, match="record 'r7' in 1 tries"):
        ask(server, retries=0)


def test_an_error_that_cannot_pass_is_not_tried_again(server: ChatServer) -> None:
    server.replies = [401]
    with pytest.raises(JudgeError, match=r"in 1 tries; .*status 401 \(broken\): is the key in judge_key_env right\?"):
        ask(server, retries=3)
    assert len(server.seen) == 1


def test_verdicts_come_in_the_order_of_the_answers(server: ChatServer) -> None:
    server.replies = [lambda text: "YES" if "Answer: right" in text else "NO"]
    answers = ["right" if i % 3 else "wrong" for i in range(20)]
    verdicts = ChatJudge("tiny", server.url, workers=5)([record(f"r{i}") for i in range(20)], answers)
    assert [each.correct for each in verdicts] == [bool(i % 3) for i in range(20)] and len(server.seen) == 20


def test_an_empty_answer_is_wrong_without_a_question(server: ChatServer) -> None:
    assert ask(server, " \n") == Judgement(False) and not server.seen


# Options ------------------------------------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ({"judge": "chat", "model": "m", "key_env": "OUR_JUDGE_KEY"}, "HF_HUB_OFFLINE set"),
        ({"judge": "chat", "model": "m", "url": "x:8000"}, "judge_url: .* is no address"),
        (
            {"judge": "chat", "model": "m", "url": "http://x", "key_env": "OUR_JUDGE_KEY"},
            "judge_key_env holds a token of the Hub, and judge_url is a server at x",
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_JUDGE_KEY", "hf_of_the_user")
    with pytest.raises(ValueError, match=message):
        build_judge(**options)
