"""What a connection has received stays readable for another process, at whatever byte its own process dies."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace

import pytest

from dramatiq_jetstream.wire.intake import INTAKE_BYTES, Intake, deliveries_in
from dramatiq_jetstream.wire.protocol import Protocol

PAYLOAD = b"$JS.ACK.not.a.delivery\r\nMSG a 1 $JS.ACK.forged 0\r\n\r\n"


def delivery(number: int, body: bytes = PAYLOAD) -> bytes:
    return b"MSG _INBOX.x 1 $JS.ACK.s.c.1.%d.%d.0.0 %d\r\n%b\r\n" % (number, number, len(body), body)


def ack_subject(number: int) -> str:
    return f"$JS.ACK.s.c.1.{number}.{number}.0.0"


class Rig:
    """An intake under a client that keeps what it is given, and the two ends of its connection."""

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(INTAKE_BYTES))
        self.intake = Intake(self.memory)
        self.here, self.server = socket.socketpair()
        self.protocol = Protocol()
        self.handed_over: list[str] = []
        transport = SimpleNamespace(
            get_extra_info=lambda name: self.here if name == "socket" else None,
            set_protocol=lambda protocol: None,
        )
        client = SimpleNamespace(
            transport=transport,
            data_received=self._receive,
            unfinished=self.protocol.unfinished,
            connection_lost=lambda error: None,
        )
        self.copy = self.intake.read_for(client)

    def _receive(self, data: bytes) -> None:
        self.handed_over += [event.reply for event in self.protocol.receive(data)]

    def read(self, data: bytes, *, die: bool = False) -> None:
        """Read as the loop does; a process that dies then has handed nothing over."""
        self.intake.get_buffer(-1)[: len(data)] = data
        if not die:
            self.intake.buffer_updated(len(data))

    def found(self) -> list[str]:
        return list(deliveries_in(self.memory, self.copy.dup()))


@pytest.mark.parametrize("size", [1, 7, 60, 10_000])
def test_a_delivery_is_handed_over_or_found(size):
    """Whatever the pieces are in which it arrives, and after whichever of them the process dies."""
    stream = b"".join(map(delivery, range(4))) + b"PING\r\n" + delivery(4, b"x" * 300)
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    expected = {ack_subject(number) for number in range(5)}
    for death in range(len(pieces) + 1):
        rig = Rig()
        for number, piece in enumerate(pieces[: death + 1]):
            rig.read(piece, die=number == death)
        rig.server.sendall(b"".join(pieces[death + 1 :]))
        rig.server.close()
        found = rig.found()
        assert set(rig.handed_over) | set(found) == expected
        assert not set(rig.handed_over) & set(found)


def test_a_message_larger_than_what_is_kept_of_it_is_found():
    """Its beginning says what it answers to."""
    large = delivery(1, b"y" * 100_000)
    rig = Rig()
    for at in range(0, 80_000, 8_000):
        rig.read(large[at : at + 8_000])
    rig.server.sendall(large[80_000:] + delivery(2))
    rig.server.close()
    assert rig.found() == [ack_subject(1), ack_subject(2)]


def test_a_connection_that_is_lost_leaves_nothing():
    """The server learns that it is over although another process has a copy."""
    rig = Rig()
    rig.read(delivery(1)[:20])
    rig.intake.connection_lost(None)
    rig.server.settimeout(30)
    assert rig.server.recv(1) == b""
    assert list(deliveries_in(rig.memory, None)) == []


def test_a_server_that_goes_on_sending_is_not_waited_for():
    """What is on its way is read for a bounded time."""
    rig = Rig()
    rig.server.sendall(delivery(1))
    assert rig.found() == [ack_subject(1)]


def test_the_transport_reads_straight_into_it():
    """Both loops take it for a protocol with a buffer of its own."""
    assert isinstance(Intake(memoryview(bytearray(INTAKE_BYTES))), asyncio.BufferedProtocol)


def test_what_comes_through_tls_is_read_by_its_own_process():
    """Bytes of an encrypted connection say nothing to another process, so the transport is left as it is."""
    transport = SimpleNamespace(get_extra_info=lambda name: object() if name == "ssl_object" else None)
    intake = Intake(memoryview(bytearray(INTAKE_BYTES)))
    assert intake.read_for(SimpleNamespace(transport=transport)) is None
