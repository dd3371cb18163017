"""The curriculum sensory gate: its formula, its ends, and bad arguments."""

import doctest
import math

import pytest

from trainers import sensory_gate
from trainers.sensory_gate import gate_gamma


def test_the_formula_of_the_paper() -> None:
    for step in range(0, 400, 7):
        want = 1e-6 + (1 - 1e-6) / 2 * (1 - math.cos(math.pi * step / 400))
        assert gate_gamma(step, 400, 1e-6) == pytest.approx(want, rel=1e-12)


def test_it_opens_once_and_stays_open() -> None:
    values = [gate_gamma(step, 30, 1e-6) for step in range(50)]
    assert values[0] == 1e-6 and values[30:] == [1.0] * 20
    assert all(before < after for before, after in zip(values[:30], values[1:31], strict=True))
    assert gate_gamma(0, 0, 1e-6) == 1.0 and gate_gamma(0, 30, 1.0) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 400, 1e-6), "step=-1 must be an integer, 0 or more"),
        ((0, 0.5, 1e-6), "gate_steps=0.5 must be an integer"),
        ((0, 400, 0.0), "gate_floor=0.0 must be above 0"),
        ((0, 400, 1.5), "gate_floor=1.5 must be above 0, up to 1"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate_gamma(*arguments)


def test_docstrings() -> None:
    assert doctest.testmod(sensory_gate).failed == 0
