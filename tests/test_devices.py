"""Device placement, on meta tensors, which have no data: an operation on tensors of two devices fails, as on a GPU.

What reads numbers back (a failed factorisation, a stop) can't run without data; tests/test_gpu.py needs a GPU for that.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from secateur.numerics.damping import DampedHessian
from secateur.numerics.hessian import HessianAccumulator
from secateur.numerics.masks import keep_highest_of_groups
from secateur.pruning.dense_target import Moments, dense_target_weights
from secateur.recipe.patterns import NM
from secateur.recipe.steps import DenseTarget
from secateur.solvers.base import Solved, restore_dead_inputs, zero_dead_inputs
from secateur.solvers.sweep import sweep

META = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices; single numbers may come from the CPU, as on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor) and leaf.ndim]
        if len({tensor.device for tensor in tensors}) > 1 and "copy" not in func.name():
            raise RuntimeError(f"{func.name()} got tensors of two devices")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _one_device():
    with OneDevice():
        yield


def damped(columns):
    """A damped Hessian whose factor is given, since a factorisation reads back whether it failed."""
    found = DampedHessian(torch.empty(columns, columns, device=META), 0.01)
    found.__dict__["_factored"] = (found.H, torch.empty(columns, columns, device=META), [0.01])
    return found


def test_meta_tensors_are_told_from_a_cpus():
    with pytest.raises(RuntimeError, match="two devices"):
        torch.empty(2, 2, device=META) @ torch.empty(2, 2)


@pytest.mark.parametrize("mask", ["S", "M"])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8)], ids=str)
def test_a_sweep_stays_on_its_device(mask, pattern):
    W = torch.empty(8, 64, device=META)
    weight, keep = sweep(W, damped(64), pattern, mask, compensation="S", tile=16)
    assert weight.device == keep.device == META
    assert weight.shape == keep.shape == W.shape


def test_hessians_masks_and_targets_stay_on_their_device():
    total = HessianAccumulator(300, META)
    for _ in range(2):
        total.add(torch.empty(10, 300, dtype=torch.bfloat16, device=META))
    hessian = total.finish()
    hessian.__dict__["damped"] = damped(300)
    W = zero_dead_inputs(torch.empty(4, 300, device=META), hessian)
    keep = keep_highest_of_groups(W.abs() * hessian.input_energy.sqrt(), NM(2, 4))
    solved = restore_dead_inputs(Solved(W, keep), W, hessian)
    moments = Moments(hessian, torch.empty(300, 300, device=META), torch.empty(4, 300, device=META))
    target = dense_target_weights(W, moments, DenseTarget(kind="residual"), write_gain=1.0)
    assert {each.device for each in (hessian.H, W, keep, solved.weight, target)} == {META}
    assert hessian.H.dtype == torch.float32
