"""What a request asks: the addresses of the pages, and what every view gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from werkzeug.routing import Map, MapAdapter, Rule
from werkzeug.wrappers import Request

from dramatiq_jetstream.broker import JetStreamBroker

from .access import Person
from .reading import Reader

__all__ = ["MENU", "URLS", "Asked"]

URLS: Final = Map(
    [
        Rule("/", endpoint="overview"),
        Rule("/workers", endpoint="workers"),
        Rule("/running", endpoint="running"),
        Rule("/messages", endpoint="messages"),
        Rule("/messages/<path:message>", endpoint="message"),
        Rule("/delayed", endpoint="delayed"),
        Rule("/schedules", endpoint="schedules"),
        Rule("/dead", endpoint="dead"),
        Rule("/dead/<letter>", endpoint="letter"),
        Rule("/limits", endpoint="limits"),
        Rule("/audit", endpoint="audit"),
        Rule("/change/<action>", endpoint="change"),
        Rule("/changed/<change>", endpoint="changed"),
        Rule("/static/<name>", endpoint="static"),
    ],
    merge_slashes=False,
)

#: The pages of the menu, by their endpoints.
MENU: Final = (
    ("overview", "Overview"),
    ("workers", "Workers"),
    ("running", "Running"),
    ("messages", "Messages"),
    ("delayed", "Delayed"),
    ("schedules", "Schedules"),
    ("dead", "Dead letters"),
    ("limits", "Limits"),
    ("audit", "Audit"),
)


@dataclass(frozen=True)
class Asked:
    """One request to a page: what it asks, by whom, and what answers it."""

    request: Request
    person: Person
    urls: MapAdapter
    reader: Reader

    @property
    def broker(self) -> JetStreamBroker:
        """The broker whose fleet is shown."""
        return self.reader.broker

    def get(self, name: str, *, most: int = 500) -> str:
        """A field of the address, without blanks around it; empty when it is not there."""
        return self.request.args.get(name, "").strip()[:most]

    def url(self, endpoint: str, **values: Any) -> str:
        """The address of a page; values that its path does not have follow as a query, empty ones left out."""
        return self.urls.build(endpoint, {name: value for name, value in values.items() if value})
