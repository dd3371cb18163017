"""From a stock or published checkpoint folder to a latent model in one call."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin

from .causal_lm_check import check_causal_lm, is_causal_lm
from .configuration_latent import (
    LATENT_TOKEN_FIELDS,
    LatentCausalLMConfig,
    LatentChameleonConfig,
    LatentQwen2_5_VLConfig,
    LatentQwen2VLConfig,
    LatentQwen3VLConfig,
    PublishedLayout,
    get_latent_method,
    published_method,
)
from .generation_latent import saved_generation_config
from .modeling_latent_causal_lm import LatentCausalLM
from .modeling_latent_chameleon import LatentChameleonForConditionalGeneration
from .modeling_latent_qwen2_5_vl import LatentQwen2_5_VLForConditionalGeneration
from .modeling_latent_qwen2_vl import LatentQwen2VLForConditionalGeneration
from .modeling_latent_qwen3_vl import LatentQwen3VLForConditionalGeneration
from .processing_latent import LatentProcessor
from .processing_latent_chameleon import LatentChameleonProcessor
from .processing_latent_text import LatentTextProcessor

LATENT_CLASSES: dict[str, tuple[type, type[PreTrainedModel]]] = {
    "qwen2_vl": (LatentQwen2VLConfig, LatentQwen2VLForConditionalGeneration),
    "qwen2_5_vl": (LatentQwen2_5_VLConfig, LatentQwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (LatentQwen3VLConfig, LatentQwen3VLForConditionalGeneration),
    "chameleon": (LatentChameleonConfig, LatentChameleonForConditionalGeneration),
    "causal_lm": (LatentCausalLMConfig, LatentCausalLM),
}
# Families with a processor of their own.
LATENT_PROCESSORS: dict[str, type[ProcessorMixin]] = {
    "chameleon": LatentChameleonProcessor,
    "causal_lm": LatentTextProcessor,
}

# Parts that a checkpoint may lack when the caller asks for them: they are drawn at random.
_DRAWN = ("latent_head.", "latent_stop_vector.", "concept_head.", "attention_head.")


def latent_family(model_type: str) -> str:
    """Key in `LATENT_CLASSES` of a stock or latent `model_type`: every causal language model of text alone (Llama,
    Qwen3, GPT-2, ...) is `"causal_lm"`. A family without a latent class is returned as it is."""
    family = model_type.removeprefix("latent_")
    return "causal_lm" if family not in LATENT_CLASSES and is_causal_lm(family) else family


def latent_classes(model_type: str, source: str) -> tuple[type, type[PreTrainedModel]]:
    """Latent configuration and model class of a stock family.

    Raises:
        ValueError: a family without a latent class.
    """
    family = latent_family(model_type)
    if family not in LATENT_CLASSES:
        raise ValueError(
            f"{source} is a {model_type!r} checkpoint; latent classes exist for {sorted(LATENT_CLASSES)}. "
            "Choose a checkpoint of one of these families ('causal_lm': Llama, Qwen, GPT-2 and their like)"
        )
    return LATENT_CLASSES[family]


def latent_processor_class(model_type: str) -> type[ProcessorMixin]:
    """Processor class of a family, by the stock or the latent `model_type`."""
    return LATENT_PROCESSORS.get(latent_family(model_type), LatentProcessor)


def convert_stock_checkpoint(
    name_or_path: str | Path,
    method: str | None = None,
    processor: ProcessorMixin | None = None,
    revision: str | None = None,
    weights: bool = True,
    latent_fields: dict[str, Any] | None = None,
    init_token: str | None = "method",
    latent_tokens: dict[str, str] | None = None,
    **model_kwargs: Any,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a stock checkpoint as a latent model with the method's marker tokens.

    A folder written by the published code of a method (LVR: `lvr_*` keys in `config.json`) becomes a model of that
    method, with its latent head and its end vector; saved again it has our layout.

    Args:
        name_or_path: folder or Hub repository of a stock model (weights, tokenizer, image processor).
        method: name in `LATENT_METHODS`; fixes tokens, head and decoding defaults. Default: the method whose published
            code wrote the folder, else `"laser"`.
        processor: a processor to use instead of the folder's.
        revision: branch, tag or commit of the Hub repository, for configuration, tokenizer, images and weights alike.
        weights: `False` builds the model on the meta device from its configuration; no weight is read or downloaded.
        latent_fields: latent fields of the configuration that win over the method's, e.g. `{"latent_head": "simple",
            "latent_stop_vector": True}`; what the folder lacks is drawn at random.
        init_token: token whose rows of the embedding and of the LM head the added tokens start with. Default: that of
            the method, if the tokenizer has it as one token (Coconut and IVT-LR: `"<<"`); `None`: no token. With a
            `processor` of the caller no row is changed.
        latent_tokens: role to token string in place of the method's, e.g. `learned_tokens(8)` for LaViT with eight.
        model_kwargs: for `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, ...).

    Returns:
        `(model, processor)`, ready to train, to `save_pretrained` and to `push_to_hub`. Embedding rows are added only
        when the tokenizer has outgrown the vocabulary (card: nothing is resized for the 3B and 7B models). Without an
        `init_token` they are drawn as the model initialises embeddings, and rows that were there stay.

    Raises:
        ValueError: a family without a latent class, a folder without a configuration, one that is latent already, an
            `init_token` that is no token of the tokenizer, or a published folder of another method, with other token
            ids than its tokenizer, or with tensors that do not fit its configuration.
    """
    stock_config = _read_config(name_or_path, revision)
    published = published_method(stock_config)
    if method is None:
        method = "laser" if published is None else published.name
    entry = get_latent_method(method)
    if published is not None and published != entry:
        raise ValueError(
            f"{name_or_path} is a published checkpoint of {published.name!r}, and method={method!r} would drop what "
            f"it has learned; leave method out, or convert the stock model with method={method!r}"
        )
    if stock_config.model_type.startswith("latent_"):
        raise ValueError(
            f"{name_or_path} is a latent model already (method {stock_config.latent_method!r}); load it with AutoModel"
        )
    config_class, model_class = latent_classes(stock_config.model_type, str(name_or_path))
    if latent_family(stock_config.model_type) == "causal_lm":
        check_causal_lm(stock_config, str(name_or_path))
    new_tokens = 0
    if processor is None:
        processor = latent_processor_class(stock_config.model_type).from_pretrained(
            name_or_path, revision=revision or "main", latent_tokens=latent_tokens or entry.tokens
        )
        new_tokens = processor.added_latent_tokens
    config = config_class.from_stock(
        stock_config,
        method=method,
        **{name: getattr(processor, name) for name in LATENT_TOKEN_FIELDS},
        **(latent_fields or {}),
    )
    if published is not None:
        _check_token_ids(stock_config, config, published.published, str(name_or_path))
    if weights and published is not None:
        drawn = _DRAWN if latent_fields else ()
        model = load_published(model_class, config, published.published, name_or_path, revision, drawn, **model_kwargs)
    elif weights:
        model = model_class.from_pretrained(name_or_path, config=config, revision=revision or "main", **model_kwargs)
    else:
        model = build_without_weights(model_class, config, name_or_path, **model_kwargs)
    if len(processor.tokenizer) > model.config.get_text_config().vocab_size:  # a weight of ZeRO-3 has no rows here
        with torch.no_grad():
            model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    if weights and published is None:
        start = entry.init_token if init_token == "method" else init_token
        copy_token_rows(model, processor.tokenizer, start, new_tokens, required=init_token != "method")
    model.generation_config = saved_generation_config(model.generation_config, **entry.generation)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model, processor


