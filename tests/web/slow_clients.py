"""Slow clients beside orders: ``python -m tests.web.slow_clients --url http://127.0.0.1:8000``.

A third of the connections drips the head of a request, a third the body of an order, and a third sends nothing. They
are opened again as soon as the server closes them. Meanwhile orders are placed and probes asked, one after the other on
connections of their own, and the slowest of them say whether the front end holds. Everything stays on this machine.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from itertools import count
from urllib.parse import urlsplit

DRIP_SECONDS = 4.0

_HEAD = b"POST /api/orders HTTP/1.1\r\nHost: 127.0.0.1\r\n"
_BODY = _HEAD + b"Content-Type: application/json\r\nContent-Length: 9000\r\n\r\n{"
#: What each kind of client sends at first, and then a piece of every DRIP_SECONDS.
KINDS = ((_HEAD, b"A: b\r\n"), (_BODY, b" "), (b"", b""))

ORDER = json.dumps({"customer_id": "c-42", "items": [{"sku": "MUG-01", "quantity": 1}]})


@dataclass
class Times:
    """How long answers took, in milliseconds, and how many did not come."""

    took: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        ordered = sorted(self.took)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("inf")

    def __str__(self) -> str:
        return (
            f"{len(self.took)} answers, p50 {self.percentile(0.5):.0f} ms, p99 {self.percentile(0.99):.0f} ms, "
            f"{len(self.failed)} without one {sorted(set(self.failed))}"
        )


class SlowClients:
    """Keeps connections open to the front end that send as little as they can, until it is closed."""

    def __init__(self, address: tuple[str, int], connections: int) -> None:
        self._address = address
        self._wanted = connections
        self._kinds = count()
        self._selector = selectors.DefaultSelector()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.open = 0
        self.closed_by_server = 0

    def __enter__(self) -> SlowClients:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            self._drop(key.fileobj)  # type: ignore[arg-type]

    def _run(self) -> None:
        drip = time.monotonic() + DRIP_SECONDS
        while not self._stop.is_set():
            for _ in range(min(50, self._wanted - self.open)):
                self._connect()
            for key, _ in self._selector.select(0.05):
                self._read(key.fileobj)  # type: ignore[arg-type]
            if time.monotonic() > drip:
                drip += DRIP_SECONDS
                for key in list(self._selector.get_map().values()):
                    self._send(key.fileobj, KINDS[key.data][1])  # type: ignore[arg-type]

    def _connect(self) -> None:
        kind = next(self._kinds) % len(KINDS)
        client = socket.socket()
        client.settimeout(2)
        try:
            client.connect(self._address)
        except OSError:
            client.close()
            return
        client.setblocking(False)
        self._selector.register(client, selectors.EVENT_READ, kind)
        self.open += 1
        self._send(client, KINDS[kind][0])

    def _read(self, client: socket.socket) -> None:
        try:
            if client.recv(4_096):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self.closed_by_server += 1
        self._drop(client)

    def _send(self, client: socket.socket, data: bytes) -> None:
        try:
            client.send(data)
        except OSError:
            pass  # what the server has closed shows as readable

    def _drop(self, client: socket.socket) -> None:
        self._selector.unregister(client)
        client.close()
        self.open -= 1


def ask(
    address: tuple[str, int], times: Times, method: str, path: str, expected: int, **headers: str
) -> None:
    """Make one request on a connection of its own and note how long its answer took."""
    connection = HTTPConnection(*address, timeout=10)
    started = time.monotonic()
    try:
        body = ORDER if method == "POST" else None
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        answer.read()
    except (OSError, HTTPException) as error:
        times.failed.append(type(error).__name__)
    else:
        if answer.status == expected:
            times.took.append((time.monotonic() - started) * 1000)
        else:
            times.failed.append(str(answer.status))
    finally:
        connection.close()


def measure(url: str, connections: int, seconds: float, **headers: str) -> tuple[Times, Times, SlowClients]:
    """Place orders and ask probes for a while beside slow clients."""
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    orders, probes = Times(), Times()
    with SlowClients(address, connections) as slow:
        deadline = time.monotonic() + 30
        while slow.open < connections and time.monotonic() < deadline:
            time.sleep(0.1)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ask(address, orders, "POST", "/api/orders", 202, **headers)
            ask(address, probes, "GET", "/health/live", 200)
            time.sleep(0.02)
    return orders, probes, slow


def main() -> int:
    """Measure, print, and end with 1 when the front end did not hold."""
    parser = argparse.ArgumentParser(description="Orders beside slow clients.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--connections", type=int, default=1_000)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--key", help="an API key that may order")
    options = parser.parse_args()
    headers = {} if options.key is None else {"Authorization": f"Bearer {options.key}"}
    orders, probes, slow = measure(options.url, options.connections, options.seconds, **headers)
    print(f"{options.connections} slow connections, {slow.closed_by_server} closed by the server meanwhile")
    print(f"orders: {orders}")
    print(f"probes: {probes}")
    holds = (
        not orders.failed
        and not probes.failed
        and max(orders.percentile(0.99), probes.percentile(0.99)) < 250
    )
    print("RIGHT" if holds else "WRONG")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
