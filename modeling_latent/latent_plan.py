"""Slots that depend on each other, run as a plan of segments over one KV cache (contract C4).

In IVT-LR (arXiv 2510.12603) and Coconut (arXiv 2412.06769) the slots stand in the sequence from the start, and each is
fed the hidden state of the position before its block, so a row with `n` slots is run in `n + 1` segments. The same
function serves training and generation. In IVT-LR a block also holds copies of image embeddings: those that the last
position before the block attends to most, over all layers and heads, none of them twice in a row of the batch.

Rows may differ in length, padding and number of slots: they are moved so that their first blocks stand in one column,
and a row without a block in a segment simply reads its text there. Attention is computed for the one query row that
chooses, beside SDPA or flash kernels; nothing of size `length x length` is allocated.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import distributed, nn
from transformers.cache_utils import DynamicCache

from .latent_attention import capture_attention_rows
from .latent_blocks import AlignedRows, choose_patches, find_blocks
from .latent_inputs import latent_positions
from .latent_plan_types import PATCH_IMAGES, LatentPlan, LatentPlanMixin, LatentPlanOutput, PlanStep


def run_plan(backbone: nn.Module, plan: LatentPlan, inputs: dict[str, Any]) -> LatentPlanOutput:
    """Run a batch with slots that depend on each other.

    Args:
        backbone: a [`LatentPlanMixin`]; its `forward` is called for every segment.
        plan: options.
        inputs: what the forward was given: `input_ids` `(B, T)`, and where there are any `attention_mask` (padding on
            either side), `position_ids`, image inputs, `past_key_values` (empty, to be filled), `use_cache`.

    Raises:
        ValueError: inputs that a plan cannot work with, blocks that do not fit the images of their row, or
            `gradient="bptt"` with activation checkpointing; names row or option and the remedy.
    """
    chain = _Chain(backbone, plan, inputs)
    if not (torch.is_grad_enabled() and plan.gradient == "detach"):
        if torch.is_grad_enabled() and backbone.training and _is_checkpointing(backbone):
            raise ValueError(
                "latent_gradient='bptt' needs the cache, which activation checkpointing drops; set "
                "activation_checkpointing: false, or latent_gradient: detach"
            )
        with _without_checkpointing(backbone):
            return chain.run()
    with torch.no_grad(), _without_checkpointing(backbone):
        chain.run_slots()
    return chain.full_pass()


def plan_latents(backbone: nn.Module, plan: LatentPlan, inputs: dict[str, Any]) -> torch.Tensor:
    """What the slots of a batch are fed, `(B, T, H)`, zero elsewhere, without a pass over what follows the last one.

    Gradients go through every slot where they are on; the arguments are those of [`run_plan`].
    """
    chain = _Chain(backbone, plan, inputs)
    with _without_checkpointing(backbone):
        chain.run_slots()
    return chain.aligned.undo(chain.latents, chain.ids.shape[1])


class _Chain:
    """One batch on its way through the segments. Columns are those of the aligned rows unless said otherwise."""

    def __init__(self, backbone: nn.Module, plan: LatentPlan, inputs: dict[str, Any]) -> None:
        self.backbone, self.plan, self.inputs = backbone, plan, dict(inputs)
        self.ids = self.inputs.pop("input_ids", None)
        _check_inputs(self.ids, self.inputs, plan)
        config = backbone.config
        slots = self.ids == config.latent_token_id if plan.slots is None else plan.slots
        patches = latent_positions(self.ids, (config.latent_patch_token_id,))
        self.blocks = find_blocks(slots, patches, plan.vision_first)
        self.latent_mask, self.given = slots | patches, self.inputs.pop("latent_embeds", None)
        given_mask = self.inputs.pop("latent_mask", None)
        if self.given is not None:
            self.given = torch.where((given_mask & ~self.latent_mask).unsqueeze(-1), self.given, 0)
            self.latent_mask = self.latent_mask | given_mask
        mask, self.cache = self.inputs.pop("attention_mask", None), self.inputs.pop("past_key_values", None)
        self.mask = torch.ones_like(self.ids) if mask is None else mask
        self.use_cache = bool(self.inputs.pop("use_cache", False))
        self.hidden_wanted = self.inputs.get("output_hidden_states")
        self.positions = self.inputs.pop("position_ids", None)
        if self.positions is None:
            self.positions = backbone.plan_positions(self.ids, self.mask, **self.inputs)
        self.encoded = backbone.encode_images(**self.inputs)
        for name in ("pixel_values", "mm_encoder_outputs", "mm_token_type_ids", "image_grid_thw"):
            self.inputs.pop(name, None)
        self.rows = None if self.encoded is None else backbone.image_rows(self.encoded)
        self._find_images()
        self._align()

    def _find_images(self) -> None:
        """Image tokens of each row, and which of them blocks may copy; in columns of the rows as they were."""
        ids, config, plan = self.ids.cpu(), self.backbone.config, self.plan
        token = getattr(config, "image_token_id", None)
        self.images = torch.zeros_like(ids, dtype=torch.bool) if token is None else ids == token
        self.free = torch.zeros_like(self.images) if self.rows is None else self.images
        if plan.patch_images == "last":
            runs = (self.images & ~nn.functional.pad(self.images[:, :-1], (1, 0))).long().cumsum(1)
            self.free = self.free & (runs == runs[:, -1:])
        # Number of image tokens before each place, counted over the whole batch.
        flat = self.images.flatten().long()
        self.ranks = (flat.cumsum(0) - flat).view_as(self.images).to(self.ids.device)
        before = nn.functional.pad(self.free.long().cumsum(1), (1, 0))
        blocks, used, mask = self.blocks, torch.zeros(len(ids), dtype=torch.long), self.mask.cpu()
        for row, start, count in zip(blocks.row.tolist(), blocks.start.tolist(), blocks.count.tolist(), strict=True):
            if not mask[row, start - 1]:
                raise ValueError(f"row {row} begins with a latent (position {start}); nothing comes before it")
            used[row] += count
            if used[row] > before[row, start]:
                raise ValueError(
                    f"row {row}: {int(used[row])} image embeddings are inserted up to position {start}, but only "
                    f"{int(before[row, start])} image tokens come before it; insert fewer (num_latent_patches)"
                )

    def _align(self) -> None:
        blocks, (batch, length) = self.blocks, self.ids.shape
        own = torch.arange(length).expand(batch, -1).masked_fill(self.mask.cpu() == 0, -1).amax(dim=1) + 1
        first = torch.full((batch,), length).scatter_reduce(0, blocks.row, blocks.start, "amin")
        has_block = first < length
        last = torch.where(has_block, first, 0).amax()
        shift = torch.where(has_block, last - first, 0)
        if self.cache is not None:  # it goes on being used: the columns stay those of the rows
            shift = torch.zeros_like(shift)
        width = int((own + shift).max()) if self.cache is None else length
        starts = sorted({*(blocks.start + shift[blocks.row]).tolist()})
        extra = self._missing_segments(len(starts))
        width = max(width, len(starts) + extra + 1)
        spare = [column for column in range(width - 1, 0, -1) if column not in starts][:extra]
        self.edges = sorted([0, *starts, *spare, width])
        self.shift, self.width = shift, width
        self.aligned = aligned = AlignedRows(shift.to(self.ids.device), width)
        self.aligned_images = AlignedRows(shift, width)(self.images)
        self.aligned_ids, self.aligned_mask = aligned(self.ids), aligned(self.mask)
        self.aligned_free = aligned(self.free.to(self.ids.device))
        self.aligned_ranks = aligned(self.ranks)
        positions = self.positions.expand(*self.positions.shape[:-2], batch, -1)
        channels = positions.shape[:-2]
        self.aligned_positions = aligned(positions.reshape(-1, length)).view(*channels, batch, width)
        size = self.backbone.config.get_text_config().hidden_size
        self.latents = torch.zeros(batch, width, size, dtype=self.backbone.dtype, device=self.ids.device)
        if self.given is not None:
            self.latents = aligned(self.given.to(self.latents.dtype))
        self.fed, self.columns = aligned(self.latent_mask), torch.full_like(self.aligned_ids, -1)
        self.scores: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def _missing_segments(self, number: int) -> int:
        """How many segments fewer this process has than the one with the most."""
        if not (self.plan.sync and distributed.is_available() and distributed.is_initialized()):
            return 0
        most = torch.tensor(number, device=self.ids.device)
        distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
        return int(most) - number

    # --- the segments ---

    def run(self) -> LatentPlanOutput:
        """All segments; the states of all positions."""
        parts = list(self._segments(len(self.edges) - 1))
        hidden = self._joined([part.last_hidden_state for part in parts])
        layers = None
        if self.hidden_wanted:
            layers = tuple(map(self._joined, zip(*(part.hidden_states for part in parts), strict=True)))
        return self._output(hidden, self.cache if self.use_cache else None, layers)

    def run_slots(self) -> None:
        """The segments up to the last slot: what the slots are fed is known then."""
        last = len(self.edges) - 2  # the segment from the last start on is left to the differentiable pass
        state = None
        for part in self._segments(last):
            state = part.last_hidden_state[:, -1]
        if state is not None:
            self._write(self.edges[last], state)

    def full_pass(self) -> LatentPlanOutput:
        """One pass over the rows as they were, with the slots as constants and the image embeddings in the graph."""
        length = self.ids.shape[1]
        embeds = self.aligned.undo(self.latents, length)
        columns = self.patch_columns()
        if self.rows is not None and bool((self.blocks.count > 0).any()):
            row, position = (columns >= 0).nonzero(as_tuple=True)
            copies = self.rows.index_select(0, self.ranks[row, columns[row, position]])
            embeds = embeds.index_put((row, position), copies.to(embeds.dtype))
        output = self.backbone.forward(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            use_cache=False,
            latent_embeds=embeds,
            latent_mask=self.latent_mask,
            **({} if self.encoded is None else {"mm_encoder_outputs": self.encoded}),
            **self.inputs,
        )
        return self._output(output.last_hidden_state, None, output.hidden_states, embeds)

    def _segments(self, number: int) -> Iterator[Any]:
        """The outputs of the first segments, one after the other."""
        ids, mask, positions = self.aligned_ids, self.aligned_mask, self.aligned_positions
        blocks, state = self.blocks, None
        at = blocks.start + self.shift[blocks.row]
        self.cache = DynamicCache() if self.cache is None else self.cache
        choosing = set() if self.plan.forced_patches is not None else set(at[blocks.count > 0].tolist())
        for start, end in zip(self.edges[:number], self.edges[1 : number + 1], strict=True):
            if state is not None:
                self._write(start, state)
            images = self._images_between(start, end)
            choose = end in choosing
            watch = capture_attention_rows(self.backbone, gradients=False) if choose else nullcontext()
            with watch as captured:
                output = self.backbone.forward(
                    input_ids=ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[..., start:end],
                    past_key_values=self.cache,
                    use_cache=True,
                    latent_embeds=self.latents[:, start:end],
                    latent_mask=self.fed[:, start:end],
                    **images,
                    **self.inputs,
                )
            self.attention = captured.mean()[:, 0, :end] if choose else None
            state = output.last_hidden_state[:, -1]
            yield output

    def _images_between(self, start: int, end: int) -> dict[str, Any]:
        """The encoder outputs of the image tokens of a segment; nothing where it has none."""
        here = self.aligned_images[:, start:end]
        if self.rows is None or not bool(here.any()):
            return {}
        keep = self.aligned_ranks[:, start:end][here.to(self.ids.device)]
        return {"mm_encoder_outputs": self.backbone.select_images(self.encoded, keep)}

    def _write(self, start: int, state: torch.Tensor) -> None:
        """What the blocks that begin at a column are fed: the state before it, and the chosen image embeddings."""
        blocks, device = self.blocks, self.ids.device
        here = (blocks.start + self.shift[blocks.row] == start).nonzero()[:, 0]
        row = blocks.row[here]
        # At spare borders, too, where nothing is written: a latent head whose weights are sharded then runs as often
        # on every process, forwards and backwards.
        vectors = state if self.plan.step is None else self.plan.step(state)
        vectors = self._edited(vectors, here) if len(here) else vectors
        slots = (row.to(device), (blocks.slot[here] + self.shift[row]).to(device))
        self.latents = self.latents.index_put(slots, vectors[slots[0]].to(self.latents.dtype))
        if not len(here):
            return
        most = int(blocks.count[here].max())
        if most == 0:
            return
        counts = torch.zeros(len(self.ids), dtype=torch.long).index_put((row,), blocks.count[here])
        first = torch.zeros_like(counts).index_put((row,), blocks.patch[here] + self.shift[row])
        place = torch.arange(most)
        kept = place < counts.unsqueeze(1)
        target_row, target = (kept.nonzero()[:, 0]).to(device), (first.unsqueeze(1) + place)[kept].to(device)
        chosen = self._chosen(start, here, counts)[kept.to(device)]
        copies = self.rows.index_select(0, self.aligned_ranks[target_row, chosen])
        self.latents = self.latents.index_put((target_row, target), copies.to(self.latents.dtype))
        self.columns = self.columns.index_put((target_row, target), chosen)
        self.aligned_free = self.aligned_free.index_put(
            (target_row, chosen), torch.zeros_like(chosen, dtype=torch.bool)
        )

    def _edited(self, vectors: torch.Tensor, here: torch.LongTensor) -> torch.Tensor:
        if self.plan.edit is None:
            return vectors
        blocks, row = self.blocks, self.blocks.row[here]
        active = torch.zeros(len(self.ids), dtype=torch.bool).index_fill(0, row, True)
        position = torch.full_like(active, -1, dtype=torch.long).index_put((row,), blocks.slot[here])
        index = torch.zeros_like(position).index_put((row,), blocks.index[here])
        edited = self.plan.edit(PlanStep(vectors, *(each.to(vectors.device) for each in (active, position, index))))
        return vectors if edited is None else edited.to(vectors)

    def _chosen(self, start: int, here: torch.LongTensor, counts: torch.LongTensor) -> torch.LongTensor:
        """`(B, most)` columns that the blocks copy."""
        if self.plan.forced_patches is not None:
            row, device = self.blocks.row[here], self.ids.device
            first = torch.zeros_like(counts).index_put((row,), self.blocks.patch[here])
            place = (first.unsqueeze(1) + torch.arange(int(counts.max()))).clamp(max=self.ids.shape[1] - 1).to(device)
            forced = self.plan.forced_patches.to(device).gather(1, place)
            return forced + self.aligned.shift.unsqueeze(1)
        scores = self.attention
        row = self.blocks.row[here].to(scores.device)
        self.scores.append((row, self.blocks.index[here].to(scores.device), scores))
        return choose_patches(scores, self.aligned_free[:, :start], counts, self.plan.patch_order)

    # --- what is returned, in columns of the rows as they were ---

    def patch_columns(self) -> torch.LongTensor:
        """`(B, T)` as in [`LatentPlanOutput`]."""
        columns = self.aligned.undo(self.columns + 1, self.ids.shape[1]) - 1
        return torch.where(columns >= 0, columns - self.aligned.shift.unsqueeze(1), -1)

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        joined = torch.cat(list(parts), dim=1)
        return joined if self._in_place() else self.aligned.undo(joined, self.ids.shape[1])

    def _in_place(self) -> bool:
        return self.width == self.ids.shape[1] and not bool(self.shift.any())

    def _output(
        self, hidden: torch.Tensor, cache: Any, layers: tuple | None, embeds: torch.Tensor | None = None
    ) -> LatentPlanOutput:
        length, scores = self.ids.shape[1], None
        if self.scores:
            most = int(self.blocks.index.max()) + 1
            scores = hidden.new_zeros(len(self.ids), most, length, dtype=torch.float32)
            for row, index, attention in self.scores:
                scores[row, index] = self.aligned.undo(attention, length)[row]
        return LatentPlanOutput(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=layers,
            latent_embeds=self.aligned.undo(self.latents, length) if embeds is None else embeds,
            latent_mask=self.latent_mask,
            patch_columns=self.patch_columns(),
            patch_scores=scores,
        )


def _check_inputs(ids: torch.LongTensor | None, inputs: dict[str, Any], plan: LatentPlan) -> None:
    if ids is None or inputs.get("inputs_embeds") is not None:
        raise ValueError("a latent plan reads the slots from input_ids; pass input_ids, and no inputs_embeds")
    if inputs.get("latent_embeds") is not None and (plan.slots is None or inputs.get("latent_mask") is None):
        raise ValueError(
            "latent_plan works the latents out and latent_embeds gives them; pass one of the two (for a decoded "
            "sequence: latent_embeds), or say with LatentPlan(slots=...) and latent_mask which are which"
        )
    cache = inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"past_key_values holds {cache.get_seq_length()} positions already; a latent plan begins with an empty "
            "cache: pass the whole conversation"
        )
    if inputs.get("pixel_values_videos") is not None:
        raise ValueError("a latent plan reads images, not videos; leave pixel_values_videos out")
    if inputs.get("pixel_values") is not None and inputs.get("mm_encoder_outputs"):
        raise ValueError("pixel_values and mm_encoder_outputs are two forms of the same images; pass one of them")
    for name in ("inputs_embeds", "pixel_values_videos", "video_grid_thw"):
        inputs.pop(name, None)
    mask = inputs.get("attention_mask")
    if mask is not None and (mask.dim() != 2 or mask.shape != ids.shape):
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} must have the shape of input_ids {tuple(ids.shape)} in a latent plan"
        )


def _checkpointed(backbone: nn.Module) -> list[nn.Module]:
    return [module for module in backbone.modules() if getattr(module, "gradient_checkpointing", False)]


def _is_checkpointing(backbone: nn.Module) -> bool:
    return bool(_checkpointed(backbone))


@contextmanager
def _without_checkpointing(backbone: nn.Module) -> Iterator[None]:
    """Layers keep their cache: activation checkpointing would drop it, and there is nothing to recompute here."""
    modules = _checkpointed(backbone) if backbone.training else []
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


__all__ = [
    "PATCH_IMAGES",
    "LatentPlan",
    "LatentPlanMixin",
    "LatentPlanOutput",
    "PlanStep",
    "plan_latents",
    "run_plan",
]
