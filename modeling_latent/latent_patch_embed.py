"""Patch embedding of a Qwen-VL vision tower as a matrix product in float32.

The stock module is a 3-D convolution whose kernel is its stride: every patch meets the kernel once, so it is a linear
map of the flat patch. The published LVR code warns of NaN from the convolution in low precision; its own remedy, an
autocast to float32, switches itself off. Measured (`examples/measure_patch_embed.py`), the convolution is as exact in
bfloat16 as the product and gives no NaN of its own, but takes 20 to 40 times as long on a CPU.
`config.patch_embed_fp32` chooses the product.
"""

import torch
from torch import nn
from torch.nn import functional as F


class LinearPatchProjection(nn.Conv3d):
    """A convolution of one position, `(patches, channels, frames, height, width)` to `(patches, out, 1, 1, 1)`,
    computed in float32 and returned in the dtype of its weight. Names and shapes of its tensors are those of the
    convolution, so checkpoints are the same."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        device = hidden_states.device.type
        with torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            product = F.linear(hidden_states.flatten(1).float(), self.weight.flatten(1).float(), bias)
        return product.to(self.weight.dtype)[:, :, None, None, None]


def use_linear_patch_embed(visual: nn.Module) -> None:
    """Make the patch embedding of one vision tower a [`LinearPatchProjection`], in place, parameters untouched.

    Raises:
        ValueError: a patch embedding that is no convolution of patches beside each other.
    """
    projection = getattr(visual.patch_embed, "proj", None)
    fits = isinstance(projection, nn.Conv3d) and projection.stride == projection.kernel_size
    plain = fits and not any(projection.padding) and set(projection.dilation) == {1} and projection.groups == 1
    if not plain:
        raise ValueError(
            f"patch_embed_fp32=True: {type(visual.patch_embed).__name__}.proj is {projection!r}, no 3-D convolution "
            "whose kernel is its stride; leave patch_embed_fp32 out (and fusion_config, which replaces it, too)"
        )
    projection.__class__ = LinearPatchProjection


__all__ = ["LinearPatchProjection", "use_linear_patch_embed"]
