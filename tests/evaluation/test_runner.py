"""Batched prediction against one call of `generate` a record, and the maze benchmark against known answers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import evaluation.benchmarks.mazes
from evaluation.benchmarks.mazes import evaluate_mazes
from evaluation.runner import Prediction, build_prompt, predict
from evaluation.statistics import wilson_interval
from modeling_latent import LatentProcessor, LatentQwen2_5_VLForConditionalGeneration
from modeling_latent.configuration_latent import LATENT_METHODS, LATENT_TOKEN_FIELDS
from tests.latent import liven, tiny_latent_model
from tests.tiny import tiny_images, tiny_processor, tiny_stock_model
from tests.trainers.staged_parts import staged_parts
from trainers.data.mazes import chance_level, maze_dataset, maze_of_record
from trainers.data.records import Record, RecordError, make_record, record_from_row
from trainers.tiny import build_tiny_processor


@pytest.fixture(scope="module")
def processor() -> LatentProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def model() -> LatentQwen2_5_VLForConditionalGeneration:
    defaults = {"latent_strategy": "dynamic", "max_latent_steps": 4}
    return liven(tiny_latent_model(latent_method="laser", latent_generation=defaults))


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Seven records whose order by size is not the given one: no, one and two images, short and long questions."""
    images = tiny_images(4)
    chosen = [[images[2]], [], [images[0], images[1]], [images[3]], [], [images[1]], [images[0]]]
    questions = ["What is it? " * (1 + 5 * i % 7) for i in range(7)]
    return [make_record(f"r{i}", questions[i], "A dog", chosen[i]) for i in range(7)]


def alone(model: Any, processor: LatentProcessor, record: Record, **options: Any) -> Any:
    """One record through the chat template and `generate`: its new ids and the output."""
    content = [{"type": "image", "image": image} for image in record["images"]]
    content.append({"type": "text", "text": record["question"]})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt",
        add_generation_prompt=True,
    )  # fmt: skip
    output = model.generate(**inputs, do_sample=False, max_new_tokens=9, return_dict_in_generate=True, **options)
    return output.sequences[0, inputs["input_ids"].shape[1] :].tolist(), output


# Prediction -----------------------------------------------------------------------------------------------------


def test_slots_behind_prompts_of_one_batch_with_images_of_different_sizes(records: list[Record]) -> None:
    """Blocks are shorter where an image has fewer tokens; no part of a prompt is taken for what was written."""
    processor = build_tiny_processor(latent_tokens=LATENT_METHODS["ivtlr"].tokens)
    ids = {name: getattr(processor, name) for name in LATENT_TOKEN_FIELDS}
    model = liven(tiny_latent_model(latent_method="ivtlr", **ids))
    options = {"latent_strategy": "staged", "num_latent_steps": 2, "num_latent_patches": 3, "max_new_tokens": 5}
    chosen = [record for record in records if record["images"]]
    together = predict(model, processor, chosen, batch_size=50, **options)
    assert together == predict(model, processor, chosen, batch_size=1, **options)
    for record, prediction in zip(chosen, together, strict=True):
        assert prediction.num_latent_steps == 2 and 2 < prediction.num_tokens <= 7
        assert "patch" in prediction.latent_path
        assert record["question"][:6] not in prediction.text
    lengths = {prediction.latent_path.split("patch")[0][-3:] for prediction in together}
    assert len(lengths) > 1, "all blocks have one length: this tests nothing"


def test_slots_of_a_short_prompt_that_begin_before_the_end_of_a_long_one() -> None:
    """A large image has long blocks: some of them stand where the longest prompt of the batch still goes on."""
    processor = build_tiny_processor(latent_tokens=LATENT_METHODS["ivtlr"].tokens)
    ids = {name: getattr(processor, name) for name in LATENT_TOKEN_FIELDS}
    model = liven(tiny_latent_model(latent_method="ivtlr", **ids))
    large, small = (tiny_images(4)[2].resize((side, side)) for side in (112, 28))
    records = [make_record("a", "Hi", "x", [large]), make_record("b", "What is it? " * 20, "x", [small])]
    options = {"latent_strategy": "staged", "num_latent_steps": 2, "num_latent_patches": 8, "max_new_tokens": 5}
    first, second = predict(model, processor, records, batch_size=2, **options)
    assert [first, second] == predict(model, processor, records, batch_size=1, **options)
    assert first.latent_path.startswith("⟨[4 patches]·") and "[1 patch]" in second.latent_path


