"""Rewards: the recommended ones against the published ones, finding them, and errors that name function and sample."""

import asyncio
import math
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.utils import get_callable_name, is_async_callable

import trainers.rewards
from trainers.data.maze_planning import Maze, shortest_plan
from trainers.data.mazes import maze_record
from trainers.data.records import record_to_row
from trainers.reward_loading import RewardError, checked_reward, discover_rewards, load_rewards
from trainers.rewards import (
    accuracy_reward,
    completion_text,
    format_reward,
    letter_reward,
    maze_reward,
    span_format_reward,
    system_prompt,
    verified_accuracy_reward,
)

SPAN = "<|lvr_start|><|lvr|><|lvr|><|lvr_end|>"


def in_tags(*texts: str) -> list[str]:
    return [f"{SPAN}<answer>{text}</answer>" for text in texts]


# Functions


@pytest.mark.parametrize(
    ("given", "gold", "right", "published"),
    [
        ("12", "12", 1, 1),
        ("1,000", "1000", 1, 0),
        ("50%", "0.5", 1, 0),
        ("1/2", "0.50", 1, 0),
        ("1e3", "1000", 1, 0),
        ("-3", "3", 0, 0),
        ("12 cm", "12 m", 0, 0),
        ("12 cm", "12  CM", 1, 0),
        ("Blue  car.", "blue car", 1, 0),
        ("$\\frac12$", "0.5", 1, 0),
        ("\\frac{1}{2}", "0.5", 1, 0),
        ("$\\sqrt{2}$", "$2^{1/2}$", 1, 1),
        ("$(1,2)$", "$1<x<2$", 1, 0),
        ("$1<x<2$", "$(1,2)$", 0, 1),
        ("\\boxed{4}", "3", 0, 0),
        ("", "", 1, 1),
        ("1/0", "1", 0, 0),
    ],
)
def test_accuracy_recommended_and_published(given: str, gold: str, right: int, published: int) -> None:
    pytest.importorskip("math_verify")
    assert verified_accuracy_reward(in_tags(given), answer=[gold]) == [right]
    assert verified_accuracy_reward(in_tags(given), answer=[f"<answer>{gold}</answer>"]) == [right]
    assert accuracy_reward(in_tags(given), assistant=[f"<answer>{gold}</answer>"]) == [published]


def test_accuracy_reads_the_last_closed_answer_and_works_in_a_thread() -> None:
    pytest.importorskip("math_verify")
    texts = ["4", "<answer>4", "<answer>1</answer><answer>4</answer>", "<answer>$\\frac{8}{2}$</answer>"]
    assistant = [{"role": "assistant", "content": "<answer>4</answer>"}] * 4
    got: list[list[float]] = []
    thread = threading.Thread(target=lambda: got.append(verified_accuracy_reward(texts, assistant=assistant)))
    thread.start()
    thread.join()
    assert got == [[0, 0, 1, 1]] == [verified_accuracy_reward(texts, assistant=[[m] for m in assistant])]


def test_letters() -> None:
    texts = [*in_tags("B", "(b)", "A or B", "a cat", "C"), "B", "<answer>B"]
    choices = [["a dog", "a cat", "a cow"]] * len(texts)
    assert letter_reward(texts, answer=["B"] * len(texts), choices=choices) == [1, 1, 0, 1, 0, 0, 0]
    assert letter_reward(texts, answer=["<answer>B</answer>"] * len(texts)) == [1, 1, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="label 'blue' is not one of the option letters"):
        letter_reward(in_tags("B"), answer=["blue"])


