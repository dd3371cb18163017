"""What a causal card holds: conditions item by item, effects, verdict, and what was measured beside them.

Plain data with JSON in and out; `effects.py` and `verdict.py` compute the statistics, `causal_card.py` fills it,
`card_report.py` draws it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1  # of the JSON file


@dataclass
class ConditionResult:
    """One condition, item by item; every list is `[items]`, in the order of the card's items.

    Args:
        name: as the intervention is spelled (`"clean"`, `"gauss_norm"`, `"noise_abs(0.3)"`, `"A⇸L"`).
        family: `"clean"`, `"content"`, `"structure"`, `"edges"` or `"input"`.
        regime: `"live"` or `"frozen"`.
        count: `"clean"` or `"free"`.
        applied: whether the condition exists for the item (an oracle needs boxes, an order needs two slots); where
            False, the other lists hold the item's clean values and statistics leave the item out.
        correct: of the greedy reply.
        answers: what was read out of the reply, None when nothing was.
        texts: the replies, latents hidden.
        gold_log_prob: sum over the tokens of the gold answer's content, nats; None where no gold reply is known.
        gold_tokens: their number.
        option_log_probs: of an item, one for each option (sum over content tokens), or None.
        first_token_kl: KL(clean ‖ condition) over the vocabulary at the first answer token, nats, or None.
        first_token_js: Jensen-Shannon divergence there, nats, or None.
        num_latent_steps: slots of the item.
        num_spans: spans of the item.
        forced_closed: spans that a cap or the budget closed.
        answer_tokens: length of the reply behind the last span.
    """

    name: str
    family: str
    regime: str
    count: str
    applied: list[bool]
    correct: list[bool]
    answers: list[str | None]
    texts: list[str]
    gold_log_prob: list[float | None]
    gold_tokens: list[int]
    option_log_probs: list[list[float] | None]
    first_token_kl: list[float | None]
    first_token_js: list[float | None]
    num_latent_steps: list[int]
    num_spans: list[int]
    forced_closed: list[int]
    answer_tokens: list[int]

    @property
    def parsed(self) -> list[bool]:
        """Whether an answer could be read."""
        return [answer is not None for answer in self.answers]


@dataclass
class Effect:
    """Effect of a condition against the clean run on the items where it applies (specification, section 3).

    Differences are condition minus clean in points (0-100), intervals 95 %. `u` is log π(gold | clean) - log π(gold |
    condition), nats: positive when what was edited helped.
    """

    name: str
    n: int
    accuracy: float
    delta: float
    low: float
    high: float
    only_clean: int
    only_condition: int
    p_mcnemar: float
    p_holm: float
    discordant: float
    flip: float
    mde: float
    margin: float
    p_equivalence: float
    equivalent: bool
    parse_rate: float
    parse_shift: float
    delta_parsed: float | None = None
    u: float | None = None
    u_low: float | None = None
    u_high: float | None = None
    u_per_token: float | None = None
    delta_p_gold: float | None = None
    kl_options: float | None = None
    kl_first: float | None = None
    js_first: float | None = None
    recovery: float | None = None
    recovery_low: float | None = None
    recovery_high: float | None = None

    @property
    def significant(self) -> bool:
        """Whether McNemar's test, corrected for the conditions of the card, says that the accuracies differ."""
        return self.p_holm < 0.05


@dataclass
class Verdict:
    """The verdict line by the rule of the specification's section 7.

    Args:
        label: `"inert"`, `"presence"`, `"content"`, `"harmful"` or `"undecided"`.
        sentence: the line as a report prints it.
        reasons: every premise that was checked, with its numbers and whether it holds.
        missing: conditions that the rule needs and the card lacks.
    """

    label: str
    sentence: str
    reasons: list[str]
    missing: list[str] = field(default_factory=list)


