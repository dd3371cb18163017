"""`generate` with latents: what is refused, budgets, where options come from, prompt slots, noise, hooks, extensions.

That every way of decoding gives the right ids is shown in `tests/test_matrix.py`.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from modeling_latent import (
    LATENT_HEADS,
    LATENT_OPTIONS,
    LATENT_STRATEGIES,
    STOP_RULES,
    LatentOption,
    LatentQwen2_5_VLForConditionalGeneration,
    LatentStep,
    LatentStrategy,
    register_latent_head,
    register_latent_option,
    register_latent_strategy,
    register_stop_rule,
    saved_generation_config,
)
from modeling_latent.generation_latent import LatentLogitsProcessorList
from modeling_latent.latent_strategies import int_from, number_from
from tests.latent import ScriptProcessor, eager_assistant, latent_token_ids, liven, tiny_latent_model
from tests.naive import NaiveResult, naive_generate
from tests.tiny import tiny_processor, tiny_stock_model

SLOT, START, END = latent_token_ids().values()
EOS, PAD = tiny_processor().tokenizer.eos_token_id, tiny_processor().tokenizer.pad_token_id
HIDDEN = 64


@pytest.fixture(scope="module")
def text() -> dict[str, torch.Tensor]:
    """One row of text."""
    processor = tiny_processor()
    chat = [{"role": "user", "content": "Which option is right?"}]
    return dict(
        processor.apply_chat_template(
            [chat], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
    )


@pytest.fixture
def tables() -> Iterator[None]:
    """What a test registers is gone afterwards."""
    before = [dict(table) for table in (LATENT_STRATEGIES, STOP_RULES, LATENT_OPTIONS, LATENT_HEADS)]
    yield
    for table, kept in zip((LATENT_STRATEGIES, STOP_RULES, LATENT_OPTIONS, LATENT_HEADS), before, strict=True):
        table.clear()
        table.update(kept)


def decode(model: torch.nn.Module, inputs: dict[str, torch.Tensor], scripts: Any = None, **options: Any) -> Any:
    settings = {"max_new_tokens": 12, "do_sample": False, "latent_strategy": "dynamic", **options}
    processors = LogitsProcessorList([ScriptProcessor(scripts, inputs["input_ids"].shape[1])] if scripts else [])
    return model.generate(**inputs, return_dict_in_generate=True, logits_processor=processors, **settings)


def new_ids(output: Any) -> list[list[int]]:
    return output.sequences[:, output.latent_trace.prompt_length :].tolist()


def naive(stock: torch.nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> NaiveResult:
    """The naive decoder on one row of text."""
    settings = {"strategy": "dynamic", "eos_ids": [EOS, PAD], "max_new_tokens": 12, **options}
    return naive_generate(stock, inputs["input_ids"], None, None, start_id=START, slot_id=SLOT, end_id=END, **settings)


# What is refused

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"latent_strategy": "greedy"}, r"latent_strategy='greedy' is unknown; choose one of \['dynamic', "),
    ({"max_latent_steps": 0}, r"max_latent_steps=0 must be at least 1 .* least cap is 1; use latent_strategy='off'"),
    ({"max_latent_steps": [2, 0]}, r"max_latent_steps=\[2, 0\] must be at least 1"),
    ({"max_latent_steps": -3}, "max_latent_steps=-3 must be at least 1"),
    ({"max_latent_steps": 2.5}, r"max_latent_steps=2.5 must be at least 1 \(int, or one int per prompt\)"),
    ({"max_latent_steps": True}, "max_latent_steps=True must be at least 1"),
    ({"max_latent_steps": []}, r"max_latent_steps=\[\] must be at least 1"),
    ({"max_latent_steps": [1, 2, 3]}, "max_latent_steps has 3 entries for 2 prompts; give one, or one per prompt"),
    ({"num_latent_steps": 2}, r"'dynamic' does not read \['num_latent_steps'\]; its options are .*max_latent_steps"),
    ({"latent_strategy": "off", "force_span": True}, r"'off' does not read \['force_span'\]; its options are \[\]"),
    ({"latent_strategy": "fixed"}, "latent_strategy='fixed' needs num_latent_steps; pass num_latent_steps=..."),
    ({"latent_strategy": "fixed", "num_latent_steps": -1}, "num_latent_steps=-1 must be at least 0"),
    ({"latent_strategy": "steps", "num_latent_steps": [1, 2, 3]}, "num_latent_steps has 3 entries for 2 prompts"),
    ({"latent_strategy": "fixed", "num_latent_steps": 1, "max_latent_steps": 2}, r"not read \['max_latent_steps'\]"),
    ({"force_span": "yes"}, "force_span='yes' must be True or False"),
    ({"repetition_exit": 1}, "repetition_exit=1 must be True or False"),
    ({"latent_noise": -0.1}, "latent_noise=-0.1 must be a number of at least 0"),
    ({"latent_answer_ids": "A"}, "latent_answer_ids='A' must be a token id or a list of token ids"),
    ({"latent_answer_ids": [3, -1]}, r"latent_answer_ids=\[3, -1\] must be a token id or a list of token ids"),
    ({"latent_topk": -1}, "latent_topk=-1 must be at least 0"),
    ({"latent_ids": "words"}, r"latent_ids='words' is unknown; choose one of \['placeholder', 'readable'\]"),
    ({"latent_budget": "loose"}, r"latent_budget='loose' is unknown; choose one of \['strict', 'reference'\]"),
    ({"latent_hook": 3}, "latent_hook=3 must be a callable"),
    ({"latent_ids": "readable", "num_beams": 2}, "latent_ids='readable' works with greedy decoding and sampling only"),
    ({"latent_budget": "reference", "num_beams": 2}, "latent_budget='reference' works with .* only; drop num_beams"),
    ({"num_beams": 2, "use_cache": False}, "beam search over latents needs the cache; drop use_cache=False"),
    (
        {"latent_budget": "reference", "cache_implementation": "static"},
        "latent_budget='reference' may run past max_new_tokens, which cache_implementation='static' has no room for",
    ),
    ({"assistant_early_exit": 1}, "assistant_early_exit cannot draft over latents; use prompt lookup or an assistant"),
    ({"cache_implementation": "paged"}, r"continuous batching .* cannot feed latents.*padded batch, or load the"),
    ({"max_latent_step": 3}, r"not used by the model: \['max_latent_step'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_refused(model: torch.nn.Module, inputs: dict[str, torch.Tensor], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(model, inputs, **options)
    assert new_ids(decode(model, inputs, latent_strategy="off", max_new_tokens=1)), "nothing is left behind"


@pytest.mark.parametrize("options", [{"latent_ids": "readable"}, {"latent_budget": "reference"}])
@pytest.mark.parametrize("mode", ["prompt lookup", "assistant"])
def test_reference_modes_refuse_assisted_decoding(
    model: torch.nn.Module, stock: torch.nn.Module, text: dict[str, torch.Tensor], options: dict, mode: str
) -> None:
    assisted = {"prompt_lookup_num_tokens": 2} if mode == "prompt lookup" else {"assistant_model": stock}
    with pytest.raises(ValueError, match="drop assistant_model and prompt_lookup_num_tokens, or latent_"):
        decode(model, text, max_new_tokens=4, max_latent_steps=8, **options, **assisted)


@pytest.mark.parametrize("call", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused(model: torch.nn.Module, call: str) -> None:
    with pytest.raises(ValueError, match=r"continuous batching .* Call generate\(\) with a padded batch"):
        getattr(model, call)(*([[[5, 6, 7]]] if call == "generate_batch" else []))


def test_a_model_without_latent_tokens(inputs: dict[str, torch.Tensor], stock: torch.nn.Module) -> None:
    """Decodes like the stock model and says what is missing when asked for more."""
    empty = dict.fromkeys(latent_token_ids())
    model = liven(tiny_latent_model(0, **empty), 6.0)
    ours = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert ours.tolist() == stock.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()
    with pytest.raises(ValueError, match=r"has no latent tokens \(latent_token_id, .* `convert_stock_checkpoint\("):
        decode(model, inputs)
    partly = tiny_latent_model(0, latent_end_token_id=None)
    with pytest.raises(ValueError, match=r"has no latent tokens \(latent_end_token_id is None"):
        decode(partly, inputs)
    assert decode(partly, inputs, latent_strategy="off").sequences.shape[0] == 2


def test_embeddings_without_ids(model: torch.nn.Module, stock: torch.nn.Module) -> None:
    embeds = model.get_input_embeddings()(torch.tensor([[5, 6, 7]])).detach()
    ours, theirs = (m.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False) for m in (model, stock))
    assert ours.tolist() == theirs.tolist()
    with pytest.raises(
        ValueError, match="latent_strategy='dynamic' needs input_ids, in which the latents are recorded"
    ):
        model.generate(inputs_embeds=embeds, max_new_tokens=5, latent_strategy="dynamic")


def test_train_mode_with_activation_checkpointing_is_refused(inputs: dict[str, torch.Tensor]) -> None:
    """There the layers drop the cache and go on with one token a step: another text, without an error."""
    model = tiny_latent_model(0)
    expected = new_ids(decode(model, inputs))
    model.activation_checkpointing_enable()
    assert new_ids(decode(model, inputs)) == expected
    model.train()
    with pytest.raises(ValueError, match=r"train mode with activation checkpointing, .* call model.eval\(\) first"):
        decode(model, inputs)
    model.activation_checkpointing_disable()
    assert new_ids(decode(model, inputs)) == expected


# Budgets and endings


def test_strict_never_overruns(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    for budget in (1, 2, 5):
        for options in (
            {"max_latent_steps": 8},
            {"latent_strategy": "fixed", "num_latent_steps": 8, "force_span": True},
        ):
            output = decode(model, inputs, max_new_tokens=budget, **options)
            assert new_ids(output) == [[START, *[SLOT] * (budget - 1)]] * 2
    assert all(len(row) == 5 for row in new_ids(decode(model, inputs, max_new_tokens=5, latent_ids="readable")))


def test_reference_budget_runs_to_the_end_of_the_span(
    model: torch.nn.Module, stock: torch.nn.Module, text: dict[str, torch.Tensor]
) -> None:
    options = {"max_latent_steps": 8, "latent_budget": "reference", "max_new_tokens": 4}
    output = decode(model, text, **options)
    assert new_ids(output) == [[START, *[SLOT] * 8, END]] == [naive(stock, text, **options).ids]


@pytest.mark.parametrize("script", [{}, {2: EOS, 3: PAD, 6: EOS}])
def test_readable_ids(
    model: torch.nn.Module, stock: torch.nn.Module, text: dict[str, torch.Tensor], script: dict[int, int]
) -> None:
    """Slots carry what they say, an end of turn in a slot ends nothing, and the trace still knows the slots."""
    expected = naive(stock, text, latent_ids="readable", max_latent_steps=4, script=script)
    output = decode(model, text, [script], latent_ids="readable", max_latent_steps=4)
    assert new_ids(output) == [expected.ids] and SLOT not in expected.ids
    assert output.latent_trace.latent_mask[0, -len(expected.ids) :].tolist() == expected.is_latent
    assert torch.equal(output.latent_trace.readable_sequences, output.sequences)


class StopRows(StoppingCriteria):
    """Ends given rows when the sequence has a given length."""

    def __init__(self, rows: list[bool], length: int) -> None:
        self.rows, self.length = torch.tensor(rows), length

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return self.rows & (input_ids.shape[1] >= self.length)


def test_a_row_that_ends_inside_a_span_leaves_it(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """A stopping rule of the caller ends row 0 after two slots: padding follows, which is no slot."""
    length = inputs["input_ids"].shape[1]
    criteria = StoppingCriteriaList([StopRows([True, False], length + 3)])
    output = decode(model, inputs, max_latent_steps=5, stopping_criteria=criteria)
    trace = output.latent_trace
    assert new_ids(output)[0] == [START, SLOT, SLOT, *[PAD] * 9]
    assert trace.num_latent_steps.tolist() == [2, 5]
    assert [(span.row, span.length, span.reason) for span in trace.spans][:2] == [
        (0, 2, "open"),
        (1, 5, "max_latent_steps"),
    ]
    alone = decode(model, inputs, max_latent_steps=5)
    assert new_ids(output)[1] == new_ids(alone)[1]


def test_padding_with_the_start_marker_opens_nothing(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """A row that ended is filled with the padding id; where that is the start marker, no span opens."""
    options = {"pad_token_id": START, "eos_token_id": EOS, "force_span": False, "max_latent_steps": 2}
    output = decode(model, inputs, [{1: EOS}, {}], **options)
    assert new_ids(output)[0][1:] == [EOS, *[START] * 10]
    assert output.latent_trace.num_latent_steps.tolist()[0] == 0


class Prefer(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.index_fill(1, torch.tensor([self.token]), 50.0)


@pytest.mark.parametrize("warper", [{"top_k": 1}, {"top_p": 0.5, "top_k": 0}, {"temperature": 1e-3, "top_k": 3}])
@pytest.mark.parametrize(("strategy", "token"), [("off", START), ("off", SLOT), ("dynamic", SLOT)])
def test_banned_ids_with_narrow_sampling(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], strategy: str, token: int, warper: dict[str, Any]
) -> None:
    """Top-k and top-p choose among the ids that may be written: else nothing would be left of a sure start marker."""
    processors = LogitsProcessorList([Prefer(token)])
    output = model.generate(
        **inputs, latent_strategy=strategy, do_sample=True, max_new_tokens=6, logits_processor=processors,
        return_dict_in_generate=True, **warper
    )  # fmt: skip
    trace = output.latent_trace
    written = trace.sequences[:, trace.prompt_length :][~trace.latent_mask[:, trace.prompt_length :]]
    assert token not in written.tolist()
    assert SLOT not in trace.readable_ids.tolist()
    assert strategy == "dynamic" or trace.num_slots == 0


def test_off_is_the_stock_model_with_two_ids_less(
    model: torch.nn.Module, stock: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> None:
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 5}, {"num_beams": 3, "do_sample": True}):
        torch.manual_seed(5)
        ours = model.generate(**inputs, max_new_tokens=8, latent_strategy="off", **options)
        torch.manual_seed(5)
        theirs = stock.generate(**inputs, max_new_tokens=8, suppress_tokens=[SLOT, START], **options)
        assert ours.tolist() == theirs.tolist(), options


def test_text_is_drawn_as_by_the_stock_model(
    model: torch.nn.Module, stock: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> None:
    """Outside spans no random number is drawn for latents: with one seed, the stock model writes the same text."""
    options = {"do_sample": True, "top_k": 0, "temperature": 2.0, "max_new_tokens": 8}
    torch.manual_seed(5)
    ours = model.generate(**inputs, latent_strategy="dynamic", force_span=False, suppress_tokens=[START], **options)
    torch.manual_seed(5)
    theirs = stock.generate(**inputs, suppress_tokens=[SLOT, START], **options)
    assert ours.tolist() == theirs.tolist()


class SeenOps(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations_of_a_step(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> Counter[str]:
    """Operations of one decode step: what 12 new ids take more than 8, over 4."""
    seen = []
    for length in (8, 12):
        with SeenOps() as ops:
            model.generate(**inputs, do_sample=False, max_new_tokens=length, min_new_tokens=length, **options)
        seen.append(ops.counts)
    return Counter({name: (count - seen[0][name]) / 4 for name, count in seen[1].items()})


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({"latent_strategy": "off"}, 6),
        ({"latent_strategy": "dynamic", "force_span": False, "suppress_tokens": [START]}, 12),
        ({"latent_strategy": "fixed", "num_latent_steps": [1, 2], "force_span": True}, 12),  # text again after 3 steps
        ({"latent_strategy": "dynamic", "max_latent_steps": 40, "force_span": True, "suppress_tokens": [END]}, 45),
        ({"latent_strategy": "fixed", "num_latent_steps": 40, "force_span": True}, 45),
    ],
)
def test_what_a_step_costs(
    model: torch.nn.Module,
    stock: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    options: dict[str, Any],
    budget: int,
) -> None:
    """A step reads one value from the device more than the stock loop, at most, and adds few operations."""
    suppressed = {name: options[name] for name in ("suppress_tokens",) if name in options}
    ours = operations_of_a_step(model, inputs, **options)
    theirs = operations_of_a_step(stock, inputs, **suppressed)
    reads = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "bincount")
    assert 0 <= sum(ours[name] - theirs[name] for name in reads) <= 1
    assert ours["_local_scalar_dense"] > 0  # what is counted is named so: the stock loop reads whether all rows ended
    assert 0 < ours.total() - theirs.total() <= budget


def test_processors_with_further_arguments(model: torch.nn.Module, text: dict[str, torch.Tensor]) -> None:
    """As in the stock list: one that needs more than ids and scores is refused when that is not passed."""

    class Needy(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
            return scores + cond

    with pytest.raises(ValueError, match="required parameters: .*'cond'"):
        model.generate(**text, max_new_tokens=2, logits_processor=LogitsProcessorList([Needy()]))
    processors = LatentLogitsProcessorList(LogitsProcessorList([Prefer(7)]))
    ids, scores = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 9)
    assert processors(ids, scores).argmax() == 7
    processors.append(Needy())  # seen although it came later
    assert processors(ids, scores, cond=100 * torch.eye(9)[4]).argmax() == 4


def test_a_model_is_custom_code_outside_of_generate(model: torch.nn.Module, text: dict[str, torch.Tensor]) -> None:
    """`generate` must not look at the signature of `forward` each step; saving must still write the code."""
    seen = []

    def hook(step: LatentStep) -> None:
        seen.append(model.is_remote_code())

    decode(model, text, max_latent_steps=2, latent_hook=hook)
    assert model.is_remote_code() and seen and not any(seen)


def test_answers_after_a_forced_end_of_fixed(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """With `force_end` every close of `fixed` is by force, so the answer ids follow each."""
    options = {
        "latent_strategy": "fixed",
        "num_latent_steps": [2, 0],
        "force_end": True,
        "latent_answer_ids": [40, 41],
    }
    output = decode(model, inputs, force_span=True, max_new_tokens=7, **options)
    assert new_ids(output)[0][:6] == [START, SLOT, SLOT, END, 40, 41]
    assert new_ids(output)[1][:4] == [START, END, 40, 41]


def test_sampled_words_of_slots_follow_the_distribution(model: torch.nn.Module, text: dict[str, torch.Tensor]) -> None:
    """A slot says a sample, not the arg max: in 400 draws of the first slot, shares are near the probabilities."""
    output = decode(
        model, text, max_new_tokens=2, do_sample=True, top_k=3, num_return_sequences=400, output_scores=True
    )
    trace = output.latent_trace
    said = torch.bincount(trace.readable_ids, minlength=512).float() / 400
    plain = decode(model, text, max_new_tokens=2, output_logits=True)
    logits = plain.logits[1][0]
    best = logits.topk(3)
    assert set(said.nonzero()[:, 0].tolist()) <= set(best.indices.tolist())
    torch.testing.assert_close(said[best.indices], best.values.softmax(-1), atol=0.1, rtol=0)


def test_sampled_repetition_exit_writes_the_word_that_repeats(
    model: torch.nn.Module, text: dict[str, torch.Tensor]
) -> None:
    """`fixed` writes no end marker: the word that closed the span by repeating is the word that is written."""
    for seed in range(8):
        torch.manual_seed(seed)
        output = decode(
            model, text, [{0: START}], latent_strategy="fixed", num_latent_steps=30, repetition_exit=True,
            do_sample=True, top_k=2, temperature=5.0, max_new_tokens=40, eos_token_id=EOS,
        )  # fmt: skip
        trace = output.latent_trace
        span = trace.spans[0]
        if span.reason == "repetition":
            assert (
                trace.sequences[0, span.first + span.length]
                == trace.readable_sequences[0, span.first + span.length - 1]
            )
            return
    raise AssertionError("no seed repeats: choose others")


# Where options come from


def test_precedence(inputs: dict[str, torch.Tensor]) -> None:
    """The call, then a generation config of the call, then the model's, then the method's, then the default."""

    def steps(model: torch.nn.Module, **options: Any) -> list[int]:
        output = model.generate(**inputs, return_dict_in_generate=True, max_new_tokens=24, do_sample=False, **options)
        spans = output.latent_trace.spans
        return [next((s.length for s in spans if s.row == row), 0) for row in range(2)]

    model = liven(tiny_latent_model(0), 6.0)
    assert steps(model) == [0, 0]  # no strategy anywhere: off
    assert steps(model, latent_strategy="dynamic") == [16, 16]  # default of the cap
    model.config.latent_generation = {"latent_strategy": "dynamic", "max_latent_steps": 5}
    assert steps(model) == [5, 5]
    assert steps(model, latent_strategy="off") == [0, 0]
    model.generation_config = saved_generation_config(model.generation_config, max_latent_steps=4)
    assert steps(model) == [4, 4]
    config = saved_generation_config(GenerationConfig(), max_latent_steps=3)
    assert steps(model, generation_config=config) == [3, 3]
    assert steps(model, generation_config=GenerationConfig()) == [4, 4]
    assert steps(model, generation_config=config, max_latent_steps=[2, 1]) == [2, 1]
    model.generation_config = saved_generation_config(
        model.generation_config, latent_strategy="steps", num_latent_steps=2
    )
    assert model.generation_config.latent_strategy == "fixed"
    assert steps(model) == [0, 0]  # fixed waits for a start marker
    assert steps(model, force_span=True) == [2, 2]
    assert steps(model, latent_strategy="dynamic", max_latent_steps=1) == [1, 1]


def test_options_are_saved_and_come_back(inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model = tiny_latent_model(0)
    saved = {
        "latent_strategy": "fixed",
        "num_latent_steps": 3,
        "force_span": True,
        "force_end": True,
        "latent_answer_ids": [40, 41],
        "latent_noise": 0.0,
    }
    model.generation_config = saved_generation_config(model.generation_config, **saved)
    assert model.generation_config.eos_token_id == [PAD, EOS], "the stock entries stay"
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert expected[:, -8:-3].tolist() == [[START, SLOT, SLOT, SLOT, END]] * 2
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: written[name] for name in saved} == saved
    again = LatentQwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    assert {name: getattr(again.generation_config, name) for name in saved} == saved
    assert again.generate(**inputs, max_new_tokens=8, do_sample=False).tolist() == expected.tolist()
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == written


def test_a_generation_config_made_from_a_model_config_keeps_its_options(tmp_path: Path) -> None:
    """transformers drops the custom entries of such a config on load; `saved_generation_config` clears the mark."""
    derived = GenerationConfig.from_model_config(tiny_latent_model(0).config)
    assert derived._from_model_config
    saved_generation_config(derived, latent_strategy="latent", max_latent_steps=7).save_pretrained(tmp_path)
    loaded = GenerationConfig.from_pretrained(tmp_path)
    assert (loaded.latent_strategy, loaded.max_latent_steps) == ("dynamic", 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_strategy": "sometimes"}, "latent_strategy='sometimes' is unknown"),
        ({"max_latent_steps": 0}, "max_latent_steps=0 must be at least 1"),
        ({"latent_hook": print}, "'latent_hook' is no option that can be saved; known: .*max_latent_steps"),
        ({"max_steps": 2}, "'max_steps' is no option that can be saved"),
    ],
)
def test_bad_options_are_not_saved(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        saved_generation_config(GenerationConfig(), **options)


def test_aliases(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    for alias, options in (
        ("latent", {"max_latent_steps": 2}),
        ("steps", {"num_latent_steps": 2, "force_span": True}),
    ):
        output = decode(model, inputs, latent_strategy=alias, **options)
        assert output.latent_trace.num_latent_steps.tolist() == [2, 2]
        assert output.latent_trace.info["strategy"] == {"latent": "dynamic", "steps": "fixed"}[alias]


def test_positional_arguments(model: torch.nn.Module, text: dict[str, torch.Tensor]) -> None:
    config = saved_generation_config(GenerationConfig(max_new_tokens=4), latent_strategy="dynamic", max_latent_steps=1)
    assert model.generate(text["input_ids"], config)[0, -4:-1].tolist() == [START, SLOT, END]


def test_per_row_options_with_several_returned_sequences(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> None:
    output = decode(model, inputs, do_sample=True, num_return_sequences=3, max_latent_steps=[1, 4], max_new_tokens=6)
    lengths = [span.length for span in output.latent_trace.spans if span.start == output.latent_trace.prompt_length]
    assert len(lengths) == 6 and max(lengths[:3]) == 1 and max(lengths[3:]) == 4
    tensor = decode(model, inputs, max_latent_steps=torch.tensor([1, 4]), max_new_tokens=6)
    assert new_ids(tensor) == new_ids(decode(model, inputs, max_latent_steps=[1, 4], max_new_tokens=6))


# Slots in the prompt


def test_prompt_slots(model: torch.nn.Module, stock: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Slots of a prompt give what the stock model gives for the same embeddings, in every way of decoding."""
    shape = inputs["input_ids"].shape
    given = 0.5 * torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[0, -6:-4], mask[1, -7] = True, True
    prompt = {**inputs, "input_ids": inputs["input_ids"].masked_fill(mask, SLOT)}
    embeds = torch.where(mask.unsqueeze(-1), given, stock.get_input_embeddings()(prompt["input_ids"]).detach())
    expected = stock.generate(
        **prompt, inputs_embeds=embeds, max_new_tokens=8, do_sample=False, suppress_tokens=[SLOT, START]
    )
    plain = stock.generate(**inputs, max_new_tokens=8, do_sample=False, suppress_tokens=[SLOT, START])
    assert expected[:, -8:].tolist() != plain[:, -8:].tolist(), "the vectors matter"
    modes: list[dict[str, Any]] = [
        {}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}, {"latent_mask": mask},
    ]  # fmt: skip
    for mode in modes:
        ours = decode(model, {**prompt, "latent_embeds": given}, latent_strategy="off", max_new_tokens=8, **mode)
        assert new_ids(ours) == expected[:, -8:].tolist(), mode
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8}
    theirs = stock.generate(**prompt, inputs_embeds=embeds, do_sample=False, suppress_tokens=[SLOT, START], **beams)
    ours = decode(model, {**prompt, "latent_embeds": given}, latent_strategy="off", **beams)
    assert new_ids(ours) == theirs[:, -8:].tolist()


