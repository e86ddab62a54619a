"""Texts for a model of code, from Python's standard library: one to evaluate on, one to calibrate on.

    python benchmarks/code_text.py --text TEXTS/wikitext2-valid.txt --out TEXTS

writes `code-test.txt` (the modules of `TEST`) and `text-and-code.jsonl`: records of the text and of other modules in
turn, of equal length. The modules differ a little between versions of Python, so figures compare within one version.
"""

from __future__ import annotations

import json
import sysconfig
from itertools import chain
from pathlib import Path

from common import arguments_of

TEST = ("argparse", "csv", "fractions", "heapq", "pathlib", "sched", "shelve", "textwrap")
# Letters of a record, and records of each kind.
LENGTH, RECORDS = 6000, 100


def main() -> None:
    """Run from the command line."""
    arguments = arguments_of(__doc__, "text")
    (arguments.out / "code-test.txt").write_text("\n\n".join(module(name) for name in TEST), encoding="utf-8")
    text = pieces(arguments.text.read_text(encoding="utf-8"))
    code = pieces("\n\n".join(module(name) for name in other_modules()))
    records = chain.from_iterable(zip(text, code, strict=True))
    lines = (json.dumps({"text": each}) + "\n" for each in records)
    (arguments.out / "text-and-code.jsonl").write_text("".join(lines), encoding="utf-8")


def module(name: str) -> str:
    """The source of a module of the standard library."""
    return (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8")


def other_modules() -> list[str]:
    """Names of the modules that are one file and are not in the test text, in the order of the alphabet."""
    files = Path(sysconfig.get_path("stdlib")).glob("*.py")
    return sorted(path.stem for path in files if path.stem not in TEST)


def pieces(text: str) -> list[str]:
    """The first `RECORDS` pieces of `LENGTH` letters."""
    found = [text[start : start + LENGTH] for start in range(0, RECORDS * LENGTH, LENGTH)]
    if len(text) < RECORDS * LENGTH:
        raise SystemExit(f"expected a text of at least {RECORDS * LENGTH:,} letters, but it has {len(text):,}")
    return found


if __name__ == "__main__":
    main()
