"""Make the golden matrix of tests/golden: real weights, their Hessian, and layer errors of the authors' code.

    git clone https://github.com/IST-DASLab/sparsegpt SPARSEGPT
    git clone https://github.com/mazumder-lab/ALPS ALPS
    python benchmarks/make_golden.py --sparsegpt SPARSEGPT --alps ALPS --out tests/golden/golden.json

The matrix is a corner of `v_proj` of block 10 of SmolLM2-135M: 64 outputs and 128 inputs, with the Hessian of these
inputs on 16 x 512 tokens of the shipped text. ALPS asks for `cuda:0`; its source is run with `cpu` instead.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import arguments_of
from reference import load_reference, theirs
from torch import Tensor, nn

from secateur.calibration.batches import calibration_batches
from secateur.checkpoints.load import load
from secateur.numerics.hessian import relative_error
from secateur.recipe.patterns import NM, parse_pattern
from secateur.recipe.recipe import CalibrationText

NAME = "smollm2-l10-v_proj-corner"
ROWS, COLUMNS = 64, 128
PATTERNS = ("0.5", "0.7", "2:4", "4:8")
DAMPING = 0.01


def main() -> None:
    """Write the matrix next to `--out`, and the figures to it."""
    args = arguments_of(__doc__, "sparsegpt", "alps")
    W, H = corner()
    reference, alps = load_reference(args.sparsegpt), load_alps(args.alps)
    figures = {pattern: figures_of(W, H, pattern, reference, alps) for pattern in PATTERNS}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out.parent / f"{NAME}.npz", W=W.half().numpy(), H=H.numpy())
    args.out.write_text(json.dumps({NAME: figures}, indent=1) + "\n")


def corner() -> tuple[Tensor, Tensor]:
    """W (R, C), rounded to fp16, and H = X X^T / T (C, C)."""
    checkpoint = load("smollm2")
    text = CalibrationText(samples=16, seq_len=512)
    batches = calibration_batches(None, checkpoint.tokenizer, checkpoint.model.config, text).batches
    layer = checkpoint.model.get_submodule("model.layers.10.self_attn.v_proj")
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, 1)[:, :COLUMNS].double()))
    with torch.no_grad():
        for batch in batches:
            checkpoint.model(**batch)
    X = torch.cat(seen)
    return layer.weight.detach()[:ROWS, :COLUMNS].half().float(), (X.T @ X / len(X)).float()


def load_alps(clone: Path) -> type:
    """The class ALPS_prune of the clone, for the CPU."""
    module = ModuleType("alps")
    exec(compile((clone / "alps.py").read_text().replace("cuda:0", "cpu"), "alps.py", "exec"), module.__dict__)
    return module.ALPS_prune


def figures_of(W: Tensor, H: Tensor, pattern: str, reference: type, alps: type) -> dict[str, float]:
    """Relative layer errors of the references, and the share of zeros that each left."""
    sparse, joint = theirs(reference, W, H, pattern), by_alps(alps, W, H, pattern)
    return {
        "sparsegpt": relative_error(sparse, W, H),
        "sparsegpt_mask_refit": relative_error(refit(W, H, sparse != 0), W, H),
        "alps": relative_error(joint, W, H),
        "sparsity": float((sparse == 0).double().mean()),
        "alps_sparsity": float((joint == 0).double().mean()),
    }


def by_alps(alps: type, W: Tensor, H: Tensor, pattern: str) -> Tensor:
    """The weights that the ALPS authors' code gives."""
    parsed = parse_pattern(pattern)
    n_m: dict[str, Any] = {"nm_n": parsed.n, "nm_m": parsed.m} if isinstance(parsed, NM) else {}
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
    layer.weight.data = W.clone()
    pruner = alps(layer, 1, 1)
    pruner.XtX = H.clone()
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), mock.patch("torch.cuda.synchronize"):
        pruner.ALPS_admm(0.5 if isinstance(parsed, NM) else parsed.sparsity, **n_m)
    return layer.weight.data


def refit(W: Tensor, H: Tensor, keep: Tensor) -> Tensor:
    """The kept weights of a mask by least squares in float64, under the damped Hessian."""
    damped = H.double() + DAMPING * H.diagonal().double().mean() * torch.eye(len(H), dtype=torch.float64)
    result = torch.zeros_like(W)
    for row in range(len(W)):
        kept = keep[row]
        wanted = (W[row].double() @ damped)[kept]
        result[row, kept] = torch.linalg.solve(damped[kept][:, kept], wanted).float()
    return result


if __name__ == "__main__":
    main()
