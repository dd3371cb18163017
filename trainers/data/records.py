"""The one data record: its fields, its `datasets` schema, its checks, and the report of bad rows.

Every published data set becomes rows of this schema (readers), every method's collator states which of its columns it
needs. The fields are those of "Forest Before Trees: Latent Superposition for Efficient Visual Reasoning" (arXiv
2601.06803: chain, conversations), of the ROI methods (boxes), of the stepwise methods (steps, step images) and of the
distilled ones (teacher).
"""

import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from PIL import Image as PILImage

if TYPE_CHECKING:
    from datasets import Dataset, Features


logger = logging.getLogger(__name__)

LISTED_BAD_ROWS = 10
# What Pillow raises for a file that is missing, damaged or far too large.
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError)
DEFAULT_MAX_BAD_SHARE = 0.01
_IMAGE_TYPES = (str, os.PathLike, PILImage.Image)
# A table is built in parts of so many rows: only the rows of a part are held as Python objects.
_ROWS_AT_A_TIME = 10_000


class Box(TypedDict):
    """A region of one image: `image` is the index in the record's `images`, `xyxy` is `[x0, y0, x1, y1]` in 0..1."""

    image: int
    xyxy: list[float]


class Message(TypedDict):
    """One turn as published: `content` still holds the `<image>` and `<laser>` placeholders of the file."""

    role: str
    content: str


class Record(TypedDict):
    """One example.

    Fields:
        id: name of the example.
        images: `PIL.Image.Image`s, paths (or URLs), or `{"bytes", "path"}` of a table that does not decode them, in
            the order of the placeholders.
        question: the user's words, without image placeholder.
        answer: the short answer.
        choices: texts of the options, in order.
        chain: short concepts from global to local, the answer concept last.
        steps: one sentence a reasoning step.
        boxes: regions of interest, see `Box`.
        step_images: one image a reasoning step.
        teacher: references to precomputed tensors (JSON-able).
        messages: only for data published as conversations, see `Message`.
        meta: JSON-able facts on the origin (file, row, name of the data set, ...).
    """

    id: str
    images: list[Any]
    question: str
    answer: str
    choices: list[str] | None
    chain: list[str] | None
    steps: list[str] | None
    boxes: list[Box] | None
    step_images: list[Any] | None
    teacher: dict[str, Any] | None
    messages: list[Message] | None
    meta: dict[str, Any]


RECORD_FIELDS = tuple(Record.__annotations__)


class RecordError(ValueError):
    """A bad row (or file, when `row` is None): where it is and what to do.

    Args:
        file: data file, or another name of the source.
        row: 0-based index of the record in the file.
        reason: what is wrong, the value, and the remedy.
    """

    def __init__(self, file: str | os.PathLike, row: int | None, reason: str) -> None:
        self.file, self.row, self.reason = os.fspath(file), row, reason
        super().__init__(f"{self.file}, {f'row {row}' if row is not None else 'whole file'}: {reason}")

    def __reduce__(self) -> tuple:
        return type(self), (self.file, self.row, self.reason)


class RecordShareError(ValueError):
    """The share of bad rows is above the limit; the message lists the first of them."""