def test_prompt_slots_count_as_slots_of_an_open_span(model: torch.nn.Module, text: dict[str, torch.Tensor]) -> None:
    """A prompt that ends inside a span goes on there, with the slots that stand in it counted."""
    tail = torch.tensor([[START, SLOT, SLOT]])
    ids = torch.cat([text["input_ids"], tail], dim=1)
    given = torch.randn(*ids.shape, HIDDEN)
    for cap, expected in ((5, [SLOT, SLOT, SLOT, END]), (2, [END]), (1, [END])):
        output = decode(
            model, {"input_ids": ids, "latent_embeds": given}, force_span=False, max_latent_steps=cap,
            max_new_tokens=len(expected), eos_token_id=EOS,
        )  # fmt: skip
        assert new_ids(output) == [expected]
        assert output.latent_trace.spans[0].length == 2 + len(expected) - 1


def test_a_prompt_slot_without_a_vector_is_refused(model: torch.nn.Module, text: dict[str, torch.Tensor]) -> None:
    ids = text["input_ids"].clone()
    ids[0, 7] = SLOT
    for strategy in ("off", "dynamic"):
        with pytest.raises(ValueError, match="position 7 of row 0 is a latent .* pass latent_embeds"):
            decode(model, {"input_ids": ids}, latent_strategy=strategy)


