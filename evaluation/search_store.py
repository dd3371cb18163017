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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RUN_FORMAT, RESULTS_FORMAT, VERSION = "latent-search-run", "latent-search-results", 1
RUN, RESULTS, RESULTS_V1, TIMINGS = "run.json", "results.json", "results_v1.json", "timings.json"
ITEMS, REWARD_LOGS = "items", "reward_logs"
DONE, FAILED, SKIPPED = "done", "failed", "skipped"
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


class RunFolder:
    """A folder that a run is written to.

    Args:
        folder: made when absent.
        settings: what the results depend on, name to a value that JSON can hold.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = Path(folder), json.loads(json.dumps(dict(settings)))

    def check(self, resume: bool) -> None:
        """Refuse a folder that is not this run's.

        Raises:
            ValueError: finished questions and no `resume`; questions of another configuration; names the folder, the
                first setting that differs, both values and the remedy.
        """
        path = self.folder / RUN
        if not path.exists():
            if (self.folder / RESULTS).exists():
                raise ValueError(
                    f"{self.folder} holds the {RESULTS} of another program; give another output_dir, or judge that "
                    "file anew with verify_only"
                )
            if self.has_items():
                raise ValueError(f"{self.folder} holds questions and no {RUN}; restore it, or give another output_dir")
            return
        run = read_json(path)
        found = run.get("settings") if isinstance(run, Mapping) else None
        if not isinstance(found, Mapping) or run.get("format") != RUN_FORMAT or run.get("version") != VERSION:
            raise ValueError(
                f"{path} is not of this version of the library (format {RUN_FORMAT!r}, version {VERSION}); give "
                "another output_dir"
            )
        if not resume and self.has_items():
            raise ValueError(
                f"{self.folder} holds questions of an earlier run; go on with it with resume, or give another "
                "output_dir"
            )
        for name in dict.fromkeys([*found, *self.settings]) if self.has_items() else ():
            if found.get(name) != self.settings.get(name):
                raise ValueError(
                    f"{self.folder} was begun with {name}={found.get(name)!r}, now {name}="
                    f"{self.settings.get(name)!r}; give another output_dir, or the same as before"
                )

    def has_items(self) -> bool:
        """Whether a question was finished, or failed, in an earlier run."""
        return any(path.stat().st_size for path in self._item_files())

    def begin(self) -> None:
        """Write the settings; for one process."""
        head = {"format": RUN_FORMAT, "version": VERSION, "settings": self.settings}
        write_whole(self.folder / RUN, json.dumps(head, indent=1) + "\n")

    def append(self, worker: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Put finished questions on disk, all in one write.

        Args:
            worker: of this process; no two processes have one file.
            lines: see [`items`].
        """
        path = self.folder / ITEMS / f"worker-{worker:03d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = b"".join(json.dumps(dict(line)).encode() + b"\n" for line in lines)
        with path.open("a+b") as file:
            if file.tell() and not _ends_with_newline(file):
                data = b"\n" + data  # behind a line that a kill cut off
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def items(self) -> dict[int, dict[str, Any]]:
        """The finished questions by `data_idx`, each once: a finished one before a failed one, else the last line.

        A line that cannot be read is what a kill left; its question is not finished.
        """
        found: dict[int, dict[str, Any]] = {}
        for path in self._item_files():
            for data in path.read_bytes().split(b"\n"):
                try:
                    line = json.loads(data)
                    key, status = line["data_idx"], line["status"]
                except (ValueError, TypeError, KeyError):
                    continue
                if key not in found or found[key]["status"] == FAILED or status != FAILED:
                    found[key] = line
        return found

    def _item_files(self) -> list[Path]:
        return sorted((self.folder / ITEMS).glob("worker-*.jsonl"))


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


def write_whole(path: Path, text: str) -> None:
    """A file in UTF-8 that appears under its name when all of it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> Any:
    """The value of a file that a run left.

    Raises:
        ValueError: it cannot be read; names the file.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it, or run again into another folder") from error


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


__all__ = [
    "DONE",
    "ENTRY_FIELDS",
    "FAILED",
    "RESULTS",
    "RESULTS_FORMAT",
    "RESULTS_V1",
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
