"""The sweep over every causal language model class of transformers: built tiny, pruned, checked, saved, loaded again.

    python benchmarks/coverage.py --out benchmarks/results/coverage.json

Each class of `AutoModelForCausalLM`'s mapping that can be built from a configuration alone is pruned to 50% and 2:4 by
`mrp`, on random tokens. A class passes where, at both patterns: every matrix of its layers is pruned to exactly the
target or listed as dense with its reason, the layer error is below magnitude's, its outputs are finite, and a saved
copy, loaded again, holds the same weights. Magnitude prunes the class as a user of the command would, from a folder to
a folder, and must leave dense the same matrices as `mrp` does with the model in memory.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from common import arguments_of, write_result

import secateur

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
zoo: Any = import_module("zoo")  # the tests' models
models: Any = import_module("models")

PATTERNS = ("50%", "2:4")


def main() -> None:
    """Run the sweep and write one JSON."""
    arguments = arguments_of(__doc__, families=list(zoo.FAMILIES))
    transformers.logging.set_verbosity_error()
    rows = {}
    for family in arguments.families:
        rows[family] = {"unbuildable": zoo.UNBUILDABLE[family]} if family in zoo.UNBUILDABLE else examine(family)
        print(family, rows[family].get("failure", "unbuildable" if family in zoo.UNBUILDABLE else "passes"), flush=True)
    built = {family: row for family, row in rows.items() if "unbuildable" not in row}
    passed = sum("failure" not in row for row in built.values())
    summary = {"classes": len(rows), "built": len(built), "passed": passed, "rows": len(zoo.ROWS)}
    result = {
        "command": "python benchmarks/coverage.py --out benchmarks/results/coverage.json",
        "summary": summary,
        "families": rows,
    }
    write_result(arguments.out, result)
    print(summary)


def examine(family: str) -> dict[str, Any]:
    """What became of one class: its figures, with `failure` where it does not pass."""
    row: dict[str, Any] = {}
    try:
        for pattern in PATTERNS:
            row |= check(family, pattern)
    except (AssertionError, ValueError, RuntimeError) as error:  # a check, a refusal, a forward pass that fails
        row["failure"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
    return row


def check(family: str, pattern: str) -> dict[str, Any]:
    """Prune a class at a pattern and check it. Raises AssertionError or what the library raises."""
    model, tokens = zoo.tiny(family), zoo.token_batches()
    row = {"class": type(model).__name__, "parameters": sum(each.numel() for each in model.parameters())}
    magnitude = prune_folder(model, pattern, tokens)
    report = secateur.prune(model, pattern=pattern, solver="mrp", calibration=tokens)
    assert magnitude.dense == report.dense, "from a folder, other matrices stay dense than in memory"
    missed = zoo.matrices_in_layers(model) - {matrix.name for matrix in report.matrices} - set(report.dense)
    assert not missed, f"missed {sorted(missed)[:3]}"
    for matrix in report.matrices:
        zeros = int((zoo.stored(model, matrix.name) == 0).sum())
        assert zeros == matrix.rows * matrix.columns // 2, f"{matrix.name} has {zeros} zeros at {pattern}"
    assert report.mean_relative_error < magnitude.mean_relative_error, "the layer error is not below magnitude's"
    with torch.no_grad():
        assert bool(torch.isfinite(model(tokens[0], use_cache=False)[0]).all()), "the output is not finite"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again: Any = type(model).from_pretrained(folder)
    for (name, saved), loaded in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(saved, loaded), f"{name} differs after it was saved and loaded"
    whole = next((notice.split("(")[1].split(")")[0] for notice in report.notices if "block by block" in notice), None)
    return row | {
        "pruned": len(report.matrices),
        "dense": dict(Counter(report.dense.values())),
        "share": report.pruned_parameters / row["parameters"],
        "whole": whole,
        f"error {pattern}": report.mean_relative_error,
        f"error of magnitude {pattern}": magnitude.mean_relative_error,
    }


def prune_folder(model: Any, pattern: str, tokens: list[torch.Tensor]) -> Any:
    """Prune a saved model by magnitude into another folder, and check what is there."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "model", Path(folder) / "out"
        model.save_pretrained(source)
        models.character_tokenizer().save_pretrained(source)
        report = secateur.prune(source, out, pattern=pattern, solver="magnitude", calibration=tokens)
        pruned: Any = type(model).from_pretrained(out)
    for matrix in report.matrices:
        zeros = int((zoo.stored(pruned, matrix.name) == 0).sum())
        assert zeros == matrix.rows * matrix.columns // 2, f"{matrix.name} has {zeros} zeros at {pattern} in the folder"
    return report


if __name__ == "__main__":
    main()
