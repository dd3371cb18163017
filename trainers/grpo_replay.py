"""What a rollout leaves behind: the recorded latents of each completion, and which of its tokens are trained.

Papers: "Latent Visual Reasoning" (LVR), arXiv 2509.24251, stage 2 (method card, sections 4.4 and 9.2).

Recorded latents stay packed, `(B, N, H)` with `N` the most latents of a completion: 8 rows, 8 latents, hidden size
3584 in bfloat16 are 0.46 MB. The dense form `(b, L, H)` that a backbone takes is made inside the forward, for the rows
of one micro-batch, and is as large as their embeddings. Everything is a tensor with the batch first, so that TRL can
shuffle it and cut it into micro-batches.

Shapes: `B` completions, `P` prompt positions (padded on the left), `C` completion positions, `L = P + C`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from modeling_latent.latent_strategies import get_latent_strategy
from modeling_latent.latent_trace import LatentTrace

from .losses.grpo_latent import (
    completion_mask_until_eos,
    gaussian_latent_log_ratio,
    put_latent_logps,
    sampled_token_mask,
)

SAID_BY_POLICY = "end_token"  # the stop rule that reads what the policy said
_PREFIX = "replay_"


# Recorded latents ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """What a teacher-forced forward needs to be the rollout again.

    Args:
        vectors: `(B, N, H)` recorded latents, as they entered the first layer; zero where there is none.
        index: `(B, N)` their positions in prompt and completion, -1 where there is none.
        position_ids: `(B, channels, L)` positions as fed (mrope, left padding); `None`: made from the ids.
        old_means, ref_means: `(B, N, H)` what the old policy and the reference would have fed there
            (`latent_policy="gaussian"`).
    """

    vectors: torch.Tensor
    index: torch.LongTensor
    position_ids: torch.LongTensor | None = None
    old_means: torch.Tensor | None = None
    ref_means: torch.Tensor | None = None

    @classmethod
    def from_trace(cls, trace: LatentTrace) -> "Replay":
        """The recorded latents of a trace, packed row by row.

        Raises:
            ValueError: a latent in the prompt: it was searched for, not sampled.
        """
        rows, places = trace.slot_index.unbind(1)
        if bool((places < trace.prompt_length).any()):
            strategy = trace.info.get("strategy")
            raise ValueError(
                f"latent_strategy={strategy!r} puts latents into the prompt, which no completion is credited for; use "
                "a strategy whose spans open in the completion"
            )
        counts = torch.bincount(rows, minlength=len(trace))
        before = counts.cumsum(0) - counts
        column = torch.arange(len(rows), device=rows.device) - before[rows]  # slots are sorted by row and position
        size = int(counts.max()) if len(rows) else 0
        vectors = trace.slot_inputs.new_zeros(len(trace), size, trace.slot_inputs.shape[-1])
        index = torch.full((len(trace), size), -1, device=rows.device)
        vectors[rows, column], index[rows, column] = trace.slot_inputs, places
        positions = trace.position_ids
        if positions is not None:
            positions = positions if positions.dim() == 3 else positions.unsqueeze(0)
            positions = positions.transpose(0, 1).contiguous()
        return cls(vectors, index, positions)

    def to_length(self, length: int) -> "Replay":
        """With positions for `length` ids: cut, or filled behind the end, where there is padding only."""
        if self.position_ids is None:
            return self
        missing = length - self.position_ids.shape[-1]
        return replace(self, position_ids=torch.nn.functional.pad(self.position_ids, (0, missing), value=0))

    def rows(self, rows: slice) -> "Replay":
        """Some of the completions."""
        values = {name: value[rows] for name, value in self._tensors().items()}
        return replace(self, **values)

    def with_empty_row(self) -> "Replay":
        """With one more completion, without latents."""
        values = {name: torch.cat([value, torch.zeros_like(value[:1])]) for name, value in self._tensors().items()}
        values["index"][-1:] = -1
        return replace(self, **values)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def batch(self) -> dict[str, torch.Tensor]:
        """As entries of TRL's batch, all with the batch first."""
        return {_PREFIX + name: value for name, value in self._tensors().items()}

    @classmethod
    def from_batch(cls, batch: dict[str, Any]) -> "Replay":
        """From entries of TRL's batch."""
        return cls(**{f.name: batch.get(_PREFIX + f.name) for f in fields(cls)})

    def mask(self, length: int) -> torch.BoolTensor:
        """`(B, length)` positions that are fed by latents."""
        return self.dense(torch.ones_like(self.index, dtype=torch.bool), length)

    def dense(self, values: torch.Tensor, length: int, offset: int = 0) -> torch.Tensor:
        """Packed `values` `(B, N, ...)` at their positions, minus `offset`: `(B, length, ...)`, zero elsewhere; with
        gradient."""
        row, column = (self.index >= 0).nonzero(as_tuple=True)
        out = values.new_zeros(self.index.shape[0], length, *values.shape[2:])
        return out.index_put((row, self.index[row, column] - offset), values[row, column])


