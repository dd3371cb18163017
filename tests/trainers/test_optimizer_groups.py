"""Parameter groups: which parameter is where, at which rate and decay, and that the optimizers of a run have them."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from tests.latent import tiny_latent_model
from tests.tiny import FAMILIES, tiny_processor
from trainers import LatentSFTConfig, LatentSFTTrainer
from trainers.data.mazes import maze_dataset
from trainers.optimizer_groups import check_deepspeed_optimizer, decayed_names, optimizer_groups, with_optimizer_groups


def options(**changed: Any) -> SimpleNamespace:
    """The options that the groups follow from."""
    default = {
        "learning_rate": 1e-5,
        "weight_decay": 0.1,
        "vision_lr": None,
        "merger_lr": None,
        "optim": "adamw_torch",
    }
    return SimpleNamespace(**{**default, **changed})


def trainer(folder: Path, model: nn.Module | None = None, **changed: Any) -> LatentSFTTrainer:
    """A trainer on the CPU."""
    fixed = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    shape = {"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1, "save_strategy": "no"}
    return LatentSFTTrainer(
        model=tiny_latent_model(latent_method="laser") if model is None else model,
        args=LatentSFTConfig(**{**fixed, **shape, "activation_checkpointing": False, **changed}),
        train_dataset=maze_dataset(4, seed=3, sizes=(3,)),
        processing_class=tiny_processor(),
    )


def is_norm(model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to a norm: a module that has no matrix and whose weight starts as ones."""
    weight = getattr(model.get_submodule(name.rpartition(".")[0]), "weight", None)
    return weight is not None and weight.ndim == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_each_family(family: str) -> None:
    model = tiny_latent_model(family=family, latent_method="laser")
    names = dict(model.named_parameters())
    two = optimizer_groups(model, options())
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in two] == [
        ("main", 1e-5, 0.1),
        ("main, no decay", 1e-5, 0.0),
    ]
    plain = {name for name in names if name.endswith("bias") or is_norm(model, name)}
    assert set(two[1]["names"]) == plain and 10 < len(plain) < len(names) - 10
    # The rule by names alone would let the vision tower's norms decay.
    assert any("visual" in name and is_norm(model, name) for name in two[1]["names"])

    six = optimizer_groups(model, options(vision_lr=2e-6, merger_lr=3e-6))
    rates = {"main": 1e-5, "vision": 2e-6, "merger": 3e-6}
    assert [group["name"] for group in six] == [f"{part}{rest}" for part in rates for rest in ("", ", no decay")]
    for group in six:
        part = group["name"].split(",")[0]
        assert (group["lr"], group["weight_decay"]) == (rates[part], 0.0 if "no decay" in group["name"] else 0.1)
        assert [id(parameter) for parameter in group["params"]] == [id(names[name]) for name in group["names"]]
    merged = [name for group in six[4:] for name in group["names"]]
    assert all("merger" in name and name.startswith("model.visual.") for name in merged)
    assert any("deepstack_merger_list" in name for name in merged) == (family == "qwen3_vl")
    seen = [name for group in six for name in group["names"]]
    assert sorted(seen) == sorted(names)  # tied tensors are one parameter; each is in one group
    towers = [name for group in six[2:4] for name in group["names"]]
    assert towers and all(name.startswith("model.visual.") and "merger" not in name for name in towers)

    only_merger = optimizer_groups(model, options(merger_lr=3e-6))
    assert {group["name"].split(",")[0] for group in only_merger} == {"main", "merger"}
    assert set(towers) <= {name for group in only_merger[:2] for name in group["names"]}


