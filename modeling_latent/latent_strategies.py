"""Decoding strategies: when a span opens, what closes it, and the options of `generate` that steer them.

Three tables, all open to registration, none of them edited when a method is added:

* `LATENT_OPTIONS`: every option of `generate`, with default, check and help text;
* `STOP_RULES`: named functions `(LatentStep) -> BoolTensor` that say which rows close their span now;
* `LATENT_STRATEGIES`: a strategy is a list of stop rules and a few switches.

LASER's state machines (`dynamic`, `fixed`) follow arXiv 2601.06803 and its published decoding loop.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch


@dataclass
class LatentStep:
    """What a stop rule, a strategy or a trace hook sees at one decode step; `R` rows, `T` ids so far.

    Args:
        input_ids: `(R, T)` ids so far, prompt included.
        prompt_length: number of prompt positions (padding included).
        is_open: `(R,)` bool, rows that are inside a span at this step.
        count: `(R,)` slots written in the open span so far.
        span: `(R,)` index of the span within the generated part, 0 for the first one (-1 before it).
        said: `(R,)` id that the LM head says (arg max, or the sample when sampling).
        recent: `(R, 2)` the two ids before, each slot by the id that it would have said.
        scores: `(R, V)` processed scores.
        latent: `(R, H)` vector that is fed if this position becomes a slot; a trace hook may return another one.
        is_slot: `(R,)` bool, rows whose position `T` becomes a slot; filled for the trace hook, `None` for stop rules.
        options: the options of this call; per-row options are tensors `(R,)`.
        config: the model's configuration (token ids).
        before: `(R, H)` vector of the position before: what was fed there, where it is a slot, else the latent state
            that chose it; `None` at the first step after the prompt, and unless the strategy `reads_before`.
    """

    input_ids: torch.LongTensor
    prompt_length: int
    is_open: torch.BoolTensor
    count: torch.LongTensor
    span: torch.LongTensor
    said: torch.LongTensor
    recent: torch.LongTensor
    scores: torch.Tensor
    latent: torch.Tensor
    options: SimpleNamespace
    config: Any
    is_slot: torch.BoolTensor | None = None
    before: torch.Tensor | None = None

    @property
    def position(self) -> int:
        """Position that this step writes."""
        return self.input_ids.shape[1]


StopRule = Callable[[LatentStep], torch.BoolTensor]
STOP_RULES: dict[str, StopRule] = {}


def register_stop_rule(name: str) -> Callable[[StopRule], StopRule]:
    """Decorator that adds a stop rule. A rule returns `(R,)` bool: rows whose span closes at this step."""

    def add(rule: StopRule) -> StopRule:
        known = STOP_RULES.get(name)
        if known is not None and known.__qualname__ != rule.__qualname__:
            raise ValueError(f"stop rule {name!r} is already registered; choose another name")
        STOP_RULES[name] = rule
        return rule

    return add


@register_stop_rule("max_latent_steps")
def _cap_reached(step: LatentStep) -> torch.BoolTensor:
    return step.count >= step.options.max_latent_steps


@register_stop_rule("num_latent_steps")
def _quota_reached(step: LatentStep) -> torch.BoolTensor:
    return step.count >= step.options.num_latent_steps


@register_stop_rule("repetition")
def _repeats(step: LatentStep) -> torch.BoolTensor:
    if not step.options.repetition_exit:
        return torch.zeros_like(step.is_open)
    return (step.count > 0) & (step.said == step.recent[:, 0]) & (step.said == step.recent[:, 1])


@register_stop_rule("end_token")
def _says_end(step: LatentStep) -> torch.BoolTensor:
    return step.said == step.config.latent_end_token_id


@dataclass(frozen=True)
class LatentOption:
    """One option of `generate`.

    Args:
        name: keyword of `generate`.
        default: value when neither the call, nor `generation_config.json`, nor the model's method sets it.
        check: returns the value, normalised, or raises `ValueError` with value and remedy.
        help: one line for the documentation.
        per_row: an int or a list with one entry per prompt (or one for all) becomes a tensor `(R,)`.
        saved: written to `generation_config.json`.
        aliases: names in published code, accepted with a note.
    """

    name: str
    default: Any
    check: Callable[[str, Any], Any] = field(compare=False)
    help: str
    per_row: bool = False
    saved: bool = True
    aliases: tuple[str, ...] = ()


LATENT_OPTIONS: dict[str, LatentOption] = {}


def register_latent_option(option: LatentOption) -> LatentOption:
    """Add an option of `generate`; a strategy that reads it lists its name.

    Raises:
        ValueError: when the name is taken by another option.
    """
    if LATENT_OPTIONS.get(option.name, option) != option:
        raise ValueError(f"latent option {option.name!r} is already registered; choose another name")
    LATENT_OPTIONS[option.name] = option
    return option


def take_latent_options(kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options of a call by our names, and notes on those that were given by an alias; they are taken out of `kwargs`.

    Raises:
        ValueError: the same option by two names.
    """
    given: dict[str, Any] = {}
    notes = []
    for option in LATENT_OPTIONS.values():
        names = [name for name in (option.name, *option.aliases) if name in kwargs]
        if len(names) > 1:
            raise ValueError(f"{names[0]} and {names[1]} are one option; give one of them")
        for name in names:
            given[option.name] = kwargs.pop(name)
            if name != option.name:
                notes.append(f"{name} is called {option.name!r} here")
    return given, notes


