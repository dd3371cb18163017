"""What a model can do, asked before anything runs."""

from typing import Any

from transformers import PreTrainedModel

from modeling_latent.latent_strategies import resolve_latent_options

from .variants import Variant


def strategy_of(model: PreTrainedModel, strategy: str | None = None) -> str:
    """The strategy that `generate` takes: that of the call, else the saved one, else that of the model's method."""
    saved = getattr(model.generation_config, "latent_strategy", None)
    return strategy or saved or (model.config.latent_generation or {}).get("latent_strategy") or "off"


def lays_out(model: PreTrainedModel, strategy: str | None) -> bool:
    """Whether `generate` lays slots out behind the prompt."""
    return strategy_of(model, strategy) == "staged"


def refuse_impossible(model: PreTrainedModel, variant: Variant) -> None:
    """Refuse a strategy that needs latent tokens which the model has not, or options without a value.

    Raises:
        ValueError: names the condition and what is missing.
    """
    options: dict[str, Any] = dict(variant.options)
    name = model.config.strategy_of_method(strategy_of(model, options.pop("latent_strategy", None)))
    try:
        found = resolve_latent_options(
            name, options, [vars(model.generation_config), model.config.latent_generation or {}]
        )
        if found.strategy.uses_latents and found.strategy.tokens is not None:
            model.config.require_latent_tokens(found.strategy.tokens)
    except ValueError as error:
        which = f" with {variant.model}" if variant.model else ""
        raise ValueError(f"the condition {variant.name!r}{which} cannot be run: {error}") from error


__all__ = ["lays_out", "refuse_impossible", "strategy_of"]
