"""The cache of GGUF files that were converted to ordinary checkpoints."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from secateur.errors import SecateurError
from secateur.runtime.atomic_files import sha256
from secateur.runtime.messages import say


def cache_folder() -> Path:
    """Where converted models are kept: $SECATEUR_CACHE, or the user's cache folder."""
    return Path(os.environ["SECATEUR_CACHE"]) if "SECATEUR_CACHE" in os.environ else user_cache_path("secateur")


def convert_gguf(path: Path) -> Path:
    """The folder of a GGUF file dequantised to bf16; converted once for each content.

    Raises:
        SecateurError: it is no GGUF model, or the cache can't be written.
    """
    folder = cache_folder() / "models" / f"gguf-{sha256(path)[:16]}"
    if not (folder / "config.json").is_file():
        write_converted(path, folder, card=f"Dequantised to bf16 from {path.name}.\n")
    return folder


def write_converted(gguf: Path, folder: Path, card: str) -> None:
    """Convert a GGUF file next to its final place, then move it there whole.

    Args:
        gguf: the file.
        folder: the final place.
        card: README.md of the checkpoint.

    Raises:
        SecateurError: it is no GGUF model, or the cache can't be written.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say(f"secateur: converting {gguf.name} to safetensors (once, about half a minute)")
    with cache_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder.parent)
    with scratch as place:
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
        except (ValueError, OSError, KeyError, NotImplementedError) as error:
            raise SecateurError(f"{gguf} can't be read as a GGUF model: {error}") from error
        made = Path(place) / "model"
        with cache_errors(folder.parent):
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            (made / "README.md").write_text(card, encoding="utf-8")
            if not (folder / "config.json").is_file():  # another process may have been faster
                made.rename(folder)


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Explain an error of writing to the cache.

    Raises:
        SecateurError: the cache can't be written.
    """
    try:
        yield
    except OSError as error:
        raise SecateurError(
            f"the cache {folder} can't be written ({error.strerror or error}): set SECATEUR_CACHE to a folder that can"
        ) from error
