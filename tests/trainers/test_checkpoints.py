"""Checkpoints: SIGKILL at any moment, torn folders, resuming with the right weights, what is refused."""

import functools
import logging
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, Trainer
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

import modeling_latent
from examples.train_laser import TrainLaserConfig
from tests.hub import LocalHub
from tests.latent import tiny_latent_model
from tests.tiny import FAMILIES
from tests.trainers.killed_runs import POINTS, STEPS, build_run, start
from trainers.checkpoint_files import (
    checkpoint_step,
    complete_checkpoints,
    missing_parts,
    move_into,
    publish,
    recover,
    rotate,
)
from trainers.checkpoints import check_trainer_methods, resume_request
from trainers.data.mazes import maze_dataset


def parameters(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def losses(trainer: Any) -> dict[int, float]:
    return {entry["step"]: entry["loss_total"] for entry in trainer.state.log_history if "grad_norm" in entry}


def assert_same_run(
    found: Any, expected: tuple[dict[str, torch.Tensor], dict[int, float]], steps: int = STEPS
) -> None:
    """Parameters and losses are equal, bit by bit."""
    assert found.state.global_step == steps
    for name, value in parameters(found).items():
        assert torch.equal(value, expected[0][name]), name
    assert losses(found) == expected[1] and len(expected[1]) == steps


@functools.cache
def unbroken_run(data: str = "table", **options: Any) -> tuple[dict[str, torch.Tensor], dict[int, float]]:
    """Parameters and losses of a run that nothing happened to; the options change nothing but the speed."""
    trainer = build_run(Path("/nonexistent"), data, save_strategy="no", **options)
    start = parameters(trainer)
    trainer.train()
    assert sum(not torch.equal(start[name], value) for name, value in parameters(trainer).items()) > 40
    return parameters(trainer), losses(trainer)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that went to its end, with all its checkpoints (2, 4, 6 and 7)."""
    folder = tmp_path_factory.mktemp("finished")
    build_run(folder, save_total_limit=None).train()
    assert [path.name for path in complete_checkpoints(folder)] == [f"checkpoint-{step}" for step in (2, 4, 6, 7)]
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder with `checkpoint-4` and `checkpoint-6`."""
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.copytree(finished / name, tmp_path / "run" / name)
    return tmp_path / "run"


# Killed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["in training", *POINTS])
def test_a_run_killed_at_a_point_resumes_to_the_same_end(
    point: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = start(tmp_path, point)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # With save_total_limit=1 there is one checkpoint for both, and it is whole.
    renamed = point in ("in training", "after the rename", "while the old one is deleted")
    newest = tmp_path / ("checkpoint-4" if renamed else "checkpoint-2")
    assert get_last_checkpoint(tmp_path) == str(newest) and missing_parts(newest) == []
    leftovers = {path.name for path in tmp_path.iterdir() if path.name.startswith("_")}
    assert bool(leftovers) == (point not in ("in training", "after the rename"))
    trainer = build_run(tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint="auto")
    reported = f"{tmp_path / 'checkpoint-4'} was being written when the run was killed" in caplog.text
    assert reported == (leftovers == {"_incomplete"})
    assert_same_run(trainer, unbroken_run())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", f"checkpoint-{STEPS}"]


@pytest.mark.parametrize("data, workers", [("table", 2), ("stream", 0), ("stream", 2)])
def test_data_order_survives_a_kill(data: str, workers: int, tmp_path: Path) -> None:
    process = start(tmp_path, "in training", data=data, dataloader_num_workers=workers)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    trainer = build_run(tmp_path, data, dataloader_num_workers=workers)
    trainer.train(resume_from_checkpoint="true")
    assert_same_run(trainer, unbroken_run(data, dataloader_num_workers=workers))


@pytest.mark.slow
def test_a_run_killed_again_and_again_at_any_file_operation_ends_as_one_that_was_not(tmp_path: Path) -> None:
    moments, steps = random.Random(5), []
    operations = 4 * len(list(Path(modeling_latent.__file__).parent.glob("*.py")))  # a checkpoint has the code, too
    for _ in range(6):
        process = start(tmp_path, moments.randrange(1, operations), resume="auto", save_steps=1)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        last = get_last_checkpoint(tmp_path)
        assert last is None or missing_parts(last) == []
        steps.append(0 if last is None else checkpoint_step(last))
    assert steps == sorted(steps) and 0 < steps[-1] < STEPS
    trainer = build_run(tmp_path, save_steps=1)
    trainer.train(resume_from_checkpoint="auto")
    assert_same_run(trainer, unbroken_run())


# What a complete checkpoint is ------------------------------------------------------------------------------------


def cut(name: str, share: float = 0.5) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * share))


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


