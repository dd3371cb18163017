"""The causal card on models whose use of their slots is known by construction, and what it refuses."""

import pytest

from evaluation.causal.card_data import CausalCard
from evaluation.causal.causal_card import causal_card
from tests.evaluation.constructed import KINDS, OPTIONS, SLOTS, benchmark, constructed_model, records
from tests.tiny import tiny_processor

ITEMS = 200


def card_of(kind: str, suite: object = "slots", items: int = ITEMS, **options: object) -> CausalCard:
    given = {"batch_size": 50, "measures": False, **OPTIONS, **options}
    return causal_card(constructed_model(kind), tiny_processor(), records(items), benchmark(), suite=suite, **given)


@pytest.fixture(scope="module", params=KINDS)
def card(request: pytest.FixtureRequest) -> CausalCard:
    return card_of(request.param)


def test_the_verdict_is_what_the_model_was_built_for(card: CausalCard, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["card"]
    assert card.triggers["accuracy"] == 100 and card.triggers["replay_match"] == 100
    assert card.triggers["trigger_rate"] == 100 and card.triggers["latent_steps"] == SLOTS
    assert card.verdict.label == kind
    assert card.verdict.sentence.startswith(f"{kind}:")


def test_identity_changes_nothing(card: CausalCard) -> None:
    clean, same = card.clean, card.conditions["identity"]
    assert same.texts == clean.texts and same.gold_log_prob == clean.gold_log_prob  # bit for bit
    assert same.option_log_probs == clean.option_log_probs
    assert card.effects["identity"].u == 0 and card.effects["identity"].kl_first == 0


def test_an_inert_model_has_no_effect_at_all() -> None:
    card = card_of("inert")
    for name in ("markers_only", "no_span", "gauss_norm", "shuffle_items", "A⇸L", "all⇸L"):
        effect = card.effects[name]
        assert effect.delta == 0 and effect.flip == 0 and effect.only_clean == effect.only_condition == 0, name
        assert abs(effect.u) < 1e-4, name  # the letter's probability is 1 to five digits, whatever the noise


def test_only_the_slot_that_is_copied_has_an_effect() -> None:
    """The first slot carries the answer to the reply; what the second adds is the same again, so hiding both matters,
    and a letter that another item's slots say is that item's."""
    card = card_of("content", suite=["zero", "zero[0]", "zero[1]", "shuffle_items", "shuffle_same_answer"], items=40)
    assert card.effects["zero"].u > 5 and card.effects["zero"].delta == -100
    for name in ("zero[0]", "zero[1]"):
        assert card.effects[name].delta == 0 and 0 < card.effects[name].u < card.effects["zero"].u, name
    letters = card.conditions["shuffle_items"].texts
    kept = sum(said == gold for said, gold in zip(letters, card.gold, strict=True))
    assert card.effects["shuffle_items"].accuracy == 100 * kept / 40 < 100
    assert card.conditions["shuffle_same_answer"].texts == card.clean.texts


def test_the_slots_that_the_answer_reads_most_are_known() -> None:
    """Attention is uniform in these models: the first of equal ones is edited; two of two are all."""
    card = card_of("content", suite=["zero", "zero[top=1]", "zero[top=2]", "zero[random=1]"], items=8)
    assert all(card.conditions["zero[top=1]"].applied)
    assert card.conditions["zero[top=2]"].gold_log_prob == card.conditions["zero"].gold_log_prob
    for name in ("zero[top=1]", "zero[random=1]"):
        assert 0 < card.effects[name].u < card.effects["zero"].u, name


def test_frozen_and_live_differ_where_later_slots_read_the_edited_one() -> None:
    live, frozen = (card_of("content", suite=["zero[0]"], items=8, regime=regime) for regime in ("live", "frozen"))
    assert live.clean.gold_log_prob == frozen.clean.gold_log_prob
    assert live.conditions["zero[0]"].gold_log_prob != frozen.conditions["zero[0]"].gold_log_prob


def test_free_spans_are_closed_by_the_strategy() -> None:
    free = card_of("content", ["zero", "identity"], 8, count="free", batch_size=4)
    assert free.conditions["identity"].texts == free.clean.texts
    assert free.conditions["zero"].num_latent_steps == [SLOTS] * 8 and free.conditions["zero"].count == "free"
    assert not any(free.conditions["zero"].correct)


def test_measures_and_views_are_there_and_the_card_survives_its_file(tmp_path: object) -> None:
    card = card_of("content", items=60, measures=True, num_views=2, suite=["gauss_norm", "shuffle_items"])
    assert len(card.per_slot["zero"]) == SLOTS and all(value > 0 for value in card.per_slot["zero"])
    assert card.probes["mean_input"]["accuracy"] == 1.0  # the slot says the answer
    assert card.geometry["in"]["items"] == 60 and card.attention["items"] == 60
    assert sum(card.attention[f"answer_to_{name}"] for name in ("slots", "markers", "question")) > 0.5
    assert len(card.items) == 2 and len(card.items[0].slots) == SLOTS
    assert card.items[0].option_probs["clean"][0] > 0.9
    loaded = CausalCard.load(card.save(tmp_path / "card.json"))
    assert loaded.to_json() == card.to_json()


def test_what_cannot_be_done_is_refused_by_name() -> None:
    model, processor = constructed_model("inert"), tiny_processor()

    def card(items: int = 4, suite: object = "slots", **options: object) -> CausalCard:
        given = {**OPTIONS, "measures": False, **options}
        return causal_card(model, processor, records(items), benchmark(), suite=suite, **given)

    with pytest.raises(ValueError, match="1 records: interventions swap latents between items; give two or more"):
        card(1)
    with pytest.raises(ValueError, match="unknown suite 'everything'; choose one of"):
        card(suite="everything")
    with pytest.raises(ValueError, match="unknown intervention 'zeros'; there are identity, zero"):
        card(suite=["zeros"])
    with pytest.raises(ValueError, match="oracle: the records have no boxes"):
        card(suite=["oracle"])
    with pytest.raises(ValueError, match="unknown regime 'replay'"):
        card(regime="replay")
    with pytest.raises(ValueError, match="no latent at all: the strategy opened no span"):
        causal_card(model, processor, records(4), benchmark(), latent_strategy="off")
    with pytest.raises(ValueError, match=r"latent_noise=0.5: interventions edit a clean greedy run"):
        card(latent_noise=0.5)
    with pytest.raises(ValueError, match="count='free' needs regime='live'"):
        card(suite=["zero"], count="free", regime="frozen")


def test_a_suite_says_what_it_left_out() -> None:
    card = card_of("inert", suite="trt", items=4)
    assert {line.partition(":")[0] for line in card.left_out} == {"oracle", "oracle_wrong", "gauss_oracle"}
    assert "boxes" in card.left_out[0] and "oracle" not in card.effects
