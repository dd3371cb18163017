"""Count the tokens of every sample of a data file, for batches of a bounded number of tokens (enable_dynamic_batch).

    python examples/precompute_lengths.py --data_path META.json --output_path lengths.json \
        --model_id Qwen/Qwen2.5-VL-7B-Instruct --max_pixels 6422528 --num_proc 8

Only tokenizer and image settings of the model are read, and of the images only the headers. Started again after it was
stopped, it goes on; when the data has changed, it counts the changed rows. Give the pixel bounds of the training run:
a length file is refused by a run with others. `--reference` makes the estimate of the published LASER code instead
(arXiv 2601.06803), which leaves the chain and all images but the first out.
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm
from transformers import AutoConfig

from modeling_latent import LatentProcessor
from modeling_latent.configuration_latent import get_latent_method
from trainers import LatentSFTCollator
from trainers.data.length_journal import (
    ExactRows,
    LengthJournal,
    ReferenceRows,
    SourceRow,
    count_rows,
    iter_source_rows,
)
from trainers.data.lengths import REFERENCE_MAX_PIXELS, REFERENCE_MIN_PIXELS, LengthTable, tokenizer_hash
from trainers.data.records import DEFAULT_MAX_BAD_SHARE, RecordReport
from trainers.model_loading import set_pixels
from trainers.sample_lengths import SampleLengths


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    count, settings = way_to_count(args)
    formula = "reference" if args.reference else "exact"
    total = sum(1 for _ in iter_source_rows(args.data_path, args.image_folder))
    report = RecordReport(args.max_bad_share)
    with LengthJournal(args.output_path, formula, settings, args.force) as journal:
        rows = iter_source_rows(args.data_path, args.image_folder)
        counted = count_rows(count, rows, journal.known, args.num_proc)
        for entry in tqdm(counted, f"{formula} lengths", total, unit="row"):
            journal.add(entry)
            report.good() if entry.bad is None else report.bad(*entry.bad)
        report.check()
        table = journal.finish()
    print(report.summary())
    print(describe(table))
    print(f"saved to {args.output_path}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="JSON or JSONL data, or a meta file of several sources")
    parser.add_argument("--image_folder", default=None, help="where relative image paths belong; not with a meta file")
    parser.add_argument("--output_path", required=True, help="the length file; <output_path>.partial is its journal")
    parser.add_argument("--model_id", required=True, help="folder or Hub id of a stock or latent model")
    parser.add_argument("--latent_method", default="laser", help="whose latent tokens a stock model gets")
    parser.add_argument("--latent_form", default="chain", help="as in training: chain, slots or none")
    parser.add_argument("--num_slots", type=int, default=None, help="as in training, with --latent_form slots")
    parser.add_argument("--min_pixels", type=int, default=None, help="as in training; default: those of the model")
    parser.add_argument("--max_pixels", type=int, default=None, help="as in training; default: those of the model")
    parser.add_argument("--reference", action="store_true", help="the published estimate, with its pixel bounds")
    parser.add_argument("--force", action="store_true", help="count all rows anew, whatever is there")
    parser.add_argument("--num_proc", type=int, default=1, help="processes that count")
    parser.add_argument("--max_bad_share", type=float, default=DEFAULT_MAX_BAD_SHARE, help="stop above this share")
    args = parser.parse_args(arguments)
    for name in ("num_proc", "min_pixels", "max_pixels"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name}={value} must be at least 1")
    return args


def way_to_count(args: argparse.Namespace) -> tuple[Callable[[SourceRow], int], dict]:
    """What counts a row, and the settings that the lengths depend on."""
    latent = AutoConfig.from_pretrained(args.model_id).model_type.startswith("latent_")
    tokens = {} if latent else {"latent_tokens": get_latent_method(args.latent_method).tokens}
    processor = LatentProcessor.from_pretrained(args.model_id, **tokens)
    if args.reference:
        low, high = args.min_pixels or REFERENCE_MIN_PIXELS, args.max_pixels or REFERENCE_MAX_PIXELS
        settings = {"min_pixels": low, "max_pixels": high, "tokenizer": tokenizer_hash(processor.tokenizer)}
        return ReferenceRows(processor.tokenizer, low, high), settings
    set_pixels(processor, args.min_pixels, args.max_pixels)
    lengths = SampleLengths(LatentSFTCollator(processor, args.latent_form, args.num_slots))
    return ExactRows(lengths), lengths.settings()


def describe(table: LengthTable) -> str:
    """The spread of the lengths, and the longest row: what a token cap has to hold."""
    lengths = np.array(table.lengths)
    good = lengths[lengths > 0]
    if not len(good):
        return "no row has a length"
    middle, high = np.percentile(good, [50, 99])
    most = f"most {lengths.max()} (row {lengths.argmax()})"
    return f"tokens: median {middle:.0f}, 99 % below {high:.0f}, {most}, {good.sum():,} in all"


if __name__ == "__main__":
    main()
