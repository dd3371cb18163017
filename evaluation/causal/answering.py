"""The replies that are teacher-forced: the gold answer and the options of an item, cut at their content."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trainers.data.records import Record

from ..benchmarks.benchmark import AskProtocol, Benchmark, GoldReply


class ForcedReply(NamedTuple):
    """Ids of a reply; those of its content are `ids[start:stop]`."""

    ids: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class ItemAnswers:
    """What is scored for an item.

    Args:
        gold: the gold answer as text.
        reply: the reply that says it, None where its content has no token.
        names: options as text, empty for open answers.
        options: their replies.
    """

    gold: str
    reply: ForcedReply | None
    names: tuple[str, ...] = ()
    options: tuple[ForcedReply, ...] = field(default=())

    @property
    def gold_option(self) -> int | None:
        """Number of the gold answer among the options."""
        return self.names.index(self.gold) if self.gold in self.names else None


def forced_reply(tokenizer: Any, reply: GoldReply) -> ForcedReply | None:
    """The ids of a reply, as one text; None without content."""
    text = reply.before + reply.content + reply.after
    if not reply.content:
        return None
    if not getattr(tokenizer, "is_fast", False):
        parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in reply]
        return ForcedReply(tuple(sum(parts, [])), len(parts[0]), len(parts[0]) + len(parts[1]))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    first, last = len(reply.before), len(reply.before) + len(reply.content)
    inside = [low < last and high > first for low, high in encoded["offset_mapping"]]
    if True not in inside:
        return None
    start = inside.index(True)
    return ForcedReply(tuple(encoded["input_ids"]), start, start + sum(inside))


def item_answers(tokenizer: Any, benchmark: Benchmark, protocol: AskProtocol, record: Record) -> ItemAnswers:
    """The gold answer and the options of a record."""
    gold, names = benchmark.gold(record), tuple(benchmark.answers(record) or ())
    options = tuple(forced_reply(tokenizer, protocol.gold_reply(name)) for name in names)
    if any(option is None for option in options):
        names, options = (), ()
    return ItemAnswers(gold, forced_reply(tokenizer, protocol.gold_reply(gold)), names, options)


__all__ = ["ForcedReply", "ItemAnswers", "forced_reply", "item_answers"]
