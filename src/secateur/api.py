"""The functions behind the commands: prune, evaluate, inspect, solve."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import engine, export
from secateur.calibration import DEFAULT_SAMPLES, calibrate
from secateur.capture import Batch, Progress
from secateur.checkpoint import load, parameters_of, resolve
from secateur.evaluation import perplexity
from secateur.gram import Gram
from secateur.inspection import Inspection, inspect_folder
from secateur.pattern import Pattern, parse_pattern
from secateur.report import Report
from secateur.solvers import Solved, make_solver


def no_progress(stage: str, done: int, total: int) -> None:
    """Show nothing."""


def prune(
    model: nn.Module | str | Path,
    out: str | Path | None = None,
    *,
    pattern: str | float | Pattern = "50%",
    method: str = "mrp",
    calibration: str | Path | Sequence[Tensor] | Sequence[Batch] | None = None,
    samples: int = DEFAULT_SAMPLES,
    seq_len: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    true_sequential: bool = False,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress = no_progress,
    **options: Any,
) -> Report:
    """Prune a model in one shot, without retraining.

    A model object is pruned in place; a folder, GGUF file or hub name is loaded, pruned and saved to `out`.

    Args:
        model: a transformers model, or what names one (see `secateur prune --help`).
        out: folder to save to (for a name).
        pattern: `"50%"`, `0.5`, `"2:4"` (n nonzero of m along the input dimension), or a Pattern.
        method: `magnitude`, `wanda`, `sparsegpt`, `mrp`, or a plug-in's name.
        calibration: text file, folder, JSONL, data set name, token tensors or batches; None is the shipped text.
        samples, seq_len, seed: windows drawn from a text (default 128 x 2048), and the seed of the draw.
        tokenizer: needed for text with a model object.
        include, exclude: globs on matrix paths, such as `*.mlp.*`.
        true_sequential: observe a block again after each group of matrices that share an input.
        overwrite: replace an earlier model in `out`.
        progress: called with (stage, done, total).
        options: the method's own options, such as `block=128`.

    Raises:
        ValueError: anything wrong with the request, the model or the texts. A model object is unchanged where the
            fault was there before the first weight moved; `out` is written only at the end.
    """
    started = time.perf_counter()
    plan_options = {"include": list(include), "exclude": list(exclude), "true_sequential": true_sequential}
    wanted = parse_pattern(pattern)
    solver = make_solver(method, options)
    checkpoint = None
    if isinstance(model, nn.Module):
        if out is not None:
            raise ValueError("out is for models given by name; a model object is pruned in place: save it yourself")
        target, tokens, config = model, tokenizer, model.config
    else:
        if out is None:
            raise ValueError("out is missing: name the folder to save the pruned model to")
        export.check_shard_size(max_shard_size)
        folder = resolve(str(model), trust_remote_code, allow_pickle)
        out = _writable(out, str(model), calibration, folder, overwrite)
        checkpoint = load(str(model), device or default_device(), trust_remote_code, allow_pickle)
        target, tokens, config = checkpoint.model, checkpoint.tokenizer, checkpoint.model.config
    data = calibrate(calibration, tokens, config, samples, seq_len, seed)
    storage = checkpoint.matrix_storage if checkpoint else None
    plan = engine.Plan(wanted, solver, storage_dtype=storage, **plan_options)
    matrices, dense = engine.run(target, data.batches, plan, progress)
    report = Report(
        recipe={"pattern": str(wanted), "method": method, "options": _fields(solver), **plan_options},
        environment=export.environment() | {"device": str(next(target.parameters()).device)},
        calibration=data.origin,
        matrices=matrices,
        dense=dense,
        model_parameters=parameters_of(target),
        notices=data.notices,
    )
    report.recipe["model"] = str(model) if checkpoint else type(model).__name__
    report.environment["forward_dtype"] = str(next(target.parameters()).dtype).removeprefix("torch.")
    report.seconds = time.perf_counter() - started
    if checkpoint:
        report.out = str(out)
        export.save(checkpoint, report, Path(str(out)), max_shard_size)
    return report


def evaluate(
    model: nn.Module | str | Path,
    text: str | Path | None = None,
    *,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    tokenizer: Any = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Perplexity of a model (object or name) on a text; None is the shipped evaluation text.

    Windows of `seq_len` tokens (default 1024) are disjoint and give seq_len - 1 targets each; `max_tokens` caps
    how many tokens are read. See `evaluation.perplexity` for what is returned.
    """
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise ValueError("tokenizer is missing: a model object doesn't carry one")
        was_training = model.training
        try:
            return perplexity(model.eval(), tokenizer, text, seq_len, max_tokens, progress)
        finally:
            model.train(was_training)
    checkpoint = load(str(model), device or default_device(), trust_remote_code, allow_pickle)
    return perplexity(checkpoint.model, checkpoint.tokenizer, text, seq_len, max_tokens, progress)


def inspect(folder: str | Path) -> Inspection:
    """Count the zeros in a checkpoint and hold them against what its `secateur.json` records."""
    return inspect_folder(Path(folder))


def solve(
    W: Tensor,
    H: Tensor,
    pattern: str | float | Pattern,
    method: str = "mrp",
    **options: Any,
) -> Solved:
    """Prune one matrix, given the undamped Gram matrix `H = X X^T / T` of its inputs.

    Works in fp32, or in fp64 where either argument is fp64; the arguments are not changed.

    Args:
        W: weights (R, C), output rows x input columns.
        H: (C, C), symmetric positive semi-definite.
        options: the method's options, such as `block=128`.

    Raises:
        ValueError: shapes that don't fit, NaN or infinity, a pattern that doesn't divide C, an unknown option.
    """
    wanted = parse_pattern(pattern)
    solver = make_solver(method, options)
    if W.ndim != 2 or H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(f"W is {tuple(W.shape)} and H is {tuple(H.shape)}: for W (R, C), H must be (C, C)")
    for name, tensor in (("W", W), ("H", H)):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinity")
    if bool((H.diagonal() < 0).any()):
        raise ValueError("H has a negative diagonal: it is no Gram matrix")
    wanted.check_width(W.shape[1])
    dtype = torch.float64 if torch.float64 in (W.dtype, H.dtype) else torch.float32
    with torch.no_grad():
        return solver(W.detach().to(dtype), Gram(H.detach().to(dtype), tokens=0), wanted)


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _writable(out: str | Path, model: str, calibration: Any, folder: Path, overwrite: bool) -> Path:
    """The absolute path of `out`, checked against everything that the run reads."""
    path = Path(out).expanduser().resolve()
    named = [Path(item).expanduser() for item in (model, calibration) if isinstance(item, str | Path)]
    export.check_target(path, [folder, *(item for item in named if item.exists())], overwrite)
    return path


def _fields(solver: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(solver).items() if value is not None}
