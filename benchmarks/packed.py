"""Dense against packed models: size, memory, speed and perplexity.

    python benchmarks/packed.py --name N --dense MODEL --half PRUNED50 --most PRUNED70 --recipe R --text TEXT --out JSON

Packs the pruned models, one or two, to scratch folders, and measures every model by `secateur bench` and
`secateur eval`. Run it on a quiet machine. The dense int8 model is torchao's, the dense int4 one optimum-quanto's
(`pip install torchao optimum-quanto`); without them they are left out.
Every model is measured `--rounds` times in turn; the fastest counts. `--recipe` says what the models were pruned by.
The JSON keeps models of other names.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import arguments_of, write_result

import secateur
from secateur.reporting.figures import Speed
from secateur.sources.resolve import resolve

PROMPT, NEW = 128, 64


def main() -> None:
    """Measure the models of one name."""
    args = arguments_of(
        __doc__, "text", name="", dense="", half="", most="", recipe="", rounds=2, threads=2, max_tokens=8192
    )
    earlier = json.loads(args.out.read_text()) if args.out.exists() else {}
    results, others, recipes = (earlier.get(key, {}) for key in ("models", "perplexity_alone", "recipes"))
    with tempfile.TemporaryDirectory() as scratch:
        folders = variants(args, Path(scratch))
        perplexities = {name: perplexity(folder, args) for name, folder in folders.items()}
        speeds: dict[str, list[Speed]] = {name: [] for name in folders}
        for _ in range(args.rounds):
            for name, folder in folders.items():
                speeds[name] += secateur.bench([folder], prompt_tokens=PROMPT, new_tokens=NEW, threads=args.threads)
                print(name, speeds[name][-1], flush=True)
        if (int4 := perplexity_of_int4(folders["dense bf16"], args)) is not None:
            others[args.name] = {"dense int4 (optimum-quanto)": int4}
        results[args.name] = {
            name: fastest(found).to_dict() | {"model": name, "perplexity": perplexities[name]}
            for name, found in speeds.items()
        }
        recipes[args.name] = args.recipe
        settings = {
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "text": Path(args.text).name,
            "max_tokens": args.max_tokens,
        }
        figures = {"models": results, "recipes": recipes, "perplexity_alone": others}
        write_result(args.out, figures | {"settings": settings})


def variants(args: Any, scratch: Path) -> dict[str, Path]:
    """Every model to measure, by its name."""
    dense = resolve(args.dense)
    found = {"dense bf16": dense}
    if (int8 := dense_int8(dense, scratch / "dense-int8")) is not None:
        found["dense int8 (torchao)"] = int8
    pruned = {"50%": args.half, "70%": args.most}
    for share in [share for share, folder in pruned.items() if folder]:
        for name, values in ((f"packed {share}", "same"), (f"packed {share}, int8", "int8")):
            found[name] = scratch / name
            options: Any = {"values": values}
            secateur.pack(pruned[share], found[name], **options)
    return found


def dense_int8(dense: Path, target: Path) -> Path | None:
    """The dense model with torchao's int8 weights."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    except ImportError:
        return None
    from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    AutoModelForCausalLM.from_pretrained(dense, dtype="auto", quantization_config=config).save_pretrained(target)
    AutoTokenizer.from_pretrained(dense).save_pretrained(target)
    return target


def perplexity_of_int4(dense: Path, args: Any) -> float | None:
    """Perplexity of the dense model with optimum-quanto's int4 weights, which has no fast product on a CPU."""
    try:
        from optimum.quanto import freeze, qint4, quantize  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    except ImportError:
        return None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto").eval()
    quantize(model, weights=qint4, exclude="lm_head")
    freeze(model)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    return secateur.evaluate(model, args.text, max_tokens=args.max_tokens, tokenizer=tokenizer)["perplexity"]


def perplexity(folder: Path, args: Any) -> float:
    """Perplexity of a model on the text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = secateur.evaluate(model, args.text, max_tokens=args.max_tokens, tokenizer=tokenizer)["perplexity"]
    print(folder, found, flush=True)
    return found


def fastest(speeds: list[Speed]) -> Speed:
    """The best figure of each kind."""
    return replace(
        speeds[0],
        memory_bytes=min(each.memory_bytes for each in speeds),
        load_seconds=min(each.load_seconds for each in speeds),
        prefill_tokens_per_second=max(each.prefill_tokens_per_second for each in speeds),
        decode_tokens_per_second=max(each.decode_tokens_per_second for each in speeds),
    )


if __name__ == "__main__":
    main()
