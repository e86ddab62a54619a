"""A packed layer as users and libraries treat it: gradients, compilation, pickles, other dtypes and devices."""

from __future__ import annotations

import copy
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import tiny_model

import secateur
from secateur.errors import SecateurError
from secateur.models.semi_structured import is_two_four
from secateur.packed import kernels
from secateur.packed import linear as packed_linear
from secateur.packed.layout import pack, pack_int8, unpack
from secateur.packed.linear import PackedLinear

needs_kernels = pytest.mark.skipif(kernels.level() == "none", reason="the kernels were not built, or need AVX2")


def a_layer(rows=48, columns=32, bias=True):
    torch.manual_seed(0)
    linear = torch.nn.Linear(columns, rows, bias).to(torch.bfloat16)
    linear.weight.data[torch.rand(rows, columns) < 0.5] = 0
    return linear, PackedLinear(pack(linear.weight), None if linear.bias is None else linear.bias.data)


@needs_kernels
def test_gradients_of_the_input():
    linear, packed = a_layer()
    x = torch.randn(3, 32).bfloat16()
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    packed(found).float().square().sum().backward()
    linear(expected).float().square().sum().backward()
    assert torch.allclose(found.grad, expected.grad, rtol=0.05, atol=0.05)


@needs_kernels
def test_a_layer_becomes_dense_where_no_kernel_serves_it(monkeypatch, capsys):
    monkeypatch.setattr(packed_linear, "_said", set())
    linear, packed = a_layer()
    x = torch.randn(3, 32).bfloat16()
    copied = copy.deepcopy(packed)
    assert copied.is_packed
    assert torch.equal(packed.weight, linear.weight)  # asked for by a model's code
    assert not packed.is_packed
    assert torch.equal(packed(x), linear(x))
    assert not copied.to(torch.float32).is_packed
    assert torch.allclose(copied(x.float()), linear.float()(x.float()))
    assert capsys.readouterr().err.count("unpacked") == 2


@needs_kernels
def test_threads_that_ask_for_the_weight_at_once_get_the_same(monkeypatch):
    linear, packed = a_layer(rows=512, columns=512)
    unpack, together = packed_linear.unpack, threading.Barrier(4)

    def slow(matrix):
        time.sleep(0.05)  # the others ask in the meantime
        return unpack(matrix)

    def weight():
        together.wait()
        return packed.weight

    monkeypatch.setattr(packed_linear, "unpack", slow)
    with ThreadPoolExecutor(4) as threads:
        weights = [asked.result() for asked in [threads.submit(weight) for _ in range(4)]]
    assert len({id(found) for found in weights}) == 1
    assert torch.equal(weights[0], linear.weight)


@needs_kernels
def test_a_kernel_reads_a_bias_with_strides_as_it_is():
    linear, packed = a_layer()
    x = torch.randn(3, 32).bfloat16()
    packed.bias = torch.nn.Parameter(torch.randn(96).bfloat16()[::2], requires_grad=False)
    expected = torch.nn.functional.linear(x, linear.weight, packed.bias)
    assert torch.allclose(packed(x), expected, rtol=0.02, atol=0.02)


@needs_kernels
def test_torch_compile_keeps_the_product():
    _, packed = a_layer()
    x = torch.randn(5, 32).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), packed(x))
    torch.library.opcheck(
        torch.ops.secateur.packed_linear.default,
        (x, packed.masks, packed.values, packed.offsets, packed.bias.detach(), packed.scales, 32, 48),
        test_utils=("test_schema", "test_faketensor"),
    )


@needs_kernels
def test_compiled_products_have_gradients():
    _, packed = a_layer()
    x = torch.randn(5, 32).bfloat16()
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.compile(packed, fullgraph=True, backend="aot_eager")(found).sum().backward()
    packed(expected).sum().backward()
    assert torch.equal(found.grad, expected.grad)


