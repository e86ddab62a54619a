"""Weights that transformers makes while it loads a checkpoint (experts that it fuses), mapped from files.

A tensor that a model takes as it is stored is mapped from the checkpoint. One that is stacked, split or renamed on the
way would be held in memory, with all others of its kind. transformers' and accelerate's offloading writes each to a
file as soon as it is made; from there it is mapped, and nothing of the offloading stays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def is_converted(skeleton: Any, stored: Collection[str]) -> bool:
    """Whether a parameter of a model (without weights) has a name that the checkpoint does not have."""
    ties = [tie for tie in skeleton.all_tied_weights_keys.items() if any(name in stored for name in tie)]
    known = {*stored, *(name for tie in ties for name in tie)}  # of a tie, files hold either name
    return any(name not in known for name, _ in skeleton.named_parameters())


def load_mapped(from_pretrained: Callable[..., Any], folder: Path) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """Load a model with all its weights mapped: from the checkpoint, or from files that are made for them.

    Args:
        from_pretrained: loads the model and its loading info, given more options.
        folder: for the files.

    Returns:
        the model, its loading info, and for each weight that the checkpoint has as it is, its name there.

    Cost: one read of the weights, one write of those that are made; memory for one of these at a time.
    """
    from accelerate.hooks import remove_hook_from_module

    with _without_warnings("accelerate.big_modeling"):  # of weights that are in no memory, as intended
        model, info = from_pretrained(device_map={"": "disk"}, offload_folder=str(folder))
    if info["missing_keys"]:  # nothing to map; the caller reports it
        return model, info, {}
    names: dict[str, str] = {}
    for module in model.modules():
        if hook := getattr(module, "_hf_hook", None):
            hook.pre_forward(module)  # brings the module's weights, as before a call
            names = names or _names_in_checkpoint(hook, folder)
    remove_hook_from_module(model, recurse=True)
    del model.hf_device_map  # or saving would take it for a model without weights
    model.tie_weights()
    return model, info, names


def _names_in_checkpoint(hook: Any, folder: Path) -> dict[str, str]:
    """Names in the checkpoint by names in the model, of weights for which no file was made."""
    if hook.weights_map is None:
        return {}
    index = hook.weights_map.dataset.index  # of the whole model, shared by all hooks
    return {
        name: entry["weight_name"] for name, entry in index.items() if Path(entry["safetensors_file"]).parent != folder
    }


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
