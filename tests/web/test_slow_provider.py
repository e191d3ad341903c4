"""An OpenID provider whose answers come byte by byte holds no thread for longer than one that never answers."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import requests

from web import tokens


@pytest.mark.parametrize(
    "at_once", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n"], ids=["head", "body"]
)
def test_an_answer_that_comes_byte_by_byte(monkeypatch: pytest.MonkeyPatch, at_once: bytes) -> None:
    """It is given up when its time is over, although the next byte always comes in time."""
    monkeypatch.setattr(tokens, "_FETCH_SECONDS", 1.0)
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n" + b"{%88s}" % b""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(at_once)
                for one in whole[len(at_once) :]:
                    try:
                        connection.sendall(b"%c" % one)
                    except OSError:
                        return
                    time.sleep(0.1)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(requests.RequestException):
            tokens._get(f"http://127.0.0.1:{server.getsockname()[1]}/jwks")
