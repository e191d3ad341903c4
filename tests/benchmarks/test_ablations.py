"""The pieces that a benchmark does without."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.servers import REPOSITORY


def test_every_piece_can_be_taken_away() -> None:
    """What each one replaces is where it looks for it, and a broker can be made without all of them."""
    code = "\n".join(
        [
            "from benchmarks import ablations",
            "for take_away in ablations.PIECES.values(): take_away()",
            "from dramatiq_jetstream import JetStreamBroker",
            "JetStreamBroker('nats://127.0.0.1:1')",
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=60)
