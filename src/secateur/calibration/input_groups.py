"""What the dense pass saw of each matrix, and what follows from it.

That is: groups of matrices with one input, routed experts, and matrices that stay dense or can't be pruned. Everything
here is a pure function of `Observations`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from secateur.errors import SecateurError, UnsupportedModelError
from secateur.models.blocks import Block
from secateur.models.matrices import Matrix, owner_of, parameter_of
from secateur.runtime import distributed

# Names of functions that multiply matrices: a weight that enters one must not be called dense.
PRODUCTS = {
    *("linear", "matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "grouped_mm", "scaled_mm"),
    # torch's own layers, which hide their products (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    *("multi_head_attention_forward", "native_multi_head_attention", "transformer_encoder_layer_fwd"),
}


@dataclass(eq=False)
class InputGroup:
    """Matrices with one input (q, k, v), and so one Hessian.

    Args:
        leader: the matrix whose uses are summed.
        members: every matrix of the group, with its input dimension.
    """

    leader: Matrix
    members: list[tuple[Matrix, int]] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """Number of inputs."""
        matrix, input_dim = self.members[0]
        return matrix.weight(input_dim).shape[1]

    @property
    def sum_bytes(self) -> int:
        """Bytes of the sum of a Hessian, in fp64."""
        return 8 * self.columns**2


@dataclass(eq=False)
class Observations:
    """What was seen of the matrices of some blocks, by matrix name.

    Args:
        tokens: real tokens that entered products.
        input_dim: stored dimension that inputs run along.
        inputs: numbers of the inputs of its products, in order; equal numbers are one tensor.
        other_uses: functions that took it in another way.
        sent: experts that are run by themselves.
        entered: modules that were called, as (block, path inside it).
    """

    tokens: dict[str, int] = field(default_factory=dict)
    input_dim: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, list[Any]] = field(default_factory=dict)
    other_uses: dict[str, set[str]] = field(default_factory=dict)
    sent: set[str] = field(default_factory=set)
    entered: set[tuple[str, str]] = field(default_factory=set)

    def of_all_ranks(self) -> Observations:
        """What all ranks saw, in the order of ranks, so every rank goes on with the same."""
        if distributed.world_size() == 1:
            return self
        together = Observations()
        for rank, part in enumerate(distributed.all_gather(self)):
            together.input_dim |= part.input_dim
            together.sent |= part.sent
            together.entered |= part.entered
            for name, count in part.tokens.items():
                together.tokens[name] = together.tokens.get(name, 0) + count
            for name, inputs in part.inputs.items():
                together.inputs.setdefault(name, []).extend((rank, number) for number in inputs)
            for name, uses in part.other_uses.items():
                together.other_uses.setdefault(name, set()).update(uses)
        return together


@dataclass(frozen=True, eq=False)
class ObservedBlock:
    """A block without the matrices that turned out to stay dense, and its groups in order of first use.

    Args:
        block: the block.
        groups: its matrices by input.
        missed: matrices that should be pruned but can't be observed, with the error of each.
    """

    block: Block
    groups: list[InputGroup]
    missed: dict[str, SecateurError]


def observed_block(block: Block, seen: Observations) -> ObservedBlock:
    """Sort a block's matrices by what was seen of them."""
    input_dim = dict(seen.input_dim)
    dense: dict[str, str] = {}
    missed: dict[str, SecateurError] = {}
    unused = [matrix for matrix in block.matrices if not seen.tokens.get(matrix.name)]
    for matrix in unused:
        kind = [name for name in seen.input_dim if matrix.index is not None and _is_same_kind(matrix, name)]
        if kind:  # an expert without tokens is used as the others of its kind are
            input_dim[matrix.name] = input_dim[kind[0]]
        elif reason := _why_unused(block, matrix, seen):
            dense[matrix.name] = reason
        else:
            missed[matrix.name] = _why_missed(matrix, seen)
    kept = [matrix for matrix in block.matrices if matrix.name not in dense]
    by_name = {matrix.name: matrix for matrix in kept}
    groups: dict[tuple[Any, ...], InputGroup] = {}
    for name, inputs in seen.inputs.items():
        if name in by_name:
            group = groups.setdefault(tuple(inputs), InputGroup(by_name[name]))
            group.members.append((by_name[name], input_dim[name]))
    never = [matrix for matrix in unused if matrix.name in input_dim and matrix.name not in seen.inputs]
    alone = [InputGroup(matrix, [(matrix, input_dim[matrix.name])]) for matrix in never]
    return ObservedBlock(replace(block, matrices=kept, dense=block.dense | dense), [*groups.values(), *alone], missed)


