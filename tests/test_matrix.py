"""Every backbone, strategy and way of decoding against the naive decoder of `tests/naive.py`.

The table has three axes: a new backbone is one entry of `BACKBONES`, a new strategy one entry of `scenarios`, a new
way of decoding one function decorated with `behaviour`. A cell runs all scenarios of its strategy: ids must be equal,
slots in the same places, their vectors within 1e-4, and their positions equal.

The scenarios differ by row (three prompts of different length, the last one without image): in one batch a row is in a
span while another writes text, and a third has ended.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from tests.latent import ScriptProcessor, eager_assistant, latent_token_ids, tiny_pair
from tests.naive import NaiveResult, naive_generate
from tests.tiny import CHAMELEON, FAMILIES, TEXT_FAMILIES, tiny_processor, tiny_prompts

TOLERANCE = 1e-4
PER_ROW = ("max_latent_steps", "num_latent_steps")
# By which the weights are multiplied; one that multiplies the rounding of Chameleon less.
SCALE, CHAMELEON_SCALE = 6.0, 2.0
NO_HYPOTHESIS = (
    -1e6
)  # the stock beam search fills up with such scores where a script leaves fewer sequences than beams


# First axis: backbones


class Ids(NamedTuple):
    """Token ids that the scenarios are written with; they differ between vocabularies. `PLACEHOLDERS` are those that
    text may not write: without a cache they would be read as images."""

    SLOT: int
    START: int
    END: int
    EOS: int
    PAD: int
    PLACEHOLDERS: tuple[int, ...]


@dataclass(frozen=True)
class Backbone:
    """What the table needs to know of a backbone.

    Args:
        pair: (seed, latent head or `None`) -> (stock model, latent model) of equal weights.
        rows: the three prompts, each a batch of one without padding.
        ids: token ids of its vocabulary.
        naive: `(stock model, row, **options of the naive decoder)`.
    """

    pair: Callable[[int, str | None], tuple[torch.nn.Module, torch.nn.Module]]
    rows: Callable[[], list[dict[str, torch.Tensor]]]
    ids: Callable[[], Ids]
    naive: Callable[..., NaiveResult]


@cache
def chat_rows(family: str) -> list[dict[str, torch.Tensor]]:
    """Two prompts with an image and one without."""
    text_only = [{"role": "user", "content": "Which option is right? Yes, it is safe."}]
    processor, rows = tiny_processor(family), []
    for prompt in [*tiny_prompts(), text_only]:
        inputs = processor.apply_chat_template(
            [prompt], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        rows.append(dict(inputs))
    return rows


@cache
def text_rows(family: str) -> list[dict[str, torch.Tensor]]:
    """Three prompts without image, written as they are: a base model has no chat."""
    texts = ("What is it?", "Is the path safe? Answer with the option's letter.", "Which option is right? Yes, it is.")
    return [dict(tiny_processor(family)(text=text, return_tensors="pt")) for text in texts]


@cache
def chat_ids(family: str) -> Ids:
    tokenizer = tiny_processor(family).tokenizer
    placeholders = [] if family in TEXT_FAMILIES else ["<|image_pad|>", "<|video_pad|>"]
    placeholders = tokenizer.convert_tokens_to_ids(["<image>"] if family == CHAMELEON else placeholders)
    last = tokenizer.eos_token_id, tokenizer.pad_token_id
    return Ids(*latent_token_ids(family).values(), *last, tuple(placeholders))


def naive(model: torch.nn.Module, row: dict[str, torch.Tensor], **options: Any) -> NaiveResult:
    return naive_generate(model, row["input_ids"], row.get("pixel_values"), row.get("image_grid_thw"), **options)


def tiny_backbone(family: str, scale: float = SCALE) -> Backbone:
    def pair(seed: int, head: str | None) -> tuple[torch.nn.Module, torch.nn.Module]:
        return tiny_pair(seed, scale, family, head)

    rows = text_rows if family in TEXT_FAMILIES else chat_rows
    return Backbone(pair, partial(rows, family), partial(chat_ids, family), naive)


# Of the text models, one with learned positions and one with rotary ones.
BACKBONES = {family: tiny_backbone(family) for family in (*FAMILIES, "gpt2", "llama")}
BACKBONES[CHAMELEON] = tiny_backbone(CHAMELEON, CHAMELEON_SCALE)


# Second axis: strategies, each with scenarios


class Discourage(LogitsProcessor):
    """Lowers the score of the three ids before: whoever sees another id there decodes another text."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.scatter_add(1, input_ids[:, -3:], torch.full((len(scores), 3), -2.0))


