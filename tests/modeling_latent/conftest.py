"""What the tests of one model share: a lively tiny model, the stock model of the same weights, and a batch."""

import pytest
import torch

from modeling_latent import LatentQwen2_5_VLForConditionalGeneration
from tests.latent import tiny_pair
from tests.tiny import tiny_inputs


@pytest.fixture(scope="module")
def model() -> LatentQwen2_5_VLForConditionalGeneration:
    return tiny_pair(0, 6.0)[1]


@pytest.fixture(scope="module")
def stock() -> torch.nn.Module:
    return tiny_pair(0, 6.0)[0]


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """Two rows with an image each, the first one padded on the left."""
    return dict(tiny_inputs())
