"""A run of the search over a data set: answers, verdicts and result files; killed at any moment it can go on.

    questions, _ = read_questions("data.json", end_data_idx=100)
    plan = SearchPlan(options={"num_thought_tokens": 4})
    results = run_search("out", questions, plan, SearchJudge(), lambda: (model, processor))

Paper: "Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623 (card 7).

| question | file |
|---|---|
| what is asked | `search_questions` |
| how it is answered | `search_answers` |
| what is right | `search_verdicts`, `verifier` |
| what is on disk | `search_store` |

Every process of a run calls [`run_search`], each with its model; they share the questions that are left, and the first
one judges and writes the results. With a generator of noise for each question (`noise_stream="item"`) the results
depend neither on the number of processes nor on where a run was killed, to the byte; the size of batches changes the
rounding alone.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from trainers.data.answers import STRICT
from trainers.data.answers_staged import REFERENCE
from trainers.data.chat_client import Judgement

from .search_answers import GIVE_UP, SearchAnswers, SearchPlan, SearchRunError
from .search_questions import Question
from .search_store import (
    DONE,
    FAILED,
    RESULTS,
    RESULTS_FORMAT,
    RESULTS_V1,
    RUN_FORMAT,
    SKIPPED,
    TIMINGS,
    VERSION,
    RunFolder,
    csv_path,
    published_results,
    results_text,
    reward_csv,
    write_whole,
)
from .search_verdicts import SearchJudge, Truth, judged, summary, tally

Load = Callable[[], tuple[PreTrainedModel, Any]]


@dataclass(frozen=True)
class Workers:
    """The processes of a run.

    Args:
        index: of this one.
        number: of all.
        wait: returns when all processes have called it.
    """

    index: int = 0
    number: int = 1
    wait: Callable[[], Any] = lambda: None


def run_search(
    folder: str | os.PathLike,
    questions: Sequence[Question],
    plan: SearchPlan,
    judge: SearchJudge,
    load: Load,
    *,
    model: str = "",
    dataset: str = "",
    config: Mapping[str, Any] | None = None,
    args: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    batch_size: int = 1,
    save_reward_csv: bool = True,
    csv_folder: str | os.PathLike | None = None,
    workers: Workers | None = None,
    progress: bool = False,
) -> dict[str, Any] | None:
    """Answer questions, judge the answers, write the results.

    Args:
        folder: see `search_store`.
        questions: of [`read_questions`].
        plan: how they are answered.
        judge: of the answers; only the first process asks it.
        load: gives model and processor; called where something is left to answer.
        model, dataset, config, args: for the head of `results.json`.
        settings: what answers depend on beside the plan, e.g. `{"dtype": "float32"}`.
        resume: go on with the folder; finished questions are not answered again, failed ones are.
        batch_size: questions at a time.
        save_reward_csv: write the published log of each question.
        csv_folder: where `reward_logs` goes; by default `folder`.
        workers: the processes; by default this one.
        progress: show a progress bar on the first process.

    Returns:
        The content of `results_v1.json`, on the first process; None on others.

    Raises:
        ValueError: a folder of another run or configuration; options that do not go together; other questions than
            those that were answered.
        SearchRunError: questions fail one after the other; what is finished is kept.
    """
    workers = workers or Workers()
    _check(questions, plan, batch_size, workers)
    head = {"model": model, "dataset": dataset, "config": dict(config or {}), "args": dict(args or {})}
    place = {"start_data_idx": questions[0].data_idx} if plan.noise_stream == "run" else {}
    described = {"model": model, "dataset": dataset, **plan.description(), **(settings or {}), **place}
    run = RunFolder(folder, described, RUN_FORMAT)
    run.check(resume)
    batches, stream = _left(run, questions, plan, batch_size)
    workers.wait()  # all have looked before anything is written
    if workers.index == 0:
        run.begin()
    workers.wait()  # no answer is on disk before its settings are
    mine = batches[workers.index :: workers.number]
    if mine:
        answers = SearchAnswers(*load(), plan)
        if stream is not None:
            answers.stream = stream
        _answer(run, answers, mine, workers, progress)
    workers.wait()
    if workers.index:
        return None
    logs = Path(folder if csv_folder is None else csv_folder) if save_reward_csv else None
    return _finish(run, questions, plan, judge, head, logs)


def _check(questions: Sequence[Question], plan: SearchPlan, batch_size: int, workers: Workers) -> None:
    if not questions:
        raise ValueError("there are no questions; give at least one")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be 1 or more")
    if plan.noise_stream == "run" and (batch_size > 1 or workers.number > 1):
        raise ValueError(
            f"noise_stream='run' draws the noise of one question after the other, and batch_size={batch_size} with "
            f"{workers.number} processes answers several at a time; take batch_size=1 in one process, or "
            "noise_stream='item'"
        )
    step = plan.first_injecting_step
    text = [question.data_idx for question in questions if question.record is not None and not question.has_image]
    if plan.mode == REFERENCE and step is not None and text:
        raise ValueError(
            f"{len(text)} questions have no image (the first is {text[0]}), and in mode='reference' step {step} "
            f"interleaves image tokens; set visual_injection_start_step to {plan.settings.max_num_steps}, or take "
            "mode='paper'"
        )


def _left(
    run: RunFolder, questions: Sequence[Question], plan: SearchPlan, batch_size: int
) -> tuple[list[Sequence[Question]], str | None]:
    """The batches that are still to be answered, and the state of the noise before them (published stream).

    Batches are those of the whole run: one that was not finished is answered as a whole again, so that no rounding of
    an answer depends on what was finished before.
    """
    items = run.items()
    for question in questions:
        line = items.get(question.data_idx)
        if line is not None and line["status"] != FAILED and line["digest"] != question.digest:
            raise ValueError(
                f"{run.folder} has an answer to another question {question.data_idx} than {question.question!r:.80}: "
                "the data were changed; give another output_dir"
            )
    batches = [questions[first : first + batch_size] for first in range(0, len(questions), batch_size)]
    if plan.noise_stream == "item":
        return [batch for batch in batches if not all(_is_finished(question, items) for question in batch)], None
    count = next((i for i, question in enumerate(questions) if question.data_idx not in items), len(questions))
    behind = [question.data_idx for question in questions[count:] if question.data_idx in items]
    if behind:
        raise ValueError(
            f"{run.folder} has question {behind[0]} and lacks {questions[count].data_idx} before it, which "
            "noise_stream='run' needs; give another output_dir"
        )
    return batches[count:], items[questions[count - 1].data_idx]["stream"] if count else None


def _is_finished(question: Question, items: Mapping[int, Mapping[str, Any]]) -> bool:
    """A question that failed is asked again, unless its row is what is still wrong."""
    line = items.get(question.data_idx)
    return line is not None and (line["status"] != FAILED or question.problem is not None)


def _answer(
    run: RunFolder,
    answers: SearchAnswers,
    batches: Sequence[Sequence[Question]],
    workers: Workers,
    progress: bool,
) -> None:
    failures, answered = 0, any(line["status"] == DONE for line in run.items().values())
    hidden = not (progress and workers.index == 0)
    with tqdm(total=sum(map(len, batches)), desc="questions", disable=hidden) as bar:
        for number, batch in enumerate(batches, 1):
            lines = [{**line, "worker": workers.index} for line in answers(batch)]
            run.append(workers.index, lines)
            bar.update(len(batch))
            for line in lines:
                if line["status"] == DONE:
                    failures, answered = 0, True
                elif line["status"] == FAILED and not line["its_own"]:
                    failures += 1
                if failures >= GIVE_UP or (failures and number == len(batches) and not answered):
                    raise SearchRunError(
                        f"{failures} questions in a row failed, the last one, {line['data_idx']}, with "
                        f"{line['error']:.500}; repair the cause and go on with resume, which asks them again"
                    )


# Results ------------------------------------------------------------------------------------------------------------


def _finish(
    run: RunFolder,
    questions: Sequence[Question],
    plan: SearchPlan,
    judge: SearchJudge,
    head: Mapping[str, Any],
    logs: Path | None,
) -> dict[str, Any]:
    """Judge and write everything; nothing of it depends on which process answered what, or when."""
    items = run.items()
    missing = [question.data_idx for question in questions if question.data_idx not in items]
    if missing:
        raise SearchRunError(
            f"{len(missing)} questions have no answer, the first is {missing[0]}: a process of this run ended early; "
            "go on with resume"
        )
    lines = [items[question.data_idx] for question in questions]
    entries = [_entry(question, line, plan, judge) for question, line in zip(questions, lines, strict=True)]
    _judge(questions, entries, judge)
    results = {
        "format": RESULTS_FORMAT,
        "version": VERSION,
        "model": head["model"],
        "dataset": head["dataset"],
        "judge": judge.description,
        **summary(entries),
        "config": head["config"],
        "args": head["args"],
        "settings": run.settings,
        "entries": entries,
    }
    if logs is not None and plan.strategy == "search":
        for question, line in zip(questions, lines, strict=True):
            if line["status"] == DONE:
                text = reward_csv(line["steps"], plan.settings.sigma, plan.settings.sigma_decay)
                write_whole(csv_path(logs, question.data_idx), text)
    seconds = {
        str(line["data_idx"]): {**line["seconds"], "worker": line["worker"]} for line in lines if "seconds" in line
    }
    write_whole(run.folder / TIMINGS, results_text({"questions": seconds}) + "\n")
    write_whole(run.folder / RESULTS_V1, results_text(results) + "\n")
    write_whole(run.folder / RESULTS, published_results({**head, **tally(entries, judge.mode)}, entries))
    return results


def _entry(question: Question, line: Mapping[str, Any], plan: SearchPlan, judge: SearchJudge) -> dict[str, Any]:
    """The published fields, and what else is known."""
    status, paper = line["status"], plan.mode != REFERENCE
    entry = {
        "data_idx": question.data_idx,
        "question": question.question,
        "image_path": question.image_path,
        "sys_prompt": line.get("sys_prompt", ""),
        "prompt": line.get("prompt", ""),
        "model_output": line.get("output", ""),
        "answer": None,
        "ground_truth": question.solution,
        "ground_truth_text": question.solution_text if paper else None,
        "is_correct": False,
        "best_reward": line.get("best_reward"),
        "best_reward_step": line.get("best_reward_step"),
        "stop_reason": "skipped_no_gt",
        "status": status,
    }
    if status == FAILED:
        return {
            **entry,
            "model_output": f"[GENERATION_ERROR] {line['error']}",
            "stop_reason": "exception",
            "error": line["error"],
        }
    if status == SKIPPED:
        return entry
    return {
        **entry,
        "answer": judge.answer(entry),
        "stop_reason": line["stop"][STRICT if paper else REFERENCE],
        **{name: line[name] for name in ("stop", "num_tokens", "num_image_tokens", "stopped", "steps", "patches")},
    }


def _judge(questions: Sequence[Question], entries: Sequence[dict[str, Any]], judge: SearchJudge) -> None:
    pairs = [
        (entry, Truth(question.solution, entry["ground_truth_text"]))
        for question, entry in zip(questions, entries, strict=True)
        if entry["status"] == DONE
    ]
    verdicts: list[Judgement] = judge.judge([entry for entry, _ in pairs], [truth for _, truth in pairs])
    for (entry, truth), verdict in zip(pairs, verdicts, strict=True):
        entry.update(is_correct=verdict.correct, **judged(entry, verdict, truth))


__all__ = ["Workers", "run_search"]
