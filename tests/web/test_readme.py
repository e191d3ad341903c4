"""The README names what there is: every variable with its default, every address, every file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import pytest

from tasks.settings import Settings
from tests.support.processes import REPOSITORY
from web import create_app

README = (REPOSITORY / "README.md").read_text()


class Asked(Mapping[str, str]):
    """An empty environment that remembers which variables it was asked for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.names.add(name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def rows() -> dict[str, str]:
    """Return the default of each variable in the README's table."""
    found: dict[str, str] = {}
    for names, defaults in re.findall(r"^\| (`[A-Z_`, ]+) \| ([^|]*)\|", README, re.MULTILINE):
        listed = re.findall(r"`([A-Z_]+)`", names)
        given = re.findall(r"`([^`]*)`", defaults)
        found.update(zip(listed, given or [""] * len(listed), strict=True))
    return found


def test_every_variable_is_in_the_table() -> None:
    """A setting that the service reads is explained."""
    environment = Asked()
    Settings.from_environment(environment)
    assert environment.names <= set(rows())


def test_every_default_in_the_table_is_the_default() -> None:
    """Setting a variable to its default of the table changes nothing."""
    environment = Asked()
    usual = Settings.from_environment(environment)
    defaults = {name: value for name, value in rows().items() if value and name in environment.names}
    assert len(defaults) > 10
    assert Settings.from_environment(defaults) == usual


def test_every_address_of_the_api_is_in_the_table() -> None:
    """What the front end serves to programs is listed."""
    listed = set(re.findall(r"`?(?:GET|POST)? ?(/[a-z/.{}]*)[`?]", README))
    served = {
        rule.rule.replace("<path:order_id>", "{id}")
        .replace("<path:sku>", "{sku}")
        .replace("<path:since>", "{since}")
        for rule in create_app(Settings(access="open", host="127.0.0.1")).url_map.iter_rules()
        if rule.rule.startswith(("/api", "/health", "/metrics", "/openapi", "/docs"))
        # What belongs to one subscription is on the page of webhooks, to which the table leads.
        and not rule.rule.startswith("/api/webhooks/")
    }
    assert served <= listed


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_every_link_leads_to_a_file(path: str) -> None:
    """No link of the README is broken."""
    assert (REPOSITORY / path).exists()
