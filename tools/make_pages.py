"""Write every generated page and picture, or check that they are up to date.

    python tools/make_pages.py
    python tools/make_pages.py --check

No number is typed by hand: each comes from a JSON in benchmarks/results that a script in benchmarks/ wrote.
"""

from __future__ import annotations

import sys
from pathlib import Path

import architectures_page
import benchmarks_page
import guarantees_page
import packed_page
import performance_page
import reference_pages
import results_page

PARTS = (
    reference_pages,
    results_page,
    benchmarks_page,
    architectures_page,
    performance_page,
    guarantees_page,
    packed_page,
)


def main() -> None:
    """Run from the command line."""
    pages: dict[Path, str] = {path: text for part in PARTS for path, text in part.pages().items()}
    pictures = [picture for part in PARTS for picture in getattr(part, "pictures", list)()]
    if "--check" in sys.argv:
        stale = [str(path) for path, text in pages.items() if not path.is_file() or path.read_text("utf-8") != text]
        stale += [str(picture.path) for picture in pictures if not picture.is_current()]
        sys.exit(f"out of date: {', '.join(stale)}" if stale else 0)
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    for picture in pictures:
        if not picture.is_current():
            picture.write()


if __name__ == "__main__":
    main()