class RecordReport:
    """Collects what became of the rows that were read, so that nothing is dropped silently.

    Args:
        max_bad_share: largest share of bad rows (0..1) with which a run may go on.

    Raises:
        ValueError: when `max_bad_share` is outside 0..1.
    """

    def __init__(self, max_bad_share: float = DEFAULT_MAX_BAD_SHARE) -> None:
        self.max_bad_share = _checked_share(max_bad_share)
        self.num_good = 0
        self.num_bad = 0
        self.first_bad: list[RecordError] = []
        self.skip_reasons: Counter[str] = Counter()

    @property
    def bad_share(self) -> float:
        """Bad rows divided by good and bad rows (rows skipped on request do not count); 0 when nothing was read."""
        return self.num_bad / max(self.num_good + self.num_bad, 1)

    def good(self) -> None:
        """Counts one good row."""
        self.num_good += 1

    def bad(self, file: str | os.PathLike, row: int | None, reason: str) -> None:
        """Counts one bad row and keeps it for the list if it is among the first ten."""
        self.num_bad += 1
        if len(self.first_bad) < LISTED_BAD_ROWS:
            self.first_bad.append(RecordError(file, row, reason))

    def skipped(self, reason: str) -> None:
        """Counts one row that the user asked to leave out (a blacklist, a filter)."""
        self.skip_reasons[reason] += 1

    def summary(self) -> str:
        """Counts of good, bad and skipped rows, and the first ten bad ones with file, row and reason, as text."""
        lines = [f"{self.num_good} good rows, {self.num_bad} bad rows ({self.bad_share:.2%} bad)"]
        lines += [f"  skipped on request: {count} ({reason})" for reason, count in self.skip_reasons.items()]
        lines += [f"  {error}" for error in self.first_bad]
        if self.num_bad > len(self.first_bad):
            lines.append(f"  and {self.num_bad - len(self.first_bad)} more")
        return "\n".join(lines)

    def check(self, max_bad_share: float | None = None) -> None:
        """Stops the run when too many rows are bad, warns when some are.

        Args:
            max_bad_share: limit for this call instead of the report's own.

        Raises:
            RecordShareError: when the share of bad rows is above the limit.
        """
        limit = self.max_bad_share if max_bad_share is None else _checked_share(max_bad_share)
        if self.bad_share > limit:
            raise RecordShareError(
                f"the share of bad rows is above max_bad_share={limit:g}; repair the rows listed here, or raise "
                f"max_bad_share to go on without them\n{self.summary()}"
            )
        if self.num_bad:
            logger.warning("bad rows were left out: %s", self.summary())
        elif self.skip_reasons:
            logger.info("%s", self.summary())


def _checked_share(share: float) -> float:
    if not 0 <= share <= 1:
        raise ValueError(f"max_bad_share must be between 0 and 1, got {share!r}; 0.01 allows one bad row in a hundred")
    return share


def make_record(id: str, question: str, answer: str, images: Iterable[Any] = (), **optional: Any) -> Record:
    """A record with every field present: those that are not given are None, and `meta` is `{}`.

    Raises:
        ValueError: for a field that the schema does not have.
    """
    unknown = set(optional) - set(RECORD_FIELDS)
    if unknown:
        raise ValueError(
            f"unknown record fields {sorted(unknown)}; the schema has {list(RECORD_FIELDS)}, put others in meta"
        )
    record = dict.fromkeys(RECORD_FIELDS)
    record.update(id=id, question=question, answer=answer, images=list(images), meta={})
    record.update(optional)
    return record


def validate_record(record: Mapping[str, Any], source: str | os.PathLike, row: int | None) -> None:
    """Checks the types and ranges of a record's fields.

    Raises:
        RecordError: for the first field that is missing, unknown or wrong, with its value and the remedy.
    """
    missing = [name for name in RECORD_FIELDS if name not in record]
    unknown = sorted(set(record) - set(RECORD_FIELDS))
    if missing or unknown:
        raise RecordError(
            source, row, f"missing fields {missing}, unknown fields {unknown}; build rows with make_record()"
        )
    for name in ("id", "question", "answer"):
        if not isinstance(record[name], str):
            raise RecordError(source, row, f"{name} must be a string, got {record[name]!r}")
    for name in ("choices", "chain", "steps"):
        _check_strings(record[name], name, source, row)
    if not isinstance(record["images"], list):
        raise RecordError(
            source, row, f"images must be a list (empty for text only), got {type(record['images']).__name__}"
        )
    for name in ("images", "step_images"):
        _check_images(record[name], name, source, row)
    check_boxes(record["boxes"], len(record["images"]), source, row)
    _check_messages(record["messages"], source, row)
    if not isinstance(record["meta"], dict):
        raise RecordError(source, row, f"meta must be a dict, got {record['meta']!r}")
    for name in ("meta", "teacher"):
        _to_json(record[name], name, source, row)


