"""The library's rooms: which may import which, that no two modules import each other, and what is public."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dramatiq_jetstream

PACKAGE = "dramatiq_jetstream"
ROOT = Path(dramatiq_jetstream.__file__).parent

#: What the modules of a folder may import, beside each other. Modules at the root may import from every folder
#: that stands here, and each other as long as there is no circle.
ROOMS = {
    "wire": {"errors", "config"},
    "jetstream": {"errors", "config", "wire", "kv"},
    "sending": {"errors", "config", "wire", "jetstream", "kv"},
    "worker": {"errors", "config", "wire", "jetstream", "sending", "kv", "dead_letters", "history", "limits"},
}

#: Folders that stand on top: nothing below imports them.
ON_TOP = {"cli", "fleet", "testing", "ui"}


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {_module(path): path for path in ROOT.rglob("*.py")}


def _imports(module: str) -> set[str]:
    """The modules of the library that a module imports anywhere, also for type checkers or in a function."""
    path = MODULES[module]
    package = [PACKAGE, *module.split(".")[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {target for name in names if (target := _target(name)) is not None}
    return found - {module}


def _target(name: str) -> str | None:
    """The module that an imported name is, or is taken from."""
    if not name.startswith(f"{PACKAGE}."):
        return None
    parts = name.split(".")[1:]
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        for candidate in (module, f"{module}.__init__"):
            if candidate in MODULES:
                return candidate
    return None


def _room(module: str) -> str:
    return module.split(".", 1)[0]


def test_no_modules_import_each_other_in_a_circle() -> None:
    """There is an order in which all modules can be read, imports for type checkers included."""
    TopologicalSorter({module: _imports(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_from_the_rooms_below_it(room: str) -> None:
    """A private folder imports what its line above allows."""
    for module in MODULES:
        if _room(module) == room:
            foreign = {_room(target) for target in _imports(module)} - {room}
            assert foreign <= ROOMS[room], f"{module} imports {sorted(foreign - ROOMS[room])}"


def test_nothing_below_imports_what_stands_on_top() -> None:
    """The command and the servers for tests are imported by users and by each other only."""
    for module in MODULES:
        if _room(module) not in ON_TOP:
            assert not {_room(target) for target in _imports(module)} & ON_TOP, module


def test_every_folder_has_its_place() -> None:
    """A new folder is entered above, where a reader finds what it may import."""
    assert {_room(module) for module in MODULES if "." in module} == set(ROOMS) | ON_TOP


def test_the_library_imports_no_other_package_of_this_repository() -> None:
    """Dependencies point one way: from the service to the library, which needs no OpenTelemetry either."""
    for module, path in MODULES.items():
        source = path.read_text()
        for package in ("tasks", "web", "orders", "opentelemetry"):
            assert f"import {package}" not in source, module
            assert f"from {package}" not in source, module


@pytest.mark.parametrize(
    ("grammar", "home"),
    [(r"\b10[0-2]\d\d\b", "wire.error_numbers"), (r"\$JS\.ACK", "wire.ack_subjects")],
)
def test_what_the_server_defines_stands_in_one_place(grammar: str, home: str) -> None:
    """The server's error numbers and the subjects of acks are written down once."""
    assert {module for module, path in MODULES.items() if re.search(grammar, path.read_text())} == {home}


def test_importing_the_library_has_no_side_effect() -> None:
    """`__init__` says what is public and starts nothing."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    assert all(isinstance(node, allowed) for node in tree.body)
    assert set(dramatiq_jetstream.__all__) <= set(dir(dramatiq_jetstream))


@pytest.mark.parametrize("module", sorted(name for name in MODULES if "." not in name and name != "__init__"))
def test_a_public_module_says_what_it_publishes(module: str) -> None:
    """A module at the root has a docstring and `__all__`, and what stands there is documented."""
    imported = __import__(f"{PACKAGE}.{module}", fromlist=["__all__"])
    assert imported.__doc__
    for name in imported.__all__:
        published = getattr(imported, name)
        assert not callable(published) or published.__doc__, name


#: What stands in folders and is public all the same: what the folder itself exports.
PUBLIC_FOLDERS = {"testing", "ui"}


@pytest.mark.parametrize("package", ["tasks", "web"])
def test_the_service_uses_only_what_is_public(package: str) -> None:
    """The library's first user does what every user can: it imports from modules at the root, and their `__all__`."""
    repository = ROOT.parents[1]
    for path in (repository / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith(f"{PACKAGE}.") for alias in node.names), path
            if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] != PACKAGE:
                continue
            _, _, module = (node.module or "").partition(".")
            assert "." not in module, f"{path} imports {node.module}"
            assert module not in {_room(name) for name in MODULES if "." in name} - PUBLIC_FOLDERS, path
            published = __import__(node.module or PACKAGE, fromlist=["__all__"]).__all__
            assert {alias.name for alias in node.names} <= set(published), path


def test_the_broker_is_a_facade():
    """It puts the rooms together in under 400 lines, examples apart; what does the work stands in them."""
    text = re.sub(r'\n\n +Examples:\n.*?\n +(?=""")', "", MODULES["broker"].read_text(), flags=re.DOTALL)
    assert len(text.splitlines()) < 400