# Trained tokens --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossMasks:
    """Masks over the generated part, bool `(B, T - P)`, and `(B,)` which completions ended with an EOS.

    Args:
        completion: up to and with the first EOS that was sampled.
        latents: recorded latents.
        tokens: what carries the token loss: sampled text without what decoding wrote by force.
        terminated: `(B,)`.
    """

    completion: torch.BoolTensor
    latents: torch.BoolTensor
    tokens: torch.BoolTensor
    terminated: torch.BoolTensor

    @classmethod
    def from_trace(
        cls, trace: LatentTrace, eos_token_ids: int | Iterable[int], train_start_token: bool = True
    ) -> "LossMasks":
        """See `losses.grpo_latent.sampled_token_mask`."""
        ids, latents = (value[:, trace.prompt_length :] for value in (trace.sequences, trace.latent_mask))
        completion, terminated = completion_mask_until_eos(ids, eos_token_ids, latents)
        tokens = sampled_token_mask(
            completion,
            latents,
            ids,
            trace.info["latent_start_token_id"],
            train_start_token=train_start_token,
            forced_mask=forced_mask(trace),
        )
        return cls(completion, latents, tokens, terminated)


def forced_mask(trace: LatentTrace) -> torch.BoolTensor:
    """Tokens of the generated part that decoding wrote without asking the policy, bool `(B, T - P)`.

    These are the start token of `force_span`; the end token where a rule other than the policy's own word closed the
    span (a cap, a count, a repetition, a distance) and the strategy writes it; and the ids of `latent_answer_ids`.
    """
    strategy, options = get_latent_strategy(trace.info["strategy"]), trace.info["options"]
    mask = torch.zeros_like(trace.sequences[:, trace.prompt_length :], dtype=torch.bool)
    if strategy.opens_span and options.get("force_span"):
        mask[:, :1] = True
    writes_end = strategy.writes_end or options.get("force_end")
    answers = len(options.get("latent_answer_ids") or ())
    answered = strategy.stops if options.get("force_end") else strategy.forced
    for span in trace.spans:
        close = span.first + span.length - trace.prompt_length
        if span.reason == "open":
            continue
        if writes_end and span.reason != SAID_BY_POLICY:
            mask[span.row, close : close + 1] = True
        if span.reason in answered:
            mask[span.row, close + 1 : close + 1 + answers] = True
    return mask & ~trace.latent_mask[:, trace.prompt_length :]


