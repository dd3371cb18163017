"""Exact lengths: equal to what the collator builds, for every form of record and image, from headers alone."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from modeling_latent import LatentProcessor
from tests.tiny import FAMILIES, tiny_images, tiny_processor
from trainers import LatentSFTCollator
from trainers.data.lengths import BadRow, LengthTable, row_fingerprint, save_lengths
from trainers.data.mazes import maze_dataset, maze_stream
from trainers.data.records import Record, RecordError, RecordShareError, make_record, records_to_dataset
from trainers.sample_lengths import SampleLengths, dataset_lengths, row_name

SIZES = [(80, 60), (20, 300), (500, 40), (31, 29), (200, 200)]


@pytest.fixture(scope="module")
def processor() -> LatentProcessor:
    return tiny_processor()


def scenes(folder: Path, count: int = 5) -> list[Record]:
    """Records with 0 to 3 images of odd sizes, as paths, PIL images and in different formats."""
    random = np.random.default_rng(0)
    found = []
    for i in range(count):
        images: list[Any] = []
        for number in range(i % 4):
            width, height = SIZES[(i + number) % len(SIZES)]
            image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
            path = folder / f"{i}_{number}.{'png' if number else 'jpg'}"
            image.save(path)
            images.append(image if number == 2 else str(path))
        record = make_record(f"s{i}", "What is it? " * i, "A boy", images, chain=["a dog", "grass"][: i % 2 + 1])
        record["meta"] = {"source": "scenes.json", "row": i}
        found.append(record)
    return found


def built(collator: LatentSFTCollator, row: Any) -> int:
    """Tokens that the collator really gives to one row."""
    return int(collator([row])["attention_mask"].sum())


@pytest.mark.parametrize("form", ["chain", "slots", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_are_those_of_the_collator(family: str, form: str, tmp_path: Path) -> None:
    collator = LatentSFTCollator(tiny_processor(family), form, 3 if form == "slots" else None)
    count = SampleLengths(collator)
    found = [count(record) for record in scenes(tmp_path, 9)]
    assert found == [built(collator, record) for record in scenes(tmp_path, 9)]
    assert len(set(found)) > 4


@pytest.mark.parametrize("decode", [True, False])
def test_rows_of_tables_are_counted_as_they_are_stored(
    decode: bool, processor: LatentProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collator = LatentSFTCollator(processor)
    records = scenes(tmp_path, 9)
    table = records_to_dataset(records, decode=decode).select([7, 2, 5, 3, 0, 8])
    expected = [built(collator, table[position]) for position in range(len(table))]
    monkeypatch.setattr(Image.Image, "load", None)  # nothing is decoded
    found = dataset_lengths(table, collator, progress=False)
    assert (found.lengths, found.bad) == (expected, {})
    again = dataset_lengths([records[i] for i in (7, 2, 5, 3, 0, 8)], collator, progress=False)
    assert again.lengths == expected
    assert dataset_lengths(table.select([1, 0]), collator, progress=False).data_hash != found.data_hash


def test_a_transform_of_a_table_is_respected(processor: LatentProcessor) -> None:
    collator = LatentSFTCollator(processor)
    mazes = maze_dataset(3, seed=1, sizes=(3,))
    longer = mazes.with_transform(lambda batch: {**batch, "question": [text * 3 for text in batch["question"]]})
    found = dataset_lengths(longer, collator, progress=False).lengths
    assert found == [built(collator, longer[i]) for i in range(3)]
    assert min(found) > max(dataset_lengths(mazes, collator, progress=False).lengths)


def test_an_orientation_in_the_header_changes_nothing(processor: LatentProcessor, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image = Image.new("RGB", (300, 90), (9, 200, 30))
    image.save(tmp_path / "turned.jpg", exif=exif)
    data = io.BytesIO()
    image.save(data, "JPEG", exif=exif)
    collator = LatentSFTCollator(processor)
    count = SampleLengths(collator)
    rows = []
    for stored in (str(tmp_path / "turned.jpg"), {"bytes": data.getvalue(), "path": None}):
        rows.append({**make_record("x", "What?", "A", chain=["b"]), "images": [stored]})
    grids = [collator([row])["image_grid_thw"][0].tolist() for row in rows]
    assert grids[0] == [1, grids[1][2], grids[1][1]] != grids[1]  # only bytes are turned upright
    assert [count(row) for row in rows] == [built(collator, row) for row in rows]


def test_only_headers_are_read(processor: LatentProcessor, tmp_path: Path) -> None:
    (image,) = tiny_images(1)
    image.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    count = SampleLengths(LatentSFTCollator(processor))
    lengths = [
        count(make_record("x", "What?", "A", [str(tmp_path / name)], chain=["b"])) for name in ("whole.png", "cut.png")
    ]
    assert lengths[0] == lengths[1]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"chain": None}, "column 'chain' is missing"),
    ({"images": ["nowhere.png"]}, "image 'nowhere.png' cannot be read"),
    ({"images": [{"bytes": b"no picture", "path": None}]}, "the bytes of an image cannot be read"),
    ({"images": [Image.new("RGB", (900, 3))]}, "an image of 900x3 pixels cannot be processed"),
    ({"question": "see <laser>"}, "which only responses may hold"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_what_the_collator_refuses_is_bad(change: dict[str, Any], message: str, processor: LatentProcessor) -> None:
    record = {**make_record("x", "What?", "A", chain=["b"]), "meta": {"source": "d.json", "row": 4}, **change}
    collator = LatentSFTCollator(processor)
    with pytest.raises(RecordError, match="d.json, row 4: ") as error:
        SampleLengths(collator)(record)
    assert message in str(error.value)
    with pytest.raises(RecordError) as built_error:
        collator([record])
    assert re.sub("0x[0-9a-f]+", "", str(built_error.value)) == re.sub("0x[0-9a-f]+", "", str(error.value))


def test_bad_rows_are_listed_and_counted(processor: LatentProcessor, caplog: pytest.LogCaptureFixture) -> None:
    rows = [make_record(f"r{i}", "What?", "A", chain=["b"]) for i in range(10)]
    rows[3] = {**rows[3], "chain": None, "meta": {"source": "d.json", "row": 33}}
    found = dataset_lengths(rows, LatentSFTCollator(processor), progress=False)
    assert found.lengths[3] == 0 and list(found.bad) == [3]
    with pytest.raises(RecordShareError, match=r"(?s)10.00% bad.*d.json, row 33: column 'chain' is missing"):
        found.check(0.09)
    assert not caplog.records
    found.check(0.1)
    assert "bad rows were left out: 9 good rows, 1 bad rows" in caplog.text


# From a file --------------------------------------------------------------------------------------------------------


def length_file(path: Path, rows: list[Any], lengths: list[int], **changes: Any) -> str:
    fingerprints = [row_fingerprint(row) for row in rows]
    save_lengths(LengthTable(lengths, fingerprints=fingerprints, **changes), path)
    return str(path)


def test_a_file_gives_the_lengths_by_index(processor: LatentProcessor, tmp_path: Path) -> None:
    collator = LatentSFTCollator(processor)
    rows = scenes(tmp_path)
    bad = {1: BadRow("scenes.json", 1, "no reason")}
    path = length_file(tmp_path / "lengths.json", rows, [11, 0, 13, 14, 15], bad=bad)
    found = dataset_lengths(records_to_dataset(rows), collator, path)
    assert (found.lengths, found.bad) == ([11, 0, 13, 14, 15], bad)
    for i, row in enumerate(rows):
        row["meta"]["index"] = i
    part = records_to_dataset([rows[4], rows[2]])
    assert dataset_lengths(part, collator, path).lengths == [15, 13]
    other = records_to_dataset([rows[4], {**rows[2], "question": "Else?"}])
    with pytest.raises(
        ValueError, match=r"another data set, or older: scenes.json, row 2 \(id 's2'\) differs from row 2"
    ):
        dataset_lengths(other, collator, path)


def test_a_file_of_other_settings_is_refused(processor: LatentProcessor, tmp_path: Path) -> None:
    rows = scenes(tmp_path, 2)
    collator = LatentSFTCollator(processor)
    settings = SampleLengths(collator).settings()
    path = length_file(tmp_path / "lengths.json", rows, [11, 12], settings={**settings, "latent_form": "slots"})
    with pytest.raises(
        ValueError, match="lengths were counted with latent_form='slots', this run has latent_form='ch"
    ):
        dataset_lengths(rows, collator, path)
    path = length_file(tmp_path / "lengths.json", rows, [11, 12], settings=settings)
    assert dataset_lengths(rows, collator, path).lengths == [11, 12]


def test_the_hash_stands_for_rows_and_lengths(processor: LatentProcessor, tmp_path: Path) -> None:
    rows, collator = scenes(tmp_path), LatentSFTCollator(processor)
    counted = dataset_lengths(rows, collator, progress=False)
    same = length_file(tmp_path / "same.json", rows, counted.lengths)
    other = length_file(tmp_path / "other.json", rows, [*counted.lengths[:-1], 999])
    assert dataset_lengths(rows, collator, same).data_hash == counted.data_hash
    assert dataset_lengths(rows, collator, other).data_hash != counted.data_hash
    changed = [*rows[:-1], {**rows[-1], "answer": "A cow"}]
    assert dataset_lengths(changed, collator, progress=False).data_hash != counted.data_hash


# Refused ------------------------------------------------------------------------------------------------------------


def test_a_stream_is_refused(processor: LatentProcessor) -> None:
    with pytest.raises(
        ValueError, match="enable_dynamic_batch=True needs a data set with a length, got IterableDataset"
    ):
        dataset_lengths(maze_stream(seed=1, sizes=(3,)), LatentSFTCollator(processor))


def test_a_foreign_collator_is_refused(processor: LatentProcessor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lengths are those of LatentSFTCollator, got function; give lengths_path"):
        dataset_lengths([{}], lambda rows: rows)
    rows = scenes(tmp_path, 2)
    path = length_file(tmp_path / "lengths.json", rows, [11, 12])
    assert dataset_lengths(rows, lambda rows: rows, path).lengths == [11, 12]


def test_an_image_processor_without_resizing_is_refused(processor: LatentProcessor) -> None:
    fixed = tiny_processor()
    fixed.image_processor.do_resize = False
    with pytest.raises(ValueError, match=r"\(do_resize=False\) does not say how many tokens"):
        SampleLengths(LatentSFTCollator(fixed))


def test_rows_without_an_origin_are_named_by_position() -> None:
    assert row_name(Dataset.from_list([{"id": "x"}, {"id": "y"}]), 1) == "record 'y', row 1 (id 'y')"