def test_a_conversation_goes_on_over_its_cache(model: torch.nn.Module, text: dict[str, torch.Tensor]) -> None:
    """A second turn on the returned cache, slots of the first turn inside, equals one with the slots given again."""
    first = decode(model, text, max_latent_steps=3, max_new_tokens=8, eos_token_id=EOS)
    ids = torch.cat([first.sequences, torch.tensor([[EOS, 198, 485, 40, 41]])], dim=1)
    embeds = torch.zeros(*ids.shape, HIDDEN)
    embeds[:, : first.sequences.shape[1]] = first.latent_trace.latent_embeds
    options = {"max_latent_steps": 2, "max_new_tokens": 6, "eos_token_id": EOS}
    afresh = decode(model, {"input_ids": ids, "latent_embeds": embeds}, **options)
    cached = decode(model, {"input_ids": ids}, past_key_values=first.past_key_values, **options)
    assert new_ids(cached) == new_ids(afresh)
    last = cached.latent_trace.slot_inputs[-2:]
    torch.testing.assert_close(last, afresh.latent_trace.slot_inputs[-2:], atol=1e-4, rtol=0)


def test_prompt_vectors_of_another_shape_are_refused(model: torch.nn.Module, text: dict[str, torch.Tensor]) -> None:
    """Too short vectors would leave the last slots to the token's own embedding, without a word."""
    ids = text["input_ids"].clone()
    ids[0, -1] = SLOT
    shape = ids.shape
    for given in (
        {"latent_embeds": torch.zeros(1, shape[1] - 1, HIDDEN)},
        {"latent_embeds": torch.zeros(2, shape[1], HIDDEN)},
        {"latent_embeds": torch.zeros(*shape, HIDDEN), "latent_mask": torch.zeros(1, 3, dtype=torch.bool)},
    ):
        with pytest.raises(
            ValueError, match=r"latent_(embeds|mask) \(.*\) must have the rows and the length of input_"
        ):
            decode(model, {"input_ids": ids, **given})