@dataclass
class ItemView:
    """One item as a picture shows it (specification, section 6). Pictures are files beside the card.

    Args:
        index: of the item among the card's items.
        images: names of the picture files.
        question, answer, gold: texts.
        correct: of the clean run.
        grids: of each image, rows and columns of merged patches.
        slots: one for each slot, in order, see [`SlotView`].
        reads: share of the answer's attention: `image`, `slots`, `markers`, `question`, `sink`, `other`.
        roi: boxes of the record, `[image, x0, y0, x1, y1]`, normalised.
        options: names of the options.
        option_probs: of a condition's name, probability of each option.
        replies: of a condition's name, its reply.
    """

    index: int
    images: list[str]
    question: str
    answer: str
    gold: str
    correct: bool
    grids: list[tuple[int, int]]
    slots: list["SlotView"]
    reads: dict[str, float]
    roi: list[list[float]] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    option_probs: dict[str, list[float]] = field(default_factory=dict)
    replies: dict[str, str] = field(default_factory=dict)


@dataclass
class SlotView:
    """One slot of an [`ItemView`].

    Args:
        number: from 1, over all spans.
        heat: of each image, `[rows][columns]` attention of the slot on the merged patches, not renormalised.
        tokens: top tokens of the logit lens with their probabilities.
        norm_ratio: norm of the slot's input over the mean norm of the token embeddings.
        cosine: of the slot's input with that of the slot before, None for the first.
    """

    number: int
    heat: list[list[list[float]]]
    tokens: list[tuple[str, float]]
    norm_ratio: float
    cosine: float | None


@dataclass
class CausalCard:
    """A causal card.

    Args:
        model, dataset: names for the report.
        suite, regime, count, seed: as asked.
        strategy: options of generation of the clean run.
        ids: of the items.
        gold: answers.
        clusters: what items share, for the bootstrap.
        conditions: by name, `"clean"` first.
        effects: by name, without `"clean"`.
        verdict: see [`Verdict`].
        triggers: share of items with a span, spans and slots an item, forced-close and parse rate, answer length.
        per_slot: frozen edits of single slots: name of the intervention -> `u` of each slot (mean over items).
        geometry: `in` and `out`, see `geometry.py`; flat names to numbers or lists.
        probes: see `probes.py`.
        attention: see `attention_measures.py`.
        comparisons: named differences of two conditions (content, presence, oracle headroom): difference, low, high.
        items: pictures of some items.
        left_out: what was asked for and could not be done, with the reason.
        seconds: wall time: `clean`, `conditions`, `measures`.
        environment: versions and shape of the model.
    """

    model: str
    dataset: str
    suite: str
    regime: str
    count: str
    seed: int
    strategy: dict[str, Any]
    ids: list[str]
    gold: list[str]
    clusters: list[str]
    conditions: dict[str, ConditionResult]
    effects: dict[str, Effect]
    verdict: Verdict
    triggers: dict[str, float]
    per_slot: dict[str, list[float]] = field(default_factory=dict)
    geometry: dict[str, dict[str, Any]] = field(default_factory=dict)
    probes: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)
    comparisons: dict[str, dict[str, float]] = field(default_factory=dict)
    items: list[ItemView] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def clean(self) -> ConditionResult:
        """The clean run."""
        return self.conditions["clean"]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON; numbers that are not finite become null."""
        return _finite({"format": FORMAT, **asdict(self)})

    def save(self, path: str | Path) -> Path:
        """Writes `card.json`."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: str | Path) -> "CausalCard":
        """Reads what [`CausalCard.save`] wrote.

        Raises:
            ValueError: another format, or a damaged file; names it.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise ValueError(f"format is not {FORMAT}")
            values["conditions"] = {k: ConditionResult(**v) for k, v in values["conditions"].items()}
            values["effects"] = {k: Effect(**v) for k, v in values["effects"].items()}
            values["verdict"] = Verdict(**values["verdict"])
            values["items"] = [_item_view(view) for view in values["items"]]
            return cls(**values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no causal card ({error!r}); write it with examples/diagnose.py") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def _item_view(values: Mapping[str, Any]) -> ItemView:
    slots = [SlotView(**{**slot, "tokens": _pairs(slot["tokens"])}) for slot in values["slots"]]
    return ItemView(**{**values, "slots": slots, "grids": _pairs(values["grids"])})


def _pairs(rows: Sequence[Sequence[Any]]) -> list[tuple[Any, Any]]:
    return [(first, second) for first, second in rows]


__all__ = ["CausalCard", "ConditionResult", "Effect", "ItemView", "SlotView", "Verdict"]
