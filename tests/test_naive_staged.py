"""The naive staged schedule on tiny stock models: what a run must be whatever the model, and what it refuses.

`tests/golden/ivtlr_naive.py` checks it against the vectors of the reference code as well.
"""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.latent import liven
from tests.naive_staged import NaiveBackbone, NaiveQwenVL, NaiveStaged, naive_staged, naive_staged_generate
from tests.tiny import FAMILIES, tiny_inputs, tiny_stock_model

SLOT, PATCH = 508, 509  # ids that the tiny prompts do not use
CHAIN = {"slot_id": SLOT, "patch_id": PATCH}


def tiny_backbone(family: str, rope_positions: str) -> NaiveQwenVL:
    """The second prompt's image in a stock model with enlarged weights."""
    model = liven(tiny_stock_model(family=family), 2.0)
    model.set_attn_implementation("eager")
    batch = tiny_inputs(family=family)
    count = int(batch["image_grid_thw"][0].prod())
    return NaiveQwenVL(model, batch["pixel_values"][count:], batch["image_grid_thw"][1:], rope_positions)


def tiny_row(family: str, slots: int, answer: list[int] | None = None) -> torch.Tensor:
    batch = tiny_inputs(family=family)
    ids = batch["input_ids"][1][batch["attention_mask"][1].bool()].tolist()
    return torch.tensor([[*ids, *[SLOT] * slots, *(answer or [])]])


def assert_is_a_fixed_point(backbone: NaiveQwenVL, run: NaiveStaged, length: int) -> None:
    """One pass over the result finds each latent before its slot again, and the same copies where it looks."""
    with torch.no_grad():
        positions = backbone.positions(run.input_ids, run.attention_mask)
        once = backbone.run(run.inputs_embeds, run.input_ids, run.attention_mask, positions, output_attentions=True)
    torch.testing.assert_close(once.last_hidden_state, run.hidden)
    weights = torch.stack([layer[0].mean(0) for layer in once.attentions]).mean(0)  # (L, L)
    read, used = run.pass_lengths[0] - 1, []
    for latent, chosen, scores in zip(run.latents, run.selected, run.scores, strict=True):
        torch.testing.assert_close(once.last_hidden_state[:, read], latent)
        torch.testing.assert_close(run.inputs_embeds[:, read + 1 + chosen.shape[1]], latent)
        images = scores[0].nonzero()[:, 0]
        torch.testing.assert_close(weights[read, images], scores[0, images])
        free = [(-float(weights[read, j]), j) for j in images.tolist() if j not in used]
        assert chosen[0].tolist() == [j for _, j in sorted(free)[: chosen.shape[1]]]
        used += chosen[0].tolist()
        read += chosen.shape[1] + 1
    assert len(set(used)) == len(used) and max(used) < length


