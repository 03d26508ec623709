# SPDX-License-Identifier: Apache-2.0
"""The memory of environments, all their processes together, and of host and launcher over time."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import statistics
from pathlib import Path

import psutil

from benchmarks.peers import UnavailableError
from benchmarks.subject import launcher_process

_PSS = re.compile(r"^Pss:\s+(\d+) kB$", re.M)


def environment_pss(pid: int) -> float:
    """Megabytes of the environment whose PID 1 is `pid`: of that process and all below it.

    Pages shared with others count in part: PSS of all processes adds up to what is used.
    """
    init = psutil.Process(pid)
    return sum(_pss(process.pid) for process in (init, *init.children(recursive=True)))


def _pss(pid: int) -> float:
    path = Path(f"/proc/{pid}/smaps_rollup")
    try:
        match = _PSS.search(path.read_text(encoding="ascii"))
    except PermissionError:
        # The processes are not dumpable, so that no other of the same user may read their memory.
        raise UnavailableError(f"only root may read {path}") from None
    if match is None:
        raise UnavailableError(f"{path} has no Pss")
    return int(match[1]) * 1024 / 1e6


MARGIN = 1.10
"""What memory may grow by at most, besides `ROOM`: a table or an arena that one more call fills."""
ROOM = {"host": 12.0, "launcher": 2.0}
"""Megabytes. The host's are one arena of the allocator with two of the largest answers in it."""


class Memory:
    """The resident memory of this process and its launcher, early and late in a run."""

    def __init__(self) -> None:
        """No samples yet."""
        self._early: dict[str, list[float]] = {name: [] for name in ROOM}
        self._late: dict[str, list[float]] = {name: [] for name in ROOM}

    def sample(self, part: float) -> None:
        """Looks, if `part` of the run is of interest: after a warm-up, or near its end."""
        into = self._early if 0.4 <= part < 0.6 else self._late if part >= 0.8 else None
        if into is None:
            return
        # What the allocator keeps for the next large answer, in an arena for each thread, is free.
        gc.collect()
        _trim()
        into["host"].append(_resident(os.getpid()))
        launcher = launcher_process()
        if launcher is not None:
            into["launcher"].append(_resident(launcher.pid))

    def growth(self) -> list[str]:
        """Tells who has grown by more than the tolerance."""
        found = []
        for name, room in ROOM.items():
            early, late = self._medians(name)
            if late > early * MARGIN + room:
                found.append(f"the {name} grew from {early:.1f} to {late:.1f} MB")
        return found

    def rows(self) -> list[list[str]]:
        """Rows of a table: early and late."""
        rows = []
        for name in ROOM:
            early, late = self._medians(name)
            rows.append([f"memory of the {name}", f"{early:.1f} MB, at the end {late:.1f} MB"])
        return rows

    def _medians(self, name: str) -> tuple[float, float]:
        early, late = self._early[name], self._late[name]
        return (statistics.median(early) if early else 0.0, statistics.median(late or [0.0]))


def _trim() -> None:
    with contextlib.suppress(AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _resident(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0.0  # it has just ended
    return pages * os.sysconf("SC_PAGESIZE") / 1e6
