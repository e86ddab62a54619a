"""The functions behind the commands: prune, evaluate, inspect, pack, load, coverage, solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.batches import Texts, calibration_batches
from secateur.calibration.coverage import Coverage, measure_coverage
from secateur.calibration.stream import Progress
from secateur.calibration.texts import max_positions
from secateur.checkpoints.inspection import Inspection, inspect_folder
from secateur.checkpoints.load import Checkpoint, load_config_and_tokenizer
from secateur.checkpoints.load import load as load_checkpoint
from secateur.checkpoints.packing import load_model, pack_folder
from secateur.errors import SecateurError
from secateur.evaluation.perplexity import divergence, perplexity
from secateur.evaluation.speed import Speed, measure_models
from secateur.evaluation.tasks import check_tasks, run_tasks
from secateur.models.blocks import config_of
from secateur.models.determinism import evaluation_mode, full_precision
from secateur.numerics.hessian import DEFAULT_DAMPING, Hessian
from secateur.numerics.problem import check_problem
from secateur.packed import kernels
from secateur.packed.encoding import Compression
from secateur.pruning.dry_run import DryRun
from secateur.pruning.report import Report
from secateur.recipe.patterns import Pattern
from secateur.recipe.recipe import CalibrationText, Recipe
from secateur.recipe.resolve import resolve_recipe
from secateur.recipe.settings import checks_names
from secateur.recipe.sizes import parse_size
from secateur.recipe.steps import SwapRefinement
from secateur.run import ModelSource, Request, estimate_run, prune_in_memory, prune_to_folder, texts_of
from secateur.runtime import distributed
from secateur.runtime.environment import check_device, default_device, devices, environment
from secateur.solvers import Solved, solve_checked
from secateur.solvers.swaps import check_columns, refine_by_swaps
from secateur.sources.model_cache import cache_folder
from secateur.sources.resolve import resolve
from secateur.sources.unpacked import is_packed, unpack_folder
from secateur.storage.paths import user_path

DEFAULT_SHARD_SIZE = "5GB"


def no_progress(stage: str, done: int, total: int) -> None:
    """Show nothing."""


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
    calibration: Texts = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    resume: bool = False,
    max_shard_size: str | int | None = None,
    max_memory: str | int | None = None,
    offload_dir: str | Path | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Prune a model in one shot, without retraining.

    A model object is pruned in place; save it by `model.save_pretrained(DIR)` and `report.save(DIR)`. A folder, GGUF
    file or hub name is loaded, pruned and saved to `out`. Ranks that torchrun started, or of a process group that is
    initialised, each call it in the same way and share the work.

    Args:
        model: a transformers model, or what names one (see `secateur prune --help`). A loaded `Checkpoint` is pruned in
            place, its weights rounded to the dtypes of its files.
        out: folder to save to, for a name.
        recipe: a `Recipe`, its data, the name of a preset (`fast`, `balanced`, `best`) or of a recipe file. None is
            `balanced`, or the solver alone where one is named.
        pattern: `"50%"`, `0.5`, `"2:4"` (n nonzero of m along the input dimension).
        solver: `magnitude`, `wanda`, `sparsegpt`, `mrp`, `admm`, a plug-in's name, or options such as
            `{"name": "admm", "search_iterations": 12}`.
        settings: options of the recipe by dotted name, such as `{"refit.rate": 0.01}`; they win over the recipe.
        include, exclude: globs on matrix names, such as `*.mlp.*`: prune only these, leave these dense.
        calibration: text file, folder, JSONL, data set name, token tensors or batches (an encoder-decoder's with its
            `decoder_input_ids`); None is the shipped text.
        samples, seq_len, seed: sequences drawn from a text (default 128 x 2048), and the seed of the draw.
        tokenizer: needed for a text with a model object.
        overwrite: replace an earlier model in `out`.
        resume: resume the unfinished run in `out` to the bits that it would have given; start where there is none, and
            change nothing where it is finished. Model, recipe, texts, versions and threads must be the same.
        max_shard_size: of a weight file, such as `5GB`.
        max_memory: cap on Hessians, hidden states and temporaries, such as `8GB`: Hessians are then gathered in several
            passes, solvers work in smaller chunks, and hidden states go to `offload_dir` (default: next to `out`).
        offload_dir: folder for hidden states, in files without a name; without `max_memory`, all of them.
        device: where to run: `cpu`, `cuda`, `cuda:1`, `mps`; None = a GPU where there is one.
        trust_remote_code: let the checkpoint's Python code run.
        allow_pickle: also read .bin files, which can run code.
        progress: called with (stage, done, total).

    Raises:
        SecateurError: anything wrong with the request, the model or the texts. A model object is unchanged where the
            fault was there before the first weight moved. `out` changes only at the end, in one step; finished blocks
            are in `.OUT.secateur` next to it.
    """
    shortcuts = {"pattern": pattern, "solver": solver, "samples": samples, "seq_len": seq_len, "seed": seed}
    shortcuts["max_memory"] = max_memory
    request = _request(recipe, settings, include, exclude, calibration, shortcuts, offload_dir, progress)
    if isinstance(model, nn.Module | Checkpoint):
        given = {
            "out": out,
            "resume": resume,
            "overwrite": overwrite,
            "device": device,
            "max_shard_size": max_shard_size,
            "trust_remote_code": trust_remote_code,
            "allow_pickle": allow_pickle,
        }
        if unused := [name for name, value in given.items() if value]:
            raise SecateurError(
                f"{', '.join(f'‹{name}›' for name in unused)} can't be used with a model object, which is pruned in "
                f"place: move it by model.to(device), save it by model.save_pretrained(DIR) and report.save(DIR)"
            )
        with distributed.process_group(None):
            return prune_in_memory(model, tokenizer, request)
    if not isinstance(model, str | Path):
        raise SecateurError(f"the model is a {type(model).__name__}: pass the model itself, or a name and a folder")
    if out is None:
        raise SecateurError("out is missing: name the folder to save the pruned model to")
    if tokenizer is not None:
        raise SecateurError("‹tokenizer› is for a model object: a model by name brings its tokenizer")
    shard_size = parse_size(DEFAULT_SHARD_SIZE if max_shard_size is None else max_shard_size, "max_shard_size")
    source = ModelSource(str(model), device, trust_remote_code, allow_pickle)
    if device is not None:
        check_device(device)
    with distributed.process_group(device):
        return prune_to_folder(source, user_path(out), request, overwrite, resume, shard_size)


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
    calibration: Texts = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    max_memory: str | int | None = None,
    offload_dir: str | Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress = no_progress,
) -> DryRun:
    """What `prune` would do with these arguments: matrices, tokens, estimated time, memory and disk.

    One block is pruned on a few batches, in a copy that is dropped. Nothing is written.

    Args:
        model: folder, GGUF file or hub name.
        out: the folder that `prune` would write, which is checked; None = not checked.
        recipe, pattern, solver, settings, include, exclude: as for `prune`.
        calibration, samples, seq_len, seed: as for `prune`.
        max_memory, offload_dir, device, overwrite, resume, max_shard_size: as for `prune`.
        trust_remote_code, allow_pickle, progress: as for `prune`.

    Raises:
        SecateurError: what a run would raise before the first block.
    """
    shortcuts = {"pattern": pattern, "solver": solver, "samples": samples, "seq_len": seq_len, "seed": seed}
    shortcuts["max_memory"] = max_memory
    request = _request(recipe, settings, include, exclude, calibration, shortcuts, offload_dir, progress)
    if not isinstance(model, str | Path):
        raise SecateurError(
            f"the model is a {type(model).__name__}: a dry run takes a folder, a GGUF file or a hub name"
        )
    source = ModelSource(str(model), device, trust_remote_code, allow_pickle)
    shard_bytes = parse_size(max_shard_size, "max_shard_size")
    return estimate_run(source, None if out is None else user_path(out), request, overwrite, resume, shard_bytes)


