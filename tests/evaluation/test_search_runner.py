"""Runs of the search over questions: answers, noise by question, batches, workers, interruption, failures, verdicts,
result files."""

import copy
import dataclasses
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from evaluation import search_answers
from evaluation.search_answers import (
    GIVE_UP,
    ItemSampling,
    SearchAnswers,
    SearchPlan,
    SearchRunError,
    item_seed,
)
from evaluation.search_questions import Question, read_questions
from evaluation.search_runner import Workers, run_search
from evaluation.search_store import ENTRY_FIELDS, RunFolder, csv_path, reward_csv
from evaluation.search_verdicts import SearchJudge, Truth, summary, tally, verify_results
from evaluation.verifier import LLMVerifier, VerifierSettings
from modeling_latent.search_prompts import search_prompts
from modeling_latent.search_strategy import generate_with_search
from tests.chat_server import ChatServer, Reply
from tests.latent import liven, tiny_pair
from tests.tiny import tiny_images, tiny_processor, tiny_stock_model
from trainers.data.records import RecordError, RecordShareError, make_record

YES, NO = '{"equivalent": true}', '{"equivalent": false}'
SHORT = {"num_thought_tokens": 2, "max_num_steps": 2, "num_selected_patches": 1, "initial_patch_count": 1}
REFERENCE = {**SHORT, "mode": "reference", "sigma": 1.0}

Run = Callable[..., dict[str, Any]]


def made(number: int, image: bool = True, **changes: Any) -> Question:
    """A question of which the number says which, with an image of its own."""
    record = make_record(
        id=str(number),
        question=f"Which colour is thing {number}?" + " It is small." * (number % 3),
        answer="blue",
        images=tiny_images(number + 1)[number:] if image else [],
    )
    values = {"data_idx": number, "question": record["question"], "image_path": f"{number}.png" if image else ""}
    return Question(**{**values, "solution": "blue", "record": record, **changes})


def plan(options: dict[str, Any] | None = None, **changes: Any) -> SearchPlan:
    return SearchPlan(options=SHORT if options is None else options, **{"max_new_tokens": 4, **changes})


def parts(family: str = "qwen2_5_vl") -> tuple[Any, Any]:
    return tiny_pair(family=family)[0], tiny_processor(family)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs into `out` (or the folder named) with a tiny model; returns the content of results_v1.json."""

    def call(questions: list[Question], folder: str = "out", **options: Any) -> dict[str, Any]:
        given = {"plan": plan(), "judge": SearchJudge(), "load": parts, **options}
        return run_search(tmp_path / folder, questions, **given)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """The files that results are in, by name."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "items")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "timings.json"}


def line_files(folder: Path) -> list[Path]:
    return sorted((folder / "items").glob("*.jsonl"))


# Answers and files --------------------------------------------------------------------------------------------------


def test_the_files_of_a_run(run: Run, tmp_path: Path) -> None:
    questions = [made(i) for i in range(3)]
    rich = run(questions, model="m", dataset="d", config={"c": 1}, args={"a": 2}, batch_size=2)
    out = tmp_path / "out"
    assert sorted(contents(out)) == [
        "results.json", "results_v1.json", *(f"reward_logs/reward_steps_00000{i}.csv" for i in range(3)), "run.json",
    ]  # fmt: skip
    assert json.loads((out / "results_v1.json").read_text()) == rich
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["model", "dataset", "accuracy", "correct", "total", "config", "args", "entries"]
    assert (results["model"], results["dataset"], results["config"], results["args"]) == ("m", "d", {"c": 1}, {"a": 2})
    assert results["total"] == 3 and (rich["format"], rich["version"]) == ("latent-search-results", 1)
    for entry, published in zip(rich["entries"], results["entries"], strict=True):
        assert tuple(published) == ENTRY_FIELDS == tuple(entry)[: len(ENTRY_FIELDS)]
        assert all(entry[name] == value for name, value in published.items())
        assert [step["step"] for step in entry["steps"]] == [0, 1] and entry["num_tokens"] <= 4
        best = entry["steps"][entry["best_reward_step"]]
        assert best["is_new_best"] and best["reward"] == entry["best_reward"]
        assert set(entry["stop"]) == {"strict", "reference"} and entry["stop_reason"] == entry["stop"]["strict"]
        assert {"correct", "error", "reply"} == set(entry["verdict"]) and set(entry["rule"]) == {"strict", "reference"}
        rows = csv_path(out, entry["data_idx"]).read_bytes().decode().split("\r\n")
        assert rows[0] == "step,reward,sigma,is_new_best,patch_count,patch_budget" and len(rows) == 4
        assert float(rows[1].split(",")[1]) == entry["steps"][0]["reward"]
    timed = json.loads((out / "timings.json").read_text())["questions"]
    assert list(timed) == ["0", "1", "2"] and [each["batch"] for each in timed.values()] == [2, 2, 1]
    assert all(each["search"] > 0 and each["decode"] > 0 for each in timed.values())


