"""The results of a comparison, `compare.json`: read with suspicion, written whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Required

from annotated_types import MinLen
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from secateur.errors import SecateurError
from secateur.storage.held_folder import write_durably
from secateur.storage.json_files import read_json

RESULTS = "compare.json"
DENSE = "dense"


class Figures(TypedDict, total=False):
    """What tables show of a cell; it holds more."""

    __pydantic_config__ = ConfigDict(extra="allow", allow_inf_nan=False)  # pyright: ignore[reportGeneralTypeIssues]

    perplexity: Required[dict[str, float]]
    divergence: dict[str, float]
    top1_agreement: dict[str, float]
    tasks: dict[str, Annotated[dict[str, float], MinLen(1)]]
    tasks_asked: list[str]
    layer_error: float
    seconds: float
    peak_memory: float


@dataclass
class Comparison:
    """A table's settings, environment and cells, as `compare.json` holds them.

    Args:
        settings: what all cells share.
        environment: of the last cell.
        command: that ran it.
        cells: figures by the cell's key: `dense`, or recipe, pattern and seed.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    settings: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


_FIGURES = TypeAdapter(Figures)
_COMPARISON = TypeAdapter(Comparison)


def read_results(folder: Path) -> Comparison | None:
    """The results in a folder; None where there are none.

    Raises:
        SecateurError: damaged results, or ones that no comparison wrote.
    """
    path = folder / RESULTS
    if not path.exists():
        return None
    data = read_json(path)
    try:
        found = _COMPARISON.validate_python(data)
        for key, cell in found.cells.items():
            if key != DENSE and key.count(" ") < 2:
                raise SecateurError(f"{path} has the cell {key!r}, which is not a recipe, a pattern and a seed")
            found.cells[key] = dict(_FIGURES.validate_python(cell))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SecateurError(f"{path}: {place}: {first['msg']}: it was changed, or is not a comparison") from error
    return found


def write_results(comparison: Comparison, folder: Path) -> None:
    """Write the results, whole or not at all."""
    write_durably(folder / RESULTS, json.dumps(comparison.to_dict(), indent=1, allow_nan=False) + "\n")
