# SPDX-License-Identifier: Apache-2.0
"""The memory of environments, all their processes together, and of host and launcher over time."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
from pathlib import Path

import psutil

from benchmarks.peers import UnavailableError

_M_MMAP_THRESHOLD = -3  # malloc.h; once set it is not adapted any more
_PSS = re.compile(r"^Pss:\s+(\d+) kB$", re.M)
_KERNELS_OWN = re.compile(r"^(?:Slab|KernelStack|PageTables|Percpu):\s+(\d+) kB$", re.M)


def environment_pss(pid: int) -> float:
    """Megabytes of the environment whose PID 1 is `pid`: of that process and all below it.

    Pages shared with others count in part: PSS of all processes adds up to what is used.
    """
    init = psutil.Process(pid)
    return sum(pss(process.pid) for process in (init, *init.children(recursive=True)))


def kernel_memory() -> float:
    """Megabytes that the kernel has for itself, the whole machine's: of proc_meminfo(5) Slab,
    KernelStack, PageTables and Percpu.

    Not what is left when all else is taken from MemTotal: that has the free pages of each processor
    in it, which come and go by megabytes.
    """
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    return sum(int(size) for size in _KERNELS_OWN.findall(text)) * 1024 / 1e6


def pss(pid: int) -> float:
    """Megabytes of a process, shared pages in part."""
    path = Path(f"/proc/{pid}/smaps_rollup")
    try:
        match = _PSS.search(path.read_text(encoding="ascii"))
    except PermissionError:
        # The processes are not dumpable, so that no other of the same user may read their memory.
        raise UnavailableError(f"only root may read {path}") from None
    if match is None:
        raise UnavailableError(f"{path} has no Pss")
    return int(match[1]) * 1024 / 1e6


MARGIN = 1.05
ROOM = 2.0
"""Megabytes that memory may grow by at most, besides a twentieth: what the allocator keeps and
cannot give back since something small lives in the same page, and tables that grow by doubling."""


class Memory:
    """The resident memory of this process and its launcher, early and late in a run."""

    def __init__(self) -> None:
        """No samples yet."""
        self.samples: list[dict[str, float]] = []
        """Megabytes, of each who was there."""

    def sample(self, launcher: int | None) -> None:
        """Looks; to be called when nothing is under way. `launcher` is its pid."""
        # What the allocator keeps for later, in an arena for each thread, is free.
        gc.collect()
        trim()
        found = {"host": resident(os.getpid())}
        if launcher is not None:
            found[f"launcher {launcher}"] = resident(launcher)
        self.samples.append(found)

    def growth(self) -> list[str]:
        """Tells who has grown by more than the tolerance from its first sample to the last."""
        first: dict[str, float] = {}
        for sample in self.samples:
            first = {**sample, **first}
        return [
            f"the {name} grew from {first[name]:.1f} to {size:.1f} MB"
            for name, size in self.samples[-1].items()
            if size > first[name] * MARGIN + ROOM
        ]


def map_large_blocks() -> None:
    """Has glibc give large blocks back when they are free, so that memory in use can be told."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 << 10)


def trim() -> None:
    """Gives what the allocator keeps for later back to the kernel."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident(pid: int) -> float:
    """Megabytes of a process in memory; 0: it has just ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return pages * os.sysconf("SC_PAGESIZE") / 1e6
