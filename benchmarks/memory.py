"""Peak memory of a run against the number of layers, with experts and without, and of a model of 4 GB.

    python benchmarks/memory.py --out benchmarks/results/memory.json

Writes random models to disk, prunes each by `secateur prune` in a separate process, and samples that process's
anonymous memory (RssAnon: what is not mapped from a file, which the system can't drop) every 10 ms. Random weights:
memory doesn't depend on them. Bytes read from the disk are counted too, which says how often a model that is larger
than memory was read. Runs that the JSON already has are replaced one by one, the others stay.

`--cgroup FOLDER` puts each process in a memory cgroup whose limit you have set, where the system counts the pages of
mapped files too, and takes them away when they are too many:

    mkdir /sys/fs/cgroup/memory/capped && echo 2000000000 > /sys/fs/cgroup/memory/capped/memory.limit_in_bytes
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.runtime.environment import environment

WIDE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
EXPERTS = WIDE | {"intermediate_size": 512}
LARGE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
LLAMA_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
RECIPES = {
    "magnitude of q_proj": ("--solver", "magnitude", "--include", "*.q_proj"),
    "sparsegpt": ("--solver", "sparsegpt"),
    "balanced": ("--recipe", "balanced"),
}
LENGTH = 128


@dataclass(frozen=True)
class Case:
    """A random model (a Mixtral where it has experts, else a Llama), and how it is pruned."""

    name: str
    layers: int
    widths: dict[str, int]
    experts: int = 0
    recipes: tuple[str, ...] = ("sparsegpt",)
    samples: int = 4


CASES = {
    "layers": [Case(f"{n} layers", n, WIDE, recipes=("sparsegpt", "balanced")) for n in (8, 16, 32, 64)],
    "experts": [Case(f"8 experts, {n} layers", n, EXPERTS, experts=8) for n in (8, 16, 32, 64)],
    "large": [Case("4 GB", 43, LARGE)],
    "reads": [Case("2 GB, 6 batches", 22, LARGE, recipes=("magnitude of q_proj",), samples=96)],
    "llama-7b": [Case("Llama-2-7B", 32, LLAMA_7B, recipes=("sparsegpt", "balanced"))],  # 13 GB; for a GPU
}


def main() -> None:
    """Measure every run and write one JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["layers", "experts"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cgroup", type=Path, help="A memory cgroup for the processes that prune.")
    arguments = parser.parse_args()
    runs: dict[str, Any] = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else {}
    for case in (case for name in arguments.cases for case in CASES[name]):
        with tempfile.TemporaryDirectory() as scratch:
            model = write_model(Path(scratch) / "model", case)
            for recipe in case.recipes:
                flags = (*RECIPES[recipe], "--device", arguments.device, "--samples", str(case.samples))
                run = measure(model, Path(scratch) / "out", flags, arguments.cgroup)
                name = ", ".join([recipe, *(["capped"] if arguments.cgroup else []), case.name])
                settings = {"widths": case.widths, "layers": case.layers, "samples": case.samples, "seq_len": LENGTH}
                runs[name] = settings | {"environment": environment()} | run
                peak, size = (round(run[key] / 1e6) for key in ("peak_anonymous_bytes", "model_bytes"))
                print(f"{name}: peak {peak} MB, files of {size} MB", flush=True)
                arguments.out.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


def write_model(folder: Path, case: Case) -> Path:
    """Write the model in bf16, in shards of 500 MB, and a tokenizer of one token a character.

    Each expert is one tensor in the files; transformers fuses them as it loads them.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "num_hidden_layers": case.layers,
        "max_position_embeddings": 512,
        **case.widths,
    }
    torch.set_default_dtype(torch.bfloat16)
    if case.experts:
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=case.experts, **sizes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(folder, max_shard_size="500MB")
    torch.set_default_dtype(torch.float32)
    letters = Tokenizer(models.WordLevel({chr(index): index for index in range(256)}, unk_token="\x00"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="\x00").save_pretrained(folder)
    return folder


def measure(model: Path, out: Path, flags: tuple[str, ...], cgroup: Path | None) -> dict[str, Any]:
    """Prune in a separate process; its peak of anonymous memory in bytes, and seconds."""
    command = [sys.executable, "-m", "secateur", "prune", str(model), str(out), *flags, "--overwrite"]
    command += ["--seq-len", str(LENGTH), "--max-shard-size", "500MB"]
    if cgroup is not None:  # the shell joins, and becomes the command
        forget(model)
        command = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(cgroup), *command]
    started, peak, read = time.perf_counter(), 0, 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, figure_of(process.pid, "status", r"RssAnon:\s+(\d+) kB") * 1024)
            read = max(read, figure_of(process.pid, "io", r"\bread_bytes: (\d+)"))
            time.sleep(0.01)
        errors = process.stderr.read() if process.stderr else ""
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {errors}")
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    seconds = time.perf_counter() - started
    result = {"model_bytes": size, "peak_anonymous_bytes": peak, "read_bytes": read, "seconds": seconds}
    return result if cgroup is None else result | {"limit_bytes": limit_of(cgroup)}


def forget(model: Path) -> None:
    """Let the system drop the files' pages, which count for the process that first read or wrote them."""
    for path in model.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def limit_of(cgroup: Path) -> int:
    """The limit of a memory cgroup, of version 2 or 1, in bytes."""
    newer, older = cgroup / "memory.max", cgroup / "memory.limit_in_bytes"
    return int((newer if newer.exists() else older).read_text())


def figure_of(pid: int, file: str, pattern: str) -> int:
    """What the system says of a process; 0 once it is gone."""
    try:
        found = re.search(pattern, Path(f"/proc/{pid}/{file}").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


if __name__ == "__main__":
    main()
