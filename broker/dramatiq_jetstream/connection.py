"""The border between threads and asyncio: one event loop thread and one NATS connection per process.

Everything else in the library is called from Dramatiq's threads and calls in here; nothing else imports
nats-py, and every nats-py error is translated here. The connection is made on first use and made anew
after a fork, because nats-py is neither thread-safe nor fork-safe.

What is sent goes one way: a thread leaves a *call* in the mailbox and wakes the loop, at most once for many
calls; the loop runs the calls and one writer task hands what they produced to nats-py, in order.

What waits for an answer (a publish for its PubAck, a JetStream API request for its reply) stays in
`_pending` until it is answered or its time is up, and is sent again after a reconnect. Sending it again is
safe: the headers are the same, so the same `Nats-Msg-Id` stores once within the stream's duplicate window.
nats-py's own buffer for a lost connection is switched off, because it would send what the caller was
already told had failed.

A *fence* is a message to ourselves, once a second. A server handles one client's messages in order, so when
a fence comes back, everything sent before it has arrived: consumers forget the acks they kept for sending
again. When fences stop coming back the connection is dead, whatever nats-py believes (its reader can die
silently), and is replaced.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import os
import re
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import nats
import nats.errors
from dramatiq.errors import BrokerError
from nats.aio.client import Client, RawCredentials
from nats.aio.msg import Msg

from .errors import (
    ApiError,
    BrokerConnectionError,
    ConnectionClosed,
    ConnectionFailed,
    InvalidOption,
    MessageTooLarge,
    NotFound,
    PermissionDenied,
    ServerUnsupported,
    StoreFull,
    StoreTimeout,
    TopologyMissing,
)

__all__ = ["ConnectOptions", "Connection", "ConnectionState", "Msg", "PubAck", "Publication", "Subscription"]

#: The first server with every feature the library builds on (cron schedules, ADR-51).
MINIMUM_SERVER: Final = (2, 14, 0)

#: How often a fence is sent, and after how many that did not come back the connection is replaced.
FENCE_INTERVAL: Final = 1.0
FENCES_MISSED: Final = 6

#: How long "no responders" is taken for a stream that is still starting, in milliseconds.
NO_RESPONDERS_GRACE: Final = 5_000

#: The first wait, in seconds, before an unanswered publish is sent again; it doubles each time.
RESEND_AFTER: Final = 1.0

#: How many publishes of one batch are under way at once.
BATCH_WINDOW: Final = 4_000

# The server's error numbers (nats-server, server/errors.json).
_FULL = frozenset({10002, 10023, 10028, 10047, 10077, 10122})
_TRANSIENT = frozenset({10008, 10009, 10118, 10119, 10158, 10163, 10194, 10195})
_NOT_FOUND = frozenset({10014, 10037, 10059})
_TOO_LARGE = frozenset({10054, 10097})

_PERMISSION = re.compile(r'permissions violation for (publish|subscription) to "([^"]*)"', re.IGNORECASE)

Headers = Mapping[str, str]


@dataclass(frozen=True)
class ConnectOptions:
    """Where the servers are and who we are there.

    Parameters:
      servers: Addresses (`nats://`, `tls://` or `ws://`), tried in random order.
      credentials: A `.creds` file's path, or its content.
      user, password, token, nkey: Other ways to authenticate; `nkey` is a seed or the path of one.
      tls: A context for `tls://` servers; None uses the system's authorities.
      name: What the server shows for this connection.
      connect_timeout: Milliseconds for the first connection, all addresses together.
      inbox_prefix: First tokens of the subjects on which answers arrive, for accounts that restrict them.
    """

    servers: tuple[str, ...] = ("nats://localhost:4222",)
    credentials: str | None = None
    user: str | None = None
    password: str | None = None
    token: str | None = None
    nkey: str | None = None
    tls: ssl.SSLContext | None = None
    name: str = "dramatiq-jetstream"
    connect_timeout: int = 5_000
    inbox_prefix: str = "_INBOX"

    @classmethod
    def of(
        cls,
        url: str | Iterable[str] | None = None,
        *,
        credentials: str | None = None,
        **others: Any,
    ) -> ConnectOptions:
        """Complete what was given with `NATS_URL` and `NATS_CREDS`, and check it.

        Raises:
          InvalidOption: When an address is not one.
        """
        source = "url"
        if url is None:
            url, source = os.environ.get("NATS_URL") or cls.servers, "NATS_URL"
        addresses = url.split(",") if isinstance(url, str) else list(url)
        servers = tuple(address.strip() for address in addresses if address.strip())
        if not servers:
            raise InvalidOption(f"{source} names no server: give an address such as nats://localhost:4222.")
        for address in servers:
            if not re.fullmatch(r"((nats|tls|ws|wss)://)?[^\s/]+(:\d{1,5})?/?", address):
                raise InvalidOption(
                    f"{source} has {address!r}, which is not the address of a server: "
                    "give one such as nats://localhost:4222."
                )
        if credentials is None:
            credentials = os.environ.get("NATS_CREDS") or None
        return cls(servers=servers, credentials=credentials, **others)

    @property
    def display(self) -> str:
        """The addresses without passwords, for messages to people."""
        return ", ".join(re.sub(r"//[^@/]*@", "//", server) for server in self.servers)

    def for_nats(self) -> dict[str, Any]:
        """The keyword arguments of `nats.connect` that these options stand for."""
        chosen: dict[str, Any] = {"servers": list(self.servers), "name": self.name}
        if self.credentials is not None:
            if "BEGIN NATS USER JWT" in self.credentials:
                chosen["user_credentials"] = RawCredentials(self.credentials)
            elif Path(self.credentials).exists():
                chosen["user_credentials"] = self.credentials
            else:
                raise InvalidOption(
                    f"credentials (or NATS_CREDS) name the file {self.credentials!r}, which does not exist: "
                    "give the path or the content of a .creds file."
                )
        if self.nkey is not None:
            chosen["nkeys_seed" if Path(self.nkey).exists() else "nkeys_seed_str"] = self.nkey
        for option in ("user", "password", "token", "tls"):
            if getattr(self, option) is not None:
                chosen[option] = getattr(self, option)
        chosen["inbox_prefix"] = self.inbox_prefix
        return chosen


@dataclass(frozen=True, slots=True)
class PubAck:
    """What JetStream answered once a message was stored."""

    stream: str
    seq: int
    duplicate: bool = False


@dataclass
class ConnectionState:
    """What is known of the connection, for health checks and metrics."""

    connected: bool = False
    reconnects: int = 0
    server: str | None = None
    server_version: str | None = None
    last_error: str | None = None


class Publication:
    """One message on its way to a stream."""

    __slots__ = ("headers", "payload", "subject")

    def __init__(self, subject: str, payload: bytes, headers: Headers | None = None) -> None:
        self.subject = subject
        self.payload = payload
        self.headers = headers


class _Pending:
    """A request whose answer is awaited, and how often and when it was sent."""

    __slots__ = ("answer", "deadline", "headers", "payload", "resend", "sent", "started", "subject", "wait")

    def __init__(
        self,
        subject: str,
        payload: bytes,
        headers: Headers | None,
        answer: Callable[[Msg | BaseException], bool],
        deadline: float,
        resend: bool,
    ) -> None:
        self.subject = subject
        self.payload = payload
        self.headers = headers
        self.answer = answer  # returns True when the answer says "try again"
        self.deadline = deadline
        self.resend = resend
        self.started = time.monotonic()
        self.sent: float | None = None
        self.wait = RESEND_AFTER


@dataclass(eq=False)
class Subscription:
    """Interest in a subject that lives until `close`, through every reconnect."""

    subject: str
    callback: Callable[[Msg], None]
    _connection: Connection = field(repr=False)
    _nats: Any = field(default=None, repr=False)

    def close(self) -> None:
        """End the interest; what is still on its way is dropped."""
        self._connection._unsubscribe(self)

    def withdraw(self) -> None:
        """Tell the server to send no more; what is still on its way is delivered until `close`."""
        self._connection.post(self._connection._withdraw, self)


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _after_fork() -> None:
    for connection in list(_connections):
        connection._forget()
        for callback in connection._on_fork:
            callback()


os.register_at_fork(after_in_child=_after_fork)


class Connection:
    """A connection that any thread may use; see the module's first lines for how it works.

    Parameters:
      options: Where to connect and as whom.
      timeout: Milliseconds that `publish`, `api` and `request` wait unless told otherwise.
    """

    def __init__(self, options: ConnectOptions | None = None, *, timeout: int = 10_000) -> None:
        self.options = options or ConnectOptions.of()
        self.timeout = timeout
        self.logger = logging.getLogger(__name__)
        self._closed = False
        self._on_reconnect: list[Callable[[], None]] = []
        self._on_fence: list[Callable[[int], None]] = []
        self._on_tick: list[Callable[[], None]] = []
        self._on_fork: list[Callable[[], None]] = []
        self._subscriptions: list[Subscription] = []
        self._forget()
        _connections.add(self)

    def _forget(self) -> None:
        """Start from nothing: at creation, and in the child of a fork, where the parent's loop is not ours.

        The parent's objects stay referenced, so that collecting them does not touch its socket.
        """
        self._inherited = self.__dict__.get("_thread"), self.__dict__.get("_nc"), self.__dict__.get("_loop")
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._nc: Client | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._mailbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._outgoing: deque[tuple[str, bytes, str, Headers | None]] = deque()
        self._woken = False
        self._wake: asyncio.Event | None = None
        self._pending: dict[str, _Pending] = {}
        self._counter = 0
        self._inbox = ""
        self._fence_sent = 0
        self._fence_seen = 0
        self._fences_missed = 0
        self.state = ConnectionState()
        for subscription in self._subscriptions:
            subscription._nats = None

    # Connecting

    @property
    def is_connected(self) -> bool:
        """Whether the server is there now, as far as this process can know."""
        nc = self._nc
        return nc is not None and nc.is_connected and self._fences_missed < 2

    @property
    def max_payload(self) -> int:
        self.connect()
        return cast(Client, self._nc).max_payload

    def connect(self) -> None:
        """Connect if that has not been done; returns at once when it has, even while reconnecting.

        Raises:
          ConnectionFailed: When no server answered in time, or none accepted us.
          ServerUnsupported: When the server is too old or has no JetStream.
          ConnectionClosed: When this connection was closed.
        """
        if self._nc is not None:
            return
        with self._lock:
            if self._closed:
                raise ConnectionClosed("The connection to NATS was closed; make a new broker to go on.")
            if self._nc is not None:
                return
            _refuse_gevent()
            loop = self._start_loop()
            opening = asyncio.run_coroutine_threadsafe(self._open(), loop)
            try:
                opening.result(self.options.connect_timeout / 1000 + 5)
            except concurrent.futures.TimeoutError:
                opening.cancel()
                raise ConnectionFailed(f"No NATS server answered at {self.options.display}.") from None

    def _start_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = _new_event_loop()
            self._wake = asyncio.Event()
            self._thread = threading.Thread(
                target=self._loop.run_forever, name="dramatiq-jetstream", daemon=True
            )
            self._thread.start()
        return self._loop

    async def _open(self) -> None:
        """Open the first connection. Nothing is left behind when it fails: the next call starts again."""
        nc = Client()
        refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        # nats-py's callbacks must not raise: that would end its reader.
        async def on_error(error: Exception) -> None:
            self.state.last_error = str(error) or type(error).__name__
            if self._nc is None:
                if "authorization" in str(error).lower() and not refused.done():
                    refused.set_result(str(error))
                return
            self._handle_server_error(error)

        async def on_disconnect() -> None:
            self.state.connected = False
            self._outgoing.clear()
            if not self._closed:
                self.logger.warning(
                    "The connection to NATS was lost; reconnecting to %s.", self.options.display
                )

        async def on_reconnect() -> None:
            self._handle_reconnect()

        async def on_close() -> None:
            self.state.connected = False
            if not self._closed:
                self.logger.error("NATS closed the connection for good: %s", self.state.last_error)
                self._nc = None  # the next call connects anew, and says why if it cannot

        connecting = asyncio.ensure_future(
            nc.connect(
                **self.options.for_nats(),
                error_cb=on_error,
                disconnected_cb=on_disconnect,
                reconnected_cb=on_reconnect,
                closed_cb=on_close,
                connect_timeout=2,
                allow_reconnect=True,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.2,  # type: ignore[arg-type]
                ping_interval=20,
                max_outstanding_pings=3,
                pending_size=0,
                skip_subject_validation=True,
            )
        )
        await asyncio.wait(
            cast("set[asyncio.Future[Any]]", {connecting, refused}),
            timeout=self.options.connect_timeout / 1000,
            return_when=asyncio.FIRST_COMPLETED,
        )
        try:
            if refused.done():
                raise ConnectionFailed(
                    f"NATS at {self.options.display} refused us ({refused.result()}): "
                    "check the user, password, token or credentials."
                )
            if not connecting.done():
                cause = self.state.last_error or "no answer"
                raise ConnectionFailed(
                    f"Could not connect to NATS at {self.options.display} within "
                    f"{self.options.connect_timeout} ms: {cause}."
                )
            try:
                connecting.result()
            except BrokerError:
                raise
            except Exception as error:
                raise ConnectionFailed(
                    f"Could not connect to NATS at {self.options.display}: {error}."
                ) from error
            self._check_server(nc)
        except BaseException:
            connecting.cancel()
            with contextlib.suppress(Exception):
                await nc.close()
            raise
        self._inbox = nc.new_inbox()
        await nc.subscribe(f"{self._inbox}.*", cb=self._handle_answer)
        self._fence_sent = self._fence_seen = self._fences_missed = 0
        for subscription in self._subscriptions:
            await self._attach(nc, subscription)
        for task in self._tasks:
            task.cancel()
        self._nc = nc
        self._note_server(nc)
        self._tasks = [asyncio.ensure_future(self._write()), asyncio.ensure_future(self._watch())]

    def _check_server(self, nc: Client) -> None:
        version = nc.connected_server_version
        if (version.major, version.minor, version.patch) < MINIMUM_SERVER:
            raise ServerUnsupported(
                f"The NATS server at {self.options.display} is version {version.major}.{version.minor}."
                f"{version.patch}, but {'.'.join(map(str, MINIMUM_SERVER))} or newer is needed "
                "(message schedules): upgrade nats-server."
            )
        if not nc._server_info.get("jetstream"):
            raise ServerUnsupported(
                f"The NATS server at {self.options.display} has JetStream switched off: "
                "start it with --jetstream, or add a jetstream block to its configuration."
            )

    def _note_server(self, nc: Client) -> None:
        self.state.connected = True
        self.state.server = nc.connected_url.netloc.rpartition("@")[2] if nc.connected_url else None
        self.state.server_version = str(nc._server_info.get("version"))

    def close(self) -> None:
        """Close the connection; whoever still waits for an answer gets `ConnectionClosed`."""
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
            self._loop = None
        if loop is None or thread is None:
            return
        closing = asyncio.run_coroutine_threadsafe(self._shut(), loop)
        try:
            closing.result(5)
        except concurrent.futures.TimeoutError:
            self.logger.warning("The connection to NATS did not close within 5 s; leaving it.")
        loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join(5)
        self._nc = None

    async def _shut(self) -> None:
        nc = self._nc
        for task in self._tasks:
            task.cancel()
        if nc is not None:
            await self._drain_mailbox(nc)
            with contextlib.suppress(Exception):  # closing a broken connection has nothing left to save
                await nc.close()
        for pending in list(self._pending.values()):
            pending.answer(ConnectionClosed("The connection to NATS was closed before an answer came."))
        self._pending.clear()
        self.state.connected = False

    # Calls from threads

    def post(self, call: Callable[..., None], *args: Any) -> None:
        """Run `call(*args)` on the loop thread soon, in the order posted. It must neither block nor raise."""
        self._mailbox.append((call, args))
        if not self._woken:
            self._woken = True
            loop, wake = self._loop, self._wake
            if loop is not None and wake is not None:
                with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is left to hear
                    loop.call_soon_threadsafe(wake.set)

    def send(
        self, subject: str, payload: bytes = b"", headers: Headers | None = None, reply: str = ""
    ) -> None:
        """Publish without JetStream: lost when nobody listens or the connection is down."""
        self.connect()
        self.post(self.write, subject, payload, reply, headers)

    def write(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: Headers | None = None
    ) -> None:
        """Hand a message to the writer; only on the loop thread."""
        self._outgoing.append((subject, payload, reply, headers))
        if not self._woken and self._wake is not None:
            self._wake.set()

    def publish(
        self, subject: str, payload: bytes, headers: Headers | None = None, *, timeout: int | None = None
    ) -> PubAck:
        """Store a message in the stream that has `subject` and wait for the acknowledgement.

        It is sent again over a reconnect, so give it a `Nats-Msg-Id` to have it stored once.

        Parameters:
          timeout: Milliseconds to wait in all; None takes the connection's own.

        Raises:
          StoreTimeout, ConnectionClosed: No acknowledgement in time.
          StoreFull, MessageTooLarge, TopologyMissing, PermissionDenied, ApiError: JetStream's refusal.
        """
        return self.publish_many([Publication(subject, payload, headers)], timeout=timeout)[0]

    def publish_many(
        self, publications: Iterable[Publication], *, timeout: int | None = None
    ) -> list[PubAck]:
        """Store many messages, in order, without waiting for one before sending the next.

        Raises:
          As `publish`, for the first that failed, when all are settled; the others may be stored.
        """
        results: list[PubAck] = []
        failure: BaseException | None = None
        for outcome in self.try_publish_many(publications, timeout=timeout):
            if isinstance(outcome, PubAck):
                results.append(outcome)
            else:
                failure = failure or outcome
        if failure is not None:
            raise failure
        return results

    def try_publish_many(
        self, publications: Iterable[Publication], *, timeout: int | None = None
    ) -> list[PubAck | BrokerError]:
        """Store many messages as `publish_many` does, and return an outcome for each instead of raising."""
        self.connect()
        items = list(publications)
        limit = cast(Client, self._nc).max_payload
        for item in items:
            _check_size(item, limit)
        outcomes: list[PubAck | BrokerError] = []
        for start in range(0, len(items), BATCH_WINDOW):
            outcomes += self._publish_window(items[start : start + BATCH_WINDOW], timeout)
        return outcomes

    def _publish_window(self, items: list[Publication], timeout: int | None) -> list[PubAck | BrokerError]:
        seconds = (self.timeout if timeout is None else timeout) / 1000
        outcomes: list[PubAck | BrokerError | None] = [None] * len(items)
        remaining = len(items)
        done = threading.Lock()  # a bare lock is the cheapest event there is
        done.acquire()

        def receiver(position: int) -> Callable[[Msg | BaseException], bool]:
            def receive(answer: Msg | BaseException) -> bool:
                nonlocal remaining
                outcome = _read_puback(items[position].subject, answer, patient=time.monotonic() < grace)
                if outcome is None:
                    return True
                outcomes[position] = outcome
                remaining -= 1
                if remaining == 0:
                    done.release()
                return False

            return receive

        deadline = time.monotonic() + seconds
        grace = time.monotonic() + min(seconds - 0.5, NO_RESPONDERS_GRACE / 1000)
        for position, item in enumerate(items):
            self._ask(item.subject, item.payload, item.headers, receiver(position), deadline, resend=True)
        if not done.acquire(timeout=seconds + 2):
            late = StoreTimeout(f"JetStream did not acknowledge within {seconds * 1000:.0f} ms.")
            return [outcome or late for outcome in outcomes]
        return cast("list[PubAck | BrokerError]", outcomes)

    def publish_batch(self, publications: list[Publication], *, timeout: int | None = None) -> PubAck:
        """Send an atomic batch, numbered and with its commit last, and wait for the commit's acknowledgement.

        It is not sent again: after a failure the caller makes a new batch of it.
        """
        self.connect()
        limit = cast(Client, self._nc).max_payload
        for item in publications:
            _check_size(item, limit)
        *parts, commit = publications

        def send() -> None:
            for part in parts:
                self.write(part.subject, part.payload, "", part.headers)

        self.post(send)
        answer = self.request(commit.subject, commit.payload, commit.headers, timeout=timeout)
        outcome = _read_puback(commit.subject, answer, patient=False)
        if isinstance(outcome, PubAck):
            return outcome
        raise outcome or StoreTimeout(f"JetStream could not take a batch for {commit.subject} now.")

    def request(
        self,
        subject: str,
        payload: bytes = b"",
        headers: Headers | None = None,
        *,
        timeout: int | None = None,
        resend: bool = False,
    ) -> Msg:
        """Send a request and wait for its first answer.

        Parameters:
          resend: Send it again after a reconnect; only for requests that may be repeated.

        Raises:
          BrokerConnectionError: When no answer came in time.
          PermissionDenied: When the server refused the subject.
        """
        self.connect()
        seconds = (self.timeout if timeout is None else timeout) / 1000
        future: concurrent.futures.Future[Msg] = concurrent.futures.Future()
        grace = time.monotonic() + min(seconds, NO_RESPONDERS_GRACE / 1000)

        def receive(answer: Msg | BaseException) -> bool:
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            elif _is_no_responders(answer) and time.monotonic() < grace:
                return True
            else:
                future.set_result(answer)
            return False

        self._ask(subject, payload, headers, receive, time.monotonic() + seconds, resend)
        try:
            return future.result(seconds + 2)
        except concurrent.futures.TimeoutError:
            raise BrokerConnectionError(f"No answer on {subject} within {seconds * 1000:.0f} ms.") from None

    def api(
        self, verb: str, body: Mapping[str, Any] | None = None, *, timeout: int | None = None
    ) -> dict[str, Any]:
        """Ask the JetStream API, for instance `api("STREAM.INFO.orders")`.

        Raises:
          NotFound, ApiError: What JetStream answered.
          BrokerConnectionError: When it did not answer in time.
        """
        payload = json.dumps(body).encode() if body is not None else b""
        seconds = (self.timeout if timeout is None else timeout) / 1000
        deadline = time.monotonic() + seconds
        while True:
            left = max(1, int((deadline - time.monotonic()) * 1000))
            answer = self.request(f"$JS.API.{verb}", payload, timeout=left, resend=True)
            if _is_no_responders(answer):
                raise ServerUnsupported(
                    f"JetStream does not answer at {self.options.display}: it is switched off for this "
                    "account, or has no leader now."
                )
            reply = cast(dict[str, Any], json.loads(answer.data))
            error = reply.get("error")
            if error is None:
                return reply
            translated = _translate(error)
            if error.get("err_code") not in _TRANSIENT or time.monotonic() + 0.25 > deadline:
                raise translated
            time.sleep(0.25)

    def new_inbox(self) -> str:
        """Return a fresh subject for answers; add tokens to it as needed."""
        self.connect()
        return cast(Client, self._nc).new_inbox()

    def subscribe(self, subject: str, callback: Callable[[Msg], None]) -> Subscription:
        """Call `callback` on the loop thread for each message on `subject`; it must neither block nor raise."""
        self.connect()
        subscription = Subscription(subject, callback, self)
        self._subscriptions.append(subscription)
        self.run(self._attach(cast(Client, self._nc), subscription))
        return subscription

    def run(self, coroutine: Coroutine[Any, Any, None], timeout: int | None = None) -> None:
        """Run a short coroutine on the loop thread and wait for it."""
        if self._loop is None or threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("A blocking call was made on the connection's own thread.")
        milliseconds = self.timeout if timeout is None else timeout
        try:
            asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(milliseconds / 1000)
        except concurrent.futures.TimeoutError:
            raise ConnectionClosed(f"NATS did not answer within {milliseconds} ms.") from None
        except nats.errors.Error as error:
            raise ConnectionClosed(f"NATS refused: {error}.") from error

    def _unsubscribe(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
        if subscription._nats is not None and self._loop is not None and not self._closed:
            asyncio.run_coroutine_threadsafe(self._detach(subscription._nats), self._loop)
            subscription._nats = None

    def _withdraw(self, subscription: Subscription) -> None:
        nc, native = self._nc, subscription._nats
        if nc is not None and native is not None and nc.is_connected:
            # nats-py's own unsubscribe would also drop what is on its way.
            self._withdrawing = asyncio.ensure_future(nc._send_unsubscribe(native._id))

    async def _attach(self, nc: Client, subscription: Subscription) -> None:
        callback = subscription.callback

        async def deliver(message: Msg) -> None:
            callback(message)

        subscription._nats = await nc.subscribe(subscription.subject, cb=deliver)

    async def _detach(self, native: Any) -> None:
        with contextlib.suppress(nats.errors.Error):  # a closed connection has no subscriptions left
            await native.unsubscribe()

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop thread after each reconnect, once unanswered publishes were sent again."""
        self._on_reconnect.append(callback)

    def on_fence(self, callback: Callable[[int], None]) -> None:
        """Call `callback(n)` on the loop thread when everything sent before fence `n` has arrived."""
        self._on_fence.append(callback)

    def on_tick(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop thread ten times a second, connected or not."""
        self._on_tick.append(callback)

    def on_fork(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the child of a fork, where nothing is connected yet."""
        self._on_fork.append(callback)

    def forget(self, callback: Callable[..., None]) -> None:
        """Undo every `on_…` for a callback."""
        for callbacks in (self._on_reconnect, self._on_fence, self._on_tick, self._on_fork):
            with contextlib.suppress(ValueError):
                callbacks.remove(callback)

    def soon(self, call: Callable[[], None], delay: float = 0.0) -> None:
        """Run `call` on the loop thread after this turn, or after `delay` seconds; only on the loop thread."""
        loop = cast(asyncio.AbstractEventLoop, self._loop)

        def run() -> None:
            call()
            if self._outgoing and self._wake is not None:
                self._wake.set()

        loop.call_later(delay, run) if delay else loop.call_soon(run)

    def hurry_fence(self) -> None:
        """Send the next fence now instead of within a second; from any thread."""
        self.post(self._send_fence)

    def _send_fence(self) -> None:
        if self._fence_seen == self._fence_sent:
            self._fence_sent += 1
            self.write(f"{self._inbox}.fence", str(self._fence_sent).encode())

    @property
    def next_fence(self) -> int:
        """The fence behind everything that is sent now."""
        return self._fence_sent + 1

    # On the loop thread

    def _ask(
        self,
        subject: str,
        payload: bytes,
        headers: Headers | None,
        answer: Callable[[Msg | BaseException], bool],
        deadline: float,
        resend: bool,
    ) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError("A blocking call was made on the connection's own thread.")
        self.post(self._start, _Pending(subject, payload, headers, answer, deadline, resend))

    def _start(self, pending: _Pending) -> None:
        self._counter += 1
        token = format(self._counter, "x")
        self._pending[token] = pending
        self._transmit(token, pending)

    def _transmit(self, token: str, pending: _Pending) -> None:
        nc = self._nc
        if nc is not None and nc.is_connected:
            pending.sent = time.monotonic()
            self._outgoing.append(
                (pending.subject, pending.payload, f"{self._inbox}.{token}", pending.headers)
            )

    async def _handle_answer(self, message: Msg) -> None:
        token = message.subject[len(self._inbox) + 1 :]
        if token == "fence":
            self._handle_fence(int(message.data))
            return
        pending = self._pending.get(token)
        if pending is None:
            return  # an answer to what was sent twice, or too late
        if pending.answer(message):
            pending.wait = 0.1  # "try again": the sweep does
        else:
            del self._pending[token]

    def _handle_fence(self, number: int) -> None:
        self._fence_seen = max(self._fence_seen, number)
        for callback in self._on_fence:
            callback(number)

    def _handle_reconnect(self) -> None:
        nc = self._nc
        if nc is None:
            return
        self.state.reconnects += 1
        self._note_server(nc)
        self._fences_missed = 0
        self._fence_seen = self._fence_sent
        self.logger.info("Reconnected to NATS at %s.", self.state.server)
        for token, pending in list(self._pending.items()):
            if pending.resend or pending.sent is None:
                self._transmit(token, pending)
        for callback in list(self._on_reconnect):
            callback()
        if self._wake is not None:
            self._wake.set()

    def _handle_server_error(self, error: Exception) -> None:
        denied = _PERMISSION.search(str(error))
        if denied is None:
            self.logger.debug("NATS reported: %s", error)
            return
        verb, subject = denied.groups()
        refusal = PermissionDenied(
            f"This account may not {'publish to' if verb.lower() == 'publish' else 'subscribe to'} "
            f"{subject!r}: extend its permissions (docs/operations.md lists what each role needs)."
        )
        waiting = [token for token, pending in self._pending.items() if pending.subject == subject]
        if not waiting:
            self.logger.error("%s", refusal)
        for token in waiting:
            self._pending.pop(token).answer(refusal)

    async def _write(self) -> None:
        """Run what threads posted and hand what that produced to nats-py."""
        wake = cast(asyncio.Event, self._wake)
        while True:
            await wake.wait()
            wake.clear()
            nc = self._nc
            if nc is not None:
                await self._drain_mailbox(nc)

    async def _drain_mailbox(self, nc: Client) -> None:
        self._woken = False
        mailbox, outgoing = self._mailbox, self._outgoing
        while mailbox or outgoing:
            while mailbox:
                call, args = mailbox.popleft()
                try:
                    call(*args)
                except Exception:
                    self.logger.exception("A call on the connection's thread failed.")
            while outgoing:
                subject, payload, reply, headers = outgoing.popleft()
                try:
                    await nc.publish(subject, payload, reply, cast("dict[str, str] | None", headers))
                except (nats.errors.OutboundBufferLimitError, nats.errors.ConnectionClosedError):
                    # Not connected: publishes are sent again on reconnect, acks by their consumer.
                    outgoing.clear()
                except Exception:
                    self.logger.exception("A message for %s could not be sent.", subject)

    async def _watch(self) -> None:
        """Send fences, and give up on what nobody answered in time."""
        next_fence = 0.0
        while True:
            await asyncio.sleep(0.1)
            now = time.monotonic()
            nc = self._nc
            if nc is None:
                continue
            self._sweep(now)
            for callback in list(self._on_tick):
                callback()
            if not nc.is_connected:
                next_fence = 0.0
                continue
            if now < next_fence:
                continue
            next_fence = now + FENCE_INTERVAL
            if self._fence_seen < self._fence_sent:
                self._fences_missed += 1
                if self._fences_missed >= FENCES_MISSED:
                    self.logger.warning("NATS has been silent for %d s; reconnecting.", self._fences_missed)
                    self._fences_missed = 0
                    await nc.force_reconnect()
                    continue
            else:
                self._fences_missed = 0
            self._fence_sent += 1
            self.write(f"{self._inbox}.fence", str(self._fence_sent).encode())

    def _sweep(self, now: float) -> None:
        again = False
        for token, pending in list(self._pending.items()):
            if now >= pending.deadline:
                del self._pending[token]
                pending.answer(self._too_late(pending))
            elif pending.sent is None:
                self._transmit(token, pending)
                again = True
            elif (pending.resend or pending.wait < RESEND_AFTER) and now - pending.sent >= pending.wait:
                pending.wait = min(pending.wait * 2, 8.0) if pending.wait >= RESEND_AFTER else RESEND_AFTER
                self._transmit(token, pending)
                again = True
        if again and self._wake is not None:
            self._wake.set()

    def _too_late(self, pending: _Pending) -> BrokerConnectionError:
        waited = int((time.monotonic() - pending.started) * 1000)
        if pending.sent is None:
            return ConnectionClosed(
                f"NATS at {self.options.display} was not connected for {waited} ms "
                f"({self.state.last_error}); nothing was sent to {pending.subject}."
            )
        return StoreTimeout(
            f"NATS at {self.options.display} did not answer on {pending.subject} within {waited} ms; "
            "whether it stored the message is not known."
        )


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return cast(asyncio.AbstractEventLoop, uvloop.new_event_loop())


def _refuse_gevent() -> None:
    try:
        from gevent import monkey
    except ImportError:
        return
    if monkey.is_module_patched("threading"):
        raise BrokerError(
            "dramatiq-jetstream does not run under gevent, which replaces the threads it needs: "
            "start workers with `dramatiq` instead of `dramatiq-gevent`."
        )


def _check_size(item: Publication, limit: int) -> None:
    size = len(item.payload)
    if item.headers:
        size += 12 + sum(len(k.encode()) + len(v.encode()) + 4 for k, v in item.headers.items())
    if size > limit:
        raise MessageTooLarge(
            f"A message of {size} bytes for {item.subject} is over the server's max_payload of {limit} bytes: "
            "store large data elsewhere and send a reference, or raise max_payload."
        )


def _is_no_responders(answer: Msg) -> bool:
    return not answer.data and bool(answer.headers) and (answer.headers or {}).get("Status") == "503"


def _read_puback(subject: str, answer: Msg | BaseException, *, patient: bool) -> PubAck | BrokerError | None:
    """Return what an answer to a publish says, or None when it says "try again"."""
    if isinstance(answer, BaseException):
        return answer if isinstance(answer, BrokerError) else BrokerError(str(answer))
    if _is_no_responders(answer):
        if patient:
            return None
        return TopologyMissing(
            f"No stream takes {subject}: prepare it with `fleet setup`, or let the broker declare it."
        )
    reply = json.loads(answer.data)
    error = reply.get("error")
    if error is None:
        return PubAck(reply["stream"], reply["seq"], reply.get("duplicate", False))
    if error.get("err_code") in _TRANSIENT:
        return None
    return _translate(error)


def _translate(error: Mapping[str, Any]) -> BrokerError:
    code, err_code = int(error.get("code", 0)), int(error.get("err_code", 0))
    description = str(error.get("description", "unknown error"))
    if err_code in _FULL:
        return StoreFull(f"JetStream has no room ({description}): raise its limits or let workers catch up.")
    if err_code in _TOO_LARGE:
        return MessageTooLarge(f"JetStream refused the message: {description}.")
    if err_code in _NOT_FOUND or code == 404:
        return NotFound(code, err_code, description)
    return ApiError(code, err_code, description)
