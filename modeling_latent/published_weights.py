"""The files that the published codes of IVT-LR (arXiv 2510.12603) and Coconut (arXiv 2412.06769) write: one flat
dictionary of a wrapped model, read without running code, named as the stock model names its tensors.

A file holds LoRA tensors and the weights below them, and an alias of the embedding.
"""

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

WRAPPER, PEFT_WRAPPER, ALIAS = "base_causallm.", "base_model.model.", "embedding.weight"
PUBLISHED_RANK, PUBLISHED_ALPHA = 64, 16.0
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.(?P<adapter>[^.]+)\.weight")
_EMBEDDINGS = re.compile(r"(?:.+\.)?(?:embed_tokens|wte)\.weight")


@dataclass(frozen=True)
class PublishedWeights:
    """The tensors of a file under the names of the stock model.

    Args:
        weights: name to tensor, those below adapters included.
        adapters: name of a linear layer to `(lora_A (r, in), lora_B (out, r))`.
        embedding: name of the input embedding.
    """

    weights: dict[str, torch.Tensor]
    adapters: dict[str, tuple[torch.Tensor, torch.Tensor]]
    embedding: str

    @property
    def rows(self) -> int:
        """Rows of the embedding; the last three are those of the start, end and slot token."""
        return len(self.weights[self.embedding])

    @property
    def rank(self) -> int | None:
        """Rank of the adapters, `None` without any."""
        return next((len(down) for down, _ in self.adapters.values()), None)


def read_published_weights(path: str | Path, bare: bool = False) -> PublishedWeights:
    """Read a file and name its tensors as the stock model does; they may be mapped from the file, and change with it.

    Args:
        path: file of `torch.save`, read without running code, or safetensors.
        bare: accept names without the wrapper's prefix, as a plain language model has them.

    Raises:
        ValueError: a file that is no such checkpoint, or adapters that do not fit together; by name.
    """
    path = Path(path)
    named: dict[str, torch.Tensor] = {}
    unknown = []
    for key, tensor in _read_tensors(path).items():
        name = key.removeprefix("module.")
        if name == ALIAS:
            continue
        if not name.startswith(WRAPPER) and not bare:
            unknown.append(key)
            continue
        named[name.removeprefix(WRAPPER).removeprefix(PEFT_WRAPPER)] = tensor
    if unknown or not named:
        raise ValueError(
            f"{path}: the tensors {some(unknown)} do not begin with {WRAPPER!r}; is it a checkpoint of this method? "
            "A folder of save_pretrained is loaded with load_latent_model"
        )
    weights, adapters = _split(named, path)
    embedding = next((name for name in weights if _EMBEDDINGS.fullmatch(name)), None)
    if embedding is None:
        raise ValueError(f"{path} has no input embedding among {some(weights)}; give the whole model, not an adapter")
    return PublishedWeights(weights, adapters, embedding)


def copied_weights(
    found: PublishedWeights, dtype: torch.dtype, scaling: float | None = None
) -> dict[str, torch.Tensor]:
    """The weights in memory of their own: those of a file may be mapped, and change with it.

    Args:
        found: what was read.
        dtype: of the result.
        scaling: add `scaling * B @ A` to a weight below an adapter, computed in float32; `None` leaves adapters out.
    """
    weights = {}
    for name, weight in found.weights.items():
        adapter = found.adapters.get(name.removesuffix(".weight")) if scaling is not None else None
        if adapter is not None:
            down, up = adapter
            weight = weight.float() + scaling * (up.float() @ down.float())
        weights[name] = weight.to(dtype, copy=adapter is None)
    return weights


def adapter_scaling(found: PublishedWeights, lora_alpha: float | None, path: Path) -> float:
    """The factor on `B @ A`, `alpha / r`; alpha is not in the file.

    Raises:
        ValueError: another rank than the published one, and no alpha.
    """
    if found.rank is None:
        return 0.0
    if lora_alpha is None and found.rank != PUBLISHED_RANK:
        raise ValueError(
            f"{path}: the adapters have r = {found.rank}, the published ones r = {PUBLISHED_RANK} with alpha = "
            f"{PUBLISHED_ALPHA:g}; alpha is not in the file, so pass lora_alpha=... of the training"
        )
    return (PUBLISHED_ALPHA if lora_alpha is None else lora_alpha) / found.rank


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The dictionary of a file, mapped into memory where its format allows it."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).split("\n")[0][:120] or type(error).__name__
        raise ValueError(
            f"{path} is not a file of tensors that torch.save or safetensors wrote ({reason}); objects other than "
            "tensors are not read, as they could run code: save the state dict alone"
        ) from error
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of named tensors")
    other = [key for key, value in content.items() if not (isinstance(key, str) and torch.is_tensor(value))]
    if other:
        raise ValueError(
            f"{path}: the entries {some(map(str, other))} are no tensors; give the flat state dict of the model alone"
        )
    return dict(content)


def _split(
    named: dict[str, torch.Tensor], path: Path
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Weights and adapters.

    Raises:
        ValueError: half an adapter, one without the weight below it or the reverse, shapes that do not fit, or more
            than one rank or adapter.
    """
    weights: dict[str, torch.Tensor] = {}
    sides: dict[str, dict[str, torch.Tensor]] = {}
    wrapped, adapters = set(), set()
    for name, tensor in named.items():
        lora = _LORA.fullmatch(name)
        if lora is not None:
            sides.setdefault(lora["module"], {})[lora["side"]] = tensor
            adapters.add(lora["adapter"])
            continue
        module, below, kind = name.partition(".base_layer.")
        weights[f"{module}.{kind}" if below else name] = tensor
        wrapped |= {module} if below else set()
    if len(adapters) > 1:
        raise ValueError(f"{path} holds the adapters {sorted(adapters)}; give a file with one")
    for module in sorted(wrapped ^ set(sides)):
        raise ValueError(
            f"{path}: {module} has {'base_layer' if module in wrapped else 'lora'} tensors only; an adapter is "
            "lora_A and lora_B on a base_layer, so the file is not whole"
        )
    for module, parts in sides.items():
        if len(parts) < 2:
            raise ValueError(f"{path}: {module} has lora_{min(parts)} alone, without the other half of B @ A")
        down, up, weight = parts["A"], parts["B"], weights.get(f"{module}.weight")
        if weight is None or up.shape[1] != down.shape[0] or (up.shape[0], down.shape[1]) != tuple(weight.shape):
            shape = None if weight is None else tuple(weight.shape)
            raise ValueError(
                f"{path}: {module} has lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} on a weight {shape}; "
                "they must be (r, in), (out, r) and (out, in)"
            )
    ranks = sorted({len(parts["A"]) for parts in sides.values()})
    if len(ranks) > 1:
        raise ValueError(f"{path}: the adapters have the ranks {ranks}; they must have one")
    return weights, {module: (parts["A"], parts["B"]) for module, parts in sides.items()}


def some(names: Iterable[str]) -> str:
    """The first names of a list, for a message."""
    names = sorted(names)
    return f"{names[:3]}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


__all__ = [
    "PublishedWeights",
    "adapter_scaling",
    "copied_weights",
    "read_published_weights",
    "some",
]
