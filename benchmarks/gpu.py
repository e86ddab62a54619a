"""Everything that waits for a GPU, on one card in under 25 minutes: tests, products, solvers, memory, a model of 7B.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json

Steps that fail are recorded, and the others go on. The JSON is written after each step. `--only STEP ...` runs some;
the JSON keeps the others. `--small` tries the script itself without a GPU: tiny sizes, in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from common import arguments_of, write_result

HERE = Path(__file__).parent
TESTS = ("tests/test_gpu.py", "tests/test_devices.py", "tests/test_triton_kernel.py")
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
COPY_BYTES = 1 << 30


def main() -> None:
    """Run the steps, and write one JSON."""
    args = arguments_of(__doc__, only=list(STEPS), small=False)
    if not torch.cuda.is_available() and not args.small:
        sys.exit("there is no GPU here; --small tries the script on a CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = json.loads(args.out.read_text())["steps"] if args.out.exists() else {}
    for name in args.only:
        started = time.perf_counter()
        try:
            results[name] = STEPS[name](device, args.small)
        except (RuntimeError, subprocess.SubprocessError, OSError) as error:
            results[name] = {"failed": str(error)[-2000:]}
        results[name]["seconds"] = time.perf_counter() - started
        print(name, json.dumps(results[name])[:2000], flush=True)
        write_result(args.out, {"steps": results}, device)


def tests(device: str, small: bool) -> dict[str, Any]:  # noqa: ARG001
    """All tests of GPUs."""
    files = TESTS[-1:] if small else TESTS
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *files], capture_output=True, text=True, check=False)
    return {"exit_code": done.returncode, "end": done.stdout.splitlines()[-15:]}


def products(device: str, small: bool) -> dict[str, Any]:
    """Packed products by Triton against torch's dense bf16, and what reading the bytes alone would take."""
    from secateur.packed import triton_kernel
    from secateur.packed.layout import pack, pack_int8

    rows, gigabytes = [], bandwidth(device, small)
    for shape in ((64, 96),) if small else SHAPES:
        weight = torch.randn(shape).bfloat16()
        rank = torch.rand(shape)
        for sparsity in (0.5, 0.7):
            sparse = weight.masked_fill(rank < sparsity, 0)
            for values, make in (("bf16", pack), ("int8", pack_int8)):
                packed = on(make(sparse), device)
                offsets, dense = triton_kernel.split_offsets(packed), sparse.to(device)
                for batch in (1, 2, 4, 8):
                    x = torch.randn(batch, shape[1], device=device).bfloat16()
                    ours = microseconds(lambda x=x, p=packed, o=offsets: triton_kernel.multiply(x, p, o), device)
                    theirs = microseconds(lambda x=x, d=dense: torch.nn.functional.linear(x, d), device)
                    bound = packed.nbytes / gigabytes / 1e3
                    rows.append(
                        {"shape": shape, "sparsity": sparsity, "values": values, "batch": batch, "packed": ours,
                         "torch bf16": theirs, "reading alone": bound}
                    )  # fmt: skip
    return {"gigabytes_per_second": gigabytes, "microseconds": rows}


def on(packed: Any, device: str) -> Any:
    """The packed matrix on a device."""
    scales = None if packed.scales is None else packed.scales.to(device)
    return replace(packed, masks=packed.masks.to(device), values=packed.values.to(device), scales=scales)


def prefill_2_4(device: str, small: bool) -> dict[str, Any]:
    """2:4 weights by `secateur.to_semi_structured` against dense bf16, for prompts."""
    if small:
        return {"rows": []}
    from secateur import solve, to_semi_structured

    found = []
    for shape in SHAPES:
        weight = torch.randn(shape, device=device)
        mask = solve(weight, torch.eye(shape[1], device=device), "2:4", solver="magnitude").weight != 0
        dense = (weight * mask).bfloat16()
        layer = torch.nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=torch.bfloat16)
        layer.weight.data = dense.clone()
        to_semi_structured(layer)
        for tokens in (64, 512, 2048):
            x = torch.randn(tokens, shape[1], device=device).bfloat16()
            times = {
                "2:4": microseconds(lambda x=x, layer=layer: layer(x), device),
                "torch bf16": microseconds(lambda x=x, d=dense: torch.nn.functional.linear(x, d), device),
            }
            found.append({"shape": shape, "tokens": tokens, "microseconds": times})
    return {"rows": found}


def out_of_memory(device: str, small: bool) -> dict[str, Any]:
    """A solver with most of the card's memory taken: it works in smaller chunks, to the same weights."""
    if small:
        return {}
    from secateur import solve

    size = 4096
    W, X = torch.randn(size, size, device=device), torch.randn(2 * size, size, device=device)
    H = X.T @ X / len(X)
    free = solve(W, H, "50%", solver="mrp").weight
    torch.cuda.empty_cache()
    left = int(6 * W.nbytes)
    taken = torch.empty(torch.cuda.mem_get_info()[0] - left, dtype=torch.uint8, device=device)
    tight = solve(W, H, "50%", solver="mrp").weight
    del taken
    same = float(((free == 0) == (tight == 0)).float().mean())
    return {"bytes_left": left, "share_of_equal_masks": same, "largest_difference": float((free - tight).abs().max())}


def script(name: str, *arguments: str) -> Callable[[str, bool], dict[str, Any]]:
    """A step that runs another benchmark on the device."""

    def run(device: str, small: bool) -> dict[str, Any]:
        if small:
            return {}
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out.json"
            command = [sys.executable, str(HERE / name), "--device", device, "--out", str(out), *arguments]
            subprocess.run(command, check=True, timeout=900)
            return json.loads(out.read_text())

    return run


def microseconds(call: Callable[[], object], device: str) -> float:
    """Time of a call: the mean of many, after a warm-up, as the device counts it."""
    if device == "cpu":
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e6
    for _ in range(5):
        call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(50):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 50 * 1e3


def bandwidth(device: str, small: bool) -> float:
    """Gigabytes a second that the device reads, from a sum over more than its cache holds."""
    data = torch.ones((1 << 20 if small else COPY_BYTES) // 4, device=device)
    return data.nbytes / microseconds(lambda: data.sum(), device) / 1e3


STEPS: dict[str, Callable[[str, bool], dict[str, Any]]] = {
    "tests": tests,
    "products": products,
    "2:4 prefill": prefill_2_4,
    "out of memory": out_of_memory,
    "solvers": script("solvers.py", "--sizes", "--repeats", "1"),
    "llama-2-7b": script("memory.py", "--cases", "llama-7b"),
}


if __name__ == "__main__":
    main()
