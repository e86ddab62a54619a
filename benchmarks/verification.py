"""What digests cost: seconds of hashing in a whole run on SmolLM2.

    python benchmarks/verification.py --out benchmarks/results/verification.json

The fastest recipe on the tokens of the README, so that the share is large. All hashing counts: of the source, of
every block, of the finished model before it is published, and of OUT on a resumed run of it.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments_of, write_result

import secateur

RECIPE = {"recipe": "fast", "samples": 32, "seq_len": 512}


def main() -> None:
    """Time one run and its resumed check, and write one JSON."""
    args = arguments_of(__doc__)
    hashed = {"seconds": 0.0, "bytes": 0}
    digest = hashlib.file_digest

    def timed(file: Any, name: str) -> Any:
        started = time.perf_counter()
        found = digest(file, name)
        hashed["seconds"] += time.perf_counter() - started
        hashed["bytes"] += file.tell()
        return found

    hashlib.file_digest = timed  # pyright: ignore[reportAttributeAccessIssue]
    with tempfile.TemporaryDirectory() as scratch:
        out, found = Path(scratch) / "out", {}
        for name in ("run", "finished run resumed"):
            hashed |= {"seconds": 0.0, "bytes": 0}
            started = time.perf_counter()
            secateur.prune("smollm2", out, resume=True, **RECIPE)  # pyright: ignore[reportArgumentType]
            seconds = time.perf_counter() - started
            found[name] = {"seconds": seconds, "hashing": hashed["seconds"], "hashed_bytes": hashed["bytes"]}
        size = sum(path.stat().st_size for path in out.iterdir())
    write_result(args.out, {"recipe": RECIPE, "model_bytes": size, "runs": found})
    print(found)


if __name__ == "__main__":
    main()
