"""What worker commands import: `broker` is the contender's, named by BENCH_CONTENDER."""

from __future__ import annotations

import os

from benchmarks import contenders

app = contenders.find(os.environ["BENCH_CONTENDER"]).app()
broker = app.broker
