"""Extraction of teacher signals: what becomes of every record, resume, the published layout, models as teachers."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.tiny import tiny_images, tiny_processor, tiny_stock_model
from tests.trainers.teacher_parts import LEFT, WIDTH, StubTeacher, contents, stub_signals, teacher_records
from trainers.data.lavit import read_lavit
from trainers.data.records import Record, RecordShareError, record_from_row, records_to_dataset
from trainers.data.teacher_signals import load_teacher_signals
from trainers.judges import Judgement, MatchJudge
from trainers.teacher_capture import STEP_SYSTEM_MESSAGE, capture_attention, capture_gradient, generate_answers
from trainers.teacher_store import iter_rows, read_index
from trainers.teachers import ModelTeacher, TeacherConfig, extract_teacher, load_teacher_dataset, model_fingerprint

Extract = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def extract(tmp_path: Path) -> Extract:
    """Runs an extraction into `out` with a stub teacher; returns the rows by id."""

    def run(records: Any, teacher: StubTeacher | None = None, judge: Any = None, **options: Any) -> dict[str, Any]:
        given = {"output_dir": str(tmp_path / "out"), "batch_size": 2, "shard_size": 3, **options}
        root = given.pop("image_root", None)
        config = TeacherConfig(**given)
        folder = extract_teacher(
            config, None, None, records, image_root=root, teacher=teacher or StubTeacher(), judge=judge, progress=False
        )
        assert folder == Path(config.output_dir)
        return {row["id"]: row for _, row in iter_rows(folder)}

    return run


def number(question: str) -> int:
    """Of the thing that a question of `teacher_records` asks about."""
    return int(re.search(r"thing (\d+)", question)[1])


def replies(special: dict[int, str], blind: dict[int, str] | None = None) -> Callable[[str, bool], str]:
    """Replies that are right, but for some questions; without the image nothing is known, but for some questions."""
    return lambda question, seen: (
        special.get(number(question), "blue") if seen else (blind or {}).get(number(question), "?")
    )


# What becomes of a record -------------------------------------------------------------------------------------------


def test_every_sample_that_is_left_out_has_its_reason(extract: Extract, tmp_path: Path) -> None:
    records = teacher_records(7)
    records[4]["boxes"] = [{"image": 0, "xyxy": [0.75, 0.0, 1.0, 1.0]}]  # the teacher looks at the left half
    records[5]["boxes"] = None
    teacher = StubTeacher(replies({1: "a red one"}, blind={2: "The blue."}))
    rows = extract(records, teacher)
    reasons = {name: row["reason"] for name, row in rows.items() if row["reason"]}
    assert reasons == {
        "toy-1": "wrong answer",
        "toy-2": "answered without the image",
        "toy-4": "attention outside the boxes",
        "toy-5": "no boxes",
    }
    assert [row["accepted"] for row in rows.values()] == [row["reason"] is None for row in rows.values()]
    assert rows["toy-1"]["final_answer"] == "a red one" and rows["toy-1"]["correct"] is False
    assert rows["toy-2"]["text_only_answer"] == "The blue." and rows["toy-2"]["text_only_correct"] is True
    assert rows["toy-4"]["box_mass"] == pytest.approx(0.1, abs=0.05) and rows["toy-5"]["box_mass"] is None
    assert rows["toy-0"]["box_mass"] == pytest.approx(0.9, abs=0.01)
    index = read_index(tmp_path / "out")
    assert index["counts"] == {"accepted": 3, "bad": 0, "rejected": dict.fromkeys(sorted(reasons.values()), 1)}
    assert load_teacher_dataset(tmp_path / "out")["id"] == ["toy-0", "toy-3", "toy-6"] == list(index["rows"])


def test_work_is_saved_on_samples_that_are_lost_anyway(extract: Extract) -> None:
    teacher = StubTeacher(replies({0: "red", 1: "red", 3: "red"}, blind={2: "blue"}))
    extract(teacher_records(6), teacher)
    # Shards of 3 in batches of 2: all are asked; without the image only the right ones; captured only what is left.
    assert teacher.asked == [(2, True), (1, True), (1, False), (2, True), (1, True), (2, False)]
    assert teacher.captured == [[["blue"], ["blue"]]]


def test_thresholds_and_presets(extract: Extract, tmp_path: Path) -> None:
    teacher = StubTeacher(replies({1: "red"}, blind={2: "blue"}))
    records = teacher_records(4)
    records[3]["boxes"] = [{"image": 0, "xyxy": [0.75, 0.0, 1.0, 1.0]}]

    def lost(name: str, **options: Any) -> list[str]:
        rows = extract(records, teacher, output_dir=str(tmp_path / name), **options)
        return [row["id"] for row in rows.values() if not row["accepted"]]

    assert lost("paper") == ["toy-1", "toy-2", "toy-3"]
    assert lost("reference", acceptance="reference") == ["toy-1"]
    assert lost("none", acceptance="none") == []
    assert lost("low", min_box_mass=0.05) == ["toy-1", "toy-2"]
    assert lost("seen", reject_text_only=False) == ["toy-1", "toy-3"]
    assert lost("boxes", acceptance="none", min_box_mass=0.5) == ["toy-3"]


def test_a_judge_that_fails_is_a_reason_of_its_own(extract: Extract) -> None:
    verdicts = iter([Judgement(True), Judgement(None, None, "away"), Judgement(False), Judgement(None, None, "away")])
    rows = extract(teacher_records(3), judge=lambda records, answers: [next(verdicts) for _ in answers])
    # The last verdict is on what the first sample says without its image.
    assert [row["reason"] for row in rows.values()] == ["judge failed", "judge failed", "wrong answer"]


def test_the_whole_reply_is_captured_and_its_final_answer_judged(extract: Extract) -> None:
    """As of a teacher that was trained with explicit steps."""
    reply = "Move down to A2.\nTherefore, the answer is blue"
    teacher = StubTeacher(replies(dict.fromkeys(range(2), reply)))
    rows = extract(teacher_records(2), teacher, answer_prompt="{question} Think.\n{choices}", min_box_mass=0)
    assert [row["final_answer"] for row in rows.values()] == ["blue", "blue"] and teacher.captured == [[[reply]] * 2]
    assert teacher.questions == [f"Which colour is thing {i}? Think.\n" for i in (0, 1)] * 2  # with and without image


def test_steps_have_their_own_attention(extract: Extract, tmp_path: Path) -> None:
    def reply(question: str, with_image: bool) -> str:
        steps = "<step>one</step> <step>two</step>" if number(question) != 1 else "<step>one</step>"
        return f"{steps}\nFINAL ANSWER: blue" if with_image else "?"

    teacher = StubTeacher(reply)
    rows = extract(
        teacher_records(3), teacher, steps=2, step_split="tags", save_full_concept=True, concept_dtype="float32"
    )
    assert rows["toy-1"]["reason"] == "too few steps"
    assert teacher.captured == [[["<step>one</step>", "<step>two</step>"]] * 2]
    record = record_from_row(load_teacher_dataset(tmp_path / "out")[0])
    one, two = (stub_signals(tiny_images(1)[0], f"<step>{text}</step>") for text in ("one", "two"))
    signals = load_teacher_signals(record)
    torch.testing.assert_close(signals.attention, (one.attention + two.attention) / 2)
    torch.testing.assert_close(signals.concept, one.concept.mean(0))
    full = {**record, "teacher": {**record["teacher"]}}
    full["teacher"]["concept"] = {**record["teacher"]["concept"], "key": "toy-0/concept_full"}
    torch.testing.assert_close(load_teacher_signals(full).concept, one.concept)


def test_lines_as_steps(extract: Extract) -> None:
    teacher = StubTeacher(replies({0: "a\n\nb\nblue", 1: "blue"}))
    rows = extract(teacher_records(2), teacher, steps=2, step_split="lines", judge_match="contained")
    assert teacher.captured == [[["a", "b"]]] and rows["toy-1"]["reason"] == "too few steps"


# Bad rows -----------------------------------------------------------------------------------------------------------


def spoil(question: str, signals: Any) -> Any:
    changes = {
        1: {"concept": signals.concept * torch.nan},
        2: {"attention": signals.attention * 0},
        3: {"attention": signals.attention[:-1]},
    }
    return dataclasses.replace(signals, **changes.get(number(question), {}))


def test_bad_signals_and_bad_records_are_named(extract: Extract, tmp_path: Path) -> None:
    records = teacher_records(9, tmp_path)
    records[4]["images"] *= 2
    records[5]["images"] = []
    Path(records[6]["images"][0]).unlink()
    records[7]["id"] = records[0]["id"]
    with pytest.raises(RecordShareError) as raised:
        extract(records, StubTeacher(spoil=spoil), max_bad_share=0.5)
    message = str(raised.value)
    for part in (
        "toy.json, row 1: record 'toy-1': the teacher's concept has NaN or infinite values",
        "row 2: record 'toy-2': the teacher's attention sums to zero",
        "row 3: record 'toy-3': 7 values of attention for a grid of 4 x 2 image tokens",
        "row 4: record 'toy-4': 2 images; a teacher is asked about one",
        "row 5: record 'toy-5': 0 images",
        "row 6: record 'toy-6': image ",
        "row 7: record 'toy-0': this id is that of record 0, too; ids must be unique",
    ):
        assert part in message
    # The shards are kept: with another limit the run ends at once.
    teacher = StubTeacher(spoil=spoil)
    extract(records, teacher, max_bad_share=0.9)
    assert not teacher.asked and read_index(tmp_path / "out")["counts"] == {"accepted": 2, "bad": 7, "rejected": {}}


def test_one_record_that_the_teacher_refuses_does_not_cost_its_batch(extract: Extract) -> None:
    class Refusing(StubTeacher):
        def answer(self, images: Any, questions: Any, with_image: bool = True) -> list[str]:
            if any(number(question) == 1 for question in questions):
                raise ValueError("row 1 has image tokens in its text")
            return super().answer(images, questions, with_image)

    rows = extract(teacher_records(3), Refusing(), max_bad_share=0.5)
    assert [row["accepted"] for row in rows.values()] == [True, False, True]
    assert "the teacher cannot take it (row 1 has image tokens" in rows["toy-1"]["bad"][2]


def test_a_run_with_very_many_bad_rows_does_not_go_on_to_its_end(extract: Extract, tmp_path: Path) -> None:
    records = [{**teacher_records(1)[0], "id": f"r{i}", "images": []} for i in range(400)]
    with pytest.raises(RecordShareError, match="200 bad rows"):
        extract(records, shard_size=50)
    assert len(list((tmp_path / "out").glob("shard-*.json"))) == 4


def test_bad_rows_are_tried_again_when_asked_for(extract: Extract, tmp_path: Path) -> None:
    records = teacher_records(6, tmp_path)
    path = Path(records[4]["images"][0])
    picture = path.read_bytes()
    path.unlink()
    extract(records, max_bad_share=0.5)
    path.write_bytes(picture)
    again = StubTeacher()
    extract(records, again, max_bad_share=0.5)
    assert not again.asked
    extract(records, again, retry_bad=True)
    assert again.asked[0] == (2, True) and len(again.asked) == 4  # the second shard alone
    assert read_index(tmp_path / "out")["counts"]["accepted"] == 6


def test_data_without_any_box_is_refused_at_once(extract: Extract) -> None:
    records = [{**record, "boxes": None} for record in teacher_records(2)]
    teacher = StubTeacher()
    with pytest.raises(ValueError, match="no record has boxes, so none can pass min_box_mass=0.2; choose acceptance="):
        extract(records, teacher)
    assert not teacher.asked
    assert all(row["accepted"] for row in extract(records, no_boxes="accept").values())


# Resume -------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_and_gives_the_same_bytes(extract: Extract, tmp_path: Path) -> None:
    records = teacher_records(8)

    class Stopping(StubTeacher):
        def capture(self, *args: Any) -> Any:
            if len(self.captured) == 3:  # in the second shard
                raise KeyboardInterrupt
            return super().capture(*args)

    with pytest.raises(KeyboardInterrupt):
        extract(records, Stopping())
    assert sorted(path.name for path in (tmp_path / "out").glob("shard-*.json")) == ["shard-00000.json"]
    rest = StubTeacher()
    extract(records, rest)
    assert sum(size for size, with_image in rest.asked if with_image) == 5
    extract(records, output_dir=str(tmp_path / "clean"))
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_batches_and_shards_do_not_matter_to_the_signals(extract: Extract, tmp_path: Path) -> None:
    """With a teacher whose batches do not matter."""
    tables = []
    for name, sizes in {"a": (2, 3), "b": (5, 7)}.items():
        extract(teacher_records(7), output_dir=str(tmp_path / name), batch_size=sizes[0], shard_size=sizes[1])
        records = map(record_from_row, load_teacher_dataset(tmp_path / name))
        tables.append([load_teacher_signals(record) for record in records])
    for one, other in zip(*tables, strict=True):
        assert torch.equal(one.concept, other.concept) and torch.equal(one.attention, other.attention)


def test_other_settings_are_refused(extract: Extract) -> None:
    records = teacher_records(2)
    extract(records)
    with pytest.raises(ValueError, match="was extracted with accept_min_box_mass=0.2, now accept_min_box_mass=0.3"):
        extract(records, min_box_mass=0.3)
    with pytest.raises(ValueError, match="max_new_tokens=1024, now max_new_tokens=5"):
        extract(records, max_new_tokens=5)
    with pytest.raises(ValueError, match="was extracted from other records"):
        extract(list(reversed(records)))
    extract(
        records, max_bad_share=0.7, judge_retries=9, acceptance="reference", reject_text_only=True, min_box_mass=0.2
    )


def test_a_table_gives_what_the_list_of_its_records_gives(extract: Extract, tmp_path: Path) -> None:
    records = teacher_records(4, tmp_path / "data")
    for name, data in {
        "list": records,
        "table": records_to_dataset(records),
        "paths": records_to_dataset(records, False),
    }.items():
        extract(data, output_dir=str(tmp_path / name), image_root=str(tmp_path / "data"))
    assert contents(tmp_path / "list") == contents(tmp_path / "table") == contents(tmp_path / "paths")
    assert json.loads((tmp_path / "list" / "shard-00000.json").read_text())["rows"][0]["image"] == "pictures/0.png"


def test_processes_that_do_not_know_of_each_other_are_refused(
    extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="the launcher started 2 processes, accelerate knows 1"):
        extract(teacher_records(1))


# The published layout -----------------------------------------------------------------------------------------------


def test_the_published_layout_can_be_read_for_training(extract: Extract, tmp_path: Path) -> None:
    records = teacher_records(3, tmp_path / "data")
    extract(records, StubTeacher(replies({1: "red"})), write_json=True, topk=2, image_root=str(tmp_path / "data"))
    out = tmp_path / "out"
    path = out / "data/metadata/lavit_15k_for_training.json"
    found = list(read_lavit(path, out / "data/images", concept_size=WIDTH))
    ours = [record_from_row(row) for row in load_teacher_dataset(out)]
    assert [record["question"] for record in found] == [record["question"] for record in ours]
    for record, same in zip(found, ours, strict=True):
        signals, expected = load_teacher_signals(record), load_teacher_signals(same)
        torch.testing.assert_close(signals.concept.mean(0), expected.concept, atol=0.01, rtol=0.01)  # of bfloat16 rows
        torch.testing.assert_close(signals.attention, expected.attention)
        assert Image.open(record["images"][0]).size == Image.open(same["images"][0]).size
    steps = json.loads((out / "data/features/trajectories/sample_000012_attention.json").read_text())["steps"]
    assert len(steps) == 1 and len(steps[0]["p_topk_idx"]) == 2
    assert max(steps[0]["p_t"]) == steps[0]["p_t"][steps[0]["p_topk_idx"][0]]


def test_images_in_memory_are_named_after_their_sample(extract: Extract, tmp_path: Path) -> None:
    records = teacher_records(2)
    records[1]["meta"].pop("question_id")  # its row, then
    extract(records, write_json=True)
    assert sorted(path.name for path in (tmp_path / "out/data/images").iterdir()) == [
        "sample_000001.png",
        "sample_000010.png",
    ]
    with pytest.raises(ValueError, match="copy_images=False, and the image of record 'toy-0' is no file"):
        extract(records, write_json=True, copy_images=False, output_dir=str(tmp_path / "other"))


def test_images_elsewhere_do_not_leave_the_folder(extract: Extract, tmp_path: Path) -> None:
    records = teacher_records(1, tmp_path / "data")
    extract(records, write_json=True, image_root=str(tmp_path / "nothing"))
    assert [path.name for path in (tmp_path / "out/data/images").iterdir()] == ["sample_000010.png"]


@pytest.mark.parametrize("question_id", ["abc", 1.5, True, -1])
def test_question_ids_that_name_no_file(extract: Extract, question_id: Any) -> None:
    records = teacher_records(3)
    records[1]["meta"]["question_id"] = question_id
    records[2]["meta"]["question_id"] = 10
    rows = extract(records, write_json=True, max_bad_share=0.9)
    assert f"question_id {question_id!r} is no whole number" in rows["toy-1"]["bad"][2]
    assert "question_id 10 is that of record 0, too; their files would clash" in rows["toy-2"]["bad"][2]


# Models -------------------------------------------------------------------------------------------------------------


def test_a_model_by_attention() -> None:
    model, processor, images = tiny_stock_model(), tiny_processor(), tiny_images(2)
    config = TeacherConfig(steps=2, step_split="lines", num_layers=1, attention_rows="answer", max_new_tokens=4)
    teacher, questions = ModelTeacher(model, processor, config), ["What?", "Is it safe?"]
    given = {"max_new_tokens": 4}
    assert teacher.answer(images, questions) == generate_answers(model, processor, images, questions, **given)
    blind = generate_answers(model, processor, images, questions, with_image=False, **given)
    assert teacher.answer(images, questions, with_image=False) == blind
    pieces = [["one", "two"], ["a", "longer second"]]
    found = teacher.capture(images, questions, pieces)
    options = {"num_layers": 1, "rows": "answer"}
    first = capture_attention(model, processor, images, questions, ["one", "a"], **options)
    both = capture_attention(model, processor, images, questions, ["one\ntwo", "a\nlonger second"], **options)
    for sample, expected in zip(found, zip(first, both, strict=True), strict=True):
        for one, other in zip(sample, expected, strict=True):
            assert torch.equal(one.attention, other.attention) and torch.equal(one.concept, other.concept)


def test_a_model_by_gradient() -> None:
    model, processor, (image,) = tiny_stock_model(), tiny_processor(), tiny_images(1)
    config = TeacherConfig(
        method="gradient", max_grad_calls_per_step=2, aggregation="simple_avg", system_message="Look."
    )
    (found,) = ModelTeacher(model, processor, config).capture([image], ["Question: What?"], [["<step>a b</step>"]])
    (expected,) = capture_gradient(
        model, processor, image, "Question: What?", ["<step>a b</step>"], config.gradient_options()
    )
    assert torch.equal(found[0].attention, expected.attention) and len(found[0].steps) == 2
    assert (
        config.gradient_options().system_message == "Look." and config.gradient_options().aggregation == "simple_avg"
    )


def test_another_model_is_another_teacher() -> None:
    model = tiny_stock_model()
    assert (
        model_fingerprint(model)
        == model_fingerprint(tiny_stock_model())
        != model_fingerprint(tiny_stock_model(seed=1))
    )
    changed = tiny_stock_model()
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    assert model_fingerprint(model) != model_fingerprint(changed) != model_fingerprint(model.bfloat16())


# Options ------------------------------------------------------------------------------------------------------------


def test_what_the_user_says() -> None:
    plain, chosen = TeacherConfig(), TeacherConfig(answer_prompt="{question}\n{choices}\nAnswer:")
    assert plain.user_text("Which {x}?", ["a"]) == "Which {x}?" and plain.system_text() is None
    assert chosen.user_text("Which?", ["red", "blue"]) == "Which?\n(A) red\n(B) blue\nAnswer:"
    gradient = TeacherConfig(method="gradient", steps=3)
    assert gradient.user_text("Which?", None) == "Question: Which?"
    assert gradient.system_text() == STEP_SYSTEM_MESSAGE.replace("{num_steps}", "3")
    assert (
        TeacherConfig(steps=2, step_split="lines", system_message="In {num_steps} lines.").system_text()
        == "In 2 lines."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "saliency"}, r"unknown method 'saliency'; choose one of \['attention', 'gradient'\]"),
        ({"steps": 2}, "steps=2 with step_split='auto': a whole reply is one step"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"aggregation": "max"}, "aggregation='max' is unknown"),
        ({"tau_grad": 0.0}, "tau=0.0 must be above 0"),
        ({"answer_prompt": "Look!"}, "answer_prompt='Look!' has no {question}"),
        ({"acceptance": "lenient"}, "unknown acceptance 'lenient'"),
        ({"max_bad_share": 2.0}, "max_bad_share=2.0 must be between 0 and 1"),
        ({"final_answer": "last"}, "unknown final_answer 'last'"),
        ({"concept_dtype": "int8"}, "unknown concept_dtype 'int8'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherConfig(**options)


def test_options_that_name_a_judge() -> None:
    assert TeacherConfig(judge_match="contained").build_judge() == MatchJudge("contained")
    assert TeacherConfig(acceptance="none").build_judge() is None
    with pytest.raises(ValueError, match="judge='chat' needs judge_model"):
        TeacherConfig(judge="chat").build_judge()


def test_the_box_of_the_records_is_the_half_that_the_stub_looks_at() -> None:
    """What the tests above rest on."""
    record: Record = teacher_records(1)[0]
    assert record["boxes"] == LEFT and stub_signals(record["images"][0], "x").attention.sum().item() == pytest.approx(
        1.0
    )
