"""The one file that touches how transformers names tensors on disk: what makes a run resume with the right weights.

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
            "train with save_strategy='no' or add the conversion to trainers/checkpoints.py"
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
