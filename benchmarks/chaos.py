# SPDX-License-Identifier: Apache-2.0
"""Kills from outside during a soak: workers, PID 1s, and once the launcher; and new versions."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator

import psutil

from benchmarks.soaked import HOUSE, Plan, Subject
from benchmarks.subject import launcher_process
from benchmarks.users import TASKS

_INIT = re.compile(r"nsbox-[0-9a-f]{8}")
LAUNCHER_AT = 0.2
"""When the launcher is killed, as part of the time."""


class Chaos:
    """What happens to the pools' processes, told by the soak's own thread."""

    def __init__(self, plan: Plan, subject: Subject) -> None:
        """Kills nothing yet."""
        self._plan = plan
        self._subject = subject
        self._choices = random.Random(f"{plan.seed}/chaos")
        self._done: Counter[str] = Counter()
        self.kills = 0
        """Of one environment each, so of one call at most."""
        self.shared = 0
        """Calls that may have died of the launcher's end."""

    def moments(self, end: float) -> Iterator[float]:
        """Kill now and then until `end`; yield in between which part of the time is over."""
        begin = time.monotonic()
        while (now := time.monotonic()) < end:
            part = (now - begin) / (end - begin)
            yield part
            if part >= LAUNCHER_AT and not self._done["launcher"]:
                self._kill_launcher()
            elif self._choices.random() < 0.2:
                self._subject.publish_next()
            else:
                self._kill_one()
            pause = self._choices.uniform(0.5, 1.5) * self._plan.kill_every
            time.sleep(max(0.0, min(pause, end - time.monotonic())))
        yield 1.0

    def rows(self) -> list[list[str]]:
        """What was done, as rows of a table."""
        done = ", ".join(f"{what} {count}" for what, count in sorted(self._done.items()))
        text = f"{self._subject.ledger.killed} died by {self.kills} kills"
        return [["killed", done], ["calls that died", f"{text} and the launcher's end"]]

    def _kill_launcher(self) -> None:
        launcher = launcher_process()
        if launcher is not None and _kill(launcher, os.getpid()):
            self._done["launcher"] += 1
            environments = sum(int(settings["max_environments"]) for settings in HOUSE.values())
            self.shared += environments + TASKS * self._plan.threads

    def _kill_one(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = launcher_process()
            if launcher is None:
                return
            inits = [child for child in launcher.children() if _INIT.fullmatch(child.name())]
            if not inits:
                return
            init = self._choices.choice(inits)
            workers = init.children()
            if workers and self._choices.random() < 0.5:
                what, victim, parent = "worker", self._choices.choice(workers), init.pid
            else:
                what, victim, parent = "PID 1", init, launcher.pid
            if _kill(victim, parent):
                self._done[what] += 1
                self.kills += 1


def _kill(process: psutil.Process, parent: int) -> bool:
    """Kill a process that is still the child of `parent`: its number may be another's by now."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if process.ppid() != parent:
            return False
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
    finally:
        os.close(fd)
    return True
