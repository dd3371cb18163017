"""The obviously correct latent decoder that every fast path is measured against.

One row, no cache, no padding, no hooks: at every step the whole sequence is embedded, the latent positions are
overwritten by the stored vectors, and the stock language model runs over all of it again. Nothing here is shared with
the decoding code of the library. The rules are those of LASER ("Forest Before Trees: Latent Superposition for
Efficient Visual Reasoning", arXiv 2601.06803); with `latent_ids="readable"` and `latent_budget="reference"` they are
exactly the rules of its reference code. `end_vector` and `mode_switch` are those of LVR ("Latent Visual Reasoning",
arXiv 2509.24251); with `latent_ids="readable"` and `reference=True` they are those of its reference code.

Words: a *slot* is a generated position that is fed by a vector instead of a token embedding; a *span* is a run of
slots after one start marker; what a slot *said* is the token that the scores chose there.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch


@dataclass
class NaiveResult:
    """What happened, step by step; step 0 reads the prompt. G tokens were generated, M of them are slots.

    Attributes:
        ids: the G generated tokens (slots carry the slot id or, in readable mode, what they said).
        is_latent: G flags, true at slots.
        slot_inputs: M vectors `[hidden]` in order; a slot in the very last position has one although it was never fed.
        said: M tokens, what each slot said.
        hidden: G vectors `[hidden]`, the last position after the final norm at each step.
        logits: G vectors `[vocabulary]`, as the stock head makes them of `hidden`, before any processing.
        fed: G - 1 vectors `[hidden]`, the input of each generated position that was read by a later step.
        positions: G - 1 tensors, the position of each: `[3]` (time, height, width), or `[1]` where it is plain.
    """

    ids: list[int] = field(default_factory=list)
    is_latent: list[bool] = field(default_factory=list)
    slot_inputs: list[torch.Tensor] = field(default_factory=list)
    said: list[int] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    fed: list[torch.Tensor] = field(default_factory=list)
    positions: list[torch.Tensor] = field(default_factory=list)


@torch.no_grad()
def naive_generate(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    image_grid_thw: torch.Tensor | None,
    *,
    strategy: str = "off",
    start_id: int,
    slot_id: int,
    end_id: int,
    eos_ids: Collection[int],
    max_new_tokens: int,
    max_latent_steps: int = 16,
    num_latent_steps: int | None = None,
    force_span: bool | None = None,
    answer_ids: list[int] | None = None,
    repetition_exit: bool = False,
    latent_ids: str = "placeholder",
    latent_budget: str = "strict",
    script: dict[int, int] | None = None,
    process_scores: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    reference: bool = False,
    stop_vector: torch.Tensor | None = None,
    end_threshold: float = 0.02,
    criterion: str = "mse",
    overwrite: Callable[[int, int, torch.Tensor], torch.Tensor] | None = None,
    noise_ratio: float = 0.0,
) -> NaiveResult:
    """Greedy decoding of one prompt `[1, length]`, recomputing everything at every step.

    Args:
        model: a stock model of the Qwen-VL families, of Chameleon, or a causal language model without images.
        strategy: `off` (no span opens), `fixed` (`num_latent_steps` slots after each start marker), `dynamic` and
            `mode_switch` (slots until the scores choose the end marker, the end is forced after `max(max_latent_steps,
            1)` of them), or `end_vector` (slots until the one fed last is near `stop_vector`, at most
            `max_latent_steps` of them; then text).
        force_span: the first token is the start marker; default true for `dynamic` only. If the prompt already ends
            with a start marker, the forced token is a slot that said the start marker.
        answer_ids: tokens forced one after the other after a forced end, or after a repetition exit of `fixed`.
        repetition_exit: leave the span when a token equals both before it; what slots said counts, not their id.
        latent_ids: slots carry `slot_id` (`placeholder`) or what they said (`readable`). With `placeholder` the scores
            never choose the slot id and, with strategy `off`, the start marker; with `readable` nothing is forbidden.
        latent_budget: `strict` never passes `max_new_tokens`; in `reference` an open span overrides every stop.
        script: step -> token; the scores of all other tokens are -inf at that step, before the rules below.
        process_scores: called with the ids so far `[1, n]` and float32 scores `[1, vocabulary]`, returns scores.
        head: hidden state -> slot vector, both `[hidden]`.
        reference: as in the published LVR code: the head changes what slots return, before `lm_head`, and a slot is
            fed the state as it is; `end_vector` compares the state before the span too, and a start marker that a
            slot said restarts its cap.
        stop_vector: `[hidden]`.
        end_threshold: how near the vector must be.
        criterion: `mse`, `mae` (means over the vector) or `cosine` (one minus it).
        overwrite: (span, slot in the span, vector) -> the vector that is fed; applied last.
        noise_ratio: relative noise of the reference, drawn from torch's global generator (see `_noise_is_drawn`).

    Raises:
        ValueError: an unknown strategy or mode, or inputs that do not fit together.
    """
    _check_options(
        strategy, latent_ids, latent_budget, num_latent_steps, max_new_tokens, force_span, stop_vector is not None
    )
    force_span = (strategy == "dynamic") if force_span is None else force_span
    prompt = _prompt(model, input_ids, pixel_values, image_grid_thw)
    sequence = input_ids[0].tolist()  # ids as they are written
    words = input_ids[0].tolist()  # the same with what the slots said
    vectors: dict[int, torch.Tensor] = {}  # position in the sequence -> slot vector
    script = script or {}
    never_chosen = []
    if latent_ids == "placeholder":  # a slot id that is no slot would have no vector
        never_chosen = [slot_id, start_id] if strategy == "off" else [slot_id]
    if not set(never_chosen).isdisjoint(script.values()):
        raise ValueError(f"the script {script} writes one of {never_chosen}, which are never chosen in this mode.")
    in_span, span, slots, since_start, answer_left = False, -1, 0, 0, []
    previous = None  # what the step before would have fed, or fed
    result = NaiveResult()

    for step in count():
        hidden = _read(prompt, sequence, vectors, result)
        if head is not None and reference and in_span:
            hidden = result.hidden[-1] = head(hidden)
        token = _choose(prompt, hidden, sequence, script.get(step), process_scores, never_chosen, result)
        if step == 0 and force_span:
            token = start_id
        if answer_left:
            token = answer_left.pop(0)

        # The rules of the span: does this token open one, stay in it, or leave it?
        was_in_span = in_span
        opens = strategy != "off" and not was_in_span and words[-1] == start_id
        repeats = repetition_exit and was_in_span and token == words[-1] == words[-2]
        if strategy in ("dynamic", "mode_switch"):
            if was_in_span and (slots >= max(max_latent_steps, 1) or repeats):
                token = end_id
                answer_left = list(answer_ids or [])
            in_span = (was_in_span or opens) and token != end_id
        elif strategy == "fixed":
            if repeats:
                answer_left = list(answer_ids or [])
            in_span = (opens and num_latent_steps > 0) or (was_in_span and slots < num_latent_steps and not repeats)
        elif strategy == "end_vector":
            since_start = 0 if opens or (reference and words[-1] == start_id) else since_start + 1
            near = (was_in_span or reference) and _is_near(previous, stop_vector, criterion, end_threshold)
            if was_in_span and since_start >= max_latent_steps:
                answer_left = list(answer_ids or [])
            in_span = (was_in_span or opens) and since_start < max_latent_steps and not near

        # The vector of a slot is the state that predicted it.
        if opens:
            span, slots = span + 1, 0
        vector = hidden if head is None or reference else head(hidden)
        if noise_ratio > 0 and _noise_is_drawn(strategy, was_in_span, in_span):
            vector = _add_noise(vector, noise_ratio)
        if in_span:
            if overwrite is not None:
                vector = overwrite(span, slots, vector)
            slots += 1
            vectors[len(sequence)] = vector
            result.slot_inputs.append(vector)
            result.said.append(token)
        previous = vector

        sequence.append(slot_id if in_span and latent_ids == "placeholder" else token)
        words.append(token)
        result.ids.append(sequence[-1])
        result.is_latent.append(in_span)
        budget_spent = step + 1 >= max_new_tokens
        if not in_span and (token in eos_ids or budget_spent):
            return result
        if budget_spent and latent_budget == "strict":
            return result


class _Prompt:
    """One prompt of a text decoder with plain positions: its images, encoded once, and where they stand in it."""

    def __init__(
        self, model: torch.nn.Module, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, grid: Any
    ) -> None:
        if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: give one row, [1, length].")
        self.model, self.grid = model, grid
        image_id = getattr(model.config, "image_token_id", None)
        self.image_positions = (input_ids[0] == image_id).nonzero()[:, 0].tolist() if image_id is not None else []
        self.image_vectors = [] if pixel_values is None else self.encode(pixel_values)
        if len(self.image_vectors) != len(self.image_positions):
            raise ValueError(
                f"the prompt has {len(self.image_positions)} image placeholders but the images give "
                f"{len(self.image_vectors)} vectors."
            )

    def encode(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """The vectors `[hidden]` of all image tokens."""
        raise ValueError(f"{type(self.model).__name__} reads no images.")

    def positions(self, ids: torch.Tensor) -> torch.Tensor:
        """`[axes, 1, length]`."""
        return torch.arange(ids.shape[1], device=ids.device)[None, None]

    def decode(self, ids: torch.Tensor, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """States `[1, length, hidden]` after the final norm."""
        output = self.model.base_model(inputs_embeds=embeds, position_ids=positions[0], use_cache=False)
        return output.last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[vocabulary]`."""
        return self.model.get_output_embeddings()(hidden)