def test_an_answer_is_that_of_the_search_with_the_seed_of_its_question(run: Run) -> None:
    (entry,) = run([made(1)], plan=plan(seed=7))["entries"]
    model, processor = parts()
    prompt = search_prompts(processor, [made(1).question], [made(1).record["images"][0]], num_thought_tokens=2)
    output = generate_with_search(
        model, **prompt.inputs, **SHORT, thought_mask=prompt.thought_mask, seed=item_seed(7, 1),
        max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
    )  # fmt: skip
    assert entry["prompt"] == prompt.text[0] and entry["sys_prompt"] in entry["prompt"]
    assert output.search.best_reward == [entry["best_reward"]] and output.search.best_step == [
        entry["best_reward_step"]
    ]
    assert {int(offset): places for offset, places in entry["patches"].items()} == output.search.patches[0]
    text = processor.decode(output.sequences[0, -entry["num_tokens"] :], skip_special_tokens=True)
    assert entry["model_output"] == text
    places = [place for each in entry["patches"].values() for place in each]
    ids = prompt.inputs["input_ids"][0]
    assert places and all(ids[place] == model.config.image_token_id for place in places)
    assert entry["num_image_tokens"] == int((ids == model.config.image_token_id).sum())


def test_latent_models_give_what_stock_models_give(run: Run) -> None:
    stock = run([made(i) for i in range(2)])["entries"]
    latent = run([made(i) for i in range(2)], "latent", load=lambda: (tiny_pair()[1], tiny_processor()))["entries"]
    assert [each["model_output"] for each in stock] == [each["model_output"] for each in latent]
    assert [each["best_reward"] for each in stock] == pytest.approx([each["best_reward"] for each in latent])


@pytest.mark.parametrize("strategy", ["search", "sample"])
def test_batches_and_neighbours_change_nothing_but_rounding(run: Run, strategy: str) -> None:
    questions = [made(i) for i in range(4)]
    one = run(questions, "one", plan=plan(strategy=strategy))["entries"]
    three = run(questions, "three", plan=plan(strategy=strategy), batch_size=3)["entries"]
    alone = run(questions[2:3], "alone", plan=plan(strategy=strategy))["entries"]
    other = run(questions, "other", plan=plan(strategy=strategy, seed=1))["entries"]
    for name in ("model_output", "stop", "patches", "num_tokens", "best_reward_step"):
        assert [each[name] for each in one] == [each[name] for each in three]
        assert one[2][name] == alone[0][name]
    if strategy == "search":
        rewards = [[step["reward"] for step in each["steps"]] for each in one]
        assert rewards == [pytest.approx([step["reward"] for step in each["steps"]], abs=1e-5) for each in three]
        assert rewards != [[step["reward"] for step in each["steps"]] for each in other]
    else:
        assert [each["model_output"] for each in one] != [each["model_output"] for each in other]


def test_greedy_answers_are_those_of_the_stock_generate(run: Run) -> None:
    questions = [made(i) for i in range(2)]
    entries = run(questions, plan=plan(strategy="greedy"))["entries"]
    model, processor = parts()
    for question, entry in zip(questions, entries, strict=True):
        images = question.record["images"]
        inputs = search_prompts(processor, [question.question], images, num_thought_tokens=2).inputs
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert entry["model_output"] == processor.decode(ids, skip_special_tokens=True)
        assert entry["best_reward"] is None and entry["steps"] == [] and entry["num_tokens"] == len(ids)


def test_sampling_is_a_draw_from_the_softmax() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    ids = torch.zeros(1, 1, dtype=torch.long)
    draw = ItemSampling([3], temperature=0.5)
    counts = torch.bincount(torch.stack([draw(ids, scores).argmax(-1) for _ in range(4000)]).flatten(), minlength=4)
    torch.testing.assert_close(counts / 4000, (scores[0] / 0.5).softmax(0), atol=0.02, rtol=0)
    nucleus = ItemSampling([3], top_p=0.5)
    assert {int(nucleus(ids, scores).argmax()) for _ in range(50)} == {0}


