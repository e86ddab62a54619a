"""What a run did: figures of each matrix and block, and their summary, as plain data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.recipe.recipe import Recipe
from secateur.storage.file_records import FileRecord, Records, is_plain_name, read_records, record_of
from secateur.storage.json_files import is_sealed, read_json, sealed

METADATA = "secateur.json"
RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class MatrixReport:
    """One pruned matrix.

    Args:
        name: its path without `.weight`.
        rows, columns: outputs and inputs.
        input_dim: stored dimension that inputs run along (0 for GPT-2's transposed `Conv1D`).
        pattern: its pattern.
        zeros: zeros of the mask; weights that were zero before and stay outside it are not counted.
        relative_error: `tr(D H D^T) / tr(W H W^T)` as the solver left it, H undamped; a block refit comes later.
        target_error: the same against the weights of a dense target; None without one.
        seconds: of the matrix: target, solver, exchanges, and these figures.
        tokens: real tokens that it saw.
        borrowed: share of H from tokens that a router sends to other experts.
        solver: the solver's name.
        figures: the solver's figures.
    """

    name: str
    rows: int
    columns: int
    input_dim: int
    pattern: str
    zeros: int
    relative_error: float
    target_error: float | None
    seconds: float
    tokens: int
    borrowed: float
    solver: str
    figures: dict[str, Any]

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / (self.rows * self.columns)


@dataclass(frozen=True)
class BlockReport:
    """One block's refit.

    Args:
        name: the block's path.
        val_loss_before, val_loss_after: loss on the validation batches.
        best_epoch: epoch whose weights are kept; 0 = as solved.
        rate: learning rate of that epoch, or of the last attempt.
        seconds: of the refit.
    """

    name: str
    val_loss_before: float
    val_loss_after: float
    best_epoch: int
    rate: float
    seconds: float


@dataclass(frozen=True)
class BlockFigures:
    """What pruning one block gave.

    Args:
        matrices: figures of its matrices.
        refit: figures of its refit, where there was one.
        chunk: bytes that solvers' temporaries were limited to at its end; None = the default.
    """

    matrices: list[MatrixReport]
    refit: BlockReport | None
    chunk: int | None = None


@dataclass
class Report:
    """A whole run.

    Args:
        model: what the model was called.
        recipe: the whole recipe, as data.
        environment: versions, device, threads, processes.
        calibration: where the batches came from.
        matrices: figures of each pruned matrix.
        blocks: figures of each refit block.
        dense: why each other matrix of the layers stayed dense.
        model_parameters: weights of the model.
        layer_parameters: weights of the layers' matrices.
        seconds: of the whole run.
        notices: what the user should know.
        out: the folder, for a run that wrote one.
        identity: what decides the bits, for a run from files.
        files: the record of each file that was saved with the model, except that of `secateur.json`.
    """

    model: str
    recipe: dict[str, Any]
    environment: dict[str, Any]
    calibration: dict[str, Any]
    matrices: list[MatrixReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    model_parameters: int = 0
    layer_parameters: int = 0
    seconds: float = 0.0
    notices: list[str] = field(default_factory=list)
    out: str | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def pruned_parameters(self) -> int:
        """Weights in the pruned matrices, kept ones included."""
        return sum(matrix.rows * matrix.columns for matrix in self.matrices)

    @property
    def sparsity(self) -> float:
        """Share of the pruned matrices' weights that the masks make zero."""
        return sum(matrix.zeros for matrix in self.matrices) / max(1, self.pruned_parameters)

    @property
    def mean_relative_error(self) -> float:
        """Mean relative layer error of the matrices, before any block refit."""
        return sum(matrix.relative_error for matrix in self.matrices) / max(1, len(self.matrices))

    @property
    def the_recipe(self) -> Recipe:
        """The recipe as an object."""
        return Recipe.from_dict(self.recipe)

    def __repr__(self) -> str:
        return (
            f"Report({self.model}: {len(self.matrices)} matrices, {self.sparsity:.2%} zeros, "
            f"mean layer error {self.mean_relative_error:.4f}, {self.seconds:.0f} s)"
        )

    def save(self, folder: str | Path, known: Records | None = None) -> dict[str, FileRecord]:
        """Write `secateur.json` and `recipe.yaml` next to a model that `save_pretrained` wrote.

        `secateur inspect FOLDER` then checks every matrix, and every file that was there.

        Args:
            folder: of the model.
            known: records of files that need not be read again.

        Returns:
            the record of each file of the folder.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.the_recipe.save(target / RECIPE_FILE)
        files = [path for path in target.iterdir() if path.is_file() and not path.is_symlink()]
        names = [path.name for path in files if is_plain_name(path.name)]
        found = {
            name: (known or {}).get(name) or record_of(target / name) for name in sorted(names) if name != METADATA
        }
        self.files = found
        (target / METADATA).write_text(self.to_json(), encoding="utf-8")
        return found | {METADATA: record_of(target / METADATA)}

    def to_json(self) -> str:
        """The content of `secateur.json`."""
        return json.dumps(sealed(self.to_dict()), indent=1, allow_nan=False) + "\n"

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """The report that was saved with a model; `Report.load(PRUNED).save(TUNED)` lets `inspect` check the tuned one.

        Raises:
            SecateurError: there is none, or it is damaged or was changed.
        """
        return read_metadata(Path(folder))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The report that `to_dict` made into plain data.

        Raises:
            KeyError, TypeError, AttributeError, ValueError: data of another form.
        """
        own = {field.name for field in fields(MatrixReport)}
        summary = data["summary"]
        names = ("model", "recipe", "environment", "calibration", "notices", "dense", "identity")
        return cls(
            **{name: data[name] for name in names},
            matrices=[MatrixReport(**{name: matrix[name] for name in own}) for matrix in data["matrices"]],
            blocks=[BlockReport(**block) for block in data["blocks"]],
            model_parameters=summary["model_parameters"],
            layer_parameters=summary["layer_parameters"],
            seconds=summary["seconds"],
            out=summary["out"],
            files=read_records(data["files"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the summary first."""
        return {
            "model": self.model,
            "summary": {
                "sparsity": self.sparsity,
                "pruned_matrices": len(self.matrices),
                "pruned_parameters": self.pruned_parameters,
                "model_parameters": self.model_parameters,
                "layer_parameters": self.layer_parameters,
                "share_of_parameters": self.pruned_parameters / max(1, self.model_parameters),
                "share_of_layers": self.pruned_parameters / max(1, self.layer_parameters),
                "mean_relative_error": self.mean_relative_error,
                "seconds": self.seconds,
                "out": self.out,
            },
            "recipe": self.recipe,
            "environment": self.environment,
            "identity": self.identity,
            "calibration": self.calibration,
            "notices": self.notices,
            "dense": self.dense,
            "blocks": [asdict(block) for block in self.blocks],
            "matrices": [asdict(matrix) | {"sparsity": matrix.sparsity} for matrix in self.matrices],
            "files": {name: asdict(record) for name, record in self.files.items()},
        }


def read_metadata(folder: Path) -> Report:
    """The report that a run saved with its model.

    Raises:
        SecateurError: there is none, or it is damaged or was changed.
    """
    path = folder / METADATA
    data = read_json(path)
    if not is_sealed(data):
        raise SecateurError(f"{path} is damaged, or was changed: its content does not match its digest")
    try:
        found = Report.from_dict(data)
        for matrix in found.matrices:
            _check_types(matrix, ("name", "pattern", "solver"), str)
            _check_types(matrix, ("rows", "columns", "input_dim", "zeros"), int)
            _check_types(matrix, ("relative_error", "seconds"), (int, float))
            _check_types(matrix, ("figures",), dict)
        for name in ("recipe", "environment", "calibration", "dense", "identity"):
            if not isinstance(getattr(found, name), dict):
                raise TypeError(f"its {name} is not a mapping")
        Recipe.from_dict(found.recipe)
        return found
    except SecateurError as error:
        raise error.within(str(path)) from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SecateurError(f"{path} is not a report of a run ({error})") from error


def _check_types(matrix: MatrixReport, names: Sequence[str], kind: type | tuple[type, ...]) -> None:
    for name in names:
        if not isinstance(getattr(matrix, name), kind):
            raise TypeError(f"{name} of a matrix is {getattr(matrix, name)!r}")