class _QwenPrompt(_Prompt):
    """Qwen-VL families: rotary positions in three axes, deep-stack features."""

    def __init__(self, model: torch.nn.Module, input_ids: torch.Tensor, *images: Any) -> None:
        if (input_ids == model.config.video_token_id).any():
            raise ValueError("the prompt holds a video placeholder: the naive decoder reads images only.")
        self.deep_features: list[torch.Tensor] = []
        super().__init__(model, input_ids, *images)

    def encode(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        features = self.model.model.get_image_features(pixel_values, self.grid)
        # Qwen3-VL: further vectors of the images, one set a layer, that are added behind the first text layers.
        if "deepstack_features" in features:
            self.deep_features = [torch.cat(layer) for layer in features.deepstack_features]
        return [vector for image in features.pooler_output for vector in image]

    def _is_image(self, ids: torch.Tensor) -> torch.Tensor:
        image = torch.zeros_like(ids)  # 0 = text, and latents count as text
        image[0, self.image_positions] = 1
        return image

    def positions(self, ids: torch.Tensor) -> torch.Tensor:
        types = self._is_image(ids)
        return self.model.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=self.grid)[0]

    def decode(self, ids: torch.Tensor, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        deep: dict[str, Any] = {}
        if self.deep_features:
            deep = {"deepstack_visual_embeds": self.deep_features, "visual_pos_masks": self._is_image(ids) == 1}
        decoder = self.model.model.language_model
        return decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False, **deep).last_hidden_state


