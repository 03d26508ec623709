# SPDX-License-Identifier: Apache-2.0
"""The memory of environments: the proportional set size of all their processes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection
from pathlib import Path

import psutil

from benchmarks.peers import UnavailableError

_PSS = re.compile(r"^Pss:\s+(\d+) kB$", re.M)


def environments_pss(ids: Collection[str]) -> list[float]:
    """Megabytes of each environment of this process that is named; all must be found.

    An environment is the process nsbox-ID, which is a descendant of this one, and what descends
    from that. Pages shared with others count in part: PSS of all processes adds up to what is used.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().removeprefix("nsbox-") in ids:
                family = [process, *process.children(recursive=True)]
                found.append(sum(_pss(member.pid) for member in family))
    if len(found) != len(ids):
        raise UnavailableError(f"of {len(ids)} environments {len(found)} have a process nsbox-ID")
    return found


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
