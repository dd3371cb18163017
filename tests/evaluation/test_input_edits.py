"""Edits of pictures and questions."""

import numpy as np
import pytest
from PIL import Image

from evaluation.causal.input_edits import INPUT_EDITS, counterfactual_of, edited_record
from evaluation.causal.slot_data import NotApplicable
from trainers.data.records import make_record


def record(**fields: object) -> dict:
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, 40:] = 200
    return make_record("r", "?", "A", [Image.fromarray(pixels)], **fields)


def edited(name: str, *arguments: object, other: dict | None = None, seed: int = 0, **fields: object) -> np.ndarray:
    return np.asarray(edited_record(name, record(**fields), seed, arguments, other)["images"][0])


def test_pictures() -> None:
    assert (edited("blank_image") == 127).all() and (edited("mean_image") == 100).all()
    assert edited("brightness", -0.5)[0, 60, 0] == 100
    assert edited("blur", 2)[0, 40, 0] not in (0, 200) and edited("blur", 2)[0, 5, 0] == 0
    cropped = edited("crop", 0.5)
    assert cropped.shape == (40, 80, 3) and cropped[0, 5, 0] == 0 and cropped[0, 75, 0] == 200
    assert edited("rotate", 10)[0, 0, 0] == 127
    for name, edit in INPUT_EDITS.items():
        assert edit.help, name


def test_regions_are_hidden_and_random_windows_are_as_large() -> None:
    boxes = [{"image": 0, "xyxy": [0.5, 0.5, 1.0, 1.0]}]
    whole, half = edited("mask_roi", 1.0, boxes=boxes), edited("mask_roi", 0.25, boxes=boxes)
    assert (whole[20:, 40:] == 127).all() and (whole[:20] != 127).all() and (whole == 127).all(-1).sum() == 40 * 20
    assert (half == 127).all(-1).sum() == 20 * 10 and (half[25:35, 50:70] == 127).all()
    windows = [edited("mask_random", 1.0, boxes=boxes, seed=seed) for seed in (0, 0, 1)]
    assert (windows[0] == windows[1]).all() and (windows[0] != windows[2]).any()
    assert (windows[0] == 127).all(-1).sum() == 40 * 20
    with pytest.raises(NotApplicable, match="'r' has no boxes"):
        edited("mask_roi", 1.0)


def test_other_items_and_pairs() -> None:
    other = make_record("o", "Where?", "B", [Image.new("RGB", (8, 8))])
    assert edited("swap_image", other=other).shape == (8, 8, 3)
    assert edited_record("other_question", record(), 0, (), other)["question"] == "Where?"
    with pytest.raises(NotApplicable, match="there is no other item"):
        edited("swap_image")
    pair = record()
    pair["meta"]["counterfactual"] = {"images": ["x.png"], "answer": "B"}
    assert counterfactual_of(pair)["images"] == ["x.png"] and counterfactual_of(pair)["answer"] == "B"
    with pytest.raises(NotApplicable, match="no meta\\['counterfactual'\\] with images"):
        counterfactual_of(record())
    with pytest.raises(NotApplicable, match="no meta\\['paraphrase'\\]"):
        edited("paraphrase")