def test_prompt_vectors_without_latent_tokens(text: dict[str, torch.Tensor]) -> None:
    """A model without latent tokens takes vectors by mask; without a mask nobody knows where they go."""
    model = liven(tiny_latent_model(0, **dict.fromkeys(latent_token_ids())), 6.0)
    known = liven(tiny_latent_model(0), 6.0)
    ids, mask = text["input_ids"], torch.zeros_like(text["input_ids"], dtype=torch.bool)
    mask[0, -4:-2] = True
    prompt = {**text, "latent_embeds": torch.randn(*ids.shape, HIDDEN)}
    ours = decode(model, prompt, latent_mask=mask, latent_strategy="off")
    theirs = decode(known, prompt, latent_mask=mask, latent_strategy="off")
    assert new_ids(ours) == new_ids(theirs) != new_ids(decode(known, text, latent_strategy="off"))
    assert ours.latent_trace.num_latent_steps.tolist() == [2]
    with pytest.raises(ValueError, match="has no latent tokens"):
        decode(model, prompt, latent_strategy="off")


# Noise


def test_no_noise_draws_no_random_number(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    before = torch.get_rng_state()
    for options in ({}, {"latent_noise": 0.0}, {"num_beams": 2}, {"latent_strategy": "off"}):
        decode(model, inputs, **options)
        assert torch.equal(torch.get_rng_state(), before), options


@pytest.mark.parametrize("first", [True, False])
def test_noise_is_relative_to_the_norm(model: torch.nn.Module, inputs: dict[str, torch.Tensor], first: bool) -> None:
    torch.manual_seed(0)
    output = decode(
        model, inputs, latent_noise=0.25, latent_noise_first=first, max_latent_steps=[2, 4], output_hidden_states=True
    )
    trace = output.latent_trace
    ratios = {}
    for (row, position), fed in zip(trace.slot_index.tolist(), trace.slot_inputs, strict=True):
        step = position - trace.prompt_length
        clean = output.hidden_states[step][-1][row, -1]
        ratios[(row, step)] = ((fed - clean).norm() / clean.norm()).item()
    assert len(ratios) == 6
    for (row, step), ratio in ratios.items():
        assert ratio == pytest.approx(0.25 if first or step > 1 else 0.0, abs=1e-5), (row, step)
    torch.manual_seed(0)
    again = decode(model, inputs, latent_noise=0.25, latent_noise_first=first, max_latent_steps=[2, 4])
    assert torch.equal(again.latent_trace.slot_inputs, trace.slot_inputs)


# Hooks and extensions


@pytest.mark.parametrize("shape", [(1, HIDDEN), (2, HIDDEN + 1), (2, 1, HIDDEN)])
def test_a_hook_of_the_wrong_shape_is_refused(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"latent_hook must return \(2, 64\) or None, got \("):
        decode(model, inputs, latent_hook=lambda step: torch.zeros(shape))


def test_a_hook_equals_overwrite_of_the_naive_decoder(
    model: torch.nn.Module, stock: torch.nn.Module, text: dict[str, torch.Tensor]
) -> None:
    """The hook sees span, slot and position, and what it returns is fed."""

    def hook(step: LatentStep) -> torch.Tensor:
        span = step.span + (step.count == 0)
        factor = 1.0 + span + 0.5 * step.count
        return step.latent * factor.unsqueeze(-1)

    script = {4: END, 6: START}
    expected = naive(
        stock, text, script=script, max_latent_steps=4,
        overwrite=lambda span, slot, vector: vector * (1.0 + span + 0.5 * slot),
    )  # fmt: skip
    output = decode(model, text, [script], max_latent_steps=4, latent_hook=hook)
    assert new_ids(output) == [expected.ids]
    torch.testing.assert_close(
        output.latent_trace.slot_inputs, torch.stack(expected.slot_inputs), atol=1e-4, rtol=1e-4
    )


def test_a_stop_rule_and_an_option_of_a_test(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], tables: None
) -> None:
    """A span that closes when the largest entry of the next vector passes a limit: a rule, an option, a strategy."""

    @register_stop_rule("peak_above")
    def peak_above(step: LatentStep) -> torch.BoolTensor:
        return (step.latent.amax(dim=-1) > step.options.peak_limit) & (step.count > 0)

    register_latent_option(LatentOption("peak_limit", 1e9, number_from(0.0), "closes a span above this entry"))
    register_latent_strategy(
        LatentStrategy(
            name="calm",
            stops=("peak_above", "max_latent_steps"),
            options=("peak_limit", "max_latent_steps", "force_span", "latent_answer_ids"),
            force_span=True,
            forced=("peak_above",),
        )
    )
    plain = decode(model, inputs, latent_strategy="calm", max_latent_steps=9, output_hidden_states=True)
    peaks = torch.stack([states[-1][:, -1].amax(dim=-1) for states in plain.hidden_states[1:10]], dim=1)
    seen = sorted(peaks[:, 1:].flatten().tolist())

    def closes(limit: float) -> list[int]:
        return [next((i for i in range(1, 9) if row[i] > limit), 9) for row in peaks.tolist()]

    limits = [(low + high) / 2 for low, high in zip(seen, seen[1:], strict=False) if high - low > 1e-3]
    limit = next(each for each in limits if closes(each)[0] != closes(each)[1])  # the rows close at different steps
    first = closes(limit)
    assert min(first) < 9
    output = decode(
        model, inputs, latent_strategy="calm", max_latent_steps=9, peak_limit=limit, latent_answer_ids=[40]
    )
    spans = {span.row: span for span in output.latent_trace.spans if span.start == output.latent_trace.prompt_length}
    for row in range(2):
        assert spans[row].length == first[row]
        assert spans[row].reason == ("peak_above" if first[row] < 9 else "max_latent_steps")
        after = spans[row].end + 1 - output.latent_trace.prompt_length
        assert after >= 12 or (new_ids(output)[row][after] == 40) == (first[row] < 9)
    assert output.latent_trace.info["options"]["peak_limit"] == limit
    with pytest.raises(ValueError, match="'dynamic' does not read .'peak_limit'."):
        decode(model, inputs, peak_limit=1.0)
    with pytest.raises(ValueError, match="peak_limit=-1 must be a number"):
        decode(model, inputs, latent_strategy="calm", peak_limit=-1)


