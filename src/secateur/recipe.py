"""From what a user asks for to a plan: presets of effort, and every setting that is given wins over them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from secateur.allocation import Allocation
from secateur.engine import Plan
from secateur.pattern import NM, Pattern
from secateur.refit import BlockRefit
from secateur.solvers import make_solver
from secateur.solvers.contract import check_kind
from secateur.solvers.mrp import check_mask
from secateur.solvers.swap import Swaps
from secateur.target import Target

DEFAULT_EFFORT = "balanced"
# Chosen by measurement: docs/benchmarks.md.
EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {"method": "mrp"},
    "balanced": {
        "method": "mrp",
        "tolerance": 0.02,
        "refit": "block",
        "refit_passes": 1,
        "refit_rate": 0.00625,
        "allocation": "curve",
        "allocation_windows": 4,
    },
    "best": {
        "method": "admm",
        "search_iterations": 12,
        "refit": "block",
        "refit_passes": 4,
        "refit_step_tokens": 1024,
        "refit_held_out": 0.125,
        "allocation": "curve",
    },
}
# An allocation is for unstructured patterns: to mix n:m patterns, which hardware for one of them can't run, has to be
# asked for. The time goes to the search there, which n:m patterns need more.
EFFORTS_AT_NM: dict[str, dict[str, Any]] = {
    "balanced": {"refit_strength": 0.6},
    "best": {"refit_strength": 0.6, "search_iterations": 40},
}
# Setting -> (choice that turns its step on, field of the step's dataclass).
_STEP_FIELDS: dict[str, dict[str, str]] = {
    "target": {"target_strength": "strength"},
    "refine": {"max_swaps": "max_swaps"},
    "refit": {
        "refit_passes": "passes",
        "refit_rate": "rate",
        "refit_held_out": "held_out",
        "refit_step_tokens": "step_tokens",
        "refit_strength": "strength",
    },
    "allocation": {"allocation_spread": "spread", "allocation_windows": "windows"},
}
_STEPS: dict[str, type] = {"target": Target, "refine": Swaps, "refit": BlockRefit, "allocation": Allocation}
SETTINGS = {"method", *_STEP_FIELDS, *(name for fields in _STEP_FIELDS.values() for name in fields)}


def make_plan(
    pattern: Pattern,
    effort: str | None = None,
    settings: dict[str, Any] | None = None,
    storage_dtype: dict[str, torch.dtype] | None = None,
    **others: Any,
) -> Plan:
    """The plan of a run.

    Args:
        effort: `fast`, `balanced` or `best`: settings that hold where none are given. With None, `balanced`, unless a
            method is named: that stands alone, as the field knows it.
        settings: by name, None = not given. Those of SETTINGS, and the method's own options.
        others: fields of the plan as they are.

    Raises:
        ValueError: an unknown effort, choice or option, a value out of range, or a setting of a step that is off.
    """
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    chosen = _preset(effort, given, pattern) | given
    method = chosen.pop("method")
    if not isinstance(others.get("true_sequential", False), bool):
        raise ValueError(f"true_sequential is {others['true_sequential']!r}; it must be true or false")
    _check_pattern(pattern, chosen)
    steps = {step: chosen.pop(step, None) for step in _STEP_FIELDS}
    _check(steps["refine"], "refine", ("none", "swap"))
    _check(steps["refit"], "refit", ("none", "block"))
    of_step = {step: _take(chosen, step, steps[step]) for step in _STEP_FIELDS}
    return Plan(
        pattern,
        make_solver(method, chosen),
        method=method,
        swaps=_swaps(of_step["refine"], chosen) if steps["refine"] == "swap" else None,
        target=Target(steps["target"] or "pruned", **of_step["target"], **_damping(chosen)),
        refit=BlockRefit(**of_step["refit"]) if steps["refit"] == "block" else None,
        allocation=Allocation(steps["allocation"] or "uniform", **of_step["allocation"], **_damping(chosen)),
        effort=effort or (None if "method" in given else DEFAULT_EFFORT),
        storage_dtype=storage_dtype,
        **others,
    )


def read_value(text: str) -> Any:
    """A setting as it is written in a command: what reads as JSON (numbers, booleans) is that, the rest is text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, for the report: every step that is on, with its settings."""
    recipe: dict[str, Any] = {"pattern": str(plan.pattern), "method": plan.method, "options": _fields(plan.solver)}
    recipe |= {name: list(getattr(plan, name)) for name in ("include", "exclude")}
    recipe["effort"] = plan.effort
    recipe["max_memory"] = plan.memory.limit  # it sets the chunks, and they the last bits
    recipe |= {"true_sequential": plan.true_sequential, "target": plan.target.kind}
    if plan.target.kind != "pruned":
        recipe["target_strength"] = plan.target.strength
    recipe["refine"] = _fields(plan.swaps) if plan.swaps else "none"
    recipe["refit"] = _fields(plan.refit) if plan.refit else "none"
    uniform = plan.allocation.rule == "uniform"
    recipe["allocation"] = "uniform" if uniform else _fields(plan.allocation)
    return recipe


def in_words(recipe: dict[str, Any]) -> str:
    """A recipe's method and steps in a line: `admm, allocation curve, block refit of 4 passes`."""
    parts = [recipe["method"]]
    if recipe["target"] != "pruned":
        parts.append(f"{recipe['target']} target of strength {recipe['target_strength']:g}")
    if recipe["allocation"] != "uniform":
        parts.append(f"allocation {recipe['allocation']['rule']}")
    if recipe["refine"] != "none":
        parts.append("refined by swaps")
    if recipe["refit"] != "none":
        passes = recipe["refit"]["passes"]
        parts.append(f"block refit of {passes} pass{'es' * (passes != 1)}")
    return ", ".join(parts)


