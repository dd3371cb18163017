"""What a rollout leaves behind: packing, masks, images, metrics and texts."""

import doctest
from typing import Any

import pytest
import torch

from modeling_latent.latent_trace import LatentSpan, LatentTrace
from tests.tiny import tiny_inputs, tiny_processor
from tests.trainers.grpo_parts import eager_model
from trainers import grpo_replay
from trainers.grpo_replay import (
    LossMasks,
    Replay,
    completion_texts,
    forced_mask,
    latent_counts,
    latent_metrics,
    latent_paths,
)

START, SLOT, END, EOS, PAD = 90, 91, 92, 2, 0
IDS = {"latent_token_id": SLOT, "latent_start_token_id": START, "latent_end_token_id": END}


def trace_of(
    rows: list[list[int]], spans: list[LatentSpan], strategy: str = "dynamic", prompt: int = 2, **options: Any
) -> LatentTrace:
    """A trace whose slots are the positions with the slot's id; latent `n` of the batch is filled with `n + 1`."""
    sequences = torch.tensor(rows)
    index = (sequences == SLOT).nonzero()
    number = len(index)
    vectors = torch.arange(1.0, number + 1).unsqueeze(1).expand(number, 3).clone()
    ids = torch.zeros(number, dtype=torch.long)
    return LatentTrace(
        sequences, prompt, index, vectors, vectors, ids.bool(), ids + 7, ids.view(-1, 1)[:, :0], vectors[:, :0], spans,
        position_ids=torch.arange(sequences.numel() * 3).view(3, *sequences.shape),
        info={"strategy": strategy, "options": options, **IDS},
    )  # fmt: skip


def test_latents_are_packed_and_put_back() -> None:
    rows = [[5, 5, START, SLOT, SLOT, 7], [5, 5, 7, START, SLOT, END], [5, 5, 7, 7, 7, EOS]]
    trace = trace_of(rows, [])
    replay = Replay.from_trace(trace)
    assert replay.index.tolist() == [[3, 4], [4, -1], [-1, -1]]
    assert replay.vectors[..., 0].tolist() == [[1, 2], [3, 0], [0, 0]]
    assert torch.equal(replay.mask(6), trace.latent_mask)
    assert torch.equal(replay.dense(replay.vectors, 6), trace.latent_embeds)
    assert torch.equal(replay.dense(replay.vectors, 4, offset=2), trace.latent_embeds[:, 2:])
    assert torch.equal(replay.position_ids.transpose(0, 1), trace.position_ids)
    longer, shorter = replay.to_length(8), replay.to_length(5)
    assert torch.equal(longer.position_ids[..., :6], replay.position_ids) and longer.position_ids.shape[-1] == 8
    assert torch.equal(shorter.position_ids, replay.position_ids[..., :5])
    again = Replay.from_batch({"prompt_ids": None, **replay.batch()}).rows(slice(1, 3))
    assert again.index.tolist() == [[4, -1], [-1, -1]] and again.old_means is None
    values = replay.vectors.clone().requires_grad_()
    replay.dense(values, 6).sum().backward()
    assert torch.equal(values.grad[..., 0], (replay.index >= 0).float())


def test_a_latent_in_the_prompt_is_refused() -> None:
    trace = trace_of([[5, SLOT, 7, 7]], [])
    with pytest.raises(ValueError, match="latent_strategy='dynamic' puts latents into the prompt"):
        Replay.from_trace(trace)


def span(row: int, start: int, length: int, reason: str, end: int = -1) -> LatentSpan:
    return LatentSpan(row, start, start + 1, length, end, reason)


