"""Figures of a causal card (specification, section 6); each only where its data exist."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .card_data import CausalCard, ConditionResult, Effect
from .card_style import BAND, BLUE, FAMILIES, GREY, INK, RED, new_figure, plain_axes, save_figure

MOST_POINTS = 2_000  # of a group in a map of states


def card_figures(card: CausalCard, folder: str | Path) -> dict[str, Path]:
    """Draws every figure that the card has data for; title to file."""
    drawings: dict[str, tuple[bool, Callable[[CausalCard, Path], Path]]] = {
        "effects": (bool(card.effects), draw_effects),
        "slots an item": (any(card.clean.num_latent_steps), draw_slot_counts),
        "effect by slot": (bool(card.per_slot), draw_per_slot),
        "eigenvalues": (any(found.get("eigenvalues") for found in card.geometry.values()), draw_eigenvalues),
        "cosines across items": (bool(card.geometry.get("in", {}).get("cosine_matrix")), draw_cosines),
        "enrichment by layer": (bool(card.attention.get("enrichment")), draw_enrichment),
    }
    return {
        title: draw(card, Path(folder) / f"{title.replace(' ', '_')}.png")
        for title, (has_data, draw) in drawings.items()
        if has_data
    }


def draw_effects(card: CausalCard, path: str | Path) -> Path:
    """Accuracy differences with intervals; the band is the margin of equivalence."""
    effects = list(card.effects.values())
    figure = new_figure(7.4, 1.25 + 0.27 * len(effects))
    axes = figure.add_axes((0.27, 0.62 / figure.get_figheight(), 0.7, 1 - 1.2 / figure.get_figheight()))
    effects_on(axes, effects, card.conditions)
    figure.text(
        0.02, 1 - 0.3 / figure.get_figheight(), card.verdict.sentence[:110], fontsize=9, color=INK, weight="bold"
    )
    return save_figure(figure, path)


def effects_on(axes: Any, effects: Sequence[Effect], conditions: Mapping[str, ConditionResult]) -> None:
    """The forest plot on given axes; filled points differ significantly after Holm's correction."""
    margin = effects[0].margin
    axes.axvspan(-margin, margin, color=BAND, zorder=0)
    axes.axvline(0, color=GREY, lw=0.8)
    for place, effect in enumerate(effects):
        condition = conditions.get(effect.name)
        colour = FAMILIES.get(condition.family if condition else "", INK)
        axes.plot([effect.low, effect.high], [place, place], color=colour, lw=1.6)
        axes.plot(effect.delta, place, "o", ms=5, color=colour, mfc=colour if effect.significant else "white")
    axes.set_yticks(range(len(effects)), [effect.name.replace("$", "\\$") for effect in effects])
    axes.set_ylim(len(effects) - 0.5, -0.5)
    axes.set_xlabel("accuracy minus clean, points (95 %)", fontsize=8, color=INK)
    plain_axes(axes)


def draw_slot_counts(card: CausalCard, path: str | Path) -> Path:
    """How many slots the items have."""
    counts = Counter(card.clean.num_latent_steps)
    figure, axes = _single(4.6, 2.6)
    axes.bar(list(counts), list(counts.values()), color=BLUE, width=0.8)
    axes.set_xlabel("slots an item (clean run)", fontsize=8)
    axes.set_ylabel("items", fontsize=8)
    return save_figure(figure, path)


def draw_per_slot(card: CausalCard, path: str | Path) -> Path:
    """`u` of every slot edited alone."""
    figure, axes = _single(5.2, 2.8)
    for (name, values), colour in zip(card.per_slot.items(), (BLUE, RED, INK, GREY), strict=False):
        axes.plot(range(1, len(values) + 1), values, "o-", ms=4, lw=1.4, color=colour, label=name)
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set_xlabel("slot edited alone (frozen)", fontsize=8)
    axes.set_ylabel("u, nats", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    return save_figure(figure, path)


def draw_eigenvalues(card: CausalCard, path: str | Path) -> Path:
    """Share of the variance that the first directions hold."""
    figure, axes = _single(4.6, 2.8)
    for (side, found), colour in zip(card.geometry.items(), (BLUE, RED), strict=False):
        values = np.asarray(found.get("eigenvalues") or [0.0])
        if values.sum() > 0:
            axes.plot(
                range(1, len(values) + 1), np.cumsum(values) / values.sum(), color=colour, label=f"slot {side}puts"
            )
    axes.set_xlabel("directions (centred states)", fontsize=8)
    axes.set_ylabel("share of the variance", fontsize=8)
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=8, frameon=False)
    return save_figure(figure, path)


