"""The GPU kernel of the packed format, in Triton's interpreter or on a GPU, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the extra gpu is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
from secateur.errors import SecateurError  # noqa: E402
from secateur.packed import triton_kernel  # noqa: E402
from secateur.packed.layout import pack, pack_int8, unpack  # noqa: E402


def moved(packed):
    scales = None if packed.scales is None else packed.scales.to(DEVICE)
    return replace(packed, masks=packed.masks.to(DEVICE), values=packed.values.to(DEVICE), scales=scales)


@pytest.mark.parametrize("values", ["same", "int8"])
@pytest.mark.parametrize("shape", [(1, 1), (17, 3), (33, 65), (48, 1100)], ids=str)
def test_products_agree_with_float64(shape, values):
    torch.manual_seed(0)
    W = torch.randn(shape).bfloat16()
    W[torch.rand(shape) < 0.5] = 0
    packed = pack_int8(W) if values == "int8" else pack(W)
    on_device = moved(packed)
    offsets = triton_kernel.split_offsets(on_device)
    exact_weight = unpack(packed).double()
    for batch in (1, 3, 8):
        x, bias = torch.randn(batch, shape[1]).bfloat16(), torch.randn(shape[0]).bfloat16()
        y = triton_kernel.multiply(x.to(DEVICE), on_device, offsets, bias.to(DEVICE)).cpu()
        exact = x.double() @ exact_weight.T + bias.double()
        sums = x.double().abs() @ exact_weight.abs().T + bias.double().abs()
        of_rounded_weights = sums * 2**-8 if values == "int8" else 0
        assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + sums * 2**-16 + of_rounded_weights).all()


def test_larger_batches_are_refused():
    packed = moved(pack(torch.ones(16, 16).bfloat16()))
    with pytest.raises(SecateurError, match="1 to 8 inputs"):
        triton_kernel.multiply(torch.ones(9, 16).bfloat16().to(DEVICE), packed, triton_kernel.split_offsets(packed))
