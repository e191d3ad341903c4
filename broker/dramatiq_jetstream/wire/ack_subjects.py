"""The subject on which a delivered message is acked, and what it says of the delivery (ADR-15).

`$JS.ACK.<stream>.<consumer>.<deliveries>.<sequence>.<consumer sequence>.<time stored>.<pending>`; a server
with a domain or accounts puts `<domain>.<account hash>` before the stream, and may add a random token at the end.
"""

from __future__ import annotations

__all__ = ["ack_tokens", "is_ack_subject"]

_PREFIX = "$JS.ACK."
_TOKENS = 9  # of the form without a domain


def is_ack_subject(subject: str) -> bool:
    """Whether a message with this reply subject is a delivery of a JetStream consumer."""
    return subject.startswith(_PREFIX)


def ack_tokens(subject: str) -> list[str]:
    """The tokens from the stream's name on; the time stored is in nanoseconds."""
    tokens = subject.split(".")
    return tokens[2:] if len(tokens) == _TOKENS else tokens[4:]
