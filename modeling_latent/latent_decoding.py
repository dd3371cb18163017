"""Token ids back to text that shows the latents: every span as the words that its slots would have said."""

import unicodedata
from itertools import groupby
from typing import Any

_JOINERS = frozenset("-'’_\ufffd")


class LatentDecodingMixin:
    """For a processor with a `tokenizer` and the ids of its latent tokens (see `latent_tokens.py`)."""

    def decode_latent(self, sequence_ids: Any, readable_ids: Any = None, latent_mask: Any = None) -> str:
        """Text of one sequence with every latent span shown as the words that its slots would have said.

        `decode(ids, skip_special_tokens=True)` hides the latents; here a span reads `⟨Seats·Fence·Outside⟩`. Items are
        separated by `·`. A slot starts a new item when its token begins with a space or when a word boundary lies
        between it and the slot before; otherwise it is the rest of that word (`Snow` + `board` read `⟨Snowboard⟩`). A
        special token that a slot said stays literal, an unknown one is `?`, white space alone `␣`, and a run of
        inserted image embeddings `[2 patches]`. With no readable id in the span it reads `⟨3 latents⟩`. Learned tokens
        are slots too, and read as their names where `readable_ids` is not given. Outside the spans the start, end and
        all other special tokens are dropped.

        Args:
            sequence_ids: `[length]` ids (tensor, array or list).
            readable_ids: `[length]` ids, at a latent position the arg-max id that the slot would have said, negative
                where unknown; other positions are not read. A row of `trace.dense("readable_ids")` or of
                `trace.readable_sequences` is such a list.
            latent_mask: `[length]` booleans, true at latent positions (a row of `trace.latent_mask`). Default: where
                the id is the slot, the patch or a learned token. When only the mask is given, the ids under it are
                taken as what the slots said.

        Raises:
            ValueError: for a batch, or lengths that differ.
        """
        ids = _as_list(sequence_ids)
        if any(isinstance(i, list) for i in ids):
            raise ValueError("decode_latent takes one sequence; use batch_decode_latent for a batch")
        placeholders = {self.latent_token_id, self.latent_patch_token_id}
        latents = placeholders | set(self.latent_learned_token_ids or ())
        mask = [i in latents for i in ids] if latent_mask is None else [bool(m) for m in _as_list(latent_mask)]
        if readable_ids is not None:
            said = _as_list(readable_ids)
        else:
            said = [-1 if i in placeholders else i for i in ids]
        for name, values in (("readable_ids", said), ("latent_mask", mask)):
            if len(values) != len(ids):
                raise ValueError(f"{name} has {len(values)} entries for {len(ids)} ids; give one a position")
        pieces = []
        for latent, group in groupby(range(len(ids)), key=mask.__getitem__):
            positions = list(group)
            if latent:
                pieces.append(self._show_span([(ids[i], said[i]) for i in positions]))
            else:
                pieces.append(self._text([ids[i] for i in positions], skip_special_tokens=True))
        return "".join(pieces)

    def batch_decode_latent(self, sequences: Any, readable_ids: Any = None, latent_mask: Any = None) -> list[str]:
        """[`decode_latent`] for each row of a batch.

        Args:
            sequences: `[batch, length]` ids, or a list of sequences.
            readable_ids: `None`, or one row a sequence.
            latent_mask: `None`, or one row a sequence.

        Raises:
            ValueError: when the numbers of rows differ.
        """
        size = len(sequences)
        for name, values in (("readable_ids", readable_ids), ("latent_mask", latent_mask)):
            if values is not None and len(values) != size:
                raise ValueError(f"{name} has {len(values)} rows for {size} sequences")
        readable_ids = [None] * size if readable_ids is None else readable_ids
        latent_mask = [None] * size if latent_mask is None else latent_mask
        return [self.decode_latent(*row) for row in zip(sequences, readable_ids, latent_mask, strict=True)]

    def _text(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def _show_span(self, slots: list[tuple[int, int]]) -> str:
        """One span from pairs (id in the sequence, readable id)."""
        patch_id = self.latent_patch_token_id
        readable = any(said >= 0 for i, said in slots if i != patch_id)
        items: list[str | list[int]] = []  # a literal, or the ids of one word
        for patches, group in groupby(slots, key=lambda slot: slot[0] == patch_id):
            run = [said for _, said in group]
            if patches:
                items.append(f"[{len(run)} patch{'es' if len(run) > 1 else ''}]")
            elif not readable:
                items.append(f"{len(run)} latent{'s' if len(run) > 1 else ''}")
            else:
                for said in run:
                    if said < 0:
                        items.append("?")
                    elif items and isinstance(items[-1], list) and self._continues(items[-1][-1], said):
                        items[-1].append(said)
                    else:
                        items.append([said])
        words = [item if isinstance(item, str) else self._text(item).strip() or "␣" for item in items]
        return "⟨" + "·".join(words) + "⟩"

    def _continues(self, left: int, right: int) -> bool:
        """Whether token `right` is the rest of the word that token `left` belongs to."""
        return _in_word(self._text([left])[-1:]) and _in_word(self._text([right])[:1])


def _in_word(character: str) -> bool:
    """Letters, digits, combining marks, hyphens, apostrophes, and the replacement character of an incomplete byte."""
    return bool(character) and (
        character.isalnum() or character in _JOINERS or unicodedata.category(character).startswith("M")
    )


def _as_list(values: Any) -> list:
    return values.tolist() if hasattr(values, "tolist") else list(values)


__all__ = ["LatentDecodingMixin"]
