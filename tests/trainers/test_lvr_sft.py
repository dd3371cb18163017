"""LVR's supervised stage in the trainer: losses and gradients of the plain forward, exposure, evaluation, refusals."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import AutoModelForImageTextToText

from modeling_latent import LATENT_CLASSES
from tests.tiny import FAMILIES, tiny_images
from trainers import LatentSFTConfig, LatentSFTTrainer, LVRSFTConfig, tiny
from trainers.collators import LatentSFTCollator
from trainers.data.boxes import reference_box_tokens
from trainers.data.lvr_text import LVR_TOKENS
from trainers.data.mazes import maze_dataset
from trainers.data.records import Record, RecordError, make_record, record_from_row, records_to_dataset
from trainers.objectives import build_objective

TURNS = ["<image>\nWhat is it, and where?", "Look: <lvr> and <lvr> here. <answer>a cat</answer>"]


def boxes(*corners: list[float]) -> list[dict]:
    return [{"image": 0, "xyxy": list(box)} for box in corners]


def scenes() -> list[Record]:
    """Two regions in a conversation, one region of another image, and text alone."""
    first, second, _ = tiny_images(3)
    messages = [{"role": role, "content": turn} for role, turn in zip(("user", "assistant"), TURNS, strict=True)]
    text = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, hello there."}]
    whole = [0.0, 0.0, 1.0, 1.0]
    return [
        make_record("a", "", "a cat", [first], boxes=boxes(whole, [0.1, 0.1, 0.3, 0.9]), messages=messages),
        make_record("b", "What?", "b", [second], boxes=boxes(whole)),
        make_record("c", "", "", [], messages=text),
    ]


def lvr_parts(family: str = "qwen2_5_vl", head: str | None = None, stop_vector: bool = False) -> tuple[Any, Any]:
    """A tiny model with LVR's tokens, and its processor."""
    processor = tiny.build_tiny_processor(latent_tokens=LVR_TOKENS, family=family)
    stock = tiny.build_tiny_stock_model(tiny.tiny_config(family, None, processor.tokenizer), 0)
    config_class, model_class = LATENT_CLASSES[family]
    names = ("latent_token_id", "latent_start_token_id", "latent_stop_token_id", "latent_end_token_id")
    config = config_class.from_stock(
        stock.config, latent_method="lvr", latent_head=head, latent_stop_vector=stop_vector,
        **{name: getattr(processor, name) for name in names},
    )  # fmt: skip
    torch.manual_seed(3)
    model = model_class(config)
    model.load_state_dict(stock.state_dict(), strict=False)
    return model, processor


def make_args(folder: Path, **options: Any) -> LVRSFTConfig:
    base: dict[str, Any] = {
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none", "activation_checkpointing": False,
        "per_device_train_batch_size": 3, "max_steps": 1, "logging_steps": 1, "save_strategy": "no",
        "learning_rate": 1e-3, "warmup_steps": 0,
    }  # fmt: skip
    return LVRSFTConfig(output_dir=str(folder), **{**base, **options})


def make_trainer(folder: Path, parts: tuple[Any, Any] | None = None, data: Any = None, **options: Any) -> Any:
    model, processor = parts or lvr_parts()
    more = {name: options.pop(name) for name in ("peft_config", "eval_dataset") if name in options}
    data = records_to_dataset(scenes()) if data is None else data
    args = make_args(folder, **options)
    return LatentSFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor, **more)


def plain_losses(model: Any, inputs: dict[str, Any], args: LVRSFTConfig) -> dict[str, torch.Tensor]:
    """The losses written out from the plain forward: rows one by one, the images encoded apart (card, 4.1 and 4.3)."""
    config, ids, labels = model.config, inputs["input_ids"], inputs["labels"]
    images = torch.cat(
        model.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
        ).pooler_output
    )
    slots, stops = ids == config.latent_token_id, ids == config.latent_stop_token_id
    embeds, mask = torch.zeros(*ids.shape, images.shape[1]), slots.clone()
    for row, place in slots.nonzero().tolist():
        embeds[row, place] = images[inputs["region_index"][row, place]]
    if config.latent_stop_vector:
        embeds, mask = torch.where(stops[..., None], model.latent_stop_vector.weight, embeds), slots | stops
    unlabelled = {name: value for name, value in inputs.items() if name not in ("labels", "region_index")}
    out = model(**unlabelled, latent_embeds=embeds, latent_mask=mask)
    head = model.latent_head or torch.nn.Identity()
    ce, regression, switch = [], [], []
    for row, place in (labels != -100).nonzero().tolist():
        if not mask[row, place]:
            ce.append(-out.logits[row, place - 1].log_softmax(0)[ids[row, place]])
    for row, place in slots.nonzero().tolist():
        target = images[inputs["region_index"][row, place]].detach()
        regression.append((head(out.last_hidden_state[row, place - 1]) - target).square().mean())
    for row, place in ((ids == config.latent_start_token_id) | slots).nonzero().tolist():
        logit, ends = out.logits[row, place, config.latent_end_token_id], ids[row, place + 1]
        goal = (ends == config.latent_end_token_id).float()
        switch.append(F.binary_cross_entropy_with_logits(logit, goal))
    if config.latent_stop_vector:
        vector = model.latent_stop_vector.weight
        switch = [
            (head(out.last_hidden_state[r, p - 1]) - vector).square().mean() for r, p in stops.nonzero().tolist()
        ]
    losses = {"ce": torch.stack(ce).mean(), "roi": torch.stack(regression).mean()}
    losses["switch"] = torch.stack(switch).mean() if args.mode_switch_loss else torch.zeros(())
    return losses


