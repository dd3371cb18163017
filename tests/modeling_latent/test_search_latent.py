"""The search over latents against the naive one (`tests/naive_search.py`: whole prompts, no cache), rows of a batch
against rows alone, and what it costs. Whole published loops are in `tests/golden/dmlr_search.py`."""

import copy
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from modeling_latent.search_answer import answer_inputs
from modeling_latent.search_generate import generate_with_search
from modeling_latent.search_latent import LatentSearch, SearchResult, SearchTrace
from modeling_latent.search_options import search_settings
from tests.latent import liven, tiny_pair
from tests.naive_search import NaiveSearch, one_row, padded, prompts
from tests.tiny import CHAMELEON, FAMILIES, TEXT_FAMILIES

STEPS, SIGMA, LR, NEW = 4, 0.3, 0.05, 4
WALK = {"max_num_steps": STEPS, "sigma": SIGMA, "lr": LR}
FEW = {"num_selected_patches": 4, "initial_patch_count": 1, "patch_increment": 1}
CASES: dict[str, dict[str, Any]] = {
    "paper": {"mode": "paper", **FEW},
    "reference": {"mode": "reference", **FEW},
    "stride, start and interval": {
        "mode": "paper",
        **FEW,
        "visual_insert_stride": 2,
        "visual_injection_start_step": 1,
        "visual_injection_interval": 2,
    },
    "all image tokens": {"mode": "paper", "num_selected_patches": 99, "initial_patch_count": 99},
    "image in the first thoughts": {"mode": "paper", **FEW, "visual_only": True},
    "patches are gone in the answer": {"mode": "paper", **FEW, "inject_in_decode": False},
    "first token of the answer": {"mode": "paper", **FEW, "reward": "answer_entropy"},
    "published reward": {"mode": "paper", **FEW, "reward": "published_confidence", "reward_top_k": 3},
    "paper's formula": {"mode": "paper", **FEW, "reward": "paper_confidence", "reward_rows": "thoughts_and_end"},
    "mean of samples": {"mode": "paper", **FEW, "num_noise_samples": 3, "baseline": "mean"},
    "pairs of samples": {"mode": "paper", **FEW, "num_noise_samples": 4, "baseline": "antithetic"},
    "samples": {"mode": "reference", **FEW, "num_noise_samples": 3, "sigma_decay": 0.5},
    "published without a cap": {"mode": "reference"},
    "final states as patches": {"mode": "reference", **FEW, "visual_only": True},
    "published, answer": {"mode": "reference", **FEW, "reward": "answer_entropy"},
    "published, thoughts": {"mode": "reference", **FEW, "reward_rows": "thoughts"},
}
BASIC = ("paper", "reference")
WITH_IMAGES = (*FAMILIES, CHAMELEON)


def stock(family: str = "qwen2_5_vl") -> Any:
    return tiny_pair(0, 6.0, family)[0]


def without_images(options: dict[str, Any]) -> dict[str, Any]:
    """The published loop takes a prompt without an image only if no step interleaves."""
    return {**options, "visual_injection_start_step": STEPS} if options["mode"] == "reference" else options


def run(
    model: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor, **options: Any
) -> tuple[LatentSearch, SearchResult, SearchTrace]:
    trace = SearchTrace()
    with torch.no_grad():
        search = LatentSearch(model, inputs, mask, search_settings(**{**WALK, **options}))
    return search, search.run(trace), trace


def decode(model: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor, **options: Any) -> Any:
    ends = {"eos_token_id": -1, "pad_token_id": 0}
    common = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return generate_with_search(model, **inputs, thought_mask=mask, **ends, **{**WALK, **common, **options})


