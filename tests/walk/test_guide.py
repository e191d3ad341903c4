"""The programs of the tutorial and the guide run as written, and their other code is at least Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dramatiq_jetstream.testing import NatsServer
from tests.walk.environment import Environment
from tests.walk.terminal import Command, Terminal, steps

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS / "tutorial.md", *sorted((DOCS / "guide").glob("*.md")), *sorted((DOCS / "from").glob("*.md"))]
WITH_PROGRAMS = [page for page in PAGES if any(isinstance(step, Command) for step in steps(page))]

#: What the workers print, by page.
WORKERS = {
    "tutorial": ["another second"],
    "events": ["notify 17", "archive SHIPMENT.sent"],
    "priorities": ["mail to boss", "mail to all", "scanned 1"],
}


@pytest.mark.parametrize("page", WITH_PROGRAMS, ids=lambda page: page.stem)
def test_the_programs_of_a_page_run(
    page: Path, environment: Environment, own_server: NatsServer, tmp_path: Path
) -> None:
    """Each command prints what the page shows below it."""
    with Terminal(tmp_path, environment.variables(NATS_URL=own_server.url)) as terminal:
        for step in steps(page):
            if isinstance(step, Command) and step.line.startswith("kill %"):
                for line in WORKERS.get(page.stem, []):
                    terminal.wait_for(line, "workers.log")
            terminal.do(step)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_the_code_of_a_page_is_python(page: Path) -> None:
    """A fragment that cannot be run alone has no typo in its syntax."""
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        compile(code, page.name, "exec")
