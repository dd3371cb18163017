"""`LatentTrace`: replay equals decoding, an edit changes only what follows, files come back, what the tables say."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LogitsProcessorList

from modeling_latent import LatentSpan, LatentStep, LatentTrace
from tests.latent import ScriptProcessor, latent_token_ids, tiny_pair
from tests.tiny import tiny_inputs, tiny_processor

SLOT, START, END = latent_token_ids().values()
EOS = tiny_processor().tokenizer.eos_token_id
IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "mm_token_type_ids")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_pair(0, 6.0)[1]


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """Two rows, the first one padded on the left."""
    return dict(tiny_inputs())


def take(inputs: dict[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    """Some rows of a batch with one image each, in any order."""
    patches = inputs["image_grid_thw"].prod(-1).tolist()
    images = inputs["pixel_values"].split(patches)
    taken = {name: value[rows] for name, value in inputs.items() if name != "pixel_values"}
    return {**taken, "pixel_values": torch.cat([images[row] for row in rows])}


def unpadded(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    one = take(inputs, [row])
    keep = one["attention_mask"][0].bool()
    return {name: value[:, keep] if value.shape == one["input_ids"].shape else value for name, value in one.items()}


def decode(model: torch.nn.Module, inputs: dict[str, torch.Tensor], scripts: Any = None, **options: Any) -> Any:
    """`dynamic` with a cap of 3 unless the options name another strategy."""
    settings = {"max_new_tokens": 12, "do_sample": False, "latent_strategy": "dynamic", **options}
    if settings["latent_strategy"] == "dynamic":
        settings.setdefault("max_latent_steps", 3)
    processors = LogitsProcessorList([ScriptProcessor(scripts, inputs["input_ids"].shape[1])] if scripts else [])
    return model.generate(
        **inputs, return_dict_in_generate=True, output_logits=True, logits_processor=processors, **settings
    )


def image_inputs(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: inputs[name] for name in IMAGE_INPUTS}


def replayed(model: torch.nn.Module, trace: LatentTrace, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.replay(trace, **image_inputs(inputs)).logits


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def assert_replays(model: torch.nn.Module, output: Any, inputs: dict[str, torch.Tensor], row_of: list[int]) -> None:
    """The replay has the logits that chose each id; `row_of` says which prompt each returned row belongs to."""
    trace = output.latent_trace
    logits = replayed(model, trace, take(inputs, row_of))
    beams = output.get("beam_indices")
    for row in range(len(trace)):
        for step in range(trace.sequences.shape[1] - trace.prompt_length):
            source = row if beams is None else int(beams[row, step])
            written = trace.sequences[row, trace.prompt_length : trace.prompt_length + step].tolist()
            if source < 0 or EOS in written:
                break
            ours = logits[row, trace.prompt_length + step - 1]
            assert relative(ours, output.logits[step][source]) < 1e-5, f"row {row}, step {step}"


# Replay

SPANS: dict[str, dict[str, Any]] = {
    "dynamic": {"max_latent_steps": [2, 5], "scripts": [{5: START}, {7: EOS}]},
    "fixed": {
        "latent_strategy": "fixed",
        "num_latent_steps": [2, 3],
        "force_span": True,
        "scripts": [{6: START}, {4: EOS}],
    },
    "off": {"latent_strategy": "off", "scripts": [{}, {4: EOS}]},
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "more beams": {"num_beams": 3, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 8},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spans", SPANS)
def test_replay_equals_decoding(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], spans: str, mode: str
) -> None:
    output = decode(model, inputs, **SPANS[spans], **MODES[mode])
    copies = len(output.sequences) // 2
    assert output.latent_trace.num_slots > 0 or spans == "off"
    assert_replays(model, output, inputs, [0] * copies + [1] * copies)


@pytest.mark.parametrize("mode", ["prompt lookup", "assistant"])
def test_replay_equals_assisted_decoding(model: torch.nn.Module, inputs: dict[str, torch.Tensor], mode: str) -> None:
    options = {"prompt_lookup_num_tokens": 3} if mode == "prompt lookup" else {"assistant_model": tiny_pair(0, 6.0)[0]}
    for row in range(2):
        one = unpadded(inputs, row)
        output = decode(model, one, scripts=[{6: START}], max_new_tokens=16, **options)
        assert output.latent_trace.num_slots == 6
        assert_replays(model, output, one, [0])


def test_replay_of_one_row(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """A row is a trace of its own: no padding, its own slots and spans, and it replays like the batch."""
    output = decode(model, inputs, scripts=[{5: START}, {3: END, 7: EOS}])
    trace = output.latent_trace
    whole = replayed(model, trace, inputs)
    for index in range(2):
        row, pad = trace.row(index), int((inputs["attention_mask"][index] == 0).sum())
        assert len(row) == 1 and row.attention_mask is None and row.prompt_length == trace.prompt_length - pad
        assert row.sequences[0].tolist() == trace.sequences[index, pad:].tolist()
        assert row.latent_mask[0].tolist() == trace.latent_mask[index, pad:].tolist()
        assert torch.equal(row.latent_embeds[0], trace.latent_embeds[index, pad:])
        assert torch.equal(row.position_ids[:, 0], trace.position_ids[:, index, pad:])
        moved = [
            replace(span, row=0, start=span.start - pad, first=span.first - pad, end=span.end - pad)
            for span in trace.spans if span.row == index
        ]  # fmt: skip
        assert row.spans == moved and len(moved) >= 1
        assert row.num_latent_steps.tolist() == [trace.num_latent_steps[index].item()]
        logits = replayed(model, row, unpadded(inputs, index))
        assert relative(logits[0], whole[index, pad:]) < 1e-5
    with pytest.raises(IndexError, match="row 2 of a trace with 2 rows"):
        trace.row(2)


def test_replay_after_loading(model: torch.nn.Module, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    trace = decode(model, inputs).latent_trace
    trace.save(tmp_path / "trace.safetensors")
    loaded = LatentTrace.load(tmp_path / "trace.safetensors")
    assert torch.equal(replayed(model, loaded, inputs), replayed(model, trace, inputs))


def test_replay_gives_gradients_to_the_slots(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    trace = decode(model, inputs).latent_trace
    vectors = trace.slot_inputs.clone().requires_grad_()
    logits = model.replay(trace.replace_slots(vectors), **image_inputs(inputs)).logits
    logits[:, -1].logsumexp(-1).sum().backward()
    fed = trace.has_output
    assert (vectors.grad[fed].abs().sum(-1) > 0).all()
    model.zero_grad()


def test_replay_with_slots_in_the_prompt(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Slots of the prompt are part of the trace, else a replay would feed the token's own embedding there."""
    shape = inputs["input_ids"].shape
    given = torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[0, -3:], mask[1, -5] = True, True
    prompt = {**inputs, "input_ids": inputs["input_ids"].masked_fill(mask, SLOT)}
    for options in (
        {"latent_strategy": "off"},
        {},
        {"num_beams": 2, "num_return_sequences": 2},
    ):
        output = decode(model, {**prompt, "latent_embeds": given}, **options)
        trace, copies = output.latent_trace, len(output.sequences) // 2
        expected = mask.repeat_interleave(copies, dim=0)
        assert trace.latent_mask[:, : shape[1]].tolist() == expected.tolist()
        dense = trace.latent_embeds[:, : shape[1]]
        assert torch.equal(dense[expected], given.repeat_interleave(copies, dim=0)[expected])
        assert not trace.dense("has_output")[:, : shape[1]].any()
        assert (trace.dense("topk_ids")[:, : shape[1]][expected] == -1).all()
        assert trace.spans[0].first == shape[1] - 3
        assert_replays(model, output, prompt, [0] * copies + [1] * copies)


