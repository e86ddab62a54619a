"""What is done with models before and after pruning: evaluate, inspect, pack, load, measure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.api.pruning import check_no_tokenizer, check_not_loaded, several
from secateur.calibration.documents import check_text
from secateur.checkpoints.hub import push_folder
from secateur.checkpoints.inspection import Inspection, inspect_folder
from secateur.checkpoints.load import load as load_checkpoint
from secateur.checkpoints.load import load_config_and_tokenizer
from secateur.checkpoints.measured import record_perplexity, record_speed, write_page
from secateur.checkpoints.packing import load_model, pack_folder
from secateur.errors import SecateurError
from secateur.evaluation.perplexity import EvaluationText, perplexity, perplexity_against
from secateur.evaluation.speed import measure_models
from secateur.evaluation.tasks import check_tasks, load_tasks, run_tasks
from secateur.models.blocks import config_of
from secateur.models.checks import generates, looks_ahead
from secateur.models.determinism import evaluation_mode
from secateur.packed import kernels
from secateur.packed.encoding import Compression
from secateur.packed.files import is_packed
from secateur.packed.layout import Values
from secateur.recipe.settings import checks_names
from secateur.reporting.figures import Speed
from secateur.reporting.report import read_metadata
from secateur.runtime.environment import check_device, default_device, device_name, devices, environment
from secateur.runtime.progress import Progress, no_progress
from secateur.sources.model_cache import cache_folder
from secateur.sources.resolve import resolve
from secateur.sources.unpacked import unpack_folder
from secateur.storage.checkpoint_files import METADATA
from secateur.storage.paths import user_path


@checks_names
def evaluate(
    model: nn.Module | str | Path,
    text: str | Path | None = None,
    *,
    text_field: str | None = None,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    tasks: Sequence[str] = (),
    task_dir: str | Path | None = None,
    task_limit: int | None = None,
    against: nn.Module | str | Path | None = None,
    record: bool = False,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Perplexity of a causal language model on a text; KL divergence to a dense model; tasks.

    Args:
        model: a transformers model, or a folder, GGUF file or hub name.
        text: file or data set name; None is the shipped evaluation text.
        text_field: field or column that holds the text; None = found by the form of the records.
        seq_len: tokens per window (default 1024); windows are disjoint and give seq_len - 1 targets each.
        max_tokens: cap on tokens, in whole windows.
        tasks: lm-evaluation-harness tasks (extra `eval`).
        task_dir: folder of local YAML tasks.
        task_limit: number of documents of each task.
        against: the dense model; adds its perplexity, KL divergence and top-1 agreement on the same windows.
        record: add the figures to the report and the card of the pruned model's folder.
        tokenizer: needed for a model object.
        device: where to run a model by name.
        trust_remote_code: let the checkpoint's Python code run.
        allow_pickle: also read .bin files, which can run code.
        progress: called with (stage, done, total).

    Returns:
        `perplexity`, `loss` (nats per token), `windows`, `seq_len`, `targets`, `text`; where asked for, `tasks` (task
        -> metric -> value) and `against` (`perplexity`, `kl`, `top1_agreement`).

    Raises:
        SecateurError: anything wrong with the request, the model or the text.
    """
    if record:
        _check_can_record([model])
    tasks = several(tasks)
    check_tasks(tasks, task_dir, task_limit)
    check_text(text)
    if isinstance(model, str | Path) and isinstance(against, str | Path) and user_path(model) == user_path(against):
        raise SecateurError("a model can't be compared with itself: give the dense model it was pruned from")
    module: Any = model
    if not isinstance(model, nn.Module):
        check_no_tokenizer(tokenizer)
        module, tokenizer = _load_to_evaluate(model, device_name(device), trust_remote_code, allow_pickle)
    else:
        _check_object(tokenizer, device)
        if against is None:
            check_not_loaded(trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    dense: Any = against
    if against is not None and not isinstance(against, nn.Module):
        dense = load_checkpoint(
            str(against), str(next(module.parameters()).device), trust_remote_code, allow_pickle
        ).model
    config_of(module)
    is_known = type(module).__module__.startswith("transformers.")
    what = EvaluationText(text, seq_len, max_tokens, text_field)
    with evaluation_mode(module), nullcontext() if dense is None else evaluation_mode(dense):
        if is_known and (not generates(module) or looks_ahead(module)):
            raise SecateurError(
                f"{type(module).__name__} predicts no next token: perplexity is of causal language models"
            )
        if tasks:
            load_tasks(tasks, task_dir)
        if dense is None:
            figures = perplexity(module, tokenizer, what, progress)
        else:
            figures = perplexity_against(module, dense, tokenizer, what, progress)
        if tasks:
            figures["tasks"] = run_tasks(module, tokenizer, tasks, task_dir, task_limit)
    if record and isinstance(model, str | Path):
        record_perplexity(user_path(model), figures)
    return figures


def _check_object(tokenizer: Any, device: Any) -> None:
    """Check what is given with a model object.

    Raises:
        SecateurError: no tokenizer, or a device, as the model is on one.
    """
    if tokenizer is None:
        raise SecateurError("‹tokenizer› is missing: a model object does not carry one")
    check_not_loaded(device=device)


def _check_can_record(models: Sequence[Any]) -> list[Path]:
    """Folders of those models whose report takes figures.

    Raises:
        SecateurError: none of them, a damaged report, or a folder that can't be written.
    """
    folders = [user_path(model) for model in models if isinstance(model, str | Path)]
    pruned = [folder for folder in folders if (folder / METADATA).is_file()]
    if not pruned:
        raise SecateurError(f"‹record› adds the figures to a pruned model's {METADATA}, and there is none here")
    for folder in pruned:
        read_metadata(folder)
        if not os.access(folder, os.W_OK):
            raise SecateurError(f"‹record› adds the figures to files in {folder}, which can't be written: leave it out")
    return pruned


def _load_to_evaluate(
    model: str | Path, device: str | None, trust_remote_code: bool, allow_pickle: bool
) -> tuple[Any, Any]:
    """Model and tokenizer; a packed model stays packed on a CPU."""
    folder, device = resolve(str(model), trust_remote_code, allow_pickle), device or default_device()
    if is_packed(folder) and device == "cpu":
        packed = load_model(folder, is_dense=False, trust_remote_code=trust_remote_code)
        return packed, load_config_and_tokenizer(folder, trust_remote_code)[1]
    checkpoint = load_checkpoint(str(folder), device, trust_remote_code, allow_pickle)
    return checkpoint.model, checkpoint.tokenizer


@checks_names
def inspect(folder: str | Path) -> Inspection:
    """Count the zeros in a checkpoint and check them against what its `secateur.json` records.

    Args:
        folder: of a checkpoint, packed or not.

    Returns:
        the zeros of each matrix, and every problem.

    Raises:
        SecateurError: no checkpoint folder, or damaged files.
    """
    if not isinstance(folder, str | Path):
        raise SecateurError(
            f"inspect() takes the folder of a checkpoint, not a {type(folder).__name__}: save the model first, or use "
            f"coverage_of(model)"
        )
    if not user_path(folder).is_dir():
        raise SecateurError(f"there is no folder {folder}: inspect reads the folder of a checkpoint")
    return inspect_folder(user_path(folder))


@checks_names
def load(
    model: str | Path,
    *,
    dense: bool = False,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> nn.Module:
    """A causal language model, with packed weights where its folder has them and a kernel serves them.

    Args:
        model: a folder, packed or not, GGUF file or hub name.
        dense: unpack every matrix: the ordinary model.
        dtype: of the model; the kernels serve bfloat16.
        device: where to put it; anything but `cpu` makes it dense.
        trust_remote_code: let the checkpoint's Python code run.

    Returns:
        the model, in evaluation mode.

    Raises:
        SecateurError: no model there, or damaged files.
    """
    check_device(device)
    return load_model(resolve(str(model), trust_remote_code), dense, dtype, device, trust_remote_code)


@checks_names
def pack(
    folder: str | Path,
    out: str | Path,
    *,
    values: Values = "same",
    compression: Compression = "zstd",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write a pruned checkpoint in the packed format: a bitmask and the nonzero weights of every sparse matrix.

    The same weights, bit for bit. A bfloat16 matrix at 50% takes 0.56 of its bytes in memory and about 0.4 on the disk;
    embeddings stay as they are. After `import secateur`, transformers loads the folder. docs/format.md describes it.

    Args:
        folder: an ordinary checkpoint in safetensors, pruned by any tool.
        out: a folder that does not exist, or is empty.
        values: `same` as before, bit for bit, or `int8` with a scale for each row, in 0.31 of a matrix's bytes.
        compression: `zstd`, or `none` for weights that are mapped from the file as they are.
        progress: called with (stage, done, total).

    Returns:
        `matrices`, the number that was packed, and the bytes of the weight files: `dense_bytes`, `packed_bytes`.

    Raises:
        SecateurError: no checkpoint there, damaged files or zeros, too few zeros, or a folder that can't be written.

    Cost: four reads of the weights; memory for five copies of one matrix, or eight with int8.
    """
    if compression not in ("zstd", "none"):
        raise SecateurError(f"‹compression› is {compression!r}: it must be zstd or none")
    if values not in ("same", "int8"):
        raise SecateurError(f"‹values› is {values!r}: it must be same or int8")
    return pack_folder(user_path(folder), user_path(out), compression, values, progress)


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
def bench(
    models: str | Path | Sequence[str | Path],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    threads: int | None = None,
    record: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress = no_progress,
) -> list[Speed]:
    """Size, memory, load time and speed of models on the CPU, each measured in a fresh process.

    Args:
        models: folders that transformers loads, packed ones included, or names as for `prune`; or one of them.
        prompt_tokens: length of the prompt, of random tokens.
        new_tokens: tokens to decode, one at a time.
        threads: of torch; None = its default.
        record: add the figures to the report and the card of every pruned model's folder in the list.
        trust_remote_code: let the checkpoints' Python code run.
        allow_pickle: also load .bin files, which can run code.
        progress: called with (stage, done, total).

    Returns:
        the figures of each model, in the order of `models`.

    Raises:
        SecateurError: no models, or one that can't be loaded or run.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("threads", threads)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise SecateurError(f"‹{name}› is {value!r}: it must be a whole number of 1 or more")
    models = [models] if isinstance(models, str | Path) else models
    folders = [resolve(str(name), trust_remote_code, allow_pickle) for name in models]
    if not folders:
        raise SecateurError("name at least one model")
    pruned = _check_can_record(models) if record else []
    speeds = measure_models(folders, prompt_tokens, new_tokens, threads, trust_remote_code, allow_pickle, progress)
    named = [replace(speed, model=str(name)) for speed, name in zip(speeds, models, strict=True)]
    for folder in pruned:
        record_speed(folder, named)
    return named


@checks_names
def write_report(folder: str | Path, other: str | Path | None = None, *, out: str | Path | None = None) -> Path:
    """Write the page of a run from its `secateur.json`, or of two runs side by side.

    Args:
        folder: of a pruned model.
        other: folder of a second one, for a comparison.
        out: the page; None is `report.html` in the folder, and `comparison.html` here for two.

    Returns:
        where the page is.

    Raises:
        SecateurError: no report there, damaged files, or a place that can't be written.
    """
    second, target = (None if path is None else user_path(path) for path in (other, out))
    return write_page(user_path(folder), second, target)


@checks_names
def push(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Publish a pruned model on the Hugging Face hub, in place of the pruned one that the repository holds.

    The recipe and the report name the model and the texts as they were named in the run.

    Args:
        folder: of the pruned model, packed or not.
        repo: `owner/name`, or a name in your account; made where there is none.
        private: whether a new repository is private.

    Returns:
        the address of the model.

    Raises:
        SecateurError: not a pruned model, files that were changed since, a repository with a model that secateur did
            not prune, no token, a wrong one, or an offline hub.
    """
    return push_folder(user_path(folder), repo, private)


def env() -> dict[str, Any]:
    """Versions, CPU features, kernels, devices and the cache folder."""
    return environment() | {
        "cpu": kernels.cpu_features(),
        "kernels": kernels.description(),
        "devices": devices(),
        "cache": str(cache_folder()),
    }
