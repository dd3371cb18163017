"""Objectives: what a method trains in the wrapped forward, chosen by `LatentSFTConfig.latent_method`; a file a method.

An objective binds losses of `trainers/losses/` to the options of the config and to the token ids of the model. A new
method registers its own with [`register_objective`]; the trainer is not edited.
"""

from collections.abc import Callable

from transformers import PreTrainedConfig

from ..configs import LatentSFTConfig
from ..latent_forward import LatentObjective

ObjectiveFactory = Callable[[LatentSFTConfig, PreTrainedConfig], LatentObjective]
OBJECTIVES: dict[str, ObjectiveFactory] = {}


def register_objective(method: str) -> Callable[[ObjectiveFactory], ObjectiveFactory]:
    """Decorator that adds the objective of a method: a callable `(config of the trainer, config of the model)`."""

    def add(factory: ObjectiveFactory) -> ObjectiveFactory:
        OBJECTIVES[method] = factory
        return factory

    return add


def build_objective(args: LatentSFTConfig, config: PreTrainedConfig) -> LatentObjective:
    """Objective of `args.latent_method`, by default of the method that the model was made for.

    Raises:
        ValueError: no method is named, an unknown one, or a model without latent tokens.
    """
    if not hasattr(config, "require_latent_tokens"):
        raise ValueError(
            f"{type(config).__name__} is a stock configuration; make the model with convert_stock_checkpoint(folder, "
            f"method={args.latent_method or 'laser'!r})"
        )
    method = args.latent_method or config.latent_method
    if method not in OBJECTIVES:
        raise ValueError(f"latent_method={method!r} has no training objective; choose one of {sorted(OBJECTIVES)}")
    config.require_latent_tokens()
    objective = OBJECTIVES[method](args, config)
    if args.latent_exposure not in objective.exposures:
        raise ValueError(
            f"latent_exposure={args.latent_exposure!r} is not for latent_method={method!r}; choose one of "
            f"{list(objective.exposures)}"
        )
    return objective


from . import laser, lavit, lvr, staged  # noqa: E402, F401  (they register themselves)
