"""Options of the solvers, one frozen dataclass each. `secateur.solvers` has the code that reads them.

Another package adds a solver by an entry point in the group `secateur.solvers`: `name -> dataclass`, whose fields are
its options and whose call is `(W, hessian, pattern) -> Solved`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from annotated_types import Ge
from pydantic import ConfigDict, PlainSerializer, PlainValidator, TypeAdapter, ValidationError, WithJsonSchema

from secateur.errors import nearest
from secateur.recipe.declare import Field, Number, RecipeError, Whole, explained, fields_of, options, plain, validated

# Options of the full-row refit, which two solvers end with.
Tolerance = Annotated[
    Number,
    Field(gt=0, lt=1, description="The full-row refit stops when its loss is certified to be this near the optimum."),
]
MaxIterations = Annotated[Whole, Field(ge=1, description="Iterations after which the full-row refit stops anyway.")]


class SolverOptions:
    """Options of a solver; `name` is what a recipe calls it."""

    name: ClassVar[str]


@options
class Magnitude(SolverOptions):
    """Remove the smallest weights; look at no data, move nothing."""

    name: ClassVar[str] = "magnitude"


@options
class Wanda(SolverOptions):
    """Weights times input norms, compared within each row (Sun et al., arXiv 2306.11695)."""

    name: ClassVar[str] = "wanda"


@options
class SparseGPT(SolverOptions):
    """Single removals, column by column (Frantar and Alistarh, arXiv 2301.00774)."""

    name: ClassVar[str] = "sparsegpt"
    block: Whole = Field(default=128, ge=1, description="Columns among which an unstructured mask is chosen at once.")


@options
class MRP(SolverOptions):
    """Joint removal of all pruned weights of a row (Zhao et al., arXiv 2410.15567)."""

    name: ClassVar[str] = "mrp"
    mask: Literal["S", "M"] | None = Field(
        default=None,
        description="S scores weights one by one; M takes the n:m pattern of a group with the least joint cost. "
        "Empty: M for n:m, S for unstructured patterns.",
    )
    compensation: Literal["S", "M"] = Field(
        default="M",
        description="S moves the columns to the right after each column, as SparseGPT does; M moves jointly.",
    )
    block: Annotated[Whole, Ge(1)] | Literal["all"] = Field(
        default="all",
        description="Columns that are compensated jointly, with the columns left of them frozen; `all` = the full row, "
        "re-optimised from the original weights on the mask of a sweep.",
    )
    tolerance: Tolerance = 1e-3
    max_iterations: MaxIterations = 200


@options
class ADMM(SolverOptions):
    """Joint search of the mask by ADMM (cf. ALPS, arXiv 2406.07831), then the full-row refit."""

    name: ClassVar[str] = "admm"
    search_iterations: Whole = Field(
        default=40, ge=1, description="Steps of the mask search. More find a better mask, and take longer."
    )
    penalty_start: Number = Field(
        default=0.2,
        gt=0,
        description="Penalty at the first step, relative to a scaled diagonal of 1; lower searches freely. A search of "
        "at most 4 steps has `penalty_end` alone.",
    )
    penalty_end: Number = Field(
        default=0.7, gt=0, description="Penalty at the last step; below 0.5 the mask stays unsettled."
    )
    tolerance: Tolerance = 1e-3
    max_iterations: MaxIterations = 200

    def __post_init__(self) -> None:
        if self.penalty_start > self.penalty_end:
            raise RecipeError(
                f"penalty_start is {self.penalty_start:g} and penalty_end is {self.penalty_end:g}: it must not fall",
                ("penalty_end",),
            )


SOLVERS: dict[str, type[SolverOptions]] = {kind.name: kind for kind in (Magnitude, Wanda, SparseGPT, MRP, ADMM)}


def read_solver(value: Any) -> Any:
    """A solver's options from its name, or from a mapping with `name`; options and solver objects pass.

    Raises:
        RecipeError: an unknown solver, a plug-in that can't be loaded, or an option it does not have.
    """
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        if isinstance(value, type) or not (isinstance(value, SolverOptions) or dataclasses.is_dataclass(value)):
            raise RecipeError(f"the solver is {value!r}: give its name, its options or a mapping with `name`")
        return value if isinstance(value, SolverOptions) else _given(value)
    values = dict(value)
    if "name" not in values:
        raise RecipeError("the solver's name is missing (for example `solver: {name: mrp}`)")
    name = values.pop("name")
    if not isinstance(name, str):
        raise RecipeError(f"the solver's name is {name!r}: it must be text", ("name",))
    kind = SOLVERS.get(name)
    if kind is None:
        return _plugin_options(name, values)
    if unknown := [key for key in values if key not in fields_of(kind)]:
        raise RecipeError(_unknown(name, str(unknown[0]), list(fields_of(kind))), (unknown[0],))
    try:
        return validated(kind, values)
    except RecipeError as error:
        raise RecipeError(f"solver.{error.raw}" if error.raw[0].islower() else error.raw, error.location) from None


@dataclasses.dataclass(frozen=True)
class UnknownSolver:
    """A solver of a report that is not installed here: its name and options, to be shown and written again."""

    name: str
    options: dict[str, Any]

    def __call__(self, *_: Any) -> Any:
        """Refuse to solve."""
        raise RecipeError(f"solver {self.name} is not installed here: pass the object, or install its package")


def with_unknown_solvers(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data in which solvers that are not installed are objects that can't solve."""

    def known_or_not(solver: Any) -> Any:
        name = solver.get("name") if isinstance(solver, Mapping) else None
        if not isinstance(name, str) or name in SOLVERS or name in _GIVEN:
            return solver
        return solver if name in entry_points(group="secateur.solvers").names else UnknownSolver(name, {**solver})

    rules = [
        {**rule, "solver": known_or_not(rule["solver"])} if isinstance(rule, Mapping) and "solver" in rule else rule
        for rule in (recipe.get("rules") or ())
    ]
    return {**recipe, "solver": known_or_not(recipe.get("solver")), **({"rules": rules} if rules else {})}


