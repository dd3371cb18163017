"""Batched generation over records, with or without latents: what every benchmark and example calls."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from modeling_latent import LatentTrace
from trainers.data.records import Record, RecordError, open_image, record_from_row, record_origin
from trainers.data.staged_formats import chat_prompt

from .thoughts import ThoughtPlace


@dataclass(frozen=True)
class Prediction:
    """What a model wrote for one record.

    Args:
        id: of the record.
        text: the text, latents hidden.
        latent_path: the text with every span shown as what its slots would have said; learned tokens that the model
            wrote itself by their names.
        num_latent_steps: slots fed, and learned and thought tokens, laid out or written by the model.
        num_tokens: generated positions in all: slots, learned tokens, markers and text up to the end of the turn;
            inserted image embeddings do not count.
        closed_by: stop rule of each span, `"open"` when the budget ended it.
        num_markers: those of `num_tokens` that are markers laid out around the slots (strategy `staged`).
        num_prefilled: those of `num_tokens` that are learned tokens laid out behind the prompt (strategy `learned`) or
            thought tokens in it (`search`, whose steps do not count).
        raw: the new text with its special tokens, as published scorers read it; nothing that was laid out.
    """

    id: str
    text: str
    latent_path: str
    num_latent_steps: int
    num_tokens: int
    closed_by: tuple[str, ...]
    num_markers: int = 0
    num_prefilled: int = 0
    raw: str = ""

    @property
    def num_steps(self) -> int:
        """Autoregressive steps: slots, and generated tokens with the end of the turn."""
        return self.num_tokens - self.num_markers - self.num_prefilled


def build_prompt(processor: ProcessorMixin, record: Record, instruction: str = "") -> str:
    """The chat prompt of a record: its images, then its question, then the opening of the reply."""
    return chat_prompt(processor, record["question"] + instruction, len(record["images"]))


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Iterable[Record],
    batch_size: int = 32,
    max_new_tokens: int = 64,
    instruction: str = "",
    progress: bool = False,
    prompt: Callable[[Record], str] | None = None,
    processor_options: Mapping[str, Any] | None = None,
    thoughts: str = "turn",
    **generate_options: Any,
) -> list[Prediction]:
    """Generate an answer for every record, greedily unless `do_sample=True` is passed.

    Records are sorted by the size of their images and the length of their prompt, so that a batch holds rows of
    similar length; the result is in the order given.

    Args:
        model: a latent model in eval mode (it is switched to eval and back).
        processor: its processor.
        records: records, or rows of a table of records.
        batch_size: prompts per call of `generate`.
        max_new_tokens: budget of a reply, slots and markers included.
        instruction: text appended to every question.
        progress: show a progress bar.
        prompt: from a record to its whole prompt, an image token for each image; default: [`build_prompt`].
        processor_options: of the processor's call, e.g. `{"add_special_tokens": False}`.
        thoughts: where the thought tokens of the strategy `search` stand: `"turn"`, placeholders at the end of the
            user's turn, `"question"`, its last tokens, or `"reply"`, behind the prompt, as `generate` lays them.
        generate_options: for `generate`, e.g. `latent_strategy="off"`.

    Raises:
        ValueError: `batch_size` below 1, an instruction beside a prompt, or an option that `generate` refuses.
        RecordError: an image that cannot be read, or that a processor of text alone does not take; names file and row.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be at least 1")
    if instruction and prompt is not None:
        raise ValueError(f"instruction={instruction!r} beside a prompt of your own; write it into the prompt")
    records = [with_images(record_from_row(record), processor) for record in records]
    prompts = [build_prompt(processor, each, instruction) if prompt is None else prompt(each) for each in records]
    place = ThoughtPlace.of(model, processor, generate_options, thoughts)
    if place is not None:
        prompts = [place.in_prompt(each) for each in prompts]
        generate_options.pop("thought_token_id", None)
    sizes = [sum(image.width * image.height for image in record["images"]) for record in records]
    order = sorted(range(len(records)), key=lambda i: (sizes[i], len(prompts[i])))
    results: list[Prediction | None] = [None] * len(records)
    was_training = model.training
    model.eval()
    try:
        for first in tqdm(range(0, len(order), batch_size), desc="generate", disable=not progress):
            part = order[first : first + batch_size]
            batch = generate_batch(
                model,
                processor,
                [records[i] for i in part],
                [prompts[i] for i in part],
                {"max_new_tokens": max_new_tokens, "do_sample": False, **generate_options},
                processor_options or {},
                place,
            )
            for index, prediction in zip(part, batch.predictions, strict=True):
                results[index] = prediction
    finally:
        model.train(was_training)
    return results


def with_images(record: Record, processor: ProcessorMixin) -> Record:
    """The record with its images opened.

    Raises:
        RecordError: an image that cannot be read, or that a processor of text alone does not take.
    """
    if record["images"] and not hasattr(processor, "image_processor"):
        reason = f"{len(record['images'])} images, and {type(processor).__name__} reads text alone; drop them"
        raise RecordError(*record_origin(record), reason)
    return {**record, "images": [open_image(image, record) for image in record["images"]]}


class GeneratedBatch(NamedTuple):
    """What one call of `generate` was given and returned: the processed prompts, the output, the predictions."""

    inputs: BatchFeature
    output: Any
    predictions: list[Prediction]


