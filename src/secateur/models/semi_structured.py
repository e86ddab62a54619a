"""2:4 matrices on an NVIDIA GPU, by torch's semi-structured tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from secateur.errors import SecateurError

# What both of torch's backends (cuSPARSELt and CUTLASS) take.
ROWS, COLUMNS = 32, 64
DTYPES = (torch.bfloat16, torch.float16)


def to_semi_structured(model: nn.Module) -> list[str]:
    """Let an NVIDIA GPU multiply by the 2:4 matrices of a model on its sparse tensor cores. Untested on a GPU.

    For prompts and large batches; decoding one token at a time may become slower than dense. The weight of every linear
    layer that is 2:4 becomes a tensor of `torch.sparse`, in place and for inference: save the model before.

    Args:
        model: on a GPU, in bfloat16 or float16.

    Returns:
        names of the layers whose weight is such a tensor now.

    Raises:
        SecateurError: it is not on a GPU, or no linear layer is 2:4 in a size and dtype that torch takes.

    Cost: 9/16 of the dense weights in memory, and both at once for one matrix.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not linears or not all(linear.weight.is_cuda for linear in linears.values()):
        raise SecateurError(
            "to_semi_structured() needs a model whose linear layers are on an NVIDIA GPU: model.to('cuda')"
        )
    done = [name for name, linear in linears.items() if isinstance(linear.weight, SparseSemiStructuredTensor)]
    dense = {name: linear for name, linear in linears.items() if name not in done}
    found = [name for name, linear in dense.items() if _is_taken(linear.weight) and is_two_four(linear.weight)]
    if not done and not found:
        raise SecateurError(
            f"no linear layer is 2:4 in bfloat16 or float16 with multiples of {ROWS} rows and {COLUMNS} columns: prune "
            f"with ‹pattern› 2:4"
        )
    for name in found:
        weight = linears[name].weight
        sparse: Tensor = to_sparse_semi_structured(weight.detach().contiguous())
        linears[name].weight = nn.Parameter(sparse, requires_grad=False)
    return [name for name in linears if name in {*done, *found}]


def is_two_four(weight: Tensor) -> bool:
    """Whether at most two of every four consecutive weights of a row are nonzero."""
    groups = weight.detach().reshape(-1, 4) != 0
    return int(groups.sum(1).max()) <= 2


def _is_taken(weight: Tensor) -> bool:
    rows, columns = weight.shape
    return weight.dtype in DTYPES and rows % ROWS == 0 and columns % COLUMNS == 0
