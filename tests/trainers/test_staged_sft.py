"""IVT-LR and Coconut in the trainer: loss, gradients, batches and rows, controls, and what the options refuse."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from modeling_latent.latent_plan import LatentPlan
from tests.trainers.staged_parts import (
    IMAGE_FAMILIES,
    TEXT_FAMILIES,
    scenes,
    staged_args,
    staged_parts,
    staged_trainer,
)
from trainers import LatentSFTConfig, StagedSFTConfig
from trainers.data.records import records_to_dataset
from trainers.objectives import build_objective

FAMILIES = (*IMAGE_FAMILIES, *TEXT_FAMILIES)


def plain_loss(model: Any, inputs: dict[str, Any], plan: LatentPlan | None) -> torch.Tensor:
    """The cross entropy written out from the logits of the head class, label by label (card 4.3)."""
    labels = inputs["labels"]
    fed = {"latent_mask": torch.zeros_like(labels, dtype=torch.bool)} if plan is None else {"latent_plan": plan}
    given = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**given, **fed).logits
    return torch.stack(
        [
            -logits[row, place - 1].log_softmax(0)[labels[row, place]]
            for row, place in (labels != -100).nonzero().tolist()
        ]
    ).mean()


def assert_same_gradients(found: Any, expected: Any, scale: float = 1e-5) -> None:
    gradients = {name: parameter.grad for name, parameter in found.named_parameters()}
    reached = 0
    for name, parameter in expected.named_parameters():
        ours, theirs = gradients[name], parameter.grad
        if theirs is None or not theirs.any():
            assert ours is None or not ours.any(), name
            continue
        reached += 1
        allowed = {"rtol": 1e-3, "atol": scale * theirs.abs().max().item() + 1e-9}
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}", **allowed)
    assert reached > 10


def a_batch(trainer: Any, images: bool, stages: tuple[int, ...] = (2, 0, 3, 1)) -> tuple[dict, list[dict]]:
    """A batch whose rows are at different stages, and its rows alone."""
    collator, alone = copy.copy(trainer.data_collator), []
    records = scenes(images)
    examples = []
    for stage, record in zip(stages, records, strict=True):
        collator.stage = stage
        alone.append(collator([record]))
        examples.append(collator._laid_out(collator.prepare([record])["prepared"][0], None))
    pad = collator.processor.tokenizer.pad_token_id
    width = max(len(example["input_ids"]) for example in examples) + 3
    batch: dict[str, Any] = {}
    for name, fill in (("input_ids", pad), ("labels", -100)):
        rows = [example[name] + [fill] * (width - len(example[name])) for example in examples]
        batch[name] = torch.tensor(rows)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    batch["attention_mask"] = (torch.arange(width) < lengths.unsqueeze(1)).long()
    for name in alone[0].keys() - batch.keys():
        rows = [row[name] for row in alone]
        if name == "mm_token_type_ids":
            rows = [F.pad(row, (0, max(0, width - row.shape[1])))[:, :width] for row in rows]
        batch[name] = torch.cat(rows)
    return batch, alone


@pytest.mark.parametrize("gradient", ["detach", "bptt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_plain_forward(family: str, gradient: str, tmp_path: Path) -> None:
    """The trainer's fused head reads the states of all positions that the plan returned."""
    parts = staged_parts(family)
    plain = copy.deepcopy(parts[0])
    trainer = staged_trainer(tmp_path, family, parts, latent_gradient=gradient)
    batch, _ = a_batch(trainer, family not in TEXT_FAMILIES)
    expected = plain_loss(plain, batch, LatentPlan(gradient=gradient, step=plain.latent_step))
    expected.backward()
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert_same_gradients(trainer.model, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_its_rows(family: str, tmp_path: Path) -> None:
    """Different lengths and numbers of latents: loss and gradients are the token-weighted ones of the rows alone."""
    parts = staged_parts(family)
    single = copy.deepcopy(parts)
    trainer = staged_trainer(tmp_path / "batch", family, parts)
    other = staged_trainer(tmp_path / "rows", family, single)
    batch, alone = a_batch(trainer, family not in TEXT_FAMILIES)
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    loss.backward()
    number = sum(int((row["labels"] != -100).sum()) for row in alone)
    total = torch.zeros(())
    for row in alone:
        share = other.compute_loss(other.model.train(), dict(row)) * int((row["labels"] != -100).sum()) / number
        share.backward()
        total += share.detach()
    torch.testing.assert_close(loss.detach(), total, rtol=1e-5, atol=1e-6)
    assert_same_gradients(trainer.model, other.model, 1e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gpt2"])
def test_pause_slots_are_fed_by_their_own_embedding(family: str, tmp_path: Path) -> None:
    parts = staged_parts(family)
    plain = copy.deepcopy(parts[0])
    trainer = staged_trainer(tmp_path, family, parts, staged_mode="pause")
    batch, _ = a_batch(trainer, family not in TEXT_FAMILIES)
    expected = plain_loss(plain, batch, None)
    expected.backward()
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    slot = plain.config.latent_token_id
    assert trainer.model.get_input_embeddings().weight.grad[slot].any()
    assert_same_gradients(trainer.model, plain)


def test_the_slot_embedding_gets_no_gradient_where_latents_are_fed(tmp_path: Path) -> None:
    """The published code credits the gradient of a latent to that row (card 4.4)."""
    trainer = staged_trainer(tmp_path)
    batch, _ = a_batch(trainer, True)
    trainer.compute_loss(trainer.model.train(), dict(batch)).backward()
    config, gradient = trainer.model.config, trainer.model.get_input_embeddings().weight.grad
    assert not gradient[[config.latent_token_id, config.latent_patch_token_id]].any()
    assert gradient[batch["input_ids"][0, 0]].any()


def test_activation_checkpointing_changes_nothing_when_latents_are_detached(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        trainer = staged_trainer(tmp_path, activation_checkpointing=checkpointing, max_steps=6, num_train_epochs=3)
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("average", ["batch", "token", "sample"])
def test_accumulated_micro_batches(average: str, tmp_path: Path) -> None:
    """With `"token"` and `"sample"` four micro-batches are one batch, whatever their latents."""
    found = []
    for size in (4, 1):
        trainer = staged_trainer(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, loss_average=average,
            optim="sgd", max_grad_norm=0.0, learning_rate=0.1, uniform_prob=1.0, num_train_epochs=1,
        )  # fmt: skip
        trainer.train()
        found.append(copy.deepcopy(trainer.model.state_dict()))
    same = all(torch.allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-5) for name in found[0])
    assert same == (average != "batch")


@pytest.mark.parametrize("gradient", ["detach", "bptt"])
def test_lora_trains_the_adapter_alone(gradient: str, tmp_path: Path) -> None:
    peft_config = LoraConfig(r=4, target_modules=r".*layers\.\d+\.(self_attn|mlp)\.\w_proj", lora_dropout=0.05)
    trainer = staged_trainer(tmp_path, latent_gradient=gradient, peft_config=peft_config)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert any("lora_A" in name for name in changed) and any("lora_B" in name for name in changed)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "chameleon", "gpt2"])
