"""docs/packed.md, and the README's table of sizes and speeds, from benchmarks/results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages import DOCS, RESULTS, read_result, table


def measured() -> list[Any]:
    """What benchmarks/packed.py wrote, a JSON for each model and its settings."""
    return [read_result(path.stem) for path in sorted(RESULTS.glob("packed*.json"))]


def models_table(patterns: tuple[str, ...] = ("50%", "70%")) -> str:
    """Every model's variants, packed ones at some patterns: size, memory, speed, perplexity, with ratios to the dense one."""
    rows = []
    for model, variants in [pair for found in measured() for pair in found["models"].items()]:
        dense = variants["dense bf16"]
        for name in sorted(variants, key=lambda name: not name.startswith("dense")):
            found = variants[name]
            if name.startswith("packed") and not any(pattern in name for pattern in patterns):
                continue
            rows.append(
                [
                    f"{model}, {name}",
                    size_cell(found, dense, "file_bytes"),
                    size_cell(found, dense, "memory_bytes"),
                    speed_cell(found, dense, "prefill_tokens_per_second"),
                    speed_cell(found, dense, "decode_tokens_per_second"),
                    f"{found['perplexity']:.2f}",
                ]
            )
    return table(["", "files, MB", "memory, MB", "prompt, tokens/s", "decoding, tokens/s", "perplexity"], rows)


def size_cell(found: dict[str, Any], dense: dict[str, Any], key: str) -> str:
    ratio = "" if found is dense else f" ({found[key] / dense[key]:.2f}x)"
    return f"{found[key] / 1e6:.0f}{ratio}"


def speed_cell(found: dict[str, Any], dense: dict[str, Any], key: str) -> str:
    ratio = "" if found is dense else f" ({found[key] / dense[key]:.2f}x)"
    return f"{found[key]:.1f}{ratio}" if found[key] < 100 else f"{found[key]:.0f}{ratio}"


def measured_line() -> str:
    where, settings = measured()[0]["environment"], measured()[0]["settings"]
    return (
        f"`generate` with a prompt of {settings['prompt_tokens']} tokens and {settings['new_tokens']} new ones, batch 1, "
        f"2 threads of a Xeon with AMX; torch {where['torch']}, transformers {where['transformers']}. Perplexity on "
        f"{settings['text']} ({evaluated_tokens()}). {pruned_line()} In [Benchmarks](benchmarks.md#16k-tokens) the same recipe ended SmolLM2 at {elsewhere()}."
    )


def short_line() -> str:
    """What the README says of the table; the page says the rest."""
    settings = measured()[0]["settings"]
    return (
        f"`generate` with a prompt of {settings['prompt_tokens']} tokens and {settings['new_tokens']} new ones, batch 1, 2 threads of a Xeon with AMX. "
        f"Both are Instruct models. {pruned_line()} Perplexity on {settings['text']} ({evaluated_tokens()}, so don't compare the two models by it). "
        f"Speeds differ by the machine: the demo decoded {demo_ratio():.2f} times as fast. [How it was measured](docs/packed.md)."
    )


def demo_ratio() -> float:
    """How much faster the demo's packed model decoded, on another day."""
    dense, packed = (speed["decode_tokens_per_second"] for speed in read_result("demo")["speed"])
    return packed / dense


def evaluated_tokens() -> str:
    """How many tokens of the text each model's perplexity is of."""
    return ", ".join(
        f"{found['settings']['max_tokens']:,} tokens for {model}" for found in measured() for model in found["models"]
    )


def pruned_line() -> str:
    """How the models were pruned."""
    recipes = {model: recipe for found in measured() for model, recipe in found["recipes"].items()}
    return (
        f"SmolLM2 was pruned by `{recipes['SmolLM2-135M']}` on 32 x 512 tokens of wikitext2-valid.txt, and Qwen by "
        f"`{recipes['Qwen2.5-Coder-1.5B']}` on 32 x 512 tokens of half prose and half code."
    )


def elsewhere() -> str:
    """Perplexities of SmolLM2 by the same recipe, from the comparison."""
    half, most = (perplexity_of("tokens-16k", f"balanced {pattern} 0") for pattern in ("50%", "70%"))
    return f"{half:.2f} (50%) and {most:.2f} (70%)"


def perplexity_of(comparison: str, cell: str) -> float:
    return read_result(f"compare/{comparison}/compare")["cells"][cell]["perplexity"]["wikitext2-test.txt"]


