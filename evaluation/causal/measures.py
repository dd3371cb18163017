"""What a card measures beside its conditions: geometry, probes, attention, effects by slot, and pictures of items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from trainers.data.boxes import region_tokens

from ..benchmarks.benchmark import Benchmark
from .attention_measures import mass, patch_entropy, pointing_game, region_enrichment
from .card_data import ConditionResult, ItemView
from .geometry import trajectory_geometry
from .intervention_run import InterventionRun
from .interventions import parse_intervention
from .item_attention import ItemAttention, item_attentions
from .item_views import VIEW_CONDITIONS, item_view
from .probes import answer_probe
from .slot_sources import ItemImages

PER_SLOT = ("zero", "gauss_norm")
MOST_SLOTS = 16  # effects by slot for the first so many
ATTENTION_ITEMS, ATTENTION_BATCH = 64, 4
MOST_VISUAL = 20_000  # image embeddings that geometry compares with
LEAST_FOR_PROBES = 50


@dataclass
class CardMeasures:
    """See the fields of [`CausalCard`] of the same names."""

    per_slot: dict[str, list[float]] = field(default_factory=dict)
    geometry: dict[str, dict[str, Any]] = field(default_factory=dict)
    probes: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)
    views: list[ItemView] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def measure_card(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    frozen: InterventionRun,
    conditions: Mapping[str, ConditionResult],
    images: Sequence[ItemImages | None],
    benchmark: Benchmark,
    num_views: int,
    seed: int,
) -> CardMeasures:
    """All measures.

    Args:
        model, processor: see [`causal_card`].
        frozen: a run of the same items in the frozen regime.
        conditions: of the card.
        images: image embeddings of the items.
        benchmark: of the items.
        num_views: number of pictures.
        seed: of folds and samples.
    """
    found = CardMeasures()
    attention = _attentions(model, frozen, images, found)
    found.per_slot = per_slot_effects(frozen)
    found.geometry = _geometry(frozen, images, benchmark)
    found.probes = _probes(frozen, conditions["clean"], seed, found)
    chosen = _shown(conditions["clean"], num_views)
    shown = {name: conditions[name] for name in VIEW_CONDITIONS if name in conditions}
    found.views = [
        item_view(model, processor, frozen, index, attention.get(index), images[index], shown) for index in chosen
    ]
    return found


def per_slot_effects(frozen: InterventionRun) -> dict[str, list[float]]:
    """`u` of each slot alone, the others replayed: name of the edit -> mean over the items that have the slot, nats;
    nothing where no gold reply is known."""
    most = max((sum(int(token) != frozen.ids.patch for token in item.ids[item.latent].tolist())
                for item in frozen.items), default=0)  # fmt: skip
    effects: dict[str, list[float]] = {}
    edits = [(name, number) for name in PER_SLOT for number in range(min(most, MOST_SLOTS))]
    if not edits or not frozen.scores:
        return effects
    results = frozen.run([parse_intervention(f"{name}[{number}]") for name, number in edits])
    clean = results["clean"].gold_log_prob
    for name, number in edits:
        result = results[f"{name}[{number}]"]
        values = [base - own for base, own, applied in zip(clean, result.gold_log_prob, result.applied, strict=True)
                  if applied and base is not None and own is not None]  # fmt: skip
        if values:
            effects.setdefault(name, []).append(sum(values) / len(values))
    return effects


def _attentions(
    model: PreTrainedModel, frozen: InterventionRun, images: Sequence[ItemImages | None], found: CardMeasures
) -> dict[int, ItemAttention]:
    """Attention of the first items, and its summary in `found`."""
    attention: dict[int, ItemAttention] = {}
    places = [place for place, item in enumerate(frozen.items) if len(item.inputs) and item.reply_ids]
    for first in range(0, min(len(places), ATTENTION_ITEMS), ATTENTION_BATCH):
        part = places[first : first + ATTENTION_BATCH]
        items = [frozen.items[place] for place in part]
        for place, each in zip(part, item_attentions(model, frozen.shared(items), items), strict=True):
            if each is not None:
                attention[place] = each
    if not attention:
        found.left_out.append("attention: no item has latents and a reply")
        return attention
    found.attention = attention_summary(frozen, attention, images)
    return attention


def attention_summary(
    frozen: InterventionRun, attention: Mapping[int, ItemAttention], images: Sequence[ItemImages | None]
) -> dict[str, Any]:
    """Means over items: what the answer reads, entropies over patches (nats), enrichment of the boxes by layer."""
    reads = [each.reads for each in attention.values()]
    summary: dict[str, Any] = {f"answer_to_{name}": _mean(read[name] for read in reads) for name in reads[0]}
    slot_maps = [each.latent_to_image.mean(dim=0) for each in attention.values()]
    if not slot_maps[0].shape[-1]:
        return {"items": len(attention), **summary}
    summary["slot_to_image"] = _mean(mass(each.numpy()).mean() for each in slot_maps)
    summary["slot_to_question"] = _mean(float(each.latent_to_question.mean()) for each in attention.values())
    summary["slot_entropy"] = _mean(patch_entropy(each.numpy()).mean() for each in slot_maps)
    summary["answer_entropy"] = _mean(
        patch_entropy(each.answer_to_image.numpy()[None]).mean() for each in attention.values()
    )
    return {"items": len(attention), **summary, **_regions(frozen, attention, images)}


def _regions(
    frozen: InterventionRun, attention: Mapping[int, ItemAttention], images: Sequence[ItemImages | None]
) -> dict[str, Any]:
    """Enrichment `[layers][slots]` and pointing game on items of one image with boxes."""
    rows, hits = [], []
    for place, each in attention.items():
        record, own = frozen.items[place].record, images[place]
        if own is None or len(own.grids) != 1 or not record.get("boxes"):
            continue
        region = _region_mask(record["boxes"], own.grids[0])
        if region.all() or not region.any():
            continue
        maps = each.latent_to_image.reshape(*each.latent_to_image.shape[:2], *own.grids[0]).numpy()
        rows.append(np.array([[region_enrichment(heat, region) for heat in layer] for layer in maps]))
        hits += [pointing_game(heat, region) for heat in maps.mean(axis=0)]
    if not rows:
        return {}
    fewest = min(row.shape[1] for row in rows)
    stacked = np.stack([row[:, :fewest] for row in rows])
    known = np.isfinite(stacked)
    enrichment = np.where(known, stacked, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    enrichment[~known.any(axis=0)] = np.nan
    return {"enrichment": enrichment.tolist(), "pointing_game": float(np.mean(hits)), "regions": len(rows)}


def _region_mask(boxes: Sequence[Mapping[str, Any]], grid: tuple[int, int]) -> np.ndarray:
    """`(rows, columns)` bool, the image tokens that a box touches."""
    region = np.zeros(grid[0] * grid[1], dtype=bool)
    for tokens in region_tokens([{**box, "image": 0} for box in boxes], [(1, *grid)], 1):
        region[tokens] = True
    return region.reshape(grid)


def _geometry(
    frozen: InterventionRun, images: Sequence[ItemImages | None], benchmark: Benchmark
) -> dict[str, dict[str, Any]]:
    """Geometry of slot inputs and outputs."""
    places = [place for place, item in enumerate(frozen.items) if len(item.inputs)]
    items = [frozen.items[place] for place in places]
    groups = [benchmark.group(item.record) for item in items]
    visual = [images[place].embeds for place in places if images[place] is not None]
    visual = torch.cat(visual)[:MOST_VISUAL].numpy() if visual else None
    oracles = [frozen.data.oracles[place] for place in places]
    oracles = [each.numpy() for each in oracles] if all(each is not None for each in oracles) and oracles else None
    embeddings = frozen.data.embeddings.numpy()
    found = {
        "in": trajectory_geometry(
            [item.inputs.float().numpy() for item in items], token_embeddings=embeddings, visual=visual,
            oracles=oracles, groups=groups,
        )
    }  # fmt: skip
    outputs = [item.outputs[item.has_output].float().numpy() for item in items]
    outputs = [(each, group) for each, group in zip(outputs, groups, strict=True) if len(each)]
    if outputs:
        found["out"] = trajectory_geometry(
            [each for each, _ in outputs], token_embeddings=embeddings, groups=[group for _, group in outputs]
        )
    return found


def _probes(frozen: InterventionRun, clean: ConditionResult, seed: int, found: CardMeasures) -> dict[str, Any]:
    """Can the answer be read from the slots? Labels are gold answers; fewer than 50 items, or one answer: none."""
    places = [place for place, item in enumerate(frozen.items) if len(item.inputs)]
    labels = [frozen.answers[place].gold for place in places]
    counts = {label: labels.count(label) for label in set(labels)}
    kept = [place for place, label in zip(places, labels, strict=True) if counts[label] >= 5]
    labels = [frozen.answers[place].gold for place in kept]
    if len(kept) < LEAST_FOR_PROBES or len(set(labels)) < 2:
        found.left_out.append(
            f"probes: {len(kept)} items have an answer that five items share; {LEAST_FOR_PROBES} with two answers are "
            "needed"
        )
        return {}
    features = {
        "mean_input": [frozen.items[place].inputs.float().mean(dim=0) for place in kept],
        "first_input": [frozen.items[place].inputs[0].float() for place in kept],
        "last_input": [frozen.items[place].inputs[-1].float() for place in kept],
    }
    probes = {name: answer_probe(torch.stack(rows).numpy(), labels, seed=seed) for name, rows in features.items()}
    return {"items": len(kept), "answers": len(set(labels)), **probes}


def _shown(clean: ConditionResult, count: int) -> list[int]:
    """Items with slots for pictures: right and wrong ones in turn, as far as there are."""
    with_slots = [place for place, steps in enumerate(clean.num_latent_steps) if steps and place < ATTENTION_ITEMS]
    right = [place for place in with_slots if clean.correct[place]]
    wrong = [place for place in with_slots if not clean.correct[place]]
    mixed = [place for pair in zip(right, wrong, strict=False) for place in pair]
    rest = [place for place in with_slots if place not in mixed]
    return sorted((mixed + rest)[:count])


def _mean(values: Any) -> float:
    values = [float(value) for value in values]
    return sum(values) / len(values)


__all__ = ["CardMeasures", "attention_summary", "measure_card", "per_slot_effects"]
