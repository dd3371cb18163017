"""Free-running latents: those of decoding, and the gradient of the naive form that runs whole sequences."""

import copy

import pytest
import torch

from tests.latent import tiny_latent_model
from tests.tiny import FAMILIES, tiny_images, tiny_processor
from tests.trainers.test_exposure import NUM_SLOTS, decoded  # noqa: F401  (a fixture)
from trainers.collators import LatentSFTCollator
from trainers.data.records import make_record
from trainers.exposure import LatentExposure, rank_in_span
from trainers.free_running import free_running_latents


def batch(family: str = "qwen2_5_vl") -> dict[str, torch.Tensor]:
    """Rows of different lengths: two regions, one region of another image, and text without an image."""
    first, second = tiny_images(3)[::2]
    boxes = [{"image": 0, "xyxy": [0.0, 0.0, 1.0, 1.0]}, {"image": 0, "xyxy": [0.1, 0.1, 0.3, 0.9]}]
    text = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, hello there."}]
    rows = [
        make_record(id="a", images=[first], question="What is it, and where?", answer="a cat", boxes=boxes),
        make_record(id="b", images=[second], question="What?", answer="b", boxes=boxes[:1]),
        make_record(id="c", images=[], question="", answer="", messages=text),
    ]
    return LatentSFTCollator(tiny_processor(family), "regions")(rows)


def model_and_inputs(family: str = "qwen2_5_vl", **fields: object) -> tuple:
    model, inputs = tiny_latent_model(family=family, **fields).train(), batch(family)
    inputs = {name: value for name, value in inputs.items() if name not in ("labels", "region_index")}
    own = inputs["input_ids"] == model.config.latent_token_id
    assert own.sum(dim=1)[0] > own.sum(dim=1)[1] > own.sum(dim=1)[2] == 0
    return model, inputs, own


def naive(model: torch.nn.Module, own: torch.Tensor, inputs: dict, embeds: torch.Tensor | None = None) -> torch.Tensor:
    """Latent after latent, each from a pass over the whole sequence; `embeds`: teacher's vectors at other slots."""
    slots = inputs["input_ids"] == model.config.latent_token_id
    fed = torch.zeros(*own.shape, 64) if embeds is None else torch.where(own[..., None], 0.0, embeds)
    for position in range(own.shape[1]):
        if own[:, position].any():
            hidden = model.base_model(**inputs, latent_embeds=fed, latent_mask=slots).last_hidden_state
            here = own & (torch.arange(own.shape[1]) == position)
            made = torch.nn.functional.pad(model.latent_step(hidden[:, :-1]), (0, 0, 1, 0))
            fed = torch.where(here[..., None], made, fed)
    return torch.where(own[..., None], fed, 0.0)


def test_they_are_the_latents_of_decoding(decoded: tuple) -> None:  # noqa: F811
    model, trace, fed = decoded
    latents = free_running_latents(model, trace.latent_mask, fed)
    ours = latents[trace.latent_mask].view(2, NUM_SLOTS, -1)
    torch.testing.assert_close(ours, trace.slot_inputs.view(2, NUM_SLOTS, -1), atol=1e-5, rtol=1e-4)
    assert ours.requires_grad and not latents[~trace.latent_mask].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_and_gradients_are_those_of_the_naive_form(family: str) -> None:
    model, inputs, own = model_and_inputs(family, latent_head="simple")
    grads = []
    for compute in (free_running_latents, naive):
        model.zero_grad()
        args = (own, inputs)
        latents = compute(model, *args)
        latents.square().mean().backward()
        trained = ((name, parameter.grad) for name, parameter in model.named_parameters())
        grads.append((latents.detach(), {name: grad.clone() for name, grad in trained if grad is not None}))
    (ours, our_grads), (theirs, their_grads) = grads
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert our_grads.keys() == their_grads.keys() and any("visual" in name for name in our_grads)
    for name, grad in their_grads.items():
        torch.testing.assert_close(our_grads[name], grad, atol=1e-4 * grad.abs().max().item() + 1e-9, rtol=1e-3)


def test_forced_latents_are_the_teachers_and_the_rest_follows_from_them() -> None:
    model, inputs, slots = model_and_inputs()
    torch.manual_seed(0)
    teacher = torch.randn(*slots.shape, 64)
    given = {**inputs, "latent_embeds": teacher, "latent_mask": slots}
    fed = LatentExposure("free", forced=1).inputs(model, slots, given)
    own = slots & (rank_in_span(slots) >= 1)
    assert 0 < own.sum() < slots.sum() and torch.equal(fed["latent_mask"], slots)
    forced = slots & ~own
    assert torch.equal(fed["latent_embeds"][forced], teacher[forced])
    with torch.no_grad():
        expected = naive(model, own, inputs, teacher)
    torch.testing.assert_close(fed["latent_embeds"][own], expected[own], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["own", "free"])
def test_single_latents_are_drawn(kind: str) -> None:
    model, inputs, slots = model_and_inputs()
    teacher = torch.ones(*slots.shape, 64)
    given = {**inputs, "latent_embeds": teacher, "latent_mask": slots}
    torch.manual_seed(1)
    shares = []
    for _ in range(10):
        fed = LatentExposure(kind, prob=0.5, unit="latent").inputs(model, slots, given)["latent_embeds"]
        shares.append(((fed != 1).any(-1) & slots).sum().item() / slots.sum().item())
    assert 0.2 < sum(shares) / 10 < 0.8 and len(set(shares)) > 2


def test_no_latents_at_all_cost_one_pass() -> None:
    model, inputs, slots = model_and_inputs()
    assert not free_running_latents(model, torch.zeros_like(slots), inputs).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_images_behind_latents_are_read(family: str) -> None:
    model, inputs, slots = model_and_inputs(family)
    row = int(slots[0].nonzero()[0])
    moved, own = copy.copy(inputs), torch.zeros_like(slots)
    moved["input_ids"] = inputs["input_ids"].clone()
    moved["input_ids"][slots] = model.config.latent_end_token_id
    own[0, [1, row]] = True  # the first before the image of its row
    moved["input_ids"][own] = model.config.latent_token_id
    with torch.no_grad():
        expected = naive(model, own, moved)
        latents = free_running_latents(model, own, moved)
    torch.testing.assert_close(latents[own], expected[own], atol=1e-5, rtol=1e-4)


def test_what_cannot_work_is_refused() -> None:
    model, inputs, slots = model_and_inputs()
    early = torch.zeros_like(slots)
    early[1, 0] = True
    with pytest.raises(ValueError, match="row 1 begins with a latent"):
        free_running_latents(model, early, inputs)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="activation checkpointing drops; set activation_checkpointing: false"):
        free_running_latents(model, slots, inputs)
