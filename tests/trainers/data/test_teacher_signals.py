"""Teacher signals: every kind of reference, the image's fingerprint, grids, resizing, every signal that is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.hub import ROOT, run_python
from tests.tiny import tiny_images
from trainers.data.mazes import maze_dataset
from trainers.data.records import Record, RecordError, make_record, record_from_row, records_to_dataset
from trainers.data.teacher_signals import (
    find_best_grid,
    image_fingerprint,
    load_teacher_signals,
    resize_signal,
)

ROWS = torch.tensor([[0.0, 1.0], [2.0, -3.0], [4.0, 5.0], [6.0, 7.0], [8.0, 9.0], [1.0, 1.0]])
WEIGHTS = torch.tensor([0.0, 0.5, 1.0, 0.25, 0.125, 2.0])


def scene(**teacher: Any) -> Record:
    """A record with signals of six image tokens in the record itself, changed as asked for."""
    field = {
        "concept": {"values": ROWS.tolist()},
        "attention": {"values": WEIGHTS.tolist()},
        "grid": [2, 3],
        "image": 0,
        "image_sha256": None,
    }
    made = make_record("s7", "What is it?", "A dog", tiny_images(1), teacher={**field, **teacher})
    return {**made, "meta": {"source": "scenes.json", "row": 12}}


def stored(folder: Path, kind: str, signal: str, values: torch.Tensor) -> dict[str, Any]:
    """A reference to a file of a kind that holds the values."""
    path = str(folder / f"{signal}{kind.removesuffix('-keyed')}")
    if kind == ".safetensors":
        save_file({f"s7/{signal}": values, "other": values + 1}, path)
        return {"path": path, "key": f"s7/{signal}"}
    if kind == ".json":
        Path(path).write_text(json.dumps({"steps": [{"p_t": [9.0] * len(values)}, {"p_t": values.tolist()}]}))
        return {"path": path, "step": 1}
    torch.save({"v": values} if kind.endswith("-keyed") else values, path)
    return {"path": path, "key": "v" if kind.endswith("-keyed") else None}


# Reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".safetensors", ".pt", ".pth", ".pth-keyed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signals_from_files(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    concept, attention = stored(tmp_path, kind, "concept", ROWS.to(dtype)), WEIGHTS.to(dtype)
    record = scene(concept=concept, attention=stored(tmp_path, kind, "attention", attention))
    signals = load_teacher_signals(record, concept_size=2)
    assert signals.concept.dtype == signals.attention.dtype == torch.float32
    assert torch.equal(signals.concept, ROWS) and torch.equal(signals.attention, WEIGHTS)
    assert signals.grid == (2, 3) and signals.num_tokens == 6


def test_a_step_of_a_published_trajectory(tmp_path: Path) -> None:
    reference = stored(tmp_path, ".json", "attention", WEIGHTS)
    assert torch.equal(load_teacher_signals(scene(attention=reference)).attention, WEIGHTS)
    first = load_teacher_signals(scene(attention={"path": reference["path"]}))
    assert first.attention.tolist() == [9.0] * 6


@pytest.mark.parametrize("bare", [True, False])
def test_attention_of_several_steps_is_their_mean(bare: bool) -> None:
    rows = [[1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0, 0.0, 0.0]]
    signals = load_teacher_signals(scene(attention=rows if bare else {"values": rows}))
    assert signals.attention.tolist() == [0.5, 0.0, 1.5, 0.0, 0.0, 0.0]


def test_mazes_have_attention_only() -> None:
    (row,) = maze_dataset(1, seed=3, sizes=(4,), attention="one_hot")
    record = record_from_row(row)
    signals = load_teacher_signals(record, need=("attention",))
    assert signals.grid == (4, 4) and signals.concept is None
    torch.testing.assert_close(signals.attention, torch.tensor(record["teacher"]["attention"]).mean(0))
    with pytest.raises(RecordError, match=f"teacher of record '{record['id']}': no concept"):
        load_teacher_signals(record)


def test_a_mean_has_no_tokens_and_a_table_keeps_the_field() -> None:
    record = scene(concept={"values": [1.0, 2.0, 3.0]})
    (row,) = records_to_dataset([record])
    signals = load_teacher_signals(record_from_row(row), need=["concept"])
    assert signals.concept.tolist() == [1.0, 2.0, 3.0]
    assert signals.attention is None and signals.num_tokens is None and signals.grid == (2, 3)


def test_nothing_needed_reads_nothing() -> None:
    for record in (scene(concept={"path": "nowhere.pth"}, attention=None), {**scene(), "teacher": None}):
        signals = load_teacher_signals(record, need=())
        assert (signals.concept, signals.attention, signals.grid) == (None, None, None)
    with pytest.raises(ValueError, match=r"unknown signals \['gaze'\]; choose from \['concept', 'attention'\]"):
        load_teacher_signals(scene(), need=("concept", "gaze"))


# What is refused ------------------------------------------------------------------------------------------------


def weights(*values: float) -> dict[str, list[float]]:
    return {"values": [*values, *WEIGHTS.tolist()[len(values) :]]}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no concept": ({"concept": None}, r"no concept \(None\).*set the weight of its loss to 0"),
    "no attention": ({"attention": {}}, r"no attention \(\{\}\)"),
    "path and values": ({"attention": {"path": "a.pth", "values": [1.0]}}, "no attention"),
    "missing file": ({"concept": {"path": "/no/x.pth"}}, "concept: file /no/x.pth does not exist; correct the path"),
    "unknown kind": ({"concept": {"path": "x.npy"}}, "concept in x.npy: unknown kind of file; give one of .safetens"),
    "concept as JSON": ({"concept": {"path": "x.json"}}, "concept in x.json: unknown kind of file"),
    "NaN": ({"concept": {"values": [[1.0, float("nan")]] * 6}}, "concept in the record has 6 of 12 values NaN"),
    "infinite": ({"attention": weights(1.0, float("inf"))}, "attention in the record has 1 of 6 values NaN or inf"),
    "negative": ({"attention": weights(-0.5)}, "attention in the record has the negative weight -0.5"),
    "zero attention": ({"attention": {"values": [0.0] * 6}}, "attention in the record sums to zero"),
    "zero concept": ({"concept": {"values": [[0.0, 0.0]] * 6}}, "concept in the record is zero everywhere"),
    "width": (
        {"concept": {"values": [[1.0] * 3] * 6}},
        "concept in the record is 3 wide, not 2 as .*concept_head_size",
    ),
    "width of a mean": ({"concept": {"values": [1.0]}}, "concept in the record is 1 wide, not 2"),
    "three dimensions": ({"concept": {"values": [[[1.0, 2.0]]]}}, r".*shape \(1, 1, 2\), not \(D,\) or \(tokens, D\)"),
    "no tokens": ({"attention": {"values": []}}, r"attention in the record has the shape \(0,\)"),
    "words": ({"attention": {"values": ["a"]}}, "attention in the record is no tensor of numbers"),
    "ragged": ({"attention": [[1.0], [1.0, 2.0]]}, "attention in the record is no tensor of numbers"),
    "tokens of the attention": ({"grid": [2, 2]}, "concept has 6 tokens, its grid of 2x2 has 4; correct the grid"),
    "two images": ({"grid": None, "attention": {"values": [1.0]}}, "signals of different images: .*6.*1.* tokens"),
    "grid": ({"grid": [6]}, r"grid=\[6\] is not \[rows, columns\]"),
    "empty grid": ({"grid": [0, 6]}, r"grid=\[0, 6\] is not \[rows, columns\]"),
    "image": ({"image": 1}, "image=1 is not the index of one of the 1 images"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_signal_is_named_by_file_row_and_id(name: str) -> None:
    changes, reason = BAD[name]
    with pytest.raises(RecordError, match=f"scenes.json, row 12: teacher of record 's7': {reason}"):
        load_teacher_signals(scene(**changes), concept_size=2)


def test_no_teacher_at_all() -> None:
    with pytest.raises(RecordError, match=r"teacher of record 's7': the record has none \(teacher=None\); extract"):
        load_teacher_signals({**scene(), "teacher": None})


def unreadable(folder: Path) -> dict[str, dict[str, Any]]:
    (folder / "a.pth").write_bytes(b"no pickle")
    (folder / "b.safetensors").write_bytes(b"\x10")
    (folder / "c.json").write_text("{")
    (folder / "d.json").write_text('{"steps": []}')
    save_file({"x": WEIGHTS}, str(folder / "e.safetensors"))
    torch.save({"x": WEIGHTS}, folder / "f.pt")
    torch.save({"x": object}, folder / "g.pt")
    keys = {"e.safetensors": "y", "f.pt": "y"}
    return {path.name: {"path": str(path), "key": keys.get(path.name)} for path in sorted(folder.iterdir())}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    references = unreadable(tmp_path)
    references["e without key"] = {"path": str(tmp_path / "e.safetensors")}
    references["negative step"] = {"path": str(tmp_path / "d.json"), "step": -1}
    assert len(references) == 9
    for name, reference in references.items():
        with pytest.raises(RecordError, match="teacher of record 's7': attention in .* cannot be read") as caught:
            load_teacher_signals(scene(attention=reference))
        assert "extract the signals again" in str(caught.value), name
    with pytest.raises(RecordError, match="f.pt is no tensor of numbers"):
        load_teacher_signals(scene(attention={"path": str(tmp_path / "f.pt")}))


# Fingerprint ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_pixels(tmp_path: Path) -> None:
    (image,) = tiny_images(1)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.bmp")
    first = image_fingerprint(image)
    assert len(first) == 64
    assert {image_fingerprint(Image.open(tmp_path / f"a.{kind}")) for kind in ("png", "bmp")} == {first}
    changed = image.copy()
    changed.putpixel((3, 5), tuple(value ^ 1 for value in image.getpixel((3, 5))))
    reshaped = Image.frombytes("RGB", (image.height, image.width), image.tobytes())
    assert len({first, image_fingerprint(changed), image_fingerprint(reshaped)}) == 3


def test_an_image_that_has_changed_is_refused() -> None:
    first, other = tiny_images(2)
    record = scene(image_sha256=image_fingerprint(first))
    assert load_teacher_signals(record, image=first).num_tokens == 6
    with pytest.raises(RecordError, match=r"record 's7': the image \(56x56 pixels, .* is not the one .* restore it"):
        load_teacher_signals(record, image=other)
    assert load_teacher_signals(scene(), image=other).num_tokens == 6  # no hash: not checked


# Grids ----------------------------------------------------------------------------------------------------------


def test_find_best_grid_over_all_grids() -> None:
    """The nearest by brute force; of two equally near, the order of the factors decides."""
    for tokens in range(1, 65):
        for width, height in ((100, 100), (90, 160), (160, 90), (30, 400), (37, 41)):
            rows, columns = find_best_grid(tokens, width, height)
            assert rows * columns == tokens
            factors = [n for n in range(1, tokens + 1) if tokens % n == 0]
            distances = [abs(n / (tokens // n) - height / width) for n in factors]
            assert abs(rows / columns - height / width) == min(distances)


@pytest.mark.parametrize("arguments", [(0, 10, 10), (4, 0, 10), (4, 10, -1)])
def test_find_best_grid_of_nothing(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        find_best_grid(*arguments)


def bilinear(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Half-pixel centres, edges repeated, no antialiasing; cell by cell."""
    height, width = image.shape
    out = np.zeros((rows, columns))
    for r in range(rows):
        for c in range(columns):
            y = min(max((r + 0.5) * height / rows - 0.5, 0), height - 1)
            x = min(max((c + 0.5) * width / columns - 0.5, 0), width - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            top = image[y0, x0] * (1 - (x - x0)) + image[y0, x1] * (x - x0)
            bottom = image[y1, x0] * (1 - (x - x0)) + image[y1, x1] * (x - x0)
            out[r, c] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


@pytest.mark.parametrize("target", [(4, 6), (3, 2), (1, 1), (5, 7), (2, 9)])
def test_resize_against_a_loop(target: tuple[int, int]) -> None:
    values = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 4))).float()
    found = resize_signal(values, target, source=(2, 3))
    expected = np.stack([bilinear(values[:, c].double().numpy().reshape(2, 3), *target).ravel() for c in range(4)], 1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert found.shape == (target[0] * target[1], 4)
    torch.testing.assert_close(resize_signal(values[:, 0], target, source=(2, 3)), found[:, 0])


def test_doubling_keeps_the_mean() -> None:
    torch.testing.assert_close(resize_signal(ROWS, (4, 6), source=(2, 3)).mean(0), ROWS.mean(0))


def test_resize_knows_or_guesses_the_grid() -> None:
    assert resize_signal(WEIGHTS, (2, 3), source=(2, 3)) is WEIGHTS
    assert resize_signal(WEIGHTS, (3, 2), source=None) is WEIGHTS  # as published: as many values as cells
    assert not torch.equal(resize_signal(WEIGHTS, (3, 2), source=(2, 3)), WEIGHTS)
    wide = resize_signal(WEIGHTS, (4, 6), source=None, image_size=(300, 200))
    assert torch.equal(wide, resize_signal(WEIGHTS, (4, 6), source=(2, 3)))
    half = resize_signal(WEIGHTS.to(torch.bfloat16), (1, 1), source=(2, 3))
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (WEIGHTS, {"source": (2, 2)}, "6 values do not fill a grid of 2x2"),
        (WEIGHTS, {"source": None}, "the grid of 6 values is unknown; give source, or image_size"),
        (ROWS[None], {"source": (2, 3)}, r"shape \(1, 6, 2\).*give \(N,\) or \(N, C\)"),
    ],
)
def test_resize_refuses(values: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize_signal(values, (4, 6), **options)


def test_importing_the_file_loads_neither_torch_nor_safetensors() -> None:
    printed = run_python(
        "import sys, types\n"
        "sys.modules['trainers'] = package = types.ModuleType('trainers')\n"  # the parent may import torch
        f"package.__path__ = [{str(ROOT / 'trainers')!r}]\n"
        "import trainers.data.teacher_signals\n"
        "print([name for name in ('torch', 'datasets', 'safetensors') if name in sys.modules])\n"
    )
    assert printed.strip() == "[]"
