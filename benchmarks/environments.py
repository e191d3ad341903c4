"""The Python environments of contenders whose libraries are not the project's own.

Each is made once, on demand, under `benchmarks/.venvs` (not committed).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.contenders.contender import Contender
from benchmarks.processes import BenchmarkError

FOLDER = Path(__file__).parent / ".venvs"
INSTALL_TIMEOUT = 600


def python_of(contender: Contender) -> str:
    """The interpreter that runs this contender; installs its packages first where they are missing."""
    if not contender.packages:
        return sys.executable
    home = FOLDER / contender.environment
    python = home / "bin" / "python"
    done = home / "installed"
    wanted = "\n".join(sorted(contender.packages))
    if done.exists() and done.read_text() == wanted:
        return str(python)
    _run([sys.executable, "-m", "venv", str(home)], contender)
    _run([str(python), "-m", "pip", "install", "--quiet", *contender.packages], contender)
    done.write_text(wanted)
    return str(python)


def _run(command: list[str], contender: Contender) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no output"])[-1]
        raise BenchmarkError(f"installing {', '.join(contender.packages)} failed: {last}") from None
    except subprocess.TimeoutExpired:
        raise BenchmarkError(
            f"installing {', '.join(contender.packages)}: not within {INSTALL_TIMEOUT} s"
        ) from None
