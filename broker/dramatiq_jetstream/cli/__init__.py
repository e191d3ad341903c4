"""The `fleet` command: the server, the queues and the dead letters of a namespace, for people and scripts.

Every command takes `--json` for output that programs read. What is wrong is one line on standard error and a
non-zero exit status: 1 for what the server or the data said, 2 for what was asked wrongly.
"""

from __future__ import annotations

from .app import main

__all__ = ["main"]
