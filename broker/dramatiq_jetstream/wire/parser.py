"""nats-py's parser, with messages for our callbacks taken out of the bytes before it sees them.

nats-py parses with regular expressions and enters a coroutine or two for each message, a fifth of what the
connection's thread does for one. Here whole messages are handed to their callbacks in a plain loop. Everything
else goes to nats-py's parser: other lines of the protocol with what comes after them in the same bytes, messages of
its own subscriptions, and a message that is not whole yet, with as much of the next bytes as it needs.

This reaches into nats-py 2.16: `Parser.state`, `buf` and `needed`. A newer one is let in when
`tests/broker/test_parser.py` has passed with it.
"""

from __future__ import annotations

from collections.abc import Callable

from nats.aio.client import Client
from nats.protocol.parser import AWAITING_CONTROL_LINE, CRLF_SIZE, Parser

__all__ = ["DirectParser", "HandOver"]

#: Subject, the subject for answers, payload, headers.
HandOver = Callable[[bytes, bytes, bytes, bytes | None], None]

_MESSAGES = (b"HMSG ", b"MSG ")


class DirectParser(Parser):
    """Hands whole messages to `callbacks`, by the number of their subscription; they must not raise."""

    def __init__(self, client: Client, callbacks: dict[int, HandOver]) -> None:
        super().__init__(client)
        self._callbacks = callbacks

    async def parse(self, data: bytes = b"") -> None:
        if self.state != AWAITING_CONTROL_LINE:
            missing = self.needed + CRLF_SIZE - len(self.buf)
            await super().parse(data[:missing])
            data = data[missing:]
        if not data:
            return
        if self.buf:  # the beginning of a line
            data = bytes(self.buf) + data
            self.buf.clear()
        rest = self._hand_over(data)
        if rest:
            await super().parse(rest)

    def _hand_over(self, data: bytes) -> bytes:
        """Hand over the whole messages at the beginning; returns the rest."""
        at = 0
        while data.startswith(_MESSAGES, at):
            end = data.find(b"\r\n", at)
            if end < 0:
                break
            # [H]MSG <subject> <subscription> [<reply>] [<bytes of headers>] <bytes>
            words = data[at:end].split()
            with_headers = words[0] == b"HMSG"
            reply = words[3] if len(words) == 5 + with_headers else b""
            try:
                callback = self._callbacks.get(int(words[2]))
                body = end + CRLF_SIZE
                payload = body + int(words[-2]) if with_headers else body
                stop = body + int(words[-1])
            except (ValueError, IndexError):
                break  # nats-py says what is wrong with it
            if callback is None or stop + CRLF_SIZE > len(data):
                break
            at = stop + CRLF_SIZE
            callback(words[1], reply, data[payload:stop], data[body:payload] if with_headers else None)
        return data[at:] if at else data
