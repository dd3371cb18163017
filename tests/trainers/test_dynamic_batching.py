"""Batches of a bounded number of tokens in training: what a run sees, how it resumes, and what is refused."""

import itertools
import json
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

from modeling_latent import LatentProcessor
from tests.hub import ROOT
from tests.latent import tiny_latent_model
from tests.tiny import tiny_images, tiny_processor
from trainers import LatentSFTCollator, LatentSFTConfig, LatentSFTTrainer
from trainers.data.mazes import maze_stream
from trainers.data.records import RecordShareError, make_record, records_to_dataset

CAP = 280
Build = Callable[..., LatentSFTTrainer]


def questions(count: int = 22) -> Dataset:
    """Records of 43 to 94 tokens, all different; one has an image."""
    rows = []
    for i in range(count):
        images = tiny_images(1) if i == 5 else []
        record = make_record(f"q{i}", f"{i} is it? " * (i % 9 + 1), f"No {i}", images, chain=["a dog", f"{i}"])
        record["meta"] = {"source": "questions.json", "row": i}
        rows.append(record)
    return records_to_dataset(rows)


@pytest.fixture(scope="module")
def processor() -> LatentProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def data() -> Dataset:
    return questions()


class SeenTrainer(LatentSFTTrainer):
    """Keeps the positions of the samples of every batch that it trains on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[list[int]] = []
        rows = [self.data_collator([row])["input_ids"][0] for row in self.train_dataset]
        self._position = {self._text(ids): position for position, ids in enumerate(rows)}

    def _text(self, ids: torch.Tensor) -> tuple[int, ...]:
        return tuple(ids[ids != self.processing_class.tokenizer.pad_token_id].tolist())

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        if self.args.dynamic_batch_plan == "balanced" and self.args.enable_dynamic_batch:
            assert inputs["input_ids"].numel() <= self.args.dynamic_batch_token_cap
        self.seen.append([self._position[self._text(ids)] for ids in inputs["input_ids"]])
        return super().training_step(model, inputs, *args)


def options(folder: Path, **more: Any) -> LatentSFTConfig:
    fixed = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none"}
    quick = {"activation_checkpointing": False, "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2}
    batches = {"enable_dynamic_batch": True, "dynamic_batch_token_cap": CAP, "dynamic_batch_max_bs": 5}
    return LatentSFTConfig(**{**fixed, **quick, **batches, **more})


@pytest.fixture
def build(processor: LatentProcessor, data: Dataset, tmp_path: Path) -> Build:
    """A trainer in a folder of its own, with more options than those of a short run."""

    def call(folder: str = "run", train: Any = data, **more: Any) -> SeenTrainer:
        model = tiny_latent_model(latent_method="laser")
        return SeenTrainer(model, options(tmp_path / folder, **more), train, processing_class=processor)

    return call


def changed(path: Path, **facts: Any) -> str:
    """A checkpoint whose facts were others."""
    state = json.loads((path / "trainer_state.json").read_text())
    state["stateful_callbacks"]["RunFacts"]["args"]["facts"].update(facts)
    (path / "trainer_state.json").write_text(json.dumps(state))
    return str(path)


# What a run sees ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (2, 4)])
def test_an_epoch_sees_every_sample_once(workers: int, accumulation: int, build: Build, data: Dataset) -> None:
    loader = {"dataloader_num_workers": workers, "gradient_accumulation_steps": accumulation}
    trainer = build(num_train_epochs=2, **loader)
    number = len(trainer.train_batches)
    assert number > 5 and number % 4  # the last step of an epoch has fewer batches
    trainer.train()
    assert len(trainer.get_train_dataloader()) == number and len(trainer.seen) == 2 * number
    assert trainer.state.global_step == 2 * -(-number // accumulation)
    epochs = trainer.seen[:number], trainer.seen[number:]
    assert [sorted(itertools.chain(*epoch)) for epoch in epochs] == [list(range(len(data)))] * 2
    planned = [list(itertools.chain(*trainer.train_batches.steps(epoch))) for epoch in (0, 1)]
    assert list(epochs) == planned and planned[0] != planned[1]
    assert max(map(len, trainer.seen)) == 5


def test_the_published_plan_trains_without_epochs(build: Build, data: Dataset) -> None:
    trainer = build(dynamic_batch_plan="reference", max_steps=9, gradient_accumulation_steps=2)
    trainer.train()
    assert len(trainer.seen) == 18 == len(trainer.train_batches) and trainer.state.epoch == 1
    assert trainer.seen == list(trainer.train_batches)
    first = next(n for n in range(19) if len(set(itertools.chain(*trainer.seen[:n]))) == len(data))
    assert sorted(itertools.chain(*trainer.seen[:first])) == list(range(len(data)))


def test_evaluation_keeps_its_own_batches(build: Build, data: Dataset) -> None:
    trainer = build(per_device_eval_batch_size=4, max_steps=1)
    trainer.eval_dataset = data.select(range(6))
    sizes = [len(batch["input_ids"]) for batch in trainer.get_eval_dataloader()]
    assert sizes == [4, 2]
    assert "eval_loss_total" in trainer.evaluate()


def test_without_dynamic_batches_the_stock_loader_is_used(build: Build) -> None:
    trainer = build(enable_dynamic_batch=False, per_device_train_batch_size=4)
    assert trainer.train_batches is None
    assert [len(batch["input_ids"]) for batch in trainer.get_train_dataloader()] == [4, 4, 4, 4, 4, 2]


# Resuming -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plan", "workers"), [("balanced", 0), ("balanced", 2), ("reference", 2)])
def test_a_resumed_run_goes_on_with_the_same_batches(plan: str, workers: int, build: Build, tmp_path: Path) -> None:
    """Stopped in the middle of the second epoch, and resumed by a trainer of its own."""
    more = {"dynamic_batch_plan": plan, "dataloader_num_workers": workers, "gradient_accumulation_steps": 2}
    steps = {"max_steps": 11, "save_strategy": "steps", "save_steps": 6}
    whole = build("whole", **more, **steps)
    whole.train()
    resumed = build("resumed", **more, **steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    # The balanced plan has 7 batches, so 4 steps, in an epoch; the checkpoint lies two steps into the second one.
    done = 7 + 4 if plan == "balanced" else 12
    assert len(whole.seen) >= 20 and resumed.seen == whole.seen[done:]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)


CHANGED: list[tuple[dict[str, Any], str]] = [
    ({"dynamic_batch_token_cap": 500}, "dynamic_batch_token_cap = 280, this run has 500"),
    ({"dynamic_batch_max_bs": 4}, "dynamic_batch_max_bs = 5, this run has 4"),
    ({"dynamic_batch_plan": "reference"}, "dynamic_batch_plan = 'balanced', this run has 'reference'"),
    ({"seed": 7}, r"data_seed \(seed, where it is not set\) = 42, this run has 7"),
    ({"data_seed": 8}, r"data_seed \(seed, where it is not set\) = 42, this run has 8"),
    ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps = 1, this run has 2"),
    ({"enable_dynamic_batch": False}, "enable_dynamic_batch = True, this run has False"),
    ({"train": questions(21)}, r"data_hash \(of the rows of train_dataset and their lengths\) = '[0-9a-f]{16}', this"),
]


@pytest.fixture(scope="module")
def checkpoint(processor: LatentProcessor, data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run with dynamic batches."""
    folder = tmp_path_factory.mktemp("run")
    config = options(folder, max_steps=1, save_strategy="steps", save_steps=1)
    trainer = LatentSFTTrainer(tiny_latent_model(latent_method="laser"), config, data, processing_class=processor)
    trainer.train()
    return folder / "checkpoint-1"


