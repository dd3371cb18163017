"""Interventions by name: how they are spelled, and what there is (specification, section 2).

Spelling: `name`, `name(argument, ...)`, `name[selection]`; attention edges as `queries⇸keys`, several joined by `+`,
in a part of the layers as `A⇸L@0-25` (per cent). `K=4` forces four slots. ASCII: `A-/>L` is `A⇸L`.

    gauss_norm                noise_rel(0.5)        dummy_token(.)       zero[2]  (the third latent alone)
    zero[span=0] [span=last]  zero[hidden]          zero[patches]        zero[top=4] [random=4]
    markers_only              filler(.)             extend(2)            A⇸I+Q⇸I@50-75
"""

import re
from dataclasses import dataclass
from typing import Any

from .edges import KEYS, QUERIES, Edge
from .input_edits import INPUT_EDITS
from .slot_edits import SLOT_EDITS

# name -> (defaults of the arguments, None: must be given; help)
STRUCTURES: dict[str, tuple[tuple[Any, ...], str]] = {
    "K": ((None,), "exactly n slots, as K=n; further ones are the model's own feedback"),
    "markers_only": ((), "both markers, no slot between them (K=0)"),
    "slots_only": ((), "slots without markers; positions close up"),
    "no_span": ((), "no span at all, the start marker is banned"),
    "format_only": (("",), "no span; the literal text in its place, or nothing"),
    "filler": ((".",), "ordinary tokens in place of the slots, same positions"),
    "truncate": ((None,), "only the first j slots"),
    "extend": ((None,), "j more slots of the model's own feedback"),
    "force_span": ((), "a span forced right behind the prompt"),
    "silent": ((), "slots taken out, the positions of what follows kept"),
}
# Edits of every layer's output at the latents, for slots whose input is the same for all items.
STATES: dict[str, tuple[tuple[Any, ...], str]] = {
    "zero_kv": ((), "zeros as every layer's output at the latents"),
    "mean_kv": ((), "the mean of the other items as every layer's output at the latents"),
    "shuffle_kv": ((), "another item's outputs of every layer at the latents"),
}
# Grafts of one image's keys and values into a run on another.
GRAFTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "swap_image_after": ((), "slots from the own image; what follows sees another item's image"),
}
# Other names for what is there.
ALIASES = {"drop_KV(I)": "e⇸I", "swap_image_before": "other_image"}
_SPELLING = re.compile(r"(?P<name>[A-Za-z_]+)(?:\((?P<arguments>.*)\))?(?:\[(?P<select>[^\]]*)\])?")
_EDGE = re.compile(r"(?P<queries>\w+)⇸(?P<keys>\w+)(?:@(?P<low>\d+)-(?P<high>\d+))?")
_SELECT = re.compile(r"\d+(,\d+)*|span=(\d+|first|last)|hidden|patches|(top|random)=\d+")


@dataclass(frozen=True)
class Intervention:
    """One intervention.

    Args:
        name: as it is spelled.
        family: `"content"`, `"structure"`, `"state"`, `"edges"`, `"graft"` or `"input"`.
        rule: its name without arguments.
        arguments: its arguments.
        select: which latents, `""` for all.
        edges: `(queries, keys, (low, high) per cent of the layers or None)` of each edge.
    """

    name: str
    family: str
    rule: str
    arguments: tuple[Any, ...] = ()
    select: str = ""
    edges: tuple[tuple[str, str, tuple[int, int] | None], ...] = ()

    def cut_edges(self, num_layers: int) -> tuple[Edge, ...]:
        """The edges for a decoder of so many layers."""
        return tuple(Edge(queries, keys, _layers(part, num_layers)) for queries, keys, part in self.edges)

    @property
    def needs(self) -> str | None:
        """What the data must have: `"oracles"`, `"patches"`, or a further run."""
        if self.family == "content":
            return SLOT_EDITS[self.rule].needs
        return INPUT_EDITS[self.rule].needs if self.family == "input" else None


def _layers(part: tuple[int, int] | None, count: int) -> frozenset[int] | None:
    if part is None:
        return None
    low, high = (round(count * share / 100) for share in part)
    return frozenset(range(low, max(high, low + 1)))


