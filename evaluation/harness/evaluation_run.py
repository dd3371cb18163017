"""An evaluation: benchmarks and variants in one call, batched, resumable, in one process or several.

Every process answers its share of the batches and appends what is finished to its own file; a batch has the same items
whatever the number of processes and however often the run was killed, so the results are the same to the byte.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..run_folder import RunFolder
from ..runner import Prediction, predict
from ..search_runner import Workers
from ..statistics import wilson_interval
from .item_order import item_order
from .preflight import lays_out, refuse_impossible
from .replies import chosen_reply, digest_of, item_key, line_of, replies_in
from .results import write_results
from .variants import Asked, Variant

RUN_FORMAT = "latent-evaluation-run"
Load = Callable[[str], tuple[PreTrainedModel, Any]]


@dataclass(frozen=True)
class EvaluationSettings:
    """How replies are generated.

    Args:
        model: name of the model, for the run's settings.
        batch_size: prompts per call of `generate`.
        max_new_tokens: budget of a reply; None for that of the protocol.
        temperature: sample at this temperature; 0 is greedy (votes sample at 1 then).
        seed: of sampling.
        thoughts: where thought tokens of the strategy `search` stand, see [`predict`].
    """

    model: str
    batch_size: int = 32
    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    thoughts: str = "turn"


def run_evaluation(
    folder: str | Path,
    asked: Sequence[Asked],
    variants: Sequence[Variant],
    load: Load,
    settings: EvaluationSettings,
    *,
    resume: bool = True,
    workers: Workers | None = None,
    progress: bool = False,
) -> dict[str, Any] | None:
    """Answer, score, write the results.

    Args:
        folder: of the run, see `run_folder.py` and `results.py`.
        asked: benchmarks with records.
        variants: models with strategies; the first is the reference that others are compared with.
        load: from the model of a variant (empty for that of the run) to model and processor; called once for each
            where something is left to answer.
        settings: see [`EvaluationSettings`].
        resume: go on with the folder.
        workers: the processes; by default this one.
        progress: show a progress bar with running accuracy on the first process.

    Returns:
        The content of `results.json` on the first process, None on others.

    Raises:
        ValueError: no benchmark, variant or record; a folder of another run; a strategy that the model cannot do.
        RecordError: an image that cannot be read.
    """
    workers = workers or Workers()
    _check(asked, variants, settings)
    run = RunFolder(folder, description(asked, variants, settings), RUN_FORMAT)
    run.check(resume)
    done = run.items()
    batches = [batch for batch in _batches(asked, variants, settings.batch_size) if _left(batch, done)]
    workers.wait()  # all have looked before anything is written
    if workers.index == 0:
        run.begin()
    workers.wait()  # no reply is on disk before its settings are
    mine = batches[workers.index :: workers.number]
    if mine:
        models = _loaded(mine, load, settings.thoughts)
        _answer(run, models, mine, done, settings, workers, progress)
    workers.wait()
    if workers.index:
        return None
    return write_results(folder, asked, variants, settings.model, run.items())


def description(asked: Sequence[Asked], variants: Sequence[Variant], settings: EvaluationSettings) -> dict[str, Any]:
    """What results depend on."""
    benchmarks = {
        each.benchmark.name: {
            "protocol": each.protocol.name,
            "behind": each.behind,
            "items": len(each.records),
            "digest": digest_of(each.records),
        }
        for each in asked
    }
    chosen = {each.name: {**each.options, "votes": each.votes, "model": each.model} for each in variants}
    return {**asdict(settings), "benchmarks": benchmarks, "variants": chosen}


@dataclass(frozen=True)
class _Batch:
    """Items of a benchmark under a variant; `number` counts all batches of the run."""

    number: int
    asked: Asked
    variant: Variant
    items: tuple[int, ...]

    @property
    def keys(self) -> list[str]:
        return [item_key(self.asked.benchmark.name, self.variant.name, item) for item in self.items]


def _batches(asked: Sequence[Asked], variants: Sequence[Variant], size: int) -> list[_Batch]:
    found: list[_Batch] = []
    for each in asked:
        order = item_order(each.records)
        for variant in variants:
            for first in range(0, len(order), size):
                found.append(_Batch(len(found), each, variant, tuple(order[first : first + size])))
    return found


def _left(batch: _Batch, done: Mapping[str, Any]) -> bool:
    return any(key not in done for key in batch.keys)


def _loaded(batches: Sequence[_Batch], load: Load, thoughts: str) -> dict[str, tuple[PreTrainedModel, Any]]:
    """The models of the batches, each asked for what its variants need before anything runs."""
    models: dict[str, tuple[PreTrainedModel, Any]] = {}
    for batch in {(batch.asked.benchmark.name, batch.variant.name): batch for batch in batches}.values():
        name = batch.variant.model
        if name not in models:
            models[name] = load(name)
        refuse_impossible(*models[name], batch.variant, batch.asked, thoughts)
    return models


def _answer(
    run: RunFolder,
    models: Mapping[str, tuple[PreTrainedModel, Any]],
    batches: Sequence[_Batch],
    done: Mapping[str, Any],
    settings: EvaluationSettings,
    workers: Workers,
    progress: bool,
) -> None:
    """Generate the batches of this process and put each on disk."""
    rights: dict[tuple[str, str], list[bool]] = defaultdict(list)
    shown = progress and workers.index == 0
    with tqdm(total=sum(len(batch.items) for batch in batches), desc="evaluate", disable=not shown) as bar:
        for batch in batches:
            start = time.perf_counter()
            replies = _predict(*models[batch.variant.model], batch, settings)
            seconds = (time.perf_counter() - start) / len(batch.items)
            lines = [line_of(key, own, seconds) for key, own in zip(batch.keys, replies, strict=True)]
            run.append(workers.index, [line for line in lines if line["data_idx"] not in done])
            if shown:
                own = rights[batch.asked.benchmark.name, batch.variant.name]
                own += _right(batch, lines)
                low, high = wilson_interval(sum(own), len(own))
                bar.set_postfix_str(
                    f"{batch.asked.benchmark.name}, {batch.variant.name}: {100 * sum(own) / len(own):.1f} % "
                    f"[{100 * low:.1f}, {100 * high:.1f}]"
                )
            bar.update(len(batch.items))


def _right(batch: _Batch, lines: Sequence[Mapping[str, Any]]) -> list[bool]:
    protocol, right = batch.asked.protocol, []
    for item, line in zip(batch.items, lines, strict=True):
        record = batch.asked.records[item]
        right.append(protocol.score(record, chosen_reply(replies_in(line), record, protocol)).correct)
    return right


def _predict(
    model: PreTrainedModel, processor: Any, batch: _Batch, settings: EvaluationSettings
) -> list[list[Prediction]]:
    """The replies to each item of a batch: one, or as many as there are votes."""
    protocol, votes, behind = batch.asked.protocol, max(batch.variant.votes, 1), batch.asked.behind
    records = [batch.asked.records[item] for item in batch.items]
    if protocol.prepare is not None:
        records = [protocol.prepare(record) for record in records]
    options: dict[str, Any] = dict(batch.variant.options)
    if behind and lays_out(model, options.get("latent_strategy")):
        options["latent_suffix_ids"] = processor.tokenizer.encode(behind, add_special_tokens=False)
        behind = ""
    if settings.temperature > 0 or batch.variant.votes:
        options |= {"do_sample": True, "temperature": settings.temperature or 1.0, "top_k": 0}
    torch.manual_seed(settings.seed * 1_000_003 + batch.number)  # the same draws, whoever answers the batch
    predictions = predict(
        model,
        processor,
        records * votes,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens or protocol.max_new_tokens,
        prompt=lambda record: protocol.prompt(processor, record) + behind,
        processor_options=protocol.processor_options,
        thoughts=settings.thoughts,
        **options,
    )
    return [predictions[place :: len(records)] for place in range(len(records))]


def _check(asked: Sequence[Asked], variants: Sequence[Variant], settings: EvaluationSettings) -> None:
    if not asked or not variants:
        raise ValueError(f"{len(asked)} benchmarks and {len(variants)} conditions; give at least one of each")
    for each in asked:
        if not each.records:
            raise ValueError(f"{each.benchmark.name} has no record; check its data")
    for what, names in (("benchmarks", [each.benchmark.name for each in asked]),
                        ("conditions", [each.name for each in variants])):  # fmt: skip
        if len(set(names)) < len(names):
            raise ValueError(f"{what} {names}: one comes twice; give each once")
    if settings.batch_size < 1:
        raise ValueError(f"batch_size={settings.batch_size!r} must be at least 1")
    if settings.temperature < 0:
        raise ValueError(f"temperature={settings.temperature!r} must be 0 (greedy) or more")


__all__ = ["RUN_FORMAT", "EvaluationSettings", "description", "run_evaluation"]
