"""Which modules import which, as their source says: for type checkers and in functions too."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path


def modules_of(directory: Path, package: str) -> dict[str, Path]:
    """Return the files of a package that stands in a directory, by the full names of its modules.

    A hidden folder in it, such as an environment that the benchmarks have made, has no module of the package.
    """
    folder = directory.joinpath(*package.split("."))
    found = {path.relative_to(directory): path for path in folder.rglob("*.py")}
    return {
        ".".join(place.with_suffix("").parts): path
        for place, path in found.items()
        if not any(part.startswith(".") for part in place.parts)
    }


def imports_of(module: str, modules: Mapping[str, Path]) -> set[str]:
    """Return those of the modules that one of them imports."""
    names = _imported(module, modules[module])
    return {target for name in names if (target := _target(name, modules)) is not None} - {module}


@cache
def _imported(module: str, path: Path) -> frozenset[str]:
    """Return the full names that a module imports."""
    package = module.split(".")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return frozenset(names)


def _target(name: str, modules: Mapping[str, Path]) -> str | None:
    """Return the module that an imported name is, or is taken from."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        for candidate in (module, f"{module}.__init__"):
            if candidate in modules:
                return candidate
    return None
