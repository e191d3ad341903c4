"""The library's rooms: which may import which, that no two modules import each other, and what is public."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dramatiq_jetstream
from tests.support.imports import imports_of, modules_of

PACKAGE = "dramatiq_jetstream"
ROOT = Path(dramatiq_jetstream.__file__).parent
REPOSITORY = ROOT.parents[1]

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

_FILES = modules_of(ROOT.parent, PACKAGE)

#: The library's modules, by their names below the package.
MODULES = {name.removeprefix(f"{PACKAGE}."): path for name, path in _FILES.items()}


def _imports(module: str) -> set[str]:
    """The modules of the library that a module imports."""
    return {name.removeprefix(f"{PACKAGE}.") for name in imports_of(f"{PACKAGE}.{module}", _FILES)}


def _room(module: str) -> str:
    return module.split(".", 1)[0]


@pytest.mark.parametrize(
    "files",
    [
        _FILES,
        modules_of(REPOSITORY, "tasks") | modules_of(REPOSITORY, "web"),
        modules_of(REPOSITORY / "instrumentation" / "src", "opentelemetry"),
        modules_of(REPOSITORY, "benchmarks"),
    ],
    ids=["library", "service", "instrumentation", "benchmarks"],
)
def test_no_modules_import_each_other_in_a_circle(files: dict[str, Path]) -> None:
    """There is an order in which all modules can be read, imports for type checkers included."""
    TopologicalSorter({module: imports_of(module, files) for module in files}).prepare()


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


def test_the_architecture_says_what_each_module_is_for() -> None:
    """Every module at the root and in a room below the top is named in the table of rooms."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    table = text[text.index("| Room |") : text.index("### How a message gets into a stream")]
    named = set(re.findall(r"`(\w+)/?`", table))
    wanted = {module.rpartition(".")[2] for module in MODULES if _room(module) not in ON_TOP}
    assert wanted - {"__init__"} <= named, sorted(wanted - named)


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


def _assert_public(statement: ast.stmt, where: object) -> None:
    """Check that an import takes what the library publishes: from a module at the root, and from its `__all__`."""
    if isinstance(statement, ast.Import):
        assert not any(alias.name.startswith(f"{PACKAGE}.") for alias in statement.names), where
    if not isinstance(statement, ast.ImportFrom) or (statement.module or "").partition(".")[0] != PACKAGE:
        return
    _, _, module = (statement.module or "").partition(".")
    private = {_room(name) for name in MODULES if "." in name} - PUBLIC_FOLDERS
    assert "." not in module, f"{where} imports {statement.module}"
    assert module not in private, where
    published = set(__import__(statement.module or PACKAGE, fromlist=["__all__"]).__all__)
    published |= set() if module else {name for name in MODULES if "." not in name}
    assert {alias.name for alias in statement.names} <= published, where


@pytest.mark.parametrize("package", ["tasks", "web", "examples"])
def test_the_service_uses_only_what_is_public(package: str) -> None:
    """The library's first user does what every user can, and so do the examples."""
    for path in (REPOSITORY / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.stmt):
                _assert_public(node, path)


def test_the_documents_use_only_what_is_public() -> None:
    """What a reader copies from a page works, and goes on working."""
    pages = [*(REPOSITORY / "docs").rglob("*.md"), *REPOSITORY.glob("*.md"), *REPOSITORY.glob("*/README.md")]
    imports = re.compile(
        rf"^ *(?:>>> )?((?:from|import) {PACKAGE}\b[\w.]*(?: import [\w, ]+)?)$", re.MULTILINE
    )
    found = [(page, line) for page in pages for line in imports.findall(page.read_text())]
    assert found
    for page, line in found:
        _assert_public(ast.parse(line).body[0], page)


def test_the_broker_is_a_facade():
    """It puts the rooms together in under 400 lines, examples apart; what does the work stands in them."""
    text = re.sub(r'\n\n +Examples:\n.*?\n +(?=""")', "", MODULES["broker"].read_text(), flags=re.DOTALL)
    assert len(text.splitlines()) < 400
