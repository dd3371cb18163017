"""The folder of a run of the search: finished questions as they come, and the result files made of them.

    run.json                              settings of the run: a folder is gone on with only under the same ones
    items/worker-000.jsonl                one line a finished question, appended by one process
    results.json                          as the published code writes it
    results_v1.json                       the same entries with all that is known of them, `version` 1
    timings.json                          seconds of each question: all that differs between two equal runs
    reward_logs/reward_steps_000000.csv   one row a step of question 0, as published
    verdicts.jsonl                        what the LLM verifier said, see `verifier.py`

Paper: "Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623 (card 7.2).

A line is on disk before the next question begins, and a line that a kill cut off is passed over, so that whatever ends
a run costs the questions of one batch, and no question counts twice. Files other than lines appear whole.

Deviations from the published code, on purpose: `data_idx` is always the position in the file (there, in one process,
that in the slice); `logistics.pt`, which holds what the lines hold, is not written.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .run_folder import DONE, FAILED, RESULTS, SKIPPED, VERSION, RunFolder, read_json, write_whole

RUN_FORMAT, RESULTS_FORMAT = "latent-search-run", "latent-search-results"
RESULTS_V1, TIMINGS = "results_v1.json", "timings.json"
REWARD_LOGS = "reward_logs"
ENTRY_FIELDS = (
    "data_idx",
    "question",
    "image_path",
    "sys_prompt",
    "prompt",
    "model_output",
    "answer",
    "ground_truth",
    "ground_truth_text",
    "is_correct",
    "best_reward",
    "best_reward_step",
    "stop_reason",
)
STEP_FIELDS = ("step", "reward", "sigma", "is_new_best", "patch_count", "patch_budget")


# Result files -------------------------------------------------------------------------------------------------------


def published_results(head: Mapping[str, Any], entries: Iterable[Mapping[str, Any]]) -> str:
    """The text of `results.json`: fields of the head and of each entry in the published order.

    Args:
        head: `model`, `dataset`, `accuracy`, `correct`, `total`, `config`, `args`.
        entries: with `ENTRY_FIELDS`; what else they have is left out.
    """
    kept = [{name: entry[name] for name in ENTRY_FIELDS} for entry in entries]
    names = ("model", "dataset", "accuracy", "correct", "total", "config", "args")
    return results_text({**{name: head[name] for name in names}, "entries": kept})


def results_text(results: Mapping[str, Any]) -> str:
    """A result file as the published code lays it out: indent 2, no escapes, no line break at its end."""
    return json.dumps(results, ensure_ascii=False, indent=2)


def reward_csv(steps: Iterable[Mapping[str, Any]], sigma: float, sigma_decay: float) -> str:
    """The published log of a question: one row a step, rows end with CRLF.

    Args:
        steps: with `STEP_FIELDS`.
        sigma, sigma_decay: the noise level after a step is multiplied step by step, as there.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(STEP_FIELDS)
    for step in steps:
        sigma *= sigma_decay
        row = {**step, "sigma": sigma, "is_new_best": int(step["is_new_best"])}
        writer.writerow([row[name] for name in STEP_FIELDS])
    return text.getvalue()


def csv_path(folder: str | os.PathLike, data_idx: int) -> Path:
    """Where the log of a question is."""
    return Path(folder) / REWARD_LOGS / f"reward_steps_{data_idx:06d}.csv"


__all__ = [
    "DONE",
    "ENTRY_FIELDS",
    "FAILED",
    "RESULTS",
    "RESULTS_FORMAT",
    "RESULTS_V1",
    "RUN_FORMAT",
    "SKIPPED",
    "STEP_FIELDS",
    "TIMINGS",
    "VERSION",
    "RunFolder",
    "csv_path",
    "published_results",
    "read_json",
    "results_text",
    "reward_csv",
    "write_whole",
]