def _preset(effort: str | None, given: dict[str, Any], pattern: Pattern) -> dict[str, Any]:
    """What the effort says, but for what belongs to choices that are given otherwise."""
    if effort is not None and effort not in EFFORTS:
        raise ValueError(f"effort is {effort!r}; it must be one of {', '.join(EFFORTS)}")
    if effort is None and "method" in given:
        return {}
    effort = effort or DEFAULT_EFFORT
    preset = EFFORTS[effort] | (EFFORTS_AT_NM.get(effort, {}) if isinstance(pattern, NM) else {})
    changed = {name for name in ("method", *_STEP_FIELDS) if name in given and given[name] != preset.get(name)}
    if isinstance(pattern, NM):
        changed.add("allocation")
    dropped = {field for step in changed & set(_STEP_FIELDS) for field in _STEP_FIELDS[step]}
    if "method" in changed:
        dropped |= set(preset) - SETTINGS
    return {name: value for name, value in preset.items() if name not in dropped | changed}


def _check_pattern(pattern: Pattern, chosen: dict[str, Any]) -> None:
    """Raise ValueError for choices that have no form for the pattern."""
    if isinstance(pattern, NM) and chosen.get("allocation") == "owl":
        raise ValueError(f"allocation owl has no form for {pattern}: use curve, which mixes patterns of one m")
    check_mask(chosen.get("mask"), pattern)


def _check(value: str | None, name: str, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def _take(chosen: dict[str, Any], step: str, choice: str | None) -> dict[str, Any]:
    """The settings of one step, taken out of `chosen`; they need the step to be on."""
    taken = {field: chosen.pop(name) for name, field in _STEP_FIELDS[step].items() if name in chosen}
    for name, field in _STEP_FIELDS[step].items():
        if field in taken:
            check_kind(_STEPS[step], field, taken[field], name)
    if taken and choice in (None, "none", "pruned", "uniform"):
        names = ", ".join(name for name, field in _STEP_FIELDS[step].items() if field in taken)
        raise ValueError(f"{names} is given, but {step} is {choice or 'off'}: choose a {step} too")
    return taken


def _damping(chosen: dict[str, Any]) -> dict[str, Any]:
    """The damping of the method holds for the steps around it too."""
    return {"damping": chosen["damping"]} if "damping" in chosen else {}


def _swaps(fields: dict[str, Any], chosen: dict[str, Any]) -> Swaps:
    return Swaps(**fields, **_damping(chosen))


def _fields(step: Any) -> dict[str, Any]:
    return {field.name: value for field in dataclasses.fields(step) if (value := getattr(step, field.name)) is not None}
