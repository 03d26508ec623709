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
    "Calls": ("calls", "Calls that an open pool was asked for."),
    "Invocations": ("invocations", "Calls that got an environment, or whose did not start."),
    "Errors": ("errors", "Invocations that raised."),
    "Throttles": (
        "throttles",
        "Calls that never ran: throttled, timed out or cancelled in the queue.",
    ),
    "ProvisionedConcurrencyInvocations": (
        "provisioned_invocations",
        "Invocations served by provisioned environments.",
    ),
    "ProvisionedConcurrencySpilloverInvocations": (
        "provisioned_spillover_invocations",
        "Invocations that no provisioned environment served, where there are some.",
    ),
    "Births": ("births", "Environments born."),
    "LeftRunning": (
        "left_running",
        "Invocations that have left processes running, which were killed.",
    ),
}
_SECONDS: Final = {
    "InitDuration": ("init_duration_seconds", "Seconds that environments' initialisation took."),
}
_GAUGES: Final = {
    "ConcurrentExecutions": ("concurrent_executions", "Environments that are leased."),
    "Environments": ("environments", "Environments, and places of those being born."),
    "Idle": ("idle_environments", "Environments that nobody uses."),
    "Waiting": ("waiting_calls", "Calls in the queue."),
}
_DURATION: Final = "Duration"
_LABELS: Final = ("pool",)


class HasStats(Protocol):
    """A `WarmPool` or an `AsyncWarmPool`."""

    def stats(self) -> dict[str, float]:
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
        found: dict[str, dict[str, float]] = {}
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
        text = "Seconds that invocations took, without waiting and birth."
        summary = SummaryMetricFamily(f"{_PREFIX}duration_seconds", text, labels=_LABELS)
        for labels, value, stats in values:
            summary.add_metric(labels, int(stats["Invocations"]), value / 1000)
        return summary
    if key in _COUNTERS or key in _SECONDS:
        name, text = _COUNTERS.get(key) or _SECONDS[key]
        scale = 1000 if key in _SECONDS else 1
        counter = CounterMetricFamily(_PREFIX + name, text, labels=_LABELS)
        for labels, value, _ in values:
            counter.add_metric(labels, value / scale)
        return counter
    name, text = _GAUGES.get(key) or (re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower(), f"{key}.")
    gauge = GaugeMetricFamily(_PREFIX + name, text, labels=_LABELS)
    for labels, value, _ in values:
        gauge.add_metric(labels, value)
    return gauge
