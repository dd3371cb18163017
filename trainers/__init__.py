"""Training of latent-reasoning models: data, losses, objectives and trainers.

Names are imported when first used, so that `import trainers` costs nothing.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "LatentSFTCollator": "collators",
    "LatentSFTConfig": "configs",
    "LatentSFTTrainer": "sft_trainer",
    "OBJECTIVES": "objectives",
    "build_objective": "objectives",
    "register_objective": "objectives",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