def test_replay_refuses_inputs_of_other_rows(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    trace = decode(model, inputs, num_beams=2, num_return_sequences=2).latent_trace
    for name in ("attention_mask", "mm_token_type_ids"):
        with pytest.raises(ValueError, match=f"{name} has 2 rows, the trace 4; repeat the inputs"):
            model.replay(trace, **{name: inputs[name]})


# Files


def test_save_and_load(model: torch.nn.Module, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    options = {"max_latent_steps": [2, 4], "latent_answer_ids": [40, 41], "latent_hook": lambda step: None}
    trace = decode(model, inputs, **options).latent_trace
    trace.extras["patches"] = torch.arange(trace.num_slots * 2).view(-1, 2)
    path = tmp_path / "trace.safetensors"
    trace.save(path)
    loaded = LatentTrace.load(path)
    for entry in fields(LatentTrace):
        ours, theirs = getattr(loaded, entry.name), getattr(trace, entry.name)
        if torch.is_tensor(theirs):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), entry.name
        elif entry.name == "extras":
            assert ours.keys() == theirs.keys() and torch.equal(ours["patches"], theirs["patches"])
        else:
            assert ours == theirs, entry.name
    assert loaded.info["strategy"] == "dynamic" and loaded.info["latent_token_id"] == SLOT
    assert loaded.info["options"]["max_latent_steps"] == [2, 4] and "latent_hook" not in loaded.info["options"]


@pytest.mark.parametrize("options", [{"latent_strategy": "off"}, {"latent_topk": 0}])
def test_save_and_load_of_empty_tables(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], tmp_path: Path, options: dict[str, Any]
) -> None:
    trace = decode(model, unpadded(inputs, 0), **options).latent_trace
    trace.save(tmp_path / "trace.safetensors")
    loaded = LatentTrace.load(tmp_path / "trace.safetensors")
    assert (
        loaded.attention_mask is None
        and loaded.topk_ids.shape == trace.topk_ids.shape == (trace.num_slots, 0)
        or (trace.num_slots == 0)
    )
    assert torch.equal(loaded.sequences, trace.sequences) and loaded.spans == trace.spans
    assert loaded.latent_embeds.shape == (*trace.sequences.shape, 64)


