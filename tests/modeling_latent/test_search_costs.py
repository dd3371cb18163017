"""What a search runs, keeps and leaves behind; and its gradient mode, which runs the thought tokens alone."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from modeling_latent.search_generate import generate_with_search, search_decoding
from modeling_latent.search_latent import LatentSearch, SearchTrace
from modeling_latent.search_options import search_settings
from tests.latent import tiny_pair
from tests.naive_search import NUM_THOUGHTS, NaiveSearch, one_row, prompts
from tests.tiny import FAMILIES

FEW = {"num_selected_patches": 4, "initial_patch_count": 1, "patch_increment": 1}
NEW = 3


def searched(
    model: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor, **options: Any
) -> tuple[LatentSearch, Any, SearchTrace]:
    """Without `no_grad` around it: the search says itself where it needs a gradient."""
    search, trace = LatentSearch(model, inputs, mask, search_settings(**options)), SearchTrace()
    return search, search.run(trace), trace


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what a module is run on."""
    calls: list[tuple[int, ...]] = []

    def note(_: Any, args: tuple, kwargs: dict) -> None:
        given = args[0] if args else kwargs.get("inputs_embeds", kwargs.get("hidden_states"))
        calls.append(tuple(given.shape))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


# What is run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["paper", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_vision_tower_runs_once(family: str, mode: str) -> None:
    """In a search of five steps with three samples and its answer, for a batch, by every way to call it."""
    (stock, latent), (inputs, mask) = tiny_pair(0, 6.0, family), prompts(family)
    options = {"mode": mode, **FEW, "max_num_steps": 5, "num_noise_samples": 3, "thought_mask": mask}
    calls = {
        "function": lambda: generate_with_search(stock, **inputs, **options, max_new_tokens=NEW, do_sample=False),
        "loop": lambda: stock.generate(
            **inputs, custom_generate=search_decoding, **options, max_new_tokens=NEW, do_sample=False
        ),
        "strategy": lambda: latent.generate(
            **inputs, latent_strategy="search", **options, max_new_tokens=NEW, do_sample=False
        ),
    }
    found = {}
    for name, call in calls.items():
        model = latent if name == "strategy" else stock
        with counted(model.model.visual) as passes:
            found[name] = call()
        assert len(passes) == 1, name
    assert torch.equal(found["function"], found["loop"]) and torch.equal(found["function"], found["strategy"])


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_a_step_runs_the_thought_tokens_alone(mode: str) -> None:
    """The prompt runs once, as published once more without its image."""
    (model, _), (inputs, mask) = tiny_pair(0, 6.0), prompts("qwen2_5_vl")
    with counted(model.get_decoder()) as passes:
        output = generate_with_search(
            model, **inputs, mode=mode, **FEW, max_num_steps=4, num_noise_samples=2, thought_mask=mask,
            max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, eos_token_id=-1, pad_token_id=0,
        )  # fmt: skip
    prefix = max(int(row.nonzero()[0]) for row in mask)
    steps, answer = passes[1 if mode == "paper" else 2 : -NEW - 1], passes[-NEW - 1 :]
    assert passes[: len(passes) - len(steps) - len(answer)] == [(3, prefix, 64)] * (1 if mode == "paper" else 2)
    assert len(steps) == 2 * 4 and all(shape[0] == 3 * 2 for shape in steps)
    assert {shape[1] for shape in steps[::2]} == {NUM_THOUGHTS}  # attention
    scored = [shape[1] for shape in steps[1::2]]
    assert all(NUM_THOUGHTS < width <= NUM_THOUGHTS * 5 for width in scored)
    if mode == "reference":
        assert set(scored) == {NUM_THOUGHTS + 1}
    suffix = mask.shape[1] - 1 - int(mask[0].nonzero()[-1])
    copies = [sum(map(len, each.values())) if mode == "paper" else 0 for each in output.search.patches]
    assert [shape[1] for shape in answer] == [NUM_THOUGHTS + max(copies) + suffix, *[1] * NEW]


def test_memory_does_not_grow_with_the_steps() -> None:
    """What is left is the cache of the prompt, and room for the rows of one step."""
    (model, _), (inputs, mask) = tiny_pair(0, 6.0), prompts("qwen2_5_vl")
    sizes = []
    for steps in (1, 12):
        for options in ({"mode": "paper"}, {"mode": "reference"}, {"mode": "paper", "use_auto_grad": True}):
            options = {**options, "num_selected_patches": 1, "initial_patch_count": 1, "patch_increment": 0}
            search, _, _ = searched(model, inputs, mask, **options, max_num_steps=steps)
            width = search.prefix_mask.shape[1]
            for prefix in (search.with_image, search.plain):
                assert prefix.cache.get_seq_length() == width
                assert all(not layer.keys.requires_grad for layer in prefix.cache.layers)
            tensors = [each for layer in search.with_image.cache.layers for each in (layer.keys, layer.values)]
            sizes.append(sum(each.untyped_storage().nbytes() for each in tensors))
            needed = sum(each[..., :1, :].numel() * 4 for each in tensors)
            assert sizes[-1] <= needed * (width + 2 * NUM_THOUGHTS)
    assert sizes[:3] == sizes[3:]


