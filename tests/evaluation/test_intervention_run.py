"""Interventions against forwards written by hand: one row, no cache, no padding, a dense mask."""

import math

import pytest
import torch

from evaluation.causal.card_data import ConditionResult
from evaluation.causal.cells import clean_row
from evaluation.causal.contexts import CleanItem, clean_items
from evaluation.causal.intervention_run import kl_and_js
from evaluation.causal.interventions import parse_intervention
from evaluation.runner import predict
from tests.evaluation.intervention_parts import METHODS, OTHER_FAMILIES, clean, new_run, parts

TOLERANCE = 2e-4  # nats, a sum over a few tokens


def results(method: str, *names: str, family: str = "qwen2_5_vl", **options: object) -> dict[str, ConditionResult]:
    return new_run(method, family, **options).run([parse_intervention(name) for name in names])


def close(first: ConditionResult, second: ConditionResult, tolerance: float = TOLERANCE) -> bool:
    """Same replies, and the same log-probabilities within a tolerance."""
    pairs = zip(first.gold_log_prob, second.gold_log_prob, strict=True)
    return first.texts == second.texts and all(math.isclose(a, b, abs_tol=tolerance) for a, b in pairs)


# The clean run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", ["frozen", "live"])
@pytest.mark.parametrize("method", METHODS)
def test_identity_is_the_clean_run_bit_for_bit(method: str, regime: str) -> None:
    found = results(method, "identity", regime=regime)
    base, same = found["clean"], found["identity"]
    assert all(same.applied) and same.texts == base.texts
    assert same.gold_log_prob == base.gold_log_prob and same.option_log_probs == base.option_log_probs
    assert same.first_token_kl == [0.0] * 5
    assert base.texts == [item.prediction.text for item in clean(method)]  # what `generate` wrote


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_identity_in_every_family(family: str) -> None:
    found = results("fixed", "identity", "zero", family=family)
    assert found["identity"].gold_log_prob == found["clean"].gold_log_prob
    assert found["clean"].texts == [item.prediction.text for item in clean("fixed", family)]
    assert found["zero"].gold_log_prob != found["clean"].gold_log_prob


@pytest.mark.parametrize("method", ["fixed", "dynamic", "head", "staged", "markers"])
def test_slots_that_are_worked_out_again_are_the_clean_ones(method: str) -> None:
    found = results(method, "noise_abs(0)", regime="live")
    assert close(found["noise_abs(0)"], found["clean"])


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_rows_of_different_lengths_is_each_row_alone(method: str) -> None:
    names = ("zero", "all⇸L", "no_span", "gauss_norm")
    together, alone = (results(method, *names, batch_size=size) for size in (5, 1))
    for name in names:
        assert close(together[name], alone[name]), name


# Naive forwards ---------------------------------------------------------------------------------------------------


def naive_gold(
    method: str, item: CleanItem, vectors: torch.Tensor | None = None, hidden: object = None, dropped: object = None
) -> float:
    """Log-probability of the gold answer by one forward over prefix, context and reply.

    Args:
        method: of the model.
        item: of its clean run.
        vectors: `(N, H)` in place of the item's latents.
        hidden: `(query, key) -> bool` over positions of the whole sequence, pairs that may not attend.
        dropped: positions of the context that are left out, the others keep their place.
    """
    model, processor = parts(method)
    run = new_run(method, items=[item, item])
    reply = run.answers[0].reply
    inputs = processor(text=[item.prompt], images=[item.record["images"]], return_tensors="pt")
    ids = torch.cat([item.prefix, item.ids, torch.tensor(reply.ids)])
    start = len(item.prefix)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[start : start + len(item.ids)] = item.latent
    embeds = torch.zeros(len(ids), item.inputs.shape[1])
    embeds[mask] = (item.inputs if vectors is None else vectors).float()
    types = torch.zeros(1, len(ids), dtype=torch.long)
    types[0, :start] = inputs["mm_token_type_ids"][0, :start]
    vision = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    positions = model.model.plan_positions(
        ids[None], torch.ones(1, len(ids), dtype=torch.long), mm_token_type_ids=types, **vision
    )
    kept = [place for place in range(len(ids)) if not (dropped and dropped(place - start))]
    allowed = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    for query in range(len(ids)):
        for key in range(query):
            allowed[query, key] = not (hidden and hidden(query, key))
    allowed = allowed[kept][:, kept]
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min / 2)[None, None]
    with torch.no_grad():
        logits = model(
            input_ids=ids[kept][None], attention_mask=bias, position_ids=positions[:, :, kept],
            latent_mask=mask[kept][None], latent_embeds=embeds[kept][None], mm_token_type_ids=types[:, kept], **vision,
        ).logits[0].log_softmax(-1)  # fmt: skip
    first = len(kept) - len(reply.ids)
    places = range(first + reply.start, first + reply.stop)
    return float(sum(logits[place - 1, ids[kept][place]] for place in places))


