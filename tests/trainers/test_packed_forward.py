"""The packed forward: hidden states and gradients of joined samples are those of padded ones, in every family."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.integrations import flash_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.latent import liven, tiny_latent_model
from tests.tiny import FAMILIES, tiny_images, tiny_processor
from trainers import LatentSFTCollator
from trainers.data.records import make_record
from trainers.packed_forward import PACKED_SDPA, pack_decoder


def batch(family: str, latents: bool = True) -> dict[str, torch.Tensor]:
    """Five samples of different lengths with no, one and two images; in each a few positions are fed by a vector."""
    first, second, third, fourth = tiny_images(4)
    images = [[first], [], [second, third], [fourth], []]
    records = [
        make_record(str(i), "Where is it? " * (3 * i % 4 + 1), "Here", pictures, chain=["map", "hole"] * (i + 1))
        for i, pictures in enumerate(images)
    ]
    inputs = LatentSFTCollator(tiny_processor(family))(records)
    del inputs["labels"]
    if latents:
        ends = inputs["attention_mask"].sum(dim=1, keepdim=True)
        places = torch.arange(ends.max()) - ends
        inputs["latent_mask"] = torch.nn.functional.pad(
            (places >= -6) & (places < -2), (0, inputs["input_ids"].shape[1] - places.shape[1])
        )
        generator = torch.Generator().manual_seed(1)
        inputs["latent_embeds"] = torch.randn(*inputs["input_ids"].shape, 64, generator=generator)
    return inputs


def pair(family: str = "qwen2_5_vl") -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model in train mode and a packed copy of it."""
    model = liven(tiny_latent_model(family=family)).train()
    packed = copy.deepcopy(model)
    pack_decoder(packed)
    return model, packed


