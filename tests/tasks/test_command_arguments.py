"""Numbers that commands are given: one way to read them, with bounds, whatever stands before the digits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tasks import archives, demo, keys, operate, restock

Read = Callable[[list[str]], object]

#: Each command that takes a number, what the number follows, and the largest one.
NUMBERS: dict[str, tuple[Read, list[str], int]] = {
    "keys": (keys._parser().parse_args, ["add", "shop", "--scope", "read", "--days"], 3_650),
    "archives": (archives._parser().parse_args, ["run", "--every"], 10_080),
    "restock": (restock._parser().parse_args, ["add", "MUG-01"], 10**9),
    "demo": (demo.parser().parse_args, ["--orders"], 1_000_000),
    "stuck": (operate._arguments, ["stuck", "--minutes"], 10_080),
    "refund": (operate._arguments, ["refund", "o-1", "--key", "k", "--amount"], 2**53 - 1),
}
NONE = ("{}", "000{}", "9" * 19, "9" * 5_000, "-1", "+1", "1e3", "1_0", "0x5", "٣", "²", "1.5", "")


@pytest.mark.parametrize("given", NONE, ids=lambda given: given[:20])
@pytest.mark.parametrize("command", NUMBERS)
def test_what_is_no_number_in_bounds_is_refused(
    command: str, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said in one line, and nothing is done."""
    read, before, most = NUMBERS[command]
    with pytest.raises(SystemExit) as refused:
        read([*before, given.format(most + 1)])
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "error: " in said.splitlines()[-1]


@pytest.mark.parametrize("command", NUMBERS)
def test_a_number_in_bounds_is_taken(command: str) -> None:
    """As it is written."""
    read, before, _ = NUMBERS[command]
    assert 7 in vars(read([*before, "7"])).values()
