"""Take docs/report.png: the page of a run, in a headless Chromium.

secateur demo --out demo
secateur pack demo demo-packed
secateur eval demo --against smollm2 --record --max-tokens 20480
secateur bench smollm2 demo-packed demo --record
python tools/report_picture.py demo/report.html
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from pages import DOCS

SIZE = "1440,1960"


def main() -> None:
    """Run from the command line."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None or len(sys.argv) != 2:
        sys.exit("give the page, and install Chromium")
    page = Path(sys.argv[1]).resolve()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={SIZE}"]
    subprocess.run([chromium, *options, f"--screenshot={DOCS / 'report.png'}", page.as_uri()], check=True)


if __name__ == "__main__":
    main()