@pytest.mark.parametrize(("change", "message"), CHANGED, ids=lambda value: str(value)[:40])
def test_resuming_with_other_batches_is_refused(
    change: dict[str, Any], message: str, build: Build, checkpoint: Path
) -> None:
    trainer = build(**{"max_steps": 2, **change})
    with pytest.raises(ValueError, match=f"checkpoint-1 was written with {message}") as error:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "resume with" in str(error.value) and f"model_name_or_path={checkpoint}" in str(error.value)
    assert trainer.state.global_step == 0 and not trainer.seen


@pytest.mark.parametrize("dynamic", [True, False])
def test_resuming_with_other_processes_is_refused(dynamic: bool, build: Build, tmp_path: Path) -> None:
    more = {"enable_dynamic_batch": dynamic, "save_steps": 1}
    build("first", max_steps=1, save_strategy="steps", **more).train()
    two = changed(tmp_path / "first" / "checkpoint-1", world_size=2)
    message = r"written with world_size \(the number of processes\) = 2, this run has 1: .*resume with 2, or begin a"
    with pytest.raises(ValueError, match=message):
        build("second", max_steps=2, **more).train(resume_from_checkpoint=two)


def test_other_samples_a_step_are_refused_without_dynamic_batches(build: Build, tmp_path: Path) -> None:
    more = {"enable_dynamic_batch": False, "max_steps": 1, "save_strategy": "steps"}
    build("first", per_device_train_batch_size=2, save_steps=1, **more).train()
    with pytest.raises(ValueError, match="per_device_train_batch_size = 2, this run has 3"):
        build(per_device_train_batch_size=3, **more).train(str(tmp_path / "first" / "checkpoint-1"))


