"""Packed checkpoints as ordinary ones: written to a new folder, or kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from secateur.errors import SecateurError
from secateur.packed.files import INDEX, WEIGHTS, Entry, dense, file_names, read_headers, write_index, write_weights
from secateur.reporting.report import METADATA, read_metadata
from secateur.runtime.progress import Progress
from secateur.sources.model_cache import cached
from secateur.sources.other_files import check_links, copied_files, copy_other_files
from secateur.sources.validate import INDEX as DENSE_INDEX
from secateur.sources.validate import check_packed
from secateur.storage.file_records import sha256
from secateur.storage.held_folder import HeldFolder, make_folders
from secateur.storage.json_files import read_json
from secateur.storage.paths import real_path

DENSE_STEM = "model"  # of the weight files
NOT_SMALLER = "The zeros are stored like other weights: they make no file smaller, and no dense runtime faster."
USAGE = """\
The weights are packed (a bitmask and the nonzero values). Load them with [secateur](https://pypi.org/project/secateur):

```python
import secateur  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS_MODEL")
```

`secateur unpack THIS_MODEL OUT` gives an ordinary checkpoint that needs no secateur.
"""


def unpack_folder(folder: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Write the ordinary form of a packed checkpoint to a new folder. One matrix at a time is in memory.

    Args:
        folder: a packed checkpoint.
        out: a folder that does not exist, or is empty.
        progress: called with the stage `unpack`.

    Returns:
        the bytes of the weight files: `packed_bytes`, `dense_bytes`.

    Raises:
        SecateurError: it is not packed, or damaged, or a folder that can't be written.
    """
    check_new_folder(folder, out)
    files = sorted(set(check_packed(folder).values()))
    check_links(folder)

    def write(target: Path) -> None:
        _write_dense(folder, files, target, progress)

    publish_folder(out, write)
    dense_files = (out / name for name in file_names(DENSE_STEM, len(files)))
    return {"packed_bytes": bytes_of(files), "dense_bytes": bytes_of(dense_files)}


def bytes_of(files: Iterable[Path]) -> int:
    """Bytes of files in all."""
    return sum(path.stat().st_size for path in files)


def unpacked(folder: Path) -> Path:
    """The ordinary form of a packed checkpoint, in the user's cache.

    Raises:
        SecateurError: it is damaged, or the cache can't be written.
    """
    files = sorted(set(check_packed(folder).values()))
    others = [path for path in (folder / "config.json", folder / "README.md", folder / METADATA) if path.is_file()]
    digests = "".join(f"{path.name} {sha256(path)}" for path in [*files, *others, *copied_files(folder)])
    name = f"unpacked-{_short(digests)}"
    return cached(name, lambda target: _write_dense(folder, files, target, lambda *_: None))


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed checkpoint."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def check_new_folder(folder: Path, out: Path) -> None:
    """Check that `out` is a new or empty folder, and not in one that is read.

    Raises:
        SecateurError: it is not.
    """
    place = real_path(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise SecateurError(f"{out} exists and is not an empty folder: choose another one")
    if real_path(folder) in (place, *place.parents):
        raise SecateurError(f"{out} lies in {folder}, which is read: choose another folder")


def publish_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder next to `out`, and put it there when it is whole.

    Raises:
        SecateurError: `out` can't be written, or something came to it meanwhile.
    """
    place = real_path(out)
    try:
        make_folders(place.parent)
        with HeldFolder(place.parent) as parent:
            partial_name = parent.new_name()
            try:
                with parent.subfolder(partial_name) as folder:
                    write(folder.path)
                    for name in folder.names():
                        folder.flush_file(name)
                    folder.flush()
                parent.rename(partial_name, place.name)
                parent.flush()
            finally:
                parent.remove_folder(partial_name)
    except OSError as error:
        raise SecateurError(f"{out} could not be written ({error.strerror or error})") from error


def write_rest(source: Path, target: Path, config: dict[str, Any], card: Callable[[str], str]) -> None:
    """Write everything but the weights: config, card, report, and the other files as they are."""
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_other_files(source, target)
    readme = source / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else f"# {target.name}\n"
    (target / "README.md").write_text(card(text), encoding="utf-8")
    if (source / METADATA).is_file():
        read_metadata(source).save(target)


def _write_dense(folder: Path, files: list[Path], target: Path, progress: Progress) -> None:
    names = file_names(DENSE_STEM, len(files))
    for number, (path, name) in enumerate(zip(files, names, strict=True), 1):
        write_weights(target / name, _dense_entries(path), "none")
        progress("unpack", number, len(files))
    if len(files) > 1:
        write_index(target / DENSE_INDEX, names)
    config = read_json(folder / "config.json")
    del config["quantization_config"]
    write_rest(folder, target, config, _dense_card)


def _dense_entries(path: Path) -> list[Entry]:
    """What to write of a packed file: each tensor, dense."""
    headers, found = read_headers(path), []
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            read = partial(_read_dense, path, name)
            if name in headers:
                header, _ = headers[name]
                found.append(Entry(name, header.dtype, len(header.shape), False, header.dense_bytes, read))
            else:
                tensor = file.get_tensor(name)
                found.append(Entry(name, tensor.dtype, tensor.ndim, False, tensor.nbytes, read))
    return found


def _read_dense(path: Path, name: str) -> Tensor:
    return dense(read_tensor(path, name), f"{path}: {name}")


def _dense_card(text: str) -> str:
    return text.replace(USAGE, NOT_SMALLER)


def _short(digests: str) -> str:
    return hashlib.sha256(digests.encode()).hexdigest()[:16]


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
