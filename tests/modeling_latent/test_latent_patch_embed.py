"""The patch embedding as a matrix product: equal to the stock convolution, exact in low precision, saved by name."""

from pathlib import Path

import pytest
import torch
from torch import nn

from examples import measure_patch_embed
from modeling_latent import load_latent_model
from modeling_latent.latent_patch_embed import LinearPatchProjection, use_linear_patch_embed
from tests.latent import tiny_latent_model
from tests.tiny import FAMILIES, tiny_inputs, tiny_processor

KERNEL = (2, 14, 14)


def projection(dtype: torch.dtype, bias: bool = False, std: float = 0.02) -> LinearPatchProjection:
    module = LinearPatchProjection(3, 32, KERNEL, stride=KERNEL, bias=bias, dtype=dtype)
    with torch.no_grad():
        module.weight.normal_(std=std)
    return module


def exact(module: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    product = pixels.flatten(1).double() @ module.weight.flatten(1).double().T
    return product if module.bias is None else product + module.bias.double()


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_convolution(family: str) -> None:
    """Same names, same shapes, same logits and gradients as the stock module, in float32."""
    stock, ours = (tiny_latent_model(0, family=family, patch_embed_fp32=value) for value in (False, True))
    assert type(ours.model.visual.patch_embed.proj) is LinearPatchProjection
    assert type(stock.model.visual.patch_embed.proj) is nn.Conv3d, "the stock class was changed"
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}
    grads = []
    for model in (stock, ours):
        logits = model(**tiny_inputs(family=family)).logits
        logits.square().mean().backward()
        grads.append((logits.detach(), model.model.visual.patch_embed.proj.weight.grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * one.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_low_precision_is_the_rounded_exact_product(dtype: torch.dtype, bias: bool) -> None:
    module, pixels = projection(dtype, bias), torch.randn(50, 3, *KERNEL)
    output = module(pixels)
    assert output.dtype == dtype and output.shape == (50, 32, 1, 1, 1)
    expected = exact(module, pixels)
    relative = (output.flatten(1).double() - expected).norm() / expected.norm()
    assert relative < torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype=torch.bfloat16):  # of a mixed-precision trainer: still float32 inside
        assert torch.equal(module(pixels), output)


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 3.4e38), (torch.float16, 1e5)])
def test_finite_where_the_convolution_is_not(dtype: torch.dtype, size: float) -> None:
    """Pixels that are finite in float32 and overflow in the dtype: the convolution gives NaN, the product does not."""
    module = projection(dtype, std=1e-4)
    pixels = torch.randn(20, 3, *KERNEL).sign() * size
    stock = nn.functional.conv3d(pixels.to(dtype), module.weight, stride=KERNEL)
    assert not stock.isfinite().any()
    output, expected = module(pixels).flatten(1).double(), exact(module, pixels)
    assert output.isfinite().all() and (output - expected).norm() / expected.norm() < 1e-2


def test_the_choice_is_saved(tmp_path: Path) -> None:
    tiny_latent_model(0, patch_embed_fp32=True).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    loaded, _ = load_latent_model(tmp_path)
    assert loaded.config.patch_embed_fp32 and type(loaded.model.visual.patch_embed.proj) is LinearPatchProjection
    assert (tmp_path / "latent_patch_embed.py").is_file(), "the code does not travel with the model"


def test_another_convolution_is_refused() -> None:
    visual = tiny_latent_model(0).model.visual
    visual.patch_embed.proj = nn.Conv3d(3, 32, KERNEL, stride=(1, 14, 14))
    with pytest.raises(ValueError, match=r"patch_embed_fp32=True: .*proj is Conv3d.*leave patch_embed_fp32 out"):
        use_linear_patch_embed(visual)


def test_the_measurement(capsys: pytest.CaptureFixture) -> None:
    measure_patch_embed.main(["--patches", "2", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    sizes = [line.split() for line in lines[2:8]]
    assert [float(line[0]) for line in sizes] == list(measure_patch_embed.SIZES)
    for _, conv, conv_not_finite, product, product_not_finite in sizes:
        assert 1e-4 < float(conv) < 1e-2 and 1e-4 < float(product) < 1e-2
        assert (conv_not_finite, product_not_finite) == ("0", "0")
    assert lines[-1].startswith("product is ")
