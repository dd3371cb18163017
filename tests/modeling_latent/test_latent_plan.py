"""Plans of dependent slots: a batch equals its rows, gradients, segments, and what is refused."""

import copy
from typing import Any

import pytest
import torch

from modeling_latent.latent_blocks import choose_patches, find_blocks, lay_out_blocks
from modeling_latent.latent_plan import LatentPlan, PlanStep, plan_latents
from tests.latent import tiny_pair
from tests.tiny import FAMILIES, tiny_processor, tiny_prompts

SUFFIXES = ([5, 6, 7, 8, 9], [10, 11], [12, 13, 14])


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return latent_model(request.param)


def latent_model(family: str = "qwen2_5_vl") -> Any:
    model = copy.deepcopy(tiny_pair(0, 6.0, family, None)[1])
    model.config.latent_patch_token_id = model.config.get_text_config().vocab_size - 1
    return model


def rows(model: Any, steps: tuple[int, ...] = (2, 3, 0), patches: int = 1, vision_first: bool = True) -> list[dict]:
    """Prompts of different length with their image, blocks and a suffix; the last has no slot."""
    config, made = model.config, []
    family = config.model_type.removeprefix("latent_")
    prompts = [*tiny_prompts(), tiny_prompts()[0]]
    for prompt, count, suffix in zip(prompts, steps, SUFFIXES, strict=True):
        row = tiny_processor(family).apply_chat_template(
            [prompt], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        images = int((row["input_ids"] == config.image_token_id).sum())
        ids = config.latent_token_id, config.latent_patch_token_id
        blocks = lay_out_blocks(count, patches, images, *ids, vision_first)
        row = dict(row, input_ids=torch.tensor([row["input_ids"][0].tolist() + blocks + suffix]))
        made.append(completed(row, len(suffix)))
    return made


def completed(row: dict, num_labels: int) -> dict:
    ids = row["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, -num_labels:] = ids[:, -num_labels:]
    images = {name: row[name] for name in ("pixel_values", "image_grid_thw")}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **images}


def batched(model: Any, alone: list[dict], side: str) -> dict:
    width = max(row["input_ids"].shape[1] for row in alone)
    batch = {}
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        padded = []
        for row in alone:
            missing = width - row[name].shape[1]
            ends = (0, missing) if side == "right" else (missing, 0)
            padded.append(torch.nn.functional.pad(row[name], ends, value=fill))
        batch[name] = torch.cat(padded)
    return {**batch, **{name: torch.cat([row[name] for row in alone]) for name in ("pixel_values", "image_grid_thw")}}


def call(model: Any, inputs: dict, plan: LatentPlan) -> Any:
    types = (inputs["input_ids"] == model.config.image_token_id).int()
    return model(**inputs, mm_token_type_ids=types, latent_plan=plan)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def assert_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, atol=1e-4 * float(grad.abs().max()) + 1e-9, rtol=1e-3)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("gradient", ["detach", "bptt"])
def test_a_batch_equals_its_rows(model: Any, gradient: str, side: str) -> None:
    """Different lengths and numbers of slots: loss, logits, gradients, and the image tokens that were chosen."""
    alone, plan = rows(model), LatentPlan(gradient=gradient)
    batch = batched(model, alone, side)
    model.eval()  # with logits; there is no dropout
    output = call(model, batch, plan)
    ours = gradients(model, output.loss)
    losses, total = [], 0
    for number, row in enumerate(alone):
        single = call(model, row, plan)
        kept = batch["attention_mask"][number].bool()
        torch.testing.assert_close(output.logits[number, kept], single.logits[0], atol=1e-4, rtol=1e-4)
        shift = 0 if side == "right" else int((~kept).sum())
        columns = output.plan_output.patch_columns[number, kept]
        assert torch.where(columns >= 0, columns - shift, -1).tolist() == single.plan_output.patch_columns[0].tolist()
        count = int((row["labels"][:, 1:] != -100).sum())
        losses.append(single.loss * count)
        total += count
    loss = sum(losses) / total
    torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=1e-5)
    assert_gradients(ours, gradients(model, loss))