def copy_token_rows(model: PreTrainedModel, tokenizer: Any, token: str | None, number: int, *, required: bool) -> None:
    """Give the last `number` tokens of a tokenizer the rows of another token, in the embedding and in the LM head.

    Args:
        token: that other token; `None`: nothing is copied.
        required: refuse what is no token; else nothing is copied then.

    Raises:
        ValueError: `required`, and the tokenizer has no such token.
    """
    ids = [] if token is None else tokenizer.encode(token, add_special_tokens=False)
    if required and token is not None and len(ids) != 1:
        raise ValueError(
            f"init_token={token!r} is {len(ids)} tokens of this tokenizer; choose a string that is one, or None"
        )
    if len(ids) != 1 or number == 0:
        return
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    for weight in weights[:1] if weights[0] is weights[1] else weights:
        with whole_parameter(weight), torch.no_grad():
            weight[len(tokenizer) - number : len(tokenizer)] = weight[ids]


@contextmanager
def whole_parameter(parameter: torch.nn.Parameter) -> Iterator[None]:
    """A parameter with all its rows, to be changed alike on all processes: ZeRO-3 keeps a part of it on each."""
    is_part = hasattr(parameter, "ds_id")
    if is_part:
        parameter.all_gather()
    try:
        yield
    finally:
        if is_part:
            parameter.partition(has_been_updated=True)


