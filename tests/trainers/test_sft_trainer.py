"""The trainer: its loss against full logits, its metrics, what it refuses, and what a run has to survive."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText
from transformers.integrations import is_wandb_available
from trl import SFTConfig

from modeling_latent import LatentProcessor, LatentQwen2_5_VLForConditionalGeneration
from tests.latent import latent_token_ids, tiny_latent_model
from tests.tiny import tiny_images, tiny_processor, tiny_stock_model
from trainers import LatentSFTCollator, LatentSFTConfig, LatentSFTTrainer
from trainers.data.mazes import maze_dataset, maze_stream
from trainers.data.records import Record, RecordError, make_record, record_to_row, records_to_dataset
from trainers.losses.dwal import DwalOptions, dwal_loss, find_latent_rows

METRICS = ("loss_total", "loss_ce", "loss_latent", "confused_ratio", "last_concept_ratio")
SHARP = 8.0
ANSWERS = ["A dog", "Jeans", "No", "Yes, it is safe", "The third window"]


@pytest.fixture(scope="module")
def processor() -> LatentProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def mazes() -> Dataset:
    return maze_dataset(6, seed=3, sizes=(3,))


def scenes() -> list[Record]:
    """Records with chains of different lengths; one without image, one with a repeated concept."""
    chains = [
        ["Street", "dog", "dog"],
        ["a boy"],
        ["grass outside", "fence", "seats", "stadium"],
        ["x"],
        ["map", "hole"],
    ]
    images = [[image] for image in tiny_images(4)] + [[]]
    return [
        make_record(f"s{i}", "What is it?" * (i + 1), ANSWERS[i], images[i], chain=chain)
        for i, chain in enumerate(chains)
    ]


def build(
    folder: Path, processor: LatentProcessor, data: Any, model: Any = None, eval_dataset: Any = None, **options: Any
) -> LatentSFTTrainer:
    """A trainer on the CPU; arguments of the trainer itself go by their names, all others to the config."""
    given = {name: options.pop(name) for name in ("peft_config", "callbacks") if name in options}
    defaults = {"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    fixed = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "disable_tqdm": True}
    quiet = {"report_to": "none", "activation_checkpointing": False}
    args = LatentSFTConfig(**{**fixed, **defaults, **quiet, **options})
    model = laser_model() if model is None else model
    return LatentSFTTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=eval_dataset, processing_class=processor, **given
    )


def laser_model(sharpness: float = 1.0, **options: Any) -> LatentQwen2_5_VLForConditionalGeneration:
    """A tiny model of the method; with a sharper LM head some of its windows are confused and some are not."""
    defaults = {"latent_strategy": "dynamic", "max_latent_steps": 3}
    model = tiny_latent_model(latent_method="laser", latent_generation=defaults, **options)
    if sharpness != 1:
        with torch.no_grad():
            model.lm_head.weight.mul_(sharpness)
    return model


def logged(trainer: LatentSFTTrainer, name: str) -> list[float]:
    """The values of one metric in the order in which they were logged."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# The loss, from all logits --------------------------------------------------------------------------------------


def naive_row(z: torch.Tensor, window: list[int], columns: list[int], loss_type: str) -> tuple[Any, int, bool, bool]:
    """Loss, number of terms, confused and prefers-last of one row with the published options (card, 4.3)."""
    q = z[window].detach().softmax(0)
    entropy = -float((q * (q + 1e-8).log()).sum()) / math.log(max(len(window), 2))
    confused = min(max(entropy, 0.0), 1.0) > 0.6
    target = 0.2 * q if confused else q.clone()
    target[0] += 0.8 * confused
    if loss_type == "mse":
        return (
            (z[columns].softmax(0)[: len(window)] - target).square().sum(),
            len(window),
            confused,
            bool(q.argmax() == len(window) - 1),
        )
    loss = -sum(t * z.log_softmax(0)[token] for t, token in zip(target, window, strict=True))
    return loss, 1, confused, bool(q.argmax() == len(window) - 1)


