"""The naive decoder against the stock model, and the rules of a span one by one.

`tests/golden/test_laser_decode.py` checks it against the vectors of a reference code as well.
"""

from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.latent import tiny_pair
from tests.naive import NaiveResult, naive_generate
from tests.tiny import FAMILIES, tiny_inputs

START, SLOT, END, IMAGE, EOS = 90, 91, 92, 95, 1
GRID = torch.tensor([[1, 4, 4], [1, 4, 6]])
PROMPT = torch.tensor([[5, 93, *[IMAGE] * 4, 94, 7, 8, 93, *[IMAGE] * 6, 94, 9, 10]])


@pytest.fixture(scope="module")
def model() -> Qwen2_5_VLForConditionalGeneration:
    """Two layers with large random weights, so that the arg max is never close."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "initializer_range": 0.2,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.2,
        },
        image_token_id=IMAGE,
        vision_start_token_id=93,
        vision_end_token_id=94,
        video_token_id=89,
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(int(GRID.prod(-1).sum()), 1176, generator=torch.Generator().manual_seed(1))


def decode(model: torch.nn.Module, pixels: torch.Tensor, prompt: torch.Tensor = PROMPT, **options: Any) -> NaiveResult:
    arguments = {"eos_ids": [], "max_new_tokens": 12, **options}
    return naive_generate(model, prompt, pixels, GRID, start_id=START, slot_id=SLOT, end_id=END, **arguments)


def open_prompt() -> torch.Tensor:
    return torch.cat([PROMPT, torch.tensor([[START]])], dim=1)


def replay(model: torch.nn.Module, pixels: torch.Tensor, prompt: torch.Tensor, result: NaiveResult) -> torch.Tensor:
    """Logits of every step from one call of the stock head class, latents given as embeddings."""
    ids = torch.cat([prompt, torch.tensor([result.ids[:-1]], dtype=torch.long)], dim=1)
    embeds = model.get_input_embeddings()(ids).detach().clone()
    latents = iter(result.slot_inputs)
    for step, latent in enumerate(result.is_latent[:-1]):
        if latent:
            embeds[0, prompt.shape[1] + step] = next(latents)
    model.model.rope_deltas = None
    with torch.no_grad():
        output = model(
            input_ids=ids,
            inputs_embeds=embeds,
            pixel_values=pixels,
            image_grid_thw=GRID,
            mm_token_type_ids=(ids == IMAGE).long() * (torch.arange(ids.shape[1]) < prompt.shape[1]),
        )
    return output.logits[0, prompt.shape[1] - 1 :]


def test_off_equals_stock_greedy_decoding(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    ours = decode(model, pixels, strategy="off", max_new_tokens=16)
    stock = model.generate(
        input_ids=PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        mm_token_type_ids=(PROMPT == IMAGE).long(),
        pixel_values=pixels,
        image_grid_thw=GRID,
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert ours.ids == stock.sequences[0, PROMPT.shape[1] :].tolist()
    assert len(set(ours.ids)) > 3, "the model says nothing of interest"
    assert not any(ours.is_latent) and not ours.slot_inputs
    torch.testing.assert_close(torch.stack(ours.logits), torch.cat(stock.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_as_the_stock_class_does(family: str) -> None:
    """With the image, its deep-stack features and rotary positions where the family has them."""
    stock, row = tiny_pair(0, 6.0, family)[0], tiny_inputs(family=family)
    count = int(row["image_grid_thw"][0].prod())
    row = {name: row[name][1:] for name in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")} | {
        "pixel_values": row["pixel_values"][count:]
    }
    output = stock.generate(
        **row, max_new_tokens=10, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_logits=True
    )
    unused = {"start_id": 0, "slot_id": 1, "end_id": 2, "latent_ids": "readable"}
    ours = naive_generate(
        stock, row["input_ids"], row["pixel_values"], row["image_grid_thw"], eos_ids=[], max_new_tokens=10, **unused
    )
    assert ours.ids == output.sequences[0, row["input_ids"].shape[1] :].tolist()
    torch.testing.assert_close(torch.stack(ours.logits), torch.cat(output.logits), atol=1e-4, rtol=1e-4)


def test_off_stops_at_eos(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    free = decode(model, pixels, strategy="off").ids
    eos = free[3]
    assert decode(model, pixels, strategy="off", eos_ids=[eos]).ids == free[: free.index(eos) + 1]


def test_off_ignores_markers(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    result = decode(model, pixels, open_prompt(), strategy="off", script={2: START}, latent_ids="readable")
    assert result.ids[2] == START and not any(result.is_latent)


@pytest.mark.parametrize(("strategy", "token"), [("off", SLOT), ("off", START), ("dynamic", SLOT)])
def test_placeholder_mode_never_chooses_what_would_be_read_as_a_latent(
    model: torch.nn.Module, pixels: torch.Tensor, strategy: str, token: int
) -> None:
    def prefer(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([token]), 1e4)

    options: dict[str, Any] = {"strategy": strategy, "force_span": False, "process_scores": prefer}
    assert token not in decode(model, pixels, **options).ids
    assert decode(model, pixels, latent_ids="readable", **options).ids == [token] * 12


def test_dynamic_closes_at_the_cap(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    result = decode(model, pixels, strategy="dynamic", max_latent_steps=4, answer_ids=[20, 21])
    assert result.ids[:8] == [START, SLOT, SLOT, SLOT, SLOT, END, 20, 21]
    assert result.is_latent == [False, *[True] * 4, *[False] * 7]
    assert result.said == [int(result.logits[step].argmax()) for step in range(1, 5)]
    for step in range(1, 5):
        assert torch.equal(result.slot_inputs[step - 1], result.hidden[step])
        assert torch.equal(result.fed[step], result.hidden[step])
    table = model.get_input_embeddings().weight
    for step in (0, 5, 6, 7):
        assert torch.equal(result.fed[step], table[result.ids[step]])


@pytest.mark.parametrize("strategy", ["off", "dynamic", "fixed"])
def test_one_stock_forward_gives_the_logits_of_every_step(
    model: torch.nn.Module, pixels: torch.Tensor, strategy: str
) -> None:
    prompt = open_prompt()
    result = decode(model, pixels, prompt, strategy=strategy, num_latent_steps=3, max_latent_steps=3)
    assert sum(result.is_latent) == (0 if strategy == "off" else 3)
    expected = replay(model, pixels, prompt, result)
    torch.testing.assert_close(torch.stack(result.logits), expected, atol=1e-4, rtol=1e-4)


def test_positions_go_on_after_the_prompt(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    result = decode(model, pixels, strategy="dynamic", max_latent_steps=3)
    # Text 2, image of 2 x 2 merged patches (2 positions), text 4, image of 2 x 3 (3 positions), text 3: 14 in all.
    assert [position.tolist() for position in result.positions] == [[14 + step] * 3 for step in range(11)]


@pytest.mark.parametrize("cap", [0, 1])
def test_dynamic_has_at_least_one_slot(model: torch.nn.Module, pixels: torch.Tensor, cap: int) -> None:
    result = decode(model, pixels, strategy="dynamic", max_latent_steps=cap)
    assert result.ids[:3] == [START, SLOT, END]


def test_dynamic_closes_when_the_scores_say_so(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    script = {1: EOS, 3: END, 6: EOS}
    result = decode(model, pixels, strategy="dynamic", script=script, eos_ids=[EOS], answer_ids=[20])
    assert result.ids[:4] == [START, SLOT, SLOT, END]  # the slot that said EOS did not stop
    assert result.said[0] == EOS
    assert result.ids[4] != 20  # no forced answer after an end that the model chose
    assert len(result.ids) == 7 and result.ids[-1] == EOS


def test_dynamic_may_have_an_empty_span_and_open_again(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    script = {1: END, 3: START, 5: START, 7: END}
    result = decode(model, pixels, strategy="dynamic", script=script)
    assert result.is_latent[:8] == [False, False, False, False, True, True, True, False]
    assert result.said[1] == START  # a start marker inside a span is just a slot


def test_a_prompt_that_ends_with_a_start_marker(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    forced = decode(model, pixels, open_prompt(), strategy="dynamic", max_latent_steps=2)
    assert forced.ids[:3] == [SLOT, SLOT, END] and forced.said[0] == START
    free = decode(model, pixels, open_prompt(), strategy="dynamic", max_latent_steps=2, force_span=False)
    assert free.ids[:3] == [SLOT, SLOT, END] and free.said[0] == int(free.logits[0].argmax()) != START


def test_no_span_opens_unless_forced(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    result = decode(model, pixels, strategy="dynamic", force_span=False)
    assert START not in result.ids and not any(result.is_latent)
    assert result.ids == decode(model, pixels, strategy="off").ids


@pytest.mark.parametrize("quota", [0, 1, 3])
def test_fixed_has_exactly_the_quota(model: torch.nn.Module, pixels: torch.Tensor, quota: int) -> None:
    script = {0: END, 6: START}
    result = decode(model, pixels, open_prompt(), strategy="fixed", num_latent_steps=quota, script=script)
    text = [False] * (6 - quota)
    assert result.is_latent == [*[True] * quota, *text, False, *[True] * quota, *text][:12]
    if quota > 0:
        assert result.said[0] == END  # the end marker inside is ignored
        assert result.ids[:quota] == [SLOT] * quota and result.ids[quota] != SLOT


def test_repetition_exit_counts_what_slots_said(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    script = {2: 30, 3: 30, 4: 30}
    result = decode(model, pixels, strategy="dynamic", script=script, repetition_exit=True, answer_ids=[20])
    assert result.ids[:6] == [START, SLOT, SLOT, SLOT, END, 20]
    fixed = decode(
        model,
        pixels,
        open_prompt(),
        strategy="fixed",
        num_latent_steps=9,
        script=script,
        repetition_exit=True,
        answer_ids=[20],
    )
    assert fixed.ids[:6] == [SLOT, SLOT, SLOT, SLOT, 30, 20]
    assert not any(fixed.is_latent[4:])


def test_budget(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    options: dict[str, Any] = {"strategy": "dynamic", "max_latent_steps": 6, "max_new_tokens": 4}
    strict = decode(model, pixels, **options)
    assert strict.ids == [START, SLOT, SLOT, SLOT]
    assert len(strict.slot_inputs) == 3 and len(strict.fed) == 3  # the last slot was never fed
    reference = decode(model, pixels, latent_budget="reference", **options)
    assert reference.ids == [START, *[SLOT] * 6, END]


def test_readable_ids_change_nothing_but_the_record(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    plain = decode(model, pixels, strategy="dynamic", max_latent_steps=5)
    readable = decode(model, pixels, strategy="dynamic", max_latent_steps=5, latent_ids="readable")
    assert readable.said == plain.said == readable.ids[1:6]
    assert readable.ids[6:] == plain.ids[6:] and readable.is_latent == plain.is_latent
    assert torch.equal(torch.stack(readable.hidden), torch.stack(plain.hidden))


@pytest.mark.parametrize(("mode", "seen"), [("placeholder", SLOT), ("readable", 30)])
def test_processors_see_the_ids_as_written(model: torch.nn.Module, pixels: torch.Tensor, mode: str, seen: int) -> None:
    lengths, last = [], []

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        lengths.append(ids.shape[1] - PROMPT.shape[1])
        last.append(int(ids[0, -1]))
        return scores.index_fill(1, torch.tensor([30]), 1e4)

    result = decode(model, pixels, strategy="dynamic", max_latent_steps=2, latent_ids=mode, process_scores=process)
    assert lengths == list(range(12))
    assert last[1:5] == [START, seen, seen, END] and result.said == [30, 30]


def test_head_and_overwrite_make_the_fed_vector(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    seen = []

    def overwrite(span: int, slot: int, vector: torch.Tensor) -> torch.Tensor:
        seen.append((span, slot))
        return torch.ones_like(vector) if slot == 1 else vector

    script = {5: START, 7: END}
    options: dict[str, Any] = {"strategy": "dynamic", "max_latent_steps": 2, "script": script}
    plain = decode(model, pixels, **options)
    result = decode(model, pixels, head=lambda hidden: 2 * hidden, overwrite=overwrite, **options)
    assert seen == [(0, 0), (0, 1), (1, 0)]
    assert torch.equal(result.slot_inputs[0], 2 * result.hidden[1])
    assert torch.equal(result.fed[2], torch.ones(32))
    assert not torch.allclose(result.hidden[2], plain.hidden[2], atol=1e-3)  # what is fed matters


def test_noise_is_relative_and_drawn_from_the_global_generator(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    options: dict[str, Any] = {"strategy": "dynamic", "max_latent_steps": 3, "noise_ratio": 0.1}
    torch.manual_seed(3)
    first = decode(model, pixels, **options)
    torch.manual_seed(3)
    again = decode(model, pixels, **options)
    assert torch.equal(torch.stack(first.slot_inputs), torch.stack(again.slot_inputs))
    assert torch.equal(first.slot_inputs[0], first.hidden[1])  # the first slot of a span stays clean
    for step in (2, 3):
        change = (first.slot_inputs[step - 1] - first.hidden[step]).norm() / first.hidden[step].norm()
        assert change == pytest.approx(0.1, abs=1e-5)


def test_without_noise_no_random_number_is_drawn(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    before = torch.get_rng_state()
    decode(model, pixels, strategy="dynamic", max_latent_steps=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_text_only(model: torch.nn.Module) -> None:
    prompt = torch.tensor([[5, 6, 7]])
    result = naive_generate(
        model,
        prompt,
        None,
        None,
        strategy="dynamic",
        start_id=START,
        slot_id=SLOT,
        end_id=END,
        eos_ids=[],
        max_new_tokens=6,
        max_latent_steps=2,
    )
    assert result.ids[:4] == [START, SLOT, SLOT, END]
    assert [position.tolist() for position in result.positions] == [[3 + step] * 3 for step in range(5)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"strategy": "steps"}, "strategy='steps'"),
        ({"strategy": "fixed"}, "num_latent_steps"),
        ({"strategy": "off", "force_span": True}, "force_span"),
        ({"strategy": "off", "latent_ids": "words"}, "latent_ids='words'"),
        ({"strategy": "off", "latent_budget": "loose"}, "latent_budget='loose'"),
        ({"strategy": "off", "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"strategy": "off", "script": {2: START}}, "never chosen"),
        ({"strategy": "off", "prompt": PROMPT.repeat(2, 1)}, "one row"),
        ({"strategy": "off", "prompt": PROMPT[:, :12]}, "image placeholders"),
        ({"strategy": "off", "prompt": torch.tensor([[5, 89]])}, "video"),
    ],
)
def test_bad_input_is_refused(
    model: torch.nn.Module, pixels: torch.Tensor, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        decode(model, pixels, **options)
