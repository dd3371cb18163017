"""A causal card with everything in it, made by hand: three conditions, items with one and two pictures."""

from PIL import Image

from evaluation.causal.card_data import CausalCard, ItemView, SlotView
from evaluation.causal.effects import comparisons_of, effects_of
from evaluation.causal.verdict import verdict_of
from tests.evaluation.condition_results import condition

IDS = [f"item {number}" for number in range(40)]


def view(index: int, sizes: list[tuple[int, int]], grids: list[tuple[int, int]]) -> ItemView:
    """An item whose slots look at the first patch of every picture, more and more at the last."""
    slots = []
    for number in range(1, 8):
        heat = [[[0.01] * columns for _ in range(rows)] for rows, columns in grids]
        for table in heat:
            table[0][0], table[-1][-1] = 0.3, 0.05 * number
        slots.append(
            SlotView(number, heat, [("a|b", 0.5), ("$x", 0.2), ("\n", 0.1)], 1.5, None if number == 1 else 0.25)
        )
    return ItemView(
        index=index, images=[f"item{index}_{number}.png" for number in range(len(sizes))],
        question="Which <b>one</b>?", answer="B & more", gold="A", correct=bool(index % 2), grids=grids, slots=slots,
        reads={"image": 0.3, "slots": 0.2, "markers": 0.05, "question": 0.3, "sink": 0.1, "other": 0.05},
        roi=[[0, 0.5, 0.5, 1.0, 1.0]], options=["A", "B"],
        option_probs={"clean": [0.7, 0.3], "gauss_norm": [0.4, 0.6]},
        replies={"clean": "B & more", "gauss_norm": "A"},
    )  # fmt: skip


PICTURES = {1: [(120, 60)], 2: [(60, 120)], 3: [(80, 80), (60, 30)]}
GRIDS = {1: [(2, 4)], 2: [(4, 2)], 3: [(2, 2), (1, 2)]}


def images() -> dict[int, list[Image.Image]]:
    """The pictures of the items."""
    return {index: [Image.new("RGB", size, (90, 120, 160)) for size in sizes] for index, sizes in PICTURES.items()}


def filled_card() -> CausalCard:
    """The card."""
    clean = condition("clean", [True] * 30 + [False] * 10)
    conditions = {
        "clean": clean,
        "gauss_norm": condition("gauss_norm", [False] * 12 + [True] * 18 + [False] * 10),
        "A⇸L": condition("A⇸L", [True] * 30 + [False] * 10, family="edges"),
        "oracle": condition("oracle", [True] * 34 + [False] * 6, applied=[True] * 36 + [False] * 4),
    }
    effects = effects_of(conditions, IDS)
    return CausalCard(
        model="org/model", dataset="Mazes", suite="slots", regime="live", count="clean", seed=0,
        strategy={"latent_strategy": "dynamic"}, ids=IDS, gold=["A"] * 40, clusters=IDS, conditions=conditions,
        effects=effects, verdict=verdict_of(effects), triggers={"items": 40, "accuracy": 75.0, "trigger_rate": 100.0},
        per_slot={"zero": [0.1, 0.2, -0.1]},
        geometry={"in": {"rank90": 3.0, "eigenvalues": [3.0, 1.0], "cosine_matrix": [[1.0, 0.2], [0.2, 1.0]],
                         "alerts": ["collapse: of <everything>"]}},
        probes={"items": 40, "answers": 2, "mean_input": {"accuracy": 0.5, "majority": 0.4, "shuffled": 0.3,
                                                          "cross_entropy": 1.0, "mi_nats": 0.1}},
        attention={"items": 5, "slot_entropy": 2.5, "enrichment": [[1.0, 2.0], [0.5, 3.0]]},
        comparisons=comparisons_of(conditions, IDS),
        items=[view(index, PICTURES[index], GRIDS[index]) for index in PICTURES],
        left_out=["cf_donor: no pairs | none"], seconds={"clean": 1.0},
        environment={"class": "X", "parameters": 1_500_000},
    )  # fmt: skip
