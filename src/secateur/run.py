"""One run: a model pruned in memory, or loaded by name, pruned, and saved to a folder."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from secateur.calibration.batches import CalibrationBatches, CalibrationSource
from secateur.calibration.dense_pass import run_dense_pass
from secateur.calibration.documents import text_place
from secateur.calibration.own_words import why_silent
from secateur.checkpoints.load import Checkpoint, load_config_and_tokenizer
from secateur.checkpoints.model_card import facts_of_source
from secateur.checkpoints.reordered import map_reordered
from secateur.checkpoints.save import write_checkpoint
from secateur.errors import SecateurError
from secateur.models.blocks import config_of, device_of
from secateur.models.checks import PROBE_TOKENS, check_finite_weights, check_runnable
from secateur.models.determinism import deterministic_forward
from secateur.models.matrices import all_parameters, parameter_of
from secateur.models.placement import InMemory, OffloadedWeights, WeightPlacement
from secateur.pruning.context import BlockStore, DroppedBlocks, InMemoryStore, RunContext, StorageOf, keep_dtype
from secateur.pruning.dry_run import DryRun, estimate
from secateur.pruning.loop import check_stream, checked_structure, prune_model
from secateur.recipe.recipe import Recipe
from secateur.reporting.report import Report, read_metadata
from secateur.request import ModelSource, Request
from secateur.resume.block_store import JournalledBlocks
from secateur.resume.folder import begin_run, check_out, locked_journal, take_over
from secateur.resume.manifest import Manifest, RunManifest, check_no_unfinished, journal_of
from secateur.resume.output_folder import check_apart, check_may_replace, check_outside_model, check_place
from secateur.resume.publish import Publisher, read_outcome
from secateur.runtime import distributed
from secateur.runtime.environment import environment, environment_number, processor_name
from secateur.runtime.memory import available_bytes, total_memory
from secateur.runtime.progress import no_progress
from secateur.sources.other_files import model_files
from secateur.storage.checkpoint_files import METADATA
from secateur.storage.file_records import first_damage, sha256
from secateur.storage.paths import real_path, user_path


def prune_in_memory(model: nn.Module | Checkpoint, tokenizer: Any, request: Request) -> Report:
    """Prune a model object in place; its report.

    Raises:
        SecateurError: as `api.prune` says.
    """
    if request.recipe.format == "packed":
        raise SecateurError("‹settings.format=packed› needs a folder: save the model, then use pack()")
    started = time.perf_counter()
    if isinstance(model, Checkpoint):
        module, name, notices = model.model, model.name, model.notices
        tokenizer = tokenizer or model.tokenizer
    else:
        module, name, notices = model, type(model).__name__, []
    request.check()
    data = request.calibration(tokenizer, config_of(module), lambda: why_silent(module, InMemory()))
    if data.to_write is not None:
        _check_structure(module, request, InMemoryStore())
    data = request.written(data, module, tokenizer, InMemory())
    if isinstance(model, Checkpoint):
        where, storage_of = _environment(model.device, model.compute_dtype), _storage_of(model)
    else:
        parameter = next(module.parameters())
        where, storage_of = _environment(str(parameter.device), parameter.dtype), keep_dtype
    _check_same_on_all_ranks(module, data, request.recipe)
    context = RunContext(request.recipe, request.progress, memory=request.memory(), storage_of=storage_of)
    report = _prune(module, name, data, request, where, context)
    return replace(report, seconds=time.perf_counter() - started, notices=[*notices, *report.notices])


def prune_to_folder(
    source: ModelSource, out: Path, request: Request, overwrite: bool, resume: bool, max_shard_size: int
) -> Report:
    """Load a model, prune it, and save it to a folder that no other run may write meanwhile.

    Raises:
        SecateurError: as `api.prune` says.
    """
    request.check()
    out = real_path(out)
    if distributed.is_main():
        check_place(out)
        is_fetched = not user_path(source.name).exists()
        if is_fetched and not (resume or overwrite or journal_of(out).exists()):
            check_may_replace(out, overwrite)
    folder = source.folder()
    if distributed.is_main():
        _check_request(out, source.name, request.texts, folder)
    with locked_journal(out) as journal:
        before = take_over(journal, out, resume, overwrite)
        if finished := _finished(out, source, folder, request, before, resume, overwrite):
            return finished
        if journal is not None:
            before = check_out(journal, out, before, overwrite)
        place = journal_of(out)
        checkpoint = source.load(folder, place)
        placement = OffloadedWeights(checkpoint.device, checkpoint.compute_dtype, _room(checkpoint.device))
        begun_with = None if overwrite else before.identity.get("calibration", {}).get("own_words")
        data = _calibration_of(checkpoint, request, placement, begun_with)
        where = _environment(checkpoint.device, checkpoint.compute_dtype)
        _check_same_on_all_ranks(checkpoint.model, data, request.recipe)
        identity = _identity(source.name, folder, request.recipe, data, where)
        memory = request.memory(place)  # checked before the journal is written
        manifest = begin_run(journal, out, before, identity, overwrite)
        reordered = place / f"reordered-{distributed.rank()}"
        blocks = JournalledBlocks(
            manifest, placement, _storage_of(checkpoint), lambda order: map_reordered(checkpoint, order, reordered)
        )
        if not manifest.state.outcome:
            if data.to_write is not None and not manifest.state.own_words:
                _check_structure(checkpoint.model, request, blocks)
            data = request.written(data, checkpoint.model, checkpoint.tokenizer, _to_write(checkpoint), manifest)
        context = RunContext(request.recipe, request.progress, blocks, memory, storage_of=blocks.storage_of)
        report = replace(_report_of(checkpoint, data, request, where, manifest, context), out=str(out))
        publisher = Publisher(manifest, blocks, out)
        publisher.publish(
            checkpoint.model,
            lambda: write_checkpoint(checkpoint, report, publisher, out.name, max_shard_size, request.progress),
        )
    return report


def estimate_run(
    source: ModelSource, out: Path | None, request: Request, overwrite: bool, resume: bool, shard_bytes: int
) -> DryRun:
    """What a run to a folder would do and take. Only a scratch folder is written, where a run would, and removed.

    Raises:
        SecateurError: what a run would raise before the first block, or several processes.
    """
    if (processes := environment_number("WORLD_SIZE", 1)) > 1:
        raise SecateurError(f"a dry run is for one process, but {processes} were started: leave torchrun out")
    request.check()
    folder = source.folder()
    if out is not None:
        place = real_path(out)
        _check_request(place, source.name, request.texts, folder)
        if not (resume or overwrite):
            check_no_unfinished(place)
        if not resume:
            check_may_replace(place, overwrite)
    with TemporaryDirectory(prefix=".secateur-", dir=_scratch_place(out, request.memory().folder)) as scratch:
        checkpoint = source.load(folder, Path(scratch))
        converted = sum(each.stat().st_size for each in Path(scratch).rglob("*") if each.is_file())
        placement = OffloadedWeights(checkpoint.device, checkpoint.compute_dtype, _room(checkpoint.device))
        dropped = DroppedBlocks(placement)
        data = _calibration_of(checkpoint, request, placement)
        writing = 0.0
        if data.to_write is not None:
            _check_structure(checkpoint.model, request, dropped)
            where = _to_write(checkpoint)
            windows, writing = data.to_write.sketch(checkpoint.model, checkpoint.tokenizer, where, request.progress)
            data = data.with_written(windows)
        memory = request.memory(Path(scratch))
        context = RunContext(request.recipe, request.progress, dropped, memory, storage_of=_storage_of(checkpoint))
        found = estimate(checkpoint.model, data.batches, context, shard_bytes)
        return replace(
            found,
            seconds=found.seconds + writing,
            disk_bytes=found.disk_bytes + converted,
            notices=[*checkpoint.notices, *data.notices],
        )


def _scratch_place(out: Path | None, offload_dir: Path | None) -> Path | None:
    """Where a dry run puts what it converts, which may be as large as the model; None = the system's place."""
    if offload_dir is not None or out is None:
        return offload_dir
    return next(each for each in real_path(out).parents if each.is_dir())


