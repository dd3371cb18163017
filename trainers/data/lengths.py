"""Lengths of samples in tokens: the file that holds them, and the estimate of the published code.

A length file belongs to one data set and one way to count: it keeps a fingerprint of every row and the settings that
lengths depend on (pixel bounds, tokenizer, layout), and is refused for another one. `examples/precompute_lengths.py`
writes it; the published form `{index: length}` is read too.

Paper: "Forest Before Trees: Latent Superposition for Efficient Visual Reasoning", arXiv 2601.06803 (card 5.1). What
the published estimate does not count (the chain, all images but the first, the template) the exact count does: it is
made by the collator, see `trainers/sample_lengths.py`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image as PILImage

from .json_rows import existing_file
from .llava import resolve_image
from .records import IMAGE_ERRORS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT, VERSION = "latent-lengths", 1
FORMULAS = ("exact", "reference")
RECOUNT = "count again with examples/precompute_lengths.py"
# The published estimate: what it adds for template and chain, and the image formats whose headers it reads.
REFERENCE_EXTRA = 50
REFERENCE_MIN_PIXELS, REFERENCE_MAX_PIXELS = 100_352, 6_422_528
_REFERENCE_FORMATS = ("PNG", "JPEG", "MPO", "GIF", "BMP", "WEBP")
_PATCH = 28


class BadRow(NamedTuple):
    """Why a row has no length."""

    file: str
    row: int | None
    reason: str


@dataclass
class LengthTable:
    """The lengths of a data set, by index over all of its sources.

    Args:
        lengths: tokens before padding; 0 for a bad row.
        bad: index to what is wrong with the row.
        formula: `"exact"`, `"reference"`, or `"published"` for a file of the published form.
        settings: what the lengths depend on; empty when the file does not say.
        fingerprints: of each row (None for a row that could not be read); None for a file that has none.
        path: of the file, for messages.
    """

    lengths: list[int]
    bad: dict[int, BadRow] = field(default_factory=dict)
    formula: str = "exact"
    settings: dict[str, Any] = field(default_factory=dict)
    fingerprints: list[str | None] | None = None
    path: str = ""

    def check_settings(self, expected: Mapping[str, Any]) -> None:
        """Compare what the lengths depend on with what a run uses; a file that says nothing passes.

        Raises:
            ValueError: names the file, the option, both values and the remedy.
        """
        for name, value in self.settings.items():
            if name in expected and expected[name] != value:
                raise ValueError(
                    f"{self.path}: lengths were counted with {name}={value!r}, this run has "
                    f"{name}={expected[name]!r}; {RECOUNT}, or use the same {name}"
                )

    def of_rows(
        self, rows: Sequence[tuple[int, str]], name: Callable[[int], str], max_bad_share: float = 0.01
    ) -> tuple[list[int], dict[int, BadRow]]:
        """Lengths of the rows of a data set, which may be a part of the one that was counted.

        Args:
            rows: index over all sources and fingerprint, of each row.
            name: how a message names the row at a position.
            max_bad_share: share of rows that the data set may lack when the file has no fingerprints to compare.

        Returns:
            Length by position (0 for a bad row), and position to what is wrong.

        Raises:
            ValueError: the file is of another data set: a row that it lacks, or one that was another when counted.
        """
        count = len(self.lengths)
        other = f"{self.path} is of another data set"
        if self.fingerprints is None and not (1 - max_bad_share) * count <= len(rows) <= count:
            raise ValueError(f"{other}: it has {count} lengths, the data set has {len(rows)} rows; {RECOUNT}")
        for position, (index, fingerprint) in enumerate(rows):
            if index >= count:
                raise ValueError(f"{other}: it has {count} lengths, and none for {name(position)}; {RECOUNT}")
            if self.fingerprints is not None and self.fingerprints[index] != fingerprint:
                raise ValueError(f"{other}, or older: {name(position)} differs from row {index} there; {RECOUNT}")
        bad = {position: self.bad[index] for position, (index, _) in enumerate(rows) if index in self.bad}
        return [self.lengths[index] for index, _ in rows], bad


def row_fingerprint(row: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for what a row says: its turns, its chain, the file names of its images.

    The same for a record, for its row in a table, and on another machine: folders, pixels and annotations that the
    text does not show are left out.
    """
    messages = row.get("messages")
    if messages is None:
        said: Any = [row.get("question"), row.get("answer")]
    else:
        said = [[turn["role"], turn["content"]] for turn in messages]
    names = [image.get("path") if isinstance(image, dict) else image for image in row.get("images") or []]
    names = [os.path.basename(name) if isinstance(name, str | os.PathLike) else "" for name in names]
    text = json.dumps([said, row.get("chain"), names], ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def content_hash(fingerprints: Sequence[str | None]) -> str:
    """One number for all rows of a data set, in their order."""
    return hashlib.sha256("\n".join(text or "-" for text in fingerprints).encode()).hexdigest()


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Stands for a tokenizer: its vocabulary with the added tokens, and how it cuts a probe."""
    probe = tokenizer.encode("Two boys, 3 dogs;\n the Grass isn't\t\u00e9 \u4e2d", add_special_tokens=False)
    text = json.dumps([sorted(tokenizer.get_vocab().items()), probe])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# The file -----------------------------------------------------------------------------------------------------------


def save_lengths(table: LengthTable, path: str | os.PathLike) -> None:
    """Write a length file; it appears whole or not at all.

    The format is JSON: `format`, `version`, `formula`, `settings`, `count`, `content_hash` (over the fingerprints),
    `lengths` (0 for a bad row), `fingerprints`, and `bad`, index to `[file, row, reason]`.
    """
    path = Path(path)
    value = {
        "format": FORMAT,
        "version": VERSION,
        "formula": table.formula,
        "settings": table.settings,
        "count": len(table.lengths),
        "content_hash": content_hash(table.fingerprints or []),
        "bad": {str(index): list(row) for index, row in sorted(table.bad.items())},
        "lengths": table.lengths,
        "fingerprints": table.fingerprints,
    }
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_lengths(path: str | os.PathLike) -> LengthTable:
    """Read a length file, or one of the published form `{index: length}` (an index left out, or a 0, is a bad row).

    Raises:
        RecordError: the file does not exist.
        ValueError: not such a file, damaged, or a length that is no integer, negative, or 0 without being listed as
            bad; names the file, the row and the value.
    """
    path = existing_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a length file ({error}); {RECOUNT}") from error
    if isinstance(value, dict) and value.get("format") == FORMAT:
        return _own_table(path, value)
    if isinstance(value, dict) and value and all(key.isascii() and key.isdigit() for key in value):
        return _published_table(path, {int(key): length for key, length in value.items()})
    raise ValueError(
        f"{path}: not a length file: neither format={FORMAT!r} nor an object of index to length; {RECOUNT}"
    )


def _own_table(path: Path, value: dict[str, Any]) -> LengthTable:
    if value.get("version") != VERSION:
        raise ValueError(f"{path}: version={value.get('version')!r} of the format, this reads {VERSION}; {RECOUNT}")
    lengths, fingerprints, bad = (value.get(name) for name in ("lengths", "fingerprints", "bad"))
    if not (isinstance(lengths, list) and isinstance(fingerprints, list) and isinstance(bad, dict)):
        raise ValueError(f"{path}: lengths, fingerprints or bad are missing; {RECOUNT}")
    if not len(lengths) == len(fingerprints) == value.get("count"):
        raise ValueError(
            f"{path}: count={value.get('count')!r} for {len(lengths)} lengths and {len(fingerprints)} fingerprints; "
            f"the file was cut or edited: {RECOUNT}"
        )
    if content_hash(fingerprints) != value.get("content_hash"):
        raise ValueError(f"{path}: content_hash does not fit the fingerprints; the file was edited: {RECOUNT}")
    reasons = {int(index): BadRow(*row) for index, row in bad.items()}
    for index, length in enumerate(lengths):
        _check_length(path, index, length, index in reasons)
    return LengthTable(lengths, reasons, value["formula"], value["settings"], fingerprints, str(path))


def _published_table(path: Path, found: dict[int, Any]) -> LengthTable:
    lengths = [found.get(index, 0) for index in range(max(found) + 1)]
    bad = {}
    for index, length in enumerate(lengths):
        _check_length(path, index, length, listed=True)
        if length == 0:
            reason = f"counting failed: {path} gives 0" if index in found else f"{path} has no length for it"
            bad[index] = BadRow(str(path), index, f"{reason}; {RECOUNT}, which says why")
    return LengthTable(lengths, bad, "published", {}, None, str(path))


def _check_length(path: Path, index: int, length: Any, listed: bool) -> None:
    if not isinstance(length, int) or isinstance(length, bool):
        raise ValueError(f"{path}, row {index}: the length {length!r} is not an integer; {RECOUNT}")
    if length < 0 or (length == 0 and not listed):
        where = "negative" if length < 0 else "0, and the row is not among the bad ones"
        raise ValueError(f"{path}, row {index}: the length {length} is {where}; {RECOUNT}")


# The published estimate (card 5.1) ----------------------------------------------------------------------------------


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width of an image after resizing, multiples of 28: those of the image processor of transformers.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as stock_resize

    try:
        return stock_resize(height, width, _PATCH, min_pixels, max_pixels)
    except ValueError as error:
        raise ValueError(f"an image of {width}x{height} pixels: one side is more than 200 times the other") from error


def reference_length(
    value: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    image_folder: str | os.PathLike,
    min_pixels: int = REFERENCE_MIN_PIXELS,
    max_pixels: int = REFERENCE_MAX_PIXELS,
) -> int:
    """The published estimate for one JSON record: text without chain, the first image, and 50 (card 5.1).

    An image that is missing, or of another format than PNG, JPEG, GIF, BMP and WebP, counts nothing.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: a record that the published code fails on (length 0 there).
    """
    turns = [turn["value"] for turn in value["conversations"]]
    text = "\n".join(turn.replace("<image>", "") for turn in turns)
    length = len(tokenizer.encode(text, add_special_tokens=False)) + REFERENCE_EXTRA
    images = value.get("image") or []
    images = [images] if isinstance(images, str) else images
    if images and any("<image>" in turn for turn in turns):
        size = _header_size(resolve_image(images[0], image_folder))
        if size is not None:
            width, height = size
            height, width = smart_resize(height, width, min_pixels, max_pixels)
            length += height * width // _PATCH**2
    return length


def _header_size(path: str) -> tuple[int, int] | None:
    try:
        with PILImage.open(path) as image:
            return image.size if image.format in _REFERENCE_FORMATS else None
    except IMAGE_ERRORS:
        return None
