"""Checks of a checkpoint's files before they are used, and the dtypes that follow from them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from secateur.errors import SecateurError
from secateur.packed.files import FORMAT_VERSION, METHOD, is_packed, read_headers
from secateur.runtime.messages import first_line
from secateur.storage.checkpoint_files import DENSE_INDEX, DENSE_WEIGHTS, PACKED_INDEX, PACKED_STEM, PACKED_WEIGHTS
from secateur.storage.json_files import read_json

ADAPTER = "adapter_config.json"
QUANTISED = ("I8", "U8", "I16", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")
_COUNT = re.compile(r"layers?$|layers_|blocks$|experts$|depth$")  # num_hidden_layers, n_layer, num_local_experts
LONGEST_NAME = 255  # of a file
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_folder(folder: Path, allow_pickle: bool = False) -> tuple[dict[str, torch.dtype], dict[str, Path]]:
    """Check a checkpoint's files without reading weights.

    Returns:
        the dtype of each floating tensor, and the file of each tensor, by name.

    Raises:
        SecateurError: missing, incomplete, damaged or quantised files.
    """
    _check_no_adapter(folder)
    config = _config_of(folder)
    for part in _parts_of(config):
        if quantised := part.get("quantization_config"):
            method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
            if method == METHOD:
                raise SecateurError(f"{folder} is packed: `secateur unpack` gives the ordinary checkpoint")
            raise SecateurError(f"{folder} is quantised ({method}): give the original floating-point checkpoint")
    _check_config(folder / "config.json", config)
    shard_paths = _shard_paths(folder, DENSE_WEIGHTS, DENSE_INDEX)
    if not shard_paths:
        has_pickles = any(folder.glob("pytorch_model*.bin"))
        if allow_pickle and has_pickles:
            return {}, {}
        hint = (
            " (it has .bin files: ‹allow_pickle› reads them, at the risk of code in them; "
            "`save_pretrained` of a model that you trust writes safetensors)"
        )
        raise SecateurError(f"{folder} holds no model.safetensors{hint * has_pickles}")
    dtypes: dict[str, torch.dtype] = {}
    shards: dict[str, Path] = {}
    for path in shard_paths:
        try:
            with safe_open(path, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118 - safe_open is not a mapping
                    dtype = shard.get_slice(key).get_dtype()
                    shards[key] = path
                    if dtype in FLOATS:
                        dtypes[key] = FLOATS[dtype]
                    elif dtype in QUANTISED and key.endswith("weight"):
                        raise SecateurError(
                            f"{path} is quantised ({key} is {dtype}): give the original floating-point checkpoint"
                        )
        except (SafetensorError, OSError) as error:
            raise SecateurError(f"{path} is damaged or incomplete ({first_line(error)}): download it again") from error
    _check_counts(folder / "config.json", config, len(shards))
    return dtypes, shards


def check_packed(folder: Path) -> dict[str, Path]:
    """Check a packed checkpoint's files without reading weights; the file of each tensor, by name.

    Raises:
        SecateurError: it is not packed, or files are missing, incomplete, damaged or of another version.
    """
    _check_no_adapter(folder)
    config = _config_of(folder)
    packing = config.get("quantization_config")
    if not isinstance(packing, dict) or packing.get("quant_method") != METHOD:
        if not is_packed(folder):
            raise SecateurError(f"{folder} is not packed: its config.json names no packing")
        raise SecateurError(
            f"{folder} holds packed weights ({PACKED_STEM}*.safetensors), but its config.json describes dense ones: if "
            f"a dense model was saved over the packed one, remove {PACKED_STEM}*.safetensors*; else restore config.json"
        )
    if packing.get("version") != FORMAT_VERSION:
        raise SecateurError(
            f"{folder} is packed in version {packing.get('version')} of the format; this secateur reads version "
            f"{FORMAT_VERSION}: upgrade it"
        )
    _check_config(folder / "config.json", config)
    sharded = packing.get("sharded", False)  # decides what is loaded
    if not isinstance(sharded, bool):
        raise SecateurError(f"{folder / 'config.json'}: sharded is {sharded!r}, which must be true or false")
    paths = _indexed(folder, PACKED_INDEX) if sharded else list(filter(Path.is_file, [folder / PACKED_WEIGHTS]))
    if not paths:
        raise SecateurError(f"{folder} holds no {PACKED_WEIGHTS}: the download is incomplete")
    shards: dict[str, Path] = {}
    for path in paths:
        read_headers(path)
        with safe_open(path, framework="pt") as file:
            shards |= dict.fromkeys(file.keys(), path)
    _check_counts(folder / "config.json", config, len(shards))
    return shards


def _check_no_adapter(folder: Path) -> None:
    """Check that a folder holds no adapter: transformers would apply it to the model in the folder.

    Raises:
        SecateurError: it does.
    """
    if not (folder / ADAPTER).is_file():
        return
    if (folder / "config.json").is_file():
        raise SecateurError(
            f"{folder} holds a model and an adapter ({ADAPTER}), which transformers would add to it: if the adapter is "
            f"merged into the model, move its adapter_* files away; else merge it first"
        )
    raise SecateurError(
        f"{folder} is a LoRA adapter, not a model: merge it first, by "
        f"peft.AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained(MERGED), "
        f"and save its tokenizer there too"
    )


def _config_of(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise SecateurError(f"there is no folder {folder}")
    return read_json(folder / "config.json", "a model folder needs its config.json")


def _check_config(path: Path, config: dict[str, Any]) -> None:
    """Check what is read of a config.json before transformers reads it.

    Raises:
        SecateurError: a value of another kind, code from elsewhere, or weights that were not checked.
    """
    for part in _parts_of(config):
        made_as = part.get("architectures") or []
        if not isinstance(made_as, list) or not all(isinstance(name, str) for name in made_as):
            raise SecateurError(f"{path}: architectures is {made_as!r}, which must be a list of names")
        for name in ("attn_implementation", "_attn_implementation"):
            if "/" in str(part.get(name, "")):
                raise SecateurError(f"{path}: {name} is {part[name]!r}, code from a hub, which is not run: remove it")
        if named := part.get("transformers_weights"):
            raise SecateurError(
                f"{path}: transformers_weights is {named!r}, and weights are read from model.safetensors or what its "
                f"index names: rename the file, and remove the entry"
            )


def _parts_of(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration, and those within it: of a composite model, transformers may take `text_config` instead."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _parts_of(value)


def _check_counts(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Check numbers of layers and experts against the tensors: each has one at least, and each costs time to build.

    Raises:
        SecateurError: more than there can be.
    """
    for part in _parts_of(config):
        for name, value in part.items():
            if _COUNT.search(name) and isinstance(value, int) and value > max(tensors, 1024):
                raise SecateurError(
                    f"{path}: {name} is {value:,}, but the files hold {tensors:,} tensors: it is damaged"
                )


