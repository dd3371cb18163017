"""What a model can do, asked before anything runs."""

from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from modeling_latent.latent_strategies import get_latent_strategy, resolve_latent_options
from trainers.data.records import Record, RecordError

from ..runner import predict
from .variants import Asked, Variant


def strategy_of(model: PreTrainedModel, strategy: str | None = None) -> str:
    """The strategy that `generate` takes: that of the call, else the saved one, else that of the model's method."""
    saved = getattr(model.generation_config, "latent_strategy", None)
    return strategy or saved or (model.config.latent_generation or {}).get("latent_strategy") or "off"


def lays_out(model: PreTrainedModel, strategy: str | None) -> bool:
    """Whether `generate` lays slots out behind the prompt."""
    return strategy_of(model, strategy) == "staged"


def refuse_impossible(model: PreTrainedModel, processor: Any, variant: Variant, asked: Asked, thoughts: str) -> None:
    """Refuse what a model cannot do: a strategy whose latent tokens it has not, options without a value or that do not
    go together, a prompt that its processor cannot write. One record is asked, for a single step.

    Args:
        model, processor: of the variant.
        variant: what is to be run.
        asked: a benchmark that it is run on.
        thoughts: see [`predict`].

    Raises:
        ValueError: names the condition and what is wrong.
    """
    options: dict[str, Any] = dict(variant.options)
    name = model.config.strategy_of_method(strategy_of(model, options.pop("latent_strategy", None)))
    try:
        saved = [vars(model.generation_config), model.config.latent_generation or {}]
        found = resolve_latent_options(name, options, saved)
        if found.strategy.uses_latents and found.strategy.tokens is not None:
            model.config.require_latent_tokens(found.strategy.tokens)
        _one_step(model, processor, variant, asked, thoughts)
    except RecordError:
        raise
    except ValueError as error:
        which = f" with {variant.model}" if variant.model else ""
        raise ValueError(f"the condition {variant.name!r}{which} cannot be run: {error}") from error


class _AtOnce(StoppingCriteria):
    """Every row stops."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.BoolTensor:
        return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _one_step(model: PreTrainedModel, processor: Any, variant: Variant, asked: Asked, thoughts: str) -> None:
    protocol, options = asked.protocol, dict(variant.options)
    record: Record = min(asked.records, key=lambda each: len(each["question"]))
    if get_latent_strategy(options.get("latent_strategy") or "off").name == "search":
        options |= {"max_num_steps": 0}
        budget = 1
    else:
        options |= {"stopping_criteria": StoppingCriteriaList([_AtOnce()])}
        budget = protocol.max_new_tokens
    predict(
        model,
        processor,
        [record if protocol.prepare is None else protocol.prepare(record)],
        max_new_tokens=budget,
        prompt=lambda each: protocol.prompt(processor, each),
        processor_options=protocol.processor_options,
        thoughts=thoughts,
        **options,
    )


__all__ = ["lays_out", "refuse_impossible", "strategy_of"]
