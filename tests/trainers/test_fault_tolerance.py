"""What stops a run: losses, gradients and weights that are not finite, precisions that the device does not have."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from tests.latent import tiny_latent_model
from tests.trainers.killed_runs import build_run
from trainers import LatentSFTConfig
from trainers.data.mazes import maze_dataset
from trainers.fault_tolerance import (
    RECORD_LABELS,
    LabelledCollator,
    NonFiniteError,
    check_model_precision,
    check_precision,
    decode_labels,
    failure_message,
    record_label,
)

BAD = maze_dataset(7, seed=3, sizes=(3,))[5]["id"]


class Poison:
    """A collator that makes the pixels of one record NaN and keeps the ids of every batch."""

    def __init__(self, collator: Any, bad: str | None) -> None:
        self.collator, self.bad, self.batches = collator, bad, []

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        self.batches.append([row["id"] for row in rows])
        batch = self.collator(rows)
        if self.bad in self.batches[-1]:
            batch["pixel_values"] = batch["pixel_values"] * math.nan
        return batch

    def place(self) -> tuple[int, int]:
        """Optimiser step and micro-batch (of two) in which the record comes, both from 1."""
        index = next(i for i, ids in enumerate(self.batches) if self.bad in ids)
        return index // 2 + 1, index % 2 + 1


class Watch(TrainerCallback):
    """Keeps the parameters after the last step, and can call something then."""

    def __init__(self, call: Any = None) -> None:
        self.call, self.parameters = call, {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.parameters = {name: value.clone() for name, value in model.state_dict().items()}
        if self.call is not None:
            self.call(state.global_step, model)


def poisoned(folder: Path, bad: str | None = BAD, **options: Any) -> tuple[Any, Poison, Watch]:
    watch = options.pop("watch", Watch())
    trainer = build_run(folder, callbacks=[watch], save_steps=1, save_total_limit=None, **options)
    trainer.data_collator = Poison(trainer.data_collator, bad)
    return trainer, trainer.data_collator, watch


# Losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [42, 4])
def test_a_bad_loss_stops_the_run_before_the_step(seed: int, tmp_path: Path) -> None:
    trainer, poison, watch = poisoned(tmp_path, seed=seed)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    step, micro = poison.place()
    text = str(caught.value)
    assert f"the loss is not finite at optimiser step {step}; the step was not taken" in text
    ids = next(ids for ids in poison.batches if BAD in ids)
    line = f"rank 0, micro-batch {micro} of 2: loss_ce=nan, loss_latent=nan (loss_ce and loss_latent not finite)"
    (found,) = [part for part in text.splitlines() if "micro-batch" in part]
    assert found.strip().startswith(line) and all(f"id {name!r}" in found for name in ids)
    last = tmp_path / f"checkpoint-{step - 1}"
    if step == 1:
        assert "No checkpoint was saved yet" in text
    else:
        assert f"The last good checkpoint is {last}; go on from it with resume_from_checkpoint={last}" in text
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, watch.parameters[name]), name
    assert trainer.state.global_step == step - 1
    assert "stop_on_nan=False would train on" in text


def test_the_bad_term_is_named(tmp_path: Path) -> None:
    trainer, _, _ = poisoned(tmp_path, bad=None)
    kind, calls = type(trainer.objective), []
    loss = kind.loss

    def broken(self: Any, *args: Any) -> Any:
        result = loss(self, *args)
        calls.append(result)
        return type(result)(result.loss * math.inf if len(calls) == 4 else result.loss, result.sums)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "loss", broken)
        with pytest.raises(NonFiniteError, match=r"micro-batch 2 of 2: loss_ce=\d.*loss_latent=inf \(loss_latent not"):
            trainer.train()
    assert trainer.state.global_step == 1 and len(calls) == 4


def test_a_weight_of_zero_leaves_the_latent_loss_out(tmp_path: Path) -> None:
    trainer, _, _ = poisoned(tmp_path, bad=None, latent_loss_weight=0.0, max_steps=2)
    kind, loss = type(trainer.objective), type(trainer.objective).loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kind, "loss", lambda self, *args: type(r := loss(self, *args))(r.loss.detach() * math.nan, r.sums)
        )
        trainer.train()
    assert trainer.state.global_step == 2


def test_without_the_option_the_run_goes_on_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, poison, _ = poisoned(tmp_path, stop_on_nan=False, max_steps=4)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 4
    assert f"the loss is not finite at optimiser step {poison.place()[0]}" in caplog.text
    assert f"id {BAD!r}" in caplog.text


def test_a_bad_gradient_of_good_losses_stops_the_run_too(tmp_path: Path) -> None:
    trainer, poison, watch = poisoned(tmp_path, bad=None)
    weight = next(p for name, p in trainer.model.named_parameters() if name.endswith("q_proj.weight"))
    calls = []
    weight.register_hook(lambda grad: (calls.append(1), grad * math.nan if len(calls) == 4 else grad)[1])
    with pytest.raises(NonFiniteError, match=r"the gradient is not finite \(norm nan\) at optimiser step 2; the step"):
        trainer.train()
    assert trainer.state.global_step == 1
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, watch.parameters[name]), name


def test_the_records_of_all_micro_batches_are_named_for_a_bad_gradient(tmp_path: Path) -> None:
    trainer, poison, _ = poisoned(tmp_path, bad=None)
    weight = next(p for name, p in trainer.model.named_parameters() if name.endswith("q_proj.weight"))
    weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NonFiniteError, match="gradient is not finite") as caught:
        trainer.train()
    lines = [line for line in str(caught.value).splitlines() if "micro-batch" in line]
    assert len(lines) == 2
    for line, ids in zip(lines, poison.batches[:2], strict=True):
        assert all(f"id {name!r}" in line for name in ids)


def test_float16_leaves_bad_gradients_to_its_scaler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, _ = poisoned(tmp_path, bad=None)
    infinite = torch.tensor(math.inf)
    with pytest.raises(NonFiniteError):
        trainer._get_grad_norm(trainer.model, infinite)
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    assert trainer._get_grad_norm(trainer.model, infinite) == infinite
    trainer._guard.start([{}])
    trainer.watch_losses(torch.tensor(1.0), infinite)
    with pytest.raises(NonFiniteError, match="the loss is not finite"):
        trainer._get_grad_norm(trainer.model, infinite)


def test_bad_weights_are_not_saved(tmp_path: Path) -> None:
    def spoil(step: int, model: Any) -> None:
        if step == 3:
            with torch.no_grad():
                model.lm_head.weight[5, 2] = math.inf

    trainer, _, _ = poisoned(tmp_path, bad=None, watch=Watch(spoil))
    last = tmp_path / "checkpoint-2"
    message = f"weights are not finite after optimiser step 3; not saved(?s:.*)The last good checkpoint is {last};"
    with pytest.raises(NonFiniteError, match=message):
        trainer.train()
    assert not (tmp_path / "checkpoint-3").exists()


def test_one_check_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, _ = poisoned(tmp_path, bad=None, max_steps=3, gradient_accumulation_steps=4)
    checks = []
    check = trainer._check_step
    monkeypatch.setattr(trainer, "_check_step", lambda norm: (checks.append(float(norm)), check(norm)))
    trainer.train()
    assert len(checks) == 3 and all(norm > 0 for norm in checks)


# Records -----------------------------------------------------------------------------------------------------------


def test_labels_say_file_row_and_id() -> None:
    assert record_label({"id": "x7", "meta": '{"source": "d.json", "row": 3}'}) == "d.json, row 3, id 'x7'"
    assert record_label({"id": "x7", "meta": {"source": "d.json"}}) == "d.json, id 'x7'"
    assert record_label({"id": "x7", "meta": ""}) == record_label({"id": "x7"}) == "id 'x7'"
    assert record_label(3) == "a int without id"


def test_labels_travel_as_bytes() -> None:
    rows = [
        {"id": "Straße 1"},
        {"id": "b", "meta": {"source": "/very/long/" + "ü" * 300 + "/d.json", "row": 12}},
    ]
    batch = LabelledCollator(lambda rows: {"input_ids": torch.zeros(len(rows), 3)})(rows)
    labels = batch[RECORD_LABELS]
    assert labels.shape == (2, 192) and labels.dtype == torch.uint8 and set(batch) == {"input_ids", RECORD_LABELS}
    first, second = decode_labels(labels)
    assert first == "id 'Straße 1'"
    assert second.endswith("/d.json, row 12, id 'b'") and second.startswith("ü")


def test_labels_are_in_training_batches_only(tmp_path: Path) -> None:
    trainer = build_run(tmp_path, eval_dataset=maze_dataset(2, seed=5, sizes=(3,)), dataloader_num_workers=1)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch[RECORD_LABELS].shape == (2, 192)
    assert RECORD_LABELS not in next(iter(trainer.get_eval_dataloader()))
    assert not isinstance(trainer.data_collator, LabelledCollator)
    batches, _ = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert RECORD_LABELS not in batches[0]
    trainer.watch_losses(torch.tensor(math.nan), torch.tensor(0.5))
    with pytest.raises(NonFiniteError, match="rank 0, micro-batch 1 of 1: loss_ce=nan, loss_latent=0.5 .loss_ce not"):
        trainer._get_grad_norm(trainer.model, torch.tensor(1.0))


def test_long_lists_are_cut() -> None:
    text = failure_message("what", [f"line {i}" for i in range(20)], None)
    assert "line 15" in text and "line 16" not in text and "and 4 more" in text and "start again" in text


# Precisions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch report another device: None for no GPU, else name and compute capability."""

    def pretend(name: str | None, capability: tuple[int, int] = (0, 0)) -> None:
        found = None if name is None else torch.device("cuda")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.version, "hip", None)

    return pretend


