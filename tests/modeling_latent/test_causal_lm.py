"""Causal language models with latents: configuration, refusals, forward, positions, attention, plans."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from modeling_latent import (
    LatentCausalLM,
    LatentCausalLMConfig,
    capture_attention_rows,
    load_latent_model,
)
from modeling_latent.causal_lm_check import check_causal_lm
from modeling_latent.latent_plan import LatentPlan
from tests.latent import tiny_latent_model, tiny_pair
from tests.naive_staged import NaiveBackbone, naive_staged
from tests.tiny import TEXT_FAMILIES, tiny_config, tiny_processor
from trainers.tiny_text import (
    save_tiny_text_checkpoint,
)

TEXTS = ["What is it?", "Is the path safe? Answer with the option's letter."]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}


@pytest.fixture(params=TEXT_FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, LatentCausalLM]:
    return tiny_pair(0, 6.0, request.param)


def batch_of(family: str) -> dict[str, torch.Tensor]:
    """Two rows, the first padded on the left."""
    return dict(tiny_processor(family)(text=TEXTS, return_tensors="pt", padding=True))


# Configuration


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_configuration(family: str, tmp_path: Path) -> None:
    stock = tiny_config(None, family)
    config = LatentCausalLMConfig.from_stock(stock, method="coconut", latent_token_id=7)
    assert type(config.get_text_config()) is type(stock)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(config.text_config, name) == getattr(stock, name)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    model = "modeling_latent_causal_lm.LatentCausalLM"
    assert written["auto_map"] == {
        "AutoConfig": "configuration_latent.LatentCausalLMConfig",
        "AutoModel": model,
        "AutoModelForImageTextToText": model,
        "AutoModelForCausalLM": model,
        "AutoProcessor": "processing_latent_text.LatentTextProcessor",
    }
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is LatentCausalLMConfig and again.to_dict() == {**config.to_dict(), **_stamps(again)}
    other = LatentCausalLMConfig.from_stock(again, latent_token_id=8)
    assert other.latent_token_id == 8 and other.text_config.to_dict() == again.text_config.to_dict()


def _stamps(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: config.to_dict()[key] for key in ("_name_or_path", "transformers_version") if key in config.to_dict()}


def test_what_says_how_a_folder_is_read_stands_at_the_top() -> None:
    stock = LlamaConfig(**SIZES, dtype="bfloat16")
    stock.quantization_config = {"quant_method": "gptq", "bits": 4}
    config = LatentCausalLMConfig.from_stock(stock)
    assert config.quantization_config == {"quant_method": "gptq", "bits": 4} and config.dtype == torch.bfloat16
    assert not hasattr(config.text_config, "quantization_config")


# What is refused


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=2), r"changes the logits \(final_logit_softcapping=30"),
        (PhiConfig(**SIZES, intermediate_size=48), "whose head is no plain matrix, so"),
        (MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32), "whose base model takes no position_ids"),
        (AutoConfig.for_model("biogpt", **SIZES), "whose head is no plain matrix called lm_head,"),
        (AutoConfig.for_model("bloom", **SIZES), "whose base model takes no position_ids"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_families_that_do_more_are_refused(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=f"the folder is a '{config.model_type}' checkpoint, .*{reason}"):
        check_causal_lm(config, "the folder")


def test_a_stock_folder_without_method_is_named(tmp_path: Path) -> None:
    folder = save_tiny_text_checkpoint(tmp_path, "llama")
    with pytest.raises(ValueError, match="is a stock 'llama' checkpoint without latents; give the method"):
        load_latent_model(folder)


# Forward


def test_logits_states_and_attention_are_those_of_the_stock_model(pair: tuple) -> None:
    stock, model = pair
    batch = batch_of(stock.config.model_type)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        theirs = stock(**batch, position_ids=positions, output_hidden_states=True)
        ours = model(**batch, output_hidden_states=True)
        assert torch.equal(ours.logits[kept], theirs.logits[kept])
        assert len(ours.hidden_states) == 3 and torch.equal(ours.hidden_states[1][kept], theirs.hidden_states[1][kept])
        assert torch.equal(ours.last_hidden_state, model.base_model(**batch).last_hidden_state)
    assert model.base_model is model.model and model.get_output_embeddings() is model.lm_head


def test_padding_does_not_count_in_the_positions(pair: tuple) -> None:
    """Rows of a batch equal rows alone, with padding on either side, also where positions are learned; and so does
    what follows them on a cache."""
    _, model = pair
    processor = tiny_processor(model.config.text_config.model_type)
    alone = [dict(processor(text=[text], return_tensors="pt")) for text in TEXTS]
    follow = torch.tensor([[5, 6], [7, 8]])
    with torch.no_grad():
        for side in ("left", "right"):
            batch = processor(text=TEXTS, return_tensors="pt", padding=True, padding_side=side)
            output = model(**batch, use_cache=True)
            mask = torch.cat([batch["attention_mask"], torch.ones_like(follow)], dim=1)
            more = model(follow, attention_mask=mask, past_key_values=output.past_key_values)
            for row, one in enumerate(alone):
                kept = batch["attention_mask"][row].bool()
                torch.testing.assert_close(output.logits[row][kept], model(**one).logits[0], atol=1e-4, rtol=0)
                whole = torch.cat([one["input_ids"], follow[row : row + 1]], dim=1)
                torch.testing.assert_close(more.logits[row], model(whole).logits[0, -2:], atol=1e-4, rtol=0)


def test_latents_replace_embeddings(pair: tuple) -> None:
    _, model = pair
    slot, width = model.config.latent_token_id, model.config.text_config.hidden_size
    ids = torch.tensor([[5, 6, slot, 7], [8, slot, slot, 9]])
    vectors = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = model(ids, latent_embeds=vectors)
    embeds = torch.where((ids == slot)[..., None], vectors, model.get_input_embeddings()(ids))
    assert torch.equal(output.logits, model(inputs_embeds=embeds).logits)
    output.logits.float().logsumexp(-1).sum().backward()
    assert ((vectors.grad != 0).any(-1) == (ids == slot)).all()
    with pytest.raises(ValueError, match="position 2 of row 0 is a latent .* but no vector was given"):
        model(ids)
    masked = model(ids, latent_mask=torch.zeros_like(ids, dtype=torch.bool))
    assert torch.equal(masked.logits, model(inputs_embeds=model.get_input_embeddings()(ids)).logits)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_loss_and_activation_checkpointing(family: str) -> None:
    """The loss is the stock one; in train mode no full logits are built; checkpointing changes no gradient, and a plan
    with gradients through the slots says that it needs the cache."""
    model = copy.deepcopy(tiny_pair(0, 4.0, family)[1]).train()
    batch = batch_of(family)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    stock = tiny_pair(0, 4.0, family)[0]
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    output = model(**batch)
    torch.testing.assert_close(output.loss, stock(**batch, position_ids=positions).loss)
    assert output.logits is None
    output.loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)
    slots = torch.tensor([[5, 6, model.config.latent_token_id, 7, 8]])
    model(slots, labels=slots, latent_plan=LatentPlan(gradient="detach")).loss.backward()
    with pytest.raises(ValueError, match="latent_gradient='bptt' needs the cache, which activation checkpointing"):
        model(slots, labels=slots, latent_plan=LatentPlan(gradient="bptt"))


def test_attention_implementations_and_captured_rows(pair: tuple) -> None:
    _, model = pair
    model = copy.deepcopy(model)
    batch = batch_of(model.config.text_config.model_type)
    with capture_attention_rows(model) as captured, torch.no_grad():
        fast = model(**batch).logits
    assert model.config.text_config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(**batch, output_attentions=True)
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(fast[kept], eager.logits[kept], atol=1e-4, rtol=0)
    assert sorted(captured.weights) == [0, 1]
    for layer, weights in captured.weights.items():
        torch.testing.assert_close(weights[:, :, 0], eager.attentions[layer][:, :, -1], atol=1e-5, rtol=0)


def test_devices_are_filled_by_whole_layers(pair: tuple) -> None:
    stock, model = pair
    assert model._no_split_modules == set(stock._no_split_modules) and model._no_split_modules


def test_rows_are_added(pair: tuple) -> None:
    stock, model = pair
    model, before = copy.deepcopy(model), pair[1].get_input_embeddings().weight
    rows = len(before) + 5
    model.resize_token_embeddings(rows, mean_resizing=False)
    assert model.config.text_config.vocab_size == rows == model(torch.tensor([[5]])).logits.shape[-1]
    assert torch.equal(model.get_input_embeddings().weight[:-5], before)
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert is_tied == stock.config.tie_word_embeddings


@pytest.mark.parametrize("head", ["simple", "glu"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_latent_heads(family: str, head: str, tmp_path: Path) -> None:
    model = tiny_latent_model(family=family, latent_head=head, latent_stop_vector=True)
    states = model(torch.tensor([[5, 6]]))
    assert torch.equal(states.latent_states, model.latent_head(states.last_hidden_state))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


# Plans


@pytest.mark.parametrize("gradient", ["bptt", "detach"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_plan_is_the_naive_schedule(family: str, side: str, gradient: str) -> None:
    """Loss and gradients of a padded batch with two, no and three slots, against its rows one by one."""
    stock, model = (copy.deepcopy(each) for each in tiny_pair(0, 4.0, family))
    stock.set_attn_implementation("eager")
    slot = model.config.latent_token_id
    rows = [[5, 6, 7, slot, slot, 8, 9], [10, 11, 12, 13], [14, slot, slot, slot, 15, 16, 17, 18]]
    width, loss, count = max(map(len, rows)), 0.0, 0
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids in rows:
        labels = [-100 if token == slot or index < 2 else token for index, token in enumerate(ids)]
        one = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        run = naive_staged(NaiveBackbone(stock), **one, slot_id=slot, gradient=gradient)
        counted = sum(label != -100 for label in labels[1:])
        loss, count = loss + run.loss * counted, count + counted
        padding = width - len(ids)
        columns = {"input_ids": (ids, 0), "attention_mask": ([1] * len(ids), 0), "labels": (labels, -100)}
        for name, (values, fill) in columns.items():
            pads = [fill] * padding
            batch[name].append(pads + values if side == "left" else values + pads)
    (loss / count).backward()
    output = model(**{name: torch.tensor(values) for name, values in batch.items()}, latent_plan=LatentPlan(gradient))
    torch.testing.assert_close(output.loss, loss / count, atol=1e-5, rtol=0)
    output.loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    prefix = f"{stock.base_model_prefix}."
    for name, parameter in stock.named_parameters():
        own = f"model.language_model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(ours[own] / scale, parameter.grad / scale, atol=1e-4, rtol=0, msg=name)