@checks_names
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
    """Perplexity of a causal language model on a text, and what else is asked for.

    Args:
        model: a model, or what names one.
        text: file or data set name; None is the shipped evaluation text.
        seq_len: tokens a window (default 1024); windows are disjoint and give seq_len - 1 targets each.
        max_tokens: cap on the tokens that are read.
        tasks: lm-evaluation-harness tasks (extra `eval`).
        task_dir: folder of local YAML tasks.
        task_limit: number of documents of each task.
        against: the dense model; adds KL divergence and top-1 agreement on the same windows.
        tokenizer: needed for a model object.
        device: where to run a model by name.
        trust_remote_code: let the checkpoint's Python code run.
        allow_pickle: also read .bin files, which can run code.
        progress: called with (stage, done, total).

    Returns:
        what `evaluation.perplexity` returns, with `tasks` (task -> metric -> value) and `against` (`kl`,
        `top1_agreement`) where asked for.

    Raises:
        SecateurError: anything wrong with the request, the model or the text.
    """
    tasks = _several(tasks)
    check_tasks(tasks, task_dir, task_limit)
    module: Any = model
    if not isinstance(model, nn.Module):
        module, tokenizer = _load_to_evaluate(model, device, trust_remote_code, allow_pickle)
    elif tokenizer is None:
        raise SecateurError("‹tokenizer› is missing: a model object does not carry one")
    dense: Any = against
    if isinstance(against, str | Path):
        dense = load_checkpoint(
            str(against), str(next(module.parameters()).device), trust_remote_code, allow_pickle
        ).model
    config_of(module)
    if type(module).__module__.startswith("transformers.") and not module.can_generate():
        raise SecateurError(f"{type(module).__name__} predicts no next token: perplexity is of causal language models")
    with evaluation_mode(module), nullcontext() if dense is None else evaluation_mode(dense):
        figures = perplexity(module, tokenizer, text, seq_len, max_tokens, progress)
        if dense is not None:
            figures["against"] = divergence(module, dense, tokenizer, text, seq_len, max_tokens, progress)
        if tasks:
            figures["tasks"] = run_tasks(module, tokenizer, tasks, task_dir, task_limit)
        return figures


