"""What pruning takes for models from 135M to 70B, estimated by the dry run's model.

    python benchmarks/scale.py --out benchmarks/results/scale.json

For each shape a random model with two of its blocks is written to a scratch folder, and `secateur.dry_run` prunes one
of them on a few batches. Time is scaled to the shape's number of blocks. Blocks of the larger shapes take a small
machine hours: their times are those of the 1.5B shape, scaled by weights (what grows with the text) and by R C^2.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import arguments_of, write_result
from transformers import AutoModelForCausalLM, LlamaConfig

import secateur

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

VOCABULARY = 512  # of the random models
SHARD = 5_000_000_000


@dataclass(frozen=True)
class Shape:
    """A Llama-like model."""

    name: str
    hidden: int
    mlp: int
    blocks: int
    kv_share: float
    vocabulary: int
    tied: bool

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Rows and columns of a block's matrices."""
        kv = int(self.hidden * self.kv_share)
        attention = [(self.hidden, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, self.hidden)]
        return [*attention, (self.mlp, self.hidden), (self.mlp, self.hidden), (self.hidden, self.mlp)]

    @property
    def block_weights(self) -> int:
        """Weights of a block's matrices."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def solver_work(self) -> int:
        """R C^2, summed over a block."""
        return sum(rows * columns**2 for rows, columns in self.matrices)

    @property
    def outside(self) -> int:
        """Weights outside of the blocks."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def weights(self) -> int:
        """All weights."""
        return self.blocks * self.block_weights + self.outside


SHAPES = (
    Shape("135M (SmolLM2)", 576, 1536, 30, 1 / 3, 49152, True),
    Shape("1.5B (Qwen2.5)", 1536, 8960, 28, 1 / 6, 151936, False),
    Shape("7B (Llama-2)", 4096, 11008, 32, 1.0, 32000, False),
    Shape("70B (Llama-3)", 8192, 28672, 80, 1 / 8, 128256, False),
)
LARGEST = 1  # of the shapes that are tried


def main() -> None:
    """Estimate every shape."""
    args = arguments_of(__doc__, recipes=["fast", "balanced"], samples=128, seq_len=2048)
    rows: list[dict[str, Any]] = []
    for recipe in args.recipes:
        known: dict[str, Any] = {}
        for number, shape in enumerate(SHAPES):
            found = extrapolated(shape, known) if number > LARGEST else estimated(shape, recipe, args)
            known = found if number <= LARGEST else known
            rows.append({"model": shape.name, "recipe": recipe, "weights": shape.weights, **found})
            print(rows[-1], flush=True)
            write_result(args.out, {"samples": args.samples, "seq_len": args.seq_len, "rows": rows})


def estimated(shape: Shape, recipe: str, args: Any) -> dict[str, Any]:
    """Time, memory and disk of a shape, from a dry run on two of its blocks."""
    heads = shape.hidden // 64
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.mlp, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=max(1, int(heads * shape.kv_share)), vocab_size=VOCABULARY, max_position_embeddings=4096,
        dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    with TemporaryDirectory() as scratch:
        model: Any = AutoModelForCausalLM.from_config(config)
        model.to(torch.bfloat16).save_pretrained(scratch)
        del model
        found = secateur.dry_run(scratch, recipe=recipe, calibration=tokens(scratch), samples=args.samples,
                                 seq_len=args.seq_len)  # fmt: skip
    scale = shape.blocks / found.num_blocks
    outside = 2 * (shape.outside - 2 * VOCABULARY * shape.hidden)
    return {
        "seconds": found.seconds * scale,
        "solver_seconds": found.solver_seconds * scale,
        "memory_bytes": found.memory_bytes + max(0, outside),
        "disk_bytes": 2 * shape.weights + min(SHARD, 2 * shape.weights),
        "is_extrapolated": False,
    }


def extrapolated(shape: Shape, row: dict[str, Any]) -> dict[str, Any]:
    """The times of the largest shape that was tried, scaled; memory is not estimated."""
    known = SHAPES[LARGEST]
    by_work = shape.blocks * shape.solver_work / (known.blocks * known.solver_work)
    by_weights = shape.blocks * shape.block_weights / (known.blocks * known.block_weights)
    solving = row["solver_seconds"] * by_work
    return {
        "seconds": solving + (row["seconds"] - row["solver_seconds"]) * by_weights,
        "solver_seconds": solving,
        "memory_bytes": None,
        "disk_bytes": 2 * shape.weights + SHARD,
        "is_extrapolated": True,
    }


def tokens(folder: str) -> Path:
    """A tokenizer of one token a character in the model's folder, and a text for it."""
    from models import character_tokenizer  # pyright: ignore[reportMissingImports]

    character_tokenizer().save_pretrained(folder)
    text = Path(folder) / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 8000)
    return text


if __name__ == "__main__":
    main()
