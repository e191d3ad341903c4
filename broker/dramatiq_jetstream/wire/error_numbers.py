"""The server's own numbers for its errors, as far as the library acts on them (nats-server, server/errors.json).

Every other error is an `ApiError` that the caller sees. No other module names a number.
"""

from __future__ import annotations

from typing import Final

# What is missing.
STREAM_NOT_FOUND: Final = 10059
CONSUMER_NOT_FOUND: Final = 10014
MESSAGE_NOT_FOUND: Final = 10037
NO_MESSAGE_TO_DELETE: Final = 10057
SEQUENCE_NOT_FOUND: Final = 10043
MISSING: Final = frozenset({STREAM_NOT_FOUND, CONSUMER_NOT_FOUND, MESSAGE_NOT_FOUND})

# What exists already, with another configuration.
STREAM_EXISTS: Final = 10058
CONSUMER_EXISTS: Final = frozenset({10013, 10105, 10148})

#: While a stream is copied to more servers, its consumers cannot have as many replicas yet.
REPLICAS_EXCEED_STREAM: Final = 10126

#: The account demands a limit for each stream.
MAX_BYTES_REQUIRED: Final = 10113

# Writes that came second.
WRONG_LAST_SEQUENCE: Final = 10071
OTHER_WRITE_IN_FLIGHT: Final = 10164
CONFLICT: Final = frozenset({WRONG_LAST_SEQUENCE, OTHER_WRITE_IN_FLIGHT})
ROLLUP_FAILED: Final = 10111

# Atomic batches.
BATCH_ALREADY_STORED: Final = 10201  # a message id of the batch is in the duplicate window
BATCH_PARTS_MISSING: Final = frozenset({10175, 10176})  # some were lost with the connection

#: No room: memory, storage, or a limit of the stream or account.
FULL: Final = frozenset({10002, 10023, 10028, 10047, 10077, 10122})

#: Limits that an operator may raise, of streams, consumers or storage: the same request may succeed later.
LIMIT_REACHED: Final = frozenset({10026, 10027, 10047, 10077})

#: JetStream is switched off for the account, or on the server.
NO_JETSTREAM: Final = frozenset({10039, 10076})

#: The message is larger than the server or the stream takes.
TOO_LARGE: Final = frozenset({10054, 10097})

#: Errors that pass by themselves: no leader yet, a stream that is starting, a write under way, a batch that lost a
#: part on its way.
TRANSIENT: Final = frozenset({10008, 10009, 10118, 10119, 10158, 10163, 10176, 10194, 10195, 10210})