@torch.no_grad()
def _check_structure(model: nn.Module, request: Request, store: BlockStore) -> None:
    """Check that the recipe suits the model's blocks and matrices, before the model writes text, which may take hours.

    Raises:
        SecateurError: it does not.
    """
    check_runnable(model)
    check_finite_weights(model)
    few = {"input_ids": torch.ones(1, PROBE_TOKENS, dtype=torch.long, device=device_of(model))}
    context = RunContext(request.recipe, no_progress, store)
    with deterministic_forward(model):
        for chain in checked_structure(model, few, context).chains:
            found = run_dense_pass(model, chain, [few] * distributed.world_size(), no_progress, store)
            check_stream(found.stream, context)


def _report_of(
    checkpoint: Checkpoint,
    data: CalibrationBatches,
    request: Request,
    where: dict[str, Any],
    manifest: RunManifest,
    context: RunContext,
) -> Report:
    """The report of a run from files: of an earlier process that finished every block, or of pruning them now."""
    outcome = distributed.broadcast_object(read_outcome(manifest) if distributed.is_main() else None)
    if outcome:
        return Report.from_dict(outcome["report"])
    report = _prune(checkpoint.model, checkpoint.name, data, request, where, context)
    return replace(
        report,
        source=facts_of_source(checkpoint),
        identity=manifest.state.identity,
        seconds=manifest.seconds,
        notices=[*checkpoint.notices, *report.notices, *manifest.state.notices],
    )


