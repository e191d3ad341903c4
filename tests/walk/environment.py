"""An environment as a user has it: the library from its wheel, and nothing of this checkout.

What the library depends on comes from the environment of the tests, which has it already, so that no test installs
from a network. That environment holds this checkout too, in the editable way: by a `.pth` file and a finder. A
directory named in another environment's `.pth` file is searched for packages, and its own `.pth` files are not read, so
the checkout is not importable.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from release.stage import DISTRIBUTIONS, stage

#: Commands of other packages that the documents use.
_COMMANDS = {
    "celery": "from celery.__main__ import main",
    "curl": "from tests_curl import main",
    "dramatiq": "from dramatiq.__main__ import main",
    "flask": "from flask.cli import main",
    "opentelemetry-instrument": "from opentelemetry.instrumentation.auto_instrumentation import run as main",
    "uvicorn": "from uvicorn.main import main",
}

#: Enough of curl for the documents, so that a machine needs none. It waits until the port is open.
_CURL = """
import sys, time, urllib.request
from urllib.error import URLError

def main():
    url, method = sys.argv[-1], sys.argv[sys.argv.index("-X") + 1]
    for left in range(300, -1, -1):
        try:
            answer = urllib.request.urlopen(urllib.request.Request(f"http://{url}", method=method))
        except URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError) or not left:
                raise
            time.sleep(0.2)
        else:
            print(answer.read().decode())
            return
"""


class Environment:
    """A virtual environment in `directory` with the wheels of both distributions."""

    def __init__(self, directory: Path) -> None:
        stage(directory / "source", None)
        wheels = directory / "wheels"
        for name in DISTRIBUTIONS:
            _pip(
                "wheel",
                "--no-deps",
                "--no-build-isolation",
                "--wheel-dir",
                wheels,
                directory / "source" / name,
            )
        venv.create(directory / "venv", symlinks=True)
        self.bin = directory / "venv" / "bin"
        _pip("--python", self.python, "install", "--no-deps", "--no-index", *wheels.glob("*.whl"))
        packages = directory.glob("venv/lib/python*/site-packages")
        site = next(packages)
        (site / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (site / "tests_curl.py").write_text(_CURL)
        for name, imported in _COMMANDS.items():
            script = self.bin / name
            script.write_text(f"#!{self.python}\nimport sys\n{imported}\nsys.exit(main())\n")
            script.chmod(0o755)

    @property
    def python(self) -> Path:
        return self.bin / "python"

    def variables(self, **more: str) -> dict[str, str]:
        """Return the variables with which `python`, `fleet` and `dramatiq` are those of this environment."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        path = f"{self.bin}{os.pathsep}{inherited.get('PATH', os.defpath)}"
        return {**inherited, "PATH": path, "PYTHONUNBUFFERED": "1", **more}


def _pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
