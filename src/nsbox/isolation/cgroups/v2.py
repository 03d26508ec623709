# SPDX-License-Identifier: Apache-2.0
"""cgroup v2: its files declared with cgroupspy's typed interfaces, and its rules for delegation.

Kernel: Documentation/admin-guide/cgroup-v2.rst. cgroupspy 0.2.3 knows v1's controllers only.
"""

from __future__ import annotations

import errno
import os

from cgroupspy.interfaces import BaseFileInterface, DictFile, FlagFile, IntegerFile

from nsbox.errors import SyscallError
from nsbox.isolation.cgroups.files import ControlFiles, read_processes, read_text, write_text
from nsbox.isolation.cgroups.locate import HINT_CONTROLLER, HINT_DELEGATE
from nsbox.isolation.cgroups.owner import HOST_LEAF
from nsbox.linux.binding import is_unknown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

CONTROLLERS = ("memory", "pids", "cpu", "cpuset", "io")
"""What is enabled for the children of the own cgroup, where no v1 hierarchy has it."""

_MOVE_ROUNDS = 20
_CPUS_AT_MOST = 1 << 16  # far above any NR_CPUS; keeps "0-4000000000" small


class MaxFile(IntegerFile):  # type: ignore[misc]
    """A number or ``max``, which is None here."""

    def sanitize_get(self, value: str) -> int | None:
        return None if value == "max" else int(value)

    def sanitize_set(self, value: int | None) -> int | str:
        return "max" if value is None else int(value)


class CpuMaxFile(BaseFileInterface):  # type: ignore[misc]
    """``quota period`` in microseconds; written from a number of CPUs."""

    def sanitize_get(self, value: str) -> float | None:
        quota, period = value.split()
        return None if quota == "max" else int(quota) / int(period)

    def sanitize_set(self, value: float) -> str:
        quota, period = cpu_quota(value)
        return f"{quota} {period}"


class IoStatFile(BaseFileInterface):  # type: ignore[misc]
    """``254:0 rbytes=1 wbytes=2 ...``: the sums over all devices."""

    readonly = True

    def sanitize_get(self, value: str) -> dict[str, int]:
        sums: dict[str, int] = {}
        for line in value.splitlines():
            for word in line.split()[1:]:
                key, separator, number = word.partition("=")
                if separator and number.isdigit():
                    sums[key] = sums.get(key, 0) + int(number)
        return sums


class Unified(ControlFiles):
    """The files of one v2 cgroup that nsbox uses."""

    kill = FlagFile("cgroup.kill", writeonly=True)
    freeze = FlagFile("cgroup.freeze")
    events = DictFile("cgroup.events", readonly=True)
    cpu_stat = DictFile("cpu.stat", readonly=True)
    cpu_max: Any = CpuMaxFile("cpu.max")
    cpuset_cpus = BaseFileInterface("cpuset.cpus")
    cpuset_cpus_effective = BaseFileInterface("cpuset.cpus.effective", readonly=True)
    memory_max: Any = MaxFile("memory.max")
    memory_swap_max: Any = MaxFile("memory.swap.max")
    memory_oom_group = FlagFile("memory.oom.group")
    memory_current = IntegerFile("memory.current", readonly=True)
    memory_peak = IntegerFile("memory.peak", readonly=True)
    memory_events = DictFile("memory.events", readonly=True)
    pids_max: Any = MaxFile("pids.max")
    pids_current = IntegerFile("pids.current", readonly=True)
    pids_peak = IntegerFile("pids.peak", readonly=True)
    io_max = BaseFileInterface("io.max")
    io_stat: Any = IoStatFile("io.stat")


FEATURE_FILES = {
    "cgroup.memory": ("memory", "memory.max"),
    "cgroup.memory.swap": ("memory", "memory.swap.max"),
    "cgroup.pids": ("pids", "pids.max"),
    "cgroup.cpu": ("cpu", "cpu.max"),
    "cgroup.cpuset": ("cpuset", "cpuset.cpus"),
    "cgroup.io": ("io", "io.max"),
    "cgroup.freeze": ("unified", "cgroup.freeze"),
    "cgroup.kill": ("unified", "cgroup.kill"),
}
"""Feature -> (place, file that must be writable)."""


def cpu_quota(cpus: float) -> tuple[int, int]:
    """Return (quota, period) in microseconds for a number of CPUs.

    The kernel takes no quota below 1 ms, so small shares get the longest period (1 s).
    """
    period = 100_000 if cpus >= 0.01 else 1_000_000
    return round(cpus * period), period


