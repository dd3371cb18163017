"""The verdict of a card by the rule of the specification, section 7.

    harmful    without the span the model is significantly better
    presence   noise in the slots is as good as the slots, no span is significantly worse
    inert      noise, another item's slots, hidden slots and empty markers are all equivalent to the clean run
    content    noise and another item's slots are significantly worse, the oracle is not worse
    undecided  anything else, with the premises that are open

"Significantly" is McNemar's exact test after Holm's correction over the conditions of the card, "equivalent" two
one-sided tests within the margin. The first label of the list that holds is given.
"""

from collections.abc import Mapping

from .card_data import Effect, Verdict

ROLES = {
    "noise": "gauss_norm",
    "swap": "shuffle_items",
    "mask": "all⇸L",
    "empty": "markers_only",
    "off": "no_span",
    "oracle": "oracle",
}
SENTENCES = {
    "harmful": "harmful: the model is better without its latents",
    "presence": "presence: that there are latents matters, what is in them does not",
    "inert": "inert: neither the latents nor what is in them matters",
    "content": "content: the answer depends on what is in the latents",
}


def verdict_of(effects: Mapping[str, Effect], margin: float = 2.0, roles: Mapping[str, str] | None = None) -> Verdict:
    """The verdict on the effects of a card.

    Args:
        effects: by name of the condition.
        margin: of equivalence, points.
        roles: which condition plays which role of `ROLES`; methods without markers have stand-ins.
    """
    roles = {**ROLES, **(roles or {})}
    found = {role: effects.get(name) for role, name in roles.items()}
    missing = [f"{role} ({roles[role]})" for role, effect in found.items() if effect is None and role != "oracle"]
    reasons = [_reason(role, effect) for role, effect in found.items() if effect is not None]
    label = _label(found)
    if label is None:
        why = _open_premises(found, margin, missing)
        return Verdict("undecided", f"undecided: {why}", reasons, missing)
    return Verdict(label, SENTENCES[label], reasons, missing)


def _worse(effect: Effect | None) -> bool:
    return effect is not None and effect.significant and effect.delta < 0


def _better(effect: Effect | None) -> bool:
    return effect is not None and effect.significant and effect.delta > 0


def _equal(effect: Effect | None) -> bool:
    return effect is not None and effect.equivalent


def _label(found: Mapping[str, Effect | None]) -> str | None:
    if _better(found["off"]):
        return "harmful"
    if _equal(found["noise"]) and _worse(found["off"]):
        return "presence"
    if all(_equal(found[role]) for role in ("noise", "swap", "mask", "empty")):
        return "inert"
    if _worse(found["noise"]) and _worse(found["swap"]) and not _worse(found["oracle"]):
        return "content"
    return None


def _reason(role: str, effect: Effect) -> str:
    """A premise with its numbers."""
    state = "equivalent" if effect.equivalent else "significantly worse" if _worse(effect) else (
        "significantly better" if _better(effect) else "not decided"
    )  # fmt: skip
    return (
        f"{role} ({effect.name}): {effect.delta:+.1f} [{effect.low:+.1f}, {effect.high:+.1f}] points, n={effect.n}, "
        f"p={effect.p_holm:.2g} (Holm), equivalence p={effect.p_equivalence:.2g}: {state}"
    )


def _open_premises(found: Mapping[str, Effect | None], margin: float, missing: list[str]) -> str:
    if missing:
        return f"the card lacks {', '.join(missing)}"
    open_ones = [e for role, e in found.items() if role != "oracle" and e is not None
                 and not (e.equivalent or e.significant)]  # fmt: skip
    names = ", ".join(effect.name for effect in open_ones)
    weakest = max(open_ones, key=lambda effect: effect.mde, default=None)
    if weakest is not None and weakest.mde > margin:
        return (
            f"{names} neither different nor equivalent at n={weakest.n} (effects below {weakest.mde:.1f} points would "
            f"not be found, the margin is {margin:g}); use more items"
        )
    if open_ones:
        return f"{names} neither different nor equivalent; use more items"
    parts = [f"{e.name} {e.delta:+.1f}" for e in found.values() if e is not None]
    return f"the premises of no verdict hold together ({', '.join(parts)})"


__all__ = ["ROLES", "SENTENCES", "verdict_of"]
