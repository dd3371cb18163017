"""The published data set of LaViT on disk, written from a teacher's signals: feature files, images, training JSON.

Paper: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129 (card 2.4 and 5.2; data set
`Svard/LaViT-15k`):

    data/images/<path of the image>                            # with copy_images
    data/features/vtop/sample_000012_v_top_layer.pth           # [N, D] bfloat16
    data/features/trajectories/sample_000012_attention.json    # {"steps": [{"p_t": [...], ...}]}
    data/metadata/lavit_15k_for_training.json                  # {"results": [...]}, what training reads

The number is the `question_id` of the record, or its row where it has none. `trainers/data/lavit.py` reads all this.
"""

import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from .atomic_files import write_bytes
from .data.lavit import write_lavit_json
from .data.records import Record
from .teacher_store import image_bytes, image_path

IMAGES = "data/images"
TRAINING_JSON = "data/metadata/lavit_15k_for_training.json"


def sample_number(record: Mapping[str, Any], row: int) -> int:
    """The number in the file names of a sample: its `question_id`, or its row where it has none.

    Raises:
        ValueError: a `question_id` that is no whole number; the published files cannot be named after it.
    """
    number = record["meta"].get("question_id")
    if number is None:
        return row
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(
            f"question_id {number!r} is no whole number, and the published layout (write_json) names its files "
            "sample_%06d after it; give numbers, or extract without write_json"
        )
    return number


class PublishedLayout:
    """Writes samples in the published layout below a folder.

    Args:
        root: output folder.
        image_root: folder that the paths of images are relative to.
        copy_images: copy them below the root; without, the training JSON names them where they are.
        topk: how many indices of the largest weights a trajectory file lists.
    """

    def __init__(
        self, root: str | os.PathLike, image_root: str | os.PathLike | None, copy_images: bool = True, topk: int = 8
    ) -> None:
        self.root, self.image_root = Path(os.path.abspath(root)), image_root
        self.copy_images, self.topk = copy_images, topk

    def paths(self, number: int) -> tuple[Path, Path]:
        """Files of a sample's concept and of its attention."""
        name, features = f"sample_{number:06d}", self.root / "data" / "features"
        return features / "vtop" / f"{name}_v_top_layer.pth", features / "trajectories" / f"{name}_attention.json"

    def image_name(self, path: str | None, number: int) -> str:
        """The path of a sample's image in the training JSON.

        Args:
            path: of the image as [`image_path`] gives it.
            number: of the sample.

        Raises:
            ValueError: an image that is no file, and images are not copied.
        """
        if not self.copy_images:
            if path is None:
                raise ValueError("copy_images=False, and an image is no file; leave copy_images on")
            return path if self.image_root is None else (Path(self.image_root) / path).as_posix()
        # What lies outside the folder of the images, or is no file, is named after the sample.
        inside = path is not None and not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts
        return path if inside else f"sample_{number:06d}{'.png' if path is None else PurePosixPath(path).suffix}"

    def write_sample(
        self, record: Record, number: int, concept: torch.Tensor, steps: Sequence[Mapping[str, Any]]
    ) -> None:
        """Write the files of one sample, each in one step.

        Args:
            record: with its image as a path or as bytes.
            number: of the sample.
            concept: `(N, D)`.
            steps: of the trajectory file, with `p_t`; see [`trajectory_step`].
        """
        vtop, attention = self.paths(number)
        content = io.BytesIO()
        torch.save(concept.to(torch.bfloat16).contiguous().clone(), content)
        write_bytes(vtop, content.getvalue())
        write_bytes(attention, json.dumps({"steps": list(steps)}).encode())
        if self.copy_images:
            self._copy_image(record["images"][0], number)

    def _copy_image(self, image: Any, number: int) -> None:
        target = self.root / IMAGES / self.image_name(image_path(image, self.image_root), number)
        source = image_path(image)
        if source is None:
            write_bytes(target, image_bytes(image))
        elif not (target.exists() and os.path.samefile(source, target)):
            # Several processes may copy the image of their samples at once: each has a file of its own till the end.
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.{number:06d}.tmp")
            shutil.copyfile(source, partial)
            os.replace(partial, target)

    def training_row(self, record: Mapping[str, Any], path: str | None, number: int) -> dict[str, Any]:
        """The entry of a sample in the training JSON.

        Args:
            record: its question, answer and `meta`.
            path: of its image as [`image_path`] gives it.
            number: of the sample.
        """
        vtop, attention = self.paths(number)
        return {
            "question_id": number,
            "dataset": record["meta"].get("dataset"),
            "split": record["meta"].get("split"),
            "question": record["question"],
            "ground_truth_enriched": record["answer"],
            "image_relative_path": self.image_name(path, number),
            "v_top_path_abs": str(vtop),
            "attention_path_abs": str(attention),
        }

    def write_training_json(self, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Merge the entries into the training JSON, in one step."""
        path = self.root / TRAINING_JSON
        write_lavit_json(rows, path)
        return path


def trajectory_step(
    attention: torch.Tensor, topk: int, *, scores: torch.Tensor | None = None, **facts: Any
) -> dict[str, Any]:
    """One step of a trajectory file.

    Args:
        attention: `(N,)`.
        topk: how many indices of its largest values are listed.
        scores: `(N,)` mean attention before its scaling (attention method); None where there is none.
        facts: `method`, `tau_used`, ...
    """
    largest = attention.topk(min(topk, len(attention))).indices.tolist()
    step = {"p_t": attention.tolist(), "p_topk_idx": largest, **facts}
    return step if scores is None else {**step, "raw_attention_scores": scores.tolist()}


__all__ = ["PublishedLayout", "sample_number", "trajectory_step"]
