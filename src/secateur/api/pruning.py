"""Prune models and single matrices, and say beforehand what a run would do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.batches import CalibrationSource, calibration_batches
from secateur.calibration.coverage import Coverage, measure_coverage
from secateur.calibration.texts import max_positions
from secateur.checkpoints.hub import check_can_push, push_folder
from secateur.checkpoints.load import Checkpoint
from secateur.checkpoints.load import load as load_checkpoint
from secateur.errors import SecateurError
from secateur.models.blocks import config_of, device_of
from secateur.models.checks import check_finite_weights, check_runnable
from secateur.models.determinism import full_precision
from secateur.models.placement import InMemory
from secateur.numerics.damping import DEFAULT_DAMPING
from secateur.numerics.hessian import Hessian
from secateur.numerics.problem import check_problem
from secateur.pruning.dry_run import DryRun
from secateur.recipe.patterns import Pattern, check_asked_pattern
from secateur.recipe.recipe import CalibrationText, Recipe
from secateur.recipe.resolve import resolve_recipe
from secateur.recipe.settings import checks_names
from secateur.recipe.sizes import parse_size
from secateur.recipe.steps import SwapRefinement
from secateur.reporting.report import Report
from secateur.reporting.stages import StageClock
from secateur.request import ModelSource, Request, texts_of
from secateur.run import estimate_run, prune_in_memory, prune_to_folder
from secateur.runtime import distributed
from secateur.runtime.environment import check_device, default_device, device_name
from secateur.runtime.progress import Progress, no_progress
from secateur.solvers import Solved, solve_checked
from secateur.solvers.swaps import check_columns, refine_by_swaps
from secateur.storage.paths import user_path

DEFAULT_SHARD_SIZE = "5GB"


@checks_names
def prune(
    model: nn.Module | Checkpoint | str | Path,
    out: str | Path | None = None,
    *,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    pattern: str | float | Pattern | None = None,
    solver: Any = None,
    settings: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    calibration: CalibrationSource = None,
    text_field: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    resume: bool = False,
    max_shard_size: str | int | None = None,
    push_to_hub: bool | str = False,
    max_memory: str | int | None = None,
    offload_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Prune a model in one shot, without retraining.

    A model object is pruned in place; save it with `model.save_pretrained(DIR)` and `report.save(DIR)`, next to its
    tokenizer. A folder, GGUF file or hub name is loaded, pruned and saved to `out`; `overwrite`, `resume`, `device`,
    `max_shard_size`, `push_to_hub`, `trust_remote_code` and `allow_pickle` are for these alone. Under torchrun, or in a
    process group, every rank makes the same call, and they share the work.

    Args:
        model: a transformers model, or a folder, GGUF file or hub name.
        out: folder to save to, for a model by name.
        recipe: a `Recipe`, its data, the name of a preset (`fast`, `balanced`, `best`) or of a recipe file. None is
            `balanced`, or the solver alone where one is named.
        pattern: `"50%"`, `0.5`, `"2:4"` (n nonzero of m along the input dimension); None = the recipe's, 50%.
        solver: `magnitude`, `wanda`, `sparsegpt`, `mrp`, `admm`, a plug-in's name, or options such as
            `{"name": "admm", "search_iterations": 12}`.
        settings: options of the recipe by dotted name, such as `{"refit.rate": 0.01}`; they win over the recipe.
        include, exclude: globs on matrix names, such as `*.mlp.*`: prune only these, leave these dense.
        calibration: file (text, JSON, JSONL, CSV, Parquet), folder, data set name, token tensors or batches (an
            encoder-decoder's with its `decoder_input_ids`); `self` or `self:PROMPTS` for text that the model writes;
            None is the shipped text.
        text_field: field or column that holds the text; None = found by the form of the records.
        samples, seq_len, seed: sequences drawn from a text (default 128 x 2048), and the seed of the draw.
        tokenizer: needed for a text with a model object.
        overwrite: replace an earlier model in `out`.
        resume: resume the unfinished run in `out` to the bits that it would have given; start where there is none, and
            change nothing where it is finished. Model, recipe, texts, versions, threads and device must be the
            same. With another number of processes, the result differs by the rounding of sums.
        max_shard_size: of a weight file, such as `5GB`.
        push_to_hub: then upload `out` to the Hugging Face hub: a repository, or True for the folder's name. A new
            repository is private.
        max_memory: cap on Hessians, hidden states and temporaries, such as `8GB`: Hessians are then gathered in several
            passes, and solvers work in smaller chunks. Hidden states that need more than a quarter of it go to
            `offload_dir` (default: next to `out`; needed for a model object).
        offload_dir: folder for hidden states, in unlinked files; without `max_memory`, all of them.
        device: where to run: `cpu`, `cuda`, `cuda:1`, `mps`; None = CUDA where there is a GPU, else the CPU.
        trust_remote_code: let the checkpoint's Python code run.
        allow_pickle: also read .bin files, which can run code.
        progress: called with (stage, done, total).

    Returns:
        the report of the run.

    Raises:
        SecateurError: anything wrong with the request, the model or the texts. Most faults are found before the
            first weight changes; then a model object is as it was. `out` changes only at the end, in one step; finished
            blocks are in `.OUT.secateur` next to it.
    """
    shortcuts = {"pattern": pattern, "solver": solver, "samples": samples, "seq_len": seq_len, "seed": seed}
    shortcuts |= {"max_memory": max_memory, "text_field": text_field}
    request = _request(recipe, settings, include, exclude, calibration, shortcuts, offload_dir, progress)
    if isinstance(model, nn.Module | Checkpoint):
        given = {
            "out": out,
            "resume": resume,
            "overwrite": overwrite,
            "device": device,
            "max_shard_size": max_shard_size,
            "push_to_hub": push_to_hub,
            "trust_remote_code": trust_remote_code,
            "allow_pickle": allow_pickle,
        }
        save = "save it with model.save_pretrained(DIR) and report.save(DIR)"
        check_not_loaded(f"move it by model.to(device), {save}", **given)
        runs_on = model.device if isinstance(model, Checkpoint) else device_of(model)
        with distributed.process_group(torch.device(runs_on).type):
            return prune_in_memory(model, tokenizer, request)
    if not isinstance(model, str | Path):
        raise SecateurError(f"the model is a {type(model).__name__}: pass the model itself, or a name and a folder")
    if out is None:
        raise SecateurError("out is missing: name the folder to save the pruned model to")
    check_no_tokenizer(tokenizer)
    shard_bytes = _shard_bytes(max_shard_size)
    source = ModelSource(str(model), device_name(device), trust_remote_code, allow_pickle)
    if device is not None:
        check_device(device)
    place, repo = user_path(out), push_to_hub if isinstance(push_to_hub, str) else Path(out).name
    if push_to_hub:
        check_can_push(repo)
    with distributed.process_group(source.device):
        report = prune_to_folder(source, place, request, overwrite, resume, shard_bytes)
        if push_to_hub and distributed.is_main():
            push_folder(place, repo, private=True)
    return report