def test_both_gradients_have_one_forward_and_only_bptt_reaches_the_slots(model: Any) -> None:
    batch = batched(model, rows(model), "right")
    found = {name: call(model, batch, LatentPlan(gradient=name)) for name in ("detach", "bptt")}
    torch.testing.assert_close(found["detach"].loss, found["bptt"].loss, atol=1e-5, rtol=1e-5)
    assert found["bptt"].plan_output.latent_embeds[found["bptt"].plan_output.latent_mask].requires_grad
    detach, bptt = (gradients(model, output.loss) for output in found.values())
    name = next(name for name in bptt if name.endswith("q_proj.weight"))
    assert (detach[name] - bptt[name]).abs().max() > 0.05 * bptt[name].abs().max()
    row = model.get_input_embeddings().weight.grad
    assert not row[[model.config.latent_token_id, model.config.latent_patch_token_id]].any()


def test_detach_is_the_gradient_of_one_pass_with_the_latents_given(model: Any) -> None:
    batch = batched(model, rows(model), "right")
    output = call(model, batch, LatentPlan())
    ours = gradients(model, output.loss)
    with torch.no_grad():
        plan = call(model, batch, LatentPlan()).plan_output
    slots = batch["input_ids"] == model.config.latent_token_id
    types = (batch["input_ids"] == model.config.image_token_id).int()
    rows_of = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
    table = torch.zeros(*slots.shape, 64).masked_scatter((types > 0)[..., None], torch.cat(list(rows_of)))
    columns = plan.patch_columns.clamp(min=0)[..., None].expand(-1, -1, 64)
    embeds = torch.where(slots[..., None], plan.latent_embeds, table.gather(1, columns))
    given = model(**batch, mm_token_type_ids=types, latent_embeds=embeds, latent_mask=plan.latent_mask)
    torch.testing.assert_close(output.loss, given.loss)
    assert_gradients(ours, gradients(model, given.loss))


def test_activation_checkpointing_is_right_or_refused(model: Any) -> None:
    batch = batched(model, rows(model), "right")
    model.train()
    expected = gradients(model, call(model, batch, LatentPlan()).loss)
    model.activation_checkpointing_enable()
    assert_gradients(gradients(model, call(model, batch, LatentPlan()).loss), expected)
    assert model.is_activation_checkpointing
    with pytest.raises(ValueError, match="latent_gradient='bptt' needs the cache"):
        call(model, batch, LatentPlan(gradient="bptt"))


def test_calls_of_the_layers(model: Any) -> None:
    """n + 1 segments whose lengths add up to the row; `detach` runs the slots, then one full pass."""
    alone = rows(model)[1]
    lengths: list[int] = []
    layer = model.get_decoder().layers[0]
    handle = layer.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    with torch.no_grad():
        call(model, alone, LatentPlan())
    total = alone["input_ids"].shape[1]
    assert len(lengths) == 4 and sum(lengths) == total and lengths[1:3] == [2, 2]
    segments, lengths[:] = list(lengths), []
    call(model, alone, LatentPlan())
    assert lengths == [*segments[:3], total]
    handle.remove()


def test_no_attention_matrix_and_no_eager_kernel(model: Any) -> None:
    batch = batched(model, rows(model), "right")
    assert model.config._attn_implementation == "sdpa"
    widest = batch["input_ids"].shape[1] + 4
    seen: list[torch.Size] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 4 and "softmax" in getattr(func, "__name__", ""):
                seen.append(out.shape)
            return out

    with Watch(), torch.no_grad():
        call(model, batch, LatentPlan())
    text = [shape for shape in seen if shape[1] == model.config.get_text_config().num_attention_heads]
    assert text and all(shape[2] == 1 and shape[3] <= widest for shape in text)


