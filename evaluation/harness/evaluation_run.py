"""An evaluation: benchmarks and variants in one call, batched, resumable, in one process or several.

Every process answers its share of the batches and appends what is finished to its own file; a batch has the same items
whatever the number of processes and however often the run was killed, so the results are the same to the byte.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from trainers.data.records import Record

from ..benchmarks.benchmark import Scored
from ..run_folder import DONE, RunFolder
from ..runner import Prediction, predict
from ..search_runner import Workers
from ..statistics import wilson_interval
from .results import write_results
from .variants import Asked, Variant

RUN_FORMAT = "latent-evaluation-run"
Load = Callable[[], tuple[PreTrainedModel, Any]]
Key = tuple[str, str, int]  # benchmark, variant, number of the item


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
    resume: bool = False,
    workers: Workers | None = None,
    progress: bool = False,
) -> dict[str, Any] | None:
    """Answer, score, write the results.

    Args:
        folder: of the run, see `run_folder.py` and `results.py`.
        asked: benchmarks with records.
        variants: strategies; the first is the reference that others are compared with.
        load: gives model and processor; called where something is left to answer.
        settings: see [`EvaluationSettings`].
        resume: go on with the folder.
        workers: the processes; by default this one.
        progress: show a progress bar with running accuracy on the first process.

    Returns:
        The content of `results.json` on the first process, None on others.

    Raises:
        ValueError: no benchmark, variant or record; a folder of another run; an option that the model cannot do.
        RecordError: an image that cannot be read.
    """
    workers = workers or Workers()
    _check(asked, variants, settings)
    run = RunFolder(folder, _description(asked, variants, settings), RUN_FORMAT)
    run.check(resume)
    done = run.items()
    batches = [batch for batch in _batches(asked, variants, settings.batch_size) if _left(batch, done)]
    workers.wait()
    if workers.index == 0:
        run.begin()
    workers.wait()
    mine = batches[workers.index :: workers.number]
    if mine:
        model, processor = load()
        _answer(run, model, processor, mine, done, settings, workers, progress)
    workers.wait()
    if workers.index:
        return None
    return write_results(folder, asked, variants, settings.model, run.items())


@dataclass(frozen=True)
class _Batch:
    """Items of a benchmark under a variant; `number` counts all batches of the run."""

    number: int
    asked: Asked
    variant: Variant
    items: range


def _batches(asked: Sequence[Asked], variants: Sequence[Variant], size: int) -> list[_Batch]:
    found: list[_Batch] = []
    for each in asked:
        for variant in variants:
            for first in range(0, len(each.records), size):
                items = range(first, min(first + size, len(each.records)))
                found.append(_Batch(len(found), each, variant, items))
    return found


def item_key(benchmark: str, variant: str, number: int) -> str:
    """What names an item in the lines of a run."""
    return f"{benchmark}/{variant}/{number}"


def _left(batch: _Batch, done: Mapping[str, Any]) -> bool:
    return any(item_key(batch.asked.benchmark.name, batch.variant.name, item) not in done for item in batch.items)


def _answer(
    run: RunFolder,
    model: PreTrainedModel,
    processor: Any,
    batches: Sequence[_Batch],
    done: Mapping[str, Any],
    settings: EvaluationSettings,
    workers: Workers,
    progress: bool,
) -> None:
    """Generate the batches of this process and put each on disk."""
    right = total = 0
    shown = progress and workers.index == 0
    with tqdm(total=sum(len(batch.items) for batch in batches), desc="evaluate", disable=not shown) as bar:
        for batch in batches:
            start = time.perf_counter()
            predictions = _predict(model, processor, batch, settings)
            seconds = (time.perf_counter() - start) / len(batch.items)
            lines = [
                {"data_idx": key, "status": DONE, "prediction": asdict(prediction), "seconds": seconds}
                for key, prediction in zip(_keys(batch), predictions, strict=True)
                if key not in done
            ]
            run.append(workers.index, lines)
            records = [batch.asked.records[item] for item in batch.items]
            right += sum(batch.asked.protocol.score(*pair).correct for pair in zip(records, predictions, strict=True))
            total += len(records)
            low, high = wilson_interval(right, total)
            bar.set_postfix_str(f"{100 * right / total:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
            bar.update(len(records))


def _keys(batch: _Batch) -> list[str]:
    return [item_key(batch.asked.benchmark.name, batch.variant.name, item) for item in batch.items]


def _predict(model: PreTrainedModel, processor: Any, batch: _Batch, settings: EvaluationSettings) -> list[Prediction]:
    protocol, votes = batch.asked.protocol, batch.variant.votes
    records = [batch.asked.records[item] for item in batch.items]
    if protocol.prepare is not None:
        records = [protocol.prepare(record) for record in records]
    options: dict[str, Any] = dict(batch.variant.options)
    if settings.temperature > 0 or votes:
        options |= {"do_sample": True, "temperature": settings.temperature or 1.0, "top_k": 0}
        torch.manual_seed(settings.seed * 1_000_003 + batch.number)  # the same draws, whoever answers the batch
    predictions = predict(
        model,
        processor,
        list(records) * max(votes, 1),
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens or protocol.max_new_tokens,
        prompt=lambda record: protocol.prompt(processor, record),
        processor_options=protocol.processor_options,
        thoughts=settings.thoughts,
        **options,
    )
    return _voted(predictions, records, protocol.score) if votes else predictions


def _voted(
    predictions: Sequence[Prediction], records: Sequence[Record], score: Callable[[Record, Prediction], Scored]
) -> list[Prediction]:
    """Of each item a reply with its most frequent answer, the earlier of two that are as frequent, with the steps and
    positions of all its replies."""
    chosen = []
    for place, record in enumerate(records):
        votes = predictions[place :: len(records)]
        answers = [score(record, vote).answer for vote in votes]
        winner = votes[answers.index(Counter(answers).most_common(1)[0][0])]
        steps, tokens = (sum(getattr(vote, name) for vote in votes) for name in ("num_latent_steps", "num_tokens"))
        chosen.append(replace(winner, num_latent_steps=steps, num_tokens=tokens))
    return chosen


def _check(asked: Sequence[Asked], variants: Sequence[Variant], settings: EvaluationSettings) -> None:
    if not asked or not variants:
        raise ValueError(f"{len(asked)} benchmarks and {len(variants)} variants; give at least one of each")
    for each in asked:
        if not each.records:
            raise ValueError(f"{each.benchmark.name} has no record; check its data")
    names = [each.benchmark.name for each in asked]
    if len(set(names)) < len(names):
        raise ValueError(f"benchmarks {names}: one comes twice; give each once")
    if settings.batch_size < 1:
        raise ValueError(f"batch_size={settings.batch_size!r} must be at least 1")


def _description(asked: Sequence[Asked], variants: Sequence[Variant], settings: EvaluationSettings) -> dict[str, Any]:
    """What results depend on."""
    return {
        **asdict(settings),
        "benchmarks": {each.benchmark.name: {"protocol": each.protocol.name, "items": len(each.records),
                                             "first": each.records[0]["id"], "last": each.records[-1]["id"]}
                       for each in asked},
        "variants": {variant.name: {**variant.options, "votes": variant.votes} for variant in variants},
    }  # fmt: skip


__all__ = ["RUN_FORMAT", "EvaluationSettings", "item_key", "run_evaluation"]
