"""What the benchmark scripts share: arguments, the environment, and one JSON of results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from secateur.runtime.environment import environment


def arguments_of(doc: str | None, *paths: str, **options: Any) -> argparse.Namespace:
    """Parsed arguments of a script: `--out` for its JSON, paths that it needs, and options with a default.

    An option whose default is a list takes several values.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (*paths, "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, default in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true")
        elif isinstance(default, list):
            parser.add_argument(flag, nargs="+", default=default)
        else:
            parser.add_argument(flag, default=default, type=str if default is None else type(default))
    return parser.parse_args()


def where(device: str = "cpu") -> dict[str, Any]:
    """The environment, with the device and its name."""
    card = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return environment() | {"device": device, "card": card}


def write_result(out: Path, result: dict[str, Any], device: str = "cpu") -> None:
    """Write one JSON of results with the environment that they come from."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"environment": where(device)} | result, indent=1) + "\n", encoding="utf-8")
