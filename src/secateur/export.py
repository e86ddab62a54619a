"""Write a pruned model as an ordinary checkpoint: dense safetensors, tokenizer, `secateur.json`, model card.

Nothing marks the checkpoint as sparse to a runtime: every loader that knew such marks has dropped them, and some
then load random weights without an error. `store` moves it to its place.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor

from secateur.capture import Progress
from secateur.checkpoint import INDEX, Checkpoint, read_json
from secateur.manifest import FOLDER, unfinished
from secateur.recipe import in_words
from secateur.report import Report
from secateur.store import Journal

METADATA = "secateur.json"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx", ".ot"}
NOT_COPIED = {"README.md", "config.json", METADATA}


def check_target(out: Path, inputs: Sequence[Path], overwrite: bool, resume: bool = False) -> None:
    """Raise ValueError unless a checkpoint may be written to `out`. Leaves nothing behind.

    Args:
        out: an absolute path.
        inputs: files and folders that the run reads; `out` may hold none of them, since it is replaced whole.
        overwrite: an earlier model in `out`, or an unfinished run, may be replaced.
        resume: an unfinished run in `out` may go on, and a finished one may be there.
    """
    for kept in (*inputs, Path.cwd()):
        if out == kept.resolve() or out in kept.resolve().parents:
            raise ValueError(f"{out} is or holds {kept}, which must stay: write to another folder")
    if out.is_file():
        raise ValueError(f"{out} is a file: give a folder to write to")
    if out.is_dir() and any(out.iterdir()):
        _check_content(out, overwrite, resume)
    made = [parent for parent in (out.parent, *out.parent.parents) if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=out if out.is_dir() else out.parent, prefix=f".{out.name}.").cleanup()
    except OSError as error:
        raise ValueError(f"{out} can't be written: {error.strerror} ({error.filename})") from error
    finally:
        for parent in made:
            if parent.is_dir():
                parent.rmdir()


def _check_content(out: Path, overwrite: bool, resume: bool) -> None:
    """Raise ValueError unless what `out` holds may be replaced, or gone on with."""
    kept, finished = unfinished(out), (out / METADATA).is_file()
    if kept and not overwrite and not resume:
        raise ValueError(
            f"{out} holds an unfinished run ({kept.progress}): go on with --resume, or start again with --overwrite"
        )
    others = [path for path in out.iterdir() if path.name not in {FOLDER, *(kept.files if kept else ())}]
    if not others or (kept and not overwrite):
        return
    if not overwrite and not (resume and finished):
        raise ValueError(f"{out} exists and is not empty: choose another folder, or pass --overwrite to replace it")
    if not finished and not (out / "config.json").is_file():
        raise ValueError(f"{out} holds neither {METADATA} nor config.json, so it is no model: it is not overwritten")
    if folders := sorted(path.name for path in others if path.is_dir()):
        raise ValueError(f"{out} holds the folder {folders[0]}, as no checkpoint of ours does: it is not overwritten")


def check_shard_size(size: str) -> None:
    """Raise ValueError unless size is a number and a unit, as transformers reads it."""
    if not re.fullmatch(r"\d+\s*[KMGT]i?B", size, re.IGNORECASE):
        raise ValueError(f"max-shard-size is {size!r}; write a size such as 5GB or 500MB")


def write(
    checkpoint: Checkpoint,
    report: Report,
    journal: Journal,
    folder: Path,
    title: str,
    max_shard_size: str,
    progress: Progress,
) -> dict[str, str]:
    """Write model, tokenizer, every other file of the source, metadata and card to a folder.

    The journal says which shards are whole there, and hears of each that follows; the first process plans them all.
    Memory: one shard.

    Returns:
        for each file its name in the finished model.

    Raises:
        OSError, SafetensorError: the disk is full or not writable.
        ValueError: a damaged journal.
    """
    model, outcome = checkpoint.model, journal.outcome()
    if outcome is None:
        shards = _shards(checkpoint, max_shard_size)
        outcome = {"report": report.to_dict(), "max_shard_size": max_shard_size, "shards": shards}
        journal.keep_outcome(outcome)
    journal.restore(model, _pruned(report), outcome["shards"])
    for number in range(len(journal.manifest.shards), len(outcome["shards"])):
        names = outcome["shards"][number]
        made = _write_shard(checkpoint, report, names, folder, number, outcome["max_shard_size"])
        journal.keep_shard(model, names, made)
        progress("save", number + 1, len(outcome["shards"]))
    weights = _weight_files(journal)
    if len(weights) > 1:
        _write_index(folder, weights, report.model_parameters)
    _write_config(checkpoint, folder)
    _copy_companions(checkpoint.folder, folder)
    (folder / METADATA).write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(checkpoint, report, title), encoding="utf-8")
    _make_readable(folder)
    others = [path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".safetensors"]
    return weights | {name: name for name in others}


def _shards(checkpoint: Checkpoint, max_shard_size: str) -> list[list[str]]:
    """Names of the model's tensors, in lists that fill up to a size.

    Tied tensors stay together, so that they are saved once, and so do a layer's, and those that are in none, which
    transformers may have to put together to what the checkpoint holds.
    """
    units: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    unit_of: dict[int | str, str] = {}
    for name, tensor in checkpoint.model.state_dict().items():
        layer = re.match(r".*?\.\d+\.", name)
        content = tensor.untyped_storage().data_ptr() if tensor.numel() else name
        dtype = checkpoint.storage.get(name) or tensor.dtype
        sizes[name] = 0 if content in unit_of else tensor.numel() * dtype.itemsize
        units.setdefault(unit_of.setdefault(content, layer[0] if layer else ""), []).append(name)
    split = split_state_dict_into_shards_factory(
        units,
        get_storage_size=lambda names: sum(sizes[name] for name in names),
        filename_pattern="{suffix}",
        max_shard_size=max_shard_size,
    )
    return [[name for unit in shard for name in units[unit]] for shard in split.filename_to_tensors.values()]


def _write_shard(
    checkpoint: Checkpoint, report: Report, names: Collection[str], folder: Path, number: int, max_shard_size: str
) -> list[Path]:
    """Let transformers save some of the model's tensors, with config and code; returns the files.

    A layer that is larger than a shard may be becomes several files.
    """
    scratch = folder / "shard"
    shutil.rmtree(scratch, ignore_errors=True)
    tensors = tensors_to_save(checkpoint, report, names)
    checkpoint.model.save_pretrained(scratch, state_dict=tensors, max_shard_size=max_shard_size)
    (scratch / INDEX).unlink(missing_ok=True)
    made = []
    for path in sorted(scratch.iterdir()):
        name = f"{number:05d}-{path.name}" if path.suffix == ".safetensors" else path.name
        made.append(path.replace(folder / name))
    scratch.rmdir()
    return made


def _weight_files(journal: Journal) -> dict[str, str]:
    """Names of the finished model's weight files, as transformers gives them, by those of the shards' files."""
    made = [name for shard in journal.manifest.shards for name in shard]
    if len(made) == 1:
        return {made[0]: "model.safetensors"}
    return {name: f"model-{number:05d}-of-{len(made):05d}.safetensors" for number, name in enumerate(made, 1)}


def _write_index(folder: Path, weights: dict[str, str], parameters: int) -> None:
    """Write which tensor is in which file, as transformers does."""
    size, weight_map = 0, {}
    for made, name in weights.items():
        with safe_open(folder / made, framework="pt") as shard:
            weight_map |= dict.fromkeys(shard.keys(), name)
        with (folder / made).open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        size += (folder / made).stat().st_size - header
    index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tensors_to_save(checkpoint: Checkpoint, report: Report, names: Collection[str]) -> dict[str, Tensor]:
    """Some of the model's tensors, each in its checkpoint's dtype; tied tensors stay one.

    A tensor that the forward pass held in a narrower dtype than the checkpoint does, and that was not pruned, is read
    from the checkpoint again, so that its bits are the original ones.
    """
    done: dict[tuple[int, int, torch.dtype], Tensor] = {}
    tensors: dict[str, Tensor] = {}
    pruned = _pruned(report)
    content = checkpoint.model.state_dict()
    for name in names:
        tensor = content[name]
        dtype = checkpoint.storage.get(name) or tensor.dtype
        key = (tensor.data_ptr(), tensor.numel(), dtype)
        if key not in done:
            narrower = tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < torch.finfo(dtype).bits
            if narrower and name in checkpoint.stored and name.removesuffix(".weight") not in pruned:
                path, there = checkpoint.stored[name]
                with safe_open(path, framework="pt") as shard:
                    done[key] = shard.get_tensor(there)
            else:
                done[key] = tensor.to(dtype)
        tensors[name] = done[key]
    return tensors


def _pruned(report: Report) -> set[str]:
    """The matrices that were pruned, and the stacks of experts of which some were."""
    return {matrix.name.partition("[")[0] for matrix in report.matrices}


def model_card(checkpoint: Checkpoint, report: Report, title: str) -> str:
    """README.md of the pruned model: licence and base model from the source's card, recipe and figures from the run."""
    source = _front_matter(checkpoint.folder / "README.md")
    base = source.get("base_model") if checkpoint.name == "smollm2" else None
    header = {
        "license": source.get("license", "unknown"),
        "base_model": base or checkpoint.name,
        "tags": "[pruned, sparse, secateur]",
        "library_name": "transformers",
    }
    gguf = checkpoint.name == "smollm2" or checkpoint.name.endswith(".gguf")
    what = f"{base or checkpoint.name}{' (dequantised from its GGUF file)' * gguf}"
    recipe = report.recipe
    options = ", ".join(f"{key} {value}" for key, value in recipe["options"].items()) or "none"
    calibration = report.calibration
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in header.items()),
        "---",
        f"# {title}",
        "",
        f"{what}, pruned to {recipe['pattern']} in one shot, without retraining, by secateur.",
        "",
        "| | |",
        "|---|---|",
        f"| zeros in the pruned matrices | {report.sparsity:.2%} of {report.pruned_parameters:,} weights |",
        f"| share of the model's weights in them | {report.pruned_parameters / max(1, report.model_parameters):.1%} |",
        f"| mean relative layer error, before any block refit | {report.mean_relative_error:.4f} |",
        f"| recipe | {in_words(recipe)} |",
        f"| options of the method | {options} |",
        f"| calibration | {_amount(calibration)} of {calibration['source']} |",
        "",
        "The zeros are stored like other weights: they make no file smaller, and no dense runtime faster.",
        f"Per-matrix figures and the whole recipe are in `{METADATA}`.",
        "",
    ]
    return "\n".join(lines)