def naive_losses(
    model: Any, inputs: dict[str, torch.Tensor], loss_type: str = "weighted_ce", **fed: torch.Tensor
) -> dict[str, Any]:
    """Cross entropy outside the chain, DWAL and its counts, from the logits of every position."""
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**unlabelled, **fed, use_cache=False).logits
    start, end = model.config.latent_start_token_id, model.config.latent_end_token_id
    ce, rows = [], []
    for b, ids in enumerate(inputs["input_ids"].tolist()):
        opened = None
        for j, token in enumerate(ids):
            if opened is not None and token != end:
                window = ids[j : ids.index(end, j)]
                rows.append((naive_row(logits[b, j - 1], window, window, loss_type), len(window)))
            elif inputs["labels"][b, j] != -100:
                ce.append(-logits[b, j - 1].log_softmax(0)[token])
            opened = j if token == start else None if token == end else opened
    wide = [row for row, width in rows if width > 1]
    return {
        "ce": sum(ce) / len(ce),
        "latent": sum(row[0] for row, _ in rows) / max(sum(row[1] for row, _ in rows), 1),
        "wide": len(wide),
        "confused": sum(row[2] for row in wide),
        "last": sum(row[3] for row in wide),
    }


@pytest.mark.parametrize("weight", [0, 0.1, 1])
@pytest.mark.parametrize("loss_type", ["weighted_ce", "mse"])
def test_loss_and_gradients_equal_the_full_logits(
    loss_type: str, weight: float, processor: LatentProcessor, tmp_path: Path
) -> None:
    plain = laser_model(SHARP).train()
    options = {"dwal_loss_type": loss_type, "latent_loss_weight": weight}
    trainer = build(tmp_path, processor, records_to_dataset(scenes()), copy.deepcopy(plain), **options)
    inputs = trainer.data_collator(scenes())
    naive = naive_losses(plain, inputs, loss_type)
    expected = naive["ce"] + weight * naive["latent"]
    expected.backward()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    found = dict(trainer.model.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert sum(float(p.grad.abs().sum()) > 0 for p in plain.parameters()) > 40
    assert 0 < naive["confused"] < naive["wide"]


def test_own_latents_are_fed_in_training_only(processor: LatentProcessor, tmp_path: Path) -> None:
    plain, data = laser_model(SHARP).train(), records_to_dataset(scenes())
    trainer = build(tmp_path, processor, data, copy.deepcopy(plain), latent_exposure="own")
    inputs = trainer.data_collator(scenes())
    ids, config = inputs["input_ids"], plain.config
    inside = (ids == config.latent_start_token_id).cumsum(1) - (ids == config.latent_end_token_id).cumsum(1) == 1
    inside &= ids != config.latent_start_token_id
    with torch.no_grad():
        hidden = plain.model(**{name: value for name, value in inputs.items() if name != "labels"}).last_hidden_state
        text = naive_losses(plain, inputs)
    shifted = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)
    naive = naive_losses(plain, inputs, latent_embeds=shifted, latent_mask=inside)
    expected = naive["ce"] + naive["latent"]
    expected.backward()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert not torch.isclose(loss, text["ce"] + text["latent"], rtol=1e-4)
    found = dict(trainer.model.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
    trainer.model.eval()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(inputs)), text["ce"] + text["latent"])


@pytest.mark.parametrize("window", [1, 2, None])
def test_options_of_the_config_change_the_loss_as_the_loss_function_says(
    window: int | None, processor: LatentProcessor, tmp_path: Path
) -> None:
    options = {
        "dwal_window_size": window,
        "dwal_entropy_threshold": 0.2,
        "dwal_force_prob": 0.5,
        "dwal_temperature": 2.0,
    }
    trainer = build(tmp_path, processor, records_to_dataset(scenes()), laser_model(SHARP), **options)
    inputs = trainer.data_collator(scenes())
    config = trainer.model.config
    ids = inputs["input_ids"]
    rows = find_latent_rows(ids, config.latent_start_token_id, config.latent_end_token_id, window)
    logits = trainer.model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    expected = dwal_loss(rows.select(logits), rows, DwalOptions(window, 2.0, 0.2, 0.5))
    latent = trainer.model(**inputs, fused_lm_head=True).latent_loss
    torch.testing.assert_close(latent, expected.loss, rtol=1e-5, atol=1e-6)
    default = build(tmp_path, processor, records_to_dataset(scenes()), laser_model(SHARP))
    assert not torch.isclose(latent, default.model(**inputs, fused_lm_head=True).latent_loss)


