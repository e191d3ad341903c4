"""Changes single expressions of the code, and tells which changes no fast test notices: `make mutants`.

    make mutants                                     all modules below; it takes long
    make mutants ARGS="tasks/saga.py"                one of them
    mutmut show NAME                                 in .artifacts/mutants: what a survivor changes

Not all modules of the library's `worker`, `sending` and `wire` are below. The others are glue between threads, a server
and a socket: what they do is seen in tests that start a server or wait for another thread, seconds for each change.

- worker: threads of a worker or beside it (activity, attempts, consumer, consumers, current, giving_back, hard_limits,
  heartbeats, in_flight, interrupts, later, places, presence, recorder, room, roster, shutdown_notices, vitals,
  work_queue, workplace); what a server holds (attachment, durables, fetching, limits, message, pulling, rerouting,
  server_clock, sources);
- sending: what a server holds (batches, composition, many, publications, sender);
- wire: sockets, their threads and the loop (asking, calls, client, connection, core_connection, handshake, intake,
  lanes, link, listeners, login, loop, opening, outbox, thread_queue, tls, waiting); numbers (error_numbers); what runs
  at import and in a forked child, where no change is in force (ids).

Fast tests pass through some of these (current, durables, in_flight, message) and check little of them.

mutmut makes the changes and runs the tests that reach each of them. It works on a copy in `.artifacts/mutants`, and
is no part of `make test`. The exit status is 1 while a module is below the share that `SHARE` asks for. A mutant
counts as found if a test fails, or never ends, because of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from mutmut.stats import status_by_exit_code

from tests.support.processes import REPOSITORY

PLACE: Final = REPOSITORY / ".artifacts" / "mutants"
LIBRARY: Final = "dramatiq_jetstream"
COPIED: Final = (
    "tasks",
    "web",
    "proto",
    "tests",
    "instrumentation",
    "benchmarks",
    "docs",
    "deploy",
    "examples",
)
FILES: Final = ("README.md", "pyproject.toml", "Makefile", "Procfile", "CHANGELOG.md")

#: The share of mutants that has to be found.
SHARE: Final = 0.85

#: pytest's exit status for an error of its own. mutmut takes it for a failed test; here it has found nothing.
INTERNAL_ERROR: Final = 3

#: What is changed, and the tests that are quick enough to be run for each change.
MODULES: Final = {
    f"{LIBRARY}/wire/protocol.py": ["tests/broker/test_protocol.py"],
    f"{LIBRARY}/wire/addresses.py": ["tests/broker/test_addresses.py"],
    f"{LIBRARY}/wire/headers.py": ["tests/broker/test_headers.py"],
    f"{LIBRARY}/wire/ack_subjects.py": ["tests/broker/test_deliveries.py"],
    f"{LIBRARY}/wire/replies.py": ["tests/broker/test_replies.py"],
    f"{LIBRARY}/worker/delivery.py": ["tests/broker/test_deliveries.py"],
    f"{LIBRARY}/worker/suspects.py": ["tests/broker/test_suspects.py"],
    f"{LIBRARY}/worker/follow_ups.py": ["tests/broker/test_following.py"],
    f"{LIBRARY}/worker/limit_state.py": ["tests/broker/test_limit_state.py"],
    f"{LIBRARY}/worker/time_limits.py": ["tests/broker/test_time_limits.py"],
    f"{LIBRARY}/worker/arguments.py": ["tests/broker/test_shown_text.py"],
    f"{LIBRARY}/worker/log_lines.py": ["tests/broker/test_shown_text.py"],
    f"{LIBRARY}/worker/tracebacks.py": ["tests/broker/test_shown_text.py"],
    f"{LIBRARY}/worker/settlements.py": ["tests/broker/test_settlements.py"],
    f"{LIBRARY}/worker/hooks.py": ["tests/broker/test_hooks.py"],
    f"{LIBRARY}/sending/envelope.py": [
        "tests/broker/test_envelope.py",
        "tests/broker/test_carried_events.py",
    ],
    f"{LIBRARY}/sending/fitting.py": ["tests/broker/test_fitting.py"],
    f"{LIBRARY}/sending/delays.py": ["tests/broker/test_delay_times.py"],
    f"{LIBRARY}/sending/options.py": ["tests/broker/test_checked_options.py"],
    f"{LIBRARY}/sending/references.py": ["tests/broker/test_references.py"],
    f"{LIBRARY}/sending/unique.py": ["tests/broker/test_unique_claims.py"],
    "tasks/accept.py": ["tests/tasks/test_acceptance.py"],
    "tasks/idempotency.py": ["tests/tasks/test_requests.py"],
    "tasks/parsing.py": ["tests/tasks/test_parsing.py"],
    "tasks/saga.py": ["tests/tasks/test_saga_steps.py", "tests/tasks/test_outdated_reads.py"],
    "tasks/stock.py": ["tests/tasks/test_stock_steps.py"],
}


def prepare(modules: list[str]) -> None:
    """Copy the project, with the package where its name can be imported from the root."""
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    copies = {LIBRARY: REPOSITORY / "broker" / LIBRARY} | {name: REPOSITORY / name for name in COPIED}
    for name, source in copies.items():
        if source.is_dir():
            shutil.copytree(source, PLACE / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(REPOSITORY / name, PLACE / name)
    tests = sorted({test for module in modules for test in MODULES[module]})
    settings = {
        "source_paths": [LIBRARY, "tasks"],
        "only_mutate": modules,
        "also_copy": [
            *(name for name in COPIED if (PLACE / name).is_dir() and name not in ("tasks", "tests")),
            *FILES,
        ],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-n", "0", "--hypothesis-profile", "mutants"],
        "pytest_add_cli_args_test_selection": tests,
    }
    with (PLACE / "pyproject.toml").open("a") as config:
        config.write("\n[tool.mutmut]\n")
        config.writelines(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())


def found(module: str) -> tuple[int, int, list[str]]:
    """Return how many mutants of a module were found, how many there are, and the survivors."""
    results = PLACE / "mutants" / f"{module}.meta"
    codes = json.loads(results.read_text())["exit_code_by_key"]
    states = {
        name: "error in pytest" if code == INTERNAL_ERROR else status_by_exit_code[code]
        for name, code in codes.items()
    }
    survivors = [f"{name}: {state}" for name, state in states.items() if state not in ("killed", "timeout")]
    return len(states) - len(survivors), len(states), survivors


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make mutants", description="Which mistakes do fast tests not notice?"
    )
    parser.add_argument(
        "modules", nargs="*", choices=[[], *MODULES], metavar="MODULE", help="all if none is named"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many tests run at a time")
    options = parser.parse_args()
    modules = options.modules or list(MODULES)
    prepare(modules)
    mutmut = Path(sys.executable).parent / "mutmut"
    with (PLACE / "mutmut.log").open("w") as log:
        done = subprocess.run(
            [mutmut, "run", "--max-children", str(options.processes)],
            cwd=PLACE,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        print((PLACE / "mutmut.log").read_text()[-2_000:], file=sys.stderr)
        return 2
    missed = False
    survived: list[str] = []
    print(f"\n{'':44}  found     of")
    for module in modules:
        killed, of, survivors = found(module)
        share = killed / of if of else 1.0
        missed |= share < SHARE
        survived += survivors
        print(f"{module:44} {share:6.0%} {of:6,}")
    listed = PLACE / "survivors.txt"
    listed.write_text("".join(f"{line}\n" for line in survived))
    print(f"\n{len(survived)} survivors are listed in {listed.relative_to(REPOSITORY)}.")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