def draw_cosines(card: CausalCard, path: str | Path) -> Path:
    """Cosines of pooled slot inputs of pairs of items."""
    matrix = np.asarray(card.geometry["in"]["cosine_matrix"], dtype=np.float64)
    figure, axes = _single(4.2, 3.6)
    drawn = axes.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
    figure.colorbar(drawn, ax=axes, shrink=0.85).ax.tick_params(labelsize=7)
    axes.set_xlabel("item", fontsize=8)
    axes.set_ylabel("item", fontsize=8)
    return save_figure(figure, path)


def draw_enrichment(card: CausalCard, path: str | Path) -> Path:
    """Attention of slots on annotated regions over background windows of the same size, by layer."""
    table = np.asarray(card.attention["enrichment"], dtype=np.float64)
    figure, axes = _single(1.8 + 0.35 * max(table.shape[1], 6), 1.4 + 0.22 * max(table.shape[0], 5))
    drawn = axes.imshow(table, cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
    figure.colorbar(drawn, ax=axes).ax.tick_params(labelsize=7)
    axes.set_xticks(range(table.shape[1]), range(1, table.shape[1] + 1))
    axes.set_xlabel("slot", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    return save_figure(figure, path)


def draw_cards(cards: Sequence[CausalCard], path: str | Path) -> Path:
    """Effects of several cards (models or benchmarks) side by side: points, with the half width of the interval.

    Raises:
        ValueError: no card.
    """
    if not cards:
        raise ValueError("no card to draw; give one or more")
    names = list(dict.fromkeys(name for card in cards for name in card.effects))
    values = np.array([[_delta(card, name) for card in cards] for name in names])
    figure, axes = _single(2.6 + 1.2 * len(cards), 1.2 + 0.3 * len(names))
    most = max(float(np.nanmax(np.abs(values))), 1.0)
    axes.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    for row, name in enumerate(names):
        for column, card in enumerate(cards):
            if name in card.effects:
                effect = card.effects[name]
                text = f"{effect.delta:+.1f} ±{(effect.high - effect.low) / 2:.1f}"
                dark = abs(effect.delta) > 0.6 * most
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else INK)
    axes.set_xticks(range(len(cards)), [f"{card.model}\n{card.dataset}" for card in cards], fontsize=7)
    axes.set_yticks(range(len(names)), names)
    figure.set_layout_engine("tight")
    return save_figure(figure, path)


def _delta(card: CausalCard, name: str) -> float:
    return card.effects[name].delta if name in card.effects else float("nan")


def draw_states(groups: Mapping[str, np.ndarray], path: str | Path, seed: int = 0) -> Path:
    """t-SNE (PCA to 50 first) of states of several groups: slots, image embeddings, text embeddings, oracles.

    Args:
        groups: name to `(n, hidden)`; at most 2,000 of each, drawn with the seed.
        path: PNG file.
        seed: of the draw and of t-SNE.

    Raises:
        ValueError: fewer than ten states in all.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rng = np.random.default_rng(seed)
    some = {name: rows[rng.permutation(len(rows))[:MOST_POINTS]] for name, rows in groups.items() if len(rows)}
    rows = np.concatenate(list(some.values())) if some else np.zeros((0, 1))
    if len(rows) < 10:
        raise ValueError(f"{len(rows)} states; a map needs ten")
    rows = PCA(min(50, *rows.shape), random_state=seed).fit_transform(rows)
    points = TSNE(2, perplexity=min(30, (len(rows) - 1) // 3), init="pca", random_state=seed).fit_transform(rows)
    figure, axes = _single(5, 4.2)
    start = 0
    for (name, own), colour in zip(some.items(), (RED, BLUE, GREY, "#2f855a", INK), strict=False):
        part = points[start : start + len(own)]
        axes.scatter(part[:, 0], part[:, 1], s=4, color=colour, label=name, alpha=0.6)
        start += len(own)
    axes.legend(fontsize=8, frameon=False, markerscale=3)
    axes.set_xticks([])
    axes.set_yticks([])
    return save_figure(figure, path)


def _single(width: float, height: float) -> tuple[Any, Any]:
    """A figure with one pair of axes."""
    figure = new_figure(width, height)
    axes = figure.add_subplot()
    plain_axes(axes)
    figure.set_layout_engine("tight")
    return figure, axes


__all__ = [
    "card_figures", "draw_cards", "draw_cosines", "draw_effects", "draw_eigenvalues", "draw_enrichment",
    "draw_per_slot", "draw_slot_counts", "draw_states", "effects_on",
]  # fmt: skip
