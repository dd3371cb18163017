"""Curricula: which stage is trained when, in tables and streams, with workers, resumed; new optimizers for stages."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from transformers import TrainerCallback

from tests.latent import tiny_latent_model
from tests.tiny import tiny_processor
from tests.trainers.staged_parts import scenes, staged_args, staged_parts, staged_trainer
from trainers import Curriculum, LatentSFTCollator, LatentSFTConfig, LatentSFTTrainer
from trainers.checkpoint_files import list_checkpoints
from trainers.curriculum import check_deepspeed_reset, reset_optimizer_state, stage_lines
from trainers.data.mazes import maze_dataset
from trainers.data.records import record_to_row, records_to_dataset

# The schedule ---------------------------------------------------------------------------------------------------


def stages(curriculum: Curriculum, steps: int, steps_per_epoch: int | None = None) -> list[int]:
    return [curriculum.stage_at(step, steps_per_epoch) for step in range(steps)]


def test_stages_of_one_length() -> None:
    assert stages(Curriculum((2,)), 9, steps_per_epoch=2) == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert stages(Curriculum((1,), num_stages=2), 5, steps_per_epoch=2) == [0, 0, 1, 1, 1]
    assert stages(Curriculum((3,), "step", start_stage=2), 7) == [2, 2, 2, 3, 3, 3, 4]


def test_a_length_for_each_stage() -> None:
    curriculum = Curriculum((1, 3, 2), "step")
    assert stages(curriculum, 9) == [0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert curriculum.last_stage == 2
    assert stages(Curriculum((1, 3, 2), "step", start_stage=1), 5) == [1, 1, 1, 2, 2]


def test_the_plan_of_a_run_is_its_stages() -> None:
    for curriculum, epoch in (
        (Curriculum((2,)), 3),
        (Curriculum((1, 3, 2), "step"), None),
        (Curriculum((2,), num_stages=2, start_stage=1), 3),
        (Curriculum((1,), "step", 4, 3), None),
    ):
        plan = curriculum.plan(17, epoch)
        assert [stage for stage, first, end in plan for _ in range(first, end)] == stages(curriculum, 17, epoch)
    assert stage_lines(Curriculum((5,), "step").plan(8)) == ["stage 0: steps 1-5", "stage 1: steps 6-8"]


def test_when_the_optimizer_is_new() -> None:
    never, stage, epoch = (Curriculum((2,), reset_optimizer=reset) for reset in ("never", "stage", "epoch"))
    assert [[step for step in range(13) if each.resets_at(step, 3)] for each in (never, stage, epoch)] == [
        [],
        [6, 12],
        [3, 6, 9, 12],
    ]


REFUSED = [
    ({"lengths": ()}, r"epochs_per_stage=\[\] must be integers"),
    ({"lengths": (2, 0)}, r"epochs_per_stage=\[2, 0\] must be integers of at least 1"),
    ({"lengths": (True,), "unit": "step"}, r"steps_per_stage=\[True\] must be integers"),
    ({"lengths": (1, 2), "num_stages": 3}, r"num_stages=3 with epochs_per_stage=\[1, 2\]"),
    ({"lengths": (1,), "num_stages": 0}, "num_stages=0 must be an integer of at least 1"),
    ({"lengths": (1, 2), "start_stage": 2}, "start_stage=2 must be an integer from 0 to 1"),
    ({"lengths": (1,), "start_stage": -1}, "start_stage=-1 must be an integer from 0 to the last stage"),
    ({"lengths": (1,), "reset_optimizer": "daily"}, "reset_optimizer='daily' is unknown"),
    ({"lengths": (1,), "unit": "step", "reset_optimizer": "epoch"}, "reset_optimizer='epoch' with steps_per_stage"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=str)
def test_wrong_schedules_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curriculum(**values)
    with pytest.raises(ValueError, match="epochs_per_stage needs data with a length"):
        Curriculum((2,)).stage_at(3)


# In the trainer -------------------------------------------------------------------------------------------------


class Recorder(LatentSFTTrainer):
    """Keeps what it trained on: the stage and the token ids of each micro-batch."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        seen = (self.state.global_step, self.data_collator.stage, inputs["input_ids"].tolist())
        self.seen = [*getattr(self, "seen", []), seen]
        return super().training_step(model, inputs, *args, **kwargs)

    @property
    def latents(self) -> list[list[int]]:
        """Latents of each row, by micro-batch."""
        slot = self.model.config.latent_token_id
        return [[row.count(slot) for row in ids] for _, _, ids in self.seen]


