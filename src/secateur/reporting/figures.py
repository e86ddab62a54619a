"""Figures of a run: of each matrix, block and stage, and what was measured of the finished model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MatrixReport:
    """One pruned matrix.

    Args:
        name: its path without `.weight`.
        rows, columns: outputs and inputs.
        input_dim: stored dimension that inputs run along (0 for GPT-2's transposed `Conv1D`).
        pattern: its pattern.
        zeros: zeros of the pruned matrix, with those that it had before.
        relative_error: `tr(D H D^T) / tr(W H W^T)` as the solver left it, H undamped; a block refit comes later.
        target_error: the same against the weights of a dense target; None without one.
        seconds: of the matrix: target, solver, exchanges, and these figures.
        tokens: real tokens that it saw.
        borrowed: share of H from tokens that a router sends to other experts.
        solver: the solver's name.
        figures: the solver's figures.
    """

    name: str
    rows: int
    columns: int
    input_dim: int
    pattern: str
    zeros: int
    relative_error: float
    target_error: float | None
    seconds: float
    tokens: int
    borrowed: float
    solver: str
    figures: dict[str, Any]

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / (self.rows * self.columns)


OUTPUT_ERROR, PREDICTIONS = "output error", "divergence of predictions"


@dataclass(frozen=True)
class BlockReport:
    """One block's refit.

    Args:
        name: the block's path.
        objective: what it minimised: `OUTPUT_ERROR`, or `PREDICTIONS` near the end of a model.
        val_loss_before, val_loss_after: that loss on the validation batches.
        best_epoch: epoch whose weights are used, the last where a part of the way to its weights is; 0 = as solved.
        rate: learning rate of that epoch, or of the last attempt.
        seconds: of the refit.
    """

    name: str
    objective: str
    val_loss_before: float
    val_loss_after: float
    best_epoch: int
    rate: float
    seconds: float


@dataclass(frozen=True)
class DepthReport:
    """How far the hidden states after a block are from the dense model's, on one batch.

    Args:
        block: the block's path.
        cosine: mean cosine of a token's pruned and dense hidden states.
        relative_error: `||pruned - dense|| / ||dense||`.
    """

    block: str
    cosine: float
    relative_error: float


@dataclass(frozen=True)
class StageReport:
    """What a stage of the run took.

    Args:
        name: as the progress shows it.
        seconds: from the end of the stage before it to its end.
        memory_bytes: most resident memory of the process, up to its end.
    """

    name: str
    seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class MeasuredPerplexity:
    """Perplexity of the pruned model on a text.

    Args:
        text: its name.
        perplexity: of the pruned model.
        targets: predicted tokens.
        seq_len: tokens of a window.
        dense: perplexity of the dense model.
        kl: mean KL divergence from the dense model's predictions, in nats.
        top1_agreement: share of tokens where both models' most likely token is the same.
    """

    text: str
    perplexity: float
    targets: int
    seq_len: int
    dense: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None

    @property
    def what(self) -> tuple[str, int, int]:
        """What was measured: only figures of the same text, window and number of tokens compare."""
        return self.text, self.seq_len, self.targets


@dataclass(frozen=True)
class Speed:
    """What one model takes, and how fast it is.

    Args:
        model: its folder or name.
        file_bytes: of its weight files.
        memory_bytes: resident memory that the process gained by loading the model and running it.
        load_seconds: until it is in memory.
        prefill_tokens_per_second: of a prompt.
        decode_tokens_per_second: of the tokens after it, one at a time; the prompt's time is subtracted.
        threads: that torch used.
    """

    model: str
    file_bytes: int
    memory_bytes: int
    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class BlockFigures:
    """What pruning one block gave.

    Args:
        matrices: figures of its matrices.
        refit: figures of its refit, where there was one.
        chunk: bytes that solvers' temporaries were limited to at its end; None = the default.
    """

    matrices: list[MatrixReport]
    refit: BlockReport | None
    chunk: int | None = None
