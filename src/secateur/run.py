"""One run: a model pruned in place, or loaded by name, pruned, and saved to a folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import engine, export, parallel
from secateur.calibration import BATCH_TOKENS, Calibration, calibrate, check_is_name
from secateur.capture import Progress
from secateur.checkpoint import Checkpoint, default_device, load, load_words, read_json, resolve
from secateur.durable import digest_of
from secateur.model import config_of, parameters_of
from secateur.recipe import describe
from secateur.report import Report
from secateur.residence import Mapped
from secateur.solvers.contract import check_kind
from secateur.store import Journal, open_journal

LARGEST_SEED = 2**63  # of torch


@dataclass(frozen=True)
class Texts:
    """What to calibrate on, as `calibrate` takes it."""

    source: str | Path | Sequence[Tensor] | Sequence[Mapping[str, Tensor]] | None
    samples: int
    seq_len: int | None
    seed: int

    def __post_init__(self) -> None:
        check_is_name(self.source)
        for name in ("samples", "seq_len", "seed"):
            check_kind(Texts, name, getattr(self, name), name)
        if not 0 <= self.seed < LARGEST_SEED:
            raise ValueError(f"seed is {self.seed}; it must lie between 0 and {LARGEST_SEED - 1}")

    def calibration(self, tokenizer: Any, config: Any, plan: engine.Plan) -> Calibration:
        """Batches of the size that the plan works best with."""
        size = BATCH_TOKENS if plan.refit is None else plan.refit.step_tokens
        return calibrate(self.source, tokenizer, config, self.samples, self.seq_len, self.seed, size)


@dataclass(frozen=True)
class Source:
    """What to load, and how."""

    name: str
    device: str | None
    trust_remote_code: bool
    allow_pickle: bool

    def folder(self) -> Path:
        """Where it lies; one process fetches or converts it, where need be, and the others find it."""
        if not parallel.is_first():
            parallel.wait()
        folder = resolve(self.name, self.trust_remote_code, self.allow_pickle)
        if parallel.is_first():
            parallel.wait()
        return folder

    def load(self, scratch: Path) -> Checkpoint:
        """The model, mapped from its files, those in `scratch` among them; each process has a GPU of its own."""
        device = self.device or default_device()
        if device == "cuda" and parallel.size() > 1:
            device = f"cuda:{parallel.own_gpu()}"
        converted = scratch / f"converted-{parallel.rank()}"
        return load(self.name, device, self.trust_remote_code, self.allow_pickle, converted)


def prune_in_place(
    model: nn.Module | Checkpoint,
    tokenizer: Any,
    plan: engine.Plan,
    texts: Texts,
    progress: Progress,
    journal: Journal | None = None,
) -> Report:
    """Prune a model object, or what was loaded for a journal; its report.

    Raises:
        ValueError: as `api.prune` says.
    """
    started = time.perf_counter()
    if isinstance(model, Checkpoint):
        module, name, tokenizer = model.model, model.name, tokenizer or model.tokenizer
        plan = replace(plan, storage_dtype=model.matrix_storage)
    else:
        module, name = model, type(model).__name__
    config = config_of(module)
    data = texts.calibration(tokenizer, config, plan)
    given = (data.origin["sha256"], parameters_of(module), plan.seed, json.dumps(describe(plan), sort_keys=True))
    if len({*parallel.gather(given)}) > 1:
        raise ValueError(
            "the processes were given different models, calibration batches, settings or seeds: give each the same, "
            "and all batches, which are then dealt out"
        )
    parameter = next(module.parameters())
    device, dtype = str(parameter.device), parameter.dtype
    if isinstance(model, Checkpoint):
        device, dtype = model.device, model.compute_dtype
    environment = export.environment() | {"device": device, "forward_dtype": str(dtype).removeprefix("torch.")}
    environment["processes"] = parallel.size()
    environment["processor"] = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
    )
    if journal is not None:
        assert isinstance(model, Checkpoint)
        journal.storage_of = plan.storage_of
        journal.begin(_identity(name, model.folder, plan, data.origin, environment))
        if outcome := parallel.from_first(journal.outcome() if parallel.is_first() else None):
            return Report.from_dict(outcome["report"])
    outcome = engine.run(module, data.batches, plan, progress, journal)
    return Report(
        recipe=describe(plan) | {"model": name},
        environment=environment,
        identity={} if journal is None else journal.manifest.identity,
        calibration=data.origin,
        matrices=outcome.matrices,
        blocks=outcome.blocks,
        dense=outcome.dense,
        model_parameters=parameters_of(module),
        layer_parameters=outcome.layer_weights,
        seconds=time.perf_counter() - started if journal is None else journal.spent,
        notices=(model.notices if isinstance(model, Checkpoint) else [])
        + data.notices
        + outcome.notices
        + ([] if journal is None else journal.manifest.notices),
    )


def prune_to_folder(
    source: Source,
    out: Path,
    plan: engine.Plan,
    texts: Texts,
    overwrite: bool,
    resume: bool,
    max_shard_size: str,
    progress: Progress,
) -> Report:
    """Load a model, prune it, and save it to a folder that no other run may write meanwhile.

    Raises:
        ValueError: as `api.prune` says.
    """
    folder = source.folder()
    out = out.expanduser().resolve()
    if parallel.is_first():
        _check_writable(out, source.name, texts.source, folder, overwrite, resume)
    with open_journal(out, resume, overwrite) as journal:
        finished = None
        if parallel.is_first() and resume and (journal.manifest.files or not journal.manifest.identity):
            finished = _finished(out, source, folder, plan, texts, overwrite)
        if finished := parallel.from_first(finished):
            return finished
        checkpoint = source.load(journal.folder)
        if plan.memory.limit is not None and plan.memory.folder is None:
            plan = replace(plan, memory=replace(plan.memory, folder=journal.folder))
        journal.residence = Mapped(checkpoint.device, checkpoint.compute_dtype, _room(checkpoint.device))
        report = prune_in_place(checkpoint, None, plan, texts, progress, journal)
        report.out = str(out)
        journal.finish(
            checkpoint.model,
            lambda made: export.write(checkpoint, report, journal, made, out.name, max_shard_size, progress),
        )
    return report


def _room(device: str) -> int:
    """Bytes of layers that may stay on a device between forward passes of the whole model: half of what a GPU has
    free. On a CPU none: there the copies are cheap, and memory is what a model may be larger than."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.startswith("cuda") else 0


