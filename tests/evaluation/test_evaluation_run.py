"""Evaluations: killed and gone on with, in two processes, votes, scores made anew, what is refused before a run."""

import json
import logging
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.harness import evaluation_run
from evaluation.harness.evaluation_run import RUN_FORMAT, run_evaluation
from evaluation.harness.item_order import item_order
from evaluation.harness.replies import chosen_reply, digest_of
from evaluation.harness.results import write_results
from evaluation.harness.variants import Variant, variants_of
from evaluation.run_folder import RunFolder
from evaluation.runner import Prediction, predict
from evaluation.search_runner import Workers
from tests.evaluation.evaluation_parts import (
    SETTINGS,
    asked,
    evaluate,
    in_process,
    letter_records,
    letters,
    load,
    mazes,
    parts,
    variants,
)
from tests.tiny import tiny_images
from trainers.data.records import RecordError, make_record


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small evaluation, run once."""
    folder = tmp_path_factory.mktemp("run")
    evaluate(folder)
    return folder


def results(folder: Path) -> bytes:
    return (folder / "results.json").read_bytes()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for path in sorted((folder / "items").iterdir()) for line in path.read_text().splitlines()
    ]


def test_killed_at_ten_random_points_the_result_is_the_same(undisturbed: Path, tmp_path: Path) -> None:
    """One folder is killed again and again until it is done; whatever it had is kept, and nothing counts twice."""
    code, points = in_process(tmp_path / "counted")
    assert code == 0 and points > 30 and results(tmp_path / "counted") == results(undisturbed)
    chosen = random.Random(0).sample(range(1, points + 1), 10)
    for number in chosen:
        folder = tmp_path / f"point-{number}"
        code, reached = in_process(folder, number)
        assert (code, reached) == (-signal.SIGKILL, number)
        before = len(lines(folder)) if (folder / "items").exists() else 0
        code, further = in_process(folder)
        assert code == 0 and results(folder) == results(undisturbed)
        keys = [line["data_idx"] for line in lines(folder)]
        assert len(keys) == len(set(keys)) == len(lines(undisturbed))
        assert before == 0 or further < points  # finished batches were not run again


def test_a_torn_line_is_answered_again(undisturbed: Path, tmp_path: Path) -> None:
    evaluate(tmp_path)
    (path,) = (tmp_path / "items").iterdir()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    kept = path.read_bytes().rpartition(b"\n")[0]
    evaluate(tmp_path)
    assert results(tmp_path) == results(undisturbed) and path.read_bytes().startswith(kept)


def test_a_finished_run_loads_no_model(undisturbed: Path) -> None:
    def refuse(name: str) -> Any:
        raise AssertionError("nothing is left to answer")

    before = results(undisturbed)
    evaluate(undisturbed, load=refuse)
    assert results(undisturbed) == before


def test_two_workers_write_the_bytes_of_one(undisturbed: Path, tmp_path: Path) -> None:
    """The second one first, as if it were faster; the first one finds its lines and writes the results."""
    half = Workers(1, 2)
    RunFolder(tmp_path, evaluation_run.description([asked(), mazes()], variants(), SETTINGS), RUN_FORMAT).begin()
    assert evaluate(tmp_path, half) is None
    first = {line["data_idx"] for line in lines(tmp_path)}
    assert 0 < len(first) < len(lines(undisturbed))
    evaluate(tmp_path)
    assert results(tmp_path) == results(undisturbed)


def test_the_replies_are_those_of_predict(undisturbed: Path) -> None:
    """Every condition against a call without the harness; the order of the results is that of the records."""
    found = json.loads(results(undisturbed))["conditions"]
    assert [(each["benchmark"], each["variant"]) for each in found] == [
        (name, variant.name) for name in ("letters", "mazes") for variant in variants()
    ]
    records, order = letter_records(), item_order(letter_records())
    for each in found[:3]:
        texts = {}
        for first in range(0, 7, 2):
            part = [records[i] for i in order[first : first + 2]]
            replies = predict(*parts(), part, max_new_tokens=5, **each["options"])
            texts |= {reply.id: (reply.text, reply.num_latent_steps, reply.num_tokens) for reply in replies}
        rows = [(item["text"], item["latent_steps"], item["tokens"]) for item in each["items"]]
        assert rows == [texts[record["id"]] for record in records]
    assert [each["latent_steps"] for each in found[:3]] == [1.0, 3.0, 0.0]


def test_the_order_holds_similar_items_together() -> None:
    images = tiny_images(3)  # 80 x 60, 56 x 56, 60 x 100
    sizes = [(2, "long question"), (0, "long question"), (0, "q"), (1, "q")]
    records = [
        make_record(id=str(i), question=text, answer="A", images=[images[k]]) for i, (k, text) in enumerate(sizes)
    ]
    assert item_order(records) == [3, 2, 1, 0]


def test_an_image_that_is_no_image_is_named_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"no picture")
    record = make_record(id="x", question="Q", answer="A", images=[str(tmp_path / "no.png")], choices=["a", "b"],
                         meta={"source": "rows.json", "row": 4})  # fmt: skip
    bad = replace(asked(), records=[*letter_records(2), record])
    with pytest.raises(RecordError, match=r"rows.json, row 4: image .*no.png.* cannot be read"):
        evaluate(tmp_path / "run", asked=[bad])
    assert not (tmp_path / "run").exists()


# Votes


def reply(text: str, steps: int = 1, tokens: int = 5) -> Prediction:
    return Prediction("q", text, text, steps, tokens, (), raw=text)


@pytest.mark.parametrize(
    ("texts", "winner"),
    [
        (["A", "B", "B"], "B"),
        (["A", "B"], "A"),
        (["none", "also none", "B"], "none"),
        (["B", "A", "A first", "B"], "B"),
    ],
)
def test_the_most_frequent_answer_counts(texts: list[str], winner: str) -> None:
    record, protocol = letter_records(1)[0], letters().protocol()
    replies = [reply(text, steps, 10 + steps) for steps, text in enumerate(texts)]
    chosen = chosen_reply(replies, record, protocol)
    number = len(texts)
    assert chosen.text == winner
    assert chosen.num_latent_steps == number * (number - 1) // 2
    assert chosen.num_tokens == 10 * number + number * (number - 1) // 2


def test_votes_are_sampled_apart_and_all_kept(undisturbed: Path) -> None:
    kept = {line["data_idx"]: line["replies"] for line in lines(undisturbed)}
    voted = [replies for key, replies in kept.items() if "most of 3" in key]
    assert len(voted) == 10 and all(len(replies) == 3 for replies in voted)
    assert any(len({each["raw"] for each in replies}) > 1 for replies in voted)
    assert all(len(replies) == 1 for key, replies in kept.items() if "most of" not in key)


def test_the_seed_of_sampling_counts(tmp_path: Path) -> None:
    raws = []
    for seed in (1, 2, 1):
        folder = tmp_path / str(len(raws))
        options = {"asked": [asked()], "variants": [Variant("off", {"latent_strategy": "off"})]}
        evaluate(folder, settings=replace(SETTINGS, temperature=1.0, seed=seed), **options)
        raws.append([line["replies"][0]["raw"] for line in lines(folder)])
    assert raws[0] == raws[2] != raws[1]


# Scores made anew


def test_scores_are_made_from_the_lines_alone(undisturbed: Path, tmp_path: Path) -> None:
    """With a protocol that reads nothing: no reply is run again, all are wrong, and three raw ones are shown."""
    run = RunFolder(undisturbed, {}, RUN_FORMAT)
    found = write_results(tmp_path, [asked("never")], variants(), "tiny", run.items())
    before = json.loads(results(undisturbed))["conditions"][: len(variants())]
    for new, old in zip(found["conditions"], before, strict=True):
        assert (new["accuracy"], new["parse_rate"], new["protocol"]) == (0, 0, "never")
        assert new["strict_accuracy"] == old["accuracy"] or "most of" in new["variant"]
        assert [item["raw"] for item in new["items"]] == [item["raw"] for item in old["items"]] or "most" in new[
            "variant"
        ]


def test_a_loud_warning_when_nothing_can_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="evaluation.harness.results"):
        evaluate(tmp_path, asked=[asked("never")], variants=variants_of(["off"]))
    (message,) = [record.getMessage() for record in caplog.records]
    raws = [item["raw"] for item in json.loads(results(tmp_path))["conditions"][0]["items"]]
    assert "letters under off: NO REPLY COULD BE READ" in message and repr(raws[:3]) in message
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="evaluation.harness.results"):
        reads = replace(asked().protocol, score=lambda record, _: asked().protocol.score(record, reply("A")))
        evaluate(tmp_path / "fine", asked=[replace(asked(), protocol=reads)], variants=variants_of(["off"]))
    assert not caplog.records


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"settings": replace(SETTINGS, max_new_tokens=6)}, "was begun with max_new_tokens=5, now .*=6"),
        (lambda: {"settings": replace(SETTINGS, model="other")}, "was begun with model='tiny', now model='other'"),
        (lambda: {"variants": variants()[:2]}, "was begun with variants="),
        (lambda: {"asked": [asked(), mazes(2)]}, "was begun with benchmarks="),
        (lambda: {"asked": [asked("never"), mazes()]}, "was begun with benchmarks="),
        (lambda: {"resume": False}, "holds questions of an earlier run"),
    ],
)  # fmt: skip
def test_another_run_is_refused(change: Callable[[], dict[str, Any]], message: str, undisturbed: Path) -> None:
    before = results(undisturbed)
    with pytest.raises(ValueError, match=message):
        evaluate(undisturbed, **change())
    assert results(undisturbed) == before


def test_changed_items_are_another_run() -> None:
    first, second = letter_records(3), letter_records(3)
    assert digest_of(first) == digest_of(second)
    for name, value in (("question", "Else?"), ("answer", "C"), ("choices", ["no", "yes"]), ("id", "other")):
        assert digest_of([*first[:2], {**first[2], name: value}]) != digest_of(first)
    assert digest_of(first[::-1]) != digest_of(first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"asked": []}, "0 benchmarks and 4 conditions; give at least one of each"),
        ({"variants": []}, "2 benchmarks and 0 conditions"),
        ({"asked": [replace(asked(), records=[])]}, "letters has no record; check its data"),
        ({"asked": [asked(), asked("never")]}, r"benchmarks \['letters', 'letters'\]: one comes twice"),
        ({"settings": replace(SETTINGS, batch_size=0)}, "batch_size=0 must be at least 1"),
        ({"settings": replace(SETTINGS, temperature=-1.0)}, "temperature=-1.0 must be 0"),
        ({"variants": [Variant("learned", {"latent_strategy": "learned"})]},
         "the condition 'learned' cannot be run: .* has slots and no learned tokens"),
        ({"variants": [Variant("fixed", {"latent_strategy": "fixed"})]},
         "the condition 'fixed' cannot be run: .*num_latent_steps"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_before_anything_runs(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was run")

    monkeypatch.setattr(evaluation_run, "predict", fail)
    good = Variant("off", {"latent_strategy": "off"})
    if options.get("variants"):
        options = {"variants": [good, *options["variants"]]}  # not even the first, which could be run
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path, **options)


def test_an_item_that_is_missing_is_named(undisturbed: Path, tmp_path: Path) -> None:
    run = dict(RunFolder(undisturbed, {}, RUN_FORMAT).items())
    del run["letters/off/4"]
    with pytest.raises(ValueError, match=r"item 4 \('q4'\) of letters under 'off' is not finished"):
        write_results(tmp_path, [asked()], variants(), "tiny", run)


def test_models_are_loaded_once_each(tmp_path: Path) -> None:
    """Another model under its own name; both answer the same items."""
    names = []

    def once(name: str) -> Any:
        names.append(name)
        return load(name)

    pair = variants_of(["off", "dynamic"], compare="folder/other", compare_strategy="off")
    assert [(each.name, each.model) for each in pair][2] == ("off, other", "folder/other")
    found = run_evaluation(tmp_path, [asked()], pair, once, SETTINGS)
    assert names == ["", "folder/other"]
    off, _, other = found["conditions"]
    assert (off["model"], other["model"]) == ("tiny", "folder/other") and off["items"] == other["items"]
    assert other["against_first"]["difference"] == 0 and other["against_first"]["discordant"] == 0
