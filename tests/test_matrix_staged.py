"""Every backbone and way of decoding against the naive schedule of `tests/naive_staged.py`, for slots laid out behind
the prompt (`latent_strategy="staged"`): blocks of IVT-LR, and slots between markers as in Coconut.

What `generate` returned is given to the naive schedule as one row: prompt, slots, and the ids that were written. Its
slots must hold the same vectors, its blocks copy the same image tokens, and its logits give every id that was chosen.
The rows of a batch have different lengths and different numbers of slots.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from tests.naive_staged import NaiveBackbone, NaiveChameleon, NaiveQwenVL, NaiveStaged, naive_staged
from tests.test_matrix import BACKBONES, Prefer, left_pad

TOLERANCE = 1e-4
NEW_TOKENS = 6


@dataclass(frozen=True)
class Scenario:
    """Rows of a backbone and how their slots are laid out.

    Args:
        name: of the test.
        rows: prompts of the backbone.
        steps: slots of each row.
        options: further options of `generate`.
        needs_images: left out for backbones without.
        eos_step: the id that row 0 writes at this step ends a text.
    """

    name: str
    rows: tuple[int, ...]
    steps: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    needs_images: bool = True
    eos_step: int | None = None
    seed: int = 0

    @property
    def patches(self) -> int:
        return self.options.get("num_latent_patches", 0)


SCENARIOS = [
    Scenario("slots alone", (0, 1, 2), (2, 0, 3), needs_images=False),
    Scenario("markers, a row ends early", (0, 1, 2), (1, 3, 2), {"latent_markers": True}, False, eos_step=2),
    Scenario("one image embedding a slot", (0, 1), (2, 3), {"num_latent_patches": 1}),
    Scenario(
        "two, by column", (1, 0), (2, 1), {"num_latent_patches": 2, "latent_patch_order": "index_then_kth"}, seed=1
    ),
    Scenario("more than there are", (0, 1), (1, 3), {"num_latent_patches": 99}),
]


@cache
def models(backbone: str, seed: int) -> tuple[Any, Any]:
    """Stock model with eager attention, and latent model with an id for inserted image embeddings."""
    stock, latent = (copy.deepcopy(model) for model in BACKBONES[backbone].pair(seed, None))
    stock.set_attn_implementation("eager")
    latent.config.latent_patch_token_id = latent.config.get_text_config().vocab_size - 1
    return stock, latent


def has_images(backbone: str) -> bool:
    return "pixel_values" in BACKBONES[backbone].rows()[0]


@dataclass(frozen=True)
class Cell:
    """One scenario on one backbone."""

    backbone: str
    scenario: Scenario

    @property
    def model(self) -> Any:
        return models(self.backbone, self.scenario.seed)[1]

    def row(self, number: int) -> dict[str, torch.Tensor]:
        return BACKBONES[self.backbone].rows()[self.scenario.rows[number]]

    def generate(self, numbers: list[int] | None = None, **options: Any) -> Any:
        """`generate` on some of the rows; all by default."""
        numbers = list(range(len(self.scenario.rows))) if numbers is None else numbers
        pad, banned = BACKBONES[self.backbone].ids().PAD, placeholders(self)
        steps = [self.scenario.steps[number] for number in numbers]
        settings = {
            "latent_strategy": "staged",
            "num_latent_steps": steps if len(steps) > 1 else steps[0],
            "num_latent_patches": self.scenario.patches,
            "max_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
            # No placeholder is written: without a cache, and by the naive schedule, it would be read as an image.
            "logits_processor": LogitsProcessorList([Prefer(*banned, by=-1e4)] if banned else []),
            "generation_config": GenerationConfig(eos_token_id=eos_of(self), pad_token_id=pad),
        }
        inputs = left_pad([self.row(number) for number in numbers], pad)
        return self.model.generate(**inputs, **{**settings, **self.scenario.options, **options})

    def naive(self, number: int, written: list[int]) -> NaiveStaged:
        """The naive schedule on a row with what was written behind its slots."""
        stock, row, config = models(self.backbone, self.scenario.seed)[0], self.row(number), self.model.config
        ids = row["input_ids"][0].tolist()
        slots = [config.latent_token_id] * self.scenario.steps[number]
        if self.scenario.options.get("latent_markers"):
            slots = [config.latent_start_token_id, *slots, config.latent_end_token_id]
        with torch.no_grad():
            return naive_staged(
                naive_backbone(stock, row),
                torch.tensor([[*ids, *slots, *written]]),
                slot_id=config.latent_token_id,
                patch_id=config.latent_patch_token_id,
                num_patches=self.scenario.patches,
                patch_order=self.scenario.options.get("latent_patch_order", "score"),
            )


def naive_backbone(stock: Any, row: dict[str, torch.Tensor]) -> NaiveBackbone:
    if "image_grid_thw" in row:
        return NaiveQwenVL(stock, row["pixel_values"], row["image_grid_thw"])
    if hasattr(stock.config, "image_token_id"):
        reads_images = NaiveChameleon if hasattr(stock.config, "vq_config") else NaiveQwenVL
        return reads_images(stock, row.get("pixel_values"))
    return NaiveBackbone(stock)


@cache
def eos_of(cell: Cell) -> int:
    """The id that ends a text: what row 0 writes at a step, else none."""
    if cell.scenario.eos_step is None:
        return -1
    written: list[int] = []
    for _ in range(cell.scenario.eos_step + 1):
        written.append(int(allowed(cell, cell.naive(0, written).logits[0, -1]).argmax()))
    return written[-1]


def placeholders(cell: Cell) -> list[int]:
    return list(BACKBONES[cell.backbone].ids().PLACEHOLDERS)


def allowed(cell: Cell, logits: torch.Tensor) -> torch.Tensor:
    """Scores without the ids that text may not write."""
    config = cell.model.config
    banned = [config.latent_token_id, config.latent_patch_token_id, config.latent_start_token_id, *placeholders(cell)]
    return logits.index_fill(-1, torch.tensor(banned), -float("inf"))


Cell.__hash__ = lambda self: hash((self.backbone, self.scenario.name))


def cells(backbone: str) -> list[Cell]:
    return [Cell(backbone, one) for one in SCENARIOS if has_images(backbone) or not one.needs_images]


def assert_same(cell: Cell, output: Any, place: int, number: int, greedy: bool = True) -> None:
    """Row `place` of an output is what the naive schedule makes of prompt `number` and the written ids."""
    trace, pad = output.latent_trace, BACKBONES[cell.backbone].ids().PAD
    start, name = trace.prompt_length, f"{cell.scenario.name}, row {number}"
    written = output.sequences[place, start:].tolist()
    stop = written.index(eos_of(cell)) + 1 if eos_of(cell) in written else len(written)
    assert set(written[stop:]) <= {pad}, name
    written = written[:stop]
    naive = cell.naive(number, written)
    length = naive.input_ids.shape[1] - len(written)
    assert output.sequences[place, start - length : start].tolist() == naive.input_ids[0, :length].tolist(), name
    mask = trace.latent_mask[place]
    is_slot = output.sequences[place] == cell.model.config.latent_token_id
    vectors = trace.dense("slot_inputs")[place]
    expected = naive.inputs_embeds[0][naive.source[0] < 0] if cell.scenario.patches else None
    if naive.latents:
        torch.testing.assert_close(vectors[mask & is_slot], torch.cat(naive.latents), atol=TOLERANCE, rtol=0)
    assert int((mask & ~is_slot).sum()) == int((naive.source < 0).sum()), name
    if expected is not None and len(expected):
        torch.testing.assert_close(vectors[mask & ~is_slot], expected, atol=TOLERANCE, rtol=0)
        columns = trace.dense("patch_column")[place][mask & ~is_slot] - (start - length)
        assert columns.tolist() == torch.cat(naive.selected, dim=1)[0].tolist(), name
    chosen = naive.logits[0, length - 1 : -1]
    for step, token in enumerate(written):
        if greedy:
            assert token == int(allowed(cell, chosen[step]).argmax()), f"{name}, step {step}"
    outputs = trace.dense("slot_outputs")[place][mask]
    latents = torch.nn.functional.pad(mask[start - length : start], (0, len(written)))
    torch.testing.assert_close(outputs, naive.hidden[0][latents], atol=TOLERANCE, rtol=0)


BEHAVIOURS: dict[str, Callable[[str], None]] = {}


def behaviour(function: Callable[[str], None]) -> Callable[[str], None]:
    BEHAVIOURS[function.__name__] = function
    return function


def together(backbone: str, **options: Any) -> None:
    for cell in cells(backbone):
        output = cell.generate(**options)
        for number in range(len(cell.scenario.rows)):
            assert_same(cell, output, number, number)


@behaviour
def greedy(backbone: str) -> None:
    for cell in cells(backbone):
        for number in range(len(cell.scenario.rows)):
            assert_same(cell, cell.generate([number]), 0, number)


@behaviour
def batch(backbone: str) -> None:
    together(backbone)


@behaviour
def static_cache(backbone: str) -> None:
    together(backbone, cache_implementation="static")


@behaviour
def no_cache(backbone: str) -> None:
    together(backbone, use_cache=False)


@behaviour
def chunked_prefill(backbone: str) -> None:
    together(backbone, prefill_chunk_size=7)


@behaviour
def hidden_states(backbone: str) -> None:
    """The last layer's states of the prompt are those that the trace keeps at its slots."""
    for cell in cells(backbone):
        output = cell.generate(output_hidden_states=True)
        trace = output.latent_trace
        last = output.hidden_states[0][-1]
        mask = trace.latent_mask[:, : trace.prompt_length]
        torch.testing.assert_close(trace.dense("slot_outputs")[:, : trace.prompt_length][mask], last[mask])


