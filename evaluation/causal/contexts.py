"""The clean run: what a model wrote for each item, cut at the end of its last span (specification, section 1).

A [`CleanItem`] has three parts: the prefix, which every condition of the item shares (prompt and images), the context
(markers, slots, inserted image embeddings, and text between spans), and the reply. Conditions edit the context and
write the reply anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from modeling_latent import LatentTrace
from trainers.data.records import Record, record_from_row

from ..benchmarks.benchmark import AskProtocol
from ..runner import Prediction, generate_batch, with_images
from ..thoughts import ThoughtPlace

# Greedy, and nothing that rewards or punishes what was written: every condition decodes by the same rule.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


class ContextSpan(NamedTuple):
    """A span in a context: position of its start marker (-1: none), of its first latent, number of latents (inserted
    image embeddings count), position of its end marker (-1: none), whether a cap or the budget closed it."""

    start: int
    first: int
    length: int
    end: int
    forced: bool


@dataclass(frozen=True)
class CleanItem:
    """One item of the clean run; `n` positions of the context, `N` latents, `H` hidden size; on the CPU.

    Args:
        record: with open images.
        prompt: the whole prompt.
        prefix: `(p,)` ids that all conditions share.
        ids: `(n,)` ids of the context.
        laid_out: number of its positions that the prompt or the strategy laid out; the model wrote the others.
        offsets: `(n,)` rotary positions, counted from the first one behind the prefix.
        latent: `(n,)` bool, positions fed by a vector.
        inputs: `(N, H)` what was fed there, in order.
        outputs: `(N, H)` final-norm states there.
        has_output: `(N,)` whether the output is known.
        said: `(N,)` ids that the latents would have said.
        spans: the spans of the context.
        reply_ids: ids behind the context, with the end of the turn.
        budget: how many ids a reply may have.
        prediction: of the clean `generate`.
        strategy: name of the strategy that decoded it.
    """

    record: Record
    prompt: str
    prefix: torch.LongTensor
    ids: torch.LongTensor
    laid_out: int
    offsets: torch.LongTensor
    latent: torch.BoolTensor
    inputs: torch.Tensor
    outputs: torch.Tensor
    has_output: torch.BoolTensor
    said: torch.LongTensor
    spans: tuple[ContextSpan, ...]
    reply_ids: tuple[int, ...]
    budget: int
    prediction: Prediction
    strategy: str


@torch.no_grad()
def clean_items(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    protocol: AskProtocol,
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    thoughts: str = "turn",
    progress: bool = False,
    **options: Any,
) -> list[CleanItem]:
    """The clean greedy run over all records.

    Args:
        model: a latent model in eval mode.
        processor: its processor.
        records: records.
        protocol: how they are asked.
        batch_size: prompts per call of `generate`.
        max_new_tokens: default: of the protocol.
        thoughts: see [`predict`].
        progress: show a progress bar.
        options: of `generate`: `latent_strategy` and its options.

    Raises:
        ValueError: options that cannot be replayed (noise, hidden latents, several beams); names them.
        RecordError: an image that cannot be read.
    """
    _check_options(options)
    budget = protocol.max_new_tokens if max_new_tokens is None else max_new_tokens
    options = {**GREEDY, **options, "max_new_tokens": budget}
    place = ThoughtPlace.of(model, processor, options, thoughts)
    if place is not None:
        options.pop("thought_token_id", None)
    items: list[CleanItem] = []
    for first in tqdm(range(0, len(records), batch_size), desc="clean run", disable=not progress):
        part = [with_images(_prepared(record, protocol), processor) for record in records[first : first + batch_size]]
        prompts = [protocol.prompt(processor, record) for record in part]
        if place is not None:
            prompts = [place.in_prompt(prompt) for prompt in prompts]
        batch = generate_batch(model, processor, part, prompts, options, protocol.processor_options, place)
        trace = batch.output.get("latent_trace")
        if trace is None:
            raise ValueError(f"{type(model).__name__} has no latents to intervene on; load it with load_latent_model")
        lengths = batch.inputs["attention_mask"].sum(dim=1).tolist()
        ends = _ends(model)
        for row, (record, prompt, length) in enumerate(zip(part, prompts, lengths, strict=True)):
            single = trace.to("cpu").row(row)
            items.append(_item(single, model, record, prompt, length, budget, batch.predictions[row], ends))
    return items


def _prepared(record: Mapping[str, Any], protocol: AskProtocol) -> Record:
    record = record_from_row(record)
    return record if protocol.prepare is None else protocol.prepare(record)


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse what a clean trace cannot be replayed with."""
    for name, harmless in (("latent_noise", (None, 0, 0.0)), ("mask_latents", (None, False)), ("num_beams", (None, 1)),
                           ("do_sample", (None, False)), ("latent_ids", (None, "placeholder"))):  # fmt: skip
        if options.get(name) not in harmless:
            raise ValueError(
                f"{name}={options[name]!r}: interventions edit a clean greedy run; leave it out, and name the edit "
                "as an intervention (noise_rel(0.5), all⇸L)"
            )