def _check_strings(values: Any, name: str, source: str | os.PathLike, row: int | None) -> None:
    if values is not None and not (isinstance(values, list) and all(isinstance(v, str) and v.strip() for v in values)):
        raise RecordError(source, row, f"{name} must be a list of non-empty strings or None, got {values!r}")


def _check_images(images: Any, name: str, source: str | os.PathLike, row: int | None) -> None:
    if images is None:
        return
    wrong = [image for image in images if not (_is_encoded(image) or isinstance(image, _IMAGE_TYPES))]
    if wrong:
        raise RecordError(
            source, row, f"{name} must hold PIL images or paths, got {type(wrong[0]).__name__}: {wrong[0]!r:.80}"
        )


def _is_encoded(image: Any) -> bool:
    return isinstance(image, dict) and set(image) == {"bytes", "path"} and any(image.values())


def check_boxes(boxes: Any, num_images: int, source: str | os.PathLike, row: int | None) -> None:
    """Checks that every box names one of the images and has `0 <= x0 < x1 <= 1` and `0 <= y0 < y1 <= 1`.

    Raises:
        RecordError: for the first box that does not.
    """
    for box in boxes or []:
        try:
            x0, y0, x1, y1 = (float(value) for value in box["xyxy"])
            right = box["image"] in range(num_images) and 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
        except (KeyError, TypeError, ValueError):
            right = False
        if not right:
            raise RecordError(
                source,
                row,
                f"box {box!r} is not {{'image': index, 'xyxy': [x0, y0, x1, y1]}} with 0 <= x0 < x1 <= 1, "
                f"0 <= y0 < y1 <= 1 and an index below {num_images} (the number of images); "
                "divide pixels by the image size",
            )


def _check_messages(messages: Any, source: str | os.PathLike, row: int | None) -> None:
    for turn in messages or []:
        if not (isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))):
            raise RecordError(source, row, f"messages must hold {{'role': str, 'content': str}}, got {turn!r}")


def _to_json(value: Any, name: str, source: str | os.PathLike, row: int | None) -> str | None:
    if value is None:
        return None
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise RecordError(
            source, row, f"{name} must be JSON-able ({error}); store tensors in files and refer to them"
        ) from error


def record_features(decode: bool = True) -> "Features":
    """The `datasets` schema of a record; `meta` and `teacher` are JSON strings because a struct cannot vary by row.

    Args:
        decode: whether the table opens the images when a row is read. With `False` they are opened by
            [`record_from_row`] (bytes) or by the collator (paths), which names file and row of a bad one.
    """
    from datasets import Features, Image, List, Value

    text = Value("string")
    return Features(
        {
            "id": text,
            "images": List(Image(decode=decode)),
            "question": text,
            "answer": text,
            "choices": List(text),
            "chain": List(text),
            "steps": List(text),
            "boxes": List({"image": Value("int32"), "xyxy": List(Value("float64"))}),
            "step_images": List(Image(decode=decode)),
            "teacher": text,
            "messages": List({"role": text, "content": text}),
            "meta": text,
        }
    )


def record_origin(record: Mapping[str, Any]) -> tuple[str, int | None]:
    """File and row that an error about this record names: from `meta`, else the record's id."""
    meta = record.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    return str(meta.get("source", f"record {record.get('id')!r}")), meta.get("row")


def record_to_row(record: Record) -> dict[str, Any]:
    """The row of a `datasets` table: images encoded (paths stay paths), `meta` and `teacher` as JSON strings.

    For a streaming data set:
    `IterableDataset.from_generator(lambda: map(record_to_row, records), features=record_features())`.

    Raises:
        RecordError: when a field is wrong (see `validate_record`).
    """
    source, row = record_origin(record)
    validate_record(record, source, row)
    encoded = {field: record[field] for field in RECORD_FIELDS}
    for field in ("images", "step_images"):
        if record[field] is not None:
            encoded[field] = [_encode_image(image) for image in record[field]]
    for field in ("meta", "teacher"):
        encoded[field] = _to_json(record[field], field, source, row)
    return encoded


