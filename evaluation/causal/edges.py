"""Attention edges that interventions cut (specification, section 2.3): who may no longer look at whom.

`A⇸L`: the text behind a span does not read slots (the end marker still does); `all⇸L`: nothing behind the slots does,
the end marker included. A row that would lose all its keys keeps itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from modeling_latent import Visibility

from .cells import MARKER, PATCH, SLOT, TEXT, Row

QUERIES = ("A", "A_only", "all", "e", "L", "Q")
KEYS = ("L", "M", "I", "Q")


@dataclass(frozen=True)
class Layout:
    """Where everything is in a batch of prefixes and cells; `B` rows, `T` columns, bool unless said otherwise.

    Args:
        images: image tokens of the prefix.
        question: text of the prefix, without its first token (the attention sink).
        latents: slots and inserted image embeddings.
        markers: of spans.
        text: text behind the first latent.
        spans: `(B, T)` number of the span of a position, -1 outside.
        ends: end markers, and everything in cells behind a span.
        prefix: number of columns of the prefix.
    """

    images: torch.BoolTensor
    question: torch.BoolTensor
    latents: torch.BoolTensor
    markers: torch.BoolTensor
    text: torch.BoolTensor
    spans: torch.LongTensor
    ends: torch.BoolTensor
    prefix: int

    @classmethod
    def of(cls, images: torch.BoolTensor, mask: torch.Tensor, rows: Sequence[Row], width: int) -> "Layout":
        """From the image tokens `(B, P)` and the mask of prefixes and the cells behind them, padded on the left."""
        first = mask.bool() & (mask.cumsum(dim=1) == 1)
        cells = torch.zeros(5, len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            behind = False
            for column, cell in enumerate(row.cells, start=width - len(row.cells)):
                is_latent = cell.kind in (SLOT, PATCH)
                behind = behind or is_latent
                cells[0, number, column] = is_latent
                cells[1, number, column] = cell.kind == MARKER
                cells[2, number, column] = cell.kind == TEXT and behind
                cells[3, number, column] = cell.span + 1
                cells[4, number, column] = behind and not is_latent
        cells = cells.to(mask.device)

        def wide(part: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
            prefix = torch.zeros_like(images, dtype=part.dtype) if prefix is None else prefix.to(part.dtype)
            return torch.cat([prefix, part], dim=1)

        none = torch.zeros(len(rows), width, dtype=torch.bool, device=mask.device)
        return cls(
            images=wide(none, images),
            question=wide(none, mask.bool() & ~images & ~first),
            latents=wide(cells[0].bool()),
            markers=wide(cells[1].bool()),
            text=wide(cells[2].bool()),
            spans=wide(cells[3]) - 1,
            ends=wide(cells[4].bool()),
            prefix=images.shape[1],
        )


@dataclass(frozen=True)
class Edge:
    """One edge.

    Args:
        queries: one of `QUERIES`: text behind a span and the answer, the answer's content alone, everything behind a
            span's latents, end marker and what follows, latents, question.
        keys: one of `KEYS`: latents, markers, image, question.
        layers: decoder layers, None for all.
    """

    queries: str
    keys: str
    layers: frozenset[int] | None = None

    @property
    def in_prefix(self) -> bool:
        """Whether it is cut while the prefix is run."""
        return self.queries == "Q"

    def prefix_rules(self, layout: Layout) -> list[Visibility]:
        """The rule for the run of the prefix; none for an edge behind it."""
        if not self.in_prefix:
            return []
        return [Visibility(layout.question, self._keys(layout), later=False, layers=self.layers)]

    def rules(self, layout: Layout, content_start: int) -> list[Visibility]:
        """The rules for what stands behind the prefix; `content_start` ids of the reply are its template."""
        if self.in_prefix:
            return []
        keys, layers = self._keys(layout), self.layers
        if self.queries == "all":
            return [
                Visibility(_behind(layout, span), keys & (layout.spans == span), layers=layers)
                for span in range(_num_spans(layout))
            ]
        none = torch.zeros_like(layout.text)
        if self.queries == "A_only":
            pad = none.new_zeros(len(none), content_start)
            return [Visibility(torch.cat([none, pad], dim=1), torch.cat([keys, pad], dim=1), layers=layers)]
        queries = {"A": layout.text, "e": layout.ends, "L": layout.latents}[self.queries]
        return [Visibility(queries, keys, later=self.queries != "L", layers=layers)]

    def _keys(self, layout: Layout) -> torch.BoolTensor:
        named = {"L": layout.latents, "M": layout.markers, "I": layout.images, "Q": layout.question}
        return named[self.keys]


def _num_spans(layout: Layout) -> int:
    return int(layout.spans.max()) + 1 if layout.spans.numel() else 0


def _behind(layout: Layout, span: int) -> torch.BoolTensor:
    """`(B, T)` positions behind the last latent of a span."""
    places = torch.arange(layout.spans.shape[1], device=layout.spans.device)
    own = layout.latents & (layout.spans == span)
    last = torch.where(own, places, -1).amax(dim=1, keepdim=True)
    return (places > last) & (last >= 0)


def rules_of(edges: Iterable[Edge], layout: Layout, content_start: int = 0) -> list[Visibility]:
    """The rules of some edges behind the prefix."""
    return [rule for edge in edges for rule in edge.rules(layout, content_start)]


__all__ = ["KEYS", "QUERIES", "Edge", "Layout", "rules_of"]
