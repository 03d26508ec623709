# SPDX-License-Identifier: Apache-2.0
"""Numbers of pools for Prometheus: a collector for prometheus-client (``nsbox[prometheus]``).

::

    from prometheus_client import REGISTRY
    from nsbox.observe.prometheus import PoolCollector

    REGISTRY.register(PoolCollector({"thumbnails": pool}))

What is told is `WarmPool.stats` when it is asked for: all numbers of a pool are of one moment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, Protocol

from nsbox.errors import ConfigError, PoolError
from nsbox.pool.events import PoolStats

try:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        SummaryMetricFamily,
    )
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "nsbox.observe.prometheus needs prometheus-client: pip install nsbox[prometheus]"
    ) from error

_PREFIX: Final = "nsbox_pool_"
_COUNTERS: Final = {
    "Calls": "calls",
    "Invocations": "invocations",
    "Errors": "errors",
    "Throttles": "throttles",
    "ProvisionedConcurrencyInvocations": "provisioned_invocations",
    "ProvisionedConcurrencySpilloverInvocations": "provisioned_spillover_invocations",
    "Births": "births",
    "LeftRunning": "left_running",
}
_SECONDS: Final = {"InitDuration": "init_duration_seconds"}
_GAUGES: Final = {
    "ConcurrentExecutions": "concurrent_executions",
    "Environments": "environments",
    "Idle": "idle_environments",
    "Waiting": "waiting_calls",
}
_DURATION: Final = "Duration"
_LABELS: Final = ("pool",)


class HasStats(Protocol):
    """A `WarmPool` or an `AsyncWarmPool`."""

    def stats(self) -> Mapping[str, float]:
        """Return its numbers."""


class PoolCollector(Collector):
    """Tells the numbers of named pools; to be registered with a `CollectorRegistry`.

    Counters end in ``_total``, durations are seconds, and each has the label ``pool``. A number
    that is not known here is a gauge under its own name.
    """

    def __init__(self, pools: Mapping[str, HasStats]) -> None:
        """Take pools by the names that they get as a label.

        Raises:
            ConfigError: It is no such mapping.
        """
        if not isinstance(pools, Mapping):
            raise ConfigError(f"pools: give a mapping of names to pools, got {pools!r}")
        for name, pool in pools.items():
            if not isinstance(name, str) or not callable(getattr(pool, "stats", None)):
                raise ConfigError(f"pools: {name!r} must name a pool, got {pool!r}")
        self._pools = dict(pools)

    def describe(self) -> Iterable[Metric]:
        """Return nothing: pools are asked only when numbers are asked for."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of this moment."""
        found: dict[str, Mapping[str, float]] = {}
        for name, pool in self._pools.items():
            try:
                found[name] = pool.stats()
            except PoolError:
                continue  # an `AsyncWarmPool` that is not entered yet has no numbers
        keys = dict.fromkeys(key for stats in found.values() for key in stats)
        return [_family(key, found) for key in keys]


def _family(key: str, found: Mapping[str, Mapping[str, float]]) -> Metric:
    values = [([name], stats[key], stats) for name, stats in found.items() if key in stats]
    if key == _DURATION:
        name = "duration_seconds"
        summary = SummaryMetricFamily(_PREFIX + name, _text_of(name), labels=_LABELS)
        for labels, value, stats in values:
            summary.add_metric(labels, int(stats["Invocations"]), value / 1000)
        return summary
    if key in _COUNTERS or key in _SECONDS:
        name = _COUNTERS.get(key) or _SECONDS[key]
        scale = 1000 if key in _SECONDS else 1
        counter = CounterMetricFamily(_PREFIX + name, _text_of(name), labels=_LABELS)
        for labels, value, _ in values:
            counter.add_metric(labels, value / scale)
        return counter
    known = _GAUGES.get(key)
    name = known or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()
    text = _text_of(known) if known else f"{key}."
    gauge = GaugeMetricFamily(_PREFIX + name, text, labels=_LABELS)
    for labels, value, _ in values:
        gauge.add_metric(labels, value)
    return gauge


def _text_of(name: str) -> str:
    """Return what `PoolStats` says of a number; it has the metric's name."""
    return str(getattr(PoolStats, name).__doc__)
