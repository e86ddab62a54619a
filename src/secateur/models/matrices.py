"""The prunable matrices of a module, and which of them a recipe prunes.

Shape legend: R output rows, C input columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from secateur.errors import UnsupportedModelError
from secateur.recipe.recipe import Recipe
from secateur.recipe.rules import check_rules_match, rule_for

# What stays dense inside a block, and why: expressions on the path inside a layer. A rule with `dense: false` wins.
DENSE_BY_DEFAULT: tuple[tuple[str, str], ...] = (
    (r"(^|\.)(\w*router\w*|gate|shared_expert_gate)(\.|$)", "router"),
    # DBRX's `norm_attn_norm` is its attention, with the norms around it.
    (r"(^|\.)(?!norm_attn_norm)(\w*_?norm|ln_\w+|layernorm\w*)(\.|$)", "norm"),
    (r"(^|\.)attention_input\.query(\[|$)", "learned queries"),
)


@dataclass(frozen=True, eq=False)
class Matrix:
    """One prunable matrix: a 2-D parameter, or one slice of a 3-D one (an expert).

    Args:
        name: its path in the model without `.weight`; an expert's ends in `[index]`.
        parameter: the parameter that holds it.
        index: the slice of a 3-D parameter.
    """

    name: str
    parameter: nn.Parameter
    index: int | None = None

    @property
    def parameter_name(self) -> str:
        """Path of the parameter without `.weight`: the name without an expert's index."""
        return self.name if self.index is None else parameter_of(self.name)

    @property
    def stored(self) -> Tensor:
        """The matrix as it lies in memory (a view)."""
        return self.parameter.data if self.index is None else self.parameter.data[self.index]

    def weight(self, input_dim: int) -> Float[Tensor, "R C"]:
        """The matrix as (outputs, inputs), a view: transposed where inputs are stored first (`Conv1D`)."""
        return self.stored if input_dim == 1 else self.stored.T


def parameter_of(matrix_name: str) -> str:
    """Path of the parameter that holds a matrix of this name; experts share one."""
    return re.sub(r"\[\d+\]$", "", matrix_name)


def layer_of(name: str) -> str:
    """The layer that a parameter is in, up to and with the dot behind its number; "" outside of the layers."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else ""


def matrices_of(path: str, module: nn.Module) -> list[Matrix]:
    """Every floating-point matrix of a module: 2-D parameters, and slices of 3-D ones; no convolutions.

    A matrix that the module holds in several places comes once, by its first path.

    Raises:
        UnsupportedModelError: a matrix that is computed before each call.
    """
    matrices = []
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)
    for module_name, part in module.named_modules():
        if isinstance(part, (nn.Embedding, *convolutions)):
            continue
        if computed := _computed_weight(part):
            raise UnsupportedModelError(
                f"{'.'.join(filter(None, (path, module_name)))}.{computed} is computed from other parameters before "
                f"each call, so pruning those would do nothing: make it plain by torch.nn.utils.prune.remove, "
                f"remove_weight_norm or parametrize.remove_parametrizations"
            )
        for parameter_name, parameter in part.named_parameters(recurse=False):
            if not parameter.is_floating_point() or parameter.ndim not in (2, 3) or min(parameter.shape) < 2:
                continue
            last = "" if parameter_name == "weight" else parameter_name
            name = ".".join(filter(None, (path, module_name, last)))
            if parameter.ndim == 2:
                matrices.append(Matrix(name, parameter))
            else:
                matrices += [Matrix(f"{name}[{index}]", parameter, index) for index in range(len(parameter))]
    return matrices


def _computed_weight(module: nn.Module) -> str | None:
    """Name of a matrix that the module computes from other parameters (torch's pruning, weight norm)."""
    if is_parametrized(module):
        return next(iter(module.parametrizations))  # pyright: ignore[reportArgumentType, reportCallIssue]
    own = module._parameters
    computed = (name.rpartition("_")[0] for name in own if name.endswith(("_orig", "_g")))
    return next((name for name in computed if name and name not in own and hasattr(module, name)), None)


def owner_of(module: nn.Module, matrix: Matrix) -> nn.Module:
    """The submodule that holds a matrix's parameter."""
    for part in module.modules():
        if any(parameter is matrix.parameter for parameter in part.parameters(recurse=False)):
            return part
    raise AssertionError(f"{matrix.name} is not in the module")


@dataclass(frozen=True)
class MatrixFilter:
    """Splits matrices into those that a recipe prunes and those that stay dense.

    Args:
        recipe: its rules decide; where none matches, `DENSE_BY_DEFAULT` does.
    """

    recipe: Recipe

    def partition(self, matrices: Iterable[Matrix]) -> tuple[list[Matrix], dict[str, str]]:
        """The matrices to prune, and why each of the others stays dense."""
        pruned: list[Matrix] = []
        dense: dict[str, str] = {}
        for matrix in matrices:
            if reason := self.why_dense(matrix.name):
                dense[matrix.name] = reason
            else:
                pruned.append(matrix)
        return pruned, dense

    def why_dense(self, name: str) -> str | None:
        """Why a matrix stays dense; None where it is pruned."""
        rule = rule_for(self.recipe, name)
        if rule is not None and rule.dense is True:
            return f"a rule leaves {' and '.join(map(repr, rule.match))} dense"
        if rule is not None and rule.dense is False:
            return None
        inside = re.split(r"\.\d+\.", name, maxsplit=1)[-1]
        return next((reason for expression, reason in DENSE_BY_DEFAULT if re.search(expression, inside)), None)

    def check_all_matched(self, names: Iterable[str]) -> None:
        """Check that every glob of the rules matches one of the names.

        Raises:
            SecateurError: one does not.
        """
        check_rules_match(self.recipe.rules, [*names])


def all_parameters(model: Any) -> int:
    """Number of weights of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
