"""Edits of slots: each against its formula, donors, seeds, spelling."""

from typing import Any

import pytest
import torch

from evaluation.causal.contexts import CleanItem
from evaluation.causal.edges import Edge
from evaluation.causal.interventions import (
    ALIASES,
    GRAFTS,
    STATES,
    STRUCTURES,
    describe_interventions,
    parse_intervention,
)
from evaluation.causal.slot_data import NotApplicable, SlotData, at_number, derangement, pooled
from evaluation.causal.slot_edits import SLOT_EDITS
from trainers.data.records import make_record

HIDDEN = 8


def item(number: int, latents: int) -> CleanItem:
    torch.manual_seed(number)
    empty = torch.zeros(0, dtype=torch.long)
    return CleanItem(
        record=make_record(f"i{number}", "?", "A"), prompt="", prefix=empty, ids=empty, laid_out=0, offsets=empty,
        latent=empty.bool(), inputs=torch.randn(latents, HIDDEN) * 3 + number, outputs=torch.zeros(latents, HIDDEN),
        has_output=torch.ones(latents, dtype=torch.bool), said=torch.arange(latents), spans=(), reply_ids=(), budget=1,
        prediction=None, strategy="fixed",
    )  # fmt: skip


@pytest.fixture
def data() -> SlotData:
    """Five items with 3, 2, 3, 0 and 4 latents."""
    items = [item(number, latents) for number, latents in enumerate((3, 2, 3, 0, 4))]
    torch.manual_seed(9)
    oracles = [torch.randn(6, HIDDEN), torch.randn(3, HIDDEN), None, None, torch.randn(1, HIDDEN)]
    return SlotData(
        items, ["A", "A", "B", "B", "B"], 0, torch.randn(20, HIDDEN), patches=[torch.randn(5, HIDDEN)] * 5,
        oracles=oracles, token_id={"x": 7}.__getitem__, unembedding=torch.randn(20, HIDDEN), letters=[3, 4],
    )  # fmt: skip


def fed(data: SlotData, name: str, item: int, *arguments: Any) -> torch.Tensor:
    """What an edit feeds at every latent of an item whose own vectors are the clean ones."""
    rule = SLOT_EDITS[name]
    feed = rule.make(data, item, *(arguments or rule.arguments))
    return torch.stack([feed(number, own) for number, own in enumerate(data.vectors(item))])


def test_formulas(data: SlotData) -> None:
    own, every = data.vectors(0), torch.cat([data.vectors(i) for i in (0, 1, 2, 4)])
    noise = torch.stack([data.noise(0, k, HIDDEN) for k in range(3)])
    length, unit = own.norm(dim=-1, keepdim=True), noise / noise.norm(dim=-1, keepdim=True)
    expected = {
        ("identity",): own,
        ("zero",): torch.zeros_like(own),
        ("noise_abs", 0.3): own + 0.3 * noise,
        ("noise_rel", 0.5): own + 0.5 * length / HIDDEN**0.5 * noise,
        ("gauss_unit",): noise,
        ("gauss_norm",): unit * length,
        ("gauss_model",): own.mean() + own.std(correction=0) * noise,
        ("gauss_model_diag",): every.mean(0) + every.std(0, correction=0) * noise,
        ("gauss_oracle",): data.oracles[0].mean() + data.oracles[0].std(correction=0) * noise,
        ("clamp",): every.mean(0).expand(3, -1),
        ("extreme", 10.0): (10 * every.abs().mean()).expand(3, HIDDEN),
        ("first_repeat",): own[:1].expand(3, -1),
        ("dummy_token", 4): data.embeddings[4].expand(3, -1),
        ("dummy_token", "x"): data.embeddings[7].expand(3, -1),
        ("text_fed",): data.embeddings[:3],
        ("oracle",): data.oracles[0].reshape(3, 2, HIDDEN).mean(1),
    }
    for (name, *arguments), vectors in expected.items():
        assert torch.allclose(fed(data, name, 0, *arguments), vectors, atol=1e-5), name
    assert torch.allclose(fed(data, "gauss_norm", 0).norm(dim=-1), own.norm(dim=-1))


def test_the_mean_leaves_the_item_itself_out(data: SlotData) -> None:
    others = torch.stack([data.vectors(i)[2] for i in (2, 4)]).mean(0)
    assert torch.allclose(fed(data, "mean", 0)[2], others, atol=1e-5)
    with pytest.raises(NotApplicable, match="no other item has as many latents"):
        fed(data, "mean", 4)


def test_donors_are_aligned_by_number_and_their_last_is_repeated(data: SlotData) -> None:
    data.donors = [1, 4, 0, 2, 3]
    swapped = fed(data, "shuffle_items", 0)
    assert torch.equal(swapped, data.vectors(1)[[0, 1, 1]])
    assert torch.equal(fed(data, "shuffle_items", 1), data.vectors(4)[:2])
    with pytest.raises(NotApplicable, match="'i3' has no latents"):
        fed(data, "shuffle_items", 4)
    assert torch.equal(fed(data, "shuffle_same_answer", 0), data.vectors(1)[[0, 1, 1]])
    donor = data.other_answer[0]
    assert data.gold[donor] == "B"


def test_an_order_moves_every_latent(data: SlotData) -> None:
    order = data.order(4, 4)
    assert sorted(order) == [0, 1, 2, 3] and all(place != value for place, value in enumerate(order))
    assert torch.equal(fed(data, "perm", 4), data.vectors(4)[order])


