"""Captured attention rows: the weights of eager attention, beside other kernels, without a trace left behind."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_latent import LatentQwen2_5_VLForConditionalGeneration, capture_attention_rows
from modeling_latent.latent_attention import attention_of_rows
from tests.latent import liven, tiny_latent_model
from tests.tiny import FAMILIES, tiny_inputs, tiny_stock_model

HEADS, LAYERS = 4, 2


def build(implementation: str = "sdpa", seed: int = 0) -> LatentQwen2_5_VLForConditionalGeneration:
    """A tiny model with large weights: its attention is far from uniform."""
    model = liven(tiny_latent_model(seed), 6.0)
    model.set_attn_implementation(implementation)
    return model


@pytest.fixture(scope="module")
def model() -> LatentQwen2_5_VLForConditionalGeneration:
    return build()


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """Two rows of different length, the first one padded on the left."""
    return dict(tiny_inputs())


@pytest.fixture(scope="module")
def eager(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Attention of every layer as the stock class returns it, `(batch, heads, length, length)`."""
    stock = liven(tiny_stock_model(0), 6.0)
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = stock(**inputs, output_attentions=True).attentions
    assert len(attentions) == LAYERS and (attentions[0].amax(-1)[1, :, -1] > 0.1).any()
    return list(attentions)


def rows_of(attention: torch.Tensor, rows: torch.LongTensor) -> torch.Tensor:
    """Chosen query rows of full weights."""
    index = (rows % attention.shape[2]).view(rows.shape[0], 1, -1, 1)
    return attention.gather(2, index.expand(-1, HEADS, -1, attention.shape[3]))


def capture(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> dict[int, torch.Tensor]:
    with capture_attention_rows(model, **options) as captured, torch.no_grad():
        model(**inputs)
    return captured.weights


# The weights


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [None, [[-1, 43, 30], [0, 7, -3]]])
@pytest.mark.parametrize("layers", [None, [1]])
def test_rows_equal_eager_attention(
    inputs: dict[str, torch.Tensor], eager: list[torch.Tensor], implementation: str, rows: Any, layers: Any
) -> None:
    """All layers or some, the last row or chosen ones from either end, with left padding."""
    index = None if rows is None else torch.tensor(rows)
    weights = capture(build(implementation), inputs, rows=index, layers=layers)
    assert list(weights) == (layers or [0, 1])
    expected = torch.full((2, 1), -1) if index is None else index
    for layer, captured in weights.items():
        assert captured.dtype == torch.float32 and captured.shape == (2, HEADS, expected.shape[1], 45)
        torch.testing.assert_close(captured, rows_of(eager[layer], expected), atol=1e-5, rtol=0)
        torch.testing.assert_close(captured.sum(-1), torch.ones(captured.shape[:-1]))
        assert not captured[0, ..., : 45 - 27].any(), "padding is not attended to"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    """Beside SDPA, of the stock class and of ours with a latent, as eager attention returns them (q and k are
    normalised in Qwen3-VL)."""
    inputs, rows = dict(tiny_inputs(family=family)), torch.tensor([[-1, -4], [-2, 9]])
    for model in (tiny_stock_model(0, family=family), tiny_latent_model(0, family=family)):
        model, given = liven(model, 6.0), dict(inputs)
        if hasattr(model, "latent_step"):
            given["latent_mask"] = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
            given["latent_mask"][:, -3] = True
            given["latent_embeds"] = torch.randn(*given["latent_mask"].shape, 64)
        weights = capture(model, given, rows=rows)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            expected = model(**given, output_attentions=True).attentions
        assert list(weights) == [0, 1] and len(expected) == 2
        for layer, captured in weights.items():
            torch.testing.assert_close(captured, rows_of(expected[layer], rows), atol=1e-5, rtol=0)
        assert (expected[1][1, :, -1].amax(-1) > 0.1).any(), "attention is far from uniform"


