"""LVR as a model: published folders, the learned end vector, the places of the head, its strategies and refusals.

What the strategies decode is compared elsewhere: with the naive decoder in `tests/test_matrix.py`, with published
vectors in `tests/golden/lvr_decoding.py`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modeling_latent import LATENT_METHODS, LatentQwen2_5_VLConfig, convert_stock_checkpoint, load_latent_model
from modeling_latent.latent_lvr import latent_distance
from tests.latent import ScriptProcessor, latent_token_ids, liven, tiny_latent_model, tiny_pair
from tests.naive import naive_generate
from tests.tiny import tiny_config, tiny_inputs
from trainers.tiny import TINY_TEXTS, build_tiny_tokenizer, save_tiny_stock_checkpoint

LVR = LATENT_METHODS["lvr"]
LVR_IDS = ("latent_start_token_id", "latent_token_id", "latent_stop_token_id", "latent_end_token_id")
IDS = latent_token_ids()
START, SLOT, END = IDS["latent_start_token_id"], IDS["latent_token_id"], IDS["latent_end_token_id"]


def head_tensors(kind: str | None, size: int = 64, inner: int = 128) -> dict[str, torch.Tensor]:
    """Tensors of a published head, by published name."""
    shapes = {
        None: {},
        "simple": {"ln_q.weight": (size,), "ln_q.bias": (size,)}
        | {
            f"mlp.{i}.{part}": (size, size)[: 2 if part == "weight" else 1]
            for i in (0, 2)
            for part in ("weight", "bias")
        },
        "glu": {f"{name}_proj.weight": (inner, size) for name in ("gate", "up")}
        | {
            "gate_proj.bias": (inner,),
            "up_proj.bias": (inner,),
            "down_proj.weight": (size, inner),
            "down_proj.bias": (size,),
        },
    }[kind]
    return {f"lvr_head.{name}": torch.randn(shape) for name, shape in shapes.items()}


def publish(folder: Path, head: str | None = None, end_vector: bool = False, **keys: Any) -> dict[str, torch.Tensor]:
    """Write a folder as the published code does; returns its tensors."""
    torch.manual_seed(0)
    tokenizer = build_tiny_tokenizer(TINY_TEXTS)
    for token in LVR.tokens.values():
        tokenizer.add_tokens(token, special_tokens=True)
    save_tiny_stock_checkpoint(folder, tokenizer)
    config = json.loads((folder / "config.json").read_text())
    ids = tokenizer.convert_tokens_to_ids(list(LVR.tokens.values()))
    config.update(zip(("lvr_start_id", "lvr_id", "lvr_latent_end_id", "lvr_end_id"), ids, strict=True))
    config.update(lvr_head=head is not None, lvr_head_type=head or "simple", latent_end_token=end_vector)
    config.update({"loss_lvr_fct": "mse", "architectures": ["QwenWithLVR"], **keys})
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors") | head_tensors(head)
    if end_vector:
        weights["lvr_latent_end_emb"] = torch.randn(64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def our_name(name: str) -> str:
    if name == "lvr_latent_end_emb":
        return "latent_stop_vector.weight"
    for theirs, ours in (
        ("lvr_head.", "latent_head."),
        ("visual.", "model.visual."),
        ("model.", "model.language_model."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


# Published folders


@pytest.mark.parametrize(("head", "end_vector"), [(None, False), ("simple", True), ("glu", False), (None, True)])
def test_every_tensor_of_a_published_folder_arrives(head: str | None, end_vector: bool, tmp_path: Path) -> None:
    weights = publish(tmp_path / "published", head, end_vector)
    model, processor = load_latent_model(tmp_path / "published")
    config, state = model.config, model.state_dict()
    assert (config.latent_method, config.latent_head, config.latent_stop_vector) == ("lvr", head, end_vector)
    assert [getattr(config, name) for name in LVR_IDS] == list(
        processor.tokenizer.convert_tokens_to_ids(list(LVR.tokens.values()))
    )
    assert state.keys() == {our_name(name) for name in weights}
    assert not [name for name in weights if not torch.equal(state[our_name(name)], weights[name])]
    assert model.generation_config.latent_strategy == "fixed" and model.generation_config.num_latent_steps == 8

    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    saved, settings = (
        load_file(tmp_path / "ours" / "model.safetensors"),
        json.loads((tmp_path / "ours" / "config.json").read_text()),
    )
    assert not [name for name in saved if name.startswith("lvr_")]
    assert ("latent_stop_vector.weight" in saved) == end_vector
    assert any(name.startswith("latent_head.") for name in saved) == (head is not None)
    assert settings["model_type"] == "latent_qwen2_5_vl" and settings["loss_lvr_fct"] == "mse"
    assert not {"lvr_head", "lvr_head_type", "latent_end_token", "lvr_id"} & settings.keys()
    assert (tmp_path / "ours" / "latent_lvr.py").is_file(), "the code does not travel with the model"
    again = load_latent_model(tmp_path / "ours")[0]
    assert again.state_dict().keys() == state.keys()
    assert not [name for name, value in again.state_dict().items() if not torch.equal(value, state[name])]
    assert again.config.latent_stop_vector is end_vector


def test_published_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    publish(tmp_path / "ids", lvr_id=7)
    with pytest.raises(
        ValueError, match=r"ids: config.json says lvr_id=7, its tokenizer \d+; give the folder the tok"
    ):
        load_latent_model(tmp_path / "ids")
    publish(tmp_path / "lost", "simple", lvr_head=False)
    with pytest.raises(ValueError, match=r"lost: .* without a place \['(lvr|latent)_head.*correct its settings"):
        convert_stock_checkpoint(tmp_path / "lost")
    publish(tmp_path / "missing", latent_end_token=True)
    with pytest.raises(ValueError, match=r"missing \['latent_stop_vector.weight'\]"):
        convert_stock_checkpoint(tmp_path / "missing")
    model = convert_stock_checkpoint(tmp_path / "missing", latent_fields={"latent_head": "glu"})[0]
    assert model.latent_head is not None and model.latent_stop_vector.weight.norm() > 1, "drawn when asked for"
    with pytest.raises(ValueError, match="published checkpoint of 'lvr', and method='laser' would drop"):
        load_latent_model(tmp_path / "missing", method="laser")
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="is a latent model already; latent_fields are for a stock checkpoint"):
        load_latent_model(tmp_path / "ours", latent_fields={"latent_head": None})


# New parts of a stock model


def test_a_stock_model_gets_new_parts_with_their_first_values(tmp_path: Path) -> None:
    """Drawn by `from_pretrained`, where values written in a constructor are lost."""
    save_tiny_stock_checkpoint(tmp_path, build_tiny_tokenizer(TINY_TEXTS))
    fields = {"latent_head": "simple", "latent_stop_vector": True}
    model, processor = load_latent_model(tmp_path, "lvr", latent_fields=fields, dtype=torch.float32)
    assert list(processor.latent_tokens) == ["start", "slot", "latent_end", "end"]
    first = processor.latent_start_token_id
    assert [getattr(model.config, name) for name in LVR_IDS] == [first, first + 1, first + 2, first + 3]
    vector = model.latent_stop_vector()
    assert vector.norm().item() == pytest.approx(8.0, rel=1e-5) and vector.std() > 0.5
    for layer in (model.latent_head.mlp[0], model.latent_head.mlp[2]):
        for value in (layer.weight, layer.bias):  # uniform within 1 / sqrt(64)
            assert 0.06 < value.detach().std() < 0.085 and value.abs().max() <= 0.125
    assert torch.equal(model.latent_head.ln_q.weight, torch.ones(64))
    empty, _ = load_latent_model(tmp_path, "lvr", latent_fields=fields, weights=False)
    assert empty.latent_stop_vector.weight.device.type == "meta"


def test_an_adapter_brings_its_new_parts_along(tmp_path: Path) -> None:
    """The base is stock: head and end vector are in the adapter, or it is refused."""
    peft = pytest.importorskip("peft")
    save_tiny_stock_checkpoint(tmp_path / "base")
    fields = {"latent_head": "simple", "latent_stop_vector": True}
    states = torch.randn(2, 64)
    for kept in (["latent_head", "latent_stop_vector"], ["latent_head"]):
        model, processor = load_latent_model(tmp_path / "base", "lvr", latent_fields=fields, dtype=torch.float32)
        expected = model.latent_stop_vector(states).detach(), model.latent_step(states).detach()
        folder = tmp_path / str(len(kept))
        settings = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=kept)
        peft.get_peft_model(model, settings).save_pretrained(folder)
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        if len(kept) == 2:
            again = load_latent_model(folder, base_model=tmp_path / "base", dtype=torch.float32)[0]
            assert torch.equal(again.latent_stop_vector(states), expected[0])
            torch.testing.assert_close(again.latent_step(states), expected[1])
        else:
            with pytest.raises(
                ValueError, match=r"trained with \['latent_stop_vector'\], which neither it nor its base"
            ):
                load_latent_model(folder, base_model=tmp_path / "base")


def test_the_end_vector_is_trained() -> None:
    model = tiny_latent_model(latent_stop_vector=True)
    (model.latent_stop_vector() ** 2).sum().backward()
    assert torch.equal(model.latent_stop_vector.weight.grad, 2 * model.latent_stop_vector.weight)


def test_an_unknown_timing_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"latent_head_timing='late' is unknown; choose one of \['train', 'reference'\]"
    ):
        LatentQwen2_5_VLConfig.from_stock(tiny_config(), latent_head_timing="late")


# Where the head stands


def open_inputs() -> dict[str, torch.Tensor]:
    """Two prompts that end with the start marker, left padded."""
    inputs = dict(tiny_inputs())
    tail = torch.full((2, 1), START)
    for name, value in (("input_ids", tail), ("attention_mask", tail * 0 + 1), ("mm_token_type_ids", tail * 0)):
        inputs[name] = torch.cat([inputs[name], value.to(inputs[name])], dim=1)
    return inputs


@pytest.mark.parametrize("timing", ["train", "reference"])
@pytest.mark.parametrize("head", ["simple", "glu"])
def test_one_forward_repeats_what_was_decoded(timing: str, head: str) -> None:
    """Teacher forcing agrees with decoding in both timings, and the head stands where the timing says."""
    torch.manual_seed(0)
    model = liven(tiny_latent_model(latent_head=head, latent_head_timing=timing), 3.0)
    inputs = open_inputs()
    output = model.generate(
        **inputs, latent_strategy="fixed", num_latent_steps=[2, 4], max_new_tokens=8, min_new_tokens=8,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    trace, first = output.latent_trace, inputs["input_ids"].shape[1]
    assert trace.num_latent_steps.tolist() == [2, 4]
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}
    with torch.no_grad():
        again = model.replay(trace, **images)
    decoded = torch.stack(output.logits, dim=1)
    torch.testing.assert_close(again.logits[:, first - 1 : -1], decoded, atol=1e-4, rtol=1e-5)
    slots = trace.latent_mask[:, first:]
    states, fed = again.last_hidden_state[:, first - 1 : -1], trace.latent_embeds[:, first:]
    with torch.no_grad():
        expected = states if timing == "reference" else model.latent_head(states)
    torch.testing.assert_close(fed[slots], expected[slots], atol=1e-4, rtol=1e-4)


# Stop rules


def test_distances() -> None:
    target = torch.tensor([1.0, 2.0, 2.0])
    vectors = torch.stack([target, -target, torch.tensor([1.0, 0.0, 0.0])])
    assert latent_distance(vectors, target, "mse").tolist() == pytest.approx([0, 12, 8 / 3])
    assert latent_distance(vectors, target, "mae").tolist() == pytest.approx([0, 10 / 3, 4 / 3])
    assert latent_distance(vectors, target, "cosine").tolist() == pytest.approx([0, 2, 2 / 3], abs=1e-6)
    assert latent_distance(vectors, target, "cosine_batch").tolist() == pytest.approx([8 / 9] * 3)


def end_vector_model(dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    model = tiny_latent_model(latent_stop_vector=True, **fields)
    return liven(model, 6.0).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["mse", "mae", "cosine"])
def test_a_span_closes_at_the_learned_vector(criterion: str, dtype: torch.dtype) -> None:
    """The vector is what the second slot of row 0 is fed: that row has two slots, the other one goes to the cap."""
    model, inputs = end_vector_model(dtype), open_inputs()
    settings = {**inputs, "max_new_tokens": 7, "do_sample": False, "return_dict_in_generate": True}
    free = model.generate(**settings, latent_strategy="fixed", num_latent_steps=5).latent_trace
    with torch.no_grad():
        model.latent_stop_vector.weight.copy_(free.row(0).slot_inputs[1])
    near = {"latent_criterion": criterion, "latent_end_threshold": 1e-5}
    trace = model.generate(**settings, latent_strategy="end_vector", max_latent_steps=[5, 3], **near).latent_trace
    assert trace.num_latent_steps.tolist() == [2, 3]
    assert [span.reason for span in trace.spans] == ["end_vector", "max_latent_steps"]
    given = model.latent_stop_vector.weight.detach().clone()
    with torch.no_grad():
        model.latent_stop_vector.weight.zero_()
    near["latent_stop_vector"] = given
    again = model.generate(**settings, latent_strategy="end_vector", max_latent_steps=[5, 3], **near).latent_trace
    assert again.sequences.tolist() == trace.sequences.tolist(), "the vector of the call wins"


def test_what_was_fed_counts(model: nn.Module) -> None:
    """A vector that a trace hook puts in place of a slot ends the span, not the one that the model made."""
    target = torch.ones(64)

    def second_slot(step: Any) -> torch.Tensor:
        return torch.where((step.count == 1).unsqueeze(-1), target, step.latent)

    for options in ({}, {"use_cache": False}, {"num_beams": 2}):
        trace = model.generate(
            **open_inputs(), latent_strategy="end_vector", latent_stop_vector=target, latent_hook=second_slot,
            max_latent_steps=6, max_new_tokens=9, do_sample=False, return_dict_in_generate=True, **options,
        ).latent_trace  # fmt: skip
        assert trace.num_latent_steps.tolist() == [2, 2]


def test_the_batch_wide_angle_ties_the_rows_together(model: nn.Module) -> None:
    """As published: with `cosine_batch` both rows leave when the mean is near, with `cosine` each on its own."""
    settings = {**open_inputs(), "max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    free = model.generate(**settings, latent_strategy="fixed", num_latent_steps=5).latent_trace
    vector = free.row(0).slot_inputs[0]
    angles = latent_distance(torch.stack([free.row(row).slot_inputs[0] for row in (0, 1)]), vector, "cosine").tolist()
    threshold = angles[1] * 0.75  # above the mean of 0 and the angle of row 1, below that angle
    assert angles[1] > 0.05
    counts = {}
    for criterion in ("cosine", "cosine_batch"):
        options = {"latent_criterion": criterion, "latent_end_threshold": threshold, "latent_stop_vector": vector}
        trace = model.generate(**settings, latent_strategy="end_vector", max_latent_steps=5, **options).latent_trace
        counts[criterion] = trace.num_latent_steps.tolist()
    assert counts["cosine_batch"] == [1, 1] and counts["cosine"][0] == 1 < counts["cosine"][1]


@pytest.mark.parametrize("threshold", [1e6, 0.0])
def test_the_habits_of_the_published_loop(threshold: float, inputs: dict[str, torch.Tensor]) -> None:
    """A large threshold keeps a span of the text from opening, and a start marker said by a slot restarts the cap."""
    stock, model = tiny_pair(0, 6.0)
    vector, prompt = torch.ones(64), {name: value[:1] for name, value in inputs.items() if name != "pixel_values"}
    prompt["pixel_values"] = inputs["pixel_values"][: int(prompt["image_grid_thw"].prod())]
    keep = prompt["attention_mask"][0].bool()
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        prompt[name] = prompt[name][:, keep]
    script = {1: START, 3: START, 8: START}
    output = model.generate(
        **prompt, latent_strategy="end_vector_reference", latent_stop_vector=vector, latent_end_threshold=threshold,
        max_latent_steps=3, max_new_tokens=12, do_sample=False, return_dict_in_generate=True,
        latent_ids="readable", latent_budget="reference",
        logits_processor=[ScriptProcessor([script], prompt["input_ids"].shape[1])],
    )  # fmt: skip
    naive = naive_generate(
        stock, prompt["input_ids"], prompt["pixel_values"], prompt["image_grid_thw"], strategy="end_vector",
        start_id=START, slot_id=SLOT, end_id=END, eos_ids=[model.generation_config.eos_token_id], max_new_tokens=12,
        max_latent_steps=3, latent_ids="readable", latent_budget="reference", script=script, reference=True,
        stop_vector=vector, end_threshold=threshold,
    )  # fmt: skip
    first = prompt["input_ids"].shape[1]
    assert output.sequences[0, first:].tolist() == naive.ids
    assert output.latent_trace.latent_mask[0, first:].tolist() == naive.is_latent
    assert sum(naive.is_latent) == (0 if threshold else 5 + 3), "slots 2 to 6 and 9 to 11"


# Names, and what cannot work


def test_the_published_names() -> None:
    """`latent` means LVR's strategy on an LVR model and LASER's on others; `steps` means `fixed` on all."""
    inputs = {**tiny_inputs(), "max_new_tokens": 2, "return_dict_in_generate": True}
    lvr = tiny_latent_model(latent_method="lvr", latent_stop_vector=True, latent_generation=LVR.generation)
    for model, name, meant in (
        (lvr, "latent", "end_vector"),
        (lvr, None, "fixed"),
        (lvr, "steps", "fixed"),
        (tiny_latent_model(latent_method="laser"), "latent", "dynamic"),
        (tiny_latent_model(), "latent", "dynamic"),
    ):
        trace = model.generate(**inputs, latent_strategy=name).latent_trace
        assert trace.info["strategy"] == meant


def test_what_cannot_work_is_refused_at_the_call(model: nn.Module) -> None:
    inputs = dict(tiny_inputs())
    with pytest.raises(ValueError, match=r"'end_vector' needs a model with a learned end vector, .* trained without"):
        model.generate(**inputs, latent_strategy="end_vector")
    with pytest.raises(
        ValueError, match=r"'mode_switch' needs a model trained with a latent head, .* use latent_strat"
    ):
        model.generate(**inputs, latent_strategy="mode_switch")
    with pytest.raises(ValueError, match="latent_stop_vector has 3 entries, the model 64; give one of its size"):
        model.generate(**inputs, latent_strategy="end_vector", latent_stop_vector=torch.ones(3))
    for name, value, said in (
        ("latent_stop_vector", torch.ones(2, 64), r"must be a tensor of floats of shape \(hidden,\)"),
        ("latent_criterion", "l2", r"is unknown; choose one of \['mse', 'mae', 'cosine', 'cosine_batch'\]"),
        ("latent_end_threshold", -0.1, "must be a number of at least 0"),
        ("max_latent_steps", 0, "the least cap is 1"),
        ("num_latent_steps", 3, "does not read"),
    ):
        with pytest.raises(ValueError, match=said):
            model.generate(**inputs, latent_strategy="end_vector", **{name: value})