def _prune(
    model: nn.Module, name: str, data: CalibrationBatches, request: Request, where: dict[str, Any], context: RunContext
) -> Report:
    """Prune a loaded model; its report, without what only the caller knows."""
    outcome = prune_model(model, data.batches, context)
    return Report(
        model=name,
        recipe=request.recipe,
        environment=where,
        calibration=data.origin,
        matrices=outcome.matrices,
        blocks=outcome.blocks,
        depth=outcome.depth,
        prices=outcome.prices,
        stages=request.progress.stages(),
        dense=outcome.dense,
        model_parameters=all_parameters(model),
        layer_parameters=outcome.layer_weights,
        notices=[*data.notices, *outcome.notices],
    )


def _storage_of(checkpoint: Checkpoint) -> StorageOf:
    """Dtype that each parameter is saved in, by its name without `.weight`."""
    storage = checkpoint.matrix_dtypes
    return lambda name, own: storage.get(parameter_of(name), own)


def _environment(device: str, dtype: Any) -> dict[str, Any]:
    return environment() | {
        "device": device,
        "forward_dtype": str(dtype).removeprefix("torch."),
        "processes": distributed.world_size(),
        "processor": processor_name(device),
    }


def _check_same_on_all_ranks(model: nn.Module, data: CalibrationBatches, recipe: Recipe) -> None:
    given = (data.origin["sha256"], all_parameters(model), json.dumps(recipe.to_dict(), sort_keys=True))
    if len({*distributed.all_gather(given)}) > 1:
        raise SecateurError(
            "the processes were given different models, calibration batches or recipes: give each the same, and all "
            "batches, which are then sharded"
        )


def _calibration_of(
    checkpoint: Checkpoint, request: Request, placement: WeightPlacement, begun_with: int | None = None
) -> CalibrationBatches:
    """Batches for a loaded model; it writes by itself if half of memory holds it, as each token reads all weights.

    `begun_with` is the number of sequences that it writes in the run to resume, which may have begun elsewhere.
    """

    def why() -> str | None:
        if begun_with is not None:
            return None if begun_with else "as it did not when the run began"
        width = checkpoint.compute_dtype.itemsize
        size = sum(each.numel() * max(each.itemsize, width) for each in checkpoint.model.parameters())
        half = total_memory(checkpoint.device) // 2 // _processes(checkpoint.device)
        if size > half:
            return f"its weights take {size / 1e9:.1f} GB, more than half of memory, and each token reads them all"
        return why_silent(checkpoint.model, placement)

    return request.calibration(checkpoint.tokenizer, config_of(checkpoint.model), why)