class Say(LogitsProcessor):
    """The arg max of a row is its own list of ids, one a step."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows, self.step = rows, -1

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        scores = torch.full_like(scores, -1e9)
        for row, ids in enumerate(self.rows):
            scores[row, ids[self.step]] = 0
        return scores


def learned_parts() -> tuple[LatentQwen2_5_VLForConditionalGeneration, LatentProcessor]:
    """A model with learned tokens: it has neither slots nor markers."""
    processor = build_tiny_processor(latent_tokens=LATENT_METHODS["lavit"].tokens)
    ids = {name: getattr(processor, name) for name in LATENT_TOKEN_FIELDS}
    assert [name for name, value in ids.items() if value is not None] == ["latent_learned_token_ids"]
    return liven(tiny_latent_model(latent_method="lavit", **ids)), processor


@pytest.mark.parametrize("options", [{}, {"num_latent_steps": 3}, {"mask_latents": True}, {"mask_latents": "padding"}])
def test_learned_tokens_behind_the_prompt_are_latent_steps_and_no_text(
    options: dict[str, Any], records: list[Record]
) -> None:
    """They cost no step; nothing is cut from the answer, whose own ids are what `generate` wrote behind them."""
    model, processor = learned_parts()
    options = {"latent_strategy": "learned", **options}
    number = options.get("num_latent_steps", len(processor.latent_learned_token_ids))
    predictions = predict(model, processor, records, batch_size=3, max_new_tokens=9, **options)
    for record, prediction in zip(records, predictions, strict=True):
        ids, output = alone(model, processor, record, **options)
        assert ids[:number] == processor.latent_learned_token_ids[:number] and len(ids) == number + 9
        assert prediction.raw == processor.decode(ids[number:]) and "<lvr" not in prediction.raw
        assert prediction.text == processor.decode(ids[number:], skip_special_tokens=True).strip()
        assert (prediction.num_latent_steps, prediction.num_prefilled, prediction.num_markers) == (number, number, 0)
        assert (prediction.num_tokens, prediction.num_steps) == (number + 9, 9)
        said = output.latent_trace.readable_sequences[0]
        path = processor.decode_latent(output.sequences[0], said, output.latent_trace.latent_mask[0])
        assert path.endswith(prediction.latent_path) and prediction.latent_path.startswith("⟨")
        assert record["question"][:6] not in prediction.latent_path


def test_learned_tokens_that_the_model_writes_are_counted(records: list[Record]) -> None:
    model, processor = learned_parts()
    learned, end = processor.latent_learned_token_ids, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    (word,) = processor.tokenizer.encode("dog", add_special_tokens=False)[:1]
    rows = [
        [*learned, word, end, end],
        [word, end, end, end, end, end, end],
        [word, *learned[:2], word, end, end, end],
    ]
    options: dict[str, Any] = {"latent_strategy": "learned", "force_latents": False, "max_new_tokens": 7}
    chosen = sorted((record for record in records if record["images"]), key=lambda record: len(record["question"]))[:3]
    found = [predict(model, processor, [each], logits_processor=[Say([row])], **options)[0]
             for each, row in zip(chosen, rows, strict=True)]  # fmt: skip
    said, names = processor.decode([word]), [processor.tokenizer.convert_ids_to_tokens(token) for token in learned]
    assert [each.text for each in found] == [said.strip(), said.strip(), processor.decode([word, word]).strip()]
    assert [each.num_latent_steps for each in found] == [4, 0, 2]
    assert [each.num_steps for each in found] == [each.num_tokens for each in found] == [6, 2, 5]
    assert [each.num_prefilled for each in found] == [0, 0, 0]
    assert found[0].raw == "".join(names) + f"{said}<|im_end|>" and found[1].raw == f"{said}<|im_end|>"
    assert found[0].latent_path == f"⟨{'·'.join(names)}⟩{said}".strip() and "⟨" not in found[1].latent_path
    assert f"⟨{'·'.join(names[:2])}⟩" in found[2].latent_path
    off = {"latent_strategy": "off", "max_new_tokens": 7, "logits_processor": [Say([rows[0]])]}
    (without,) = predict(model, processor, chosen[:1], **off)
    assert without.num_latent_steps == 0 and "<lvr" not in without.raw, "no latents: other words in their place"


def test_learned_tokens_of_a_stock_model(records: list[Record]) -> None:
    """A published folder that was read as the stock class writes them as it writes any token."""
    _, processor = learned_parts()
    learned = processor.latent_learned_token_ids
    (word,) = processor.tokenizer.encode("dog", add_special_tokens=False)[:1]
    options = {"logits_processor": [Say([[*learned, word]])], "max_new_tokens": 5}
    (found,) = predict(tiny_stock_model(), processor, records[:1], **options)
    assert (found.num_latent_steps, found.num_tokens, found.text) == (4, 5, processor.decode([word]).strip())
    assert found.raw.startswith("<lvr1><lvr2><lvr3><lvr4>") and found.closed_by == ()


class EndAt(LogitsProcessor):
    """The arg max is the end token at a position that depends on the row, from the first generated one on."""

    def __init__(self, end: int, positions: list[int | None]) -> None:
        self.end, self.positions, self.first = end, positions, None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        self.first = input_ids.shape[1] if self.first is None else self.first
        scores[:, self.end] = -1e9
        for row, position in enumerate(self.positions):
            if position == input_ids.shape[1] - self.first:
                scores[row, self.end] = 1e9
        return scores


@pytest.mark.parametrize(("family", "strategy"), [("gpt2", "staged"), ("gpt2", "off"), ("llama", "staged")])
def test_models_of_text_alone(family: str, strategy: str) -> None:
    """A prompt of one's own; the end of the turn counts where padding is the same token (GPT-2), markers are told."""
    model, processor = staged_parts(family)
    end = processor.tokenizer.eos_token_id
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, processor.tokenizer.pad_token_id
    assert (processor.tokenizer.pad_token_id == end) == (family == "gpt2")
    records = [make_record(f"r{i}", "Is the path safe? " * (i + 1), "yes") for i in range(3)]
    options = {"latent_strategy": strategy, "max_new_tokens": 6, "prompt": lambda record: record["question"] + "\n"}
    if strategy == "staged":
        options |= {"num_latent_steps": 2, "latent_markers": True}
    ends = [EndAt(end, [0, 3, None])]
    predictions = predict(model, processor, records, logits_processor=ends, **options)
    laid_out = 4 if strategy == "staged" else 0
    assert [each.num_tokens - laid_out for each in predictions] == [1, 4, 6]
    assert [each.num_steps for each in predictions] == [laid_out // 2 + n for n in (1, 4, 6)]
    assert [each.num_latent_steps for each in predictions] == [laid_out // 2] * 3
    inputs = processor(text=[records[1]["question"] + "\n"], return_tensors="pt")
    del options["prompt"]
    ids = model.generate(**inputs, do_sample=False, logits_processor=[EndAt(end, [3])], **options)[0].tolist()
    assert predictions[1].text == processor.decode(ids[-4:], skip_special_tokens=True).strip()
    with pytest.raises(RecordError, match="record 'r', whole file: 1 images, and LatentTextProcessor reads text"):
        predict(model, processor, [make_record("r", "What?", "x", [tiny_images(1)[0]])])
    with pytest.raises(ValueError, match="instruction=' Please.' beside a prompt of your own"):
        predict(model, processor, records, instruction=" Please.", prompt=lambda record: record["question"])


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize(
    "options",
    [{}, {"latent_strategy": "fixed", "num_latent_steps": 2, "force_span": True}, {"latent_strategy": "off"}],
    ids=["dynamic", "fixed", "off"],
)
def test_batches_equal_single_calls_in_the_given_order(
    options: dict[str, Any],
    batch_size: int,
    model: LatentQwen2_5_VLForConditionalGeneration,
    processor: LatentProcessor,
    records: list[Record],
) -> None:
    predictions = predict(model, processor, records, batch_size=batch_size, max_new_tokens=9, **options)
    assert [prediction.id for prediction in predictions] == [record["id"] for record in records]
    for record, prediction in zip(records, predictions, strict=True):
        ids, output = alone(model, processor, record, **options)
        trace = output.latent_trace
        start = len(output.sequences[0]) - len(ids)
        path = processor.decode_latent(ids, trace.readable_sequences[0, start:], trace.latent_mask[0, start:])
        assert prediction == Prediction(
            id=record["id"],
            text=processor.decode(ids, skip_special_tokens=True).strip(),
            latent_path=path.strip(),
            num_latent_steps=ids.count(processor.latent_token_id),
            num_tokens=len(ids),
            closed_by=tuple(span.reason for span in trace.spans),
            raw=processor.decode(ids),
        )
        expected = {"dynamic": 4, "fixed": 2, "off": 0}[options.get("latent_strategy", "dynamic")]
        assert prediction.num_latent_steps == expected
        assert ("⟨" in prediction.latent_path) == (expected > 0) and "⟨" not in prediction.text
    closed = {reason for prediction in predictions for reason in prediction.closed_by}
    reasons = {"dynamic": {"max_latent_steps"}, "fixed": {"num_latent_steps"}, "off": set()}
    assert closed == reasons[options.get("latent_strategy", "dynamic")]


def test_tokens_are_counted_up_to_the_end_of_the_turn(
    model: LatentQwen2_5_VLForConditionalGeneration, processor: LatentProcessor, records: list[Record]
) -> None:
    written = [alone(model, processor, record)[0] for record in records]
    # An id that some replies hold and others do not, or hold later: there the turn ends now.
    candidates = {token for ids in written for token in ids[6:]}
    lengths = {
        token: [ids.index(token) + 1 if token in ids else len(ids) for ids in written] for token in sorted(candidates)
    }
    end = next(token for token, found in lengths.items() if len(set(found)) > 1)
    predictions = predict(model, processor, records, max_new_tokens=9, eos_token_id=end)
    assert [prediction.num_tokens for prediction in predictions] == lengths[end]
    assert [prediction.num_latent_steps for prediction in predictions] == [4] * len(records)


def test_a_budget_inside_a_span_is_reported(
    model: LatentQwen2_5_VLForConditionalGeneration, processor: LatentProcessor, records: list[Record]
) -> None:
    predictions = predict(model, processor, records[:2], max_new_tokens=3)
    assert [prediction.closed_by for prediction in predictions] == [("open",)] * 2
    assert [(p.num_latent_steps, p.num_tokens, p.text) for p in predictions] == [(2, 3, "")] * 2


def test_a_stock_model_is_predicted_with_the_same_runner(processor: LatentProcessor, records: list[Record]) -> None:
    stock, latent = liven(tiny_stock_model()), liven(tiny_latent_model(latent_method="laser"))
    plain = predict(stock, processor, records, max_new_tokens=6)
    off = predict(latent, processor, records, max_new_tokens=6, latent_strategy="off")
    assert [(p.id, p.text, p.num_tokens) for p in plain] == [(p.id, p.text, p.num_tokens) for p in off]
    assert all(p.latent_path == p.text and p.num_latent_steps == 0 and p.closed_by == () for p in plain)


def test_rows_of_a_table_records_and_paths_are_the_same(
    model: LatentQwen2_5_VLForConditionalGeneration, processor: LatentProcessor, tmp_path: Path
) -> None:
    rows = list(maze_dataset(3, seed=2, split="test", sizes=(3, 4)))
    plain = [record_from_row(row) for row in rows]
    paths = []
    for i, record in enumerate(plain):
        record["images"][0].save(tmp_path / f"{i}.png")
        paths.append({**record, "images": [str(tmp_path / f"{i}.png")]})
    first, second, third = (predict(model, processor, given, max_new_tokens=8) for given in (rows, plain, paths))
    assert first == second == third and first[0].id == rows[0]["id"]
    with pytest.raises(RecordError, match="record 'maze-test-2-0', row 0: .*gone.png' cannot be read"):
        predict(model, processor, [{**plain[0], "images": [str(tmp_path / "gone.png")]}])


def test_options_instruction_and_mode(
    model: LatentQwen2_5_VLForConditionalGeneration, processor: LatentProcessor, records: list[Record]
) -> None:
    (asked,) = predict(model, processor, [records[3]], max_new_tokens=9, instruction=" Answer with one word.")
    longer = {**records[3], "question": records[3]["question"] + " Answer with one word."}
    assert asked == predict(model, processor, [longer], max_new_tokens=9)[0]
    assert build_prompt(processor, records[3], " Please.") == build_prompt(processor, records[3]).replace(
        f"{records[3]['question']}<|im_end|>", f"{records[3]['question']} Please.<|im_end|>"
    )
    torch.manual_seed(0)
    sampled = predict(model, processor, records, max_new_tokens=9, do_sample=True, latent_strategy="off")
    assert [p.text for p in sampled] != [
        p.text for p in predict(model, processor, records, max_new_tokens=9, latent_strategy="off")
    ]
    assert predict(model, processor, []) == []
    for mode in (True, False):
        model.train(mode)
        predict(model, processor, records[:1], max_new_tokens=2)
        assert model.training == mode
    model.train()
    with pytest.raises(ValueError, match="latent_strategy='slow' is unknown"):
        predict(model, processor, records[:1], latent_strategy="slow")
    assert model.training
    model.eval()
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        predict(model, processor, records, batch_size=0)


# The maze benchmark ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mazes() -> list[dict[str, Any]]:
    """Rows of a table: mazes of sizes 3 and 4, at least two of each."""
    rows = list(maze_dataset(8, seed=1, split="test", sizes=(3, 4)))
    assert {maze_of_record(row).size for row in rows} == {3, 4}
    return rows


def answering(monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> list[dict[str, Any]]:
    """Replaces generation by given answers; returns the calls."""
    calls: list[dict[str, Any]] = []

    def fake(model: Any, processor: Any, records: Any, **options: Any) -> list[Prediction]:
        calls.append({"model": model, "processor": processor, **options})
        return [
            Prediction(record["id"], text, text, i % 3, 10 + i, ("end_token",))
            for i, (record, text) in enumerate(zip(records, answers, strict=True))
        ]

    monkeypatch.setattr(evaluation.benchmarks.mazes, "predict", fake)
    return calls


def test_gold_answers_score_everything(mazes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answering(monkeypatch, [f"<answer>{row['answer']}</answer>" for row in mazes])
    report = evaluate_mazes("gold", "model", "processor", mazes, batch_size=7, latent_strategy="off", max_new_tokens=5)
    options = {"batch_size": 7, "latent_strategy": "off", "max_new_tokens": 5}
    assert calls == [{"model": "model", "processor": "processor", **options}]
    assert report.accuracy == 1 and report.by_size() == {3: 1.0, 4: 1.0} and report.correct == [True] * 8
    assert report.chance == chance_level([maze_of_record(row) for row in mazes])
    assert 0 < report.chance < 0.2


@pytest.mark.parametrize("wrong", ["L L L L", "", "no idea", "<answer>up</answer>"])
def test_wrong_answers_score_nothing(wrong: str, mazes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    # A plan that starts upwards or leftwards could be right somewhere: take the mazes where the gold one is another.
    others = [row for row in mazes if row["answer"].split()[0] not in ("L", "U")]
    assert len(others) > 1
    answering(monkeypatch, [wrong] * len(others))
    report = evaluate_mazes("wrong", None, None, others)
    assert report.accuracy == 0 and set(report.by_size().values()) == {0.0}


def test_accuracy_by_size_and_the_line(mazes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [maze_of_record(row).size for row in mazes]
    first = {size: sizes.index(size) for size in (3, 4)}
    answers = [
        row["answer"] if size == 3 or i == first[4] else ""
        for i, (row, size) in enumerate(zip(mazes, sizes, strict=True))
    ]
    answering(monkeypatch, answers)
    report = evaluate_mazes("latents on", None, None, [record_from_row(row) for row in mazes])
    right = sizes.count(3) + 1
    assert report.sizes == sizes and sum(report.correct) == right and report.accuracy == right / 8
    assert report.by_size() == {3: 1.0, 4: 1 / sizes.count(4)}
    low, high = (100 * end for end in wilson_interval(right, 8))
    line = report.line()
    assert line.startswith("latents on ") and f" {100 * right / 8:.1f} % [{low:4.1f}, {high:4.1f}]  n=8" in line
    assert f"3x3 100.0  4x4 {100 / sizes.count(4):5.1f}" in line
    assert line.endswith(f"latent steps {sum(i % 3 for i in range(8)) / 8:.1f}  positions 13.5")


def test_no_mazes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, [])
    with pytest.raises(ValueError, match="empty list of mazes; give at least one"):
        evaluate_mazes("none", None, None, [])


def test_the_benchmark_runs_a_model(
    model: LatentQwen2_5_VLForConditionalGeneration, processor: LatentProcessor, mazes: list[dict[str, Any]]
) -> None:
    report = evaluate_mazes("untrained", model, processor, mazes, batch_size=3, max_new_tokens=12)
    assert [p.id for p in report.predictions] == [row["id"] for row in mazes] and len(report.correct) == 8
    assert report.line().count("%") == 1 and "latent steps 4.0" in report.line()
