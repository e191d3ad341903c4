"""Free ports for servers that tests start."""

from __future__ import annotations

from dramatiq_jetstream.server import free_port

__all__ = ["free_port"]