class _ChameleonPrompt(_Prompt):
    """Chameleon: an image is a row of tokens, named by the VQ encoder, which the model never says itself."""

    def encode(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        tokens = self.model.model.get_image_tokens(pixel_values)
        return list(self.model.get_input_embeddings()(tokens.flatten()))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().logits(hidden)
        names = self.model.config.vocabulary_map.items()
        logits[[token for name, token in names if name.startswith("IMGIMG")]] = torch.finfo(logits.dtype).min
        return logits


_PROMPTS = {"qwen2_vl": _QwenPrompt, "qwen2_5_vl": _QwenPrompt, "qwen3_vl": _QwenPrompt, "chameleon": _ChameleonPrompt}


def _prompt(model: torch.nn.Module, *inputs: Any) -> _Prompt:
    return _PROMPTS.get(model.config.model_type.removeprefix("latent_"), _Prompt)(model, *inputs)


def _read(prompt: _Prompt, sequence: list[int], vectors: dict[int, torch.Tensor], result: NaiveResult) -> torch.Tensor:
    """Run the language model over the whole sequence; return the last state after the final norm."""
    embedding = prompt.model.get_input_embeddings()
    ids = torch.tensor([sequence], device=embedding.weight.device)
    embeds = embedding(ids)
    for position, vector in zip(prompt.image_positions, prompt.image_vectors, strict=True):
        embeds[0, position] = vector
    for position, vector in vectors.items():
        embeds[0, position] = vector
    positions = prompt.positions(ids)
    hidden = prompt.decode(ids, embeds, positions)[0, -1]
    if result.ids:  # the last position is a generated one
        result.fed.append(embeds[0, -1])
        result.positions.append(positions[:, 0, -1])
    result.hidden.append(hidden)
    return hidden


def _choose(
    prompt: _Prompt,
    hidden: torch.Tensor,
    sequence: list[int],
    scripted: int | None,
    process_scores: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
    never_chosen: list[int],
    result: NaiveResult,
) -> int:
    """The token with the highest processed score."""
    logits = prompt.logits(hidden)
    result.logits.append(logits)
    scores = logits.float().clone()
    if process_scores is not None:
        ids = torch.tensor([sequence], device=scores.device)
        scores = process_scores(ids, scores[None])[0]
    if scripted is not None:
        return scripted
    scores[never_chosen] = float("-inf")
    return int(scores.argmax())


def _is_near(vector: torch.Tensor | None, target: torch.Tensor, criterion: str, threshold: float) -> bool:
    """Whether a vector, if there is one, is nearer to the target than the threshold."""
    if vector is None:
        return False
    if criterion == "cosine":
        distance = 1 - vector @ target / (vector.norm() * target.norm())
    else:
        distance = {"mse": (vector - target) ** 2, "mae": (vector - target).abs()}[criterion].mean()
    return bool(distance < threshold)


def _noise_is_drawn(strategy: str, was_in_span: bool, in_span: bool) -> bool:
    """When the reference draws noise.

    `dynamic`: at every step that begins inside a span, so the first slot of a span stays clean and the draw of the
    step that closes it is lost. `fixed`: at every slot.
    """
    return was_in_span if strategy == "dynamic" else in_span


def _add_noise(vector: torch.Tensor, ratio: float) -> torch.Tensor:
    noise = torch.randn_like(vector[None])[0]  # drawn as the reference does, [rows, hidden]
    return vector + ratio * vector.norm() * noise / (noise.norm() + 1e-8)


def _check_options(
    strategy: str,
    latent_ids: str,
    latent_budget: str,
    num_latent_steps: int | None,
    max_new_tokens: int,
    force_span: bool | None,
    has_stop_vector: bool,
) -> None:
    for name, value, allowed in (
        ("strategy", strategy, ("off", "fixed", "dynamic", "end_vector", "mode_switch")),
        ("latent_ids", latent_ids, ("placeholder", "readable")),
        ("latent_budget", latent_budget, ("strict", "reference")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}.")
    if strategy == "fixed" and num_latent_steps is None:
        raise ValueError("strategy='fixed' needs num_latent_steps.")
    if strategy == "end_vector" and not has_stop_vector:
        raise ValueError("strategy='end_vector' needs stop_vector.")
    if strategy == "off" and force_span:
        raise ValueError("strategy='off' opens no span: leave force_span unset.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: give at least 1.")
