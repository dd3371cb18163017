"""`latent_packing` in the trainer: losses and gradients of joined samples, plans, resuming, and what is refused."""

import copy
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.hub import ROOT
from tests.latent import tiny_latent_model
from tests.tiny import FAMILIES, tiny_images, tiny_processor
from tests.trainers.test_lvr_sft import lvr_parts, make_args, scenes
from trainers import LatentSFTCollator, LatentSFTConfig, LatentSFTTrainer
from trainers.data.mazes import maze_stream
from trainers.data.packing import BucketOptions, plan_buckets
from trainers.data.records import RecordShareError, make_record, records_to_dataset
from trainers.dry_run import _step_lines
from trainers.packed_loader import CutCollator, SampleCuts

Build = Callable[..., LatentSFTTrainer]
SEQUENCE = {"latent_packing": "sequence", "packing_max_tokens": 200, "per_device_train_batch_size": 2}
BUCKETS = {
    "latent_packing": "buckets", "packing_max_tokens": 260, "packing_long_threshold": 110, "packing_max_instances": 3,
    "max_steps": 9,
}  # fmt: skip


def questions(count: int = 23) -> Dataset:
    """Records of 43 to 118 tokens, all different, with chains of 2 to 6 concepts; every fifth has an image."""
    rows = []
    for i in range(count):
        images = tiny_images(4)[i % 4 : i % 4 + 1] if i % 5 == 0 else []
        chain = [f"{i}", *["map", "hole", "dog", "x", "Jeans"][: i % 5 + 1]]
        record = make_record(f"q{i}", f"{i} is it? " * (i % 13 + 1), f"No {i}" * (i % 3 + 1), images, chain=chain)
        record["meta"] = {"source": "questions.json", "row": i}
        rows.append(record)
    return records_to_dataset(rows)


DATA = questions()


