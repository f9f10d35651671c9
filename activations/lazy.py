"""Public names of a package, loaded at first use: `import activations` costs milliseconds and loads no torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType

__all__ = ["export"]


def export(package: str, homes: Mapping[str, str]) -> None:
    """Let `package.name` load the object `name` from the module that is its home.

    A function may bear the name of the module it lives in (`extract` in `extract.py`): importing that module would
    bind the module to the package's attribute, so such bindings are dropped and the name stays the function's.

    Args:
        package: The package's `__name__`.
        homes: Public name to the module that defines it.
    """

    class Package(ModuleType):
        def __getattr__(self, name: str) -> object:
            if name not in homes:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            value = getattr(importlib.import_module(homes[name]), name)
            self.__dict__[name] = value
            return value

        def __setattr__(self, name: str, value: object) -> None:
            if not (name in homes and isinstance(value, ModuleType)):
                super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *homes})

    sys.modules[package].__class__ = Package
