"""Rules of who may attend to whom: as numbers against loops over pairs, and inside models against dense masks."""

import copy
import importlib.util
import math
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from modeling_latent import capture_attention_rows
from modeling_latent.latent_masks import (
    Visibility,
    allowed_pairs,
    check_visibility,
    hidden_positions,
    image_visibility,
    visibility_bias,
    visible_attention,
)
from tests.hub import ROOT
from tests.naive_learned import NaiveBackbone, NaiveChameleon, NaiveQwenVL
from tests.test_matrix import BACKBONES, Prefer, left_pad

INF = math.inf
ROWS = (0, 1, 2)
KINDS = [(backbone, kernel) for backbone in BACKBONES for kernel in ("sdpa", "eager")]


def marked(*rows: str) -> torch.BoolTensor:
    """`marked("..x", "xx.")`: a mask, one string a row."""
    return torch.tensor([[mark != "." for mark in row] for row in rows])


def naive_bias(rules: Sequence[Visibility], row: int, length: int, pad: int = 0) -> torch.Tensor:
    """`(length, length)` sum of the rules for a row without its `pad` first positions; those behind a rule are
    queries of it, unless it says no."""
    total = torch.zeros(length, length)
    for rule in rules:
        known = rule.queries.shape[1] - pad
        for query in range(length):
            looks = bool(rule.queries[row, query + pad]) if query < known else rule.later
            for key in range(min(length, known)):
                if looks and rule.keys[row, key + pad] and key != query:
                    total[query, key] += rule.bias
    return total


# Rules as numbers ----------------------------------------------------------------------------------------------------


def test_pairs_are_queries_by_keys_without_the_position_itself() -> None:
    rule = Visibility(marked("xx.x", "...x"), marked("xx..", "x..x"))
    pairs = rule.pairs(2, torch.arange(4), torch.arange(4))
    assert torch.equal(pairs[0], marked(".x..", "x...", "....", "xx.."))
    assert torch.equal(pairs[1], marked("....", "....", "....", "x..."))


def test_decoded_positions_are_queries_and_never_keys() -> None:
    queries, keys = marked("...x"), marked(".x.x")
    where = torch.arange(3, 7)
    assert torch.equal(Visibility(queries, keys).pairs(1, where, torch.arange(7))[0], marked(
        ".x.....", ".x.x...", ".x.x...", ".x.x..."
    ))  # fmt: skip
    assert torch.equal(Visibility(queries, keys, later=False).pairs(1, where, torch.arange(7))[0], marked(
        ".x.....", ".......", ".......", "......."
    ))  # fmt: skip


def test_rows_of_a_prompt_stand_side_by_side() -> None:
    """Beams and samples: row 3 of 6 belongs to prompt 1 of 3."""
    rule = Visibility(torch.ones(3, 5).bool(), marked("x....", ".x...", "..x.."))
    pairs = rule.pairs(6, torch.arange(5), torch.arange(5))
    assert pairs.any(dim=1).int().argmax(dim=1).tolist() == [0, 0, 1, 1, 2, 2]


def random_rules(batch: int, length: int, seed: int, biases: Sequence[float]) -> list[Visibility]:
    torch.manual_seed(seed)
    return [
        Visibility(torch.rand(batch, length) < 0.6, torch.rand(batch, length) < 0.4, bias, later=index % 2 == 0)
        for index, bias in enumerate(biases)
    ]