def same_as_naive(
    model: Any,
    inputs: dict[str, torch.Tensor],
    mask: torch.Tensor,
    options: dict[str, Any],
    number_of_images: tuple[int, ...] = (1, 1, 1),
) -> None:
    """The search on a batch with its answers, and the naive one on each of its rows."""
    search, result, trace = run(model, inputs, mask, **options)
    output = decode(model, inputs, mask, **options)
    naive_options = {name: value for name, value in options.items() if name != "mode"}
    for row in range(len(mask)):
        alone, own = one_row(inputs, mask, row, number_of_images)
        naive = NaiveSearch(model, alone, own, options["mode"], **naive_options)
        found = naive.search(STEPS, SIGMA, LR, new_tokens=NEW)
        padding = int((inputs["attention_mask"][row] == 0).sum())
        for step in range(STEPS):
            torch.testing.assert_close(trace.rewards[step][row], torch.tensor(found.rewards[step]), atol=1e-4, rtol=0)
            torch.testing.assert_close(trace.after[step][row], found.thoughts[step], atol=2e-5, rtol=0)
            selections = [shifted(each, padding + search.shift[row]) for each in found.selections[step]]
            assert trace.selections[step][row] == selections
        assert result.best_step[row] == found.best_step
        assert result.best_reward[row] == pytest.approx(found.best_reward, abs=1e-4)
        torch.testing.assert_close(result.thoughts[row], found.best_thoughts, atol=2e-5, rtol=0)
        assert result.patches[row] == shifted(found.patches, padding)
        assert output.sequences[row, -NEW:].tolist() == found.answer
        for ours, theirs in zip(output.logits, found.logits, strict=True):
            torch.testing.assert_close(ours[row], theirs, atol=1e-3, rtol=1e-4)


def shifted(selection: dict[int, list[int]], by: int) -> dict[int, list[int]]:
    return {offset: [place + by for place in places] for offset, places in selection.items()}


# The naive search ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BASIC)
@pytest.mark.parametrize("family", [*WITH_IMAGES, *TEXT_FAMILIES])
def test_every_family(family: str, case: str) -> None:
    """A batch of prompts of different length with different images."""
    options = CASES[case] if family in WITH_IMAGES else without_images(CASES[case])
    same_as_naive(stock(family), *prompts(family), options)


@pytest.mark.parametrize("case", [name for name in CASES if name not in BASIC])
def test_every_option(case: str) -> None:
    same_as_naive(stock(), *prompts("qwen2_5_vl"), CASES[case])


@pytest.mark.parametrize("case", BASIC)
@pytest.mark.parametrize("family", WITH_IMAGES)
def test_two_images_in_a_prompt(family: str, case: str) -> None:
    """Image tokens are picked from both, as published from the first one alone."""
    inputs, mask = prompts(family, (2, 2))
    same_as_naive(stock(family), inputs, mask, CASES[case], (2, 2))
    search = run(stock(family), inputs, mask, **CASES[case])[0]
    every = (search.prefix_ids == search.image_id) & search.prefix_mask.bool()
    for row in range(2):
        columns, found = every[row].nonzero()[:, 0].tolist(), search.image_positions(row)
        assert len(columns) > 2 and (found == columns) == (case == "paper")
        assert found == columns[: len(found)] and found


@pytest.mark.parametrize("number_of_images", [(1, 0, 2), (0, 1, 0), (0, 0, 0)], ids=str)
def test_rows_with_and_without_images(number_of_images: tuple[int, ...]) -> None:
    inputs, mask = prompts("qwen2_5_vl", number_of_images)
    same_as_naive(stock(), inputs, mask, CASES["paper"], number_of_images)
    same_as_naive(stock(), inputs, mask, without_images(CASES["reference"]), number_of_images)


def test_videos_are_seen_and_not_picked_from() -> None:
    inputs, mask = prompts("qwen2_5_vl", (1,))
    config = stock().config
    inputs["input_ids"] = inputs["input_ids"].masked_fill(
        inputs["input_ids"] == config.image_token_id, config.video_token_id
    )
    inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"] * 2
    inputs["pixel_values_videos"], inputs["video_grid_thw"] = inputs.pop("pixel_values"), inputs.pop("image_grid_thw")
    search, result, trace = run(stock(), inputs, mask, **CASES["paper"])
    naive = NaiveSearch(stock(), inputs, mask, "paper").search(STEPS, SIGMA, LR, new_tokens=NEW)
    torch.testing.assert_close(torch.stack(trace.rewards)[:, 0], torch.tensor(naive.rewards), atol=1e-4, rtol=0)
    assert result.patches == [{}]
    assert decode(stock(), inputs, mask, **CASES["paper"]).sequences[0, -NEW:].tolist() == naive.answer
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].flip(0)
    assert not torch.equal(run(stock(), inputs, mask, **CASES["paper"])[2].rewards[0], trace.rewards[0])


