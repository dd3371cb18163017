"""Which stock causal language models `LatentCausalLM` can hold.

It puts latents into the input embeddings of the stock base model and reads its last hidden state through a plain LM
head. A family whose own class does more on either side would decode something else, so it is refused by name.
"""

import copy
import inspect

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

# What a head class does to its logits, by field of the configuration and the value at which it does nothing.
_LOGIT_FIELDS = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
}
_INPUTS = ("attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")


def is_causal_lm(model_type: str) -> bool:
    """Whether a family is a causal language model of text alone."""
    return (
        model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    )


def check_causal_lm(config: PreTrainedConfig, source: str) -> None:
    """Refuse a causal language model that the latent class cannot hold. No weight is made.

    Args:
        config: its stock configuration.
        source: its name, for the message.

    Raises:
        ValueError: names the family, the reason and the remedy.
    """
    obstacle = _obstacle(config)
    if obstacle is not None:
        raise ValueError(
            f"{source} is a {config.model_type!r} checkpoint, {obstacle}, so latents cannot be put into it as into "
            "Llama, Qwen, Mistral or GPT-2; choose a checkpoint of such a family"
        )


def _obstacle(config: PreTrainedConfig) -> str | None:
    """What keeps the latent class from holding the models of a stock configuration."""
    for field, neutral in _LOGIT_FIELDS.items():
        value = getattr(config, field, None)
        if value not in (None, neutral):
            return f"whose head changes the logits ({field}={value})"
    head_class, base_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], MODEL_MAPPING[type(config)]
    # Built by their constructors: `from_config` would spread them over the processes of a ZeRO-3 run.
    with torch.device("meta"), no_init_weights():
        return _obstacle_of_parts(head_class(copy.deepcopy(config)), base_class(copy.deepcopy(config)))


def _obstacle_of_parts(stock: PreTrainedModel, base: PreTrainedModel) -> str | None:
    """The same, of the head class and the base class."""
    head, embeddings = stock.get_output_embeddings(), base.get_input_embeddings()
    if type(stock.base_model) is not type(base):
        return f"whose head class holds a {type(stock.base_model).__name__}, not a {type(base).__name__}"
    if type(head) is not nn.Linear or head.bias is not None:
        return "whose head is no plain matrix"
    own = {name for name, _ in stock.named_parameters(remove_duplicate=False)}
    prefix = f"{stock.base_model_prefix}."
    if {name for name in own if not name.startswith(prefix)} - {"lm_head.weight"}:
        return "whose head is no plain matrix called lm_head"
    if not isinstance(embeddings, nn.Embedding) or embeddings.embedding_dim != head.in_features:
        return "whose embeddings are not as wide as its hidden states"
    missing = [name for name in _INPUTS if name not in inspect.signature(type(base).forward).parameters]
    if missing or getattr(base, "_is_stateful", False):
        return f"whose base model takes no {missing[0]}" if missing else "whose state is more than keys and values"
    if getattr(base.config, "hidden_size_per_layer_input", None):
        return "whose layers read the token ids again"
    return None


__all__ = ["check_causal_lm", "is_causal_lm"]
