"""Names that a shell completes: of queues, and of actors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click
from click.shell_completion import CompletionItem

from .context import Fleet

__all__ = ["ACTOR", "QUEUE"]


class _Name(click.ParamType[str]):
    """A name; the server knows some of them: completing asks it, and a server that is not there completes nothing."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        fleet = ctx.find_object(Fleet) or Fleet()
        try:
            return [CompletionItem(name) for name in sorted(self.known(fleet)) if name.startswith(incomplete)]
        except Exception:  # noqa: BLE001 - there is no place for an error on a line that is being typed
            return []
        finally:
            fleet.close()

    def known(self, fleet: Fleet) -> Iterable[str]:
        raise NotImplementedError


class _Queue(_Name):
    name = "queue"

    def known(self, fleet: Fleet) -> Iterable[str]:
        return fleet.queue_names()


class _Actor(_Name):
    name = "actor"

    def known(self, fleet: Fleet) -> Iterable[str]:
        return fleet.seen_actors()


QUEUE = _Queue()
ACTOR = _Actor()
