"""Posts orders over kept-alive connections, and reads from the stream when each was created and confirmed.

The client shares the machine with what it measures, so it is as cheap as Python allows: plain sockets and
requests made beforehand.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

PRODUCTS = ("MUG-01", "TEE-01", "NOTE-01", "BAG-01", "LAMP-01")
TIMEOUT_SECONDS = 30.0
FINAL = ("confirmed", "rejected", "failed")


def _request(number: int, host: str) -> bytes:
    skus = (PRODUCTS[number % len(PRODUCTS)], PRODUCTS[(number + 1) % len(PRODUCTS)])
    items = [{"sku": sku, "quantity": 1} for sku in skus]
    body = json.dumps({"customer_id": f"c-{number}", "items": items}).encode()
    head = f"POST /api/orders HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _answer(connection: socket.socket) -> bytes:
    received = b""
    while True:
        chunk = connection.recv(65_536)
        if not chunk:
            raise ConnectionError("the front end closed the connection in the middle of an answer")
        received += chunk
        head, separator, body = received.partition(b"\r\n\r\n")
        if separator:
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            if len(body) >= length:
                return received


def post(url: str, orders: int, clients: int, rate: float = 0.0) -> list[float]:
    """Posts `orders` orders; returns how long each answer took, in seconds.

    With a `rate` they are started at that many a second, whatever the answers take; else one after the other on
    every connection. Raises when one is not accepted.
    """
    parts = urlsplit(url)
    host, port = str(parts.hostname), int(parts.port or 80)
    numbers = iter(range(orders))
    lock = threading.Lock()
    stop = threading.Event()
    begin = time.perf_counter()

    def client() -> list[float]:
        took = []
        try:
            with socket.create_connection((host, port), timeout=TIMEOUT_SECONDS) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while not stop.is_set():
                    with lock:
                        number = next(numbers, None)
                    if number is None:
                        break
                    if rate:
                        time.sleep(max(0.0, begin + number / rate - time.perf_counter()))
                    request = _request(number, host)
                    sent = time.perf_counter()
                    connection.sendall(request)
                    answer = _answer(connection)
                    took.append(time.perf_counter() - sent)
                    if not answer.startswith(b"HTTP/1.1 202"):
                        raise RuntimeError(f"an order was not accepted: {answer[:300]!r}")
        except BaseException:
            stop.set()
            raise
        return took

    with ThreadPoolExecutor(clients) as pool:
        parts_of_all = [pool.submit(client) for _ in range(clients)]
        return [seconds for part in parts_of_all for seconds in part.result()]


def wait_confirmed(url: str, orders: int, timeout: float) -> list[tuple[int, int]]:
    """Waits until all orders are confirmed; returns when each was created and confirmed (server's nanoseconds)."""
    return asyncio.run(_wait_confirmed(url, orders, time.monotonic() + timeout))


async def _wait_confirmed(url: str, orders: int, deadline: float) -> list[tuple[int, int]]:
    import nats

    client = await nats.connect(url)
    js = client.jetstream()
    counts: dict[str, int] = {}
    while sum(counts.values()) < orders:
        if time.monotonic() > deadline:
            raise RuntimeError(f"of {orders} orders only these were finished in time: {counts}")
        await asyncio.sleep(0.1)
        info = await js.stream_info("ORDERS", subjects_filter="ORDER.>")
        subjects = info.state.subjects or {}
        counts = {name: subjects.get(f"ORDER.{name}", 0) for name in FINAL}
    if counts["confirmed"] != orders:
        raise RuntimeError(f"not all of {orders} orders were confirmed: {counts}")
    created = await _times(js, "ORDER.created")
    confirmed = await _times(js, "ORDER.confirmed")
    await client.close()
    return [(created[order_id], at) for order_id, at in confirmed.items()]


async def _times(js, subject: str) -> dict[str, int]:  # type: ignore[no-untyped-def]
    """When the event of each order was stored."""
    from tasks.events import decode, order_id_of

    times: dict[str, int] = {}
    subscription = await js.subscribe(subject, ordered_consumer=True)
    while True:
        message = await subscription.next_msg(timeout=10)
        event = decode(message.subject, message.data)
        if event is not None:
            times[order_id_of(event)] = int(message.metadata.timestamp.timestamp() * 1e9)
        if message.metadata.num_pending == 0:
            await subscription.unsubscribe()
            return times
