# SPDX-License-Identifier: Apache-2.0
"""Counters of one environment, read from the host side."""

from __future__ import annotations

import errno
import os
from _io import FileIO

from nsbox.errors import SyscallError
from nsbox.isolation.cgroups.files import ControlFiles, read_bytes
from nsbox.isolation.cgroups.v1 import BlockIo, Cpu, CpuAccounting, Memory, Pids
from nsbox.isolation.cgroups.v2 import Unified

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_FEWEST = 2  # threads of PID 1 and one worker
FIELDS = (
    "cpu_usec",
    "cpu_user_usec",
    "cpu_system_usec",
    "throttled_usec",
    "memory_current",
    "memory_peak",
    "pids_current",
    "pids_peak",
    "io_rbytes",
    "io_wbytes",
    "io_rios",
    "io_wios",
    "oom_kills",
    "oom_events",
)


def _kills(events: Mapping[str, int]) -> int | None:
    kills, groups = events.get("oom_kill"), events.get("oom_group_kill", 0)  # the latter from 5.17
    if kills is None or not groups:
        return kills
    # A group kill begins with its first victim and then kills every member, that one again; it is
    # counted twice, unless it was gone in between (mm/oom_kill.c, oom_kill_process).
    return max(groups, kills - groups)


class UsageReader:
    """Reads the files of `EnvironmentCgroup.paths`; every value is None where there is no file.

    All counts, and the peaks, are of the whole life of the environment so far: the kernel keeps
    one of each per cgroup. Take the difference of two readings for one command; peaks have none.
    """

    def __init__(self, paths: Mapping[str, str], absent: set[object] | None = None) -> None:
        """Take `EnvironmentCgroup.paths`.

        `absent` notes which files this kernel does not have there, for environments of one
        launcher: asking again costs as much as an answer.
        """
        self._absent: set[object] = set() if absent is None else absent
        self._unified = Unified(paths["unified"]) if "unified" in paths else None
        self._memory = Memory(paths["memory"]) if "memory" in paths else None
        self._pids = Pids(paths["pids"]) if "pids" in paths else None
        self._cpu = Cpu(paths["cpu"]) if "cpu" in paths else None
        self._accounting = CpuAccounting(paths["cpuacct"]) if "cpuacct" in paths else None
        self._io = BlockIo(paths["io"]) if "io" in paths else None

    def counters(self) -> dict[str, int | None]:
        """Return what only grows: CPU times, throttling, io and OOM kills; the rest is None."""
        values: dict[str, int | None] = dict.fromkeys(FIELDS)
        self._read_cpu(values)
        events = self._memory_events()
        values["oom_kills"] = _kills(events)
        values["oom_events"] = events.get("oom")
        self._read_io(values)
        return values

    def read(self) -> dict[str, int | None]:
        """Return every counter of `FIELDS`: microseconds, bytes, operations, tasks, kills."""
        values = self.counters()
        if self._memory is not None:
            values["memory_current"] = self._get(self._memory, "usage_in_bytes")
        elif self._unified is not None:
            values["memory_current"] = self._get(self._unified, "memory_current")
        values["memory_peak"] = self.memory_peak()
        pids = self._pids or self._unified
        if pids is not None:
            current, peak = ("current", "peak") if self._pids else ("pids_current", "pids_peak")
            values["pids_current"] = self._get(pids, current)
            values["pids_peak"] = self._get(pids, peak)
        return values

    def memory_peak(self) -> int | None:
        """Return how many bytes it has had at most; None where they are not counted."""
        if self._memory is not None:
            return self._get(self._memory, "max_usage_in_bytes")  # type: ignore[no-any-return]
        return self._get(self._unified, "memory_peak")  # type: ignore[no-any-return]

    def open_counter(self) -> FileIO | None:
        """Return the file that counts its threads, None where there is none."""
        files = self._pids or self._unified
        try:
            return FileIO(f"{files.directory}/pids.current") if files else None
        except OSError:
            return None

    def tasks(self) -> tuple[int, int] | None:
        """Return how many processes and threads there are; None where they are not counted.

        That there are but two of each costs one file to know.
        """
        files = self._pids or self._unified
        # It counts threads, ended ones that nobody has waited for among them.
        count = self._get(files, "current" if self._pids else "pids_current")
        if files is None or count is None or count <= _FEWEST:
            return None if count is None else (count, count)
        threads = "tasks" if self._pids else "cgroup.threads"
        lists = (read_bytes(f"{files.directory}/{name}") for name in ("cgroup.procs", threads))
        processes, tasks = (len(data.split()) for data in lists)
        return processes, tasks

    def cpu_usec(self) -> int | None:
        """Return the CPU time used, user and system, in microseconds."""
        if self._unified is not None:
            used = (self._get(self._unified, "cpu_stat") or {}).get("usage_usec")
            if used is not None:
                return int(used)
        nanoseconds = self._get(self._accounting, "usage")
        return None if nanoseconds is None else nanoseconds // 1000

    def oom_kills(self) -> int | None:
        """Return how many processes the kernel has killed at the memory limit."""
        return _kills(self._memory_events())

    def _memory_events(self) -> Mapping[str, int]:
        # v1 counts kills only ("oom_kill", 4.13); its failcnt counts every reclaim at the limit.
        if self._memory is not None:
            return self._get(self._memory, "oom_control") or {}
        return self._get(self._unified, "memory_events") or {}

    def _read_cpu(self, values: dict[str, int | None]) -> None:
        # v2's cpu.stat counts time in every cgroup, on hybrid hosts too; throttling only with
        # the controller.
        stat = self._get(self._unified, "cpu_stat") or {}
        values["cpu_usec"] = stat.get("usage_usec")
        values["cpu_user_usec"] = stat.get("user_usec")
        values["cpu_system_usec"] = stat.get("system_usec")
        values["throttled_usec"] = stat.get("throttled_usec")
        if values["cpu_usec"] is None and self._accounting is not None:
            values["cpu_usec"] = self.cpu_usec()
            ticks = self._get(self._accounting, "acct_stat") or {}
            for key, name in (("user", "cpu_user_usec"), ("system", "cpu_system_usec")):
                if key in ticks:
                    values[name] = ticks[key] * 1_000_000 // os.sysconf("SC_CLK_TCK")
        if self._cpu is not None:
            throttled = (self._get(self._cpu, "stat") or {}).get("throttled_time")
            if throttled is not None:
                values["throttled_usec"] = throttled // 1000

    def _read_io(self, values: dict[str, int | None]) -> None:
        if self._io is not None:
            sums = self._get(self._io, "throttle_io_service_bytes")
            if sums is not None:
                values["io_rbytes"], values["io_wbytes"] = sums
            sums = self._get(self._io, "throttle_io_serviced")
            if sums is not None:
                values["io_rios"], values["io_wios"] = sums
            return
        stat = self._get(self._unified, "io_stat")
        if stat is not None:
            for key in ("rbytes", "wbytes", "rios", "wios"):
                values[f"io_{key}"] = stat.get(key, 0)

    def _get(self, files: ControlFiles | None, attribute: str) -> Any:  # noqa: ANN401 - no types
        """Return the value of a file that cgroupspy declares, None where there is none."""
        if files is None or (type(files), attribute) in self._absent:
            return None
        try:
            return getattr(files, attribute)
        except SyscallError as error:
            # Gone with the whole cgroup it says nothing about others.
            if error.errno == errno.ENOENT and os.path.exists(files.directory):
                self._absent.add((type(files), attribute))
            return None
