"""LaViT golden vectors: the published data set as the builder writes it, from a teacher without a model (card 5.2)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.conftest import each, golden_dir, golden_json
from tests.tiny import tiny_images
from tests.trainers.teacher_parts import StubTeacher, contents
from trainers.data.records import RecordReport
from trainers.data.viscot import read_viscot
from trainers.judges import Judgement
from trainers.teacher_store import read_index
from trainers.teachers import TeacherConfig, extract_teacher

FOLDER = golden_dir("lavit")
BUILDER: dict[str, Any] = golden_json(FOLDER, "answers.json", {}).get("builder", {})
KINDS = {"copy_images": True, "no_copy_images": False}
IMAGES, TRAINING = "data/images/", "data/metadata/lavit_15k_for_training.json"


def judge(records: list[Any], answers: list[str]) -> list[Judgement]:
    """The stub of the vectors: rejects one ground truth, which its description names in quotation marks."""
    (rejected,) = re.findall(r'"([^"]*)"', BUILDER["judge"])
    return [Judgement(record["answer"] != rejected) for record in records]


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """The data file, and the folder with those images that exist in the vectors."""
    path, folder = tmp_path / "viscot.json", tmp_path / "pictures"
    path.write_text(json.dumps(BUILDER["input"]))
    names = [name.removeprefix(IMAGES) for name in BUILDER["copy_images"]["files"] if name.startswith(IMAGES)]
    for name, image in zip(names, tiny_images(len(names)), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    return path, folder


@each("kind", [kind for kind in KINDS if kind in BUILDER])
def test_the_published_data_set(kind: str, data: tuple[Path, Path], tmp_path: Path) -> None:
    expected, (path, folder), out = BUILDER[kind], data, tmp_path / "published"
    report = RecordReport(1.0)
    records = list(read_viscot(path, folder, seed=BUILDER["random_seed"], report=report))
    config = TeacherConfig(
        output_dir=str(tmp_path / "signals"),
        output_lavit15k_root=str(out),
        copy_images=KINDS[kind],
        acceptance="reference",
        batch_size=2,
        max_bad_share=1.0,
    )
    extract_teacher(config, None, None, records, image_root=folder, teacher=StubTeacher(), judge=judge, progress=False)
    text = json.dumps(expected["training_json"]).replace("<OUT>", str(out)).replace("<IMAGES>", str(folder))
    found = json.loads((out / TRAINING).read_text())
    assert found == json.loads(text)
    assert [list(row) for row in found["results"]] == [list(row) for row in json.loads(text)["results"]]
    assert sorted(contents(out)) == expected["files"]
    counts = read_index(tmp_path / "signals")["counts"]
    left_out = report.num_bad + counts["bad"] + counts["rejected"].get("wrong answer", 0)
    assert counts["accepted"] == len(found["results"]) == len(BUILDER["input"]) - left_out
    for row in found["results"]:
        trajectory = json.loads(Path(row["attention_path_abs"]).read_text())
        assert sorted(trajectory) == expected["trajectory_file_keys"]
        assert [sorted(step) for step in trajectory["steps"]] == [expected["trajectory_step_keys"]]
        concept = torch.load(row["v_top_path_abs"], weights_only=True)
        assert concept.dtype == torch.bfloat16 and len(concept) == len(trajectory["steps"][0]["p_t"])
