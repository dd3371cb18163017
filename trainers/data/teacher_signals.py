"""What a larger model saw and where it looked: the `teacher` field of a record, loaded, checked and resized.

Paper: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129 (card 2.4, 2.5, 5.2, 5.3).

The field is JSON-able. Tensors lie in files, short ones also in the record itself:

    {"concept": {"path": "a.safetensors", "key": "7/concept"},    # (D,), or (N, D): one row an image token
     "attention": {"path": "sample_000007_attention.json"},       # (N,): weights of the image tokens, row by row
     "grid": [rows, columns],                                     # of these N tokens; None: guessed
     "image": 0,                                                  # which image of the record
     "image_sha256": "..."}                                       # of `image_fingerprint`; None: not checked

A reference is `{"path", "key"}` (`.safetensors`; a `.pt` or `.pth` holds one tensor, or a dictionary whose entry `key`
names), for the attention also a published `.json`, `{"path", "step"}`, or `{"values": [...]}`, or the bare list.
Attention with several rows (one a step) is their mean.

Deviations from the reference, on purpose: a missing or unreadable file, NaN, or a signal that is zero everywhere is an
error (there it trains on zeros); the teacher's grid is taken from the record, and guessed only where it is unknown.
"""

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image as PILImage

from .records import RecordError, record_origin
from .teacher_files import EXTRACT_AGAIN, SignalError, is_index, read_signal

if TYPE_CHECKING:
    from torch import Tensor

TEACHER_SIGNALS = ("concept", "attention")


@dataclass(frozen=True)
class TeacherSignals:
    """The signals of one image, float32; those that were not asked for are None.

    Args:
        concept: `(D,)`, the mean over the image tokens, or `(N, D)`, one row each.
        attention: `(N,)`, at least 0, of any positive sum.
        grid: `(rows, columns)` of the N image tokens; None where the record does not say.
    """

    concept: "Tensor | None"
    attention: "Tensor | None"
    grid: tuple[int, int] | None

    @property
    def num_tokens(self) -> int | None:
        """Image tokens of the teacher; None where only a mean is known."""
        rows = [len(self.attention)] if self.attention is not None else []
        rows += [len(self.concept)] if self.concept is not None and self.concept.ndim == 2 else []
        return rows[0] if rows else None


def load_teacher_signals(
    record: Mapping[str, Any],
    *,
    concept_size: int | None = None,
    image: PILImage.Image | None = None,
    need: Collection[str] = TEACHER_SIGNALS,
) -> TeacherSignals:
    """The teacher signals of a record.

    Args:
        record: with `teacher`, see above.
        concept_size: width D that the concept must have.
        image: the image the signals belong to, opened; compared with `image_sha256` where the record has that.
        need: which signals: `"concept"`, `"attention"`. With none of them nothing is read or checked.

    Raises:
        ValueError: `need` names another signal.
        RecordError: names file, row and id of the record: no `teacher` or a needed signal missing, a file that is
            missing or cannot be read, NaN or infinity, negative attention, a signal that is zero everywhere, another
            width, another number of tokens than the grid, or an image that has changed since extraction.
    """
    unknown = sorted(set(need) - set(TEACHER_SIGNALS))
    if unknown:
        raise ValueError(f"need={sorted(need)} has the unknown signals {unknown}; choose from {list(TEACHER_SIGNALS)}")
    if not need:
        return TeacherSignals(None, None, None)
    try:
        teacher = _teacher(record)
        if image is not None:
            _check_image(teacher.get("image_sha256"), image)
        grid = _grid(teacher.get("grid"))
        concept = _concept(teacher, concept_size) if "concept" in need else None
        attention = _attention(teacher) if "attention" in need else None
        _check_tokens(concept, attention, grid)
    except SignalError as error:
        raise RecordError(*record_origin(record), f"teacher of record {record.get('id')!r}: {error}") from error
    return TeacherSignals(concept, attention, grid)


