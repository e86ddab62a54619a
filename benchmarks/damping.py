"""Layer error on the calibration text and on held-out text, by the Hessian's damping and shrinkage.

    python benchmarks/damping.py --model MODEL --text TEXT --block 4 --matrices self_attn.q_proj mlp.down_proj
        --out benchmarks/results/damping.json

The first sequences give the Hessian that the solvers see, and the next ones the Hessian that judges: a matrix with many
inputs and few tokens fits the text that it saw. Rows are evenly spread. Of the dense model, without errors of earlier
blocks.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import arguments_of, write_result

import secateur
from secateur.calibration.batches import calibration_batches
from secateur.calibration.dense_pass import run_dense_pass
from secateur.calibration.stream import Batch
from secateur.checkpoints.load import load
from secateur.models.determinism import deterministic_forward
from secateur.models.discovery import BlockChain, find_block_chains
from secateur.numerics.damping import shrinkage_for
from secateur.numerics.hessian import Hessian, relative_error
from secateur.recipe.recipe import CalibrationText, Recipe
from secateur.runtime.progress import no_progress

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)
SHRINKAGES = (0.03, 0.1, 0.2, 0.5, "auto")  # with the default damping
SOLVERS = ("sparsegpt", "mrp")


def main() -> None:
    """Watch a block, solve its matrices at each damping and each shrinkage, and write one JSON."""
    args = arguments_of(
        __doc__, "text", model="smollm2", block=4, matrices=["mlp.down_proj"], samples=32, held_out=16, seq_len=512,
        rows=96, pattern="50%",
    )  # fmt: skip
    rows = [row for name, W, seen, held in watched(args) for row in errors(name, W, seen, held, args.pattern)]
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    settings |= {"text": args.text.name, "model": Path(args.model).name}
    write_result(args.out, {"settings": settings, "rows": rows})


@torch.no_grad()
def watched(args: argparse.Namespace) -> list[tuple[str, torch.Tensor, Hessian, Hessian]]:
    """Name, some rows, and both Hessians of each matrix."""
    checkpoint = load(args.model)
    model = checkpoint.model
    text = CalibrationText(samples=args.samples + args.held_out, seq_len=args.seq_len)
    batches = calibration_batches(
        str(args.text), checkpoint.tokenizer, model.config, text, batch_tokens=args.seq_len
    ).batches
    with deterministic_forward(model):
        chain = find_block_chains(model, batches[0], Recipe()).chains[0]
        parts = (batches[: args.samples], batches[args.samples :])
        seen, held = (hessians_of(model, chain, part, args.block) for part in parts)
    found = []
    for matrix in chain.blocks[args.block].matrices:
        if matrix.name.endswith(tuple(args.matrices)):
            weight = matrix.stored[torch.linspace(0, len(matrix.stored) - 1, args.rows).long()].float()
            found.append((matrix.name, weight, seen[matrix.name], held[matrix.name]))
    return found


def hessians_of(model: Any, chain: BlockChain, batches: list[Batch], number: int) -> dict[str, Hessian]:
    """The Hessians of a dense block's matrices."""
    dense = run_dense_pass(model, chain, batches, no_progress)
    stream, block = dense.stream, dense.blocks[number]
    for before in dense.blocks[:number]:
        stream.hidden = stream.outputs(before)
    groups = stream.groups[block.name]
    by_leader = stream.observe(block, groups)
    return {matrix.name: by_leader[group.leader.name] for group in groups for matrix, _ in group.members}


def errors(name: str, W: torch.Tensor, seen: Hessian, held: Hessian, pattern: str) -> list[dict[str, Any]]:
    """Relative layer errors of one matrix."""
    auto = shrinkage_for(W.shape[1], seen.tokens)
    options: list[dict[str, Any]] = [{"damping": damping} for damping in DAMPINGS]
    options += [{"shrinkage": auto if share == "auto" else float(share)} for share in SHRINKAGES]
    found = []
    for solver, option in product(SOLVERS, options):
        pruned = secateur.solve(W, seen.H, pattern, solver, **option).weight
        row = {"matrix": name, "inputs": W.shape[1], "tokens": seen.tokens, "solver": solver} | option
        row |= {"auto": option.get("shrinkage") == auto}
        row |= {"error": relative_error(pruned, W, seen.H), "held_out": relative_error(pruned, W, held.H)}
        found.append(row)
        print(row, flush=True)
    return found


if __name__ == "__main__":
    main()
