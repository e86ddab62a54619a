"""The functions behind the commands: prune, evaluate, inspect, solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import export, parallel
from secateur.calibration import DEFAULT_SAMPLES, calibrate
from secateur.capture import Progress
from secateur.checkpoint import Checkpoint, default_device, load
from secateur.coverage import Coverage, measure_coverage
from secateur.evaluation import divergence, perplexity
from secateur.gram import Gram
from secateur.inspection import Inspection, inspect_folder
from secateur.memory import parse_memory
from secateur.model import config_of, evaluation_mode, full_precision
from secateur.pattern import Pattern, parse_pattern
from secateur.recipe import SETTINGS, make_plan
from secateur.report import Report
from secateur.run import Source, Texts, prune_in_place, prune_to_folder
from secateur.solvers import Solved
from secateur.solvers.contract import held_to_contract
from secateur.solvers.swap import check_columns
from secateur.tasks import check_tasks, run_tasks


def no_progress(stage: str, done: int, total: int) -> None:
    """Show nothing."""


def prune(
    model: nn.Module | Checkpoint | str | Path,
    out: str | Path | None = None,
    *,
    pattern: str | float | Pattern = "50%",
    effort: str | None = None,
    method: str | None = None,
    target: str | None = None,
    refine: str | None = None,
    refit: str | None = None,
    allocation: str | None = None,
    calibration: str | Path | Sequence[Tensor] | Sequence[Mapping[str, Tensor]] | None = None,
    samples: int = DEFAULT_SAMPLES,
    seq_len: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    true_sequential: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    max_shard_size: str = "5GB",
    max_memory: str | int | None = None,
    offload_dir: str | Path | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress = no_progress,
    **options: Any,
) -> Report:
    """Prune a model in one shot, without retraining.

    A model object is pruned in place; a folder, GGUF file or hub name is loaded, pruned and saved to `out`. Processes
    that torchrun started, or of a group that is initialised, each call it alike and share the work.

    Args:
        model: a transformers model, or what names one (see `secateur prune --help`). A loaded `Checkpoint` is pruned in
            place as a model is, its weights rounded to the dtypes of its files.
        out: folder to save to (for a name).
        pattern: `"50%"`, `0.5`, `"2:4"` (n nonzero of m along the input dimension), or a Pattern.
        effort: `fast`, `balanced` (the default) or `best`: a preset of the settings below; what is given wins over it.
            Where a method is named and no effort is, the method stands alone.
        method: `magnitude`, `wanda`, `sparsegpt`, `mrp`, `admm`, or a plug-in's name.
        target: `pruned`, `dense` or `residual`: what each matrix is fitted to (`target.Target`).
        refine: `swap` = exchanges to a 1-swap optimum after the method; or `none`.
        refit: `block` = the kept weights of each block are refit to the dense block's output; or `none`.
        allocation: `uniform`, `owl` or `curve`: how zeros are spread over the matrices.
        calibration: text file, folder, JSONL, data set name, token tensors or batches (an encoder-decoder's
            with its `decoder_input_ids`); None is the shipped text.
        samples, seq_len, seed: windows drawn from a text (default 128 x 2048), and the seed of the draw.
        tokenizer: needed for text with a model object.
        include, exclude: globs on matrix paths, such as `*.mlp.*`.
        true_sequential: observe a block again after each group of matrices that share an input.
        overwrite: replace an earlier model in `out`.
        resume: go on with the unfinished run in `out`, to the bits that it would have given; start where there is none,
            and change nothing where it is finished. Model, recipe, texts, versions and threads must be the same.
        max_memory: cap on what is held beside one block's weights (`8GB`): Gram matrices are then gathered in several
            passes, solvers work in smaller chunks, and hidden states go to `offload_dir` (default: `out/.secateur`).
        offload_dir: folder for hidden states, in files without a name; without `max_memory`, all of them.
        progress: called with (stage, done, total).
        options: the method's own options, such as `block=128`, and settings of the steps: `target_strength`,
            `max_swaps`, `refit_passes`, `refit_rate`, `refit_held_out`, `refit_step_tokens`,
            `refit_strength`, `allocation_spread`, `allocation_windows`.

    Raises:
        ValueError: anything wrong with the request, the model or the texts. A model object is unchanged where the
            fault was there before the first weight moved; `out` is written only at the end, but for the finished
            blocks in `out/.secateur`.
    """
    settings = {"method": method, "target": target, "refine": refine, "refit": refit, "allocation": allocation}
    plan = make_plan(
        parse_pattern(pattern),
        effort,
        settings | options,
        include=_several(include),
        exclude=_several(exclude),
        true_sequential=true_sequential,
        seed=seed,
        memory=parse_memory(max_memory, offload_dir),
    )
    texts = Texts(calibration, samples, seq_len, seed)
    if isinstance(model, nn.Module | Checkpoint):
        if out is not None or resume or overwrite:
            raise ValueError(
                "out, resume and overwrite are for models given by name; a model object is pruned in place: save it "
                "yourself"
            )
        with parallel.joined(device):
            return prune_in_place(model, tokenizer, plan, texts, progress)
    if not isinstance(model, str | Path):
        raise ValueError(f"the model is a {type(model).__name__}: pass the model itself, or a name and a folder")
    if out is None:
        raise ValueError("out is missing: name the folder to save the pruned model to")
    export.check_shard_size(max_shard_size)
    source = Source(str(model), device, trust_remote_code, allow_pickle)
    with parallel.joined(device):
        return prune_to_folder(source, Path(out), plan, texts, overwrite, resume, max_shard_size, progress)


def evaluate(
    model: nn.Module | str | Path,
    text: str | Path | None = None,
    *,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    tasks: Sequence[str] = (),
    task_dir: str | Path | None = None,
    task_limit: int | None = None,
    against: nn.Module | str | Path | None = None,
    tokenizer: Any = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Perplexity of a model (object or name) on a text, and what else is asked for.

    Args:
        text: file or data set name; None is the shipped evaluation text.
        seq_len: tokens a window (default 1024); windows are disjoint and give seq_len - 1 targets each.
        max_tokens: caps how many tokens are read.
        tasks: lm-evaluation-harness tasks (extra `eval`); `task_dir` holds local YAML ones, `task_limit` takes the
            first documents of each.
        against: the dense model; adds KL divergence and top-1 agreement on the same windows.

    Returns:
        What `evaluation.perplexity` returns, with `tasks` (task -> metric -> value) and `against` (`kl`,
        `top1_agreement`) where asked for.
    """
    tasks = _several(tasks)
    check_tasks(tasks, task_dir, task_limit)
    module: Any = model
    if not isinstance(model, nn.Module):
        checkpoint = load(str(model), device or default_device(), trust_remote_code, allow_pickle)
        module, tokenizer = checkpoint.model, checkpoint.tokenizer
    elif tokenizer is None:
        raise ValueError("tokenizer is missing: a model object doesn't carry one")
    dense: Any = against
    if isinstance(against, str | Path):
        dense = load(str(against), str(next(module.parameters()).device), trust_remote_code, allow_pickle).model
    config_of(module)
    if type(module).__module__.startswith("transformers.") and not module.can_generate():
        raise ValueError(f"{type(module).__name__} predicts no next token: perplexity is of causal language models")
    with evaluation_mode(module), nullcontext() if dense is None else evaluation_mode(dense):
        figures = perplexity(module, tokenizer, text, seq_len, max_tokens, progress)
        if dense is not None:
            figures["against"] = divergence(module, dense, tokenizer, text, seq_len, max_tokens, progress)
        if tasks:
            figures["tasks"] = run_tasks(module, tokenizer, tasks, task_dir, task_limit)
        return figures