def spied(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """Shapes of what the layers of the text model are given, filled by each forward."""
    shapes: list[tuple[int, ...]] = []
    model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    return shapes


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["stored", "reentrant", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_are_those_of_padded_rows(family: str, checkpointing: bool | None) -> None:
    inputs, models = batch(family), pair(family)
    if checkpointing is not None:
        for model in models:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    mask = inputs["attention_mask"].bool()
    weight = torch.randn(*mask.shape, 64, generator=torch.Generator().manual_seed(0)) * mask.unsqueeze(-1)
    shapes, hidden = spied(models[1]), []
    for model in models:
        hidden.append(model.base_model(**inputs, use_cache=False).last_hidden_state)
        (hidden[-1] * weight).sum().backward()
    assert shapes[0] == (1, int(mask.sum()), 64) and mask.numel() > mask.sum() > 5
    torch.testing.assert_close(hidden[1][mask], hidden[0][mask], rtol=1e-5, atol=1e-5)
    assert not hidden[1][~mask].any()
    for (name, expected), found in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (expected.grad is None) == (found.grad is None), name
        if expected.grad is not None:
            limit = 1e-5 * max(1.0, float(expected.grad.abs().max()))
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=limit, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_does_not_see_its_neighbours(family: str) -> None:
    """Another sample before it, and its hidden states are the same; alone it is the same, too."""
    inputs = batch(family, latents=False)
    _, packed = pair(family)
    keep = [1, 4]  # text alone, so that no images have to be left out
    text = {name: value[keep] for name, value in inputs.items() if len(value) == 5 and name != "image_grid_thw"}
    with torch.no_grad():
        both = packed.base_model(**text, use_cache=False).last_hidden_state
        changed = {**text, "input_ids": text["input_ids"].clone()}
        changed["input_ids"][0, 3] += 1
        other = packed.base_model(**changed, use_cache=False).last_hidden_state
        alone = packed.base_model(**{k: v[1:] for k, v in text.items()}, use_cache=False).last_hidden_state
    assert not torch.equal(other[0], both[0])
    assert torch.equal(other[1], both[1])
    torch.testing.assert_close(alone[0], both[1], rtol=1e-6, atol=1e-6)


def test_positions_of_text_that_are_given_in_four_channels_are_taken() -> None:
    inputs = batch("qwen2_5_vl")
    model, packed = pair()
    places = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    del inputs["mm_token_type_ids"]
    hidden = [
        each.base_model(**inputs, position_ids=given, use_cache=False).last_hidden_state
        for each, given in ((model, places.expand(3, -1, -1)), (packed, places.expand(4, -1, -1)), (packed, places))
    ]
    mask = inputs["attention_mask"].bool()
    for found in hidden[1:]:
        torch.testing.assert_close(found[mask], hidden[0][mask], rtol=1e-5, atol=1e-5)


def test_only_whole_padded_sequences_in_train_mode_are_packed() -> None:
    inputs = batch("qwen2_5_vl")
    model, packed = pair()
    shapes, padded = spied(packed), tuple(inputs["input_ids"].shape)
    for change in (lambda: packed.eval(), lambda: packed.train()):
        change()
        packed.base_model(**inputs, use_cache=not packed.training)
    packed.base_model(**inputs, use_cache=True)
    without = {**inputs, "attention_mask": None}
    packed.base_model(**without, use_cache=False)
    assert [shape[:2] for shape in shapes] == [padded, (1, int(inputs["attention_mask"].sum())), padded, padded]
    expected = model.eval().generate(inputs["input_ids"][:, :20], max_new_tokens=4, do_sample=False)
    found = packed.eval().generate(inputs["input_ids"][:, :20], max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)


def test_hidden_states_of_the_layers_are_padded_again() -> None:
    inputs, (model, packed) = batch("qwen2_5_vl"), pair()
    mask = inputs["attention_mask"].bool()
    outputs = [each.base_model(**inputs, use_cache=False, output_hidden_states=True) for each in (model, packed)]
    expected, found = (output.hidden_states for output in outputs)
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[mask], other[mask], rtol=1e-5, atol=1e-5)


def test_a_packed_model_can_be_copied_and_saved(tmp_path: Any) -> None:
    inputs, (_, packed) = batch("qwen2_5_vl"), pair()
    again = copy.deepcopy(packed)
    with torch.no_grad():
        packed.get_decoder().norm.weight.zero_()
        assert not packed.base_model(**inputs, use_cache=False).last_hidden_state.any()
        assert again.base_model(**inputs, use_cache=False).last_hidden_state.any()
    again.save_pretrained(tmp_path)
    loaded = type(again).from_pretrained(tmp_path)
    assert loaded.get_decoder().config._attn_implementation == "sdpa"


# Attention ----------------------------------------------------------------------------------------------------------


def test_flash_kernels_get_the_boundaries_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself needs a GPU; here SDPA in its place, by the boundaries that it is given."""
    inputs, calls = batch("qwen2_5_vl"), []

    def varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any) -> torch.Tensor:
        assert mask is None and kwargs["is_causal"] and kwargs["max_length_q"] == kwargs["max_length_k"]
        assert kwargs["cu_seq_lens_q"].dtype == torch.int32
        calls.append(kwargs["cu_seq_lens_q"].tolist())
        lengths = kwargs["cu_seq_lens_k"].diff().tolist()
        assert max(lengths) == kwargs["max_length_q"]
        groups = query.shape[2] // key.shape[2]
        states = (query, key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2))
        parts = zip(*(s.transpose(1, 2).split(lengths, dim=2) for s in states), strict=True)
        scale = kwargs["softmax_scale"]
        out = [torch.nn.functional.scaled_dot_product_attention(*p, is_causal=True, scale=scale) for p in parts]
        return torch.cat(out, dim=2).transpose(1, 2)

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", varlen)
    model = liven(tiny_latent_model()).train()
    packed = copy.deepcopy(model)
    packed.get_decoder().config._attn_implementation = "flash_attention_2"
    pack_decoder(packed)
    assert packed.get_decoder().config._attn_implementation == "flash_attention_2"
    mask = inputs["attention_mask"].bool()
    expected, found = (each.base_model(**inputs, use_cache=False).last_hidden_state for each in (model, packed))
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)
    assert calls == [[0, *inputs["attention_mask"].sum(dim=1).cumsum(0).tolist()]] * 2


def _eager(config: Any) -> None:
    config._attn_implementation = "eager"


def _sliding(config: Any) -> None:
    config.layer_types = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_eager, "attn_implementation='eager', which cannot keep the samples of a row apart; load the model with"),
        (_sliding, r"layers of the kind \['sliding_attention'\] and attn_implementation='sdpa': they would mix"),
    ],
)
def test_attention_that_would_mix_samples_is_refused(change: Callable[[Any], None], message: str) -> None:
    model = tiny_latent_model()
    change(model.get_decoder().config)
    with pytest.raises(ValueError, match=f"latent_packing='sequence' with {message}"):
        pack_decoder(model)


def test_a_text_model_that_drops_the_lengths_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, (_, packed) = batch("qwen2_5_vl"), pair()
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def deaf(*args: Any, sample_lengths: Any = None, **kwargs: Any) -> Any:
        return stock(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, PACKED_SDPA, deaf)
    with pytest.raises(RuntimeError, match="does not hand its arguments on to the attention interface"):
        packed.base_model(**inputs, use_cache=False)
