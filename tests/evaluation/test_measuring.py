"""Paired measurements: order and counts of the runs, ratios and bars, clocks, memory and time of fresh processes."""

import json
import sys
import time

import pytest
import torch

from evaluation.measuring import (
    Clock,
    Ratio,
    StepClock,
    fresh_process,
    peak_memory,
    processor_seconds,
    take_turns,
)

CPU = Clock(torch.device("cpu"), "cpu")


def test_arms_take_turns_in_alternating_order() -> None:
    order: list[str] = []
    arms = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    taken = take_turns(arms, repeats=2, clock=CPU, warmup=1)
    assert "".join(order) == "abc" + "cba" + "abc"
    assert taken == {"a": [6.0, 7.0], "b": [5.0, 8.0], "c": [4.0, 9.0]}


def test_an_arm_that_returns_nothing_is_timed() -> None:
    def work() -> None:
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    taken = take_turns({"work": work, "sleep": lambda: time.sleep(0.05)}, repeats=2, clock=CPU, warmup=0)
    assert min(taken["work"]) >= 0.02 > max(taken["sleep"])  # processor time does not count waiting


def test_ratio_of_medians_spread_and_bar() -> None:
    values = [[2.0, 4.0, 6.0, 8.0, 100.0], [1.0, 2.0, 3.0, 4.0, 5.0]]
    line = Ratio("a / b", *values, bar=2.0)
    assert line.ratio == 2.0 and line.spread == (2.0, 2.0) and line.met
    assert not Ratio("a / b", *values, bar=1.99).met
    assert Ratio("a / b", *values, bar=2.0, at_least=True).met and not Ratio("a / b", *values, 2.1, at_least=True).met
    assert Ratio("a / b", *values).met is None
    assert Ratio("a / b", [3.0, 1.0], [1.0, 2.0]).spread == (0.5, 3.0)
    assert "2.000 [2.000, 2.000]  <= 1.99 NOT MET" in Ratio("a / b", *values, bar=1.99).line()
    record = json.loads(json.dumps(line.record()))
    assert record["first"] == values[0] and (record["ratio"], record["bar"], record["met"]) == (2.0, 2.0, True)


def test_the_clock_of_several_threads_is_the_wall() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert Clock.of("cpu").kind == "cpu" and Clock.of("cuda").kind == "wall"
        torch.set_num_threads(2)
        assert Clock.of("cpu").kind == "wall"
    finally:
        torch.set_num_threads(threads)


def test_median_step_leaves_out_prompt_and_first_steps() -> None:
    clock = StepClock(CPU)
    clock.moments = [0.0, 5.0, 9.0, 10.0, 11.0, 13.0, 14.0, 15.0]
    assert clock.median_step() == 1.0
    clock.put(torch.zeros(1))
    assert len(clock.moments) == 9


def test_peak_memory_of_a_fresh_process() -> None:
    code = (
        "import json, torch; from evaluation.measuring import peak_memory; before = peak_memory('cpu');"
        "block = torch.ones(16, 2**20); del block; print('noise'); print(json.dumps(peak_memory('cpu') - before))"
    )
    assert 60 <= fresh_process(["-c", code]) <= 80  # 64 MiB, and it stays a peak when they are freed
    assert peak_memory("cpu") > 50


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="(?s)ended with 1:.*ZeroDivisionError"):
        fresh_process(["-c", "1 / 0"])


def test_processor_seconds_of_a_process() -> None:
    idle, busy = (processor_seconds(f"x = sum(range({n}))") for n in (10, 3 * 10**7))
    assert 0 < idle < busy and sys.executable