@checks_names
def dry_run(
    model: str | Path,
    out: str | Path | None = None,
    *,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    pattern: str | float | Pattern | None = None,
    solver: Any = None,
    settings: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    calibration: CalibrationSource = None,
    text_field: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    max_memory: str | int | None = None,
    offload_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    resume: bool = False,
    max_shard_size: str | int | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress = no_progress,
) -> DryRun:
    """What `prune` would do with these arguments: matrices, tokens, estimated time, memory and disk.

    One block is pruned on a few batches, in a copy that is dropped. Weights that have to be converted (experts
    in another layout) are written to a scratch folder next to `out`, and removed.

    Args:
        model: folder, GGUF file or hub name.
        out: the folder that `prune` would write, which is checked; None = not checked.
        recipe, pattern, solver, settings, include, exclude: as for `prune`.
        calibration, text_field, samples, seq_len, seed: as for `prune`.
        max_memory, offload_dir, device, overwrite, resume, max_shard_size: as for `prune`.
        trust_remote_code, allow_pickle, progress: as for `prune`.

    Returns:
        the estimates, the matrices that would be pruned, and notices.

    Raises:
        SecateurError: what a run would raise before the first block.
    """
    shortcuts = {"pattern": pattern, "solver": solver, "samples": samples, "seq_len": seq_len, "seed": seed}
    shortcuts |= {"max_memory": max_memory, "text_field": text_field}
    request = _request(recipe, settings, include, exclude, calibration, shortcuts, offload_dir, progress)
    if not isinstance(model, str | Path):
        raise SecateurError(
            f"the model is a {type(model).__name__}: a dry run takes a folder, a GGUF file or a hub name"
        )
    source = ModelSource(str(model), device_name(device), trust_remote_code, allow_pickle)
    if device is not None:
        check_device(device)
    place, shard_bytes = None if out is None else user_path(out), _shard_bytes(max_shard_size)
    return estimate_run(source, place, request, overwrite, resume, shard_bytes)


