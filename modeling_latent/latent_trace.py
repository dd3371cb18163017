"""`LatentTrace`: the record of what happened in the spans of a decoded batch (contract C2).

`generate(return_dict_in_generate=True)` returns it as `output.latent_trace`. Trainers replay it, rewards score it,
diagnostics edit it, and it saves to and loads from one safetensors file.
"""

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_FORMAT = "latent_trace/1"


@dataclass(frozen=True)
class LatentSpan:
    """One span of one row.

    Args:
        row: row of the batch.
        start: position of the start marker, -1 when the span has none.
        first: position of the first slot (with `length` 0: the position after the start marker).
        length: number of slots, inserted image embeddings included.
        end: position of the end marker, -1 when there is none.
        reason: stop rule that closed it, `"open"` when decoding ended inside it.
    """

    row: int
    start: int
    first: int
    length: int
    end: int
    reason: str


@dataclass
class LatentTrace:
    """Slots of a batch. `B` rows, `T` positions (prompt with its padding, then the generated part), `N` slots, `H`
    hidden size.

    Args:
        sequences: `(B, T)` ids as returned by `generate`.
        prompt_length: number of prompt positions.
        slot_index: `(N, 2)` row and position of every slot, sorted.
        slot_inputs: `(N, H)` vector that entered the first layer at the slot (after noise and trace hook).
        slot_outputs: `(N, H)` final-norm hidden state at the slot.
        has_output: `(N,)` false where the output is unknown: a slot that decoding ended on (written but never fed), or
            one that stood in the prompt (of learned tokens also what assisted decoding and chunks do not keep).
        readable_ids: `(N,)` id that the slot would have said; for a slot of the prompt its own id.
        topk_ids: `(N, k)` ids of the LM head's distribution at the position before the slot, best first; -1 for a slot
            of the prompt.
        topk_probs: `(N, k)` their probabilities (softmax of the raw logits).
        spans: table of spans.
        position_ids: `(C, B, T)` positions as fed, the last three channels temporal, height and width for mrope, or
            `(B, T)` where a family has plain positions.
        attention_mask: `(B, prompt_length)` of the prompt, `None` when there was no padding. Behind the padding it is
            zero where learned tokens count as padding (`mask_latents="padding"`).
        extras: further tensors with one row per slot that a strategy recorded: `patch_column` `(N,)`, at an inserted
            image embedding the position of the image token that it copies, -1 at a slot.
        info: strategy, options and token ids of the call.
    """

    sequences: torch.LongTensor
    prompt_length: int
    slot_index: torch.LongTensor
    slot_inputs: torch.Tensor
    slot_outputs: torch.Tensor
    has_output: torch.BoolTensor
    readable_ids: torch.LongTensor
    topk_ids: torch.LongTensor
    topk_probs: torch.Tensor
    spans: list[LatentSpan] = field(default_factory=list)
    position_ids: torch.LongTensor | None = None
    attention_mask: torch.LongTensor | None = None
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of rows."""
        return self.sequences.shape[0]

    @property
    def num_slots(self) -> int:
        """Number of slots of all rows."""
        return self.slot_index.shape[0]

    @property
    def latent_mask(self) -> torch.BoolTensor:
        """`(B, T)` bool, true at slots."""
        mask = torch.zeros_like(self.sequences, dtype=torch.bool)
        mask[self.slot_index[:, 0], self.slot_index[:, 1]] = True
        return mask

    @property
    def latent_embeds(self) -> torch.Tensor:
        """`(B, T, H)` slot inputs, zero elsewhere: what `forward` takes to replay the sequences."""
        return self.dense("slot_inputs")

    def dense(self, name: str) -> torch.Tensor:
        """Scatter a per-slot tensor (`slot_inputs`, `topk_ids`, an extra, ...) to `(B, T, ...)`, zero elsewhere."""
        packed = self.extras[name] if name in self.extras else getattr(self, name)
        out = packed.new_zeros((*self.sequences.shape, *packed.shape[1:]))
        out[self.slot_index[:, 0], self.slot_index[:, 1]] = packed
        return out

    @property
    def readable_sequences(self) -> torch.LongTensor:
        """`(B, T)` ids with every slot replaced by the id that it would have said."""
        return torch.where(self.latent_mask, self.dense("readable_ids"), self.sequences)

    @property
    def num_latent_steps(self) -> torch.LongTensor:
        """`(B,)` number of slots of each row, those of the prompt included; inserted image embeddings do not count."""
        row, position = self.slot_index.unbind(1)
        patch = self.info.get("latent_patch_token_id")
        steps = row if patch is None else row[self.sequences[row, position] != patch]
        return torch.bincount(steps, minlength=len(self))

    def row(self, index: int) -> "LatentTrace":
        """View of one sample with its left padding cut off; a trace with `B = 1`.

        Raises:
            IndexError: no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a trace with {len(self)} rows")
        mask = None if self.attention_mask is None else self.attention_mask[index : index + 1]
        pad = 0 if mask is None else int((mask.cumsum(dim=1) == 0).sum())
        keep = self.slot_index[:, 0] == index
        shift = torch.tensor([index, pad], device=self.slot_index.device)
        packed = {name: getattr(self, name)[keep] for name in _PACKED}
        packed["slot_index"] = packed["slot_index"] - shift
        spans = [
            replace(s, row=0, start=s.start - pad if s.start >= 0 else -1, first=s.first - pad,
                    end=s.end - pad if s.end >= 0 else -1)
            for s in self.spans if s.row == index
        ]  # fmt: skip
        return replace(
            self,
            **packed,
            sequences=self.sequences[index : index + 1, pad:],
            prompt_length=self.prompt_length - pad,
            spans=spans,
            position_ids=None if self.position_ids is None else self.position_ids[..., index : index + 1, pad:],
            attention_mask=None if mask is None or bool(mask[:, pad:].all()) else mask[:, pad:],
            extras={
                name: value[keep] if name not in _POSITIONS else torch.where(value[keep] < 0, -1, value[keep] - pad)
                for name, value in self.extras.items()
            },
        )

    def replace_slots(self, slot_inputs: torch.Tensor) -> "LatentTrace":
        """Trace with other slot inputs `(N, H)`, for a replay with edited latents.

        Raises:
            ValueError: wrong shape.
        """
        if slot_inputs.shape != self.slot_inputs.shape:
            raise ValueError(f"slot_inputs must be {tuple(self.slot_inputs.shape)}, got {tuple(slot_inputs.shape)}")
        return replace(self, slot_inputs=slot_inputs)

    def to(self, device: torch.device | str) -> "LatentTrace":
        """Trace with all tensors on `device`."""
        moved = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if torch.is_tensor(getattr(self, f.name))
        }
        return replace(self, **moved, extras={name: value.to(device) for name, value in self.extras.items()})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; spans and info go to its metadata."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if torch.is_tensor(getattr(self, f.name))}
        tensors.update({f"extras.{name}": value for name, value in self.extras.items()})
        meta = {
            "format": _FORMAT,
            "prompt_length": str(self.prompt_length),
            "spans": json.dumps([vars(span) for span in self.spans]),
            "info": json.dumps(self.info),
        }
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, str(path), metadata=meta
        )

    @classmethod
    def load(cls, path: str | Path) -> "LatentTrace":
        """Read a file written by [`save`].

        Raises:
            ValueError: the file is not a trace.
        """
        with safe_open(str(path), "pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != _FORMAT:
                raise ValueError(
                    f"{path} is not a latent trace (format {meta.get('format')!r}); write it with LatentTrace.save"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        extras = {
            name.removeprefix("extras."): tensors.pop(name) for name in list(tensors) if name.startswith("extras.")
        }
        return cls(
            **tensors,
            prompt_length=int(meta["prompt_length"]),
            spans=[LatentSpan(**span) for span in json.loads(meta["spans"])],
            extras=extras,
            info=json.loads(meta["info"]),
        )


_POSITIONS = ("patch_column",)  # extras that are positions of their row, -1 for none
_PACKED = ("slot_index", "slot_inputs", "slot_outputs", "has_output", "readable_ids", "topk_ids", "topk_probs")


def find_spans(
    sequences: torch.LongTensor,
    latent_mask: torch.BoolTensor,
    prompt_length: int,
    start_id: int,
    end_id: int,
    reasons: dict[tuple[int, int], str],
) -> list[LatentSpan]:
    """Span table of decoded sequences.

    Args:
        sequences: `(B, T)`.
        latent_mask: `(B, T)`.
        prompt_length: spans that open before the last prompt position are not listed unless they hold slots.
        start_id, end_id: marker ids.
        reasons: `(row, position)` of the step that closed a span, to the stop rule's name.
    """
    spans = []
    length = sequences.shape[1]
    for row, (ids, mask) in enumerate(zip(sequences.tolist(), latent_mask.tolist(), strict=True)):
        position = 0
        while position < length:
            opens = ids[position] == start_id and not mask[position] and position >= prompt_length - 1
            if not opens and not mask[position]:
                position += 1
                continue
            first = position + 1 if not mask[position] else position
            stop = first
            while stop < length and mask[stop]:
                stop += 1
            if opens or stop > first:
                start = first - 1 if first > 0 and ids[first - 1] == start_id else -1
                end = stop if stop < length and ids[stop] == end_id else -1
                spans.append(LatentSpan(row, start, first, stop - first, end, reasons.get((row, stop), "open")))
            position = max(stop, position + 1)
    return spans
