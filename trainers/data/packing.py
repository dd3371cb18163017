"""Packing plans: which samples share a batch, or a row. This module is the front door of the two kinds.

* `plan_buckets` is what "Latent Visual Reasoning" (arXiv 2509.24251, card section 5.4) calls packing: it chooses
  samples of bounded total length, which the collator then pads to the longest again. Equal to the published streams.
* `pack_sequences` plans real packing: short samples are joined into one row, long ones stay alone.

`BucketBatches` and `SequenceBatches` run them as batch samplers of `torch.utils.data.DataLoader`, with the interface
of those in `dynamic_batching.py`.
"""

from .packing_buckets import (
    Bucket,
    BucketBatches,
    BucketOptions,
    Segment,
    can_be_cut,
    cut_example,
    plan_buckets,
)
from .packing_rows import (
    JoinedRows,
    SequenceBatches,
    SequencePlan,
    pack_sequences,
    padding_share,
    split_rows,
    unpack_rows,
)

__all__ = [
    "Bucket",
    "BucketBatches",
    "BucketOptions",
    "JoinedRows",
    "Segment",
    "SequenceBatches",
    "SequencePlan",
    "can_be_cut",
    "cut_example",
    "pack_sequences",
    "padding_share",
    "plan_buckets",
    "split_rows",
    "unpack_rows",
]