def _amount(calibration: dict[str, Any]) -> str:
    """How much was calibrated on; the caller's own tensors may be of any length."""
    if "seq_len" in calibration:
        return f"{calibration['samples']} x {calibration['seq_len']} tokens"
    return f"{calibration['samples']} sequences"


def _front_matter(card: Path) -> dict[str, str]:
    """Plain `key: value` lines of a card's YAML header."""
    if not card.is_file():
        return {}
    match = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    lines = match[1].splitlines() if match else []
    pairs = (re.fullmatch(r"(\w+):\s*(\S.*)", line) for line in lines)
    return {pair[1]: pair[2] for pair in pairs if pair}


def _write_config(checkpoint: Checkpoint, folder: Path) -> None:
    """Let config.json be the source's, which describes these tensors too, where it names this class.

    transformers writes another spelling than it reads (of rotary embeddings, of the dtype), which its older versions
    and other runtimes silently take for defaults. Of a text model taken out of a larger one it is the only one; there
    the dtype is that of the checkpoint, not the one that forward passes ran in.
    """
    path, source = folder / "config.json", checkpoint.folder / "config.json"
    if type(checkpoint.model).__name__ in (read_json(source, "").get("architectures") or ()):
        shutil.copyfile(source, path)
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(checkpoint.main_dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_companions(source: Path, target: Path) -> None:
    """Copy the source's other files as they are: tokenizer, chat template, generation config, licence, notice."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name not in NOT_COPIED and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)


def _make_readable(folder: Path) -> None:
    """Give files the permissions that the user's umask asks for (safetensors writes 0600)."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


def environment() -> dict[str, Any]:
    """Versions and threads: what a repeat of the run needs to be the same."""
    import platform
    from importlib.metadata import version

    packages = ("secateur", "torch", "transformers", "safetensors")
    return {package: version(package) for package in packages} | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
