"""Edits of what the model is given: pictures and questions (specification, section 2.4).

The edited item is asked anew, slots and all. `mask_roi` against `mask_random` of the same area is the grounding test;
small changes of light, angle, crop and sharpness are the sweep of the representation-consistency test.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from trainers.data.records import Record

from .slot_data import NotApplicable

EditRecord = Callable[..., Record]  # (record, generator, *arguments)


@dataclass(frozen=True)
class InputEdit:
    """An edit of a record.

    Args:
        make: `(record, numpy generator, *arguments)` to the edited record; images are open.
        help: one line.
        arguments: their defaults, None: must be given.
        needs: `"boxes"`, `"counterfactual"`, or `"others"` for edits that take something of another item.
    """

    make: EditRecord
    help: str
    arguments: tuple[Any, ...] = ()
    needs: str | None = None


def _images(edit: Callable[[Image.Image], Image.Image], record: Record) -> Record:
    if not record["images"]:
        raise NotApplicable(f"item {record['id']!r} has no image")
    return {**record, "images": [edit(image) for image in record["images"]]}


def _blank(record: Record, rng: np.random.Generator) -> Record:
    return _images(lambda image: Image.new("RGB", image.size, (127, 127, 127)), record)


def _mean(record: Record, rng: np.random.Generator) -> Record:
    def edit(image: Image.Image) -> Image.Image:
        colour = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(axis=0).round()
        return Image.new("RGB", image.size, tuple(int(value) for value in colour))

    return _images(edit, record)


def _blur(record: Record, rng: np.random.Generator, sigma: float) -> Record:
    return _images(lambda image: image.filter(ImageFilter.GaussianBlur(sigma)), record)


def _brightness(record: Record, rng: np.random.Generator, change: float) -> Record:
    return _images(lambda image: ImageEnhance.Brightness(image).enhance(1 + change), record)


def _rotate(record: Record, rng: np.random.Generator, degrees: float) -> Record:
    return _images(lambda image: image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(127, 127, 127)), record)


def _crop(record: Record, rng: np.random.Generator, share: float) -> Record:
    def edit(image: Image.Image) -> Image.Image:
        width, height = (max(1, round(side * share)) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height)).resize(image.size, Image.Resampling.BICUBIC)

    return _images(edit, record)


def _boxes(record: Record) -> list[tuple[int, float, float, float, float]]:
    boxes = record.get("boxes")
    if not boxes:
        raise NotApplicable(f"item {record['id']!r} has no boxes")
    return [(box["image"], *box["xyxy"]) for box in boxes]


def _area(image: Image.Image, box: tuple[float, ...], ratio: float) -> tuple[int, int, int, int]:
    """The middle `ratio` of a box in pixels, at least one."""
    x0, y0, x1, y1 = box
    middle, width, height = ((x0 + x1) / 2, (y0 + y1) / 2), (x1 - x0) * ratio**0.5, (y1 - y0) * ratio**0.5
    left, top = int((middle[0] - width / 2) * image.width), int((middle[1] - height / 2) * image.height)
    wide, high = max(1, round(width * image.width)), max(1, round(height * image.height))
    return left, top, min(left + wide, image.width), min(top + high, image.height)


def _grey(record: Record, areas: list[tuple[int, tuple[int, int, int, int]]]) -> Record:
    images = [image.copy() for image in record["images"]]
    for number, area in areas:
        images[number].paste((127, 127, 127), area)
    return {**record, "images": images}


def _roi_areas(record: Record, ratio: float) -> list[tuple[int, tuple[int, int, int, int]]]:
    return [(number, _area(record["images"][number], tuple(box), ratio)) for number, *box in _boxes(record)]


def _mask_roi(record: Record, rng: np.random.Generator, ratio: float) -> Record:
    return _grey(record, _roi_areas(record, ratio))


def _mask_random(record: Record, rng: np.random.Generator, ratio: float) -> Record:
    """Windows of the sizes that `mask_roi` hides, elsewhere in the same images."""
    moved = []
    for number, (left, top, right, bottom) in _roi_areas(record, ratio):
        image, width, height = record["images"][number], right - left, bottom - top
        x, y = (int(rng.integers(0, most + 1)) for most in (image.width - width, image.height - height))
        moved.append((number, (x, y, x + width, y + height)))
    return _grey(record, moved)


def _counterfactual(record: Record, rng: np.random.Generator) -> Record:
    return counterfactual_of(record)


def counterfactual_of(record: Record) -> Record:
    """The other view of a counterfactual pair: `meta["counterfactual"]` has its `images`, and `answer` where that
    changes.

    Raises:
        NotApplicable: the record has none.
    """
    other = (record.get("meta") or {}).get("counterfactual")
    if not other or "images" not in other:
        raise NotApplicable(f"item {record['id']!r} has no meta['counterfactual'] with images")
    return {**record, "images": list(other["images"]), "answer": other.get("answer", record["answer"])}


def _paraphrase(record: Record, rng: np.random.Generator) -> Record:
    text = (record.get("meta") or {}).get("paraphrase")
    if not text:
        raise NotApplicable(f"item {record['id']!r} has no meta['paraphrase']")
    return {**record, "question": text}


def _other_images(record: Record, rng: np.random.Generator, other: Record) -> Record:
    if not record["images"] or len(record["images"]) != len(other["images"]):
        raise NotApplicable(f"item {record['id']!r} and its donor have different numbers of images")
    return {**record, "images": list(other["images"])}


def _other_question(record: Record, rng: np.random.Generator, other: Record) -> Record:
    return {**record, "question": other["question"], "choices": other.get("choices")}


INPUT_EDITS: dict[str, InputEdit] = {
    "blank_image": InputEdit(_blank, "grey pictures"),
    "mean_image": InputEdit(_mean, "pictures of their mean colour"),
    "blur": InputEdit(_blur, "Gaussian blur of so many pixels", (None,)),
    "brightness": InputEdit(_brightness, "brightness changed by a share, e.g. 0.2 or -0.2", (None,)),
    "rotate": InputEdit(_rotate, "rotated by degrees", (None,)),
    "crop": InputEdit(_crop, "the middle share of width and height, resized", (0.9,)),
    "mask_roi": InputEdit(_mask_roi, "the middle share of every box hidden", (1.0,), "boxes"),
    "mask_random": InputEdit(_mask_random, "windows of the same size hidden elsewhere", (1.0,), "boxes"),
    "counterfactual": InputEdit(_counterfactual, "the other view of the pair", needs="counterfactual"),
    "paraphrase": InputEdit(_paraphrase, "the question in other words (meta['paraphrase'])"),
    "swap_image": InputEdit(_other_images, "another item's pictures", needs="others"),
    "other_question": InputEdit(_other_question, "another item's question", needs="others"),
}


def edited_record(name: str, record: Record, seed: int, arguments: tuple[Any, ...], other: Record | None) -> Record:
    """A record after an edit; the same seed gives the same windows.

    Raises:
        NotApplicable: the record does not allow it.
    """
    edit = INPUT_EDITS[name]
    digest = hashlib.blake2b(f"{seed}/{record['id']}/{name}".encode(), digest_size=7).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "big"))
    if edit.needs == "others":
        if other is None:
            raise NotApplicable("there is no other item")
        return edit.make(record, rng, other)
    return edit.make(record, rng, *arguments)


__all__ = ["INPUT_EDITS", "InputEdit", "counterfactual_of", "edited_record"]
