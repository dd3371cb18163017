"""Names of tensors in a checkpoint and in the model: what makes a run resume with the right weights.

`save_pretrained` writes the names of the published checkpoints (`visual.*`, `model.layers.*`) and `from_pretrained`
renames them, but `Trainer` resumes, and loads its best checkpoint, with a plain `load_state_dict(..., strict=False)`:
of a Qwen2.5-VL it would take the LM head alone, with a warning, and train on from the initial weights.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def saved_names(model: PreTrainedModel) -> dict[str, str]:
    """Names that `save_pretrained` gives to the tensors of a model, where they differ: saved name to own name.

    Raises:
        RuntimeError: a family whose tensors are not only renamed but also split or merged on disk.
    """
    markers = {name: torch.empty(0) for name in model.state_dict()}
    owners = {id(marker): name for name, marker in markers.items()}
    saved = {name: owners.get(id(marker)) for name, marker in revert_weight_conversion(model, markers).items()}
    if None in saved.values() or len(saved) != len(owners):
        raise RuntimeError(
            f"{type(model).__name__} is saved with tensors that are split or merged, which a run cannot resume from; "
            "train with save_strategy='no' or add the conversion to trainers/tensor_names.py"
        )
    return {name: own for name, own in saved.items() if name != own}


def accept_saved_names(model: PreTrainedModel) -> None:
    """Let `model.load_state_dict` take the names that `model.save_pretrained` writes, besides its own."""
    names = saved_names(model)

    def rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for saved, own in names.items():
            if prefix + saved in state_dict and prefix + own not in state_dict:
                state_dict[prefix + own] = state_dict.pop(prefix + saved)

    if names:
        model.register_load_state_dict_pre_hook(rename)


def not_loaded(model: PreTrainedModel, missing: list[str], unexpected: list[str]) -> list[str]:
    """Tensors of a model that a load left as they were.

    Args:
        missing, unexpected: as the load reported them; for sharded checkpoints transformers compares the names in the
            files with those of the model before any renaming.
    """
    came = {own for saved, own in saved_names(model).items() if saved in unexpected}
    state = model.state_dict()
    missing = [name for name in missing if name in state and name not in came]
    # A tied tensor is saved under one of its names.
    loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in missing and tensor.numel()}
    return [name for name in missing if state[name].data_ptr() not in loaded]
