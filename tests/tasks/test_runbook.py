"""Every procedure of the runbook is executed as it stands in the text, against a live service.

A block of commands that nothing executes fails the first test. Only what an operator would fill in is filled in:
ORDER_ID, MESSAGE_ID, QUEUE, and the port of the server that is started on a copy. The procedures run one after the
other on one service, because dead letters are numbered from its first one on.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import dramatiq
import pytest

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.testing import NatsServer
from tasks.outage import REST_SECONDS
from tests.support.polling import eventually
from tests.support.ports import free_port
from tests.support.processes import REPOSITORY, Process
from tests.tasks.producer import Producer, created
from tests.web.stack import Stack

PAGE = (REPOSITORY / "docs" / "operations.md").read_text()


@dataclass(frozen=True)
class Block:
    """A block of commands: the section that it stands in, its language and its lines."""

    section: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands, each on its own; a block for a console has what they print, too."""
        if self.language == "console":
            return [line.removeprefix("$ ") for line in self.text.splitlines() if line.startswith("$ ")]
        if "<<'EOF'" in self.text:
            return [self.text]
        return [line.strip() for line in self.text.splitlines() if line.strip()]

    @property
    def printed(self) -> set[str]:
        """What a block for a console says is printed, whatever the numbers."""
        lines = [line for line in self.text.splitlines() if line.strip() and not line.startswith("$ ")]
        return {alike(line) for line in lines}


def alike(line: str) -> str:
    """Return a line in the form that it has for all numbers."""
    return " ".join(re.sub(r"\d[\d.,:]*", "N", line).split())


def blocks() -> list[Block]:
    found = []
    for match in re.finditer(r"^ *```(sh|console)\n(.*?)^ *```", PAGE, re.MULTILINE | re.DOTALL):
        section = re.findall(r"^##+ (.*)$", PAGE[: match.start()], re.MULTILINE)[-1]
        found.append(Block(section, match[1], match[2]))
    return found


