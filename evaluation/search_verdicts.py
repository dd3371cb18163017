"""Right or wrong: the entries of a run of the search, judged by rule or by the LLM verifier, at its end or later.

Paper: "Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623 (card 7.1, 7.3,
7.4). Deviations from the published code, on purpose, in mode `"strict"`: what failed is apart from what is wrong; a
question that the verifier gave no verdict on is neither; `data_idx` is the position in the file, also when results are
judged anew.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.data.answers import STRICT
from trainers.data.answers_dmlr import MODES, extract_dmlr, score_dmlr, verifier_truth
from trainers.data.answers_staged import REFERENCE
from trainers.data.chat_client import Judgement

from .search_store import DONE, FAILED, RESULTS, RESULTS_V1, SKIPPED, read_json, results_text, write_whole
from .statistics import wilson_interval
from .verifier import LLMVerifier

_STATUS_OF_STOP = {"exception": FAILED, "skipped_no_gt": SKIPPED}


@dataclass(frozen=True)
class Truth:
    """The ground truth of a question: its solution as the file has it, and the text of the right option or None."""

    solution: Any
    text: str | None = None


@dataclass(frozen=True)
class SearchJudge:
    """Judges answers.

    Args:
        mode: `"strict"`, or `"reference"`: the published rules of extraction, judging and counting.
        verifier: asks a chat model (in the same mode); without one the rule judge decides.
    """

    mode: str = STRICT
    verifier: LLMVerifier | None = None

    def judge(self, entries: Sequence[Mapping[str, Any]], truths: Sequence[Truth]) -> list[Judgement]:
        """One judgement an entry. The rule judge reads the output, the verifier the answer that was taken from it."""
        if self.verifier is None:
            pairs = zip(entries, truths, strict=True)
            return [Judgement(score_dmlr(output_of(entry), truth.solution, self.mode)) for entry, truth in pairs]
        candidates = [self.answer(entry) for entry in entries]
        texts = [verifier_truth(truth.solution, truth.text, self.mode) for truth in truths]
        return self.verifier(candidates, texts)

    def answer(self, entry: Mapping[str, Any]) -> str:
        """The stored answer, else the one that the output gives."""
        stored = entry.get("answer")
        return stored if isinstance(stored, str) else extract_dmlr(output_of(entry), self.mode)

    @property
    def description(self) -> dict[str, Any]:
        """Who judges, for a result file."""
        kind = {"kind": "rule", "mode": self.mode}
        return kind if self.verifier is None else {**kind, "kind": "llm", "model": self.verifier.settings.model}


def output_of(entry: Mapping[str, Any]) -> str:
    """What the model said; old files call it `response`."""
    output = entry.get("model_output", entry.get("response"))
    return output if isinstance(output, str) else ""


def status_of(entry: Mapping[str, Any]) -> str:
    """`"done"`, `"failed"` or `"skipped"`; a published file says it in `stop_reason`."""
    return entry.get("status") or _STATUS_OF_STOP.get(entry.get("stop_reason"), DONE)


def judged(entry: Mapping[str, Any], judgement: Judgement, truth: Truth) -> dict[str, Any]:
    """What a verdict adds to an entry of `results_v1.json`: of both rule judges, too."""
    output = output_of(entry)
    return {
        "verdict": {"correct": judgement.correct, "error": judgement.error, "reply": judgement.reply},
        "rule": {mode: score_dmlr(output, truth.solution, mode) for mode in MODES},
    }


def tally(entries: Iterable[Mapping[str, Any]], mode: str) -> dict[str, Any]:
    """`accuracy`, `correct` and `total` as in `results.json`.

    In mode `"reference"` every entry counts; in mode `"strict"` a question without ground truth, or without a verdict,
    counts for nothing, and one that failed as wrong.
    """
    entries = list(entries)
    counted = [entry for entry in entries if mode == REFERENCE or _counts(entry)]
    correct = sum(entry.get("is_correct") is True for entry in counted)
    return {"accuracy": correct / len(counted) if counted else 0.0, "correct": correct, "total": len(counted)}


def _counts(entry: Mapping[str, Any]) -> bool:
    return status_of(entry) != SKIPPED and isinstance(entry.get("is_correct"), bool)


def summary(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of the entries of `results_v1.json`, each kind apart.

    Returns:
        `counts`: questions, correct, wrong, unverified (no verdict), failed (no answer), skipped (no ground truth),
        cut_off (answers that the budget of tokens ended, among all answers); `accuracy`: of those with a verdict, with
        its 95 % Wilson `interval`, None where there is none; `accuracy_of_all`: unverified and failed ones as wrong;
        `unverified`: how often each reason occurs.
    """
    entries = list(entries)
    done = [entry for entry in entries if status_of(entry) == DONE]
    verdicts = Counter(entry.get("is_correct") for entry in done)
    status = Counter(map(status_of, entries))
    correct, decided, asked = verdicts[True], verdicts[True] + verdicts[False], len(done) + status[FAILED]
    errors = Counter(entry["verdict"]["error"] for entry in done if entry.get("verdict", {}).get("error"))
    return {
        "counts": {
            "questions": len(entries),
            "correct": correct,
            "wrong": verdicts[False],
            "unverified": verdicts[None],
            "failed": status[FAILED],
            "skipped": status[SKIPPED],
            "cut_off": sum(entry.get("stop", {}).get(STRICT) == "length" for entry in done),
        },
        "accuracy": correct / decided if decided else None,
        "interval": list(wilson_interval(correct, decided)) if decided else None,
        "accuracy_of_all": correct / asked if asked else None,
        "unverified": dict(errors.most_common()),
    }


