"""The measurements, in the order of the report."""

from __future__ import annotations

from benchmarks.measurements.ablation import Ablation
from benchmarks.measurements.batch import Batch
from benchmarks.measurements.cluster import Cluster
from benchmarks.measurements.delayed import Delayed
from benchmarks.measurements.drain import Drain
from benchmarks.measurements.enqueue import Enqueue
from benchmarks.measurements.growth import Growth
from benchmarks.measurements.history import History
from benchmarks.measurements.idle import Idle
from benchmarks.measurements.latency import Latency
from benchmarks.measurements.limits import Limits
from benchmarks.measurements.measurement import Measurement
from benchmarks.measurements.orders import Orders
from benchmarks.measurements.presence import Presence
from benchmarks.measurements.recovery import Recovery
from benchmarks.measurements.roundtrip import Roundtrip
from benchmarks.measurements.short_actor import ShortActor
from benchmarks.measurements.sustained import Payload, Sustained
from benchmarks.measurements.telemetry import Telemetry

MEASUREMENTS: tuple[Measurement, ...] = (
    Enqueue(),
    Batch(),
    Drain(),
    Sustained(),
    Payload(),
    ShortActor(),
    Latency(),
    Roundtrip(),
    Delayed(),
    Growth(),
    Recovery(),
    Cluster(),
    Idle(),
    Telemetry(),
    History(),
    Presence(),
    Limits(),
    Ablation(),
    Orders(),
)
