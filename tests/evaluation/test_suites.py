"""Suites: what they hold, what a method or data leave out, and whole cards of every method on random models."""

from typing import Any

import pytest

from evaluation.causal.causal_card import causal_card
from evaluation.causal.interventions import parse_intervention
from evaluation.causal.suites import SUITES, Traits, reason_against, roles_of, suite_interventions
from tests.evaluation.intervention_parts import METHODS, benchmark, parts, records

EVERYTHING: dict[str, Any] = {"constant": False, "searched": False, "markers": True, "patches": False,
                              "opens_span": True, "boxes": True, "images": True, "pairs": True}  # fmt: skip


def names(suite: str, **traits: bool) -> set[str]:
    return {each.name for each in suite_interventions(suite, Traits(**{**EVERYTHING, **traits}))[0]}


def test_the_suites_of_the_specification() -> None:
    assert names("trt") == set(SUITES["trt"]) and "first_repeat" in names("trt")
    assert names("prism") == {
        "identity",
        "zero",
        "noise_abs(0.1)",
        "noise_abs(0.3)",
        "noise_abs(1.0)",
        "swap_pool(64)",
    }
    assert {"markers_only", "slots_only", "no_span", "filler(.)", "gauss_norm", "A⇸L", "all⇸L", "A⇸M", "L⇸I"} < names(
        "slots"
    )
    assert {"clamp", "extreme", "other_image", "cf_donor", "A⇸I+Q⇸I"} < names("mediation")
    assert names("full") > names("slots") | names("trt") | names("mediation") | names("prism") - {"swap_pool(64)"}
    for suite in SUITES:
        assert "identity" in names(suite)


def test_methods_leave_out_what_means_nothing_and_add_what_they_need() -> None:
    learned = names("full", constant=True, markers=False)
    assert {"shuffle_kv", "mean_kv", "zero_kv"} < learned and not {"shuffle_items", "mean", "markers_only"} & learned
    assert "K=4" not in learned and "all⇸L" in learned
    assert {"gauss_norm[hidden]", "gauss_norm[patches]"} < names("slots", patches=True)
    assert {"initial", "random_walk"} < names("slots", searched=True)
    assert not {"oracle", "mask_roi(1)"} & names("full", boxes=False)
    assert not {"L⇸I", "blur(1)", "random_patch"} & names("full", images=False)
    assert not {"cf_donor", "counterfactual"} & names("full", pairs=False)
    assert "the strategy lays its latents out itself" in reason_against(
        parse_intervention("force_span"), Traits(**{**EVERYTHING, "opens_span": False})
    )


def test_roles_of_the_verdict() -> None:
    assert roles_of(Traits(**EVERYTHING))["swap"] == "shuffle_items"
    learned = roles_of(Traits(**{**EVERYTHING, "constant": True, "markers": False}))
    assert learned["swap"] == "shuffle_kv" and learned["empty"] == learned["off"] == "no_span"


def asked(method: str) -> list[dict]:
    """The tiny records with a box and a counterfactual view each."""
    found = records()
    for number, record in enumerate(found):
        record["boxes"] = [{"image": 0, "xyxy": [0.0, 0.0, 0.5, 0.5]}]
        record["meta"] |= {"counterfactual": {"images": found[(number + 1) % 5]["images"]}, "paraphrase": "And this?"}
    return found


@pytest.mark.parametrize("method", ["fixed", "head", "staged", "learned", "search"])
def test_a_full_card_of_every_method(method: str) -> None:
    model, processor = parts(method)
    card = causal_card(
        model,
        processor,
        asked(method),
        benchmark(),
        suite="full",
        batch_size=3,
        num_views=2,
        **METHODS[method].options,
    )
    assert card.effects["identity"].u == 0 and card.conditions["identity"].texts == card.clean.texts
    assert card.triggers["replay_match"] == 100 and card.triggers["trigger_rate"] == 100
    emits = method in ("fixed", "head")
    expected = names("full", constant=method == "learned", searched=method == "search", markers=emits,
                     patches=method == "staged", opens_span=emits)  # fmt: skip
    assert set(card.conditions) - {"clean"} == expected
    untouched = {name for name, result in card.conditions.items() if not any(result.applied)}
    assert untouched <= {"swap_image_after"}, untouched  # five pictures of different sizes
    assert card.effects["zero"].u != 0 and card.effects["no_span"].n == 5
    assert (
        card.attention["items"] == sum(map(bool, card.clean.answer_tokens)) >= 4
        and len(card.items) == 2
        and card.items[0].slots
    )
    assert card.geometry["in"]["items"] == 5 and card.per_slot["zero"]
    assert card.items[0].grids and len(card.items[0].slots[0].heat[0]) == card.items[0].grids[0][0]


def test_views_and_donors_of_other_inputs() -> None:
    """A counterfactual view that is the same picture gives the item's own latents back; a blank one does not."""
    model, processor = parts("fixed")
    same = asked("fixed")
    for record in same:
        record["meta"]["counterfactual"] = {"images": record["images"]}
    card = causal_card(
        model, processor, same, benchmark(), batch_size=3, measures=False,
        suite=["counterfactual", "cf_donor", "blank_image", "paraphrase", "force_span", "swap_image", "other_image"],
        **METHODS["fixed"].options,
    )  # fmt: skip
    assert card.conditions["counterfactual"].texts == card.clean.texts
    assert card.conditions["counterfactual"].gold_log_prob == pytest.approx(card.clean.gold_log_prob, abs=1e-4)
    assert card.conditions["cf_donor"].gold_log_prob == pytest.approx(card.clean.gold_log_prob, abs=1e-4)
    assert card.conditions["force_span"].gold_log_prob == pytest.approx(card.clean.gold_log_prob, abs=1e-4)
    for name in ("blank_image", "paraphrase", "other_image"):
        assert card.conditions[name].gold_log_prob != pytest.approx(card.clean.gold_log_prob, abs=1e-4), name
