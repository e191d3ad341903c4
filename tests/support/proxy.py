"""A TCP proxy between a client and its server that loses, holds and refuses what a test tells it to."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from urllib.parse import urlsplit


class Proxy:
    """Listens on a free port and passes on to the server in `target`; connect to `url`.

    Attributes:
      deaf: Drop what the server says; the client still gets through to it.
      mute: Drop what the client says.
      down: Refuse new connections (they are closed at once).
      dropped: What was lost of the server's words.
      impostor: Called with each new connection of a client in place of the server; it may say anything.
      rate: Bytes a second towards the client; None for no limit.
      behind: Words, and what to call once, behind the next request in which they occur: it arrives, and its reply
        does not.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        assert parts.hostname is not None
        assert parts.port is not None
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"{parts.scheme}://127.0.0.1:{self._listener.getsockname()[1]}"
        self.deaf = self.mute = self.down = False
        self.dropped = b""
        self.impostor: Callable[[socket.socket], object] | None = None
        self.rate: int | None = None
        self.behind: tuple[bytes, Callable[[], object]] | None = None
        self._flowing = threading.Event()
        self._flowing.set()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._stranded: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._striking = threading.Lock()
        self._accepting = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._accepting.start()

    def cut(self) -> int:
        """Break all open connections and return how many there were."""
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
        return len(pairs)

    def strand(self) -> None:
        """Pass nothing on for the connections that are open, without breaking them; new ones work."""
        with self._lock:
            self._stranded |= self._pairs

    def hold(self) -> None:
        """Read nothing and pass nothing on until `release`, so that what is written fills up the buffers."""
        self._flowing.clear()

    def release(self) -> None:
        self._flowing.set()

    def say(self, words: bytes) -> None:
        """Say something to every client in the server's name."""
        with self._lock:
            for client, _ in self._pairs:
                client.sendall(words)

    def lose(self) -> None:
        """The server is gone: connections break, and new ones are refused, until `restore`."""
        self.down = True
        self.cut()

    def restore(self) -> None:
        """All is well again. What was lost stays lost, so connections that lost something are broken."""
        with self._striking:
            self.behind = None
        if self.deaf or self.mute or self._stranded & self._pairs:
            self.cut()
        self.deaf = self.mute = self.down = False

    def close(self) -> None:
        self.release()
        # Closing alone would not wake the thread that accepts.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._accepting.join(5)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.down:
                client.close()
                continue
            if self.impostor is not None:
                with client, suppress(OSError):
                    self.impostor(client)
                continue
            try:
                server = socket.create_connection(self._target, timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            pair = (client, server)
            for end in pair:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs.add(pair)
            for source, sink in (pair, pair[::-1]):
                threading.Thread(
                    target=self._pass_on, args=(pair, source, sink), name="proxy", daemon=True
                ).start()

    def _strikes_behind(self, data: bytes, pair: tuple[socket.socket, socket.socket]) -> bool:
        """Whether a fault was to come behind these words: then they were passed on, and it has come."""
        if self.behind is None:
            return False
        with self._striking:
            if self.behind is None or self.behind[0] not in data:
                return False
            (_, fault), self.behind = self.behind, None
            with self._lock:
                self._stranded.add(pair)
            pair[1].sendall(data)
            fault()
            return True

    def _pass_on(
        self, pair: tuple[socket.socket, socket.socket], source: socket.socket, sink: socket.socket
    ) -> None:
        from_server = source is pair[1]
        try:
            while self._flowing.wait() and (data := source.recv(65536)):
                self._flowing.wait()
                if pair in self._stranded:
                    continue
                if self.deaf if from_server else self.mute:
                    self.dropped += data if from_server else b""
                elif not from_server and self._strikes_behind(data, pair):
                    pass
                else:
                    sink.sendall(data)
                    if from_server and self.rate:
                        time.sleep(len(data) / self.rate)
        except OSError:
            pass  # one side is gone; the other learns it below
        with self._lock:
            self._pairs.discard(pair)
        for end in pair:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