def image_fingerprint(image: PILImage.Image) -> str:
    """SHA-256 of an image's size and RGB pixels, as hexadecimal digits: the same for every lossless format."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    digest = hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode())
    digest.update(rgb.tobytes())
    return digest.hexdigest()


# Grids --------------------------------------------------------------------------------------------------------------


def find_best_grid(num_tokens: int, image_width: int, image_height: int) -> tuple[int, int]:
    """The published guess at a grid: the factors of the number of tokens that are nearest to the image's shape.

    Args:
        num_tokens: image tokens.
        image_width, image_height: of the image as it is on disk, in pixels.

    Returns:
        `(rows, columns)`; of grids equally near, the one with the smaller factor first, rows before columns.

    Raises:
        ValueError: a number below 1.

    Example:
        >>> find_best_grid(24, 300, 100)
        (3, 8)
    """
    if min(num_tokens, image_width, image_height) < 1:
        raise ValueError(
            f"no grid of {num_tokens} tokens in {image_width}x{image_height} pixels; all must be positive"
        )
    shape, best, best_distance = image_height / image_width, (1, num_tokens), math.inf
    for factor in range(1, math.isqrt(num_tokens) + 2):
        if num_tokens % factor:
            continue
        for rows, columns in ((factor, num_tokens // factor), (num_tokens // factor, factor)):
            distance = abs(rows / columns - shape)
            if distance < best_distance:
                best, best_distance = (rows, columns), distance
    return best


def resize_signal(
    values: "Tensor",
    target: tuple[int, int],
    *,
    source: tuple[int, int] | None,
    image_size: tuple[int, int] | None = None,
) -> "Tensor":
    """A signal on another grid: bilinear with half-pixel centres, without antialiasing, channel by channel. The sum of
    the values changes with the number of cells, and nothing is normalised.

    Args:
        values: `(N,)` or `(N, C)`, row by row from the top left.
        target: `(rows, columns)` wanted.
        source: `(rows, columns)` of the values. None, as published: with as many values as the target has cells they
            are taken to be on it, otherwise the grid is guessed with [`find_best_grid`].
        image_size: `(width, height)` in pixels, for the guess.

    Returns:
        `(rows * columns,)` or `(rows * columns, C)` float32; the values themselves when they are on the target grid.

    Raises:
        ValueError: another number of values than the source has cells, a guess without `image_size`, or other
            dimensions.
    """
    from torch.nn.functional import interpolate

    if values.ndim not in (1, 2) or min(target) < 1:
        raise ValueError(f"cannot resize values of shape {tuple(values.shape)} to {target}; give (N,) or (N, C)")
    values = values.float()
    if source is None:
        source = target if len(values) == math.prod(target) else _guess(len(values), image_size)
    if math.prod(source) != len(values):
        raise ValueError(f"{len(values)} values do not fill a grid of {source[0]}x{source[1]}; correct the grid")
    if tuple(source) == tuple(target):
        return values
    channels = values.reshape(*source, -1).permute(2, 0, 1)
    resized = interpolate(channels[None], size=tuple(target), mode="bilinear", align_corners=False)[0]
    return resized.permute(1, 2, 0).reshape(math.prod(target), *values.shape[1:])


def _guess(num_tokens: int, image_size: tuple[int, int] | None) -> tuple[int, int]:
    if image_size is None:
        raise ValueError(f"the grid of {num_tokens} values is unknown; give source, or image_size to guess it")
    return find_best_grid(num_tokens, *image_size)


# Reading ------------------------------------------------------------------------------------------------------------


def _teacher(record: Mapping[str, Any]) -> Mapping[str, Any]:
    teacher = record.get("teacher")
    if not isinstance(teacher, Mapping):
        raise SignalError(
            f"the record has none (teacher={teacher!r:.80}); extract the signals (examples/extract_teacher.py), or "
            "train without them"
        )
    index, images = teacher.get("image", 0), record.get("images") or []
    if not is_index(index) or (images and index >= len(images)):
        raise SignalError(f"image={index!r} is not the index of one of the {len(images)} images; correct it")
    return teacher


def _check_image(expected: Any, image: PILImage.Image) -> None:
    if expected is None:
        return
    found = image_fingerprint(image)
    if found != expected:
        raise SignalError(
            f"the image ({image.width}x{image.height} pixels, sha256 {found:.12}...) is not the one that the signals "
            f"were extracted from (image_sha256 {expected!s:.12}...); restore it, or {EXTRACT_AGAIN}"
        )


def _grid(grid: Any) -> tuple[int, int] | None:
    if grid is None:
        return None
    if not (isinstance(grid, list | tuple) and len(grid) == 2 and all(is_index(n) and n > 0 for n in grid)):
        raise SignalError(f"grid={grid!r} is not [rows, columns]; correct it, or None to have it guessed")
    return grid[0], grid[1]


def _concept(teacher: Mapping[str, Any], concept_size: int | None) -> "Tensor":
    concept, where = read_signal(teacher.get("concept"), "concept")
    if concept.ndim not in (1, 2) or not concept.numel():
        raise SignalError(f"{where} has the shape {tuple(concept.shape)}, not (D,) or (tokens, D); {EXTRACT_AGAIN}")
    if concept_size is not None and concept.shape[-1] != concept_size:
        raise SignalError(
            f"{where} is {concept.shape[-1]} wide, not {concept_size} as the model's head and the other records; "
            "use signals of one teacher, and a model with its concept_head_size"
        )
    return _checked_values(concept, where, "is zero everywhere")


def _attention(teacher: Mapping[str, Any]) -> "Tensor":
    attention, where = read_signal(teacher.get("attention"), "attention")
    if attention.ndim not in (1, 2) or not attention.numel():
        raise SignalError(
            f"{where} has the shape {tuple(attention.shape)}, not (tokens,) or (steps, tokens); {EXTRACT_AGAIN}"
        )
    attention = _checked_values(attention, where, "sums to zero")
    if (attention < 0).any():
        raise SignalError(f"{where} has the negative weight {attention.min().item():g}; {EXTRACT_AGAIN}")
    return attention.mean(0) if attention.ndim == 2 else attention


def _checked_values(values: "Tensor", where: str, zero: str) -> "Tensor":
    finite = values.isfinite()
    if not finite.all():
        wrong = int((~finite).sum())
        raise SignalError(f"{where} has {wrong} of {values.numel()} values NaN or infinite; {EXTRACT_AGAIN}")
    if not values.any():
        raise SignalError(f"{where} {zero}: it is no target; {EXTRACT_AGAIN}")
    return values


def _check_tokens(concept: "Tensor | None", attention: "Tensor | None", grid: tuple[int, int] | None) -> None:
    counts = {} if concept is None or concept.ndim == 1 else {"concept": len(concept)}
    counts |= {} if attention is None else {"attention": len(attention)}
    for name, count in counts.items():
        if grid is not None and count != math.prod(grid):
            raise SignalError(
                f"{name} has {count} tokens, its grid of {grid[0]}x{grid[1]} has {math.prod(grid)}; correct the grid, "
                f"or {EXTRACT_AGAIN}"
            )
    if len(set(counts.values())) > 1:
        raise SignalError(f"signals of different images: {counts} tokens; {EXTRACT_AGAIN}")
