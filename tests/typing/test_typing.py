"""What a type checker says of a user's program: nothing of a right one, and every mistake of a wrong one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WRONG = {
    number
    for number, line in enumerate((HERE / "mistakes.py").read_text().splitlines(), start=1)
    if line.endswith("# wrong")
}


def mypy(path: Path) -> set[int]:
    """The lines with errors."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file", "", str(path)]
    # Type checkers do not follow editable installations.
    environment = {**os.environ, "MYPYPATH": str(ROOT / "broker")}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150)
    return {int(line) for line in re.findall(rf"{path.name}:(\d+): error", found.stdout)}


def pyright(path: Path, project: Path) -> set[int]:
    """The lines with errors."""
    project.write_text(
        json.dumps(
            {"include": [str(path)], "typeCheckingMode": "strict", "extraPaths": [str(ROOT / "broker")]}
        )
    )
    command = [
        sys.executable,
        "-m",
        "basedpyright",
        "--outputjson",
        "-p",
        str(project),
        "--pythonpath",
        sys.executable,
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=150)
    report = json.loads(found.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    return {
        issue["range"]["start"]["line"] + 1
        for issue in report["generalDiagnostics"]
        if issue["severity"] == "error"
    }


@pytest.mark.parametrize(("file", "lines"), [("program.py", set()), ("mistakes.py", WRONG)])
def test_mypy_finds_the_mistakes_and_nothing_else(file: str, lines: set[int]) -> None:
    """Strict mypy, as a user's project has it."""
    assert mypy(HERE / file) == lines


@pytest.mark.parametrize(("file", "lines"), [("program.py", set()), ("mistakes.py", WRONG)])
def test_pyright_finds_the_mistakes_and_nothing_else(file: str, lines: set[int], tmp_path: Path) -> None:
    """Strict pyright, as an editor has it."""
    assert pyright(HERE / file, tmp_path / "pyrightconfig.json") == lines
