"""A directory for one run: temporary, or kept."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def directory(keep: Path | None, name: str) -> Iterator[Path]:
    """Make a directory for the length of the block, or one of this name in `keep` that stays."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="chaos-") as made:
            yield Path(made)
        return
    path = (keep / name).absolute()
    path.mkdir(parents=True, exist_ok=True)
    yield path