def parse_cpus(text: str) -> set[int]:
    """Return the CPUs of a list such as ``0-2,4``; `SyscallError` for more than a kernel has."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if first:
            end = int(last if dash else first) + 1
            if end > _CPUS_AT_MOST:
                raise SyscallError("write", errno.EINVAL, "cpuset.cpus")
            found.update(range(int(first), end))
    return found


def write_memory(directory: str, limit: int | None) -> None:
    """Limit memory, keep it out of swap, and let an OOM kill take the whole environment."""
    files = Unified(directory)
    if limit is not None:
        files.memory_max = limit
        try:
            files.memory_swap_max = 0
        except SyscallError as error:
            # No such file: the kernel has no swap accounting, and `Tree.capabilities` says so.
            if error.errno != errno.ENOENT:
                raise
    files.memory_oom_group = True


def write_cpuset(directory: str, cpus: str) -> None:
    """Pin to `cpus`; `SyscallError` (EINVAL) when not all of them can be had.

    The kernel accepts CPUs that the parent does not have, and then gives what it likes.
    """
    files = Unified(directory)
    files.cpuset_cpus = cpus
    if parse_cpus(files.cpuset_cpus_effective) != parse_cpus(cpus):
        raise SyscallError("write", errno.EINVAL, f"{directory}/cpuset.cpus")


def write_io(directory: str, limits: Sequence[Mapping[str, Any]]) -> None:
    """Limit bandwidth and operations per second of devices."""
    files = Unified(directory)
    for limit in limits:
        rates = [
            f"{key}={limit[key]}"
            for key in ("rbps", "wbps", "riops", "wiops")
            if limit.get(key) is not None
        ]
        if rates:
            files.io_max = " ".join([limit["device"], *rates])


def enable_controllers(base: str, wanted: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Hand `wanted` down from the own cgroup; return {controller: (reason, hint)} of failures.

    A cgroup other than the root that hands domain controllers down may hold no process itself
    ("no internal process"): the kernel answers EBUSY, and then every process of `base` is moved
    to its leaf ``nsbox.host``. Where that fails they are moved back.
    """
    failed: dict[str, tuple[str, str]] = {}
    try:
        available = read_text(f"{base}/cgroup.controllers").split()
        enabled = read_text(f"{base}/cgroup.subtree_control").split()
    except SyscallError as error:
        if is_unknown(error):
            raise
        return {name: (str(error), HINT_DELEGATE) for name in wanted}
    got = False
    for name in wanted:
        if name not in available:
            reason = f"controller {name} is not in {base}/cgroup.controllers"
            failed[name] = (reason, HINT_CONTROLLER)
        elif name in enabled:
            got = True
        else:
            refusal = _enable(base, name)
            if refusal is None:
                got = True
            else:
                failed[name] = (f"cannot hand {name} down: {refusal}", HINT_DELEGATE)
    if failed and not got:
        release_leaf(base)
    return failed


def _enable(base: str, name: str) -> OSError | None:
    path = f"{base}/cgroup.subtree_control"
    for _ in range(_MOVE_ROUNDS):
        try:
            write_text(path, f"+{name}")
            return None
        except SyscallError as error:
            if is_unknown(error):
                raise
            if error.errno != errno.EBUSY:
                return error
            last = error
        try:
            # Again while processes of the own cgroup fork faster than they are moved.
            move_processes(base, f"{base}/{HOST_LEAF}")
        except OSError as error:
            return error
    return last


def move_processes(source: str, target: str) -> None:
    """Move every process of one cgroup to another, which is made; `OSError` when one cannot be."""
    try:
        os.mkdir(target, 0o755)
    except FileExistsError:
        pass
    for process in read_processes(source):
        if process == 0:
            # Visible as 0 only: it belongs to a pid namespace outside ours.
            raise SyscallError("write", errno.ESRCH, f"{target}/cgroup.procs")
        try:
            write_text(f"{target}/cgroup.procs", str(process))
        except SyscallError as error:
            if error.errno != errno.ESRCH:  # it ended
                raise


def release_leaf(base: str) -> bool:
    """Undo `enable_controllers`, when ``nsbox.host`` is the only child of `base`.

    Returns whether the leaf is gone. Anything else below `base` may need its controllers, and
    then everything stays as it is.
    """
    try:
        with os.scandir(base) as entries:
            children = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        if children != [HOST_LEAF]:
            return HOST_LEAF not in children
        enabled = read_text(f"{base}/cgroup.subtree_control").split()
        if enabled:
            write_text(f"{base}/cgroup.subtree_control", " ".join(f"-{name}" for name in enabled))
        for _ in range(_MOVE_ROUNDS):
            move_processes(f"{base}/{HOST_LEAF}", base)
            try:
                os.rmdir(f"{base}/{HOST_LEAF}")
                return True
            except OSError as error:
                if error.errno != errno.EBUSY:
                    return False
    except OSError:
        pass  # somebody enables controllers for himself just now: his business, and his leaf
    return False
