"""What other programs say to the server, to the byte."""

from __future__ import annotations

import socket


def publish_wire(url: str, subject: str, headers: bytes, body: bytes) -> None:
    """Write the protocol's own bytes."""
    host, _, port = url.removeprefix("nats://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b'CONNECT {"verbose":false,"headers":true}\r\n'
            + f"HPUB {subject} {len(headers)} {len(headers) + len(body)}\r\n".encode()
            + headers
            + body
            + b"\r\nPING\r\n"
        )
        answer = b""
        while b"PONG" not in answer:
            answer += connection.recv(4096)
        assert b"-ERR" not in answer