@behaviour
def streamer(backbone: str) -> None:
    """What is streamed is what is returned, slots first."""

    class Keep(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.ids.extend(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    for cell in cells(backbone):
        keep = Keep()
        output = cell.generate([0], streamer=keep)
        assert_same(cell, output, 0, 0)
        assert keep.ended and keep.ids == output.sequences[0].tolist()


@behaviour
def sampling(backbone: str) -> None:
    """Two samples a prompt; the logits of every step are those of the naive schedule on what was sampled."""
    for seed, cell in enumerate(cells(backbone)):
        torch.manual_seed(seed)
        output = cell.generate(do_sample=True, temperature=1.5, top_k=20, num_return_sequences=2)
        for place in range(len(output.sequences)):
            assert_same(cell, output, place, place // 2, greedy=False)
            start = output.latent_trace.prompt_length
            written = output.sequences[place, start:].tolist()
            naive = cell.naive(place // 2, written)
            for step in range(NEW_TOKENS if eos_of(cell) not in written else written.index(eos_of(cell)) + 1):
                logits = naive.logits[0, len(naive.logits[0]) - len(written) - 1 + step]
                torch.testing.assert_close(output.logits[step][place], logits, atol=1e-3, rtol=1e-4)


def beam_search(backbone: str, beams: int) -> None:
    """Scores are those of the naive schedule on the returned ids; a row alone is that of the batch."""
    for turn, cell in enumerate(cells(backbone)):
        output = cell.generate(num_beams=beams, num_return_sequences=2, output_scores=True)
        for place in range(len(output.sequences)):
            assert_same(cell, output, place, place // 2, greedy=False)
            length = int((output.beam_indices[place] >= 0).sum())
            start = output.latent_trace.prompt_length
            written = output.sequences[place, start : start + length].tolist()
            naive = cell.naive(place // 2, written)
            scores = naive.logits[0, len(naive.logits[0]) - length - 1 : -1].log_softmax(-1)
            total = float(scores[torch.arange(length), torch.tensor(written)].sum())
            assert output.sequences_scores[place].item() == pytest.approx(total / length, abs=1e-4)
        number = turn % len(cell.scenario.rows)
        single = cell.generate([number], num_beams=beams, num_return_sequences=2, output_scores=True)
        wanted = output.sequences[2 * number : 2 * number + 2, output.latent_trace.prompt_length :]
        found = single.sequences[:, single.latent_trace.prompt_length :]
        width = min(wanted.shape[1], found.shape[1])
        assert torch.equal(found[:, :width], wanted[:, :width])


@behaviour
def beams_2(backbone: str) -> None:
    beam_search(backbone, 2)


@behaviour
def beams_4(backbone: str) -> None:
    beam_search(backbone, 4)


@behaviour
def replay(backbone: str) -> None:
    """One teacher-forced forward over the trace gives the logits of decoding (contract C2)."""
    for cell in cells(backbone):
        output = cell.generate()
        inputs = left_pad([cell.row(number) for number in range(len(cell.scenario.rows))], 0)
        images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
        logits = cell.model.replay(output.latent_trace, **images).logits
        decoded = torch.stack(output.logits, dim=1)
        count = decoded.shape[1]
        torch.testing.assert_close(logits[:, -count - 1 : -1], decoded, atol=TOLERANCE, rtol=1e-5)


@behaviour
def assistants_are_refused(backbone: str) -> None:
    """Assisted decoding skips the prefill in which the slots are worked out."""
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": models(backbone, 0)[0]}):
        with pytest.raises(ValueError, match="has a prefill of its own, which assisted decoding skips"):
            cells(backbone)[0].generate([0], **options)


@behaviour
def traced_decode(backbone: str) -> None:
    """The decode step behind the slots is one graph, compiled once."""
    config = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend="eager")
    config._compile_all_devices = True
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        cell = cells(backbone)[0]
        output = cell.generate(cache_implementation="static", compile_config=config)
    torch._dynamo.reset()
    for number in range(len(cell.scenario.rows)):
        assert_same(cell, output, number, number)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_cell(backbone: str, behaviour: str) -> None:
    BEHAVIOURS[behaviour](backbone)
