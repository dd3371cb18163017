"""Every backbone and way of decoding against the naive decoder of `tests/naive_learned.py`, for learned tokens
(`latent_strategy="learned"`): laid out behind the prompt, hidden in two ways, or written by the model itself.

What `generate` returned is compared with what the naive decoder writes, and with one naive pass over the returned row:
what is fed, states and words of the learned tokens, positions, logits. Prompts have different lengths, the last one no
image, and a row may have fewer learned tokens than another.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from modeling_latent import LatentTrace
from tests.latent import ScriptProcessor, eager_assistant
from tests.naive_learned import (
    NaiveBackbone,
    NaiveChameleon,
    NaiveLearned,
    NaiveQwenVL,
    naive_learned,
    naive_learned_generate,
)
from tests.test_matrix import BACKBONES, NO_HYPOTHESIS, Discourage, Prefer, counted_forwards, left_pad

TOLERANCE = 1e-4
NEW_TOKENS = 7
NUM_LEARNED = 4
ROWS = (0, 1, 2)


@dataclass(frozen=True)
class Scenario:
    """What is laid out behind the three prompts of a backbone, and what happens then.

    Args:
        name: of the test.
        options: of `generate`.
        steps: learned tokens of each row.
        written: per row, step -> index of the learned token that the model is made to write there.
        discouraged: whoever sees another id among the last three decodes another text.
        eos_step: the id that row 0 writes at this step ends a text.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] = (NUM_LEARNED,) * 3
    written: tuple[dict[int, int], ...] = ({}, {}, {})
    discouraged: bool = False
    eos_step: int | None = None
    seed: int = 0

    @property
    def form(self) -> str | None:
        """How the learned tokens are hidden."""
        value = self.options.get("mask_latents", False)
        return "visibility" if value is True else value or None


def by_row(*steps: int) -> dict[str, Any]:
    return {"options": {"num_latent_steps": list(steps)}, "steps": steps}


SCENARIOS = [
    Scenario("laid out"),
    Scenario("a number of tokens by row, one ends early", **by_row(1, 0, 3), eos_step=2, discouraged=True),
    Scenario("hidden", {"mask_latents": True}, seed=1, eos_step=3),
    Scenario(
        "hidden, a number of tokens by row",
        {"mask_latents": "visibility", "num_latent_steps": [3, 4, 0]},
        (3, 4, 0),
        discouraged=True,
    ),
    Scenario("as padding", {"mask_latents": "padding"}, discouraged=True),
    Scenario(
        "as padding, a number of tokens by row", {"mask_latents": "padding", "num_latent_steps": [4, 0, 2]}, (4, 0, 2)
    ),
    Scenario(
        "written by the model",
        {"force_latents": False},
        (0, 0, 0),
        ({0: 0, 1: 1, 2: 2, 3: 3}, {2: 0, 3: 1}, {}),
        eos_step=5,
    ),
]


@cache
def models(backbone: str, seed: int) -> tuple[Any, Any]:
    """Stock model with eager attention, and latent model whose only latents are learned tokens, not in the order of
    their ids."""
    stock, latent = (copy.deepcopy(model) for model in BACKBONES[backbone].pair(seed, None))
    stock.set_attn_implementation("eager")
    config, ids = latent.config, BACKBONES[backbone].ids()
    config.latent_learned_token_ids = [config.get_text_config().vocab_size - 1, ids.END, ids.SLOT, ids.START]
    config.latent_token_id = config.latent_start_token_id = config.latent_end_token_id = None
    return stock, latent