def _ends(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])


def _item(
    trace: LatentTrace,
    model: PreTrainedModel,
    record: Record,
    prompt: str,
    prompt_length: int,
    budget: int,
    prediction: Prediction,
    ends: set[int],
) -> CleanItem:
    ids, mask, config = trace.sequences[0], trace.latent_mask[0], model.config
    cut, places = prompt_length, mask.nonzero()[:, 0].tolist()
    if places:
        marker = config.latent_start_token_id
        cut = min(cut, places[0] - (places[0] > 0 and int(ids[places[0] - 1]) == marker))
    end = max([prompt_length, cut, trace.prompt_length, *(place + 1 for place in places)])
    end = max([end, *(span.end + 1 for span in trace.spans)])
    reply = _until_end(ids[end:].tolist(), ends)
    keep = (trace.slot_index[:, 1] >= cut) & (trace.slot_index[:, 1] < end)
    return CleanItem(
        record=record,
        prompt=prompt,
        prefix=ids[:cut],
        ids=ids[cut:end],
        laid_out=max(trace.prompt_length - cut, 0),
        offsets=_offsets(trace, cut, end, config),
        latent=mask[cut:end],
        inputs=trace.slot_inputs[keep],
        outputs=trace.slot_outputs[keep],
        has_output=trace.has_output[keep],
        said=trace.readable_ids[keep],
        spans=tuple(_span(span, cut) for span in trace.spans if span.first >= cut),
        reply_ids=tuple(reply),
        budget=max(budget - max(end - trace.prompt_length, 0), 0),
        prediction=prediction,
        strategy=trace.info["strategy"],
    )


_FORCED = ("open", "max_latent_steps", "repetition")


def _span(span: Any, cut: int) -> ContextSpan:
    return ContextSpan(
        span.start - cut if span.start >= cut else -1,
        span.first - cut,
        span.length,
        span.end - cut if span.end >= 0 else -1,
        span.reason in _FORCED,
    )


def _offsets(trace: LatentTrace, cut: int, end: int, config: Any) -> torch.LongTensor:
    """Rotary positions of the context; text and latents have one number on all axes.

    Raises:
        ValueError: an image token in the context, which has three different ones.
    """
    image = getattr(config, "image_token_id", None)
    if image is not None and bool((trace.sequences[0, cut:end] == image).any()):
        raise ValueError("an image stands behind the first latent; put images before the latents to intervene on them")
    if trace.position_ids is None or trace.position_ids.shape[-1] < end:
        return torch.arange(end - cut)
    positions = trace.position_ids[..., 0, :]
    positions = positions[-3:] if positions.dim() == 2 else positions.unsqueeze(0)
    first = positions[:, :cut].amax() + 1
    return positions[-1, cut:end] - first


def _until_end(ids: Sequence[int], ends: set[int]) -> list[int]:
    """The ids up to the end of the turn, that included."""
    kept = next((index + 1 for index, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:kept])


__all__ = ["GREEDY", "CleanItem", "ContextSpan", "clean_items"]