def test_oracles_of_others_and_forced_prefixes(data: SlotData) -> None:
    wrong = data.wrong_oracle[0]
    assert wrong in (1, 4) and torch.allclose(fed(data, "oracle_wrong", 0), pooled(data.oracles[wrong], 3))
    forced = fed(data, "force_k", 0, 2)
    assert torch.allclose(forced[:2], fed(data, "oracle", 0)[:2]) and torch.equal(forced[2], data.vectors(0)[2])
    with pytest.raises(
        NotApplicable, match="'i2' has no oracle vectors: they are the image embeddings inside the boxes"
    ):
        fed(data, "oracle", 2)


def test_subspaces(data: SlotData) -> None:
    own = data.vectors(0)
    for basis in ("image", "latents", "letters"):
        rows, centre = data.basis(basis, 2)
        assert torch.allclose(rows @ rows.t(), torch.eye(2), atol=1e-5)
        out = fed(data, "proj_out", 0, basis, 2)
        assert torch.allclose(out @ rows.t(), torch.zeros(3, 2), atol=1e-4)
        inside = fed(data, "proj_in", 0, basis, 2)
        assert torch.allclose(inside + out - (centre - centre @ rows.t() @ rows), own, atol=1e-4)
    letters = data.unembedding[[3, 4]]
    rows, _ = data.basis("letters", 2)
    assert torch.allclose(letters @ rows.t() @ rows, letters, atol=1e-4)
    with pytest.raises(ValueError, match="basis 'words' of rank 2: choose image, latents or letters"):
        data.basis("words", 2)


def test_patches_and_runs(data: SlotData) -> None:
    chosen = fed(data, "random_patch", 4)
    assert len({tuple(row.tolist()) for row in chosen}) == 4 and all(
        any(torch.equal(row, p) for p in data.patches[4]) for row in chosen
    )
    data.runs = {
        "other_image": [torch.ones(1, HIDDEN), None, None, None, None],
        "initial": [torch.zeros(3, HIDDEN)] * 5,
    }
    assert torch.equal(fed(data, "other_image", 0), torch.ones(3, HIDDEN))
    with pytest.raises(NotApplicable, match="'i1' has no latents in the run 'other_image'"):
        fed(data, "other_image", 1)
    walk = fed(data, "random_walk", 0)
    assert torch.allclose(walk.norm(dim=-1), data.vectors(0).norm(dim=-1), atol=1e-4)  # as far from zero


def test_noise_depends_on_item_latent_and_seed_alone(data: SlotData) -> None:
    again = SlotData(list(reversed(data.items)), data.gold, 0, data.embeddings)
    assert torch.equal(data.noise(0, 1, HIDDEN), again.noise(4, 1, HIDDEN))
    assert not torch.equal(data.noise(0, 1, HIDDEN), data.noise(0, 2, HIDDEN))
    other = SlotData(data.items, data.gold, 1, data.embeddings)
    assert not torch.equal(data.noise(0, 1, HIDDEN), other.noise(0, 1, HIDDEN))


@pytest.mark.parametrize("count", [2, 3, 7, 50])
def test_derangements_have_no_fixed_point_and_one_seed_gives_one(count: int) -> None:
    donors = derangement([""] * count, 3)
    assert sorted(donors) == list(range(count)) and all(place != donor for place, donor in enumerate(donors))
    assert donors == derangement(["x"] * count, 3)  # whatever the model: labels are not read
    assert derangement(["a"], 0) == [-1]


def test_pooling_and_numbers() -> None:
    vectors = torch.arange(6.0)[:, None].expand(6, 2)
    assert pooled(vectors, 3)[:, 0].tolist() == [0.5, 2.5, 4.5] and pooled(vectors[:1], 2)[:, 0].tolist() == [0, 0]
    assert at_number(vectors, 9)[0] == 5


# Spelling ---------------------------------------------------------------------------------------------------------


def test_spellings() -> None:
    assert parse_intervention("noise_abs(0.3)").arguments == (0.3,) and parse_intervention("extreme").arguments == (
        10.0,
    )
    assert parse_intervention(" zero[0,2] ").select == "0,2" and parse_intervention("K=4").arguments == (4,)
    assert parse_intervention("filler(a, b)").arguments == ("a, b",)  # one argument may have a comma
    assert parse_intervention("proj_out(image, 8)").arguments == ("image", 8)
    edge = parse_intervention("A-/>L@25-50")
    assert edge.family == "edges" and edge.cut_edges(8) == (Edge("A", "L", frozenset({2, 3})),)
    assert [each[:2] for each in parse_intervention("A⇸I+Q⇸I").edges] == [("A", "I"), ("Q", "I")]
    assert parse_intervention("swap_image_before").rule == ALIASES["swap_image_before"] == "other_image"
    for name in (*STATES, *GRAFTS, *(name for name in STRUCTURES if name not in ("K", "truncate", "extend"))):
        assert parse_intervention(name).rule == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("noise", "unknown intervention 'noise'; there are identity, zero"),
        ("noise_abs", r"'noise_abs' lacks an argument; write e.g. noise_abs\(1\)"),
        ("zero(3)", r"'zero\(3\)' has 1 arguments; it takes 0"),
        ("zero[k]", r"\[k\] selects latents of a content edit; write \[0\]"),
        ("no_span[0]", "selects latents of a content edit"),
        ("A⇸X", "'A⇸X' is no edge; write queries⇸keys with queries from"),
        ("A⇸L@50-50", "low below high, up to 100"),
    ],
)
def test_bad_spellings(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_intervention(text)


def test_every_intervention_is_described() -> None:
    text = describe_interventions()
    for name in (*SLOT_EDITS, *STRUCTURES, *STATES, *GRAFTS, "blank_image", "mask_roi"):
        assert f"  {name}" in text, name