def one_of(*allowed: Any) -> Callable[[str, Any], Any]:
    """Check: the value is one of `allowed`."""

    def check(name: str, value: Any) -> Any:
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {list(allowed)}")
        return value

    return check


def is_bool(name: str, value: Any) -> bool | None:
    """Check: a bool, or `None` for the strategy's own default."""
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")
    return value


def int_from(minimum: int, remedy: str, optional: bool = False) -> Callable[[str, Any], Any]:
    """Check: an int, or a list of ints (one per prompt), each at least `minimum`."""

    def check(name: str, value: Any) -> Any:
        if value is None and optional:
            return None
        entries = value.tolist() if isinstance(value, torch.Tensor) else value
        entries = entries if isinstance(entries, (list, tuple)) else [entries]
        if not entries or any(isinstance(v, bool) or not isinstance(v, int) or v < minimum for v in entries):
            raise ValueError(f"{name}={value!r} must be at least {minimum} (int, or one int per prompt); {remedy}")
        return list(entries) if len(entries) > 1 else entries[0]

    return check


def number_from(minimum: float) -> Callable[[str, Any], float]:
    """Check: a number of at least `minimum`."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= minimum:
            raise ValueError(f"{name}={value!r} must be a number of at least {minimum}")
        return float(value)

    return check


def token_ids(name: str, value: Any) -> list[int] | None:
    """Check: `None`, an id or a list of ids."""
    if value is None:
        return None
    ids = [value] if isinstance(value, int) else value
    known = isinstance(ids, (list, tuple)) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    if not known or any(i < 0 for i in ids):
        raise ValueError(f"{name}={value!r} must be a token id or a list of token ids")
    return list(ids) or None


def is_callable(name: str, value: Any) -> Any:
    """Check: `None` or a callable."""
    if value is not None and not callable(value):
        raise ValueError(f"{name}={value!r} must be a callable LatentStep -> Tensor or None")
    return value


for _option in (
    LatentOption("max_latent_steps", 16, int_from(1, "the least cap is 1; use latent_strategy='off' for no span"),
                 "cap on the slots of a span", per_row=True),
    LatentOption("num_latent_steps", None, int_from(0, "give the number of slots", optional=True),
                 "number of slots of every span", per_row=True),
    LatentOption("force_span", None, is_bool, "open a span right after the prompt"),
    LatentOption("force_end", False, is_bool, "write the end marker when the number of slots is reached"),
    LatentOption("latent_answer_ids", None, token_ids, "ids forced after a span that was closed by force"),
    LatentOption("repetition_exit", False, is_bool, "close a span whose slots say the same id three times in a row"),
    LatentOption("latent_noise", 0.0, number_from(0.0), "relative Gaussian noise on every slot: r * |h| * n / |n|"),
    LatentOption("latent_noise_first", True, is_bool, "noise also on the first slot of a span"),
    LatentOption("latent_ids", "placeholder", one_of("placeholder", "readable"),
                 "what a slot writes in the ids: the latent token, or the id that it would have said"),
    LatentOption("latent_budget", "strict", one_of("strict", "reference"),
                 "strict: stopping rules win; reference: an open span runs on past them"),
    LatentOption("latent_topk", 5, int_from(0, "0 records none"), "ids recorded per slot: what it would have said"),
    LatentOption("latent_hook", None, is_callable, "trace hook: LatentStep -> Tensor (R, H) or None", saved=False),
):  # fmt: skip
    register_latent_option(_option)

_COMMON = ("latent_ids", "latent_budget", "latent_topk", "latent_hook", "latent_noise", "latent_noise_first")


@dataclass(frozen=True)
class LatentStrategy:
    """A decoding strategy.

    Args:
        name: value of `latent_strategy`.
        stops: names of stop rules; the first that fires gives the reason of the close.
        options: names of the options that it reads (besides the common ones).
        aliases: names in published code, accepted with a note.
        required: options that must have a value.
        force_span: default of the option `force_span`.
        forced: rules after which `latent_answer_ids` are forced.
        writes_end: the close writes the end marker; otherwise the position after the last slot is ordinary text.
        opens_span: `False` for `off`: no span can open.
        reads_before: a stop rule reads `LatentStep.before`, which is not kept otherwise.
        layout: `(model, model_kwargs, options) -> model_kwargs` at the start of a call: refuses a model that the
            strategy cannot work with and takes from it what the stop rules need; for methods whose slots stand in the
            prompt it may extend `input_ids`, `attention_mask` and `mm_token_type_ids` by slots and set
            `latent_embeds` (a search over latents runs here too).
        visibility: `(options by name, latent_mask or None) -> rules` (see `latent_masks.py`) that hold during the call
            and when its trace is replayed.
        begin: `(model, state, input_ids)` once the state of a call exists, before anything is fed: edits
            `state.prompt_latents`.
        tokens: latent tokens that a model must have: `"slots"` with their markers, `"learned"` ones, or `None`.
        refuse: `(generation_config)` refuses settings of a call that the strategy cannot work with.
        processors: `(processors, options, prompt_length)` edits the logits processors of a call.
        prefill: for slots that depend on each other: `(model, stock_prefill, input_ids, generation_config,
            model_kwargs, state, **stock_options) -> outputs` runs the prompt in segments over one cache;
            `stock_prefill(input_ids, generation_config, model_kwargs, **stock_options)` is the stock function.
    """

    name: str
    stops: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    force_span: bool = False
    forced: tuple[str, ...] = ()
    writes_end: bool = True
    opens_span: bool = True
    reads_before: bool = False
    tokens: str | None = "slots"
    refuse: Callable[..., None] | None = None
    layout: Callable[..., dict[str, Any]] | None = None
    visibility: Callable[..., Any] | None = None
    begin: Callable[..., None] | None = None
    prefill: Callable[..., Any] | None = None
    processors: Callable[..., None] | None = None

    @property
    def uses_latents(self) -> bool:
        """Whether there are slots: in spans that open, or laid out in the prompt."""
        return self.opens_span or self.layout is not None

    def accepts(self, option: str) -> bool:
        """Whether an option has a meaning for this strategy."""
        return option in self.options or (self.opens_span and option in _COMMON)


LATENT_STRATEGIES: dict[str, LatentStrategy] = {}
_ALIASES: dict[str, str] = {}


def register_latent_strategy(strategy: LatentStrategy) -> LatentStrategy:
    """Add a strategy to the table.

    Raises:
        ValueError: an unknown stop rule or option, or a taken name.
    """
    unknown = [r for r in strategy.stops if r not in STOP_RULES] + [
        o for o in strategy.options if o not in LATENT_OPTIONS
    ]
    if unknown:
        raise ValueError(
            f"latent strategy {strategy.name!r} names unknown rules or options {unknown}; register them first"
        )
    if LATENT_STRATEGIES.get(strategy.name, strategy) != strategy:
        raise ValueError(f"latent strategy {strategy.name!r} is already registered; choose another name")
    for name in (strategy.name, *strategy.aliases):
        owner = _ALIASES.get(name, name if name in LATENT_STRATEGIES else strategy.name)
        if owner != strategy.name:
            raise ValueError(f"latent strategy {strategy.name!r}: {name!r} stands for {owner!r}; choose another name")
    LATENT_STRATEGIES[strategy.name] = strategy
    _ALIASES.update(dict.fromkeys(strategy.aliases, strategy.name))
    return strategy


def get_latent_strategy(name: str) -> LatentStrategy:
    """Look a strategy up by name or alias.

    Raises:
        ValueError: for an unknown name, with the names that exist.
    """
    key = _ALIASES.get(name, name)
    if key not in LATENT_STRATEGIES:
        raise ValueError(f"latent_strategy={name!r} is unknown; choose one of {sorted(LATENT_STRATEGIES)}")
    return LATENT_STRATEGIES[key]


register_latent_strategy(LatentStrategy(name="off", opens_span=False))
register_latent_strategy(
    LatentStrategy(
        name="fixed",
        stops=("repetition", "num_latent_steps"),
        options=("num_latent_steps", "force_span", "force_end", "latent_answer_ids", "repetition_exit"),
        aliases=("steps",),
        required=("num_latent_steps",),
        forced=("repetition",),
        writes_end=False,
    )
)
register_latent_strategy(
    LatentStrategy(
        name="dynamic",
        stops=("max_latent_steps", "repetition", "end_token"),
        options=("max_latent_steps", "force_span", "latent_answer_ids", "repetition_exit"),
        aliases=("latent",),
        force_span=True,
        forced=("max_latent_steps", "repetition"),
    )
)


@dataclass
class LatentOptions:
    """Options of one `generate` call, resolved: argument, then generation config, then the model's method, then
    default.

    Args:
        strategy: the strategy.
        values: namespace with one attribute per option.
        given: names that the caller passed.
        outputs: what a `layout` adds to the output of `generate`, by name.
    """

    strategy: LatentStrategy
    values: SimpleNamespace
    given: frozenset[str] = field(default_factory=frozenset)
    outputs: dict[str, Any] = field(default_factory=dict)

    def tensors(self, num_prompts: int, num_rows: int, device: torch.device) -> SimpleNamespace:
        """Per-row options as tensors `(R,)`; a list has one entry per prompt.

        Raises:
            ValueError: when a list has neither one entry nor one per prompt.
        """
        values = vars(self.values).copy()
        for name, value in values.items():
            if value is None or not LATENT_OPTIONS[name].per_row:
                continue
            entries = value if isinstance(value, list) else [value] * num_prompts
            if len(entries) != num_prompts:
                raise ValueError(
                    f"{name} has {len(entries)} entries for {num_prompts} prompts; give one, or one per prompt"
                )
            values[name] = torch.tensor(entries, device=device).repeat_interleave(num_rows // num_prompts)
        return SimpleNamespace(**values)


def resolve_latent_options(name: str, given: dict[str, Any], defaults: list[dict[str, Any]]) -> LatentOptions:
    """Check the options of a call and fill the rest.

    Args:
        name: value of `latent_strategy`.
        given: options that the caller passed.
        defaults: dictionaries to look in, in order, for the options that were not passed.

    Raises:
        ValueError: unknown strategy, a value out of range, an option that the strategy does not read, a missing one.
    """
    strategy = get_latent_strategy(name)
    foreign = [option for option in given if not strategy.accepts(option)]
    if foreign:
        known = [option for option in LATENT_OPTIONS if strategy.accepts(option)]
        raise ValueError(f"latent_strategy={strategy.name!r} does not read {foreign}; its options are {known}")
    values = {}
    for option in LATENT_OPTIONS.values():
        sources = [given, *defaults] if strategy.accepts(option.name) else []
        value = next(
            (source[option.name] for source in sources if source.get(option.name) is not None), option.default
        )
        values[option.name] = option.check(option.name, value)
    for option in strategy.required:
        if values[option] is None:
            raise ValueError(f"latent_strategy={strategy.name!r} needs {option}; pass {option}=...")
    if values["force_span"] is None:
        values["force_span"] = strategy.force_span
    return LatentOptions(strategy, SimpleNamespace(**values), frozenset(given))


__all__ = [
    "LATENT_OPTIONS",
    "LATENT_STRATEGIES",
    "STOP_RULES",
    "LatentOption",
    "LatentOptions",
    "LatentStep",
    "LatentStrategy",
    "get_latent_strategy",
    "register_latent_option",
    "register_latent_strategy",
    "register_stop_rule",
    "resolve_latent_options",
    "take_latent_options",
]
