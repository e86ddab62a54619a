"""Every causal language model class that transformers can build from a configuration: pruned whole, and exactly.

`benchmarks/coverage.py` goes further (a second pattern, magnitude too, saving and loading) and writes
docs/architectures.md.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from zoo import FAMILIES, ROWS, UNBUILDABLE, matrices_in_layers, stored, tiny, token_batches

import secateur
from secateur.models.matrices import MatrixFilter, matrices_of
from secateur.recipe.recipe import Recipe

ROOT = Path(__file__).parents[1]

# Families that are refused by name, with what the error says.
REFUSED = {
    "dbrx": "enters torch.Tensor.matmul in an unknown form",
    "deepseek_v4": "enters torch.bmm in an unknown form",
    "longcat_flash": "enters no product even when every token is sent to it",
    "xlnet": "enters torch.functional.einsum in an unknown form",
}
# Pruned in memory, but AutoModelForCausalLM doesn't know the configuration that their text models are saved with.
NO_FOLDER = {"emu3", "mllama"}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in UNBUILDABLE])
def test_every_class_is_pruned_whole_and_exactly(family):
    model = tiny(family)
    if family in REFUSED:
        with pytest.raises(ValueError, match=re.escape(REFUSED[family])):
            secateur.prune(model, pattern="2:4", solver="wanda", calibration=token_batches())
        return
    report = secateur.prune(model, pattern="2:4", solver="wanda", calibration=token_batches())
    assert matrices_in_layers(model) <= {matrix.name for matrix in report.matrices} | set(report.dense)
    for matrix in report.matrices:
        weight = stored(model, matrix.name)
        weight = weight if matrix.input_dim == 1 else weight.T
        assert bool(((weight.reshape(-1, 4) == 0).sum(1) == 2).all()), matrix.name
    with torch.no_grad():
        assert bool(torch.isfinite(model(token_batches()[0], use_cache=False)[0]).all())


def test_routers_stay_dense_and_attention_does_not():
    """Zaya's router is a network, and DBRX's attention lies within what is called a norm."""
    zaya, dbrx = (MatrixFilter(Recipe()).partition(matrices_of("", tiny(each)))[1] for each in ("zaya", "dbrx"))
    assert {name.partition(".mlp.gate.")[2] for name, reason in zaya.items() if reason == "router"} == {
        *("down_proj", "router_mlp.fc1", "router_mlp.fc2", "router_mlp.out_proj"),
    }
    assert {re.sub(r".*\.\d+\.", "", name) for name in dbrx} == {"ffn.router.layer"}


def test_the_sweep_that_the_documentation_shows_reaches_its_goal():
    sweep = json.loads((ROOT / "benchmarks" / "results" / "coverage.json").read_text())
    assert sweep["summary"]["passed"] >= 0.95 * sweep["summary"]["built"]
    assert sweep["summary"]["rows"] == len(ROWS)
    failed = {family for family, row in sweep["families"].items() if "failure" in row}
    assert failed == set(REFUSED) | NO_FOLDER
