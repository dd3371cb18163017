"""The published schedule of IVT-LR, written naively: what the plan of segments is tested and measured against.

"Reasoning in the Dark: Interleaved Vision-Text Reasoning in Latent Space" (arXiv 2510.12603). A prompt is followed by
n slots. Pass i runs the *whole* sequence up to slot i again, without a cache and with eager attention; the weights of
its last row, averaged over all layers and heads, say which K image columns are copied in before the slot; the last
hidden state becomes the slot's embedding. A last pass over everything gives logits and loss. Generation then runs the
whole sequence a second time to fill its cache. With K = 0 this is Coconut (arXiv 2412.06769) without its cache.

Words: a *slot* is a position fed by a hidden state, a *copy* one fed by an image embedding that is in the prompt too.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from .naive_backbones import NaiveBackbone

PATCH_ORDERS = ("score", "index_then_kth")
GRADIENTS = ("detach", "bptt")
IGNORED = -100


@dataclass
class NaiveStaged:
    """What happened; B rows, S given columns, n slots a row, L = S + all copies.

    Attributes:
        input_ids, attention_mask: `(B, L)`; copies carry the patch id.
        labels: `(B, L)` or `None`; -100 at copies.
        source: `(B, L)` where a column comes from: `j >= 0` is column j of the input, `-1 - j` a copy of column j.
        inputs_embeds: `(B, L, H)` of the last pass.
        hidden: `(B, L, H)` of the last pass, after the final norm.
        logits: `(B, L, V)` of the last pass.
        loss: mean cross entropy over all labels, or `None` without a label.
        latents: n tensors `(B, H)`, what was written into the slots.
        selected: n tensors `(B, k)`, columns of the input that were copied, in the order of the copies.
        scores: n tensors `(B, S)`, the averaged weights of the last row, 0 where the input is not an image column.
        pass_lengths: columns of every pass.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    labels: torch.LongTensor | None
    source: torch.LongTensor
    inputs_embeds: torch.Tensor
    hidden: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    latents: list[torch.Tensor] = field(default_factory=list)
    selected: list[torch.LongTensor] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    pass_lengths: list[int] = field(default_factory=list)


def naive_staged(
    backbone: NaiveBackbone,
    input_ids: torch.LongTensor,
    attention_mask: torch.LongTensor | None = None,
    labels: torch.LongTensor | None = None,
    *,
    slot_id: int,
    patch_id: int = -1,
    num_patches: int = 0,
    patch_order: str = "score",
    patch_images: str = "all",
    gradient: str = "detach",
    selected: Sequence[torch.LongTensor] | None = None,
    logits_of_every_pass: bool = False,
) -> NaiveStaged:
    """Run the schedule; every pass keeps its graph where gradients are on.

    Args:
        backbone: stock model with the images of the batch.
        input_ids: `(B, S)`; the n slots of a row stand side by side, in the same columns of all rows.
        attention_mask: `(B, S)`, 0 at pads on either side.
        labels: `(B, S)`, -100 where nothing is learnt.
        slot_id: id of a slot.
        patch_id: id that copies carry in the result; -1 only works when nobody embeds it again.
        num_patches: K, copies before each slot; fewer when the images run out.
        patch_order: `"score"`, or `"index_then_kth"`: the columns above the K-th score, then those equal to it, both
            in the order of the sequence (what the reference does on a GPU). Equal scores: the earlier column first.
        patch_images: `"all"`, or `"last"` for the last run of image columns only.
        gradient: `"detach"` stops it at the slots, `"bptt"` lets it through the chain.
        selected: n tensors `(B, K)` of columns to copy, instead of choosing them.
        logits_of_every_pass: as published, the logits of all passes are kept and scored side by side, although only
            the last pass has labels: the same loss and gradients, found by walking back through every pass.

    Raises:
        ValueError: an unknown option, slots that do not line up, or rows whose images run out at different slots.
    """
    _check(patch_order, patch_images, gradient)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    slots = _aligned_slots(input_ids, slot_id)
    columns = _usable_images(backbone.image_columns(input_ids) & mask.bool(), patch_images, slots)
    source = torch.arange(input_ids.shape[1], device=input_ids.device).repeat(len(input_ids), 1)
    run = NaiveStaged(input_ids, mask, labels, source, backbone.embed(input_ids))
    table, kept = run.inputs_embeds, []
    for step in range(len(slots)):
        end = slots[0] + sum(chosen.shape[1] + 1 for chosen in run.selected)
        output = _pass(backbone, run, end, output_attentions=num_patches > 0)
        scores = _scores(output.attentions, columns)
        if selected is None:
            chosen = _choose(scores, columns, run.selected, num_patches, patch_order)
        else:
            chosen = selected[step].to(input_ids)
        state = output.last_hidden_state[:, -1]
        latent = state.detach() if gradient == "detach" else state
        _insert(run, end, chosen, table, latent, patch_id)
        run.latents.append(latent)
        run.scores.append(scores)
        if logits_of_every_pass:
            kept.append(backbone.logits(output.last_hidden_state))
    run.hidden = _pass(backbone, run, run.input_ids.shape[1]).last_hidden_state
    run.logits = backbone.logits(run.hidden)
    if labels is not None:
        run.loss = _loss(torch.cat([*kept, run.logits], dim=1) if kept else run.logits, run.labels)
    return run


