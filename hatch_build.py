"""Build hook of hatchling: compiles the CPU kernels where there is a C compiler, and never fails for lack of one.

With kernels the wheel is `py3-none-PLATFORM`, for every Python; without, `py3-none-any`. `SECATEUR_BUILD=pure` builds
none; `SECATEUR_BUILD=kernels` makes a failure an error, for those who publish wheels.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE, LIBRARY = "src/secateur/packed/kernels.c", "src/secateur/packed/_kernels.so"
FLAGS = ("-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-z,now")


class KernelHook(BuildHookInterface):
    """Compiles `kernels.c` next to its source, and adds it to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile before the wheel, or the editable install, is made."""
        wanted = os.environ.get("SECATEUR_BUILD", "auto")
        library = Path(self.root) / LIBRARY
        library.unlink(missing_ok=True)  # of another machine, perhaps
        problem = "SECATEUR_BUILD=pure" if wanted == "pure" else self._compile(library)
        if problem is None:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            build_data["artifacts"].append(LIBRARY)
        elif wanted == "kernels":
            raise RuntimeError(f"the kernels could not be built: {problem}")
        else:
            self.app.display_warning(f"built without CPU kernels ({problem}): packed models are unpacked when loaded")

    def _compile(self, library: Path) -> str | None:
        """Compile the library; why not, where that fails."""
        if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
            return f"they are for x86-64 on Linux, and this is {platform.machine()} on {platform.system()}"
        named = os.environ.get("CC")
        installed = [name for name in ("gcc", "clang", "cc") if shutil.which(name)]
        compiler = shlex.split(named) if named else installed[:1]
        if not compiler:
            return "there is no C compiler"
        command = [*compiler, *FLAGS, str(Path(self.root) / SOURCE), "-o", str(library)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        return None if done.returncode == 0 else f"{shlex.join(command)}: {done.stderr.strip()[-500:]}"
