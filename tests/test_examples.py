"""The examples of the reference run: each session in a docstring shows what a program on a real server would see."""

from __future__ import annotations

import asyncio
import doctest
import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import dramatiq
import pytest
from dramatiq.middleware import AgeLimit, Callbacks, Pipelines, Retries
from dramatiq.results import Results
from dramatiq_abort import Abortable

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.abort import JetStreamBackend as Aborts
from dramatiq_jetstream.events import Events
from dramatiq_jetstream.periodic import Periodic
from dramatiq_jetstream.progress import Progress
from dramatiq_jetstream.results import JetStreamBackend
from dramatiq_jetstream.testing import NatsServer, StubBroker, stub
from release.reference import PACKAGES, examples_of, public_objects
from tests.support.polling import eventually

_OPTIONS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, Any]]]:
    """What the examples take for granted, as the first page of the reference says."""
    with NatsServer(store_dir=tmp_path_factory.mktemp("nats"), sync="2m") as server:
        middleware = [AgeLimit(), Callbacks(), Pipelines(), Retries(max_retries=0), Periodic(), Progress()]
        broker = JetStreamBroker(server.url, namespace="shop", history="all", middleware=middleware)
        broker.add_middleware(Results(backend=JetStreamBackend(broker), store_results=True))
        broker.add_middleware(Abortable(backend=Aborts(broker)))
        broker.add_middleware(Events("ORDERS", ["ORDER.>"]))

        @dramatiq.actor(broker=broker)
        def charge(customer: str, amount: Any) -> Any:
            if amount == "set":
                return {customer}
            if amount < 0:
                raise ValueError(f"{amount} is no amount")
            return amount

        @dramatiq.actor(broker=broker, cron="0 3 * * *")
        def nightly() -> None: ...

        broker.setup()
        broker.publish("ORDER.created", b"17")
        worker = dramatiq.Worker(broker, worker_threads=2)
        worker.start()

        message = charge.send("c-42", 20)
        eventually(lambda: broker.status(message).state == "done", timeout=60)

        def refuse() -> Any:
            refused = charge.send("c-42", -1)
            eventually(lambda: broker.history.of(refused.message_id), timeout=60)
            return refused

        def names(session: str) -> dict[str, Any]:
            refused = refuse() if "dead_letters" in session or "refused" in session else None
            modules = {"asyncio": asyncio, "dramatiq": dramatiq, "os": os, "time": time}
            classes = {"JetStreamBroker": JetStreamBroker, "StubBroker": StubBroker, "stub": stub}
            made = {"broker": broker, "charge": charge, "message": message, "refused": refused}
            return {**modules, **classes, **made, "bank": SimpleNamespace(is_closed=True)}

        try:
            dramatiq.set_broker(broker)
            yield names
        finally:
            dramatiq.broker.global_broker = None
            worker.stop()
            broker.close()


@pytest.mark.timeout(400)  # more than a hundred
def test_the_examples_show_what_is_seen(
    shop: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line of a session prints what its docstring shows below it."""
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=_OPTIONS)
    for thing, _ in public_objects(PACKAGES):
        session = "\n\n".join(example for example in examples_of(thing) if example.startswith(">>>"))
        if not session:
            continue
        names = shop(session)
        monkeypatch.setattr(dramatiq.broker, "global_broker", names["broker"])  # an example may set another
        test = doctest.DocTestParser().get_doctest(session, names, thing.path, None, None)
        runner.run(test, out=said.append)
    assert not said, "".join(said)
    assert runner.tries > 200
