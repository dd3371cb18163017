"""The plugin of lmms-eval: any of its tasks runs a latent model.

    python -m lmms_eval --model latent --model_args pretrained=org/laser-7b,latent_strategy=dynamic --tasks mmstar

lmms-eval finds it by the entry point `lmms_eval.models`. It is no dependency, and no extra either, because it requires
torchvision, which has no CPU build; the README has the line that installs it without.
"""

import importlib
from typing import Any

HOST = "lmms_eval"
INSTALL = "pip install --no-deps lmms-eval==0.7.3 and what README.md names, section 'Evaluate'"


def host_module(name: str) -> Any:
    """A module of lmms-eval.

    Raises:
        ImportError: it is not installed, or lacks a package; says how to install it.
    """
    try:
        return importlib.import_module(f"{HOST}.{name}")
    except ImportError as error:
        raise ImportError(f"{HOST}.{name} cannot be imported ({error}); install it: {INSTALL}") from error


def manifests() -> Any:
    """What lmms-eval registers: the model `latent`."""
    manifest = host_module("models.registry_v2").ModelManifest
    return manifest(
        model_id="latent", chat_class_path="evaluation.lmms_eval_model.LatentVLM", aliases=("latent_reasoning",)
    )


__all__ = ["HOST", "host_module", "manifests"]
