# SPDX-License-Identifier: Apache-2.0
"""cgroup v1: cgroupspy's controllers, with what they lack, and how limits are written to them.

Kernel: Documentation/admin-guide/cgroup-v1/{memory,cpusets,blkio-controller,pids}.rst and
Documentation/scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import errno

from cgroupspy.contenttypes import DeviceThrottle
from cgroupspy.controllers import (
    BlkIOController,
    Controller,
    CpuAcctController,
    CpuController,
    CpuSetController,
    MemoryController,
)
from cgroupspy.interfaces import BaseFileInterface, IntegerFile, TypedFile

from nsbox.errors import SyscallError
from nsbox.isolation.cgroups.files import ControlFiles, write_text
from nsbox.isolation.cgroups.v2 import MaxFile, cpu_quota, parse_cpus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any


class Memory(ControlFiles, MemoryController):  # type: ignore[misc]
    """``memory.limit_in_bytes``, ``memory.memsw.*``, ``memory.oom_control``, peaks."""


class Cpu(ControlFiles, CpuController):  # type: ignore[misc]
    """``cpu.cfs_quota_us``, ``cpu.cfs_period_us``, ``cpu.stat``."""


class CpuAccounting(ControlFiles, CpuAcctController):  # type: ignore[misc]
    """``cpuacct.usage`` (nanoseconds), ``cpuacct.stat`` (ticks)."""


class CpuSet(ControlFiles, CpuSetController):  # type: ignore[misc]
    """``cpuset.cpus`` and ``cpuset.mems``; a v1 cgroup takes no process before both are set."""


class Pids(ControlFiles, Controller):  # type: ignore[misc]
    """The pids controller, which cgroupspy 0.2.3 does not know."""

    maximum: Any = MaxFile("pids.max")
    current = IntegerFile("pids.current", readonly=True)
    peak = IntegerFile("pids.peak", readonly=True)


class Freezer(ControlFiles, Controller):  # type: ignore[misc]
    """The freezer, which cgroupspy 0.2.3 does not know: THAWED, FREEZING or FROZEN."""

    state = BaseFileInterface("freezer.state")


class _DeviceSums(BaseFileInterface):  # type: ignore[misc]
    """Lines ``8:0 Read 4096``: the sums over all devices, as (reads, writes)."""

    def sanitize_get(self, value: str) -> tuple[int, int]:
        reads = writes = 0
        for line in value.splitlines():
            words = line.split()
            if len(words) == 3:
                if words[1] == "Read":
                    reads += int(words[2])
                elif words[1] == "Write":
                    writes += int(words[2])
        return reads, writes


class BlockIo(ControlFiles, BlkIOController):  # type: ignore[misc]
    """Throttling. cgroupspy 0.2.3 has a blank at the end of the names of its two write files."""

    throttle_write_bps_device = TypedFile(
        "blkio.throttle.write_bps_device", contenttype=DeviceThrottle, many=True
    )
    throttle_write_iops_device = TypedFile(
        "blkio.throttle.write_iops_device", contenttype=DeviceThrottle, many=True
    )
    throttle_io_service_bytes: Any = _DeviceSums("blkio.throttle.io_service_bytes", readonly=True)
    throttle_io_serviced: Any = _DeviceSums("blkio.throttle.io_serviced", readonly=True)


FEATURE_FILES = {
    "cgroup.memory": ("memory", ("memory.limit_in_bytes",)),
    "cgroup.memory.swap": ("memory", ("memory.memsw.limit_in_bytes", "memory.swappiness")),
    "cgroup.pids": ("pids", ("pids.max",)),
    "cgroup.cpu": ("cpu", ("cpu.cfs_quota_us",)),
    "cgroup.cpuset": ("cpuset", ("cpuset.cpus",)),
    "cgroup.io": ("io", ("blkio.throttle.read_bps_device",)),
    "cgroup.freeze": ("freezer", ("freezer.state",)),
}
"""Feature -> (hierarchy, files of which one must be writable)."""

IO_FILES = (
    ("rbps", "throttle_read_bps_device"),
    ("wbps", "throttle_write_bps_device"),
    ("riops", "throttle_read_iops_device"),
    ("wiops", "throttle_write_iops_device"),
)


def prepare_directory(name: str, base: str, directory: str) -> None:
    """Make a new launcher directory fit for children: inherit cpuset, hierarchical memory."""
    if name == "cpuset":
        parent, child = CpuSet(base), CpuSet(directory)
        child.mems = parent.mems
        child.cpus = parent.cpus
    elif name == "memory":
        try:
            # Always 1 since 5.11; before, a child's usage would not count here.
            write_text(f"{directory}/memory.use_hierarchy", "1")
        except SyscallError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):
                raise


def write_memory(directory: str, limit: int) -> None:
    """Limit memory, and keep all of it out of swap; `SyscallError` names the file."""
    memory = Memory(directory)
    # In this order: the kernel refuses memory+swap below memory.
    memory.limit_in_bytes = limit
    try:
        memory.memsw_limit_in_bytes = limit
    except SyscallError as error:
        if error.errno != errno.ENOENT:
            raise
        # Booted with swapaccount=0: at least never swap to make room below the limit.
        memory.swappiness = 0


def write_pids(directory: str, limit: int) -> None:
    """Limit the number of tasks."""
    Pids(directory).maximum = limit


def write_cpu(directory: str, cpus: float) -> None:
    """Limit CPU bandwidth to `cpus` CPUs."""
    quota, period = cpu_quota(cpus)
    cpu = Cpu(directory)
    if period != 100_000:  # the kernel's default of a new cgroup
        cpu.cfs_period_us = period
    cpu.cfs_quota_us = quota


def write_cpuset(directory: str, cpus: str, tree_directory: str) -> None:
    """Pin to `cpus`, e.g. ``"0-1,3"``, with all the memory nodes of the launcher's directory."""
    files = CpuSet(directory)
    files.mems = CpuSet(tree_directory).mems
    files.cpus = parse_cpus(cpus)


def write_io(directory: str, limits: Sequence[Mapping[str, Any]]) -> None:
    """Throttle devices. On v1 this covers reads and direct writes: written-back page cache is the
    kernel threads' (blkio-controller.rst), so `wbps` does not slow down buffered writes.
    """
    files = BlockIo(directory)
    for limit in limits:
        major, minor = limit["device"].split(":")
        for key, attribute in IO_FILES:
            rate = limit.get(key)
            if rate is not None:
                # One device a write: the kernel parses only the first line.
                setattr(files, attribute, [DeviceThrottle(rate, major, minor)])
