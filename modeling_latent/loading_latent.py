"""One loader for whatever a latent model may come as: a latent checkpoint, a stock one, or an adapter of either.

An adapter folder holds the LoRA weights, the rows of the marker tokens, the processor and the latent `config.json`;
the weights of its base stay where they are. The stock `Auto` classes would put such an adapter on the stock class, and
its latents would be lost: [`load_latent_model`] makes the base a latent model first.
"""

import json
import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import cached_file, find_adapter_config_file

from .configuration_latent import LATENT_TOKEN_FIELDS, published_method
from .conversion_latent import (
    build_without_weights,
    convert_stock_checkpoint,
    latent_classes,
    latent_processor_class,
)

ADAPTER_MODES = ("attach", "merge", "skip")
# Latent field that gives a model a module, and the module.
_MODULE_OF_FIELD = {
    "latent_head": "latent_head",
    "latent_stop_vector": "latent_stop_vector",
    "concept_head_size": "concept_head",
    "attention_head": "attention_head",
}


def load_latent_model(
    name_or_path: str | Path,
    method: str | None = None,
    *,
    adapter: str = "attach",
    base_model: str | Path | None = None,
    revision: str | None = None,
    weights: bool = True,
    trust_remote_code: bool = False,
    latent_tokens: dict[str, str] | None = None,
    **model_kwargs: Any,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model that reasons in latents, with its processor.

    Args:
        name_or_path: folder or Hub repository of a latent checkpoint, one written by the published code of a method,
            a stock one (give `method`), or an adapter.
        method: name in `LATENT_METHODS`, for a stock checkpoint; a latent one and an adapter say it themselves.
        adapter: `"attach"` puts the adapter's modules into the model (`disable_adapters()` switches them off),
            `"merge"` folds them into the weights, `"skip"` returns the base as the adapter needs it.
        base_model: where the base of an adapter is, when not where the adapter says.
        revision: branch, tag or commit of `name_or_path`. The base of an adapter has its own, in the adapter.
        weights: `False` builds the model on the meta device: no weight is read or downloaded, no adapter put on.
        trust_remote_code: as in `from_pretrained`; the classes of this library do not need it.
        latent_tokens: role to token string in place of the method's, for a stock checkpoint; another one must have
            these.
        model_kwargs: for `from_pretrained` (`dtype`, `device_map`, `quantization_config`, ...), and `latent_fields`
            for a stock checkpoint (see [`convert_stock_checkpoint`]).

    Raises:
        ValueError: a stock checkpoint without `method`, an unknown mode, an adapter whose base is missing or does not
            fit; names it and the remedy.
        ImportError: an adapter, and peft is not installed.
    """
    if adapter not in ADAPTER_MODES:
        raise ValueError(f"adapter={adapter!r} is unknown; choose one of {list(ADAPTER_MODES)}")
    name = str(name_or_path)
    settings = adapter_settings(name, revision)
    options = {"weights": weights, "trust_remote_code": trust_remote_code, **model_kwargs}
    if settings is not None and model_kwargs.get("latent_fields"):
        raise ValueError(f"{name} is an adapter and has its own latent fields; leave latent_fields out")
    if settings is None:
        if base_model is not None:
            raise ValueError(f"base_model={str(base_model)!r}: {name} is no adapter; leave base_model out")
        return _load_whole(name, method, None, revision, latent_tokens=latent_tokens, **options)
    model, processor = _load_base(name, revision, settings, method, base_model, **options)
    _check_latent_tokens(name, processor, latent_tokens)
    if weights and adapter != "skip":
        attach_adapter(model, name, revision)
    if weights and adapter == "merge":
        merge_adapter(model)
    return model, processor


def adapter_settings(name_or_path: str | Path, revision: str | None = None) -> dict[str, Any] | None:
    """The content of `adapter_config.json`, or `None` for a folder or repository that is no adapter."""
    path = find_adapter_config_file(str(name_or_path), revision=revision or "main")
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _load_whole(
    name: str,
    method: str | None,
    processor: ProcessorMixin | None,
    revision: str | None,
    *,
    weights: bool,
    trust_remote_code: bool,
    latent_tokens: dict[str, str] | None = None,
    **model_kwargs: Any,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A latent checkpoint as it is, a stock one with latent tokens added."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name} has no config.json; give a folder written by save_pretrained")
    code = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(name, **code)
    if not config.model_type.startswith("latent_"):
        if method is None and published_method(config) is None:
            latent_classes(config.model_type, name)
            raise ValueError(
                f"{name} is a stock {config.model_type!r} checkpoint without latents; give the method that it is to "
                "be made for, e.g. method='laser', or a latent model"
            )
        return convert_stock_checkpoint(
            name,
            method=method,
            processor=processor,
            revision=revision,
            weights=weights,
            latent_tokens=latent_tokens,
            **model_kwargs,
        )
    if model_kwargs.pop("latent_fields", None):
        raise ValueError(
            f"{name} is a latent model already; latent_fields are for a stock checkpoint, change config.json instead"
        )
    if processor is None:
        processor = latent_processor_class(config.model_type).from_pretrained(name, revision=revision or "main")
    _check_latent_tokens(name, processor, latent_tokens)
    if weights:
        return AutoModelForImageTextToText.from_pretrained(name, **code, **model_kwargs), processor
    model_class = latent_classes(config.model_type.removeprefix("latent_"), name)[1]
    return build_without_weights(model_class, config, name, **model_kwargs), processor


def _check_latent_tokens(name: str, processor: ProcessorMixin, wanted: dict[str, str] | None) -> None:
    """Refuse a model that was made with other latent tokens than those asked for."""
    if wanted is not None and processor.latent_tokens != wanted:
        raise ValueError(
            f"{name} has the latent tokens {processor.latent_tokens}, not {wanted}; leave latent_tokens out, or make "
            "a latent model of the stock checkpoint anew"
        )


def _load_base(
    name: str,
    revision: str | None,
    settings: dict[str, Any],
    method: str | None,
    base_model: str | Path | None,
    **options: Any,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The base of an adapter as a latent model, with the processor, tokens and decoding defaults of the adapter."""
    base = str(base_model or settings.get("base_model_name_or_path") or "")
    if not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise ValueError(
            f"{name} is an adapter of {base!r}, which does not exist here; say where its base is: base_model=..."
        )
    if adapter_settings(base) is not None:
        raise ValueError(f"{name} is an adapter of {base}, itself an adapter; merge that one and save it first")
    saved = _saved_config(name, revision)
    method = getattr(saved, "latent_method", None) or method
    base_revision = settings.get("revision") if base_model is None else None
    family = AutoConfig.from_pretrained(base, revision=base_revision or "main").model_type
    processor = latent_processor_class(family).from_pretrained(name, revision=revision or "main")
    fields = _fields_of_base(name, saved, settings, base, base_revision)
    model, processor = _load_whole(base, method, processor, base_revision, latent_fields=fields, **options)
    for field in LATENT_TOKEN_FIELDS:
        expected, found = getattr(saved, field, getattr(processor, field)), getattr(model.config, field)
        if expected != found:
            raise ValueError(
                f"{name} was trained with {field}={expected}, its base {base} has {found}; give the base that it was "
                "trained on: base_model=..."
            )
    _check_rows(name, base, base_revision, settings, model)
    if cached_file(
        name, "generation_config.json", revision=revision or "main", _raise_exceptions_for_missing_entries=False
    ):
        model.generation_config = GenerationConfig.from_pretrained(name, revision=revision or "main")
    return model, processor


def _fields_of_base(
    name: str, saved: Any, settings: dict[str, Any], base: str, revision: str | None
) -> dict[str, Any] | None:
    """Latent fields that an adapter needs of a stock base: its latent head and its end vector.

    Raises:
        ValueError: parts that neither the adapter nor the base holds: they would be drawn at random.
    """
    config = AutoConfig.from_pretrained(base, revision=revision or "main")
    if config.model_type.startswith("latent_") or published_method(config) is not None:
        return None
    parts = [field for field in _MODULE_OF_FIELD if getattr(saved, field, None)]
    lost = sorted({_MODULE_OF_FIELD[field] for field in parts} - set(settings.get("modules_to_save") or []))
    if lost:
        raise ValueError(
            f"{name} was trained with {lost}, which neither it nor its base {base} holds; train the adapter with "
            f"modules_to_save={lost}, or save the base with these parts first"
        )
    parts += ["patch_embed_fp32", "rope_positions"] + (["latent_head_timing", "latent_head_size"] if parts else [])
    return {field: getattr(saved, field) for field in parts if hasattr(saved, field)}


def embedding_name(model: PreTrainedModel) -> str:
    """Name of the embedding module as adapters know it: `embed_tokens`, `wte` in GPT-2."""
    embedding = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embedding).rsplit(".", 1)[-1]


