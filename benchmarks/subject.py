# SPDX-License-Identifier: Apache-2.0
"""nsbox as the thing that is measured: found, told what to keep on standby, started by threads."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

SETTLE = 0.05
"""Seconds after a change of their number: a birth takes 3 ms, removed ones leave work behind."""


def import_nsbox() -> ModuleType:
    """The installed nsbox, else the one of this checkout."""
    try:
        return importlib.import_module("nsbox")
    except ModuleNotFoundError as error:
        if error.name != "nsbox":
            raise
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
    return importlib.import_module("nsbox")


Make = Callable[[], contextlib.AbstractContextManager[Any]]
"""Makes an environment; one such function is one kind of standby environments."""


def launcher_process() -> psutil.Process | None:
    """This process's launcher, if it has one now; the newest, while a dead one is removed."""
    found = [p.pid for p in psutil.Process().children() if p.name() == "nsbox-launcher"]
    return psutil.Process(max(found)) if found else None


class Standby:
    """How many standby environments nsbox keeps ready, per kind; one of these for a whole run."""

    def __init__(self, nsbox: ModuleType) -> None:
        """Changes nothing yet."""
        # Releases before 0.1.0 have the old name; they are compared with.
        self._set = getattr(nsbox, "set_standby", None) or nsbox.set_blanks
        self._kept: int | None = None
        self._prepared: set[int] = set()

    def none(self, make: Make) -> None:
        """The next environment that `make` makes is born when it is asked for."""
        if self._keep(0, make):
            with make():
                pass  # one that was kept until now is taken by this
            time.sleep(SETTLE)

    def ready(self, make: Make) -> None:
        """One standby environment of the kind that `make` makes is there."""
        if self._keep(1, make):
            with make():
                pass  # asks for the first one
        # It is refilled behind the caller's back, and nothing outside tells when.
        time.sleep(SETTLE)

    def default(self) -> None:
        """Back to nsbox's default."""
        if self._kept == 0:
            self._set(1)
        self._kept = None

    def _keep(self, count: int, make: Make) -> bool:
        """Sets the number; returns whether this kind has not been prepared for it yet."""
        if self._kept != count:
            self._set(count)
            self._kept = count
            self._prepared.clear()
        new = id(make) not in self._prepared
        self._prepared.add(id(make))
        return new


def microseconds(call: Callable[[], object]) -> float:
    """How long `call` takes."""
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e3


def rate(one: Callable[[], object], count: int, starters: int) -> float:
    """`count` calls of `one` by `starters` threads that begin together; per second."""
    barrier = threading.Barrier(starters + 1)
    errors: list[Exception] = []
    each = count // starters

    def start() -> None:
        barrier.wait()
        try:
            for _ in range(each):
                one()
        except Exception as error:  # noqa: BLE001 - handed to the measuring thread below
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(starters)]
    for thread in threads:
        thread.start()
    barrier.wait()
    begin = time.perf_counter_ns()
    for thread in threads:
        thread.join()
    duration = time.perf_counter_ns() - begin
    if errors:
        raise errors[0]
    return each * starters * 1e9 / duration