def _encode_image(image: Any) -> dict[str, Any]:
    if isinstance(image, str | os.PathLike):
        return {"path": os.fspath(image), "bytes": None}
    if isinstance(image, dict):
        return image
    from datasets import Image

    return Image().encode_example(image)


def _decode_image(image: Any, record: Mapping[str, Any]) -> Any:
    if not isinstance(image, dict):
        return image
    if image.get("bytes") is None:
        return image["path"]
    from datasets import Image

    try:
        return Image().decode_example(image)
    except IMAGE_ERRORS as error:
        raise RecordError(*record_origin(record), f"the bytes of an image cannot be read ({error})") from error


def open_image(image: Any, record: Mapping[str, Any], background: str | None = None) -> PILImage.Image:
    """An image of a record, or of a table that does not decode images, opened if it is a path, as RGB.

    Args:
        image: one of the record's `images`.
        record: named by errors.
        background: colour behind transparent parts, e.g. `"white"` (IVT-LR); None drops the transparency.

    Raises:
        RecordError: names file and row of the record whose image cannot be read.
    """
    image = _decode_image(image, record)
    try:
        if isinstance(image, PILImage.Image):
            return _to_rgb(image, background)
        with PILImage.open(image) as file:
            return _to_rgb(file, background)
    except IMAGE_ERRORS as error:
        reason = f"image {str(image)!r:.200} cannot be read ({error}); fix the path or the file"
        raise RecordError(*record_origin(record), reason) from error


def open_square_image(image: Any, record: Mapping[str, Any], side: int) -> PILImage.Image:
    """[`open_image`] on white, resized to a square, bicubic (IVT-LR's published scripts for Qwen2-VL: 280 pixels).

    Raises:
        RecordError: see [`open_image`].
    """
    return open_image(image, record, background="white").resize((side, side), PILImage.Resampling.BICUBIC)


def _to_rgb(image: PILImage.Image, background: str | None) -> PILImage.Image:
    if background is None or not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = PILImage.new("RGBA", image.size, background)
    return PILImage.alpha_composite(canvas, image).convert("RGB")


def records_to_dataset(records: Iterable[Record], decode: bool = True) -> "Dataset":
    """A `datasets.Dataset` with the schema of `record_features()` (paths stay references, PIL images become bytes).

    Args:
        records: what the table holds.
        decode: see [`record_features`].

    Raises:
        RecordError: for the first record with a wrong field.
    """
    from datasets import Dataset, concatenate_datasets

    features, iterator = record_features(decode), iter(records)
    parts = []
    while rows := [record_to_row(record) for record in itertools.islice(iterator, _ROWS_AT_A_TIME)]:
        parts.append(Dataset.from_list(rows, features=features))
    if not parts:
        return Dataset.from_dict({name: [] for name in features}, features=features)
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def record_from_row(row: Mapping[str, Any]) -> Record:
    """The record of a row of such a table; the inverse of `record_to_row`, with the images decoded to PIL.

    A record comes back as it is: `meta` and `teacher` may be JSON strings or what they stand for.

    Raises:
        ValueError: when the row lacks a column of the schema, or has one that the schema does not have.
    """
    if set(row) != set(RECORD_FIELDS):
        missing, unknown = sorted(set(RECORD_FIELDS) - set(row)), sorted(set(row) - set(RECORD_FIELDS))
        raise ValueError(
            f"not a record row: missing columns {missing}, unknown columns {unknown}; see record_features()"
        )
    record = dict(row)
    for name in ("meta", "teacher"):
        if isinstance(record[name], str):
            record[name] = json.loads(record[name]) if record[name] else None
    record["meta"] = record["meta"] or {}
    for name in ("images", "step_images"):
        if record[name] is not None:
            record[name] = [_decode_image(image, record) for image in record[name]]
    return record