def _check_token_ids(published: Any, config: Any, layout: PublishedLayout, name: str) -> None:
    """Refuse a folder whose configuration and tokenizer disagree: its rows would be read for other tokens."""
    for field, key in layout.token_ids.items():
        if getattr(published, key) != getattr(config, field):
            raise ValueError(
                f"{name}: config.json says {key}={getattr(published, key)}, its tokenizer {getattr(config, field)}; "
                "give the folder the tokenizer that it was trained with"
            )


def load_published(
    model_class: type[PreTrainedModel],
    config: Any,
    layout: PublishedLayout,
    name_or_path: str | Path,
    revision: str | None,
    drawn: tuple[str, ...],
    **model_kwargs: Any,
) -> PreTrainedModel:
    """Load the tensors of a published folder, all of them and nothing else; `drawn` are the beginnings of the names
    of tensors that it may lack.

    Raises:
        ValueError: tensors that the model has no place for, that the folder lacks, or of another shape.
    """
    model, found = model_class.from_pretrained(
        name_or_path,
        config=config,
        revision=revision or "main",
        key_mapping=layout.tensors,
        output_loading_info=True,
        **model_kwargs,
    )
    wrong = {kind: sorted(map(str, found[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    wrong["missing"] = [name for name in wrong["missing"] if not name.startswith(drawn)]
    if any(wrong.values()):
        raise ValueError(
            f"{name_or_path}: the tensors do not fit its config.json: missing {wrong['missing'][:3]}, without a place "
            f"{wrong['unexpected'][:3]}, of another shape {wrong['mismatched'][:3]}; correct its settings "
            f"{list(layout.keys)}, or pass latent_fields={{...}} to draw what is missing"
        )
    # What was renamed to our layout stays so when the model is saved.
    renamings = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [one for one in renamings if not set(one.source_patterns) & set(layout.tensors)]
    return model


def build_without_weights(
    model_class: type[PreTrainedModel], config: Any, name_or_path: str | Path, **model_kwargs: Any
) -> PreTrainedModel:
    """A model of the shapes of a configuration on the meta device: nothing is read, downloaded or allocated.

    Args:
        model_class: latent class of the configuration.
        config: latent configuration; its `dtype` is used unless `model_kwargs` names another.
        name_or_path: recorded as the origin.
        model_kwargs: those of `from_pretrained`; only `dtype` and `attn_implementation` matter here.
    """
    kwargs = {key: model_kwargs[key] for key in ("dtype", "attn_implementation") if model_kwargs.get(key) is not None}
    if kwargs.get("dtype") == "auto":
        del kwargs["dtype"]
    with torch.device("meta"):
        model = model_class._from_config(config, **kwargs)
    model.tie_weights()
    model.config._name_or_path = model.name_or_path = str(name_or_path)
    model.hf_device_map = {"": "meta"}  # as `device_map="meta"` would leave it: a Trainer does not move it
    return model.eval()


def _read_config(name_or_path: str | Path, revision: str | None = None) -> Any:
    path = Path(name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json; give a folder written by save_pretrained or a Hub repository id")
    return AutoConfig.from_pretrained(name_or_path, revision=revision or "main")
