"""Keeps open pages up to date by server-sent events, bounded in time and in number.

A stream has the page's live part, made again every `BEAT_SECONDS`, whenever it differs. It holds a thread of the server
while it is open: so it ends after `STREAM_SECONDS`, and the browser comes back by itself. When all places are taken, or
the server has one thread, a stream ends with its first event; the browser then asks again every `RETRY_MS`, which
is live enough.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from dramatiq.errors import BrokerError
from werkzeug.wrappers import Request, Response

__all__ = ["Streams"]

BEAT_SECONDS: Final = 2.0
STREAM_SECONDS: Final = 60.0
RETRY_MS: Final = 2_000

logger = logging.getLogger(__name__)

#: Makes the live part of a page; None when it has none.
Render = Callable[[], str | None]


class Streams:
    """The open streams of this process.

    Parameters:
      places: How many may be open at once.
      stopping: Ends all when it is set.
    """

    def __init__(self, places: int, stopping: threading.Event) -> None:
        self._free = threading.Semaphore(places)
        self._stopping = stopping

    def follow(self, render: Render, request: Request) -> Response:
        """Answer with the live part of a page now and, if there is a place, whenever it changes."""
        first = render()
        if first is None:
            return Response(status=204)  # which tells a browser not to come back
        stays = (
            request.environ.get("wsgi.multithread", False)
            and not self._stopping.is_set()
            and self._free.acquire(blocking=False)
        )
        events = self._events(first, request.headers.get("Last-Event-ID", ""), render if stays else None)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        response = Response(events, content_type="text/event-stream; charset=utf-8", headers=headers)
        if stays:
            response.call_on_close(self._free.release)
        return response

    def _events(self, first: str, seen: str, render: Render | None) -> Iterator[str]:
        yield f"retry: {RETRY_MS}\n\n"
        deadline = time.monotonic() + STREAM_SECONDS
        part: str | None = first
        while part is not None:
            digest = hashlib.sha256(part.encode()).hexdigest()[:16]
            yield ":\n\n" if digest == seen else _event(digest, part)
            seen = digest
            if render is None or time.monotonic() > deadline or self._stopping.wait(BEAT_SECONDS):
                return
            try:
                part = render()
            except BrokerError as error:
                logger.debug("A live page ends, and comes back: %s", error)
                return


def _event(digest: str, part: str) -> str:
    lines = "".join(f"data: {line}\n" for line in part.split("\n"))
    return f"id: {digest}\nevent: part\n{lines}\n"
