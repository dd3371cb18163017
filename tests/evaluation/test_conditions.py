"""Strategies with options of their own: how they are written, checked, and given to `generate`."""

from typing import Any

import pytest

from evaluation.conditions import parse_strategy


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