def test_without_padding(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """A row of length 45 without a mask: the kernel is causal by itself."""
    one = {name: inputs[name][1:] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
    one["pixel_values"] = inputs["pixel_values"][-int(one["image_grid_thw"].prod()) :]
    stock = liven(tiny_stock_model(0), 6.0)
    stock.set_attn_implementation("eager")
    rows = torch.tensor([[3, -1, 20]])
    with torch.no_grad():
        expected = stock(**one, output_attentions=True).attentions
    for layer, captured in capture(model, one, rows=rows).items():
        torch.testing.assert_close(captured, rows_of(expected[layer], rows), atol=1e-5, rtol=0)
        assert not captured[:, :, 0, 4:].any()


def test_decode_steps_over_a_cache(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Prefill in two parts and a step: keys are those of the cache, rows count within the forward."""
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        build_eager = build("eager")
        expected = build_eager(**text, output_attentions=True).attentions
    positions = (text["attention_mask"].cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
    cache = DynamicCache(config=model.config.get_text_config())
    for start, stop in ((0, 30), (30, 44), (44, 45)):
        part = {
            "input_ids": text["input_ids"][:, start:stop],
            "attention_mask": text["attention_mask"][:, :stop],
            "position_ids": positions[:, :, start:stop],
        }
        for layer, captured in capture(model, {**part, "past_key_values": cache}).items():
            assert captured.shape == (2, HEADS, 1, stop)
            full = expected[layer][:, :, stop - 1 : stop, :stop]
            torch.testing.assert_close(captured, full, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cache", [None, "static"])
def test_rows_during_generate(model: torch.nn.Module, inputs: dict[str, torch.Tensor], cache: str | None) -> None:
    """In `generate` the last step's rows are captured; the ids are those of a call without capture."""
    options = {"latent_strategy": "dynamic", "max_latent_steps": 3, "max_new_tokens": 7, "do_sample": False}
    plain = model.generate(**inputs, cache_implementation=cache, return_dict_in_generate=True, **options)
    with capture_attention_rows(model) as captured:
        ids = model.generate(**inputs, cache_implementation=cache, **options)
    assert torch.equal(ids, plain.sequences)
    full = build("eager")
    with torch.no_grad():
        trace = plain.latent_trace
        whole = full(
            input_ids=trace.sequences,
            attention_mask=torch.nn.functional.pad(inputs["attention_mask"], (0, 7), value=1),
            position_ids=trace.position_ids,
            latent_embeds=trace.latent_embeds,
            latent_mask=trace.latent_mask,
            output_attentions=True,
            **{name: inputs[name] for name in ("pixel_values", "image_grid_thw")},
        ).attentions
    for layer, weights in captured.weights.items():
        last = whole[layer][:, :, -2:-1, :-1]
        torch.testing.assert_close(weights[..., : last.shape[-1]], last, atol=1e-4, rtol=0)
        assert not weights[..., last.shape[-1] :].any(), "room of the static cache that is not filled yet"


def test_mean(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    with capture_attention_rows(model) as captured, torch.no_grad():
        with pytest.raises(ValueError, match="no attention was captured; run a forward of the model inside the"):
            captured.mean()
        model(**inputs)
    mean = captured.mean()
    assert mean.shape == (2, 1, 45)
    torch.testing.assert_close(mean, torch.stack([captured.weights[layer].mean(1) for layer in (0, 1)]).mean(0))


def test_float_and_bool_masks() -> None:
    """A mask that is added and one that says who may attend are the same; so are causal attention and a 2-D mask."""
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    rows = torch.tensor([[0, 4], [2, 3]])
    causal = torch.ones(5, 7, dtype=torch.bool).tril(diagonal=2).expand(2, 1, 5, 7)
    added = torch.zeros(2, 1, 5, 7).masked_fill(~causal, torch.finfo(torch.float32).min)
    expected = attention_of_rows(query, key, causal, rows, 0.5)
    repeated = key.repeat_interleave(2, dim=1)
    scores = (query @ repeated.transpose(-1, -2) * 0.5).masked_fill(~causal, -float("inf")).softmax(-1)
    torch.testing.assert_close(expected, scores.gather(2, rows.view(2, 1, 2, 1).expand(-1, 4, -1, 7)))
    torch.testing.assert_close(attention_of_rows(query, key, added, rows, 0.5), expected)
    torch.testing.assert_close(attention_of_rows(query, key, None, rows, 0.5), expected)
    padding = torch.ones(2, 7)
    padding[0, :2] = 0
    padded = attention_of_rows(query, key, None, rows, 0.5, padding)
    torch.testing.assert_close(padded[1], expected[1])
    torch.testing.assert_close(
        padded, attention_of_rows(query, key, causal & padding.bool()[:, None, None], rows, 0.5)
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_of_padding_are_zero(inputs: dict[str, torch.Tensor], implementation: str) -> None:
    """Neither weights nor gradients become nan where a row is padding."""
    model = build(implementation)
    with capture_attention_rows(model, rows=torch.tensor([[5, -1], [5, -1]])) as captured:
        model(**inputs)
    weights = captured.weights[0]
    assert not weights[0, :, 0].any() and weights[1, :, 0].any() and weights[:, :, 1].any()
    (weights * torch.arange(45)).sum().backward()
    gradient = model.model.language_model.layers[0].self_attn.q_proj.weight.grad
    assert gradient.isfinite().all() and gradient.any()


# Nothing else changes


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_outputs_are_unchanged(inputs: dict[str, torch.Tensor], implementation: str) -> None:
    model = build(implementation)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        with capture_attention_rows(model):
            inside = model(**inputs, output_hidden_states=True)
        after = model(**inputs)
    assert torch.equal(inside.logits, expected.logits) and torch.equal(after.logits, expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(inside.hidden_states, expected.hidden_states, strict=True))


def test_gradients_flow(inputs: dict[str, torch.Tensor]) -> None:
    """A loss on the weights reaches queries and keys of the captured layer, and not the layers above."""
    model = build().train()
    with capture_attention_rows(model, layers=[0]) as captured:
        output = model(**inputs)
    captured.weights[0][:, :, 0, -20:].log().sum().backward()
    layers = model.model.language_model.layers
    for name in ("q_proj", "k_proj"):
        assert getattr(layers[0].self_attn, name).weight.grad.abs().sum() > 0
        assert getattr(layers[1].self_attn, name).weight.grad is None
    assert output.logits.requires_grad and layers[0].self_attn.v_proj.weight.grad is None


def test_gradients_equal_those_of_eager_attention(inputs: dict[str, torch.Tensor]) -> None:
    models = build(), build("eager")
    with capture_attention_rows(models[0]) as captured:
        models[0](**inputs)
    ours = captured.weights[1][1, :, 0]
    theirs = models[1](**inputs, output_attentions=True).attentions[1][1, :, -1]
    for model, weights in zip(models, (ours, theirs), strict=True):
        (weights * torch.arange(45)).sum().backward()
        assert model.get_input_embeddings().weight.grad.any()
    grads = [model.model.language_model.layers[0].self_attn.q_proj.weight.grad for model in models]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-3)


def test_the_vision_tower_is_not_captured(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Its layers have no part in the weights, and keep their own implementation inside the context."""
    tower = model.model.visual
    calls = []
    handle = tower.register_forward_hook(lambda *_: calls.append(tower.config._attn_implementation))
    weights = capture(model, inputs)
    handle.remove()
    assert calls == ["sdpa"] and list(weights) == [0, 1]
    assert all(captured.shape == (2, HEADS, 1, 45) for captured in weights.values())


def implementations(model: torch.nn.Module) -> list[str]:
    parts = (model, model.model, model.model.language_model, model.model.visual)
    return [part.config._attn_implementation for part in parts]


def test_configuration_is_restored(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    before = implementations(model)
    with pytest.raises(RuntimeError, match="stop"), capture_attention_rows(model):
        assert implementations(model) != before
        raise RuntimeError("stop")
    assert implementations(model) == before == ["sdpa"] * 4
    with capture_attention_rows(model) as captured, torch.no_grad():
        pass
    model(**inputs)
    assert not captured.weights, "nothing is captured after the context"


def test_saving_and_pickling(model: torch.nn.Module, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    capture(model, inputs)
    model.config.save_pretrained(tmp_path / "after")
    with capture_attention_rows(model):
        model.config.save_pretrained(tmp_path / "inside")
    for folder in ("after", "inside"):
        text = (tmp_path / folder / "config.json").read_text()
        assert "_rows" not in text and json.loads(text)["model_type"] == "latent_qwen2_5_vl"
    again = pickle.loads(pickle.dumps(model))
    assert implementations(again) == ["sdpa"] * 4
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


# Several at once, and other models


def test_two_models_at_once(inputs: dict[str, torch.Tensor]) -> None:
    """A teacher beside a student: each context sees its own model."""
    teacher, student = build(seed=1), build(seed=0)
    alone = capture(teacher, inputs), capture(student, inputs)
    with capture_attention_rows(teacher) as first, capture_attention_rows(student) as second, torch.no_grad():
        student(**inputs)
        teacher(**inputs)
    for layer in range(LAYERS):
        assert torch.equal(first.weights[layer], alone[0][layer])
        assert torch.equal(second.weights[layer], alone[1][layer])
        assert not torch.allclose(first.weights[layer], second.weights[layer], atol=1e-3)
    assert implementations(teacher) == implementations(student) == ["sdpa"] * 4


def test_two_contexts_of_one_model(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    alone = capture(model, inputs)
    rows = torch.tensor([[5], [6]])
    with capture_attention_rows(model, layers=[0]) as outer, torch.no_grad():
        with capture_attention_rows(model, rows=rows, layers=[1]) as inner:
            model(**inputs)
        assert list(outer.weights) == [0] and list(inner.weights) == [1]
        outer.weights.clear()
        model(**inputs)
    assert torch.equal(outer.weights[0], alone[0])
    assert torch.equal(inner.weights[1], capture(model, inputs, rows=rows)[1])
    assert implementations(model) == ["sdpa"] * 4


def test_contexts_leave_no_weights_behind(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """However often it runs, one implementation is registered, and it holds no tensor."""
    with capture_attention_rows(model), torch.no_grad():
        model(**inputs)
        name = model.get_decoder().config._attn_implementation
    names, function = ALL_ATTENTION_FUNCTIONS.valid_keys(), ALL_ATTENTION_FUNCTIONS[name]
    assert name.startswith("sdpa_rows")
    for _ in range(3):
        capture(model, inputs)
    assert ALL_ATTENTION_FUNCTIONS.valid_keys() == names
    assert ALL_ATTENTION_FUNCTIONS[name] is function
    assert not any(isinstance(cell.cell_contents, (torch.Tensor, dict)) for cell in function.__closure__)


def test_backbone_adapter_and_another_family(inputs: dict[str, torch.Tensor]) -> None:
    model = build()
    expected = capture(model, inputs)
    for layer, weights in capture(model.model, inputs).items():
        assert torch.equal(weights, expected[layer])
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*\.q_proj", init_lora_weights=True))
    for layer, weights in capture(adapted.eval(), inputs).items():
        torch.testing.assert_close(weights, expected[layer])
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    llama, ids = LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(0, 32, (1, 9))}
    captured = capture(llama, ids)
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = llama(**ids, output_attentions=True).attentions
    for layer, weights in captured.items():
        torch.testing.assert_close(weights, attentions[layer][:, :, -1:], atol=1e-5, rtol=0)


# Errors


def test_unknown_layers_are_refused(model: torch.nn.Module) -> None:
    for layers in ([2], [0, -1]):
        with pytest.raises(ValueError, match=r"layers \[(2|-1)\] do not exist; the text decoder has 2 layers"):
            with capture_attention_rows(model, layers=layers):
                raise AssertionError("not reached")


@pytest.mark.parametrize("rows", [[[45], [0]], [[0], [-46]], [[0]]])
def test_rows_that_do_not_exist_are_refused(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], rows: Any
) -> None:
    with pytest.raises(ValueError, match=r"rows \[\[.* do not fit a forward of 2 sequences and 45 queries; give one"):
        capture(model, inputs, rows=torch.tensor(rows))
    assert implementations(model) == ["sdpa"] * 4


def test_an_implementation_outside_the_interface_is_refused(inputs: dict[str, torch.Tensor]) -> None:
    model = build()
    model.model.language_model.config._attn_implementation_internal = "mine"
    with pytest.raises(ValueError, match="attention implementation 'mine' is not in the attention interface; use 'sd"):
        capture(model, inputs)
