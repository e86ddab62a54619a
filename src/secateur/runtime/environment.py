"""Versions, threads and devices: what a repeat of a run needs to be the same."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import torch

from secateur.errors import SecateurError
from secateur.runtime.messages import first_line

PACKAGES = ("secateur", "torch", "transformers", "safetensors")


def environment() -> dict[str, Any]:
    """Versions of packages, Python and platform, and the number of threads."""
    return {package: version(package) for package in PACKAGES} | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def default_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def devices() -> list[str]:
    """Names of the devices that torch can use here."""
    found = ["cpu"]
    found += [f"cuda:{number} ({torch.cuda.get_device_name(number)})" for number in range(torch.cuda.device_count())]
    return found + ["mps"] * torch.backends.mps.is_available()


def device_name(device: str | torch.device | None) -> str | None:
    """A device by name; None = the default one."""
    return None if device is None else str(device)


def check_device(device: str | torch.device) -> None:
    """Check that this machine and this build of torch have a device.

    Raises:
        SecateurError: they do not.
    """
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's two ways to say so
        reason, name = first_line(error).partition(" device type at start")[0], str(device).lower()
        hint = (
            f"a GPU is {name.replace('gpu', 'cuda', 1)!r}" if name.startswith("gpu") else "use cpu, cuda, cuda:1 or mps"
        )
        raise SecateurError(f"‹device› is {str(device)!r}, which can't be used here ({reason}): {hint}") from error


def processor_name(device: str) -> str:
    """The GPU's name, or the instruction set that torch uses on the CPU."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()


def environment_number(name: str, default: int) -> int:
    """A whole number from an environment variable, such as WORLD_SIZE.

    Raises:
        SecateurError: it holds something else.
    """
    text = os.environ.get(name, str(default))
    if not text.strip().isdecimal():
        raise SecateurError(f"the environment variable {name} is {text!r}: torchrun sets it to a whole number")
    return int(text)
