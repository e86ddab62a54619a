"""From what a user calls a model (folder, GGUF file, hub name, `smollm2`) to a local folder."""

from __future__ import annotations

from pathlib import Path

from secateur.errors import SecateurError
from secateur.packed.files import is_packed
from secateur.runtime.hub_errors import download_errors
from secateur.runtime.messages import first_line
from secateur.sources.demo_model import DEMO_NAME, demo_model
from secateur.sources.gguf import convert_gguf
from secateur.sources.unpacked import unpacked
from secateur.storage.paths import user_path

# Copies of the weights in another layout, which nothing here reads.
NOT_DOWNLOADED = ["consolidated*.safetensors", "original/*"]
DOWNLOADED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "README.md",
]


def resolve(name: str, trust_remote_code: bool = False, allow_pickle: bool = False) -> Path:
    """The local folder of a model, downloaded or converted into the user's cache where needed.

    Raises:
        SecateurError: there is no such model.
    """
    if not name:
        raise SecateurError("the model's name is empty")
    path = user_path(name)
    if name == DEMO_NAME and not path.exists():
        return demo_model()
    if path.is_file() and path.suffix == ".gguf":
        return convert_gguf(path)
    if path.is_dir():
        return path
    if path.exists():
        raise SecateurError(f"{name} is a file other than .gguf: give a model folder, a GGUF file or a hub name")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        raise SecateurError(f"no model at {name}: there is no such folder or file")
    return _from_hub(name, trust_remote_code, allow_pickle)


def resolve_dense(name: str, trust_remote_code: bool = False, allow_pickle: bool = False) -> Path:
    """The same, with the weights of a packed model unpacked into the user's cache.

    Raises:
        SecateurError: there is no such model, or a packed one is damaged.
    """
    folder = resolve(name, trust_remote_code, allow_pickle)
    return unpacked(folder) if is_packed(folder) else folder


def _from_hub(name: str, trust_remote_code: bool, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = [*DOWNLOADED, *["*.py"] * trust_remote_code, *["*.bin"] * allow_pickle]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=NOT_DOWNLOADED))
    except (HFValidationError, *download_errors()) as error:
        reason = first_line(error)
        raise SecateurError(
            f"there is no folder {name} here, and no model of that name could be downloaded from the hub ({reason})"
        ) from error
