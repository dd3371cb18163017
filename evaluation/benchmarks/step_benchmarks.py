"""M3CoT, ScienceQA and the text sets of Coconut, asked as IVT-LR (arXiv 2510.12603) and Coconut (arXiv 2412.06769) do.

`default` scores strictly, `ivtlr` and `coconut` by the published rules, with the prompt of training; `ivtlr_chameleon`
writes the question as Chameleon is asked. [`step_protocol`] makes the others: another format, or the prompt of the
published evaluation scripts.
"""

import os
import string
from collections.abc import Sequence
from functools import partial

from trainers.data.answers_staged import REFERENCE, STRICT, extract_coconut, extract_scienceqa, m3cot_letters
from trainers.data.records import Record, RecordReport
from trainers.data.staged_formats import STAGED_FORMATS, question_text, staged_format, user_text
from trainers.data.step_readers import STEP_READERS
from trainers.data.table_rows import open_table

from ..runner import Prediction
from .benchmark import DEFAULT_PROTOCOL, AskProtocol, Benchmark, Scored
from .choice_protocols import choice_letter
from .read_tables import checked_columns, load_part
from .step_tasks import GRAPHS, NUM_GRAPHS, TASKS, Reply, read_task

_TITLES = {"m3cot": "M3CoT", "scienceqa": "ScienceQA", "prosqa": "ProsQA", "prontoqa": "ProntoQA", "gsm8k": "GSM8k",
           GRAPHS: "Graphs (generated)"}  # fmt: skip
_SOURCES = {
    "m3cot": ("LightChen2333/M3CoT",),
    "scienceqa": ("derek-thomas/ScienceQA", "lmms-lab-encoder/ScienceQA"),
}
_CONFIGS = {"lmms-lab-encoder/ScienceQA": "ScienceQA-IMG"}  # that has no part without a name
_COLUMNS = dict.fromkeys(_SOURCES, ("question", "choices", "answer", "image"))


def _read(
    name: str,
    source: str | os.PathLike | None,
    *,
    tasks: Sequence[str] | None = None,
    image_folder: str | os.PathLike | None = None,
    report: RecordReport | None = None,
    max_samples: int | None = None,
    split: str | None = None,
    num: int | None = None,
    seed: int = 0,
    **graph_options: object,
) -> list[Record]:
    """See [`read_task`]; the split `test` of a Hub id or folder unless another is asked for."""
    if name == GRAPHS:
        number = num if max_samples is None else min(max_samples, NUM_GRAPHS if num is None else num)
        return read_task(name, source, split, num=number, seed=seed, image_folder=image_folder, **graph_options)
    if source is None:
        if name not in _SOURCES:
            raise ValueError(f"{name} has no public source; give its file as data_root")
        source = _SOURCES[name][0]
    if split is None and STEP_READERS[name].has_split and not os.path.isfile(source):
        split = "test"
    table: object = source
    if os.fspath(source) in _CONFIGS and not os.path.exists(source):
        table, split = load_part(os.fspath(source), _CONFIGS[os.fspath(source)], split), None
    if name in _COLUMNS:
        next(iter(checked_columns(open_table(table, split, image_folder), _COLUMNS[name]).rows), None)
    records = read_task(
        name, table, split, num=num, seed=seed, image_folder=image_folder, report=report, **graph_options
    )
    return records[:max_samples]


def _reply(record: Record, prediction: Prediction, fmt: str, prompt: str) -> Reply:
    question = user_text(record, fmt, prompt=prompt)
    return Reply(prediction.text, f"{question}\n{prediction.text}", question, STAGED_FORMATS[fmt])


def score_steps(name: str, fmt: str, prompt: str, mode: str, record: Record, prediction: Prediction) -> Scored:
    """Score and what was read: a letter, the number of an option (ScienceQA), or the text behind the answer's mark.

    The published rule of M3CoT takes any letter it finds behind the prompt's `Answer:`; the last one is the answer.
    """
    reply = _reply(record, prediction, fmt, prompt)
    right = TASKS[name].score(record, reply, mode)
    return Scored(right, _answer(name, mode, record, reply))


def _answer(name: str, mode: str, record: Record, reply: Reply) -> str | None:
    if name == "scienceqa":
        number = extract_scienceqa(reply.text, mode, record["choices"])
        return None if number < 0 else str(number)
    if name == "m3cot":
        if mode == REFERENCE:
            found = m3cot_letters(reply.whole)[len(m3cot_letters(reply.question)) :]
            return found[-1] if found else None
        return choice_letter(reply.text, record["choices"])
    return extract_coconut(reply.text, mode, reply.fmt.answer_prefix.strip()) or None


def step_protocol(
    name: str, label: str = DEFAULT_PROTOCOL, fmt: str | None = None, prompt: str = "training"
) -> AskProtocol:
    """A protocol of a benchmark of this file.

    Args:
        name: of the benchmark.
        label: of the protocol: `"default"` scores strictly, others by the published rule.
        fmt: how a question is written, see `staged_formats.py`; default: that of the benchmark, for
            `"ivtlr_chameleon"` that of Chameleon.
        prompt: `"training"`, or `"published_inference"` for the prompt of the published evaluation scripts; what that
            has behind its latents is [`text_behind`].

    Raises:
        ValueError: an unknown format or kind of prompt.
    """
    task = TASKS[name]
    fmt = fmt or (task.chameleon if label == "ivtlr_chameleon" else None) or task.fmt
    written = staged_format(fmt)
    written.style(prompt)
    return AskProtocol(
        label,
        "2412.06769" if written.name == "coconut" else "2510.12603, card 7",
        lambda processor, record: question_text(record, processor, written, prompt=prompt),
        partial(score_steps, name, fmt, prompt, STRICT if label == DEFAULT_PROTOCOL else REFERENCE),
        task.max_new_tokens,
        written.answer_prefix + "{answer}",
        {"add_special_tokens": written.special_tokens, **({"image_markers": False} if "chameleon" in fmt else {})},
        ask=lambda record: user_text(record, written, prompt=prompt),
    )


def text_behind(name: str, label: str = DEFAULT_PROTOCOL, fmt: str | None = None, prompt: str = "training") -> str:
    """What the prompt of such a protocol has behind its latents."""
    task = TASKS[name]
    fmt = fmt or (task.chameleon if label == "ivtlr_chameleon" else None) or task.fmt
    return staged_format(fmt).style(prompt).after_latents


def _answers(name: str, record: Record) -> tuple[str, ...] | None:
    """The options as replies name them: letters, of ScienceQA their numbers."""
    count = len(record["choices"] or ())
    names = tuple(map(str, range(count))) if name == "scienceqa" else tuple(string.ascii_uppercase[:count])
    return names or None


def _benchmark(name: str) -> Benchmark:
    task = TASKS[name]
    labels = [DEFAULT_PROTOCOL, task.method, *(["ivtlr_chameleon"] if task.chameleon else [])]
    return Benchmark(
        name=name,
        title=_TITLES[name],
        sources=_SOURCES.get(name, ()),
        reader=partial(_read, name),
        protocols={label: step_protocol(name, label) for label in labels},
        group=lambda record: str(record["meta"].get(task.group, "none")) if task.group else
        f"{len(record['steps'] or [])} steps",
        cluster=None,
        answers=partial(_answers, name),
        gold=lambda record: record["answer"],
        columns=_COLUMNS.get(name, ()),
    )  # fmt: skip


STEP_BENCHMARKS = tuple(map(_benchmark, TASKS))

__all__ = ["STEP_BENCHMARKS", "score_steps", "step_protocol", "text_behind"]
