"""Rows of `examples/benchmark.py ivtlr` and `coconut`: what slots cost that depend on each other.

A training step is forward and backward of one row: a prompt of 1,088 tokens (with an image in IVT-LR), n slots, eight
labelled tokens. It is compared with a plain step of the same length, and with the published schedule written naively
(`naive_staged.py`: every pass over the whole prefix, eager attention, the logits of all passes kept, and a second
prefill in generation). Activation checkpointing, with which the published code runs every pass once more, is off on
both sides. Memory is what a step adds to a fresh process.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import torch

from modeling_latent.latent_blocks import lay_out_blocks
from modeling_latent.latent_plan import LatentPlan

from .benchmark_models import Pair, Sizes, build_pair
from .measuring import Ratio, peak_memory, take_turns
from .naive_staged import naive_staged, naive_staged_generate
from .speed_table import Settings, in_fresh_process, in_process, row, run

SIZES = {
    "qwen2_vl": Sizes(512, 8, 32_000, 8, side=20, prompt=1_088, answer=8, patches=64),
    "chameleon": Sizes(512, 8, 32_000, 8, side=32, prompt=1_088, answer=8, patches=64),
    "gpt2": Sizes(512, 8, 32_000, 8, side=0, prompt=1_088, answer=8, patches=0),
}
QUICK = Sizes(32, 2, 1_024, 4, side=4, prompt=40, answer=4, patches=3)
GRADIENTS = ("detach", "bptt")
SLOTS, MOST_SLOTS = 3, 4
NAIVE, NO_ZEROS = "published schedule", "published schedule without its backward of zeros"
TIME_BAR, SPEED_BAR, MEMORY_BAR = 0.25, 4, 1.1  # naive: at most 1/4 of its time; linear: the same memory a token


@cache
def pair_of(family: str, settings: Settings, prompt: int | None = None) -> Pair:
    """The models of a family and a row, at the length of the table or another one."""
    sizes = settings.small(SIZES[family], QUICK)
    return build_pair(family, sizes if prompt is None else Sizes(**{**asdict(sizes), "prompt": prompt}), settings)


def training_row(pair: Pair, slots: int, blocks: bool) -> dict[str, torch.Tensor]:
    """Ids, mask and labels of prompt, slots and answer.

    Args:
        pair: models and prompt.
        slots: number of slots, `n`.
        blocks: slots with their copies, as our models read them; else the slots alone.
    """
    ids, patches = pair.ids, pair.patches if blocks else 0
    chain = lay_out_blocks(slots, patches, pair.sizes.side**2, ids["slot"], ids["patch"])
    answer = torch.arange(20, 20 + pair.sizes.answer)
    row_ids = torch.cat([pair.prompt.cpu(), torch.tensor(chain, dtype=torch.long), answer])[None]
    labels = torch.full_like(row_ids, -100)
    labels[:, -pair.sizes.answer :] = answer
    tensors = {"input_ids": row_ids, "attention_mask": torch.ones_like(row_ids), "labels": labels}
    return {name: value.to(pair.prompt.device) for name, value in tensors.items()}


def plain_row(pair: Pair, slots: int) -> dict[str, torch.Tensor]:
    """The same length with text in place of the slots and copies."""
    batch = training_row(pair, slots, blocks=True)
    latent = (batch["input_ids"] == pair.ids["slot"]) | (batch["input_ids"] == pair.ids["patch"])
    return {**batch, "input_ids": batch["input_ids"].masked_fill(latent, 15)}


def model_inputs(pair: Pair, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    types = {}
    if "image_grid_thw" in pair.images:
        types["mm_token_type_ids"] = (batch["input_ids"] == pair.ids["image"]).int()
    return {**batch, **pair.images, **types}


def our_step(pair: Pair, slots: int, gradient: str | None) -> Callable[[], float]:
    """Forward and backward of our model; `gradient=None` is a plain step. Returns the loss."""
    batch = plain_row(pair, slots) if gradient is None else training_row(pair, slots, blocks=True)
    inputs, model = model_inputs(pair, batch), pair.latent.train()
    plan = {} if gradient is None else {"latent_plan": LatentPlan(gradient=gradient, patch_order="index_then_kth")}

    def step() -> float:
        model.zero_grad()
        loss = model(**inputs, use_cache=False, **plan).loss
        loss.backward()
        return loss.item()

    return step


def naive_step(pair: Pair, slots: int, gradient: str, every: bool) -> Callable[[], float]:
    """The same of the published schedule."""
    batch = training_row(pair, slots, blocks=False)

    def step() -> float:
        backbone = pair.naive()
        backbone.model.zero_grad()
        loss = naive_staged(
            backbone, **batch, slot_id=pair.ids["slot"], patch_id=pair.ids["patch"], num_patches=pair.patches,
            patch_order="index_then_kth", gradient=gradient, logits_of_every_pass=every,
        ).loss  # fmt: skip
        loss.backward()
        return loss.item()

    return step


def timed(step: Callable[[], Any]) -> Callable[[], None]:
    """The step as an arm that is timed whole."""

    def arm() -> None:
        step()

    return arm


def details_of(pair: Pair, **further: Any) -> dict[str, Any]:
    return {**asdict(pair.sizes), "patches": pair.patches, **further}


def plain_ratios(family: str, settings: Settings) -> list[Ratio]:
    """Steps with n slots over a plain step of the same final length."""
    pair, lines = pair_of(family, settings), []
    for slots in range(MOST_SLOTS + 1):
        arms = {"plain": timed(our_step(pair, slots, None))}
        arms |= {gradient: timed(our_step(pair, slots, gradient)) for gradient in GRADIENTS}
        taken = take_turns(arms, settings.repeats, settings.clock)
        length = training_row(pair, slots, blocks=True)["input_ids"].shape[1]
        lines += [
            Ratio(f"{family}: {gradient} step, n = {slots} / plain step of {length} tokens", taken[gradient],
                  taken["plain"], clock=settings.clock.kind, details=details_of(pair, slots=slots, length=length))
            for gradient in GRADIENTS
        ]  # fmt: skip
    return lines


def schedule_ratios(family: str, settings: Settings, gradient: str) -> list[Ratio]:
    """A step with three slots over the published schedule.

    Raises:
        RuntimeError: the two do not find the same loss.
    """
    pair = pair_of(family, settings)
    steps = {
        "ours": our_step(pair, SLOTS, gradient),
        NAIVE: naive_step(pair, SLOTS, gradient, every=True),
        NO_ZEROS: naive_step(pair, SLOTS, gradient, every=False),
    }
    losses = {name: step() for name, step in steps.items()}
    if max(losses.values()) - min(losses.values()) > 0.02 * max(losses.values()):
        raise RuntimeError(f"{family}, {gradient}: the steps compared do not find one loss: {losses}")
    taken = take_turns({name: timed(step) for name, step in steps.items()}, settings.repeats, settings.clock, warmup=0)
    return [
        Ratio(f"{family}: {gradient} step, n = {SLOTS} / {name}", taken["ours"], taken[name],
              TIME_BAR if name == NAIVE and gradient == "detach" else None, clock=settings.clock.kind,
              details=details_of(pair, slots=SLOTS, losses=losses))
        for name in (NAIVE, NO_ZEROS)
    ]  # fmt: skip


def generation_ratio(family: str, settings: Settings) -> list[Ratio]:
    """Eight tokens behind three slots, everything included, with the published schedule over ours."""
    pair, new = pair_of(family, settings), settings.small(8, 4)
    ids = pair.prompt[None]
    compact = torch.cat([ids, torch.full_like(ids[:, :SLOTS], pair.ids["slot"])], dim=1)
    chain = {"slot_id": pair.ids["slot"], "patch_id": pair.ids["patch"], "num_patches": pair.patches}
    inputs = model_inputs(pair, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    pair.latent.eval()

    def ours() -> None:
        output = pair.latent.generate(
            **inputs, latent_strategy="staged", num_latent_steps=SLOTS, num_latent_patches=pair.patches,
            latent_markers=False, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None,
        )  # fmt: skip
        if output.shape[1] != compact.shape[1] + SLOTS * pair.patches + new:
            raise RuntimeError(f"{family}: {output.shape[1]} ids after {new} new tokens and {SLOTS} slots")

    def naive() -> None:
        naive_staged_generate(pair.naive(), compact, max_new_tokens=new, use_cache=pair.patches > 0, **chain)

    taken = take_turns({"naive": naive, "ours": ours}, settings.repeats, settings.clock)
    name = f"{family}: speed of {new} tokens behind {SLOTS} slots / {NAIVE}"
    details = details_of(pair, slots=SLOTS, new_tokens=new)
    return [Ratio(name, taken["naive"], taken["ours"], SPEED_BAR, True, clock=settings.clock.kind, details=details)]


@in_process
def staged_rise(settings: Settings, arm: str) -> float:
    """MiB that a step with three slots adds to what the models take; `arm` is family, kind of step and length."""
    family, kind, length = arm.split()
    pair = pair_of(family, settings, int(length))
    step = naive_step(pair, SLOTS, "detach", True) if kind == "naive" else our_step(pair, SLOTS, kind)
    before = peak_memory(settings.device)
    step()
    return peak_memory(settings.device) - before


def memory_ratios(family: str, settings: Settings) -> list[Ratio]:
    """What a further token takes, from two to four times the prompt over from one to two times; the constant part
    (gradients of the weights) falls out. And a step at the shortest length over the published schedule."""
    first = settings.small(SIZES[family], QUICK).prompt * settings.small(1, 8)
    lengths = (first, 2 * first, 4 * first)
    asked = [*((kind, length) for kind in GRADIENTS for length in lengths), ("naive", first)]
    arms = {
        f"{kind} {length}": partial(in_fresh_process, staged_rise, settings, f"{family} {kind} {length}")
        for kind, length in asked
    }
    taken = take_turns(arms, min(settings.repeats, 3), settings.clock, warmup=0)
    clock, lines = "rise in a fresh process", []
    for kind in GRADIENTS:
        short, middle, long = (taken[f"{kind} {length}"] for length in lengths)
        slopes = [
            [(more - less) / span for more, less in zip(*pair, strict=True)]
            for pair, span in (((long, middle), 2 * first), ((middle, short), first))
        ]
        name = (
            f"{family}: memory a further token, {kind} step, from {2 * first} to {4 * first} / to {2 * first} tokens"
        )
        lines.append(Ratio(name, *slopes, MEMORY_BAR, unit="MiB", clock=clock, details={"rise": taken}))
        name = f"{family}: memory of a {kind} step, prompt of {first} tokens / {NAIVE}"
        lines.append(Ratio(name, short, taken[f"naive {first}"], unit="MiB", clock=clock))
    return lines


@row("ivtlr")
def steps_qwen2_vl(settings: Settings) -> list[Ratio]:
    return plain_ratios("qwen2_vl", settings)


@row("ivtlr")
def steps_chameleon(settings: Settings) -> list[Ratio]:
    return plain_ratios("chameleon", settings)


@row("ivtlr")
def schedule_qwen2_vl(settings: Settings) -> list[Ratio]:
    return schedule_ratios("qwen2_vl", settings, "detach")


@row("ivtlr")
def schedule_chameleon(settings: Settings) -> list[Ratio]:
    return schedule_ratios("chameleon", settings, "detach")


@row("ivtlr")
def generation_qwen2_vl(settings: Settings) -> list[Ratio]:
    return generation_ratio("qwen2_vl", settings)


@row("ivtlr")
def generation_chameleon(settings: Settings) -> list[Ratio]:
    return generation_ratio("chameleon", settings)


@row("ivtlr")
def memory_qwen2_vl(settings: Settings) -> list[Ratio]:
    return memory_ratios("qwen2_vl", settings)


@row("ivtlr")
def memory_chameleon(settings: Settings) -> list[Ratio]:
    return memory_ratios("chameleon", settings)


@row("coconut")
def steps_gpt2(settings: Settings) -> list[Ratio]:
    return plain_ratios("gpt2", settings)


@row("coconut")
def schedule_gpt2(settings: Settings) -> list[Ratio]:
    return [line for gradient in GRADIENTS for line in schedule_ratios("gpt2", settings, gradient)]


@row("coconut")
def generation_gpt2(settings: Settings) -> list[Ratio]:
    return generation_ratio("gpt2", settings)


@row("coconut")
def memory_gpt2(settings: Settings) -> list[Ratio]:
    return memory_ratios("gpt2", settings)


if __name__ == "__main__":  # a measurement in a fresh process
    run()
