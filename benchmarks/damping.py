"""Layer error on the calibration text and on held-out text, by the Hessian's damping.

    python benchmarks/damping.py --model MODEL --text TEXT --block 4 --matrices self_attn.q_proj mlp.down_proj
        --out benchmarks/results/damping.json

The first sequences give the Hessian that the solvers see, and the next ones the Hessian that judges: a matrix with many
inputs and few tokens fits the text that it saw. Rows are evenly spread. Of the dense model, without errors of earlier
blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import arguments_of, write_result
from torch import nn

import secateur
from secateur.calibration.batches import calibration_batches
from secateur.checkpoints.load import load
from secateur.models.determinism import deterministic_forward
from secateur.models.discovery import find_block_chains
from secateur.numerics.hessian import Hessian, HessianAccumulator, relative_error
from secateur.recipe.recipe import CalibrationText, Recipe

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)
SOLVERS = ("sparsegpt", "mrp")


def main() -> None:
    """Watch a block, solve its matrices at each damping, and write one JSON."""
    args = arguments_of(
        __doc__, "text", model="smollm2", block=4, matrices=["mlp.down_proj"], samples=32, held_out=16, seq_len=512,
        rows=96, pattern="50%",
    )  # fmt: skip
    rows = [row for name, W, seen, held in watched(args) for row in errors(name, W, seen, held, args.pattern)]
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "text", "model")}
    write_result(args.out, {"settings": settings | {"text": args.text.name}, "rows": rows})


class _Enough(Exception):
    """Ends a forward pass behind the block."""


@torch.no_grad()
def watched(args: argparse.Namespace) -> list[tuple[str, torch.Tensor, Hessian, Hessian]]:
    """Name, some rows, and both Hessians of each matrix."""
    checkpoint = load(args.model)
    model = checkpoint.model
    text = CalibrationText(samples=args.samples + args.held_out, seq_len=args.seq_len)
    data = calibration_batches(str(args.text), checkpoint.tokenizer, model.config, text, batch_tokens=args.seq_len)
    windows = torch.cat([batch["input_ids"] for batch in data.batches])
    block = find_block_chains(model, {"input_ids": windows[:1]}, Recipe()).chains[0].blocks[args.block].module
    layers: dict[str, Any] = {name: block.get_submodule(name) for name in args.matrices}
    sums: list[dict[str, HessianAccumulator]] = [
        {name: HessianAccumulator(layer.weight.shape[1], layer.weight.device) for name, layer in layers.items()}
        for _ in range(2)
    ]
    current = sums[0]

    def watching(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            current[name].add(inputs[0].flatten(0, -2))

        return add

    def end(*_: Any) -> None:
        raise _Enough

    for name, layer in layers.items():
        assert isinstance(layer, nn.Linear)
        layer.register_forward_pre_hook(watching(name))
    block.register_forward_hook(end)
    with deterministic_forward(model):
        for number, window in enumerate(windows):
            current = sums[number >= args.samples]
            try:
                model(input_ids=window[None], use_cache=False)
            except _Enough:
                continue
    chosen = {
        name: layer.weight[torch.linspace(0, len(layer.weight) - 1, args.rows).long()].float()
        for name, layer in layers.items()
    }
    return [(name, W, sums[0][name].finish(), sums[1][name].finish()) for name, W in chosen.items()]


def errors(name: str, W: torch.Tensor, seen: Hessian, held: Hessian, pattern: str) -> list[dict[str, Any]]:
    """Relative layer errors of one matrix."""
    found = []
    for solver in SOLVERS:
        for damping in DAMPINGS:
            pruned = secateur.solve(W, seen.H, pattern, solver, damping=damping).weight
            row = {"matrix": name, "inputs": W.shape[1], "tokens": seen.tokens, "solver": solver, "damping": damping}
            row |= {"error": relative_error(pruned, W, seen.H), "held_out": relative_error(pruned, W, held.H)}
            found.append(row)
            print(row, flush=True)
    return found


if __name__ == "__main__":
    main()
