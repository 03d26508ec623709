# SPDX-License-Identifier: Apache-2.0
"""What happens to a storm's processes, threads and clock; and the hosts that are killed whole."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from tests import leaks
from tests.storm.callers import TASKS, Callers
from tests.storm.ledger import Plan
from tests.storm.pools import POOLS, Subject
from tests.support import IS_ROOT, SLOW_MACHINE, family_of, host_program

KINDS = {
    "signals": 1.0, "interrupts": 0.5, "publish": 6.0, "close": 6.0, "clock": 4.0, "hosts": 4.0,
}  # fmt: skip
"""Kinds of strikes, and how many times `Plan.strike_every` is between two of each."""
VICTIMS = {
    "worker": 5.0, "PID 1": 5.0, "template": 1.0, "janitor": 1.0, "launcher": 0.3,
}  # fmt: skip
STOPPED = 0.3
"""Part of the strikes that are SIGSTOP, and SIGCONT up to `LONGEST_STOP` seconds later."""
LONGEST_STOP = 1.0
JUMPS = (-315_360_000, -3600, 3600, 315_360_000)
"""Seconds that the wall clock is set by: an hour and ten years, to and fro."""
GONE_WITHIN = 2.0
"""Seconds, times the plan's patience, after which nothing is left of a killed host."""
_INIT = re.compile(r"nsbox-[0-9a-f]{8}")

HOST = """
import os, sys, threading
import nsbox

version = nsbox.Function("app.handler", code=sys.argv[1], timeout=60).publish(store=sys.argv[2])
pool = nsbox.WarmPool(version, max_environments=3, provisioned=1)

def work(caller):
    number = 0
    while True:
        number += 1
        event = {"do": "echo", "caller": caller, "nonce": f"{caller}:{number}", "seconds": 0.002}
        answer = pool.invoke(event, tenant=[None, "red"][number % 8 == 0])
        is_right = (answer["caller"], answer["nonce"]) == (caller, event["nonce"])
        os.write(1, (f"{'right' if is_right else answer}" + chr(10)).encode())

for caller in range(4):
    threading.Thread(target=work, args=(caller,), daemon=True).start()
sys.stdin.read()
"""


class Clock:
    """The wall clock: the kernel's own in User-Mode Linux as root, else Python's in this process.

    A time namespace has no clock of its own for CLOCK_REALTIME.
    """

    def __init__(self) -> None:
        """It goes right."""
        self._is_own = SLOW_MACHINE and IS_ROOT
        self._offset = time.time() - time.monotonic()
        self._originals = time.time, time.time_ns

    def jump(self, seconds: float) -> None:
        """Set it to so many seconds from the right time."""
        offset = self._offset + seconds
        if self._is_own:
            time.clock_settime(time.CLOCK_REALTIME, time.monotonic() + offset)
        else:
            time.time = lambda: time.monotonic() + offset
            time.time_ns = lambda: int((time.monotonic() + offset) * 1e9)

    def restore(self) -> None:
        """Set it right."""
        self.jump(0)
        time.time, time.time_ns = self._originals


