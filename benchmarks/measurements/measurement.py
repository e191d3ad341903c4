"""The interface of a measurement: what it reports, in which cases, and how one repetition is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from benchmarks.contenders.contender import Contender


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    scale: float = 1.0
    million: bool = False

    @property
    def full(self) -> bool:
        return self.scale >= 1

    def count(self, messages: int, least: int = 20) -> int:
        """`messages` at full size, fewer in a quick run."""
        return max(least, int(messages * self.scale))


@dataclass(frozen=True)
class Figure:
    """One column of the report."""

    key: str
    title: str
    unit: str = ""
    plotted: bool = False


CPU = (
    Figure("worker_cpu_us", "worker CPU", "µs/msg"),
    Figure("server_cpu_us", "server CPU", "µs/msg"),
    Figure("worker_rss_mb", "worker memory", "MB"),
    Figure("server_rss_mb", "server memory", "MB"),
)
DRIVER = (
    Figure("driver_cpu_us", "client CPU", "µs/msg"),
    Figure("server_cpu_us", "server CPU", "µs/msg"),
    Figure("driver_rss_mb", "client memory", "MB"),
)
MB = 1024 * 1024


class Measurement(ABC):
    """One question, asked of every contender in the same way."""

    name: str
    title: str
    figures: tuple[Figure, ...]
    quick = True  # part of a quick run
    repetitions: int | None = None  # for what is too slow to repeat as often as the rest
    least_repetitions = 1  # for what compares small differences

    def cases(self, options: Options, contender: Contender) -> list[str]:
        return [""]

    @abstractmethod
    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        """One repetition; raises BenchmarkError when it cannot be made."""


def driver_figures(figures: dict[str, float], server_cpu: float | None, messages: int) -> dict[str, float]:
    """The figures of an operation of the driver, per message."""
    result = {
        "per_second": figures["per_second"],
        "driver_cpu_us": figures["driver_cpu"] / messages * 1e6,
        "driver_rss_mb": figures["driver_peak_rss"] / MB,
    }
    if server_cpu is not None:
        result["server_cpu_us"] = server_cpu / messages * 1e6
    return result
