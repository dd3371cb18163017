"""The wrapped forward: which rows meet the LM head, what it returns, and that it leaves everything else alone."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.utils import add_fused_lm_head

import trainers.latent_forward
import trainers.objectives
from modeling_latent import LatentQwen2_5_VLForConditionalGeneration
from tests.latent import tiny_latent_model
from tests.tiny import tiny_images, tiny_processor
from trainers import LatentSFTCollator, LatentSFTConfig, LatentSFTTrainer
from trainers.data.records import make_record, records_to_dataset
from trainers.latent_forward import (
    LatentFusedOutput,
    LatentLoss,
    LatentObjective,
    add_latent_loss,
    check_plain_logits,
    gathered_lm_head,
)
from trainers.objectives import OBJECTIVES, build_objective, register_objective


def batch(**options: Any) -> dict[str, torch.Tensor]:
    """Three padded rows: a chain with a repeated concept beside an image, two spans in one reply, text alone."""
    image, twice = tiny_images(1), ["Street", "dog", "dog", "A red bicycle"]
    turns = ["<image>\nWhat is it?", "<laser>Look: <laser><answer>Jeans</answer>"]
    messages = [{"role": role, "content": turn} for role, turn in zip(("user", "assistant"), turns, strict=True)]
    records = [
        make_record("a", "What is it?", "A dog", image, chain=twice),
        make_record("b", "", "Jeans", image, chain=["a boy", "Jeans"], messages=messages),
        make_record("c", "Is the path safe?", "Yes", chain=["No"]),
    ]
    return LatentSFTCollator(tiny_processor(), **options)(records)


def wrapped(
    config_options: dict[str, Any] | None = None, tie: bool = False
) -> LatentQwen2_5_VLForConditionalGeneration:
    """A tiny model with TRL's fused head and the latent loss, in train mode."""
    model = tiny_latent_model(latent_method="laser", tie_word_embeddings=tie).train()
    args = LatentSFTConfig(output_dir="unused", use_cpu=True, bf16=False, **(config_options or {}))
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    add_latent_loss(model, build_objective(args, model.config), with_loss=args.latent_loss_weight > 0)
    return model


def spans(inputs: dict[str, torch.Tensor], model: torch.nn.Module) -> torch.Tensor:
    """Bool `(batch, length)`: positions between the markers, found by walking along each row."""
    inside = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        is_open = False
        for position, token in enumerate(ids):
            is_open = is_open and token != model.config.latent_end_token_id
            inside[row, position] = is_open
            is_open = is_open or token == model.config.latent_start_token_id
    return inside


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many rows met the head: `"ce"` in TRL's chunked kernel, `"latent"` in the fused DWAL loss."""
    rows: dict[str, list[int]] = {"ce": [], "latent": []}
    kernel, dwal = trl.trainer.utils._ChunkedLogProbFunction, trainers.objectives.laser.fused_dwal_loss

    class Counting:
        @staticmethod
        def apply(hidden: torch.Tensor, *args: Any) -> Any:
            rows["ce"].append(hidden.shape[0])
            return kernel.apply(hidden, *args)

    def counting_dwal(hidden: torch.Tensor, *args: Any) -> Any:
        rows["latent"].append(hidden.shape[0])
        return dwal(hidden, *args)

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Counting)
    monkeypatch.setattr(trainers.objectives.laser, "fused_dwal_loss", counting_dwal)
    return rows


def test_only_supervised_rows_meet_the_head(seen: dict[str, list[int]]) -> None:
    model, inputs = wrapped(), batch()
    called: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: called.append(1))
    output = model(**inputs, fused_lm_head=True)
    inside = spans(inputs, model)
    supervised = int(((inputs["labels"] != -100) & ~inside)[:, 1:].sum())
    assert seen == {"ce": [supervised], "latent": [int(inside.sum())]}
    assert not called and supervised + int(inside.sum()) < inputs["input_ids"].numel() / 2
    assert isinstance(output, LatentFusedOutput)
    assert output.log_probs.shape == output.entropy.shape == output.is_top1.shape == (1, supervised)
    assert output.label_mask.all() and output.latent_loss.shape == () and output.latent_sums.shape == (2, 2)
    lengths = [len(run) for row in inside for run in "".join(map(str, row.int().tolist())).split("0") if run]
    assert len(lengths) == 4
    assert output.latent_sums[:, 1].tolist() == [sum(length - 1 for length in lengths)] * 2


