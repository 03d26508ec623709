# SPDX-License-Identifier: Apache-2.0
"""The memory of environments: the proportional set size of all their processes."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

from benchmarks.peers import UnavailableError

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