ON_CPU: list[tuple[dict[str, Any], str]] = [
    ({"fp16": True}, "^fp16=True needs a GPU, and this run is on the CPU .use_cpu=True.; leave it out, or set bf16"),
    ({"fp16_full_eval": True, "bf16": False}, "^fp16_full_eval=True needs a GPU, .*; leave it out"),
    ({"tf32": True, "bf16": False}, "^tf32=True needs a GPU of the Ampere generation or later, .*; leave it out"),
]


@pytest.mark.parametrize(("options", "message"), ON_CPU)
def test_precisions_that_a_cpu_does_not_have(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        LatentSFTConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_bfloat16_on_a_cpu_has_to_be_asked_for(device: Any, tmp_path: Path) -> None:
    device(None)
    message = r"^bf16=True \(the default of trl\) needs a GPU, .* on the CPU \(no GPU was found\); set use_cpu: true"
    with pytest.raises(ValueError, match=message):
        LatentSFTConfig(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="^bf16_full_eval=True needs a GPU, and"):
        LatentSFTConfig(output_dir=str(tmp_path), bf16=False, bf16_full_eval=True)
    assert LatentSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True).bf16


def test_precisions_of_an_older_gpu(device: Any) -> None:
    options = {"use_cpu": False, "bf16": None, "fp16": False, "tf32": None}
    full = {"fp16_full_eval": False, "bf16_full_eval": False}
    device("Tesla V100", (7, 0))
    message = r"^bf16=True \(the default of trl\) .* on Tesla V100 \(compute capability \(7, 0\)\); .* fp16: true"
    with pytest.raises(ValueError, match=message):
        check_precision(SimpleNamespace(**options, **full))
    with pytest.raises(ValueError, match="^bf16_full_eval=True needs a GPU of the Ampere"):
        check_precision(SimpleNamespace(**{**options, **full, "bf16": False, "bf16_full_eval": True}))
    with pytest.raises(ValueError, match="^tf32=True needs a GPU of the Ampere generation.*leave it out"):
        check_precision(SimpleNamespace(**{**options, **full, "fp16": True, "tf32": True}))
    check_precision(SimpleNamespace(**{**options, **full, "fp16": True}))
    device("A100", (8, 0))
    check_precision(SimpleNamespace(**{**options, **full, "tf32": True}))


