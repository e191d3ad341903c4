"""Who we are to a server, read and checked for each attempt to connect; nats-py signs with it (see `handshake`).

Files are read each time, so that rotated credentials count from the next connection on. A file that is missing or half
written fails that one attempt with a sentence about the file; the next attempt reads it again.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dramatiq_jetstream.config import ConnectOptions
from dramatiq_jetstream.errors import ConnectionFailed

from .addresses import Address
from .protocol import encode_connect

__all__ = ["Login", "LoginUnreadable", "connect_command", "preload", "read_login"]

_JWT: Final = re.compile(r"-+BEGIN NATS USER JWT-+\s+([\w.=-]+)\s+-+END NATS USER JWT-+")
_SEED: Final = re.compile(r"-+BEGIN USER NKEY SEED-+\s+(SU[A-Z2-7]{56})\s+-+END USER NKEY SEED-+")
_BARE_SEED: Final = re.compile(r"\bSU[A-Z2-7]{56}\b")

#: A text without a slash that is as long as this may be a seed, or a part of one, and is shown in no error.
SHORTEST_SECRET: Final = 30


class LoginUnreadable(ConnectionFailed):
    """The credentials cannot be read now."""


def preload(options: ConnectOptions) -> None:
    """Import now what signing needs: a fork in the middle of an import leaves the module locked in its child."""
    if options.credentials is not None or options.nkey is not None:
        with contextlib.suppress(ImportError):
            import nkeys  # noqa: F401


@dataclass(frozen=True)
class Login:
    """Who we are, read for one attempt to connect.

    Attributes:
      words: User, password and token, named as CONNECT names them.
      credentials: The content of a complete `.creds` file.
      seed: A user's nkey seed.
    """

    words: dict[str, str] = field(default_factory=dict, repr=False)
    credentials: str | None = field(default=None, repr=False)
    seed: str | None = field(default=None, repr=False)


def read_login(options: ConnectOptions, address: Address) -> Login:
    """Read who we are to the server at `address`.

    Raises:
      LoginUnreadable: When a file with credentials is missing or incomplete.
    """
    if options.credentials is not None:
        text = _read("credentials (or NATS_CREDS)", options.credentials, "BEGIN NATS USER JWT")
        seed = _SEED.search(text)
        if _JWT.search(text) is None or seed is None:
            raise LoginUnreadable(
                "The credentials (or NATS_CREDS) have no complete user JWT and seed: "
                "give the path or the content of a whole .creds file."
            )
        _check_seed(seed[1])
        return Login(credentials=text)
    if options.nkey is not None:
        bare = _BARE_SEED.search(_read("nkey", options.nkey, "SU"))
        if bare is None:
            raise LoginUnreadable(
                "The nkey has no complete seed of a user: give a seed, or the path of a file with one."
            )
        _check_seed(bare[0])
        return Login(seed=bare[0])
    found = {
        "user": options.user if options.user is not None else address.user,
        "pass": options.password if options.password is not None else address.password,
        "auth_token": options.token if options.token is not None else address.token,
    }
    return Login({name: value for name, value in found.items() if value is not None})


def connect_command(options: ConnectOptions, who: Mapping[str, str], *, tls: bool) -> bytes:
    """What a client says after the server's greeting."""
    return encode_connect(
        {
            "verbose": False,
            "pedantic": False,
            "tls_required": tls,
            "lang": "python3",
            "version": "0.1",
            "name": options.name,
            "protocol": 1,
            "headers": True,
            "no_responders": True,
            **who,
        }
    )


def _read(setting: str, value: str, content_has: str) -> str:
    """The content of a setting that is a path or the content itself."""
    if content_has in value and "/" not in value.partition(content_has)[0] and not _is_file(value):
        return value
    try:
        return Path(value).read_text()
    except (OSError, ValueError) as error:  # a text that cannot be decoded is a ValueError, too
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise LoginUnreadable(
            f"{setting} name {_shown(value)}, which does not exist or cannot be read ({reason}): "
            "give the path or the content of the file."
        ) from None


def _is_file(value: str) -> bool:
    try:
        return Path(value).is_file()
    except (OSError, ValueError):  # content is longer than any path
        return False


def _shown(value: str) -> str:
    """What an error says of a path; what may be a secret is not shown."""
    may_be_secret = "\n" in value or (len(value) >= SHORTEST_SECRET and "/" not in value)
    return "a file" if may_be_secret else f"the file {value!r}"


def _check_seed(seed: str) -> None:
    try:
        import nkeys
    except ImportError:
        raise LoginUnreadable(
            "Credentials and nkeys need the package nkeys: install dramatiq-jetstream[nkeys]."
        ) from None
    try:
        nkeys.from_seed(bytearray(seed.encode())).wipe()
    except Exception as error:  # noqa: BLE001 - nkeys and libsodium have many
        raise LoginUnreadable(
            f"The seed of the credentials cannot be used ({type(error).__name__})."
        ) from None
