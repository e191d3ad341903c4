"""Checks that every public object of the library explains itself; the documentation's build fails on what this finds.

Public is what a module at the root of the package, or `testing` or `ui`, names in `__all__`. Each class and function
has a docstring, and so has each method that is not inherited. No docstring explains a parameter that is not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import griffe

PACKAGE = "dramatiq_jetstream"

#: Methods with which middleware and backends answer Dramatiq, which documents them.
_DRAMATIQS = (
    "before_",
    "after_",
    "actor_options",
    "emit_",
    "get_declared_queues",
    "add_middleware",
    "declare_actor",
)


#: Where the package is.
SOURCE = Path(__file__).resolve().parent.parent / "broker"


def faults(source: Path = SOURCE) -> Iterator[str]:
    """Yield a sentence for each public object of the package in `source` whose docstring lacks something."""
    package = griffe.load(
        PACKAGE,
        search_paths=[source],
        docstring_parser="google",
        resolve_aliases=True,
        resolve_external=False,
    )
    modules = [package, *(module for module in package.modules.values() if not module.is_alias)]
    seen: set[str] = set()
    for module in modules:
        for name in module.exports or ():
            member = module.members.get(str(name))
            if member is None or (member.is_alias and not member.target_path.startswith(PACKAGE)):
                continue
            target = member.final_target if isinstance(member, griffe.Alias) else member
            if target.path not in seen and isinstance(target, griffe.Class | griffe.Function):
                seen.add(target.path)
                yield from _faults_of(target)


def _faults_of(thing: griffe.Class | griffe.Function) -> Iterator[str]:
    if not thing.has_docstring:
        yield f"{thing.path} has no docstring"
    else:
        yield from _unknown_parameters(thing)
    if isinstance(thing, griffe.Class):
        for name, member in thing.members.items():
            hidden = name.startswith("_") or name.startswith(_DRAMATIQS)
            if hidden or not isinstance(member, griffe.Function):
                continue
            if not member.has_docstring:
                yield f"{member.path} has no docstring"
            else:
                yield from _unknown_parameters(member)


def _unknown_parameters(thing: griffe.Class | griffe.Function) -> Iterator[str]:
    if thing.docstring is None:
        return
    known = {parameter.name for parameter in thing.parameters}
    for section in thing.docstring.parse("google", warnings=False):
        if isinstance(section, griffe.DocstringSectionParameters):
            for parameter in section.value:
                names = {name.strip().lstrip("*") for name in parameter.name.split(",")}
                for name in sorted(names - known):
                    yield f"{thing.path} explains the parameter {name}, which it does not have"
