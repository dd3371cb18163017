"""Tiny latent models: the stock models of `tests/tiny.py` in the library's class, with the same weights."""

import copy
import json
from functools import lru_cache
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel

from modeling_latent.conversion_latent import latent_classes
from tests.tiny import TEXT_FAMILIES, tiny_processor, tiny_stock_model
from trainers.tiny import DEFAULT_FAMILY


def latent_token_ids(family: str = DEFAULT_FAMILY) -> dict[str, int]:
    """The latent token ids of [`tests.tiny.tiny_processor`], by field of the configuration."""
    processor = tiny_processor(family)
    return {
        "latent_token_id": processor.latent_token_id,
        "latent_start_token_id": processor.latent_start_token_id,
        "latent_end_token_id": processor.latent_end_token_id,
    }


@lru_cache
def _latent_model(seed: int, tie_word_embeddings: bool | None, family: str, fields: str) -> PreTrainedModel:
    stock = tiny_stock_model(seed, tie_word_embeddings, family)
    config_class, model_class = latent_classes(family, family)
    config = config_class.from_stock(stock.config, **{**latent_token_ids(family), **json.loads(fields)})
    model = model_class(config)
    missing, unexpected = model.load_state_dict(named_as_latent(stock), strict=False)
    drawn = ("latent_head.", "latent_stop_vector.", "concept_head.", "attention_head.")
    assert not unexpected and all(name.startswith(drawn) for name in missing)
    model.generation_config = copy.deepcopy(stock.generation_config)
    return model.eval()


def named_as_latent(stock: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of a stock model by the names of the latent class, which holds a text model as `language_model`."""
    if stock.config.model_type not in TEXT_FAMILIES:
        return stock.state_dict()
    prefix = f"{stock.base_model_prefix}."
    return {
        f"model.language_model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name: tensor
        for name, tensor in stock.state_dict().items()
    }


def tiny_latent_model(
    seed: int = 0, tie_word_embeddings: bool | None = None, family: str = DEFAULT_FAMILY, **fields: Any
) -> PreTrainedModel:
    """The stock model of the same arguments as a latent model in evaluation mode, float32; a copy for every caller.

    Args:
        seed, tie_word_embeddings, family: see [`tests.tiny.tiny_stock_model`].
        fields: latent fields of the configuration, e.g. `latent_head="simple"` or `latent_token_id=None`; the default
            is the token ids of [`tests.tiny.tiny_processor`] and nothing else.
    """
    return copy.deepcopy(_latent_model(seed, tie_word_embeddings, family, json.dumps(fields, sort_keys=True)))


def liven(model: torch.nn.Module, scale: float = 4.0) -> torch.nn.Module:
    """Multiply every matrix: the arg max gets a margin, and images and positions change what the model says."""
    with torch.no_grad():
        seen = {id(parameter): parameter for parameter in model.parameters() if parameter.ndim > 1}
        for parameter in seen.values():
            parameter.mul_(scale)
    return model


@lru_cache
def tiny_pair(
    seed: int = 0, scale: float = 4.0, family: str = DEFAULT_FAMILY, head: str | None = None
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A stock and a latent model of equal, enlarged weights, built once: do not change them. A latent head is of the
    size that it starts with."""
    torch.manual_seed(seed)
    latent = liven(tiny_latent_model(seed, family=family, latent_head=head), scale)
    if head is not None:
        liven(latent.latent_head, 1 / scale)
    return liven(tiny_stock_model(seed, family=family), scale), latent


def eager_assistant(model: torch.nn.Module) -> torch.nn.Module:
    """The model, set to draft six ids at a time however unsure it is."""
    model.generation_config.update(
        num_assistant_tokens=6, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    return model


class ScriptProcessor(LogitsProcessor):
    """Per prompt, at the scripted steps, all scores but one token's become -inf, as by `script` of the naive decoder.

    Args:
        scripts: one `step -> token` per prompt; beams and returned sequences of a prompt share it.
        prompt_length: length of the padded prompt.
    """

    def __init__(self, scripts: list[dict[int, int]], prompt_length: int) -> None:
        self.scripts = scripts
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = input_ids.shape[1] - self.prompt_length
        scores = scores.clone()
        for row in range(len(scores)):
            token = self.scripts[row * len(self.scripts) // len(scores)].get(step)
            if token is not None:
                kept = scores[row, token].item()
                scores[row] = float("-inf")
                scores[row, token] = kept
        return scores
