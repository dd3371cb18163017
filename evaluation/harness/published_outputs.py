"""Prediction files as the published evaluations write and merge them.

LASER (arXiv 2601.06803, card 7): a folder a benchmark and strategy, JSON lists, one file a rank that a script merges.
LaViT (arXiv 2601.10129, card 7): JSON lines. DMLR (arXiv 2512.12623, card 7): one `results.json`.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.data.predictions import whole_file
from trainers.data.records import Record

from ..benchmarks.benchmark import AskProtocol, Scored
from ..run_folder import read_json
from ..runner import Prediction

PUBLISHED_FORMS = ("laser", "lavit", "dmlr")
_SHUFFLE_SEED = 42  # of the published split into ranks
_CATEGORIES = ("category", "l2_category", "subcategory")


def laser_record(record: Record, prediction: Prediction, protocol: AskProtocol) -> dict[str, Any]:
    """An entry of LASER's files: id, query, replies with special tokens, label as in the data, categories."""
    fields, meta = record["meta"].get("fields", {}), record["meta"]
    label = fields.get("Correct Answer", fields.get("gt_answer", record["answer"]))
    entry = {
        "id": str(fields.get("question_id", meta["row"])) if "gt_answer" in fields else record["id"],
        "question": protocol.ask(record),
        "prediction": [prediction.raw],
        "label": str(label),
    }
    named = {name: str(fields[name]) for name in _CATEGORIES if name in fields}
    if "question_image_type" in fields:
        named = {"category": fields["question_image_type"]}
    elif meta.get("ds_name") == "blink":
        named = {"category": meta["group"]}
    elif "gt_answer" in fields:
        named = {"category": "unknown", "subcategory": "unknown", **named}
    return {**entry, **named}


def laser_path(
    folder: str | Path, benchmark: str, model: str | Path, options: Mapping[str, Any], instruction: bool = True
) -> Path:
    """Where LASER's scripts write the predictions of a model.

    Args:
        folder: of all results.
        benchmark: its name.
        model: path of the checkpoint: the names of its folder and of the one above are kept.
        options: of `generate`.
        instruction: whether the query has the instruction.
    """
    strategy, steps = options["latent_strategy"], options.get("num_latent_steps")
    cap = options.get("max_latent_steps")
    parts = [f"decoding_by_{'steps' if strategy == 'fixed' else strategy}"]
    parts += [f"max{cap}"] if strategy == "dynamic" and cap is not None else []
    parts += ["with_inst"] if instruction else []
    parts += ["rep_exit"] if options.get("repetition_exit") else []
    path = Path(model)
    name = (
        "dynamic.json"
        if strategy == "dynamic"
        else f"{'steps' if strategy == 'fixed' else strategy}{steps or 0:03d}.json"
    )
    return Path(folder) / benchmark / "_".join(parts) / f"{path.parent.name}_{path.name}" / name


def lavit_line(record: Record, prediction: Prediction, protocol: AskProtocol) -> dict[str, Any]:
    """A line of LaViT's files; learned tokens that were laid out are counted and no part of `model_output`."""
    fields = record["meta"].get("fields", {})
    return {
        "id": record["id"],
        "prompt": protocol.ask(record),
        "ground_truth": str(fields.get("Correct Answer", record["answer"])),
        "model_output": prediction.raw,
        "lvr_count": prediction.num_latent_steps,
        "meta": {name: value for name, value in fields.items() if name not in ("question", "prompt")},
    }


def dmlr_results(
    model: str, dataset: str, records: Sequence[Record], predictions: Sequence[Prediction], scored: Sequence[Scored]
) -> dict[str, Any]:
    """A `results.json` of DMLR for replies that no search made: its fields, those of the search empty."""
    entries = [
        {
            "data_idx": number, "question": record["question"], "image_path": None, "sys_prompt": "", "prompt": "",
            "model_output": prediction.text, "answer": each.answer, "ground_truth": record["answer"],
            "ground_truth_text": record["meta"].get("extra", {}).get("answer_text"), "is_correct": each.correct,
            "best_reward": None, "best_reward_step": None, "stop_reason": "no_search",
        }
        for number, (record, prediction, each) in enumerate(zip(records, predictions, scored, strict=True))
    ]  # fmt: skip
    correct = sum(each.correct for each in scored)
    head = {"model": model, "dataset": dataset, "accuracy": correct / len(scored), "correct": correct,
            "total": len(scored), "config": {}, "args": {}}  # fmt: skip
    return {**head, "entries": entries}