def verify_results(
    folder: str | os.PathLike, truths: Mapping[int, Truth], judge: SearchJudge
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Judge the entries of a `results.json` anew, without the model; of a `results_v1.json` beside it, too.

    As published, an entry without truth stays as it is and counts for nothing, and fields that are not known here are
    kept. In mode `"strict"` entries that failed or were skipped stay as they are.

    Args:
        folder: holds the files.
        truths: by `data_idx`.
        judge: who judges.

    Returns:
        The content of `results.json`, and the [`summary`] of the entries that have a truth.

    Raises:
        ValueError: no such file, or one without entries.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise ValueError(f"{path} does not exist, so there is nothing to verify; run without verify_only first")
    results = read_json(path)
    if not isinstance(results, dict) or not isinstance(results.get("entries"), list):
        raise ValueError(f"{path} has no list of entries; verify_only needs the {RESULTS} of a run")
    visited = [entry for entry in results["entries"] if _is_visited(entry, truths, judge.mode)]
    again = [entry for entry in visited if judge.mode == REFERENCE or status_of(entry) == DONE]
    found = [_truth(entry, truths) for entry in again]
    verdicts = judge.judge(again, found)
    by_idx = {entry["data_idx"]: verdict for entry, verdict in zip(again, verdicts, strict=True)}
    for entry, truth, verdict in zip(again, found, verdicts, strict=True):
        entry.update(ground_truth=truth.solution, is_correct=verdict.correct)
    results.update(tally(visited, judge.mode))
    rich = _verified_v1(path.with_name(RESULTS_V1), truths, by_idx, judge)
    write_whole(path, results_text(results))
    if rich is not None:
        write_whole(path.with_name(RESULTS_V1), results_text(rich) + "\n")
    errors = {index: {"verdict": {"error": verdict.error}} for index, verdict in by_idx.items()}
    return results, summary({**entry, **errors.get(entry["data_idx"], {})} for entry in visited)


def _truth(entry: Mapping[str, Any], truths: Mapping[int, Truth]) -> Truth:
    """The truth of an entry; a text of the right option that the entry has comes first."""
    truth = truths[entry["data_idx"]]
    return Truth(truth.solution, entry.get("ground_truth_text") or truth.text)


def _is_visited(entry: Any, truths: Mapping[int, Truth], mode: str) -> bool:
    index = entry.get("data_idx") if isinstance(entry, dict) else None
    known = isinstance(index, int) and not isinstance(index, bool) and index in truths
    return known and (mode == REFERENCE or truths[index].solution is not None)


def _verified_v1(
    path: Path, truths: Mapping[int, Truth], verdicts: Mapping[int, Judgement], judge: SearchJudge
) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    rich = read_json(path)
    for entry in rich["entries"]:
        verdict = verdicts.get(entry["data_idx"])
        if verdict is not None:
            truth = _truth(entry, truths)
            entry.update(ground_truth=truth.solution, is_correct=verdict.correct, **judged(entry, verdict, truth))
    rich.update(summary(rich["entries"]), judge=judge.description)
    return rich


__all__ = [
    "SearchJudge",
    "Truth",
    "judged",
    "output_of",
    "status_of",
    "summary",
    "tally",
    "verify_results",
]