@checks_names
def solve(
    W: Tensor,
    H: Tensor,
    pattern: str | float | Pattern,
    solver: Any = "mrp",
    *,
    damping: float = DEFAULT_DAMPING.relative,
    shrinkage: float = 0.0,
    refine: SwapRefinement | Mapping[str, Any] | None = None,
) -> Solved:
    """Prune one matrix, given the undamped Hessian `H = X X^T / T` of its inputs.

    Looks for the `W'` with the pattern's zeros that minimises `tr((W' - W) Hd (W' - W)^T)`, Hd the damped Hessian: the
    mean squared change of the layer's output. Works in fp32, or in fp64 where either argument is fp64; the arguments
    are not changed.

    Args:
        W: weights (R, C), output rows x input columns, of a floating dtype.
        H: (C, C), symmetric positive semi-definite, on the same device.
        pattern: as for `prune`.
        solver: a solver's name, or options such as `{"name": "sparsegpt", "block": 64}`.
        damping: of the Hessian, relative to its mean diagonal.
        shrinkage: share that entries of H off the diagonal lose, below 1. For an H of T tokens the presets use
            `C / (C + T / 2)`; 0 = the paper's.
        refine: options of the exchanges after the solver, such as `{}` (up to 2048 columns on a CPU); None = no
            exchange.

    Returns:
        `weight` (R, C) in fp32 or fp64, which the caller rounds to the model's dtype; `keep` (R, C), bool, True = kept;
        and `info`, the solver's figures.

    Raises:
        SecateurError: no tensors, shapes that do not fit, NaN or infinity, values that fp32 can't hold, a pattern that
            does not divide C, an unknown option.

    Cost: R C^2 for every solver but `magnitude` and `wanda` (R C), and C^3 for the factor of H.
    """
    if isinstance(shrinkage, str):
        raise SecateurError(f"shrinkage is {shrinkage!r}: give a number, as H does not say how many tokens it is of")
    check_asked_pattern(pattern)
    options = {"pattern": pattern, "solver": solver, "damping": damping, "shrinkage": shrinkage, "refine": refine}
    recipe = Recipe.from_dict(options)
    check_problem(W, H)
    recipe.pattern.check_width(W.shape[1])
    if recipe.refine is not None:
        check_columns(W.shape[1], W.device)
    dtype = torch.float64 if torch.float64 in (W.dtype, H.dtype) else torch.float32
    weights = W.detach().to(dtype)
    hessian = Hessian(H.detach().to(dtype), tokens=0, damping=recipe.damping, shrinkage=shrinkage)
    with torch.no_grad(), full_precision():
        solved = solve_checked(recipe.solver, weights, hessian, recipe.pattern)
        if recipe.refine is None:
            return solved
        return refine_by_swaps(recipe.refine, weights, solved, hessian, recipe.pattern)


