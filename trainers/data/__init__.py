"""Data of latent visual reasoning: one record schema, readers and writers of published formats, short-answer scorers.

Every reader yields `Record`s (see `records.py`), every collator reads them. Importing this package loads neither torch
nor `datasets`; the functions that need them import them when called.
"""

from .answers import (
    extract_answer,
    extract_letter,
    extract_mmvp,
    extract_yes_no,
    score_choice_relaxed,
    score_letter,
    score_mmvp,
    score_yes_no,
    score_yes_no_relaxed,
)
from .llava import (
    LASER_TOKENS,
    encode_conversation,
    pad_batch,
    read_llava,
    read_source,
    record_form,
    render_turns,
    write_llava,
)
from .records import (
    Record,
    RecordError,
    RecordReport,
    RecordShareError,
    make_record,
    record_features,
    record_from_row,
    record_to_row,
    records_to_dataset,
    validate_record,
)

__all__ = [
    "LASER_TOKENS",
    "Record",
    "RecordError",
    "RecordReport",
    "RecordShareError",
    "encode_conversation",
    "extract_answer",
    "extract_letter",
    "extract_mmvp",
    "extract_yes_no",
    "make_record",
    "pad_batch",
    "read_llava",
    "read_source",
    "record_features",
    "record_form",
    "record_from_row",
    "record_to_row",
    "records_to_dataset",
    "render_turns",
    "score_choice_relaxed",
    "score_letter",
    "score_mmvp",
    "score_yes_no",
    "score_yes_no_relaxed",
    "validate_record",
    "write_llava",
]