def test_what_is_behind_the_end_of_an_answer_is_padding_of_its_batch(run: Run) -> None:
    """One answer ends early, the other goes on."""
    model, processor = liven(tiny_stock_model()), tiny_processor()
    questions, greedy = [made(0), made(2)], plan(strategy="greedy")
    ids = []
    for question in questions:
        images = question.record["images"]
        inputs = search_prompts(processor, [question.question], images, num_thought_tokens=2).inputs
        ids.append(model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :].tolist())
    end = next(place for place, token in enumerate(ids[0]) if token not in ids[1] and token not in ids[0][:place])
    assert end < 3
    model.generation_config.eos_token_id = [ids[0][end]]
    entries = run(questions, plan=greedy, load=lambda: (model, processor), batch_size=2)["entries"]
    assert (entries[0]["num_tokens"], entries[0]["stop"]["strict"]) == (end + 1, "eos_token")
    assert entries[0]["model_output"] == processor.decode(ids[0][: end + 1], skip_special_tokens=True)
    assert (entries[1]["num_tokens"], entries[1]["stop"]["strict"]) == (4, "length")
    assert entries[1]["model_output"] == processor.decode(ids[1], skip_special_tokens=True)


@pytest.mark.parametrize(("family", "side"), [("qwen2_5_vl", 28), ("qwen3_vl", 32)])
def test_bounds_of_images_are_in_tokens_of_the_processor(run: Run, family: str, side: int) -> None:
    """Card 10.25."""
    image = Image.new("RGB", (20 * side, 10 * side))
    question = made(0)
    question.record["images"] = [image]
    for low, high in ((4, 9), (20, 40)):
        (entry,) = run([question], f"{low}", load=lambda: parts(family), plan=plan(min_tokens=low, max_tokens=high))[
            "entries"
        ]
        assert low <= entry["num_image_tokens"] <= high


def test_questions_of_text_on_a_model_that_sees_and_on_one_that_does_not(run: Run) -> None:
    questions = [made(i, image=False) for i in range(2)]
    seen = run([*questions, made(2)], "seen", batch_size=3)["entries"]
    assert [entry["num_image_tokens"] > 0 for entry in seen] == [False, False, True]
    assert [bool(entry["patches"]) for entry in seen] == [False, False, True]
    for family in ("llama", "gpt2"):
        tokenizer = tiny_processor(family).tokenizer
        placeholder = "<|endoftext|>" if family == "gpt2" else None
        for options in (SHORT, {**REFERENCE, "visual_injection_start_step": 2}):
            entries = run(
                questions,
                f"{family}-{options.get('mode')}",
                load=lambda family=family, tokenizer=tokenizer: (tiny_stock_model(family=family), tokenizer),
                plan=plan(options, placeholder=placeholder),
                batch_size=2,
            )["entries"]
            assert all(entry["status"] == "done" and len(entry["steps"]) == 2 for entry in entries)


def test_text_cannot_get_image_tokens_in_reference_mode(run: Run) -> None:
    """Card 10.13."""
    questions = [made(0), made(1, image=False)]
    with pytest.raises(ValueError, match="1 questions have no image .the first is 1.*start_step to 2, or take mode="):
        run(questions, plan=plan(REFERENCE))
    late = {**REFERENCE, "visual_injection_start_step": 2}
    assert [entry["status"] for entry in run(questions, plan=plan(late))["entries"]] == ["done", "done"]


# The published stream of noise --------------------------------------------------------------------------------------


def test_the_published_stream_is_one_generator_for_all_questions(run: Run) -> None:
    questions = [made(i) for i in range(3)]
    entries = run(questions, plan=plan(REFERENCE, noise_stream="run", seed=5))["entries"]
    model, processor = parts()
    generator = torch.Generator().manual_seed(5)
    for question, entry in zip(questions, entries, strict=True):
        prompt = search_prompts(
            processor, [question.question], question.record["images"], num_thought_tokens=2, mode="reference"
        )
        output = generate_with_search(
            model, **prompt.inputs, **REFERENCE, thought_mask=prompt.thought_mask, seed=generator, max_new_tokens=4,
            do_sample=False, return_dict_in_generate=True,
        )  # fmt: skip
        assert output.search.best_reward == [entry["best_reward"]]
        assert [step.reward for step in output.search.steps[0]] == [step["reward"] for step in entry["steps"]]