def test_a_trained_folder_loads_and_decodes_as_it_was_trained(family: str, tmp_path: Path) -> None:
    trainer = staged_trainer(tmp_path, family, num_stages=3, num_train_epochs=3)
    trainer.train()
    trainer.save_model()
    auto = AutoModelForCausalLM if family == "gpt2" else AutoModelForImageTextToText
    model = auto.from_pretrained(tmp_path)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    batch = trainer.data_collator(scenes(family != "gpt2")[:1])
    prompt = int((batch["labels"][0] != -100).nonzero()[0])
    inputs = {
        name: value[:, :prompt] if value.shape == batch["labels"].shape else value for name, value in batch.items()
    }
    inputs.pop("labels")
    options = {k: v for k, v in trainer.args.decoding().items() if k != "num_latent_steps"}
    out = model.generate(**inputs, **options, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert out.latent_trace.num_latent_steps.tolist() == [2]
    assert out.sequences[0, :prompt].tolist() == batch["input_ids"][0, :prompt].tolist()


def test_evaluation_has_the_loss_of_training(tmp_path: Path) -> None:
    data = records_to_dataset(scenes())
    trainer = staged_trainer(tmp_path, eval_dataset=data, start_stage=2, per_device_eval_batch_size=4)
    scores = trainer.evaluate()
    batch = trainer.data_collator(scenes())
    with torch.no_grad():
        expected = plain_loss(trainer.model.eval(), batch, LatentPlan(step=trainer.model.latent_step))
    assert scores["eval_loss_ce"] == pytest.approx(expected.item(), rel=1e-5)
    assert scores["eval_stage"] == 2 and "eval_loss_latent" not in scores


# Options --------------------------------------------------------------------------------------------------------


def test_defaults_follow_the_method(tmp_path: Path) -> None:
    ivtlr = StagedSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, epochs_per_stage=[4])
    assert (ivtlr.num_latent_patches, ivtlr.latent_gradient, ivtlr.latent_markers) == (32, "detach", False)
    coconut = staged_args(tmp_path, "gpt2")
    assert (coconut.num_latent_patches, coconut.latent_gradient, coconut.latent_markers) == (0, "bptt", True)
    assert ivtlr.curriculum().last_stage is None and ivtlr.decoding()["num_latent_steps"] == 5
    assert coconut.decoding() == {
        "latent_fed": "state",
        "latent_strategy": "staged", "num_latent_steps": 3, "max_latent_steps": 16, "num_latent_patches": 0,
        "latent_patch_order": "score", "latent_patch_images": "all", "latent_vision_first": True,
        "latent_markers": True,
    }  # fmt: skip
    assert staged_args(tmp_path, staged_mode="cot").decoding() == {"latent_strategy": "off"}


