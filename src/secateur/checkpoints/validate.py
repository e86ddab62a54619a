"""Checks of a checkpoint's files before they are used, and the dtypes that follow from them."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from secateur.errors import SecateurError

INDEX = "model.safetensors.index.json"
QUANTISED = ("I8", "U8", "I16", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_folder(folder: Path, allow_pickle: bool = False) -> tuple[dict[str, torch.dtype], dict[str, Path]]:
    """Check a checkpoint's files without reading weights.

    Returns:
        the dtype of each floating tensor, and the file of each tensor, by name.

    Raises:
        SecateurError: missing, incomplete, damaged or quantised files.
    """
    config = read_json(folder / "config.json", "a model folder needs its config.json")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise SecateurError(f"{folder} is quantised ({method}): give the original floating-point checkpoint")
    shard_paths = _shard_paths(folder)
    if not shard_paths:
        if allow_pickle and any(folder.glob("*.bin")):
            return {}, {}
        hint = " (it has .bin files: ‹allow_pickle› reads them, at the risk of code in them)" * any(
            folder.glob("*.bin")
        )
        raise SecateurError(f"{folder} holds no model.safetensors{hint}")
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
    return dtypes, shards


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: the file.
        why: what is said of a missing file.

    Raises:
        SecateurError: the file is missing, no JSON, or no object.
    """
    if not path.is_file():
        raise SecateurError(f"{path} is missing: {why}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SecateurError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise SecateurError(f"{path} must hold a JSON object")
    return value


def main_dtype(dtypes: dict[str, torch.dtype], config: Any) -> torch.dtype:
    """The dtype that most tensors of the checkpoint have."""
    if dtypes:
        return Counter(dtypes.values()).most_common(1)[0][0]
    return getattr(config, "dtype", None) or torch.float32


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


def _shard_paths(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.is_file():  # transformers takes it even next to an index
        return [single]
    if not (folder / INDEX).exists():
        return []
    weight_map = read_json(folder / INDEX, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SecateurError(f"{folder / INDEX} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise SecateurError(f"{folder / INDEX} names the shard {name!r}, which is not a plain file name")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise SecateurError(f"{folder / name} is missing though the index names it: the download is incomplete")
    return [folder / name for name in names]


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
