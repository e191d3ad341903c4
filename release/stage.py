"""Prepares both distributions for a package index, where a README stands alone: `python release/stage.py FOLDER`.

PROJECT_URL is the repository's address; the release workflow knows it. With it, links and images that lead into the
repository become absolute, at the tag of the version, and the metadata names the repository, its documentation,
changelog and issues. Without it, the distributions are copied as they are.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: The folder of each distribution.
DISTRIBUTIONS = ("broker", "instrumentation")

LINK = re.compile(r"(!?)(\[[^\]]*\]\()([^)\s]+)\)")
_VERSION = re.compile(r'^__version__ = "([^"]+)"', re.MULTILINE)


def stage(folder: Path, url: str | None) -> None:
    """Copy the distributions into `folder`; `url` is the repository's address, None where it is not known."""
    for name in DISTRIBUTIONS:
        target = folder / name
        ignored = shutil.ignore_patterns("*.egg-info", "__pycache__", "build", "dist")
        shutil.copytree(ROOT / name, target, ignore=ignored)
        if url is None:
            continue
        tag = f"v{version(target)}"
        readme = target / "README.md"
        readme.write_text(absolute(readme.read_text(), name, url, tag))
        with (target / "pyproject.toml").open("a") as project:
            project.write(_urls(url, tag))


def absolute(readme: str, folder: str, url: str, tag: str) -> str:
    """Return a README of `folder` whose links and images lead to the repository at `tag`."""

    def replace(match: re.Match[str]) -> str:
        image, text, link = match.groups()
        if re.match(r"[a-z]+:|#", link):
            return match[0]
        path, hash_, anchor = link.partition("#")
        view = "raw" if image else "blob"
        return f"{image}{text}{url}/{view}/{tag}/{posixpath.normpath(f'{folder}/{path}')}{hash_}{anchor})"

    return LINK.sub(replace, readme)


def version(distribution: Path) -> str:
    """Return the version of a distribution, given its folder."""
    for module in sorted(distribution.rglob("*.py")):
        found = _VERSION.search(module.read_text())
        if found is not None:
            return found[1]
    raise SystemExit(f"{distribution} has no __version__")


def _urls(url: str, tag: str) -> str:
    return (
        "\n[project.urls]\n"
        f'Repository = "{url}"\n'
        f'Documentation = "{url}/tree/{tag}/docs"\n'
        f'Changelog = "{url}/blob/{tag}/CHANGELOG.md"\n'
        f'Issues = "{url}/issues"\n'
    )


if __name__ == "__main__":
    stage(Path(sys.argv[1]), os.environ.get("PROJECT_URL", "").rstrip("/") or None)
