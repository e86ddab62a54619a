"""`save_pretrained` of a model that was loaded from a packed folder: packed again."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from secateur.errors import SecateurError
from secateur.packed.encoding import Compression
from secateur.packed.files import Entry, file_names, write_index, write_weights
from secateur.packed.layout import PackedTensor, is_worth_packing, pack
from secateur.packed.linear import PackedLinear
from secateur.recipe.sizes import parse_size
from secateur.storage.checkpoint_files import PACKED_INDEX, PACKED_STEM

UNSUPPORTED = {
    "push_to_hub": "save it to a folder, and publish that by secateur.push",
    "state_dict": "leave it out, as its own weights are saved",
    "variant": "leave it out",
}
_ANY_WEIGHTS = re.compile(r"(model|packed|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


def save_packed(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    max_shard_size: int | str = "50GB",
    compression: Compression = "zstd",
    **others: Any,
) -> None:
    """Save a model with its config and generation config, and its weights packed.

    Args:
        model: loaded from a packed folder.
        save_directory: is made where it is missing; weights that are there are replaced.
        is_main_process: whether this process writes; the others do nothing.
        max_shard_size: of a file, such as `5GB`; a packed file ends up smaller.
        compression: `zstd`, or `none` for weights that can be mapped.
        others: arguments of transformers that this does not need; those that it can't honour are refused.

    Raises:
        SecateurError: `push_to_hub`, a `state_dict`, a `variant`, or a form that is not safetensors.
    """
    for name, advice in UNSUPPORTED.items():
        if others.get(name):
            raise SecateurError(f"a packed model can't be saved with ‹{name}›: {advice}")
    if not others.get("safe_serialization", True):
        raise SecateurError("a packed model is saved as safetensors: leave ‹safe_serialization› out")
    if not is_main_process:
        return
    shards = _shards(_entries(model), parse_size(max_shard_size, "max_shard_size"))
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:  # a full disk leaves the earlier model
        for name, entries in shards.items():
            write_weights(Path(scratch) / name, entries, compression)
        if len(shards) > 1:
            write_index(Path(scratch) / PACKED_INDEX, shards)
        _write_configs(model, Path(scratch), len(shards) > 1)
        written = {path.name for path in Path(scratch).iterdir()}
        for name in sorted(
            written, key=lambda name: name == "config.json"
        ):  # the config names the files, so it is last
            (Path(scratch) / name).replace(folder / name)
        for path in folder.iterdir():
            if _ANY_WEIGHTS.fullmatch(path.name) and path.name not in written:
                path.unlink()


def _write_configs(model: Any, folder: Path, is_sharded: bool) -> None:
    model.config.quantization_config.sharded = is_sharded
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _entries(model: Any) -> list[Entry]:
    """Every tensor under the name that it has in a checkpoint, tied ones once."""
    content: dict[str, Any] = remove_tied_weights_from_state_dict(_dense_tensors(model), model)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and module.is_packed:
            content[f"{name}.weight"] = module.packed
    return [_entry(name, each) for name, each in revert_weight_conversion(model, content).items()]


def _dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without packed weights, which it would hold unpacked."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        of_module: Any = super(PackedLinear, module) if isinstance(module, PackedLinear) else module
        of_module._save_to_state_dict(found, f"{name}." if name else "", keep_vars=False)
    return found


def _entry(name: str, content: Tensor | PackedTensor) -> Entry:
    if isinstance(content, PackedTensor):
        return Entry(name, content.dtype, len(content.shape), True, content.nbytes, lambda: content)
    is_packed = is_worth_packing(content)
    read = partial(_on_cpu, content, is_packed)
    return Entry(name, content.dtype, content.ndim, is_packed, content.nbytes, read)


def _on_cpu(tensor: Tensor, is_packed: bool) -> Tensor | PackedTensor:
    tensor = tensor.detach().cpu()
    return pack(tensor) if is_packed else tensor


def _shards(entries: list[Entry], max_bytes: int) -> dict[str, list[Entry]]:
    """Entries by file. The size of a packed tensor is counted before it is coded."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return dict(zip(file_names(PACKED_STEM, len(shards)), shards, strict=True))
