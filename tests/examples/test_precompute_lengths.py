"""The script that counts lengths: right, resumable after a kill, never twice, and a file that training takes."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from examples import precompute_lengths
from modeling_latent import convert_stock_checkpoint
from tests.hub import ROOT
from trainers import LatentSFTCollator, LatentSFTConfig, LatentSFTTrainer
from trainers.data.length_journal import (
    ExactRows,
    LengthEntry,
    ReferenceRows,
    SourceRow,
    count_rows,
    iter_source_rows,
)
from trainers.data.lengths import load_lengths, reference_length, row_fingerprint
from trainers.data.llava import read_source, write_llava
from trainers.data.mazes import maze_dataset
from trainers.data.records import RecordError, RecordReport, RecordShareError, record_from_row, records_to_dataset
from trainers.model_loading import set_pixels
from trainers.tiny import save_tiny_stock_checkpoint

Run = Callable[..., str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stock checkpoint."""
    return save_tiny_stock_checkpoint(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def base(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without its weights: they are never read."""
    folder = tmp_path_factory.mktemp("weightless") / "base"
    return Path(shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("*.safetensors*")))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A meta file of two sources: five mazes and, as JSON lines with a folder for their pictures, three more."""
    rows = [record_from_row(row) for row in maze_dataset(8, seed=8, sizes=(3, 4))]
    write_llava(rows[:5], tmp_path / "first.json", tmp_path)
    write_llava(rows[5:], tmp_path / "second.jsonl", tmp_path / "pictures")
    sources = [{"data_path": "first.json"}, {"data_path": "second.jsonl", "image_folder": "pictures"}]
    (tmp_path / "meta.json").write_text(json.dumps(sources))
    return tmp_path / "meta.json"


def flags(base: Path, data: Path) -> list[str]:
    paths = {"data_path": data, "output_path": data.parent / "lengths.json", "model_id": base}
    return [f"--{name}={path}" for name, path in paths.items()]


@pytest.fixture
def run(base: Path, data: Path, capsys: pytest.CaptureFixture) -> Run:
    """Runs the script on the meta file with more flags; returns what it printed."""

    def call(*more: object) -> str:
        precompute_lengths.main([*flags(base, data), *map(str, more)])
        return capsys.readouterr().out

    return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices of the rows that are really counted, in order."""
    seen: list[int] = []
    real = ExactRows.__call__
    monkeypatch.setattr(ExactRows, "__call__", lambda self, row: seen.append(row.index) or real(self, row))
    return seen


def edit(path: Path, row: int, **changes: object) -> None:
    """Changes fields of one record of a JSON list; None removes a field."""
    values = json.loads(path.read_text())
    values[row] = {name: value for name, value in {**values[row], **changes}.items() if value is not None}
    path.write_text(json.dumps(values))


def collator_of(base: Path, data: Path) -> LatentSFTCollator:
    return precompute_lengths.way_to_count(precompute_lengths.parse(flags(base, data)))[0].count.collator


def test_lengths_are_those_of_training(run: Run, base: Path, data: Path) -> None:
    out = run("--max_pixels=12544")
    assert "8 good rows, 0 bad rows" in out and "tokens: median" in out
    table = load_lengths(data.parent / "lengths.json")
    collator = collator_of(base, data)
    small = [int(collator([record])["attention_mask"].sum()) for record in read_source(data)]
    set_pixels(collator.processor, None, 12544)
    large = [int(collator([record])["attention_mask"].sum()) for record in read_source(data)]
    assert table.lengths == large and min(a - b for a, b in zip(large, small, strict=True)) >= 5  # 3 x 3 tokens, not 4
    assert (table.formula, table.settings["max_pixels"], table.settings["latent_form"]) == ("exact", 12544, "chain")
    assert f"most {max(large)} (row {large.index(max(large))})" in out
    assert not (data.parent / "lengths.json.partial").exists()


def test_the_published_estimate(run: Run, base: Path, data: Path) -> None:
    run("--reference", "--max_pixels=6272", "--min_pixels=784")
    table = load_lengths(data.parent / "lengths.json")
    tokenizer = collator_of(base, data).processor.tokenizer
    rows = list(iter_source_rows(data))
    assert [row.index for row in rows] == list(range(8))
    expected = [reference_length(row.value, tokenizer, row.image_folder, 784, 6272) for row in rows]
    assert table.lengths == expected and table.formula == "reference"
    assert table.settings.keys() == {"min_pixels", "max_pixels", "tokenizer"}


# Stopped and started again ------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from examples import precompute_lengths
from trainers.data.length_journal import ExactRows

real = ExactRows.__call__
def count(self, row):
    if row.index == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, row)
ExactRows.__call__ = count
precompute_lengths.main(sys.argv[1:])
"""


def test_a_killed_run_loses_nothing_and_counts_nothing_twice(
    run: Run, calls: list[int], base: Path, data: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, *flags(base, data)], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    output, journal = data.parent / "lengths.json", data.parent / "lengths.json.partial"
    assert not output.exists() and len(journal.read_text().splitlines()) == 1 + 6
    with journal.open("ab") as file:
        file.write(b'[6, "0123')  # a line that the kill cut off
    run()
    assert calls == [6, 7]
    resumed = load_lengths(output)
    calls.clear()
    run("--force")
    assert calls == list(range(8)) and load_lengths(output) == resumed
    assert not journal.exists() and not output.with_name("lengths.json.tmp").exists()


def test_only_changed_rows_are_counted_again(run: Run, calls: list[int], data: Path) -> None:
    run()
    before = load_lengths(data.parent / "lengths.json").lengths
    calls.clear()
    run()
    assert calls == []
    edit(data.parent / "first.json", 2, reasoning_chain=["a much longer chain of concepts", "than before"])
    run()
    assert calls == [2]
    after = load_lengths(data.parent / "lengths.json").lengths
    assert after[2] > before[2] and after[:2] + after[3:] == before[:2] + before[3:]


def test_a_journal_that_was_cut_in_its_first_line_is_begun_anew(run: Run, calls: list[int], data: Path) -> None:
    (data.parent / "lengths.json.partial").write_text('{"format": "latent-le')
    run()
    assert calls == list(range(8))


def test_bad_rows_are_named_counted_and_tried_again(run: Run, calls: list[int], data: Path) -> None:
    first = data.parent / "first.json"
    chain = json.loads(first.read_text())[1]["reasoning_chain"]
    edit(first, 1, reasoning_chain=None)
    edit(first, 3, image="nowhere.png")
    with pytest.raises(
        RecordShareError, match=r"(?s)25.00% bad.*first.json, row 1: .*first.json, row 3: .*nowhere.png"
    ):
        run("--max_bad_share=0.2")
    assert not (data.parent / "lengths.json").exists()
    calls.clear()
    out = run("--max_bad_share=0.25")
    assert calls == [1, 3] and "2 bad rows (25.00% bad)" in out and "first.json, row 1: " in out
    table = load_lengths(data.parent / "lengths.json")
    assert [table.lengths[1], table.lengths[3]] == [0, 0] and table.bad.keys() == {1, 3}
    assert table.bad[1].row == 1 and "reasoning_chain" in table.bad[1].reason
    edit(first, 1, reasoning_chain=chain)
    calls.clear()
    run("--max_bad_share=0.2")
    assert calls == [1, 3] and load_lengths(data.parent / "lengths.json").bad.keys() == {3}


def test_another_way_to_count_is_refused(run: Run, data: Path) -> None:
    run()
    other = (
        "lengths.json was counted with max_pixels=[0-9]+, now max_pixels=6272; give another --output_path, or --force"
    )
    with pytest.raises(ValueError, match=other):
        run("--max_pixels=6272")
    with pytest.raises(ValueError, match="was counted with formula='exact', now formula='reference'"):
        run("--reference")
    run("--max_pixels=6272", "--force")
    assert load_lengths(data.parent / "lengths.json").settings["max_pixels"] == 6272


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lengths.json", '{"0": 5}', "lengths.json is a file of the published form; give another --output_path"),
        ("lengths.json", "[1]", "not a length file"),
        ("lengths.json.partial", '["a row"]\n', "lengths.json.partial is no journal of lengths; remove it"),
    ],
)
def test_a_foreign_file_is_not_overwritten(name: str, text: str, message: str, run: Run, data: Path) -> None:
    (data.parent / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        run()
    assert (data.parent / name).read_text() == text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--num_proc=0"], SystemExit, "--num_proc=0 must be at least 1"),
        (["--max_bad_share=2"], ValueError, "max_bad_share must be between 0 and 1"),
        (["--min_pixels=9999999", "--max_pixels=10"], ValueError, "min_pixels=9999999 is above max_pixels=10"),
        (["--latent_form=words"], ValueError, "latent_form='words' is unknown"),
        (["--image_folder=x"], ValueError, "image_folder='x' with the meta file"),
        (["--data_path=none.json"], RecordError, "none.json, whole file: the file does not exist"),
    ],
)
def test_wrong_options(options: list[str], error: type, message: str, run: Run, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(error) as raised:
        run(*options)
    assert message in str(raised.value) + capsys.readouterr().err


# Several processes --------------------------------------------------------------------------------------------------


def test_several_processes_give_the_same_rows_in_order(base: Path) -> None:
    count = ReferenceRows(Tokenizer.from_file(str(base / "tokenizer.json")), 784, 6272)
    rows = []
    for i in range(150):
        turns = [{"from": "human", "value": "What? " * (i % 9)}, {"from": "gpt", "value": "That."}]
        rows.append(SourceRow(i, "d.json", i, ".", "d", {"conversations": turns if i != 70 else None}))
    fingerprint = row_fingerprint(rows[3].record())
    known = {3: LengthEntry(3, fingerprint, 7777)}
    alone = list(count_rows(count, rows, known))
    assert (alone[3].length, alone[70].bad.row, len({entry.length for entry in alone})) == (7777, 70, 11)
    assert list(count_rows(count, rows, known, num_proc=2)) == alone


# Training ----------------------------------------------------------------------------------------------------------


def test_training_takes_the_file(run: Run, trained: Path, data: Path) -> None:
    edit(data.parent / "first.json", 4, image="nowhere.png")
    run("--max_bad_share=0.2")
    model, processor = convert_stock_checkpoint(trained)
    quick = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "max_bad_share": 0.2}
    batches = {"enable_dynamic_batch": True, "dynamic_batch_token_cap": 500}
    lengths_path = str(data.parent / "lengths.json")
    config = LatentSFTConfig(str(data.parent / "out"), **quick, **batches, lengths_path=lengths_path)

    def trainer() -> LatentSFTTrainer:
        records = records_to_dataset(read_source(data, report=RecordReport(0.2)), decode=False)
        return LatentSFTTrainer(model, config, records, processing_class=processor)

    planned = trainer().train_batches
    assert sorted(itertools.chain(*planned)) == list(range(7))  # seven rows of the table, the fifth of eight is bad
    lengths = load_lengths(lengths_path).lengths
    assert planned.lengths.tolist() == lengths[:4] + lengths[5:]
    size = dict(processor.image_processor.size)
    processor.image_processor.size = {**size, "longest_edge": 6272}
    with pytest.raises(ValueError, match="lengths.json: lengths were counted with max_pixels=.*has max_pixels=6272"):
        trainer()
    processor.image_processor.size = size
    edit(data.parent / "first.json", 0, reasoning_chain=["another", "chain"])
    with pytest.raises(ValueError, match=r"lengths.json is of another data set, or older: .*first.json, row 0 \(id"):
        trainer()