class Chaos:
    """Strikes from a thread of its own, while the callers call."""

    def __init__(self, plan: Plan, subject: Subject, callers: Callers) -> None:
        """Strikes nothing yet."""
        self._plan = plan
        self._subject = subject
        self._callers = callers
        self._over = threading.Event()
        self._stopped: list[tuple[float, int]] = []
        self._clock = Clock()
        self.done: Counter[str] = Counter()
        self.explained = 0
        """Calls that may have died of the kills."""
        self._threads = [
            threading.Thread(target=self._repeat, args=(name, strike, times), name=f"storm-{name}")
            for (name, times), strike in zip(
                KINDS.items(),
                (
                    self._strike, self._interrupt, self._publish, self._close, self._set_clock,
                    self._kill_a_host,
                ),
                strict=True,
            )
            if name not in plan.without
        ]  # fmt: skip

    @contextlib.contextmanager
    def raging(self) -> Iterator[None]:
        """Strikes in the body; in its end whoever stands still goes on."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in self._threads:  # the others wait for whom the first has stopped
                thread.join()
                self._go_on(float("inf"))
            self._clock.restore()

    def _repeat(self, name: str, strike: Callable[[random.Random], None], times: float) -> None:
        choices = random.Random(f"{self._plan.seed}/{name}")
        while not self._over.wait(choices.uniform(0.5, 1.5) * times * self._plan.strike_every):
            try:
                strike(choices)
            except Exception as error:  # noqa: BLE001 - told, and the rest goes on
                self._subject.ledger.wrong("storm", f"{name}: {error!r}")

    # -- processes --------------------------------------------------------------------------------

    def _strike(self, choices: random.Random) -> None:
        self._go_on(time.monotonic())
        found = self._victim(choices)
        if found is None:
            return
        what, pid, parent = found
        is_stop = choices.random() < STOPPED
        fd = _open_child(pid, parent)
        if fd is None:
            return
        with contextlib.suppress(ProcessLookupError):
            # Told before it is done: the call that dies may be judged first.
            if not is_stop and what != "janitor":
                self.explained += 1 if what in ("worker", "PID 1") else self._under_way_at_most()
            signal.pidfd_send_signal(fd, signal.SIGSTOP if is_stop else signal.SIGKILL)
            self.done[f"{what} {'stopped' if is_stop else 'killed'}"] += 1
            if is_stop:
                longest = LONGEST_STOP * self._plan.patience
                due = time.monotonic() + choices.uniform(0.0, longest)
                self._stopped.append((due, os.dup(fd)))
        os.close(fd)

    def _under_way_at_most(self) -> int:
        return TASKS * self._plan.threads + sum(
            int(settings["max_environments"]) for settings in POOLS.values()
        )

    def _victim(self, choices: random.Random) -> tuple[str, int, int] | None:
        """Return what, its number and its parent's; None: there is none of that kind now."""
        launcher = leaks.current_launcher()
        if launcher is None or not launcher.alive:
            return None
        what = choices.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        if what == "launcher":
            return what, launcher.pid, os.getpid()
        children = leaks.children(launcher.pid)
        if what in ("template", "janitor"):
            found = [child.pid for child in children if child.name == f"nsbox-{what}"]
            return (what, choices.choice(found), launcher.pid) if found else None
        inits = [child.pid for child in children if _INIT.fullmatch(child.name)]
        if not inits:
            return None
        init = choices.choice(inits)
        workers = [child.pid for child in leaks.children(init)]
        if what == "worker" and workers:
            return what, choices.choice(workers), init
        return "PID 1", init, launcher.pid

    def _go_on(self, now: float) -> None:
        """Have those go on that have stood still for long enough."""
        for stopped in [stopped for stopped in self._stopped if stopped[0] <= now]:
            self._stopped.remove(stopped)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(stopped[1], signal.SIGCONT)
            os.close(stopped[1])

    def _kill_a_host(self, choices: random.Random) -> None:
        """Start another host whose pool is called, kill it, and look for what it has left."""
        ledger = self._subject.ledger
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        places = str(self._subject.code), str(self._subject.store)
        with host_program(HOST, *places, bufsize=0, **pipes) as host:
            if choices.random() < 0.7 and host.stdout:  # in its calls; else as it starts
                host.stdout.readline()
            self._over.wait(choices.uniform(0.0, 0.3) * self._plan.patience)
            host.kill()
            out, err = host.communicate()
            end = time.monotonic() + GONE_WITHIN * self._plan.patience
            while (family := family_of(host.pid)) and time.monotonic() < end:
                time.sleep(0.02)
        lines = out.splitlines()
        self.done["host killed in its calls" if lines else "host killed in its start"] += 1
        wrong = [line for line in lines[:-1] if line != b"right"]
        if family or wrong or err:
            ledger.wrong("host", f"{family} are left of a killed one; {wrong}; {err.decode()}")

    # -- threads, pools, clock --------------------------------------------------------------------

    def _interrupt(self, choices: random.Random) -> None:
        windows = self._callers.windows
        # The main thread's, which a signal interrupts, as often as all others together.
        number = 0 if choices.random() < 0.5 else choices.randrange(len(windows))
        if windows[number].interrupt():
            self.done["interrupt by a signal" if number == 0 else "interrupt of a thread"] += 1

    def _publish(self, _choices: random.Random) -> None:
        self._subject.publish_next()
        self.done["published"] += 1

    def _close(self, choices: random.Random) -> None:
        self.done[f"closed and {self._subject.close_short(choices)}"] += 1

    def _set_clock(self, choices: random.Random) -> None:
        self._clock.jump(choices.choice(JUMPS))
        self.done["clock set"] += 1

    def check_killed(self) -> None:
        """No more calls have died than the kills explain."""
        killed = self._subject.ledger.count("killed")
        if killed > self.explained:
            text = f"{killed} calls died, of {self.explained} that kills explain"
            self._subject.ledger.wrong("killed", text)


def _open_child(pid: int, parent: int) -> int | None:
    """Return a pidfd of a process that is still the child of `parent`; None: it is not."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if pid in [child.pid for child in leaks.children(parent)]:
        return fd
    os.close(fd)  # its number may be another's by now
    return None
