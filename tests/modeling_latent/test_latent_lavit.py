"""The two heads that LaViT trains: what they compute, how a model holds them, and inputs that do not fit."""

import math
from typing import Any

import pytest
import torch

from modeling_latent.latent_lavit import AttentionHead, ConceptHead
from tests.latent import tiny_latent_model

HIDDEN, CONCEPT = 6, 10


def randomised(head: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head.double()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.stack([(weight * entry).sum(dim=-1) + bias for entry in x.reshape(-1, x.shape[-1])])


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)], ids=str)
def test_concept_head(shape: tuple[int, ...]) -> None:
    """Linear, exact GELU `x / 2 (1 + erf(x / sqrt 2))`, linear."""
    head, states = randomised(ConceptHead(HIDDEN, CONCEPT)), torch.randn(*shape, HIDDEN).double()
    weights = dict(head.named_parameters())
    inner = linear(states, weights["mlp.0.weight"], weights["mlp.0.bias"])
    inner = inner / 2 * (1 + torch.erf(inner / math.sqrt(2)))
    expected = linear(inner, weights["mlp.2.weight"], weights["mlp.2.bias"]).reshape(*shape, CONCEPT)
    torch.testing.assert_close(head(states), expected)


def test_attention_head() -> None:
    """Scores are plain products: keys are not projected, nothing is scaled or normalised."""
    head, states, keys = randomised(AttentionHead(HIDDEN)), torch.randn(2, HIDDEN), torch.randn(2, 7, HIDDEN)
    states, keys = states.double(), keys.double()
    query = linear(states, head.query_proj.weight, head.query_proj.bias)
    scores = head(states, keys)
    assert scores.shape == (2, 7)
    for row in range(2):
        for key in range(7):
            torch.testing.assert_close(scores[row, key], (query[row] * keys[row, key]).sum())


def test_published_parameters() -> None:
    """The names behind the published prefixes, and the numbers of the published 3B student with a 32B teacher."""
    with torch.device("meta"):
        concept, attention = ConceptHead(2048, 5120), AttentionHead(2048)
    names = [f"mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
    assert [name for name, _ in concept.named_parameters()] == names
    assert [name for name, _ in attention.named_parameters()] == ["query_proj.weight", "query_proj.bias"]
    assert sum(parameter.numel() for parameter in concept.parameters()) == 14_687_232
    assert sum(parameter.numel() for parameter in attention.parameters()) == 4_196_352


def test_gradients_reach_states_and_keys() -> None:
    states, keys = torch.randn(2, HIDDEN, requires_grad=True), torch.randn(2, 7, HIDDEN, requires_grad=True)
    AttentionHead(HIDDEN)(states, keys).square().sum().backward()
    assert states.grad.abs().sum() > 0 and keys.grad.abs().sum() > 0
    states.grad = None
    ConceptHead(HIDDEN, CONCEPT)(states).square().sum().backward()
    assert states.grad.abs().sum() > 0


FITTING = torch.zeros(2, HIDDEN)
MISFITS: dict[str, tuple[torch.nn.Module, tuple[torch.Tensor, ...]]] = {
    "states of another width": (ConceptHead(HIDDEN, CONCEPT), (torch.zeros(2, HIDDEN + 1),)),
    "states of another width than the head": (AttentionHead(HIDDEN), (torch.zeros(2, 4), torch.zeros(2, 7, HIDDEN))),
    "keys of another width": (AttentionHead(HIDDEN), (FITTING, torch.zeros(2, 7, HIDDEN + 1))),
    "keys of another batch": (AttentionHead(HIDDEN), (FITTING, torch.zeros(3, 7, HIDDEN))),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_raise(name: str) -> None:
    head, inputs = MISFITS[name]
    with pytest.raises(RuntimeError, match="shape|size"):
        head(*inputs)


SHAPES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "concept_head": (
        {"concept_head_size": 12},
        {"mlp.0.weight": (64, 64), "mlp.0.bias": (64,), "mlp.2.weight": (12, 64), "mlp.2.bias": (12,)},
    ),
    "attention_head": ({"attention_head": True}, {"query_proj.weight": (64, 64), "query_proj.bias": (64,)}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_holds_what_its_configuration_names(name: str) -> None:
    """Each head alone, drawn as the backbone draws its layers."""
    fields, shapes = SHAPES[name]
    model = tiny_latent_model(0, **fields)
    assert [other for other in SHAPES if getattr(model, other) is not None] == [name]
    head = getattr(model, name)
    assert {key: tuple(parameter.shape) for key, parameter in head.named_parameters()} == shapes
    deviation = model.config.get_text_config().initializer_range
    for key, parameter in head.named_parameters():
        if key.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(deviation, rel=0.15) and abs(parameter.mean()) < deviation


@pytest.mark.parametrize("size", [0, -3])
def test_a_width_that_is_none_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"concept_head_size={size} must be the width of the teacher's states, or No"):
        tiny_latent_model(0, concept_head_size=size)