def test_a_rate_for_what_is_not_trained_is_refused(tmp_path: Path) -> None:
    frozen = tiny_latent_model(latent_method="laser")
    frozen.model.visual.requires_grad_(False)
    with pytest.raises(ValueError, match="vision_lr=2e-06, but no parameter.*vision part.*freeze_vision_tower: false"):
        trainer(tmp_path, frozen, vision_lr=2e-6)
    frozen.model.visual.merger.requires_grad_(True)
    with pytest.raises(ValueError, match="vision_lr=2e-06, but no parameter of the vision part is trained"):
        optimizer_groups(frozen, options(vision_lr=2e-6, merger_lr=1e-6))
    groups = optimizer_groups(frozen, options(merger_lr=1e-6))
    assert [group["name"] for group in groups] == ["main", "main, no decay", "merger", "merger, no decay"]
    lora = get_peft_model(tiny_latent_model(), LoraConfig(target_modules=r".*language_model.*q_proj"))
    with pytest.raises(ValueError, match="merger_lr=1e-06, but no parameter.*target modules in `visual`"):
        optimizer_groups(lora, options(merger_lr=1e-6))
    (group,) = optimizer_groups(lora, options())  # no bias, no norm is trained: the empty group is left out
    assert group["name"] == "main" and all("lora_" in name for name in group["names"])
    with pytest.raises(ValueError, match="no parameter of the model has requires_grad"):
        optimizer_groups(frozen.requires_grad_(False), options())


def test_lora_in_the_vision_tower_takes_its_rate() -> None:
    lora = get_peft_model(tiny_latent_model(), LoraConfig(target_modules=r".*(visual.*qkv|q_proj)"))
    groups = {group["name"]: group for group in optimizer_groups(lora, options(vision_lr=2e-6))}
    assert set(groups) == {"main", "vision"}
    assert all("visual" in name for name in groups["vision"]["names"]) and groups["vision"]["lr"] == 2e-6