def test_patches_behind_the_slot(model: Any) -> None:
    alone = rows(model, vision_first=False)[1]
    with torch.no_grad():
        plan = call(model, alone, LatentPlan(vision_first=False)).plan_output
        slots = (alone["input_ids"][0] == model.config.latent_token_id).nonzero()[:, 0].tolist()
        hidden = plan.last_hidden_state[0]
        for slot in slots:
            torch.testing.assert_close(plan.latent_embeds[0, slot], hidden[slot - 1])
        assert all(int(plan.patch_columns[0, slot + 1]) >= 0 for slot in slots)
        with pytest.raises(ValueError, match="row 0, position .* does not stand before a slot"):
            call(model, alone, LatentPlan())


def test_chosen_patches_can_be_forced_and_slots_edited() -> None:
    model = latent_model()
    batch = batched(model, rows(model), "left")
    with torch.no_grad():
        plan = call(model, batch, LatentPlan()).plan_output
        images = (batch["input_ids"] == model.config.image_token_id).long().argmax(1, keepdim=True)
        other = torch.where(plan.patch_columns >= 0, images, -1)
        forced = call(model, batch, LatentPlan(forced_patches=other)).plan_output
        assert torch.equal(forced.patch_columns, other) and forced.patch_scores is None
        seen: list[PlanStep] = []
        edited = call(model, batch, LatentPlan(edit=lambda step: seen.append(step) or step.vectors * 0)).plan_output
    slots = batch["input_ids"] == model.config.latent_token_id
    assert not edited.latent_embeds[slots].any() and plan.latent_embeds[slots].any()
    assert [step.active.tolist() for step in seen] == [[True, True, False]] * 2 + [[False, True, False]]
    assert [step.index.tolist() for step in seen] == [[0, 0, 0], [1, 1, 0], [0, 2, 0]]
    assert all(slots[row, step.position[row]] for step in seen for row in range(3) if step.active[row])


def test_slots_by_a_mask_and_other_latents_given() -> None:
    """The mask says where (contract C1), whatever the ids; teacher's latents are fed elsewhere."""
    model = latent_model()
    alone = rows(model, patches=0)[1]
    by_id = call(model, alone, LatentPlan()).plan_output
    slots = alone["input_ids"] == model.config.latent_token_id
    masked = dict(alone, input_ids=alone["input_ids"].masked_fill(slots, 7))
    by_mask = call(model, masked, LatentPlan(slots=slots)).plan_output
    torch.testing.assert_close(by_mask.last_hidden_state, by_id.last_hidden_state)
    first = slots & (slots.cumsum(1) == 1)
    given = {"latent_embeds": by_id.latent_embeds.detach() * 2, "latent_mask": first}
    mixed = call(model, {**alone, **given}, LatentPlan(slots=slots & ~first)).plan_output
    torch.testing.assert_close(mixed.latent_embeds[first], 2 * by_id.latent_embeds[first])
    assert (mixed.latent_embeds - by_id.latent_embeds)[slots & ~first].abs().max() > 1e-3
    types = (masked["input_ids"] == model.config.image_token_id).int()
    latents = plan_latents(model.model, LatentPlan(slots=slots), {**masked, "mm_token_type_ids": types})
    torch.testing.assert_close(latents, by_id.latent_embeds)


@pytest.mark.parametrize("order", ["score", "index_then_kth"])
def test_ties_go_to_the_lower_column(order: str) -> None:
    scores = torch.tensor([[0.5, 0.25, 0.5, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4, 0.5]])
    free = torch.tensor([[True] * 5, [True, True, True, True, False]])
    chosen = choose_patches(scores, free, torch.tensor([3, 2]), order)
    assert chosen.tolist() == [[0, 2, 1], [3, 2, -1]]


