"""How far the pruned model's hidden states are from the dense model's, behind each block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.calibration.stream import Stream
from secateur.models.blocks import Block
from secateur.reporting.figures import DepthReport
from secateur.runtime import distributed


class DepthMeter:
    """Follows the first batch of rank 0 through the dense blocks, and compares the pruned model's hidden states.

    Each chain starts anew: a decoder's blocks are compared on what the pruned encoder gives.

    Cost: one forward of each block on one batch, and none where the stream carries the dense hidden states already.
    """

    def __init__(self, stream: Stream) -> None:
        """Begin in front of a chain's first block."""
        self.stream = stream
        self.dense = stream.hidden[0]

    def advance_dense(self, block: Block, outputs: Sequence[Tensor] | None) -> None:
        """Go through a block that is still dense.

        Args:
            block: the block.
            outputs: its outputs in the dense model, batch by batch, where they are known.
        """
        if outputs is not None:
            self.dense = outputs[0]
        elif _is_part(block) and distributed.is_main():
            self.dense = self._replayed(block, self.dense, of_dense=True)

    def measure(self, block: Block) -> list[DepthReport]:
        """Compare with the pruned hidden states behind a block, which the stream has passed unless it is the last.

        Returns:
            the figures, the same on all ranks; nothing where they are not finite, or the block is the whole model.
        """
        found = None
        if _is_part(block) and distributed.is_main():
            is_last = block.name in self.stream.calls
            hidden = self._replayed(block, self.stream.hidden[0]) if is_last else self.stream.hidden[0]
            found = distance(block.name, hidden, self.dense, self.stream.real[0])
        found = distributed.broadcast_object(found)
        return [] if found is None else [found]

    def _replayed(self, block: Block, hidden: Tensor, of_dense: bool = False) -> Tensor:
        call = self.stream.calls[block.name][0]
        gpus = range(torch.cuda.device_count())
        with torch.random.fork_rng(gpus):  # a few models draw random numbers, and the run's must stay what they were
            return (call.of_dense if of_dense else call).replay(block, hidden.clone())


def _is_part(block: Block) -> bool:
    return block.name != ""


def distance(block: str, pruned: Tensor, dense: Tensor, real: Tensor | None) -> DepthReport | None:
    """Cosine and relative error of hidden states (..., C), without padded positions (`real` = False)."""
    pruned, dense = (states.float().flatten(0, -2) for states in (pruned, dense))
    if real is not None and real.numel() == len(dense):
        pruned, dense = (states[real.flatten().to(states.device)] for states in (pruned, dense))
    cosine = float(torch.cosine_similarity(pruned, dense, dim=-1).mean())
    error = float((pruned - dense).norm() / dense.norm().clamp_min(1e-12))
    return DepthReport(block, cosine, error) if math.isfinite(cosine) and math.isfinite(error) else None