def int4_line() -> str:
    return " ".join(
        f"{model}, {name}: perplexity {value:.2f}."
        for found in measured()
        for model, each in found.get("perplexity_alone", {}).items()
        for name, value in each.items()
    )


def kernel_rows(threads: int, result: str = "kernels") -> list[dict[str, Any]]:
    return [row for row in read_result(result)["rows"] if row["threads"] == threads]


def speedup_table(threads: int) -> str:
    """Speed-ups over torch's bf16 by sparsity and batch."""
    rows = kernel_rows(threads)
    batches = sorted({row["batch"] for row in rows})
    sparsities = sorted({row["sparsity"] for row in rows})
    found = []
    for sparsity in sparsities:
        for name, label in (("packed", "bf16 values"), ("packed int8", "int8 values")):
            cells = {
                row["batch"]: row["microseconds"]["torch bf16"] / row["microseconds"][name]
                for row in rows
                if row["sparsity"] == sparsity
            }
            found.append([f"{sparsity:.0%}, {label}", *(f"{cells[b]:.2f}" if b in cells else "" for b in batches)])
    return table(["", *(f"batch {b}" for b in batches)], found)


def shares_table(result: str = "kernels") -> str:
    """What sparsity gains over a dense kernel of the same style, and how near reading alone is. Batch 1, one thread."""
    rows = []
    for row in kernel_rows(1, result):
        times = row["microseconds"]
        if "dense bf16, same style" in times:
            read = row["read_gigabytes_per_second"]
            rows.append(
                [
                    f"{row['sparsity']:.0%}",
                    f"{times['torch bf16'] / times['dense bf16, same style']:.2f}",
                    f"{times['dense bf16, same style'] / times['packed']:.2f}",
                    f"{times['dense int8, same style'] / times['packed int8']:.2f}",
                    f"{read['packed'] / read['reading alone']:.0%}",
                ]
            )
    head = ["sparsity", "dense kernel over torch bf16", "bf16 values over dense kernel", "int8 values over dense int8"]
    return table([*head, "share of the read bandwidth"], rows)


def bytes_table() -> str:
    """Bytes of a matrix against dense bf16."""
    found = read_result("kernels")["bytes"]
    rows = [
        [sparsity, *(f"{each[name]:.3f}" for name in ("memory", "memory, int8", "disk, random weights"))]
        for sparsity, each in found.items()
    ]
    return table(["sparsity", "memory, bf16 values", "memory, int8 values", "disk, bf16 values"], rows)


ROUNDINGS = {
    "same": "not rounded",
    "nearest": "`pack --values int8`",
    "descended": "the same masks, by descent",
    "while pruning": "`values=int8` while pruning",
}


def rounding_table() -> str:
    """Perplexities by how values were rounded, and the divergence from the model that was not."""
    models = read_result("rounding")["models"]
    texts = " / ".join(name.removesuffix(".txt") for name in next(iter(models.values()))["same"])
    rows = []
    for recipe, found in models.items():
        for name, label in ROUNDINGS.items():
            if name in found:
                figures = found[name].values()
                divergences = [f"{each['kl']:.4f}" for each in figures if "kl" in each]
                perplexities = " / ".join(f"{each['perplexity']:.2f}" for each in figures)
                rows.append(
                    [f"`{recipe.split()[0]}`, {recipe.split()[1]}", label, perplexities, " / ".join(divergences)]
                )
    return table(["recipe", "int8 values", f"perplexity, {texts}", "divergence from not rounded"], rows)


def rounding_of_matrices() -> str:
    """Error that rounding adds, descent over nearest, at 50%."""
    layers = read_result("rounding")["layers"]
    shares = [
        each["50%"]["descended"] / each["50%"]["nearest"] for name, each in layers.items() if "corner" not in name
    ]
    return " and ".join(f"{share:.2f}" for share in sorted(shares))


def installs_table() -> str:
    found = read_result("installs")["installs"]
    return table(["install", "kernels"], [[name, each["kernels"].partition(":")[0]] for name, each in found.items()])