TEARS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (without("model.safetensors"), r"the weights are missing \(model.safetensors, its shards"),
    "half the weights": (cut("model.safetensors"), r"model.safetensors is cut off \(\d+ bytes\)"),
    "half a header": (cut("model.safetensors", 0.001), "model.safetensors is cut off"),
    "no optimizer": (without("optimizer.pt"), "optimizer.pt is missing"),
    "half an optimizer": (cut("optimizer.pt"), "optimizer.pt is cut off"),
    "no scheduler": (without("scheduler.pt"), "scheduler.pt is missing"),
    "no random states": (without("rng_state.pth"), "rng_state.pth is missing"),
    "half the random states": (cut("rng_state.pth"), "rng_state.pth is cut off"),
    "no state": (without("trainer_state.json"), "trainer_state.json is missing"),
    "half the state": (cut("trainer_state.json"), "trainer_state.json is cut off or not JSON"),
    "no step": (lambda f: (f / "trainer_state.json").write_text("{}"), "trainer_state.json has no global_step"),
    "a rank's states": (
        lambda f: (f / "rng_state.pth").rename(f / "rng_state_1.pth"),
        "rng_state_0.pth is missing",
    ),
    "not finished": (lambda f: (f / "checkpoint-is-incomplete.txt").touch(), "says that it was not finished"),
    "weights only": (
        lambda f: [(f / name).unlink() for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")],
        "save_only_model=True: load it as a model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_refused_by_name_and_passed_over(
    tear: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, message = TEARS[tear]
    newest = run / "checkpoint-6"
    change(newest)
    trainer = build_run(run)
    complete = f"{message}.*; resume_from_checkpoint={run / 'checkpoint-4'} is complete"
    with pytest.raises(ValueError, match=f"resume_from_checkpoint={newest}: .*{complete}"):
        trainer._checkpoint_to_resume(str(newest))
    with caplog.at_level(logging.WARNING):
        assert trainer._checkpoint_to_resume(True) == str(run / "checkpoint-4")
    assert f"{newest} is not complete: " in caplog.text
    assert f"resuming from {run / 'checkpoint-4'}" in caplog.text
    shutil.rmtree(run / "checkpoint-4")
    with pytest.raises(ValueError, match=f"true: no complete checkpoint in {run} .*{message}.*give 'auto'"):
        trainer._checkpoint_to_resume("true")
    caplog.clear()
    assert trainer._checkpoint_to_resume("auto") is None
    assert f"no complete checkpoint in {run}" in caplog.text and "training starts afresh" in caplog.text


def test_a_run_goes_on_from_the_checkpoint_before_the_torn_one(run: Path) -> None:
    cut("model.safetensors")(run / "checkpoint-6")
    trainer = build_run(run)
    trainer.train(resume_from_checkpoint="last")
    assert_same_run(trainer, unbroken_run())
    assert get_last_checkpoint(run) == str(run / f"checkpoint-{STEPS}")


@pytest.mark.parametrize(
    "value, request_",
    [(True, "last"), ("true", "last"), ("True", "last"), ("last", "last"), ("auto", "auto"), ("AUTO", "auto"),
     (False, None), ("false", None), (None, None), ("none", None), ("", None), ("runs/auto/checkpoint-3",) * 2,
     (Path("a/b"), "a/b")],
)  # fmt: skip
def test_words_of_resume_from_checkpoint(value: Any, request_: str | None) -> None:
    assert resume_request(value) == request_


def test_folders_that_are_not_there(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build_run(run)
    message = f"there is no such folder; resume_from_checkpoint={run / 'checkpoint-6'} is complete"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-5"))
    with caplog.at_level(logging.WARNING):
        assert trainer._checkpoint_to_resume(None) is None
    assert f"starts afresh beside {run / 'checkpoint-6'}; resume_from_checkpoint=true" in caplog.text
    trainer = build_run(tmp_path / "new")
    with pytest.raises(ValueError, match=f"=True: no complete checkpoint in {tmp_path / 'new'}; give 'auto'"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"the weights are missing .*; .*new has no complete one"):
        trainer.train(resume_from_checkpoint=str(tmp_path))


def deepspeed_files(folder: Path, stage: int, ranks: int = 2) -> list[Path]:
    """Empty files under the names that DeepSpeed gives them."""
    names = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)]
    part = "zero_pp_rank_{}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    names += sorted({part.format(rank) for rank in range(ranks)})
    files = [folder / "global_step6" / name for name in names]
    files += [folder / f"rng_state_{rank}.pth" for rank in range(ranks)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({}, file)
    (folder / "latest").write_text("global_step6")
    (folder / "trainer_state.json").write_text('{"global_step": 6}')
    return files


@pytest.mark.parametrize("stage", [2, 3])
def test_shards_of_deepspeed_are_counted(stage: int, tmp_path: Path) -> None:
    files = deepspeed_files(tmp_path, stage)
    assert missing_parts(tmp_path) == []
    for file in files:
        content = file.read_bytes()
        file.unlink()
        assert missing_parts(tmp_path), file
        file.write_bytes(content[:-30])
        assert missing_parts(tmp_path) == [f"{file.name} is cut off ({len(content) - 30} bytes)"]
        file.write_bytes(content)
    (tmp_path / "latest").unlink()
    assert "latest is missing" in missing_parts(tmp_path)[0]
    (tmp_path / "latest").write_text("global_step8")
    assert missing_parts(tmp_path) == ["global_step8 is missing (named in latest)"]


# Folders on the disk ----------------------------------------------------------------------------------------------


def test_a_folder_that_was_being_replaced_comes_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = sorted(path.name for path in (run / "checkpoint-6").iterdir())
    staged = run / "_incomplete" / "checkpoint-6"
    shutil.copytree(run / "checkpoint-4", staged)
    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda self, to: (_ for _ in ()).throw(KeyboardInterrupt)
                      if self == staged else rename(self, to))  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            publish(staged, run / "checkpoint-6")
    assert get_last_checkpoint(run) == str(run / "checkpoint-4")
    done = recover(run)
    assert len(done) == 2 and "it is back in its place" in done[0] and "what there was is removed" in done[1]
    assert sorted(path.name for path in (run / "checkpoint-6").iterdir()) == old
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    shutil.copytree(run / "checkpoint-4", staged)
    (staged / "new").touch()
    publish(staged, run / "checkpoint-6")
    assert (run / "checkpoint-6" / "new").is_file() and recover(run) == []
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_rotation_counts_whole_checkpoints_by_age(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    names = [f"checkpoint-{step}" for step in (7, 2, 4, 6)]  # 7 is of an earlier run
    for age, name in enumerate(names):
        os.utime(run / name / "trainer_state.json", (1000 + age, 1000 + age))
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-3")
    without("model.safetensors")(run / "checkpoint-3")
    left = lambda: sorted(path.name for path in run.glob("checkpoint-*"))  # noqa: E731
    rotate(run, None, set())
    assert len(left()) == 5
    rotate(run, 3, {run / "checkpoint-6"})
    assert left() == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-6"]
    rotate(run, 1, {run / "checkpoint-6", run / "checkpoint-2"})
    assert left() == ["checkpoint-2", "checkpoint-3", "checkpoint-6"]
    assert not list(run.glob("_*"))


# The right weights ------------------------------------------------------------------------------------------------


def sharded(**options: Any) -> Any:
    """A model whose weights are saved in several files."""
    model = tiny_latent_model(latent_method="laser", **options)
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="100KB")
    return model


@pytest.mark.parametrize(("family", "tied"), [*((family, False) for family in FAMILIES), (FAMILIES[0], True)])
def test_sharded_checkpoints_resume(family: str, tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"family": family, "max_steps": 5}
    model = sharded(family=family, tie_word_embeddings=tied)
    whole = build_run(tmp_path / "whole", model=model, save_total_limit=None, **options)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (checkpoint / "model.safetensors").exists()
    part = build_run(tmp_path / "part", model=sharded(family=family, tie_word_embeddings=tied), **options)
    with caplog.at_level(logging.WARNING):
        part.train(resume_from_checkpoint=str(checkpoint))
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text
    assert_same_run(part, (parameters(whole), losses(whole)), steps=5)
    shards[1].unlink()
    assert missing_parts(checkpoint) == [f"{shards[1].name} is missing"]


@pytest.mark.parametrize("shards", [False, True])
def test_the_best_checkpoint_stays_named_by_its_place_and_is_loaded(shards: bool, tmp_path: Path) -> None:
    options = {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": False, "max_steps": 4}
    trainer = build_run(
        tmp_path, model=sharded() if shards else None, eval_dataset=maze_dataset(2, seed=5, sizes=(3,)), **options,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True, save_total_limit=2,
    )  # fmt: skip
    trainer.train()
    best, last = tmp_path / "checkpoint-1", tmp_path / "checkpoint-4"
    assert sorted(tmp_path.glob("checkpoint-*")) == [best, last]
    assert trainer.state.best_model_checkpoint == str(best)
    for checkpoint in (best, last):
        assert f'"best_model_checkpoint": "{best}"' in (checkpoint / "trainer_state.json").read_text()
    expected = AutoModelForImageTextToText.from_pretrained(best).state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_only_the_best_checkpoint_is_left_with_a_limit_of_one(tmp_path: Path) -> None:
    trainer = build_run(
        tmp_path, eval_dataset=maze_dataset(2, seed=5, sizes=(3,)), save_steps=1, eval_strategy="steps", eval_steps=1,
        max_steps=3, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-1"] and not list(tmp_path.glob("_*"))


def test_weights_of_another_model_are_refused(finished: Path, tmp_path: Path) -> None:
    trainer = build_run(tmp_path, model=tiny_latent_model(latent_method="laser", latent_head="simple"))
    with pytest.raises(ValueError, match=r"has no values for \d+ of \d+ tensors of LatentQwen2_5_VL.*latent_head"):
        trainer.train(resume_from_checkpoint=str(finished / "checkpoint-2"))


def test_a_finished_run_takes_no_further_step(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    trainer = build_run(tmp_path / "run", save_total_limit=None, lr_scheduler_type="constant")
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == STEPS
    expected = unbroken_run()[0]
    assert all(torch.equal(value, expected[name]) for name, value in parameters(trainer).items())
    assert not (tmp_path / "run" / f"checkpoint-{STEPS + 1}").exists()


# The final model, and the Hub -------------------------------------------------------------------------------------


def test_a_saved_model_replaces_an_older_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    build_run(tmp_path / "a", model=sharded()).save_model(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    (folder / "notes.txt").write_text("mine")
    new = build_run(tmp_path / "b", model=tiny_latent_model(seed=1, latent_method="laser"))
    replace, moved = Path.replace, []

    def interrupted(self: Path, to: Path, after: int) -> Path:
        if len(moved) == after:
            raise KeyboardInterrupt
        moved.append(self.name)
        return replace(self, to)

    for after in (0, 3):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", functools.partialmethod(interrupted, after=after))
            with pytest.raises(KeyboardInterrupt):
                new.save_model(folder)
        with pytest.raises((OSError, ValueError)):  # no mixture of the two
            AutoModelForImageTextToText.from_pretrained(folder)
    new.save_model(folder)
    loaded = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in new.model.state_dict().items())
    assert not list(folder.glob("model-*")) and not list(folder.glob("_*"))
    assert (folder / "notes.txt").read_text() == "mine"


def test_an_adapter_moves_in_beside_a_model(tmp_path: Path) -> None:
    target, staged = tmp_path / "model", tmp_path / "model" / "_incomplete" / "model"
    staged.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "adapter_config.json", "adapter_model.bin"):
        (target / name).write_text("old")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (staged / name).write_text("new")
    (staged / "second").mkdir()
    (staged / "second" / "adapter_config.json").write_text("new")
    move_into(staged, target)
    texts = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert texts == {"config.json": "old", "model.safetensors": "old", "adapter_config.json": "new",
                     "adapter_model.safetensors": "new", "second/adapter_config.json": "new"}  # fmt: skip
    assert not (target / "_incomplete").exists()


def test_a_checkpoint_is_pushed_from_its_place(hub: LocalHub, tmp_path: Path) -> None:
    hub.run(
        """
        import sys; sys.path.insert(0, sys.argv[2])
        from pathlib import Path
        from tests.trainers.killed_runs import build_run
        run = build_run(Path(sys.argv[1]), max_steps=2, push_to_hub=True, hub_model_id="org/run",
                        hub_strategy="checkpoint", hub_always_push=True)
        run.train()
        """,
        str(tmp_path / "run"), str(Path(__file__).parents[2]),
    )  # fmt: skip
    repo = hub.repo("models", "org/run")
    files = set(repo.commits[repo.head])
    names = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {f"last-checkpoint/{name}" for name in names} <= files
    assert {"model.safetensors", "config.json"} <= files and not any("_incomplete" in name for name in files)


# Versions of transformers -----------------------------------------------------------------------------------------


def test_another_trainer_is_named_with_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_trainer_methods()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_get_output_dir", lambda self: "runs")
        with pytest.raises(RuntimeError, match=r"transformers \d.* changed its Trainer .*_get_output_dir\('trial',\)"):
            build_run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", lambda self, model, trial: None)
        with pytest.raises(RuntimeError, match=r"Trainer._save_checkpoint calling self._get_output_dir\("):
            build_run(tmp_path)


# The script -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [("--resume_from_checkpoint", "true"), ("--config",)])
def test_the_script_takes_true_from_yaml_and_from_a_flag(given: tuple[str, ...], tmp_path: Path) -> None:
    if given == ("--config",):
        (tmp_path / "c.yaml").write_text("resume_from_checkpoint: true\n")
        given = ("--config", str(tmp_path / "c.yaml"))
    flags = ["--use_cpu=True", "--bf16=False", f"--output_dir={tmp_path}", *given]
    config = TrlParser((TrainLaserConfig,)).parse_args_and_config(flags)[0]
    assert resume_request(config.resume_from_checkpoint) == "last"