def test_return_outputs_gives_logits(processor: LatentProcessor, tmp_path: Path) -> None:
    trainer = build(tmp_path, processor, records_to_dataset(scenes()))
    inputs = trainer.data_collator(scenes())
    trainer.model.eval()
    with pytest.warns(FutureWarning, match="return_outputs"):
        loss, outputs = trainer.compute_loss(trainer.model, dict(inputs), return_outputs=True)
    assert outputs.logits.shape[:2] == inputs["input_ids"].shape
    torch.testing.assert_close(loss, trainer.compute_loss(trainer.model, dict(inputs)))


# Metrics ------------------------------------------------------------------------------------------------------


def expected_metrics(records: list[Record], processor: LatentProcessor) -> dict[str, float]:
    """Metrics of micro-batches of one record each, in any order."""
    model, collator = laser_model(SHARP), LatentSFTCollator(processor)
    with torch.no_grad():
        parts = [naive_losses(model, collator([record])) for record in records]
    ce, latent = (sum(float(part[name]) for part in parts) / len(parts) for name in ("ce", "latent"))
    wide = sum(part["wide"] for part in parts)
    ratios = [part["confused"] / max(part["wide"], 1) for part in parts]
    result = {
        "loss_total": ce + latent,
        "loss_ce": ce,
        "loss_latent": latent,
        "confused_ratio": sum(part["confused"] for part in parts) / wide,
        "last_concept_ratio": sum(part["last"] for part in parts) / wide,
    }
    # A mean of ratios would be another number: the test can tell them apart.
    assert abs(sum(ratios) / len(ratios) - result["confused_ratio"]) > 1e-3
    return result


def test_metrics_add_up_over_unequal_micro_batches(processor: LatentProcessor, tmp_path: Path) -> None:
    records = scenes()
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5, "max_steps": 4, "logging_steps": 2}
    trainer = build(
        tmp_path,
        processor,
        records_to_dataset(records),
        laser_model(SHARP),
        learning_rate=0.0,
        weight_decay=0.0,
        **options,
    )
    trainer.train()
    expected = expected_metrics(records, processor)
    for name, value in expected.items():
        assert logged(trainer, name) == pytest.approx([value, value], rel=1e-4), name
    assert logged(trainer, "loss") == pytest.approx(logged(trainer, "loss_total"), rel=1e-4)


def test_evaluation_has_its_own_metrics(processor: LatentProcessor, tmp_path: Path) -> None:
    records = scenes()
    train, held_out = records[:2], records[1:]
    options = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "learning_rate": 0.0}
    rhythm = {"max_steps": 4, "logging_steps": 4, "eval_strategy": "steps", "eval_steps": 3}
    trainer = build(
        tmp_path,
        processor,
        records_to_dataset(train),
        laser_model(SHARP),
        records_to_dataset(held_out),
        **options,
        **rhythm,
    )
    trainer.train()
    evaluated, trained = (expected_metrics(part, processor) for part in (held_out, train))
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert entries[0]["step"] == 3
    for name in METRICS:
        for entry in entries:
            assert entry[f"eval_{name}"] == pytest.approx(evaluated[name], rel=1e-4), name
            assert name not in entry
        # Steps before and after the evaluation are all in the one log of the training, and nothing else is.
        assert logged(trainer, name) == pytest.approx([trained[name]], rel=1e-4), name
        assert entries[0]["eval_loss"] == pytest.approx(entries[0]["eval_loss_total"], rel=1e-5)
    metrics = trainer.evaluate()
    assert metrics["eval_loss_latent"] == pytest.approx(evaluated["loss_latent"], rel=1e-4)
    assert not set(METRICS) & set(metrics)


