"""The table of pruning methods. Plug-ins enter by the entry-point group `secateur.solvers`, as `name -> dataclass`."""

from __future__ import annotations

import dataclasses
from importlib.metadata import entry_points
from typing import Any

from secateur.solvers.admm import ADMM
from secateur.solvers.contract import Solved, Solver
from secateur.solvers.magnitude import Magnitude
from secateur.solvers.mrp import MRP
from secateur.solvers.sparsegpt import SparseGPT
from secateur.solvers.wanda import Wanda

__all__ = ["SOLVERS", "Solved", "Solver", "make_solver", "solver_table"]

SOLVERS: dict[str, type] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT, "mrp": MRP, "admm": ADMM}


def solver_table() -> dict[str, type]:
    """Every method by name: the built-in ones and those of installed plug-ins, which cannot replace a built-in."""
    plugins = {point.name: point.load() for point in entry_points(group="secateur.solvers")}
    return plugins | SOLVERS


def make_solver(method: str, options: dict[str, Any] | None = None) -> Solver:
    """The solver named `method` with these options.

    Raises:
        ValueError: unknown method, an option the method doesn't have, or a value it doesn't take.
    """
    table = solver_table()
    if method not in table:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(sorted(table))}")
    options = options or {}
    known = [field.name for field in dataclasses.fields(table[method])]
    if unknown := sorted(set(options) - set(known)):
        has = f"its options are {', '.join(known)}" if known else "it has no options"
        others = [name for name in table if unknown[0] in {field.name for field in dataclasses.fields(table[name])}]
        hint = f" ({unknown[0]} belongs to {', '.join(others)}: name the method)" if others else ""
        raise ValueError(f"method {method} has no option {', '.join(map(repr, unknown))}: {has}{hint}")
    return table[method](**options)
