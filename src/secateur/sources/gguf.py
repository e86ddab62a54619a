"""GGUF files as ordinary checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.reporting.report import CARD
from secateur.runtime.messages import one_line, say
from secateur.sources.gguf_header import check_gguf
from secateur.sources.model_cache import cached
from secateur.storage.file_records import sha256

WEIGHTS_A_SECOND = 6e6  # converted, on two cores
CONVERTER = 2  # counted up where the same file gives another checkpoint


def convert_gguf(path: Path) -> Path:
    """The folder of a GGUF file dequantised to bf16; converted once for each content.

    Raises:
        SecateurError: it is no GGUF model, or the cache can't be written.
    """
    card = f"Dequantised to bf16 from {one_line(path.name)}.\n"
    return cached(f"gguf-{CONVERTER}-{sha256(path)[:16]}", lambda folder: write_converted(path, folder, card))


def write_converted(gguf: Path, folder: Path, card: str) -> None:
    """Convert a GGUF file.

    Args:
        gguf: the file.
        folder: an empty folder for the checkpoint.
        card: README.md of the checkpoint.

    Raises:
        SecateurError: it is no GGUF model.
        OSError: the folder can't be written.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    weights = check_gguf(gguf)
    say(
        f"secateur: converting {gguf.name} to bf16 safetensors in {folder.parent}: once, about "
        f"{2 * weights / 1e6:,.0f} MB and {max(10, weights / WEIGHTS_A_SECOND):.0f} s"
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
        )
    except Exception as error:
        raise SecateurError(f"{gguf} can't be read as a GGUF model: {type(error).__name__}: {error}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise SecateurError(f"{gguf} lacks {len(missing)} tensors ({missing[0]} ...): the file is incomplete")
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if isinstance(error, OSError):
            raise
        raise OSError(str(error)) from error  # safetensors and tokenizers have their own words for a full disk
    (folder / CARD).write_text(card, encoding="utf-8")