REFUSED = [
    ({"latent_gradient": "bptt", "activation_checkpointing": True}, "latent_gradient='bptt' needs the cache"),
    ({"latent_gradient": "stop"}, "unknown latent_gradient 'stop'"),
    ({"staged_mode": "think"}, "unknown staged_mode 'think'"),
    ({"staged_format": "chatml"}, "staged_format='chatml'.*choose one of"),
    ({"latent_patch_order": "index"}, "unknown latent_patch_order 'index'"),
    ({"latent_patch_images": "first"}, "unknown latent_patch_images 'first'"),
    ({"latent_form": "chain"}, "unknown latent_form 'chain'"),
    ({"latent_exposure": "text"}, "latent_exposure='text' is not for latent_method='ivtlr'"),
    ({"latent_method": "laser"}, "latent_method='laser' lays out no latents by stage"),
    ({"latent_loss_weight": 0.5}, "latent_loss_weight=0.5.*there is no latent loss"),
    ({"latents_per_step": 0}, "latents_per_step=0 must be an integer of at least 1; for no latents set staged_mode"),
    ({"latents_per_step": 4}, "max_latent_stage=5 with latents_per_step=4: 20 latents, above max_latent_steps=16"),
    ({"max_latent_steps": 0}, "max_latent_steps=0 must be an integer of at least 1"),
    ({"num_latent_patches": -1}, "num_patches=-1 must be an integer"),
    ({"uniform_prob": 1.5}, "uniform_prob=1.5 must be between 0 and 1"),
    ({"uniform_prob": 0.5, "staged_mode": "cot"}, "uniform_prob=0.5 with staged_mode='cot'"),
    ({"max_staged_length": -3}, "max_staged_length=-3 must be an integer of at least 1, or 0"),
    ({"latent_packing": "sequence"}, "latent_packing='sequence' is not for a curriculum"),
    ({"enable_dynamic_batch": True}, "enable_dynamic_batch=True is not for a curriculum"),
    ({"epochs_per_stage": None}, "staged_mode='latent' without a curriculum would train stage 0 alone"),
    ({"epochs_per_stage": [1], "steps_per_stage": [1]}, "are both set; give one of them"),
    ({"epochs_per_stage": [0]}, r"epochs_per_stage=\[0\] must be integers"),
    ({"start_stage": -2}, "start_stage=-2 must be an integer"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_what_cannot_work_is_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        staged_trainer(tmp_path, parts=staged_parts(), **options)


def test_another_configuration_and_a_model_without_the_tokens_are_refused(tmp_path: Path) -> None:
    args = LatentSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="latent_method='ivtlr' is trained with a StagedSFTConfig"):
        build_objective(args, staged_parts()[0].config)
    model = staged_parts("qwen2_5_vl", "coconut")[0]
    with pytest.raises(ValueError, match="num_latent_patches=2, but the model has no token for inserted"):
        build_objective(staged_args(tmp_path), model.config)


def test_a_data_set_without_steps_is_refused(tmp_path: Path) -> None:
    data = records_to_dataset(scenes()).remove_columns("steps")
    with pytest.raises(ValueError, match=r"missing \['steps'\]"):
        staged_trainer(tmp_path, data=data)
    staged_trainer(tmp_path, data=data, staged_mode="no_cot").train()
    text = records_to_dataset(scenes(images=False)).remove_columns(["images", "boxes", "chain"])
    staged_trainer(tmp_path, "gpt2", data=text, max_steps=1).train()
