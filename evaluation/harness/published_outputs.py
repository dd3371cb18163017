"""Prediction files as the published evaluations write and merge them.

LASER (arXiv 2601.06803, card 7): a folder a benchmark and strategy, JSON lists, one file a rank that a script merges.
LVR (arXiv 2509.24251, card 7): JSON lists. LaViT (arXiv 2601.10129, card 7): JSON lines. DMLR (arXiv 2512.12623,
card 7): one `results.json`. IVT-LR (arXiv 2510.12603, card 7): JSON lines of M3CoT, one JSON object of ScienceQA.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.data.answers import (
    LASER,
    score_choice_relaxed,
    score_letter,
    score_mmvp,
    score_yes_no,
    score_yes_no_relaxed,
)
from trainers.data.answers_staged import REFERENCE, extract_scienceqa
from trainers.data.predictions import (
    m3cot_prediction,
    scienceqa_predictions,
    whole_file,
    write_m3cot_predictions,
    write_scienceqa_predictions,
)
from trainers.data.records import Record

from ..benchmarks.benchmark import AskProtocol
from ..benchmarks.choice_items import mmstar_facts
from ..run_folder import read_json
from ..runner import Prediction
from ..search_store import published_results
from .replies import scores
from .variants import Asked

PUBLISHED_FORMS = ("laser", "lvr", "lavit", "dmlr", "ivtlr")
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


def lvr_record(record: Record, prediction: Prediction) -> dict[str, Any]:
    """An entry of LVR's files: id, reply, letter, and the category where the set has some."""
    meta, fields = record["meta"], record["meta"].get("fields", {})
    entry = {"id": record["id"], "prediction": [prediction.text], "label": record["answer"]}
    has_category = meta.get("ds_name") in ("blink", "vstar") or "category" in fields
    return entry | ({"category": meta["group"]} if has_category else {})


def lavit_line(record: Record, prediction: Prediction, protocol: AskProtocol) -> dict[str, Any]:
    """A line of LaViT's files; learned tokens that were laid out are counted and no part of `model_output`."""
    fields = record["meta"].get("fields", {})
    return {
        "id": record["id"],
        "prompt": record["meta"].get("prompt") or protocol.ask(record),
        "ground_truth": str(fields.get("Correct Answer", record["answer"])),
        "model_output": prediction.raw,
        "lvr_count": prediction.num_latent_steps,
        "meta": _lavit_meta(record, fields),
    }


def _lavit_meta(record: Record, fields: Mapping[str, Any]) -> dict[str, Any]:
    name = record["meta"].get("ds_name")
    if "item" in record["meta"]:  # the lines of VSP
        return record["meta"]["item"]
    if name == "blink":
        return {"task": fields["task"], "choices": record["choices"], "num_images": len(record["images"])}
    if name == "mmstar":
        return mmstar_facts(fields)
    if name == "vstar":
        return {"category": fields.get("category")}
    return {key: value for key, value in fields.items() if key != "task"}


def dmlr_results(model: str, asked: Asked, predictions: Sequence[Prediction]) -> str:
    """A `results.json` of DMLR for replies of any strategy: its fields, those of the search's log empty."""
    scored = scores(asked, predictions)
    entries = [
        {
            "data_idx": number, "question": record["question"], "image_path": record["meta"].get("image_path", ""),
            "sys_prompt": "", "prompt": asked.protocol.ask(record), "model_output": prediction.text,
            "answer": each.answer, "ground_truth": record["answer"],
            "ground_truth_text": record["meta"].get("extra", {}).get("answer_text"), "is_correct": each.correct,
            "best_reward": None, "best_reward_step": None, "stop_reason": "other",
        }
        for number, (record, prediction, each) in enumerate(zip(asked.records, predictions, scored, strict=True))
    ]  # fmt: skip
    correct = sum(each.correct for each in scored)
    counts = {"accuracy": correct / len(scored), "correct": correct, "total": len(scored)}
    head = {"model": model, "dataset": asked.benchmark.name, **counts, "config": {}, "args": {}}
    return published_results(head, entries)


