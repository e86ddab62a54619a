"""What the dense model wrote to be calibrated on, kept with the run: a resumed one does not write it again."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.errors import SecateurError
from secateur.resume.block_files import check_digest
from secateur.resume.manifest import RunManifest
from secateur.runtime import distributed
from secateur.storage.json_files import read_json

OWN_WORDS_FILE = "own-words.json"


def kept_windows(manifest: RunManifest, write: Callable[[], Int[Tensor, "N T"]]) -> Int[Tensor, "N T"]:
    """The windows that an earlier process kept, or those that the model writes now, which are kept.

    Every rank lets its copy of the model write, so that onloading is the same on all; rank 0's text is taken.

    Raises:
        SecateurError: a damaged file, or a journal that can't be written.
    """
    path, digest = manifest.folder / OWN_WORDS_FILE, manifest.state.own_words
    if digest:  # all ranks see the journal's disk
        check_digest(path, digest)
        return torch.tensor(read_json(path)["windows"])
    windows = distributed.broadcast_object(write())
    if distributed.is_main():
        try:
            manifest.held.write(OWN_WORDS_FILE, json.dumps({"windows": windows.tolist()}) + "\n")
            manifest.update(own_words=manifest.held.record(OWN_WORDS_FILE).sha256)
        except OSError as error:
            raise SecateurError(f"{manifest.folder} can't be written ({error})") from error
    manifest.take_state_of_main()
    return windows
