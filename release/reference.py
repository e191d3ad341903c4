"""Checks that every public object explains itself; the documentation's build fails on what this finds.

Public is what a package, a module at its root, or `testing` or `ui` names in `__all__`. Of each class and function:

- It has a docstring with an example: a section `Examples:`, with a session (`>>>`), which the tests run on a real
  server, or with a fenced program, which is at least Python.
- Each parameter that the docstring explains is there. One that is a time has its unit in the docstring.
- Each error that it raises itself is named there.

The same holds for each method that overrides none, but that its class's example may show it.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parent.parent

#: The packages, and where they are.
PACKAGES = {
    "dramatiq_jetstream": ROOT / "broker",
    "opentelemetry.instrumentation.dramatiq": ROOT / "instrumentation/src",
}

_PUBLIC_FOLDERS = frozenset({"testing", "ui"})

#: Methods with which middleware, backends and instrumentors answer their frameworks, which document them.
_HOOKS = ("before_", "after_", "emit_", "setup_topology", "actor_options")
_FRAMEWORKS = frozenset(
    {
        *("add_middleware", "declare_actor", "get_declared_queues"),
        *("add", "decr", "incr", "incr_and_sum", "wait", "wait_notify"),
        *("aget_result", "build_message_key", "get_result", "store_exception", "store_result"),
        *("notify", "poll", "wait_many", "stub", "close"),
        "instrumentation_dependencies",
    }
)

_TIME = re.compile(r"delay|interval|max_age|timeout|(?:.*_)?ttl|(?:.*_)?window|ack_wait")
_UNIT = re.compile(r"[Mm]illiseconds|\bms\b|[Ss]econds")
_FENCED = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def faults(packages: dict[str, Path] | None = None) -> Iterator[str]:
    """Yield a sentence for each public object whose docstring lacks something."""
    for thing, owner in public_objects(PACKAGES if packages is None else packages):
        yield from _faults_of(thing, owner)


def public_objects(
    packages: dict[str, Path],
) -> Iterator[tuple[griffe.Class | griffe.Function, griffe.Class | None]]:
    """Yield each public class, function and method, and the class that a method belongs to."""
    for name, source in packages.items():
        package = griffe.load(
            name,
            search_paths=[source],
            docstring_parser="google",
            resolve_aliases=True,
            resolve_external=False,
        )
        assert isinstance(package, griffe.Module)
        yield from _of_package(package)


def _of_package(
    package: griffe.Module,
) -> Iterator[tuple[griffe.Class | griffe.Function, griffe.Class | None]]:
    seen: set[str] = set()
    for module in [package, *_public_modules(package)]:
        for name in module.exports or ():
            member = module.members.get(str(name))
            if member is None or (member.is_alias and not member.target_path.startswith(package.path)):
                continue
            target = member.final_target if isinstance(member, griffe.Alias) else member
            if target.path in seen or not isinstance(target, griffe.Class | griffe.Function):
                continue
            seen.add(target.path)
            yield target, None
            if isinstance(target, griffe.Class):
                for method in target.members.values():
                    if isinstance(method, griffe.Function) and _is_public(method, target):
                        yield method, target


def _public_modules(package: griffe.Module) -> Iterator[griffe.Module]:
    """Yield the modules at the root of a package, and those of its folders that are public."""
    for name, module in package.modules.items():
        if not module.is_alias and (not module.is_init_module or name in _PUBLIC_FOLDERS):
            yield module


def _is_public(method: griffe.Function, owner: griffe.Class) -> bool:
    generated = method.lineno == method.endlineno == 0
    overrides = any(method.name in base.members for base in owner.mro())
    hidden = method.name.startswith(("_", *_HOOKS)) or method.name in _FRAMEWORKS
    return not (hidden or generated or overrides)


def _faults_of(thing: griffe.Class | griffe.Function, owner: griffe.Class | None) -> Iterator[str]:
    if thing.docstring is None:
        yield f"{thing.path} has no docstring"
        return
    examples = list(examples_of(thing))
    of_owner = [] if owner is None else list(examples_of(owner))
    if not examples and not any(f".{thing.name}(" in example for example in of_owner):
        yield f"{thing.path} has no example"
    for example in examples:
        try:
            compile(_program(example), thing.path, "exec")
        except SyntaxError as error:
            yield f"the example of {thing.path} is not Python: {error}"
    yield from _unknown_parameters(thing)
    yield from _times_without_unit(thing, owner)
    yield from _errors_without_a_word(thing, owner)


def examples_of(thing: griffe.Class | griffe.Function) -> Iterator[str]:
    """Yield the examples of an object: sessions, and programs."""
    if thing.docstring is None:
        return
    for section in thing.docstring.parse("google", warnings=False):
        if isinstance(section, griffe.DocstringSectionExamples):
            for kind, text in section.value:
                if kind is griffe.DocstringSectionKind.examples:
                    yield text
                else:
                    yield from _FENCED.findall(text)


def _program(example: str) -> str:
    """Return an example as a program: of a session the lines that are typed; one may return, or await."""
    typed = example
    if example.lstrip().startswith(">>>"):
        typed = "\n".join(line[4:] for line in example.splitlines() if line.startswith((">>>", "...")))
    return f"async def example():\n{textwrap.indent(typed, '    ')}\n"


def _unknown_parameters(thing: griffe.Class | griffe.Function) -> Iterator[str]:
    assert thing.docstring is not None
    known = {parameter.name for parameter in thing.parameters}
    for section in thing.docstring.parse("google", warnings=False):
        if isinstance(section, griffe.DocstringSectionParameters):
            for parameter in section.value:
                names = {name.strip().lstrip("*") for name in parameter.name.split(",")}
                for name in sorted(names - known):
                    yield f"{thing.path} explains the parameter {name}, which it does not have"


def _said(thing: griffe.Class | griffe.Function, owner: griffe.Class | None) -> str:
    """Return what the docstrings of an object and of its class say."""
    return "\n".join(one.docstring.value for one in (thing, owner) if one is not None and one.docstring)


def _times_without_unit(thing: griffe.Class | griffe.Function, owner: griffe.Class | None) -> Iterator[str]:
    said = _said(thing, owner)
    for parameter in thing.parameters:
        if _TIME.fullmatch(parameter.name) and not _UNIT.search(said):
            yield f"{thing.path} does not say the unit of {parameter.name}"


def _errors_without_a_word(
    thing: griffe.Class | griffe.Function, owner: griffe.Class | None
) -> Iterator[str]:
    source = thing if isinstance(thing, griffe.Function) else thing.members.get("__init__")
    if not isinstance(source, griffe.Function):
        return
    said = _said(thing, owner)
    for node in ast.walk(ast.parse(textwrap.dedent(source.source))):
        raised = node.exc if isinstance(node, ast.Raise) else None
        called = raised.func if isinstance(raised, ast.Call) else raised
        if isinstance(called, ast.Name) and called.id[0].isupper() and called.id not in said:
            yield f"{thing.path} raises {called.id} and does not say so"
