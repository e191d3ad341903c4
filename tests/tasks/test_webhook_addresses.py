"""Webhooks send requests to the public Internet alone, and every request ends in time."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tasks.webhooks import addresses
from tasks.webhooks.addresses import InvalidAddress, NoAddress, check, is_public, parse, resolve
from tasks.webhooks.posting import MAX_ANSWER, NotAnswered, post

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))

PRIVATE = [
    *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
    *("100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"),
    *("::1", "::", "fe80::1", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1"),
    *("::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::1"),
    *("2002:7f00:1::", "2002:a00:1::", "2001:0:7f00:1::", "100::1", "fe80::1%eth0"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_not_public(address: str) -> None:
    """Neither as they are nor where they hide in IPv6."""
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "64:ff9b::101:101"])
def test_public_addresses_are_public(address: str) -> None:
    """Also one that is reached through a translator."""
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        *("", "example.com", "ftp://example.com/", "http://example.com/", "https://", "https://a b/"),
        *("https://user@example.com/", "https://u:p@example.com/", "https://example.com/#x"),
        *("https://example.com:0/", "https://example.com:65536/", "https://example.com\\@localhost/"),
        *("https://localhost/", "https://nats/", "https://127.0.0.1/", "https://127.1/", "https://[::1]/"),
        *("https://0x7f000001/", "https://2130706433/", "https://0177.0.0.1/", "https://0.0.0.0/"),
        *("https://[::ffff:10.0.0.1]/", "https://169.254.169.254/latest", "https://10.0.0.1:8443/x"),
        *("https://example.com/\r\nHost:x", "https://example.com/ü", f"https://example.com/{'x' * 500}"),
    ],
)
def test_addresses_that_no_receiver_can_have(url: str) -> None:
    """They are refused when they are given, in every notation of an address."""
    with pytest.raises(InvalidAddress):
        check(url, ())


@pytest.mark.parametrize(
    "url", ["https://example.com", "https://example.com:8443/a/b?c=d", "https://1.1.1.1/", "https://a.b?x=1"]
)
def test_addresses_that_a_receiver_can_have(url: str) -> None:
    """A name or a public address, with port, path and query."""
    check(url, ())


def test_a_network_that_is_allowed() -> None:
    """Only the named network, and plain HTTP within it."""
    check("http://127.0.0.1:8000/x", LOOPBACK)
    check("http://localhost:8000/x", LOOPBACK)
    for url in ("http://10.0.0.1/", "https://10.0.0.1/", "http://1.1.1.1/"):
        with pytest.raises(InvalidAddress):
            check(url, LOOPBACK)


def named(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Have names resolve to each of the answers in turn; returns the names that were asked for."""
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        asked.append(host)
        found = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in found]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_name_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection goes to the address that was checked: a name that changes its mind changes nothing."""
    asked = named(monkeypatch, ["1.1.1.1", "10.0.0.1"], ["127.0.0.1"])
    connected: list[str] = []

    def create_connection(address: tuple[str, int], timeout: float) -> socket.socket:
        connected.append(address[0])
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("tasks.webhooks.posting.socket.create_connection", create_connection)
    with pytest.raises(NotAnswered, match="refused"):
        post("https://rebinding.example/", b"", {}, allowed=(), seconds=30)
    assert (asked, connected) == (["rebinding.example"], ["1.1.1.1"])


@pytest.mark.parametrize("found", [[], ["10.0.0.1"], ["::ffff:127.0.0.1"], ["0.0.0.0"], ["169.254.169.254"]])
def test_a_name_that_leads_inside_is_none(monkeypatch: pytest.MonkeyPatch, found: list[str]) -> None:
    """What is said of it is the same as of a name that does not exist."""
    named(monkeypatch, found)
    with pytest.raises(NoAddress, match=r"^no public address was found for its name$"):
        resolve(parse("https://inside.example/"), (), 30)


# Requests, over real sockets


@contextmanager
def receiver(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A receiver that does with each connection what the test says."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    client.settimeout(30)
                    try:
                        answer(client)
                    except OSError:
                        pass  # the other side has hung up, as it should

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/hook?a=b"
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(60)


def asked_of(client: socket.socket) -> bytes:
    """Read a request to the end of its body."""
    read = b""
    while not read.endswith(b"body"):
        part = client.recv(65_536)
        if not part:
            break
        read += part
    return read


def send(url: str, seconds: float = 30.0) -> Any:
    return post(url, b"body", {"webhook-id": "m"}, allowed=LOOPBACK, seconds=seconds)


def test_a_request_and_its_answer() -> None:
    """The path, the host and the headers are sent as they are, and the answer comes back."""
    seen: list[bytes] = []

    def answer(client: socket.socket) -> None:
        seen.append(asked_of(client))
        client.sendall(b"HTTP/1.1 202 Accepted\r\nConnection: close\r\n\r\nbegin")
        time.sleep(0.1)  # most times the head was read before the rest is sent
        client.sendall(b"ning")

    with receiver(answer) as url:
        got = send(url)
    assert (got.status, got.text) == (202, "beginning")
    (request,) = seen
    assert request.startswith(b"POST /hook?a=b HTTP/1.1\r\n")
    assert f"Host: {url[7:].partition('/')[0]}".encode() in request
    assert b"webhook-id: m" in request


def test_redirects_are_not_followed() -> None:
    """A redirect is an answer like any other."""

    def answer(client: socket.socket) -> None:
        asked_of(client)
        client.sendall(
            b"HTTP/1.1 307 Elsewhere\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
        )

    with receiver(answer) as url:
        assert send(url).status == 307


def test_a_long_answer_is_read_in_part() -> None:
    """An endless one is cut, and keeps nothing busy."""

    def answer(client: socket.socket) -> None:
        asked_of(client)
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            client.sendall(b"x" * 65_536)

    with receiver(answer) as url:
        assert len(send(url).text) == MAX_ANSWER


def drip(before: bytes) -> Callable[[socket.socket], None]:
    """Answer the beginning, and then byte by byte for ever."""

    def answer(client: socket.socket) -> None:
        asked_of(client)
        client.sendall(before)
        while True:
            client.sendall(b"x")
            time.sleep(0.05)

    return answer


@pytest.mark.parametrize("before", [b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nX: "], ids=repr)
def test_a_receiver_that_drips_is_left_in_time(before: bytes) -> None:
    """The limit is one for the whole answer, and no byte puts it off."""
    with receiver(drip(before)) as url:
        with pytest.raises(NotAnswered, match="no answer within 500 ms"):
            send(url, 0.5)


def test_a_body_that_drips_does_not_take_its_status_back() -> None:
    """What counts is known with the head of the answer."""
    with receiver(drip(b"HTTP/1.1 200 OK\r\n\r\n")) as url:
        assert send(url, 0.5).status == 200


def test_answers_that_are_none() -> None:
    """No HTTP, nothing at all, no receiver, no TLS: each says why in a few words."""

    def nonsense(client: socket.socket) -> None:
        asked_of(client)
        client.sendall(b"220 ready\r\n\r\n")

    with receiver(nonsense) as url:
        with pytest.raises(NotAnswered, match="not one of HTTP"):
            send(url)
    with receiver(lambda client: None) as url:
        with pytest.raises(NotAnswered):
            send(url)
        with pytest.raises(NotAnswered, match=r"TLS|no connection"):
            send(url.replace("http://", "https://"))
    with pytest.raises(NotAnswered, match="no connection"):
        send(url)
