"""Write a pruned model as an ordinary checkpoint: dense safetensors, tokenizer, `secateur.json`, recipe, model card.

Nothing marks the checkpoint as sparse: every loader that knew such marks has dropped them, and some then load random
weights without an error. `resume.put_in_place` gives it its place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor

from secateur.checkpoints.load import Checkpoint
from secateur.checkpoints.model_card import model_card
from secateur.checkpoints.packing import entries_of, packed_card, packing_config, transposed_matrices
from secateur.models.matrices import layer_of, parameter_of
from secateur.packed.files import write_index, write_weights
from secateur.packed.layout import pack, pack_int8_where_exact
from secateur.reporting.report import Report
from secateur.resume.publish import Publisher, read_outcome
from secateur.runtime.progress import Progress
from secateur.sources.other_files import copy_other_files
from secateur.sources.validate import holds_all
from secateur.storage.checkpoint_files import CARD, DENSE_INDEX, DENSE_STEM, PACKED_INDEX, PACKED_STEM
from secateur.storage.file_records import FileRecord
from secateur.storage.held_folder import HeldFolder
from secateur.storage.json_files import read_json


def write_checkpoint(
    checkpoint: Checkpoint,
    report: Report,
    publisher: Publisher,
    title: str,
    max_shard_size: int,
    progress: Progress,
) -> dict[str, FileRecord]:
    """Write model, tokenizer, every other file of the source, report, recipe and card to the publisher's folder.

    The publisher knows which shards are whole, and records each that follows. Memory: one shard.

    Args:
        checkpoint: the pruned model.
        report: of the run.
        publisher: keeps the shards.
        title: of the model card.
        max_shard_size: bytes of a weight file; a resumed run keeps the size that it was planned with.
        progress: called with the stage `save`.

    Returns:
        the record of each file of the finished model.

    Raises:
        OSError, SafetensorError: the disk is full or not writable.
        SecateurError: a damaged journal.
    """
    model, folder, outcome = checkpoint.model, publisher.folder, read_outcome(publisher.manifest)
    is_packed = report.recipe.format == "packed"
    if outcome is None:
        shards = _plan_shards(checkpoint, max_shard_size)
        outcome = {"report": report.to_dict(), "max_shard_size": max_shard_size, "shards": shards}
        publisher.keep_outcome(outcome)
    publisher.restore(model, names_of_pruned_parameters(report), outcome["shards"])
    for number in range(publisher.num_whole_shards, len(outcome["shards"])):
        names = outcome["shards"][number]
        made = _write_shard(checkpoint, report, names, folder, outcome["max_shard_size"])
        if is_packed:
            _pack_files(folder / made, report)
        publisher.keep_shard(model, names, made)
        progress("save", number + 1, len(outcome["shards"]))
    weights = publisher.name_shards()
    if len(weights) > 1:
        write_index(folder / (PACKED_INDEX if is_packed else DENSE_INDEX), weights, report.model_parameters)
    _write_config(checkpoint, folder, packing_config(len(weights)) if is_packed else None)
    copy_other_files(checkpoint.folder, folder)
    card = model_card(report, title)
    (folder / CARD).write_text(packed_card(card) if is_packed else card, encoding="utf-8")
    _make_readable(folder)
    return report.save(folder, weights)


def _plan_shards(checkpoint: Checkpoint, max_shard_size: int) -> list[list[str]]:
    """Names of the model's tensors shard by shard, up to a size.

    Tied tensors stay together, so they are saved once. So do a layer's tensors, and those that are in no layer:
    transformers may have to combine them into what the checkpoint holds.
    """
    units: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    unit_of: dict[int | str, str] = {}
    for name, tensor in checkpoint.model.state_dict().items():
        content = tensor.untyped_storage().data_ptr() if tensor.numel() else name
        dtype = checkpoint.file_dtypes.get(name) or tensor.dtype
        sizes[name] = 0 if content in unit_of else tensor.numel() * dtype.itemsize
        units.setdefault(unit_of.setdefault(content, layer_of(name)), []).append(name)
    split = split_state_dict_into_shards_factory(
        units,
        get_storage_size=lambda names: sum(sizes[name] for name in names),
        filename_pattern="{suffix}",
        max_shard_size=max_shard_size,
    )
    return [[name for unit in shard for name in units[unit]] for shard in split.filename_to_tensors.values()]


def _write_shard(
    checkpoint: Checkpoint, report: Report, names: Collection[str], folder: Path, max_shard_size: int
) -> str:
    """Let transformers save some of the model's tensors, with config and code, to a new folder; returns its name.

    A layer that is larger than the size becomes several files.
    """
    with HeldFolder(folder) as finished:
        made = finished.new_name()
    (folder / made).mkdir()
    tensors = tensors_to_save(checkpoint, report, names)
    checkpoint.model.save_pretrained(folder / made, state_dict=tensors, max_shard_size=max_shard_size)
    (folder / made / DENSE_INDEX).unlink(missing_ok=True)
    return made


def _pack_files(folder: Path, report: Report) -> None:
    """Replace the dense weight files of a folder by packed ones."""
    transposed = transposed_matrices(report)
    for path in sorted(folder.glob(f"{DENSE_STEM}*.safetensors")):
        packed = path.with_name(path.name.replace(DENSE_STEM, PACKED_STEM, 1))
        make = pack_int8_where_exact if report.recipe.values == "int8" else pack
        write_weights(packed, entries_of(path, transposed, make), "zstd")
        path.unlink()


def tensors_to_save(checkpoint: Checkpoint, report: Report, names: Collection[str]) -> dict[str, Tensor]:
    """Some of the model's tensors, each in its checkpoint's dtype; tied tensors stay one.

    A tensor that was held in a dtype without all values of the checkpoint's and was not pruned is read from the
    checkpoint again, so its bits are the original ones.
    """
    done: dict[tuple[int, int, torch.dtype], Tensor] = {}
    tensors: dict[str, Tensor] = {}
    pruned = names_of_pruned_parameters(report)
    content = checkpoint.model.state_dict()
    for name in names:
        tensor = content[name]
        dtype = checkpoint.file_dtypes.get(name) or tensor.dtype
        key = (tensor.data_ptr(), tensor.numel(), dtype)
        if key not in done:
            is_rounded = tensor.is_floating_point() and not holds_all(tensor.dtype, dtype)
            if is_rounded and name in checkpoint.file_of and name.removesuffix(".weight") not in pruned:
                path, there = checkpoint.file_of[name]
                with safe_open(path, framework="pt") as shard:
                    done[key] = shard.get_tensor(there)
            else:
                done[key] = tensor.to(dtype)
        tensors[name] = done[key]
    return tensors


def names_of_pruned_parameters(report: Report) -> set[str]:
    """Parameters that hold pruned matrices, without `.weight`."""
    return {parameter_of(matrix.name) for matrix in report.matrices}


def _write_config(checkpoint: Checkpoint, folder: Path, packing: dict[str, Any] | None) -> None:
    """Copy the source's config.json where it names this class; it describes these tensors too. Add the packing.

    transformers writes another spelling than it reads (of rotary embeddings, of the dtype), which its older versions
    and other runtimes silently take for defaults. A text model taken out of a larger one keeps what transformers wrote,
    with the checkpoint's dtype instead of that of forward passes.
    """
    path, source = folder / "config.json", checkpoint.folder / "config.json"
    if type(checkpoint.model).__name__ in (read_json(source, "").get("architectures") or ()):
        path.write_bytes(source.read_bytes())
        if packing is None:
            return
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(checkpoint.main_dtype).removeprefix("torch.")
    if packing is not None:
        config["quantization_config"] = packing
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _make_readable(folder: Path) -> None:
    """Give weights the permissions that the user's umask asks for (safetensors writes 0600)."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~umask)
