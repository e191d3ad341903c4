"""Builds the documentation's site: `python release/site.py FOLDER`, or `make docs`.

The pages stand where GitHub shows them: most in `docs`, some beside what they describe. This copies them to
FOLDER/pages, under the names of PAGES, and leads their links to each other. A link to another file of the repository
leads to PROJECT_URL, the repository's address; without that it becomes its text. Then it checks the docstrings of the
reference and builds FOLDER/html with Zensical, strictly: a link or an anchor that leads nowhere fails the build, and
so does a public object without a docstring (release/reference.py).

FOLDER is removed first, so that a build that was interrupted leaves nothing behind for the next.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dramatiq_jetstream.cli.app import fleet  # noqa: E402
from release.reference import faults  # noqa: E402
from release.stage import LINK, version  # noqa: E402

#: Pages that stand elsewhere than in `docs`, and their names in the site.
PAGES = {
    "README.md": "service/index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "broker/README.md": "library.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/results/results.md": "results.md",
    "deploy/kubernetes/README.md": "kubernetes.md",
    "deploy/systemd/README.md": "systemd.md",
    "examples/celery/README.md": "from/celery-example.md",
    "instrumentation/README.md": "instrumentation.md",
}

#: The page that gets the help of every `fleet` command.
COMMANDS = "reference/command.md"

_FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
_PICTURES = (".png", ".svg")


def stage(folder: Path, url: str | None) -> None:
    """Copy pages and the pictures that they show to `folder`; `url` is the repository's address, None if unknown."""
    pages = dict(_pages())
    for source, name in pages.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / source).read_text()
        parts = _FENCE.split(text)
        parts[::2] = [_relinked(part, source, pages, url) for part in parts[::2]]
        target.write_text("".join(parts))
    with (folder / COMMANDS).open("a") as page:
        page.writelines(_helps(fleet, "fleet"))
    for source in ROOT.glob("docs/**/*"):
        if source.suffix in _PICTURES:
            target = folder / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    shutil.copytree(ROOT / "benchmarks/results", folder / "benchmarks/results", ignore=_all_but_pictures)


def _pages() -> Iterator[tuple[str, str]]:
    for source in sorted((ROOT / "docs").rglob("*.md")):
        path = source.relative_to(ROOT).as_posix()
        yield path, path.removeprefix("docs/")
    yield from PAGES.items()


def _helps(command: click.Command, name: str) -> Iterator[str]:
    """Yield a section with the help of each command below `command`."""
    with click.Context(command, info_name=name) as context:
        yield f"\n## `{name}`\n\n```text\n{command.get_help(context)}\n```\n"
    for child, below in getattr(command, "commands", {}).items():
        yield from _helps(below, f"{name} {child}")


def _all_but_pictures(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (Path(folder, name).is_dir() or name.endswith(_PICTURES))]


def _relinked(text: str, source: str, pages: dict[str, str], url: str | None) -> str:
    """Return a part of `source` that is no code, with links that lead where they lead in the repository."""
    here = posixpath.dirname(pages[source])

    def replace(match: re.Match[str]) -> str:
        image, label, link = match.groups()
        if re.match(r"[a-z]+:|#", link):
            return match[0]
        path, hash_, anchor = link.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if (ROOT / path).is_dir() and f"{path}/README.md" in pages:
            path = f"{path}/README.md"
        if path in pages or path.endswith(_PICTURES):
            return f"{image}{label}{posixpath.relpath(pages.get(path, path), here or '.')}{hash_}{anchor})"
        if url is not None:
            return f"{image}{label}{url}/blob/v{version(ROOT / 'broker')}/{path}{hash_}{anchor})"
        return label.removeprefix("[").removesuffix("](")

    return LINK.sub(replace, text)


def build(folder: Path, url: str | None) -> int:
    """Build the site below `folder`; the returned status is 0 if nothing is wrong with it."""
    found = list(faults())
    for fault in found:
        print(fault, file=sys.stderr)
    if found:
        print(f"{len(found)} faults in the docstrings of the reference.", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    stage(folder / "pages", url)
    shutil.copy(ROOT / "docs/zensical.toml", folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(ROOT / "broker")},
        capture_output=True,
        text=True,
        check=False,
    )
    sys.stdout.write(done.stdout)
    # After its warnings Zensical prints its own traceback, which says no more.
    sys.stderr.write(done.stderr.partition("Traceback (most recent call last)")[0])
    return done.returncode


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]), os.environ.get("PROJECT_URL", "").rstrip("/") or None))