@dataclass
class NaiveStagedGeneration:
    """Greedy decoding of one prompt: new tokens, backbone calls it took, and the run before the first token."""

    new_tokens: list[int]
    calls: int
    staged: NaiveStaged


@torch.no_grad()
def naive_staged_generate(
    backbone: NaiveBackbone,
    input_ids: torch.LongTensor,
    *,
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    stop_on_first_token: bool = False,
    use_cache: bool = True,
    slot_id: int,
    patch_id: int,
    **options: object,
) -> NaiveStagedGeneration:
    """Decode one prompt as the published code does: passes, last pass, then the whole sequence once more.

    Args:
        backbone: see [`naive_staged`].
        input_ids: `(1, S)`, ending with the slots.
        max_new_tokens: cap.
        eos_ids: ids that end the text; they are kept.
        stop_on_first_token: whether the first new token may end it (it may not in the published code).
        use_cache: `False` runs the whole sequence for every token (published Coconut).
        slot_id, patch_id, options: see [`naive_staged`].
    """
    before = backbone.calls
    run = naive_staged(backbone, input_ids, slot_id=slot_id, patch_id=patch_id, **options)
    ids, embeds, cache = run.input_ids, run.inputs_embeds, None
    new = [int(run.logits[0, -1].argmax())]
    while len(new) < max_new_tokens and not (new[-1] in eos_ids and (len(new) > 1 or stop_on_first_token)):
        token = ids.new_tensor([[new[-1]]])
        ids = torch.cat([ids, token], dim=1)
        embeds = torch.cat([embeds, backbone.model.get_input_embeddings()(token)], dim=1)
        mask = torch.ones_like(ids)
        fed = slice(0 if cache is None else ids.shape[1] - 1, None)
        positions = backbone.positions(ids, mask)[..., fed]
        memory = {"use_cache": use_cache, "past_key_values": cache}
        output = backbone.run(embeds[:, fed], ids[:, fed], mask, positions, **memory)
        cache = output.past_key_values if use_cache else None
        new.append(int(backbone.logits(output.last_hidden_state[0, -1]).argmax()))
    return NaiveStagedGeneration(new, backbone.calls - before, run)


def _check(patch_order: str, patch_images: str, gradient: str) -> None:
    known = {"patch_order": PATCH_ORDERS, "patch_images": ("all", "last"), "gradient": GRADIENTS}
    for name, value in (("patch_order", patch_order), ("patch_images", patch_images), ("gradient", gradient)):
        if value not in known[name]:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {list(known[name])}")


def _aligned_slots(input_ids: torch.LongTensor, slot_id: int) -> list[int]:
    """The columns of the slots, the same in all rows and side by side."""
    rows = [(row == slot_id).nonzero()[:, 0].tolist() for row in input_ids]
    first = rows[0]
    if any(row != first for row in rows) or first != list(range(first[0], first[0] + len(first)) if first else []):
        raise ValueError(f"slots stand in columns {rows}; give rows whose slots line up, side by side, or one row")
    return first


