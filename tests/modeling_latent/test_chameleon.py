"""Chameleon with latents: its forward against the stock class, and an LM head that never says an image token."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import ChameleonForConditionalGeneration, ChameleonModel
from trl.trainer.utils import add_fused_lm_head

from modeling_latent import LatentChameleonForConditionalGeneration, convert_stock_checkpoint, load_latent_model
from modeling_latent.latent_plan import LatentPlan
from modeling_latent.modeling_latent_chameleon import SILENCED_LOGIT, TextTokenHead, runs_of
from tests.latent import tiny_latent_model, tiny_pair
from tests.tiny import CHAMELEON, tiny_inputs, tiny_processor
from trainers.latent_forward import trl_forward
from trainers.tiny_chameleon import save_tiny_chameleon_checkpoint

HIDDEN, SCALE = 64, 2.0


@pytest.fixture(scope="module")
def model() -> LatentChameleonForConditionalGeneration:
    return tiny_pair(0, SCALE, CHAMELEON)[1]


@pytest.fixture(scope="module")
def stock() -> ChameleonForConditionalGeneration:
    return tiny_pair(0, SCALE, CHAMELEON)[0]


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Two rows with an image each, the first one padded on the left."""
    return dict(tiny_inputs(family=CHAMELEON))


@pytest.fixture
def labelled(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with labels on the last four tokens."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    return {**inputs, "labels": labels}


@pytest.fixture
def latents(inputs: dict[str, torch.Tensor]) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Inputs with three slots, the mask of them, and dense vectors that are not a number anywhere else."""
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[0, -5:-3], mask[1, -2] = True, True
    embeds = torch.full((*mask.shape, HIDDEN), float("nan"))
    embeds[mask] = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    slot = tiny_processor(CHAMELEON).latent_token_id
    return {**inputs, "input_ids": inputs["input_ids"].masked_fill(mask, slot)}, mask, embeds


def image_columns(model: nn.Module) -> torch.BoolTensor:
    """`(vocabulary,)` columns of image tokens."""
    columns = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    columns[[token for name, token in model.config.vocabulary_map.items() if name.startswith("IMGIMG")]] = True
    return columns


def by_hand(
    stock: nn.Module, inputs: dict[str, torch.Tensor], mask: torch.Tensor, embeds: torch.Tensor
) -> torch.Tensor:
    """Logits of the stock class on embeddings that were put in their places here."""
    with torch.no_grad():
        x = stock.get_input_embeddings()(inputs["input_ids"])
        places = (inputs["input_ids"] == stock.config.image_token_id) & ~mask
        x[places] = stock.model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
        x[mask] = embeds[mask]
        return stock(inputs_embeds=x, attention_mask=inputs["attention_mask"]).logits


def run(model: nn.Module, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


# Forward


def test_signatures_are_those_of_the_stock_classes(model: nn.Module) -> None:
    ours, theirs = (
        inspect.signature(model.forward).parameters,
        inspect.signature(ChameleonForConditionalGeneration.forward).parameters,
    )
    added = {"latent_embeds", "latent_mask", "latent_plan"}
    assert set(ours) - set(theirs) == added | {"return_dict", "num_items_in_batch"}
    assert set(theirs) - {"self"} <= set(ours)
    backbone = set(inspect.signature(model.model.forward).parameters)
    assert backbone == (set(inspect.signature(ChameleonModel.forward).parameters) - {"self"}) | added


def test_without_latents_it_is_the_stock_model(model: nn.Module, stock: nn.Module, inputs: dict) -> None:
    expected = run(stock, **inputs)
    assert torch.equal(run(model, **inputs), expected)
    changed = run(stock, **{**inputs, "pixel_values": inputs["pixel_values"].flip(0)})
    assert (changed[:, -1] - expected[:, -1]).abs().max() > 1e-3, "the images make no difference here"


def test_latents_and_images_are_put_in_their_places(model: nn.Module, stock: nn.Module, latents: tuple) -> None:
    inputs, mask, embeds = latents
    expected = by_hand(stock, inputs, mask, embeds)
    torch.testing.assert_close(run(model, **inputs, latent_embeds=embeds), expected)
    encoded = {"image": model.model.get_image_features(inputs.pop("pixel_values"))}
    torch.testing.assert_close(run(model, **inputs, latent_embeds=embeds, mm_encoder_outputs=encoded), expected)


def test_placeholders_are_found_by_id_beside_embeddings(model: nn.Module, stock: nn.Module, inputs: dict) -> None:
    """Embeddings with noise in them, as adversarial training or a soft prompt makes them, equal no token's."""
    x = model.get_input_embeddings()(inputs["input_ids"])
    noisy = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    places = inputs["input_ids"] == model.config.image_token_id
    clean = noisy.masked_scatter(places.unsqueeze(-1), x[places])
    ids = inputs.pop("input_ids")
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        run(stock, **inputs, inputs_embeds=noisy.detach())
    expected = run(stock, **inputs, inputs_embeds=clean.detach())
    torch.testing.assert_close(run(model, **inputs, input_ids=ids, inputs_embeds=noisy), expected)


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_latent_is_never_taken_for_an_image(
    model: nn.Module, stock: nn.Module, latents: tuple, with_ids: bool
) -> None:
    """Neither by its id nor by its vector."""
    inputs, mask, embeds = latents
    placeholder = model.get_input_embeddings().weight[model.config.image_token_id].detach()
    embeds[1, -2] = placeholder
    inputs["input_ids"][0, -4] = model.config.image_token_id
    expected = by_hand(stock, inputs, mask, embeds)
    if not with_ids:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    torch.testing.assert_close(run(model, **inputs, latent_embeds=embeds, latent_mask=mask), expected)


def test_images_given_twice_are_refused(model: nn.Module, latents: tuple) -> None:
    inputs, _, embeds = latents
    encoded = {"image": model.model.get_image_features(inputs["pixel_values"])}
    with pytest.raises(ValueError, match="the same images twice"):
        run(model, **inputs, latent_embeds=embeds, mm_encoder_outputs=encoded)


def test_image_features_have_no_graph_through_the_encoder(model: nn.Module, stock: nn.Module, inputs: dict) -> None:
    pixels = inputs["pixel_values"]
    ours, theirs = model.model.get_image_features(pixels), stock.model.get_image_features(pixels)
    assert torch.equal(ours.pooler_output, theirs.pooler_output) and ours.pooler_output.requires_grad
    assert not ours.last_hidden_state.requires_grad and theirs.last_hidden_state.requires_grad
    as_tuple = model.model.get_image_features(pixels, return_dict=False)
    assert isinstance(as_tuple, tuple) and any(torch.equal(part, ours.pooler_output) for part in as_tuple)
    half = tiny_latent_model(family=CHAMELEON).to(torch.bfloat16)
    assert half.model.get_image_features(pixels).pooler_output.dtype == torch.bfloat16


# Rows of a batch


def test_rows_of_a_batch_are_what_they_are_alone(model: nn.Module, inputs: dict) -> None:
    """Questions of different length, image starts in different columns, 2 and 1 slots: the reference mixes them up."""
    model = tiny_latent_model(family=CHAMELEON, latent_patch_token_id=570)
    model.load_state_dict(tiny_pair(0, SCALE, CHAMELEON)[1].state_dict())
    slot, patch, pad = model.config.latent_token_id, 570, model.config.pad_token_id
    rows = []
    for number, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        text = ids[mask.bool()].tolist()
        rows.append([*[40 + number] * (3 * number), *text, *([*[patch] * 3, slot] * (2 - number)), 50, 51])
    width = max(map(len, rows))
    starts = [row.index(model.config.image_token_id) for row in rows]
    assert len({len(row) for row in rows}) == len(set(starts)) == 2
    plan = LatentPlan(patch_order="index_then_kth")
    for side in ("left", "right"):
        fill = [[pad] * (width - len(row)) for row in rows]
        ids = torch.tensor([gap + row if side == "left" else row + gap for gap, row in zip(fill, rows, strict=True)])
        together = model(
            input_ids=ids,
            attention_mask=(ids != pad).long(),
            pixel_values=inputs["pixel_values"],
            latent_plan=plan,
        )
        for number, row in enumerate(rows):
            pixels = inputs["pixel_values"][number : number + 1]
            alone = model(input_ids=torch.tensor([row]), pixel_values=pixels, latent_plan=plan)
            real = ids[number] != pad
            torch.testing.assert_close(together.logits[number][real], alone.logits[0], atol=1e-4, rtol=0)
            shift = int(real.long().argmax())
            chosen, single = together.plan_output.patch_columns[number][real], alone.plan_output.patch_columns[0]
            assert torch.equal(torch.where(chosen >= 0, chosen - shift, -1), single) and (single >= 0).sum() >= 3


# The LM head


def test_runs_of_ids() -> None:
    assert runs_of([]) == () and runs_of([7]) == ((7, 8),)
    assert runs_of([4, 5, 6, 9, 11, 12]) == ((4, 7), (9, 10), (11, 13))


def test_image_tokens_have_the_lowest_logit(model: nn.Module, inputs: dict) -> None:
    logits, columns = run(model, **inputs), image_columns(model)
    assert columns.sum() == 64
    assert bool((logits[..., columns] == torch.finfo(torch.float32).min).all())
    assert bool((logits[..., ~columns].abs() < 1e3).all())
    assert torch.equal(model.lm_head.bias, torch.where(columns, SILENCED_LOGIT, 0.0))


def fused(model: nn.Module, **options: Any) -> nn.Module:
    """A copy of a model under TRL's fused head."""
    model = copy.deepcopy(model)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits"), **options)
    return model


def test_the_fused_head_of_trl_has_the_loss_and_the_gradients(
    model: nn.Module, stock: nn.Module, labelled: dict
) -> None:
    """Without the bias that the head shows, the loss would be another one."""
    expected = stock(**labelled).loss
    ours, theirs = copy.deepcopy(model).train(), fused(model).train()
    plain, output = ours(**labelled), theirs(**labelled, fused_lm_head=True)
    assert plain.logits is None
    torch.testing.assert_close(plain.loss, expected)
    torch.testing.assert_close(output.loss, expected)
    plain.loss.backward()
    output.loss.backward()
    named = dict(theirs.named_parameters())
    trained = [(name, parameter.grad) for name, parameter in ours.named_parameters() if parameter.grad is not None]
    assert len(trained) > 20 and not any("vqmodel" in name for name, _ in trained)
    for name, gradient in trained:
        assert bool(torch.isfinite(named[name].grad).all()), name
        torch.testing.assert_close(named[name].grad, gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert not ours.lm_head.weight.grad[image_columns(model)].any()
    assert not theirs.lm_head.weight.grad[image_columns(model)].any()
    theirs.lm_head = nn.Linear(HIDDEN, model.config.vocab_size, bias=False)
    theirs.lm_head.weight = ours.lm_head.weight
    assert abs(theirs(**labelled, fused_lm_head=True).loss - expected) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_head_is_finite_at_any_temperature(model: nn.Module, labelled: dict, dtype: torch.dtype) -> None:
    low = fused(model, temperature=0.3).to(dtype)
    output = low.train()(**labelled, fused_lm_head=True)
    output.loss.backward()
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits"):
        assert bool(torch.isfinite(output[name]).all()), name
    assert bool(torch.isfinite(low.lm_head.weight.grad).all())


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_stays_silent_whatever_is_done_to_the_model(tied: bool, inputs: dict, tmp_path: Path) -> None:
    model = tiny_latent_model(family=CHAMELEON, tie_word_embeddings=tied)
    columns, rows = image_columns(model), model.config.vocab_size
    assert [name for name, _ in model.lm_head.named_parameters()] == ["weight"] and not list(model.lm_head.buffers())
    assert not [name for name in model.state_dict() if name.endswith("lm_head.bias")]

    def check(changed: nn.Module, size: int) -> None:
        head, bias = changed.get_output_embeddings(), changed.get_output_embeddings().bias
        assert isinstance(head, TextTokenHead) and bias.shape == (size,) and not bias.requires_grad
        assert bias.dtype == head.weight.dtype and bias.device == head.weight.device
        expected = nn.functional.pad(torch.where(columns, SILENCED_LOGIT, 0.0), (0, size - rows)).to(bias.dtype)
        assert head.weight.is_meta or torch.equal(bias, expected)
        assert (head.weight is changed.get_input_embeddings().weight) == tied

    for size in (rows + 24, rows + 8):  # more rows, then fewer
        model.resize_token_embeddings(size, mean_resizing=size > rows + 8)
        check(model, size)
    check(copy.deepcopy(model).to(torch.bfloat16), size)
    model.save_pretrained(tmp_path)
    check(LatentChameleonForConditionalGeneration.from_pretrained(tmp_path), size)
    with torch.device("meta"):
        meta = LatentChameleonForConditionalGeneration._from_config(model.config)
    meta.tie_weights()
    check(meta, size)
    logits = run(model, **inputs)
    assert bool((logits[..., : len(columns)][..., columns] == torch.finfo(torch.float32).min).all())


def test_rows_of_an_adapter_leave_the_head_silent(labelled: dict) -> None:
    """PEFT's trainable tokens wrap the head and multiply with the weight alone; neither path may forget the bias."""
    model = tiny_latent_model(family=CHAMELEON)
    expected = model(**labelled).loss
    add_fused_lm_head(model)
    rows = [model.config.latent_start_token_id, model.config.latent_end_token_id]
    config = LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": rows, "lm_head": rows}
    )
    adapted = get_peft_model(model, config)
    forward = trl_forward(model)
    assert not isinstance(model.get_output_embeddings(), TextTokenHead)
    logits = adapted(**{name: value for name, value in labelled.items() if name != "labels"}).logits
    assert bool((logits[..., image_columns(model)] == torch.finfo(torch.float32).min).all())
    torch.testing.assert_close(adapted(**labelled).loss, expected)
    output = forward(**labelled, fused_lm_head=True)
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    deltas = [p.grad for name, p in adapted.named_parameters() if "trainable_tokens_delta" in name]
    assert len(deltas) == 2 and all(bool(torch.isfinite(grad).all()) for grad in deltas) and deltas[1].any()
    adapted.to(torch.bfloat16)  # the bias follows where the weight goes
    forward(**{**labelled, "pixel_values": labelled["pixel_values"].bfloat16()}, fused_lm_head=True)
    assert model.get_output_embeddings().bias.dtype == torch.bfloat16


def test_the_bias_of_a_sharded_head() -> None:
    """DTensors of FSDP2 are gathered together; DeepSpeed finds a bias that needs no gathering."""
    head = TextTokenHead.of(nn.Linear(4, 6, bias=False), ((1, 3),))
    expected = head.bias
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        sharded = copy.deepcopy(head)
        sharded.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
        assert torch.equal(sharded.bias.full_tensor(), expected)
    finally:
        distributed.destroy_process_group()

    class Status:
        AVAILABLE, NOT_AVAILABLE = "available", "not available"

        def __init__(self) -> None:
            self.value = self.NOT_AVAILABLE

    head.weight.ds_shape, head.weight.ds_status = head.weight.shape, Status()
    head.weight.data = torch.empty(0)
    assert torch.equal(head.bias, expected) and head.bias.ds_status == Status.AVAILABLE


# Checkpoints


@pytest.mark.parametrize("method", ["laser", "ivtlr"])
def test_a_stock_folder_becomes_a_latent_model(method: str, tmp_path: Path) -> None:
    folder = save_tiny_chameleon_checkpoint(tmp_path / "stock")
    model, processor = convert_stock_checkpoint(folder, method=method)
    ours, theirs = model.state_dict(), ChameleonForConditionalGeneration.from_pretrained(folder).state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name][: len(theirs[name])], theirs[name])]
    assert model.config.image_token_id == processor.image_token_id
    assert model.config.latent_token_id == processor.latent_token_id
    assert processor.latent_patch_token_id == model.config.latent_patch_token_id
    model.save_pretrained(tmp_path / "latent")
    processor.save_pretrained(tmp_path / "latent")
    again, its_processor = load_latent_model(tmp_path / "latent")
    assert type(again) is type(model) and type(its_processor) is type(processor)
    assert not [name for name, value in again.state_dict().items() if not torch.equal(value, ours[name])]
    inputs = tiny_inputs(its_processor)
    assert torch.equal(run(again, **inputs), run(model, **inputs))