def write_published(
    form: str,
    path: str | Path,
    model: str,
    dataset: str,
    protocol: AskProtocol,
    records: Sequence[Record],
    predictions: Sequence[Prediction],
) -> Path:
    """Write predictions in a published form.

    Args:
        form: one of `PUBLISHED_FORMS`.
        path: the file.
        model, dataset: names.
        protocol: that was asked with.
        records, predictions: in order.

    Raises:
        ValueError: an unknown form, or a protocol whose queries cannot be written.
    """
    if form not in PUBLISHED_FORMS:
        raise ValueError(f"unknown form of predictions {form!r}; choose one of {list(PUBLISHED_FORMS)}")
    if protocol.ask is None:
        raise ValueError(f"the protocol {protocol.name!r} has no query alone, which {form} writes; take another form")
    pairs = list(zip(records, predictions, strict=True))
    if form == "laser":
        text = json.dumps([laser_record(*pair, protocol) for pair in pairs], ensure_ascii=False, indent=4)
    elif form == "lavit":
        text = "\n".join(json.dumps(lavit_line(*pair, protocol), ensure_ascii=False) for pair in pairs) + "\n"
    else:
        scored = [protocol.score(*pair) for pair in pairs]
        text = json.dumps(dmlr_results(model, dataset, records, predictions, scored), ensure_ascii=False, indent=2)
    with whole_file(path) as file:
        file.write(text)
    return Path(path)


def published_shards(count: int, world_size: int) -> list[list[int]]:
    """Which items each rank of LASER's parallel run has: shuffled unless alone, and cut; the last one has the rest."""
    order = list(range(count))
    if world_size > 1:
        random.Random(_SHUFFLE_SEED).shuffle(order)
    share = count // world_size
    ends = [*(share * rank for rank in range(world_size)), count]
    return [order[first:last] for first, last in zip(ends, ends[1:], strict=False)]


def merge_ranks(path: str | Path, num_ranks: int) -> list[dict[str, Any]]:
    """The entries of all ranks of a LASER run, in rank order; written under the name without a rank.

    Args:
        path: `.../dynamic.json`; the ranks are `.../dynamic_rank0.json` and so on.
        num_ranks: number of processes.

    Raises:
        ValueError: a rank is missing or no list; names it (the published script only warns).
    """
    target = Path(path)
    files = [target.with_name(f"{target.stem}_rank{rank}{target.suffix}") for rank in range(num_ranks)]
    missing = [file.name for file in files if not file.is_file()]
    if missing or num_ranks < 1:
        raise ValueError(f"{target.parent} lacks {missing or 'ranks'} of {num_ranks}; finish these ranks, then merge")
    entries: list[dict[str, Any]] = []
    for file in files:
        found = read_json(file)
        if not isinstance(found, list):
            raise ValueError(f"{file} holds {type(found).__name__} in place of a list of entries; run the rank again")
        entries += found
    with whole_file(target) as written:
        written.write(json.dumps(entries, ensure_ascii=False, indent=4))
    return entries


def merged_summary(entries: Sequence[Mapping[str, Any]], score: Any) -> list[str]:
    """The lines that LASER's merge script prints: all, and by category where there are several."""
    rights = [bool(score(_reply(entry), entry["label"])) for entry in entries]
    groups: dict[str, list[bool]] = {}
    for entry, right in zip(entries, rights, strict=True):
        groups.setdefault(str(entry.get("category", "Unknown")), []).append(right)
    lines = [("Accuracy", rights)] + (sorted(groups.items()) if len(groups) > 1 else [])
    return [f"{name}: {sum(own)}/{len(own)} = {100 * sum(own) / len(own):.2f}%" for name, own in lines]


def _reply(entry: Mapping[str, Any]) -> str:
    prediction = entry["prediction"]
    return prediction if isinstance(prediction, str) else prediction[0]


__all__ = [
    "PUBLISHED_FORMS", "dmlr_results", "laser_path", "laser_record", "lavit_line", "merge_ranks", "merged_summary",
    "published_shards", "write_published",
]  # fmt: skip
