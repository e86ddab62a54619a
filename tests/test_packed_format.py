"""The packed format: exact round trips, a second reader, kernels against float64, damage that is found."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import packed_reader
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import SecateurError
from secateur.packed import kernels, layout
from secateur.packed.encoding import HEADER, MAGIC, decode, encode, read_header, sealed_header
from secateur.packed.files import Entry, write_weights
from secateur.packed.layout import PackedTensor, check, is_worth_packing, pack, pack_int8, unpack
from secateur.packed.mapped import drop_pages

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 1), (1, 7), (17, 3), (16, 2), (33, 65), (3, 20, 7), (2, 16, 32), (64, 48))
LEVELS = [name for name in kernels.LEVELS[1:] if kernels.LEVELS.index(name) <= kernels.LEVELS.index(kernels.level())]
needs_kernels = pytest.mark.skipif(not LEVELS, reason="the kernels were not built, or this CPU has no AVX2")


def sparse(shape, sparsity, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    tensor[torch.rand(shape, generator=generator) < sparsity] = 0
    return tensor


def same_bits(one, other):
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def bits(tensor):
    return tensor.contiguous().view(layout.BITS[tensor.dtype])


def joined(pieces):
    return torch.frombuffer(bytearray(b"".join(map(bytes, pieces))), dtype=torch.uint8)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.sampled_from((0.0, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)),
    st.booleans(), st.sampled_from(("zstd", "none")), st.integers(0, 99),
)  # fmt: skip
def test_a_round_trip_keeps_every_bit(dtype, shape, sparsity, transposed, compression, seed):
    tensor = sparse(shape, sparsity, dtype, seed)
    encoded = joined(encode(pack(tensor, transposed), compression))
    assert len(encoded) % 64 == 0
    decoded = decode(encoded)
    assert decoded.kept == int((bits(tensor) != 0).sum())
    assert same_bits(unpack(decoded), tensor)
    again = packed_reader.read_tensor(encoded.numpy().tobytes())
    assert np.array_equal(again.astype(np.int64), bits(tensor).numpy().view(again.dtype).astype(np.int64))


def test_odd_values_keep_their_bits():
    tensor = torch.tensor([[0.0, -0.0, float("nan"), float("inf")], [-float("inf"), 1e-40, 0.0, 0.0]])
    for dtype in DTYPES:
        assert same_bits(unpack(pack(tensor.to(dtype))), tensor.to(dtype))
    assert pack(tensor).kept == 5  # -0.0 is kept: it is not all zero bits


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
def test_kernels_unpack_as_numpy_does(monkeypatch, level):
    monkeypatch.setattr(kernels, "level", lambda: level)
    for shape in SHAPES:
        for transposed in (False, True):
            packed = pack(sparse(shape, 0.5), transposed)
            by_kernel, by_numpy = layout._unpack_by_kernel(packed), layout._unpack_by_numpy(packed)
            assert torch.equal(by_kernel, by_numpy), (shape, transposed)


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_products_agree_with_float64(monkeypatch, level, threads):
    """Within the rounding of the sums to bfloat16, and of the sums themselves."""
    monkeypatch.setattr(kernels, "level", lambda: level)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for rows, columns in ((1, 1), (17, 3), (16, 2), (33, 65), (100, 130), (96, 256)):
        for batch in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 33, 48, 64, 65, 80):
            W = sparse((rows, columns), 0.5, seed=batch)
            x, bias = sparse((batch, columns), 0, seed=1), sparse((1, rows), 0, seed=2)[0]
            packed = pack(W)
            for added in (None, bias):
                y = kernels.multiply(x, packed.masks, packed.values, packed.offsets(), rows, packed.columns, added)
                exact = x.double() @ W.double().T + (0 if added is None else added.double())
                sums = x.double().abs() @ W.double().abs().T + bias.double().abs()
                error = (y.double() - exact).abs()
                assert (error <= exact.abs() * 2**-8 + sums * 2**-16).all(), (rows, columns, batch)


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threads", [1, 3])
def test_products_of_int8_values_agree_with_float64(monkeypatch, level, threads):
    """Within what rounding x to 16 bits changes, and the rounding of the sums to bfloat16."""
    monkeypatch.setattr(kernels, "level", lambda: level)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for rows, columns in ((1, 1), (17, 3), (33, 65), (100, 130), (32, 2304)):
        for batch in (1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64, 65):
            x, bias = sparse((batch, columns), 0, seed=1), sparse((1, rows), 0, seed=2)[0]
            packed = pack_int8(sparse((rows, columns), 0.5, seed=batch))
            W = layout._unpack_by_numpy(replace(packed, dtype=torch.float32))[0].double()
            y = kernels.multiply(
                x, packed.masks, packed.values, packed.offsets(), rows, packed.columns, bias, packed.scales
            )
            exact = x.double() @ W.T + bias.double()
            of_x = x.double().abs().amax(1, keepdim=True) * W.abs().sum(1) / 65534
            of_sums = (x.double().abs() @ W.abs().T + bias.double().abs()) * 2**-16
            # At larger batches W is rounded to bfloat16.
            of_weights = of_sums * 2**8 if batch > kernels.MAX_BATCH[level] else 0
            assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + of_x + of_sums + of_weights + 1e-30).all()


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("make", [pack, pack_int8])
def test_large_batches_take_several_tiles(monkeypatch, level, make):
    monkeypatch.setattr(kernels, "level", lambda: level)
    monkeypatch.setattr(kernels, "TILE_BYTES", 1)  # 16 rows
    monkeypatch.setitem(kernels.MAX_BATCH, level, 1)
    packed, x, bias = make(sparse((100, 130), 0.5)), sparse((9, 130), 0, seed=1), sparse((1, 100), 0, seed=2)[0]
    y = kernels.multiply(x, packed.masks, packed.values, packed.offsets(), 100, 130, bias, packed.scales)
    expected = torch.nn.functional.linear(x.float(), unpack(packed).float(), bias.float())
    assert torch.allclose(y.float(), expected, rtol=0.02, atol=0.02)


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
def test_int8_sums_do_not_overflow(monkeypatch, level):
    monkeypatch.setattr(kernels, "level", lambda: level)
    W, x = torch.ones(16, 8192).bfloat16(), torch.ones(8, 8192).bfloat16()
    packed = pack_int8(W)
    for batch in (1, 2, 4, 8):
        y = kernels.multiply(
            x[:batch], packed.masks, packed.values, packed.offsets(), 16, packed.columns, None, packed.scales
        )
        assert (y == 8192).all()
    x[1, 3] = float("nan")
    x[0, 3] = float("inf")
    y = kernels.multiply(x[:4], packed.masks, packed.values, packed.offsets(), 16, packed.columns, None, packed.scales)
    assert not y[:2].isfinite().any()
    assert (y[2:] == 8192).all()
    y = kernels.multiply(
        x[2:3] * 0, packed.masks, packed.values, packed.offsets(), 16, packed.columns, None, packed.scales
    )
    assert (y == 0).all()


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("outlier", [1.0, 100.0, 1e4, 1e8])
def test_an_outlier_leaves_the_other_inputs_their_digits(monkeypatch, level, outlier):
    """Massive activations of some tokens are thousands of times the others (arXiv 2402.17762)."""
    monkeypatch.setattr(kernels, "level", lambda: level)
    packed = pack_int8(sparse((256, 2048), 0.5))
    W = layout._unpack_by_numpy(replace(packed, dtype=torch.float32))[0].double()
    x = sparse((3, 2048), 0, seed=1) * 0.1
    x[0, 7] = x[2, 9] = outlier
    y = kernels.multiply(x, packed.masks, packed.values, packed.offsets(), 256, packed.columns, None, packed.scales)
    exact = x.double() @ W.T
    others = x.double().clone()
    others[0, 7] = others[2, 9] = 0
    size = (others @ W.T).square().mean(1).sqrt()
    for row, column in ((0, 7), (1, 0), (2, 9)):
        spared = W[:, column] == 0  # outputs that the outlier does not reach
        assert ((y.double() - exact)[row, spared].square().mean().sqrt() <= 0.004 * size[row]).all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.sampled_from((0.0, 0.5, 1.0)), st.booleans(),
       st.sampled_from(("zstd", "none")))  # fmt: skip
def test_int8_values_are_near_and_are_read_twice_alike(dtype, shape, sparsity, transposed, compression):
    tensor = sparse(shape, sparsity, dtype)
    packed = pack_int8(tensor, transposed)
    encoded = joined(encode(packed, compression))
    decoded = decode(encoded)
    dense = unpack(decoded)
    assert torch.equal(decoded.scales, packed.scales)
    assert ((dense != 0) <= (tensor != 0)).all()
    steps = packed.scales.view(*shape[:-2], packed.rows, 1)
    steps = steps.mT if transposed else steps
    largest = tensor.float().abs().amax(-2 if transposed else -1, keepdim=True)
    error = (dense.float() - tensor.float()).abs()
    in_dtype = 0 if dtype == torch.float32 else torch.finfo(dtype).eps * largest  # of a whole number times the scale
    assert (error <= 0.5001 * steps + in_dtype).all()
    again = packed_reader.read_tensor(encoded.numpy().tobytes())
    assert np.allclose(again, (decoded_exactly(packed)).numpy(), rtol=1e-6)


def decoded_exactly(packed):
    return unpack(replace(packed, dtype=torch.float32))


@needs_kernels
def test_inputs_of_another_width_are_refused():
    packed = pack(sparse((48, 32), 0.5))
    for width in (16, 31, 33, 64, 4096):
        with pytest.raises(SecateurError, match=f"have {width} columns, and the packed matrix has 32"):
            kernels.multiply(torch.ones(2, width).bfloat16(), packed.masks, packed.values, packed.offsets(), 48, 32)


@needs_kernels
def test_a_product_reads_nothing_but_its_own_input():
    """Inputs that lie before and after, and are not finite, change nothing, also where columns are padded."""
    for columns in (3, 5, 30, 34, 64):
        W = sparse((20, columns), 0.5)
        packed = pack(W)
        around = torch.full((12 * columns + 64,), float("nan"), dtype=torch.bfloat16)
        for batch in (1, 4):
            inputs = around[32 : 32 + batch * columns].view(batch, columns)
            inputs.copy_(sparse((batch, columns), 0))
            y = kernels.multiply(inputs, packed.masks, packed.values, packed.offsets(), 20, packed.columns)
            assert y.isfinite().all()
            around.fill_(float("nan"))


def test_the_files_are_ordinary_safetensors(tmp_path):
    from safetensors.torch import load_file

    tensors = {
        "a": sparse((33, 65), 0.5),
        "b": sparse((3, 5), 0, torch.float32),
        "c": torch.arange(7),
        "d": torch.ones(()),
    }
    entries = [
        Entry(
            name,
            each.dtype,
            each.ndim,
            name == "a",
            each.nbytes,
            lambda each=each, name=name: pack(each) if name == "a" else each,
        )
        for name, each in tensors.items()
    ]
    for compression in ("zstd", "none"):
        path = tmp_path / f"{compression}.safetensors"
        write_weights(path, entries, compression)
        loaded = load_file(path)
        assert same_bits(unpack(decode(loaded["a"])), tensors["a"])
        assert all(torch.equal(loaded[name], tensors[name]) for name in "bcd")
        (header,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert (8 + header) % 64 == 0
        again = packed_reader.read_file(path)
        assert np.array_equal(again["a"].view(np.int16), tensors["a"].view(torch.int16).numpy())
        assert again["b"].tobytes() == tensors["b"].numpy().tobytes()


def test_sizes_at_50_and_70_percent():
    for sparsity, most in ((0.5, 0.565), (0.7, 0.365)):
        W = torch.randn(1024, 1024).bfloat16()
        W.view(-1)[torch.randperm(W.numel())[: int(W.numel() * sparsity)]] = 0
        packed = pack(W)
        assert packed.nbytes <= most * W.nbytes
        assert sum(map(len, encode(packed))) < 0.75 * packed.nbytes
    assert not is_worth_packing(sparse((64, 64), 0.1))
    assert is_worth_packing(sparse((64, 64), 0.3))
    assert not is_worth_packing(torch.zeros(64, 64, dtype=torch.int64))


def with_fields(encoded, **changes):
    """The bytes with other fields in the header, and a checksum that fits."""
    names = [
        "magic",
        "version",
        "dtype",
        "values",
        "coding",
        "transposed",
        "ndim",
        "zero",
        "d0",
        "d1",
        "d2",
        "kept",
        "stored",
        "crc32",
        "own_crc32",
    ]
    content = encoded.numpy().tobytes()
    fields = dict(zip(names, HEADER.unpack(content[: HEADER.size]), strict=True)) | changes
    *others, _ = fields.values()
    header = HEADER.pack(*fields.values()) if "own_crc32" in changes else sealed_header(others)
    return torch.frombuffer(bytearray(header + content[HEADER.size :]), dtype=torch.uint8)


@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize(
    "changes",
    [{"version": 2}, {"magic": b"SOMEBODY"}, {"dtype": 9}, {"values": 3}, {"coding": 7}, {"transposed": 2}, {"ndim": 4},
     {"ndim": 1}, {"zero": 1}, {"own_crc32": 1}, {"d0": 0}, {"d0": 2**63}, {"d0": 48}, {"d1": 10**6}, {"d2": 3},
     {"kept": 0}, {"kept": 2**60}, {"stored": 2**63}, {"stored": 0}, {"crc32": 1}],
    ids=str,
)  # fmt: skip
def test_damaged_headers_are_refused(compression, changes):
    encoded = joined(encode(pack(sparse((64, 64), 0.5)), compression))
    with pytest.raises(SecateurError):
        decode(with_fields(encoded, **changes))


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_no_flipped_bit_of_a_header_is_taken(compression):
    """A square matrix with another orientation would look as good."""
    encoded = joined(encode(pack(sparse((64, 64), 0.5)), compression))
    for bit in range(8 * HEADER.size):
        flipped = encoded.clone()
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SecateurError):
            decode(flipped)


def test_wrong_contents_under_a_right_checksum_are_refused():
    packed = pack(torch.ones(20, 9, dtype=torch.bfloat16))  # the second panel has 4 rows, the last block 1 column

    def refused(panel, block, mask, match):
        masks = packed.masks.clone()
        masks[panel, block] = mask
        wrong = PackedTensor(packed.shape, packed.dtype, False, masks, packed.values, packed.kept)
        with pytest.raises(SecateurError, match=match):
            decode(joined(encode(wrong, "none")))

    assert packed.masks[1].tolist() == [0xFF, 0xFF, 0xFF, 0xFF, 0x55]
    refused(1, 0, 0x7F, "bits, but it holds")
    refused(0, 4, -1, "bits, but it holds")
    refused(1, 0, 0x7F | 1 << 30, "below the last row")
    refused(1, 4, 0x56, "after the last column")


def test_a_small_file_takes_little_memory():
    """A header can't claim more than twice the coded bytes."""
    huge = sealed_header((MAGIC, 1, 1, 1, 1, 0, 2, 0, 2**20, 2**20, 0, 0, 64, 0))
    with pytest.raises(SecateurError, match="can't hold the shape"):
        read_header(huge, 128)
    empty = torch.zeros(512, 512, dtype=torch.bfloat16)
    encoded = joined(encode(pack(empty)))
    assert len(encoded) >= 512 * 512 // 8  # kept plain, since zstd would make almost nothing of it
    assert same_bits(unpack(decode(encoded)), empty)