class Prefer(LogitsProcessor):
    """Adds to the scores of some ids; by default so much that the id wins."""

    def __init__(self, *tokens: int, by: float = 1e4) -> None:
        self.tokens = torch.tensor(tokens, dtype=torch.long)
        self.by = by

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.index_add(1, self.tokens, torch.full((len(scores), len(self.tokens)), self.by))


class Follow(LogitsProcessor):
    """Makes one id follow another, without forbidding any."""

    def __init__(self, pairs: dict[int, int]) -> None:
        self.pairs = pairs

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        for row, last in enumerate(input_ids[:, -1].tolist()):
            if last in self.pairs:
                scores[row, self.pairs[last]] += 20.0
        return scores


@dataclass(frozen=True)
class Scenario:
    """Options of `generate` and what happens in each of the three rows.

    Args:
        name: of the test.
        options: of `generate`; the value of a per-row option may be a list of three.
        scripts: per row, step -> id that the model is made to say there.
        tails: per row, ids appended to the prompt.
        processors: logits processors for all rows.
        seed: of the model.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    scripts: tuple[dict[int, int], ...] = ({}, {}, {})
    tails: tuple[tuple[int, ...], ...] = ((), (), ())
    processors: tuple[LogitsProcessor, ...] = ()
    seed: int = 0
    max_new_tokens: int = 11


COMPILED = {
    "off": "rows end one by one",
    "fixed": "opened in the text, twice",
    "dynamic": "opens again",
    "end_vector": "opened in the text, twice",
    "mode_switch": "opens again",
}

STRATEGIES = ("off", "fixed", "dynamic")
LVR_STRATEGIES = ("end_vector", "mode_switch")
HEADS = dict.fromkeys(LVR_STRATEGIES, "simple")  # latent head of the models of a strategy
WRITES_END = ("dynamic", "mode_switch")
OPTION_NAMES = {  # of `generate`: of the naive decoder
    "latent_stop_vector": "stop_vector",
    "latent_end_threshold": "end_threshold",
    "latent_criterion": "criterion",
}


@cache
def scenarios(ids: Ids) -> dict[str, list[Scenario]]:
    """Strategy to its scenarios, written with the ids of one vocabulary."""
    SLOT, START, END, EOS, PAD, *_ = ids
    OPEN = ((START,), (START,), (START,))
    # For drafts copied from the prompt. After 50 the draft is 51 52 START, but the model says 51 60: what was decided
    # behind START is given up. After 60 the draft is 61 62 63, which is right and covers the same positions.
    DRAFT_TAIL = (50, 51, 52, START, 53, 60, 61, 62, 63, 55, 50)
    REJECTED: dict[str, Any] = {
        "tails": (DRAFT_TAIL,) * 3,
        "processors": (Follow({50: 51, 51: 60, 60: 61, 61: 62, 62: 63}), Discourage()),
    }
    # Here the draft is right and opens a span; END is followed by 50, and so on.
    ACCEPTED: dict[str, Any] = {
        "tails": (DRAFT_TAIL,) * 3,
        "processors": (Follow({50: 51, 51: 52, 52: START, START: 40, END: 50}),),
    }

    table = {
        "off": [
            Scenario("free"),
            Scenario("another model", seed=1),
            Scenario("rows end one by one", scripts=({3: EOS}, {6: EOS}, {0: PAD})),
            Scenario("a start marker is never written", processors=(Prefer(START),)),
            Scenario("a start marker in the prompt opens nothing", tails=OPEN, processors=(Discourage(),)),
            Scenario("rejected drafts", scripts=({}, {4: EOS}, {}), **REJECTED),
            Scenario("accepted drafts, but for the start marker", **ACCEPTED),
        ],
        "fixed": [
            Scenario("quota per row", {"num_latent_steps": [1, 4, 0]}, tails=OPEN),
            Scenario("forced", {"num_latent_steps": 3, "force_span": True}, seed=1, processors=(Discourage(),)),
            Scenario(
                "opened in the text, twice",
                {"num_latent_steps": [2, 1, 3]},
                scripts=({2: START, 7: START}, {0: START, 5: START}, {4: START, 8: START}),
            ),
            Scenario(
                "end marker, end of turn and start marker say nothing inside",
                {"num_latent_steps": [3, 2, 4]},
                tails=OPEN,
                scripts=({0: END, 1: EOS, 2: START, 5: EOS}, {0: EOS, 1: END, 2: END}, {0: PAD, 3: START}),
            ),
            Scenario(
                "repetition",
                {"num_latent_steps": [6, 3, 8], "repetition_exit": True, "latent_answer_ids": [40, 41, 42]},
                tails=OPEN,
                scripts=({1: 30, 2: 30, 3: 30}, {1: 30, 2: 30, 3: 30}, {1: 30, 2: 30, 3: 31, 4: 31, 5: 31}),
            ),
            Scenario("slot id is never said", {"num_latent_steps": 3}, tails=OPEN, processors=(Prefer(SLOT),)),
            Scenario("cut by the budget", {"num_latent_steps": [5, 2, 9]}, tails=OPEN, max_new_tokens=4),
            Scenario(
                "rejected drafts", {"num_latent_steps": 2}, scripts=({8: START}, {5: START}, {6: START}), **REJECTED
            ),
            Scenario("accepted drafts", {"num_latent_steps": 2}, scripts=({5: 50}, {6: 50}, {7: 60}), **ACCEPTED),
            Scenario(
                "the model opens spans",
                {"num_latent_steps": [1, 2, 3]},
                processors=(Prefer(START, by=2.5), Discourage()),
                max_new_tokens=16,
            ),
        ],
        "dynamic": [
            Scenario("cap per row", {"max_latent_steps": [1, 3, 6]}),
            Scenario("another model", {"max_latent_steps": 5}, seed=1, processors=(Discourage(),)),
            Scenario(
                "the model says end",
                {"latent_answer_ids": [40, 41]},
                scripts=({1: END}, {4: END, 8: EOS}, {2: END, 3: EOS}),
            ),
            Scenario("answer ids after the cap", {"max_latent_steps": [1, 2, 4], "latent_answer_ids": [40, 41, 42]}),
            Scenario(
                "says end at the cap",
                {"max_latent_steps": [2, 3, 2], "latent_answer_ids": 40},
                scripts=({3: END}, {3: END}, {4: END}),
            ),
            Scenario(
                "opens again",
                {"max_latent_steps": [3, 2, 4]},
                scripts=(
                    {1: END, 3: START, 5: END},
                    {2: END, 3: START, 9: START},
                    {3: START, 4: END, 5: START, 6: END},
                ),
            ),
            Scenario(
                "not forced",
                {"max_latent_steps": 3, "force_span": False},
                tails=((), (), (START,)),
                scripts=({2: START}, {}, {}),
            ),
            Scenario("forced on an open prompt", {"max_latent_steps": [1, 2, 3]}, tails=OPEN),
            Scenario(
                "repetition",
                {"max_latent_steps": 9, "repetition_exit": True, "latent_answer_ids": [40, 41]},
                scripts=({2: 30, 3: 30, 4: 30}, {1: START, 2: START}, {3: 31, 4: 31, 5: 31}),
            ),
            Scenario(
                "end of turn inside a span, then outside",
                {"max_latent_steps": [2, 6, 4]},
                scripts=({1: EOS, 2: PAD, 4: EOS}, {3: EOS}, {2: EOS, 6: EOS}),
            ),
            Scenario(
                "answer ids that open a span and end the turn",
                {"max_latent_steps": [1, 2, 5], "latent_answer_ids": [40, START, 41, END, EOS]},
                max_new_tokens=14,
            ),
            Scenario("slot id is never said", {"max_latent_steps": 3}, processors=(Prefer(SLOT),)),
            Scenario("cut by the budget", {"max_latent_steps": [2, 9, 3]}, max_new_tokens=4),
            Scenario(
                "rejected drafts",
                {"force_span": False, "max_latent_steps": 2},
                scripts=({8: START}, {5: START}, {6: START}),
                **REJECTED,
            ),
            Scenario("accepted drafts", {"force_span": False, "max_latent_steps": [1, 2, 3]}, **ACCEPTED),
            Scenario(
                "the model opens and closes spans",
                {"force_span": False, "max_latent_steps": [4, 3, 5], "latent_answer_ids": [40]},
                processors=(Prefer(START, by=2.5), Prefer(END, by=2.0), Discourage()),
                max_new_tokens=16,
            ),
        ],
        "end_vector": [
            Scenario("slots come near one by one", near(0.13, "mse", 9), tails=OPEN, processors=(Discourage(),)),
            Scenario("mean difference, one row to the cap", near(0.265, "mae", 6), tails=OPEN, seed=1),
            Scenario("angle, cap per row", near(0.87, "cosine", [2, 5, 3]), tails=OPEN, seed=1),
            Scenario("forced", {**near(0.13, "mse", 4), "force_span": True}, processors=(Discourage(),)),
            Scenario(
                "opened in the text, twice",
                near(0.13, "mse", [2, 6, 1]),
                scripts=({2: START, 7: START}, {0: START, 5: START}, {4: START, 8: START}),
            ),
            Scenario("whatever the distance, one slot is fed", near(1e6, "mse", 5), tails=OPEN),
            Scenario(
                "answer ids after the cap, not after a near one",
                {**near(0.13, "mse", [3, 2, 4]), "latent_answer_ids": [40, 41, 42]},
                tails=OPEN,
            ),
            Scenario(
                "end marker, end of turn and start marker say nothing inside",
                near(0.0, "mse", [3, 2, 4]),
                tails=OPEN,
                scripts=({0: END, 1: EOS, 2: START, 5: EOS}, {0: EOS, 1: END, 2: END}, {0: PAD, 3: START}),
            ),
            Scenario("cut by the budget", near(0.1, "mse", 9), tails=OPEN, max_new_tokens=4),
            Scenario("rejected drafts", near(0.0, "mse", 2), scripts=({8: START}, {5: START}, {6: START}), **REJECTED),
            Scenario("accepted drafts", near(0.13, "mse", 2), scripts=({5: 50}, {6: 50}, {7: 60}), **ACCEPTED),
        ],
    }
    # The rules of `dynamic` for a model with a head, but no span is forced unless asked for.
    forced = [replace(one, options={"force_span": True, **one.options}) for one in table["dynamic"]]
    opened = Scenario("opened by the prompt", {"max_latent_steps": [1, 3, 6]}, scripts=({}, {1: END}, {}), tails=OPEN)
    return {**table, "mode_switch": [opened, *forced]}


def near(threshold: float, criterion: str, cap: int | list[int]) -> dict[str, Any]:
    """Options of `end_vector` with a vector of about the length of the slots; the tiny models need no training."""
    vector = 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    return {
        "latent_stop_vector": vector,
        "latent_end_threshold": threshold,
        "latent_criterion": criterion,
        "max_latent_steps": cap,
    }


# A cell


@dataclass(frozen=True)
class Cell:
    """One scenario on one backbone."""

    backbone: str
    strategy: str
    scenario: Scenario

    @property
    def stock(self) -> torch.nn.Module:
        return BACKBONES[self.backbone].pair(self.scenario.seed, HEADS.get(self.strategy))[0]

    @property
    def model(self) -> torch.nn.Module:
        return BACKBONES[self.backbone].pair(self.scenario.seed, HEADS.get(self.strategy))[1]

    @property
    def ids(self) -> Ids:
        return BACKBONES[self.backbone].ids()

    @property
    def processors(self) -> list[LogitsProcessor]:
        """Those of the scenario, and one that writes no placeholder."""
        return [*self.scenario.processors, Prefer(*self.ids.PLACEHOLDERS, by=-1e4)]

    def process(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The scores after all processors."""
        for processor in self.processors:
            scores = processor(input_ids, scores)
        return scores

    def row(self, index: int) -> dict[str, torch.Tensor]:
        """The prompt of one row with its tail, `[1, length]`."""
        row = dict(BACKBONES[self.backbone].rows()[index])
        tail = torch.tensor([self.scenario.tails[index]], dtype=torch.long)
        for name, value in (("input_ids", None), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in row:
                extra = tail if value is None else torch.full_like(tail, value)
                row[name] = torch.cat([row[name], extra.to(row[name])], dim=1)
        return row

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Some rows, padded on the left."""
        return left_pad([self.row(index) for index in rows], self.ids.PAD)

    def naive_options(self, index: int) -> dict[str, Any]:
        """The options of one row in the words of the naive decoder."""
        ids = self.ids
        options = {"start_id": ids.START, "slot_id": ids.SLOT, "end_id": ids.END, "eos_ids": [ids.EOS, ids.PAD]}
        options["strategy"] = self.strategy
        for name, value in self.scenario.options.items():
            value = value[index] if name in PER_ROW and isinstance(value, list) else value
            if name == "latent_answer_ids":
                name, value = "answer_ids", [value] if isinstance(value, int) else value
            options[OPTION_NAMES.get(name, name)] = value
        options["head"] = self.model.latent_head
        return {**options, "max_new_tokens": self.scenario.max_new_tokens, "process_scores": self.process}

    def expected(self, index: int, script: dict[int, int] | None = None) -> NaiveResult:
        """What the naive decoder does with a row, with its script or another one."""
        script = self.scenario.scripts[index] if script is None else script
        return _expected(self.backbone, self.strategy, self.scenario.name, index, tuple(sorted(script.items())))

    def generate(self, rows: list[int], model: torch.nn.Module | None = None, **options: Any) -> Any:
        """`generate` on some rows with the script and the processor of the scenario."""
        inputs = self.batch(rows)
        scripts = [self.scenario.scripts[index] for index in rows]
        script = ScriptProcessor(scripts, inputs["input_ids"].shape[1])
        processors = LogitsProcessorList([*self.processors, script])
        latent = {}
        if model is None:
            latent = {"latent_strategy": self.strategy, **self.scenario.options}
            for name in PER_ROW:
                if isinstance(latent.get(name), list):
                    latent[name] = [latent[name][index] for index in rows]
        settings = {"do_sample": False, "max_new_tokens": self.scenario.max_new_tokens, **latent, **options}
        return (model or self.model).generate(
            **inputs, logits_processor=processors, return_dict_in_generate=True, **settings
        )


@cache
def _expected(backbone: str, strategy: str, scenario: str, index: int, script: tuple) -> NaiveResult:
    cell = next(cell for cell in cells(backbone, strategy) if cell.scenario.name == scenario)
    options = cell.naive_options(index)
    return BACKBONES[backbone].naive(cell.stock, cell.row(index), script=dict(script), **options)


def cells(backbone: str, strategy: str) -> Iterator[Cell]:
    for scenario in scenarios(BACKBONES[backbone].ids())[strategy]:
        yield Cell(backbone, strategy, scenario)


def left_pad(rows: list[dict[str, torch.Tensor]], pad_id: int) -> dict[str, torch.Tensor]:
    length = max(row["input_ids"].shape[1] for row in rows)
    batch: dict[str, list[torch.Tensor]] = {}
    for row in rows:
        for name, value in row.items():
            if value.shape == row["input_ids"].shape:
                fill = pad_id if name == "input_ids" else 0
                value = torch.nn.functional.pad(value, (length - value.shape[1], 0), value=fill)
            batch.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in batch.items()}


def assert_same(cell: Cell, output: Any, number: int, expected: NaiveResult) -> None:
    """Row `number` of an output is what the naive decoder did."""
    trace, name = output.latent_trace, f"{cell.scenario.name}, row {number}"
    start, length = trace.prompt_length, len(expected.ids)
    new = output.sequences[number, start:].tolist()
    assert new[:length] == expected.ids, name
    assert set(new[length:]) <= {cell.ids.PAD}, name
    assert trace.latent_mask[number, start:].tolist() == expected.is_latent + [False] * (len(new) - length), name
    assert not trace.latent_mask[number, :start].any(), name
    if trace.position_ids is not None:
        positions = trace.position_ids if trace.position_ids.dim() == 3 else trace.position_ids[None]
        positions = positions[-3:, number, start : start + length - 1].T
        assert positions.tolist() == [position.tolist() for position in expected.positions], name
    steps = [step for step, is_latent in enumerate(expected.is_latent) if is_latent]
    dense = {
        key: trace.dense(key)[number, start:] for key in ("slot_inputs", "slot_outputs", "readable_ids", "has_output")
    }
    assert dense["readable_ids"][steps].tolist() == expected.said, name
    for vector, step in zip(expected.slot_inputs, steps, strict=True):
        torch.testing.assert_close(
            dense["slot_inputs"][step], vector, atol=TOLERANCE, rtol=0, msg=f"{name}, step {step}"
        )
        assert bool(dense["has_output"][step]) == (step + 1 < length), name
        if step + 1 < length:
            torch.testing.assert_close(dense["slot_outputs"][step], expected.hidden[step + 1], atol=TOLERANCE, rtol=0)


# Third axis: ways of decoding

BEHAVIOURS: dict[str, Callable[[str, str], None]] = {}


def behaviour(function: Callable[[str, str], None]) -> Callable[[str, str], None]:
    BEHAVIOURS[function.__name__] = function
    return function


def alone(backbone: str, strategy: str, **options: Any) -> None:
    for cell in cells(backbone, strategy):
        for index in range(3):
            assert_same(cell, cell.generate([index], **options), 0, cell.expected(index))


def together(backbone: str, strategy: str, **options: Any) -> None:
    for cell in cells(backbone, strategy):
        output = cell.generate([0, 1, 2], **options)
        for index in range(3):
            assert_same(cell, output, index, cell.expected(index))


@behaviour
def greedy(backbone: str, strategy: str) -> None:
    alone(backbone, strategy)


@behaviour
def batch(backbone: str, strategy: str) -> None:
    together(backbone, strategy)


@behaviour
def static_cache(backbone: str, strategy: str) -> None:
    together(backbone, strategy, cache_implementation="static")


@behaviour
def no_cache(backbone: str, strategy: str) -> None:
    together(backbone, strategy, use_cache=False)


@behaviour
def chunked_prefill(backbone: str, strategy: str) -> None:
    together(backbone, strategy, prefill_chunk_size=7)


@behaviour
def streamer(backbone: str, strategy: str) -> None:
    """What is streamed is what is returned, prompt first."""

    class Keep(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.ids.extend(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    for cell in cells(backbone, strategy):
        for index in (0, 2):
            keep = Keep()
            output = cell.generate([index], streamer=keep)
            assert_same(cell, output, 0, cell.expected(index))
            assert keep.ended and keep.ids == output.sequences[0].tolist()


@behaviour
def prompt_lookup(backbone: str, strategy: str) -> None:
    """Drafts copied from the text so far; at least some of them are accepted."""
    saved = 0
    for cell in cells(backbone, strategy):
        for index in range(3):
            with counted_forwards(cell.model) as calls:
                output = cell.generate([index], prompt_lookup_num_tokens=3)
            assert_same(cell, output, 0, cell.expected(index))
            saved += len(cell.expected(index).ids) - len(calls)
    assert saved >= 10, "hardly any draft was accepted: this cell tests nothing"


@behaviour
def assistant_model(backbone: str, strategy: str) -> None:
    """Drafts of the stock model of the same weights, and of another one that disagrees."""
    saved = 0
    for cell in cells(backbone, strategy):
        for index, seed in enumerate((cell.scenario.seed, 2, cell.scenario.seed)):
            assistant = eager_assistant(BACKBONES[backbone].pair(seed, None)[0])
            with counted_forwards(cell.model) as calls:
                output = cell.generate([index], assistant_model=assistant)
            assert_same(cell, output, 0, cell.expected(index))
            saved += len(cell.expected(index).ids) - len(calls)
    assert saved >= 10, "hardly any draft was accepted: this cell tests nothing"


class counted_forwards:
    """Context that collects one entry for each forward of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __enter__(self) -> list[int]:
        calls: list[int] = []
        self.handle = self.model.register_forward_hook(lambda *_: calls.append(1))
        return calls

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def script_of(output: Any, number: int, length: int) -> dict[int, int]:
    """What the model said at each of the `length` steps of a returned row: the id, or what a slot would have said."""
    start = output.latent_trace.prompt_length
    said = output.latent_trace.readable_sequences[number, start : start + length].tolist()
    return dict(enumerate(said))


def generated_length(row: list[int], ids: Ids) -> int:
    """Up to the first end of turn."""
    return next((step + 1 for step, token in enumerate(row) if token in (ids.EOS, ids.PAD)), len(row))


@behaviour
def sampling(backbone: str, strategy: str) -> None:
    """The naive decoder, made to say what was sampled, does the same; `off` draws what the stock class draws."""
    warpers: list[dict[str, Any]] = [{"temperature": 1.5, "top_k": 0}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}]
    for seed, cell in enumerate(cells(backbone, strategy)):
        warper = warpers[seed % 2]
        torch.manual_seed(seed)
        output = cell.generate([0, 1, 2], do_sample=True, **warper)
        for index in range(3):
            generated = output.sequences[index, output.latent_trace.prompt_length :].tolist()
            length = generated_length(generated, cell.ids)
            assert_same(cell, output, index, cell.expected(index, script_of(output, index, length)))
        if strategy == "off":
            torch.manual_seed(seed)
            banned = {"suppress_tokens": [cell.ids.SLOT, cell.ids.START]}
            stock = cell.generate([0, 1, 2], cell.stock, do_sample=True, **banned, **warper)
            assert output.sequences.tolist() == stock.sequences.tolist(), cell.scenario.name