def page() -> str:
    """docs/packed.md."""
    kernels = read_result("kernels")
    return f"""# Packed models

Written by `python tools/make_pages.py` from `benchmarks/results/*.json`; do not edit.

```
secateur pack PRUNED PACKED                  # the same weights, smaller
secateur pack PRUNED PACKED --values int8    # rounded to 8 bits, smaller still
secateur bench DENSE PACKED                  # your machine's figures
```

```python
import secateur  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PACKED")  # weights stay packed
dense = secateur.load("PACKED", dense=True)  # the ordinary model
```

After `import secateur`, `pipeline`, `generate`, `lm_eval`'s `HFLM`, `device_map="cpu"`, `torch.compile` and `save_pretrained` (packed
again) work as with any model. `state_dict()` gives dense weights; `load_state_dict()` packs them. `lm_eval`'s own command does not import secateur: use `secateur eval PACKED --tasks ...`. [The format](format.md) is open and small.

## Whole models

{models_table()}

{measured_line()} {int4_line()}

    python benchmarks/packed.py --name NAME --dense MODEL --half PRUNED50 --most PRUNED70 --recipe RECIPE --text TEXT --out benchmarks/results/packed.json

## What 8 bits cost

{rounding_table()}

SmolLM2-135M, by earlier versions of the recipes: compare only within this table. Rounding costs little: two runs of pruning differ by more. Rounding [while
pruning](how/round.md) changes layers less: on two matrices of SmolLM2 at 50% the error that it adds is {rounding_of_matrices()} of that of the nearest
values. The third row has the masks of the first, so its divergence is that of rounding alone.

With int8, small batches round inputs too, to 16 bits with one scale for each token. Those that are more than 128 times the mean size
get a second scale, so that the others keep their digits. The table has no part of that: its texts run in large batches.

    python benchmarks/rounding.py --matrices MATRIX.npz ... --texts TEXT ... --calibration TEXT --out benchmarks/results/rounding.json

## One product

Time of `x W^T` with W of {kernels["size"]} x {kernels["size"]}: torch's bf16 over ours. The {kernels["matrices"]} matrices come from memory, as in decoding.
Level `{kernels["level"]}`, one thread:

{speedup_table(1)}

Two threads:

{speedup_table(2)}

## Where the speed comes from

{shares_table()}

The first column is the kernel's part: dense weights, and a kernel in our style instead of torch's. The next is the part of the zeros.
Our kernels read about as fast as memory gives, so the zeros gain the bytes that are not read: at most 1 / 0.5625 = 1.78 at 50%.

The same on another Xeon, with {read_result("kernels_second_machine")["cache_bytes"] >> 20} MB of cache instead of {kernels["cache_bytes"] >> 20}, where int8 values gain less:

{shares_table("kernels_second_machine")}

## Bytes

Of a matrix, against dense bf16. Random weights; real ones shrink about as much on the disk.

{bytes_table()}

    python benchmarks/kernels.py --out benchmarks/results/kernels.json

## Where nothing is gained

- **Large batches.** Arithmetic decides there. At a batch of 512 int8 values are slower than torch's dense product. Above a batch of 512 with
  AMX, 16 with AVX-512 and 8 with AVX2, weights are unpacked in tiles for torch's product.
- **GPUs**: not measured. On a GPU, packed layers are dense; 2:4 has [its own way](guides/pack.md#24-on-an-nvidia-gpu). A Triton
  kernel exists and is correct in the interpreter. `benchmarks/gpu.py` measures both.
- **Other runtimes**: vLLM reads the pruned folder like any checkpoint. llama.cpp and ONNX need it converted (`convert_hf_to_gguf.py pruned`).
  All have the dense model's size and speed, as zeros gain nothing there. None reads a packed folder: `secateur unpack` it first. Untested.
- **Models whose code reads weights itself** (Mamba's `dt_proj`), fused experts, fp16 and fp32 values: unpacked to dense when loaded, and
  the model says so once. Their files are still smaller.
- CPUs without AVX2, machines that are not x86-64 Linux, and installs without a C compiler: unpacked to dense.

## Kernels

AVX-512 with VBMI2 and BF16, AMX where there is one, else AVX2; chosen at run time. They are compiled when secateur is installed, if
there is a C compiler; installing never needs one. `secateur env` says what is used. `SECATEUR_KERNELS=avx2` (`avx512`, `none`) uses less.

{installs_table()}

    python benchmarks/installs.py --out benchmarks/results/installs.json
    SECATEUR_BUILD=kernels python -m build --wheel && auditwheel repair dist/*.whl    # a manylinux wheel for every Python

To train a pruned model and keep its zeros, see [Fine-tune](guides/fine-tune.md); then pack it.
"""


def pages() -> dict[Path, str]:
    """The page."""
    return {DOCS / "packed.md": page()}
