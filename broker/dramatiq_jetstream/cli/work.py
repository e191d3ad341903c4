"""`fleet work`: runs the workers of a program under a supervisor."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import click

from dramatiq_jetstream.fleet.banner import banner
from dramatiq_jetstream.fleet.health import HealthPortError, serve_health
from dramatiq_jetstream.fleet.options import WorkOptions
from dramatiq_jetstream.fleet.supervisor import Supervisor

COMMANDS: list[click.Command] = []

_LOG_FORMAT = "[%(asctime)s] [PID %(process)d] [%(name)s] [%(levelname)s] %(message)s"

_UNITS = {"": 1, "K": 1_000, "M": 1_000_000, "G": 1_000_000_000}


class Size(click.ParamType[int]):
    """A number of bytes, such as 512M."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        number, unit = str(value).upper().removesuffix("B"), ""
        if number[-1:] in _UNITS and number[-1:]:
            number, unit = number[:-1], number[-1]
        if not number.isdecimal() or int(number) == 0:
            self.fail(f"{value!r} is not a size: give bytes, such as 512M or 2G.", param, ctx)
        return int(number) * _UNITS[unit]


class Address(click.ParamType[tuple[str, int]]):
    """HOST:PORT."""

    name = "host:port"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        host, _, port = str(value).rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
            self.fail(f"{value!r} is not an address: give HOST:PORT, such as 127.0.0.1:8080.", param, ctx)
        return host.strip("[]"), int(port)


@click.command()
@click.argument("modules", metavar="MODULE...", nargs=-1, required=True)
@click.option(
    "-p", "--processes", type=click.IntRange(1, 1_024), default=os.cpu_count() or 1, show_default="CPUs"
)
@click.option(
    "-t",
    "--threads",
    type=click.IntRange(1, 10_000),
    default=8,
    show_default=True,
    help="Threads of each process.",
)
@click.option(
    "-Q", "--queues", multiple=True, metavar="QUEUE", help="Serve only these; repeat it, or use commas."
)
@click.option("-P", "--path", multiple=True, default=(".",), help="A directory to search for modules first.")
@click.option(
    "-f", "--fork-function", "forks", multiple=True, help="Run module:function in a process of its own."
)
@click.option(
    "--pid-file", type=click.Path(dir_okay=False, path_type=Path), help="Write the supervisor's PID here."
)
@click.option(
    "--log-file", type=click.Path(dir_okay=False, path_type=Path), help="Append all output to this file."
)
@click.option("--skip-logging", is_flag=True, help="Leave the logging of workers to the program.")
@click.option(
    "--worker-shutdown-timeout",
    "shutdown_timeout",
    type=click.IntRange(0),
    default=600_000,
    show_default=True,
    help="Milliseconds that running actors get when a worker stops.",
)
@click.option("--max-tasks", type=click.IntRange(1), help="Replace a worker after this many attempts.")
@click.option(
    "--max-age", type=click.FloatRange(1), metavar="SECONDS", help="Replace a worker that is this old."
)
@click.option(
    "--max-memory", type=Size(), help="Replace a worker with this much resident memory, such as 512M."
)
@click.option("--max-memory-hard", type=Size(), help="Kill a worker with this much.")
@click.option("--http", type=Address(), help="Serve /health/live, /health/ready and /metrics here.")
@click.option(
    "--watch",
    type=click.Path(exists=True, file_okay=False),
    help="Reload when a source file in here changes.",
)
@click.option("-v", "--verbose", count=True, help="Log debug messages.")
def work(
    modules: tuple[str, ...],
    queues: tuple[str, ...],
    pid_file: Path | None,
    log_file: Path | None,
    http: tuple[str, int] | None,
    watch: str | None,
    **settings: Any,
) -> None:
    """Run the workers of a program; replace those that die.

    The first MODULE is the program (module, or module:broker), the others are imported too. Signals: TERM and INT
    stop (twice: at once), HUP reloads without a gap, USR1 takes nothing more, USR2 logs state and stacks.
    """
    wanted = tuple(name.strip() for given in queues for name in given.split(",") if name.strip())
    options = WorkOptions(modules[0], modules[1:], queues=wanted, **settings)
    with _output(log_file) as output, _pid_file(pid_file):
        logging.basicConfig(
            level=logging.DEBUG if options.verbose else logging.INFO,
            format=_LOG_FORMAT,
            stream=_Text(output),
            force=True,
        )
        address = None if http is None else f"{http[0]}:{http[1]}"

        def booted(ready: dict[str, Any]) -> None:
            output.write(banner(options, ready, pid=os.getpid(), http=address).encode())
            output.flush()

        supervisor = Supervisor(options, output=output, booted=booted)
        try:
            with serve_health(supervisor, http), _watching(watch):
                status = supervisor.run()
        except HealthPortError as error:
            raise click.ClickException(str(error)) from None
    if status:
        raise click.exceptions.Exit(status)


class _Text:
    """The output for the supervisor's own log lines."""

    def __init__(self, output: IO[bytes]) -> None:
        self._output = output

    def write(self, text: str) -> None:
        self._output.write(text.encode("utf-8", "backslashreplace"))

    def flush(self) -> None:
        self._output.flush()


@contextlib.contextmanager
def _output(log_file: Path | None) -> Iterator[IO[bytes]]:
    if log_file is None:
        yield sys.stderr.buffer
        return
    try:
        opened = log_file.open("ab")
    except OSError as error:
        raise click.ClickException(
            f"the log file {str(log_file)!r} cannot be written: {error.strerror}."
        ) from None
    with opened:
        yield opened


@contextlib.contextmanager
def _pid_file(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    try:
        text = path.read_text().strip() if path.exists() else ""
        if text and not text.isdecimal():
            raise click.ClickException(f"{str(path)!r} is not a PID file: name another one, or remove it.")
        if text and int(text) != os.getpid() and _runs(int(text)):
            raise click.ClickException(f"the fleet of {str(path)!r} runs already, with PID {text}.")
        path.write_text(str(os.getpid()))
    except OSError as error:
        raise click.ClickException(
            f"the PID file {str(path)!r} cannot be written: {error.strerror}."
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _watching(directory: str | None) -> Iterator[None]:
    """Send this process SIGHUP when a source file changes, as the `dramatiq` command does."""
    if directory is None:
        yield
        return
    try:
        from dramatiq.watcher import setup_file_watcher
    except ImportError:
        raise click.ClickException("--watch needs watchdog: pip install 'dramatiq[watch]'.") from None
    watcher = setup_file_watcher(directory, include_patterns=["**.py"])
    try:
        yield
    finally:
        watcher.stop()
        watcher.join()


COMMANDS.append(work)
