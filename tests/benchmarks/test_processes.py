"""The processes that a benchmark owns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.processes import Process, members, wait_until

#: Starts a child with a session of its own, which starts one in that session, and waits.
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
CHILD = "import subprocess, sys; subprocess.run(['sleep', '600'])"


def test_children_with_sessions_of_their_own_are_found_and_ended(tmp_path: Path) -> None:
    """As PostgreSQL's are: they count for its use of the machine, and end with it."""
    process = Process([sys.executable, "-c", PARENT, CHILD], tmp_path / "log")
    wait_until(lambda: len(members([process])) == 3, 60, "parent, child and grandchild run")
    found = members([process])
    process.kill()
    wait_until(lambda: not any(_runs(pid) for pid in found), 30, "all are gone")


def test_every_contender_can_be_driven_from_an_environment_without_the_library() -> None:
    """Celery's has Celery, and neither this library nor its packages."""
    program = (
        "import sys; sys.modules['dramatiq_jetstream'] = sys.modules['nats'] = None; import benchmarks.driver"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def _runs(pid: int) -> bool:
    """Whether a process is there and more than the entry of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False
