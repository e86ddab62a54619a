"""Prune a fixed set of models and print a hash of the weights of each, to show that a change kept every bit.

    python benchmarks/same_bits.py --out AFTER.json --against BEFORE.json

Hashes depend on the CPU and on torch, and on the number of threads, which is 1 here: make both files on one machine. It
exits with 1 where a hash differs. `--keywords 622a1c4` calls the API by the names that it had at that commit (run it
there with `PYTHONPATH=src`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import secateur

RECIPES: dict[str, dict[str, str]] = {
    "sparsegpt": {"solver": "sparsegpt"},
    "mrp": {"solver": "mrp"},
    "balanced": {"recipe": "balanced"},
    "best": {"recipe": "best"},
}
PATTERNS = ("50%", "2:4")
KEYWORDS = {"622a1c4": {"solver": "method", "recipe": "effort"}}
SIZES: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
LLAMA: dict[str, Any] = SIZES | {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
PICTURES: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_labels": 10}


def main() -> None:
    """Prune every model and write one JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path, help="An earlier file of this script to compare with.")
    parser.add_argument("--keywords", choices=KEYWORDS)
    parser.add_argument("--only", default="", help="Only models whose name contains this.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = json.loads(arguments.against.read_text())["hashes"] if arguments.against else None
    names = KEYWORDS.get(arguments.keywords, {})
    hashes: dict[str, str] = {}
    for pattern in PATTERNS:
        for recipe, given in RECIPES.items():
            keywords = {names.get(name, name): value for name, value in given.items()} | {"pattern": pattern}
            for model in ("smollm2", *TINY):
                name = f"{model} {recipe} {pattern}"
                if arguments.only in name:
                    hashes[name] = smollm2(keywords) if model == "smollm2" else tiny(model, keywords)
                    print(name, hashes[name], flush=True)
                    arguments.out.write_text(json.dumps({"hashes": hashes}, indent=1) + "\n")
    if before is not None:
        differing = [name for name in hashes if hashes[name] != before.get(name)]
        sys.exit(f"{len(differing)} of {len(hashes)} differ: {', '.join(differing)}" if differing else 0)


def smollm2(keywords: dict[str, Any]) -> str:
    """SmolLM2-135M from folder to folder, on 8 x 256 tokens of the shipped text."""
    with tempfile.TemporaryDirectory() as scratch:
        secateur.prune("smollm2", Path(scratch) / "out", samples=8, seq_len=256, device="cpu", **keywords)
        return digest(load_file(Path(scratch) / "out" / "model.safetensors"))


def tiny(name: str, keywords: dict[str, Any]) -> str:
    """A tiny random model, in memory, on random inputs."""
    torch.manual_seed(0)
    model, batches = TINY[name]()
    for parameter in model.parameters():
        if parameter.ndim >= 2:  # as large as a trained model's
            torch.nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    secateur.prune(model, calibration=batches, **keywords)
    return digest(model.state_dict())


def tokens(**more: Any) -> list[dict[str, Tensor]]:
    """Batches of random token ids."""
    ids = torch.randint(3, 128, (16, 24), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part} | dict.fromkeys(more, part) for part in ids.split(2)]


def mamba() -> Any:
    """Mamba of two layers."""
    config = transformers.MambaConfig(**SIZES, state_size=8, time_step_rank=4)
    return transformers.MambaForCausalLM(config), tokens()


def mixtral() -> Any:
    """Mixtral of two layers with four experts."""
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=4)
    return transformers.MixtralForCausalLM(config), tokens()


def gpt2() -> Any:
    """GPT-2 of two layers."""
    config = transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config), tokens()


def t5() -> Any:
    """T5 of two layers on either side."""
    config = transformers.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config), tokens(decoder_input_ids=True)


def vit() -> Any:
    """ViT of two layers."""
    sizes: dict[str, Any] = {
        name: value for name, value in LLAMA.items() if name not in ("vocab_size", "num_key_value_heads")
    }
    pictures = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **PICTURES))
    return model, [{"pixel_values": part} for part in pictures.split(2)]


TINY = {"mamba": mamba, "mixtral": mixtral, "gpt2": gpt2, "t5": t5, "vit": vit}


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and bits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()
