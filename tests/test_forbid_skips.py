"""The rule of CI: where everything is installed, a test that did not run is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY

CONFTEST = "from tests.support.skips import register as pytest_configure\n"
SKIP = "pytest.skip('no such thing here', allow_module_level=True)"
TESTS = {
    "passes": "def test(): pass",
    "skips": f"import pytest\ndef test(): {SKIP}",
    "skips the module": f"import pytest\n{SKIP}",
    "skips in a fixture": f"import pytest\n@pytest.fixture\ndef f(): {SKIP}\ndef test(f): pass",
    "is expected to fail": "import pytest\n@pytest.mark.xfail(reason='no such thing here')\ndef test(): 1 / 0",
    "fails": "def test(): assert 0",
}


def run(directory: Path, content: str, *, forbid: bool) -> subprocess.CompletedProcess[str]:
    """Run pytest on one test file with the rule on or off."""
    (directory / "conftest.py").write_text(CONFTEST)
    (directory / "test_fine.py").write_text("def test(): pass\n")
    (directory / "test_other.py").write_text(content)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--import-mode=importlib", directory],
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "FORBID_SKIPS": "1" if forbid else "0",
        },
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("kind", ["skips", "skips the module", "skips in a fixture", "is expected to fail"])
def test_a_test_that_did_not_run_fails_the_run(tmp_path: Path, kind: str) -> None:
    """Every way not to run is found, named with its reason, and leaves a failing exit code."""
    result = run(tmp_path, TESTS[kind], forbid=True)
    assert result.returncode == 1, result.stdout
    assert "FORBID_SKIPS" in result.stdout
    assert result.stdout.count("no such thing here") >= 1


@pytest.mark.parametrize(("kind", "code"), [("passes", 0), ("fails", 1)])
def test_other_outcomes_are_untouched(tmp_path: Path, kind: str, code: int) -> None:
    """Passing stays passing, failing stays failing, without a word."""
    result = run(tmp_path, TESTS[kind], forbid=True)
    assert result.returncode == code, result.stdout
    assert "FORBID_SKIPS" not in result.stdout


def test_on_a_smaller_machine_skipping_is_allowed(tmp_path: Path) -> None:
    """Without the rule a skip is a skip."""
    assert run(tmp_path, TESTS["skips"], forbid=False).returncode == 0