@dataclass(frozen=True)
class Cell:
    """One scenario on one backbone."""

    backbone: str
    scenario: Scenario

    @property
    def model(self) -> Any:
        return models(self.backbone, self.scenario.seed)[1]

    @property
    def learned(self) -> list[int]:
        return self.model.config.latent_learned_token_ids

    @property
    def processors(self) -> list[Any]:
        """No placeholder is written: without a cache, and by the naive decoder, it would be read as an image."""
        placeholders = BACKBONES[self.backbone].ids().PLACEHOLDERS
        further = [Discourage()] if self.scenario.discouraged else []
        return [*further, Prefer(*placeholders, by=-1e4)]

    def process(self, ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for processor in self.processors:
            scores = processor(ids, scores)
        return scores

    def script(self, number: int) -> dict[int, int]:
        return {step: self.learned[index] for step, index in self.scenario.written[number].items()}

    def row(self, number: int) -> dict[str, torch.Tensor]:
        return BACKBONES[self.backbone].rows()[number]

    def prompt(self, number: int) -> list[int]:
        return self.row(number)["input_ids"][0].tolist()

    def laid_out(self, number: int) -> list[int]:
        return self.learned[: self.scenario.steps[number]]

    def generate(self, numbers: tuple[int, ...] = ROWS, **options: Any) -> Any:
        """`generate` on some of the rows."""
        pad = BACKBONES[self.backbone].ids().PAD
        inputs = left_pad([self.row(number) for number in numbers], pad)
        length = max(len(self.prompt(number)) + len(self.laid_out(number)) for number in numbers)
        script = ScriptProcessor([self.script(number) for number in numbers], length)
        settings = {
            "latent_strategy": "learned",
            "max_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
            "logits_processor": LogitsProcessorList([*self.processors, script]),
            "generation_config": GenerationConfig(eos_token_id=self.eos, pad_token_id=pad),
            **self.scenario.options,
        }
        if isinstance(settings.get("num_latent_steps"), list):
            settings["num_latent_steps"] = [settings["num_latent_steps"][number] for number in numbers]
        return self.model.generate(**inputs, **{**settings, **options})

    @property
    def eos(self) -> int:
        """The id that ends a text: what row 0 writes at a step, else that of the tokenizer."""
        step = self.scenario.eos_step
        return BACKBONES[self.backbone].ids().EOS if step is None else expected(self, 0, False)[step]

    def naive(self, number: int, written: list[int]) -> NaiveLearned:
        """One naive pass over a row with what was written behind its learned tokens."""
        prompt, tail = self.prompt(number), self.laid_out(number)
        places = range(len(prompt), len(prompt) + len(tail))
        return naive_learned(naive_backbone(self, number), [*prompt, *tail, *written], places, self.scenario.form)


Cell.__hash__ = lambda self: hash((self.backbone, self.scenario.name))


@cache
def naive_backbone(cell: Cell, number: int) -> NaiveBackbone:
    stock, row = models(cell.backbone, cell.scenario.seed)[0], cell.row(number)
    if "image_grid_thw" in row:
        return NaiveQwenVL(stock, row["pixel_values"], row["image_grid_thw"])
    if hasattr(stock.config, "image_token_id"):
        reads_images = NaiveChameleon if hasattr(stock.config, "vq_config") else NaiveQwenVL
        return reads_images(stock, row.get("pixel_values"))
    return NaiveBackbone(stock)


@cache
def expected(cell: Cell, number: int, stops: bool = True) -> list[int]:
    """What the naive decoder writes, up to the end of the text if it stops there."""
    return naive_learned_generate(
        naive_backbone(cell, number),
        cell.prompt(number),
        cell.laid_out(number),
        max_new_tokens=NEW_TOKENS,
        form=cell.scenario.form,
        eos_ids=[cell.eos] if stops else [],
        script=cell.script(number),
        process_scores=cell.process,
    )


def cells(backbone: str) -> list[Cell]:
    return [Cell(backbone, one) for one in SCENARIOS]


def written_in(cell: Cell, output: Any, place: int) -> list[int]:
    """The ids behind the prompt of a returned row, up to the end of its text; behind it is padding."""
    start, pad = output.latent_trace.prompt_length, BACKBONES[cell.backbone].ids().PAD
    ids = output.sequences[place, start:].tolist()
    stop = ids.index(cell.eos) + 1 if cell.eos in ids else len(ids)
    assert set(ids[stop:]) <= {pad}
    return ids[:stop]


def assert_row(cell: Cell, output: Any, place: int, number: int, complete: bool = True) -> NaiveLearned:
    """Row `place` of an output and of its trace are what one naive pass makes of prompt `number` and the ids.

    `complete`: what the learned tokens returned is known for all of them.
    """
    trace, name = output.latent_trace, f"{cell.scenario.name}, row {number}"
    written, count = written_in(cell, output, place), cell.scenario.steps[number]
    naive = cell.naive(number, written)
    start, length = trace.prompt_length, len(naive.ids) - len(written)
    first = start - length
    assert output.sequences[place, first : start + len(written)].tolist() == naive.ids, name
    latent = torch.zeros(output.sequences.shape[1], dtype=torch.bool)
    latent[start - count : start] = True
    assert torch.equal(trace.latent_mask[place], latent), name
    assert torch.equal(trace.dense("slot_inputs")[place][latent], naive.embeds[length - count : length]), name
    spans = [(span.first, span.length, span.reason) for span in trace.spans if span.row == place]
    assert spans == ([(start - count, count, "num_latent_steps")] if count else []), name
    is_known = trace.dense("has_output")[place][latent]
    assert is_known.all() or not complete, name
    outputs = trace.dense("slot_outputs")[place][latent][is_known]
    torch.testing.assert_close(outputs, naive.hidden[length - count : length][is_known], atol=TOLERANCE, rtol=0)
    said = naive.logits[length - count - 1 : length - 1]
    if complete:
        assert trace.dense("readable_ids")[place][latent].tolist() == said.argmax(-1).tolist(), name
        top = trace.dense("topk_probs")[place][latent]
        torch.testing.assert_close(top, said.softmax(-1).topk(5).values, atol=1e-4, rtol=0)
    if trace.position_ids is not None:
        positions = trace.position_ids[..., place, first : start + len(written) - 1]
        positions = positions[-3:] if naive.positions.dim() == 2 else positions
        assert torch.equal(positions, naive.positions[..., :-1]), name
    return naive


def assert_same(cell: Cell, output: Any, place: int, number: int, complete: bool = True) -> None:
    """[`assert_row`], and the row is written as the naive decoder writes it, by the same logits."""
    naive, start = assert_row(cell, output, place, number, complete), output.latent_trace.prompt_length
    written = written_in(cell, output, place)
    assert written == expected(cell, number), f"{cell.scenario.name}, row {number}"
    for step in range(len(written)):
        logits = naive.logits[len(naive.ids) - len(written) - 1 + step]
        torch.testing.assert_close(output.logits[step][place], logits, atol=1e-3, rtol=1e-4)
    assert start >= len(naive.ids) - len(written)


BEHAVIOURS: dict[str, Callable[[str], None]] = {}


def behaviour(function: Callable[[str], None]) -> Callable[[str], None]:
    BEHAVIOURS[function.__name__] = function
    return function


def together(backbone: str, complete: bool = True, **options: Any) -> None:
    for cell in cells(backbone):
        output = cell.generate(**options)
        for number in ROWS:
            assert_same(cell, output, number, number, complete)


@behaviour
def greedy(backbone: str) -> None:
    for cell in cells(backbone):
        for number in ROWS:
            assert_same(cell, cell.generate((number,)), 0, number)


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
    """The trace has what the last chunk returned."""
    together(backbone, complete=False, prefill_chunk_size=7)


@behaviour
def eager_attention(backbone: str) -> None:
    """Masks that are added, in place of those that say who may attend."""
    for one in {cell.scenario.seed: cell for cell in cells(backbone)}.values():
        one.model.set_attn_implementation("eager")
    try:
        together(backbone)
    finally:
        for cell in cells(backbone):
            cell.model.set_attn_implementation("sdpa")


@behaviour
def streamer(backbone: str) -> None:
    """What is streamed is what is returned, learned tokens first."""

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
        output = cell.generate((0,), streamer=keep)
        assert_same(cell, output, 0, 0)
        assert keep.ended and keep.ids == output.sequences[0].tolist()


@behaviour
def sampling(backbone: str) -> None:
    """Two samples a prompt; the logits of every step are those of a naive pass over what was sampled, and the seed
    decides."""
    for seed, cell in enumerate(cells(backbone)):
        options = {"do_sample": True, "temperature": 1.5, "top_k": 20, "num_return_sequences": 2}
        torch.manual_seed(seed)
        output = cell.generate(**options)
        torch.manual_seed(seed)
        assert torch.equal(cell.generate(**options).sequences, output.sequences)
        for place in range(len(output.sequences)):
            naive = assert_row(cell, output, place, place // 2)
            written = written_in(cell, output, place)
            for step in range(len(written)):
                logits = naive.logits[len(naive.ids) - len(written) - 1 + step]
                torch.testing.assert_close(output.logits[step][place], logits, atol=1e-3, rtol=1e-4)


def beam_search(backbone: str, beams: int) -> None:
    """Scores are those of a naive pass over the returned ids; a row alone is that of the batch."""
    options = {"num_beams": beams, "num_return_sequences": 2, "output_scores": True}
    for turn, cell in enumerate(cells(backbone)):
        output = cell.generate(**options)
        for place in range(len(output.sequences)):
            if output.sequences_scores[place] < NO_HYPOTHESIS:
                continue
            naive = assert_row(cell, output, place, place // 2)
            written, total = written_in(cell, output, place), 0.0
            for step, token in enumerate(written):
                end = len(naive.ids) - len(written) + step
                scores = naive.logits[end - 1 : end].log_softmax(-1)
                total += float(cell.process(torch.tensor([naive.ids[:end]]), scores)[0, token])
            assert output.sequences_scores[place].item() == pytest.approx(total / len(written), abs=1e-4)
        number = turn % 3
        single = cell.generate((number,), **options)
        for beam in range(2):
            if single.sequences_scores[beam] > NO_HYPOTHESIS:
                assert written_in(cell, single, beam) == written_in(cell, output, 2 * number + beam)


@behaviour
def beams_2(backbone: str) -> None:
    beam_search(backbone, 2)


@behaviour
def beams_4(backbone: str) -> None:
    beam_search(backbone, 4)


@behaviour
def replay(backbone: str) -> None:
    """One teacher-forced forward over the trace gives the logits of decoding (contract C2): of the batch, after the
    trace was saved, and of one row."""
    for cell in cells(backbone):
        output = cell.generate()
        inputs = left_pad([cell.row(number) for number in ROWS], 0)
        images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
        count = len(output.logits)
        logits = cell.model.replay(output.latent_trace, **images).logits
        for step in range(count):
            torch.testing.assert_close(
                logits[:, step - count - 1], output.logits[step], atol=TOLERANCE, rtol=1e-5, msg=cell.scenario.name
            )
        names = ("pixel_values", "image_grid_thw")
        for number in (0, 2):
            row = {name: cell.row(number)[name] for name in names if name in cell.row(number)}
            alone = cell.model.replay(output.latent_trace.row(number), **row).logits[0, -count - 1 : -1]
            decoded = torch.stack([each[number] for each in output.logits])
            torch.testing.assert_close(alone, decoded, atol=TOLERANCE, rtol=1e-5, msg=cell.scenario.name)


@behaviour
def replay_of_a_saved_trace(backbone: str, tmp_path: Path) -> None:
    for cell in cells(backbone):
        output = cell.generate((2,))
        output.latent_trace.save(tmp_path / "trace.safetensors")
        logits = cell.model.replay(LatentTrace.load(tmp_path / "trace.safetensors")).logits
        decoded, count = torch.stack(output.logits, dim=1), len(output.logits)
        torch.testing.assert_close(logits[:, -count - 1 : -1], decoded, atol=TOLERANCE, rtol=1e-5)


def assisted(backbone: str, **options: Any) -> int:
    """Forwards that drafts saved."""
    saved = 0
    for cell in cells(backbone):
        for number in ROWS:
            with counted_forwards(cell.model) as calls:
                output = cell.generate((number,), **options)
            assert_same(cell, output, 0, number, complete=False)
            saved += len(expected(cell, number)) - len(calls)
    return saved


@behaviour
def assistant_model(backbone: str) -> None:
    """Drafts of the stock model, which sees the learned tokens where ours hides them."""
    assistant = eager_assistant(copy.deepcopy(models(backbone, 0)[0]))
    assert assisted(backbone, assistant_model=assistant) >= 10, "hardly any draft was accepted"


@behaviour
def prompt_lookup(backbone: str) -> None:
    assisted(backbone, prompt_lookup_num_tokens=2)


@behaviour
def embeddings_are_refused(backbone: str) -> None:
    """There are no ids to lay tokens out behind, or they are not what is fed."""
    cell = cells(backbone)[0]
    ids = cell.row(2)["input_ids"]
    embeds = cell.model.get_input_embeddings()(ids)
    for inputs in ({"inputs_embeds": embeds}, {"inputs_embeds": embeds, "input_ids": ids}):
        with pytest.raises(
            ValueError, match="lays learned tokens out behind input_ids; pass input_ids, and leave inp"
        ):
            cell.model.generate(**inputs, latent_strategy="learned", max_new_tokens=2)


@behaviour
def traced_decode(backbone: str) -> None:
    """The decode step behind the learned tokens is one graph, compiled once, whatever is hidden."""
    config = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend="eager")
    config._compile_all_devices = True
    for form in (None, "visibility", "padding"):
        cell = next(cell for cell in cells(backbone) if cell.scenario.form == form)
        torch._dynamo.reset()
        with torch._dynamo.config.patch(error_on_recompile=True):
            output = cell.generate(cache_implementation="static", compile_config=config)
        torch._dynamo.reset()
        for number in ROWS:
            assert_same(cell, output, number, number)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_cell(backbone: str, behaviour: str, tmp_path: Path) -> None:
    takes_folder = behaviour == "replay_of_a_saved_trace"
    BEHAVIOURS[behaviour](backbone, *([tmp_path] if takes_folder else []))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_scenarios_differ(backbone: str) -> None:
    """Learned tokens, and hiding them in either way, change what a model says: equality above says something."""
    written = {cell.scenario.name: [expected(cell, number) for number in ROWS] for cell in cells(backbone)}
    first = [cells(backbone)[0].naive(0, []).logits[-1]]
    for form in ("visibility", "padding"):
        cell = Cell(backbone, Scenario(form, {"mask_latents": form}))
        first.append(cell.naive(0, []).logits[-1])
    first.append(Cell(backbone, Scenario("none", {"num_latent_steps": 0}, (0, 0, 0))).naive(0, []).logits[-1])
    for index, one in enumerate(first):
        for other in first[index + 1 :]:
            assert (one - other).abs().max() > 1e-2
    assert len({str(rows) for rows in written.values()}) == len(SCENARIOS)
