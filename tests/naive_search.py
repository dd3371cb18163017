"""The naive search over latents: one prompt, no cache, no padding, no batch; every forward runs the whole prompt.

A step is, as published, one pass with the image for attention and one for the reward; attention comes from eager
attention of all rows, positions from the stock model, and vectors are put into the input of the first layer. Nothing
of the library is used but the rewards, which have tests of their own.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from modeling_latent.search_rewards import REWARDS
from tests.tiny import CHAMELEON, FAMILIES, TEXT_FAMILIES, tiny_processor

MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
QUESTIONS = (
    "What is it?",
    "Is the path safe? Answer with the option's letter.",
    "How many cells are there in the third row?",
)
NUM_THOUGHTS = 3


def images(number: int, first: int = 0) -> list[Image.Image]:
    """Different noise images of 12, 6 and 9 tokens of Qwen2-VL, again and again."""
    sizes, random = [(112, 84), (84, 56), (84, 84)], np.random.default_rng(first)
    return [Image.fromarray(random.integers(0, 256, (*sizes[i % 3][::-1], 3), dtype=np.uint8)) for i in range(number)]


def prompts(
    family: str, number_of_images: Sequence[int] = (1, 1, 1), first: int = 0, thoughts: int = NUM_THOUGHTS
) -> tuple[dict[str, torch.Tensor], torch.BoolTensor]:
    """A batch of questions of different length with images, padded on the left, and where its thought tokens stand:
    near the end of the user's turn. Text models get no images.

    Args:
        number_of_images: of each row.
        first: seed of the images.
    """
    processor, count = tiny_processor(family), len(number_of_images)
    tokenizer = processor.tokenizer
    if family in TEXT_FAMILIES:
        end, slot = tokenizer.encode("\n", add_special_tokens=False), processor.latent_token_id
        rows = [tokenizer.encode(text, add_special_tokens=False) for text in QUESTIONS[:count]]
        inputs = padded([[*row, *[slot] * thoughts, *end, *row[:2]] for row in rows])
        return inputs, inputs["input_ids"] == slot
    pictures, chats = iter(images(sum(number_of_images), first)), []
    for text, number in zip(QUESTIONS, number_of_images, strict=False):
        shown = [{"type": "image", "image": next(pictures)} for _ in range(number)]
        asked = {"type": "text", "text": text + tokenizer.pad_token * thoughts + " Answer:"}
        chats.append([{"role": "user", "content": [*shown, asked]}])
    size = {} if family == CHAMELEON else {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 40}}
    inputs = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, "padding_side": "left", "images_kwargs": size},
    )
    stands = (inputs["input_ids"] == tokenizer.pad_token_id) & inputs["attention_mask"].bool()
    return dict(inputs), stands


def padded(rows: list[list[int]], left: bool = True) -> dict[str, torch.Tensor]:
    """Ids and mask of rows; padding is 0."""
    width = max(map(len, rows))
    blank = [[0] * (width - len(row)) for row in rows]
    pairs = [(fill + row, fill + [1] * len(row)) if left else (row + fill, [1] * len(row) + fill)
             for fill, row in zip(blank, rows, strict=True)]  # fmt: skip
    ids, mask = (torch.tensor(each) for each in zip(*pairs, strict=True))
    return {"input_ids": ids, "attention_mask": mask}


def one_row(
    inputs: dict[str, torch.Tensor], mask: torch.Tensor, row: int, number_of_images: Sequence[int] = (1, 1, 1)
) -> tuple[dict[str, torch.Tensor], torch.BoolTensor]:
    """A row of a batch alone, without its padding."""
    kept = inputs["attention_mask"][row].bool()
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    alone = {name: inputs[name][row : row + 1, kept] for name in names if name in inputs}
    own = slice(sum(number_of_images[:row]), sum(number_of_images[: row + 1]))
    if number_of_images[row] and "image_grid_thw" in inputs:
        sizes = inputs["image_grid_thw"].prod(dim=1).tolist()
        start = sum(sizes[: own.start])
        alone["image_grid_thw"] = inputs["image_grid_thw"][own]
        alone["pixel_values"] = inputs["pixel_values"][start : start + sum(sizes[own])]
    elif number_of_images[row] and "pixel_values" in inputs:
        alone["pixel_values"] = inputs["pixel_values"][own]
    return alone, mask[row : row + 1, kept]


@dataclass
class NaiveResult:
    """What a naive search found; lists have one entry a step, `rewards` one a sample in it."""

    rewards: list[list[float]] = field(default_factory=list)
    thoughts: list[torch.Tensor] = field(default_factory=list)
    selections: list[list[dict[int, list[int]]]] = field(default_factory=list)
    best_reward: float = -float("inf")
    best_step: int = 0
    best_thoughts: torch.Tensor | None = None
    patches: dict[int, list[int]] = field(default_factory=dict)
    answer: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


class NaiveSearch:
    """A search on one prompt of a stock model.

    Args:
        model: stock; a copy with eager attention is made.
        inputs, mask: of [`one_row`].
        mode: `"paper"` or `"reference"`.
        options: by the names of the library, those of the image tokens without a default.
    """

    def __init__(
        self, model: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor, mode: str, **options: Any
    ) -> None:
        self.model = copy.deepcopy(model).eval()
        self.model.set_attn_implementation("eager")
        self.inputs, self.paper, self.options = inputs, mode == "paper", options
        self.ids = inputs["input_ids"][0].tolist()
        places = mask[0].nonzero()[:, 0].tolist()
        self.start, self.stop = places[0], places[-1] + 1
        self.has_media = any(name in inputs for name in MEDIA)
        self.embedding = self.model.get_input_embeddings().weight
        image = getattr(self.model.config, "image_token_id", None)
        self.image_places = [place for place, token in enumerate(self.ids) if token == image]
        if not self.paper:  # the first image alone
            first = self.image_places[:1]
            for place in self.image_places[1:]:
                if place != first[-1] + 1:
                    break
                first.append(place)
            self.image_places = first
        with torch.no_grad():
            prompt = self.run(self.ids, {}, image=self.has_media)
        self.sources = {
            place: prompt["hidden"][place]
            if not self.paper and options.get("visual_only")
            else prompt["embeds"][place]
            if self.paper
            else self.embedding[image]
            for place in self.image_places
        }

    def run(self, ids: list[int], vectors: dict[int, torch.Tensor], image: bool) -> dict[str, torch.Tensor]:
        """One whole pass over ids of which some positions hold vectors.

        Returns:
            `logits (L, V)`, `attention (L, L)` mean over layers and heads, `embeds` and `hidden (L, H)`.
        """
        tokens, length = torch.tensor([ids]), len(ids)
        flat = torch.arange(length)
        kwargs: dict[str, Any] = {"position_ids": flat.view(1, -1)}
        if self.model.config.model_type in FAMILIES:
            kwargs["position_ids"] = flat.expand(3, 1, -1)
        if image:
            media = {name: self.inputs[name] for name in MEDIA if name in self.inputs}
            if "mm_token_type_ids" in self.inputs:
                media["mm_token_type_ids"] = torch.zeros_like(tokens)
                media["mm_token_type_ids"][:, : self.start] = self.inputs["mm_token_type_ids"][:, : self.start]
            if self.paper and self.model.config.model_type in FAMILIES:
                del kwargs["position_ids"]  # those of the model's images
            kwargs |= {"input_ids": tokens, **media}
        else:
            embeds = self.embedding[tokens].clone()
            for place, vector in vectors.items():
                embeds[0, place] = vector
            kwargs["inputs_embeds"] = embeds
        with self.vectors_put_in(vectors if image else {}) as seen:
            output = self.model(**kwargs, use_cache=False, output_attentions=True, output_hidden_states=True)
        attention = torch.stack(output.attentions)[:, 0].mean(dim=(0, 1))
        embeds = seen["embeds"] if image else kwargs["inputs_embeds"][0]
        return {
            "logits": output.logits[0],
            "attention": attention,
            "embeds": embeds,
            "hidden": output.hidden_states[-1][0],
        }

    @contextmanager
    def vectors_put_in(self, vectors: dict[int, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """Overwrite rows of what the first layer reads."""
        seen: dict[str, torch.Tensor] = {}
        layers = getattr(self.model.get_decoder(), "layers", None)
        if layers is None:
            yield seen
            return

        def hook(module: Any, args: tuple) -> tuple:
            states = args[0].clone()
            for place, vector in vectors.items():
                states[0, place] = vector
            seen["embeds"] = states[0]
            return (states, *args[1:])

        handle = layers[0].register_forward_pre_hook(hook)
        try:
            yield seen
        finally:
            handle.remove()

    def laid_out(
        self, thoughts: torch.Tensor, selection: dict[int, list[int]]
    ) -> tuple[list[int], dict[int, torch.Tensor], list[int]]:
        """Ids with thought tokens and image tokens between them, the vectors by position, and where thoughts stand."""
        slot, block, where = self.ids[self.start], [], []
        for number in range(len(thoughts)):
            where.append(self.start + len(block))
            block += [thoughts[number], *(self.sources[place] for place in selection.get(number, []))]
        if not self.paper and any(selection.values()):  # written over the first rows of the longer block
            block[: len(thoughts)] = list(thoughts)
            where = list(range(self.start, self.start + len(thoughts)))
        ids = [*self.ids[: self.start], *[slot] * len(block), *self.ids[self.stop :]]
        return ids, {self.start + number: vector for number, vector in enumerate(block)}, where

    def reward(self, thoughts: torch.Tensor, selection: dict[int, list[int]]) -> torch.Tensor:
        """Of noisy thought tokens `(T, H)`, a number with a gradient."""
        name = self.options.get("reward", "confidence" if self.paper else "published_confidence")
        rows = self.options.get("reward_rows") or REWARDS[name].rows
        ids, vectors, where = self.laid_out(thoughts, selection)
        logits = self.run(ids, vectors, image=self.paper and self.has_media)["logits"]
        if rows == "answer":
            where = [len(ids) - 1]
        elif rows == "thoughts_and_end":
            where = [*where, where[0] + len(where) if not self.paper else self.start + len(vectors)]
        return REWARDS[name].function(logits[where].unsqueeze(0), self.options.get("reward_top_k", 10))[0]

    def select(
        self, attention: torch.Tensor, locked: dict[int, list[int]], budget: int | None
    ) -> dict[int, list[int]]:
        """Image tokens for each thought token, given the attention `(L, L)` of a prompt without image tokens."""
        chosen, limit = {}, len(self.image_places) if not budget else min(budget, len(self.image_places))
        for number in range(0, self.stop - self.start, self.options.get("visual_insert_stride", 1)):
            weights = attention[self.start + number]
            rest = sorted(self.image_places, key=lambda place: (-weights[place].item(), place))
            kept = locked.get(number, [])[:limit]
            chosen[number] = (kept + [place for place in rest if place not in kept])[:limit]
        return chosen

    @torch.no_grad()
    def search(
        self,
        steps: int,
        sigma: float,
        lr: float,
        seed: int = 42,
        new_tokens: int = 4,
    ) -> NaiveResult:
        """Search, then decode greedily."""
        given = self.options
        decay, samples, baseline = (
            given.get(name, default)
            for name, default in (("sigma_decay", 0.95), ("num_noise_samples", 1), ("baseline", "none"))
        )
        cap, budget = given.get("num_selected_patches"), given.get("initial_patch_count")
        budget = min(budget, cap) if budget and cap else budget or cap
        start_step, interval = (given.get(f"visual_injection_{name}", 0) for name in ("start_step", "interval"))
        found, random = NaiveResult(), torch.Generator().manual_seed(seed)
        if not self.paper:
            found.best_reward = 0.0
        thoughts = self.embedding[self.ids[self.start : self.stop]].clone()
        if self.paper and self.options.get("visual_only"):
            thoughts[:] = torch.stack(list(self.sources.values())).mean(0)
        found.best_thoughts, locked = thoughts, {}
        for step in range(steps):
            level = sigma * decay**step
            drawn = samples // 2 if baseline == "antithetic" else samples
            noise = [torch.randn(thoughts.shape, generator=random) * level for _ in range(drawn)]
            noise += [-each for each in noise] if baseline == "antithetic" else []
            rewards, selections = [], []
            for each in noise:
                selection: dict[int, list[int]] = {}
                if (
                    self.image_places
                    and step >= (start_step or 0)
                    and not (step - (start_step or 0)) % (interval or 1)
                ):
                    ids, vectors, _ = self.laid_out(thoughts + each, {})
                    attention = self.run(ids, vectors, image=True)["attention"]
                    selection = self.select(attention, locked, budget)
                selections.append(selection)
                rewards.append(self.reward(thoughts + each, selection).item())
            mean = sum(rewards) / samples
            scale = samples / (samples - 1) if baseline == "mean" else 1.0
            moves = [
                (reward - (mean if baseline == "mean" else 0.0)) * scale * each
                for reward, each in zip(rewards, noise, strict=True)
            ]
            before, thoughts = thoughts, thoughts + lr * torch.stack(moves).mean(0) / level**2
            found.rewards.append(rewards)
            found.thoughts.append(thoughts)
            found.selections.append(selections)
            best = max(range(samples), key=rewards.__getitem__)
            if rewards[best] > found.best_reward:
                found.best_reward, found.best_step = rewards[best], step
                found.best_thoughts = before + noise[best] if self.paper else thoughts
                locked = found.patches = selections[best]
                if cap and budget:
                    budget = min(cap, budget + given.get("patch_increment", 0))
        self.decode(found, new_tokens)
        return found

    def decode(self, found: NaiveResult, new_tokens: int) -> None:
        """Greedily, with the image and, in paper mode, the image tokens of the best step."""
        inject = self.options.get("inject_in_decode", self.paper)
        ids, vectors, _ = self.laid_out(found.best_thoughts, found.patches if inject else {})
        for _ in range(new_tokens):
            logits = self.run([*ids, *found.answer], vectors, image=self.has_media)["logits"][-1]
            found.logits.append(logits)
            found.answer.append(int(logits.argmax()))
