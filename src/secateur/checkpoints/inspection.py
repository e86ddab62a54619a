"""Zeros of each matrix of a checkpoint, checked against what `secateur.json` records."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open
from torch import Tensor

from secateur.checkpoints.as_saved import load_as_saved
from secateur.models.matrices import parameter_of
from secateur.numerics.masks import is_met
from secateur.packed.files import dense, is_packed
from secateur.recipe.patterns import NM, Pattern, parse_pattern
from secateur.recipe.recipe import Recipe
from secateur.recipe.rules import matrix_recipe, rule_for
from secateur.reporting.report import read_metadata
from secateur.sources.validate import check_folder, check_packed
from secateur.storage.checkpoint_files import METADATA
from secateur.storage.file_records import damage

OUTSIDE, NOT_OURS = "outside the blocks", f"no {METADATA}: not pruned by secateur"


@dataclass(frozen=True)
class MatrixInspection:
    """One matrix as it is in the file. `ok` is None where nothing is recorded of it."""

    name: str
    shape: tuple[int, ...]
    zeros: int
    sparsity: float
    pattern: str | None
    ok: bool | None


@dataclass
class Inspection:
    """A checkpoint's matrices, what stayed dense and why, and every problem."""

    folder: str
    matrices: list[MatrixInspection] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"ok": not self.problems, **asdict(self)}


def inspect_folder(folder: Path) -> Inspection:
    """Count the zeros of every matrix, and check what `secateur.json` records of matrices, rules and files.

    Raises:
        SecateurError: no checkpoint there, damaged files, or a broken `secateur.json`.

    Cost: two reads of the weights. Where transformers renames tensors of the files, or fuses experts: a copy of them in
    temporary files, and of a packed model an unpacked copy in the user's cache.
    """
    shards = check_packed(folder) if is_packed(folder) else check_folder(folder)[1]
    report = read_metadata(folder) if (folder / METADATA).exists() else None
    inspection = Inspection(str(folder))
    recorded: dict[str, dict[str, Any]] = {}
    if report is not None:
        recorded = {matrix.name: asdict(matrix) for matrix in report.matrices}
        inspection.dense = {str(name): str(reason) for name, reason in report.dense.items()}
        inspection.problems += _breaks_of_rules(report.recipe, recorded)
        inspection.problems += filter(None, (damage(folder, *file) for file in report.unedited_files.items()))
    otherwise = NOT_OURS if report is None else OUTSIDE
    in_files = {name.removesuffix(".weight") for name in shards}
    as_stored = all(parameter_of(name) in in_files for name in recorded)
    for key, tensor in _stored(shards) if as_stored else _loaded(folder):
        _inspect_tensor(inspection, key, tensor, recorded, otherwise)
    inspection.problems += [f"{name} is recorded as pruned, but the checkpoint has no such matrix" for name in recorded]
    inspection.matrices.sort(key=lambda matrix: _natural(matrix.name))
    return inspection


def _stored(shards: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Every matrix, or stack of some, in the files."""
    for path in sorted(set(shards.values())):
        with safe_open(path, framework="pt") as shard:
            for key in sorted(name for name, where in shards.items() if where == path):
                tensor = dense(shard.get_tensor(key), f"{path}: {key}")
                if tensor.ndim in (2, 3):
                    yield key, tensor


def _loaded(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The same under the model's names, where the files have others: transformers renames or fuses some."""
    with TemporaryDirectory() as scratch:
        model = load_as_saved(folder, Path(scratch))
        yield from ((name, each.data) for name, each in model.named_parameters() if each.ndim in (2, 3))


def _inspect_tensor(
    inspection: Inspection, key: str, tensor: Tensor, recorded: dict[str, dict[str, Any]], otherwise: str
) -> None:
    """Add a tensor's matrices: itself, or each recorded expert of a 3-D tensor. Takes what it finds off `recorded`.

    Args:
        inspection: takes the matrices.
        key: name of the tensor.
        tensor: the tensor.
        recorded: what is recorded of each matrix that was not met yet.
        otherwise: why a matrix is dense of which nothing is recorded.
    """
    path = key.removesuffix(".weight")
    parts = {path: tensor}
    if tensor.ndim == 3:
        experts = {f"{path}[{index}]": part for index, part in enumerate(tensor)}
        if any(name in recorded for name in experts):
            parts = experts
    for name, part in parts.items():
        promise = recorded.pop(name, None)
        if promise is None:
            inspection.dense.setdefault(name, otherwise)
        _inspect_matrix(inspection, name, part, promise)


def _inspect_matrix(inspection: Inspection, name: str, stored: Tensor, promise: dict[str, Any] | None) -> None:
    """Add one matrix, checked against what is recorded of it."""
    zeros = int((stored == 0).sum())
    ok = None if promise is None else stored.ndim == 2 and _keeps(promise, stored)
    if promise is not None and not ok:
        inspection.problems.append(
            f"{name} breaks its pattern {promise['pattern']}: it has {zeros} zeros of {stored.numel()} weights, "
            f"{promise['zeros']} are recorded. To fine-tune, train the pruned model within secateur.keep_zeros(model)"
        )
    pattern = None if promise is None else promise["pattern"]
    share = zeros / max(1, stored.numel())
    inspection.matrices.append(MatrixInspection(name, tuple(stored.shape), zeros, share, pattern, ok))


def _keeps(promise: dict[str, Any], stored: Tensor) -> bool:
    """Whether a stored matrix has at least the recorded zeros, where its pattern wants them."""
    weight = stored if promise["input_dim"] == 1 else stored.T
    zero = weight == 0
    pattern: Pattern = parse_pattern(promise["pattern"])
    if tuple(weight.shape) != (promise["rows"], promise["columns"]) or int(zero.sum()) < promise["zeros"]:
        return False
    return not (isinstance(pattern, NM) and weight.shape[1] % pattern.m) and is_met(pattern, zero)


def _breaks_of_rules(recipe: Recipe, recorded: dict[str, dict[str, Any]]) -> list[str]:
    """Matrices whose recorded pattern is not the one that a rule of the recipe gives them."""
    found = []
    for name, entry in recorded.items():
        rule, own = rule_for(recipe, name), matrix_recipe(recipe, name)
        if rule is not None and rule.dense is True:
            found.append(f"{name} was pruned, but a rule of the recipe leaves it dense")
        elif own.own_pattern and entry["pattern"] != str(own.pattern):
            found.append(f"{name} was pruned to {entry['pattern']}, but its rule in the recipe says {own.pattern}")
    return found


def _natural(name: str) -> list[Any]:
    """A key that sorts numbers in names by value: block 2 before block 10."""
    parts = re.split(r"([0-9]+)", name)  # text, digits, text, ...
    parts[1::2] = [part.lstrip("0") for part in parts[1::2]]
    return [(len(part), part) if number % 2 else part for number, part in enumerate(parts)]
