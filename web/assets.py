"""Gives each static file an address that changes with its content, so that browsers may keep it for ever."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

_DIRECTORY = Path(__file__).parent / "static"


@cache
def asset_url(name: str) -> str:
    """Return the address of a file in ``static``."""
    digest = hashlib.sha256((_DIRECTORY / name).read_bytes()).hexdigest()[:12]
    return f"/static/{name}?v={digest}"
