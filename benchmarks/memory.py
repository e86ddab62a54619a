"""Peak memory of a run against the number of layers, with experts and without, and of a model of 4 GB.

    python benchmarks/memory.py --out benchmarks/results/memory.json

Writes random Llamas and Mixtrals to disk, prunes each by `secateur prune` in a process of its own, and samples that
process's anonymous memory (RssAnon: what is not mapped from a file, which the system can't drop) every 10 ms. Random
weights: memory doesn't depend on them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from secateur.export import environment

LAYERS = (8, 16, 32, 64)
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
EXPERTS = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 8}
LARGE_LAYERS = 43  # 4.1 GB in bf16; memory.json has 40, 3.8 GB
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
LLAMA_7B_LAYERS = 32  # 13 GB
EFFORTS = {
    "sparsegpt": ("--method", "sparsegpt"),
    "balanced": ("--effort", "balanced"),
}
SAMPLES, LENGTH = 4, 128


def main() -> None:
    """Measure every run and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--large", action="store_true", help="The 4 GB model too: 9 GB of disk, and an hour.")
    parser.add_argument("--experts", action="store_true", help="The models with experts alone, beside what is known.")
    parser.add_argument("--llama-7b", action="store_true", help="Llama-2-7B's shape alone: 26 GB of disk; for a GPU.")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.llama_7b:
            model = write_model(Path(scratch) / "llama", LLAMA_7B_LAYERS, LLAMA_7B)
            for name, flags in EFFORTS.items():
                flags = (*flags, "--device", arguments.device)
                runs[f"{name}, Llama-2-7B"] = measure(model, Path(scratch) / "out", flags)
                save(arguments.out, runs)
            return
        if arguments.experts and arguments.out.exists():
            runs |= json.loads(arguments.out.read_text())["runs"]
        for layers in (min(LAYERS), max(LAYERS)):
            model = write_model(Path(scratch) / f"experts-{layers}", layers, EXPERTS, experts=8)
            runs[f"sparsegpt, experts, {layers} layers"] = measure(model, Path(scratch) / "out", EFFORTS["sparsegpt"])
            save(arguments.out, runs)
        for layers in LAYERS * (not arguments.experts):
            model = write_model(Path(scratch) / f"layers-{layers}", layers, WIDE)
            for name, flags in EFFORTS.items():
                runs[f"{name}, {layers} layers"] = measure(model, Path(scratch) / "out", flags)
                save(arguments.out, runs)
        if arguments.large:
            model = write_model(Path(scratch) / "large", LARGE_LAYERS, LARGE)
            runs["sparsegpt, 4 GB"] = measure(model, Path(scratch) / "out", EFFORTS["sparsegpt"])
            save(arguments.out, runs)


def save(path: Path, runs: dict[str, Any]) -> None:
    """Write what is measured so far."""
    large = LARGE | {"layers": LARGE_LAYERS}
    settings = {"samples": SAMPLES, "seq_len": LENGTH, "wide": WIDE, "experts": EXPERTS, "large": large}
    path.write_text(json.dumps({"settings": settings, "environment": environment(), "runs": runs}, indent=1) + "\n")


def write_model(folder: Path, layers: int, widths: dict[str, int], experts: int = 0) -> Path:
    """A random Llama, or a Mixtral where there are experts, in shards of 500 MB, and a tokenizer of one token a
    character. Each expert is a tensor in the files, which transformers fuses as it loads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "num_hidden_layers": layers, "max_position_embeddings": 512, **widths}
    torch.set_default_dtype(torch.bfloat16)
    model = MixtralForCausalLM(MixtralConfig(num_local_experts=experts, **sizes)) if experts else None
    (model or LlamaForCausalLM(LlamaConfig(**sizes))).save_pretrained(folder, max_shard_size="500MB")
    torch.set_default_dtype(torch.float32)
    letters = Tokenizer(models.WordLevel({chr(index): index for index in range(256)}, unk_token="\x00"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="\x00").save_pretrained(folder)
    return folder


def measure(model: Path, out: Path, flags: tuple[str, ...]) -> dict[str, Any]:
    """Prune in a process of its own; its peak of anonymous memory in bytes, and seconds."""
    command = [sys.executable, "-m", "secateur", "prune", str(model), str(out), *flags, "--overwrite"]
    command += ["--samples", str(SAMPLES), "--seq-len", str(LENGTH), "--max-shard-size", "500MB"]
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(0.01)
        errors = process.stderr.read() if process.stderr else ""
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {errors}")
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    result = {"model_bytes": size, "peak_anonymous_bytes": peak, "seconds": time.perf_counter() - started}
    print(model.name, *flags, {name: round(value / 1e6, 1) for name, value in result.items()}, flush=True)
    return result


def anonymous_memory(pid: int) -> int:
    """RssAnon of a process in bytes; 0 once it is gone."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    main()