def test_check_accepts_what_pack_makes():
    for shape in SHAPES:
        for transposed in (False, True):
            check(pack(sparse(shape, 0.5), transposed))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc")
def test_decoded_bytes_leave_memory_and_the_rest_of_their_file_stays(tmp_path):
    """Of a file of 8 MB, the middle 4 MB were decoded: they are dropped, and still there when they are read again."""
    path, numbers = tmp_path / "file", torch.arange(1 << 20)
    path.write_bytes(numbers.numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=1 << 20, dtype=torch.int64)
    middle = mapped[(1 << 18) + 3 : 3 << 18]

    def resident() -> int:
        areas = Path("/proc/self/smaps").read_text().split(str(path))[1]
        return int(re.search(r"Rss:\s+(\d+) kB", areas)[1])

    assert torch.equal(mapped, numbers)
    before = resident()
    drop_pages(mapped[: 1 << 17])
    assert resident() > before / 2, "the rest stays"
    assert torch.equal(mapped, numbers)
    before = resident()
    drop_pages(middle)
    # The system may take pages of a file back at any time.
    assert before - resident() >= 4096 - 64 or resident() <= 4096 + 8
    assert torch.equal(mapped, numbers)
    own = numbers.clone()
    drop_pages(own)  # not part of a file, so it keeps its content
    assert torch.equal(own, numbers)


def test_a_lower_level_of_kernels_can_be_asked_for(monkeypatch):
    best = kernels.level.__wrapped__()
    for name in kernels.LEVELS:
        monkeypatch.setenv("SECATEUR_KERNELS", name)
        assert kernels.level.__wrapped__() == min(best, name, key=kernels.LEVELS.index)
    monkeypatch.setenv("SECATEUR_KERNELS", "sse")
    with pytest.raises(SecateurError, match="must be one of"):
        kernels.level.__wrapped__()
