"""The documentation's site: it builds, strictly, and what is wrong with a page or a docstring fails the build."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from release import reference, site

ROOT = Path(__file__).resolve().parent.parent


def _in_navigation(entry: object) -> set[str]:
    if isinstance(entry, str):
        return {entry}
    values = entry.values() if isinstance(entry, dict) else entry
    assert isinstance(values, list) or not isinstance(entry, list)
    return set().union(*(_in_navigation(value) for value in values))


def test_the_site_builds_and_a_broken_link_would_fail_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every link, anchor and reference of every page leads somewhere, and the build says so when one does not."""
    staged = site.stage

    def stage_with_a_broken_link(folder: Path, url: str | None) -> None:
        staged(folder, url)
        (folder / "glossary.md").write_text("[gone](guarantees.md#no-such-heading)")

    assert site.build(tmp_path / "site", None) == 0, capfd.readouterr().err
    page = (tmp_path / "site/html/reference/backends/index.html").read_text()
    assert 'id="dramatiq_jetstream.results.JetStreamBackend"' in page
    assert "fleet dead replay" in (tmp_path / "site/html/reference/command/index.html").read_text()
    monkeypatch.setattr(site, "stage", stage_with_a_broken_link)
    assert site.build(tmp_path / "site", None) != 0
    assert "anchor does not exist" in capfd.readouterr().err


def test_every_page_is_in_the_navigation() -> None:
    """A page that no menu names cannot be found."""
    navigation = tomllib.loads((ROOT / "docs/zensical.toml").read_text())["project"]["nav"]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert _in_navigation(navigation) == pages | set(site.PAGES.values())


def test_a_link_out_of_the_site_leads_to_the_repository(tmp_path: Path) -> None:
    """With the repository's address, links to its files are kept; without, their text is."""
    site.stage(tmp_path / "with", "https://git.example.org/team/project")
    site.stage(tmp_path / "without", None)
    page = "architecture.md"
    assert "](https://git.example.org/team/project/blob/v" in (tmp_path / "with" / page).read_text()
    assert "](../" not in (tmp_path / "without" / page).read_text()


@pytest.mark.parametrize("fault", [[], ["dramatiq_jetstream.x has no docstring"]])
def test_a_fault_of_a_docstring_fails_the_build(
    fault: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference is complete, or there is none."""
    monkeypatch.setattr(site, "faults", lambda: iter(fault))
    monkeypatch.setattr(site, "stage", lambda folder, url: folder.mkdir(parents=True))
    status = site.build(tmp_path / "site", None)
    assert ("no docstring" in capsys.readouterr().err) == bool(fault)
    assert status == 1 or not fault


def test_every_public_object_explains_itself(tmp_path: Path) -> None:
    """The check finds nothing in the packages, and would find what lacks a docstring, an example, a unit, an error."""
    assert list(reference.faults()) == []
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "things.py").write_text(
        "__all__ = ['Thing', 'make', 'wait']\n"
        "class Thing:\n"
        "    '''A thing.\n\n    Examples:\n      >>> Thing().shown()\n    '''\n"
        "    def shown(self):\n        'Is in the example.'\n"
        "    def method(self): ...\n"
        "    def _hidden(self): ...\n"
        "def make(size):\n"
        "    '''Make one.\n\n    Parameters:\n      sise: How large.\n\n    Examples:\n      ```python\n      make(\n"
        "      ```\n    '''\n"
        "def wait(timeout):\n    'Wait.'\n    raise TimeoutError('no thing')\n"
        "def other(): ...\n"
    )
    assert list(reference.faults({"shop": tmp_path})) == [
        "shop.things.Thing.method has no docstring",
        "the example of shop.things.make is not Python: '(' was never closed (shop.things.make, line 2)",
        "shop.things.make explains the parameter sise, which it does not have",
        "shop.things.wait has no example",
        "shop.things.wait does not say the unit of timeout",
        "shop.things.wait raises TimeoutError and does not say so",
    ]
