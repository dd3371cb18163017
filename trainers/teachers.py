"""Teacher signals for LaViT: what a larger model sees in an image and where it looks when it answers.

Paper: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129 (card 5.2 and 5.3).

For every record the teacher answers, a judge compares, and of the answers that are accepted the signals are captured
and stored. The work is cut into shards, which the processes of a run share:

    accelerate launch examples/extract_teacher.py --model_path Qwen/Qwen2.5-VL-32B-Instruct --data_file viscot.json

| question | file |
|---|---|
| which options | `teacher_config` |
| who answers, and how signals are captured | `teacher_models`, `teacher_capture`, `teacher_gradients` |
| which samples are kept | `teacher_acceptance`, `judges` |
| what becomes of a record | `teacher_extraction` |
| what is on disk | `teacher_store`, in the published layout `teacher_layout` |

Deviations from the published builder, on purpose: samples are batched; concept and attention come from one forward;
the teacher's grid and a fingerprint of the image are kept; every sample that is left out is counted with its reason.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from .data.records import Record, record_features
from .judges import Judge
from .teacher_config import TeacherConfig
from .teacher_extraction import Extraction
from .teacher_models import ModelTeacher, Teacher, model_fingerprint
from .teacher_store import load_teacher_dataset

_LONG = timedelta(days=30)  # processes wait for the slowest one


def teacher_processes() -> PartialState:
    """This process among those of the run; they wait for each other as long as an extraction may take.

    Raises:
        RuntimeError: the launcher started several processes that do not know of each other: each would do everything.
    """
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_LONG)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != state.num_processes:
        raise RuntimeError(
            f"the launcher started {started} processes, accelerate knows {state.num_processes}: call "
            "teacher_processes() before anything else makes an accelerate state"
        )
    return state


def extract_teacher(
    config: TeacherConfig,
    model: PreTrainedModel | None,
    processor: ProcessorMixin | None,
    records: Dataset | Sequence[Record],
    *,
    image_root: str | Path | None = None,
    teacher: Teacher | None = None,
    judge: Judge | None = None,
    progress: bool = True,
) -> Path:
    """Ask a teacher about every record and store its signals. Every process of a run calls it, each on its device.

    Started again with the same options it goes on with the shards that are missing. The bytes that are written do not
    depend on the number of processes, nor on where a run was killed.

    Args:
        config: options.
        model, processor: the teacher, in evaluation mode on its device.
        records: in a table (best without decoding the images) or a list; one image each.
        image_root: folder of the images: paths are kept relative to it.
        teacher: another teacher than `model`.
        judge: another judge than the one of `config`.
        progress: show a progress bar on the main process.

    Returns:
        The folder. On the main process it is complete: [`load_teacher_dataset`] reads it.

    Raises:
        ValueError: the folder belongs to other settings or records, or options and records do not go together.
        RecordShareError: the share of bad rows is above `max_bad_share`.
        JudgeError: see [`trainers.judges.ChatJudge`].
    """
    state = teacher_processes()
    if isinstance(records, Dataset) and records.features != record_features(decode=False):
        records = records.cast(record_features(decode=False))
    extraction = Extraction(
        config, teacher or ModelTeacher(model, processor, config), judge or config.build_judge(), records, image_root
    )
    mine = range(state.process_index, extraction.plan.num_shards, state.num_processes)
    if state.is_main_process:
        extraction.store.begin()
    extraction.run(mine, show=progress and state.is_main_process)
    state.wait_for_everyone()
    if state.is_main_process:
        extraction.finish()
    return extraction.store.folder


__all__ = [
    "ModelTeacher",
    "Teacher",
    "TeacherConfig",
    "extract_teacher",
    "load_teacher_dataset",
    "model_fingerprint",
    "teacher_processes",
]
