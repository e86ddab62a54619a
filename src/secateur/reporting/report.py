"""A whole run: its figures, what was asked for and where, as plain data that is saved with the model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from secateur.errors import SecateurError
from secateur.recipe.recipe import Recipe
from secateur.recipe.solvers import with_unknown_solvers
from secateur.reporting.figures import (
    BlockReport,
    DepthReport,
    MatrixReport,
    MeasuredPerplexity,
    Speed,
    StageReport,
)
from secateur.storage.checkpoint_files import CARD, CHECKPOINT_FILES, METADATA, RECIPE_FILE, REPORT_FILE
from secateur.storage.file_records import FileRecord, Records, is_plain_name, read_records, record_of
from secateur.storage.json_files import is_sealed, read_json, sealed
from secateur.storage.paths import user_path

OWN_CODE = ("modeling_*.py", "configuration_*.py", "tokenization_*.py")


class _Summary(TypedDict):
    model_parameters: int
    layer_parameters: int
    seconds: float
    out: str | None


class _Calibration(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    source: str
    samples: int
    seq_len: NotRequired[int]
    written: NotRequired[int]


class _Saved(TypedDict):
    """The content of `secateur.json`, as it is checked when it is read."""

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)  # pyright: ignore[reportGeneralTypeIssues]

    model: str
    summary: _Summary
    recipe: dict[str, Any]
    environment: dict[str, Any]
    source: dict[str, str]
    identity: dict[str, Any]
    calibration: _Calibration
    notices: list[str]
    dense: dict[str, str]
    prices: dict[str, float]
    perplexities: list[MeasuredPerplexity]
    speeds: list[Speed]
    stages: list[StageReport]
    depth: list[DepthReport]
    blocks: list[BlockReport]
    matrices: list[MatrixReport]
    files: Any


_SAVED = TypeAdapter(_Saved)


@dataclass
class Report:
    """A whole run.

    Args:
        model: what the model was called.
        recipe: the whole recipe.
        environment: versions, device, threads, processes.
        calibration: where the batches came from.
        matrices: figures of each pruned matrix.
        blocks: figures of each refit block.
        depth: distance from the dense model behind each block.
        prices: what one more zero at the global sparsity costs in a matrix, relative to the median matrix, where an
            allocation measured it.
        stages: time and memory of each stage; of the last process, where the run was resumed.
        perplexities: measured of the finished model, by text.
        speeds: measured of the finished model, with those that it was compared with; the first is the reference.
        dense: why each other matrix of the layers stayed dense.
        model_parameters: weights of the model.
        layer_parameters: weights of the layers' matrices.
        seconds: of the whole run.
        notices: what the user should know.
        out: the folder, for a run that wrote one.
        source: facts of the dense model, as its card gives them.
        identity: what decides the bits, for a run from files.
        files: the record of each file that was saved with the model, except that of `secateur.json`.
    """

    model: str
    recipe: Recipe
    environment: dict[str, Any]
    calibration: dict[str, Any]
    matrices: list[MatrixReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    depth: list[DepthReport] = field(default_factory=list)
    prices: dict[str, float] = field(default_factory=dict)
    stages: list[StageReport] = field(default_factory=list)
    perplexities: list[MeasuredPerplexity] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    model_parameters: int = 0
    layer_parameters: int = 0
    seconds: float = 0.0
    notices: list[str] = field(default_factory=list)
    out: str | None = None
    source: dict[str, str] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def unedited_files(self) -> dict[str, FileRecord]:
        """Records of the files that must stay as they were saved: all but the card."""
        return {name: record for name, record in self.files.items() if name != CARD}

    @property
    def pruned_parameters(self) -> int:
        """Weights in the pruned matrices, kept ones included."""
        return sum(matrix.rows * matrix.columns for matrix in self.matrices)

    @property
    def sparsity(self) -> float:
        """Share of zeros in the pruned matrices, with those that they had before."""
        return sum(matrix.zeros for matrix in self.matrices) / max(1, self.pruned_parameters)

    @property
    def mean_relative_error(self) -> float:
        """Mean relative layer error of the matrices, before any block refit."""
        return sum(matrix.relative_error for matrix in self.matrices) / max(1, len(self.matrices))

    def __repr__(self) -> str:
        return (
            f"Report({self.model}: {len(self.matrices)} matrices, {self.sparsity:.2%} zeros, "
            f"mean layer error {self.mean_relative_error:.4f}, {self.seconds:.0f} s)"
        )

    def _repr_html_(self) -> str:
        from secateur.reporting.page import notebook_form

        return notebook_form(self)

    def save(self, folder: str | Path, known: Records | None = None) -> dict[str, FileRecord]:
        """Write `secateur.json`, `recipe.yaml` and `report.html` next to a model that `save_pretrained` wrote.

        Figures that were measured of other weights are left out. `secateur inspect FOLDER` then checks every matrix,
        and the checkpoint's files except page and card. Other files that lie there are not recorded, nor published.
        (`secateur prune` writes all files of its folder itself, and records them all.)

        Args:
            folder: of the model.
            known: records of files that need not be read again, where a run has written all files of the folder.

        Returns:
            the record of each file of the folder.
        """
        from secateur.recipe.files import to_yaml
        from secateur.reporting.page import run_page

        target = user_path(folder)
        target.mkdir(parents=True, exist_ok=True)
        _write_new(target / RECIPE_FILE, to_yaml(self.recipe))
        files = [path for path in target.iterdir() if path.is_file() and not path.is_symlink()]
        usual = (*CHECKPOINT_FILES, *OWN_CODE, *self.files)
        names = [path.name for path in files if is_plain_name(path.name)]
        if known is None:
            names = [name for name in names if any(fnmatchcase(name, each) for each in usual)]
        recorded = sorted({*names} - {METADATA, REPORT_FILE})  # the page may be written again
        found = {name: (known or {}).get(name) or record_of(target / name) for name in recorded}
        if weights_of(found) != weights_of(self.files):
            self.perplexities, self.speeds = [], []  # they were measured of other weights
        self.files = found
        _write_new(target / METADATA, self.to_json())
        _write_new(target / REPORT_FILE, run_page(self, target))
        return self.files | {name: record_of(target / name) for name in (METADATA, REPORT_FILE)}

    def to_json(self) -> str:
        """The content of `secateur.json`, which does not say where it lies."""
        data = self.to_dict()
        data["summary"]["out"] = None
        return json.dumps(sealed(data), indent=1, allow_nan=False) + "\n"

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """The report that was saved with a model; `Report.load(PRUNED).save(TUNED)` lets `inspect` check the tuned one.

        Raises:
            SecateurError: there is none, or it is damaged or was changed.
        """
        return read_metadata(user_path(folder))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The report that `to_dict` made into plain data.

        Raises:
            SecateurError, ValueError: data of another form.
        """
        found: dict[str, Any] = {**_SAVED.validate_python(data)}
        recipe = Recipe.from_dict(with_unknown_solvers(found.pop("recipe")))
        return cls(**found.pop("summary"), recipe=recipe, files=read_records(found.pop("files")), **found)

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
            "recipe": self.recipe.to_dict(),
            "environment": self.environment,
            "source": self.source,
            "identity": self.identity,
            "calibration": self.calibration,
            "notices": self.notices,
            "dense": self.dense,
            "perplexities": [asdict(each) for each in self.perplexities],
            "speeds": [asdict(each) for each in self.speeds],
            "prices": self.prices,
            "stages": [asdict(stage) for stage in self.stages],
            "depth": [asdict(each) for each in self.depth],
            "blocks": [asdict(block) for block in self.blocks],
            "matrices": [asdict(matrix) | {"sparsity": matrix.sparsity} for matrix in self.matrices],
            "files": {name: asdict(record) for name, record in self.files.items()},
        }


def weights_of(files: Records) -> dict[str, FileRecord]:
    """The records of weight files."""
    return {name: record for name, record in files.items() if name.endswith(".safetensors")}


def _write_new(path: Path, text: str) -> None:
    """Write a file in place of what has its name, not through it, where that is a link."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


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
        return replace(Report.from_dict(data), out=str(folder))
    except SecateurError as error:
        raise error.within(str(path)) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SecateurError(f"{path} is not a report of a run ({place}: {first['msg']})") from error
