"""The table of pruning methods. Plug-ins enter by the entry-point group `secateur.solvers`, as `name -> dataclass`."""

from __future__ import annotations

import dataclasses
from importlib.metadata import entry_points
from typing import Any

from secateur.solvers.admm import ADMM
from secateur.solvers.contract import Solved, Solver, check_kind
from secateur.solvers.magnitude import Magnitude
from secateur.solvers.mrp import MRP
from secateur.solvers.sparsegpt import SparseGPT
from secateur.solvers.wanda import Wanda

__all__ = ["SOLVERS", "Solved", "Solver", "make_solver"]

SOLVERS: dict[str, type] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT, "mrp": MRP, "admm": ADMM}


def make_solver(method: str, options: dict[str, Any] | None = None) -> Solver:
    """The solver named `method` with these options.

    Raises:
        ValueError: unknown method, a plug-in that can't be loaded, an option the method doesn't have, or a value it
            doesn't take.
    """
    solver = SOLVERS[method] if method in SOLVERS else _plugin(method)
    options = options or {}
    fields = {field.name: field for field in dataclasses.fields(solver)}
    if unknown := sorted(set(options) - set(fields)):
        has = f"its options are {', '.join(fields)}" if fields else "it has no options"
        others = [name for name, each in SOLVERS.items() if unknown[0] in {f.name for f in dataclasses.fields(each)}]
        hint = f" ({unknown[0]} belongs to {', '.join(others)}: name the method)" if others else ""
        raise ValueError(f"method {method} has no option {', '.join(map(repr, unknown))}: {has}{hint}")
    for name, value in options.items():
        check_kind(solver, name, value, name)
    required = [name for name, each in fields.items() if each.default is each.default_factory is dataclasses.MISSING]
    if lacking := sorted(set(required) - set(options)):
        raise ValueError(f"method {method} needs its option {', '.join(lacking)}")
    return solver(**options)


def _plugin(method: str) -> type:
    """The solver of an installed plug-in; no other is loaded, so that one that is broken stops nobody else.

    Raises:
        ValueError: there is none of that name, or it is no solver.
    """
    points = {point.name: point for point in entry_points(group="secateur.solvers")}
    if method not in points:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(sorted({*points, *SOLVERS}))}")
    try:
        solver = points[method].load()
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(f"the plug-in of method {method} can't be loaded: {error}") from error
    if not (isinstance(solver, type) and dataclasses.is_dataclass(solver)):
        raise ValueError(f"the plug-in of method {method} is no dataclass, as every method is")
    return solver
