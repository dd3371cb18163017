"""A causal card as Markdown: the verdict first, then what it rests on."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .card_data import CausalCard, Effect

_TRIGGERS = {
    "accuracy": "accuracy, %", "trigger_rate": "items with a span, %", "spans": "spans an item",
    "latent_steps": "slots an item", "forced_close_rate": "spans closed by force, %",
    "parse_rate": "replies parsed, %", "answer_tokens": "tokens of the reply",
    "replay_match": "replies that the replay reproduces, %",
}  # fmt: skip
_LISTS = ("eigenvalues", "cosine_matrix", "alerts", "enrichment")


def card_markdown(card: CausalCard, pictures: Mapping[str, str] | None = None) -> str:
    """The card as Markdown.

    Args:
        card: the card.
        pictures: title to relative path of a figure.
    """
    clean = card.clean
    parts = [
        f"# Causal card: {card.model} on {card.dataset}",
        f"**{card.verdict.sentence}**",
        f"{len(card.ids)} items, suite `{card.suite}`, regime `{card.regime}`, count `{card.count}`, "
        f"seed {card.seed}; "
        f"clean accuracy {100 * sum(clean.correct) / len(card.ids):.1f} %. "
        f"Decoding: {_options(card.strategy)}. {_environment(card)}",
        "## Why",
        _bullets([*card.verdict.reasons, *(f"missing: {each}" for each in card.verdict.missing)]),
        "## Effects of the interventions",
        effects_table(card),
        "Differences are condition minus clean in points with 95 % intervals (bootstrap over "
        f"{'clusters' if len(set(card.clusters)) < len(card.ids) else 'items'}); p is McNemar's exact test after "
        f"Holm's correction; = means equivalent within {_margin(card):g} points (two one-sided tests); MDE is the "
        "smallest effect found with 80 % power; u is how much the log-probability of the gold answer drops, in nats.",
    ]
    if card.comparisons:
        parts += ["## Comparisons", _table(("", "points", "95 %", "n"), [
            (name, f"{each['difference']:+.1f}", f"[{each['low']:+.1f}, {each['high']:+.1f}]", str(each["n"]))
            for name, each in card.comparisons.items()
        ])]  # fmt: skip
    parts += ["## Clean run", _table(("", ""), [
        (title, _number(card.triggers[name])) for name, title in _TRIGGERS.items() if name in card.triggers
    ])]  # fmt: skip
    if card.per_slot:
        most = max(len(values) for values in card.per_slot.values())
        parts += ["## Each slot alone (frozen), u in nats", _table(
            ("edit", *(str(number + 1) for number in range(most))),
            [(name, *(f"{value:+.3f}" for value in values)) for name, values in card.per_slot.items()],
        )]  # fmt: skip
    parts += _measures(card)
    if pictures:
        parts += ["## Figures", "\n\n".join(f"![{title}]({path})" for title, path in pictures.items())]
    if card.left_out:
        parts += ["## Left out", _bullets(card.left_out)]
    return "\n\n".join(parts) + "\n"


def effects_table(card: CausalCard) -> str:
    """The table of effects, in the order of the card."""
    head = ("intervention", "n", "accuracy", "difference", "95 %", "p", "=", "flips", "MDE", "u", "KL", "parsed",
            "recovery")  # fmt: skip
    return _table(head, [_effect_row(effect) for effect in card.effects.values()])


def _effect_row(effect: Effect) -> tuple[str, ...]:
    recovery = "–" if effect.recovery is None else f"{100 * effect.recovery:.0f} %"
    kl = effect.kl_first if effect.kl_options is None else effect.kl_options
    u = "–" if effect.u is None else f"{effect.u:+.3f} [{effect.u_low:+.3f}, {effect.u_high:+.3f}]"
    parsed = f"{effect.parse_rate:.0f} %"
    if effect.delta_parsed is not None:
        parsed += f" (parsed alone {effect.delta_parsed:+.1f})"
    return (
        f"`{effect.name}`", str(effect.n), f"{effect.accuracy:.1f}", f"{effect.delta:+.1f}",
        f"[{effect.low:+.1f}, {effect.high:+.1f}]", _p(effect.p_holm), "=" if effect.equivalent else "",
        f"{100 * effect.flip:.0f} %", f"{effect.mde:.1f}", u, "–" if kl is None else f"{kl:.3f}", parsed, recovery,
    )  # fmt: skip


def _measures(card: CausalCard) -> list[str]:
    """Geometry, probes, attention."""
    parts: list[str] = []
    if card.geometry:
        names = list(dict.fromkeys(name for found in card.geometry.values() for name in found if name not in _LISTS))
        rows = [(name, *(_number(found.get(name)) for found in card.geometry.values())) for name in names]
        parts += ["## Geometry of the slots", _table(("", *card.geometry), rows)]
        alerts = [f"`{side}`: {line}" for side, found in card.geometry.items() for line in found.get("alerts", ())]
        parts += [_bullets(alerts)] if alerts else []
    probes = {name: found for name, found in card.probes.items() if isinstance(found, Mapping)}
    if probes:
        head = ("read from", "accuracy", "majority", "shuffled labels", "cross-entropy", "MI, nats")
        keys = ("accuracy", "majority", "shuffled", "cross_entropy", "mi_nats")
        parts += ["## Can the answer be read from the slots?", _table(head, [
            (name, *(_number(found.get(key)) for key in keys)) for name, found in probes.items()
        ]), f"{card.probes.get('items')} items with {card.probes.get('answers')} answers."]  # fmt: skip
    if card.attention:
        rows = [(name, _number(value)) for name, value in card.attention.items() if name not in _LISTS]
        parts += ["## Attention", _table(("", ""), rows)]
    return parts


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if value == round(value) and abs(value) >= 10 else f"{value:.3g}"
    return str(value)


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _margin(card: CausalCard) -> float:
    return next((effect.margin for effect in card.effects.values()), 2.0)


def _options(strategy: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in strategy.items())


def _environment(card: CausalCard) -> str:
    found = card.environment
    if not found:
        return ""
    millions = found.get("parameters", 0) / 1e6
    return (
        f"Model: {found.get('class')}, {millions:.1f} M parameters, {found.get('dtype')} on {found.get('device')}; "
        f"torch {found.get('torch')}, transformers {found.get('transformers')}. Seconds: "
        + ", ".join(f"{name} {value:.1f}" for name, value in card.seconds.items())
        + "."
    )


__all__ = ["card_markdown", "effects_table"]
