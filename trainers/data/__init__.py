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
from .answers_dmlr import extract_dmlr, parse_score, score_dmlr, stop_reason, verifier_truth
from .answers_lavit import (
    accuracy_lavit,
    count_learned_tokens,
    extract_final_answer,
    extract_letter_lavit,
    judge_verdict,
    score_lavit,
)
from .answers_staged import (
    cot_matches,
    extract_coconut,
    extract_scienceqa,
    m3cot_letters,
    score_coconut,
    score_m3cot,
    score_scienceqa,
)
from .dmlr import read_dmlr, write_dmlr_json
from .graphs import GraphGenerator, check_graph_question, graph_dataset, graph_record, graph_stream
from .lavit import read_lavit, write_lavit_json
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
from .m3cot import read_m3cot
from .predictions import (
    m3cot_prediction,
    read_m3cot_predictions,
    read_scienceqa_predictions,
    scienceqa_predictions,
    write_m3cot_predictions,
    write_scienceqa_predictions,
)
from .prosqa import read_gsm8k_steps, read_prontoqa, read_prosqa
from .rationales import group_steps, split_rationale
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
from .scienceqa import read_scienceqa
from .staged_text import COCONUT_TOKENS, IVTLR_TOKENS, STAGED_FORMATS, StagedExample, StagedFormat, encode_staged
from .viscot import read_viscot
from .viscot_answers import enrich_answers

__all__ = [
    "COCONUT_TOKENS",
    "IVTLR_TOKENS",
    "LASER_TOKENS",
    "STAGED_FORMATS",
    "GraphGenerator",
    "Record",
    "RecordError",
    "RecordReport",
    "RecordShareError",
    "StagedExample",
    "StagedFormat",
    "accuracy_lavit",
    "check_graph_question",
    "cot_matches",
    "count_learned_tokens",
    "encode_conversation",
    "encode_staged",
    "enrich_answers",
    "extract_answer",
    "extract_coconut",
    "extract_dmlr",
    "extract_final_answer",
    "extract_letter",
    "extract_letter_lavit",
    "extract_mmvp",
    "extract_scienceqa",
    "extract_yes_no",
    "graph_dataset",
    "graph_record",
    "graph_stream",
    "group_steps",
    "judge_verdict",
    "m3cot_letters",
    "m3cot_prediction",
    "make_record",
    "pad_batch",
    "parse_score",
    "read_dmlr",
    "read_gsm8k_steps",
    "read_lavit",
    "read_llava",
    "read_m3cot",
    "read_m3cot_predictions",
    "read_prontoqa",
    "read_prosqa",
    "read_scienceqa",
    "read_scienceqa_predictions",
    "read_source",
    "read_viscot",
    "record_features",
    "record_form",
    "record_from_row",
    "record_to_row",
    "records_to_dataset",
    "render_turns",
    "scienceqa_predictions",
    "score_choice_relaxed",
    "score_coconut",
    "score_dmlr",
    "score_lavit",
    "score_letter",
    "score_m3cot",
    "score_mmvp",
    "score_scienceqa",
    "score_yes_no",
    "score_yes_no_relaxed",
    "split_rationale",
    "stop_reason",
    "validate_record",
    "verifier_truth",
    "write_dmlr_json",
    "write_lavit_json",
    "write_llava",
    "write_m3cot_predictions",
    "write_scienceqa_predictions",
]
