"""Decoding against the vectors of the LVR reference code (arXiv 2509.24251; method card, section 6).

The traces of the naive decoder (row by row, padding removed) and of the library's `generate` (batched and left padded,
as published) go through one comparison, `assert_same_decoding`: ids, latent flags and rotary positions must be equal,
vectors within 1e-4 and logits within 2e-4. The model is read from a folder in the published layout.

Published names: `steps` is `fixed`, `latent` is `end_vector_reference`, no strategy at all is `mode_switch`, and
`dynamic` without a forced span where the model has no head (the same rules, for an LM head trained to say the end).

Collected by `test_lvr.py`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from modeling_latent import LATENT_METHODS
from modeling_latent import LatentQwen2_5_VLForConditionalGeneration as LatentModel
from modeling_latent.conversion_latent import load_published
from tests.golden.conftest import each, golden_dir, golden_json
from tests.naive import NaiveResult, naive_generate

FOLDER = golden_dir("lvr")
CASES: list[dict[str, Any]] = golden_json(FOLDER, "decode_cases.json", [])
LAYOUT = LATENT_METHODS["lvr"].published
IDS: dict[str, int] = golden_json(FOLDER, "manifest.json")["special_ids"]
EOS, PAD, IMAGE = (IDS[name] for name in ("eos", "pad", "image"))
HEADS = sorted({case["lvr_head"] for case in CASES if case["lvr_head"]})
TOLERANCE, LOGIT_TOLERANCE = 1e-4, 2e-4  # of the manifest, absolute
NO_CAP = 64  # the published loop without a strategy has none

per_case = each("case", CASES, ids=lambda case: case["name"])
# The naive decoder has one row: it cannot know a distance that is a mean over the batch.
BY_ROW = [case for case in CASES if case["batch"] == 1 or case["generate_kwargs"].get("criterion") != "cosine"]


@pytest.fixture(scope="module")
def decode_tensors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "decode.safetensors")


@dataclass
class Prompt:
    """Inputs of one case or row; `pixel_values` and `image_grid_thw` are `None` without an image."""

    input_ids: torch.Tensor  # [B, L], left padded
    attention_mask: torch.Tensor  # [B, L]
    pixel_values: torch.Tensor | None  # [patches, 1176]
    image_grid_thw: torch.Tensor | None  # [images, 3]


def read_prompt(case: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Prompt:
    name, images = case["name"], load_file(FOLDER / "images.safetensors")
    chosen = tensors[f"{name}/image_ids"].tolist() if f"{name}/image_ids" in tensors else []
    pixels = [images[f"image_{index}/pixel_values_q"].float() / 64 for index in chosen]
    return Prompt(
        tensors[f"{name}/input_ids"],
        tensors[f"{name}/attention_mask"],
        torch.cat(pixels) if pixels else None,
        tensors[f"{name}/image_grid_thw"] if pixels else None,
    )


def split_rows(prompt: Prompt) -> list[Prompt]:
    """The same prompts one by one, without padding; images are assigned by counting their placeholders."""
    rows, image, patch = [], 0, 0
    for ids, mask in zip(prompt.input_ids, prompt.attention_mask, strict=True):
        ids = ids[mask.bool()]
        left, first_image, first_patch = int((ids == IMAGE).sum()), image, patch
        while left > 0:
            patches = int(prompt.image_grid_thw[image].prod())
            left, image, patch = left - patches // 4, image + 1, patch + patches
        assert left == 0, "an image is split between two rows"
        pixels = grids = None
        if image > first_image:
            pixels, grids = prompt.pixel_values[first_patch:patch], prompt.image_grid_thw[first_image:image]
        rows.append(Prompt(ids[None], torch.ones_like(ids)[None], pixels, grids))
    assert prompt.image_grid_thw is None or image == len(prompt.image_grid_thw), "an image belongs to no row"
    return rows


def quotas(case: dict[str, Any]) -> list[int]:
    steps = case["generate_kwargs"]["lvr_steps"]
    steps = steps if isinstance(steps, list) else [steps]
    return steps * case["batch"] if len(steps) == 1 else steps


# What both decoders answer


@dataclass
class Decoding:
    """One decoded case in the layout of the vectors; F forwards, B rows, rows that ended early are filled up."""

    generated: torch.Tensor  # [B, F]
    is_latent: torch.Tensor  # [B, F] bool, the id written by a step is a slot
    fed: torch.Tensor  # [F, B, H], zero where no slot is fed
    hidden: torch.Tensor  # [F, B, H]
    positions: torch.Tensor  # [3, B, F - 1] of the generated ids
    logits: tuple[torch.Tensor, torch.Tensor]  # [B, V] of the first and of the last forward


def row_lengths(case: dict[str, Any], generated: torch.Tensor, is_latent: torch.Tensor) -> list[int]:
    """Number of ids that each row generated before it ended; a slot ends no row."""
    lengths, budget = [], case["generate_kwargs"]["max_new_tokens"]
    for ids, latent in zip(generated.tolist(), is_latent.tolist(), strict=True):
        ends = [s + 1 for s, token in enumerate(ids) if (token == EOS or s + 1 >= budget) and not latent[s]]
        lengths.append(min(ends, default=len(ids)))
    return lengths


def assert_same_decoding(case: dict[str, Any], tensors: dict[str, torch.Tensor], ours: Decoding) -> None:
    name, first = case["name"], tensors[f"{case['name']}/input_ids"].shape[1]
    mode = tensors[f"{name}/mode_in"].bool()  # [F, B]
    assert ours.generated.tolist() == tensors[f"{name}/sequences"][:, first:].tolist() == case["new_tokens"]
    assert len(mode) == case["n_forwards"] == ours.generated.shape[1]
    assert ours.is_latent[:, :-1].T.tolist() == mode[1:].tolist() and not mode[0].any()
    assert not ours.is_latent[:, -1].any(), "a span is open at the end"
    assert ours.is_latent.sum(1).tolist() == case["n_latent_forwards"]
    mask, prefill = tensors[f"{name}/attention_mask"].bool(), tensors[f"{name}/prefill_position_ids"]
    lengths = row_lengths(case, ours.generated, ours.is_latent)
    for row, length in enumerate(lengths):
        assert (ours.generated[row, length:] == PAD).all()
        for key, mine in (("fed_latent", ours.fed), ("hidden_out", ours.hidden)):
            close(mine[:length, row], tensors[f"{name}/{key}"][:length, row], TOLERANCE)
        start = int(prefill[:, row, mask[row]].max()) + 1  # a generated id goes on after the largest position
        expected = (start + torch.arange(length - 1)).expand(3, -1)
        assert torch.equal(ours.positions[:, row, : length - 1], expected)
    close(ours.logits[0], tensors[f"{name}/logits_first"], LOGIT_TOLERANCE)
    alive = [row for row, length in enumerate(lengths) if length == len(mode)]
    close(ours.logits[1][alive], tensors[f"{name}/logits_last"][alive], LOGIT_TOLERANCE)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


# The naive decoder, row by row


@pytest.fixture(scope="module")
def published_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    """Folders as the published code saves them: with or without a head, always with the learned end vector."""
    root = tmp_path_factory.mktemp("lvr")
    config, made = golden_json(FOLDER, "tiny_config.json"), {}

    def folder(head: str | None) -> Path:
        if head not in made:
            made[head] = root / str(head)
            made[head].mkdir()
            keys = {"lvr_head": head is not None, "lvr_head_type": head or "simple", "latent_end_token": True}
            text = json.dumps({**config, **keys, "architectures": ["QwenWithLVR"]})
            (made[head] / "config.json").write_text(text)
            names = ["tiny_model", "tiny_latent_end", *([f"tiny_lvr_head_{head}"] if head else [])]
            weights = {
                key: value for name in names for key, value in load_file(FOLDER / f"{name}.safetensors").items()
            }
            save_file(weights, made[head] / "model.safetensors", metadata={"format": "pt"})
        return made[head]

    return folder


def plain_head(kind: str | None) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The head of the vectors, written out."""
    if kind is None:
        return None
    tensors = load_file(FOLDER / f"tiny_lvr_head_{kind}.safetensors")
    weights = {name.removeprefix("lvr_head."): value for name, value in tensors.items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    if kind == "simple":
        norm = weights["ln_q.weight"], weights["ln_q.bias"], 1e-6
        return lambda x: linear("mlp.2", F.gelu(linear("mlp.0", F.layer_norm(x, x.shape[-1:], *norm))))
    return lambda x: linear("down_proj", F.silu(linear("gate_proj", x)) * linear("up_proj", x))


def naive_rows(case: dict[str, Any], model: torch.nn.Module, prompt: Prompt) -> list[NaiveResult]:
    asked, results = case["generate_kwargs"], []
    for number, row in enumerate(split_rows(prompt)):
        options: dict[str, Any] = {"strategy": "mode_switch", "max_latent_steps": NO_CAP}
        if asked.get("decoding_strategy") == "steps":
            options = {"strategy": "fixed", "num_latent_steps": quotas(case)[number]}
        elif asked.get("decoding_strategy") == "latent":
            options = {"strategy": "end_vector", "max_latent_steps": quotas(case)[0]}
            options["stop_vector"] = load_file(FOLDER / "tiny_latent_end.safetensors")["lvr_latent_end_emb"]
            options.update(criterion=asked["criterion"], end_threshold=asked["lvr_end_threshold"])
        results.append(
            naive_generate(
                model,
                row.input_ids,
                row.pixel_values,
                row.image_grid_thw,
                start_id=IDS["lvr_start"],
                slot_id=IDS["lvr"],
                end_id=IDS["lvr_end"],
                eos_ids=[EOS],
                max_new_tokens=asked["max_new_tokens"],
                latent_ids="readable",
                latent_budget="reference",
                head=plain_head(case["lvr_head"]),
                reference=True,
                **options,
            )
        )
    return results


def naive_decoding(results: list[NaiveResult], logits_last: torch.Tensor) -> Decoding:
    """Rows side by side; rows that ended early are filled with the pad id and zeros."""
    rows, steps, width = len(results), max(len(row.ids) for row in results), results[0].hidden[0].shape[-1]
    ours = Decoding(
        generated=torch.full((rows, steps), PAD),
        is_latent=torch.zeros(rows, steps, dtype=torch.bool),
        fed=torch.zeros(steps, rows, width),
        hidden=torch.zeros(steps, rows, width),
        positions=torch.zeros(3, rows, steps - 1, dtype=torch.long),
        logits=(torch.stack([row.logits[0] for row in results]), logits_last.clone()),
    )
    for number, row in enumerate(results):
        length, latent = len(row.ids), torch.tensor(row.is_latent)
        ours.generated[number, :length] = torch.tensor(row.ids)
        ours.is_latent[number, :length] = latent
        ours.hidden[:length, number] = torch.stack(row.hidden)
        if length > 1:
            ours.fed[1:length, number] = torch.stack(row.fed) * latent[:-1, None]
            ours.positions[:, number, : length - 1] = torch.stack(row.positions, dim=1)
        if length == steps:
            ours.logits[1][number] = row.logits[-1]
    return ours


@pytest.fixture(scope="module")
def stock_model(published_folder: Callable[[str | None], Path]) -> Qwen2_5_VLForConditionalGeneration:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(published_folder(None), attn_implementation="eager")
    return model.float().eval()


@each("case", BY_ROW, ids=lambda case: case["name"])
def test_naive_decoder_reproduces_the_vectors(
    case: dict[str, Any],
    decode_tensors: dict[str, torch.Tensor],
    stock_model: Qwen2_5_VLForConditionalGeneration,
) -> None:
    results = naive_rows(case, stock_model, read_prompt(case, decode_tensors))
    last = decode_tensors[f"{case['name']}/logits_last"]
    assert_same_decoding(case, decode_tensors, naive_decoding(results, last * 0))


# The library, batched and left padded as published


@pytest.fixture(scope="module")
def latent_model(published_folder: Callable[[str | None], Path]) -> Callable[[str | None], LatentModel]:
    """The published folder in the library's class, with the head where the published decoder has it."""
    made: dict[str | None, LatentModel] = {}

    def model(head: str | None) -> LatentModel:
        if head not in made:
            folder = published_folder(head)
            stock = AutoConfig.from_pretrained(folder)
            ids = {field: getattr(stock, key) for field, key in LAYOUT.token_ids.items()}
            config = LatentModel.config_class.from_stock(stock, method="lvr", latent_head_timing="reference", **ids)
            made[head] = load_published(
                LatentModel, config, LAYOUT, folder, None, (), dtype=torch.float32, attn_implementation="eager"
            )
        return made[head]

    return model


def library_options(case: dict[str, Any]) -> dict[str, Any]:
    asked = case["generate_kwargs"]
    published = asked.get("decoding_strategy")
    if published == "steps":
        return {"latent_strategy": "steps", "num_latent_steps": quotas(case)}
    if published == "latent":
        criterion = {"cosine": "cosine_batch"}.get(asked["criterion"], asked["criterion"])
        return {
            "latent_strategy": "end_vector_reference",
            "max_latent_steps": quotas(case)[0],
            "latent_criterion": criterion,
            "latent_end_threshold": asked["lvr_end_threshold"],
        }
    if case["lvr_head"]:
        return {"latent_strategy": "mode_switch", "max_latent_steps": NO_CAP}
    return {"latent_strategy": "dynamic", "force_span": False, "max_latent_steps": NO_CAP}


def library_decoding(case: dict[str, Any], model: LatentModel, prompt: Prompt, **options: Any) -> Decoding:
    """`generate` in the mode of the reference: readable slots, an open span overrides the budget."""
    images = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        output = model.generate(
            input_ids=prompt.input_ids,
            attention_mask=prompt.attention_mask,
            mm_token_type_ids=(prompt.input_ids == IMAGE).long(),
            **{name: value for name, value in images.items() if value is not None},
            max_new_tokens=case["generate_kwargs"]["max_new_tokens"],
            eos_token_id=EOS,
            pad_token_id=PAD,
            do_sample=False,
            return_dict_in_generate=True,
            latent_ids="readable",
            latent_budget="reference",
            **{**library_options(case), **options},
        )
    finally:
        handle.remove()
    trace, length = output.latent_trace, prompt.input_ids.shape[1]
    slot_inputs = trace.dense("slot_inputs")[:, length:]
    fed = torch.zeros(len(outputs), *slot_inputs[:, 0].shape)
    fed[1:] = slot_inputs[:, :-1].transpose(0, 1)
    return Decoding(
        generated=output.sequences[:, length:],
        is_latent=trace.latent_mask[:, length:],
        fed=fed,
        hidden=torch.stack([one.last_hidden_state[:, -1] for one in outputs]),
        positions=trace.position_ids[-3:, :, length:-1],
        logits=(outputs[0].logits[:, -1], outputs[-1].logits[:, -1]),
    )


@per_case
def test_library_reproduces_the_vectors(
    case: dict[str, Any],
    decode_tensors: dict[str, torch.Tensor],
    latent_model: Callable[[str | None], LatentModel],
) -> None:
    ours = library_decoding(case, latent_model(case["lvr_head"]), read_prompt(case, decode_tensors))
    assert_same_decoding(case, decode_tensors, ours)
    # What a slot is fed is what the step before returned, bit for bit.
    for row, step in ours.is_latent[:, :-1].nonzero().tolist():
        assert torch.equal(ours.fed[step + 1, row], ours.hidden[step, row])


@each("head", HEADS)
def test_where_the_head_stands_matters(
    head: str, decode_tensors: dict[str, torch.Tensor], latent_model: Callable[[str | None], LatentModel]
) -> None:
    """The vectors tell the timings apart: the model without its head decodes something else."""
    for case in (case for case in CASES if case["lvr_head"] == head):
        options = {} if case["generate_kwargs"].get("decoding_strategy") else {"latent_strategy": "dynamic"}
        if options:
            options["force_span"] = False
        ours = library_decoding(case, latent_model(None), read_prompt(case, decode_tensors), **options)
        if case["n_latent_forwards"] != [0]:
            with pytest.raises(AssertionError):
                assert_same_decoding(case, decode_tensors, ours)