class Rates(TrainerCallback):
    """Keeps the rates of all groups, as they are for the next step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups])


def test_the_schedule_scales_each_group_and_a_resumed_run_has_them(tmp_path: Path) -> None:
    rates = {"learning_rate": 1e-3, "vision_lr": 2e-4, "merger_lr": 4e-4, "weight_decay": 0.1}
    saves = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear", "warmup_steps": 0}
    run, again, kept = trainer(tmp_path, **rates, **saves), trainer(tmp_path, **rates, **saves), Rates()
    run.add_callback(kept)
    run.train()
    start = [1e-3, 1e-3, 2e-4, 2e-4, 4e-4, 4e-4]
    for left, found in zip((0.75, 0.5, 0.25, 0), kept.seen, strict=True):
        assert found == pytest.approx([left * rate for rate in start])
    logged = [entry["learning_rate"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])  # that of the main part
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for trained in (run, again):
        groups = trained.optimizer.param_groups
        assert [group["name"] for group in groups[::2]] == ["main", "vision", "merger"]
        assert [group["initial_lr"] for group in groups] == start
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0] * 3
    for (name, one), (_, other) in zip(run.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_small_rate_moves_its_part_less(tmp_path: Path) -> None:
    before = tiny_latent_model(latent_method="laser")
    run = trainer(tmp_path, learning_rate=1e-2, vision_lr=1e-5, merger_lr=1e-3, max_steps=1, warmup_steps=0)
    run.train()
    moved: dict[str, float] = {}
    for (name, one), (_, other) in zip(run.model.named_parameters(), before.named_parameters(), strict=True):
        part = "merger" if "merger" in name else "vision" if "visual" in name else "main"
        moved[part] = max(moved.get(part, 0.0), (one - other).abs().max().item())
    # Adam's first step is the rate, for entries with a gradient.
    assert moved == pytest.approx({"main": 1e-2, "vision": 1e-5, "merger": 1e-3}, rel=0.1)


def test_optimizers_that_arrange_parameters_themselves_keep_doing_so() -> None:
    model = tiny_latent_model()
    own = {"lr": 1e-3, "params": [{"params": list(model.parameters())}]}
    assert with_optimizer_groups(torch.optim.AdamW, own, options(), model) == (torch.optim.AdamW, own)
    factory = lambda: None  # noqa: E731
    assert with_optimizer_groups(factory, {"lr": 1e-3}, options(), model) == (factory, {"lr": 1e-3})
    with pytest.raises(ValueError, match=r"optim='muon' arranges the parameters itself and takes no \['merger_lr'\]"):
        with_optimizer_groups(factory, {"lr": 1e-3}, options(optim="muon", merger_lr=1e-4), model)


def test_the_latent_head_has_a_rate_of_its_own() -> None:
    """Its own group, after those of the tower; the vector that ends a span stays in the main part."""
    model = tiny_latent_model(latent_head="simple", latent_stop_vector=True)
    groups = {group["name"]: group for group in optimizer_groups(model, options(latent_head_lr=1e-4, merger_lr=1e-6))}
    assert list(groups)[2:] == ["merger", "merger, no decay", "latent head", "latent head, no decay"]
    head = {f"latent_head.{name}" for name, _ in model.latent_head.named_parameters()}
    assert set(groups["latent head"]["names"]) | set(groups["latent head, no decay"]["names"]) == head
    assert (groups["latent head"]["lr"], groups["latent head"]["weight_decay"]) == (1e-4, 0.1)
    assert "latent_stop_vector.weight" in groups["main"]["names"]
    together = {group["name"]: group for group in optimizer_groups(model, options())}
    assert list(together) == ["main", "main, no decay"] and "latent_head.mlp.0.weight" in together["main"]["names"]
    with pytest.raises(ValueError, match="latent_head_lr=0.0001, but no parameter.*latent_head: simple"):
        optimizer_groups(tiny_latent_model(), options(latent_head_lr=1e-4))


def test_the_published_rule_lets_rms_norms_decay() -> None:
    model = tiny_latent_model(latent_head="simple", latent_stop_vector=True)
    names = {name for name, _ in model.named_parameters()}
    ours, published = decayed_names(model), decayed_names(model, "published")
    assert names - published == {name for name in names if "bias" in name} | {"latent_head.ln_q.weight"}
    assert ours < published and "model.language_model.norm.weight" in published - ours
    with pytest.raises(ValueError, match=r"weight_decay_rule='card' is unknown; choose one of \['transf"):
        optimizer_groups(model, options(weight_decay_rule="card"))
    with pytest.raises(ValueError, match="weight_decay_rule='card' is unknown"):
        LatentSFTConfig(weight_decay_rule="card", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="latent_head_lr=0 must be above 0"):
        LatentSFTConfig(latent_head_lr=0, use_cpu=True, bf16=False)


def test_a_deepspeed_optimizer_would_ignore_the_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
    settings = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(settings))
    for given in (settings, str(file), json.dumps(settings)):
        with pytest.raises(ValueError, match=r"optimizer section.* ignores \['latent_head_lr'\]; take the"):
            check_deepspeed_optimizer(options(deepspeed=given, latent_head_lr=1e-4))
    with pytest.raises(ValueError, match=r"zero.json.*ignores \['vision_lr'\]"):
        LatentSFTConfig(deepspeed=str(file), vision_lr=1e-6, use_cpu=True, bf16=False)
    with caplog.at_level(logging.WARNING):
        check_deepspeed_optimizer(options(deepspeed=str(file)))
    assert "weight decay acts on biases and norms" in caplog.text
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))  # as accelerate launch says it
    with pytest.raises(ValueError, match="ignores"):
        check_deepspeed_optimizer(options(merger_lr=1e-6))
    del settings["optimizer"]
    file.write_text(json.dumps(settings))
    check_deepspeed_optimizer(options(merger_lr=1e-6))


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "hub_configs" / "deepspeed").glob("*.json")))
def test_our_deepspeed_files_keep_the_groups(path: Path) -> None:
    check_deepspeed_optimizer(options(deepspeed=str(path), vision_lr=1e-6, merger_lr=1e-6, latent_head_lr=1e-4))
