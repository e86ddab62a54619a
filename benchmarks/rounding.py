"""What 8-bit values cost: rounded after pruning (`pack --values int8`), and while pruning (`values: int8`).

    python benchmarks/rounding.py --texts TEXT ... --calibration TEXT --out benchmarks/results/rounding.json

Layer errors are those of real matrices (`--matrices`, of tests/golden and others like it). Whole models are pruned by
each recipe, with one seed, packed, and read back as the numbers that the packed files hold. `--fewer` leaves them out.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import arguments_of, write_result

import secateur
from secateur.numerics.hessian import Hessian, relative_error
from secateur.packed.layout import pack_int8, unpack
from secateur.recipe.patterns import parse_pattern
from secateur.recipe.solvers import MRP
from secateur.solvers import solve_checked
from secateur.solvers.rounding import round_to_int8

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
    result["layers"] = {
        Path(path).stem: {pattern: layer_errors(path, pattern) for pattern in ("50%", "70%", "2:4")}
        for path in args.matrices
    }
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
    """Seconds and perplexities of one recipe: values as before, rounded afterwards, and rounded while pruning."""
    found: dict[str, Any] = {}
    for values in ("same", "int8"):
        started = time.perf_counter()
        secateur.prune(
            args.model, scratch / values, recipe=recipe, pattern=pattern, settings={"values": values},
            calibration=args.calibration, samples=args.samples, seq_len=args.seq_len,
        )  # fmt: skip
        found[values] = {"seconds": time.perf_counter() - started}
    found["nearest"] = {}
    for name, source in (("nearest", "same"), ("int8", "int8")):
        secateur.pack(scratch / source, scratch / f"{name}-packed", values="int8")
        secateur.unpack(scratch / f"{name}-packed", scratch / name) if name == "nearest" else None
    for name, each in found.items():
        each |= {Path(text).name: figures(scratch / name, args.model, text, args.max_tokens) for text in args.texts}
        print(recipe, pattern, name, each, flush=True)
    return found


def figures(folder: Path, dense: str, text: str, max_tokens: int) -> dict[str, float]:
    """Perplexity, and the divergence from the dense model."""
    found = secateur.evaluate(folder, text, against=dense, max_tokens=max_tokens)
    return {"perplexity": found["perplexity"], "kl": found["against"]["kl"]}


if __name__ == "__main__":
    main()
