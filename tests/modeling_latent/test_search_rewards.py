"""Rewards of the search: values by hand, bounds, extreme logits, gradients, and what is refused."""

import math

import pytest
import torch

from modeling_latent.search_rewards import (
    REWARD_ROWS,
    REWARDS,
    confidence,
    paper_confidence,
    published_confidence,
)

V = 152064


def spread(*shares: float, size: int = V) -> torch.Tensor:
    """`(1, size)` logits of one row: these probabilities, and the rest evenly on what is left."""
    rest = (1 - sum(shares)) / (size - len(shares))
    probabilities = torch.full((size,), rest, dtype=torch.float64)
    probabilities[: len(shares)] = torch.tensor(shares, dtype=torch.float64)
    return probabilities.clamp(min=1e-30).log().float().unsqueeze(0)


def even(count: int) -> torch.Tensor:
    """Uniform over `count` tokens and nothing on the others."""
    return torch.where(torch.arange(V) < count, 0.0, -1e4).unsqueeze(0)


def one_and_nine(share: float) -> torch.Tensor:
    """A probability on one token, the rest on nine."""
    return spread(share, *[(1 - share) / 9] * 9)


# (logits, published form, paper's form with k = 10), from the method's own account of the two
TABLE = [
    (even(1), 20.72, 1.00),
    (one_and_nine(0.99), 6.12, 0.92),
    (one_and_nine(0.9), 4.06, 0.46),
    (one_and_nine(0.5), 2.67, -0.79),
    (even(10), 2.303, -1.30),
    (even(1000), 6.91, 0.93),
    (torch.zeros(1, V), 11.93, 0.999),
]


@pytest.mark.parametrize(("logits", "published", "paper"), TABLE)
def test_known_values(logits: torch.Tensor, published: float, paper: float) -> None:
    assert published_confidence(logits, 10).item() == pytest.approx(published, abs=6e-3)
    assert paper_confidence(logits, 10).item() == pytest.approx(paper, abs=6e-3)


def test_only_the_default_grows_with_confidence() -> None:
    ordered = [torch.zeros(1, V), even(1000), even(10), *(one_and_nine(each) for each in (0.5, 0.9, 0.99)), even(1)]
    values = [confidence(each).item() for each in ordered]
    assert values == sorted(values) and len(set(values)) == len(values)
    assert values[0] == pytest.approx(0.0, abs=1e-5) and values[-1] == pytest.approx(1.0, abs=1e-5)
    assert values[1] == pytest.approx(1 - math.log(1000) / math.log(V), abs=1e-5)
    for reward in (published_confidence, paper_confidence):
        assert reward(torch.zeros(1, V), 10) > reward(one_and_nine(0.9), 10)


def test_formulas_by_hand() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64)
    for row in range(2):
        expected = {"full": 0.0, "published": 0.0, "paper": 0.0}
        for place in range(3):
            weights = [math.exp(each) for each in logits[row, place].tolist()]
            shares = sorted((each / sum(weights) for each in weights), reverse=True)
            expected["full"] += (1 + sum(each * math.log(each) for each in shares) / math.log(7)) / 3
            expected["published"] += sum(-math.log(each + 1e-10) for each in shares[:4]) / 4 / 3
            expected["paper"] += (1 + sum(each * math.log(each) for each in shares[:4])) / 3
        assert confidence(logits)[row].item() == pytest.approx(expected["full"], abs=1e-6)
        assert published_confidence(logits, 4)[row].item() == pytest.approx(expected["published"], abs=1e-6)
        assert paper_confidence(logits, 4)[row].item() == pytest.approx(expected["paper"], abs=1e-6)


def test_all_tokens_may_count() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    shares = logits.softmax(-1)
    expected = -(shares + 1e-10).log().mean((1, 2))
    torch.testing.assert_close(published_confidence(logits, 7), expected)
    whole = 1 - (1 - confidence(logits)) * math.log(7)
    torch.testing.assert_close(paper_confidence(logits, 7), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("top_k", [0, -1, 8])
@pytest.mark.parametrize("reward", [published_confidence, paper_confidence])
def test_a_number_of_tokens_that_is_refused(reward: object, top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k={top_k} must be between 1 and the size of the vocabulary, 7"):
        reward(torch.zeros(1, 2, 7), top_k)


def test_the_floor_bounds_the_published_form() -> None:
    for top_k in (2, 10):
        found = published_confidence(even(1) * 1e3, top_k).item()
        assert found == pytest.approx(-math.log(1e-10) * (top_k - 1) / top_k, abs=1e-3)
        assert found <= 23.026 * (top_k - 1) / top_k


@pytest.mark.parametrize("lowest", [-3e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("name", list(REWARDS))
def test_logits_that_are_as_low_as_can_be(name: str, lowest: float) -> None:
    """Chameleon silences its image tokens so."""
    logits = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    silenced = torch.cat([logits, torch.full((2, 3, 10), lowest)], dim=-1).requires_grad_()
    value = REWARDS[name].function(silenced, 10)
    (gradient,) = torch.autograd.grad(value.sum(), silenced)
    assert value.shape == (2,) and value.isfinite().all() and gradient.isfinite().all()
    assert not gradient[..., 40:].any() and gradient[..., :40].any()


@pytest.mark.parametrize("name", list(REWARDS))
def test_gradients(name: str) -> None:
    """Each step up the gradient raises the reward, in half precision too the value is float32."""
    logits = torch.randn(4, 2, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reward = REWARDS[name]
    assert reward.rows in REWARD_ROWS
    value = reward.function(logits, 5)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert (reward.function(logits.detach() + 0.1 * gradient, 5) > value).all()
    half = reward.function(logits.detach().bfloat16(), 5)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, value.detach(), atol=3e-2, rtol=0)
