"""Latents as decoding would make them, for a batch of training sequences: step by step over one cache.

Each row is fed its own latents where `own` says so and the teacher's inputs elsewhere. The rows are moved so that
their first latents stand in one column: one pass over everything before it, then one step a column, in all as many
steps as the longest stretch from a row's first own latent to its last has positions. With gradients this is
back-propagation through time; without, it says how far free-running latents are from their targets.

All processes run the same number of steps, so that parameters gathered module by module (ZeRO-3, FSDP) do not hang.
"""

from typing import Any

import torch
from torch import distributed
from transformers import DynamicCache, PreTrainedModel


def free_running_latents(model: PreTrainedModel, own: torch.BoolTensor, inputs: dict[str, Any]) -> torch.Tensor:
    """The vectors `(batch, length, hidden)` that free-running decoding feeds at `own`; zero elsewhere.

    Gradients flow through every step where they are enabled. The model may be in train mode, but activation
    checkpointing would drop the cache: switch it off.

    Args:
        model: the head class; its backbone is run and its `latent_step` applied.
        own: `(batch, length)` bool, positions that are fed the model's own latents.
        inputs: what the backbone takes: `input_ids`, `attention_mask` (padding on the right), image inputs, and the
            teacher's `latent_embeds` and `latent_mask`, if any.

    Raises:
        ValueError: activation checkpointing in train mode, an own latent at position 0, or image placeholders behind
            the first own latent of a row.
    """
    if model.training and model.is_activation_checkpointing:
        raise ValueError(
            "free-running latents need the cache, which activation checkpointing drops; set activation_checkpointing: "
            "false, or latent_exposure: own"
        )
    ids = inputs["input_ids"]
    is_image = ids == model.config.image_token_id
    first, steps = _first_and_steps(own, is_image)
    _check_rows(own, first, is_image)
    width = int(first.max()) + steps
    shift = first.max() - first
    aligned = _Aligned(shift, width)
    mask = inputs.get("attention_mask")
    mask = aligned(torch.ones_like(ids) if mask is None else mask)
    positions = _rotary_positions(model, inputs)
    positions = aligned(positions.flatten(0, 1)).unflatten(0, positions.shape[:2])
    ids, own_here = aligned(ids), aligned(own)
    given, given_mask = _teacher(aligned, inputs, ids, model.config.get_text_config().hidden_size)
    images = {name: value for name, value in inputs.items() if name in _IMAGE_INPUTS}
    cache, start, end, made = DynamicCache(), 0, width - steps, []
    for _ in range(steps):
        embeds, fed = given[:, start:end], given_mask[:, start:end]
        if made:  # one column: what the last step made, where it is fed
            mine = own_here[:, start:end]
            embeds, fed = torch.where(mine.unsqueeze(-1), made[-1].to(embeds.dtype), embeds), fed | mine
        hidden = model.base_model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, :, start:end],
            past_key_values=cache,
            use_cache=True,
            latent_embeds=embeds,
            latent_mask=fed,
            **images,
        ).last_hidden_state
        made.append(model.latent_step(hidden[:, -1:]))
        start, end, images = end, end + 1, {}
    return aligned.undo(torch.cat(made, dim=1), own, width - steps)


_IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "mm_encoder_outputs")


class _Aligned:
    """Rows moved to the right by `shift` `(batch,)`, cut or filled with zeros to `width`."""

    def __init__(self, shift: torch.LongTensor, width: int) -> None:
        self.shift = shift
        self.source = torch.arange(width, device=shift.device) - shift.unsqueeze(1)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        batch, length = values.shape[:2]
        source = self.source.repeat(batch // len(self.shift), 1)
        inside = (source >= 0) & (source < length)
        index = source.clamp(0, length - 1)
        rows = torch.arange(batch, device=values.device).unsqueeze(1)
        inside = inside.unsqueeze(-1) if values.dim() == 3 else inside
        return torch.where(inside, values[rows, index], torch.zeros((), dtype=values.dtype, device=values.device))

    def undo(self, made: torch.Tensor, own: torch.BoolTensor, column: int) -> torch.Tensor:
        """The steps' vectors, the first of which belongs to `column`, at the places `own` of the rows as they were."""
        row, position = own.nonzero(as_tuple=True)
        values = made[row, position + self.shift[row] - column]
        out = made.new_zeros(*own.shape, made.shape[-1])
        return out.index_put((row, position), values)


def _first_and_steps(own: torch.BoolTensor, images: torch.BoolTensor) -> tuple[torch.LongTensor, int]:
    """Position of the first own latent of each row, for a row without one the place behind its images, and the number
    of steps, the same on all processes."""
    places = torch.arange(own.shape[1], device=own.device)
    first = torch.where(own, places, own.shape[1]).amin(dim=1)
    last = torch.where(own, places, -1).amax(dim=1)
    behind_images = torch.where(images, places + 1, 1).amax(dim=1)
    steps = torch.where(last >= 0, last - first + 1, 1).amax()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(steps, op=distributed.ReduceOp.MAX)
    return torch.where(last >= 0, first, behind_images), int(steps)


def _check_rows(own: torch.BoolTensor, first: torch.LongTensor, is_image: torch.BoolTensor) -> None:
    if bool(own[:, 0].any()):
        raise ValueError(f"row {int(own[:, 0].nonzero()[0, 0])} begins with a latent; nothing comes before it")
    behind = is_image & (torch.arange(own.shape[1], device=own.device) >= first.unsqueeze(1))
    if bool(behind.any()):
        row, position = behind.nonzero()[0].tolist()
        raise ValueError(
            f"row {row} has an image at position {position}, behind its first latent, so its latents cannot be "
            "decoded over one pass of the images; use latent_exposure: own and eval_free_running: false"
        )


def _rotary_positions(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.LongTensor:
    """`(channels, batch, length)` positions of the rows as they were."""
    given = inputs.get("position_ids")
    if given is not None:
        return given if given.dim() == 3 else given.unsqueeze(0).expand(3, -1, -1)
    backbone, ids = model.base_model, inputs["input_ids"]
    names = ("image_grid_thw", "attention_mask", "mm_token_type_ids", *backbone.position_inputs)
    found = backbone.compute_3d_position_ids(
        input_ids=ids, inputs_embeds=None, past_key_values=None, video_grid_thw=None,
        **{name: inputs.get(name) for name in names},
    )  # fmt: skip
    if found is None:
        found = torch.arange(ids.shape[1], device=ids.device).expand(3, len(ids), -1)
    return found


def _teacher(
    aligned: _Aligned, inputs: dict[str, Any], ids: torch.LongTensor, size: int
) -> tuple[torch.Tensor, torch.BoolTensor]:
    """The teacher's latents and where they are, aligned; none of them when there are none."""
    given = inputs.get("latent_embeds")
    if given is None:
        return torch.zeros(*ids.shape, size, device=ids.device), torch.zeros_like(ids, dtype=torch.bool)
    return aligned(given), aligned(inputs["latent_mask"])
