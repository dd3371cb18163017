"""Stopping rules of LVR: the learned end vector and the mode switch ("Latent Visual Reasoning", arXiv 2509.24251).

A span of LVR is closed by a count (`fixed`), by a distance (`end_vector`: the vector fed last is near a learned one),
or by the LM head (`mode_switch`: it says the end marker). All have a cap. `end_vector_reference` has the two habits of
the published loop that `end_vector` leaves out; see [`cap_since_start`] and [`near_end_vector_or_entry`].
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .latent_strategies import (
    LatentOption,
    LatentOptions,
    LatentStep,
    LatentStrategy,
    number_from,
    one_of,
    register_latent_option,
    register_latent_strategy,
    register_stop_rule,
)

CRITERIA = ("mse", "mae", "cosine", "cosine_batch")


class LatentStopVector(nn.Module):
    """The learned vector `(hidden,)` that ends a span; `config.latent_stop_vector` says whether a model has one.

    It starts in a random direction with the norm sqrt(hidden) (see `_init_weights` of the head class). Call the module
    to read it, `model.latent_stop_vector(states)`: sharded training gathers the weight for the call, and an adapter
    puts its own copy in its place.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, like: torch.Tensor | None = None) -> torch.Tensor:
        """The vector, on the device and in the dtype of `like` if there is one."""
        return self.weight.clone() if like is None else self.weight.to(like, copy=True)


def latent_distance(vectors: torch.Tensor, target: torch.Tensor, criterion: str) -> torch.Tensor:
    """Distance of each row to one vector.

    Args:
        vectors: `(R, H)`.
        target: `(H,)`.
        criterion: `"mse"` and `"mae"`, the mean squared and the mean absolute difference over `H`; `"cosine"`, one
            minus the cosine; `"cosine_batch"`, one minus the mean cosine of all rows (published code: a row then
            depends on its batch).

    Returns:
        `(R,)`, in float32.
    """
    vectors, target = vectors.float(), target.to(vectors.device, torch.float32)
    if criterion == "mse":
        return (vectors - target).square().mean(-1)
    if criterion == "mae":
        return (vectors - target).abs().mean(-1)
    distances = 1 - F.cosine_similarity(vectors, target.expand_as(vectors), dim=-1, eps=1e-8)
    return distances if criterion == "cosine" else distances.mean().expand_as(distances)


def _near(step: LatentStep) -> torch.BoolTensor:
    if step.before is None:
        return torch.zeros_like(step.is_open)
    values = step.options
    distance = latent_distance(step.before, values.latent_stop_vector, values.latent_criterion)
    return distance.to(step.is_open.device) < values.latent_end_threshold


@register_stop_rule("end_vector")
def near_end_vector(step: LatentStep) -> torch.BoolTensor:
    """The vector fed last is near: the slot that matched has been fed, and text goes on."""
    return _near(step) & (step.count > 0)


@register_stop_rule("end_vector_reference")
def near_end_vector_or_entry(step: LatentStep) -> torch.BoolTensor:
    """As published: the state that chose the start marker is compared as well, so a large threshold keeps a span
    from opening at all, except right after the prompt."""
    return _near(step)


@register_stop_rule("cap_since_start")
def cap_since_start(step: LatentStep) -> torch.BoolTensor:
    """As published: the cap counts from the last start marker, and with `latent_ids="readable"` a slot may say one."""
    places = torch.arange(step.position, device=step.input_ids.device)
    start = torch.where(step.input_ids == step.config.latent_start_token_id, places, -1).amax(dim=1)
    return step.position - 1 - start >= step.options.max_latent_steps


def is_vector(name: str, value: Any) -> torch.Tensor | None:
    """Check: `None` (the model's own) or a vector of floats."""
    if value is not None and not (isinstance(value, torch.Tensor) and value.dim() == 1 and value.is_floating_point()):
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else value
        raise ValueError(
            f"{name}={shape!r} must be a tensor of floats of shape (hidden,), or None for the learned one"
        )
    return value


for _option in (
    LatentOption("latent_end_threshold", 0.02, number_from(0.0), "distance below which a span closes"),
    LatentOption("latent_criterion", "mse", one_of(*CRITERIA), "the distance; cosine_batch is one for all rows"),
    LatentOption("latent_stop_vector", None, is_vector, "vector that ends a span; the learned one", saved=False),
):
    register_latent_option(_option)


def require_stop_vector(model: nn.Module, model_kwargs: dict[str, Any], options: LatentOptions) -> dict[str, Any]:
    """Take the vector that ends a span from the call, else from the model.

    Raises:
        ValueError: the model was trained without one, or a given vector has another size.
    """
    size, given, learned = (
        model.config.get_text_config().hidden_size,
        options.values.latent_stop_vector,
        getattr(model, "latent_stop_vector", None),
    )
    if given is None and learned is None:
        raise ValueError(
            f"latent_strategy={options.strategy.name!r} needs a model with a learned end vector, and "
            f"{model.name_or_path or type(model).__name__!r} was trained without one (latent_stop_vector is false in "
            "config.json); use latent_strategy='fixed', pass latent_stop_vector=..., or train with "
            "latent_stop_vector=True"
        )
    vector = learned(None) if given is None else given
    if vector.shape[0] != size:
        raise ValueError(f"latent_stop_vector has {vector.shape[0]} entries, the model {size}; give one of its size")
    options.values.latent_stop_vector = vector
    return model_kwargs


def require_latent_head(model: nn.Module, model_kwargs: dict[str, Any], options: LatentOptions) -> dict[str, Any]:
    """Refuse the mode switch where it was never trained: its loss exists for models with a latent head only.

    Raises:
        ValueError: a model without a latent head.
    """
    if model.config.latent_head is None:
        raise ValueError(
            f"latent_strategy={options.strategy.name!r} needs a model trained with a latent head, and "
            f"{model.name_or_path or type(model).__name__!r} has none (latent_head is null in config.json); use "
            "latent_strategy='fixed', or, where the LM head learned to say the end marker inside a span, "
            "latent_strategy='dynamic' with force_span=False"
        )
    return model_kwargs


_END_OPTIONS = (
    "max_latent_steps",
    "latent_end_threshold",
    "latent_criterion",
    "latent_stop_vector",
    "force_span",
    "force_end",
    "latent_answer_ids",
)
_END_VECTOR = LatentStrategy(
    name="end_vector",
    stops=("max_latent_steps", "end_vector"),
    options=_END_OPTIONS,
    forced=("max_latent_steps",),
    writes_end=False,
    reads_before=True,
    layout=require_stop_vector,
)
register_latent_strategy(_END_VECTOR)
register_latent_strategy(
    replace(
        _END_VECTOR,
        name="end_vector_reference",
        stops=("cap_since_start", "end_vector_reference"),
        forced=("cap_since_start",),
    )
)
register_latent_strategy(
    LatentStrategy(
        name="mode_switch",
        stops=("max_latent_steps", "repetition", "end_token"),
        options=("max_latent_steps", "force_span", "latent_answer_ids", "repetition_exit"),
        forced=("max_latent_steps", "repetition"),
        layout=require_latent_head,
    )
)

__all__ = ["CRITERIA", "LatentStopVector", "latent_distance", "require_latent_head", "require_stop_vector"]
