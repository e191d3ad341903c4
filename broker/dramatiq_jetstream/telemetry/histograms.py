"""Adds the histograms of the tallies to what a metric exporter sends."""

from __future__ import annotations

import dataclasses
from time import time_ns

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from . import conventions as c
from .metrics import HISTOGRAMS, attributes_of
from .tallies import Durations, Key, Tallies


class HistogramFeed:
    """The histograms of some tallies for one exporter."""

    def __init__(self, tallies: Tallies, temporality: AggregationTemporality) -> None:
        self._tallies = tallies
        self._temporality = temporality
        self._since = time_ns()
        #: What was exported before, when each export is to bring only what is new.
        self._before: dict[Key, Durations] = {}

    def added_to(self, data: MetricsData) -> MetricsData:
        """The data with the histograms."""
        points = self._points()
        if not points or not data.resource_metrics:
            return data
        metrics = [
            Metric(name, description, "s", Histogram(of_kind, self._temporality))
            for kind, (name, description) in HISTOGRAMS.items()
            if (of_kind := [point for key, point in points.items() if key[0] == kind])
        ]
        scope = InstrumentationScope(c.SCOPE, c.version(), c.SCHEMA_URL)
        own = ResourceMetrics(
            data.resource_metrics[0].resource, [ScopeMetrics(scope, metrics, c.SCHEMA_URL)], ""
        )
        return dataclasses.replace(data, resource_metrics=[*data.resource_metrics, own])

    def _points(self) -> dict[Key, HistogramDataPoint]:
        now = time_ns()
        _, totals = self._tallies.totals()
        points = {
            key: HistogramDataPoint(
                attributes=attributes_of(key),
                start_time_unix_nano=self._since,
                time_unix_nano=now,
                count=new.count,
                sum=new.total,
                bucket_counts=new.buckets,
                explicit_bounds=c.DURATION_BUCKETS,
                min=new.shortest,
                max=new.longest,
            )
            for key, total in totals.items()
            if (new := self._new(key, total)).count
        }
        if self._temporality is AggregationTemporality.DELTA:
            self._before, self._since = dict(totals), now
        return points

    def _new(self, key: Key, total: Durations) -> Durations:
        before = self._before.get(key)
        if before is None:
            return total
        # The shortest and longest of the new ones alone are not known; those of all are a bound for them.
        return Durations(
            [a - b for a, b in zip(total.buckets, before.buckets, strict=True)],
            total.total - before.total,
            total.shortest,
            total.longest,
        )
