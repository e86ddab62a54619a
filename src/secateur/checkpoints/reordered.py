"""A checkpoint's weights in another order of channels, mapped from files that are made for the run."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.checkpoints.load import Checkpoint
from secateur.errors import SecateurError
from secateur.models.matrices import layer_of
from secateur.permutation.channels import ChannelOrder


def map_reordered(checkpoint: Checkpoint, order: ChannelOrder, folder: Path) -> None:
    """Write the weights that an order moves to files, one a layer, and map the model from these.

    Args:
        checkpoint: the dense model, mapped from its files.
        order: of its channels.
        folder: for the files; what is in it is removed.

    Raises:
        SecateurError: the disk is full or not writable.

    Cost: one read of the weights, and a copy of them on the disk. Memory: one layer.
    """
    parameters = dict(checkpoint.model.named_parameters())
    by_layer: dict[str, list[str]] = {}
    files: dict[str, Path] = {}
    for name in order.indices:
        by_layer.setdefault(layer_of(name), []).append(name)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        for number, names in enumerate(by_layer.values()):
            path = folder / f"{number:05d}.safetensors"
            save_file({name: order.applied(name, _source(checkpoint, name)).contiguous() for name in names}, path)
            with safe_open(path, framework="pt") as file:
                for name in names:
                    files[name] = path
                    mapped, parameter = file.get_tensor(name), parameters[name]
                    own = parameter.data.dtype
                    parameter.data = mapped if mapped.dtype == own else order.applied(name, parameter.data)
    except (OSError, SafetensorError) as error:
        raise SecateurError(f"{folder} could not be written ({error})") from error
    moved = {id(parameters[name]): name for name in order.indices}
    for name, parameter in checkpoint.model.named_parameters(remove_duplicate=False):
        if id(parameter) in moved:  # a tied weight has several names
            there = moved[id(parameter)]
            checkpoint.file_of[name] = (files[there], there)


def _source(checkpoint: Checkpoint, name: str) -> Tensor:
    """A weight in the dtype of its file."""
    held = checkpoint.model.get_parameter(name).data
    stored = checkpoint.file_dtypes.get(name, held.dtype)
    if held.dtype == stored or name not in checkpoint.file_of:
        return held
    path, there = checkpoint.file_of[name]
    with safe_open(path, framework="pt") as shard:
        return shard.get_tensor(there)
