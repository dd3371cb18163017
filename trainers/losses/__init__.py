"""Losses of the methods, one file each: functions of hidden states or logits at the needed rows, targets and masks.

They know no trainer and no model.
"""

from .dwal import (
    DwalLossOutput,
    DwalOptions,
    DwalRows,
    dwal_loss,
    find_latent_rows,
    fused_dwal_loss,
    mask_region_labels,
)

__all__ = [
    "DwalLossOutput",
    "DwalOptions",
    "DwalRows",
    "dwal_loss",
    "find_latent_rows",
    "fused_dwal_loss",
    "mask_region_labels",
]
