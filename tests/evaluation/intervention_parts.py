"""Tiny random models of every method for tests of interventions, and their clean runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from evaluation.benchmarks.benchmark import AskProtocol, Benchmark, Scored
from evaluation.causal.answering import item_answers
from evaluation.causal.contexts import CleanItem, clean_items
from evaluation.causal.intervention_run import InterventionRun
from evaluation.causal.slot_data import SlotData
from evaluation.causal.slot_sources import image_embeddings
from evaluation.runner import Prediction, build_prompt
from modeling_latent.configuration_latent import LATENT_METHODS, LATENT_TOKEN_FIELDS
from modeling_latent.latent_strategies import get_latent_strategy
from tests.latent import liven, tiny_latent_model
from tests.tiny import CHAMELEON, FAMILIES, TEXT_FAMILIES, tiny_images, tiny_processor
from trainers.data.records import Record, make_record
from trainers.tiny import build_tiny_processor

SPAN = {"num_latent_steps": 3, "force_span": True, "force_end": True}


@dataclass(frozen=True)
class Method:
    """A way of thinking in latents: method of the tokens, options of generate, further fields of the configuration."""

    tokens: str
    options: dict[str, Any]
    fields: dict[str, Any]
    thoughts: str = "turn"


METHODS = {
    "fixed": Method("laser", {"latent_strategy": "fixed", **SPAN}, {}),
    "dynamic": Method("laser", {"latent_strategy": "dynamic", "max_latent_steps": 4}, {}),
    "head": Method("lvr", {"latent_strategy": "fixed", **SPAN}, {"latent_head": "simple"}),
    "staged": Method("ivtlr", {"latent_strategy": "staged", "num_latent_steps": 2, "num_latent_patches": 1}, {}),
    "markers": Method("laser", {"latent_strategy": "staged", "num_latent_steps": 3, "latent_markers": True}, {}),
    "learned": Method("lavit", {"latent_strategy": "learned"}, {}),
    "search": Method("laser", {"latent_strategy": "search", "max_num_steps": 2, "num_thought_tokens": 2}, {}),
}
OTHER_FAMILIES = (*(family for family in FAMILIES if family != "qwen2_5_vl"), CHAMELEON, *TEXT_FAMILIES)


@cache
def parts(method: str, family: str = "qwen2_5_vl") -> tuple[PreTrainedModel, Any]:
    """Model and processor; do not change them."""
    entry = METHODS[method]
    if family != "qwen2_5_vl":
        return liven(
            tiny_latent_model(family=family, **entry.fields), 2.0 if family == CHAMELEON else 4.0
        ), tiny_processor(family)
    processor = build_tiny_processor(latent_tokens=LATENT_METHODS[entry.tokens].tokens)
    ids = {name: getattr(processor, name) for name in LATENT_TOKEN_FIELDS}
    torch.manual_seed(0)
    model = tiny_latent_model(latent_method=entry.tokens, **ids, **entry.fields)
    return liven(model), processor


def records(text_alone: bool = False) -> list[Record]:
    """Five records of different lengths and images."""
    images = tiny_images(4)
    questions = ["What is it? " * (1 + 3 * i % 5) for i in range(5)]
    return [
        make_record(f"r{i}", questions[i], "AB"[i % 2], [] if text_alone else [images[i % 4]], choices=["a", "b"])
        for i in range(5)
    ]


@cache
def benchmark(reply: str = "say {answer} now") -> Benchmark:
    """Two options; a reply is right when its length is even, so that edits change what is right."""
    ask = AskProtocol("default", "", _prompt, _score, 14, reply)
    return Benchmark("tiny", "tiny", (), list, {"default": ask}, lambda record: "", None, lambda record: ("A", "B"),
                     lambda record: record["answer"])  # fmt: skip


def _prompt(processor: Any, record: Record) -> str:
    return build_prompt(processor, record) if processor.chat_template else record["question"]


def _score(record: Record, prediction: Prediction) -> Scored:
    return Scored(len(prediction.text) % 2 == 0, prediction.text or None)


@cache
def clean(method: str, family: str = "qwen2_5_vl") -> Sequence[CleanItem]:
    """The clean run of the records."""
    model, processor = parts(method, family)
    entry = METHODS[method]
    asked = records(family in TEXT_FAMILIES)
    torch.manual_seed(0)
    return clean_items(
        model, processor, asked, benchmark().protocol(), batch_size=3, thoughts=entry.thoughts, **entry.options
    )


def new_run(
    method: str,
    family: str = "qwen2_5_vl",
    regime: str = "frozen",
    batch_size: int = 3,
    items: Sequence[CleanItem] | None = None,
    fillers: Callable[[str], list[int]] | None = None,
) -> InterventionRun:
    """A run over the clean items."""
    model, processor = parts(method, family)
    items = clean(method, family) if items is None else items
    tokenizer, bench = processor.tokenizer, benchmark()
    answers = [item_answers(tokenizer, bench, bench.protocol(), item.record) for item in items]
    images = image_embeddings(model, processor, [item.record for item in items])
    data = SlotData(
        items, [answer.gold for answer in answers], 0, model.get_input_embeddings().weight.detach(),
        patches=[None if each is None else each.embeds for each in images],
        oracles=[None if each is None else each.embeds for each in images],
    )  # fmt: skip
    strategy = get_latent_strategy(METHODS[method].options["latent_strategy"])
    return InterventionRun(
        model, processor, items, answers, bench.protocol(), data, regime=regime, batch_size=batch_size,
        feeds_back=strategy.opens_span or strategy.prefill is not None,
        fillers=fillers or (lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]),
    )  # fmt: skip
