"""Builds the GPU of `simulated_gpu.cpp` and runs tests/test_gpu.py on it: CPU kernels behind CUDA's dispatch key.

    python tests/simulated_gpu/simulated_gpu.py

An operation on tensors of two devices fails there as on a real GPU, and memory has a limit. It is built against private
headers of torch, so it is an optional check. As a plug-in of pytest, this file makes torch take the library for a GPU.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

LIBRARY = "PRETENDED_GPU"
FREE = 10**6  # bytes that the GPU says are free


def build(folder: Path) -> Path:
    """Compile the library; half a minute."""
    source, library = Path(__file__).with_suffix(".cpp"), folder / "libsimulated_gpu.so"
    installed = Path(torch.__file__).parent
    include = installed / "include"
    headers = ["-I", str(include), "-I", str(include / "torch/csrc/api/include")]
    libraries = ["-L", str(installed / "lib"), "-lc10", "-ltorch_cpu"]
    options = ["-shared", "-fPIC", "-std=c++20", "-O1", "-w"]
    command = [str(compiler()), *options, *headers, str(source), "-o", str(library), *libraries]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def compiler() -> str | None:
    """A C++ compiler, where this is a Linux that has one."""
    return shutil.which("g++") if sys.platform == "linux" else None


def environment(library: Path) -> dict[str, str]:
    """Variables of a process whose torch finds the library's registrations."""
    torch_libraries = str(Path(torch.__file__).parent / "lib")
    folders = [torch_libraries, *os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)]
    return os.environ | {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders)),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        LIBRARY: str(library),
    }


def loaded() -> ctypes.CDLL | None:
    """The library, where this process runs on it; its functions tell and cap the bytes in use."""
    if LIBRARY not in os.environ:
        return None
    library = ctypes.CDLL(os.environ[LIBRARY])
    library.simulated_used.restype = library.simulated_most.restype = ctypes.c_size_t
    library.simulated_limit.argtypes = [ctypes.c_size_t]
    return library


def pytest_configure() -> None:
    """What a build of torch for CPUs can't answer in Python."""
    cuda, library = torch.cuda, loaded()
    assert library is not None
    answers = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "a simulated GPU",
        "mem_get_info": lambda *_: (FREE, 2 * FREE),
        "max_memory_allocated": lambda *_: library.simulated_most(),
        "reset_peak_memory_stats": lambda *_: library.simulated_forget(),
        "memory_allocated": lambda *_: library.simulated_used(),
        "manual_seed_all": lambda _seed: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)


def main() -> None:
    """Compile, then run the tests."""
    with tempfile.TemporaryDirectory() as scratch:
        variables = environment(build(Path(scratch)))
        tests = Path(__file__).parents[1] / "test_gpu.py"
        command = [sys.executable, "-m", "pytest", "-p", "simulated_gpu", "-p", "no:cacheprovider", "-rs", str(tests)]
        sys.exit(subprocess.run(command, env=variables, check=False).returncode)


if __name__ == "__main__":
    main()
