"""Exact lengths of samples in tokens, without decoding pixels: what the collator would build, before padding.

Text is rendered and tokenised by the collator itself; of an image only the header is read, and the image processor
says how many patches an image of that size becomes. An EXIF orientation changes nothing: height and width swapped give
the same number.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image as PILImage
from tqdm.auto import tqdm
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from .collators import LatentSFTCollator, completed_row
from .data.lengths import BadRow, LengthTable, load_lengths, row_fingerprint, tokenizer_hash
from .data.records import IMAGE_ERRORS, Record, RecordError, RecordReport, record_from_row, record_origin

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 256


class SampleLengths:
    """Counts the tokens of a record, or of a row of a table, as a collator lays it out.

    Args:
        collator: the collator of the run.

    Raises:
        ValueError: a collator or an image processor whose output cannot be told from the image's size.
    """

    def __init__(self, collator: LatentSFTCollator) -> None:
        if not isinstance(collator, LatentSFTCollator):
            raise ValueError(
                f"lengths are those of LatentSFTCollator, got {type(collator).__name__}; give lengths_path, a file of "
                "lengths of that collator, or leave enable_dynamic_batch out"
            )
        processor = collator.processor.image_processor
        if not hasattr(processor, "get_number_of_image_patches") or not getattr(processor, "do_resize", True):
            raise ValueError(
                f"{type(processor).__name__} (do_resize={getattr(processor, 'do_resize', None)}) does not say how "
                "many tokens an image of a given size becomes; use an image processor of Qwen-VL with do_resize=True"
            )
        self.collator = collator

    def settings(self) -> dict[str, Any]:
        """What the lengths depend on besides the data; kept in length files."""
        processor = self.collator.processor.image_processor
        names = ("region_layout", "empty_region", "join_regions") if self.collator.latent_form == "regions" else ()
        return {
            **{name: str(getattr(self.collator, name)) for name in names},
            "latent_form": self.collator.latent_form,
            "num_slots": self.collator.num_slots,
            "min_pixels": processor.size["shortest_edge"],
            "max_pixels": processor.size["longest_edge"],
            "patch_size": processor.patch_size,
            "merge_size": processor.merge_size,
            "latent_tokens": dict(self.collator.processor.latent_tokens),
            "tokenizer": tokenizer_hash(self.collator.processor.tokenizer),
            "system_message": self.collator.processor.default_system_message,
        }

    def __call__(self, row: Mapping[str, Any]) -> int:
        """Tokens of a row, padding not counted.

        Raises:
            RecordError: a row that the collator refuses; names file, row and reason.
        """
        record = self.collator.record({**row, "images": [], "step_images": None})
        record["images"] = [_unread(image, record) for image in row.get("images") or []]
        grids = [self.grid_thw(image, record) for image in record["images"]]
        return len(self.collator.encode(record, grids)["input_ids"])

    def grid_thw(self, image: Any, record: Record) -> tuple[int, int, int]:
        """Patches of an image: frames (1), height, width.

        Args:
            image: a path, a PIL image or, as a table stores it, a dictionary.
            record: whose it is, for messages.

        Raises:
            RecordError: an image that cannot be read, or has no place between the bounds of the processor.
        """
        processor = self.collator.processor.image_processor
        (width, height), patch = _size(_unread(image, record), record), processor.patch_size
        bounds = processor.size["shortest_edge"], processor.size["longest_edge"]
        try:
            resized = smart_resize(height, width, patch * processor.merge_size, *bounds)
            return 1, *(side // patch for side in resized)
        except ValueError as error:
            reason = f"an image of {width}x{height} pixels cannot be processed ({error}); drop it"
            raise RecordError(*record_origin(record), reason) from error


def _unread(image: Any, record: Record) -> Any:
    """An image of a row as the collator takes it, a path or a PIL image, whose pixels are not decoded yet."""
    if not isinstance(image, dict):
        return image
    if image.get("bytes") is None:
        return image["path"]
    try:
        return PILImage.open(BytesIO(image["bytes"]))
    except IMAGE_ERRORS as error:
        raise RecordError(*record_origin(record), f"the bytes of an image cannot be read ({error})") from error


def _size(image: Any, record: Record) -> tuple[int, int]:
    if isinstance(image, PILImage.Image):
        return image.size
    try:
        with PILImage.open(image) as file:
            return file.size
    except IMAGE_ERRORS as error:
        reason = f"image {str(image)!r} cannot be read ({error}); fix the path or the file"
        raise RecordError(*record_origin(record), reason) from error


# A whole data set ---------------------------------------------------------------------------------------------------


@dataclass
class DatasetLengths:
    """Lengths of the rows of a data set, by position.

    Args:
        lengths: tokens before padding; 0 for a bad row.
        bad: positions to leave out, and what is wrong with them.
        data_hash: stands for the rows and their lengths.
    """

    lengths: list[int]
    bad: dict[int, BadRow] = field(default_factory=dict)
    data_hash: str = ""

    def check(self, max_bad_share: float) -> None:
        """Say which rows are left out, and stop when they are too many.

        Raises:
            RecordShareError: their share is above the limit.
        """
        report = RecordReport(max_bad_share)
        report.num_good = len(self.lengths) - len(self.bad)
        for _, row in sorted(self.bad.items()):
            report.bad(*row)
        report.check()


def dataset_lengths(
    dataset: Any,
    collator: Any,
    lengths_path: str | None = None,
    max_bad_share: float = 0.01,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> DatasetLengths:
    """Lengths of a map-style data set: from a file, or counted here, each rank a part of the rows.

    Args:
        dataset: records or rows of a table.
        collator: of the run.
        lengths_path: a length file; its rows are found by `meta["index"]`, else by position.
        max_bad_share: see [`LengthTable.of_rows`].
        rank, world_size: of this process; all processes must call this together.
        progress: show a bar on the first rank while rows are counted.

    Raises:
        ValueError: a streaming data set, or a length file of other data or settings.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"enable_dynamic_batch=True needs a data set with a length, got {type(dataset).__name__} (streaming); "
            "load it as a table, or set enable_dynamic_batch=False"
        )
    table = None
    if lengths_path is None:
        count = SampleLengths(collator)
    else:
        count, table = None, load_lengths(lengths_path)
        if table.settings and isinstance(collator, LatentSFTCollator):
            table.check_settings(SampleLengths(collator).settings())
        if table.formula != "exact":
            logger.warning("%s holds estimates (%s): batches may exceed the token cap", table.path, table.formula)
    part = range(rank * len(dataset) // world_size, (rank + 1) * len(dataset) // world_size)
    rows = tqdm(_rows(dataset, part), "lengths", len(part), disable=rank > 0 or count is None or not progress)
    facts = gather_object([_facts(position, row, count) for position, row in zip(part, rows, strict=True)])
    found = _from_facts(facts) if table is None else _from_table(facts, table, dataset, max_bad_share)
    lines = [f"{fact[1]} {length}" for fact, length in zip(facts, found.lengths, strict=True)]
    found.data_hash = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return found


def _rows(dataset: Any, part: Sequence[int]) -> Iterator[Mapping[str, Any]]:
    """Rows with their images as they are stored, unless they are made when they are read."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        yield from (dataset[position] for position in part)
    else:
        yield from stored_rows(dataset, part)


def stored_rows(dataset: Dataset, part: range) -> Iterator[dict[str, Any]]:
    """Rows of a table as they are stored: images are not decoded, a transform is not called."""
    stored = dataset.with_format("arrow")
    for start in range(part.start, part.stop, _ROWS_AT_A_TIME):
        yield from stored[start : min(start + _ROWS_AT_A_TIME, part.stop)].to_pylist()


def _facts(position: int, row: Mapping[str, Any], count: SampleLengths | None) -> tuple[int, str, int, BadRow | None]:
    """Index over all sources, fingerprint, length (0: not counted) and what is wrong."""
    meta = row.get("meta")
    meta = json.loads(meta) if isinstance(meta, str) and meta else meta
    index = meta.get("index") if isinstance(meta, dict) else None
    index = position if not isinstance(index, int) else index
    length, bad = 0, None
    if count is not None:
        try:
            length = count(row)
        except RecordError as error:
            bad = BadRow(error.file, error.row, error.reason)
    return index, row_fingerprint(row), length, bad


def _from_facts(facts: Iterable[tuple[int, str, int, BadRow | None]]) -> DatasetLengths:
    facts = list(facts)
    bad = {position: fact[3] for position, fact in enumerate(facts) if fact[3] is not None}
    return DatasetLengths([fact[2] for fact in facts], bad)


def _from_table(facts: Sequence[tuple], table: LengthTable, dataset: Any, max_bad_share: float) -> DatasetLengths:
    rows = [(index, fingerprint) for index, fingerprint, *_ in facts]
    return DatasetLengths(*table.of_rows(rows, lambda position: row_name(dataset, position), max_bad_share))


def row_name(dataset: Any, position: int) -> str:
    """How a message names a row of a data set: file, row and id."""
    row = next(_rows(dataset, range(position, position + 1)))
    record = record_from_row(completed_row({**row, "images": [], "step_images": None}))
    source, number = record_origin(record)
    return f"{source}, row {position if number is None else number} (id {record['id']!r})"