class Shell:
    """Runs commands where the service is installed, with its settings, in a directory that has its `.data`."""

    def __init__(self, shop: Stack, directory: Path, broker: JetStreamBroker) -> None:
        self.shop = shop
        self.directory = directory
        self.producer = Producer(broker, shop)
        self.broker = broker
        self.environment = {
            **os.environ,
            **shop.environment,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def __call__(self, command: str, *, code: int = 0, **filled_in: str) -> str:
        """Run a command, saying yes when it asks; returns what it prints."""
        for placeholder, value in filled_in.items():
            command = re.sub(rf"\b{placeholder}\b", value, command)
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.directory,
            env=self.environment,
            input="y\n",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == code, f"{command}\n{said}"
        assert "Traceback" not in done.stderr, said
        return said

    def fail(self, letters: int) -> list[str]:
        """Have payments given up until there are `letters` dead letters; returns the orders of the new ones."""
        self.shop.knobs(failure_rate=1.0)
        orders = []
        while (before := self.dead()) < letters:
            order_id = self.producer.publish(created())
            eventually(lambda before=before: self.dead() > before, timeout=60)
            eventually(lambda order_id=order_id: self.producer.status(order_id) == "failed", timeout=60)
            orders.append(order_id)
        self.recover()
        return orders

    def recover(self) -> None:
        """Have payments succeed again, once the workers no longer leave the gateway alone."""
        self.shop.knobs(failure_rate=0.0)
        time.sleep(REST_SECONDS)
        self.order()  # the one payment that finds out

    def delay(self) -> str:
        """Have a message of the payments wait for ten minutes; returns its id."""
        message: dramatiq.Message[None] = dramatiq.Message("payments", "capture_payment", (), {}, {})
        self.broker.declare_queue("payments")
        self.broker.enqueue(message, delay=600_000)
        return message.message_id

    def order(self) -> str:
        """Return an order that is confirmed."""
        order_id = self.producer.publish(created())
        self.confirmed(order_id)
        return order_id

    def dead(self) -> int:
        return self.broker.queue_stats("payments").dead

    def confirmed(self, order_id: str) -> None:
        eventually(lambda: self.producer.status(order_id) == "confirmed", timeout=60)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    directory = tmp_path_factory.mktemp("runbook")
    env = {"RETRY_LIMIT": "1", "STUCK_AFTER": "1000"}
    with (
        NatsServer(store_dir=directory / ".data" / "nats", sync="2m") as nats,
        Stack(directory, nats=nats, env=env) as shop,
    ):
        broker = JetStreamBroker(nats.url)
        yield Shell(shop, directory, broker)
        broker.close()


def failing_orders(shell: Shell, block: Block) -> None:
    shell.fail(letters=1)
    listed, shown = block.commands
    assert "capture_payment" in shell(listed)
    assert "GatewayUnavailable" in shell(shown)


def a_first_look(shell: Shell, console: Block, behind: Block) -> None:
    """What is printed is what the page says, with other numbers."""
    shell.fail(letters=2)
    said = "".join(shell(command) for command in console.commands)
    assert console.printed <= {alike(line) for line in said.splitlines()}, said
    (command,) = behind.commands
    assert "dramatiq-capture_payment 0 waiting, 0 in flight" in shell(command)


def dead_letters(shell: Shell, block: Block) -> None:
    third, fourth = shell.fail(letters=4)
    listed, shown, replay, drop, replay_all = block.commands
    assert shell(listed).count("capture_payment") >= 4
    assert "capture_payment" in shell(shown)
    shell(replay)
    eventually(lambda: shell.dead() == 2, timeout=60)
    shell(drop)
    assert shell.dead() == 1
    shell(replay_all)
    shell.confirmed(fourth)
    assert shell.producer.status(third) == "failed"


def an_order_that_does_not_move_on(shell: Shell, block: Block) -> None:
    """While the gateway fails, so that what is called again fails again."""
    (order_id,) = shell.fail(letters=shell.dead() + 1)
    shell.shop.knobs(failure_rate=1.0)
    stuck, redrive, redrive_all, cancel, accept, refund, ship, take_back = block.commands
    eventually(lambda: order_id in shell(stuck), timeout=60)
    assert "1 dead letters replayed" in shell(redrive, ORDER_ID=order_id)
    shell(redrive_all)
    assert "cancelled" in shell(cancel, ORDER_ID=order_id)
    assert "the customer asked for it" in shell.shop.get(f"/api/orders/{order_id}").text
    shell.recover()
    charged = shell.order()
    assert "refund requested" in shell(refund, ORDER_ID=charged)
    assert "Nothing is offered of order" in shell(accept, code=1, ORDER_ID=charged)
    shell(ship, ORDER_ID=charged)
    eventually(lambda: shell.producer.status(charged) == "shipped", timeout=60)
    shell(take_back, ORDER_ID=charged)
    eventually(lambda: shell.producer.status(charged) == "returned", timeout=60)


def a_purge(shell: Shell, block: Block) -> None:
    shell.delay()
    shell(block.commands[0])
    assert shell.broker.queue_stats("payments").delayed == 0


def a_pause(shell: Shell, block: Block) -> None:
    pause, resume = block.commands
    shell(pause)
    order_id = shell.producer.publish(created())
    eventually(lambda: shell.producer.status(order_id) == "reserved", timeout=60)
    assert shell.broker.is_paused("payments")
    shell(resume)
    shell.confirmed(order_id)


def single_messages(shell: Shell, block: Block) -> None:
    """The order service has neither progress nor aborts, as the page says, and the commands say so."""
    listed, cancel, progress, abort = block.commands
    message_id = shell.delay()
    assert message_id in shell(listed)
    shell(progress, MESSAGE_ID=message_id, code=1)
    shell(abort, MESSAGE_ID=message_id, code=1)
    shell(cancel, MESSAGE_ID=message_id)
    assert message_id not in shell(listed)


def a_rebuild(shell: Shell, block: Block) -> None:
    shell.order()
    (command,) = block.commands
    assert {alike(line) for line in shell(command).splitlines()} == block.printed


def the_archive(shell: Shell, block: Block) -> None:
    """Nothing is old enough to leave."""
    directory = shell.directory / "archive"
    directory.mkdir()
    shell.environment |= {"RETENTION_DAYS": "1", "ARCHIVE_DIR": str(directory)}
    run, verify, restore = block.commands
    assert "0 segments written" in shell(run)
    assert "0 segments are whole" in shell(verify)
    assert "not in the archive alone" in shell(restore, code=1, ORDER_ID=shell.order())


def an_erasure(shell: Shell, block: Block) -> None:
    customer, resume, certificates = block.commands
    order_id = shell.shop.order(customer_id="c-erased")["order_id"]
    shell.confirmed(order_id)
    said = shell(customer, CUSTOMER_ID="c-erased")
    assert '"orders": 1' in said
    assert "c-erased" not in said
    shell(resume)
    assert shell(certificates).count("certificate") == 1


def a_backup(shell: Shell, block: Block) -> None:
    """A server on the copy has the queues."""
    copy, server = block.commands
    shell(copy)
    command, _, look = server.replace("4223", str(free_port())).partition("# in another terminal: ")
    with Process(
        ["bash", "-c", f"exec {command}"],
        log=shell.directory / "copy.log",
        env=shell.environment,
        cwd=shell.directory,
    ) as copied:
        copied.wait_for_output(r"nats-server \S+ at nats:", timeout=60)
        assert "payments" in shell(look)


def a_trace(shell: Shell, block: Block) -> None:
    shell.order()
    assert shell(block.commands[0]).strip() == "None"  # nothing is traced here


def old_events(shell: Shell, block: Block) -> None:
    shell(block.commands[0])
    assert shell.broker.stream("ORDERS").range().first == 8


#: What is done with the blocks of each section, in this order.
PROCEDURES: dict[str, Callable[..., None]] = {
    "Orders are failing": failing_orders,
    "A first look": a_first_look,
    "Dead letters": dead_letters,
    "An order does not move on": an_order_that_does_not_move_on,
    "The queue grows": a_purge,
    "Pausing a queue": a_pause,
    "Single messages": single_messages,
    "Rebuilding the read model": a_rebuild,
    "The archive": the_archive,
    "Erasing a customer": an_erasure,
    "Backup": a_backup,
    "Spans": a_trace,
    "The store is full": old_events,
}

#: Commands in the text that are whole, and need no preparation.
IN_THE_TEXT = sorted(
    set(re.findall(r"`((?:fleet|python -m tasks)[^`\n]*)`", PAGE))
    & {
        "fleet dead drop --reason undecodable --all",
        "fleet dead list",
        "fleet doctor",
        "fleet pause QUEUE",
        "fleet queues",
        "fleet resume QUEUE",
        "fleet schedules",
        "fleet setup tasks",
        "fleet setup tasks --update",
        "python -m tasks.rebuild",
    }
)


def test_every_block_of_commands_has_a_procedure() -> None:
    """A section with commands that nothing executes, or a procedure that the page has no more, is found."""
    assert {block.section for block in blocks()} == PROCEDURES.keys()


@pytest.mark.parametrize("section", PROCEDURES)
def test_the_procedure_works_as_it_stands(shell: Shell, section: str) -> None:
    """The commands of a section do what it says."""
    PROCEDURES[section](shell, *(block for block in blocks() if block.section == section))


def test_the_commands_in_the_text_work(shell: Shell) -> None:
    """Those that are whole, in the order in which they can be run."""
    assert len(IN_THE_TEXT) == 10, IN_THE_TEXT
    for command in IN_THE_TEXT:
        shell(command, QUEUE="payments")
    shell.order()