@checks_names
def coverage_of(
    model: nn.Module | str | Path,
    *,
    calibration: CalibrationSource = None,
    tokenizer: Any = None,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Coverage:
    """Every matrix of the model's layers: whether a run would prune it, leave it dense by a rule, or miss it.

    Args:
        model: a transformers model, or a folder, GGUF file or hub name.
        calibration: as for `prune`; a few windows of a text are enough, and all that are taken.
        tokenizer: needed for a text with a model object.
        recipe: as for `prune`; its rules count.
        include, exclude: globs on matrix names, as for `prune`.
        device: where to run a model by name.
        trust_remote_code: let the checkpoint's Python code run.
        allow_pickle: also read .bin files, which can run code.

    Returns:
        every matrix of the layers, with its state.

    Raises:
        SecateurError: anything wrong with the request, the model or the text.
    """
    named = str(calibration) if isinstance(calibration, str | Path) else None
    chosen = resolve_recipe(recipe, None, several(include), several(exclude), calibration=named)
    module: Any = model
    if not isinstance(model, nn.Module):
        check_no_tokenizer(tokenizer)
        on = device_name(device) or default_device()
        checkpoint = load_checkpoint(str(model), on, trust_remote_code, allow_pickle)
        module, tokenizer = checkpoint.model, checkpoint.tokenizer
    else:
        check_not_loaded(device=device, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    chosen, texts = texts_of(chosen, calibration)
    few = CalibrationText()
    if texts is None or isinstance(texts, str | Path):
        seq_len = min(64, max_positions(config_of(module)) or 64)
        few = replace(chosen.calibration, samples=4, seq_len=seq_len, own_words=None)
    data = calibration_batches(texts, tokenizer, config_of(module), few)
    if data.to_write is not None:
        check_runnable(module)
        check_finite_weights(module)
        data = data.with_written(data.to_write.write(module, tokenizer, InMemory(), no_progress))
    return measure_coverage(module, data.batches, chosen)


def _request(
    recipe: Any,
    settings: Mapping[str, Any] | None,
    include: Any,
    exclude: Any,
    calibration: CalibrationSource,
    shortcuts: dict[str, Any],
    offload_dir: Any,
    progress: Progress,
) -> Request:
    """What a run is asked for: its whole recipe, and its texts."""
    if isinstance(calibration, Tensor) and calibration.ndim < 2:
        raise SecateurError("‹calibration› is one row of tokens: give a list of tensors, one for each batch")
    named = str(calibration) if isinstance(calibration, str | Path) else None
    chosen = resolve_recipe(recipe, settings, several(include), several(exclude), calibration=named, **shortcuts)
    return Request(*texts_of(chosen, calibration), offload_dir, StageClock(progress))


def _shard_bytes(size: str | int | None) -> int:
    return parse_size(DEFAULT_SHARD_SIZE if size is None else size, "max_shard_size")


def check_no_tokenizer(tokenizer: Any) -> None:
    """Check that no tokenizer is given next to a model's name.

    Raises:
        SecateurError: one is.
    """
    if tokenizer is not None:
        raise SecateurError("‹tokenizer› is for a model object: a model by name brings its tokenizer")


def check_not_loaded(instead: str = "move it by model.to(device)", /, **given: Any) -> None:
    """Check that nothing is asked for, next to a model object, which is for a model that is loaded by name.

    Raises:
        SecateurError: something is.
    """
    if unused := [name for name, value in given.items() if value]:
        raise SecateurError(
            f"{', '.join(f'‹{name}›' for name in unused)} can't be used with a model object, which is loaded already: "
            f"{instead}"
        )


def several(names: str | Sequence[str] | None) -> list[str]:
    """A list of names; one alone, or none, may be given as it is."""
    return [names] if isinstance(names, str) else list(names or ())
