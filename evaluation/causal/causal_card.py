"""`causal_card`: the causal evidence on one model and data set, in one call (specification, section 7)."""

import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, ProcessorMixin

from modeling_latent.latent_strategies import get_latent_strategy
from trainers.data.boxes import checked_option
from trainers.data.records import Record

from ..benchmarks.benchmark import DEFAULT_PROTOCOL, Benchmark
from .answering import item_answers
from .card_data import CausalCard
from .contexts import CleanItem
from .effects import comparisons_of, effects_of
from .further_runs import Ask, asker, check_free, donors_of_runs, edited_items, free_items
from .intervention_run import InterventionRun
from .interventions import Intervention
from .item_attention import item_attentions
from .measures import ATTENTION_BATCH, CardMeasures, measure_card
from .slot_data import SlotData
from .slot_sources import image_embeddings, oracle_vectors
from .suites import roles_of, suite_interventions, traits_of
from .verdict import verdict_of

REGIMES = ("live", "frozen")
COUNTS = ("clean", "free")


@torch.no_grad()
def causal_card(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    benchmark: Benchmark,
    *,
    protocol: str = DEFAULT_PROTOCOL,
    suite: str | Sequence[str] = "slots",
    regime: str = "live",
    count: str = "clean",
    seed: int = 0,
    margin: float = 2.0,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    scores: bool = True,
    measures: bool = True,
    num_views: int = 8,
    progress: bool = False,
    name: str = "",
    **options: Any,
) -> CausalCard:
    """Run a model clean and under interventions on its latents, and say whether they matter.

    Args:
        model: a latent model; it is switched to eval and back.
        processor: its processor.
        records: what is asked, 200 and more for a verdict.
        benchmark: how records are asked and scored, see `evaluation/benchmarks/registry.py`.
        protocol: one of the benchmark's.
        suite: `"trt"`, `"mediation"`, `"prism"`, `"slots"` or `"full"`, or a list of interventions.
        regime: `"live"`: slots behind an edited one are worked out again; `"frozen"`: they are replayed.
        count: `"clean"`: as many slots as in the clean run; `"free"`: the stop rule acts (content edits, live).
        seed: of noise, donors and the bootstrap.
        margin: of equivalence, points.
        batch_size: items run together.
        max_new_tokens: of a reply; default: of the protocol.
        scores: teacher-force gold answers and options too (`u`, KL).
        measures: also geometry, probes, attention and effects by slot.
        num_views: how many items get a picture.
        progress: show progress bars.
        name: of the model in the report; default: where it was loaded from.
        options: of `generate`: `latent_strategy` and its options; default: those saved with the model.

    Returns:
        The card; `card_report.write_card` draws it.

    Raises:
        ValueError: an unknown suite, regime, count or intervention, records of fewer than two items, a model or
            strategy without latents, `count="free"` where no stop rule acts.
    """
    checked_option("regime", regime, REGIMES)
    checked_option("count", count, COUNTS)
    if len(records) < 2:
        raise ValueError(f"{len(records)} records: interventions swap latents between items; give two or more")
    was_training = model.training
    model.eval()
    try:
        ask = asker(model, processor, benchmark.protocol(protocol), batch_size, max_new_tokens, options)
        builder = _Builder(
            model, processor, benchmark, protocol, ask, regime, count, seed, margin, batch_size, scores, progress
        )
        builder.run_clean(records)
        builder.run_conditions(suite)
        found = builder.measure(num_views) if measures else CardMeasures()
        return builder.card(found, name, suite if isinstance(suite, str) else "chosen", options)
    finally:
        model.train(was_training)