def parse_intervention(text: str) -> Intervention:
    """An intervention by its spelling.

    Raises:
        ValueError: unknown, wrong arguments, or a selection that it does not take; says what there is.
    """
    text = text.strip().replace("-/>", "⇸")
    text = ALIASES.get(text, text)
    if "⇸" in text:
        return Intervention(text, "edges", text, edges=tuple(_edge(part, text) for part in text.split("+")))
    if re.fullmatch(r"K=\d+", text):
        return Intervention(text, "structure", "K", (int(text[2:]),))
    found = _SPELLING.fullmatch(text)
    tables = {"content": SLOT_EDITS, "structure": STRUCTURES, "state": STATES, "graft": GRAFTS, "input": INPUT_EDITS}
    name = found["name"] if found else ""
    family = next((family for family, table in tables.items() if name in table), None)
    if family is None or name == "K":
        raise ValueError(f"unknown intervention {text!r}; {known_interventions()}")
    if found["select"] is not None and (family != "content" or not _SELECT.fullmatch(found["select"])):
        raise ValueError(
            f"intervention {text!r}: [{found['select']}] selects latents of a content edit; write [0], [0,2], "
            "[span=0], [span=last], [hidden], [patches], [top=4] or [random=4]"
        )
    entry = tables[family][name]
    defaults = entry.arguments if family in ("content", "input") else entry[0]
    arguments = _arguments(text, found["arguments"], defaults)
    return Intervention(text, family, name, arguments, found["select"] or "")


def _edge(text: str, whole: str) -> tuple[str, str, tuple[int, int] | None]:
    found = _EDGE.fullmatch(text.strip())
    if not found or found["queries"] not in QUERIES or found["keys"] not in KEYS:
        raise ValueError(
            f"intervention {whole!r}: {text!r} is no edge; write queries⇸keys with queries from {list(QUERIES)} and "
            f"keys from {list(KEYS)}, e.g. A⇸L or A⇸L@0-25"
        )
    part = None
    if found["low"] is not None:
        part = int(found["low"]), int(found["high"])
        if not part[0] < part[1] <= 100:
            raise ValueError(f"intervention {whole!r}: layers {text!r}; write per cent, low below high, up to 100")
    return found["queries"], found["keys"], part


def _arguments(text: str, given: str | None, defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a spelling: numbers where they are, else text."""
    parts = [] if not given else ([given] if len(defaults) == 1 else [part.strip() for part in given.split(",")])
    if len(parts) > len(defaults):
        raise ValueError(f"intervention {text!r} has {len(parts)} arguments; it takes {len(defaults)}")
    values = [_value(part) for part in parts] + list(defaults[len(parts) :])
    if None in values:
        raise ValueError(f"intervention {text!r} lacks an argument; write e.g. {text.split('(')[0]}(1)")
    return tuple(values)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def known_interventions() -> str:
    """All names, in one sentence."""
    names = [*SLOT_EDITS, *(name for name in STRUCTURES if name != "K"), "K=n", *STATES, *GRAFTS, *INPUT_EDITS]
    return f"there are {', '.join(names)}, and edges such as A⇸L"


def describe_interventions() -> str:
    """Every intervention with its arguments, one a line, by family."""
    tables = {
        "content": {name: (rule.arguments, rule.help) for name, rule in SLOT_EDITS.items()},
        "structure": STRUCTURES,
        "states of the layers": STATES,
        "grafts": GRAFTS,
        "input": {name: (edit.arguments, edit.help) for name, edit in INPUT_EDITS.items()},
    }
    lines = []
    for family, table in tables.items():
        lines.append(f"{family}:")
        for name, (defaults, help_text) in table.items():
            given = ", ".join("..." if value is None else str(value) for value in defaults)
            spelled = "K=n" if name == "K" else f"{name}({given})" if defaults else name
            lines.append(f"  {spelled:<26} {help_text}")
    lines.append(f"edges: queries⇸keys, queries from {', '.join(QUERIES)}, keys from {', '.join(KEYS)}; e.g. A⇸L@0-25")
    return "\n".join(lines)


__all__ = [
    "ALIASES",
    "GRAFTS",
    "STATES",
    "STRUCTURES",
    "Intervention",
    "describe_interventions",
    "known_interventions",
    "parse_intervention",
]
