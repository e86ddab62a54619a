"""Products with packed matrices against torch and against dense kernels of the same style, from memory.

    python benchmarks/kernels.py --out benchmarks/results/kernels.json

Run it on a quiet machine; it needs gcc, AVX-512 with BF16 and VBMI2, and 4 GB. There are 40 matrices of 4096 x 4096,
more than the last-level cache holds, and every pass reads all of them: as in decoding, weights come from memory.
All ways are timed in turn, `ROUNDS` times, and the fastest pass of each counts, so ratios are from one run.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import arguments_of, write_result
from torch import Tensor

from secateur.packed import kernels
from secateur.packed.encoding import encode
from secateur.packed.layout import PackedTensor, pack, pack_int8

SIZE, ROUNDS = 4096, 5
NUMBER = 40
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 512)


def main() -> None:
    """Time every sparsity, batch and number of threads."""
    args = arguments_of(__doc__)
    dense_kernels = built()
    weight, rank = torch.randn(SIZE, SIZE).bfloat16(), torch.rand(SIZE, SIZE)
    dense = [weight.clone() for _ in range(NUMBER)]
    result: dict[str, Any] = {
        "level": kernels.level(), "size": SIZE, "matrices": NUMBER, "cache_bytes": cache_bytes(), "rows": [],
    }  # fmt: skip
    for sparsity in SPARSITIES:
        sparse = weight.masked_fill(rank < sparsity, 0)
        ours, small = pack(sparse), pack_int8(sparse)
        result.setdefault("bytes", {})[f"{sparsity:.0%}"] = {
            "memory": ours.nbytes / weight.nbytes,
            "memory, int8": small.nbytes / weight.nbytes,
            "disk, random weights": sum(map(len, encode(ours))) / weight.nbytes,
        }
        packed, packed_int8 = [copied(ours) for _ in range(NUMBER)], [copied(small) for _ in range(NUMBER)]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for batch in BATCHES if sparsity in (0.5, 0.7) else (1, 8):
                ways = ways_of(dense, packed, packed_int8, batch, threads, dense_kernels)
                row = {"sparsity": sparsity, "threads": threads, "batch": batch, "microseconds": timed(ways)}
                row["read_gigabytes_per_second"] = {
                    name: each.nbytes / row["microseconds"][name] / 1e3
                    for name, each in (("packed", ours), ("packed int8", small))
                }
                row["read_gigabytes_per_second"]["reading alone"] = (
                    words(packed[0]).nbytes / row["microseconds"]["reading alone"] / 1e3
                )
                result["rows"].append(row)
                print(row, flush=True)
                write_result(args.out, result)


def ways_of(
    dense: list[Tensor],
    packed: list[PackedTensor],
    packed_int8: list[PackedTensor],
    batch: int,
    threads: int,
    dense_kernels: ctypes.CDLL,
) -> dict[str, Callable[[], object]]:
    """The products to time, each a pass over all matrices."""
    x = torch.randn(batch, SIZE).bfloat16()
    ways: dict[str, Callable[[], object]] = {
        "torch bf16": lambda: [torch.nn.functional.linear(x, each) for each in dense],
        "packed": lambda: [product(x, each) for each in packed],
        "packed int8": lambda: [product(x, each) for each in packed_int8],
        "reading alone": lambda: [words(each).sum() for each in packed],
    }
    if batch == 1 and threads == 1:
        y, inputs = torch.empty(SIZE), torch.ones(SIZE, dtype=torch.int16)
        whole, half = [each.data_ptr() for each in dense], [each.data_ptr() for each in dense]
        ways["dense bf16, same style"] = lambda: [
            dense_kernels.dense_bf16(at, SIZE, SIZE, x.data_ptr(), y.data_ptr()) for at in whole
        ]
        ways["dense int8, same style"] = lambda: [
            dense_kernels.dense_int8(at, SIZE, SIZE, inputs.data_ptr(), y.data_ptr()) for at in half
        ]
    return ways


def words(packed: PackedTensor) -> Tensor:
    """The values as 64-bit numbers, to read them."""
    return packed.values[: len(packed.values) // 4 * 4].view(torch.int64)


def product(x: Tensor, packed: PackedTensor) -> Tensor:
    """One product."""
    return kernels.multiply(x, packed.masks, packed.values, OFFSETS[packed.kept], SIZE, SIZE, None, packed.scales)


OFFSETS: dict[int, Tensor] = {}


def copied(packed: PackedTensor) -> PackedTensor:
    """The same at another place in memory."""
    OFFSETS.setdefault(packed.kept, packed.offsets())
    return PackedTensor(
        packed.shape, packed.dtype, False, packed.masks.clone(), packed.values.clone(), packed.kept, packed.scales
    )


def timed(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds of one product each way: the fastest of several passes, taken in turn."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], (time.perf_counter() - start) / NUMBER * 1e6)
    return best


def cache_bytes() -> int:
    """Size of the last-level cache that the kernel reports."""
    text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    return int(text.rstrip("KM")) * (1 << 20 if text.endswith("M") else 1 << 10)


def built() -> ctypes.CDLL:
    """The dense kernels, compiled."""
    library = Path(tempfile.mkdtemp()) / "dense_kernels.so"
    source = Path(__file__).with_name("dense_kernels.c")
    subprocess.run(["gcc", "-O3", "-fPIC", "-shared", str(source), "-o", str(library)], check=True)
    found = ctypes.CDLL(str(library))
    for function in (found.dense_bf16, found.dense_int8):
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
        function.restype = None
    return found


if __name__ == "__main__":
    main()
