"""Says who a request comes from and what they may do: nothing but look, unless it is said.

Access is a function of the WSGI environment that returns a `Person`, or None for a stranger. A host application gives
its own; three are ready: `OnThisMachine`, `Passwords` and `ProxyHeader`. Nothing here is remembered but passwords that
were right a moment ago, so every process of a server may answer every request, and a restart signs no one out.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from dramatiq_jetstream.errors import InvalidOption

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

__all__ = [
    "PERMISSIONS",
    "ROLES",
    "Access",
    "OnThisMachine",
    "Passwords",
    "Person",
    "ProxyHeader",
    "operator",
    "viewer",
]

#: Each kind of change, as permissions name it.
PERMISSIONS: Final = frozenset({"pause", "abort", "cancel", "run", "schedule", "replay", "drop"})

#: How long a password that was right is known without being hashed again, and how many are.
REMEMBERED_SECONDS: Final = 60.0
REMEMBERED: Final = 256

MIN_PASSWORD: Final = 12
MAX_PASSWORD: Final = 256


@dataclass(frozen=True, slots=True)
class Person:
    """Who makes a request.

    Attributes:
      name: What the page and the audit call them.
      may: The changes that they may make, of `PERMISSIONS`; none lets them look.

    Examples:
      >>> from dramatiq_jetstream.ui import Person
      >>> ben = Person("ben", may=frozenset({"replay"}))
    """

    name: str
    may: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.may) - PERMISSIONS)
        if unknown:
            raise InvalidOption(
                f"permission {unknown[0]!r} cannot be used: there are {', '.join(sorted(PERMISSIONS))}."
            )
        object.__setattr__(self, "may", frozenset(self.may))


def viewer(name: str) -> Person:
    """A person who may look.

    Examples:
      >>> from dramatiq_jetstream.ui import viewer
      >>> viewer("ben").may
      frozenset()
    """
    return Person(name)


def operator(name: str) -> Person:
    """A person who may make every change.

    Examples:
      >>> from dramatiq_jetstream.ui import PERMISSIONS, operator
      >>> operator("ann").may == frozenset(PERMISSIONS)
      True
    """
    return Person(name, PERMISSIONS)


# How the headers begin with which a proxy says for whom it asks.
_FORWARDED: Final = ("HTTP_FORWARDED", "HTTP_X_FORWARDED", "HTTP_X_REAL_IP")

#: Returns who makes a request, None for a stranger.
Access = Callable[["WSGIEnvironment"], Person | None]

ROLES: Final[Mapping[str, Callable[[str], Person]]] = {"viewer": viewer, "operator": operator}


class OnThisMachine:
    """Lets everyone on this machine look, and no one else.

    The request has to come from a loopback address, for a name of this machine (a page of another site could have its
    own name point here), and from no proxy.

    Examples:
      >>> from dramatiq_jetstream.ui import OnThisMachine
      >>> OnThisMachine()({"REMOTE_ADDR": "192.0.2.7", "HTTP_HOST": "localhost"}) is None
      True
    """

    def __call__(self, environ: WSGIEnvironment) -> Person | None:
        if any(name.startswith(_FORWARDED) for name in environ):
            return None
        local = is_loopback(environ.get("REMOTE_ADDR", "")) and is_loopback(_host(environ))
        return viewer("anyone on this machine") if local else None


class Passwords:
    """People who sign in with a name and a password (HTTP Basic); its Argon2 hash is kept.

    Parameters:
      users: For each name the role, `viewer` or `operator`, and what `Passwords.hash` made of the password.

    Raises:
      InvalidOption: For a role or a hash that cannot be used.

    Examples:
      >>> from dramatiq_jetstream.ui import Passwords
      >>> access = Passwords({"ann": ("operator", Passwords.hash("correct horse battery"))})
    """

    #: What asks a browser for a name and a password.
    challenge: Final = 'Basic realm="fleet", charset="UTF-8"'

    def __init__(self, users: Mapping[str, tuple[str, str]]) -> None:
        self._hasher = PasswordHasher()
        for name, (role, kept) in users.items():
            if role not in ROLES:
                raise InvalidOption(
                    f"role {role!r} of {name!r} cannot be used: give {' or '.join(map(repr, ROLES))}."
                )
            try:
                self._hasher.check_needs_rehash(kept)
            except InvalidHashError:
                raise InvalidOption(
                    f"the password of {name!r} is not an Argon2 hash: make one with `fleet ui-user`."
                ) from None
        self._users = dict(users)
        # A hash takes 64 MiB while it is computed: two at a time, whatever comes in.
        self._turns = threading.BoundedSemaphore(2)
        self._no_such_person = self._hasher.hash(secrets.token_urlsafe(16))
        self._secret = secrets.token_bytes(32)
        self._known: OrderedDict[bytes, float] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def hash(password: str) -> str:
        """Return what to keep of a password.

        Raises:
          InvalidOption: When it has fewer than 12 or more than 256 characters.
        """
        if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
            raise InvalidOption(f"a password has {MIN_PASSWORD} to {MAX_PASSWORD} characters.")
        return PasswordHasher().hash(password)

    @classmethod
    def read(cls, path: Path) -> Passwords:
        """Read users from a file: a line for each, with name, role and hash; `#` begins a comment.

        Raises:
          InvalidOption: When the file cannot be read or used.

        Examples:
          ```python
          access = Passwords.read(Path("fleet-users"))  # lines such as: ann operator $argon2id$…
          ```
        """
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidOption(f"the users in {str(path)!r} cannot be read: {error}.") from None
        users: dict[str, tuple[str, str]] = {}
        for number, line in enumerate(lines, start=1):
            fields = line.split()
            if not fields or fields[0].startswith("#"):
                continue
            if len(fields) != 3:
                raise InvalidOption(
                    f"line {number} of {str(path)!r} is not a name, a role and a hash: make one with `fleet ui-user`."
                )
            users[fields[0]] = fields[1], fields[2]
        if not users:
            raise InvalidOption(f"there are no users in {str(path)!r}: make one with `fleet ui-user`.")
        return cls(users)

    def __call__(self, environ: WSGIEnvironment) -> Person | None:
        name, password = _basic(environ.get("HTTP_AUTHORIZATION", ""))
        role, kept = self._users.get(name, ("viewer", self._no_such_person))
        return ROLES[role](name) if self._is_right(name, password, kept) else None

    def _is_right(self, name: str, password: str, kept: str) -> bool:
        if not password or len(password) > MAX_PASSWORD:
            return False
        shown = f"{name}\0{password}\0{kept}".encode("utf-8", "surrogatepass")
        seen = hmac.digest(self._secret, shown, "sha256")
        now = time.monotonic()
        with self._lock:
            if now - self._known.get(seen, -REMEMBERED_SECONDS) < REMEMBERED_SECONDS:
                return True
        with self._turns:
            try:
                self._hasher.verify(kept, password)
            except (VerificationError, InvalidHashError):
                return False
        with self._lock:
            self._known[seen] = now
            self._known.move_to_end(seen)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return True


class ProxyHeader:
    """Believes a header in which a proxy, which signed people in, says who they are.

    Parameters:
      header: Such as `X-Forwarded-User`. The proxy must remove it from what comes in.
      operators: The names of those who may make changes; all others may look.
      proxies: Addresses or networks of the proxies; the header is believed from no one else.

    Raises:
      InvalidOption: For an address that is none.

    Examples:
      >>> from dramatiq_jetstream.ui import ProxyHeader
      >>> access = ProxyHeader("X-Forwarded-User", operators=["ann"], proxies=["10.0.0.0/8"])
      >>> access({"REMOTE_ADDR": "10.1.2.3", "HTTP_X_FORWARDED_USER": "ben"}).may
      frozenset()
    """

    def __init__(
        self,
        header: str,
        *,
        operators: Iterable[str] = (),
        proxies: Iterable[str] = ("127.0.0.0/8", "::1"),
    ) -> None:
        self._key = f"HTTP_{header.upper().replace('-', '_')}"
        self._operators = frozenset(operators)
        try:
            self._proxies = [ipaddress.ip_network(proxy, strict=False) for proxy in proxies]
        except ValueError as error:
            raise InvalidOption(f"the proxies cannot be used: {error}.") from None

    def __call__(self, environ: WSGIEnvironment) -> Person | None:
        name = environ.get(self._key, "").strip()
        if not name or not self._is_proxy(environ.get("REMOTE_ADDR", "")):
            return None
        return operator(name) if name in self._operators else viewer(name)

    def _is_proxy(self, address: str) -> bool:
        try:
            peer = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(peer in network for network in self._proxies)


def is_loopback(host: str) -> bool:
    """Whether an address, or a name as browsers send it, is this machine's alone."""
    if host.lower().removesuffix(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def fingerprint(person: Person) -> str:
    """What tells one person from another in a token."""
    return hashlib.sha256(person.name.encode("utf-8", "surrogatepass")).hexdigest()


def _host(environ: WSGIEnvironment) -> str:
    host = str(environ.get("HTTP_HOST", environ.get("SERVER_NAME", "")))
    name, _, port = host.rpartition(":")
    return name if name and port.isdigit() else host


def _basic(header: str) -> tuple[str, str]:
    """The name and the password of a request; empty when it has none."""
    scheme, _, text = header.partition(" ")
    if scheme.lower() != "basic":
        return "", ""
    try:
        name, _, password = base64.b64decode(text.strip(), validate=True).decode("utf-8").partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return "", ""
    return name, password
