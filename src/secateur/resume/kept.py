"""What a run found before its first block, kept in the journal: a resumed one does not look for it again.

That is what the dense model wrote to be calibrated on, the order of its channels, and how zeros are spread.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.errors import SecateurError
from secateur.permutation.channels import ChannelOrder
from secateur.pruning.context import LayerPatterns
from secateur.recipe.patterns import Pattern, Unstructured, parse_pattern
from secateur.resume.block_files import check_digest
from secateur.resume.manifest import RunManifest
from secateur.runtime import distributed
from secateur.storage.json_files import read_json

OWN_WORDS_FILE = "own-words.json"
ORDER_FILE = "channel-order.json"
ALLOCATION_FILES = "allocation-{}.json"


def kept_windows(manifest: RunManifest, write: Callable[[], Int[Tensor, "N T"]]) -> Int[Tensor, "N T"]:
    """The windows that an earlier process kept, or those that the model writes now, which are kept.

    Every rank lets its copy of the model write, so that onloading is the same on all; rank 0's text is taken.

    Raises:
        SecateurError: a damaged file, or a journal that can't be written.
    """
    if digest := manifest.state.own_words:
        return torch.tensor(_read(manifest, OWN_WORDS_FILE, digest)["windows"])
    windows = distributed.broadcast_object(write())
    _keep(manifest, OWN_WORDS_FILE, {"windows": windows.tolist()}, lambda digest: {"own_words": digest})
    return windows


def kept_order(manifest: RunManifest) -> ChannelOrder | None:
    """The order of channels that an earlier process kept.

    Raises:
        SecateurError: a damaged file.
    """
    if not (digest := manifest.state.channel_order):
        return None
    found = _read(manifest, ORDER_FILE, digest)
    return ChannelOrder(
        {name: {int(dim): torch.tensor(index) for dim, index in by_dim.items()} for name, by_dim in found.items()}
    )


def keep_order(manifest: RunManifest, order: ChannelOrder) -> None:
    """Keep an order of channels.

    Raises:
        SecateurError: the journal can't be written.
    """
    plain = {name: {dim: index.tolist() for dim, index in by_dim.items()} for name, by_dim in order.indices.items()}
    _keep(manifest, ORDER_FILE, plain, lambda digest: {"channel_order": digest})


def kept_patterns(manifest: RunManifest, chain: str, find: Callable[[], LayerPatterns]) -> LayerPatterns:
    """The allocation of a chain of blocks that an earlier process kept, or the one that is found now, which is kept.

    Raises:
        SecateurError: a damaged file, or a journal that can't be written.
    """
    digests = manifest.state.allocation
    if chain not in digests:
        found = find()
        plain = {
            "patterns": {name: _plain(pattern) for name, pattern in found.patterns.items()},
            "row_scales": {name: scale.tolist() for name, scale in found.row_scales.items()},
            "prices": found.prices,
        }
        file = ALLOCATION_FILES.format(len(digests))
        _keep(manifest, file, plain, lambda digest: {"allocation": digests | {chain: digest}})
        return found
    kept = _read(manifest, ALLOCATION_FILES.format([*digests].index(chain)), digests[chain])
    return LayerPatterns(
        {name: parse_pattern(pattern) for name, pattern in kept["patterns"].items()},
        {name: torch.tensor(scale) for name, scale in kept["row_scales"].items()},
        kept["prices"],
    )


def _plain(pattern: Pattern) -> float | str:
    """A pattern as `parse_pattern` reads it, without rounding."""
    return pattern.sparsity if isinstance(pattern, Unstructured) else str(pattern)


def _read(manifest: RunManifest, name: str, digest: str) -> dict[str, Any]:
    path = manifest.folder / name
    check_digest(path, digest)
    return read_json(path)


def _keep(manifest: RunManifest, name: str, content: dict[str, Any], entry: Callable[[str], dict[str, Any]]) -> None:
    """Write a file, and the manifest's entry of its digest."""
    if distributed.is_main():
        try:
            manifest.held.write(name, json.dumps(content) + "\n")
            manifest.update(**entry(manifest.held.record(name).sha256))
        except OSError as error:
            raise SecateurError(f"{manifest.folder} can't be written ({error})") from error
    manifest.take_state_of_main()