def test_half_precision_comes_back(model: torch.nn.Module, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    trace = decode(model, inputs).latent_trace
    half = trace.replace_slots(trace.slot_inputs.bfloat16())
    half.save(tmp_path / "trace.safetensors")
    loaded = LatentTrace.load(tmp_path / "trace.safetensors")
    assert loaded.slot_inputs.dtype == torch.bfloat16 and torch.equal(loaded.slot_inputs, half.slot_inputs)


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is not a latent trace"):
        LatentTrace.load(tmp_path / "model.safetensors")


# Editing


def hooked(model: torch.nn.Module, inputs: dict[str, torch.Tensor], hook: Callable | None) -> Any:
    return decode(model, inputs, scripts=[{6: START}, {2: END, 4: START}], latent_hook=hook, max_latent_steps=4)


def test_an_identity_hook_changes_nothing(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    plain = hooked(model, inputs, None)
    for hook in (lambda step: None, lambda step: step.latent):
        output = hooked(model, inputs, hook)
        assert torch.equal(output.sequences, plain.sequences)
        assert torch.equal(output.latent_trace.slot_inputs, plain.latent_trace.slot_inputs)
        assert torch.equal(torch.stack(output.logits), torch.stack(plain.logits))


def test_overwriting_one_slot_changes_only_what_follows(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> None:
    """The slot itself and everything before it, and the other row, stay bit for bit; what reads the slot differs."""
    plain, length = hooked(model, inputs, None), inputs["input_ids"].shape[1]
    target = length + 3  # third slot of the first span of row 0
    seen = []

    def hook(step: LatentStep) -> torch.Tensor:
        seen.append((step.position - length, step.is_slot.tolist(), step.count.tolist(), step.span.tolist()))
        vector = step.latent.clone()
        if step.position == target:
            vector[0] = -vector[0]
        return vector

    edited = hooked(model, inputs, hook)
    # Row 0: start, 4 slots, end, start, 4 slots. Row 1: start, 1 slot, end, a word, start, 4 slots, end.
    assert [entry[0] for entry in seen] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert seen[0][1:] == ([True, True], [0, 0], [-1, -1]) and seen[2][1][0] and seen[2][2][0] == 2
    assert seen[6][1:] == ([True, True], [0, 2], [0, 1])
    at = plain.latent_trace.slot_index.tolist().index([0, target])
    ours, theirs = edited.latent_trace, plain.latent_trace
    assert torch.equal(ours.slot_inputs[at], -theirs.slot_inputs[at])
    before = torch.arange(theirs.num_slots) < at
    assert torch.equal(ours.slot_inputs[before], theirs.slot_inputs[before])
    for step, (changed, clean) in enumerate(zip(edited.logits, plain.logits, strict=True)):
        assert torch.equal(changed[1], clean[1]), step
        assert torch.equal(changed[0], clean[0]) == (step <= 3), step


def test_edited_trace(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Replaying edited slots: logits before the edit are those of the plain replay, the edited slot's are not."""
    trace = hooked(model, inputs, None).latent_trace
    at = 1
    row, position = trace.slot_index[at].tolist()
    vectors = trace.slot_inputs.clone()
    vectors[at] = torch.randn(64)
    edited = trace.replace_slots(vectors)
    assert edited.spans == trace.spans and torch.equal(edited.sequences, trace.sequences)
    assert not torch.equal(trace.slot_inputs, vectors), "the original is untouched"
    clean, changed = (replayed(model, t, inputs) for t in (trace, edited))
    torch.testing.assert_close(changed[row, :position], clean[row, :position], atol=1e-6, rtol=0)
    torch.testing.assert_close(changed[1 - row], clean[1 - row], atol=1e-6, rtol=0)
    assert ((changed - clean)[row, position:].abs().amax(-1) > 1e-4).all()
    with pytest.raises(ValueError, match=r"slot_inputs must be \(\d+, 64\), got \(1, 64\)"):
        trace.replace_slots(vectors[:1])


# What the tables say


def test_topk_is_the_softmax_of_the_logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """At the position before the slot, of the raw logits: processors and temperature do not enter."""
    output = decode(model, inputs, scripts=[{2: 33}, {}], latent_topk=7, do_sample=True, temperature=0.5)
    trace = output.latent_trace
    assert trace.topk_ids.shape == trace.topk_probs.shape == (trace.num_slots, 7)
    for (row, position), ids, probs in zip(trace.slot_index.tolist(), trace.topk_ids, trace.topk_probs, strict=True):
        expected = output.logits[position - trace.prompt_length][row].softmax(-1).topk(7)
        assert ids.tolist() == expected.indices.tolist()
        torch.testing.assert_close(probs, expected.values)
    assert trace.readable_ids[trace.slot_index.tolist().index([0, trace.prompt_length + 2])] == 33


def test_readable_sequences(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    output = decode(model, inputs)
    trace, length = output.latent_trace, inputs["input_ids"].shape[1]
    for row in range(2):
        for step, token in enumerate(trace.readable_sequences[row, length:].tolist()):
            if trace.latent_mask[row, length + step]:
                assert trace.sequences[row, length + step] == SLOT
                assert token == int(output.logits[step][row].argmax())
            else:
                assert token == trace.sequences[row, length + step]


def spans_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor], scripts: Any, **options: Any) -> Any:
    """Spans of a decoding as (row, start, first, length, end, reason), positions counted from the prompt's end."""
    trace = decode(model, inputs, scripts=scripts, **options).latent_trace
    zero = trace.prompt_length

    def shift(position: int) -> int:
        return position - zero if position >= 0 else -1

    rows = [(s.row, s.start - zero, s.first - zero, s.length, shift(s.end), s.reason) for s in trace.spans]
    for span in trace.spans:
        assert trace.latent_mask[span.row, span.first : span.first + span.length].all()
    assert sum(span.length for span in trace.spans) == trace.num_slots
    return rows


def test_span_table_of_dynamic(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    scripts = [{2: END, 4: START, 9: START}, {1: 30, 2: 30, 3: 30, 6: START, 7: END, 9: START, 10: EOS}]
    spans = spans_of(model, inputs, scripts, max_latent_steps=3, repetition_exit=True)
    assert spans == [
        (0, 0, 1, 1, 2, "end_token"),
        (0, 4, 5, 3, 8, "max_latent_steps"),
        (0, 9, 10, 2, -1, "open"),
        (1, 0, 1, 2, 3, "repetition"),
        (1, 6, 7, 0, 7, "end_token"),
        (1, 9, 10, 2, -1, "open"),
    ]


def test_span_table_of_fixed(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    options = {"latent_strategy": "fixed", "repetition_exit": True, "num_latent_steps": [2, 5]}
    scripts = [{0: START, 3: 31, 5: START, 8: 32, 11: START}, {1: START, 2: 30, 3: 30, 4: 30, 6: EOS}]
    assert spans_of(model, inputs, scripts, **options) == [
        (0, 0, 1, 2, -1, "num_latent_steps"),
        (0, 5, 6, 2, -1, "num_latent_steps"),
        (0, 11, 12, 0, -1, "open"),
        (1, 1, 2, 2, -1, "repetition"),
    ]
    options["force_end"] = True
    assert spans_of(model, inputs, [{0: START}, {1: START, 5: EOS}], **options) == [
        (0, 0, 1, 2, 3, "num_latent_steps"),
        (1, 1, 2, 5, 7, "num_latent_steps"),
    ]


def test_span_that_the_prompt_opens(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """A start marker that ends the prompt belongs to the span; one further back opens nothing and is not listed."""
    start = torch.full((2, 1), START)
    ones = torch.ones_like(start)
    ids = inputs["input_ids"].clone()
    ids[:, -2] = START
    prompt = {
        **inputs,
        "input_ids": torch.cat([ids, start], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], ones], dim=1),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], 0 * ones], dim=1),
    }
    spans = spans_of(model, prompt, [{}, {1: END}], force_span=False, max_latent_steps=2)
    assert spans == [(0, -1, 0, 2, 2, "max_latent_steps"), (1, -1, 0, 1, 1, "end_token")]


def test_has_output_is_false_for_a_slot_that_was_never_fed(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> None:
    trace = decode(model, inputs, max_latent_steps=[8, 2], max_new_tokens=5).latent_trace
    assert trace.num_latent_steps.tolist() == [4, 2]
    assert trace.has_output.tolist() == [True, True, True, False, True, True]
    assert torch.equal(trace.slot_outputs[3], torch.zeros(64)) and (trace.slot_outputs[:3].norm(dim=-1) > 0).all()
    assert trace.spans[0] == LatentSpan(0, trace.prompt_length, trace.prompt_length + 1, 4, -1, "open")
    logits = model.lm_head(trace.slot_outputs[:3])
    expected = replayed(model, trace, inputs)[0, trace.prompt_length + 1 : trace.prompt_length + 4]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_to_and_dense(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    trace = decode(model, inputs).latent_trace
    trace.extras["score"] = torch.arange(trace.num_slots, dtype=torch.float32) + 1
    dense = trace.dense("score")
    assert torch.equal(dense[trace.latent_mask], trace.extras["score"]) and (dense[~trace.latent_mask] == 0).all()
    moved = trace.to("cpu")
    assert torch.equal(moved.slot_inputs, trace.slot_inputs) and moved.spans == trace.spans
    assert moved.extras["score"].device.type == "cpu"