def append_slots(model: torch.nn.Module, model_kwargs: dict[str, Any], vectors: torch.Tensor) -> dict[str, Any]:
    """The layout of a test strategy: slots with given vectors after the prompt."""
    ids, count = model_kwargs["input_ids"], len(vectors)
    rows, length = ids.shape
    new = {"input_ids": SLOT, "attention_mask": 1, "mm_token_type_ids": 0}
    for name, fill in new.items():
        if model_kwargs.get(name) is not None:
            model_kwargs[name] = torch.nn.functional.pad(model_kwargs[name], (0, count), value=fill)
    embeds = torch.zeros(rows, length + count, vectors.shape[-1])
    embeds[:, length:] = vectors
    return {**model_kwargs, "latent_embeds": embeds}


def close_at_once(step: LatentStep) -> torch.BoolTensor:
    return torch.ones_like(step.is_open)


def by_hand(model: torch.nn.Module, inputs: dict[str, torch.Tensor], vectors: torch.Tensor, **options: Any) -> Any:
    """The same slots laid out by the caller; the span is closed by the cap."""
    prompt = append_slots(model, dict(inputs), vectors)
    return decode(model, prompt, force_span=False, max_latent_steps=len(vectors), **options)


MODES: list[dict[str, Any]] = [{}, {"use_cache": False}, {"num_beams": 2}, {"prefill_chunk_size": 6}]