def inspect(folder: str | Path) -> Inspection:
    """Count the zeros in a checkpoint and hold them against what its `secateur.json` records."""
    return inspect_folder(Path(folder))


def coverage_of(
    model: nn.Module | str | Path,
    *,
    calibration: str | Path | Sequence[Tensor] | Sequence[Mapping[str, Tensor]] | None = None,
    tokenizer: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Coverage:
    """Every matrix of the model's layers: whether a run would prune it, leave it dense by a rule, or miss it.

    Args:
        model: a transformers model, or what names one.
        calibration: as for `prune`; a few windows of a text are enough, and all that are taken.
        include, exclude: globs on matrix paths, as for `prune`.
    """
    module: Any = model
    if not isinstance(model, nn.Module):
        checkpoint = load(str(model), device or default_device(), trust_remote_code, allow_pickle)
        module, tokenizer = checkpoint.model, checkpoint.tokenizer
    batches = calibrate(calibration, tokenizer, config_of(module), samples=4, seq_len=64).batches
    return measure_coverage(module, batches, _several(include), _several(exclude))


def solve(
    W: Tensor,
    H: Tensor,
    pattern: str | float | Pattern,
    method: str = "mrp",
    refine: str = "none",
    **options: Any,
) -> Solved:
    """Prune one matrix, given the undamped Gram matrix `H = X X^T / T` of its inputs.

    Works in fp32, or in fp64 where either argument is fp64; the arguments are not changed.

    Args:
        W: weights (R, C), output rows x input columns.
        H: (C, C), symmetric positive semi-definite.
        refine: `swap` improves the method's mask by exchanges to a 1-swap optimum (up to 2048 columns on a CPU).
        options: the method's options, such as `block=128`, and `max_swaps`.

    Raises:
        ValueError: shapes that don't fit, NaN or infinity, a pattern that doesn't divide C, an unknown option.
    """
    if alien := sorted(set(options) & (SETTINGS - {"max_swaps"})):
        raise ValueError(f"{', '.join(alien)} can't be used on one matrix alone: it belongs to a run over a model")
    plan = make_plan(parse_pattern(pattern), settings={"method": method, "refine": refine} | options)
    if W.ndim != 2 or not W.numel() or H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(f"W is {tuple(W.shape)} and H is {tuple(H.shape)}: for W (R, C), H must be (C, C)")
    if W.device != H.device:
        raise ValueError(f"W is on {W.device} and H on {H.device}: put both on one device")
    for name, tensor in (("W", W), ("H", H)):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinity")
    _check_gram(H)
    plan.pattern.check_width(W.shape[1])
    if plan.swaps is not None:
        check_columns(W.shape[1], W.device)
    dtype = torch.float64 if torch.float64 in (W.dtype, H.dtype) else torch.float32
    weights, gram = W.detach().to(dtype), Gram(H.detach().to(dtype), tokens=0)
    with torch.no_grad(), full_precision():
        solved = held_to_contract(plan.solver, weights, gram, plan.pattern)
        return solved if plan.swaps is None else plan.swaps(weights, solved, gram, plan.pattern)


def _several(names: str | Sequence[str] | None) -> list[str]:
    """A list of names; one alone, or none, may be given as it is."""
    return [names] if isinstance(names, str) else list(names or ())


def _check_gram(H: Tensor) -> None:
    """Raise ValueError for what can't be `X X^T`: a negative diagonal, asymmetry, or an entry too large for it."""
    diagonal = H.diagonal()
    if bool((diagonal < 0).any()):
        raise ValueError("H has a negative diagonal: it is no Gram matrix")
    if not torch.allclose(H, H.T, rtol=1e-2, atol=1e-3 * float(diagonal.max())):
        raise ValueError("H is not symmetric: it is no Gram matrix")
    dead = diagonal == 0
    if bool(H[dead].any()):
        raise ValueError(
            f"H has a zero on its diagonal at input {int(dead.nonzero()[0])} and other numbers in that row: it is no "
            f"Gram matrix, or was computed in too narrow a dtype (fp32 is enough)"
        )