def _to_write(checkpoint: Checkpoint) -> OffloadedWeights:
    """Where the weights are while the model writes: each token reads all, so copies stay where there is memory."""
    device = checkpoint.device
    room = _room(device) if device.startswith("cuda") else available_bytes() // 2 // _processes(device)
    return OffloadedWeights(device, checkpoint.compute_dtype, room)


def _processes(device: str) -> int:
    """Processes that share the memory of a device, at most: each has its own GPU."""
    return 1 if device.startswith("cuda") else distributed.world_size()


def _room(device: str) -> int:
    """Bytes of layers that stay onloaded between forward passes of the whole model: half of a GPU's free memory.

    0 on a CPU: copies are cheap there, and the model may be larger than memory.
    """
    return torch.cuda.mem_get_info(device)[0] // 2 if device.startswith("cuda") else 0


def _finished(
    out: Path, source: ModelSource, folder: Path, request: Request, before: Manifest, resume: bool, overwrite: bool
) -> Report | None:
    """The report of the finished model in `out`, where the run to resume is finished; None where there is work to do.

    Raises:
        SecateurError: it is of another run, and may not be overwritten.
    """
    found = None
    if distributed.is_main() and resume and not before.has_begun and (out / METADATA).is_file():
        found = _report_in(out, source, folder, request, overwrite)
    return distributed.broadcast_object(found)


def _report_in(out: Path, source: ModelSource, folder: Path, request: Request, overwrite: bool) -> Report | None:
    config, tokenizer = load_config_and_tokenizer(folder, source.trust_remote_code)
    try:
        report = read_metadata(out)
    except SecateurError as error:
        _check_may_replace_after(error, overwrite)
        return None
    data = request.calibration(tokenizer, config, lambda: None if report.calibration.get("written") else "")
    wanted = _decisive(_identity(source.name, folder, request.recipe, data, {}))
    try:
        held = _decisive(report.identity)
        different = sorted(name for name in wanted if held[name] != wanted[name])
        if different:
            raise SecateurError(f"{out} holds a finished model of another run (its {', '.join(different)} differs)")
        if found := first_damage(out, report.unedited_files):
            raise SecateurError(f"{found}: the finished model in {out} is damaged or was changed")
    except SecateurError as error:
        _check_may_replace_after(error, overwrite)
        return None
    return report


def _check_may_replace_after(error: SecateurError, overwrite: bool) -> None:
    """Check that a model that is not the one asked for, as an error says, may be replaced.

    Raises:
        SecateurError: it may not.
    """
    if not overwrite:
        raise SecateurError(f"{error.raw}: choose another folder, or pass ‹overwrite› to replace it") from error


def _decisive(identity: dict[str, Any]) -> dict[str, Any]:
    """What tells a finished model from another: not names, versions and threads, as the model is there."""
    model, calibration = (identity.get(name) for name in ("model", "calibration"))
    return {
        "model": model.get("files") if isinstance(model, dict) else None,
        "recipe": identity.get("recipe"),
        "calibration": calibration.get("sha256") if isinstance(calibration, dict) else None,
    }


def _identity(
    name: str, folder: Path, recipe: Recipe, data: CalibrationBatches, where: dict[str, Any]
) -> dict[str, Any]:
    """What decides the bits of a run, and names that explain it. Cost: one read of the model's files."""
    return {
        "model": {"name": name, "files": {path.name: sha256(path) for path in model_files(folder)}},
        "recipe": recipe.without_calibration().to_dict(),
        "calibration": data.origin | {"own_words": data.to_write.number if data.to_write else 0},
        "environment": {
            # The number of a GPU is that of a process, or the user's choice among equal ones.
            name: value.partition(":")[0] if name == "device" else value
            for name, value in where.items()
            if name not in ("python", "platform")
        },
    }


def _check_request(out: Path, model: str, texts: CalibrationSource, folder: Path) -> None:
    """Check that `out` can be written, and holds nothing that the run reads."""
    named = user_path(model)
    texts_at = text_place(texts) if isinstance(texts, str | Path) else None
    check_place(out)
    check_apart(out, [folder, *(place for place in (named, texts_at) if place is not None and place.exists())])
    check_outside_model(out, model)
