"""What is built for a package index: READMEs that stand alone, and metadata that names the repository."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from release.stage import DISTRIBUTIONS, ROOT, stage

URL = "https://git.example.org/team/project"


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_link_of_a_readme_leads_to_a_file_of_the_tag(name: str, tmp_path: Path) -> None:
    """On an index page there are no files beside a README, so no link and no image may be relative."""
    stage(tmp_path, URL)
    project = tomllib.loads((tmp_path / name / "pyproject.toml").read_text())["project"]
    tag = project["urls"]["Changelog"].split("/")[-2]
    links = re.findall(r"\]\(([^)\s]+)\)", (tmp_path / name / "README.md").read_text())
    assert links
    for link in links:
        if link.startswith(URL):
            view, version, path = link.removeprefix(f"{URL}/").split("/", 2)
            assert (view in ("blob", "raw"), version) == (True, tag)
            assert (ROOT / path.partition("#")[0]).exists(), link
        else:
            assert re.match(r"https?:|#", link), link


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_metadata_names_the_repository(name: str, tmp_path: Path) -> None:
    """An index shows where source, documentation, changelog and issues are."""
    stage(tmp_path, URL)
    urls = tomllib.loads((tmp_path / name / "pyproject.toml").read_text())["project"]["urls"]
    assert set(urls) == {"Repository", "Documentation", "Changelog", "Issues"}
    assert urls["Repository"] == URL


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_without_an_address_nothing_is_made_up(name: str, tmp_path: Path) -> None:
    """A build on a developer's machine has README and metadata as they are."""
    stage(tmp_path, None)
    for file in ("README.md", "pyproject.toml"):
        assert (tmp_path / name / file).read_bytes() == (ROOT / name / file).read_bytes()