def write_published(form: str, path: str | Path, model: str, asked: Asked, predictions: Sequence[Prediction]) -> Path:
    """Write predictions in a published form.

    Args:
        form: one of `PUBLISHED_FORMS`.
        path: the file.
        model: its name.
        asked: what was asked.
        predictions: to its records.

    Raises:
        ValueError: an unknown form, a protocol whose queries cannot be written, a benchmark that has no such form.
    """
    protocol, target = asked.protocol, Path(path)
    if form not in PUBLISHED_FORMS:
        raise ValueError(f"unknown form of predictions {form!r}; choose one of {list(PUBLISHED_FORMS)}")
    if protocol.ask is None:
        raise ValueError(f"the protocol {protocol.name!r} has no query alone, which {form} writes; take another form")
    if form == "ivtlr":
        return _write_ivtlr(target, asked, predictions)
    pairs = list(zip(asked.records, predictions, strict=True))
    if form == "laser":
        text = json.dumps([laser_record(*pair, protocol) for pair in pairs], ensure_ascii=False, indent=4)
    elif form == "lvr":
        text = json.dumps([lvr_record(*pair) for pair in pairs], ensure_ascii=False, indent=4)
    elif form == "lavit":
        text = "".join(json.dumps(lavit_line(*pair, protocol), ensure_ascii=False) + "\n" for pair in pairs)
    else:
        text = dmlr_results(model, asked, predictions)
    with whole_file(target) as file:
        file.write(text)
    return target


def _write_ivtlr(path: Path, asked: Asked, predictions: Sequence[Prediction]) -> Path:
    name, records = asked.benchmark.name, asked.records
    if name == "m3cot":
        rows = zip(records, predictions, strict=True)
        write_m3cot_predictions(
            path, [m3cot_prediction(record, asked.protocol.ask(record), reply.text) for record, reply in rows]
        )
    elif name == "scienceqa":
        found = [extract_scienceqa(reply.text, REFERENCE) for reply in predictions]
        write_scienceqa_predictions(path, scienceqa_predictions(records, found))
    else:
        raise ValueError(f"there is no published form of prediction files of {name}; results.json has them")
    return path


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
        ValueError: a rank is missing or no list of entries; names it (the published script only warns).
    """
    target = Path(path)
    files = [target.with_name(f"{target.stem}_rank{rank}{target.suffix}") for rank in range(num_ranks)]
    missing = [file.name for file in files if not file.is_file()]
    if missing or num_ranks < 1:
        raise ValueError(f"{target.parent} lacks {missing or 'ranks'} of {num_ranks}; finish these ranks, then merge")
    more = target.with_name(f"{target.stem}_rank{num_ranks}{target.suffix}")
    if more.is_file():
        raise ValueError(f"{more} is a further rank than the {num_ranks} that are to be merged; give --num_ranks")
    entries: list[dict[str, Any]] = []
    for file in files:
        entries += _checked_entries(file)
    with whole_file(target) as written:
        written.write(json.dumps(entries, ensure_ascii=False, indent=4))
    return entries


def _checked_entries(file: Path) -> list[dict[str, Any]]:
    found = read_json(file)
    if not isinstance(found, list):
        raise ValueError(f"{file} holds {type(found).__name__} in place of a list of entries; run the rank again")
    for number, entry in enumerate(found):
        if not isinstance(entry, Mapping) or "label" not in entry or not entry.get("prediction"):
            raise ValueError(f"{file}, entry {number}: needs prediction and label, got {entry!r:.120}; run it again")
    return found


def merged_summary(entries: Sequence[Mapping[str, Any]], benchmark: str = "") -> list[str]:
    """The lines that LASER's merge script prints: all, and by category where there are several.

    Args:
        entries: of [`merge_ranks`].
        benchmark: whose published scorer is taken: yes or no (HallusionBench), with options (MMVP), relaxed (VSR,
            CUB), else letters.
    """
    if not entries:
        raise ValueError("no entries; the ranks have none")
    rights = [_is_right(entry, benchmark) for entry in entries]
    groups: dict[str, list[bool]] = {}
    for entry, right in zip(entries, rights, strict=True):
        groups.setdefault(str(entry.get("category", "Unknown")), []).append(right)
    lines = [("Accuracy", rights)] + (sorted(groups.items()) if len(groups) > 1 else [])
    return [f"{name}: {sum(own)}/{len(own)} = {100 * sum(own) / len(own):.2f}%" for name, own in lines]


def _is_right(entry: Mapping[str, Any], benchmark: str) -> bool:
    prediction, label = entry["prediction"], entry["label"]
    reply = prediction if isinstance(prediction, str) else prediction[0]
    if benchmark == "mmvp":
        return score_mmvp(reply, label, entry["question"], LASER)
    if benchmark in ("vsr", "cub"):
        return {"vsr": score_yes_no_relaxed, "cub": score_choice_relaxed}[benchmark](reply, label)
    return (score_yes_no if benchmark == "hallusionbench" else score_letter)(reply, label, LASER)


__all__ = [
    "PUBLISHED_FORMS", "dmlr_results", "laser_path", "laser_record", "lavit_line", "lvr_record", "merge_ranks",
    "merged_summary", "published_shards", "write_published",
]  # fmt: skip