@pytest.mark.parametrize("exposure", ["text", "own"])
def test_the_rows_are_found_once(exposure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the ids of a batch are changed in place before the next call."""
    model, inputs = tiny_latent_model(latent_method="laser").train(), batch()
    args = LatentSFTConfig(output_dir="unused", use_cpu=True, bf16=False, latent_exposure=exposure)
    objective = build_objective(args, model.config)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    add_latent_loss(model, objective, args.exposure())
    calls: list[int] = []
    find = trainers.objectives.laser.find_latent_rows
    monkeypatch.setattr(trainers.objectives.laser, "find_latent_rows", lambda *a: calls.append(1) or find(*a))
    first = model(**inputs, fused_lm_head=True)
    assert len(calls) == 1 and objective._found is None
    assert int(first.latent_count) == int(spans(inputs, model).sum())
    inputs["input_ids"].masked_fill_(inputs["input_ids"] == model.config.latent_start_token_id, 5)
    assert int(model(**inputs, fused_lm_head=True).latent_count) == 0 and len(calls) == 2


class OrderOfOps(TorchDispatchMode):
    """Names of the operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device_behind_the_backbone() -> None:
    """What shapes depend on is read before the first product: later, the host would wait for the whole backbone."""
    text = [make_record(str(i), "Is the path safe?", "Yes", chain=["No", "A dog"][i:]) for i in range(2)]
    inputs, model = LatentSFTCollator(tiny_processor())(text), wrapped()
    reads = ("nonzero", "_local_scalar_dense", "masked_select", "is_nonzero", "bincount")
    with OrderOfOps() as backbone:
        model.base_model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
    with OrderOfOps() as ops:
        output = model(**inputs, fused_lm_head=True)
        (output.latent_loss - output.log_probs.sum()).backward()
    product = min(ops.names.index(name) for name in ("mm", "addmm") if name in ops.names)
    found = Counter(name for name in ops.names[:product] if name in reads)
    found -= Counter(name for name in backbone.names if name in reads)
    assert found == {"nonzero": 2, "_local_scalar_dense": 1}  # rows and labels, longest window
    assert not set(ops.names[product:]) & set(reads)


def test_without_a_latent_loss_none_is_computed(
    seen: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight 0: labels as before, every parameter gets its gradient, and nothing of the latent loss is logged."""
    inputs, model, whole = batch(), wrapped({"latent_loss_weight": 0.0}), wrapped()
    output, expected = model(**inputs, fused_lm_head=True), whole(**inputs, fused_lm_head=True)
    assert output.latent_loss is output.latent_sums is output.latent_count is None
    assert torch.equal(output.log_probs, expected.log_probs) and len(seen["ce"]) == 2 and len(seen["latent"]) == 1
    output.log_probs.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    records = [make_record(str(i), "Is the path safe?", "Yes", chain=["No", "Yes"]) for i in range(2)]
    args = LatentSFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, logging_steps=1,
        latent_loss_weight=0.0, activation_checkpointing=False,
    )  # fmt: skip
    trainer = LatentSFTTrainer(
        tiny_latent_model(latent_method="laser"), args, records_to_dataset(records), processing_class=tiny_processor()
    )
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"loss_total", "loss_ce"} <= logged
    assert not {"loss_latent", "confused_ratio", "last_concept_ratio"} & logged and len(seen["latent"]) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("final_logit_softcapping", 30.0), ("logit_scale", 0.5), ("logits_scaling", 8.0), ("lm_head_multiplier", 0.1)],
)
def test_scaled_and_capped_logits_are_refused(name: str, value: float) -> None:
    model = tiny_latent_model(latent_method="laser")
    options = {"output_dir": "unused", "use_cpu": True, "bf16": False}
    check_plain_logits(model.config)
    setattr(model.config.get_text_config(), name, value)
    with pytest.raises(ValueError, match=rf"{name}={value} in the configuration of .* latent_loss_weight: 0"):
        build_objective(LatentSFTConfig(**options), model.config)
    build_objective(LatentSFTConfig(**options, latent_loss_weight=0.0), model.config)
    setattr(model.config.get_text_config(), name, None if name == "final_logit_softcapping" else 1.0)
    build_objective(LatentSFTConfig(**options), model.config)


@pytest.mark.parametrize("case", ["no label outside the spans", "no span", "nothing"])
def test_a_batch_without_rows_stays_finite(case: str, seen: dict[str, list[int]]) -> None:
    model = wrapped()
    inputs = batch() if case == "no label outside the spans" else batch(latent_form="none")
    if case != "no span":
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
    output = model(**inputs, fused_lm_head=True)
    loss = -output.log_probs.sum() / output.label_mask.sum().clamp(min=1) + output.latent_loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    moved = sum(float(parameter.grad.abs().sum()) for parameter in model.parameters())
    if case == "nothing":
        assert loss.item() == moved == 0
    else:
        assert loss > 1 and moved > 0
    assert (output.latent_loss == 0) == (case != "no label outside the spans")
    assert int(output.label_mask.sum()) == (0 if case != "no span" else int((inputs["labels"][:, 1:] != -100).sum()))


def test_without_the_fused_head_nothing_changes() -> None:
    plain, model, inputs = tiny_latent_model(latent_method="laser").train(), wrapped(), batch()
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(model(**unlabelled).logits, plain(**unlabelled).logits)
        assert torch.equal(model(**inputs).loss, plain(**inputs).loss)
        items = {"num_items_in_batch": 7}
        assert torch.equal(model(**inputs, **items).loss, plain(**inputs, **items).loss)
        assert torch.equal(model.eval()(**inputs).logits, plain.eval()(**inputs).logits)
        options = {"max_new_tokens": 9, "latent_strategy": "dynamic", "max_latent_steps": 3, "do_sample": False}
        prompt = {name: value[:1, :8] for name, value in unlabelled.items() if name in ("input_ids", "attention_mask")}
        assert torch.equal(model.generate(**prompt, **options), plain.generate(**prompt, **options))


def test_the_backbone_output_is_whole_again_after_the_call() -> None:
    model, inputs = wrapped(), batch()
    hooks = len(model.base_model._forward_hooks)
    model(**inputs, fused_lm_head=True)
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    assert model.base_model(**unlabelled).last_hidden_state.shape[:2] == inputs["input_ids"].shape
    broken = {**inputs, "image_grid_thw": inputs["image_grid_thw"][:1]}
    with pytest.raises(Exception, match="(?i)image|split|shape|size"):
        model(**broken, fused_lm_head=True)
    assert len(model.base_model._forward_hooks) == hooks


def test_wrapping_twice_uses_the_last_objective_only(seen: dict[str, list[int]]) -> None:
    model, inputs = wrapped({"dwal_window_size": 1}), batch()
    first = model(**inputs, fused_lm_head=True).latent_loss
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    args = LatentSFTConfig(output_dir="unused", use_cpu=True, bf16=False)
    add_latent_loss(model, build_objective(args, model.config))
    second = model(**inputs, fused_lm_head=True).latent_loss
    assert len(seen["ce"]) == len(seen["latent"]) == 2
    assert torch.equal(second, wrapped()(**inputs, fused_lm_head=True).latent_loss) and not torch.equal(first, second)


def test_a_model_that_trl_did_not_wrap_is_refused() -> None:
    model = tiny_latent_model(latent_method="laser")
    args = LatentSFTConfig(output_dir="unused", use_cpu=True, bf16=False)
    with pytest.raises(RuntimeError, match="not wrapped by TRL's add_fused_lm_head; build the trainer first"):
        add_latent_loss(model, build_objective(args, model.config))


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("def f(labels, shift_labels): backbone_attr; last_hidden_state", "'fused_lm_head'"),
        ("def f(fused_lm_head, labels, shift_labels): last_hidden_state", "backbone call"),
    ],
)
def test_another_form_of_trls_head_is_refused(source: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped()
    monkeypatch.setattr(trainers.latent_forward.inspect, "getsource", lambda _: source)
    with pytest.raises(RuntimeError, match=f"trl {trl.__version__} changed its fused LM head .*{missing}"):
        add_latent_loss(model, None)


@pytest.mark.parametrize("tie", [False, True])
def test_the_head_is_handed_out_as_plain_tensors(tie: bool) -> None:
    model = tiny_latent_model(tie_word_embeddings=tie)
    with gathered_lm_head(model) as (weight, bias):
        assert weight is model.lm_head.weight and bias is None
    assert tie == (model.lm_head.weight is model.get_input_embeddings().weight)


def test_a_new_method_is_an_objective_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers.objectives, "OBJECTIVES", dict(OBJECTIVES))

    @register_objective("norm")
    class NormObjective(LatentObjective):
        """Cross entropy everywhere, and the mean square of the hidden states."""

        sum_names = ()

        def __init__(self, args: LatentSFTConfig, config: Any) -> None:
            self.scale = args.dwal_temperature

        def ce_labels(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return labels

        def fed_positions(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(input_ids, dtype=torch.bool)

        def loss(self, model: Any, hidden_states: torch.Tensor, inputs: dict[str, Any]) -> LatentLoss:
            assert {"input_ids", "labels", "attention_mask"} <= set(inputs)
            return LatentLoss(self.scale * hidden_states.square().mean(), {})

    model, inputs = wrapped({"latent_method": "norm", "dwal_temperature": 3.0}), batch()
    output = model(**inputs, fused_lm_head=True)
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    hidden = model.base_model(**unlabelled).last_hidden_state
    torch.testing.assert_close(output.latent_loss, 3 * hidden.square().mean())
    assert output.latent_sums.shape == (0, 2)
    assert output.log_probs.shape == (1, int((inputs["labels"][:, 1:] != -100).sum()))


def test_a_wrapped_model_is_saved_as_it_was(tmp_path: Any) -> None:
    model, inputs = wrapped(), batch()
    model.save_pretrained(tmp_path)
    again = LatentQwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).train()
    assert "forward" not in vars(again)
    assert torch.equal(again(**inputs).loss, model(**inputs).loss)
