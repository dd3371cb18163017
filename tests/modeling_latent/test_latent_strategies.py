"""Stop rules, options and strategies: each rule on tensors, how options are resolved, and the tables.

What the strategies decode is shown in `tests/test_matrix.py`.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modeling_latent import (
    LATENT_OPTIONS,
    LATENT_STRATEGIES,
    STOP_RULES,
    LatentOption,
    LatentStep,
    LatentStrategy,
    register_latent_option,
    register_latent_strategy,
    register_stop_rule,
)
from modeling_latent.latent_strategies import (
    get_latent_strategy,
    int_from,
    is_bool,
    is_callable,
    number_from,
    one_of,
    resolve_latent_options,
    token_ids,
)


@pytest.fixture
def tables() -> Any:
    before = [dict(table) for table in (LATENT_STRATEGIES, STOP_RULES, LATENT_OPTIONS)]
    yield
    for table, kept in zip((LATENT_STRATEGIES, STOP_RULES, LATENT_OPTIONS), before, strict=True):
        table.clear()
        table.update(kept)


# Stop rules


def step(count: list[int], said: list[int], recent: list[list[int]], **options: Any) -> LatentStep:
    rows = len(count)
    options = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in options.items()}
    return LatentStep(
        input_ids=torch.zeros(rows, 5, dtype=torch.long),
        prompt_length=3,
        is_open=torch.ones(rows, dtype=torch.bool),
        count=torch.tensor(count),
        span=torch.zeros(rows, dtype=torch.long),
        said=torch.tensor(said),
        recent=torch.tensor(recent),
        scores=torch.zeros(rows, 10),
        latent=torch.zeros(rows, 4),
        options=SimpleNamespace(**options),
        config=SimpleNamespace(latent_end_token_id=9),
    )


def test_a_step_knows_its_position() -> None:
    assert step([0], [1], [[0, 0]]).position == 5


@pytest.mark.parametrize(("rule", "option"), [("max_latent_steps",) * 2, ("num_latent_steps",) * 2])
def test_count_rules(rule: str, option: str) -> None:
    fires = STOP_RULES[rule](step([0, 1, 2, 3], [1] * 4, [[0, 0]] * 4, **{option: [0, 2, 2, 2]}))
    assert fires.tolist() == [True, False, True, True]


def test_repetition_rule() -> None:
    """Three in a row, counted from the first slot on, and only when asked for."""
    rows: dict[str, Any] = {
        "count": [2, 2, 2, 0, 1],
        "said": [4, 4, 4, 4, 4],
        "recent": [[4, 4], [3, 4], [4, 3], [4, 4], [4, 4]],
    }
    assert STOP_RULES["repetition"](step(**rows, repetition_exit=True)).tolist() == [True, False, False, False, True]
    assert not STOP_RULES["repetition"](step(**rows, repetition_exit=False)).any()


def test_end_rule() -> None:
    assert STOP_RULES["end_token"](step([0, 3], [9, 8], [[0, 0]] * 2)).tolist() == [True, False]


# Checks of options


@pytest.mark.parametrize(
    ("check", "value", "expected"),
    [
        (int_from(1, ""), 4, 4),
        (int_from(1, ""), [4], 4),
        (int_from(1, ""), (4, 5), [4, 5]),
        (int_from(1, ""), torch.tensor([4, 5]), [4, 5]),
        (int_from(1, ""), torch.tensor(4), 4),
        (int_from(0, "", optional=True), None, None),
        (number_from(0.0), 1, 1.0),
        (is_bool, None, None),
        (is_bool, False, False),
        (one_of("a", "b"), "b", "b"),
        (token_ids, None, None),
        (token_ids, 5, [5]),
        (token_ids, (5, 6), [5, 6]),
        (token_ids, [], None),
        (is_callable, None, None),
        (is_callable, len, len),
    ],
)
def test_values_are_normalised(check: Any, value: Any, expected: Any) -> None:
    result = check("name", value)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (int_from(1, "do this"), None, r"name=None must be at least 1 \(int, or one int per prompt\); do this"),
        (int_from(1, ""), "4", "name='4' must be at least 1"),
        (int_from(1, ""), [1, [2]], r"name=\[1, \[2\]\] must be"),
        (int_from(1, ""), torch.tensor([1.5]), "must be at least 1"),
        (number_from(0.0), "much", "name='much' must be a number of at least 0"),
        (number_from(0.0), float("nan"), "name=nan must be a number of at least 0"),
        (number_from(0.0), True, "name=True must be a number"),
        (is_bool, 0, "name=0 must be True or False"),
        (one_of("a", "b"), "c", r"name='c' is unknown; choose one of \['a', 'b'\]"),
        (token_ids, [1.0], "must be a token id or a list"),
        (token_ids, True, "name=True must be a token id"),
        (token_ids, [True], r"name=\[True\] must be a token id"),
        (is_callable, "hook", "must be a callable LatentStep -> Tensor or None"),
    ],
)
def test_bad_values_are_refused(check: Any, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check("name", value)


def test_every_option_has_a_help_text_and_a_valid_default() -> None:
    for option in LATENT_OPTIONS.values():
        assert len(option.help) > 10
        assert option.check(option.name, option.default) == option.default, option.name
    assert not LATENT_OPTIONS["latent_hook"].saved


# Resolving


def test_order_of_sources() -> None:
    sources = [{"max_latent_steps": 3, "latent_topk": 2}, {"max_latent_steps": 4, "latent_noise": 0.5}]
    options = resolve_latent_options("dynamic", {"latent_topk": 9}, sources)
    assert (options.values.latent_topk, options.values.max_latent_steps, options.values.latent_noise) == (9, 3, 0.5)
    assert options.given == {"latent_topk"} and options.strategy.name == "dynamic"
    assert options.values.force_span is True and options.values.latent_budget == "strict"


def test_saved_options_that_the_strategy_does_not_read_are_left_out() -> None:
    """A folder may hold the options of its own strategy: another one takes their defaults instead of failing."""
    sources = [{"latent_strategy": "dynamic", "max_latent_steps": 3, "latent_noise": 0.5}]
    off = resolve_latent_options("off", {}, sources).values
    assert (off.max_latent_steps, off.latent_noise, off.force_span) == (16, 0.0, False)


def test_a_bad_saved_value_is_refused_as_well() -> None:
    with pytest.raises(ValueError, match="max_latent_steps=0 must be at least 1"):
        resolve_latent_options("dynamic", {}, [{"max_latent_steps": 0}])


def test_force_span_has_its_default_by_strategy() -> None:
    for name, expected in (("dynamic", True), ("fixed", False)):
        for value in (None, True, False):
            given = {} if value is None else {"force_span": value}
            options = resolve_latent_options(name, given, [{"num_latent_steps": 1}])
            assert options.values.force_span is (expected if value is None else value)
    assert resolve_latent_options("dynamic", {}, [{"force_span": False}]).values.force_span is False
    given_wins = resolve_latent_options("dynamic", {"force_span": True}, [{"force_span": False}])
    assert given_wins.values.force_span is True


def test_per_row_options_become_tensors() -> None:
    options = resolve_latent_options("dynamic", {"max_latent_steps": [2, 5]}, [])
    rows = options.tensors(2, 6, torch.device("cpu"))
    assert rows.max_latent_steps.tolist() == [2, 2, 2, 5, 5, 5] and rows.num_latent_steps is None
    assert options.values.max_latent_steps == [2, 5], "the options of the call stay as they are"
    one = resolve_latent_options("dynamic", {"max_latent_steps": 3}, []).tensors(2, 4, torch.device("cpu"))
    assert one.max_latent_steps.tolist() == [3, 3, 3, 3]
    with pytest.raises(ValueError, match="max_latent_steps has 2 entries for 3 prompts; give one, or one per prompt"):
        options.tensors(3, 3, torch.device("cpu"))


# Tables


def test_aliases_and_unknown_names() -> None:
    assert get_latent_strategy("steps") is LATENT_STRATEGIES["fixed"]
    assert get_latent_strategy("latent") is LATENT_STRATEGIES["dynamic"]
    with pytest.raises(ValueError, match=r"latent_strategy='on' is unknown; choose one of \['dynamic', .*'off'"):
        get_latent_strategy("on")


def test_a_strategy_must_name_what_exists(tables: None) -> None:
    with pytest.raises(ValueError, match=r"'new' names unknown rules or options \['bored', 'patience'\]; register"):
        register_latent_strategy(LatentStrategy("new", stops=("bored", "end_token"), options=("patience",)))


def test_names_are_taken_once(tables: None) -> None:
    register_latent_strategy(LatentStrategy(**vars(LATENT_STRATEGIES["fixed"])))  # the same values again
    with pytest.raises(ValueError, match="latent strategy 'fixed' is already registered; choose another name"):
        register_latent_strategy(LatentStrategy("fixed"))

    def always(step: LatentStep) -> torch.BoolTensor:
        return torch.ones_like(step.is_open)

    assert register_stop_rule("always")(always) is always and register_stop_rule("always")(always) is always
    with pytest.raises(ValueError, match="stop rule 'end_token' is already registered; choose another name"):
        register_stop_rule("end_token")(always)
    register_latent_option(LATENT_OPTIONS["latent_noise"])
    with pytest.raises(ValueError, match="latent option 'latent_noise' is already registered; choose another name"):
        register_latent_option(LatentOption("latent_noise", 1.0, number_from(0.0), "another meaning of noise"))


def test_an_alias_may_not_hide_a_strategy(tables: None) -> None:
    for alias, owner in (("dynamic", "dynamic"), ("steps", "fixed")):
        with pytest.raises(ValueError, match=f"'new': '{alias}' stands for '{owner}'; choose another name"):
            register_latent_strategy(LatentStrategy("new", aliases=(alias,)))
    assert get_latent_strategy("dynamic").name == "dynamic" and "new" not in LATENT_STRATEGIES
    with pytest.raises(ValueError, match="latent strategy 'steps': 'steps' stands for 'fixed'; choose another name"):
        register_latent_strategy(LatentStrategy("steps"))


def test_what_a_strategy_reads() -> None:
    dynamic, fixed, off = (LATENT_STRATEGIES[name] for name in ("dynamic", "fixed", "off"))
    assert dynamic.accepts("max_latent_steps") and not fixed.accepts("max_latent_steps")
    assert fixed.accepts("num_latent_steps") and not dynamic.accepts("num_latent_steps")
    for option in ("latent_hook", "latent_topk", "latent_noise"):
        assert dynamic.accepts(option) and fixed.accepts(option) and not off.accepts(option)