def test_tensorboard_gets_the_scalars(
    processor: LatentProcessor, mazes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = build(tmp_path, processor, mazes, eval_dataset=mazes.select([0]), report_to="tensorboard")
    trainer.train()
    trainer.evaluate()
    events = EventAccumulator(str(next((tmp_path / "events").rglob("events.out*")).parent))
    events.Reload()
    scalars = events.Tags()["scalars"]
    for name in METRICS:
        assert [event.value for event in events.Scalars(f"train/{name}")][:2] == pytest.approx(
            logged(trainer, name)[:2]
        )
        assert f"eval/{name}" in scalars


@pytest.mark.skipif(is_wandb_available(), reason="wandb is installed")
def test_wandb_that_is_not_installed_is_named(processor: LatentProcessor, mazes: Dataset, tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, ImportError), match="wandb"):
        build(tmp_path, processor, mazes, report_to="wandb")


# What is refused ------------------------------------------------------------------------------------------------


def without(*columns: str) -> Callable[[Dataset], Dataset]:
    return lambda data: data.remove_columns(list(columns))


DATA: dict[str, tuple[Callable[[Dataset], Any], str]] = {
    "no chain": (without("chain"), r"train_dataset has the columns .*missing \['chain'\] \(latent_form='chain'\)"),
    "no images": (without("images", "messages"), r"missing \['images'\]"),
    "no answer": (without("answer", "messages"), r"missing \['answer'\]"),
    "another column": (lambda data: data.add_column("label", [1] * len(data)), r"unknown \['label'\].*remove columns"),
    "empty": (lambda data: data.select([]), "train_dataset is empty; look at what its reader reported"),
    "empty stream": (lambda data: data.select([0]).to_iterable_dataset().skip(1), "train_dataset is empty"),
    "bad first row": (
        lambda data: records_to_dataset([make_record("x7", "q", "a")]),
        "record 'x7', whole file: column 'chain' is missing",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_work_is_refused_at_once(
    name: str, processor: LatentProcessor, mazes: Dataset, tmp_path: Path
) -> None:
    change, message = DATA[name]
    with pytest.raises(ValueError, match=message):
        build(tmp_path, processor, change(mazes))


def test_evaluation_data_is_checked_too(processor: LatentProcessor, mazes: Dataset, tmp_path: Path) -> None:
    bad = mazes.remove_columns("chain")
    with pytest.raises(ValueError, match=r"eval_dataset has the columns .*missing \['chain'\]"):
        build(tmp_path, processor, mazes, eval_dataset=bad)
    with pytest.raises(ValueError, match=r"eval_dataset\['far'\] has the columns .*missing \['chain'\]"):
        build(tmp_path, processor, mazes, eval_dataset=DatasetDict(near=mazes, far=bad))


def test_the_published_sample_needs_slots(processor: LatentProcessor, tmp_path: Path) -> None:
    reply = f"<|laser_start|>{'<laser>' * 4}<|laser_end|><answer>B</answer>"
    messages = [{"role": "user", "content": "<image>\nWhich?"}, {"role": "assistant", "content": reply}]
    record = make_record("a", "Which?", "B", tiny_images(1), messages=messages, meta={"source": "d.json", "row": 3})
    data = records_to_dataset([record] * 2)
    with pytest.raises(
        RecordError, match="d.json, row 3: required column 'reasoning_chain' is missing.*latent_form='slots'"
    ):
        build(tmp_path, processor, data)
    trainer = build(tmp_path, processor, data, latent_form="slots")
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert logged(trainer, "loss_latent")[:2] == [0.0, 0.0]
    assert logged(trainer, "loss_total")[:2] == logged(trainer, "loss_ce")[:2]
    slot = trainer.model.config.latent_token_id
    moved = trainer.model.state_dict()["model.language_model.embed_tokens.weight"][slot]
    assert not torch.equal(moved, before["model.language_model.embed_tokens.weight"][slot])


def test_parts_that_do_not_fit_are_refused(
    processor: LatentProcessor, mazes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="args must be a LatentSFTConfig, got SFTConfig"):
        LatentSFTTrainer(laser_model(), stock, train_dataset=mazes, processing_class=processor)
    args = LatentSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    for wrong in (None, processor.tokenizer):
        with pytest.raises(ValueError, match="processing_class must be the LatentProcessor.*from_pretrained"):
            LatentSFTTrainer(laser_model(), args, train_dataset=mazes, processing_class=wrong)
    with pytest.raises(ValueError, match="compute_loss_func would replace the latent loss"):
        LatentSFTTrainer(
            laser_model(), args, train_dataset=mazes, processing_class=processor, compute_loss_func=lambda *_: 0
        )
    with pytest.raises(ValueError, match="stock configuration; make the model with convert_stock_checkpoint"):
        build(tmp_path, processor, mazes, tiny_stock_model())
    with pytest.raises(
        ValueError, match="latent_end_token_id is 5 in the model and .* load both from the same folder"
    ):
        build(tmp_path, processor, mazes, laser_model(latent_end_token_id=5))
    with pytest.raises(TypeError, match="must be a `Dataset` or `IterableDataset`, got `list`"):
        build(tmp_path, processor, [record_to_row(record) for record in scenes()])


# Runs -----------------------------------------------------------------------------------------------------------


def test_the_trained_model_generates_and_its_folder_loads(
    processor: LatentProcessor, mazes: Dataset, tmp_path: Path
) -> None:
    trainer = build(tmp_path, processor, mazes, save_strategy="steps", save_steps=2, learning_rate=1e-3)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    files = {path.name for path in checkpoint.iterdir()}
    code = {"modeling_latent_qwen2_5_vl.py", "configuration_latent.py", "generation_latent.py", "processing_latent.py"}
    assert code | {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= files
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": mazes[0]["images"][0]}, {"type": "text", "text": "?"}]}],  # noqa: E501
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )  # fmt: skip
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    expected = trainer.model.eval().generate(**prompt, **options)
    assert expected.latent_trace.num_latent_steps.tolist() == [3]
    for auto in (AutoModel, AutoModelForImageTextToText):
        again = auto.from_pretrained(checkpoint).eval()
        assert isinstance(again, LatentQwen2_5_VLForConditionalGeneration)
        assert torch.equal(again.generate(**prompt, **options).sequences, expected.sequences)
    saved = LatentProcessor.from_pretrained(checkpoint)
    assert saved.latent_tokens == processor.latent_tokens
    from_folder = build(tmp_path / "next", saved, mazes, str(checkpoint), max_steps=1)
    from_folder.train()
    assert isinstance(from_folder.model, LatentQwen2_5_VLForConditionalGeneration)
    assert "latent-reasoning" in from_folder.model.model_tags


@pytest.mark.parametrize("kind", ["untied", "tied", "lora"])
def test_a_resumed_run_equals_an_unbroken_one(
    kind: str, processor: LatentProcessor, mazes: Dataset, tmp_path: Path
) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "max_steps": 4}

    def trainer(folder: str) -> LatentSFTTrainer:
        lora = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])} if kind == "lora" else {}
        model = laser_model(tie_word_embeddings=kind == "tied")
        return build(tmp_path / folder, processor, mazes, model, **options, **lora)

    whole, part, start = (trainer(folder) for folder in ("whole", "part", "start"))
    whole.train()
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert part.state.global_step == 4
    resumed, first = part.model.state_dict(), start.model.state_dict()
    changed = 0
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        changed += not torch.equal(value, first[name])
    assert changed >= (8 if kind == "lora" else 40)
    assert logged(part, "loss_latent")[-2:] == logged(whole, "loss_latent")[-2:]


