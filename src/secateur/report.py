"""What a run did: per-matrix figures and their summary, as plain data for `secateur.json` and tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class MatrixReport:
    """One pruned matrix.

    `input_dim` is the stored dimension that inputs run along (0 for GPT-2's transposed `Conv1D`). `relative_error` is
    `tr(D H D^T) / tr(W H W^T)` with D the change of the weights as the solver left them, H undamped; `target_error` is
    the same against the weights that a dense target asked for (None without one). A block refit comes after both.
    `zeros` are those of the mask: weights that were zero before and stay outside it are not counted.
    `borrowed` is the share of H from tokens that a router sends elsewhere (`experts`).
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
    solver: dict[str, Any]

    @property
    def sparsity(self) -> float:
        return self.zeros / (self.rows * self.columns)


@dataclass(frozen=True)
class BlockReport:
    """One block's refit: the objective on held-out batches before and after, the pass that won (0 = as solved), and the
    rate that it, or the last attempt, was made at."""

    name: str
    held_out_before: float
    held_out_after: float
    best_pass: int
    rate: float
    seconds: float


@dataclass(frozen=True)
class BlockFigures:
    """What pruning one block gave: figures of its matrices, and of its refit where there was one.

    `chunk` is the number of bytes that solvers' temporaries were limited to at its end; None = the usual one.
    """

    matrices: list[MatrixReport]
    refit: BlockReport | None
    chunk: int | None = None


@dataclass
class Report:
    """A whole run: its recipe, and what came of it. `identity` is what decides its bits, for a run from files."""

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

    @property
    def pruned_parameters(self) -> int:
        """Weights in the matrices that were pruned, kept ones included."""
        return sum(matrix.rows * matrix.columns for matrix in self.matrices)

    @property
    def sparsity(self) -> float:
        """Share of the pruned matrices' weights that the masks make zero."""
        return sum(matrix.zeros for matrix in self.matrices) / max(1, self.pruned_parameters)

    @property
    def mean_relative_error(self) -> float:
        return sum(matrix.relative_error for matrix in self.matrices) / max(1, len(self.matrices))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The report that `to_dict` made into plain data.

        Raises:
            KeyError, TypeError, AttributeError: data of another form.
        """
        own = {field.name for field in fields(MatrixReport)}
        summary = data["summary"]
        return cls(
            **{name: data[name] for name in ("recipe", "environment", "calibration", "notices", "dense", "identity")},
            matrices=[MatrixReport(**{name: matrix[name] for name in own}) for matrix in data["matrices"]],
            blocks=[BlockReport(**block) for block in data["blocks"]],
            model_parameters=summary["model_parameters"],
            layer_parameters=summary["layer_parameters"],
            seconds=summary["seconds"],
            out=summary["out"],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the summary first."""
        return {
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
        }