def main_dtype(dtypes: dict[str, torch.dtype], config: Any) -> torch.dtype:
    """The dtype that most tensors of the checkpoint have."""
    if dtypes:
        return Counter(dtypes.values()).most_common(1)[0][0]
    return getattr(config, "dtype", None) or torch.float32


def holds_all(held: torch.dtype, stored: torch.dtype) -> bool:
    """Whether a floating dtype holds every value of another; fp16 and bf16 hold neither each other's."""
    return torch.promote_types(held, stored) == held


def compute_dtype(storage: torch.dtype, device: str) -> torch.dtype:
    """Dtype of forward passes: the checkpoint's where the device is fast in it, else fp32, which holds its values.

    A CPU is fast in bf16 with AMX tiles, or where AVX-512's bf16 instructions run at full rate: on AMD (2.2 times the
    rate of fp32 on a Zen 4), while a Xeon without AMX gave half the rate of fp32.
    """
    if not device.startswith("cpu") or storage in (torch.float32, torch.float64):
        return storage
    return storage if storage == torch.bfloat16 and _is_fast_in_bf16() else torch.float32


@cache
def _is_fast_in_bf16() -> bool:
    if torch.cpu._is_amx_tile_supported():
        return True
    processor = Path("/proc/cpuinfo")
    amd = processor.is_file() and "AuthenticAMD" in processor.read_text(encoding="utf-8")
    return amd and torch.cpu._is_avx512_bf16_supported()


def _shard_paths(folder: Path, single: str, index: str) -> list[Path]:
    if (folder / single).is_file():  # transformers takes it even next to an index
        return [folder / single]
    return _indexed(folder, index)


def _indexed(folder: Path, index: str) -> list[Path]:
    """The files that an index names; none where there is no index."""
    if not (folder / index).exists():
        return []
    weight_map = read_json(folder / index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SecateurError(f"{folder / index} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or len(name) > LONGEST_NAME:
            raise SecateurError(f"{folder / index} names the shard {repr(name)[:80]}, which is not a plain file name")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise SecateurError(f"{folder / name} is missing though the index names it: the download is incomplete")
    return [folder / name for name in names]