@pytest.mark.parametrize("options", [{}, {"mode": "reference"}, {"use_auto_grad": True}], ids=str)
def test_weights_and_graph(options: dict[str, Any]) -> None:
    """No weight gets a gradient or changes, and nothing that is returned has a graph."""
    model, (inputs, mask) = copy.deepcopy(tiny_pair(0, 6.0)[0]), prompts("qwen2_5_vl")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, result, trace = searched(model, inputs, mask, **FEW, **options, max_num_steps=3)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and parameter.requires_grad, name
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    kept = [result.thoughts, result.initial, *trace.noise, *trace.before, *trace.after, *trace.candidate]
    kept += [*trace.rewards, *trace.logits, *trace.attention]
    assert len(kept) == 2 + 7 * 3 and all(not each.requires_grad and each.grad_fn is None for each in kept)
    output = generate_with_search(
        model, **inputs, thought_mask=mask, **FEW, **options, max_num_steps=2, max_new_tokens=NEW, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert all(not each.requires_grad for each in output.logits)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_in_half_precision() -> None:
    """Thought tokens, noise and rewards are float32, whatever the model is."""
    model, (inputs, mask) = copy.deepcopy(tiny_pair(0, 6.0)[0]), prompts("qwen2_5_vl")
    expected = searched(model, inputs, mask, **FEW, max_num_steps=1)[2]
    half = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    _, result, trace = searched(model.bfloat16(), half, mask, **FEW, max_num_steps=1)
    for found in (result.thoughts, trace.noise[0], trace.after[0], trace.rewards[0]):
        assert found.dtype == torch.float32
    assert torch.equal(trace.noise[0], expected.noise[0])
    torch.testing.assert_close(trace.rewards[0], expected.rewards[0], atol=2e-2, rtol=0)


# The gradient mode ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number_of_images", [(1, 1, 1), (0, 0, 0)], ids=str)
def test_adam_on_the_gradient(number_of_images: tuple[int, ...]) -> None:
    """The gradient through the cache is that through whole prompts."""
    (model, _), (inputs, mask) = tiny_pair(0, 6.0), prompts("qwen2_5_vl", number_of_images)
    options = {"max_num_steps": 4, "sigma": 0.1, "lr": 0.02, "num_noise_samples": 2, "num_selected_patches": 0}
    _, result, trace = searched(model, inputs, mask, use_auto_grad=True, **options)
    for row in range(3):
        naive = NaiveSearch(model, *one_row(inputs, mask, row, number_of_images), "paper")
        thoughts = torch.nn.Parameter(result.initial[row].clone())
        adam = torch.optim.Adam([thoughts], lr=0.02, maximize=True)
        for step in range(4):
            rewards = torch.stack([naive.reward(thoughts + each, {}) for each in trace.noise[step][row]])
            torch.testing.assert_close(trace.rewards[step][row], rewards.detach(), atol=1e-4, rtol=0)
            thoughts.grad = torch.autograd.grad(rewards.mean(), thoughts)[0]
            adam.step()
            torch.testing.assert_close(trace.after[step][row], thoughts.detach(), atol=1e-4, rtol=0)


def test_the_gradient_ascends_with_patches() -> None:
    """The reward of the thought tokens without noise rises; a row that stopped does not move."""
    (model, _), (inputs, mask) = tiny_pair(0, 6.0), prompts("qwen2_5_vl")
    options = {"use_auto_grad": True, **FEW, "patch_increment": 0, "max_num_steps": 12, "sigma": 1e-3, "lr": 0.02}
    _, result, trace = searched(model, inputs, mask, **options)
    rewards = torch.stack(trace.rewards)[:, :, 0]
    assert (rewards[-1] > rewards[0] + 0.01).all()
    assert all(reward > float(first) for reward, first in zip(result.best_reward, rewards[0], strict=True))
    threshold = float(rewards[6, 1])
    _, result, trace = searched(model, inputs, mask, **options, reward_threshold=threshold)
    for row in range(3):
        count = len(result.steps[row])
        assert all(torch.equal(each[row], trace.after[count - 1][row]) for each in trace.after[count:])
    assert len(result.steps[1]) <= 7 and max(map(len, result.steps)) > min(map(len, result.steps))


def test_the_published_gradient_mode_moves_nothing() -> None:
    (model, _), (inputs, mask) = tiny_pair(0, 6.0), prompts("qwen2_5_vl")
    _, result, trace = searched(model, inputs, mask, mode="reference", **FEW, use_auto_grad=True, max_num_steps=3)
    assert torch.equal(result.thoughts, result.initial) and torch.equal(trace.after[-1], result.initial)
    assert not torch.equal(trace.candidate[0][:, 0], result.initial)


def test_a_reward_without_a_gradient() -> None:
    (model, _), (inputs, mask) = tiny_pair(0, 6.0, "llama"), prompts("llama")
    words = "use_auto_grad=True: the reward has no gradient.*leave torch.inference_mode, or leave use_auto_grad out"
    with pytest.raises(ValueError, match=words):
        searched(model, inputs, mask, use_auto_grad=True, reward=lambda logits: logits.argmax(-1).float().mean(-1))
    with torch.inference_mode(), pytest.raises(ValueError, match=words):
        searched(model, inputs, mask, use_auto_grad=True)
    with torch.inference_mode():
        searched(model, inputs, mask)