def _usable_images(columns: torch.BoolTensor, patch_images: str, slots: list[int]) -> torch.BoolTensor:
    """`(B, S)` image columns before the slots, all of them or the last run of each row."""
    if slots:
        columns[:, slots[0] :] = False
    if patch_images == "last":
        for row in columns:
            gaps = ((~row).cumsum(0) * row).tolist()  # the same number along a run
            row &= torch.tensor([gap == max(gaps) for gap in gaps], device=row.device)
    return columns


def _scores(attentions: tuple[torch.Tensor, ...] | None, columns: torch.BoolTensor) -> torch.Tensor:
    """`(B, S)` weights of the last row, averaged over layers and heads; 0 where there is no image column."""
    scores = torch.zeros(columns.shape, device=columns.device)
    if attentions is None:
        return scores
    row = torch.stack([weights[:, :, -1].float().mean(1) for weights in attentions]).mean(0).detach()
    width = min(row.shape[1], columns.shape[1])
    scores[:, :width] = row[:, :width] * columns[:, :width]
    return scores


def _pass(backbone: NaiveBackbone, run: NaiveStaged, end: int, **options: object) -> object:
    """The first `end` columns through the backbone, without a cache."""
    run.pass_lengths.append(end)
    ids, mask = run.input_ids[:, :end], run.attention_mask[:, :end]
    return backbone.run(run.inputs_embeds[:, :end], ids, mask, backbone.positions(ids, mask), **options)


def _choose(
    scores: torch.Tensor, columns: torch.BoolTensor, taken: list[torch.LongTensor], most: int, order: str
) -> torch.LongTensor:
    """`(B, k)` image columns that are not taken yet, those with the highest scores, row by row."""
    rows: list[list[int]] = []
    for index, score in enumerate(scores.tolist()):
        used = {j for chosen in taken for j in chosen[index].tolist()}
        free = [j for j in columns[index].nonzero()[:, 0].tolist() if j not in used]
        ranked = sorted((-score[j], j) for j in free)[:most]
        if order == "index_then_kth":
            ranked.sort(key=lambda pair, last=ranked[-1:]: (pair[0] == last[0][0], pair[1]))
        rows.append([j for _, j in ranked])
    counts = [len(row) for row in rows]
    if len(set(counts)) != 1:
        raise ValueError(f"{counts} image columns are left in the rows; give these rows one by one")
    return torch.tensor(rows, dtype=torch.long, device=scores.device).view(len(rows), counts[0])


def _insert(
    run: NaiveStaged,
    end: int,
    chosen: torch.LongTensor,
    table: torch.Tensor,
    latent: torch.Tensor,
    patch_id: int,
) -> None:
    """Put the copies before the slot in column `end`, and the latent into it."""
    copies = table.gather(1, chosen[..., None].expand(-1, -1, table.shape[-1]))
    before, after = run.inputs_embeds[:, :end], run.inputs_embeds[:, end + 1 :]
    run.inputs_embeds = torch.cat([before, copies, latent[:, None], after], dim=1)

    def spread(values: torch.Tensor, inserted: torch.Tensor) -> torch.Tensor:
        return torch.cat([values[:, :end], inserted, values[:, end:]], dim=1)

    run.input_ids = spread(run.input_ids, torch.full_like(chosen, patch_id))
    run.attention_mask = spread(run.attention_mask, torch.ones_like(chosen))
    run.source = spread(run.source, -1 - chosen)
    if run.labels is not None:
        run.labels = spread(run.labels, torch.full_like(chosen, IGNORED))
    run.selected.append(chosen)


def _loss(logits: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor | None:
    """Next-token cross entropy; the labels belong to the last columns of the logits."""
    labels = labels[:, 1:]
    if not (labels != IGNORED).any():
        return None
    labels = functional.pad(labels, (logits.shape[1] - 1 - labels.shape[1], 0), value=IGNORED)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten())


__all__ = ["NaiveStaged", "NaiveStagedGeneration", "naive_staged", "naive_staged_generate"]