def test_blocks_of_different_sizes() -> None:
    ids = torch.tensor([[1, 8, 8, 9, 8, 9, 9, 2], [1, 2, 3, 8, 9, 4, 9, 5]])
    blocks = find_blocks(ids == 9, ids == 8)
    assert blocks.row.tolist() == [0, 0, 0, 1, 1] and blocks.index.tolist() == [0, 1, 2, 0, 1]
    assert blocks.start.tolist() == [1, 4, 6, 3, 6] and blocks.slot.tolist() == [3, 5, 6, 4, 6]
    assert blocks.count.tolist() == [2, 1, 0, 1, 0]
    ids = torch.tensor([[1, 9, 8, 8, 9, 8, 9, 2], [1, 2, 3, 9, 8, 4, 9, 5]])
    behind = find_blocks(ids == 9, ids == 8, vision_first=False)
    assert behind.start.tolist() == behind.slot.tolist() == [1, 4, 6, 3, 6]
    assert behind.count.tolist() == [2, 1, 0, 1, 0] and behind.patch.tolist() == [2, 5, 7, 4, 7]


REFUSED = {
    "no ids": (
        {"input_ids": None, "inputs_embeds": torch.zeros(1, 4, 64)},
        {},
        "pass input_ids, and no inputs_embeds",
    ),
    "latents given": ({"latent_embeds": torch.zeros(1, 1, 64)}, {}, "pass one of the two"),
    "a mask of another shape": ({"attention_mask": torch.ones(1, 3)}, {}, "must have the shape of input_ids"),
    "images twice": ({"mm_encoder_outputs": {"image": object()}}, {}, "two forms of the same images"),
    "videos": ({"pixel_values_videos": torch.zeros(1, 1)}, {}, "reads images, not videos"),
    "an unknown order": ({}, {"patch_order": "random"}, "patch_order='random' is unknown"),
    "an unknown gradient": ({}, {"gradient": "none"}, "gradient='none' is unknown"),
    "unknown images": ({}, {"patch_images": "first"}, "patch_images='first' is unknown"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_inputs(case: str) -> None:
    model = latent_model()
    changed, options, message = REFUSED[case]
    alone = {**rows(model)[0], **changed}
    with pytest.raises(ValueError, match=message), torch.no_grad():
        ids = alone.pop("input_ids")
        model(**{name: value for name, value in alone.items() if name != "labels"}, input_ids=ids,
              latent_plan=LatentPlan(**options))  # fmt: skip


def test_blocks_that_do_not_fit() -> None:
    model = latent_model()
    slot, patch, image = (getattr(model.config, f"{role}_token_id") for role in ("latent", "latent_patch", "image"))
    row = rows(model)[0]
    images = int((row["input_ids"] == image).sum())

    def run(ids: list[int], mask: list[int] | None = None) -> None:
        given = {name: row[name] for name in ("pixel_values", "image_grid_thw")}
        tokens = torch.tensor([ids])
        keep = torch.ones_like(tokens) if mask is None else torch.tensor([mask])
        call(model, {"input_ids": tokens, "attention_mask": keep, **given}, LatentPlan())

    prompt = row["input_ids"][0].tolist()[: -len(SUFFIXES[0]) - 4]
    with pytest.raises(ValueError, match="row 0 begins with a latent"):
        run([slot, *prompt])
    with pytest.raises(ValueError, match="row 0 begins with a latent .position 2."):
        run([0, 0, slot, *prompt], [0, 0] + [1] * (len(prompt) + 1))
    with pytest.raises(ValueError, match=f"row 0, position {len(prompt)}: an inserted image embedding"):
        run([*prompt, patch, 5])
    with pytest.raises(ValueError, match=f"only {images} image tokens come before it; insert fewer"):
        run([*prompt, *[patch] * (images + 1), slot])


def test_a_cache_that_is_not_empty_is_refused() -> None:
    model = latent_model()
    row = rows(model)[0]
    row.pop("labels")
    with torch.no_grad():
        used = call(model, {**row, "use_cache": True}, LatentPlan()).past_key_values
        assert used.get_seq_length() == row["input_ids"].shape[1]
        with pytest.raises(ValueError, match="past_key_values holds .* positions already"):
            call(model, {**row, "past_key_values": used}, LatentPlan())