def _is_same_kind(expert: Matrix, name: str) -> bool:
    return parameter_of(name) == expert.parameter_name


def _why_unused(block: Block, matrix: Matrix, seen: Observations) -> str | None:
    """Why a matrix without a product stays dense; None where that must not pass.

    Two cases are fine: a module that is never called, though what it is a part of is (cross-attention without an
    encoder), and a bare parameter in no product (Mamba's A_log). A module's weight must be in a product.
    """
    if _is_never_called(block, matrix, seen):
        return "its module is never called on the calibration inputs"
    uses = seen.other_uses.get(matrix.name, set())
    module_weights = {id(module.weight) for module in block.module.modules() if hasattr(module, "weight")}
    if uses and not _products(uses) and id(matrix.parameter) not in module_weights:
        return f"enters no matrix product (used by {', '.join(sorted(uses))})"
    return None


def _why_missed(matrix: Matrix, seen: Observations) -> SecateurError:
    if products := _products(seen.other_uses.get(matrix.name, set())):
        return UnsupportedModelError(
            f"{matrix.name} enters {products[0]} in an unknown form, so its inputs can't be observed: leave it dense "
            f"with ‹exclude='{matrix.name}'›"
        )
    return SecateurError(
        f"{matrix.name} saw no calibration token: it entered no matrix product. Use more calibration text, or leave it "
        f"dense with ‹exclude='{matrix.name}'›"
    )


def _products(uses: set[str]) -> list[str]:
    return sorted(use for use in uses if use.rsplit(".", 1)[-1].strip("_") in PRODUCTS)


def _is_never_called(block: Block, matrix: Matrix, seen: Observations) -> bool:
    """Whether the matrix's module isn't called, in an element of a list (a layer, an expert) that is."""
    owner = owner_of(block.module, matrix)
    path = next(name for name, module in block.module.named_modules() if module is owner)
    if matrix.name in seen.other_uses or (block.name, path) in seen.entered:
        return False
    element, module, inside = "", block.module, ""
    for step in path.split("."):
        inside = f"{inside}.{step}" if inside else step
        element = inside if isinstance(module, nn.ModuleList | nn.ModuleDict) else element
        module = module.get_submodule(step)
    return (block.name, element) in seen.entered


def routed_matrices(blocks: Sequence[Block], seen: Observations, num_tokens: int) -> frozenset[str]:
    """Experts that a router sends tokens: slices of a 3-D parameter, and elements of a list that differ in tokens.

    A slice may see every token, and yet in another order than the rest of the block.
    Cross-attention sees another number of tokens than the rest of its block, but the same number in all its matrices.

    Args:
        blocks: the observed blocks.
        seen: what was seen of their matrices.
        num_tokens: real tokens of all batches.
    """
    routed: set[str] = set()
    for block in blocks:
        alike: dict[str, list[str]] = {}
        for matrix in block.matrices:
            if matrix.index is None:
                inside = matrix.name.removeprefix(block.name)
                alike.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", inside), []).append(matrix.name)
            elif matrix.name in seen.sent or (
                seen.tokens.get(matrix.name, 0) < num_tokens and _is_used(matrix, seen.input_dim)
            ):
                routed.add(matrix.name)
        for names in alike.values():
            if block.name and len({seen.tokens.get(name, 0) for name in names}) > 1:
                routed |= set(names)
    return frozenset(routed)


def _is_used(expert: Matrix, input_dim: Mapping[str, int]) -> bool:
    """Whether an expert, or another of its kind, is in a product."""
    return any(_is_same_kind(expert, name) for name in input_dim)


def observation_passes(groups: Sequence[InputGroup], hessian_bytes: int) -> list[list[InputGroup]]:
    """The groups that are observed at a time: as many as the sums of their Hessians fit into `hessian_bytes`."""
    found: list[list[InputGroup]] = []
    room = 0
    for group in groups:
        needed = group.sum_bytes
        if not found or needed > room:
            found.append([])
            room = hessian_bytes
        found[-1].append(group)
        room -= needed
    return found