@pytest.mark.parametrize("rope_positions", ["mrope", "flat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_repeats_itself_in_one_pass(family: str, rope_positions: str) -> None:
    backbone, ids = tiny_backbone(family, rope_positions), tiny_row(family, 2, [20, 21])
    with torch.no_grad():
        run = naive_staged(backbone, ids, **CHAIN, num_patches=1)
    assert run.pass_lengths == [ids.shape[1] - 4, ids.shape[1] - 2, ids.shape[1] + 2] and backbone.calls == 3
    written = [PATCH, SLOT, PATCH, SLOT, 20, 21]
    assert run.input_ids[0].tolist() == ids[0, :-4].tolist() + written
    assert_is_a_fixed_point(backbone, run, ids.shape[1])


def test_positions_of_the_stock_model_are_those_of_its_own_forward() -> None:
    backbone, ids = tiny_backbone("qwen2_vl", "mrope"), tiny_row("qwen2_vl", 0)
    stock = {
        "pixel_values": backbone.pixel_values,
        "image_grid_thw": backbone.image_grid_thw,
        "mm_token_type_ids": backbone.image_columns(ids).int(),
    }
    with torch.no_grad():
        logits = backbone.model(ids, **stock).logits
        torch.testing.assert_close(naive_staged(backbone, ids, **CHAIN).logits, logits)
        backbone.rope_positions = "flat"
        assert not torch.allclose(naive_staged(backbone, ids, **CHAIN).logits, logits, atol=1e-3)


def test_images_that_run_out_give_fewer_copies() -> None:
    backbone, ids = tiny_backbone("qwen2_vl", "flat"), tiny_row("qwen2_vl", 3, [20])
    total = int(backbone.image_columns(ids).sum())
    with torch.no_grad():
        run = naive_staged(backbone, ids, **CHAIN, num_patches=total - 1)
    assert [chosen.shape[1] for chosen in run.selected] == [total - 1, 1, 0]
    assert run.input_ids.shape[1] == ids.shape[1] + total


class ScriptedWeights(NaiveBackbone):
    """A text model that counts the first four columns as images and gives them chosen weights."""

    weights = (0.2, 0.3, 0.1, 0.4)

    def image_columns(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        return torch.arange(input_ids.shape[1]).expand_as(input_ids) < 4

    def run(self, *args: Any, **options: Any) -> Any:
        output = super().run(*args, **options)
        if output.attentions is not None and output.attentions[0].shape[-1] >= 4:
            rows = torch.zeros_like(output.attentions[0])
            rows[..., -1, :4] = torch.tensor(self.weights)
            output.attentions = (rows,)
        return output


@pytest.fixture(scope="module")
def text_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM._from_config(
        LlamaConfig(vocab_size=512, initializer_range=0.2, **sizes), attn_implementation="eager"
    )
    return model.eval()


@pytest.mark.parametrize(
    ("order", "expected"),
    [("score", [[3, 1, 0], [2]]), ("index_then_kth", [[1, 3, 0], [2]])],
)
def test_order_of_the_copies(text_model: LlamaForCausalLM, order: str, expected: list[list[int]]) -> None:
    """Column 0 has the third of the scores, so it stands last in either order."""
    ids = torch.tensor([[5, 6, 7, 8, 9, SLOT, SLOT, 10]])
    run = naive_staged(ScriptedWeights(text_model), ids, **CHAIN, num_patches=3, patch_order=order)
    assert [chosen[0].tolist() for chosen in run.selected] == expected
    copies = [-1 - column for column in expected[0]]
    assert run.source[0].tolist() == [0, 1, 2, 3, 4, *copies, 5, -3, 6, 7]


@pytest.mark.parametrize("order", ["score", "index_then_kth"])
def test_the_earlier_of_equal_scores_is_taken(text_model: LlamaForCausalLM, order: str) -> None:
    backbone, ids = ScriptedWeights(text_model), torch.tensor([[5, 6, 7, 8, 9, SLOT, 10]])
    backbone.weights = (0.1, 0.3, 0.3, 0.3)
    run = naive_staged(backbone, ids, **CHAIN, num_patches=2, patch_order=order)
    assert run.selected[0].tolist() == [[1, 2]]


def test_only_the_last_image_counts_when_asked(text_model: LlamaForCausalLM) -> None:
    class TwoImages(ScriptedWeights):
        def image_columns(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
            return input_ids == 7

    ids = torch.tensor([[7, 7, 9, 7, 5, SLOT, 7]])
    run = naive_staged(TwoImages(text_model), ids, **CHAIN, num_patches=3, patch_images="last")
    assert run.selected[0].tolist() == [[3]]  # neither the first image nor what follows the slot
    run = naive_staged(TwoImages(text_model), ids, **CHAIN, num_patches=3)
    assert sorted(run.selected[0][0].tolist()) == [0, 1, 3]


def test_gradients_of_a_chain(text_model: LlamaForCausalLM) -> None:
    """`bptt` lets the gradient through the slots; keeping the logits of every pass changes cost and nothing else."""
    ids = torch.tensor([[5, 6, 7, SLOT, SLOT, 10, 11]])
    labels = torch.where(ids > SLOT - 1, -100, ids)
    gradients = {}
    for gradient, every in (("detach", False), ("detach", True), ("bptt", False), ("bptt", True)):
        text_model.zero_grad()
        run = naive_staged(
            NaiveBackbone(text_model), ids, labels=labels, **CHAIN, gradient=gradient, logits_of_every_pass=every
        )
        run.loss.backward()
        gradients[gradient, every] = text_model.model.layers[0].mlp.up_proj.weight.grad.clone()
    for gradient in ("detach", "bptt"):
        torch.testing.assert_close(gradients[gradient, True], gradients[gradient, False])
    assert not torch.allclose(gradients["detach", False], gradients["bptt", False], rtol=1e-2)


@pytest.mark.parametrize("use_cache", [True, False])
def test_text_is_what_the_stock_loop_writes(text_model: LlamaForCausalLM, use_cache: bool) -> None:
    prompt = torch.tensor([[5, 6, 7, 8]])
    stock = text_model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, eos_token_id=None
    )[0, 4:].tolist()
    backbone = NaiveBackbone(text_model)
    ours = naive_staged_generate(backbone, prompt, max_new_tokens=6, use_cache=use_cache, **CHAIN)
    assert ours.new_tokens == stock and ours.calls == 6
    for first, kept in ((False, stock[:2]), (True, stock[:1])):
        done = naive_staged_generate(
            backbone, prompt, max_new_tokens=6, eos_ids=stock[:2], stop_on_first_token=first, **CHAIN
        )
        assert done.new_tokens == kept


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([[5, SLOT, 6], [SLOT, 5, 6]], {}, r"slots stand in columns \[\[1\], \[0\]\]"),
        ([[5, SLOT, 6, SLOT]], {}, "side by side"),
        ([[5, SLOT]], {"patch_order": "native"}, r"patch_order='native' is unknown; choose one of \['score'"),
        ([[5, SLOT]], {"patch_images": "first"}, "patch_images='first' is unknown"),
        ([[5, SLOT]], {"gradient": "none"}, "gradient='none' is unknown"),
    ],
)
def test_refusals(text_model: LlamaForCausalLM, ids: list[list[int]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        naive_staged(NaiveBackbone(text_model), torch.tensor(ids), **CHAIN, **options)


def test_refuses_rows_whose_images_run_out_at_different_slots(text_model: LlamaForCausalLM) -> None:
    class Uneven(ScriptedWeights):
        def image_columns(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
            return input_ids == 7

    ids = torch.tensor([[7, 7, 5, SLOT], [7, 5, 5, SLOT]])
    with pytest.raises(ValueError, match=r"\[2, 1\] image columns are left"):
        naive_staged(Uneven(text_model), ids, **CHAIN, num_patches=2)


def test_refuses_models_without_weights_and_unknown_positions(text_model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="attn_implementation='sdpa' returns no attention weights"):
        NaiveBackbone(LlamaForCausalLM(text_model.config.__class__(**{**text_model.config.to_dict()})))
    with pytest.raises(ValueError, match="rope_positions='round' is unknown"):
        NaiveQwenVL(text_model, rope_positions="round")