def beam_search(backbone: str, strategy: str, beams: int) -> None:
    """Scores are those of a teacher-forced replay, forced ids free of charge; a row alone is that of the batch."""
    for turn, cell in enumerate(cells(backbone, strategy)):
        options = {"num_beams": beams, "num_return_sequences": 2, "output_scores": True}
        output = cell.generate([0, 1, 2], **options)
        scores = [assert_replayed(cell, output, number, number // 2) for number in range(6)]
        index = (turn + beams) % 3  # each scenario has its turn with one row, another one for each number of beams
        single = cell.generate([index], **options)
        for beam, score in enumerate(scores[2 * index : 2 * index + 2]):
            assert single.sequences_scores[beam].item() == pytest.approx(score, abs=1e-5, rel=1e-6)
            if score > NO_HYPOTHESIS:
                assert written(single, beam) == written(output, 2 * index + beam), f"{cell.scenario.name}, row {index}"
        if strategy == "off":
            stock = cell.generate([0, 1, 2], cell.stock, suppress_tokens=[cell.ids.SLOT, cell.ids.START], **options)
            assert output.sequences.tolist() == stock.sequences.tolist(), cell.scenario.name
            torch.testing.assert_close(output.sequences_scores, stock.sequences_scores)


def written(output: Any, number: int) -> list[int]:
    """The ids of a returned beam without what fills it up."""
    start, length = output.latent_trace.prompt_length, int((output.beam_indices[number] >= 0).sum())
    return output.sequences[number, start : start + length].tolist()


def assert_replayed(cell: Cell, output: Any, number: int, index: int) -> float:
    """A returned beam obeys the rules of its strategy and has the score that its ids deserve; returns the score."""
    score = output.sequences_scores[number].item()
    if score < NO_HYPOTHESIS:
        return score
    length = len(written(output, number))
    script = script_of(output, number, length)
    expected = cell.expected(index, script)
    assert_same(cell, output, number, expected)
    free, words = free_steps(cell, output, number, index)
    total = 0.0
    for step, (token, logits) in enumerate(zip(expected.ids, expected.logits, strict=True)):
        scores = logits.float().log_softmax(-1)
        ids = torch.cat([cell.row(index)["input_ids"], torch.tensor([expected.ids[:step]], dtype=torch.long)], dim=1)
        scores = cell.process(ids, scores[None])[0]
        if step in free:
            total += float(scores[token])
        elif step in words and step not in cell.scenario.scripts[index]:
            scores[cell.ids.SLOT] = -float("inf")
            assert script[step] == int(scores.argmax()), f"{cell.scenario.name}: a span goes by the best id"
    assert score == pytest.approx(total / length, abs=1e-5), cell.scenario.name
    return score


def free_steps(cell: Cell, output: Any, number: int, index: int) -> tuple[set[int], set[int]]:
    """Steps whose id the model chose, and steps whose word it chose (slots and the end marker too)."""
    trace, options = output.latent_trace, cell.naive_options(index)
    forced_ids, forced_words = set(), set()
    if options.get("force_span", cell.strategy == "dynamic") and cell.strategy != "off":
        forced_words.add(0)
    for span in trace.spans:
        if span.row == number:
            first, stop = span.first - trace.prompt_length, span.first + span.length - trace.prompt_length
            forced_ids.update(range(first, stop))
            if cell.strategy in WRITES_END and span.reason != "open":
                forced_ids.add(stop)
                forced_words.update([stop] if span.reason != "end_token" else [])
            if span.reason in ("repetition", "max_latent_steps"):
                forced_words.update(range(stop + 1, stop + 1 + len(options.get("answer_ids") or [])))
    steps = set(range(cell.scenario.max_new_tokens))
    return steps - forced_ids - forced_words, steps - forced_words


@behaviour
def beams_2(backbone: str, strategy: str) -> None:
    beam_search(backbone, strategy, 2)


@behaviour
def beams_4(backbone: str, strategy: str) -> None:
    beam_search(backbone, strategy, 4)


def compiled_decode(backbone: str, strategy: str, backend: str) -> None:
    """The decode step is one graph, compiled once for the whole call, and the batch is decoded as ever."""
    cell = next(cell for cell in cells(backbone, strategy) if cell.scenario.name == COMPILED[strategy])
    config = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend=backend)
    config._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        output = cell.generate([0, 1, 2], cache_implementation="static", compile_config=config)
    torch._dynamo.reset()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for index in range(3):
        assert_same(cell, output, index, cell.expected(index))


@behaviour
def traced_decode(backbone: str, strategy: str) -> None:
    """`torch.compile` without a C++ compiler: what is captured is run as it is."""
    compiled_decode(backbone, strategy, "eager")


# Rows of a family: the strategies of LVR differ from the others around the layers only, so one family with images has
# them, and one without.
CELLS = [(backbone, strategy) for backbone in BACKBONES for strategy in STRATEGIES]
CELLS += [(backbone, strategy) for backbone in ("qwen2_5_vl", "gpt2") for strategy in LVR_STRATEGIES]


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize(("backbone", "strategy"), CELLS)
def test_cell(backbone: str, strategy: str, behaviour: str) -> None:
    BEHAVIOURS[behaviour](backbone, strategy)


# Families differ inside the layers, strategies around them: all strategies on one family, one strategy on the others.
COMPILED_CELLS = [("qwen2_5_vl", strategy) for strategy in STRATEGIES + LVR_STRATEGIES] + [
    (backbone, "dynamic") for backbone in BACKBONES if backbone != "qwen2_5_vl"
]


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize(("backbone", "strategy"), COMPILED_CELLS)
def test_compiled_decode(backbone: str, strategy: str) -> None:
    compiled_decode(backbone, strategy, "inductor")
