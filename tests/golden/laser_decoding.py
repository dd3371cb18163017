"""Decoding against the vectors of the LASER reference code (arXiv 2601.06803; method card, section 6).

One comparison, `assert_same_decoding`, takes the traces of the naive decoder (row by row, padding removed) and of the
library's `generate` (batched and left padded, as published). Ids, latent flags and rotary positions must be equal,
vectors within 1e-4.

Collected by `test_laser.py`.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    LogitsProcessorList,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    RepetitionPenaltyLogitsProcessor,
)

from modeling_latent import LatentQwen2_5_VLForConditionalGeneration as LatentModel
from tests.golden.conftest import each, golden_dir, golden_json
from tests.latent import ScriptProcessor
from tests.naive import NaiveResult, naive_generate

FOLDER = golden_dir("laser")
TENSOR_FILE = "decode.safetensors"
CASES: list[dict[str, Any]] = golden_json(FOLDER, "decode_cases.json", []) if (FOLDER / TENSOR_FILE).is_file() else []
SPECIAL_IDS: dict[str, int] = (
    golden_json(FOLDER, "manifest.json")["files"][TENSOR_FILE]["special_ids"] if CASES else {}
)
START, SLOT, END = (SPECIAL_IDS.get(name) for name in ("laser_start_id", "laser_id", "laser_end_id"))
EOS, PAD, IMAGE = (SPECIAL_IDS.get(name) for name in ("eos", "pad", "image"))
TOLERANCE = 1e-4  # of the manifest, absolute
TOPK_TOLERANCE = 1e-5

per_case = each("case", CASES, ids=lambda case: case["name"])


# What both decoders are asked


@dataclass
class Prompt:
    """The inputs of one case; `pixel_values` and `image_grid_thw` hold the images of all rows, in row order."""

    input_ids: torch.Tensor  # [B, L], left padded
    attention_mask: torch.Tensor  # [B, L]
    pixel_values: torch.Tensor  # [patches, 1176]
    image_grid_thw: torch.Tensor  # [images, 3]


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / TENSOR_FILE)


def read_prompt(case: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Prompt:
    name = case["name"]
    return Prompt(
        input_ids=tensors[f"{name}.input_ids"],
        attention_mask=tensors[f"{name}.attention_mask"],
        pixel_values=torch.cat([tensors[f"image.{letter}"] for letter in case["images"]]),
        image_grid_thw=tensors[f"{name}.image_grid_thw"],
    )


def split_rows(prompt: Prompt) -> list[Prompt]:
    """The same prompts one by one, without padding; images are assigned by counting their placeholders."""
    rows, image, patch = [], 0, 0
    for ids, mask in zip(prompt.input_ids, prompt.attention_mask, strict=True):
        ids = ids[mask.bool()]
        placeholders = int((ids == IMAGE).sum())
        first_image, first_patch = image, patch
        while placeholders > 0:
            patches = int(prompt.image_grid_thw[image].prod())
            placeholders -= patches // 4  # the vision tower merges 2 x 2 patches
            image, patch = image + 1, patch + patches
        assert placeholders == 0, "an image is split between two rows"
        pixels, grids = prompt.pixel_values[first_patch:patch], prompt.image_grid_thw[first_image:image]
        rows.append(Prompt(ids[None], torch.ones_like(ids)[None], pixels, grids))
    assert image == len(prompt.image_grid_thw), "an image belongs to no row"
    return rows


def is_dynamic(case: dict[str, Any]) -> bool:
    return case["strategy"] != "steps"  # the reference treats every other name as dynamic


def quotas(case: dict[str, Any], rows: int) -> list[int]:
    """`steps`: number of latents after each start marker, one per row."""
    steps = case["laser_steps"]
    return steps * rows if len(steps) == 1 else steps


def scripts(case: dict[str, Any], rows: int) -> list[dict[int, int]]:
    """Per row, step -> token."""
    return [{int(step): token for step, token in row.items()} for row in case.get("script", [{}] * rows)]


# What both decoders answer


@dataclass
class Decoding:
    """One decoded case in the layout of the vectors; G steps, B rows, rows that ended early are filled up.

    Only what a row did before it ended is compared, and that the rest is padding.
    """

    generated: torch.Tensor  # [B, G]
    is_latent: torch.Tensor  # [B, G] bool
    fed: torch.Tensor  # [G - 1, B, H], the input of the decode steps
    rope_pos: torch.Tensor  # [G - 1, 3, B]
    hidden: torch.Tensor  # [G, B, H], last position after the final norm
    slot_outputs: torch.Tensor | None = None  # [B, G, H], the state that reading a slot gave
    topk: list[dict[str, Any]] | None = None  # records as in the file

    def saved_mask(self, case: dict[str, Any]) -> torch.Tensor:
        """Which slots the reference saves, `[B, max_new_tokens]`.

        Its buffer misses the first slot of each span (`dynamic`) or the slots that said the end marker (`steps`), and
        has no room beyond the budget.
        """
        if is_dynamic(case):
            saved = self.is_latent.clone()
            saved[:, 0] = False
            saved[:, 1:] &= self.is_latent[:, :-1]
        else:
            saved = self.is_latent & (self.generated != END)
        mask = torch.zeros(len(saved), case["max_new_tokens"], dtype=torch.bool)
        width = min(saved.shape[1], case["max_new_tokens"])
        mask[:, :width] = saved[:, :width]
        return mask

    def saved_states(self, case: dict[str, Any]) -> torch.Tensor:
        """The saved vectors, `[B, max_new_tokens, H]`, zero where nothing is saved."""
        mask = self.saved_mask(case)
        states = torch.zeros(*mask.shape, self.fed.shape[-1])
        for row, step in mask.nonzero().tolist():
            states[row, step] = self.fed[step, row]
        return states


def row_lengths(case: dict[str, Any], generated: torch.Tensor, is_latent: torch.Tensor) -> list[int]:
    """Number of tokens that each row generated before it ended; `is_latent` is `[G - 1, B]` as in the file."""
    lengths = []
    for row, ids in enumerate(generated.tolist()):
        length = len(ids)
        for step in range(len(ids) - 1):
            ended = ids[step] == EOS or step + 1 >= case["max_new_tokens"]
            if ended and not is_latent[step, row]:
                length = step + 1
                break
        lengths.append(length)
    return lengths


def assert_same_decoding(case: dict[str, Any], tensors: dict[str, torch.Tensor], ours: Decoding) -> None:
    """The comparison of one case with its vectors."""
    theirs = {
        field: tensors[f"{case['name']}.{field}"]
        for field in ("generated", "is_latent", "fed", "rope_pos", "hidden", "laser_mask")
    }
    lengths = row_lengths(case, theirs["generated"], theirs["is_latent"])
    steps = theirs["generated"].shape[1]

    assert ours.generated.tolist() == theirs["generated"].tolist() == case["generated_ids"]
    assert ours.is_latent.shape == (len(lengths), steps)
    assert ours.is_latent.sum(1).tolist() == case["latents_fed_per_row"]
    assert max(0, steps - case["max_new_tokens"]) == case["overrun_tokens"]
    assert not ours.is_latent[:, -1].any(), "a span is open at the end"
    assert ours.is_latent[:, :-1].T.tolist() == theirs["is_latent"].bool().tolist()
    for row, length in enumerate(lengths):
        assert (ours.generated[row, length:] == PAD).all()
        assert torch.equal(ours.rope_pos[: length - 1, :, row], theirs["rope_pos"][: length - 1, :, row])
        assert_close(ours.hidden[:length, row], theirs["hidden"][:length, row])
        assert_close(ours.fed[: length - 1, row], theirs["fed"][: length - 1, row])
    assert ours.saved_mask(case).tolist() == theirs["laser_mask"].bool().tolist()
    assert_slots(case, tensors, ours)
    if "save_laser_topk" in case:
        assert_same_topk(case["topk_records"], ours.topk)


def assert_slots(case: dict[str, Any], tensors: dict[str, torch.Tensor], ours: Decoding) -> None:
    """A slot is fed by the state that predicted it, bit for bit; with noise, by the saved noisy state."""
    slots = ours.is_latent.nonzero().tolist()
    if "laser_noise_ratio" in case:
        assert_close(ours.saved_states(case), tensors[f"{case['name']}.laser_states"])
        assert any(not torch.equal(ours.fed[step, row], ours.hidden[step, row]) for row, step in slots)
    else:
        for row, step in slots:
            assert torch.equal(ours.fed[step, row], ours.hidden[step, row]), f"row {row}, step {step}"
    if ours.slot_outputs is not None:
        for row, step in slots:
            assert_close(ours.slot_outputs[row, step], ours.hidden[step + 1, row])


def assert_same_topk(theirs: list[dict[str, Any]], ours: list[dict[str, Any]] | None) -> None:
    assert ours is not None
    assert len(ours) == len(theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        assert {**mine, "topk_probs": None} == {**reference, "topk_probs": None}
        assert mine["topk_probs"] == pytest.approx(reference["topk_probs"], abs=TOPK_TOLERANCE, rel=0)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def slot_numbers(is_latent: list[bool]) -> list[int]:
    """The number of each slot within its span, from 0; -1 in text."""
    numbers, number = [], -1
    for latent in is_latent:
        number = number + 1 if latent else -1
        numbers.append(number)
    return numbers


# The naive decoder, row by row


@pytest.fixture(scope="module")
def stock_model() -> Qwen2_5_VLForConditionalGeneration:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        FOLDER / "tiny_model", dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def naive_rows(case: dict[str, Any], model: torch.nn.Module, prompt: Prompt) -> list[NaiveResult]:
    rows = split_rows(prompt)
    assert len(rows) == 1 or "laser_noise_ratio" not in case, "the order of random draws is per batch"
    results = []
    for row, script, number in zip(rows, scripts(case, len(rows)), range(len(rows)), strict=True):
        options: dict[str, Any] = {"strategy": "dynamic"}
        if not is_dynamic(case):
            options = {"strategy": "fixed", "num_latent_steps": quotas(case, len(rows))[number]}
        elif case["laser_steps"] is not None:
            options["max_latent_steps"] = case["laser_steps"][0]
        if "answer_start_id" in case:
            options["answer_ids"] = [case["answer_start_id"]]
        if "repetition_penalty" in case:
            options["process_scores"] = RepetitionPenaltyLogitsProcessor(case["repetition_penalty"])
        if "torch_seed" in case:
            torch.manual_seed(case["torch_seed"])
        results.append(
            naive_generate(
                model,
                row.input_ids,
                row.pixel_values,
                row.image_grid_thw,
                start_id=START,
                slot_id=SLOT,
                end_id=END,
                eos_ids=[EOS],
                max_new_tokens=case["max_new_tokens"],
                repetition_exit=case.get("repetition_exit", False),
                latent_ids="readable",
                latent_budget="reference",
                script=script,
                noise_ratio=case.get("laser_noise_ratio", 0.0),
                **options,
            )
        )
    return results


def naive_decoding(case: dict[str, Any], results: list[NaiveResult]) -> Decoding:
    """Rows side by side; rows that ended early are filled with the pad id and zeros."""
    rows, steps, width = len(results), max(len(row.ids) for row in results), results[0].hidden[0].shape[-1]
    decoding = Decoding(
        generated=torch.full((rows, steps), PAD),
        is_latent=torch.zeros(rows, steps, dtype=torch.bool),
        fed=torch.zeros(steps - 1, rows, width),
        rope_pos=torch.zeros(steps - 1, 3, rows, dtype=torch.long),
        hidden=torch.zeros(steps, rows, width),
    )
    for number, row in enumerate(results):
        length = len(row.ids)
        decoding.generated[number, :length] = torch.tensor(row.ids)
        decoding.is_latent[number, :length] = torch.tensor(row.is_latent)
        decoding.fed[: length - 1, number] = torch.stack(row.fed)
        decoding.rope_pos[: length - 1, :, number] = torch.stack(row.positions)
        decoding.hidden[:length, number] = torch.stack(row.hidden)
    if "save_laser_topk" in case:
        decoding.topk = naive_topk(results, case["save_laser_topk"])
    return decoding


def naive_topk(results: list[NaiveResult], k: int) -> list[dict[str, Any]]:
    records = []
    for number, row in enumerate(results):
        for step, slot in enumerate(slot_numbers(row.is_latent)):
            if slot >= 0:
                top = row.logits[step].float().softmax(-1).topk(k)
                records.append(topk_record(number, slot, step, top.indices, top.values, row.ids[step]))
    return sorted(records, key=lambda record: (record["generation_step"], record["batch_idx"]))


def topk_record(
    row: int, slot: int, step: int, ids: torch.Tensor, probs: torch.Tensor, selected: int
) -> dict[str, Any]:
    return {
        "batch_idx": row,
        "laser_step": slot,
        "generation_step": step,
        "topk_ids": ids.tolist(),
        "topk_probs": probs.tolist(),
        "selected_token": selected,
    }


@per_case
def test_naive_decoder_reproduces_the_vectors(
    case: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    stock_model: Qwen2_5_VLForConditionalGeneration,
) -> None:
    results = naive_rows(case, stock_model, read_prompt(case, tensors))
    assert_same_decoding(case, tensors, naive_decoding(case, results))
    for row in results:
        assert row.said == [token for token, latent in zip(row.ids, row.is_latent, strict=True) if latent]


# The library, batched and left padded as published


@pytest.fixture(scope="module")
def library_model() -> torch.nn.Module:
    """The same folder in the library's class; the marker ids are those that the checkpoint names `laser_*_id`."""
    config = LatentModel.config_class.from_stock(
        Qwen2_5_VLConfig.from_pretrained(FOLDER / "tiny_model"),
        latent_start_token_id=START,
        latent_token_id=SLOT,
        latent_end_token_id=END,
    )
    model = LatentModel.from_pretrained(
        FOLDER / "tiny_model", config=config, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def library_generate(case: dict[str, Any], model: torch.nn.Module, prompt: Prompt) -> Any:
    """`generate` in the mode of the reference: readable slots, an open span overrides the budget."""
    rows, length = prompt.input_ids.shape
    options: dict[str, Any] = {"latent_strategy": case["strategy"]}
    if not is_dynamic(case):
        options["num_latent_steps"] = quotas(case, rows)
    elif case["laser_steps"] is not None:
        options["max_latent_steps"] = max(case["laser_steps"][0], 1)  # 0 acts as 1 in the reference, is refused here
    if "answer_start_id" in case:
        options["latent_answer_ids"] = [case["answer_start_id"]]
    if "repetition_penalty" in case:
        options["repetition_penalty"] = case["repetition_penalty"]
    if "laser_noise_ratio" in case:
        options.update(latent_noise=case["laser_noise_ratio"], latent_noise_first=not is_dynamic(case))
    if "save_laser_topk" in case:
        options["latent_topk"] = case["save_laser_topk"]
    if "torch_seed" in case:
        torch.manual_seed(case["torch_seed"])
    return model.generate(
        input_ids=prompt.input_ids,
        attention_mask=prompt.attention_mask,
        mm_token_type_ids=(prompt.input_ids == IMAGE).long(),
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid_thw,
        max_new_tokens=case["max_new_tokens"],
        do_sample=False,
        return_dict_in_generate=True,
        output_hidden_states=True,
        repetition_exit=case.get("repetition_exit", False),
        latent_ids="readable",
        latent_budget="reference",
        logits_processor=LogitsProcessorList([ScriptProcessor(scripts(case, rows), length)]),
        **options,
    )


def library_decoding(case: dict[str, Any], model: torch.nn.Module, prompt: Prompt, output: Any) -> Decoding:
    """The one place that knows the names in the library's output; the trace covers prompt and generated tokens."""
    trace = output.latent_trace
    length = prompt.input_ids.shape[1]
    assert output.sequences[:, :length].tolist() == prompt.input_ids.tolist()
    assert not trace.latent_mask[:, :length].any(), "a slot in the prompt"
    generated = output.sequences[:, length:]
    is_latent = trace.latent_mask[:, length:].bool()
    # One tuple of layers a step; the last position of the last one is the state that chose that step's token.
    assert len(output.hidden_states) == generated.shape[1]
    embeds = model.get_input_embeddings()(generated).detach()
    slot_inputs, slot_outputs = (trace.dense(name)[:, length:] for name in ("slot_inputs", "slot_outputs"))
    fed = torch.where(is_latent[..., None], slot_inputs, embeds)
    decoding = Decoding(
        generated=generated,
        is_latent=is_latent,
        fed=fed[:, :-1].transpose(0, 1),
        rope_pos=trace.position_ids[-3:, :, length:-1].permute(2, 0, 1),
        hidden=torch.stack([layers[-1][:, -1] for layers in output.hidden_states]),
        slot_outputs=slot_outputs,
    )
    if "save_laser_topk" in case:
        decoding.topk = []
        for row, latents in enumerate(is_latent.tolist()):
            for step, slot in enumerate(slot_numbers(latents)):
                if slot >= 0:
                    ids, probs = (trace.dense(name)[row, length + step] for name in ("topk_ids", "topk_probs"))
                    decoding.topk.append(topk_record(row, slot, step, ids, probs, int(generated[row, step])))
        decoding.topk.sort(key=lambda record: (record["generation_step"], record["batch_idx"]))
    return decoding


@per_case
def test_library_reproduces_the_vectors(
    case: dict[str, Any], tensors: dict[str, torch.Tensor], library_model: torch.nn.Module
) -> None:
    prompt = read_prompt(case, tensors)
    output = library_generate(case, library_model, prompt)
    assert_same_decoding(case, tensors, library_decoding(case, library_model, prompt, output))
