"""Register the packed format with transformers as soon as transformers is imported, and not before.

`import secateur` must not import transformers, which takes seconds, and transformers offers no entry point for formats.
So this waits for the import of the module that loads models.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

AWAITED, QUANTIZER = "transformers.modeling_utils", "secateur.packed.quantizer"


def register_with_transformers() -> None:
    """Register the format now if transformers is imported, else when it is. Safe to repeat."""
    if AWAITED in sys.modules:
        import_module(QUANTIZER)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the awaited module as Python would, with a loader that registers the format after it."""

    is_asked = False  # by itself, which would never end

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname != AWAITED or self.is_asked:
            return None
        self.is_asked = True
        try:
            spec = find_spec(fullname)
        finally:
            self.is_asked = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads a module by another loader, then registers the format, and lets go of the finder."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        import_module(QUANTIZER)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)
