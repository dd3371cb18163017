"""Strategy `learned`: latents that are tokens with an embedding of their own, always there, right behind the prompt.

LaViT ("LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129) trains `K` such tokens at
the beginning of every reply; the states at them carry what the image is, the answer follows. Laid out they are a part
of the prompt, so that no decode step is spent on them. `mask_latents` is the ablation: the tokens are there, and
nothing behind them can look at them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .latent_inputs import mask_of_prompts
from .latent_masks import Visibility, hidden_positions
from .latent_staged import pad_rows
from .latent_state import LatentState
from .latent_strategies import (
    LatentOption,
    LatentOptions,
    LatentStep,
    LatentStrategy,
    is_bool,
    register_latent_option,
    register_latent_strategy,
)

MASK_FORMS = ("visibility", "padding")


def is_mask_form(name: str, value: Any) -> str | bool:
    """Check: `False`, or a form of hiding; `True` is the first one."""
    if value is True:
        return MASK_FORMS[0]
    if value is not False and value not in MASK_FORMS:
        raise ValueError(f"{name}={value!r} is unknown; choose False, True or one of {list(MASK_FORMS)}")
    return value


for _option in (
    LatentOption("force_latents", True, is_bool,
                 "lay the learned tokens out behind the prompt; False: the model writes them itself, if it does",
                 aliases=("force_lvr",)),
    LatentOption("mask_latents", False, is_mask_form,
                 "hide the learned tokens: 'visibility' (no other position sees them, nothing moves), or 'padding' "
                 "(they count as padding, and later positions follow the prompt)", aliases=("mask_lvr",)),
):  # fmt: skip
    register_latent_option(_option)


def lay_out(model: nn.Module, model_kwargs: dict, options: LatentOptions) -> dict:
    """Extend the prompts by the learned tokens, fed by their embeddings. A prompt that ends with the first of them, or
    with all, keeps those.

    Raises:
        ValueError: options that contradict each other, more tokens than the model has, a prompt that ends with other
            learned tokens, or inputs without ids; names row or option, value and remedy.
    """
    ids, values, learned = model_kwargs.get("input_ids"), options.values, model.config.latent_learned_token_ids
    if not values.force_latents:
        _refuse_for_free_tokens(options)
        return model_kwargs
    names = ("inputs_embeds", "position_ids", "latent_embeds")
    if ids is None or any(model_kwargs.get(name) is not None for name in names):
        raise ValueError(
            f"latent_strategy={options.strategy.name!r} lays learned tokens out behind input_ids; pass input_ids, and "
            "leave inputs_embeds, position_ids and latent_embeds out"
        )
    mask = mask_of_prompts(model, ids, model_kwargs.get("attention_mask"))
    tails = _tails(options, len(ids), learned)
    rows = []
    for row, (tokens, kept, tail) in enumerate(zip(ids.tolist(), mask.tolist(), tails, strict=True)):
        tokens = [token for token, keep in zip(tokens, kept, strict=True) if keep]
        rows.append(tokens + tail[_standing(row, tokens, tail, learned) :])
    pad = model.generation_config.pad_token_id
    changed = {**model_kwargs, **pad_rows(rows, ids, mask, model_kwargs, 0 if pad is None else pad)}
    length, cache = changed["input_ids"].shape[1], model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() and not changed["input_ids"][:, : ids.shape[1]].equal(ids):
        raise ValueError(
            "past_key_values holds prompts whose padding changes when learned tokens are laid out; pad them on the "
            "left and lay out one number of tokens for all rows, or leave past_key_values out"
        )
    counts = torch.tensor([len(tail) for tail in tails], device=ids.device)
    latents = torch.arange(length, device=ids.device) >= length - counts.unsqueeze(1)
    embeds = model.get_input_embeddings()(changed["input_ids"])
    changed.update(latent_embeds=embeds * latents.unsqueeze(-1), latent_mask=latents)
    if values.mask_latents == "padding":
        changed["attention_mask"] = changed["attention_mask"].masked_fill(latents, 0)
    return changed


def _refuse_for_free_tokens(options: LatentOptions) -> None:
    """Refuse what needs tokens that are laid out, when the model writes them itself, if it does."""
    values = options.values
    for name in ("mask_latents", "num_latent_steps", "latent_noise", "latent_hook"):
        asked = name != "num_latent_steps" or name in options.given  # a number may be the default of the model
        if asked and getattr(values, name) not in (False, None, 0):
            raise ValueError(
                f"{name}={getattr(values, name)!r} with force_latents=False: the model may write its learned tokens "
                f"or not, and they are text; leave force_latents out, or {name}"
            )


def _standing(row: int, tokens: list[int], tail: list[int], learned: list[int]) -> int:
    """How many tokens of the tail stand at the end of a prompt already."""
    number = next((index for index, token in enumerate(reversed(tokens)) if token not in learned), len(tokens))
    ending = tokens[len(tokens) - number :]
    if ending != tail[:number]:
        raise ValueError(
            f"the prompt of row {row} ends with the learned tokens {ending}, and {tail} are to be laid out; end it "
            "with the first of these, with all, or with none"
        )
    return number


def _tails(options: LatentOptions, num_rows: int, learned: list[int]) -> list[list[int]]:
    """The learned tokens of each row: all, or the first `num_latent_steps`."""
    counts = options.values.num_latent_steps
    counts = len(learned) if counts is None else counts
    counts = counts if isinstance(counts, list) else [counts] * num_rows
    if len(counts) != num_rows:
        raise ValueError(
            f"num_latent_steps has {len(counts)} entries for {num_rows} prompts; give one, or one per prompt"
        )
    if max(counts) > len(learned):
        raise ValueError(
            f"num_latent_steps={max(counts)}: the model has {len(learned)} learned tokens; ask for as many at most"
        )
    return [learned[:count] for count in counts]


def visibility(options: Mapping[str, Any], latent_mask: torch.BoolTensor | None) -> list[Visibility]:
    """The rule that hides the learned tokens, if they are to be hidden so."""
    hides = latent_mask is not None and options["mask_latents"] == "visibility"
    return [hidden_positions(latent_mask)] if hides else []


def edit_latents(model: nn.Module, state: LatentState, input_ids: torch.LongTensor) -> None:
    """Noise and trace hook on what the learned tokens are fed, one token of all prompts after the other."""
    values = state.options.values
    if state.prompt_latents is None or (values.latent_noise == 0 and values.latent_hook is None):
        return
    embeds, latents = state.prompt_latents
    embeds, (batch, length) = embeds.clone(), latents.shape
    counts = latents.long().cumsum(dim=1)
    for position in latents.any(dim=0).nonzero()[:, 0].tolist():
        here = latents[:, position]
        vectors = state.with_noise(embeds[:, position].clone(), here)  # a hook may keep what it sees
        if values.latent_hook is not None:
            scores = model.head_logits(vectors)
            seen = LatentStep(
                input_ids=input_ids[:, :position],
                prompt_length=length,
                is_open=here,
                count=(counts[:, position] - 1).clamp(min=0),
                span=torch.zeros(batch, dtype=torch.long, device=here.device),
                said=scores.argmax(-1),
                recent=input_ids[:, max(0, position - 2) : position],
                scores=scores,
                latent=vectors,
                options=values,
                config=model.config,
                is_slot=here,
            )
            vectors = state.with_hook(seen, vectors)
        embeds[:, position] = torch.where(here.unsqueeze(-1), vectors.to(embeds), embeds[:, position])
    state.prompt_latents = embeds, latents


register_latent_strategy(
    LatentStrategy(
        name="learned",
        options=(
            "force_latents",
            "mask_latents",
            "num_latent_steps",
            "latent_topk",
            "latent_hook",
            "latent_noise",
        ),
        opens_span=False,
        tokens="learned",
        layout=lay_out,
        visibility=visibility,
        begin=edit_latents,
    )
)

__all__ = ["MASK_FORMS", "edit_latents", "lay_out", "visibility"]
