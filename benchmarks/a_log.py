r"""Does pruning Mamba's A_log pay? Perplexity of a trained Mamba with half of A_log set to zero, by several scores.

    python benchmarks/a_log.py --model ../shared/models/mamba-tiny --calibration ../shared/data/wikitext2-valid.txt \
        --text ../shared/data/wikitext2-test.txt --out benchmarks/results/a_log.json

A zero in A_log is a state that decays at rate exp(0) = 1, so it saves storage and no arithmetic. The scores:
`magnitude` of A_log; `state` = A_log^2 times the sum of squared states over calibration tokens, the saliency of
SparseSSM (arXiv 2506.09613); `random`. No weight is updated, here as there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from common import arguments_of, write_result
from torch.nn import functional as F

import secateur
from secateur.calibration.batches import calibration_batches
from secateur.checkpoints.load import load
from secateur.numerics.masks import keep_all_but_lowest
from secateur.recipe.recipe import CalibrationText

SAMPLES, LENGTH, MAX_TOKENS = 16, 256, 16384
SPARSITIES = (0.25, 0.5)
SCORES = ("random", "magnitude", "state")


def main() -> None:
    """Evaluate the dense model and every score at every sparsity, and write one JSON."""
    arguments = arguments_of(__doc__, "model", "calibration", "text")
    checkpoint = load(str(arguments.model), "cpu")
    dense: Any = checkpoint.model
    size = CalibrationText(samples=SAMPLES, seq_len=LENGTH)
    draw = calibration_batches(arguments.calibration, checkpoint.tokenizer, dense.config, size)
    energies = state_energies(dense, draw.batches)
    mixers = [layer.mixer for layer in dense.backbone.layers]
    total = sum(parameter.numel() for parameter in dense.backbone.layers.parameters())

    def perplexity(model: Any) -> float:
        figures = secateur.evaluate(
            model, arguments.text, tokenizer=checkpoint.tokenizer, seq_len=512, max_tokens=MAX_TOKENS
        )
        return figures["perplexity"]

    cells = {"dense": perplexity(dense)}
    for sparsity in SPARSITIES:
        for kind in SCORES:
            model = copy.deepcopy(dense)
            prune_a_log(model, energies, kind, sparsity)
            cells[f"{kind} {sparsity:.0%}"] = perplexity(model)
            print(kind, sparsity, cells[f"{kind} {sparsity:.0%}"], flush=True)
    cells |= against_more_zeros_elsewhere(dense, draw.batches, energies, perplexity)
    result = {
        "settings": {"model": arguments.model.name, "text": arguments.text.name, "max_tokens": MAX_TOKENS},
        "share_of_block_parameters": sum(mixer.A_log.numel() for mixer in mixers) / total,
        "perplexity": cells,
    }
    write_result(arguments.out, result)


def against_more_zeros_elsewhere(
    dense: Any, batches: Any, energies: list[torch.Tensor], perplexity: Callable[[Any], float]
) -> dict[str, float]:
    """Half of A_log on top of `mrp` at 50%, and as many zeros by `mrp` alone, at a little more than 50%."""
    half = copy.deepcopy(dense)
    report = secateur.prune(half, pattern="50%", solver="mrp", calibration=batches)
    cells = {"mrp 50%": perplexity(half)}
    extra = prune_a_log(half, energies, "state", 0.5)
    cells["mrp 50% + state 50%"] = perplexity(half)
    more = copy.deepcopy(dense)
    sparsity = 0.5 + extra / sum(matrix.rows * matrix.columns for matrix in report.matrices)
    secateur.prune(more, pattern=f"{100 * sparsity:.2f}%", solver="mrp", calibration=batches)
    cells["mrp with as many zeros"] = perplexity(more)
    return cells


def prune_a_log(model: Any, energies: list[torch.Tensor], kind: str, sparsity: float) -> int:
    """Zero the lowest scores of every layer's A_log in place; returns how many."""
    pruned = 0
    for layer, energy in zip(model.backbone.layers, energies, strict=True):
        A_log = layer.mixer.A_log.data
        count = round(sparsity * A_log.numel())
        A_log *= keep_all_but_lowest(score(kind, A_log, energy), count)
        pruned += count
    return pruned


def score(kind: str, A_log: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """What each entry's loss is taken to cost; the lowest go."""
    if kind == "random":
        return torch.rand(A_log.shape, generator=torch.Generator().manual_seed(0))
    return A_log.square() * (energy if kind == "state" else 1)


@torch.no_grad()
def state_energies(model: Any, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The sum over tokens of each layer's squared states, inner width x state size, by the recurrence."""
    mixers = [layer.mixer for layer in model.backbone.layers]
    energies = [torch.zeros(mixer.A_log.shape) for mixer in mixers]

    def watch(mixer: Any, energy: torch.Tensor) -> Any:
        def add(_module: Any, args: tuple[torch.Tensor]) -> None:
            energy.add_(energy_of(mixer, args[0]))

        return mixer.x_proj.register_forward_pre_hook(add)

    hooks = [watch(mixer, energy) for mixer, energy in zip(mixers, energies, strict=True)]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return energies


def energy_of(mixer: Any, x: torch.Tensor) -> torch.Tensor:
    """The sum of h_t^2 of `h_t = exp(delta A) h_(t-1) + delta B x` over a batch (Gu and Dao, arXiv 2312.00752)."""
    dt, B, _ = F.linear(x, mixer.x_proj.weight).split(
        [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size], dim=-1
    )
    delta = F.softplus(F.linear(dt, mixer.dt_proj.weight, mixer.dt_proj.bias))
    A = -torch.exp(mixer.A_log.float())
    state = torch.zeros(len(x), *A.shape)
    energy = torch.zeros(A.shape)
    for t in range(x.shape[1]):
        drive = delta[:, t, :, None] * B[:, t, None, :] * x[:, t, :, None]
        state = torch.exp(delta[:, t, :, None] * A) * state + drive
        energy += state.square().sum(0)
    return energy


if __name__ == "__main__":
    main()
