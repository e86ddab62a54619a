"""Cut a calibration text in two: what to calibrate on, and a part that is held out, to choose settings by.

    python benchmarks/split_text.py --text TEXTS/wikitext2-valid.txt --out TEXTS

writes `wikitext2-valid-first.txt` (the first 85% of the lines) and `wikitext2-valid-rest.txt`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

SHARE = 0.85


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lines = arguments.text.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = round(SHARE * len(lines))
    for part, name in ((lines[:cut], "first"), (lines[cut:], "rest")):
        path = arguments.out / f"{arguments.text.stem}-{name}.txt"
        path.write_text("".join(part), encoding="utf-8")


if __name__ == "__main__":
    main()
