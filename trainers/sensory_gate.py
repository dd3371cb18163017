"""The curriculum sensory gate of LaViT (arXiv 2601.10129): how far the answer may look at the image in a step.

The log of the gate is added to the attention of answer rows on image tokens, in every layer and head. It opens over
the first steps of a run. Nothing of it exists in the published code.
"""

import math


def gate_gamma(step: int, gate_steps: int, floor: float) -> float:
    """`floor + (1 - floor) / 2 * (1 - cos(pi * step / gate_steps))` before `gate_steps`, then 1 (card, section 4.6).

    Args:
        step: optimizer steps that are done, from 0.
        gate_steps: steps after which the gate is open; 0: it is open from the beginning. Published: 400.
        floor: the gate at step 0, above 0. Published: 1e-6, that is -13.8 on the logits.

    Raises:
        ValueError: names argument, value and remedy.

    Example:
        >>> [round(gate_gamma(step, 400, 1e-6), 6) for step in (0, 100, 200, 400, 999)]
        [1e-06, 0.146447, 0.5, 1.0, 1.0]
    """
    for name, value in (("step", step), ("gate_steps", gate_steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name}={value!r} must be an integer, 0 or more")
    if not 0 < floor <= 1:
        raise ValueError(f"gate_floor={floor!r} must be above 0, up to 1: its log is added to the attention")
    if step >= gate_steps:
        return 1.0
    return floor + (1 - floor) / 2 * (1 - math.cos(math.pi * step / gate_steps))


__all__ = ["gate_gamma"]
