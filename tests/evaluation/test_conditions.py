"""Strategies with options of their own: how they are written, checked, and given to `generate`."""

import argparse
from typing import Any

import pytest

from evaluation.conditions import Condition, add_condition_arguments, conditions_of, parse_strategy, strategy_options


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_condition_arguments(parser, ("dynamic", "off"), max_new_tokens=8, batch_size=4)
    return parser.parse_args(flags)


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("off", "off", {}),
        ("learned", "learned", {}),
        ("learned:mask_latents", "learned", {"mask_latents": True}),
        ("learned:mask_latents=padding,num_latent_steps=2", "learned",
         {"mask_latents": "padding", "num_latent_steps": 2}),
        ("learned:force_latents=false", "learned", {"force_latents": False}),
        ("dynamic:repetition_exit,latent_noise=0.5", "dynamic", {"repetition_exit": True, "latent_noise": 0.5}),
        ("fixed", "fixed", {}),  # what it needs may be in the model's folder
        ("steps:num_latent_steps=3", "steps", {"num_latent_steps": 3}),
    ],
)  # fmt: skip
def test_options_behind_a_colon(text: str, name: str, options: dict[str, Any]) -> None:
    found = parse_strategy(text)
    assert found == (name, options)
    assert [type(value) for value in found[1].values()] == [type(value) for value in options.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slow", "latent_strategy='slow' is unknown"),
        ("slow:mask_latents", "latent_strategy='slow' is unknown"),
        ("learned:", "strategy 'learned:': '' is no option; write name:option=value"),
        ("learned:mask_latents=", "'mask_latents=' is no option"),
        ("learned:=true", "'=true' is no option"),
        ("learned:mask_latents,,force_latents", "'' is no option"),
        ("learned:mask_latents,mask_latents=padding", "'mask_latents' is given twice"),
        ("learned:mask_latents=holes", "strategy 'learned:mask_latents=holes': mask_latents='holes' is unknown"),
        ("learned:force_latents=2", "force_latents=2 must be True or False"),
        ("learned:max_latent_steps=2", r"latent_strategy='learned' does not read \['max_latent_steps'\]"),
        ("off:mask_latents", r"latent_strategy='off' does not read \['mask_latents'\]"),
        ("dynamic:max_latent_steps=0", "max_latent_steps=0 must be at least 1"),
        ("dynamic:latent_noise=[1", r"'\[1' is no YAML value"),
        ("dynamic:latent_noise={a: 1}", "'{a: 1}' is a list or a mapping; give one value"),
    ],
)
def test_wrong_strategies(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_strategy(text)
    with pytest.raises(ValueError, match=message):
        conditions_of(parsed("--model=m", "--strategies", "off", text))
    with pytest.raises(ValueError, match=message):
        conditions_of(parsed("--model=m", "--compare=n", f"--compare_strategy={text}"))


def test_conditions_of_one_strategy_with_different_options() -> None:
    args = parsed(
        "--model=m", "--revision=r", "--strategies", "learned", "learned:mask_latents", "off", "--compare=runs/n",
        "--compare_strategy=learned:force_latents=false",
    )  # fmt: skip
    conditions = conditions_of(args)
    assert conditions == [
        Condition("m", "r", "learned", "latents learned"),
        Condition("m", "r", "learned:mask_latents", "latents learned:mask_latents"),
        Condition("m", "r", "off", "latents off"),
        Condition("runs/n", None, "learned:force_latents=false", "latents learned:force_latents=false, n"),
    ]
    assert strategy_options(conditions, num_latent_steps=None) == {
        "learned": {"latent_strategy": "learned"},
        "learned:mask_latents": {"latent_strategy": "learned", "mask_latents": True},
        "off": {"latent_strategy": "off"},
        "learned:force_latents=false": {"latent_strategy": "learned", "force_latents": False},
    }


def test_options_for_all_go_to_the_strategies_that_read_them_and_own_ones_win() -> None:
    conditions = conditions_of(parsed("--model=m", "--strategies", "fixed", "fixed:num_latent_steps=2", "dynamic"))
    found = strategy_options(conditions, num_latent_steps=7, num_latent_patches=None)
    assert found == {
        "fixed": {"latent_strategy": "fixed", "num_latent_steps": 7},
        "fixed:num_latent_steps=2": {"latent_strategy": "fixed", "num_latent_steps": 2},
        "dynamic": {"latent_strategy": "dynamic"},
    }
    with pytest.raises(ValueError, match="num_latent_steps=7 is read by none of the strategies .'off'."):
        strategy_options(conditions_of(parsed("--model=m", "--strategies=off")), num_latent_steps=7)


def test_defaults_and_the_published_spelling_of_the_model() -> None:
    args = parsed("--checkpoint=m")
    assert (args.model, args.strategies, args.max_new_tokens, args.batch_size) == ("m", ["dynamic", "off"], 8, 4)
    (first, second) = conditions_of(parsed("--model=m", "--strategies=dynamic", "--compare=n"))
    assert (first.strategy, second.strategy) == ("dynamic", "dynamic")
    with pytest.raises(ValueError, match="the condition 'latents off' is asked for 2 times; give it once"):
        conditions_of(parsed("--model=m", "--strategies", "off", "off"))
