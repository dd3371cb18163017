"""The folder of teacher signals: plans and refusals, shards whole or absent, the index, records for training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import tiny_images
from tests.trainers.teacher_parts import contents, teacher_records
from trainers.data.records import RecordError, RecordReport, make_record, record_from_row, record_to_row
from trainers.data.teacher_signals import image_fingerprint, load_teacher_signals
from trainers.teacher_store import (
    BAD,
    StorePlan,
    TeacherStore,
    image_bytes,
    image_path,
    iter_rows,
    load_teacher_dataset,
    read_index,
    record_hash,
)

SETTINGS = {"method": "attention", "steps": 1}


def plan(number: int = 5, **settings: Any) -> StorePlan:
    return StorePlan({**SETTINGS, **settings}, [f"hash {i}" for i in range(number)], 2)


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A rejected sample; see `accepted` for the other kind."""
    return {"id": f"r{number}", "row": number, "accepted": False, "reason": "wrong answer", **changes}


def accepted(number: int, image: str | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Row and tensors of an accepted sample with a grid of 1 x 2 tokens; its image is a file, or in the tensors."""
    picture = tiny_images(1)[0]
    record = {
        k: v for k, v in make_record(f"r{number}", "q?", "a").items() if k not in ("images", "step_images", "teacher")
    }
    facts = {"grid": [1, 2], "image": image, "image_sha256": image_fingerprint(picture), "record": record}
    tensors = {"concept": torch.arange(3.0) + number, "attention": torch.tensor([1.0, 3.0])}
    if image is None:
        tensors["image"] = torch.frombuffer(bytearray(image_bytes(picture)), dtype=torch.uint8)
    return row(number, accepted=True, reason=None, **facts), {f"r{number}/{k}": v for k, v in tensors.items()}


def fill(store: TeacherStore) -> TeacherStore:
    """Three shards: accepted and rejected; bad and accepted; rejected."""
    first, tensors = accepted(0)
    store.begin()
    store.write(0, [first, row(1)], tensors)
    third, tensors = accepted(3, "pictures/3.png")
    store.write(1, [row(2, reason=BAD, bad=["toy.json", 2, "no image"]), third], tensors)
    store.write(2, [row(4, reason="answered without the image")], {})
    return store


# Plans and refusals -------------------------------------------------------------------------------------------------


def test_a_shard_depends_on_its_records_and_the_settings_alone() -> None:
    whole, longer = plan(5), plan(9)
    assert [list(whole.rows(shard)) for shard in range(whole.num_shards)] == [[0, 1], [2, 3], [4]]
    assert [whole.fingerprint(i) for i in (0, 1)] == [longer.fingerprint(i) for i in (0, 1)]
    assert whole.fingerprint(2) != longer.fingerprint(2) and whole.fingerprint() != longer.fingerprint()
    assert len({whole.fingerprint(0), whole.fingerprint(1), plan(5, steps=2).fingerprint(0)}) == 3


def test_the_hash_of_a_record(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    first, moved = teacher_records(1, here)[0], teacher_records(1, there)[0]
    moved["meta"]["source"] = "elsewhere.json"
    assert record_hash(first, here) == record_hash(moved, there) != record_hash(moved)
    assert record_hash(record_to_row(first), here) == record_hash(first, here)
    assert record_hash({**first, "question": "Other?"}, here) != record_hash(first, here)
    in_memory, same, other = teacher_records(1)[0], teacher_records(1)[0], teacher_records(2)[1]
    assert record_hash(in_memory) == record_hash(same) != record_hash({**same, "images": other["images"]})


def test_what_an_image_is(tmp_path: Path) -> None:
    picture = tiny_images(1)[0]
    assert (
        image_path("a/b.png")
        == image_path({"path": "a/b.png", "bytes": None})
        == image_path(Path("a/b.png"))
        == "a/b.png"
    )
    assert image_path("/root/a/b.png", "/root") == "a/b.png" and image_path("/other/b.png", "/root") == "/other/b.png"
    assert image_path(picture) is image_path({"path": "b.png", "bytes": b"x"}) is None
    assert image_bytes({"path": None, "bytes": b"x"}) == b"x" and image_bytes(picture).startswith(b"\x89PNG")
    assert image_bytes(picture.convert("RGBA")) == image_bytes(picture)
    with pytest.raises(ValueError, match="an image must be a path, bytes or a PIL image, got int"):
        image_bytes(3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            plan(5, method="gradient"),
            "was extracted with method='attention', now method='gradient'; give another output_dir",
        ),
        (plan(5, layers=8), "was extracted with layers=None, now layers=8"),
        (plan(6), "was extracted with num_records=5, now num_records=6"),
        (StorePlan(SETTINGS, plan(5).hashes, 3), "was extracted with shard_size=2, now shard_size=3"),
        (StorePlan(SETTINGS, [*plan(4).hashes, "another"], 2), "was extracted from other records"),
    ],
)
def test_another_run_is_refused_by_name(tmp_path: Path, changed: StorePlan, message: str) -> None:
    TeacherStore(tmp_path, plan(5)).begin()
    with pytest.raises(ValueError, match=message):
        TeacherStore(tmp_path, changed)


def test_shards_without_their_index_are_refused_too(tmp_path: Path) -> None:
    fill(TeacherStore(tmp_path, plan(5)))
    (tmp_path / "index.json").unlink()
    other = TeacherStore(tmp_path, plan(5, steps=3))
    with pytest.raises(ValueError, match="shard-00000.json is of other settings or other records; remove it"):
        other.rows(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "index.json is damaged"),
        ('{"format": "x"}', "is no index of teacher signals"),
        ('{"format": "latent-teacher", "version": 0}', "has version 0, this library reads 1; extract again"),
    ],
)
def test_a_foreign_index_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        TeacherStore(tmp_path, plan())


# Shards -------------------------------------------------------------------------------------------------------------


def test_a_shard_is_there_when_both_files_are(tmp_path: Path) -> None:
    store = TeacherStore(tmp_path, plan(5))
    assert store.rows(1) is None
    fill(store)
    assert [each["id"] for each in store.rows(1)] == ["r2", "r3"] and store.rows(2)[0]["accepted"] is False
    assert sorted(contents(tmp_path)) == [
        "index.json", *(f"shard-0000{i}.{end}" for i in range(3) for end in ("json", "safetensors"))
    ]  # fmt: skip
    assert load_file(tmp_path / "shard-00001.safetensors").keys() == {"r3/concept", "r3/attention"}
    (tmp_path / "shard-00001.safetensors").unlink()
    assert store.rows(1) is None


def test_what_a_kill_leaves_is_written_over(tmp_path: Path) -> None:
    store, clean = TeacherStore(tmp_path / "a", plan(5)), TeacherStore(tmp_path / "b", plan(5))
    for name in ("shard-00000.json.tmp", "shard-00000.safetensors.tmp"):
        (store.folder / name).write_text("half of i")
    (store.folder / "shard-00001.safetensors").write_text("whole, but the rows are missing")
    assert store.rows(1) is None
    fill(store).merge()
    fill(clean).merge()
    assert contents(store.folder) == contents(clean.folder)


def test_rows_with_any_text_come_back(tmp_path: Path) -> None:
    store = TeacherStore(tmp_path, plan(2))
    rows = [row(0, teacher_answer="\ud800 half a pair, ü, \n, \u2028"), row(1)]
    store.begin()
    store.write(0, rows, {})
    assert store.rows(0) == rows and (tmp_path / "shard-00000.json").read_bytes().count(b"\n") == 4


# Index --------------------------------------------------------------------------------------------------------------


def test_the_index_counts_every_reason(tmp_path: Path) -> None:
    report = RecordReport(1.0)
    index = fill(TeacherStore(tmp_path, plan(5), "/pictures")).merge(report)
    assert index == read_index(tmp_path)
    assert index["counts"] == {
        "accepted": 2,
        "bad": 1,
        "rejected": {"answered without the image": 1, "wrong answer": 1},
    }
    assert index["rows"] == {"r0": 0, "r3": 1} and index["complete"] and index["image_root"] == "/pictures"
    assert (report.num_good, report.num_bad) == (4, 1) and str(report.first_bad[0]) == "toy.json, row 2: no image"


def test_an_index_without_all_shards_is_not_completed(tmp_path: Path) -> None:
    store = fill(TeacherStore(tmp_path, plan(5)))
    (tmp_path / "shard-00002.json").unlink()
    with pytest.raises(ValueError, match="shard-00002.json is missing; start the extraction again"):
        store.merge()
    with pytest.raises(ValueError, match="is not complete; start the extraction again with the same options"):
        load_teacher_dataset(tmp_path)
    with pytest.raises(ValueError, match="has no index.json: no folder of teacher signals"):
        load_teacher_dataset(tmp_path / "nowhere")


# Records ------------------------------------------------------------------------------------------------------------


def test_accepted_records_are_ready_for_training(tmp_path: Path) -> None:
    store = fill(TeacherStore(tmp_path / "store", plan(5), tmp_path))
    store.merge()
    (tmp_path / "pictures").mkdir()
    tiny_images(1)[0].save(tmp_path / "pictures" / "3.png")
    table = load_teacher_dataset(store.folder)
    assert table["id"] == ["r0", "r3"] and table[0]["images"][0]["bytes"].startswith(b"\x89PNG")
    assert table[1]["images"] == [{"path": str(tmp_path / "pictures" / "3.png"), "bytes": None}]
    for index, (number, sample) in enumerate(
        zip((0, 3), load_teacher_dataset(store.folder, decode=True), strict=True)
    ):
        record = record_from_row(table[index])
        signals = load_teacher_signals(record, concept_size=3, image=sample["images"][0])
        assert torch.equal(signals.concept, torch.arange(3.0) + number) and signals.grid == (1, 2)
        assert signals.attention.tolist() == [1.0, 3.0] and record["teacher"]["image_sha256"]
    with pytest.raises(RecordError, match="r3.*is not the one that the signals were extracted from"):
        load_teacher_signals(record, image=tiny_images(2)[1])


def test_images_may_have_moved(tmp_path: Path) -> None:
    fill(TeacherStore(tmp_path, plan(5), "/before")).merge()
    assert load_teacher_dataset(tmp_path)[1]["images"][0]["path"] == "/before/pictures/3.png"
    assert load_teacher_dataset(tmp_path, image_root="/after")[1]["images"][0]["path"] == "/after/pictures/3.png"
    moved = shutil.copytree(tmp_path, tmp_path.parent / "moved")
    teacher = json.loads(load_teacher_dataset(moved)[0]["teacher"])
    assert teacher["concept"]["path"] == str(moved / "shard-00000.safetensors")


def test_a_folder_without_accepted_samples_is_an_empty_table(tmp_path: Path) -> None:
    store = TeacherStore(tmp_path, plan(1))
    store.begin()
    store.write(0, [row(0)], {})
    store.merge()
    assert len(load_teacher_dataset(tmp_path)) == 0 and [r["id"] for _, r in iter_rows(tmp_path)] == ["r0"]