def generate_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    prompts: Sequence[str],
    options: Mapping[str, Any],
    processor_options: Mapping[str, Any],
    place: ThoughtPlace | None = None,
) -> GeneratedBatch:
    """One batch of [`predict`]; images of the records are open ([`with_images`]), options are those of `generate`."""
    images = [record["images"] for record in records]
    pictures = {"images": images} if any(images) else {}
    inputs = processor(
        text=list(prompts), **pictures, padding=True, padding_side="left", return_tensors="pt", **processor_options
    ).to(model.device)
    if place is not None:
        options = {**options, "thought_mask": place.mask(inputs)}
    output = model.generate(**inputs, return_dict_in_generate=True, **options)
    trace, start = output.get("latent_trace"), inputs["input_ids"].shape[1]
    written = output.sequences[:, start if trace is None else trace.prompt_length :]
    replies = _replies(written, model, processor, records, options)
    if trace is not None:
        found = output.get("search")
        thoughts = None if found is None else found.thoughts.shape[1]
        replies = _with_latents(replies, output.sequences, trace, start, processor, thoughts)
    return GeneratedBatch(inputs, output, replies)


def _replies(
    written: torch.LongTensor,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    options: Mapping[str, Any],
) -> list[Prediction]:
    """What the model wrote itself: text, and learned tokens, which are no text."""
    replies, learned = [], torch.isin(written, _learned(processor, written.device))
    texts = processor.batch_decode(
        torch.where(learned, processor.tokenizer.pad_token_id, written), skip_special_tokens=True
    )
    rows, ends = written.tolist(), _ends_of_replies(written, model, processor, options)
    for record, text, count, ids, end in zip(records, texts, learned.sum(1).tolist(), rows, ends, strict=True):
        length = end - ids[:end].count(processor.latent_patch_token_id)
        text, raw = text.strip(), processor.decode(ids[:end])
        replies.append(Prediction(record["id"], text, text, count, length, (), raw=raw))
    return replies


def _with_latents(
    replies: Sequence[Prediction],
    sequences: torch.LongTensor,
    trace: LatentTrace,
    start: int,
    processor: ProcessorMixin,
    thoughts: int | None = None,
) -> list[Prediction]:
    """The replies with the slots and with what was laid out behind the prompts, which are `start` columns long, or
    with the thought tokens in them."""
    start, device = _start_of_layout(trace, start), sequences.device
    new = _without_prompt(sequences[:, start:], trace, start, processor)
    latents = trace.latent_mask[:, start:] | torch.isin(new, _learned(processor, device))
    paths = processor.batch_decode_latent(new, trace.readable_sequences[:, start:], latents)
    laid_out, steps = new[:, : trace.prompt_length - start], trace.num_latent_steps.tolist()
    slots, markers, prefilled = (
        torch.isin(laid_out, ids).sum(dim=1).tolist()
        for ids in (
            _token_ids([processor.latent_token_id], device),
            _markers(processor, device),
            _learned(processor, device),
        )
    )
    if thoughts is not None:  # copies of image tokens between them do not count
        steps, prefilled = [thoughts] * len(replies), [thoughts] * len(replies)
        slots = markers = [0] * len(replies)
    return [
        replace(
            reply,
            latent_path=paths[row].strip(),
            num_latent_steps=reply.num_latent_steps + steps[row],
            num_tokens=reply.num_tokens + slots[row] + markers[row] + prefilled[row],
            closed_by=tuple(span.reason for span in trace.spans if span.row == row),
            num_markers=markers[row],
            num_prefilled=prefilled[row],
        )
        for row, reply in enumerate(replies)
    ]


def _start_of_layout(trace: LatentTrace, start: int) -> int:
    """The first column of what is laid out behind the prompts, which are `start` columns long with their padding: a
    short prompt with many slots has some of them before that."""
    laid_out = trace.latent_mask[:, : trace.prompt_length].any(dim=0).nonzero()
    return min(start, max(int(laid_out[0]) - 1, 0)) if len(laid_out) else start  # a marker may stand before a slot


def _without_prompt(
    new: torch.LongTensor, trace: LatentTrace, start: int, processor: ProcessorMixin
) -> torch.LongTensor:
    """The ids from `start` on, padding in place of the end of a prompt that has fewer slots laid out behind it than
    others of its batch."""
    behind = torch.arange(new.shape[1], device=new.device) >= trace.prompt_length - start
    kept = behind | trace.latent_mask[:, start:] | torch.isin(new, _markers(processor, new.device))
    return torch.where(kept, new, processor.tokenizer.pad_token_id)


def _markers(processor: ProcessorMixin, device: torch.device) -> torch.LongTensor:
    return _token_ids([processor.latent_start_token_id, processor.latent_end_token_id], device)


def _learned(processor: ProcessorMixin, device: torch.device) -> torch.LongTensor:
    return _token_ids(processor.latent_learned_token_ids or (), device)


def _token_ids(ids: Iterable[int | None], device: torch.device) -> torch.LongTensor:
    """The ids that the model has: a method with learned tokens has neither slots nor markers."""
    return torch.tensor([token for token in ids if token is not None], dtype=torch.long, device=device)


def _ends_of_replies(
    written: torch.LongTensor, model: PreTrainedModel, processor: ProcessorMixin, options: Mapping[str, Any]
) -> list[int]:
    """Number of ids of each reply, with the end of the turn, without the padding behind it (which may be the same
    token)."""
    pad, ends = processor.tokenizer.pad_token_id, options.get("eos_token_id", model.generation_config.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    found = []
    for ids in written.tolist():
        kept = len(ids)
        while kept and ids[kept - 1] == pad:
            kept -= 1
        ends_with_pad = kept < len(ids) and pad in ends and not (kept and ids[kept - 1] in ends)
        found.append(kept + ends_with_pad)
    return found