def test_the_best_checkpoint_is_loaded_whole(processor: LatentProcessor, mazes: Dataset, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    trainer = build(
        tmp_path, processor, mazes, eval_dataset=mazes.select([0, 1]), learning_rate=1e-2, **options,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    best = LatentQwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-1").state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, best[name]), name


@pytest.mark.parametrize("workers", [0, 1])
def test_streams_train(workers: int, processor: LatentProcessor, tmp_path: Path) -> None:
    stream = maze_stream(seed=1, sizes=(3,))
    trainer = build(tmp_path, processor, stream, dataloader_num_workers=workers, learning_rate=0.0)
    trainer.train()
    assert trainer.state.global_step == 2
    table = [maze for maze, _ in zip(stream, range(4), strict=False)]
    with torch.no_grad():
        naive = [naive_losses(laser_model(), LatentSFTCollator(processor)(table[i : i + 2])) for i in (0, 2)]
    expected = [float(losses["ce"] + losses["latent"]) for losses in naive]
    assert logged(trainer, "loss_total")[:2] == pytest.approx(expected, rel=1e-5)


def test_a_stream_of_unknown_columns_trains(processor: LatentProcessor, tmp_path: Path) -> None:
    rows = [record_to_row(record) for record in scenes()]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert stream.column_names is None
    trainer = build(tmp_path, processor, stream)
    trainer.train()
    assert len(logged(trainer, "loss_total")) >= 2


def test_activation_checkpointing_changes_nothing(processor: LatentProcessor, mazes: Dataset, tmp_path: Path) -> None:
    runs = {}
    for on in (False, True):
        trainer = build(tmp_path, processor, mazes, activation_checkpointing=on, learning_rate=1e-2, max_steps=3)
        trainer.train()
        assert trainer.model.is_activation_checkpointing == on
        runs[on] = trainer
    for name in ("loss_total", "loss_ce", "loss_latent", "grad_norm"):
        assert logged(runs[True], name) == pytest.approx(logged(runs[False], name), rel=1e-5), name


def test_form_none_trains_without_spans(processor: LatentProcessor, mazes: Dataset, tmp_path: Path) -> None:
    trainer = build(tmp_path, processor, mazes, latent_form="none")
    trainer.train()
    assert set(logged(trainer, "loss_latent")) == set(logged(trainer, "confused_ratio")) == {0.0}
    assert all(value > 1 for value in logged(trainer, "loss_ce"))


# LoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True])
def test_lora_with_trained_latent_tokens(
    tie: bool, processor: LatentProcessor, mazes: Dataset, tmp_path: Path
) -> None:
    base = laser_model(tie_word_embeddings=tie)
    base.save_pretrained(tmp_path / "base")
    ids = list(latent_token_ids().values())
    lora = LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        trainable_token_indices={"embed_tokens": ids},
    )
    trainer = build(tmp_path, processor, mazes, base, peft_config=lora, learning_rate=1e-2, max_steps=3)
    inputs = trainer.data_collator([mazes[0], mazes[1]])
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files
    assert not any(name.startswith("model") and name.endswith(".safetensors") for name in files)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name or name.endswith("trainable_tokens_delta") for name in saved)
    (rows,) = [value for name, value in saved.items() if name.endswith("trainable_tokens_delta")]
    embedding = base.get_input_embeddings().original_module.weight
    assert rows.shape == (3, embedding.shape[1]) and not torch.equal(rows[0], embedding[sorted(ids)[0]])
    again = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        trained = trainer.model.eval()(**unlabelled).logits
        torch.testing.assert_close(again(**unlabelled).logits, trained, rtol=1e-6, atol=1e-6)
        naive = naive_losses(trainer.model.get_base_model(), inputs)
        fused = trainer.model(**inputs, fused_lm_head=True)
    torch.testing.assert_close(fused.latent_loss, naive["latent"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(-fused.log_probs.mean(), naive["ce"], rtol=1e-4, atol=1e-5)
    prompt = {"input_ids": inputs["input_ids"][:1, :8], "attention_mask": inputs["attention_mask"][:1, :8]}
    options = {"latent_strategy": "dynamic", "max_latent_steps": 3, "max_new_tokens": 8, "do_sample": False}
    out = again.generate(**prompt, **options, return_dict_in_generate=True)
    assert out.latent_trace.num_latent_steps.tolist() == [3]
    merged = again.merge_and_unload()
    assert isinstance(merged, LatentQwen2_5_VLForConditionalGeneration)
    with torch.no_grad():
        torch.testing.assert_close(merged(**unlabelled).logits, trained, rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.generate(**prompt, **options), out.sequences)
