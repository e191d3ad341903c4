"""`python -m dramatiq_jetstream.cli` is `fleet`."""

from __future__ import annotations

from .app import main

main()