def run_on(kind: str, bf16: bool = False, fp16: bool = False) -> Any:
    return SimpleNamespace(device=torch.device(kind), bf16=bf16, fp16=fp16)


def test_kernels_and_weights_that_do_not_fit() -> None:
    model = tiny_latent_model(latent_method="laser")
    check_model_precision(model, run_on("cpu"))
    model.config.text_config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' does not run on cpu; set .*'sdpa'"):
        check_model_precision(model, run_on("cpu", bf16=True))
    with pytest.raises(ValueError, match="'flash_attention_2' does not take float32 .* on cuda.; set bf16: true"):
        check_model_precision(model, run_on("cuda"))
    check_model_precision(model, run_on("cuda", bf16=True))
    check_model_precision(model.to(torch.bfloat16), run_on("cuda"))


def test_float16_weights_are_not_trained() -> None:
    model = tiny_latent_model(latent_method="laser").half()
    with pytest.raises(ValueError, match="dtype=float16: .* trained parameters are float16 .first: .*dtype: float32"):
        check_model_precision(model, run_on("cuda", fp16=True))
    check_model_precision(model, run_on("cuda", fp16=True), deepspeed=True)  # keeps float32 copies
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))  # its matrices are float32
    check_model_precision(lora, run_on("cuda", fp16=True))


def test_the_trainer_checks_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype=float16"):
        build_run(tmp_path, model=tiny_latent_model(latent_method="laser").half())