def test_a_strategy_with_a_layout(model: torch.nn.Module, inputs: dict[str, torch.Tensor], tables: None) -> None:
    """Two learned slots after the prompt: equal to `latent_embeds` given by the caller."""
    vectors = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(3))
    register_stop_rule("at_once")(close_at_once)
    register_latent_strategy(
        LatentStrategy(
            name="learned_pair",
            stops=("at_once",),
            layout=lambda model, model_kwargs, options: append_slots(model, model_kwargs, vectors),
        )
    )
    for mode in MODES:
        ours = decode(model, inputs, latent_strategy="learned_pair", **mode)
        theirs = by_hand(model, inputs, vectors, **mode)
        assert torch.equal(ours.sequences, theirs.sequences), mode
        assert all(row[0] == END for row in new_ids(ours))
        trace = ours.latent_trace
        assert (
            trace.num_latent_steps.tolist() == [2, 2] and [span.reason for span in trace.spans[:2]] == ["at_once"] * 2
        )
        assert torch.equal(trace.slot_inputs, vectors.repeat(2, 1))
    plain = decode(model, inputs, latent_strategy="off")
    assert new_ids(plain) != new_ids(ours)


def test_a_strategy_with_a_prefill(
    model: torch.nn.Module, stock: torch.nn.Module, inputs: dict[str, torch.Tensor], tables: None
) -> None:
    """A slot laid out after the prompt whose vector is the state before it, found by a forward of its own."""
    laid: dict[str, torch.Tensor] = {}

    def layout(model: torch.nn.Module, model_kwargs: dict[str, Any], options: Any) -> dict[str, Any]:
        laid["prompt"] = dict(model_kwargs)
        model_kwargs = append_slots(model, model_kwargs, torch.zeros(1, HIDDEN))
        laid["embeds"] = model_kwargs["latent_embeds"]
        return model_kwargs

    def prefill(
        model: torch.nn.Module, stock_prefill: Callable, input_ids: torch.Tensor, generation_config: Any,
        model_kwargs: dict[str, Any], options: Any, **stock_options: Any,
    ) -> Any:  # fmt: skip
        assert (input_ids[:, -1] == SLOT).all() and stock_options == {"is_first_iteration": True}
        names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
        hidden = model(**{name: laid["prompt"][name] for name in names}, use_cache=False).last_hidden_state
        laid["embeds"][:, -1] = hidden[:, -1]
        return stock_prefill(input_ids, generation_config, model_kwargs, **stock_options)

    register_stop_rule("at_once")(close_at_once)
    register_latent_strategy(LatentStrategy(name="one_back", stops=("at_once",), layout=layout, prefill=prefill))
    with torch.no_grad():
        states = stock.model(**inputs).last_hidden_state[:, -1]
    for mode in MODES:
        ours = decode(model, inputs, latent_strategy="one_back", **mode)
        vectors = ours.latent_trace.dense("slot_inputs")[:, ours.latent_trace.prompt_length - 1]
        torch.testing.assert_close(vectors, states, atol=1e-4, rtol=0)
        prompt = append_slots(model, dict(inputs), torch.zeros(1, HIDDEN))
        prompt["latent_embeds"][:, -1] = states
        theirs = decode(model, prompt, force_span=False, max_latent_steps=1, **mode)
        assert torch.equal(ours.sequences, theirs.sequences), mode
    one = {name: inputs[name][1:] for name in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")}
    one["pixel_values"] = inputs["pixel_values"][-int(one["image_grid_thw"].prod()) :]
    with pytest.raises(ValueError, match="'one_back' has a prefill of its own, which assisted decoding skips; drop"):
        decode(model, one, latent_strategy="one_back", prompt_lookup_num_tokens=2)


def test_a_strategy_whose_slots_never_close_is_cut_by_the_budget(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], tables: None
) -> None:
    register_latent_strategy(LatentStrategy(name="endless", force_span=True, options=("force_span",)))
    output = decode(model, inputs, latent_strategy="endless", max_new_tokens=150)
    assert new_ids(output) == [[START, *[SLOT] * 149]] * 2
    assert output.latent_trace.spans[0].reason == "open"


