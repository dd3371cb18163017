"""From a stock checkpoint folder to a latent model in one call."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from .configuration_latent import LatentQwen2_5_VLConfig, get_latent_method
from .generation_latent import saved_generation_config
from .modeling_latent_qwen2_5_vl import LatentQwen2_5_VLForConditionalGeneration
from .processing_latent import LatentProcessor

LATENT_CLASSES: dict[str, tuple[type, type[PreTrainedModel]]] = {
    "qwen2_5_vl": (LatentQwen2_5_VLConfig, LatentQwen2_5_VLForConditionalGeneration),
}


def latent_classes(model_type: str, source: str) -> tuple[type, type[PreTrainedModel]]:
    """Latent configuration and model class of a stock family.

    Raises:
        ValueError: a family without a latent class.
    """
    if model_type not in LATENT_CLASSES:
        raise ValueError(
            f"{source} is a {model_type!r} checkpoint; latent classes exist for {sorted(LATENT_CLASSES)}. "
            "Choose a checkpoint of one of these families"
        )
    return LATENT_CLASSES[model_type]


def convert_stock_checkpoint(
    name_or_path: str | Path,
    method: str = "laser",
    processor: LatentProcessor | None = None,
    **model_kwargs: Any,
) -> tuple[PreTrainedModel, LatentProcessor]:
    """Load a stock checkpoint as a latent model with the method's marker tokens.

    Args:
        name_or_path: folder or Hub repository of a stock model (weights, tokenizer, image processor).
        method: name in `LATENT_METHODS`; fixes tokens, head and decoding defaults.
        processor: a processor to use instead of the folder's.
        model_kwargs: for `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, ...).

    Returns:
        `(model, processor)`, ready to train, to `save_pretrained` and to `push_to_hub`. Embedding rows are added only
        when the tokenizer has outgrown the vocabulary (card: nothing is resized for the 3B and 7B models); added rows
        are drawn as the model initialises embeddings.

    Raises:
        ValueError: a family without a latent class, a folder without a configuration, or one that is latent already.
    """
    entry = get_latent_method(method)
    stock_config = _read_config(name_or_path)
    if stock_config.model_type.startswith("latent_"):
        raise ValueError(
            f"{name_or_path} is a latent model already (method {stock_config.latent_method!r}); load it with AutoModel"
        )
    config_class, model_class = latent_classes(stock_config.model_type, str(name_or_path))
    if processor is None:
        processor = LatentProcessor.from_pretrained(name_or_path, latent_tokens=entry.tokens)
    config = config_class.from_stock(
        stock_config,
        method=method,
        latent_token_id=processor.latent_token_id,
        latent_start_token_id=processor.latent_start_token_id,
        latent_end_token_id=processor.latent_end_token_id,
        latent_patch_token_id=processor.latent_patch_token_id,
    )
    model = model_class.from_pretrained(name_or_path, config=config, **model_kwargs)
    if len(processor.tokenizer) > model.get_input_embeddings().weight.shape[0]:
        with torch.no_grad():
            model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    model.generation_config = saved_generation_config(model.generation_config, **entry.generation)
    return model, processor


def _read_config(name_or_path: str | Path) -> Any:
    path = Path(name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json; give a folder written by save_pretrained or a Hub repository id")
    return AutoConfig.from_pretrained(name_or_path)