@pytest.mark.parametrize(
    ("text", "span_format", "published"),
    [
        (f"{SPAN}<answer>4</answer>", 1, 1),
        (f"Look: {SPAN}\nSo it is\n<answer>\n4\n</answer>\n", 1, 0),
        (f"{SPAN} and {SPAN}<answer>4</answer>", 1, 1),
        ("<|laser_start|><|laser|><|laser_end|><answer>4</answer>", 1, 0),
        (f"{SPAN}<answer>1</answer><answer>2</answer>", 0, 1),
        (f"<answer>1</answer>{SPAN}<answer>2</answer>", 0, 0),
        (f"{SPAN}<answer>4</answer> because", 0, 0),
        (f"{SPAN}<answer>4", 0, 0),
        ("<|lvr_start|><|lvr|><answer>4</answer>", 0, 0),
        ("<|lvr_start|><|laser_end|><answer>4</answer>", 0, 0),
        ("<|vision_start|><|vision_end|><answer>4</answer>", 0, 0),
        ("<answer>4</answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_format_recommended_and_published(text: str, span_format: int, published: int) -> None:
    conversation = [{"role": "assistant", "content": text}]
    assert span_format_reward([text, conversation]) == [span_format] * 2
    assert format_reward([text, conversation]) == [published] * 2


def test_maze_reward_follows_the_plan() -> None:
    maze = Maze.from_rows(["@_#", "#_*", "___"])
    record = maze_record(maze)
    plan = " ".join(shortest_plan(maze))
    texts = [*in_tags(plan, "R D R", "R R", "D", ""), f"{SPAN}no idea"]
    metas = [record["meta"], record_to_row(record)["meta"]] * 3
    assert maze_reward(texts, meta=metas) == [1, 1, 0, 0, 0, 0]


def test_solutions_need_a_column() -> None:
    with pytest.raises(ValueError, match="needs a column 'answer' .* or 'assistant'"):
        verified_accuracy_reward(in_tags("4"))
    with pytest.raises(ValueError, match="is neither a text nor a list of messages"):
        completion_text([{"role": "assistant", "content": [{"type": "text"}]}])


def test_system_prompts() -> None:
    assert system_prompt("default") == "You are a helpful assistant." and system_prompt("none") is None
    assert "<answer>" in system_prompt("answer") and system_prompt("Think in pictures.") == "Think in pictures."
    with pytest.raises(ValueError, match=r"unknown system_prompt 'lvr'; choose one of \['answer', 'default'"):
        system_prompt("lvr")


# Finding


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return str(path)


MODULE = """
    import functools
    from operator import itemgetter as builtin_reward
    from trainers.rewards import format_reward

    ratio_reward = 0.5

    def zeta_reward(completions, **columns):
        return [1.0] * len(completions)

    def helper(completions):
        return 0

    def logged(function):
        @functools.wraps(function)
        def inner(*args, **columns):
            return function(*args, **columns)
        return inner

    @logged
    def alpha_reward(completions, **columns):
        return [0.0] * len(completions)

    async def slow_reward(completions, **columns):
        return [2.0] * len(completions)
"""


def test_discovery_in_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "mine.py", MODULE)
    found = discover_rewards(path)
    assert [function.__name__ for function in found] == ["zeta_reward", "alpha_reward", "slow_reward"]
    assert "builtin_reward, format_reward, ratio_reward not used as rewards" in caplog.text
    assert [function.__name__ for function in load_rewards(f"{path}:alpha_reward")] == ["alpha_reward"]
    assert discover_rewards(path)[0] is found[0]  # one module, one state
    zeta, _, slow = load_rewards(path)
    assert zeta(completions=["a", "b"], prompts=["p", "p"]) == [1.0, 1.0] and get_callable_name(zeta) == "zeta_reward"
    assert is_async_callable(slow) and asyncio.run(slow(completions=["a"])) == [2.0]


def test_discovery_in_modules() -> None:
    published = ["accuracy_reward", "format_reward"]
    recommended = ["verified_accuracy_reward", "letter_reward", "span_format_reward", "maze_reward"]
    for source in ("trainers.rewards", trainers.rewards):
        assert [function.__name__ for function in discover_rewards(source)] == published + recommended
    chosen = load_rewards(["maze_reward", "trainers.rewards:span_format_reward"])
    assert [function.__name__ for function in chosen] == ["maze_reward", "span_format_reward"]


def test_sources_without_rewards_are_refused(tmp_path: Path) -> None:
    empty = write(tmp_path, "empty.py", "from trainers.rewards import format_reward\n\ndef score():\n    return 0\n")
    with pytest.raises(RewardError, match=r"empty.py defines no function whose name ends with '_reward' \(format_rew"):
        discover_rewards(empty)
    broken = write(tmp_path, "broken.py", "import no_such_library\n")
    for _ in range(2):  # the second time too
        with pytest.raises(RewardError, match="broken.py' cannot be imported .*No module named 'no_such_library'"):
            discover_rewards(broken)
    with pytest.raises(RewardError, match="does not exist"):
        discover_rewards(str(tmp_path / "absent.py"))
    with pytest.raises(RewardError, match="'no_such_module' cannot be imported"):
        load_rewards("no_such_module")
    with pytest.raises(RewardError, match="has no reward function 'speed_reward'; choose one of"):
        load_rewards("speed_reward")
    with pytest.raises(RewardError, match=r"named twice: \['maze_reward'\]"):
        load_rewards(["maze_reward", "trainers.rewards"])
    with pytest.raises(RewardError, match="no reward function was named"):
        load_rewards([])


def test_a_missing_library_is_refused_before_training(tmp_path: Path) -> None:
    text = "def a_reward(completions, **c):\n    return [0]\n\na_reward.requires = ('no_such_library',)\n"
    path = write(tmp_path, "needs.py", text)
    with pytest.raises(RewardError, match="a_reward needs no-such-library, which is not installed: pip install"):
        load_rewards(path)


def test_without_math_verify_only_what_needs_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert verified_accuracy_reward(in_tags("12"), answer=["12.0"]) == [1]
    for call in (
        lambda: accuracy_reward(in_tags("12"), assistant=["12"]),
        lambda: verified_accuracy_reward(in_tags("\\frac12"), answer=["0.5"]),
    ):
        with pytest.raises(ImportError, match="pip install math-verify"):
            call()


# Checking


def reward_of(values: Any) -> Any:
    def some_reward(completions: list[str], **columns: Any) -> Any:
        return values

    return checked_reward(some_reward)


@pytest.mark.parametrize("values", [[1, None, True], (1.0, None, 1.0), [torch.tensor(1.0), None, 1.0]])
def test_good_rewards_become_numbers(values: Any) -> None:
    assert reward_of(values)(completions=["a", "b", "c"]) == [1.0, None, 1.0]
    assert reward_of(torch.tensor([1.0, 2.0]))(["a", "b"]) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "'some_reward' returned 2 rewards for 3 completions"),
        (None, "'some_reward' returned NoneType; return a list of numbers"),
        (1.0, "'some_reward' returned float"),
        ("abc", "'some_reward' returned str"),
        ([1.0, math.nan, 0.0], r"'some_reward' returned nan for sample 1 \(id 'row-1'\), completion 'b'"),
        ([math.inf, 0.0, 0.0], r"'some_reward' returned inf for sample 0"),
        ([0.0, 0.0, "1"], r"'some_reward' returned '1' for sample 2"),
        ([0.0, [1.0], 0.0], r"'some_reward' returned \[1.0\] for sample 1"),
        (torch.tensor([0.0, 0.0, math.nan]), "'some_reward' returned nan for sample 2"),
    ],
)
def test_bad_rewards_name_the_function_and_the_sample(values: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        reward_of(values)(completions=["a", "b", "c"], id=["row-0", "row-1", "row-2"])


def division_reward(completions: list[str], weight: list[float], scale: float, **columns: Any) -> list[float]:
    return [scale / value for value in weight]


def test_a_reward_that_raises_names_the_function_and_the_sample() -> None:
    with pytest.raises(RewardError, match="'division_reward' raised ZeroDivisionError") as caught:
        checked_reward(division_reward)(
            completions=["a", "b" * 500], weight=[1.0, 0.0], scale=1.0, id=["row-0", "row-1"], log_extra=print
        )
    assert "sample 1 (id 'row-1'), completion 'bbb" in str(caught.value) and len(str(caught.value)) < 300
    assert isinstance(caught.value.__cause__, ZeroDivisionError)

    async def slow_reward(completions: list[str], **columns: Any) -> list[float]:
        return [1 / (len(text) - 1) for text in completions]

    with pytest.raises(RewardError, match="'slow_reward' raised ZeroDivisionError.*sample 1, completion 'b'"):
        asyncio.run(checked_reward(slow_reward)(completions=["aa", "b"]))

    def crowd_reward(completions: list[str], **columns: Any) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(RewardError, match="RuntimeError: too many; for a batch of 2, and no sample of it alone"):
        checked_reward(crowd_reward)(completions=["a", "b"])
