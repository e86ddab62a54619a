"""Options of the steps around a solver, one frozen dataclass each. `secateur.pruning` has the code that reads them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from secateur.recipe.declare import Field, Number, Whole, options

WIDTH_OF_RATES = 576  # channels of the model that rates were chosen on, SmolLM2-135M


@options
class DenseTarget:
    """Fit matrices to the dense model's outputs instead of what their own weights give on pruned inputs."""

    kind: Literal["dense", "residual"] = Field(
        default="dense",
        description="dense = the dense outputs; residual = dense, and writes into the residual stream also correct "
        "the block's output.",
    )
    strength: Number = Field(
        default=0.25, ge=0, le=1, description="From 0 (the matrix's own outputs) to 1, which overfits few tokens."
    )


@options
class SwapRefinement:
    """Exchange kept and pruned weights of a row until no exchange of two lowers the loss."""

    max_swaps: Whole = Field(default=1000, ge=1, description="Most exchanges per row.")
    tolerance: Number = Field(default=1e-4, gt=0, lt=1, description="Tolerance of the full-row refit that follows.")
    max_iterations: Whole = Field(default=200, ge=1, description="Iterations after which that refit stops anyway.")


@options
class BlockRefit:
    """Hold the masks of a block and move its kept weights until its output matches the dense block's, by Adam."""

    epochs: Whole = Field(default=4, ge=0, description="Epochs over the calibration batches.")
    max_tokens: Whole | None = Field(
        default=None,
        ge=1,
        description="Cap on the tokens of all epochs together: of a longer text there are fewer epochs, at least one.",
    )
    rate: Number = Field(
        default=0.025,
        gt=0,
        lt=1,
        description="Peak learning rate, relative to the RMS of a matrix's kept weights. "
        f"Above {WIDTH_OF_RATES} channels it falls in proportion to the width. If the validation loss does not fall, "
        "a quarter of it is tried, then a sixteenth.",
    )
    val_fraction: Number = Field(
        default=0.0625,
        gt=0,
        lt=1,
        description="Validation share of the calibration batches; it decides which epoch is used.",
    )
    step_tokens: Whole = Field(
        default=512, ge=1, description="Tokens of a step, in whole sequences; a batch of your own tensors is one step."
    )
    strength: Number = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Target: from 0, the dense block on pruned inputs, to 1, the dense block on dense inputs.",
    )
    prediction_blocks: Whole = Field(
        default=0,
        ge=0,
        description="How many of the last blocks aim at the dense model's predictions (by their divergence) instead of "
        "the dense block's output; only for models that predict a token at every position.",
    )

    def over_tokens(self, tokens: int) -> BlockRefit:
        """These options for a text of `tokens`: as many epochs as `max_tokens` allows, at least one."""
        if self.max_tokens is None or self.epochs <= 1:
            return self
        return replace(self, epochs=max(1, min(self.epochs, self.max_tokens // tokens)))

    def at_width(self, channels: int) -> BlockRefit:
        """These options for hidden states of `channels`: above `WIDTH_OF_RATES` the rate falls in proportion.

        Adam moves every weight by about the rate, whatever its gradient is, and an output sums over its inputs. So at
        one rate a step moves the outputs of a wide matrix further (as in arXiv 2203.03466).
        """
        return replace(self, rate=self.rate * min(1.0, WIDTH_OF_RATES / channels))


@options
class Allocation:
    """Spread the zeros of `pattern` over the matrices; their total stays exact."""

    rule: Literal["owl", "curve"] = Field(
        default="curve",
        description="owl = blocks with many outliers lose less (arXiv 2310.05175); curve = minimise measured layer "
        "losses, weighted by the Fisher information of each output row.",
    )
    spread: Number = Field(default=0.3, gt=0, lt=1, description="How far a matrix may be from the global sparsity.")
    tokens: Whole = Field(
        default=16_384, ge=1, description="Calibration tokens that the allocation looks at, in whole sequences."
    )


@options
class ChannelPermutation:
    """Before an n:m pattern, put channels in an order in which fewer large weights share a group.

    The dense model computes the same in it. Adapters made for the dense model do not fit the reordered one.
    """

    rounds: Whole = Field(
        default=4, ge=1, description="Most rounds of the search; each moves one channel of every group."
    )
    sequences: Whole = Field(default=8, ge=1, description="Calibration sequences that the search looks at.")