@pytest.mark.parametrize("biases", [(), (-INF,), (-1.5, 0.25), (0.5, -INF, -2.0, -INF)], ids=str)
def test_biases_add_up_and_hidden_wins(biases: tuple[float, ...]) -> None:
    rules, length, more = random_rules(2, 6, 3, biases), 6, 9
    whole = visibility_bias(rules, 4, torch.arange(more), torch.arange(more))
    assert whole.dtype == torch.float32 and whole.shape == (4, more, more)
    for row in range(4):
        assert torch.equal(whole[row], naive_bias(rules, row // 2, more))
    if biases:
        assert whole.any() and (whole[:, :, length:] == 0).all()
    # A step of cached decoding sees its row of the whole.
    for first, last in ((5, 6), (6, 7), (7, 9)):
        part = visibility_bias(rules, 4, torch.arange(first, last), torch.arange(last))
        assert torch.equal(part, whole[:, first:last, :last])


def test_hidden_positions_are_seen_by_themselves_alone() -> None:
    allowed = allowed_pairs([hidden_positions(marked("..xx.", "....."))], torch.ones(2, 5).long())
    assert torch.equal(allowed[0, 0], marked("x....", "xx...", "xxx..", "xx.x.", "xx..x"))
    assert torch.equal(allowed[1, 0], torch.ones(5, 5).bool().tril())


def test_allowed_pairs_know_padding_and_what_only_damps_is_allowed() -> None:
    rules = random_rules(3, 7, 1, (-INF, -3.0, -INF))
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1] * 7])
    allowed = allowed_pairs(rules, attention_mask)
    assert allowed.shape == (3, 1, 7, 7)
    for row in range(3):
        bias = naive_bias(rules, row, 7)
        for query in range(7):
            for key in range(7):
                free = key <= query and attention_mask[row, key] == 1 and bias[query, key] != -INF
                assert bool(allowed[row, 0, query, key]) == free


LAYOUTS = {  # i: image, l: learned token
    "image, question, latents, answer": "..iii..ll..",
    "two images with text between": ".ii..ii.lll.",
    "latents at the end": "..ii...ll",
    "no prompt behind the image": ".iiill..",
    "one latent": "i.l.",
    "text between the latents": ".i..l.l..",
    "no image": "....ll..",
    "no latents": ".iii....",
    "neither": "......",
}


@pytest.mark.parametrize("block_prompt", [True, False])
@pytest.mark.parametrize("bias", [-INF, -0.75])
def test_image_visibility(bias: float, block_prompt: bool) -> None:
    """In one batch, padded on the right: behind the last latent nobody sees an image, nor between the last image and
    the first latent with `block_prompt`; rows without either lose nothing, in training and in decoding."""
    length = max(map(len, LAYOUTS.values()))
    rows = [layout.ljust(length, ".") for layout in LAYOUTS.values()]
    images, latents = (torch.tensor([[mark == kind for mark in row] for row in rows]) for kind in "il")
    rule = image_visibility(images, latents, bias, block_prompt)
    found = visibility_bias([rule], len(rows), torch.arange(length + 2), torch.arange(length + 2))
    for number, row in enumerate(rows):
        expected, last = torch.zeros(length + 2, length + 2), row.rfind("l")
        for query in range(length + 2):
            is_answer = query > last
            is_prompt = block_prompt and row.rfind("i") < query < row.find("l")
            if last >= 0 and (is_answer or is_prompt):
                expected[query, [key for key, mark in enumerate(row) if mark == "i"]] = bias
        assert torch.equal(found[number], expected), row


# Rules inside models -------------------------------------------------------------------------------------------------


