# SPDX-License-Identifier: Apache-2.0
"""What two readings of an environment's counters say (`isolation.cgroups.UsageReader`)."""

from __future__ import annotations

from collections.abc import Mapping

from nsbox.values.result import Usage


def rise(
    before: Mapping[str, int | None], after: Mapping[str, int | None], name: str
) -> int | None:
    """Return by how much a counter has risen; None when the host does not count it."""
    new, old = after.get(name), before.get(name)
    return None if new is None else max(0, new - (old or 0))


def oom_evidence(before: Mapping[str, int | None], after: Mapping[str, int | None]) -> str:
    """Say what an out-of-memory kill is concluded from; "" where there was none."""
    kills = rise(before, after, "oom_kills")
    if kills:
        return f"the memory cgroup counts {kills} OOM kills since it began"
    if after.get("oom_notices"):
        # v1: at the kernel's notice all is killed, maybe before the kernel has chosen a victim.
        return "the kernel gave notice of OOM in the memory cgroup, and nsbox was quicker to kill"
    return ""


def usage_between(
    before: Mapping[str, int | None], after: Mapping[str, int | None], wall: float | None
) -> Usage:
    """Return the usage between two readings of the counters; `wall` in seconds."""

    def seconds(name: str) -> float | None:
        value = rise(before, after, name)
        return None if value is None else value / 1e6

    return Usage(
        wall_seconds=wall,
        cpu_user_seconds=seconds("cpu_user_usec"),
        cpu_system_seconds=seconds("cpu_system_usec"),
        memory_current_bytes=after.get("memory_current"),
        memory_peak_bytes=after.get("memory_peak"),
        pids_current=after.get("pids_current"),
        pids_peak=after.get("pids_peak"),
        io_read_bytes=rise(before, after, "io_rbytes"),
        io_write_bytes=rise(before, after, "io_wbytes"),
        throttled_seconds=seconds("throttled_usec"),
        oom_kills=rise(before, after, "oom_kills"),
    )
