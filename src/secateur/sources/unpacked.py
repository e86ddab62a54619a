"""Packed checkpoints as ordinary ones: written to a new folder, or kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from secateur.packed.files import (
    Entry,
    bytes_of,
    dense,
    file_names,
    read_headers,
    read_tensor,
    write_index,
    write_weights,
)
from secateur.reporting.report import read_metadata
from secateur.runtime.progress import Progress, no_progress
from secateur.sources.model_cache import cached
from secateur.sources.other_files import check_links, copied_files, copy_other_files
from secateur.sources.validate import check_packed
from secateur.storage.checkpoint_files import CARD, DENSE_INDEX, DENSE_STEM, METADATA
from secateur.storage.file_records import sha256
from secateur.storage.json_files import read_json
from secateur.storage.new_folder import check_new_folder, publish_folder
from secateur.storage.paths import real_path

USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_MODEL", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("THIS_MODEL")
```

The zeros are stored like other weights: they make no file smaller, and no dense runtime faster.
"""
PACKED_USAGE = """\
The weights are packed (a bitmask and the nonzero values). Load them with the Python package secateur:

```python
import secateur  # registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_MODEL")
tokenizer = AutoTokenizer.from_pretrained("THIS_MODEL")
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


def unpacked(folder: Path) -> Path:
    """The ordinary form of a packed checkpoint, in the user's cache.

    Raises:
        SecateurError: it is damaged, or the cache can't be written.
    """
    files = sorted(set(check_packed(folder).values()))
    others = [path for path in (folder / "config.json", folder / CARD, folder / METADATA) if path.is_file()]
    digests = "".join(f"{path.name} {sha256(path)}" for path in [*files, *others, *copied_files(folder)])
    name = f"unpacked-{_short(digests)}"
    return cached(name, lambda target: _write_dense(folder, files, target, no_progress))


def write_rest(source: Path, target: Path, config: dict[str, Any], card: Callable[[str], str]) -> None:
    """Write everything but the weights: config, card, report, and the other files as they are."""
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_other_files(source, target)
    readme = source / CARD
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else f"# {real_path(source).name}\n"
    (target / CARD).write_text(card(text), encoding="utf-8")
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
    """A packed model's card as one of dense weights."""
    return with_usage(text, PACKED_USAGE, USAGE)


def with_usage(card: str, old: str, new: str) -> str:
    """A card with other instructions. One from the hub has the model's name for `THIS_MODEL`."""
    pattern = re.escape(old).replace("THIS_MODEL", r"[^\s\"]+")
    return re.sub(pattern, lambda _: new, card)


def _short(digests: str) -> str:
    return hashlib.sha256(digests.encode()).hexdigest()[:16]