@pytest.mark.parametrize("head", ["simple", "glu", "double"])
def test_latent_head_in_decoding(text: dict[str, torch.Tensor], tables: None, head: str) -> None:
    """The vector fed is the state through the head; a head of the test is registered and found."""

    @register_latent_head("double")
    class Double(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor([2.0]))

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.factor * hidden_states

    model = liven(tiny_latent_model(0, latent_head=head), 6.0)
    expected = naive(model, text, head=model.latent_head, script={6: START}, max_latent_steps=3)
    output = decode(model, text, [{6: START}], max_latent_steps=3)
    assert new_ids(output) == [expected.ids]
    fed = torch.stack(expected.slot_inputs)
    torch.testing.assert_close(output.latent_trace.slot_inputs, fed, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(fed[0], expected.hidden[1], atol=1e-2)
    torch.testing.assert_close(output.latent_trace.slot_outputs[0], expected.hidden[2], atol=1e-4, rtol=1e-4)


# Calls beside each other


def test_streaming_from_a_thread(model: torch.nn.Module, text: dict[str, torch.Tensor]) -> None:
    tokenizer = tiny_processor().tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=False)
    options = {"latent_strategy": "dynamic", "max_latent_steps": 2, "max_new_tokens": 8, "do_sample": False}
    thread = threading.Thread(target=model.generate, kwargs={**text, **options, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    expected = model.generate(**text, **options)[0, text["input_ids"].shape[1] :]
    assert streamed == tokenizer.decode(expected)
    assert streamed.startswith("<|laser_start|><|laser|><|laser|><|laser_end|>")


def test_calls_inside_a_call_do_not_mix(model: torch.nn.Module, text: dict[str, torch.Tensor]) -> None:
    """A hook that decodes with the same model leaves the outer call as it was."""
    inner = []

    def hook(step: LatentStep) -> None:
        inner.append(decode(model, text, max_latent_steps=1, max_new_tokens=5).sequences.tolist())

    plain = decode(model, text, max_latent_steps=3)
    nested = decode(model, text, max_latent_steps=3, latent_hook=hook)
    assert torch.equal(nested.sequences, plain.sequences)
    assert torch.equal(nested.latent_trace.slot_inputs, plain.latent_trace.slot_inputs)
    assert len(inner) >= 3 and inner[0] == decode(model, text, max_latent_steps=1, max_new_tokens=5).sequences.tolist()


def test_assistant_is_brought_up_to_date_after_a_span(
    model: torch.nn.Module, text: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its drafts are those that it would make of the text so far without any cache."""
    assistant = eager_assistant(liven(tiny_stock_model(0), 6.0))
    drafts = []
    original = AssistedCandidateGenerator._generate_candidates

    def recorded(self: AssistedCandidateGenerator, arguments: dict[str, Any]) -> tuple:
        ids, logits = original(self, arguments)
        drafts.append((arguments["input_ids"], ids, logits))
        return ids, logits

    monkeypatch.setattr(AssistedCandidateGenerator, "_generate_candidates", recorded)
    script = {5: 60, 6: 61, 7: START, 12: 62, 15: START}
    decode(model, text, [script], max_latent_steps=3, max_new_tokens=28, assistant_model=assistant)
    assert len(drafts) >= 4
    for seen, drafted, scores in drafts:
        processors = LogitsProcessorList([ScriptProcessor([script], text["input_ids"].shape[1])])
        fresh = assistant.generate(
            seen,
            attention_mask=torch.ones_like(seen),
            max_new_tokens=drafted.shape[1] - seen.shape[1],
            do_sample=False,
            logits_processor=processors,
            output_scores=True,
            return_dict_in_generate=True,
        )
        assert drafted.tolist() == fresh.sequences.tolist()
        torch.testing.assert_close(scores, torch.stack(fresh.scores, dim=1), atol=1e-4, rtol=0)


def test_a_latent_model_as_assistant(model: torch.nn.Module, text: dict[str, torch.Tensor]) -> None:
    """A latent assistant drafts text only, whatever strategy is saved with it."""
    assistant = liven(tiny_latent_model(1), 6.0)
    assistant.generation_config = saved_generation_config(assistant.generation_config, latent_strategy="dynamic")
    options = {"max_latent_steps": 3, "max_new_tokens": 16}
    plain = decode(model, text, [{9: START}], **options)
    assisted = decode(model, text, [{9: START}], assistant_model=assistant, **options)
    assert torch.equal(assisted.sequences, plain.sequences)


def test_per_row_check_of_a_registered_option(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], tables: None
) -> None:
    """A per-row option of a test reaches its rule as a tensor with one entry per running row."""
    seen = []

    @register_stop_rule("after")
    def after(step: LatentStep) -> torch.BoolTensor:
        seen.append(step.options.after.tolist())
        return step.count >= step.options.after

    register_latent_option(
        LatentOption("after", 1, int_from(1, "give a number"), "closes after so many", per_row=True)
    )
    register_latent_strategy(
        LatentStrategy(name="counted", stops=("after",), options=("after", "force_span"), force_span=True)
    )
    output = decode(model, inputs, latent_strategy="counted", after=[1, 3], num_beams=2)
    assert seen[0] == [1, 1, 3, 3]
    assert [span.length for span in output.latent_trace.spans if span.start == output.latent_trace.prompt_length] == [
        1,
        3,
    ]
