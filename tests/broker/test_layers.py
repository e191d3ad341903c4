"""The order of the library's modules: each imports only what stands before it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dramatiq_jetstream

ROOT = Path(dramatiq_jetstream.__file__).parent

#: A module may import from the lines above its own, and from its own line.
LAYERS = [
    ["errors", "wire.ids", "wire.parser", "worker.running"],
    ["jetstream.names", "config", "wire.client"],
    ["wire.lanes", "wire.opening", "worker.emission", "wire.handover", "worker.time_limits"],
    ["worker.work_queue"],
    ["wire.answers"],
    ["wire.link"],
    ["wire.connection"],
    ["jetstream.topology", "jetstream.reading", "sending.envelope", "worker.settlements"],
    ["jetstream.listing", "jetstream.watching"],
    ["kv", "sending.delays", "dead_letters", "worker.ledger"],
    ["worker.pulling"],
    ["worker.consumer"],
    ["jetstream.declaring", "worker.undertaker", "queues", "sending.batches"],
    ["broker"],
    ["jetstream.wakeups", "backends", "jetstream.cron"],
    ["events", "results", "rate_limits", "abort", "periodic", "progress", "telemetry"],
    ["testing.child_process"],
    ["testing.server"],
    ["testing.cluster"],
    ["testing"],
    ["cli"],
]
POSITION = {module: position for position, layer in enumerate(LAYERS) for module in layer}


def _modules() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in ROOT.rglob("*.py"):
        name = _place(path.relative_to(ROOT).with_suffix("").parts)
        if name is not None:
            found.setdefault(name, []).append(path)
    return found


def _place(parts: tuple[str, ...]) -> str | None:
    """The name under which a module is listed: its own, its folder's, or None for a folder's docstring."""
    dotted = ".".join(part for part in parts if part != "__init__")
    if dotted in POSITION:
        return dotted
    if parts[0] in POSITION:
        return parts[0]
    return None if parts[-1] == "__init__" else dotted


def _imports(path: Path) -> set[str]:
    """The modules of this library that a file imports when it is imported itself."""
    package = path.relative_to(ROOT.parent).with_suffix("").parts[:-1]
    imported: set[str] = set()
    for node in _executed(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif node.level:
            base = package[: len(package) - node.level + 1]
            names = [[*base, *(node.module or alias.name).split(".")] for alias in node.names]
            if not node.module:
                names = [[*base, alias.name] for alias in node.names]
        else:
            names = [[*(node.module or "").split("."), alias.name] for alias in node.names]
        for name in names:
            if name[0] == "dramatiq_jetstream":
                places = (".".join(name[1:end]) for end in range(len(name), 1, -1))
                imported |= {next((place for place in places if place in POSITION), ".".join(name[1:]))}
    return imported


def _executed(body: list[ast.stmt]) -> list[ast.Import | ast.ImportFrom]:
    """Import statements at module level; not those in functions or for type checkers only."""
    found: list[ast.Import | ast.ImportFrom] = []
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif isinstance(node, (ast.If, ast.Try)):
            found += _executed([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])
    return found


def test_every_module_has_its_place() -> None:
    """A new module is entered in the list above, where a reader finds what it may import."""
    assert set(_modules()) <= set(POSITION)


@pytest.mark.parametrize("module", sorted(_modules()))
def test_a_module_imports_only_what_stands_before_it(module: str) -> None:
    """No module imports one of a later layer, nor another package of this repository."""
    for path in _modules()[module]:
        later = {
            other
            for other in _imports(path)
            if other != module and other in POSITION and POSITION[other] > POSITION[module]
        }
        assert not later, f"{path.name} imports {sorted(later)}"
        source = path.read_text()
        for package in ("tasks", "web", "orders"):
            assert f"import {package}" not in source
            assert f"from {package}" not in source


def test_importing_the_library_has_no_side_effect() -> None:
    """`__init__` says what is public and starts nothing."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    assert all(isinstance(node, allowed) for node in tree.body)
    assert set(dramatiq_jetstream.__all__) <= set(dir(dramatiq_jetstream))
