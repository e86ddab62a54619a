"""How a model runs while it is watched: in evaluation mode, deterministic, in full fp32, with frozen weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def deterministic_forward(model: nn.Module) -> Iterator[None]:
    """Run the model without dropout, with experts as plain products, by deterministic kernels.

    Some models draw random numbers even so (hashes of an attention); the caller's generator is restored afterwards.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(_eager_experts(model))
        stack.enter_context(deterministic_algorithms())
        stack.enter_context(full_precision())
        stack.enter_context(torch.random.fork_rng(gpus))
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode (no dropout); each module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _eager_experts(model: Any) -> Iterator[None]:
    """Run experts as plain products, one at a time: fused kernels hide the uses of each expert's weights."""
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if before in (None, "eager") or not hasattr(model, "set_experts_implementation"):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute fp32 products in fp32, for Hessians and solvers: neither in TF32 nor in autocast's dtype."""
    backends: Any = torch.backends  # its settings are not declared
    settings = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    cast = [kind for kind in ("cpu", "cuda", "mps") if torch.is_autocast_enabled(kind)]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with ExitStack() as stack:
            for kind in cast:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Use deterministic kernels only, so the same seed on the same machine gives the same bits."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills: Any = torch.utils.deterministic  # its setting is not declared
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses cuBLAS
    fill = fills.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    fills.fill_uninitialized_memory = False  # a debugging aid that costs a write of each new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        fills.fill_uninitialized_memory = fill


@contextmanager
def without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within this context backward passes take no gradient of these parameters."""
    required = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
