"""Builds the Dockerfile and confirms an order with what came of it: `make test-image`, as root on Debian.

No container engine is needed: Debian's `buildah` builds with vfs storage and chroot isolation, on a base that
`debootstrap` makes and that stands for the one which the Dockerfile names. Then `fleet setup`, the payments' stand-in,
the workers and the front end run from inside the image, beside a nats-server of this machine. It takes some minutes
the first time, and is no part of `make test` for that. The base is kept in `.artifacts/image`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import requests
from cryptography.fernet import Fernet

from dramatiq_jetstream.testing import NatsServer
from tests.support.polling import eventually
from tests.support.ports import free_port
from tests.support.processes import REPOSITORY, WORKER_READY, Process

ARTIFACTS: Final = REPOSITORY / ".artifacts" / "image"
SUITE: Final = "bookworm"
PACKAGES: Final = "python3,python3-pip,python-is-python3,ca-certificates"
CERTIFICATES: Final = Path("/etc/ssl/certs/ca-certificates.crt")

#: How long the image may take to do what it is asked, in seconds.
PATIENCE: Final = 300.0


class Buildah:
    """The commands of buildah, on a storage of its own."""

    def __init__(self, storage: Path) -> None:
        self._options = [
            *("--root", str(storage / "root"), "--runroot", str(storage / "run")),
            *("--storage-driver", "vfs"),
        ]

    def command(self, *arguments: str) -> list[str]:
        return ["buildah", *self._options, *arguments]

    def __call__(self, *arguments: str) -> str:
        """Run a command to its end; returns what it printed."""
        done = subprocess.run(
            self.command(*arguments), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"buildah {' '.join(arguments[:2])} ended with {done.returncode}")
        return done.stdout.strip()


def base(directory: Path) -> Path:
    """Return the files of a base system, made when they are not there yet."""
    root = directory / SUITE
    if not (root / "usr/bin/python").exists():
        shutil.rmtree(root, ignore_errors=True)
        making = directory / "making"
        shutil.rmtree(making, ignore_errors=True)
        mirror = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
        arguments = ["--variant=minbase", f"--include={PACKAGES}", SUITE, str(making), mirror]
        subprocess.run(["debootstrap", *arguments], stdout=subprocess.DEVNULL, check=True)
        making.rename(root)
    # What this machine trusts, so that packages come through whatever stands before the network here.
    shutil.copyfile(CERTIFICATES, root / str(CERTIFICATES).lstrip("/"))
    return root


def build(buildah: Buildah, root: Path) -> str:
    """Build the image on the base; returns its name."""
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, str(root), "/")
    # Debian keeps pip out of its own Python; in an image there is none to protect.
    for variable in (f"PIP_CERT={CERTIFICATES}", "PIP_BREAK_SYSTEM_PACKAGES=1", "PIP_DEFAULT_TIMEOUT=120"):
        buildah("config", "--env", variable, container)
    buildah("commit", "--quiet", "--rm", container, "base")
    arguments = [
        "--format",
        "docker",
        "--isolation",
        "chroot",
        "--pull=never",
        "--from",
        "localhost/base",
        "--file",
        "Dockerfile",
    ]
    buildah("build", *arguments, "--tag", "order-service", ".")
    return "localhost/order-service"


class Image:
    """The image at work.

    Parameters:
      environment: What every process of it is told.
    """

    def __init__(self, buildah: Buildah, name: str, environment: Mapping[str, str], logs: Path) -> None:
        self._buildah = buildah
        self._name = name
        self._environment = environment
        self._logs = logs

    def process(self, name: str, *arguments: str, **environment: str) -> Process:
        """Return a process in a container of its own, as the image's own user."""
        container = self._buildah("from", "--pull=never", self._name)
        told = {**self._environment, **environment}
        variables = [part for item in told.items() for part in ("--env", "=".join(item))]
        command = self._buildah.command(
            "run", "--isolation", "chroot", *variables, container, "--", *arguments
        )
        return Process(command, log=self._logs / f"{name}.log")


def confirm_an_order(image: Image, port: int, gateway: int) -> None:
    """Set up, start everything from inside the image, and see an order through."""
    setup = image.process("setup", "fleet", "setup", "tasks")
    code = setup.start().wait(PATIENCE)
    assert code == 0, setup.output
    with ExitStack() as running:
        running.enter_context(
            image.process(
                "payments",
                *("python", "-m", "tasks.payments_stand_in", "--port", str(gateway)),
                *("--database", "/data/payments.sqlite"),
            )
        ).wait_for_output("payments stand-in on", timeout=PATIENCE)
        running.enter_context(
            image.process("workers", "fleet", "work", "tasks", "--processes", "1", "--threads", "4")
        ).wait_for_output(WORKER_READY, timeout=PATIENCE)
        web = running.enter_context(
            image.process(
                "web",
                *("gunicorn", "-c", "web/gunicorn.conf.py", "web:create_app()"),
                HOST="127.0.0.1",
                PORT=str(port),
                WEB_CONCURRENCY="1",
            )
        )
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            try:
                return requests.get(f"{url}/health", timeout=10).status_code == 200
            except (requests.ConnectionError, requests.Timeout):
                return False

        eventually(answers, timeout=PATIENCE, message="the front end did not get ready")
        user = image.process("user", "id", "-un")
        user.start().wait(PATIENCE)
        assert user.output.strip() == "service", f"the image runs as {user.output.strip()}"
        body = {"customer_id": "c-1", "items": [{"sku": "MUG-01", "quantity": 1}]}
        placed = requests.post(f"{url}/api/orders", json=body, timeout=30)
        assert placed.status_code == 202, placed.text + web.output
        order = f"{url}{placed.headers['Location']}"
        eventually(
            lambda: requests.get(order, timeout=30).json()["status"] == "confirmed",
            timeout=PATIENCE,
            message="the order was not confirmed",
        )
        print(f"{placed.json()['order_id']} was confirmed by the image", flush=True)


def main() -> int:
    missing = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        print(
            f"run this as root, with {' and '.join(missing) or 'everything'} installed by apt-get",
            file=sys.stderr,
        )
        return 1
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with TemporaryDirectory(prefix="image-", dir=ARTIFACTS) as temporary:
        directory = Path(temporary)
        buildah = Buildah(directory / "storage")
        root = base(ARTIFACTS)
        print(f"the base is there after {time.monotonic() - began:.0f} s", flush=True)
        name = build(buildah, root)
        print(f"the image is built after {time.monotonic() - began:.0f} s", flush=True)
        port, gateway = free_port(), free_port()
        with NatsServer(store_dir=directory / "nats", sync="2m") as nats:
            environment = {
                "NATS_URL": nats.url,
                "PAYMENT_URL": f"http://127.0.0.1:{gateway}",
                "ACCESS": "open",
                "TOKEN_KEY": Fernet.generate_key().decode(),
                "SECRET_KEY": secrets.token_hex(32),
            }
            try:
                confirm_an_order(Image(buildah, name, environment, directory), port, gateway)
            except BaseException:
                for log in sorted(directory.glob("*.log")):
                    print(f"== {log.name}\n{log.read_text()[-3_000:]}", file=sys.stderr)
                raise
    print(f"all of it took {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