_GIVEN: dict[str, type] = {}  # solvers whose objects were passed, so that a recipe of this process can be read again


def _given(solver: Any) -> Any:
    """A solver object of the caller's, which needs no plug-in; its name is known from then on."""
    name = getattr(solver, "name", None)
    if not callable(solver) or not isinstance(name, str) or name in SOLVERS:
        raise RecipeError(
            f"the solver {type(solver).__name__} must be a dataclass with __call__(W, hessian, pattern), and with a "
            f"`name` that is none of {', '.join(SOLVERS)}"
        )
    if not isinstance(solver, UnknownSolver):
        _GIVEN[name] = type(solver)
    return solver


def _unknown(solver: str, option: str, known: list[str]) -> str:
    others = [name for name, kind in SOLVERS.items() if option in fields_of(kind)]
    hint = f" ({option} belongs to {', '.join(others)})" if others else nearest(option, known)
    has = f"its options are {', '.join(known)}" if known else "it has none"
    return f"solver {solver} has no option {option!r}: {has}{hint}"


def solver_names() -> list[str]:
    """Solvers of secateur and of plug-ins."""
    return sorted({*SOLVERS, *(point.name for point in entry_points(group="secateur.solvers"))})


def _plugin_options(name: str, values: dict[str, Any]) -> Any:
    """Options of a plug-in's solver; no other plug-in is loaded, so that a broken one stops nobody else."""
    kind = _GIVEN[name] if name in _GIVEN else _plugin(name)
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    if unknown := [key for key in values if key not in known]:
        raise RecipeError(_unknown(name, str(unknown[0]), known), (unknown[0],))
    _check_plugin_values(name, kind, values)
    try:
        made = kind(**values)
    except TypeError as error:
        raise RecipeError(f"solver {name}: {error}") from error
    if not callable(made):
        raise RecipeError(f"the plug-in of solver {name} has no __call__(W, hessian, pattern): it can't solve")
    return made


def _plugin(name: str) -> Any:
    """The options dataclass of a plug-in."""
    points = {point.name: point for point in entry_points(group="secateur.solvers")}
    if name not in points:
        known = solver_names()
        raise RecipeError(f"unknown solver {name!r}: choose one of {', '.join(known)}{nearest(name, known)}", ("name",))
    try:
        kind = points[name].load()
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RecipeError(f"the plug-in of solver {name} can't be loaded: {reason}", ("name",)) from error
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise RecipeError(f"the plug-in of solver {name} is {kind!r}: it must be a dataclass with a call", ("name",))
    own = getattr(kind, "name", None)
    if own != name:
        raise RecipeError(
            f"the plug-in of solver {name} has the `name` {own!r}: give the class the name of its entry point",
            ("name",),
        )
    return kind


def _check_plugin_values(name: str, kind: type, values: dict[str, Any]) -> None:
    """Check a plug-in's values against its annotations, as far as these can be resolved."""
    try:
        hints = get_type_hints(kind)
    except NameError as error:
        raise RecipeError(f"the plug-in of solver {name} has an annotation that can't be resolved: {error}") from error
    for key, value in values.items():
        try:
            TypeAdapter(hints[key], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            raise RecipeError(f"{key} is {value!r}: {explained(error, kind).raw.partition(': ')[2]}", (key,)) from error


def plain_solver(solver: Any) -> dict[str, Any]:
    """A solver's options as plain data, with its name."""
    if isinstance(solver, UnknownSolver):
        return solver.options
    values = plain(solver) if isinstance(solver, SolverOptions) else dataclasses.asdict(solver)
    return {"name": solver.name, **values}


def _schema() -> dict[str, Any]:
    """JSON schema of the solver section: the name alone, or a mapping with the solver's options."""
    sections = []
    for name, kind in SOLVERS.items():
        section = TypeAdapter(kind).json_schema()
        section["properties"] = {"name": {"const": name}} | section.get("properties", {})
        sections.append(section | {"required": ["name"], "title": name})
    other = {"type": "string", "not": {"enum": list(SOLVERS)}, "description": "A plug-in's name."}
    plugin = {"type": "object", "properties": {"name": other}, "required": ["name"]}
    return {"anyOf": [{"enum": list(SOLVERS)}, *sections, other, plugin]}


Solver = Annotated[Any, PlainValidator(read_solver), PlainSerializer(plain_solver), WithJsonSchema(_schema())]