@cache
def parts(backbone: str, kernel: str) -> tuple[Any, Any, list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Stock model with eager attention, latent model, three rows, and these as a batch padded on the left."""
    stock, latent = (copy.deepcopy(model) for model in BACKBONES[backbone].pair(0, None))
    stock.set_attn_implementation("eager")
    latent.set_attn_implementation(kernel)
    rows = BACKBONES[backbone].rows()
    return stock, latent, rows, left_pad(rows, BACKBONES[backbone].ids().PAD)


def rules_of(batch: dict[str, torch.Tensor], biases: Sequence[float] = (-INF, -1.5, 0.75)) -> list[Visibility]:
    """Rules over a batch; the last position of the prompt looks, so that decoding goes on as it began."""
    rules = random_rules(len(batch["input_ids"]), batch["input_ids"].shape[1], 7, biases)
    for rule in rules:
        rule.queries[:, -1] = rule.later
    return rules


@torch.no_grad()
def naive_states(backbone: str, row: int, rules: Sequence[Visibility], written: list[int]) -> tuple[Any, torch.Tensor]:
    """States `(L, H)` of one row with what was written behind it, its mask written out; and their logits."""
    stock, _, rows, batch = parts(backbone, "sdpa")
    inputs, naive = rows[row], NaiveBackbone
    if "image_grid_thw" in inputs or hasattr(stock.config, "image_token_id"):
        naive = NaiveChameleon if hasattr(stock.config, "vq_config") else NaiveQwenVL
    given = [inputs.get("pixel_values"), inputs.get("image_grid_thw")][: 1 if naive is NaiveChameleon else 2]
    model = naive(stock, *given) if naive is not NaiveBackbone else naive(stock)
    ids = torch.cat([inputs["input_ids"], torch.tensor([written], dtype=torch.long)], dim=1)
    length, pad = ids.shape[1], batch["input_ids"].shape[1] - inputs["input_ids"].shape[1]
    added = naive_bias(rules, row, length, pad)
    added = added.masked_fill(torch.ones(length, length).bool().triu(1), -INF).clamp(torch.finfo(torch.float32).min)
    hidden = model.run(model.embed(ids), ids, added[None, None], model.positions(ids, torch.ones_like(ids)))
    return hidden.last_hidden_state[0], model.logits(hidden.last_hidden_state)[0]


def states(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).last_hidden_state


@pytest.mark.parametrize(("backbone", "kernel"), KINDS)
def test_a_forward_with_rules_is_that_with_a_dense_mask(backbone: str, kernel: str) -> None:
    _, model, rows, batch = parts(backbone, kernel)
    plain = states(model, batch)
    for rules in (rules_of(batch), rules_of(batch, (-INF, -INF)), rules_of(batch, (-2.0,))):
        with visible_attention(model, rules):
            found = states(model, batch)
        assert torch.isfinite(found).all()
        assert (found - plain)[batch["attention_mask"].bool()].abs().max() > 1e-2
        for row in ROWS:
            expected, _ = naive_states(backbone, row, rules, [])
            torch.testing.assert_close(found[row, -len(expected) :], expected, atol=1e-4, rtol=0)
    assert torch.equal(states(model, batch), plain), "a rule is left behind"
    assert model.get_decoder().config._attn_implementation == kernel


@pytest.mark.parametrize(("backbone", "kernel"), KINDS)
def test_one_row_without_padding(backbone: str, kernel: str) -> None:
    """The stock code makes no mask for it: causality alone is a flag of the kernel."""
    _, model, rows, batch = parts(backbone, kernel)
    for row in ROWS:
        length = rows[row]["input_ids"].shape[1]
        rules = [
            Visibility(
                rule.queries[row : row + 1, -length:], rule.keys[row : row + 1, -length:], rule.bias, rule.later
            )
            for rule in rules_of(batch)
        ]
        with visible_attention(model, rules):
            found = states(model, rows[row])[0]
        expected, _ = naive_states(backbone, row, rules_of(batch), [])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize(("backbone", "kernel"), KINDS)
def test_decoding_with_rules_is_that_with_dense_masks(backbone: str, kernel: str, options: dict[str, Any]) -> None:
    """Every step's logits, of two samples a prompt."""
    _, model, rows, batch = parts(backbone, kernel)
    ids, rules, length = BACKBONES[backbone].ids(), rules_of(batch), batch["input_ids"].shape[1]
    processors = LogitsProcessorList([Prefer(*ids.PLACEHOLDERS, ids.EOS, ids.PAD, by=-1e4)])
    common = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 2, "pad_token_id": ids.PAD}
    torch.manual_seed(0)
    with visible_attention(model, rules):
        output = model.generate(
            **batch, **common, **options, logits_processor=processors, output_logits=True, return_dict_in_generate=True
        )
    decoded = torch.stack(output.logits, dim=1)
    for place, sequence in enumerate(output.sequences[:, length:].tolist()):
        _, logits = naive_states(backbone, place // 2, rules, sequence)
        torch.testing.assert_close(decoded[place], logits[-len(sequence) - 1 : -1], atol=1e-3, rtol=1e-4)


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> Any:
    return copy.deepcopy(parts("qwen2_5_vl", request.param)[1])


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return parts("qwen2_5_vl", "sdpa")[3]


def test_contexts_nest(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Rules of the contexts that are open add up; a context that is left takes only its own along."""
    first, second, third = rules_of(batch)
    config, base = model.get_decoder().config, model.get_decoder().config._attn_implementation
    plain = states(model, batch)
    alone = []
    for rules in ([first], [first, second], [first, second, third], [third, third]):
        with visible_attention(model, rules):
            alone.append(states(model, batch))
    for index, one in enumerate([plain, *alone]):
        assert all(not torch.equal(one, other) for other in alone[index:])
    with visible_attention(model, [first]):
        assert torch.equal(states(model, batch), alone[0])
        with pytest.raises(RuntimeError, match="inside"), visible_attention(model, [second]):
            torch.testing.assert_close(states(model, batch), alone[1], atol=1e-5, rtol=0)
            with visible_attention(model, [third]):
                torch.testing.assert_close(states(model, batch), alone[2], atol=1e-5, rtol=0)
            torch.testing.assert_close(states(model, batch), alone[1], atol=1e-5, rtol=0)
            raise RuntimeError("inside")
        assert torch.equal(states(model, batch), alone[0])
    with visible_attention(model, [third]), visible_attention(model, [third]):
        torch.testing.assert_close(states(model, batch), alone[3], atol=1e-5, rtol=0)
    assert config._attn_implementation == base and torch.equal(states(model, batch), plain)


def test_no_rules_change_nothing(model: Any, batch: dict[str, torch.Tensor]) -> None:
    config, plain = model.get_decoder().config, states(model, batch)
    base = config._attn_implementation
    with visible_attention(model, []):
        assert config._attn_implementation == base and torch.equal(states(model, batch), plain)


def test_models_do_not_share_rules(model: Any, batch: dict[str, torch.Tensor]) -> None:
    other, (first, second, _) = copy.deepcopy(model), rules_of(batch)
    with visible_attention(other, [second]):
        expected = states(other, batch)
    plain = states(model, batch)
    with visible_attention(model, [first]):
        mine = states(model, batch)
        assert torch.equal(states(other, batch), plain)
        with visible_attention(other, [second]):
            assert torch.equal(states(model, batch), mine) and torch.equal(states(other, batch), expected)


def test_two_copies_of_the_code_in_a_process(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """As the folders of two models bring them: each applies its own rules, and captures, beside and inside the
    other."""
    masks, attention = (another_copy(name) for name in ("latent_masks", "latent_attention"))
    rules, more = rules_of(batch, (-INF,)), rules_of(batch, (-2.0,))
    with visible_attention(model, [*rules, *more]), capture_attention_rows(model) as captured:
        expected = states(model, batch)
    for ours, theirs in ((rules, more), (more, rules)):
        with visible_attention(model, ours), masks.visible_attention(model, theirs):
            with attention.capture_attention_rows(model) as inner, capture_attention_rows(model) as outer:
                torch.testing.assert_close(states(model, batch), expected, atol=1e-4, rtol=0)
        for found in (inner, outer):
            torch.testing.assert_close(found.mean(), captured.mean(), atol=1e-5, rtol=0)
    with masks.visible_attention(model, [*rules, *more]):
        torch.testing.assert_close(states(model, batch), expected, atol=1e-4, rtol=0)


def another_copy(name: str) -> Any:
    """A file of the library as another module."""
    spec = importlib.util.spec_from_file_location(
        f"modeling_latent.copy_of_{name}", f"{ROOT}/modeling_latent/{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def test_the_first_layer_attends_by_the_rules(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Captured weights, whichever context is the outer one: nothing at hidden pairs, and `exp(bias)` of the odds."""
    hide, damp, _ = rules_of(batch)
    length, real = batch["input_ids"].shape[1], batch["attention_mask"].bool()
    index, every = torch.arange(length), torch.arange(length).expand(len(real), -1)

    def capture() -> torch.Tensor:
        with capture_attention_rows(model, rows=every, layers=[0]) as captured:
            states(model, batch)
        return captured.weights[0].mean(dim=1) if len(captured.weights) == 1 else torch.empty(0)

    with visible_attention(model, [hide]):
        inside = capture()
    with capture_attention_rows(model, rows=every, layers=[0]) as captured, visible_attention(model, [hide]):
        states(model, batch)
    torch.testing.assert_close(captured.weights[0].mean(dim=1), inside, atol=1e-6, rtol=0)
    with (
        visible_attention(model, [hide]),
        capture_attention_rows(model, rows=every, layers=[0]) as captured,
        visible_attention(model, [damp]),
    ):
        states(model, batch)
    both = captured.weights[0]
    allowed = allowed_pairs([hide], batch["attention_mask"])[:, 0]
    for weights in (inside, both.mean(dim=1)):
        assert (weights[real] > 0).eq(allowed[real]).all()
    with capture_attention_rows(model, rows=every, layers=[0]) as captured:
        states(model, batch)
    free = captured.weights[0].masked_fill(~allowed.unsqueeze(1), 0.0)
    damped = free * visibility_bias([damp], len(real), index, index).unsqueeze(1).exp()
    expected = damped / damped.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(both.transpose(1, 2)[real], expected.transpose(1, 2)[real], atol=1e-5, rtol=0)


def test_half_precision_stays_finite(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Also at padding, whose keys are all hidden, and where rules hide what causality hides."""
    model, everything = model.to(torch.bfloat16), torch.ones_like(batch["input_ids"]).bool()
    rules = [Visibility(everything, everything), *rules_of(batch)]
    inputs = {**batch, "pixel_values": batch["pixel_values"].to(torch.bfloat16)}
    with visible_attention(model, rules):
        output = model(**inputs, labels=batch["input_ids"])
    assert torch.isfinite(output.last_hidden_state).all() and torch.isfinite(output.logits).all()
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_position_that_sees_itself_alone_has_no_context(model: Any, batch: dict[str, torch.Tensor]) -> None:
    everything = torch.ones_like(batch["input_ids"]).bool()
    with visible_attention(model, [Visibility(everything, everything)]):
        first = states(model, batch)
        changed = batch["input_ids"].clone()
        changed[:, -2] = (changed[:, -2] + 1) % 200
        second = states(model, {**batch, "input_ids": changed})
    torch.testing.assert_close(first[:, -1], second[:, -1])
    assert (first[:, -2] - second[:, -2]).abs().max() > 1e-2


# What is refused -----------------------------------------------------------------------------------------------------

DENSE = ("sdpa", "eager", "sdpa_visible", "eager_visible_rows")
WITHOUT_MASKS = ("flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa", "kernels/flash-attn")


@pytest.mark.parametrize("implementation", DENSE)
def test_implementations_with_dense_masks(implementation: str) -> None:
    check_visibility(implementation)


@pytest.mark.parametrize("implementation", WITHOUT_MASKS)
def test_implementations_without_dense_masks(implementation: str, batch: dict[str, torch.Tensor]) -> None:
    model = copy.deepcopy(parts("qwen2_5_vl", "sdpa")[1])
    config = model.get_decoder().config
    config._attn_implementation = implementation
    with pytest.raises(ValueError) as refused, visible_attention(model, rules_of(batch)):
        raise AssertionError("the context was entered")
    for words in (f"attn_implementation={implementation!r}", "use attn_implementation='sdpa' or 'eager'"):
        assert words in str(refused.value)
    assert config._attn_implementation == implementation
    with visible_attention(model, []):
        pass  # nothing is asked of it


def test_an_implementation_that_is_not_registered(batch: dict[str, torch.Tensor]) -> None:
    model = copy.deepcopy(parts("qwen2_5_vl", "sdpa")[1])
    model.get_decoder().config._attn_implementation = "mine"
    with pytest.raises(ValueError, match="'mine' is not in the attention interface; use 'sdpa' or 'eager'"):
        with visible_attention(model, rules_of(batch)):
            pass