def roles(item: CleanItem, method: str) -> dict[str, set[int]]:
    """Positions of the whole sequence by role."""
    model, _ = parts(method)
    start = len(item.prefix)
    row = clean_row(item, new_run(method, items=[item, item]).ids)
    found = {"I": {p for p in range(start) if int(item.prefix[p]) == model.config.image_token_id},
             "L": {start + p for p, cell in enumerate(row.cells) if cell.kind in ("slot", "patch")},
             "M": {start + p for p, cell in enumerate(row.cells) if cell.kind == "marker"}}  # fmt: skip
    found["Q"] = set(range(1, start)) - found["I"]
    last = max(found["L"])
    found["behind"] = set(range(last + 1, start + len(item.ids) + 20))
    found["A"] = found["behind"] - found["M"]
    return found


EDGES = {
    "A⇸L": ("A", "L"), "all⇸L": ("behind", "L"), "A⇸M": ("A", "M"), "L⇸I": ("L", "I"), "L⇸Q": ("L", "Q"),
    "L⇸L": ("L", "L"), "A⇸I": ("A", "I"), "Q⇸I": ("Q", "I"), "e⇸I": ("behind", "I"),
}  # fmt: skip


@pytest.mark.parametrize("method", ["fixed", "staged", "markers", "learned"])
@pytest.mark.parametrize("edge", EDGES)
def test_cut_edges_are_those_of_a_dense_mask(method: str, edge: str) -> None:
    item = clean(method)[1]
    where = roles(item, method)
    if not where["M"] and "M" in edge:
        pytest.skip("the method has no markers")
    queries, keys = (where[name] for name in EDGES[edge])
    expected = naive_gold(method, item, hidden=lambda query, key: query in queries and key in keys)
    found = results(method, edge)
    assert math.isclose(found[edge].gold_log_prob[1], expected, abs_tol=TOLERANCE)
    assert abs(found["clean"].gold_log_prob[1] - expected) > 1e-5 or edge == "L⇸L" and len(where["L"]) < 2


def test_several_edges_and_a_part_of_the_layers() -> None:
    item = clean("fixed")[0]
    where = roles(item, "fixed")
    expected = naive_gold(
        "fixed", item, hidden=lambda query, key: key in where["I"] and query in where["A"] | where["Q"]
    )
    found = results("fixed", "A⇸I+Q⇸I", "A⇸L", "A⇸L@0-100", "A⇸L@0-50", "A⇸L@50-100", "drop_KV(I)", "e⇸I")
    assert math.isclose(found["A⇸I+Q⇸I"].gold_log_prob[0], expected, abs_tol=TOLERANCE)
    assert close(found["A⇸L@0-100"], found["A⇸L"])
    values = [found[name].gold_log_prob[0] for name in ("clean", "A⇸L", "A⇸L@0-50", "A⇸L@50-100")]
    assert len({round(value, 5) for value in values}) == 4
    assert "drop_KV(I)" not in found  # it is another name


def test_the_content_alone_is_a_query_of_its_own() -> None:
    item = clean("fixed")[0]
    where = roles(item, "fixed")
    start = len(item.prefix) + len(item.ids) + new_run("fixed").answers[0].reply.start
    expected = naive_gold("fixed", item, hidden=lambda query, key: query >= start and key in where["L"])
    found = results("fixed", "A_only⇸L", "A⇸L")
    assert math.isclose(found["A_only⇸L"].gold_log_prob[0], expected, abs_tol=TOLERANCE)


@pytest.mark.parametrize("method", ["fixed", "head", "staged", "learned"])
def test_zero_is_a_forward_with_zero_rows(method: str) -> None:
    item = clean(method)[2]
    expected = naive_gold(method, item, vectors=torch.zeros_like(item.inputs))
    assert math.isclose(results(method, "zero")["zero"].gold_log_prob[2], expected, abs_tol=TOLERANCE)


def test_one_slot_of_several_and_the_parts_of_a_block() -> None:
    item = clean("staged")[0]
    kinds = [cell.kind for cell in clean_row(item, new_run("staged").ids).cells]
    assert kinds == ["patch", "slot"] * 2
    for name, places in (("zero[1]", [2, 3]), ("zero[hidden]", [1, 3]), ("zero[patches]", [0, 2])):
        vectors = item.inputs.clone()
        vectors[places] = 0
        expected = naive_gold("staged", item, vectors=vectors)
        assert math.isclose(results("staged", name)[name].gold_log_prob[0], expected, abs_tol=TOLERANCE), name


def test_silent_is_the_sequence_without_its_slots_and_all_to_latents_is_the_same() -> None:
    item = clean("fixed")[0]
    expected = naive_gold("fixed", item, dropped=lambda place: 0 <= place < len(item.ids) and bool(item.latent[place]))
    found = results("fixed", "silent", "all⇸L", "A⇸L")
    assert math.isclose(found["silent"].gold_log_prob[0], expected, abs_tol=1e-5)
    assert close(found["silent"], found["all⇸L"], 1e-5)
    assert not close(found["A⇸L"], found["all⇸L"], 1e-5)  # the end marker still reads the slots


