"""Exposure to the model's own latents: the fed vectors are those of decoding, row by row and pass by pass."""

import pytest
import torch

from tests.latent import tiny_latent_model
from tests.tiny import tiny_inputs
from trainers.exposure import LatentExposure

NUM_SLOTS = 3


@pytest.fixture
def decoded() -> tuple:
    """A model in train mode, its trace of two rows with three slots each, and the inputs of the replayed sequences."""
    model = tiny_latent_model()
    inputs = tiny_inputs()
    output = model.generate(
        **inputs,
        latent_strategy="fixed",
        num_latent_steps=NUM_SLOTS,
        force_span=True,
        max_new_tokens=NUM_SLOTS + 3,
        do_sample=False,
        return_dict_in_generate=True,
    )
    trace = output.latent_trace
    new = trace.sequences.shape[1] - trace.prompt_length
    fed = {
        "input_ids": trace.readable_sequences,  # ordinary ids: what the slots would have said
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, new)),
        "pixel_values": inputs["pixel_values"],
        "image_grid_thw": inputs["image_grid_thw"],
    }
    return model.train(), trace, fed


def test_text_feeds_nothing_and_evaluation_is_text(decoded: tuple) -> None:
    model, trace, fed = decoded
    assert LatentExposure().inputs(model, trace.latent_mask, fed) == {}
    assert LatentExposure("own").inputs(model.eval(), trace.latent_mask, fed) == {}


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_after_n_passes_the_first_n_latents_are_those_of_decoding(decoded: tuple, passes: int) -> None:
    model, trace, fed = decoded
    latents = LatentExposure("own", passes=passes).inputs(model, trace.latent_mask, fed)
    assert torch.equal(latents["latent_mask"], trace.latent_mask)
    ours = latents["latent_embeds"][trace.latent_mask].view(2, NUM_SLOTS, -1)
    theirs = trace.slot_inputs.view(2, NUM_SLOTS, -1)
    torch.testing.assert_close(ours[:, :passes], theirs[:, :passes], atol=1e-5, rtol=1e-4)
    if passes < NUM_SLOTS:
        assert (ours[:, passes:] - theirs[:, passes:]).abs().max() > 1e-3


def test_only_the_drawn_rows_are_fed_and_the_vectors_carry_no_gradient(decoded: tuple) -> None:
    model, trace, fed = decoded
    torch.manual_seed(0)
    shares = []
    for _ in range(20):
        latents = LatentExposure("own", prob=0.5).inputs(model, trace.latent_mask, fed)
        rows = latents["latent_mask"].any(dim=1)
        assert torch.equal(latents["latent_mask"], trace.latent_mask & rows[:, None])
        assert not latents["latent_embeds"].requires_grad
        shares.append(rows.float().mean().item())
    assert 0.2 < sum(shares) / len(shares) < 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "self"}, "latent_exposure='self'"),
        ({"kind": "own", "prob": 0.0}, "latent_exposure_prob=0.0"),
        ({"kind": "own", "passes": 0}, "latent_exposure_passes=0"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentExposure(**options)