def _finished(
    out: Path, source: Source, folder: Path, plan: engine.Plan, texts: Texts, overwrite: bool
) -> Report | None:
    """The report of the finished model in `out`, where that is what is wanted; None where there is none, or it may be
    overwritten.

    Raises:
        ValueError: it is of another run.
    """
    path = out / export.METADATA
    if not path.is_file():
        return None
    config, words = load_words(folder, source.trust_remote_code)
    data = texts.calibration(words, config, plan)
    wanted = _identity(source.name, folder, plan, data.origin, {})
    try:
        report = Report.from_dict(read_json(path, ""))
    except (KeyError, TypeError, AttributeError) as error:
        if overwrite:
            return None
        raise ValueError(f"{path} is no report of a run: choose another folder, or pass --overwrite") from error
    # Versions and threads may differ: the model is there.
    different = sorted(name for name in ("model", "recipe", "calibration") if report.identity.get(name) != wanted[name])
    if different and not overwrite:
        raise ValueError(
            f"{out} holds a finished model of another run (its {', '.join(different)} differs): choose another folder, "
            f"or pass --overwrite to replace it"
        )
    return None if different else report


def _identity(
    name: str, folder: Path, plan: engine.Plan, origin: dict[str, Any], environment: dict[str, Any]
) -> dict[str, Any]:
    """What decides the bits of a run. Cost: one read of the model's files."""
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json", ".py")]
    return {
        "model": {"name": name, "files": {path.name: digest_of(path) for path in sorted(files)}},
        "recipe": json.loads(json.dumps(describe(plan))) | {"seed": plan.seed},
        "calibration": origin["sha256"],
        "environment": {
            # The number of a GPU is that of a process, or the user's choice among like ones.
            name: value.partition(":")[0] if name == "device" else value
            for name, value in environment.items()
            if name not in ("python", "platform")
        },
    }


def _check_writable(out: Path, model: str, calibration: Any, folder: Path, overwrite: bool, resume: bool) -> None:
    """Raise ValueError where `out` must not be written, checked against everything that the run reads."""
    named = [Path(item).expanduser() for item in (model, calibration) if isinstance(item, str | Path)]
    export.check_target(out, [folder, *(item for item in named if item.exists())], overwrite, resume)