def test_the_published_stream_needs_one_process_and_batches_of_one(run: Run) -> None:
    published = plan(REFERENCE, noise_stream="run")
    with pytest.raises(ValueError, match="batch_size=2 with 1 processes.*noise_stream='item'"):
        run([made(0)], plan=published, batch_size=2)
    with pytest.raises(ValueError, match="batch_size=1 with 2 processes"):
        run([made(0)], plan=published, workers=Workers(0, 2))


def test_a_question_that_fails_stops_the_published_stream(run: Run, tmp_path: Path) -> None:
    questions = [made(0), made(1), made(2)]
    (tmp_path / "broken.png").write_bytes(b"no image")
    questions[1].record["images"] = [str(tmp_path / "broken.png")]
    published = plan(REFERENCE, noise_stream="run")
    with pytest.raises(SearchRunError, match="question 1 failed.*broken.png.*noise_stream='item'"):
        run(questions, plan=published)
    tiny_images(2)[1].save(tmp_path / "broken.png")
    resumed = run(questions, plan=published, resume=True)
    assert resumed == run(questions, "whole", plan=published)


# Interrupted, resumed, shared ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"plan": plan(REFERENCE, noise_stream="run")}])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_run_that_was_stopped_gives_the_bytes_of_one_that_was_not(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], after: int
) -> None:
    questions = [made(i) for i in range(5)]
    size = {"batch_size": 1 if options else 2}
    append, calls = RunFolder.append, []

    def stopping(self: RunFolder, worker: int, lines: Any) -> None:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append([line["data_idx"] for line in lines])
        append(self, worker, lines)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RunFolder, "append", stopping)
        run(questions, **options, **size)
    with line_files(tmp_path / "out")[0].open("ab") if calls else (tmp_path / "x").open("wb") as file:
        file.write(b'{"data_idx": 4, "status": "done", "ou')  # what a kill leaves of a line
    before = [line["data_idx"] for line in _lines(tmp_path / "out")]
    run(questions, **options, **size, resume=True)
    after_resume = [line["data_idx"] for line in _lines(tmp_path / "out")]
    assert after_resume[: len(before)] == before and sorted(after_resume) == [0, 1, 2, 3, 4], "none twice, none lost"
    run(questions, "whole", **options, **size)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _lines(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in line_files(folder):
        for line in path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                assert line == '{"data_idx": 4, "status": "done", "ou'
    return found


def test_a_finished_run_loads_no_model(run: Run, tmp_path: Path) -> None:
    questions = [made(i) for i in range(2)]
    run(questions)
    first = contents(tmp_path / "out")
    (tmp_path / "out" / "results.json").unlink()

    def load() -> Any:
        raise AssertionError("nothing is left to answer")

    run(questions, load=load, resume=True)
    assert contents(tmp_path / "out") == first


def test_a_line_that_is_there_twice_counts_once(run: Run, tmp_path: Path) -> None:
    questions = [made(i) for i in range(2)]
    rich = run(questions)
    (path,) = line_files(tmp_path / "out")
    failed = {"data_idx": 0, "digest": questions[0].digest, "status": "failed", "error": "later", "its_own": False}
    path.write_text(path.read_text() * 2 + json.dumps(failed) + "\n")
    assert run(questions, resume=True) == rich


def test_workers_share_what_is_left(run: Run, tmp_path: Path) -> None:
    """Two of them, in threads that wait for each other; they share whole batches, so the bytes are those of one."""
    questions = [made(i) for i in range(5)]
    run(questions, "one", batch_size=2)
    barrier = threading.Barrier(2, timeout=60)

    def work(index: int) -> Any:
        own = copy.deepcopy(tiny_pair()[0]), tiny_processor()
        return run(questions, "two", batch_size=2, load=lambda: own, workers=Workers(index, 2, barrier.wait))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, range(2))
    assert second is None and first["counts"]["questions"] == 5
    names = [path.name for path in line_files(tmp_path / "two")]
    assert names == ["worker-000.jsonl", "worker-001.jsonl"]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    timed = json.loads((tmp_path / "two" / "timings.json").read_text())["questions"]
    assert [each["worker"] for each in timed.values()] == [0, 0, 1, 1, 0]


def test_a_process_that_ended_early_is_found_out(run: Run) -> None:
    with pytest.raises(SearchRunError, match="2 questions have no answer, the first is 1: .*go on with resume"):
        run([made(i) for i in range(4)], workers=Workers(0, 2))


