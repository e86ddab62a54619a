"""Mamba: every projection is pruned by the statistics of its input, computed here from the model's equations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import dense_pass
from models import tokens
from torch.nn import functional as F
from zoo import tiny

import secateur

TRAINED = Path(__file__).parents[1].parent / "shared" / "models" / "mamba-tiny"
TEXT = Path(__file__).parents[1].parent / "shared" / "data" / "wikitext2-valid.txt"


def inputs_by_hand(mixer: Any, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """What enters each projection of a Mamba mixer, by the equations of the paper (Gu and Dao, arXiv 2312.00752)."""
    x, gate = F.linear(hidden, mixer.in_proj.weight).chunk(2, dim=-1)
    kernel = mixer.conv1d.weight[:, 0]
    padded = F.pad(x.transpose(1, 2), (kernel.shape[1] - 1, 0))
    windows = padded.unfold(-1, kernel.shape[1], 1)
    x = F.silu((windows * kernel[:, None]).sum(-1) + mixer.conv1d.bias[:, None]).transpose(1, 2)
    parameters = F.linear(x, mixer.x_proj.weight)
    dt, B, C = parameters.split([mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size], dim=-1)
    delta = F.softplus(F.linear(dt, mixer.dt_proj.weight, mixer.dt_proj.bias))
    A = -torch.exp(mixer.A_log)
    state = torch.zeros(x.shape[0], *A.shape, dtype=x.dtype)
    scanned = []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        state = decay * state + delta[:, t, :, None] * B[:, t, None, :] * x[:, t, :, None]
        scanned.append((state * C[:, t, None, :]).sum(-1) + mixer.D * x[:, t])
    return {"in_proj": hidden, "x_proj": x, "dt_proj": dt, "out_proj": torch.stack(scanned, 1) * F.silu(gate)}


def test_the_hessian_of_every_projection_is_that_of_the_equations():
    model = tiny("mamba")
    batches = [{"input_ids": ids} for ids in tokens(8)]
    found = dense_pass(model, tokens(8))
    stream, blocks = found.stream, found.blocks
    with torch.no_grad():
        hessians = stream.observe(blocks[0], stream.groups[blocks[0].name])
        double = model.double()
        mixer = double.backbone.layers[0].mixer
        sums: dict[str, Any] = {}
        for batch in batches:
            hidden = double.backbone.layers[0].norm(double.backbone.embeddings(batch["input_ids"]))
            for name, X in inputs_by_hand(mixer, hidden).items():
                rows = X.reshape(-1, X.shape[-1])
                sums[name] = sums.get(name, 0) + rows.T @ rows / (8 * 24)
    assert {name.rsplit(".", 1)[1] for name in hessians} == set(sums)
    for name, hessian in hessians.items():
        expected = sums[name.rsplit(".", 1)[1]]
        assert torch.allclose(hessian.H.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())), name


@pytest.mark.skipif(not TRAINED.is_dir(), reason="the trained Mamba lies in ../shared, which is not here")
@pytest.mark.long
def test_a_trained_mamba_loses_less_by_mrp_than_by_sparsegpt(tmp_path):
    figures = {}
    for solver in ("sparsegpt", "mrp"):
        report = secateur.prune(
            TRAINED, tmp_path / solver, pattern="50%", solver=solver, calibration=TEXT, samples=16, seq_len=128
        )
        kinds = {matrix.name.rsplit(".", 1)[1] for matrix in report.matrices}
        assert kinds == {"in_proj", "x_proj", "dt_proj", "out_proj"}
        assert all(matrix.sparsity == 0.5 for matrix in report.matrices)
        text = TEXT.with_name("wikitext2-test.txt")
        figures[solver] = secateur.evaluate(tmp_path / solver, text, seq_len=256, max_tokens=2048)["perplexity"]
    assert figures["mrp"] < figures["sparsegpt"]
