"""GGUF files as ordinary checkpoints."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.runtime.messages import one_line, say
from secateur.sources.gguf_header import check_gguf
from secateur.sources.model_cache import cached
from secateur.storage.checkpoint_files import CARD
from secateur.storage.file_records import sha256

WEIGHTS_A_SECOND = 6e6  # converted, on two cores
HEAD = "output.weight"  # where it is not tied to the embeddings
CONVERTER = 3  # counted up where the same file gives another checkpoint


def convert_gguf(path: Path) -> Path:
    """The folder of a GGUF file dequantised to bf16; converted once for each content.

    Raises:
        SecateurError: it is not a GGUF model, or the cache can't be written.
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
        SecateurError: it is not a GGUF model.
        OSError: the folder can't be written.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tensors = check_gguf(gguf)
    weights = sum(tensors.values())
    say(
        f"secateur: converting {gguf.name} to bf16 safetensors in {folder.parent}: once, about "
        f"{2 * weights / 1e6:,.0f} MB and {max(10, weights / WEIGHTS_A_SECOND):.0f} s"
    )
    with tempfile.TemporaryDirectory() as alone:  # transformers would prefer a tokenizer that lies next to the file
        (Path(alone) / "model.gguf").symlink_to(gguf.absolute())
        try:
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                alone,
                gguf_file="model.gguf",
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                output_loading_info=True,
            )
        except Exception as error:
            raise SecateurError(f"{gguf} can't be read as a GGUF model: {type(error).__name__}: {error}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise SecateurError(f"{gguf} lacks {len(missing)} tensors ({missing[0]} ...): the file is incomplete")
    _check_all_taken(gguf, tensors, model)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if isinstance(error, OSError):
            raise
        raise OSError(str(error)) from error  # safetensors and tokenizers have their own words for a full disk
    (folder / CARD).write_text(card, encoding="utf-8")


def _check_all_taken(gguf: Path, tensors: dict[str, int], model: Any) -> None:
    """Check that a model has as many weights as its GGUF file: transformers skips tensors that it does not know.

    Raises:
        SecateurError: it has other ones.
    """
    saved = model.state_dict().keys()
    taken = sum(parameter.numel() for parameter in model.parameters())
    taken += sum(buffer.numel() for name, buffer in model.named_buffers() if name in saved)
    in_file = sum(tensors.values())
    if model.config.tie_word_embeddings:
        in_file -= tensors.get(HEAD, 0)  # some files hold the embeddings twice
    if in_file != taken:
        scaled = [name for name in tensors if name.startswith("rope_")]
        why = f" ({scaled[0]} scales its rotary positions)" if scaled else ""
        raise SecateurError(
            f"{gguf} holds {in_file:,} weights, and the {type(model).__name__} that transformers makes of it "
            f"{taken:,}{why}: it would be another model. Give the original checkpoint"
        )