def _load_to_evaluate(
    model: str | Path, device: str | None, trust_remote_code: bool, allow_pickle: bool
) -> tuple[Any, Any]:
    """Model and tokenizer; a packed model stays packed on a CPU."""
    path, device = user_path(model), device or default_device()
    if is_packed(path) and device == "cpu":
        return load_model(path, is_dense=False), load_config_and_tokenizer(path)[1]
    checkpoint = load_checkpoint(str(model), device, trust_remote_code, allow_pickle)
    return checkpoint.model, checkpoint.tokenizer


@checks_names
def inspect(folder: str | Path) -> Inspection:
    """Count the zeros in a checkpoint and check them against what its `secateur.json` records.

    Raises:
        SecateurError: no checkpoint folder, or damaged files.
    """
    if not isinstance(folder, str | Path):
        raise SecateurError(
            f"inspect() takes the folder of a checkpoint, not a {type(folder).__name__}: save the model first, or use "
            f"coverage_of(model)"
        )
    return inspect_folder(user_path(folder))


@checks_names
def pack(
    folder: str | Path,
    out: str | Path,
    *,
    compression: Compression = "zstd",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write a pruned checkpoint in the packed format: a bitmask and the nonzero weights of every sparse matrix.

    The same weights, bit for bit, in 0.56 of the bytes in memory and about 0.4 on the disk, for bfloat16 at 50%. After
    `import secateur`, transformers loads the folder. docs/format.md describes it.

    Args:
        folder: an ordinary checkpoint in safetensors, pruned by any tool.
        out: a folder that does not exist, or is empty.
        compression: `zstd`, or `none` for weights that are mapped from the file as they are.
        progress: called with (stage, done, total).

    Returns:
        `matrices`, the number that was packed, and the bytes of the weight files: `dense_bytes`, `packed_bytes`.

    Raises:
        SecateurError: no checkpoint there, damaged files or zeros, too few zeros, or a folder that can't be written.

    Cost: four reads of the weights; memory for one matrix, about five times.
    """
    if compression not in ("zstd", "none"):
        raise SecateurError(f"‹compression› is {compression!r}: it must be zstd or none")
    return pack_folder(user_path(folder), user_path(out), compression, progress)


@checks_names
def unpack(folder: str | Path, out: str | Path, *, progress: Progress = no_progress) -> dict[str, Any]:
    """Write a packed checkpoint as an ordinary one, bit for bit.

    Args:
        folder: what `pack` wrote.
        out: a folder that does not exist, or is empty.
        progress: called with (stage, done, total).

    Returns:
        the bytes of the weight files: `packed_bytes`, `dense_bytes`.

    Raises:
        SecateurError: it is not packed, or damaged, or a folder that can't be written.
    """
    return unpack_folder(user_path(folder), user_path(out), progress)


@checks_names
def load(
    model: str | Path, *, dense: bool = False, dtype: torch.dtype | str = "auto", device: str = "cpu"
) -> nn.Module:
    """A causal language model, with packed weights where its folder has them and a kernel serves them.

    Args:
        model: what names a model (see `secateur prune --help`), or a packed folder.
        dense: unpack every matrix: the ordinary model.
        dtype: of the model; the kernels serve bfloat16.
        device: where to put it; anything but `cpu` makes it dense.

    Raises:
        SecateurError: no model there, or damaged files.
    """
    check_device(device)
    path = user_path(model)
    return load_model(path if is_packed(path) else resolve(str(model)), dense, dtype, device)


@checks_names
def bench(
    models: Sequence[str | Path],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> list[Speed]:
    """Size, memory, load time and speed of models on the CPU, each measured in a fresh process.

    Args:
        models: folders that transformers loads, packed ones included, or names as for `prune`.
        prompt_tokens: length of the prompt, of random tokens.
        new_tokens: tokens to decode, one at a time.
        threads: of torch; None = its default.
        progress: called with (stage, done, total).

    Raises:
        SecateurError: no models, or one that can't be loaded or run.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("threads", threads)):
        if value is not None and value < 1:
            raise SecateurError(f"‹{name}› is {value}; at least 1 is needed")
    folders = [path if (path := user_path(name)).is_dir() else resolve(str(name)) for name in models]
    if not folders:
        raise SecateurError("name at least one model")
    return measure_models(folders, prompt_tokens, new_tokens, threads, progress)


def env() -> dict[str, Any]:
    """Versions, CPU features, kernels, devices and the cache folder."""
    return environment() | {
        "cpu": kernels.cpu_features(),
        "kernels": kernels.description(),
        "devices": devices(),
        "cache": str(cache_folder()),
    }


@checks_names
def coverage_of(
    model: nn.Module | str | Path,
    *,
    calibration: Texts = None,
    tokenizer: Any = None,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
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
        tokenizer: needed for a text with a model object.
        recipe: as for `prune`; its rules count.
        include, exclude: globs on matrix names, as for `prune`.
        device: where to run a model by name.
        trust_remote_code: let the checkpoint's Python code run.
        allow_pickle: also read .bin files, which can run code.

    Raises:
        SecateurError: anything wrong with the request, the model or the text.
    """
    named = str(calibration) if isinstance(calibration, str | Path) else None
    chosen = resolve_recipe(recipe, None, _several(include), _several(exclude), calibration=named)
    module: Any = model
    if not isinstance(model, nn.Module):
        checkpoint = load_checkpoint(str(model), device or default_device(), trust_remote_code, allow_pickle)
        module, tokenizer = checkpoint.model, checkpoint.tokenizer
    chosen, texts = texts_of(chosen, calibration)
    few = CalibrationText(samples=4, seq_len=min(64, max_positions(config_of(module)) or 64))
    batches = calibration_batches(texts, tokenizer, config_of(module), few).batches
    return measure_coverage(module, batches, chosen)


@checks_names
def solve(
    W: Tensor,
    H: Tensor,
    pattern: str | float | Pattern,
    solver: Any = "mrp",
    *,
    damping: float = DEFAULT_DAMPING,
    refine: SwapRefinement | Mapping[str, Any] | None = None,
) -> Solved:
    """Prune one matrix, given the undamped Hessian `H = X X^T / T` of its inputs.

    Works in fp32, or in fp64 where either argument is fp64; the arguments are not changed.

    Args:
        W: weights (R, C), output rows x input columns.
        H: (C, C), symmetric positive semi-definite.
        pattern: as for `prune`.
        solver: a solver's name, or options such as `{"name": "sparsegpt", "block": 64}`.
        damping: of the Hessian, relative to its mean diagonal.
        refine: options of the exchanges after the solver, such as `{}` (up to 2048 columns on a CPU); None = no
            exchange.

    Raises:
        SecateurError: no tensors, shapes that do not fit, NaN or infinity, values too large for fp32, a pattern that
            does not divide C, an unknown option.
    """
    recipe = Recipe.from_dict({"pattern": pattern, "solver": solver, "damping": damping, "refine": refine})
    check_problem(W, H)
    recipe.pattern.check_width(W.shape[1])
    if recipe.refine is not None:
        check_columns(W.shape[1], W.device)
    dtype = torch.float64 if torch.float64 in (W.dtype, H.dtype) else torch.float32
    weights = W.detach().to(dtype)
    hessian = Hessian(H.detach().to(dtype), tokens=0, damping=recipe.damping)
    with torch.no_grad(), full_precision():
        solved = solve_checked(recipe.solver, weights, hessian, recipe.pattern)
        if recipe.refine is None:
            return solved
        return refine_by_swaps(recipe.refine, weights, solved, hessian, recipe.pattern)


def _request(
    recipe: Any,
    settings: Mapping[str, Any] | None,
    include: Any,
    exclude: Any,
    calibration: Texts,
    shortcuts: dict[str, Any],
    offload_dir: Any,
    progress: Progress,
) -> Request:
    """What a run is asked for: its whole recipe, and its texts."""
    named = str(calibration) if isinstance(calibration, str | Path) else None
    chosen = resolve_recipe(recipe, settings, _several(include), _several(exclude), calibration=named, **shortcuts)
    return Request(*texts_of(chosen, calibration), offload_dir, progress)


def _several(names: str | Sequence[str] | None) -> list[str]:
    """A list of names; one alone, or none, may be given as it is."""
    return [names] if isinstance(names, str) else list(names or ())