def test_a_window_of_attention() -> None:
    """Layers that look back 8 positions; the cache keeps more."""
    config = MistralConfig(
        vocab_size=600, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = liven(MistralForCausalLM(config).eval(), 6.0)
    same_as_naive(model, *prompts("llama"), CASES["paper"])


@pytest.mark.parametrize("case", BASIC)
def test_padding_anywhere(case: str) -> None:
    """On the right, and in the middle of a prompt: what stands behind the thought tokens may be padded, too."""
    options = without_images(CASES[case])
    inputs, mask = prompts("llama")
    expected = decode(stock("llama"), inputs, mask, **options)
    rows = [ids[kept.bool()].tolist() for ids, kept in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    right = padded(rows, left=False)
    slot = inputs["input_ids"][mask][0]
    for given in (right, with_holes(right)):
        found = decode(stock("llama"), given, given["input_ids"] == slot, **options)
        assert torch.equal(found.sequences[:, -NEW:], expected.sequences[:, -NEW:])
        assert found.search.best_step == expected.search.best_step
        torch.testing.assert_close(found.search.thoughts, expected.search.thoughts, atol=2e-5, rtol=0)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-3, rtol=1e-4)


def with_holes(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A position of padding behind the first token."""
    return {name: torch.cat([value[:, :1], value[:, :1] * 0, value[:, 1:]], dim=1) for name, value in inputs.items()}


def test_without_a_mask_padding_is_found_as_by_the_stock_class() -> None:
    model, (inputs, mask) = copy.deepcopy(stock("llama")), prompts("llama")
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, [2]
    expected = run(model, inputs, mask, **CASES["paper"])[1]
    assert (
        run(model, {"input_ids": inputs["input_ids"]}, mask, **CASES["paper"])[1].best_reward == expected.best_reward
    )


# Rows of a batch -----------------------------------------------------------------------------------------------------


def test_one_row_stops_early() -> None:
    """After the update of the step that reached the threshold; the others go on."""
    (inputs, mask), options = prompts("qwen2_5_vl"), CASES["reference"]
    rewards = torch.stack(run(stock(), inputs, mask, **options)[2].rewards)[:, :, 0]
    stops, row = divmod(int(rewards.argmax()), 3)
    threshold = float(rewards.max()) - 1e-3
    assert (rewards >= threshold).sum() == 1 and 0 < stops < STEPS - 1
    _, result, trace = run(stock(), inputs, mask, **options, reward_threshold=threshold)
    assert [each == "reward_threshold" for each in result.stopped] == [each == row for each in range(3)]
    assert [len(steps) for steps in result.steps] == [stops + 1 if each == row else STEPS for each in range(3)]
    assert result.best_step[row] == stops
    torch.testing.assert_close(result.thoughts[row], trace.after[stops][row])
    assert not torch.equal(trace.after[stops][row], trace.before[stops][row])
    for each in range(3):
        alone = run(stock(), *one_row(inputs, mask, each), **options, reward_threshold=threshold)[1]
        assert alone.stopped == result.stopped[each : each + 1]
        assert [step.step for step in alone.steps[0]] == [step.step for step in result.steps[each]]
        torch.testing.assert_close(alone.thoughts[0], result.thoughts[each], atol=2e-5, rtol=0)


def test_a_search_ends_when_all_rows_stopped() -> None:
    (inputs, mask), options = prompts("qwen2_5_vl"), CASES["reference"]
    _, result, trace = run(stock(), inputs, mask, **options, reward_threshold=0.5)
    assert len(trace.rewards) == 1 and result.stopped == ["reward_threshold"] * 3
    assert all(step.is_new_best and step.step == 0 for (step,) in result.steps)


def test_seeds() -> None:
    """One for all rows is one each of the same; a row has the noise of its own seed; a generator goes on."""
    inputs, mask = prompts("llama")
    draws = {}
    for name, seed in {
        "one": 7,
        "each": [7, 7, 7],
        "other": [7, 8, 9],
        "generators": [torch.Generator().manual_seed(each) for each in (7, 8, 9)],
        "shared": torch.Generator().manual_seed(7),
    }.items():
        draws[name] = torch.stack(run(stock("llama"), inputs, mask, **CASES["paper"], seed=seed)[2].noise)[:, :, 0]
    assert torch.equal(draws["one"], draws["each"]) and torch.equal(draws["generators"], draws["other"])
    assert torch.equal(draws["one"][:, 0], draws["other"][:, 0])
    assert torch.equal(draws["one"][:, 0], draws["one"][:, 2])
    assert not torch.equal(draws["one"][:, 1], draws["other"][:, 1])
    random = torch.Generator().manual_seed(7)
    for step in range(STEPS):
        for row in range(3):
            level = SIGMA * 0.95**step
            expected = torch.randn(draws["shared"].shape[2:], generator=random) * level
            torch.testing.assert_close(draws["shared"][step, row], expected)
            alone = torch.Generator().manual_seed(7)
    torch.testing.assert_close(draws["one"][0, 0], torch.randn(draws["one"].shape[2:], generator=alone) * SIGMA)


def test_relative_sigma_is_in_units_of_the_first_thoughts_of_a_row() -> None:
    (inputs, mask), options = prompts("llama"), CASES["paper"]
    inputs["input_ids"][1] = inputs["input_ids"][1].masked_fill(mask[1], 40)  # other first thoughts
    model = stock("llama")
    first = [int(inputs["input_ids"][row, mask[row]][0]) for row in range(2)]
    units = model.get_input_embeddings().weight.detach()[first].pow(2).mean(1).sqrt()
    assert abs(units[0] - units[1]) > 1e-3
    _, _, trace = run(model, inputs, mask, **options, relative_sigma=True)
    for row in range(2):
        absolute = run(model, *one_row(inputs, mask, row), **{**options, "sigma": SIGMA * float(units[row])})
        torch.testing.assert_close(torch.stack(trace.noise)[:, row], torch.stack(absolute[2].noise)[:, 0])
        torch.testing.assert_close(trace.after[-1][row], absolute[2].after[-1][0], atol=2e-5, rtol=0)


# What the reward and the answer see ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WITH_IMAGES)
def test_another_image(family: str) -> None:
    """Changes rewards and thoughts; as published it changes selections alone."""
    (inputs, mask), (other, _) = prompts(family), prompts(family, first=1)
    assert torch.equal(inputs["input_ids"], other["input_ids"])
    for case in BASIC:
        first, second = (run(stock(family), each, mask, **CASES[case]) for each in (inputs, other))
        assert first[2].selections != second[2].selections
        for name in ("rewards", "after"):
            pairs = zip(getattr(first[2], name), getattr(second[2], name), strict=True)
            equal = [torch.equal(ours, theirs) for ours, theirs in pairs]
            assert not any(equal) if case == "paper" else all(equal)
        assert torch.equal(first[1].thoughts, second[1].thoughts) == (case == "reference")


@pytest.mark.parametrize("family", WITH_IMAGES)
def test_a_picked_patch_changes_the_reward_and_the_answer(family: str) -> None:
    """Not by its place in the prompt, which is run already, but by its copy."""
    inputs, mask = prompts(family, (1,))
    search, result, trace = run(stock(family), inputs, mask, **CASES["paper"])
    block, candidate = trace.blocks[-1][0], trace.candidate[-1][0]
    place = next(code for code in block[0] if code >= 0)
    answers, rewards = [], []
    result.patches = [{0: [place], 1: [place]}]
    for _ in range(2):
        with torch.no_grad(), search.with_image.expanded(1) as cache:
            logits = search.reward_logits(search.with_image, cache, block, candidate, "thoughts")
        rewards.append(search.settings.reward.function(logits, 10).item())
        answers.append(continued(search, result))
        search.with_image.embeds[0, place] = search.with_image.embeds[0, place].flip(0)
    assert rewards[0] == pytest.approx(trace.rewards[-1].item(), abs=1e-5)
    assert abs(rewards[0] - rewards[1]) > 1e-4
    assert (answers[0] - answers[1]).abs().max() > 1e-3


def continued(search: LatentSearch, result: SearchResult) -> torch.Tensor:
    """`(B, V)` logits of the first token of the answer."""
    answer = answer_inputs(search, result)
    vectors = search.model.get_input_embeddings()(answer["input_ids"])
    vectors = torch.where(answer["latent_mask"].unsqueeze(-1), answer["latent_embeds"], vectors)[:, -1:]
    with torch.no_grad():
        output = search.model(
            inputs_embeds=vectors,
            attention_mask=answer["attention_mask"],
            position_ids=answer["position_ids"][..., -1:],
            past_key_values=answer["past_key_values"],
        )
    return output.logits[:, -1]


@pytest.mark.parametrize("mode", BASIC)
def test_patches_stand_in_the_prompt_of_the_answer(mode: str) -> None:
    """With their embeddings, between the thought tokens; not in reference mode."""
    inputs, mask = prompts("qwen2_5_vl")
    search, result, _ = run(stock(), inputs, mask, **CASES[mode])
    answer = answer_inputs(search, result)
    assert all(result.patches[row] for row in range(3))
    for row in range(3):
        vectors = answer["latent_embeds"][row, answer["latent_mask"][row]]
        columns = search.image_positions(row)
        expected = []
        for offset in range(3):
            expected.append(result.thoughts[row, offset])
            places = [place + search.shift[row] for place in result.patches[row][offset]] if mode == "paper" else []
            assert set(places) <= set(columns)
            expected += [search.with_image.embeds[row, place] for place in places]
        torch.testing.assert_close(vectors, torch.stack(expected))
    kept = answer["attention_mask"].sum(1) - answer["latent_mask"].sum(1)
    assert torch.equal(kept, inputs["attention_mask"].sum(1) - 3)
    assert answer["past_key_values"].get_seq_length() == answer["input_ids"].shape[1] - 1


def test_no_patches() -> None:
    """With a cap of 0 in paper mode, and where no step interleaves."""
    inputs, mask = prompts("qwen2_5_vl")
    found = decode(stock(), inputs, mask, mode="paper", num_selected_patches=0)
    later = decode(stock(), inputs, mask, mode="paper", visual_injection_start_step=STEPS)
    assert found.search.patches == later.search.patches == [{}, {}, {}]
    assert found.search.best_reward == later.search.best_reward
    assert torch.equal(found.sequences, later.sequences)
    assert found.sequences.shape[1] == inputs["input_ids"].shape[1] + NEW
    # Published: no cap, so that all image tokens are interleaved.
    search, _, trace = run(stock(), inputs, mask, mode="reference", num_selected_patches=0)
    assert [len(trace.selections[0][row][0][0]) for row in range(3)] == [
        len(search.image_positions(row)) for row in range(3)
    ]


@pytest.mark.parametrize("mode", BASIC)
def test_no_steps(mode: str) -> None:
    """The prompt as it is, by the stock model, with the thought tokens as text."""
    model, (inputs, mask) = stock("llama"), prompts("llama")
    output = decode(model, inputs, mask, **without_images(CASES[mode]), **{"max_num_steps": 0})
    found = output.search
    assert found.best_reward == [0.0 if mode == "reference" else -float("inf")] * 3
    assert found.best_step == [0] * 3 and found.steps == [[], [], []] and found.stopped == ["max_num_steps"] * 3
    assert torch.equal(found.thoughts, model.get_input_embeddings()(inputs["input_ids"][mask].view(3, -1)))
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    kept = torch.nn.functional.pad(inputs["attention_mask"].bool(), (0, NEW), value=True)
    assert output.sequences.shape == expected.shape and torch.equal(output.sequences[kept], expected[kept])
