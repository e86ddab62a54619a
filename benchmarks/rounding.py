"""What 8-bit values cost: rounded after pruning (`pack --values int8`), and while pruning (`values: int8`).

    python benchmarks/rounding.py --texts TEXT ... --calibration TEXT --out benchmarks/results/rounding.json

Layer errors are those of real matrices (`--matrices`, of tests/golden and others like it). Whole models are pruned by
each recipe, with one seed. `--fewer` leaves them out.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import arguments_of, write_result

import secateur
from secateur.numerics.hessian import Hessian, relative_error
from secateur.numerics.rounding import round_to_int8
from secateur.packed.layout import pack_int8, unpack
from secateur.recipe.patterns import parse_pattern
from secateur.recipe.recipe import Recipe
from secateur.recipe.solvers import MRP
from secateur.solvers import solve_checked

CORNER = Path(__file__).parents[1] / "tests" / "golden" / "smollm2-l10-v_proj-corner.npz"


def main() -> None:
    """Measure matrices, then whole models."""
    args = arguments_of(
        __doc__,
        "calibration",
        matrices=[str(CORNER)],
        texts=[""],
        model="smollm2",
        recipes=["fast", "balanced"],
        patterns=["50%"],
        samples=32,
        seq_len=512,
        max_tokens=16384,
        threads=1,
        fewer=False,
    )
    torch.set_num_threads(args.threads)
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    result.pop("environment", None)
    for path in args.matrices:
        errors = {pattern: layer_errors(path, pattern) for pattern in ("50%", "70%", "2:4")}
        result.setdefault("layers", {})[Path(path).stem] = errors
    result.setdefault("models", {})
    for recipe in [] if args.fewer else args.recipes:
        for pattern in args.patterns:
            with TemporaryDirectory() as scratch:
                result["models"][f"{recipe} {pattern}"] = whole_model(args, recipe, pattern, Path(scratch))
            write_result(args.out, result)
    write_result(args.out, result)


def layer_errors(path: str, pattern: str) -> dict[str, float]:
    """Error that rounding adds, relative to the layer's output: by the nearest values, and by the descent."""
    arrays = np.load(path)
    W, H = torch.from_numpy(arrays["W"]).float(), Hessian(torch.from_numpy(arrays["H"]).float(), tokens=0)
    solved = solve_checked(MRP(), W, H, parse_pattern(pattern))
    nearest = unpack(pack_int8(solved.weight.bfloat16())).float()
    descended = round_to_int8(solved.weight, solved.keep, H.damped.matrix, torch.bfloat16).bfloat16().float()
    return {
        "pruning": relative_error(solved.weight, W, H.H),
        "nearest": relative_error(nearest, solved.weight, H.H),
        "descended": relative_error(descended, solved.weight, H.H),
    }


def whole_model(args: Any, recipe: str, pattern: str, scratch: Path) -> dict[str, Any]:
    """Figures of one recipe with values as before, rounded afterwards, and rounded while pruning.

    The masks of a run depend on all that went before, so two runs differ by more than rounding. Where every matrix has
    the same pattern, the pruned model is also rounded by the descent, its masks and all else kept: by magnitude, which
    prunes the zeros that are there. Then the divergence from it is that of rounding alone.
    """
    options = {"calibration": args.calibration, "samples": args.samples, "seq_len": args.seq_len}
    int8: dict[str, Any] = {"values": "int8"}
    secateur.prune(args.model, scratch / "same", recipe=recipe, pattern=pattern, **options)
    secateur.prune(args.model, scratch / "while pruning", recipe=recipe, pattern=pattern, settings=int8, **options)
    secateur.pack(scratch / "same", scratch / "packed", values="int8")
    secateur.unpack(scratch / "packed", scratch / "nearest")
    names = ["same", "while pruning", "nearest"]
    if Recipe.preset(recipe, pattern).allocation is None:
        names.append("descended")
        secateur.prune(
            scratch / "same", scratch / "descended", solver="magnitude", pattern=pattern, settings=int8, **options
        )
    found = {
        name: {Path(text).name: figures(scratch, name, text, args.max_tokens) for text in args.texts} for name in names
    }
    print(recipe, pattern, found, flush=True)
    return found


def figures(scratch: Path, name: str, text: str, max_tokens: int) -> dict[str, float]:
    """Perplexity, and for what was rounded alone the divergence from what it was before."""
    against = scratch / "same" if name in ("nearest", "descended") else None
    found = secateur.evaluate(scratch / name, text, against=against, max_tokens=max_tokens)
    return {"perplexity": found["perplexity"]} | ({"kl": found["against"]["kl"]} if against else {})


if __name__ == "__main__":
    main()