def test_more_questions_later(run: Run, tmp_path: Path) -> None:
    questions = [made(i) for i in range(4)]
    run(questions[:2], batch_size=2)
    more = run(questions, batch_size=2, resume=True)
    assert more == run(questions, "whole", batch_size=2)
    assert len(_lines(tmp_path / "out")) == 4


def test_another_configuration_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    questions = [made(0)]
    run(questions, settings={"dtype": "float32"})
    same = {"settings": {"dtype": "float32"}, "resume": True}
    with pytest.raises(ValueError, match="out holds questions of an earlier run; go on with it with resume, or give"):
        run(questions, settings={"dtype": "float32"})
    with pytest.raises(ValueError, match="was begun with sigma=0.1, now sigma=0.2; give another output_dir"):
        run(questions, plan=plan({**SHORT, "sigma": 0.2}), **same)
    with pytest.raises(ValueError, match="was begun with max_new_tokens=4, now max_new_tokens=5"):
        run(questions, plan=plan(max_new_tokens=5), **same)
    with pytest.raises(ValueError, match="was begun with dtype='float32', now dtype='bfloat16'"):
        run(questions, settings={"dtype": "bfloat16"}, resume=True)
    changed = dataclasses.replace(questions[0], solution="red")
    with pytest.raises(
        ValueError, match="an answer to another question 0 than 'Which colour is thing 0.': the data were changed"
    ):
        run([changed], **same)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="foreign holds the results.json of another program"):
        run(questions, "foreign")
    (tmp_path / "out" / "run.json").write_text('{"format": "x"}')
    with pytest.raises(ValueError, match="run.json is not of this version of the library"):
        run(questions, **same)
    (tmp_path / "out" / "run.json").write_text('{"form')
    with pytest.raises(ValueError, match="run.json cannot be read"):
        run(questions, **same)


def test_answers_without_their_settings_are_refused(run: Run, tmp_path: Path) -> None:
    run([made(0)])
    for name in ("run.json", "results.json"):
        (tmp_path / "out" / name).unlink()
    for resume in (False, True):
        with pytest.raises(ValueError, match="out holds questions and no run.json; restore it, or give another"):
            run([made(0)], resume=resume)


def test_a_hole_in_the_published_stream_is_refused(run: Run, tmp_path: Path) -> None:
    questions, published = [made(i) for i in range(3)], plan(REFERENCE, noise_stream="run")
    run(questions, plan=published)
    (path,) = line_files(tmp_path / "out")
    first, _, third = path.read_text().splitlines()
    path.write_text(f"{first}\n{third}\n")
    with pytest.raises(ValueError, match="has question 2 and lacks 1 before it, which noise_stream='run' needs"):
        run(questions, plan=published, resume=True)


# Failures -----------------------------------------------------------------------------------------------------------


def test_a_question_that_fails_costs_no_other_and_is_asked_again(run: Run, tmp_path: Path) -> None:
    questions = [made(i) for i in range(3)]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    questions[1].record["images"] = [str(broken)]
    rich = run(questions, batch_size=3)
    assert [entry["status"] for entry in rich["entries"]] == ["done", "failed", "done"]
    failed = rich["entries"][1]
    assert failed["model_output"].startswith("[GENERATION_ERROR] RecordError(") and str(broken) in failed["error"]
    assert failed["answer"] is None and failed["stop_reason"] == "exception" and failed["is_correct"] is False
    assert rich["counts"]["failed"] == 1 and rich["accuracy_of_all"] == 0
    tiny_images(2)[1].save(broken)
    again = run(questions, batch_size=3, resume=True)
    assert [entry["status"] for entry in again["entries"]] == ["done"] * 3
    assert again == run(questions, "whole", batch_size=3)


def test_a_run_whose_questions_all_fail_stops(run: Run, tmp_path: Path) -> None:
    def load() -> tuple[Any, Any]:
        model = liven(tiny_stock_model())
        model.generate = _out_of_memory
        return model, tiny_processor()

    greedy = plan(strategy="greedy")
    with pytest.raises(SearchRunError, match=rf"{GIVE_UP} questions in a row failed, the last one, 7, with .*no mem"):
        run([made(i % 4, data_idx=i) for i in range(10)], load=load, plan=greedy)
    with pytest.raises(SearchRunError, match="2 questions in a row failed"):
        run([made(0), made(1)], "few", load=load, plan=greedy)
    assert run([made(0), made(1)], "few", plan=greedy, resume=True)["counts"]["failed"] == 0