def _saved_config(name: str, revision: str | None) -> Any:
    """The latent configuration beside an adapter; `None` when another tool wrote the adapter."""
    options = {"revision": revision or "main", "_raise_exceptions_for_missing_entries": False}
    return AutoConfig.from_pretrained(path) if (path := cached_file(name, "config.json", **options)) else None


def _check_rows(name: str, base: str, revision: str | None, settings: dict[str, Any], model: PreTrainedModel) -> None:
    """Refuse an adapter without the embedding rows that its base lacks: they would be drawn at random."""
    stock = AutoConfig.from_pretrained(base, revision=revision or "main").get_text_config().vocab_size
    added = set(range(stock, model.config.get_text_config().vocab_size))
    tokens = settings.get("trainable_token_indices") or []
    rows = {row for rows in (tokens.values() if isinstance(tokens, dict) else [tokens]) for row in rows}
    if added - rows and embedding_name(model) not in (settings.get("modules_to_save") or []):
        raise ValueError(
            f"{name} does not hold the rows {sorted(added - rows)} of the embedding, and its base {base} has {stock} "
            "rows; train the adapter with trainable_token_indices, or resize and save the base first"
        )


def attach_adapter(model: PreTrainedModel, name: str, revision: str | None) -> None:
    """Put an adapter on its base with transformers' own loader.

    Raises:
        ValueError: modules of the model without weights in the file, or the other way round.
    """
    renamings = getattr(model, "_weight_conversions", None)
    log = logging.getLogger("transformers.integrations.peft")
    level = log.level
    log.setLevel(logging.ERROR)  # its report counts the tied LM head as missing; what it lists is checked below
    try:
        found = model.load_adapter(name, adapter_kwargs={"revision": revision or "main"})
    finally:
        log.setLevel(level)
    model._weight_conversions = renamings  # those of the adapter must not rename what is saved later
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for key, parameter in parameters.items() if key not in found.missing_keys}
    missing = sorted(key for key in found.missing_keys if id(parameters[key]) not in loaded)
    if missing or found.unexpected_keys or found.mismatched_keys:
        raise ValueError(
            f"the adapter {name} does not fit its base {model.name_or_path}: without weights {missing[:3]}, without "
            f"module {sorted(found.unexpected_keys)[:3]}, of other shape {sorted(map(str, found.mismatched_keys))[:3]}"
        )
    model.eval()


def merge_adapter(model: PreTrainedModel) -> None:
    """Fold the adapter of [`load_latent_model`] into the weights, in place; the model can then be saved whole.

    Raises:
        ValueError: a quantised model, whose weights would be rounded again.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError("an adapter is not merged into quantised weights; load the base without quantization_config")
    replaced: list[str] = []
    for name, module in list(model.named_modules()):
        if name.startswith(tuple(replaced)):  # part of a wrapper that is gone already
            continue
        if hasattr(module, "unload_and_optionally_merge_module"):
            merged = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        elif hasattr(module, "merged_adapters") and isinstance(getattr(module, "base_layer", None), nn.Module):
            module.merge()
            merged = module.get_base_layer()
        else:
            continue
        model.set_submodule(name, merged)
        replaced.append(f"{name}.")
    model._hf_peft_config_loaded = False
    del model.peft_config


__all__ = ["adapter_settings", "attach_adapter", "embedding_name", "load_latent_model", "merge_adapter"]
