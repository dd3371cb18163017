"""Latent heads: the table, what the built-in ones compute, and that a model builds, saves and loads them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from modeling_latent import LATENT_HEADS, LatentQwen2_5_VLForConditionalGeneration, register_latent_head
from modeling_latent.latent_heads import build_latent_head
from tests.latent import tiny_latent_model
from tests.tiny import tiny_config, tiny_inputs


@pytest.fixture
def heads() -> Any:
    before = dict(LATENT_HEADS)
    yield LATENT_HEADS
    LATENT_HEADS.clear()
    LATENT_HEADS.update(before)


def test_no_head_feeds_the_state_as_it_is() -> None:
    model = tiny_latent_model(0)
    states = torch.randn(2, 3, 64)
    assert model.latent_head is None and model.latent_step(states) is states
    assert not any("latent_head" in name for name in model.state_dict())


def test_simple_head() -> None:
    """LayerNorm (eps 1e-6), linear, GELU, linear."""
    head, states = tiny_latent_model(0, latent_head="simple").latent_head, torch.randn(2, 3, 64)
    norm, first, last = head.ln_q, head.mlp[0], head.mlp[2]
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        for bias in (norm.bias, first.bias, last.bias):
            bias.uniform_(-1, 1)
        deviation = (states.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        normed = (states - states.mean(-1, keepdim=True)) / deviation * norm.weight + norm.bias
        expected = F.linear(F.gelu(F.linear(normed, first.weight, first.bias)), last.weight, last.bias)
        torch.testing.assert_close(head(states), expected, atol=1e-5, rtol=1e-5)


def test_glu_head() -> None:
    """down(silu(gate(h)) * up(h)), with biases, of the decoder's width."""
    head, states = tiny_latent_model(0, latent_head="glu").latent_head, torch.randn(2, 3, 64)
    gate, up, down = head.gate_proj, head.up_proj, head.down_proj
    assert gate.weight.shape == (128, 64)
    with torch.no_grad():
        for layer in (gate, up, down):
            layer.bias.uniform_(-1, 1)
        inner = F.silu(F.linear(states, gate.weight, gate.bias)) * F.linear(states, up.weight, up.bias)
        expected = F.linear(inner, down.weight, down.bias)
        torch.testing.assert_close(head(states), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["simple", "glu"])
def test_states_go_through_the_head(name: str) -> None:
    """In the output `latent_states` is the head of `last_hidden_state`; logits do not pass it."""
    model, plain, inputs = tiny_latent_model(0, latent_head=name), tiny_latent_model(0), tiny_inputs()
    with torch.no_grad():
        output, expected = model(**inputs, logits_to_keep=3), plain(**inputs, logits_to_keep=3)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.latent_states, model.latent_head(output.last_hidden_state))
    assert not torch.allclose(output.latent_states, output.last_hidden_state, atol=1e-2)


@pytest.mark.parametrize("name", ["simple", "glu"])
def test_heads_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = tiny_latent_model(0, latent_head=name)
    model.save_pretrained(tmp_path)
    loaded = LatentQwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.latent_head == name
    mine, theirs = model.latent_head.state_dict(), loaded.latent_head.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", ["simple", "glu"])
def test_a_new_head_is_initialised_on_loading(name: str, tmp_path: Path) -> None:
    """A checkpoint without the head: its layers are drawn as PyTorch draws them, none is left empty."""
    tiny_latent_model(0).save_pretrained(tmp_path)
    config = tiny_latent_model(0, latent_head=name).config
    loaded = LatentQwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, config=config)
    for key, value in loaded.latent_head.state_dict().items():
        if "ln_q" in key:
            assert (value == float(key.endswith("weight"))).all(), key
        else:  # uniform within 1 / sqrt(inputs of the layer)
            bound = loaded.latent_head.get_submodule(key.rpartition(".")[0]).in_features ** -0.5
            assert value.abs().max() <= bound and 0.45 < value.std().item() / bound < 0.7, key


def test_the_width_of_a_gated_head(tmp_path: Path) -> None:
    """`latent_head_size` is that of the layers, travels with the model, and is refused where no layer has it."""
    model = tiny_latent_model(0, latent_head="glu", latent_head_size=24)
    assert [layer.weight.shape for layer in (model.latent_head.gate_proj, model.latent_head.down_proj)] == [
        (24, 64),
        (64, 24),
    ]
    assert not hasattr(model.config.get_text_config(), "latent_head_size"), "the stock configuration was changed"
    model.save_pretrained(tmp_path)
    loaded = LatentQwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.latent_head.up_proj.weight, model.latent_head.up_proj.weight)
    for fields, message in (
        ({"latent_head": "simple"}, "latent_head_size=24: the head 'simple' is as wide as the model"),
        ({}, "latent_head_size=24 without a latent head; give latent_head='glu'"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_latent_model(0, latent_head_size=24, **fields)
    with pytest.raises(ValueError, match="latent_head_size=0 must be at least 1"):
        tiny_latent_model(0, latent_head="glu", latent_head_size=0)


@pytest.mark.parametrize("name", ["simple", "glu"])
def test_a_new_head_has_the_dtype_of_the_model(name: str, tmp_path: Path) -> None:
    """A bf16 checkpoint without a head: the head drawn for it is bf16, and so is the end vector."""
    tiny_latent_model(0).bfloat16().save_pretrained(tmp_path)
    config = tiny_latent_model(0, latent_head=name, latent_stop_vector=True).config
    loaded = LatentQwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, config=config, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.latent_step(torch.randn(2, 64).bfloat16()).isfinite().all()


def test_an_unknown_head_is_refused(heads: dict) -> None:
    with pytest.raises(ValueError, match=r"unknown latent_head 'mlp'; choose one of \['glu', 'simple'\] or None"):
        tiny_latent_model(0, latent_head="mlp")


def test_a_head_is_registered_once(heads: dict) -> None:
    @register_latent_head("half")
    class Half(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.size = config.hidden_size

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states / 2

    assert register_latent_head("half")(Half) is Half, "again the same class: a file that is imported twice"

    class Other(Half):
        pass

    with pytest.raises(ValueError, match="latent head 'half' is already registered by .*Half; choose another name"):
        register_latent_head("half")(Other)
    config = tiny_latent_model(0).config
    config.latent_head = "half"
    head = build_latent_head(config)
    assert isinstance(head, Half) and head.size == tiny_config().get_text_config().hidden_size