class _Builder:
    """The steps of a card, one after the other."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        benchmark: Benchmark,
        protocol: str,
        ask: Ask,
        regime: str,
        count: str,
        seed: int,
        margin: float,
        batch_size: int,
        scores: bool,
        progress: bool,
    ) -> None:
        self.model, self.processor, self.benchmark, self.ask = model, processor, benchmark, ask
        self.protocol, self.regime, self.count, self.seed = benchmark.protocol(protocol), regime, count, seed
        self.margin, self.batch_size, self.scores, self.progress = margin, batch_size, scores, progress
        self.seconds: dict[str, float] = {}
        self.left_out: list[str] = []

    def run_clean(self, records: Sequence[Record]) -> None:
        """The clean run, and the answers."""
        start = time.perf_counter()
        self.items = self.ask(records, progress=self.progress)
        self.seconds["clean"] = time.perf_counter() - start
        if not any(len(item.inputs) for item in self.items):
            raise ValueError(
                "the clean run has no latent at all: the strategy opened no span; choose a latent_strategy (and "
                "force_span=True) with which the model has some"
            )
        self.records = [item.record for item in self.items]
        self.strategy = self.items[0].strategy
        tokenizer = self.processor.tokenizer
        self.answers = [item_answers(tokenizer, self.benchmark, self.protocol, record) for record in self.records]
        opens = get_latent_strategy(self.strategy).opens_span
        self.traits = traits_of(self.items, self.strategy, opens, self.model.config.latent_patch_token_id)

    def run_conditions(self, suite: str | Sequence[str]) -> None:
        """The interventions of the suite."""
        start = time.perf_counter()
        self.interventions, self.left_out = suite_interventions(suite, self.traits)
        self.data = self._slot_data()
        free = [each for each in self.interventions if self.count == "free" and each.family == "content"]
        if self.count == "free":
            check_free(self.strategy, free)
            if self.regime != "live":
                raise ValueError("count='free' needs regime='live': frozen slots leave the stop rule nothing to read")
        further = self._further(free)
        self.run = self._new_run(self.regime, further)
        if any(each.select.startswith("top") for each in self.interventions):
            self.data.attention = self._answer_attention()
        self.conditions = self.run.run(self.interventions)
        for each in free:
            self.conditions[each.name].count = "free"
        self.left_out += [f"{name}: for some items: {why}" for name, why in self.run.left_out.items()]
        self.seconds["conditions"] = time.perf_counter() - start

    def _new_run(
        self, regime: str, further: Mapping[str, Sequence[CleanItem | None]] | None = None
    ) -> InterventionRun:
        feeds_back = not (self.traits.constant or self.traits.searched)
        return InterventionRun(
            self.model, self.processor, self.items, self.answers, self.protocol, self.data, regime=regime,
            feeds_back=feeds_back, batch_size=self.batch_size, scores=self.scores, fillers=self._filler_ids,
            progress=self.progress, further=dict(further or {}),
        )  # fmt: skip

    def _answer_attention(self) -> list[torch.Tensor | None]:
        """Of each item the attention of the answer to its latents, for edits of those that it reads most."""
        found: list[torch.Tensor | None] = []
        for first in range(0, len(self.items), ATTENTION_BATCH):
            items = self.items[first : first + ATTENTION_BATCH]
            attention = item_attentions(self.model, self.run.shared(items), items)
            found += [None if each is None else each.answer_to_latents for each in attention]
        return found

    def _filler_ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _slot_data(self) -> SlotData:
        needs = {each.needs for each in self.interventions} | {"patches"}
        images = [None] * len(self.items)
        if self.traits.images:
            images = image_embeddings(self.model, self.processor, self.records, self.batch_size)
        self.images = images
        data = SlotData(
            self.items,
            [answer.gold for answer in self.answers],
            self.seed,
            self.model.get_input_embeddings().weight.detach().float().cpu(),
            patches=[None if each is None else each.embeds for each in images],
            oracles=[oracle_vectors(item, each) for item, each in zip(self.items, images, strict=True)],
            token_id=self._token_id,
            unembedding=self.model.get_output_embeddings().weight.detach().float().cpu(),
            letters=self._letters(),
        )
        data.runs = donors_of_runs(self.ask, self.processor, self.records, data, {need for need in needs if need})
        return data

    def _token_id(self, text: str) -> int:
        ids = self._filler_ids(text)
        if len(ids) != 1:
            raise ValueError(f"dummy_token({text}): the text is {len(ids)} tokens; give one token, or its id")
        return ids[0]

    def _letters(self) -> list[int]:
        names = sorted({name for answer in self.answers for name in answer.names})
        ids = [self._filler_ids(name) for name in names]
        return [each[0] for each in ids if len(each) == 1]

    def _further(self, free: Sequence[Intervention]) -> dict[str, list[CleanItem | None]]:
        """Items of the conditions that are asked anew."""
        found: dict[str, list[CleanItem | None]] = {}
        for each in self.interventions:
            why = ""
            if each.family == "input":
                found[each.name], why = edited_items(self.ask, self.processor, self.records, each, self.data)
            elif each.rule == "force_span":
                found[each.name] = list(self.ask(self.records, force_span=True))
            elif each in free:
                found[each.name], why = free_items(self.ask, self.records, each, self.data, self.batch_size)
            if why:
                self.left_out.append(f"{each.name}: for some items: {why}")
        return found

    def measure(self, num_views: int) -> CardMeasures:
        """Geometry, probes, attention, effects by slot, pictures."""
        start = time.perf_counter()
        frozen = self._new_run("frozen")
        found = measure_card(
            self.model, self.processor, frozen, self.conditions, self.images, self.benchmark, num_views, self.seed
        )
        self.seconds["measures"] = time.perf_counter() - start
        return found

    def card(self, found: CardMeasures, name: str, suite: str, options: Mapping[str, Any]) -> CausalCard:
        """All of it."""
        cluster = self.benchmark.cluster
        clusters = [str(place) if cluster is None else cluster(record) for place, record in enumerate(self.records)]
        effects = effects_of(self.conditions, clusters, margin=self.margin, seed=self.seed)
        return CausalCard(
            model=name or self.model.name_or_path or type(self.model).__name__,
            dataset=self.benchmark.title,
            suite=suite,
            regime=self.regime,
            count=self.count,
            seed=self.seed,
            strategy={"latent_strategy": self.strategy}
            | {key: value for key, value in options.items() if _plain(value)},
            ids=[record["id"] for record in self.records],
            gold=[answer.gold for answer in self.answers],
            clusters=clusters,
            conditions=self.conditions,
            effects=effects,
            verdict=verdict_of(effects, margin=self.margin, roles=roles_of(self.traits)),
            triggers=self._triggers(),
            per_slot=found.per_slot,
            geometry=found.geometry,
            probes=found.probes,
            attention=found.attention,
            comparisons=comparisons_of(self.conditions, clusters, seed=self.seed),
            items=found.views,
            left_out=self.left_out + found.left_out,
            seconds=self.seconds,
            environment=_environment(self.model),
        )

    def _triggers(self) -> dict[str, float]:
        clean, count = self.conditions["clean"], len(self.items)
        spans = sum(clean.num_spans)
        same = sum(item.prediction.text == text for item, text in zip(self.items, clean.texts, strict=True))
        return {
            "items": count,
            "accuracy": 100 * sum(clean.correct) / count,
            "trigger_rate": 100 * sum(number > 0 for number in clean.num_spans) / count,
            "spans": spans / count,
            "latent_steps": sum(clean.num_latent_steps) / count,
            "forced_close_rate": 100 * sum(clean.forced_closed) / max(spans, 1),
            "parse_rate": 100 * sum(clean.parsed) / count,
            "answer_tokens": sum(clean.answer_tokens) / count,
            "replay_match": 100 * same / count,
        }


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, list, type(None)))


def _environment(model: PreTrainedModel) -> dict[str, Any]:
    text = model.config.get_text_config()
    return {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


__all__ = ["COUNTS", "REGIMES", "causal_card"]
