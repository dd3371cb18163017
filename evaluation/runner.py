"""Batched generation over records, with or without latents: what every benchmark and example calls."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from modeling_latent import LatentTrace
from trainers.data.records import Record, open_image, record_from_row


@dataclass(frozen=True)
class Prediction:
    """What a model wrote for one record.

    Args:
        id: of the record.
        text: the text, latents hidden.
        latent_path: the text with every span shown as what its slots would have said.
        num_latent_steps: slots fed.
        num_tokens: generated positions in all: slots, markers and text up to the end of the turn; inserted image
            embeddings do not count.
        closed_by: stop rule of each span, `"open"` when the budget ended it.
    """

    id: str
    text: str
    latent_path: str
    num_latent_steps: int
    num_tokens: int
    closed_by: tuple[str, ...]


def build_prompt(processor: ProcessorMixin, record: Record, instruction: str = "") -> str:
    """The chat prompt of a record: its images, then its question, then the opening of the reply."""
    content = [{"type": "image"} for _ in record["images"]]
    content.append({"type": "text", "text": record["question"] + instruction})
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Iterable[Record],
    batch_size: int = 32,
    max_new_tokens: int = 64,
    instruction: str = "",
    progress: bool = False,
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
        generate_options: for `generate`, e.g. `latent_strategy="off"`.

    Raises:
        ValueError: `batch_size` below 1, or an option that `generate` refuses.
        RecordError: an image that cannot be read; names file and row.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be at least 1")
    records = [_with_images(record_from_row(record)) for record in records]
    prompts = [build_prompt(processor, record, instruction) for record in records]
    sizes = [sum(image.width * image.height for image in record["images"]) for record in records]
    order = sorted(range(len(records)), key=lambda i: (sizes[i], len(prompts[i])))
    results: list[Prediction | None] = [None] * len(records)
    was_training = model.training
    model.eval()
    try:
        for first in tqdm(range(0, len(order), batch_size), desc="generate", disable=not progress):
            part = order[first : first + batch_size]
            batch = _predict_batch(
                model,
                processor,
                [records[i] for i in part],
                [prompts[i] for i in part],
                max_new_tokens,
                generate_options,
            )
            for index, prediction in zip(part, batch, strict=True):
                results[index] = prediction
    finally:
        model.train(was_training)
    return results


def _with_images(record: Record) -> Record:
    return {**record, "images": [open_image(image, record) for image in record["images"]]}


def _predict_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    prompts: Sequence[str],
    max_new_tokens: int,
    options: dict[str, Any],
) -> list[Prediction]:
    images = [record["images"] for record in records]
    has_images = any(images)
    inputs = processor(
        text=list(prompts),
        images=images if has_images else None,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    options = {"do_sample": False, **options}
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **options)
    start = inputs["input_ids"].shape[1]
    new = output.sequences[:, start:]
    trace = output.get("latent_trace")
    text_ids = new if trace is None else new[:, trace.prompt_length - start :]
    texts = processor.batch_decode(text_ids, skip_special_tokens=True)
    if trace is None:
        return [
            Prediction(record["id"], text.strip(), text.strip(), 0, _length(ids, processor), ())
            for record, text, ids in zip(records, texts, new, strict=True)
        ]
    new = _without_prompt(new, trace, start, processor)
    paths = processor.batch_decode_latent(new, trace.readable_sequences[:, start:], trace.latent_mask[:, start:])
    steps = trace.num_latent_steps.tolist()
    reasons = [tuple(span.reason for span in trace.spans if span.row == row) for row in range(len(records))]
    return [
        Prediction(record["id"], text.strip(), path.strip(), steps[row], _length(new[row], processor), reasons[row])
        for row, (record, text, path) in enumerate(zip(records, texts, paths, strict=True))
    ]


def _without_prompt(
    new: torch.LongTensor, trace: LatentTrace, start: int, processor: ProcessorMixin
) -> torch.LongTensor:
    """The ids from `start` on, padding in place of the end of a prompt that has fewer slots laid out behind it than
    others of its batch."""
    markers = torch.tensor([processor.latent_start_token_id, processor.latent_end_token_id], device=new.device)
    behind = torch.arange(new.shape[1], device=new.device) >= trace.prompt_length - start
    kept = behind | trace.latent_mask[:, start:] | torch.isin(new, markers)
    return torch.where(kept, new, processor.tokenizer.pad_token_id)


def _length(ids: torch.LongTensor, processor: ProcessorMixin) -> int:
    """Generated positions without the padding after the end of the turn and without inserted image embeddings."""
    left_out = [processor.tokenizer.pad_token_id, processor.latent_patch_token_id]
    return sum(token not in left_out for token in ids.tolist())
