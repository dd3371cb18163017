"""LaViT in the trainer: losses and gradients of the plain forward, the gate by optimizer step, what reaches the heads,
evaluation, refusals."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig

from modeling_latent import load_latent_model
from modeling_latent.latent_attention import capture_attention_rows
from modeling_latent.latent_masks import image_visibility, visible_attention
from tests.tiny import FAMILIES
from tests.trainers.lavit_parts import TEACHER_WIDTH, lavit_args, lavit_parts, lavit_records, lavit_trainer
from trainers import LavitSFTConfig
from trainers.data.records import records_to_dataset
from trainers.objectives import build_objective
from trainers.objectives.lavit import LavitObjective
from trainers.sensory_gate import gate_gamma


def batch_of(trainer: Any, count: int = 4) -> dict[str, torch.Tensor]:
    return trainer.data_collator(lavit_records(count))


def plain_losses(model: Any, inputs: dict[str, Any], args: LavitSFTConfig, bias: float | None) -> dict[str, Any]:
    """The losses written out, row by row, from the plain forward with a dense mask (card, 4.1, 4.2, 4.6, 4.7)."""
    config, ids = model.config, inputs["input_ids"]
    own = ("labels", "concept_target", "attention_target", "attention_length")
    given = {name: value for name, value in inputs.items() if name not in own}
    learned = torch.isin(ids, torch.tensor(config.latent_learned_token_ids))
    images = ids == config.image_token_id
    index = torch.arange(ids.shape[1])
    scores = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
    scores = scores.masked_fill(~((index <= index[:, None]) & inputs["attention_mask"].bool()[:, None, None]), -1e9)
    for row in range(len(ids)):
        last, first = int(learned[row].nonzero()[-1]), int(learned[row].nonzero()[0])
        behind = int(images[row].nonzero()[-1]) + 1
        blocked = [*range(last + 1, ids.shape[1]), *(range(behind, first) if args.blocks_prompt else ())]
        for query in blocked if bias is not None else ():
            scores[row, 0, query, images[row]] += max(bias, -1e9)
    names = ("image_grid_thw", "mm_token_type_ids")
    positions = model.model.plan_positions(ids, inputs["attention_mask"], **{name: given[name] for name in names})
    out = model(**{**given, "attention_mask": scores, "position_ids": positions}, output_attentions=False)
    rows, ce, concept, attention = range(len(ids)), [], [], []
    for row, place in (inputs["labels"] != -100).nonzero().tolist():
        ce.append(-out.logits[row, place - 1].log_softmax(0)[ids[row, place]])
    for row in rows:
        state = out.last_hidden_state[row, int(learned[row].nonzero()[-1])]
        concept.append(1 - F.cosine_similarity(model.concept_head(state), inputs["concept_target"][row], dim=0))
        keys = out.last_hidden_state[row, images[row]]
        target = inputs["attention_target"][row, : len(keys)]
        kept = target.topk(min(args.attention_top_k or len(keys), len(keys))).indices
        share = torch.zeros_like(target).scatter(0, kept, target[kept])
        share = share / share.sum()
        predicted = (keys @ model.attention_head.query_proj(state)).log_softmax(0)
        attention.append((torch.xlogy(share, share) - share * predicted).sum())
    return {
        "ce": torch.stack(ce).mean(),
        "concept": torch.stack(concept).mean(),
        "attention": torch.stack(attention).mean(),
    }


@pytest.mark.parametrize("visibility", ["none", "gate", "bottleneck"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_equal_the_plain_forward(family: str, visibility: str, tmp_path: Path) -> None:
    parts = lavit_parts(family)
    parts[0].set_attn_implementation("eager")
    plain = copy.deepcopy(parts[0])
    options: dict[str, Any] = {"latent_visibility": visibility, "attention_top_k": 3, "ce_weight": 0.5}
    trainer = lavit_trainer(tmp_path, parts, **options)
    inputs = batch_of(trainer)
    trainer.state.global_step = 2  # half of the gate's steps
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    bias = {"none": None, "gate": math.log(gate_gamma(2, 4, 1e-6)), "bottleneck": -math.inf}[visibility]
    want = plain_losses(plain, inputs, trainer.args, bias)
    total = 0.5 * want["ce"] + 0.3 * want["concept"] + 0.3 * want["attention"]
    assert loss.item() == pytest.approx(total.item(), abs=1e-5)
    total.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        reference = expected[name].grad
        if reference is not None:
            scale = max(reference.abs().max().item(), 1e-4)
            assert (parameter.grad - reference).abs().max().item() <= 2e-4 * scale, name
    assert trainer.model.concept_head.mlp[0].weight.grad.norm() > 0
    assert trainer.model.attention_head.query_proj.weight.grad.norm() > 0


def answer_shares(trainer: Any, inputs: dict[str, torch.Tensor], step: int) -> torch.Tensor:
    """Share of the attention on the image in the first layer, for every answer row, `(rows, heads)`."""
    objective: LavitObjective = trainer.objective
    objective.global_step = step
    model, ids = trainer.model, inputs["input_ids"]
    answers = (inputs["labels"] != -100) & ~objective._learned(ids)
    rows = torch.stack([row.nonzero()[:2, 0] for row in answers])
    passed = {name: value for name, value in inputs.items() if name not in ("labels", *objective.batch_inputs)}
    with torch.no_grad(), objective.during_forward(model, inputs), capture_attention_rows(model, rows, [0]) as found:
        model.model(**passed)
    weights = found.weights[0]  # (batch, heads, rows, keys)
    return torch.stack([w[..., i].sum(-1) for w, i in zip(weights, ids == model.config.image_token_id, strict=True)])


def test_the_attention_from_answer_to_image_follows_the_gate(tmp_path: Path) -> None:
    """At the first step, halfway and after the warm-up. In the first layer, whose queries no gate has changed, the
    share of the image is `g s / (g s + 1 - s)` of the share `s` of an open gate."""
    trainer = lavit_trainer(tmp_path, gate_steps=10, gate_floor=1e-3)
    inputs = batch_of(trainer)
    trainer.model.train()
    opened = answer_shares(trainer, inputs, 10)
    assert opened.min() > 0.01  # there is something to narrow
    means = []
    for step in (0, 5, 10, 11):
        gamma = gate_gamma(step, 10, 1e-3)
        shares = answer_shares(trainer, inputs, step)
        assert torch.allclose(shares, gamma * opened / (gamma * opened + 1 - opened), atol=1e-5)
        means.append(shares.mean().item())
    assert means[0] < 0.01 * means[2] and means[0] < means[1] < means[2] == pytest.approx(means[3])
    trainer.model.eval()
    assert torch.allclose(answer_shares(trainer, inputs, 0), opened)  # evaluation is not narrowed


def recorded_gates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    seen: list[tuple[int, float]] = []
    rules = LavitObjective.rules

    def record(self: LavitObjective, input_ids: torch.Tensor, training: bool) -> list:
        found = rules(self, input_ids, training)
        if training:
            seen.append((self.global_step, found[0].bias if found else 0.0))
        return found

    monkeypatch.setattr(LavitObjective, "rules", record)
    return seen


def test_the_gate_moves_with_the_optimizer_step_and_survives_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recorded_gates(monkeypatch)
    run: dict[str, Any] = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 6, "gate_steps": 4,
        "save_strategy": "steps", "save_steps": 3, "seed": 1,
    }  # fmt: skip
    whole = lavit_trainer(tmp_path / "whole", **run)
    whole.train()
    biases = [math.log(gate_gamma(step, 4, 1e-6)) for step in range(6)]
    assert seen == [(step, pytest.approx(biases[step])) for step in range(6) for _ in range(2)]
    seen.clear()
    resumed = lavit_trainer(tmp_path / "whole", **run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert seen == [(step, pytest.approx(biases[step])) for step in range(3, 6) for _ in range(2)]
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("predictor", ["head", "attention"])
def test_both_alignments_fall_and_reach_what_they_train(predictor: str, tmp_path: Path) -> None:
    trainer = lavit_trainer(tmp_path, max_steps=40, attention_predictor=predictor, learning_rate=3e-3, ce_weight=0.0)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss_concept" in entry]
    names = ["grad_norm_concept_head", "grad_norm_attention" + ("_head" if predictor == "head" else "")]
    assert len(history) == 40
    for name in names:
        assert all(entry[name] > 0 for entry in history[:5]), name
    for name in ("loss_concept", "loss_attention"):
        assert history[-1][name] < 0.8 * history[0][name], name
    assert history[-1]["concept_cosine"] > history[0]["concept_cosine"]
    assert history[-1]["attention_overlap"] > history[0]["attention_overlap"]


def test_the_models_own_attention_is_read_at_the_last_learned_token(tmp_path: Path) -> None:
    parts = lavit_parts()
    parts[0].set_attn_implementation("eager")
    plain = copy.deepcopy(parts[0])
    options: dict[str, Any] = {"attention_predictor": "attention", "latent_visibility": "none", "attention_top_k": 0}
    trainer = lavit_trainer(tmp_path, parts, **options)
    inputs = batch_of(trainer)
    trainer.compute_loss(trainer.model.train(), dict(inputs))
    numerator, denominator = trainer._latent_totals["train"]["loss_attention"].tolist()
    objective = trainer.objective
    given = {name: value for name, value in inputs.items() if name not in ("labels", *objective.batch_inputs)}
    maps = torch.stack(plain(**given, output_attentions=True).attentions).mean(dim=(0, 2))  # (batch, L, L)
    losses = []
    for row, place in enumerate(objective._anchor(inputs["input_ids"]).tolist()):
        keys = maps[row, place, inputs["input_ids"][row] == plain.config.image_token_id]
        target = inputs["attention_target"][row, : len(keys)]
        target = target / target.sum()
        losses.append((torch.xlogy(target, target) - target * (keys / keys.sum()).log()).sum())
    assert numerator / denominator == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_evaluation_logs_the_alignments_and_is_not_narrowed(tmp_path: Path) -> None:
    data = records_to_dataset(lavit_records())
    logs = []
    for visibility in ("bottleneck", "none"):
        trainer = lavit_trainer(tmp_path, latent_visibility=visibility, eval_dataset=data)
        logs.append(trainer.evaluate())
    for name in ("eval_loss_concept", "eval_loss_attention", "eval_loss_ce", "eval_concept_cosine"):
        assert logs[0][name] == pytest.approx(logs[1][name], abs=1e-6)


def test_micro_batches_and_one_batch_weigh_tokens_alike(tmp_path: Path) -> None:
    """`loss_average: token`: all terms are means over the optimizer step, whatever it is cut into."""
    grads = []
    for size, steps in ((4, 1), (1, 4)):
        trainer = lavit_trainer(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, loss_average="token",
            max_grad_norm=0.0, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
        )  # fmt: skip
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        grads.append({name: before[name] - value for name, value in trainer.model.named_parameters()})
    for name, one in grads[0].items():
        assert torch.allclose(one, grads[1][name], atol=2e-5), name


def test_a_head_without_a_loss_is_left_alone(tmp_path: Path) -> None:
    parts = lavit_parts()
    before = parts[0].attention_head.query_proj.weight.detach().clone()
    trainer = lavit_trainer(tmp_path, parts, attention_loss_weight=0.0, weight_decay=0.5, max_steps=2)
    trainer.train()
    assert torch.equal(trainer.model.attention_head.query_proj.weight, before)
    assert "loss_attention" not in trainer.state.log_history[0] and "loss_concept" in trainer.state.log_history[0]
    assert trainer.data_collator.needs == ("concept",)


def test_the_baseline_has_no_learned_tokens_and_no_alignment(tmp_path: Path) -> None:
    trainer = lavit_trainer(tmp_path, latent_form="none", data=records_to_dataset(lavit_records()))
    inputs = batch_of(trainer)
    assert not trainer.objective._learned(inputs["input_ids"]).any() and "concept_target" not in inputs
    trainer.train()
    assert not {"loss_concept", "loss_attention"} & set(trainer.state.log_history[0])
    assert trainer.args.decoding() == {"latent_strategy": "off"}


def test_the_published_stage_one_hides_nothing(tmp_path: Path) -> None:
    """A later token changes the states before it: the flag of the published code, here under its own name only."""
    trainer = lavit_trainer(tmp_path, latent_visibility="reference", attention_loss_weight=0.0, training_stage=1)
    model, inputs = trainer.model.train(), batch_of(trainer, 1)
    changed = {name: value.clone() for name, value in inputs.items()}
    place = int(inputs["attention_mask"].sum()) - 2
    changed["input_ids"][0, place] = (changed["input_ids"][0, place] + 1) % 200
    states = []
    for batch in (inputs, changed):
        prepared = trainer.objective.prepare(model, batch)
        own = ("labels", *trainer.objective.batch_inputs)
        given = {name: value for name, value in batch.items() if name not in own}
        states.append(model.model(**{**given, **prepared}).last_hidden_state[0, 0])
    assert (states[0] - states[1]).abs().max() > 1e-3
    assert trainer.objective.prepare(model.eval(), inputs) == {}


def test_bottleneck_with_blind_latents_leaves_no_way_from_the_pixels(tmp_path: Path) -> None:
    """Card 10.10: the learned tokens are the only way. With them blind, too, the answer does not depend on the image;
    with them seeing, it does."""
    trainer = lavit_trainer(tmp_path, latent_visibility="bottleneck")
    model, objective, inputs = trainer.model.eval(), trainer.objective, batch_of(trainer)
    ids = inputs["input_ids"]
    images, learned = ids == model.config.image_token_id, objective._learned(ids)
    rules = objective.rules(ids, training=True)
    blind = type(rules[0])(learned, images)
    own = ("labels", *objective.batch_inputs)
    given = {name: value for name, value in inputs.items() if name not in own}
    other = {**given, "pixel_values": given["pixel_values"].flip(0) + 1}
    answers = (inputs["labels"] != -100) & ~learned
    for rows, same in ((rules, False), ([*rules, blind], True)):
        states = []
        for batch in (given, other):
            with torch.no_grad(), visible_attention(model, rows):
                states.append(model.model(**batch).last_hidden_state[answers])
        assert torch.equal(*states) == same


def test_activation_checkpointing_keeps_gate_and_gradients(tmp_path: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        trainer = lavit_trainer(tmp_path, activation_checkpointing=checkpointing, max_grad_norm=0.0)
        inputs = batch_of(trainer)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.compute_loss(trainer.model.train(), dict(inputs)).backward()
        grads.append(
            [parameter.grad.clone() for parameter in trainer.model.parameters() if parameter.grad is not None]
        )
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_an_adapter_holds_heads_and_learned_rows(tmp_path: Path) -> None:
    from trainers.adapters import build_peft_config
    from trainers.model_loading import LatentModelConfig, train_latent_parts

    model, processor = lavit_parts()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model, processor = load_latent_model(tmp_path / "base", dtype=torch.float32)
    settings = LatentModelConfig(model_name_or_path=str(tmp_path / "base"), use_peft=True, lora_r=4)
    config: LoraConfig = build_peft_config(settings, model, processor)
    train_latent_parts(config, model)
    assert {"concept_head", "attention_head"} <= set(config.modules_to_save)
    trainer = lavit_trainer(tmp_path / "run", (model, processor), peft_config=config, max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    again, _ = load_latent_model(tmp_path / "adapter", adapter="merge", dtype=torch.float32)
    trained = trainer.model.get_base_model()
    for head in ("concept_head", "attention_head"):
        ours = getattr(trained, head).modules_to_save["default"].state_dict()
        for name, value in getattr(again, head).state_dict().items():
            assert torch.equal(value, ours[name]), name


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"training_stage": 3}, "training_stage=3 is unknown; choose 0, 1 or 2"),
    ({"latent_visibility": "fog"}, "unknown latent_visibility 'fog'; choose one of"),
    ({"gate_steps": -1}, "gate_steps=-1 must be an integer, 0 or more"),
    ({"gate_floor": 0.0}, "gate_floor=0.0 must be above 0"),
    ({"attention_loss_weight": -1}, "attention_loss_weight=-1 must be a number, 0 or more"),
    ({"attention_top_k": -2}, "attention_top_k=-2 must be an integer of at least 1, or 0"),
    ({"attention_top_k": 4, "attention_target": "reference"}, "attention_top_k=4 with attention_target='reference'"),
    ({"attention_keys": "reference"}, "attention_keys='reference' with teacher_grid='merged'"),
    ({"teacher_grid": "patch"}, "attention_keys='image' with teacher_grid='patch'"),
    ({"num_latent_tokens": 0}, "num_latent_tokens=0 must be an integer of at least 1"),
    ({"attention_predictor": "attention", "activation_checkpointing": True}, "attention_predictor='attention'"),
    ({"latent_packing": "sequence"}, "latent_packing='sequence' is not for LaViT"),
    ({"latent_form": "chain"}, "unknown latent_form 'chain'; choose one of"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: "" if isinstance(value, str) else str(value))
def test_a_wrong_option_is_refused_by_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        lavit_args(tmp_path, **options)


def test_models_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    args = lavit_args(tmp_path)
    config = lavit_parts(attention_head=False)[0].config
    with pytest.raises(ValueError, match=r"the model has no attention_head.*attention_head: true, or set the weight"):
        build_objective(args, config)
    config = lavit_parts()[0].config
    config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' takes no mask by position"):
        build_objective(args, config)
    with pytest.raises(ValueError, match="is trained with a LavitSFTConfig"):
        from trainers import LatentSFTConfig

        build_objective(LatentSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), lavit_parts()[0].config)


def test_a_target_of_another_width_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"r0.*12.*7|r0.*7.*12"):
        lavit_trainer(tmp_path, concept_size=TEACHER_WIDTH - 5)


def test_the_rule_of_a_batch_is_that_of_its_rows() -> None:
    """Padding, and a row without latents: no rule."""
    images = torch.tensor([[0, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]).bool()
    learned = torch.tensor([[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]]).bool()
    rule = image_visibility(images, learned, -1.0, block_prompt=True)
    assert rule.queries.int().tolist() == [[0, 0, 0, 1, 0, 0, 1], [0] * 7]
