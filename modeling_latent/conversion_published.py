"""From a published `.pth` file of IVT-LR or Coconut to a latent model in one call.

The published codes of "Reasoning in the Dark: Interleaved Vision-Text Reasoning in Latent Space" (IVT-LR, arXiv
2510.12603) and of Coconut (arXiv 2412.06769) save the tensors of a model (see `published_weights.py`), without
configuration and tokenizer. Those come from the stock model that the file was trained from.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from .configuration_latent import get_latent_method
from .conversion_latent import convert_stock_checkpoint
from .generation_latent import saved_generation_config
from .loading_latent import attach_adapter
from .published_weights import PublishedWeights, adapter_scaling, copied_weights, read_published_weights, some

PUBLISHED_METHODS = ("ivtlr", "coconut")
FILE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
LORA_DROPOUT = 0.05  # of the published training, for an adapter that is trained on


def convert_published_checkpoint(
    name_or_path: str | Path,
    base: str | Path,
    method: str = "ivtlr",
    *,
    filename: str = "model.pth",
    adapter: str = "merge",
    lora_alpha: float | None = None,
    processor: Any = None,
    revision: str | None = None,
    base_revision: str | None = None,
    latent_fields: dict[str, Any] | None = None,
    **model_kwargs: Any,
) -> tuple[PreTrainedModel, Any]:
    """Load a published checkpoint as a latent model.

    Args:
        name_or_path: the file (`torch.save`, or safetensors with the same names), a folder or Hub repository with it.
        base: folder or Hub repository of the stock model that it was trained from: configuration, tokenizer and image
            processor are read, no weight is.
        method: `"ivtlr"` or `"coconut"`.
        filename: of a folder or repository, e.g. `"qwen_vl/model.pth"` in `"FYYDCC/IVTLR"`.
        adapter: `"merge"` adds `lora_alpha / r * B @ A` to the weights, in float32; `"keep"` attaches a PEFT adapter.
        lora_alpha: of the training; default 16, as published with r = 64.
        processor: a processor to use instead of the base's.
        revision, base_revision: branch, tag or commit of the two Hub repositories.
        latent_fields: fields of the configuration that win over the published ones (IVT-LR on Qwen-VL:
            `rope_positions="flat"`).
        model_kwargs: for `from_pretrained`; `dtype` is by default that of the frozen weights.

    Returns:
        `(model, processor)`. Rows of tokens that the file has none for (`<|latent-patch|>`) are those of the slot
        token. `generate` starts from the published settings.

    Raises:
        ValueError: an unknown method or option, a file that is no such checkpoint, adapters that do not fit together,
            a tokenizer with other latent ids, or tensors without a place, missing or of another shape; by name.
        ImportError: `adapter="keep"`, and peft is not installed.
    """
    for option, value, known in (("method", method, PUBLISHED_METHODS), ("adapter", adapter, ("merge", "keep"))):
        if value not in known:
            raise ValueError(f"{option}={value!r}: no published checkpoint is read so; choose one of {list(known)}")
    path = _find_file(name_or_path, filename, revision)
    found = read_published_weights(path, bare=method == "coconut")
    scaling = adapter_scaling(found, lora_alpha, path)
    skeleton, processor = convert_stock_checkpoint(
        base, method=method, processor=processor, revision=base_revision, weights=False, latent_fields=latent_fields
    )
    config = skeleton.config
    if method == "ivtlr" and config.model_type.startswith("latent_qwen"):
        config.rope_positions = (latent_fields or {}).get("rope_positions", "flat")
    _check_tokens(found, config, path, str(base))
    dtype = model_kwargs.pop("dtype", None)
    dtype = found.weights[found.embedding].dtype if dtype in (None, "auto") else dtype
    weights = copied_weights(found, dtype, scaling if adapter == "merge" else None)
    model = _load(skeleton, weights, found, path, str(base), dtype=dtype, **model_kwargs)
    _add_rows(model, found.rows, len(processor.tokenizer))
    model.generation_config = _generation_config(model, method, str(base), base_revision)
    if adapter == "keep" and found.adapters:
        _keep_adapter(model, found, scaling, str(base), base_revision)
    return model, processor


def _find_file(name_or_path: str | Path, filename: str, revision: str | None) -> Path:
    path = Path(name_or_path)
    if path.is_dir():
        path = path / filename
    if path.is_file():
        return path
    if path.suffix in FILE_SUFFIXES or path.parent.is_dir() and str(path.parent) != ".":
        raise ValueError(f"{path}: no such file; give a file, a folder with {filename!r}, or a Hub repository id")
    return Path(hf_hub_download(str(name_or_path), filename, revision=revision))


def _check_tokens(found: PublishedWeights, config: Any, path: Path, base: str) -> None:
    """Refuse a tokenizer whose latent ids are not the last rows of the file: rows would be read for other tokens."""
    names = ("latent_start_token_id", "latent_end_token_id", "latent_token_id")
    ours = [getattr(config, name) for name in names]
    theirs = list(range(found.rows - 3, found.rows))
    if ours != theirs:
        raise ValueError(
            f"{path} has {found.rows} embedding rows, so its start, end and slot tokens are {theirs}; the tokenizer "
            f"of {base} gives {ours}. Pass the processor of the model that the file was trained with: processor=..."
        )


def _load(
    skeleton: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    found: PublishedWeights,
    path: Path,
    base: str,
    **model_kwargs: Any,
) -> PreTrainedModel:
    """The latent model with exactly these weights.

    Raises:
        ValueError: tensors without a place, missing, or of another shape than the configuration of the base says.
    """
    config = skeleton.config
    config.get_text_config().vocab_size = found.rows
    head = weights.get("lm_head.weight")
    if config.tie_word_embeddings and head is not None:
        if not torch.equal(head, weights[found.embedding]):
            raise ValueError(
                f"{path} has an LM head of its own, and {base} ties it to the embedding (tie_word_embeddings); give "
                "the base that the file was trained from"
            )
        del weights["lm_head.weight"]
    model, info = type(skeleton).from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True, ignore_mismatched_sizes=True, **model_kwargs
    )
    wrong = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        raise ValueError(
            f"{path} does not fit {base}: missing {some(wrong['missing'])}, without a place "
            f"{some(wrong['unexpected'])}, of another shape {some(wrong['mismatched'])}; give the base that the file "
            "was trained from"
        )
    model.config._name_or_path = model.name_or_path = base
    return model.eval()


@torch.no_grad()
def _add_rows(model: PreTrainedModel, rows: int, size: int) -> None:
    """Rows of the tokens that the published tokenizer has not: copies of those of the slot token."""
    if size <= rows:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    slot = model.config.latent_token_id
    for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        matrix[rows:] = matrix[slot]


def _generation_config(model: PreTrainedModel, method: str, base: str, revision: str | None) -> GenerationConfig:
    """That of the base, with the published settings of the method."""
    options = {"revision": revision or "main"}
    file = cached_file(base, "generation_config.json", _raise_exceptions_for_missing_entries=False, **options)
    config = model.generation_config if file is None else GenerationConfig.from_pretrained(base, **options)
    published = dict(get_latent_method(method).generation)
    if method == "ivtlr":
        published.update(latent_patch_order="index_then_kth", latent_patch_images="last")
        if model.config.model_type == "latent_chameleon":
            published["num_latent_patches"] = 64
    return saved_generation_config(config, **published)


def _keep_adapter(
    model: PreTrainedModel, found: PublishedWeights, scaling: float, base: str, revision: str | None
) -> None:
    """Put the adapters on the model with PEFT, through a folder as PEFT writes it."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    tensors, targets = {}, set()
    for module, (down, up) in found.adapters.items():
        name = f"{prefix}.{module.removeprefix('model.')}"
        targets.add(name.rsplit(".", 1)[1])
        for side, tensor in (("A", down), ("B", up)):
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = tensor.contiguous()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": found.rank,
        "lora_alpha": scaling * found.rank,
        "lora_dropout": LORA_DROPOUT,
        "target_modules": rf"{prefix}\..*\.({'|'.join(sorted(targets))})",
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
        save_file(tensors, Path(folder, "adapter_model.safetensors"))
        attach_adapter(model, folder, None)


__all__ = ["convert_published_checkpoint"]