class StopAt(TrainerCallback):
    """Ends a run after a step, as a kill behind a checkpoint would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def stream(num_shards: int = 2) -> IterableDataset:
    """[`scenes`] over and over, without a length."""

    def rows(shards: list[int]) -> Any:
        for shard in shards:
            for turn in range(50):
                for row in scenes()[shard::num_shards]:
                    yield record_to_row({**row, "id": f"{row['id']}-{turn}"})

    features = records_to_dataset(scenes()).features
    return IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(num_shards))}, features=features)


def recorder(folder: Path, data: Any = None, **options: Any) -> Recorder:
    given = {name: options.pop(name) for name in ("callbacks", "eval_dataset") if name in options}
    model, processor = staged_parts()
    data = records_to_dataset(scenes()) if data is None else data
    args = staged_args(folder, **options)
    return Recorder(model=model, args=args, train_dataset=data, processing_class=processor, **given)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_of_a_table_is_of_the_stage_of_its_epoch(workers: int, tmp_path: Path) -> None:
    options = {"num_stages": 3, "num_train_epochs": 4, "gradient_accumulation_steps": 2}
    trainer = recorder(tmp_path, dataloader_num_workers=workers, per_device_train_batch_size=1, **options)
    trainer.train()
    assert [stage for _, stage, _ in trainer.seen] == [0] * 4 + [1] * 4 + [2] * 8
    assert trainer.latents == [[stage] for _, stage, _ in trainer.seen]
    assert [entry["stage"] for entry in trainer.state.log_history if "loss" in entry] == [0, 0, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_batch_of_a_stream_is_of_the_stage_of_its_step(workers: int, accumulation: int, tmp_path: Path) -> None:
    """Also the batches that workers made in advance."""
    options = {"steps_per_stage": [2, 3, 1], "max_steps": 8, "gradient_accumulation_steps": accumulation}
    trainer = recorder(tmp_path, stream(), dataloader_num_workers=workers, **options)
    trainer.train()
    expected = [stage for stage in (0, 0, 1, 1, 1, 2, 2, 2) for _ in range(accumulation)]
    assert trainer.latents == [[stage] * 2 for stage in expected]
    assert len({str(ids) for _, _, ids in trainer.seen}) >= 3


CASES = {
    "table": {"epochs_per_stage": 2, "num_stages": 2, "num_train_epochs": 4, "per_device_train_batch_size": 1},
    "stream": {"steps_per_stage": [3, 9], "max_steps": 9, "dataloader_num_workers": 2},
}


@pytest.mark.parametrize("stop", [2, 3, 5])
@pytest.mark.parametrize("data", CASES)
def test_a_resumed_run_goes_on_in_its_stage(data: str, stop: int, tmp_path: Path) -> None:
    """Before the end of a stage, at it and behind it: batches, stages, losses and weights of the run that went on."""
    common = {"gradient_accumulation_steps": 2 if data == "table" else 1, "uniform_prob": 0.5, "learning_rate": 1e-2}
    options = {**common, **CASES[data], "reset_optimizer": "stage"}
    make = {"table": lambda: None, "stream": stream}[data]
    whole = recorder(tmp_path / "whole", make(), **options)
    whole.train()
    saves = {"save_strategy": "steps", "save_steps": stop}
    first = recorder(tmp_path / "part", make(), **options, **saves, callbacks=[StopAt(stop)])
    first.train()
    second = recorder(tmp_path / "part", make(), **options, **saves)
    second.train(resume_from_checkpoint="true")
    assert first.seen[-1][0] == stop - 1 and second.seen[0][0] == stop
    assert first.seen + second.seen == whole.seen
    assert len({stage for _, stage, _ in whole.seen}) == 2 and len({n for rows in whole.latents for n in rows}) > 2
    losses = [[e["loss"] for e in trainer.state.log_history if "loss" in e] for trainer in (whole, second)]
    assert losses[0] == losses[1]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_mixed_stages_differ_by_epoch_and_are_not_in_evaluation(tmp_path: Path) -> None:
    data = records_to_dataset(scenes())
    trainer = recorder(tmp_path, data, uniform_prob=1.0, per_device_train_batch_size=4, eval_dataset=data)
    trainer.train()
    per_epoch = [sorted(rows) for rows in trainer.latents]
    assert len(set(map(tuple, per_epoch))) > 1
    assert all(0 <= count <= 4 for rows in per_epoch for count in rows)
    slot = trainer.model.config.latent_token_id
    for batch in trainer.get_eval_dataloader():
        assert (batch["input_ids"] == slot).sum(dim=1).tolist() == [3, 3]


def test_evaluation_is_at_the_current_stage(tmp_path: Path) -> None:
    data = records_to_dataset(scenes())
    options = {"eval_strategy": "epoch", "eval_on_start": True, "num_stages": 3, "num_train_epochs": 3}
    trainer = recorder(tmp_path, eval_dataset=data, **options)
    counts: list[int] = []
    step = trainer.prediction_step

    def watched(model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        counts.append(int((inputs["input_ids"] == model.config.latent_token_id).sum(dim=1).max()))
        return step(model, inputs, *args, **kwargs)

    trainer.prediction_step = watched
    trainer.train()
    trainer.evaluate()
    assert counts == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert [e["eval_stage"] for e in trainer.state.log_history if "eval_stage" in e] == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_new_optimizer_is_that_of_a_new_run(optim: str, tmp_path: Path) -> None:
    """Two stages with a reset are two runs, the second from the weights of the first."""
    fixed = {
        "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant", "optim": optim,
        "learning_rate": 1e-2, "weight_decay": 0.1, **({"optim_args": "momentum=0.9"} if optim == "sgd" else {}),
    }  # fmt: skip
    found = {}
    for reset in ("never", "stage"):
        trainer = recorder(tmp_path / reset, num_stages=2, num_train_epochs=2, reset_optimizer=reset, **fixed)
        trainer.train()
        found[reset] = copy.deepcopy(trainer.model.state_dict())
    first = recorder(tmp_path / "first", num_train_epochs=1, **fixed)
    first.train()
    second = recorder(tmp_path / "second", start_stage=1, num_train_epochs=1, **fixed)
    second.model.load_state_dict(first.model.state_dict())
    second.train()
    apart = second.model.state_dict()
    assert all(torch.equal(found["stage"][name], value) for name, value in apart.items())
    assert any(not torch.equal(found["never"][name], value) for name, value in apart.items())


def test_reset_reaches_the_optimizer_inside() -> None:
    inner = torch.optim.AdamW([weight := torch.nn.Parameter(torch.ones(2))], lr=0.1)
    weight.sum().backward()
    inner.step()
    assert inner.state[weight]["step"] == 1

    class Wrapper:
        optimizer = inner

    class Outer:
        optimizer = Wrapper()

    reset_optimizer_state(Outer())
    assert not inner.state and inner.param_groups[0]["lr"] == 0.1


def test_checkpoints_at_the_ends_of_stages(tmp_path: Path) -> None:
    recorder(tmp_path, num_stages=3, num_train_epochs=4, save_stage_ends=True).train()
    names = sorted(Path(folder).name for folder in list_checkpoints(tmp_path))
    assert names == ["checkpoint-2", "checkpoint-4"]


def test_another_schedule_is_refused_when_a_run_is_resumed(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2}
    recorder(tmp_path, **saves, callbacks=[StopAt(2)]).train()
    with pytest.raises(ValueError, match=r"epochs_per_stage = \[1\], this run has \[2\]"):
        recorder(tmp_path, epochs_per_stage=2, **saves).train(resume_from_checkpoint="true")
    with pytest.raises(ValueError, match="uniform_prob = 0.0, this run has 0.5"):
        recorder(tmp_path, uniform_prob=0.5, **saves).train(resume_from_checkpoint="true")


def test_a_run_that_ends_early_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder(tmp_path, num_train_epochs=2).train()
    assert "the run of 4 steps ends in stage 1 of 3" in caplog.text


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataloader_persistent_workers=True.*leave it out"):
        staged_args(tmp_path, dataloader_persistent_workers=True, dataloader_num_workers=2)
    with pytest.raises(ValueError, match=r"epochs_per_stage=\[1\] with a .*Iterable.*set steps_per_stage"):
        recorder(tmp_path, stream(), max_steps=4)
    with pytest.raises(ValueError, match="LatentSFTCollator has no stage, prepare, finish, facts"):
        model, processor = staged_parts()
        LatentSFTTrainer(
            model=model, args=staged_args(tmp_path), train_dataset=records_to_dataset(scenes()),
            processing_class=processor, data_collator=LatentSFTCollator(processor, "none"),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"offload_optimizer.device='cpu'.*reset_optimizer: never"):
        check_deepspeed_reset({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    check_deepspeed_reset({"zero_optimization": {"stage": 3}})


# Another method -------------------------------------------------------------------------------------------------


@dataclass
class GrowingSlots:
    """LASER with as many slots as its stage."""

    processor: Any
    stage: int = 1

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        return LatentSFTCollator(self.processor, "slots", self.stage)(rows)

    def prepare(self, rows: Sequence[Any]) -> dict[str, Any]:
        return {"rows": tuple(rows)}

    def facts(self) -> dict[str, Any]:
        return {}

    def finish(self, prepared: dict[str, Any], epoch: int) -> dict[str, torch.Tensor]:
        return {**self(prepared.pop("rows")), **prepared}


@dataclass
class GrowingConfig(LatentSFTConfig):
    def curriculum(self) -> Curriculum:
        return Curriculum((2,), "step", num_stages=4, start_stage=1)

    def build_collator(self, processor: Any) -> GrowingSlots:
        return GrowingSlots(processor)


@pytest.mark.parametrize("workers", [0, 2])
def test_another_method_with_a_curriculum_of_its_own(workers: int, tmp_path: Path) -> None:
    args = GrowingConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, disable_tqdm=True, report_to="none", max_steps=6,
        activation_checkpointing=False, per_device_train_batch_size=2, save_strategy="no", latent_form="slots",
        latent_method="laser", dataloader_num_workers=workers, logging_steps=1,
    )  # fmt: skip
    trainer = Recorder(
        model=tiny_latent_model(latent_method="laser"), args=args, train_dataset=maze_dataset(6, sizes=(3,)),
        processing_class=tiny_processor(),
    )  # fmt: skip
    trainer.train()
    assert trainer.latents == [[stage] * 2 for stage in (1, 1, 2, 2, 3, 3)]


def test_without_a_curriculum_nothing_changes(tmp_path: Path) -> None:
    trainer = staged_trainer(tmp_path, staged_mode="cot")
    assert trainer.curriculum.is_one_stage and trainer.curriculum.last_stage == 0
    args = LatentSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert args.curriculum() is None
