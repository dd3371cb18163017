"""The forward of every Qwen-VL family with latents, against the stock parts put together by hand."""

import inspect
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from modeling_latent import LATENT_CLASSES
from modeling_latent.latent_qwen_vl import forward_with
from tests.latent import liven, tiny_latent_model, tiny_pair
from tests.tiny import FAMILIES, tiny_inputs, tiny_processor
from trainers.tiny import TINY_FAMILIES

HIDDEN, SCALE = 64, 6.0
OURS = {"latent_embeds", "latent_mask", "latent_plan"}
VIDEO_GRID = torch.tensor([[2, 4, 4]])  # two frames of 2 x 2 tokens


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> torch.nn.Module:
    return tiny_pair(0, SCALE, family)[1]


@pytest.fixture(scope="module")
def stock(family: str) -> torch.nn.Module:
    return tiny_pair(0, SCALE, family)[0]


@pytest.fixture
def inputs(family: str) -> dict[str, torch.Tensor]:
    """Two rows with an image each, the first one padded on the left."""
    return dict(tiny_inputs(family=family))


@pytest.fixture
def latents(family: str, inputs: dict[str, torch.Tensor]) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Inputs with three slots, the mask of them, and dense vectors that are not a number anywhere else."""
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[0, -5:-3], mask[1, -9] = True, True
    embeds = torch.full((*mask.shape, HIDDEN), float("nan"))
    embeds[mask] = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    slot = tiny_processor(family).latent_token_id
    return {**inputs, "input_ids": inputs["input_ids"].masked_fill(mask, slot)}, mask, embeds


def by_hand(
    stock: torch.nn.Module, inputs: dict[str, torch.Tensor], mask: torch.Tensor, embeds: torch.Tensor
) -> torch.Tensor:
    """Logits `(batch, length, vocabulary)`: every embedding is put in its place, then the text model runs."""
    ids, is_image = inputs["input_ids"], inputs["mm_token_type_ids"] == 1
    with torch.no_grad():
        features = stock.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        x = stock.get_input_embeddings()(ids)
        x[is_image] = torch.cat(features.pooler_output)
        x[mask] = embeds[mask]
        positions, _ = stock.model.get_rope_index(
            ids,
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
        deep: dict[str, Any] = {}
        if "deepstack_features" in features:
            deep["deepstack_visual_embeds"] = [torch.cat(feature) for feature in features.deepstack_features]
            deep["visual_pos_masks"] = is_image
        hidden = stock.model.language_model(
            inputs_embeds=x, position_ids=positions, attention_mask=inputs["attention_mask"], **deep
        ).last_hidden_state
        return stock.lm_head(hidden)


def assert_close(ours: torch.Tensor, expected: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], expected[real], atol=1e-4, rtol=1e-4)


# Signatures


def test_signatures_are_those_of_the_stock_classes(family: str, model: torch.nn.Module) -> None:
    """`generate` and the Trainer read them: an argument of another family is refused, or its column dropped."""
    stock_class = TINY_FAMILIES[family].model_class
    ours = set(inspect.signature(model.forward).parameters)
    theirs = set(inspect.signature(stock_class.forward).parameters) - {"self"}
    assert ours - theirs <= OURS | {"return_dict", "num_items_in_batch", "use_cache"} and theirs <= ours
    assert ours >= OURS and list(inspect.signature(model.forward).parameters)[-1] == "kwargs"
    backbone = set(inspect.signature(model.model.forward).parameters)
    assert backbone >= set(inspect.signature(stock_class.base_model.fget(model).forward).parameters) | OURS
    has_seconds = {"second_per_grid_ts" in names for names in (ours, theirs, backbone)}
    assert has_seconds == {family == "qwen2_5_vl"}
    assert LATENT_CLASSES[family][1] is type(model)


def test_generate_takes_what_the_stock_class_takes(
    family: str, model: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> None:
    options = {"max_new_tokens": 2, "latent_strategy": "off", "do_sample": False}
    if family == "qwen2_5_vl":
        assert model.generate(**inputs, second_per_grid_ts=None, **options).shape[0] == 2
    else:
        with pytest.raises(ValueError, match="second_per_grid_ts"):
            model.generate(**inputs, second_per_grid_ts=torch.ones(1), **options)


def test_forward_with_keeps_the_rest() -> None:
    def forward(self: Any, a: int, b: int = 2, **kwargs: Any) -> tuple:
        """Says what it got."""
        return a, b, kwargs

    further = forward_with(forward, c=int | None)
    assert list(inspect.signature(further).parameters) == ["self", "a", "b", "c", "kwargs"]
    assert inspect.signature(further).parameters["c"].annotation == int | None
    assert further(None, 1, c=3) == (1, 2, {"c": 3}) and further.__doc__ == "Says what it got."


# Latents


def test_vectors_take_the_place_of_embeddings(model: torch.nn.Module, stock: torch.nn.Module, latents: Any) -> None:
    """With images, padding and rotary positions; by slot ids or by a mask, with ids or with their embeddings."""
    inputs, mask, embeds = latents
    expected = by_hand(stock, inputs, mask, embeds)
    tokens = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with torch.no_grad():
        for given in ({}, {"latent_mask": mask}, {"inputs_embeds": tokens}):
            model.model.rope_deltas = None
            assert_close(model(**inputs, latent_embeds=embeds, **given).logits, expected, inputs)
        moved = embeds.clone()
        moved[1, -9] += 1.0
        changed = model(**inputs, latent_embeds=moved).logits
    assert torch.equal(changed[0], model(**inputs, latent_embeds=embeds).logits[0])
    assert (changed[1, -8:] - expected[1, -8:]).abs().max() > 0.1, "the vector matters"


def test_deep_stack_features_survive(model: torch.nn.Module, inputs: dict[str, torch.Tensor], family: str) -> None:
    """They are added on the way with latents too, and change what comes behind the image."""
    if family != "qwen3_vl":
        assert not hasattr(model.model.visual, "deepstack_merger_list")
        return
    blind = liven(tiny_latent_model(0, family=family), SCALE)
    for merger in blind.model.visual.deepstack_merger_list:
        torch.nn.init.zeros_(merger.linear_fc2.weight)
        torch.nn.init.zeros_(merger.linear_fc2.bias)
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[:, -1] = True
    embeds = torch.randn(*mask.shape, HIDDEN)
    with torch.no_grad():
        seeing, not_seeing = (m(**inputs, latent_embeds=embeds, latent_mask=mask).logits for m in (model, blind))
    assert (seeing[:, -1] - not_seeing[:, -1]).abs().max() > 0.1


def test_a_latent_is_never_an_image(model: torch.nn.Module, stock: torch.nn.Module, latents: Any) -> None:
    """Neither a slot fed by the placeholder's own embedding, nor one that reads as a placeholder, nor a token with the
    same embedding (rows that were never trained are equal in some checkpoints)."""
    inputs, mask, embeds = latents
    image_id = model.config.image_token_id
    embeds = embeds.clone()
    embeds[mask] = model.get_input_embeddings().weight[image_id].detach()
    expected = by_hand(stock, inputs, mask, embeds)
    readable = {**inputs, "input_ids": inputs["input_ids"].masked_fill(mask, image_id)}
    tokens = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with torch.no_grad():
        assert_close(model(**inputs, latent_embeds=embeds).logits, expected, inputs)
        assert_close(model(**readable, latent_embeds=embeds, latent_mask=mask).logits, expected, inputs)
        model.model.rope_deltas = None
        positions = model.model.compute_3d_position_ids(
            inputs["input_ids"],
            inputs_embeds=tokens,
            video_grid_thw=None,
            past_key_values=None,
            **{name: inputs[name] for name in ("image_grid_thw", "attention_mask", "mm_token_type_ids")},
        )
        without_ids = {name: value for name, value in inputs.items() if name != "input_ids"}
        output = model(
            **without_ids, inputs_embeds=tokens, latent_embeds=embeds, latent_mask=mask, position_ids=positions
        )
    assert_close(output.logits, expected, inputs)
    twin = liven(tiny_latent_model(0, family=model.config.model_type.removeprefix("latent_")), SCALE)
    with torch.no_grad():
        table = twin.get_input_embeddings().weight
        table[inputs["input_ids"][1, -1]] = table[image_id]
        assert twin(**inputs, latent_embeds=embeds).logits.isfinite().all()


def test_text_after_an_image(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """A text batch with latents does not take up the rotary offsets of the images before it."""
    text = {name: inputs[name][:1] for name in ("input_ids", "attention_mask")}
    mask = torch.zeros_like(text["input_ids"], dtype=torch.bool)
    mask[0, -4:-2] = True
    given = {**text, "latent_embeds": torch.randn(*mask.shape, HIDDEN), "latent_mask": mask}
    with torch.no_grad():
        model.model.rope_deltas = None
        before = model(**given).logits
        model(**inputs)
        assert (model.model.rope_deltas != 0).any()
        assert torch.equal(model(**given).logits, before)


@pytest.mark.parametrize("with_image", [True, False])
def test_a_loop_of_the_caller(model: torch.nn.Module, latents: Any, with_image: bool) -> None:
    """Prompt and steps fed one by one over a cache, without position ids, equal one forward."""
    inputs, mask, embeds = latents
    ids, mask, embeds = inputs["input_ids"][1:], mask[1:], embeds[1:]
    image: dict[str, torch.Tensor] = {}
    if with_image:
        count = int(inputs["image_grid_thw"][0].prod())
        image = {"pixel_values": inputs["pixel_values"][count:], "image_grid_thw": inputs["image_grid_thw"][1:]}
        image["mm_token_type_ids"] = inputs["mm_token_type_ids"][1:]
    split = mask.shape[1] - 10  # the slot is the second step
    with torch.no_grad():
        whole = model(input_ids=ids, latent_embeds=embeds, latent_mask=mask, **image).logits
        model.model.rope_deltas = None
        cache = DynamicCache(config=model.config.get_text_config())
        for start, stop in [(0, split), *((step, step + 1) for step in range(split, mask.shape[1]))]:
            part = {"input_ids": ids[:, start:stop], **(image if start == 0 else {})}
            if with_image and start == 0:
                part["mm_token_type_ids"] = image["mm_token_type_ids"][:, :stop]
            part |= {"latent_embeds": embeds[:, start:stop], "latent_mask": mask[:, start:stop]}
            logits = model(**part, past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(logits, whole[:, start:stop], atol=1e-4, rtol=1e-4)
    assert mask[0, split:].any()


def test_gradients(family: str, latents: Any) -> None:
    """They reach the vectors, the table, and the vision tower through every one of its outputs."""
    inputs, mask, embeds = latents
    model = tiny_latent_model(0, family=family).train()
    vectors = embeds.nan_to_num().requires_grad_()
    labels = inputs["input_ids"].masked_fill(torch.arange(mask.shape[1]) < mask.shape[1] - 3, -100)
    model(**inputs, latent_embeds=vectors, labels=labels).loss.backward()
    assert vectors.grad[mask].abs().sum() > 0 and not vectors.grad[~mask].any()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    slot = tiny_processor(family).latent_token_id
    assert not model.get_input_embeddings().weight.grad[slot].any(), "the slot's own embedding was not read"


# Videos


def video_inputs(model: torch.nn.Module, family: str) -> dict[str, torch.Tensor]:
    """Text, an image, text, a video of two frames, text; Qwen3-VL has text between the frames."""
    config, image = model.config, dict(tiny_inputs(family=family))
    count = int(image["image_grid_thw"][0].prod())
    frames = [config.video_token_id] * 4
    video = [*frames, 7, *frames] if family == "qwen3_vl" else [*frames, *frames]
    ids = torch.tensor([[5, *[config.image_token_id] * (count // 4), 6, *video, 8, 9, 10]])
    types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    pixels = torch.randn(int(VIDEO_GRID.prod()), image["pixel_values"].shape[1], generator=torch.manual_seed(1))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": types,
        "pixel_values": image["pixel_values"][:count],
        "image_grid_thw": image["image_grid_thw"][:1],
        "pixel_values_videos": pixels,
        "video_grid_thw": VIDEO_GRID,
    }


def test_an_image_and_a_video(family: str, model: torch.nn.Module, stock: torch.nn.Module) -> None:
    """With nothing replaced, the way with latents gives what the stock forward gives."""
    inputs = video_inputs(model, family)
    nothing = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    embeds = torch.full((*nothing.shape, HIDDEN), float("nan"))
    seconds = [{"second_per_grid_ts": torch.tensor([rate])} for rate in (1.0, 3.0)] if family == "qwen2_5_vl" else [{}]
    seen = []
    with torch.no_grad():
        for further in seconds:
            expected = stock(**inputs, **further).logits
            ours = model(**inputs, latent_embeds=embeds, latent_mask=nothing, **further).logits
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
            seen.append(ours)
    assert all((seen[0] - other).abs().max() > 1e-2 for other in seen[1:]), "seconds between frames count"
