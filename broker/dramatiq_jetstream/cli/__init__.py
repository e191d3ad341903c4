"""The `fleet` command: the server, the queues and the dead letters of a namespace, for people and scripts.

Every command takes `--json` for output that programs read. An error is one line on standard error and a non-zero exit
status: 1 when the server or the data is the reason, 2 for wrong usage.
"""

from __future__ import annotations

from .app import main

__all__ = ["main"]
