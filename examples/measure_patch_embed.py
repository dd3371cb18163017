"""Measure the patch embedding of Qwen-VL: the stock 3-D convolution against the matrix product in float32.

    python examples/measure_patch_embed.py                          # bfloat16, 2,048 patches, the shapes of Qwen2.5-VL
    python examples/measure_patch_embed.py --dtype float16 --device cuda

For each size of the pixels it says the error of both against a float64 product (relative, Frobenius norm) and how many
outputs are not finite; then the time of a call. The pixels are rounded to the dtype first, as the backbone does.
`config.patch_embed_fp32` chooses between the two.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from modeling_latent.latent_patch_embed import LinearPatchProjection

SIZES = (1.0, 1e3, 6e4, 1e10, 1e30, 1e36)


def projections(dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """The two modules, with the same weight: `(patches, 3, 2, 14, 14)` to `(patches, 1280, 1, 1, 1)`."""
    torch.manual_seed(0)
    shape = {"kernel_size": (2, 14, 14), "stride": (2, 14, 14), "bias": False, "dtype": dtype, "device": device}
    stock, linear = nn.Conv3d(3, 1280, **shape), LinearPatchProjection(3, 1280, **shape)
    nn.init.normal_(stock.weight, std=0.02)
    linear.weight = stock.weight
    return {"convolution": stock, "product": linear}


def error(output: torch.Tensor, pixels: torch.Tensor, weight: torch.Tensor) -> tuple[float, int]:
    """Relative error of the finite outputs against a float64 product, and the number of those that are not finite."""
    exact = pixels.flatten(1).double() @ weight.flatten(1).double().T
    output = output.flatten(1).double()
    finite = output.isfinite()
    difference = torch.where(finite, output - exact, 0.0)
    return (difference.norm() / torch.where(finite, exact, 0.0).norm()).item(), int((~finite).sum())


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """The shortest time of a call."""
    times = []
    for _ in range(repeats + 1):  # the first one also compiles and allocates
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--patches", type=int, default=2048, help="rows of a call")
    parser.add_argument("--repeats", type=int, default=3, help="the shortest time of so many calls counts")
    args = parser.parse_args(arguments)
    if args.patches < 1 or args.repeats < 1:
        parser.error(f"--patches {args.patches} and --repeats {args.repeats} must be at least 1")
    dtype, modules = getattr(torch, args.dtype), projections(getattr(torch, args.dtype), args.device)
    print(f"torch {torch.__version__}, {args.dtype}, {args.device}, {args.patches} patches of 1,176 values")
    print("pixels of size    " + "".join(f"{name + ': error, not finite':>32}" for name in modules))
    for size in SIZES:
        pixels = (torch.randn(args.patches, 3, 2, 14, 14, device=args.device) * size).to(dtype)
        if not pixels.isfinite().all():
            print(f"{size:<18g}  the pixels themselves are not finite in {args.dtype}")
            continue
        found = [error(module(pixels), pixels, module.weight) for module in modules.values()]
        print(f"{size:<18g}" + "".join(f"{relative:>20.3e}{number:>12,}" for relative, number in found))
    pixels = torch.randn(args.patches, 3, 2, 14, 14, device=args.device).to(dtype)
    times = {
        name: seconds(lambda module=module: module(pixels), args.device, args.repeats)
        for name, module in modules.items()
    }
    outputs = [module(pixels) for module in modules.values()]
    print(f"outputs that differ between the two: {(outputs[0] != outputs[1]).float().mean().item():.3%}")
    for name, value in times.items():
        print(f"{name:<12} {value * 1e3:>10.2f} ms a call")
    print(f"product is {times['convolution'] / times['product']:.1f} times as fast")


if __name__ == "__main__":
    main()
