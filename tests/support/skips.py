"""What a test may need beyond Python, and the rule that in CI nothing is skipped.

`@needs_chromium`, `@needs_node`, `@needs_root` and `@needs("redis-server")` skip with a reason on a machine
that lacks the thing. With FORBID_SKIPS=1 (set by .ci/run) a skipped or expected-to-fail test fails the run.
"""

from __future__ import annotations

import os
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip the test unless every program is found on the PATH."""
    missing = [program for program in programs if not find_program(program)]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)} on the PATH")


def find_program(program: str) -> str | None:
    """The program's path; the sbin directories count too, because Debian puts servers there."""
    path = os.environ.get("PATH", os.defpath) + os.pathsep + os.pathsep.join(("/usr/local/sbin", "/usr/sbin"))
    return shutil.which(program, path=path)


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
needs_node = needs("node", "npm")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class ForbidSkips:
    """Turns a session in which a test was skipped, or expected to fail, into a failed one."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        expected_failure = getattr(report, "wasxfail", None)
        if expected_failure is not None:
            self.found.append(f"{report.nodeid}: expected to fail ({expected_failure or 'no reason'})")
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self.found.append(f"{report.nodeid}: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.note(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.found and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.found:
            terminalreporter.section("FORBID_SKIPS is set, so these fail the run", red=True, bold=True)
            for line in self.found:
                terminalreporter.line(line)


def register(config: pytest.Config) -> None:
    """Called by tests/conftest.py."""
    if os.environ.get("FORBID_SKIPS") == "1":
        config.pluginmanager.register(ForbidSkips(), "forbid-skips")
