"""Stages: which steps become latents, blocks short of image tokens, other stages mixed in, the published padding."""

import doctest
from collections import Counter

import pytest

from tests.hub import run_python
from trainers.data import stages
from trainers.data.staged_text import StagedExample
from trainers.data.stages import (
    StageLayout,
    StageTokens,
    expand_stage,
    lacks_patches,
    mixed_stage,
    pad_to_first_latent,
    stage_prompt,
)

TOKENS = StageTokens(slot=90, patch=91, start=92, end=93)
EXAMPLE = StagedExample(question=[1, 2], steps=[[3], [4, 4], [5]], answer=[6, 7])
IGNORED = -100


def ids(stage: int, images: int = 0, example: StagedExample = EXAMPLE, **options: object) -> list[int]:
    return expand_stage(example, stage, StageLayout(**options), TOKENS, images)["input_ids"]


def test_the_first_steps_become_latents() -> None:
    assert ids(0) == [1, 2, 3, 4, 4, 5, 6, 7]
    assert ids(1) == [1, 2, 90, 4, 4, 5, 6, 7]
    assert ids(3) == [1, 2, 90, 90, 90, 6, 7]
    assert ids(2, latents_per_step=2) == [1, 2, 90, 90, 90, 90, 5, 6, 7]
    assert ids(2, latents_per_step=0) == [1, 2, 5, 6, 7]


def test_stages_beyond_the_steps_of_a_record() -> None:
    """At a stage that is counted there is a latent for each, above it by `pad_latent_to_max`."""
    short = StagedExample([1], [[3]], [6])
    assert ids(3, example=short) == [1, 90, 90, 90, 6]
    assert ids(6, example=short) == [1, *[90] * 5, 6]
    assert ids(6, example=short, pad_latent_to_max=False) == [1, 90, 6]
    assert ids(6, max_latent_stage=2, pad_latent_to_max=False) == [1, 2, 90, 90, 6, 7]
    assert ids(9, example=StagedExample([1], [], [6]), pad_latent_to_max=False) == [1, 6]


def test_labels_begin_behind_the_last_marker() -> None:
    found = expand_stage(EXAMPLE, 1, StageLayout(markers=True), TOKENS)
    assert found["input_ids"] == [1, 2, 92, 90, 93, 4, 4, 5, 6, 7]
    assert found["labels"] == [IGNORED] * 5 + [4, 4, 5, 6, 7]
    assert ids(0, markers=True)[2:4] == [92, 93]


def test_direct_answers_at_every_stage() -> None:
    assert ids(0, no_cot=True) == ids(2, no_cot=True) == [1, 2, 6, 7]
    assert ids(1, no_cot=True, markers=True) == [1, 2, 92, 93, 6, 7]


def test_blocks_take_what_image_tokens_there_are() -> None:
    assert ids(2, images=9, num_patches=2) == [1, 2, 91, 91, 90, 91, 91, 90, 5, 6, 7]
    assert ids(2, images=3, num_patches=2) == [1, 2, 91, 91, 90, 91, 90, 5, 6, 7]
    assert ids(3, images=2, num_patches=5) == [1, 2, 91, 91, 90, 90, 90, 6, 7]
    assert ids(1, images=3, num_patches=1, vision_first=False) == [1, 2, 90, 91, 4, 4, 5, 6, 7]
    layout = StageLayout(num_patches=2)
    assert lacks_patches(layout, 2, 3) and not lacks_patches(layout, 2, 4) and not lacks_patches(layout, 0, 0)


def test_the_prompt_of_a_stage() -> None:
    behind = StagedExample([1, 2], [[3], [4]], [6], after_latents=[8])
    layout = StageLayout(max_latent_stage=3, markers=True)
    assert stage_prompt(behind, 3, layout, TOKENS) == [1, 2, 92, 90, 90, 90, 93, 8]
    assert stage_prompt(behind, 5, layout, TOKENS) == stage_prompt(behind, 3, layout, TOKENS)
    bound = StageLayout(max_latent_stage=3, pad_latent_to_max=False)
    assert stage_prompt(behind, 3, bound, TOKENS) == [1, 2, 90, 90, 8]


REFUSED = [
    ({"latents_per_step": -1}, "latents_per_step=-1 must be an integer"),
    ({"num_patches": 1.5}, "num_patches=1.5 must be an integer"),
    ({"max_latent_stage": True}, "max_latent_stage=True must be an integer"),
    (
        {"max_latent_stage": 4, "latents_per_step": 2, "max_latent_steps": 7},
        "max_latent_stage=4 with latents_per_step=2: 8 latents, above max_latent_steps=7",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_wrong_layouts_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageLayout(**options)


def test_a_stage_below_zero_and_missing_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="stage=-1 must be an integer, 0 or more"):
        ids(-1)
    with pytest.raises(ValueError, match=r"lack \['patch'\].*num_patches=2"):
        expand_stage(EXAMPLE, 1, StageLayout(num_patches=2), StageTokens(90), 4)
    with pytest.raises(ValueError, match=r"lack \['start', 'end'\].*markers=True"):
        expand_stage(EXAMPLE, 0, StageLayout(markers=True), StageTokens(90, 91))
    assert expand_stage(EXAMPLE, 0, StageLayout(num_patches=2), StageTokens(90))["input_ids"] == ids(0)


def test_mixed_stages_are_uniform_and_follow_from_the_key() -> None:
    draws = [mixed_stage(1, 3, 0.5, (seed, 0, "file", 4)) for seed in range(2000)]
    assert draws == [mixed_stage(1, 3, 0.5, (seed, 0, "file", 4)) for seed in range(2000)]
    counts = Counter(draws)
    assert set(counts) == {0, 1, 2, 3}
    assert counts[1] == pytest.approx(2000 * (0.5 + 0.5 / 4), rel=0.1)
    assert all(counts[stage] == pytest.approx(250, rel=0.25) for stage in (0, 2, 3))
    assert len({mixed_stage(1, 50, 1.0, (0, epoch, "a")) for epoch in range(20)}) > 5
    assert len({mixed_stage(1, 50, 1.0, (0, 0, name)) for name in range(20)}) > 5
    assert {mixed_stage(7, 3, 0.0, (seed,)) for seed in range(20)} == {7}


def test_the_published_padding_puts_first_latents_into_one_column() -> None:
    rows = [{"input_ids": row, "labels": row} for row in ([1, 90, 5], [1, 2, 3, 90], [7, 8])]
    batch = pad_to_first_latent(rows, slot_id=90, pad_id=0)
    assert batch["input_ids"] == [[0, 0, 1, 90, 5], [1, 2, 3, 90, 0], [7, 8, 0, 0, 0]]
    assert batch["position_ids"] == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 0], [0, 1, 0, 0, 0]]
    assert batch["attention_mask"][0] == [0, 0, 1, 1, 1] and batch["labels"][0][:2] == [IGNORED] * 2


def test_examples_of_the_docstrings() -> None:
    assert doctest.testmod(stages).failed == 0


def test_importing_loads_no_torch() -> None:
    code = (
        "import sys, types\n"
        "sys.modules['trainers'] = package = types.ModuleType('trainers')\n"  # the parent may import torch
        "package.__path__ = ['trainers']\n"
        "import trainers.data.stages\n"
        "print('torch' in sys.modules)\n"
    )
    assert run_python(code).strip() == "False"
