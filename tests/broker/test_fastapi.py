"""FastAPI on uvicorn, before a server that stands still: sending and waiting do not stop its event loop."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dramatiq
import pytest
from dramatiq.results import Results

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.results import JetStreamBackend
from dramatiq_jetstream.testing import NatsServer

#: How long a call waits for a server that stands still.
TIMEOUT_MS = 3_000

PROGRAM = f"""
import asyncio
import time
from contextlib import asynccontextmanager

import dramatiq
from dramatiq.results import Results, ResultTimeout
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from dramatiq_jetstream import JetStreamBroker, aio
from dramatiq_jetstream.errors import BrokerConnectionError
from dramatiq_jetstream.results import JetStreamBackend

broker = JetStreamBroker(enqueue_timeout={TIMEOUT_MS})
broker.add_middleware(Results(backend=JetStreamBackend(broker), store_results=True))
dramatiq.set_broker(broker)
longest = 0.0


async def watch():
    global longest
    last = time.monotonic()
    while True:
        await asyncio.sleep(0.01)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()


@asynccontextmanager
async def lifespan(app):
    watching = asyncio.ensure_future(watch())
    yield
    watching.cancel()


app = FastAPI(lifespan=lifespan)
messages = {{}}


@dramatiq.actor
def charge(order):
    return 100 * order


@app.exception_handler(BrokerConnectionError)
@app.exception_handler(ResultTimeout)
async def unavailable(request, error):
    return JSONResponse(type(error).__name__, status_code=503)


@app.post("/charge/{{order}}")
async def send(order: int):
    messages[order] = await charge.asend(order)


@app.post("/remind/{{order}}")
async def enqueue(order: int):
    await broker.aenqueue(charge.message(order), delay=3_600_000)


@app.get("/amount/{{order}}")
async def wait(order: int, timeout: int = {TIMEOUT_MS}):
    return await aio.get_result(messages[order], timeout=timeout)


@app.post("/blocked/{{order}}")
async def block(order: int):
    charge.send(order)


@app.get("/lag")
async def lag():
    global longest
    said, longest = longest, 0.0
    return said
"""

Ask = Callable[[str, str], tuple[int, str]]


@pytest.fixture
def ask(own_nats_server: NatsServer, tmp_path: Path) -> Iterator[Ask]:
    """Makes a request of the program, which runs on uvicorn in a process of its own."""
    (tmp_path / "program.py").write_text(PROGRAM)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        host, port = listening.getsockname()
        number = listening.fileno()
        served = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "program:app", "--fd", str(number), "--log-level", "warning"],
            cwd=tmp_path,
            env={**os.environ, "NATS_URL": own_nats_server.url},
            pass_fds=[number],
        )

    def ask(method: str, path: str) -> tuple[int, str]:
        request = urllib.request.Request(f"http://{host}:{port}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    try:
        yield ask
    finally:
        served.terminate()
        served.wait(30)


def test_the_application_goes_on_while_the_server_stands_still(ask: Ask, own_nats_server: NatsServer) -> None:
    """A blocking send stops the loop until it gives up; asend, aenqueue and get_result for a fraction of that."""
    broker = JetStreamBroker(own_nats_server.url)
    broker.add_middleware(Results(backend=JetStreamBackend(broker), store_results=True))
    dramatiq.actor(lambda order: 100 * order, actor_name="charge", broker=broker)
    worker = dramatiq.Worker(broker, worker_threads=1)
    worker.start()
    try:
        assert ask("POST", "/charge/1") == (200, "null")
        assert ask("GET", "/amount/1?timeout=60000") == (200, "100")
    finally:
        worker.stop()
        broker.close()
    assert ask("POST", "/charge/2") == (200, "null")  # no worker runs it

    awaiting = [("POST", "/charge/3"), ("POST", "/remind/4"), ("GET", "/amount/2")]
    own_nats_server.suspend()
    try:
        ask("GET", "/lag")
        assert ask("POST", "/blocked/5")[0] == 503
        blocked = float(ask("GET", "/lag")[1])
        # A busy machine may stop any process for a while, so one of three has to do.
        lags: list[float] = []
        while len(lags) < 3 and min(lags, default=blocked) > blocked / 4:
            with ThreadPoolExecutor(len(awaiting)) as pool:
                answers = list(pool.map(lambda one: ask(*one), awaiting))
            assert [status for status, _ in answers] == [503, 503, 503], answers
            lags.append(float(ask("GET", "/lag")[1]))
    finally:
        own_nats_server.resume()
    assert blocked > TIMEOUT_MS / 1000 * 0.9
    assert min(lags) < blocked / 4, lags