def credit_latents(
    batch: dict[str, Any], logps: torch.Tensor, means: torch.Tensor, replay: Replay, sigma: float, reduction: str
) -> torch.Tensor:
    """Log ratios to the old policy in the place of log-probabilities at latents (`latent_policy="gaussian"`).

    Only differences of log-probabilities enter the loss; relative to the old policy they keep all their digits
    (`losses.grpo_latent.gaussian_latent_log_ratio`).

    Args:
        batch: TRL's, whose entries for the old policy and the reference are made relative, too.
        logps: `(B, C)`.
        means: `(B, N, H)` what the policy would feed at the recorded latents, with gradient.
        sigma, reduction: of the Gaussian.

    Returns:
        `(B, C)`.
    """
    prompt_length, length = batch["prompt_ids"].shape[1], logps.shape[1]
    base = means.detach() if replay.old_means is None else replay.old_means
    mask = replay.mask(prompt_length + length)[:, prompt_length:]

    def ratio(states: torch.Tensor) -> torch.Tensor:
        values = gaussian_latent_log_ratio(replay.vectors, states, base, sigma, reduction)
        return replay.dense(values, length, prompt_length)

    values = {"old_per_token_logps": torch.zeros_like(logps)}
    if replay.ref_means is not None:
        values["ref_per_token_logps"] = ratio(replay.ref_means)
    for name, value in values.items():
        if name in batch:
            batch[name] = put_latent_logps(batch[name], value, mask)
    return put_latent_logps(logps, ratio(means), mask)


# Metrics and text ------------------------------------------------------------------------------------------------


def latent_counts(trace: LatentTrace) -> torch.Tensor:
    """`(5,)` float sums that add up over processes: completions, latents, completions with a span, spans, and spans
    that a cap or a repetition closed (`LatentStrategy.forced`)."""
    forced = get_latent_strategy(trace.info["strategy"]).forced
    spans = [span for span in trace.spans if span.first >= trace.prompt_length]
    counts = (
        len(trace),
        trace.num_slots,
        len({span.row for span in spans}),
        len(spans),
        sum(span.reason in forced for span in spans),
    )
    return torch.tensor(counts, dtype=torch.float32, device=trace.sequences.device)


def latent_metrics(counts: torch.Tensor) -> dict[str, float]:
    """Metrics from [`latent_counts`]: mean number of latents of a completion, share of completions with a span, share
    of spans that a cap or a repetition closed.

    Example:
        >>> latent_metrics(torch.tensor([4.0, 12.0, 3.0, 5.0, 1.0]))
        {'latent/steps_mean': 3.0, 'latent/trigger_rate': 0.75, 'latent/forced_close_rate': 0.2}
    """
    rows, steps, triggered, spans, forced = counts.tolist()
    rates = (steps / max(rows, 1), triggered / max(rows, 1), forced / max(spans, 1))
    names = ("latent/steps_mean", "latent/trigger_rate", "latent/forced_close_rate")
    return {name: round(rate, 6) for name, rate in zip(names, rates, strict=True)}


def hidden_special_ids(processor: Any) -> frozenset[int]:
    """Ids that the text of a completion leaves out: all special tokens but the latent ones."""
    special = {index for index, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    special.update(processor.tokenizer.all_special_ids)
    return frozenset(special) - set(processor.tokenizer.convert_tokens_to_ids(list(processor.latent_tokens.values())))


def completion_texts(processor: Any, completions: Sequence[Sequence[int]]) -> list[str]:
    """Texts that rewards see: with the latent tokens, without EOS, padding and other special tokens (as published)."""
    hidden = hidden_special_ids(processor)
    return [
        processor.tokenizer.decode([i for i in ids if i not in hidden], clean_up_tokenization_spaces=False)
        for ids in completions
    ]


def latent_paths(processor: Any, trace: LatentTrace) -> list[str]:
    """For each completion its spans as what their latents would have said, e.g. `"⟨Seats·Fence⟩ ⟨Jeans⟩"`."""
    readable, paths = trace.dense("readable_ids"), [[] for _ in range(len(trace))]
    for span in trace.spans:
        place = slice(span.first, span.first + span.length)
        ids, said = trace.sequences[span.row, place], readable[span.row, place]
        if span.length:
            paths[span.row].append(processor.decode_latent(ids, said, [True] * span.length))
    return [" ".join(path) for path in paths]


__all__ = [
    "LossMasks",
    "Replay",
    "completion_texts",
    "credit_latents",
    "forced_mask",
    "hidden_special_ids",
    "latent_counts",
    "latent_metrics",
    "latent_paths",
]
