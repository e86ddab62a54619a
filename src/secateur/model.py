"""A model as the engine sees it: decoder blocks, the prunable matrices in each, and how each block is called.

Families are found by introspection. Exceptions are rows of a table, never a class or a branch per family.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from secateur.observe import Matrix

# What stays dense inside a block, and why: patterns on the matrix's path. The field's habit, not a law: --include wins.
DENSE_RULES: tuple[tuple[str, str], ...] = (
    (r"(^|\.)(\w*router|gate|shared_expert_gate)(\.(weight|proj|classifier|linear|layer))*$", "router"),
    (r"(^|\.)(\w*_?norm|ln_\w+|layernorm\w*)(\.|$)", "norm"),
)


class UnsupportedModelError(ValueError):
    """The model can't be pruned as it is; the message says what was found and what to do."""


@dataclass(eq=False)
class Block:
    """One decoder block: its path, module, prunable matrices, and the matrices left dense with the reason."""

    name: str
    module: nn.Module
    matrices: list[Matrix] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Call:
    """How a block was called on one batch, but for its hidden states, which each replay supplies."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_name: str | None

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
        """Separate the hidden states (first positional, or by name) from the rest of a call."""
        if args and isinstance(args[0], Tensor):
            return args[0], cls(args[1:], dict(kwargs), None)
        name = "hidden_states"
        return kwargs[name], cls(args, {key: value for key, value in kwargs.items() if key != name}, name)

    def replay(self, block: Block, hidden: Tensor) -> Tensor:
        """Run the block; returns its new hidden states, whether it gives a tensor or a tuple."""
        args, kwargs = self.with_hidden(hidden)
        return hidden_of(block.module(*args, **kwargs), block)

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with these hidden states."""
        if self.hidden_name is None:
            return (hidden, *self.args), self.kwargs
        return self.args, self.kwargs | {self.hidden_name: hidden}


def hidden_of(output: Any, block: Block) -> Tensor:
    """The hidden states in a block's output. A tensor is taken whole: indexing it would take batch item 0."""
    first = output if isinstance(output, Tensor) else output[0]
    if not isinstance(first, Tensor):
        raise UnsupportedModelError(f"block {block.name} returns {type(first).__name__}, not a tensor of hidden states")
    return first


def find_blocks(model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> list[Block]:
    """The decoder blocks: the children of the outermost `ModuleList` that holds the most matrix weights.

    Args:
        include: glob patterns on matrix paths; where given, only these are pruned, rules for dense ones or not.
        exclude: glob patterns on matrix paths to leave dense.

    Raises:
        UnsupportedModelError: no list of blocks with a prunable matrix.
        ValueError: a pattern that matches no matrix.
    """
    include, exclude = list(include), list(exclude)
    name, layers = _largest_module_list(model)
    blocks = [Block(f"{name}.{index}", layer) for index, layer in enumerate(layers)]
    unmatched = set(include) | set(exclude)
    for block in blocks:
        for matrix in _all_matrices(block):
            path = matrix.name
            unmatched -= {glob for glob in unmatched if _matches(path, glob)}
            if reason := _why_dense(path, include, exclude):
                block.dense[path] = reason
            else:
                block.matrices.append(matrix)
    if unmatched:
        some = [matrix.name for matrix in _all_matrices(blocks[0])][:8]
        raise ValueError(
            f"no matrix matches {', '.join(sorted(map(repr, unmatched)))}: patterns are globs on paths such as "
            f"{', '.join(some)}"
        )
    _check_unshared(blocks)
    if not any(block.matrices for block in blocks):
        raise UnsupportedModelError(f"no prunable matrix is left in the {len(blocks)} blocks of {name}")
    return blocks


def check_runnable(model: nn.Module) -> None:
    """Raise UnsupportedModelError for models whose forward can't be watched, naming the remedy."""
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise UnsupportedModelError(
                f"{name or 'the model'} carries an accelerate offload hook, which moves weights while they are "
                f"watched: load the model without device_map, or call "
                f"accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise UnsupportedModelError(
                f"{name or 'the model'} is compiled, which hides the use of its weights: pass the model as it was "
                f"before torch.compile"
            )
    quantised = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantised is not None:
        raise UnsupportedModelError(
            "the model is quantised: load it dequantised (secateur prunes floating-point weights)"
        )


def check_finite_weights(model: nn.Module) -> None:
    """Raise ValueError naming the first parameter with a NaN or an infinity. Cost: one read of the model."""
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not bool(torch.isfinite(parameter.data).all()):
            bad = int((~torch.isfinite(parameter.data)).sum())
            raise ValueError(f"{name} has {bad} weights that are NaN or infinite: the checkpoint is damaged")


def _check_unshared(blocks: list[Block]) -> None:
    """Raise UnsupportedModelError where two matrices are one tensor: they can't be pruned one after the other."""
    seen: dict[tuple[int, int], str] = {}
    for block in blocks:
        for matrix in block.matrices:
            place = (matrix.stored.data_ptr(), matrix.stored.numel())
            if matrix.parameter.device.type != "meta" and seen.setdefault(place, matrix.name) != matrix.name:
                raise UnsupportedModelError(
                    f"{matrix.name} and {seen[place]} are one tensor, and weights that are shared can't be pruned "
                    f"block by block: leave them dense with --exclude"
                )


def _largest_module_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    best: tuple[int, str, nn.ModuleList] | None = None
    outermost: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(outer + ".") for outer in outermost):
            continue
        outermost.append(name)
        size = sum(parameter.numel() for parameter in module.parameters() if parameter.ndim >= 2)
        if size and (best is None or size > best[0]):
            best = (size, name, module)
    if best is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no prunable block: no ModuleList of layers that hold matrices was found"
        )
    return best[1], best[2]


def _all_matrices(block: Block) -> list[Matrix]:
    """Every floating-point matrix of a block: 2-D parameters, and the slices of 3-D ones that are not convolutions."""
    matrices = []
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)
    for module_name, module in block.module.named_modules():
        if isinstance(module, (nn.Embedding, *convolutions)):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_floating_point() or parameter.ndim not in (2, 3) or min(parameter.shape) < 2:
                continue
            own = () if parameter_name == "weight" else (parameter_name,)
            path = ".".join((block.name, *filter(None, (module_name,)), *own))
            if parameter.ndim == 2:
                matrices.append(Matrix(path, parameter))
            else:
                matrices += [Matrix(f"{path}[{index}]", parameter, index) for index in range(len(parameter))]
    return matrices


def _matches(path: str, glob: str) -> bool:
    """Whether a glob means a path, or spells it out: an expert's ends in brackets, which a glob reads as a set."""
    return path == glob or fnmatchcase(path, glob)


def _why_dense(path: str, include: list[str], exclude: list[str]) -> str | None:
    if any(_matches(path, glob) for glob in exclude):
        return "excluded"
    if include:
        return None if any(_matches(path, glob) for glob in include) else "not included"
    return next((reason for rule, reason in DENSE_RULES if re.search(rule, path)), None)