VARIANTS = [
    {},
    {"head": "glu", "latent_loss_weight": 0.5},
    {"mode_switch_loss": True, "latent_end_in_text": False, "mode_switch_weight": 0.3},
    {"head": "simple", "mode_switch_loss": True, "latent_end_in_text": False},
    {"head": "simple", "stop_vector": True, "mode_switch_loss": True},
    {"stop_vector": True},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_one_step(family: str, variant: dict, tmp_path: Path) -> None:
    """The loss is that of the plain forward, the gradients too, and every parameter of a method's part is trained."""
    options = dict(variant)
    parts = lvr_parts(family, options.pop("head", None), options.pop("stop_vector", False))
    plain = copy.deepcopy(parts[0])
    trainer = make_trainer(tmp_path, parts, **options)
    inputs = trainer.data_collator(scenes())
    losses = plain_losses(plain, inputs, trainer.args)
    weights = {"ce": 1, "roi": trainer.args.latent_loss_weight, "switch": trainer.args.mode_switch_weight}
    expected = sum(weights[name] * loss for name, loss in losses.items())
    expected.backward()
    loss = trainer.compute_loss(trainer.model.train(), dict(inputs))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    found = dict(trainer.model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or "latent_stop" in name, name
        allowed = {"rtol": 1e-3, "atol": 1e-5 * parameter.grad.abs().max().item() + 1e-8}
        torch.testing.assert_close(found[name].grad, parameter.grad, msg=lambda m, n=name: f"{n}: {m}", **allowed)


def test_a_run_logs_both_cosines_and_its_model_loads(tmp_path: Path) -> None:
    parts = lvr_parts(head="simple", stop_vector=True)
    trainer = make_trainer(tmp_path, parts, eval_dataset=records_to_dataset(scenes()), mode_switch_loss=True)
    trainer.train()
    logged, scores = trainer.state.log_history[0], trainer.evaluate()
    assert {"loss_ce", "loss_latent", "loss_mode_switch", "latent_cosine"} <= set(logged)
    assert "latent_cosine_free" not in logged
    assert all(-1 <= scores[name] <= 1 for name in ("eval_latent_cosine_free", "eval_latent_cosine"))
    assert scores["eval_latent_cosine_free"] != scores["eval_latent_cosine"]
    total = scores["eval_loss_ce"] + 0.1 * scores["eval_loss_latent"] + 0.1 * scores["eval_loss_mode_switch"]
    assert scores["eval_loss_total"] == pytest.approx(total, rel=1e-4)
    trainer.save_model()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, parameter in trainer.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name


def test_the_gap_is_that_of_decoding(tmp_path: Path) -> None:
    """`eval_latent_cosine_free` is the cosine of what `generate` feeds, and the embeddings of the region."""
    model, processor = lvr_parts()
    record = scenes()[1]
    trainer = make_trainer(tmp_path, (model, processor), eval_dataset=records_to_dataset([record]))
    inputs = trainer.data_collator([record])
    start = (inputs["input_ids"][0] == model.config.latent_start_token_id).nonzero()[0, 0].item()
    slots = inputs["input_ids"] == model.config.latent_token_id
    prompt = {name: inputs[name][:, : start + 1] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    number = int(slots.sum())
    trace = model.eval().generate(
        **prompt, **images, latent_strategy="fixed", num_latent_steps=number, max_new_tokens=number + 2,
        do_sample=False, return_dict_in_generate=True,
    ).latent_trace  # fmt: skip
    features = torch.cat(model.model.get_image_features(**images, return_dict=True).pooler_output)
    targets = features[inputs["region_index"][slots]]
    cosine = F.cosine_similarity(trace.slot_inputs[:number], targets, dim=-1).mean().item()
    assert trainer.evaluate()["eval_latent_cosine_free"] == pytest.approx(cosine, abs=1e-5)


def test_the_gap_can_be_left_out(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_dataset=records_to_dataset(scenes()), eval_free_running=False)
    assert "eval_latent_cosine_free" not in trainer.evaluate()


@pytest.mark.parametrize("average", ["batch", "token"])
def test_accumulated_micro_batches(average: str, tmp_path: Path) -> None:
    """With `loss_average="token"` three micro-batches are one batch, for all three losses."""
    found = []
    for size in (3, 1):
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path, lvr_parts(head="simple"), per_device_train_batch_size=size, mode_switch_loss=True,
            gradient_accumulation_steps=3 // size, loss_average=average, latent_end_in_text=False, optim="sgd",
            max_grad_norm=0.0, learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        found.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    same = all(torch.allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-6) for name in found[0])
    assert same == (average == "token")


@pytest.mark.parametrize("exposure", ["oracle", "own", "free"])
def test_lora_trains_adapter_and_latent_head(exposure: str, tmp_path: Path) -> None:
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["latent_head"])
    trainer = make_trainer(
        tmp_path, lvr_parts(head="simple"), peft_config=peft_config, latent_exposure=exposure, max_steps=2
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert any("lora_B" in name for name in changed) and any("latent_head" in name for name in changed)
    assert all("lora_" in name or "modules_to_save" in name for name in changed)


def test_only_text_has_a_latent_loss_of_zero(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, data=records_to_dataset(scenes()[2:]))
    output = trainer.model.train()(**trainer.data_collator(scenes()[2:]), fused_lm_head=True)
    assert output.latent_loss == 0 and output.latent_count == 0 and output.latent_loss.requires_grad
    trainer.train()
    assert trainer.state.log_history[0]["loss_latent"] == 0


def test_without_spans_the_cross_entropy_alone_is_trained(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, latent_form="none", eval_dataset=records_to_dataset(scenes()))
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss_latent"] == 0 and logged["loss_total"] == pytest.approx(logged["loss_ce"])
    assert trainer.evaluate()["eval_loss_latent"] == 0


def test_regions_in_the_collator() -> None:
    processor = tiny.build_tiny_processor(latent_tokens=LVR_TOKENS)
    mazes = [record_from_row(row) for row in maze_dataset(3, seed=1)]
    joined = LatentSFTCollator(processor, "regions", join_regions=True)(mazes)
    single = LatentSFTCollator(processor, "regions")(mazes)
    offset = 0
    for row, (maze, grid) in enumerate(zip(mazes, joined["image_grid_thw"].tolist(), strict=True)):
        tokens = [int(token) for box in maze["boxes"] for token in reference_box_tokens(box["xyxy"], grid[1:])]
        for batch, expected in ((joined, list(dict.fromkeys(tokens))), (single, tokens)):
            index = batch["region_index"][row]
            assert index[index >= 0].tolist() == [offset + token for token in expected]
            assert torch.equal(index >= 0, batch["input_ids"][row] == processor.latent_token_id)
        starts = [(b["input_ids"][row] == processor.latent_start_token_id).sum().item() for b in (joined, single)]
        assert starts == [1, len(maze["boxes"])]
        offset += grid[1] * grid[2] // 4


REFUSED = [
    ({"mode_switch_loss": True}, "taught never to stop; set latent_end_in_text: false"),
    ({"latent_exposure": "text"}, r"latent_exposure='text' is not for latent_method='lvr'; choose one of \['oracle'"),
    ({"latent_form": "chain"}, "unknown latent_form 'chain'; choose one of"),
    ({"latent_method": "laser"}, "latent_form='regions' is LVR's"),
    ({"roi_loss_type": "huber"}, "roi_loss_type='huber'"),
    ({"mode_switch_weight": -1}, "mode_switch_weight=-1 must be a finite number"),
    ({"empty_region": "skip"}, "unknown empty_region 'skip'"),
    ({"region_layout": "paper"}, "unknown region_layout 'paper'"),
    ({"mode_switch_targets": "code"}, "unknown mode_switch_targets 'code'"),
    ({"mode_switch_loss_type": "l2"}, "unknown mode_switch_loss_type 'l2'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_what_cannot_work_is_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_an_end_vector_without_its_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="learned end vector would never be trained"):
        make_trainer(tmp_path, lvr_parts(stop_vector=True), mode_switch_loss=True, latent_end_in_text=False)
    args = LatentSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="LVR is trained with an LVRSFTConfig"):
        build_objective(args, lvr_parts()[0].config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": boxes([0.5, 0.1, 0.2, 0.9])}, "x1"),
        ({"boxes": boxes([0.0, 0.0, 1.5, 1.0])}, "1.5"),
        ({"boxes": boxes([0.0, 0.0, 1.0, 1.0]) * 2, "messages": scenes()[0]["messages"][:1] + [
            {"role": "assistant", "content": "<lvr>x"}]}, "1 <lvr> placeholders but 2 regions"),
        ({"boxes": None}, "column 'boxes' is missing"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(change: dict, message: str) -> None:
    processor = tiny.build_tiny_processor(latent_tokens=LVR_TOKENS)
    record = {**scenes()[1], **change, "meta": {"source": "data.json", "row": 7}}
    with pytest.raises(RecordError, match=message) as caught:
        LatentSFTCollator(processor, "regions")([record])
    assert "data.json" in str(caught.value) and "7" in str(caught.value)