def options(folder: Path, **more: Any) -> LatentSFTConfig:
    fixed = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none"}
    quick = {"activation_checkpointing": False, "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2}
    return LatentSFTConfig(**{**fixed, **quick, **more})


class SeenTrainer(LatentSFTTrainer):
    """Keeps the positions of the samples of every batch that it trains on, and their number of tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[list[int]] = []
        self.shapes: list[tuple[int, ...]] = []
        rows = [self.data_collator([row])["input_ids"][0] for row in self.train_dataset]
        self._position = {self._text(ids): position for position, ids in enumerate(rows)}
        layer = self.accelerator.unwrap_model(self.model).get_decoder().layers[0]
        layer.register_forward_pre_hook(lambda module, args: self.shapes.append(tuple(args[0].shape[:2])))

    def _text(self, ids: torch.Tensor) -> tuple[int, ...]:
        return tuple(ids[ids != self.processing_class.tokenizer.pad_token_id].tolist())

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        self.seen.append([self._position[self._text(ids)] for ids in inputs["input_ids"]])
        return super().training_step(model, inputs, *args)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A trainer in a folder of its own."""

    def call(folder: str = "run", train: Any = DATA, **more: Any) -> SeenTrainer:
        model = tiny_latent_model(latent_method="laser")
        return SeenTrainer(model, options(tmp_path / folder, **more), train, processing_class=tiny_processor())

    return call


# The same losses and gradients --------------------------------------------------------------------------------------


def losses_and_gradients(trainer: LatentSFTTrainer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What one micro-batch logs, and the gradient of every parameter."""
    torch.manual_seed(5)  # the exposure draws
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model.train(), dict(batch)).backward()
    found = {name: pair[0] / pair[1].clamp(min=1) for name, pair in trainer._latent_totals["train"].items()}
    trainer._latent_totals["train"] = {}
    return found | {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def check_packed_against_padded(model: Any, config: Callable[..., Any], processor: Any, data: Dataset) -> int:
    """Both trainers on one batch of all samples; how many tensors were compared."""
    found = []
    for more in ({"latent_packing": "sequence"}, {}):
        trainer = LatentSFTTrainer(copy.deepcopy(model), config(**more), data, processing_class=processor)
        found.append(losses_and_gradients(trainer, trainer.data_collator(list(data))))
    packed, padded = found
    assert packed.keys() == padded.keys()
    for name, expected in padded.items():
        limit = 1e-5 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(packed[name], expected, rtol=1e-4, atol=limit, msg=lambda m, n=name: f"{n}: {m}")
    assert any(value.abs().max() > 1e-3 for value in padded.values())
    return len(padded)


LASER: dict[str, dict[str, Any]] = {
    "published": {},
    "own latents, drawn": {"latent_exposure": "own", "latent_exposure_prob": 0.6, "latent_exposure_passes": 2},
    "free-running": {"latent_exposure": "free", "latent_exposure_unit": "latent", "latent_exposure_prob": 0.5},
    "windows, mean of examples": {"dwal_window_size": 2, "dwal_row_average": "example", "dwal_loss_type": "mse"},
    "sample": {"loss_average": "sample", "dwal_row_average": "example"},
    "recomputed": {"activation_checkpointing": True},
}


# The objectives see the same padded batch in every family: all variants in one of them, the first in the others.
def cases(variants: dict[str, Any]) -> list[tuple[str, str]]:
    first = next(iter(variants))
    return [(f, name) for f in FAMILIES for name in variants if f == "qwen2_5_vl" or name == first]


@pytest.mark.parametrize(("family", "name"), cases(LASER))
def test_laser(family: str, name: str, tmp_path: Path) -> None:
    model = tiny_latent_model(family=family, latent_method="laser")
    data = DATA.select(range(7))
    compared = check_packed_against_padded(
        model,
        lambda **more: options(tmp_path, per_device_train_batch_size=1, **LASER[name], **more),
        tiny_processor(family),
        data,
    )
    assert compared > 50


LVR: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "oracle": ({}, {}),
    "a head, mean of examples": ({"head": "simple"}, {"roi_row_average": "example", "loss_average": "sample"}),
    "mode switch, own latents": (
        {},
        {"mode_switch_loss": True, "latent_end_in_text": False, "latent_exposure": "own"},
    ),
    "end vector, free-running": (
        {"stop_vector": True},
        {"mode_switch_loss": True, "latent_exposure": "free", "roi_detach_targets": False},
    ),
}


@pytest.mark.parametrize(("family", "name"), cases(LVR))
def test_lvr(family: str, name: str, tmp_path: Path) -> None:
    parts, method = LVR[name]
    model, processor = lvr_parts(family, **parts)
    data = records_to_dataset(scenes())
    assert check_packed_against_padded(model, lambda **more: make_args(tmp_path, **method, **more), processor, data)


@pytest.mark.parametrize("average", ["token", "sample"])
def test_a_step_is_the_same_however_its_samples_are_batched(average: str, tmp_path: Path) -> None:
    """Three rows of joined samples, and the same samples one by one: losses and weights after two steps."""
    data = DATA.select(range(6))
    common = {
        "loss_average": average, "max_steps": 2, "optim": "sgd", "learning_rate": 0.05, "dwal_row_average": "example",
    }  # fmt: skip
    ways = [
        {**SEQUENCE, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "packing_max_samples": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6},
        {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1},
    ]
    runs = []
    for number, way in enumerate(ways):
        model = tiny_latent_model(latent_method="laser")
        way = {**way, **({"packing_max_tokens": 1000} if number == 0 else {})}
        trainer = LatentSFTTrainer(model, options(tmp_path, **common, **way), data, processing_class=tiny_processor())
        trainer.train()
        runs.append(trainer)
    packed, *padded = runs
    assert len(packed.train_batches) == 3
    for other in padded:
        for name, expected in other.model.state_dict().items():
            torch.testing.assert_close(packed.model.state_dict()[name], expected, rtol=1e-4, atol=1e-5, msg=name)
        for one, two in zip(packed.state.log_history[:2], other.state.log_history[:2], strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    alone = options(tmp_path, **{**common, "loss_average": "batch"}, **ways[1])
    published = LatentSFTTrainer(
        tiny_latent_model(latent_method="laser"), alone, data, processing_class=tiny_processor()
    )
    published.train()
    difference = (published.model.lm_head.weight - packed.model.lm_head.weight).abs().max()
    assert (difference > 1e-5) == (average == "token")  # of single samples the mean of each is what "batch" takes


def test_a_sample_average_is_that_of_the_samples(tmp_path: Path) -> None:
    model, data = tiny_latent_model(latent_method="laser"), DATA.select([0, 4, 8, 9])
    args = options(tmp_path, loss_average="sample", dwal_row_average="example")
    trainer = LatentSFTTrainer(model, args, data, processing_class=tiny_processor())
    each = [losses_and_gradients(trainer, trainer.data_collator([row])) for row in data]
    all_of_them = losses_and_gradients(trainer, trainer.data_collator(list(data)))
    for name in ("loss_ce", "loss_latent", "lm_head.weight"):
        mean = torch.stack([found[name] for found in each]).mean(dim=0)
        torch.testing.assert_close(all_of_them[name], mean, rtol=1e-4, atol=1e-6)


def test_lora_trains_packed(tmp_path: Path) -> None:
    found = {}
    for packing in ("sequence", None):
        torch.manual_seed(0)
        trainer = LatentSFTTrainer(
            tiny_latent_model(latent_method="laser"),
            options(tmp_path, latent_packing=packing, max_steps=1),
            DATA,
            processing_class=tiny_processor(),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian"),
        )
        shapes: list[tuple[int, ...]] = []
        layer = trainer.model.get_base_model().get_decoder().layers[0]
        layer.register_forward_pre_hook(lambda module, args, kept=shapes: kept.append(tuple(args[0].shape[:2])))
        found[packing] = losses_and_gradients(trainer, trainer.data_collator(list(DATA)[:5]))
        assert (shapes[0][0] == 1) == (packing == "sequence")
    assert found[None].keys() == found["sequence"].keys()
    for name, expected in found[None].items():
        torch.testing.assert_close(found["sequence"][name], expected, rtol=1e-3, atol=1e-5)


# What a run sees ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (2, 2)])
def test_an_epoch_of_rows_sees_every_sample_once(workers: int, accumulation: int, build: Build) -> None:
    more = {"dataloader_num_workers": workers, "gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
    trainer = build(**SEQUENCE, **more)
    number = len(trainer.train_batches)
    trainer.train()
    assert number > 3 and len(trainer.seen) == 2 * number
    assert trainer.state.global_step == 2 * -(-number // accumulation)
    for epoch in (0, 1):
        seen = trainer.seen[epoch * number : (epoch + 1) * number]
        assert sorted(itertools.chain(*seen)) == list(range(len(DATA)))
        trainer.train_batches.set_epoch(epoch)
        assert seen == [list(itertools.chain(*rows)) for rows in trainer.train_batches]
        assert max(trainer.train_batches.plan.row_tokens) <= 200
    assert trainer.seen[:number] != trainer.seen[number:]
    assert {shape[0] for shape in trainer.shapes} == {1} and max(shape[1] for shape in trainer.shapes) <= 400


def test_buckets_are_those_of_the_plan_and_padded(build: Build) -> None:
    trainer = build(**BUCKETS, gradient_accumulation_steps=2, dataloader_num_workers=2)
    trainer.train()
    lengths = [int(trainer.data_collator([row])["attention_mask"].sum()) for row in DATA]
    planned = BucketOptions(260, 110, 3, random_seed=42)
    workers = [plan_buckets([lengths], planned, worker_id=worker, num_workers=2) for worker in (0, 1)]
    expected = [[segment.index for segment in next(workers[step % 2])] for step in range(18)]
    assert trainer.seen == expected and max(map(len, expected)) == 3
    assert max(lengths) >= 110 and all(len(bucket) == 1 for bucket in expected if lengths[bucket[0]] >= 110)
    assert [shape[0] for shape in trainer.shapes] == [len(bucket) for bucket in expected]


def test_evaluation_is_not_packed(build: Build) -> None:
    trainer = build(**SEQUENCE, max_steps=1, per_device_eval_batch_size=4)
    trainer.eval_dataset = DATA.select(range(6))
    assert "eval_loss_total" in trainer.evaluate()
    assert [shape[0] for shape in trainer.shapes] == [4, 2]


@pytest.mark.parametrize(("way", "workers"), [(SEQUENCE, 2), (BUCKETS, 0), (BUCKETS, 2)])
def test_a_resumed_run_goes_on_with_the_same_batches(
    way: dict[str, Any], workers: int, build: Build, tmp_path: Path
) -> None:
    more = {**way, "dataloader_num_workers": workers, "gradient_accumulation_steps": 2}
    steps = {"max_steps": 9, "save_strategy": "steps", "save_steps": 5}
    whole = build("whole", **{**more, **steps})
    whole.train()
    resumed = build("resumed", **{**more, **steps})
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    number = len(whole.train_batches) if way is SEQUENCE else 18
    steps_an_epoch = -(-number // 2)
    done = 5 // steps_an_epoch * number + 5 % steps_an_epoch * 2
    assert done < len(whole.seen) and resumed.seen == whole.seen[done:]
    assert way is BUCKETS or done > number  # in the middle of the second epoch
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)


CHANGED: list[tuple[dict[str, Any], str]] = [
    ({"packing_max_tokens": 300}, "packing_max_tokens = 200, this run has 300"),
    ({"packing_max_samples": 2}, "packing_max_samples = None, this run has 2"),
    ({"latent_packing": "buckets"}, "latent_packing = 'sequence', this run has 'buckets'"),
    ({"latent_packing": None}, "latent_packing = 'sequence', this run has None"),
    ({"per_device_train_batch_size": 1}, "per_device_train_batch_size = 2, this run has 1"),
    ({"train": questions(22)}, r"data_hash \(of the rows of train_dataset and their lengths\) = '[0-9a-f]{16}', this"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = options(folder, **SEQUENCE, max_steps=1, save_strategy="steps", save_steps=1)
    LatentSFTTrainer(tiny_latent_model(latent_method="laser"), config, DATA, processing_class=tiny_processor()).train()
    return folder / "checkpoint-1"


@pytest.mark.parametrize(("change", "message"), CHANGED, ids=lambda value: str(value)[:40])
def test_resuming_with_other_batches_is_refused(
    change: dict[str, Any], message: str, build: Build, checkpoint: Path
) -> None:
    trainer = build(**{**SEQUENCE, "max_steps": 2, **change})
    with pytest.raises(ValueError, match=f"checkpoint-1 was written with {message}"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not trainer.seen


@pytest.mark.parametrize("way", [SEQUENCE, BUCKETS], ids=["sequence", "buckets"])
def test_a_dry_run_counts_rows_and_steps(way: dict[str, Any], build: Build) -> None:
    trainer = build(**way, gradient_accumulation_steps=2)
    lines, _ = _step_lines(trainer, 2, None)
    text, tokens = "\n".join(lines), sum(trainer.packing_plan.lengths)
    assert f"packing ({way['latent_packing']!r})".replace("'", "") in text
    samples, found = re.search(r"about (\d+) samples, ([\d,]+) tokens a step", text).groups()
    epoch = float(re.search(r"epochs of ([\d,.]+) steps", text).group(1))
    if way is SEQUENCE:
        assert (int(samples), int(found.replace(",", ""))) == (round(23 / epoch), round(tokens / epoch))
    else:
        assert int(samples) >= 4 and f"{trainer.args.max_steps} (" in text


# Long samples and bad rows ------------------------------------------------------------------------------------------


def test_long_samples_are_kept_whole_and_alone(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(**{**SEQUENCE, "packing_max_tokens": 100})
    lengths = trainer.packing_plan.lengths
    long = {position for position, length in enumerate(lengths) if length > 100}
    rows = list(itertools.chain(*trainer.train_batches))
    assert long and [row for row in rows if long & set(row)] == [[row[0]] for row in rows if long & set(row)]
    assert sorted(itertools.chain(*rows)) == list(range(23))
    assert f"{len(long)} of 23 samples are longer than packing_max_tokens=100: each stays whole" in caplog.text
    worst = max(long, key=lambda position: lengths[position])
    message = (
        rf"the longest is questions.json, row {worst} \(id 'q{worst}'\) with {lengths[worst]} tokens; raise packing"
    )
    with pytest.raises(ValueError, match=message):
        build(**{**SEQUENCE, "packing_max_tokens": 100, "packing_over_long": "refuse"})


@pytest.fixture(scope="module")
def regions() -> tuple[Dataset, Any]:
    """Long questions behind a region, short ones, and one whose image stands at the end; with LVR's processor."""
    boxes = [{"image": 0, "xyxy": [0.0, 0.0, 1.0, 1.0]}]
    pictures = tiny_images(4)
    rows = []
    for i in range(8):
        answer = "so " * (60 if i % 2 else 2) + f"{i}"
        rows.append(make_record(f"r{i}", "What?", answer, [pictures[i % 4]], boxes=boxes))
    late = [("user", "Well? " * 50), ("assistant", "Yes?"), ("user", "<image>\nWhere?"), ("assistant", "<lvr> here")]
    messages = [{"role": role, "content": content} for role, content in late]
    rows.append(make_record("late", "", "", [pictures[0]], boxes=boxes, messages=messages))
    for i, row in enumerate(rows):
        row["meta"] = {"source": "regions.json", "row": i}
    return records_to_dataset(rows), lvr_parts()


def test_long_samples_are_cut_as_published_and_nothing_is_lost_in_silence(
    regions: tuple[Dataset, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, (model, processor) = regions
    limit = 90
    args = make_args(
        tmp_path, latent_packing="buckets", packing_max_tokens=limit, packing_long_threshold=60,
        packing_over_long="cut", max_steps=8, per_device_train_batch_size=1,
    )  # fmt: skip
    trainer = LatentSFTTrainer(copy.deepcopy(model), args, data, processing_class=processor)
    lengths = trainer.packing_plan.lengths
    long = [position for position, length in enumerate(lengths) if length > limit]
    assert long == [1, 3, 5, 7, 8]
    assert (
        "5 of 9 samples are longer than packing_max_tokens=90: 4 are cut, 1 would lose a part of an image and are"
        in (caplog.text)
    )
    assert "regions.json, row 8 (id 'late')" in caplog.text
    positions = list(trainer.train_batches)
    assert {8}.isdisjoint(itertools.chain(*positions)) and {1, 3, 5, 7} <= set(itertools.chain(*positions))
    batches = list(trainer.get_train_dataloader())
    for places, batch in zip(positions, batches, strict=True):
        whole = trainer.data_collator([data[place] for place in places])
        shape = batch["input_ids"].shape
        if set(places) & set(long):
            assert shape == (1, limit)
            for name in ("input_ids", "labels", "attention_mask", "region_index", "mm_token_type_ids"):
                assert torch.equal(batch[name], whole[name][:, :limit])
            assert batch["attention_mask"].all() and torch.equal(batch["pixel_values"], whole["pixel_values"])
        else:
            assert torch.equal(batch["input_ids"], whole["input_ids"])
    trainer.train()
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in trainer.state.log_history if "loss" in log)


def test_a_cut_through_a_region_keeps_slots_and_targets_together(regions: tuple[Dataset, Any]) -> None:
    data, (model, processor) = regions
    collator = LatentSFTCollator(processor, latent_form="regions", pad_to_multiple_of=None)
    whole = collator([data[1]])
    slots = (whole["region_index"][0] >= 0).nonzero()[:, 0]
    assert len(slots) > 1
    middle = int(slots[1])
    batch = CutCollator(collator, middle, middle + 1)([data[1]])
    assert (batch["input_ids"] == processor.latent_token_id).sum() == (batch["region_index"] >= 0).sum() == 1
    images = {processor.image_token_id}
    assert SampleCuts(data, collator, middle, images)(1) and not SampleCuts(data, collator, 5, images)(1)


@pytest.mark.parametrize("way", [SEQUENCE, BUCKETS], ids=["sequence", "buckets"])
def test_bad_rows_are_left_out_by_name(way: dict[str, Any], build: Build, caplog: pytest.LogCaptureFixture) -> None:
    rows = [dict(row) for row in DATA]
    rows[4]["chain"] = None
    data = Dataset.from_list(rows, features=DATA.features)
    with pytest.raises(RecordShareError, match=r"(?s)4.35% bad.*questions.json, row 4: column 'chain' is missing"):
        build(train=data, **way)
    trainer = LatentSFTTrainer(
        tiny_latent_model(latent_method="laser"),
        options(Path(build(max_steps=1).args.output_dir), max_bad_share=0.1, **{**way, "max_steps": 40}),
        data,
        processing_class=tiny_processor(),
    )
    seen = set(itertools.chain(*(itertools.chain(*b) if way is SEQUENCE else b for b in trainer.train_batches)))
    assert seen == set(range(23)) - {4}


# What is refused ----------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"latent_packing": "rows"}, "latent_packing='rows' is unknown; choose 'buckets' or 'sequence'"),
    ({**SEQUENCE, "packing_max_tokens": 0}, "packing_max_tokens=0 must be an integer of at least 1"),
    ({**SEQUENCE, "packing_max_samples": 1.5}, "packing_max_samples=1.5 must be an integer of at least 1, or None"),
    ({**BUCKETS, "packing_max_instances": True}, "packing_max_instances=True must be an integer of at least 1"),
    ({**BUCKETS, "packing_over_long": "drop"}, "packing_over_long='drop' is unknown; choose one of ['keep', 'cut',"),
    (
        {**SEQUENCE, "enable_dynamic_batch": True},
        "enable_dynamic_batch=True with latent_packing='sequence': each says",
    ),
    ({**SEQUENCE, "packing_over_long": "cut"}, "packing_over_long='cut' with latent_packing='sequence': a longer"),
    ({**BUCKETS, "packing_over_long": "cut"}, "packing_over_long='cut' with latent_form='chain': what is left of a"),
    ({**BUCKETS, "max_steps": -1}, "max_steps=-1 with latent_packing='buckets': that plan has no end and no common"),
    (
        {**BUCKETS, "save_strategy": "epoch"},
        "save_strategy='epoch' with latent_packing='buckets', which has no epochs",
    ),
    (
        {**SEQUENCE, "train_sampling_strategy": "sequential"},
        "train_sampling_strategy='sequential' with latent_packing=",
    ),
    (
        {**SEQUENCE, "dataloader_drop_last": True},
        "with latent_packing='sequence': the lengths alone say which samples",
    ),
    ({"packing": True}, "packing=True does not work with images and spans; set it to false, and latent_packing: seq"),
    (
        {"padding_free": True},
        "padding_free=True does not work with images and spans; set it to false, and latent_pack",
    ),
    ({"loss_average": "sample", "loss_type": "dft"}, "loss_type='dft' with loss_average='sample' is not available"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda value: str(value)[-50:])
def test_contradicting_options_are_refused(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        options(tmp_path, **wrong)


def test_a_stream_is_refused(tmp_path: Path) -> None:
    message = (
        r"latent_packing='sequence' needs a data set with a length, got IterableDataset \(streaming\); load it as"
    )
    with pytest.raises(ValueError, match=message):
        LatentSFTTrainer(
            tiny_latent_model(latent_method="laser"),
            options(tmp_path, **SEQUENCE, max_steps=3),
            maze_stream(seed=1, sizes=(3,)),
            processing_class=tiny_processor(),
        )


@pytest.mark.parametrize(
    ("parts", "method", "message"),
    [
        ({}, {}, "a latent loss of row_average='flat': samples of many latents would weigh more; set dwal_row"),
        ({}, {"roi_row_average": "example", "mode_switch_loss": True, "latent_end_in_text": False},
         r"\['loss_mode_switch'\], which has no average over the terms of a sample; set mode_switch_loss: false"),
    ],
)  # fmt: skip
def test_an_average_of_samples_needs_losses_that_have_one(
    parts: dict[str, Any], method: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, processor = lvr_parts(**parts)
    args = make_args(tmp_path, loss_average="sample", **method)
    with pytest.raises(ValueError, match=f"loss_average='sample' with {message}"):
        LatentSFTTrainer(model, args, records_to_dataset(scenes()), processing_class=processor)


def test_options_without_effect_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        options(tmp_path, packing_max_tokens=100)
        options(tmp_path, **SEQUENCE, packing_max_instances=2)
    assert "packing_max_tokens=100 have no effect without latent_packing" in caplog.text
    assert "packing_max_instances=2 have no effect with 'sequence' packing" in caplog.text


# Two processes ------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
from tests.latent import tiny_latent_model
from tests.tiny import tiny_processor
from tests.trainers.test_packing_trainer import BUCKETS, DATA, SEQUENCE, SeenTrainer, options

folder = Path(sys.argv[1])
def run(name, **more):
    config = options(folder / name, **more)
    trainer = SeenTrainer(tiny_latent_model(latent_method="laser"), config, DATA, processing_class=tiny_processor())
    trainer.train()
    return trainer
one = {**SEQUENCE, "per_device_train_batch_size": 1}
rows = run("rows", **one, num_train_epochs=2, dataloader_num_workers=2)
step = run("step", **one, max_steps=1, optim="sgd", loss_average="token", gradient_accumulation_steps=100)
buckets = run("buckets", **BUCKETS)
state = rows.accelerator.state
(folder / f"rank{state.process_index}.json").write_text(json.dumps({
    "rows": rows.seen, "buckets": buckets.seen, "count": len(rows.train_batches), "processes": state.num_processes,
    "weight": step.model.state_dict()["lm_head.weight"].sum(0).tolist(),
}))
"""


@pytest.mark.distributed
def test_two_processes_see_every_sample_once_and_take_the_same_step(tmp_path: Path, build: Build) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py", "."]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["processes"] == 2 and first["count"] % 2 == 0
    each = first["count"] // 2
    assert len(first["rows"]) == len(second["rows"]) == 2 * each
    for epoch in (0, 1):
        part = slice(epoch * each, (epoch + 1) * each)
        seen = [*itertools.chain(*first["rows"][part]), *itertools.chain(*second["rows"][part])]
        assert sorted(seen) == list(range(23))
    assert len(first["buckets"]) == len(second["buckets"]) == 9
    assert set(itertools.chain(*first["buckets"])).isdisjoint(itertools.chain(*second["buckets"]))
    alone = build(max_steps=1, optim="sgd", loss_average="token", per_device_train_batch_size=23)
    alone.train()
    expected = alone.model.state_dict()["lm_head.weight"].sum(0)
    for found in (first, second):
        torch.testing.assert_close(torch.tensor(found["weight"]), expected, rtol=1e-4, atol=1e-4)