@pytest.mark.parametrize(
    ("strategy", "reason", "options", "expected"),
    [
        ("dynamic", "end_token", {}, [0, 0, 0, 0, 0, 0, 0]),
        ("dynamic", "max_latent_steps", {}, [0, 0, 0, 1, 0, 0, 0]),
        ("dynamic", "repetition", {"latent_answer_ids": [7, 7]}, [0, 0, 0, 1, 1, 1, 0]),
        ("dynamic", "end_token", {"force_span": True, "latent_answer_ids": [7, 7]}, [1, 0, 0, 0, 0, 0, 0]),
        ("dynamic", "open", {"latent_answer_ids": [7]}, [0, 0, 0, 0, 0, 0, 0]),
        ("fixed", "num_latent_steps", {}, [0, 0, 0, 0, 0, 0, 0]),
        ("fixed", "num_latent_steps", {"force_end": True}, [0, 0, 0, 1, 0, 0, 0]),
        ("fixed", "num_latent_steps", {"latent_answer_ids": [7]}, [0, 0, 0, 0, 0, 0, 0]),
        ("fixed", "repetition", {"latent_answer_ids": [7]}, [0, 0, 0, 0, 1, 0, 0]),
        ("end_vector", "max_latent_steps", {"force_end": True, "latent_answer_ids": [7]}, [0, 0, 0, 1, 1, 0, 0]),
        ("end_vector", "end_vector", {"force_end": True}, [0, 0, 0, 1, 0, 0, 0]),
    ],
)
def test_forced_tokens(strategy: str, reason: str, options: dict, expected: list[int]) -> None:
    rows = [[5, 5, START, SLOT, SLOT, END, 7, 7, EOS]]
    trace = trace_of(rows, [span(0, 2, 2, reason, end=5)], strategy, **options)
    assert forced_mask(trace).int().tolist() == [expected]
    masks = LossMasks.from_trace(trace, [EOS, PAD])
    trained = [int(not forced and index not in (1, 2)) for index, forced in enumerate(expected)]
    assert masks.tokens.int().tolist() == [trained] and masks.terminated.tolist() == [True]
    without = LossMasks.from_trace(trace, EOS, train_start_token=False)
    assert without.tokens.int().tolist() == [[0, *trained[1:]]]


def test_only_ids_that_decoding_left_no_choice_for_are_forced() -> None:
    """Against the processed scores of real decoding: a forced id is the only one with a finite score."""
    model, processor = eager_model(), tiny_processor()
    torch.manual_seed(0)
    answer = processor.tokenizer.encode("Yes")
    options = {"latent_strategy": "dynamic", "max_latent_steps": 2, "latent_answer_ids": answer}
    sampling = {"do_sample": True, "max_new_tokens": 24, "num_return_sequences": 4, "top_k": 50}
    output = model.generate(**tiny_inputs(), **options, **sampling, return_dict_in_generate=True, output_scores=True)
    trace, scores = output.latent_trace, torch.stack(output.scores, dim=1)
    only = scores.isfinite().sum(-1) == 1
    forced = forced_mask(trace)
    latents = trace.latent_mask[:, trace.prompt_length :]
    assert forced.sum() > 8 and only[forced].all()
    masks = LossMasks.from_trace(trace, model.generation_config.eos_token_id)
    unexplained = only & ~forced & ~latents & masks.completion
    said_end = {(s.row, s.first + s.length - trace.prompt_length) for s in trace.spans if s.reason == "end_token"}
    assert {tuple(place) for place in unexplained.nonzero().tolist()} == said_end
    assert not (masks.tokens & (forced | latents)).any()


def test_latent_metrics() -> None:
    rows = [[5, 5, START, SLOT, SLOT, END, START, SLOT], [5, 5, 7, 7, EOS, PAD, PAD, PAD]]
    spans = [span(0, 2, 2, "max_latent_steps", end=5), span(0, 6, 1, "open")]
    counts = latent_counts(trace_of(rows, spans))
    assert counts.tolist() == [2, 3, 1, 2, 1]
    expected = {"latent/steps_mean": 1.5, "latent/trigger_rate": 0.5, "latent/forced_close_rate": 0.5}
    assert latent_metrics(counts) == expected
    assert latent_metrics(latent_counts(trace_of([[5, 5, 7, 7]], [])))["latent/forced_close_rate"] == 0


def test_texts_keep_latent_tokens_and_drop_the_other_special_ones() -> None:
    processor = tiny_processor()
    tokenizer = processor.tokenizer
    text = f"Yes{''.join(processor.latent_tokens.values())} it is{tokenizer.eos_token}{tokenizer.pad_token}"
    ids = tokenizer.encode(text)
    expected = text.replace(tokenizer.eos_token, "").replace(tokenizer.pad_token, "")
    assert completion_texts(processor, [ids, []]) == [expected, ""]


def test_paths_show_every_span() -> None:
    processor = tiny_processor()
    trace = trace_of([[5, 5, START, SLOT, SLOT, START, SLOT, 7], [5, 5, 7, 7, 7, 7, 7, 7]], [])
    trace.spans = [span(0, 2, 2, "end_token"), span(0, 5, 1, "end_token"), span(1, 6, 0, "open")]
    word = processor.tokenizer.encode("dogs")[0]
    trace.readable_ids = torch.full_like(trace.readable_ids, word)
    text = processor.tokenizer.decode([word])
    assert latent_paths(processor, trace) == [f"⟨{text}{text}⟩ ⟨{text}⟩", ""]


def test_docstrings() -> None:
    assert doctest.testmod(grpo_replay).failed == 0