def _out_of_memory(**inputs: Any) -> None:
    raise torch.OutOfMemoryError("no memory")


def test_a_question_with_the_placeholder_fails_with_its_reason(run: Run) -> None:
    other = dataclasses.replace(made(1), question="What is <|endoftext|>?")
    rich = run([made(0), other, made(2)], plan=plan(REFERENCE), batch_size=2)
    assert [entry["status"] for entry in rich["entries"]] == ["done", "failed", "done"]
    assert "the question contains '<|endoftext|>'" in rich["entries"][1]["error"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"num_thought_tokens": 0}}, "num_thought_tokens=0 must be an integer of at least 1; for none"),
        ({"options": {"sigma": 0.0}}, "sigma=0.0 must be a number above 0: without noise"),
        ({"options": {"steps": 1}}, "does not read .'steps'."),
        ({"options": {"seed": 1}}, "seed is an option of the plan"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of at least 1"),
        ({"seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ({"strategy": "beam"}, "beam"),
        ({"noise_stream": "all"}, "all"),
        ({"temperature": 0.0}, "temperature=0.0.*strategy='greedy'"),
        ({"strategy": "greedy", "noise_stream": "run"}, "noise_stream='run' is of the search"),
    ],
)
def test_wrong_plans(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchPlan(**changes)


def test_wrong_calls(run: Run) -> None:
    with pytest.raises(ValueError, match="no questions"):
        run([])
    with pytest.raises(ValueError, match="batch_size=0 must be 1 or more"):
        run([made(0)], batch_size=0)


def test_the_seed_of_a_question() -> None:
    seeds = {item_seed(seed, index) for seed in range(3) for index in range(100)}
    assert len(seeds) == 300 and all(0 <= seed < 2**63 for seed in seeds)
    assert item_seed(42, 7) == item_seed(42, 7)


def test_the_published_decode_never_writes_a_certain_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for Qwen3, whose model type says so."""
    seen: dict[str, Any] = {}

    def spy(model: Any, **options: Any) -> Any:
        seen[model.config.model_type] = options
        return generate_with_search(model, **options)

    monkeypatch.setattr(search_answers, "generate_with_search", spy)
    for family in ("qwen2_5_vl", "qwen3_vl"):
        (line,) = SearchAnswers(*parts(family), plan(REFERENCE))([made(0)])
        assert line["status"] == "done"
    ids = tiny_processor().tokenizer("addCriterion", add_special_tokens=False)["input_ids"]
    assert seen["qwen2_5_vl"]["bad_words_ids"] == [ids] and "bad_words_ids" not in seen["qwen3_vl"]
    SearchAnswers(*parts(), plan())([made(0)])
    assert "bad_words_ids" not in seen["qwen2_5_vl"], "the mode of the paper writes what it likes"


# Questions of a file ------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    """Writes a data file beside its images."""
    (tmp_path / "img").mkdir()
    for number, image in enumerate(tiny_images(3)):
        image.save(tmp_path / "img" / f"{number}.png")

    def write(*rows: dict[str, Any]) -> Path:
        (tmp_path / "toy.json").write_text(json.dumps(list(rows)))
        return tmp_path / "toy.json"

    return write


def row(number: int, **changes: Any) -> dict[str, Any]:
    facts = {"prompt": rf"Look. \n Which is {number}?", "solution": "B. carp", "image_path": f"img/{number % 3}.png"}
    return {**facts, "idx": 100 + number, **changes}


def test_questions_keep_their_place_in_the_file(data: Callable[..., Path]) -> None:
    path = data(row(0), row(1, solution=None), row(2, image_path="img/gone.png"), row(3, answer_text="carp"), row(4))
    questions, report = read_questions(path, start_data_idx=1, end_data_idx=100, max_bad_share=0.5)
    assert [question.data_idx for question in questions] == [1, 2, 3, 4] and report.num_bad == 1
    assert questions[0].solution is None and questions[0].problem is None
    assert questions[1].record is None and "row 2: image file" in questions[1].problem
    assert (questions[1].question, questions[1].image_path) == (row(2)["prompt"], "img/gone.png")
    assert questions[2].solution_text == "carp" and questions[2].question == "Look. \nWhich is 3?"
    assert read_questions(path, max_bad_share=0.5, repair=False)[0][3].question == row(3)["prompt"]
    with pytest.raises(RecordShareError, match=r"(?s)above max_bad_share=0.01.*row 2: image file"):
        read_questions(path)


def test_bad_and_skipped_rows_have_entries(run: Run, data: Callable[..., Path]) -> None:
    path = data(row(0), row(1, solution=None), row(2, image_path="img/gone.png"))
    questions, _ = read_questions(path, max_bad_share=1)
    rich = run(questions)
    assert [entry["status"] for entry in rich["entries"]] == ["done", "skipped", "failed"]
    assert [entry["stop_reason"] for entry in rich["entries"][1:]] == ["skipped_no_gt", "exception"]
    assert "img/gone.png" in rich["entries"][2]["model_output"]
    counts = {"questions": 3, "correct": 0, "wrong": 1, "unverified": 0, "failed": 1, "skipped": 1}
    assert {name: rich["counts"][name] for name in counts} == counts

    def load() -> Any:
        raise AssertionError("a row that is bad is not asked again")

    assert run(questions, load=load, resume=True) == rich
    # When the image is there after all, it is asked.
    tiny_images(1)[0].save(path.parent / "img/gone.png")
    questions, _ = read_questions(path)
    assert run(questions, resume=True)["entries"][2]["status"] == "done"


def test_empty_answers_are_listed_and_may_be_left_out(data: Callable[..., Path]) -> None:
    path = data(row(0), row(1, solution=""), row(2, solution=" "), row(3))
    with pytest.raises(RecordError, match="2 of 4 rows have an empty solution.*rows 1-2; .*='skip' or 'keep'"):
        read_questions(path)
    questions, report = read_questions(path, empty_answers="skip")
    assert [question.data_idx for question in questions] == [0, 3]
    assert report.skip_reasons == {"solution is empty": 2}
    assert [question.solution for question in read_questions(path, empty_answers="keep")[0]] == [
        "B. carp", "", " ", "B. carp",
    ]  # fmt: skip


def test_where_image_paths_begin(data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the file; as published in the working directory, where the first image is there alone."""
    path = data(row(0))
    nested = tmp_path / "data" / "toy.json"
    nested.parent.mkdir()
    nested.write_bytes(path.read_bytes())
    with pytest.raises(RecordShareError):
        read_questions(nested)
    assert read_questions(nested, tmp_path)[0][0].record is not None
    monkeypatch.chdir(tmp_path)
    assert read_questions("data/toy.json")[0][0].record is not None


# Verdicts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    chat = ChatServer(YES)
    yield chat
    chat.close()


def llm(url: str, mode: str = "strict", **options: Any) -> SearchJudge:
    settings = VerifierSettings("k", url, "tiny-judge")
    return SearchJudge(mode, LLMVerifier(settings, mode=mode, sleep=lambda seconds: None, workers=1, **options))


def test_the_verifier_judges_what_was_taken_from_the_answer(run: Run, server: ChatServer, tmp_path: Path) -> None:
    server.replies = [YES, NO, YES]
    questions = [made(i, solution="B. carp", solution_text=f"carp {i}") for i in range(3)]
    rich = run(questions, judge=llm(server.url, cache=tmp_path / "out" / "verdicts.jsonl"))
    assert [entry["is_correct"] for entry in rich["entries"]] == [True, False, True]
    assert rich["judge"] == {"kind": "llm", "mode": "strict", "model": "tiny-judge"}
    for entry, seen in zip(rich["entries"], server.seen, strict=True):
        assert (
            f"Candidate answer: {entry['answer']}\n" in seen["text"]
            and f"Ground truth: B:carp {entry['data_idx']}" in seen["text"]
        )
        assert entry["verdict"]["reply"] in (YES, NO)
    assert rich["accuracy"] == pytest.approx(2 / 3) and rich["interval"][0] < 2 / 3 < rich["interval"][1]
    # Verdicts are kept: a second time nothing is asked.
    run(questions, judge=llm(server.url, cache=tmp_path / "out" / "verdicts.jsonl"), resume=True)
    assert len(server.seen) == 3


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_an_endpoint_that_is_down_costs_verdicts_and_no_answers(
    run: Run, server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [made(i) for i in range(3)]
    rich = run(questions, judge=llm(f"http://127.0.0.1:{closed_port()}/v1", retries=1))
    assert [entry["is_correct"] for entry in rich["entries"]] == [None] * 3
    assert rich["counts"]["unverified"] == 3 and rich["accuracy"] is None and rich["accuracy_of_all"] == 0
    (reason,) = rich["unverified"]
    assert "cannot be reached" in reason and rich["unverified"][reason] == 3
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["accuracy"], results["correct"], results["total"]) == (0.0, 0, 0)
    # The endpoint is back.
    truths = {question.data_idx: Truth(question.solution) for question in questions}
    verified, found = verify_results(tmp_path / "out", truths, llm(server.url))
    assert found["counts"]["correct"] == 3 and found["unverified"] == {}
    assert (verified["accuracy"], verified["correct"], verified["total"]) == (1.0, 3, 3)
    rich = json.loads((tmp_path / "out" / "results_v1.json").read_text())
    assert rich["counts"]["correct"] == 3 and rich["unverified"] == {} and rich["accuracy"] == 1.0


def test_an_endpoint_that_sends_html_is_an_error_and_no_wrong_answer(run: Run, server: ChatServer) -> None:
    server.replies = [Reply(raw=b"<html><body>Please log in</body></html>")]
    rich = run([made(0)], judge=llm(server.url))
    assert rich["counts"]["unverified"] == 1 and "web page instead of JSON" in next(iter(rich["unverified"]))
    assert rich["entries"][0]["verdict"]["correct"] is None
    published = run([made(0)], "published", judge=llm(server.url, "reference"))
    assert published["entries"][0]["is_correct"] is False and published["entries"][0]["verdict"]["error"]


def entry(status: str, correct: Any, **fields: Any) -> dict[str, Any]:
    return {"status": status, "is_correct": correct, **fields}


def test_counting() -> None:
    entries = [
        entry("done", True, stop={"strict": "eos_token"}),
        entry("done", False, stop={"strict": "length"}),
        entry("done", None, verdict={"error": "away"}),
        entry("failed", False),
        entry("skipped", False),
    ]
    assert tally(entries, "strict") == {"accuracy": 1 / 3, "correct": 1, "total": 3}
    assert tally(entries, "reference") == {"accuracy": 1 / 5, "correct": 1, "total": 5}
    found = summary(entries)
    assert found["counts"] == {
        "questions": 5, "correct": 1, "wrong": 1, "unverified": 1, "failed": 1, "skipped": 1, "cut_off": 1,
    }  # fmt: skip
    assert found["accuracy"] == 0.5 and found["accuracy_of_all"] == 1 / 4 and found["unverified"] == {"away": 1}
    assert tally([], "strict") == {"accuracy": 0.0, "correct": 0, "total": 0} and summary([])["accuracy"] is None


def test_judged_anew_by_rule(run: Run, tmp_path: Path) -> None:
    questions = [made(0), made(1, solution=None), made(2)]
    rich = run(questions)
    path = tmp_path / "out" / "results.json"
    results = json.loads(path.read_text())
    results["entries"][0] |= {"model_output": "It is \\boxed{blue}", "note": "kept"}
    results["entries"].append({"data_idx": 77, "model_output": "blue"})
    path.write_text(json.dumps({**results, "extra": 1}))
    truths = {question.data_idx: Truth(question.solution) for question in questions}
    verified, found = verify_results(tmp_path / "out", truths, SearchJudge())
    assert found["counts"]["questions"] == 2
    assert verified["extra"] == 1 and verified["entries"][0]["note"] == "kept"
    assert [each.get("is_correct") for each in verified["entries"]] == [True, False, False, None]
    assert (verified["correct"], verified["total"]) == (1, 2), "skipped rows and other entries count for nothing"
    assert "ground_truth" not in verified["entries"][3] and rich["entries"][1]["status"] == "skipped"


def test_nothing_to_judge_anew(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="results.json does not exist, so there is nothing to verify; run without"):
        verify_results(tmp_path, {}, SearchJudge())
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="has no list of entries"):
        verify_results(tmp_path, {}, SearchJudge())
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="results.json cannot be read"):
        verify_results(tmp_path, {}, SearchJudge())


def test_sigma_of_a_log_is_multiplied_step_by_step() -> None:
    names = ("step", "reward", "sigma", "is_new_best", "patch_count", "patch_budget")
    steps = [dict(zip(names, (i, 1.5, 0.0, i == 0, 2, -1), strict=True)) for i in range(3)]
    rows = [line.split(",") for line in reward_csv(steps, 25.0, 0.95).split("\r\n")[1:-1]]
    assert [float(row[2]) for row in rows] == [25.0 * 0.95, 25.0 * 0.95 * 0.95, 25.0 * 0.95 * 0.95 * 0.95]
    assert rows[0] == ["0", "1.5", "23.75", "1", "2", "-1"] and rows[1][3] == "0"
