"""Other libraries on the same model, tokens and patterns, each in its own environment."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from secateur.calibration.stream import Batch
from secateur.checkpoints.load import Checkpoint
from secateur.comparison import peer_llmcompressor
from secateur.errors import SecateurError
from secateur.recipe.patterns import NM, Pattern

MOST_APART = 0.01  # shares of zeros: rows of a few weights are rounded


def prune_by_llmcompressor(
    checkpoint: Checkpoint, batches: Sequence[Batch], method: str, pattern: Pattern, python: Path
) -> dict[str, Any]:
    """Prune a loaded model in place by llm-compressor; `seconds`, `peak_memory`, `sparsity` and the peer's `versions`.

    Args:
        checkpoint: the model.
        batches: its calibration batches.
        method: `sparsegpt` or `wanda`.
        pattern: of the run.
        python: of an environment with llm-compressor.

    Raises:
        SecateurError: the peer fails, with its last lines; or it saved tensors that the model does not have, or pruned
            another share of the weights.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tokens, out = Path(scratch) / "tokens.safetensors", Path(scratch) / "pruned.safetensors"
        save_file({"input_ids": torch.cat([batch["input_ids"] for batch in batches])}, tokens)
        script = shutil.copy(peer_llmcompressor.__file__, Path(scratch) / "peer.py")  # away from our modules' names
        arguments = [str(checkpoint.folder.absolute()), str(tokens), str(out), method, _as_theirs(pattern)]
        done = subprocess.run(
            [str(python.absolute()), script, *arguments], capture_output=True, text=True, cwd=scratch, check=False
        )
        if done.returncode != 0:
            last = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise SecateurError(f"llm-compressor failed (exit code {done.returncode}):\n{last}")
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        pruned = load_file(out)
    if strange := sorted(pruned.keys() - checkpoint.model.state_dict().keys()):
        raise SecateurError(
            f"llm-compressor saved {strange[0]}, which is not a tensor of the model here: use the same transformers in "
            f"both environments"
        )
    before = {name: value for name, value in checkpoint.model.state_dict().items() if name in pruned}
    changed = [name for name, value in before.items() if not torch.equal(value.cpu(), pruned[name])]
    if not changed:
        raise SecateurError("llm-compressor left every weight as it was: its version may not prune any more")
    zeros = sum(int((pruned[name] == 0).sum()) for name in changed)
    sparsity = zeros / sum(pruned[name].numel() for name in changed)
    if abs(sparsity - pattern.sparsity) > MOST_APART:
        raise SecateurError(f"llm-compressor pruned {sparsity:.1%} of the weights, and {pattern} was asked for")
    checkpoint.model.load_state_dict(pruned, strict=False)
    return figures | {"sparsity": sparsity}


def _as_theirs(pattern: Pattern) -> str:
    """A pattern as llm-compressor takes it: the share of zeros, or n:m with n the number of zeros."""
    return f"{pattern.m - pattern.n}:{pattern.m}" if isinstance(pattern, NM) else repr(pattern.sparsity)