@needs_kernels
def test_inputs_that_no_kernel_takes_are_refused_and_leave_the_layer_packed():
    linear, packed = a_layer()
    for x in (torch.randn(3, 32), torch.randn(3, 32).half(), torch.randn(3, 32).bfloat16().to("meta")):
        with pytest.raises(SecateurError, match="takes torch.bfloat16 on the CPU, and got"):
            packed(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(torch.ones(3, 32)), linear(torch.ones(3, 32)))
    assert packed.is_packed


@needs_kernels
def test_a_bias_of_another_size_or_dtype_is_refused():
    linear, packed = a_layer()
    for bias in (torch.zeros(47).bfloat16(), torch.zeros(48)):
        with pytest.raises(SecateurError, match="the bias has the shape"):
            PackedLinear(pack(linear.weight), bias)
    packed.bias = torch.nn.Parameter(torch.zeros(47).bfloat16())
    with pytest.raises(SecateurError, match=r"the bias has the shape \(47,\)"):
        packed(torch.ones(1, 32).bfloat16())


@needs_kernels
def test_no_content_is_no_packed_layer():
    """Kernels would read where garbage points to."""
    _, packed = a_layer()
    for _ in range(20):
        layer = copy.deepcopy(packed).to_empty(device="cpu")
        assert not layer.is_packed
        assert layer(torch.ones(2, 32).bfloat16()).shape == (2, 48)
    with torch.device("meta"):
        assert packed(torch.ones(2, 32, dtype=torch.bfloat16, device="cpu")).is_cpu
        assert packed.bfloat16().is_packed


@needs_kernels
def test_tensors_without_content_go_through_the_operator():
    from torch._subclasses import FakeTensorMode

    _, packed = a_layer()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert packed(torch.ones(3, 32, dtype=torch.bfloat16)).shape == (3, 48)


@needs_kernels
def test_a_pickled_layer_is_dense_where_there_are_no_kernels(monkeypatch):
    linear, packed = a_layer()
    file = io.BytesIO()
    torch.save(packed, file)
    for level in (kernels.level(), "none"):
        monkeypatch.setattr(kernels, "level", lambda level=level: level)
        file.seek(0)
        layer = torch.load(file, weights_only=False)
        assert layer.is_packed == (level != "none")
        assert torch.equal(layer.packed.masks if layer.is_packed else layer.weight,
                           packed.packed.masks if layer.is_packed else linear.weight)  # fmt: skip


@needs_kernels
def test_int8_layers_multiply_and_have_gradients():
    torch.manual_seed(0)
    packed = pack_int8(torch.randn(48, 32).bfloat16() * (torch.rand(48, 32) < 0.5))
    layer, dense, x = PackedLinear(packed, None), unpack(packed), torch.randn(3, 32).bfloat16()
    assert torch.allclose(layer(x), x @ dense.T, rtol=0.02, atol=0.02)
    found = x.clone().requires_grad_()
    layer(found).sum().backward()
    assert torch.allclose(found.grad, torch.ones(3, 48).bfloat16() @ dense, rtol=0.02, atol=0.02)


@needs_kernels
def test_int8_layers_have_state_dicts():
    linear, _ = a_layer()
    layer = PackedLinear(pack_int8(linear.weight), None)
    state = layer.state_dict()
    again = PackedLinear(pack_int8(linear.weight * 2), None)
    again.load_state_dict(state)
    assert again.scales is not None
    assert torch.equal(again.state_dict()["weight"], state["weight"])


def test_semi_structured_tensors_need_a_gpu_and_zeros_in_groups():
    """tests/test_gpu.py makes some."""
    with pytest.raises(ValueError, match="are on an NVIDIA GPU"):
        secateur.to_semi_structured(tiny_model("llama"))
    with pytest.raises(ValueError, match="are on an NVIDIA GPU"):
        secateur.to_semi_structured(torch.nn.ReLU())


@pytest.mark.parametrize(("row", "is_so"), [([1, 0, 0, 2, 0, 0, 0, 0], True), ([0, 1, 0, 0, 3, 0, 4, 5], False)])
def test_two_of_four_are_counted_in_groups_of_a_row(row, is_so):
    """The second row has as many zeros, elsewhere."""
    assert is_two_four(torch.tensor([[1, 2, 0, 0, 0, 0, 1, 2], row])) is is_so