# Structure --------------------------------------------------------------------------------------------------------


def test_no_slots_is_markers_only_and_numbers_of_slots_are_what_generate_makes() -> None:
    model, processor = parts("fixed")
    names = ("K=0", "markers_only", "K=2", "truncate(2)", "K=5", "extend(2)")
    found = results("fixed", *names, regime="live")
    assert found["K=0"].texts == found["markers_only"].texts
    assert found["K=0"].gold_log_prob == found["markers_only"].gold_log_prob
    assert close(found["K=2"], found["truncate(2)"]) and close(found["K=5"], found["extend(2)"])
    assert found["K=5"].num_latent_steps == [5] * 5 and found["K=0"].num_latent_steps == [0] * 5
    for number in (2, 5):
        run = new_run("fixed")
        options = {**METHODS["fixed"].options, "num_latent_steps": number}
        again = clean_items(
            model, processor, [item.record for item in run.items], run.protocol, batch_size=3, **options
        )
        expected = new_run("fixed", items=again).run([])["clean"].gold_log_prob
        pairs = zip(found[f"K={number}"].gold_log_prob, expected, strict=True)
        assert all(math.isclose(a, b, abs_tol=TOLERANCE) for a, b in pairs), number


def test_no_span_is_generation_without_latents() -> None:
    model, processor = parts("fixed")
    run = new_run("fixed")
    banned = [[token] for token in (run.ids.start,)]
    off = predict(
        model, processor, [item.record for item in run.items], max_new_tokens=14, latent_strategy="off",
        repetition_penalty=1.0, bad_words_ids=banned,
    )  # fmt: skip
    found = run.run([parse_intervention("no_span"), parse_intervention("format_only(what)")])
    assert found["no_span"].texts == [each.text for each in off]
    assert found["no_span"].num_spans == [0] * 5
    assert found["format_only(what)"].texts != found["no_span"].texts


def test_fillers_stand_where_the_slots_stood() -> None:
    item = clean("fixed")[0]
    filler = parts("fixed")[1].tokenizer("x", add_special_tokens=False)["input_ids"][0]
    vector = parts("fixed")[0].get_input_embeddings().weight[filler].detach()
    found = results("fixed", "filler(x)", f"dummy_token({filler})")
    expected = naive_gold("fixed", item, vectors=vector.expand_as(item.inputs))
    assert math.isclose(found["filler(x)"].gold_log_prob[0], expected, abs_tol=TOLERANCE)
    assert close(found["filler(x)"], found[f"dummy_token({filler})"])


def test_conditions_that_an_item_does_not_allow_keep_its_clean_values() -> None:
    run = new_run("learned", regime="live")
    found = run.run([parse_intervention("markers_only"), parse_intervention("extend(1)")])
    assert not any(found["markers_only"].applied) and not any(found["extend(1)"].applied)
    assert found["markers_only"].texts == found["clean"].texts
    assert "have no markers" in run.left_out["markers_only"] and "learned tokens" in run.left_out["extend(1)"]


# States and grafts ------------------------------------------------------------------------------------------------


def test_states_of_the_layers_replace_what_later_positions_read() -> None:
    found = results("learned", "zero_kv", "mean_kv", "shuffle_kv")
    for name in ("zero_kv", "mean_kv", "shuffle_kv"):
        assert all(found[name].applied)
        assert not close(found[name], found["clean"], 1e-6), name
    run = new_run("learned")
    run._layer_means([parse_intervention("zero_kv")])
    run.data.donors = list(range(5))  # everyone is their own donor
    own = run.run([parse_intervention("shuffle_kv")])
    assert close(own["shuffle_kv"], own["clean"])


def test_a_graft_of_the_same_image_changes_nothing_and_of_another_one_does() -> None:
    items = [clean("fixed")[0], clean("fixed")[4]]  # the same picture, other questions
    run = new_run("fixed", items=items)
    found = run.run([parse_intervention("swap_image_after")])
    assert all(found["swap_image_after"].applied) and close(found["swap_image_after"], found["clean"])
    run = new_run("fixed", items=[clean("fixed")[0], clean("fixed")[1]])
    other = run.run([parse_intervention("swap_image_after")])
    assert not any(other["swap_image_after"].applied) and "swap_image_after" in run.left_out  # another grid


# Divergences ------------------------------------------------------------------------------------------------------


def test_divergences_by_hand() -> None:
    first, second = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    kl, js = kl_and_js(first, second)
    assert kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    middle = [0.375, 0.625]
    parts_of_js = [
        sum(p * math.log(p / m) for p, m in zip(dist, middle, strict=True)) for dist in ((0.5, 0.5), (0.25, 0.75))
    ]
    assert js == pytest.approx(sum(parts_of_js) / 2)
    assert kl_and_js(first, first) == (0.0, pytest.approx(0.0, abs=1e-7))