def test_a_checkpoint_without_facts_resumes_and_gets_them(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    build("first", **more).train()
    path = tmp_path / "first" / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["RunFacts"]
    path.write_text(json.dumps(state))
    build("second", **more).train(resume_from_checkpoint=str(path.parent))
    assert "does not say with how many processes and which batches it was made: not compared" in caplog.text
    saved = json.loads((tmp_path / "second" / "checkpoint-2" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["RunFacts"]["args"]["facts"]["world_size"] == 1


# Bad input ----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length' with enable_dynamic"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size=True with enable_dynamic_batch=True: the lengths alone"),
    ({"dataloader_drop_last": True}, "dataloader_drop_last=True with enable_dynamic_batch=True"),
    ({"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches=True with enable_dynamic"),
    ({"dynamic_batch_plan": "reference"}, "max_steps=-1 with dynamic_batch_plan='reference': that plan has no end"),
    (
        {"dynamic_batch_plan": "reference", "max_steps": 3, "save_strategy": "epoch"},
        "save_strategy='epoch' with dynamic_batch_plan='reference', which has no epochs; set save_strategy='steps'",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda value: str(value)[:50])
def test_contradicting_options_are_refused(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        options(tmp_path, **wrong)


def test_options_without_effect_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options(tmp_path, enable_dynamic_batch=False)
    idle = "dynamic_batch_max_bs=5, dynamic_batch_token_cap=280 have no effect without enable_dynamic_batch=True"
    assert idle in caplog.text


def test_a_sample_above_the_cap_is_named(build: Build, data: Dataset, processor: LatentProcessor) -> None:
    sizes = [int(LatentSFTCollator(processor)([row])["attention_mask"].sum()) for row in data]
    longest = max(sizes)
    row, padded = sizes.index(longest), -(-longest // 8) * 8
    message = (
        rf"dynamic_batch_token_cap={padded - 1} is smaller than one sample: questions.json, row {row} \(id 'q{row}'\)"
    )
    with pytest.raises(ValueError, match=f"{message} has {longest} tokens, {padded} after padding"):
        build(dynamic_batch_token_cap=padded - 1)
    build(dynamic_batch_token_cap=padded)


def test_a_stream_is_refused(build: Build) -> None:
    with pytest.raises(ValueError, match="enable_dynamic_batch=True needs a data set with a length, got IterableData"):
        LatentSFTTrainer(
            tiny_latent_model(latent_method="laser"),
            build(max_steps=3).args,
            maze_stream(seed=1, sizes=(3,)),
            processing_class=tiny_processor(),
        )


def test_bad_rows_are_left_out_by_name(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    rows = [dict(row) for row in questions(12)]
    rows[4]["chain"] = None
    data = Dataset.from_list(rows, features=questions(1).features)
    with pytest.raises(RecordShareError, match=r"(?s)8.33% bad.*questions.json, row 4: column 'chain' is missing"):
        build(train=data)
    caplog.clear()
    planned = LatentSFTTrainer(
        tiny_latent_model(latent_method="laser"),
        options(Path(build().args.output_dir), max_bad_share=0.1),
        data,
        processing_class=tiny_processor(),
    ).train_batches
    assert sorted(itertools.chain(*planned)) == [i for i in range(12) if i != 4]
    assert "bad rows were left out: 11 good rows, 1 bad rows" in caplog.text and "row 4" in caplog.text


@pytest.mark.parametrize("entry", [0, None])
def test_a_published_length_file_is_taken(
    entry: int | None, build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = {str(i): 100 + i for i in range(22)}
    lengths["3"] = entry
    (tmp_path / "lengths.json").write_text(json.dumps({k: v for k, v in lengths.items() if v is not None}))
    path = str(tmp_path / "lengths.json")
    with pytest.raises(RecordShareError, match="row 3: .*counting failed|row 3: .*has no length for it"):
        build(lengths_path=path)
    trainer = build(lengths_path=path, max_bad_share=0.1)
    assert sorted(itertools.chain(*trainer.train_batches)) == [i for i in range(22) if i != 3]
    assert "lengths.json holds estimates (published): batches may exceed the token cap" in caplog.text
    with pytest.raises(
        ValueError, match="lengths.json is of another data set: it has 22 lengths, the data set has 12"
    ):
        build(train=questions(12), lengths_path=path, max_bad_share=0.1)


# Two processes ------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
from tests.latent import tiny_latent_model
from tests.tiny import tiny_processor
from tests.trainers.test_dynamic_batching import SeenTrainer, options, questions

folder = Path(sys.argv[1])
more = dict(dataloader_num_workers=2, gradient_accumulation_steps=2, max_steps=8, save_strategy="steps", save_steps=5)
def run(name, resume=None, **changes):
    config = options(folder / name, **{**more, **changes})
    model = tiny_latent_model(latent_method="laser")
    trainer = SeenTrainer(model, config, questions(), processing_class=tiny_processor())
    trainer.train(resume_from_checkpoint=resume)
    return trainer
whole = run("whole")
resumed = run("resumed", str(folder / "whole" / "checkpoint-5"))
published = run("published", dynamic_batch_plan="reference", save_strategy="no")
state = whole.accelerator.state
(folder / f"rank{state.process_index}.json").write_text(json.dumps({
    "whole": whole.seen, "resumed": resumed.seen, "published": published.seen, "count": len(whole.train_batches),
    "kind": str(state.distributed_type), "processes": state.num_processes,
    "hash": whole.run_facts.facts["data_hash"],
}))
"""


@pytest.mark.distributed
def test_two_processes_share_every_epoch_and_resume(tmp_path: Path, build: Build) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py", "."]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for found in (first, second):
        assert (found["kind"], found["processes"]) == ("DistributedType.MULTI_CPU", 2)
    assert first["hash"] == second["hash"] == build().run_facts.facts["data_hash"]
    each = first["count"] // 2
    assert first["count"] % 2 == 0 and len(first["whole"]) == len(second["whole"]) > each + 2
    for epoch in (0, 1):
        part = slice(epoch * each, (epoch + 1) * each)
        seen = [*itertools.chain(*first["whole"][part]), *itertools.chain(*second["whole"][part])]
        assert sorted(seen) == list(range(22))
    steps_an_epoch = -(-each // 2)
    done_before = 5 // steps_an_epoch * each + 5 % steps_an_epoch * 2
    assert done_before % each  # in the middle of a later epoch than the first
    assert done_before > each
    for found in (first, second):
        assert found["resumed"] == found["whole"][done_before:]
        assert len(found["published"]) == 16
    once = [*itertools.chain(*first["published"][:4]), *itertools.chain(*second["published"][:4])]
    assert len(set(once)) == len(once)
