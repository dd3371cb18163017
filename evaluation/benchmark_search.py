"""Rows of `examples/benchmark.py dmlr`: what the search over thought tokens costs, beside the published schedule.

One question: a prompt of 460 tokens with an image of 196, two thought tokens, fifteen steps with one noise sample, and
the settings of the published example script. Both sides are the stock class with the same random weights in float32,
as published; both search in reference mode with the same noise, and the rows are refused when they do not find the
same: every reward within 1e-4, the same best step, image tokens and budgets. The published schedule is
`naive_search.py` with its eager attention and its graphs; ours has SDPA. The image encoder is as small as it can be,
although the published schedule runs it at every step: what is measured is the decoder. `--paper` adds `mode="paper"`
with the same number of thought tokens, of one noise sample and of eight.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from modeling_latent.search_answer import answer_inputs
from modeling_latent.search_latent import LatentSearch, SearchResult
from modeling_latent.search_options import search_settings

from .benchmark_models import Sizes
from .measuring import Ratio, peak_memory, take_turns
from .naive_search import NaiveSearch, naive_search, naive_search_answer
from .speed_table import Settings, in_fresh_process, in_process, row, run

SIZES = Sizes(512, 8, 32_000, 8, side=14, prompt=460, answer=32, patches=0)
QUICK = Sizes(32, 2, 1_024, 4, side=4, prompt=40, answer=4, patches=0)
THOUGHTS, SUFFIX, STEPS, QUICK_STEPS, SEED = 2, 5, 15, 3, 42
# The published example script.
SCRIPT = {
    "lr": 0.01,
    "sigma": 25.0,
    "sigma_decay": 0.95,
    "num_selected_patches": 16,
    "initial_patch_count": 1,
    "patch_increment": 1,
    "reward_top_k": 10,
}
PAPER_SAMPLES = (1, 8)
SPEED_BAR, REWARD_TOLERANCE = 8, 1e-4
OURS, NAIVE = "ours", "published schedule"


@dataclass
class Question:
    """A prompt in both models.

    Args:
        stock: SDPA attention.
        eager: the same weights, eager attention.
        inputs: ids, mask and image of one row.
        span: first thought token, and the column behind the last one.
        sizes: what it was made with.
    """

    stock: PreTrainedModel
    eager: PreTrainedModel
    inputs: dict[str, torch.Tensor]
    span: tuple[int, int]
    sizes: Sizes

    @property
    def thought_mask(self) -> torch.BoolTensor:
        """`(1, L)` where the thought tokens stand."""
        places = torch.arange(self.sizes.prompt, device=self.inputs["input_ids"].device)
        return ((places >= self.span[0]) & (places < self.span[1]))[None]


@cache
def question_of(settings: Settings) -> Question:
    """Models and prompt; the same ones each time."""
    torch.manual_seed(0)
    sizes = settings.small(SIZES, QUICK)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: sizes.vocab_size - 1 - place for place, name in enumerate(names)}
    slot = sizes.vocab_size - 1 - len(names)
    half = sizes.hidden_size // sizes.num_heads // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": sizes.vocab_size,
            "hidden_size": sizes.hidden_size,
            "intermediate_size": 2 * sizes.hidden_size,
            "num_hidden_layers": sizes.num_layers,
            "num_attention_heads": sizes.num_heads,
            "num_key_value_heads": sizes.num_heads // 2,
            "max_position_embeddings": 8_192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": sizes.hidden_size,
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=False,
        **ids,
    )
    models = [
        Qwen2_5_VLForConditionalGeneration._from_config(deepcopy(config), attn_implementation=kind)
        for kind in ("sdpa", "eager")  # a model shares its configuration, and writes its attention into it
    ]
    models = [model.to(settings.device).eval() for model in models]
    models[1].load_state_dict(models[0].state_dict())
    prompt = torch.randint(10, slot, (1, sizes.prompt))
    prompt[0, 2 : 2 + sizes.side**2] = ids["image_token_id"]
    prompt[0, 1], prompt[0, 2 + sizes.side**2] = ids["vision_start_token_id"], ids["vision_end_token_id"]
    span = (sizes.prompt - SUFFIX - THOUGHTS, sizes.prompt - SUFFIX)
    prompt[0, span[0] : span[1]] = slot
    grid = torch.tensor([[1, 2 * sizes.side, 2 * sizes.side]])
    inputs = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "mm_token_type_ids": (prompt == ids["image_token_id"]).int(),
        "pixel_values": torch.randn(int(grid.prod()), 1_176),
        "image_grid_thw": grid,
    }
    inputs = {name: value.to(settings.device) for name, value in inputs.items()}
    return Question(*models, inputs, span, sizes)


# One search on each side -------------------------------------------------------------------------------------------


def num_steps(settings: Settings) -> int:
    return settings.small(STEPS, QUICK_STEPS)


def run_search(settings: Settings, **options: Any) -> tuple[LatentSearch, SearchResult]:
    """The search phase: prefix, and all steps. In reference mode the settings of the script; in paper mode those of
    the paper, with as many thought tokens."""
    question = question_of(settings)
    given = {"max_num_steps": num_steps(settings), "seed": SEED, **options}
    if given.setdefault("mode", "reference") == "reference":
        given = {**SCRIPT, **given}
    with torch.no_grad():
        search = LatentSearch(question.stock, question.inputs, question.thought_mask, search_settings(**given))
        return search, search.run()


def their_search(settings: Settings) -> NaiveSearch:
    """The same in the published schedule."""
    question, generator = question_of(settings), torch.Generator().manual_seed(SEED)
    return naive_search(
        question.eager,
        question.inputs,
        question.span,
        max_num_steps=num_steps(settings),
        generator=generator,
        **SCRIPT,
    )


def compare(ours: SearchResult, theirs: NaiveSearch) -> float:
    """Largest difference of two rewards of a step.

    Raises:
        RuntimeError: the searches do not find the same.
    """
    found = [
        (step.is_new_best, step.patch_count, step.patch_budget, abs(step.reward - other.reward) < REWARD_TOLERANCE)
        for step, other in zip(ours.steps[0], theirs.steps, strict=True)
    ]
    expected = [
        (step.is_new_best, sum(map(len, step.selection.values())), -1 if step.budget is None else step.budget, True)
        for step in theirs.steps
    ]
    best = theirs.steps[theirs.best_step]
    if found != expected or ours.best_step != [theirs.best_step] or ours.patches != [best.selection]:
        raise RuntimeError(
            f"the searches compared do not find the same: {found}, best step {ours.best_step}, image tokens "
            f"{ours.patches}; published schedule: {expected}, {theirs.best_step}, {best.selection}"
        )
    differences = [abs(step.reward - other.reward) for step, other in zip(ours.steps[0], theirs.steps, strict=True)]
    return max(differences)


# Rows --------------------------------------------------------------------------------------------------------------


def details_of(settings: Settings, **further: Any) -> dict[str, Any]:
    return {
        **asdict(question_of(settings).sizes),
        "thought_tokens": THOUGHTS,
        "steps": num_steps(settings),
        "dtype": "torch.float32",
        **further,
    }


def untimed(work: Callable[[], Any]) -> Callable[[], None]:
    """The work as an arm that is timed whole."""

    def arm() -> None:
        work()

    return arm


@row("dmlr")
def search_time(settings: Settings) -> list[Ratio]:
    """The search phase, without the answer."""
    theirs = their_search(settings)
    difference = compare(run_search(settings)[1], theirs)
    arms = {OURS: untimed(lambda: run_search(settings)), NAIVE: untimed(lambda: their_search(settings))}
    lines = {OURS: ("same decisions", SPEED_BAR)}
    if settings.paper:
        for samples in PAPER_SAMPLES:
            name = f'mode="paper", K = {samples}'
            options = {"mode": "paper", "num_noise_samples": samples}
            arms[name] = untimed(lambda options=options: run_search(settings, **options))
            lines[name] = (name, None)
    taken = take_turns(arms, settings.repeats, settings.clock)
    details = details_of(
        settings,
        largest_difference_of_rewards=difference,
        tokens_of_published_forwards=sum(theirs.forwards),
        vision_passes_of_published_schedule=theirs.vision_passes,
    )
    return [
        Ratio(f"speed of the search, {what} / {NAIVE}", taken[NAIVE], taken[name], bar, True,
              clock=settings.clock.kind, details=details)
        for name, (what, bar) in lines.items()
    ]  # fmt: skip


@row("dmlr")
def answer_time(settings: Settings) -> list[Ratio]:
    """The answer behind the search. The published schedule runs the prompt once more, ours has it in the cache.

    Raises:
        RuntimeError: the answers differ.
    """
    question, new = question_of(settings), settings.small(SIZES, QUICK).answer
    budget = {"max_new_tokens": new, "min_new_tokens": new}
    search, result = run_search(settings)

    def ours() -> list[int]:
        answer = answer_inputs(search, result)
        for name in ("latent_embeds", "latent_mask"):  # in the cache, as text stands behind them
            del answer[name]
        return question.stock.generate(**answer, do_sample=False, **budget)[0, question.sizes.prompt :].tolist()

    def theirs() -> list[int]:
        return naive_search_answer(question.eager, question.inputs, question.span, result.thoughts[0], **budget)

    if ours() != theirs() or len(ours()) != new:
        raise RuntimeError(f"the answers compared differ: {ours()}; published schedule: {theirs()}")
    taken = take_turns({NAIVE: untimed(theirs), OURS: untimed(ours)}, settings.repeats, settings.clock)
    name = f"speed of the answer, {new} tokens behind the search / {NAIVE}"
    details = details_of(settings)
    return [Ratio(name, taken[NAIVE], taken[OURS], None, True, clock=settings.clock.kind, details=details)]


@in_process
def search_rise(settings: Settings, arm: str) -> float:
    """MiB that a search adds to what the models take; `arm` is a side and a number of noise samples in paper mode."""
    question_of(settings)
    side, samples = arm.split()
    before = peak_memory(settings.device)
    if side == "naive":
        their_search(settings)
    elif int(samples):
        run_search(settings, mode="paper", num_noise_samples=int(samples))
    else:
        run_search(settings)
    return peak_memory(settings.device) - before


@row("dmlr")
def search_memory(settings: Settings) -> list[Ratio]:
    """Peak memory of the search phase."""
    asked = {OURS: "ours 0", NAIVE: "naive 0"}
    if settings.paper:
        asked |= {f'mode="paper", K = {samples}': f"ours {samples}" for samples in PAPER_SAMPLES}
    arms = {name: lambda arm=arm: in_fresh_process(search_rise, settings, arm) for name, arm in asked.items()}
    taken = take_turns(arms, min(settings.repeats, 3), settings.clock, warmup=0)
    return [
        Ratio(f"memory of the search, {name} / {NAIVE}", taken[name], taken[NAIVE], unit="MiB",
              clock="rise in a fresh process", details=details_of(settings))
        for name in taken if name != NAIVE
    ]  # fmt: skip


if __name__ == "__main__":  # a measurement in a fresh process
    run()
