"""Pack a pruned checkpoint folder, and load packed and ordinary ones as models.

Every matrix with enough zeros is packed, whoever made them; everything else stays as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.checkpoints.inspection import inspect_folder
from secateur.checkpoints.load import BROKEN, check_sizes, differences, skeleton_of, why_not_loaded
from secateur.checkpoints.model_card import model_card
from secateur.errors import SecateurError, errors_within
from secateur.models.matrices import parameter_of
from secateur.packed.encoding import Compression
from secateur.packed.files import (
    FORMAT_VERSION,
    METHOD,
    Entry,
    bytes_of,
    file_names,
    is_packed,
    read_tensor,
    write_index,
    write_weights,
)
from secateur.packed.layout import PackedTensor, Values, is_worth_packing, pack, pack_int8, packed_size
from secateur.reporting.report import Report, read_metadata
from secateur.runtime.memory import available_bytes
from secateur.runtime.messages import say
from secateur.runtime.progress import Progress
from secateur.sources.other_files import check_links
from secateur.sources.unpacked import PACKED_USAGE, USAGE, with_usage, write_rest
from secateur.sources.validate import check_folder, check_packed
from secateur.storage.checkpoint_files import CARD, METADATA, PACKED_INDEX, PACKED_STEM
from secateur.storage.file_records import damage
from secateur.storage.json_files import read_json
from secateur.storage.new_folder import check_new_folder, publish_folder
from secateur.storage.paths import real_path

COPIES = {"same": 5, "int8": 8}  # of a matrix in memory, while it is packed


def pack_folder(
    folder: Path, out: Path, compression: Compression, values: Values, progress: Progress
) -> dict[str, Any]:
    """Write the packed form of a checkpoint to a new folder. One matrix at a time is in memory.

    Args:
        folder: an ordinary checkpoint in safetensors.
        out: a folder that does not exist, or is empty.
        compression: `zstd`, or `none` for weights that can be mapped from the file.
        values: `same` dtype as before, or `int8`.
        progress: called with the stage `pack`.

    Returns:
        `matrices` packed, and the bytes of the weight files: `dense_bytes`, `packed_bytes`.

    Raises:
        SecateurError: no checkpoint there, damaged files or zeros, too few zeros, or a folder that can't be written.

    Cost: four reads of the weights.
    """
    check_new_folder(folder, out)
    _, shards = check_folder(folder)
    check_links(folder)
    if (folder / METADATA).is_file() and (problems := inspect_folder(folder).problems):
        raise SecateurError(f"{folder} is not what was saved, so it is not packed: {problems[0]}")
    files = sorted(set(shards.values()))
    transposed = transposed_matrices(read_metadata(folder)) if (folder / METADATA).is_file() else set()
    make = pack_int8 if values == "int8" else pack
    by_file = {path: entries_of(path, transposed, make) for path in files}
    count = sum(entry.is_packed for entries in by_file.values() for entry in entries)
    if not count:
        raise SecateurError(_why_not_worth(folder, files))
    _check_memory(max(entry.nbytes for entries in by_file.values() for entry in entries if entry.is_packed), values)

    names = file_names(PACKED_STEM, len(files))

    def write(target: Path) -> None:
        for number, (name, entries) in enumerate(zip(names, by_file.values(), strict=True), 1):
            write_weights(target / name, entries, compression)
            progress("pack", number, len(files))
        if len(files) > 1:
            write_index(target / PACKED_INDEX, names)
        config = read_json(folder / "config.json")
        config["quantization_config"] = packing_config(len(files))
        write_rest(folder, target, config, partial(_card_of_packed, folder))

    publish_folder(out, write)
    dense_bytes, packed_bytes = bytes_of(files), bytes_of(out / name for name in names)
    return {"matrices": count, "dense_bytes": dense_bytes, "packed_bytes": packed_bytes}


def load_model(
    folder: Path,
    is_dense: bool,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model, packed where its folder is.

    Args:
        folder: packed or ordinary.
        is_dense: unpack every matrix: the ordinary model.
        dtype: of the model; kernels serve bfloat16.
        device: where to put it; anything but a CPU gets dense weights.
        trust_remote_code: let the checkpoint's Python code run.

    Raises:
        SecateurError: no model there, damaged files, or another model than a causal language model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    import secateur.packed.quantizer  # noqa: F401 - registers the format

    shards = check_packed(folder) if is_packed(folder) else check_folder(folder)[1]
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        if not trust_remote_code:  # code from the checkpoint runs no second time
            make = partial(AutoModelForCausalLM.from_config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
            check_sizes(folder, skeleton_of(make, config), shards)
        if is_packed(folder) and is_dense:
            config.quantization_config["dequantize"] = True
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, **options
        )
    except SecateurError:
        raise
    except (SafetensorError, StrictDataclassError, *BROKEN) as error:
        raise SecateurError(why_not_loaded(folder, error, trust_remote_code)) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise SecateurError(f"{folder} lacks {len(missing)} tensors ({missing[0]} ...): it is damaged")
    for notice in differences(folder, config, model, info["unexpected_keys"], shards):
        say(f"secateur: {notice}")
    return model.to(device).eval()


def packing_config(num_files: int) -> dict[str, Any]:
    """The `quantization_config` of a packed folder, by which transformers finds its loader."""
    return {"quant_method": METHOD, "version": FORMAT_VERSION, "sharded": num_files > 1}


def transposed_matrices(report: Report) -> set[str]:
    """Names of the pruned tensors that are stored as (inputs, outputs)."""
    names = {parameter_of(matrix.name) for matrix in report.matrices if matrix.input_dim == 0}
    return names | {f"{name}.weight" for name in names}


def entries_of(path: Path, transposed: set[str], make: Callable[[Tensor, bool], PackedTensor]) -> list[Entry]:
    """What to write of a dense file: each tensor, packed by `make` where that pays."""
    found = []
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            tensor = file.get_tensor(name)
            worth = is_worth_packing(tensor)
            read = (
                partial(_read_packed, path, name, name in transposed, make)
                if worth
                else partial(read_tensor, path, name)
            )
            found.append(Entry(name, tensor.dtype, tensor.ndim, worth, tensor.nbytes, read))
    return found


def _read_packed(
    path: Path, name: str, is_transposed: bool, make: Callable[[Tensor, bool], PackedTensor]
) -> PackedTensor:
    with errors_within(f"{path}: {name}"):
        return make(read_tensor(path, name), is_transposed)


def _card_of_packed(folder: Path, text: str) -> str:
    """The card of a packed folder: the source's, without figures of its weights where nobody has edited it."""
    if (folder / METADATA).is_file():
        report = read_metadata(folder)
        recorded = report.files.get(CARD)
        if recorded is not None and damage(folder, CARD, recorded) is None:
            text = model_card(replace(report, perplexities=[], speeds=[]), real_path(folder).name)
    return packed_card(text)


def packed_card(text: str) -> str:
    """A model card that says how to load packed weights."""
    found = with_usage(text, USAGE, PACKED_USAGE)
    return f"{text.rstrip()}\n\n{PACKED_USAGE}" if found == text else found


def _check_memory(largest: int, values: Values) -> None:
    needed, there = COPIES[values] * largest, available_bytes()
    if needed > there:
        raise SecateurError(
            f"packing the largest matrix takes {needed / 1e9:.1f} GB of memory, and {there / 1e9:.1f} GB are free: end "
            f"other programs, or pack on a larger machine"
        )


def _why_not_worth(folder: Path, files: list[Path]) -> str:
    """The message for a model without enough zeros, with what packing would give."""
    dense_bytes = packed_bytes = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                tensor = file.get_tensor(name)
                dense_bytes += tensor.nbytes
                packed_bytes += packed_size(tensor)
    return (
        f"{folder} has no matrix with enough zeros: packed, the model would take {packed_bytes / dense_bytes:.2f} of "
        f"its {dense_bytes / 1e6:.0f} MB. Prune it first: at 50% about 0.6 remain in memory, and 0.4 on the disk"
    )
