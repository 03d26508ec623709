# SPDX-License-Identifier: Apache-2.0
"""Make system calls of nsbox fail, one at a time, and judge what becomes of it.

`Program` is a host under tests/faults/tracer.c; what it does is tests/faults/subject.py.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import random
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.errnos import ERRNOS
from tests.support import PATIENCE, SOURCE

HERE = Path(__file__).parent
SCENARIOS = ("cold", "birth", "run", "invoke", "reset", "freeze", "close")
CLASSES = ("host", "launcher", "helper", "template", "clone", "init", "worker", "command")
"""Whose calls fail: a helper is another child of the launcher, a clone is PID 1 in its birth."""
_TRACED = {1: "host", 2: "launcher", 3: "helper", 4: "template", 5: "init", 6: "worker"}
_HEADER = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"
SLOW = 4.0 * PATIENCE
"""Seconds, over five times the usual, after which somebody has waited for what never came."""
HANGS = 60.0 * PATIENCE

_LOCKS = ["capset", "landlock_restrict_self", "mount", "pivot_root", "seccomp", "setgroups"]
_LOCKS += ["sethostname", "setresgid", "setresuid", "umount2"]
ESSENTIAL = defaultdict(frozenset[str], clone=frozenset(_LOCKS), template=frozenset(["clone3"]))
"""What a birth cannot do without: no environment, however these fail.

A template that cannot enter the launcher's namespaces ends, and another gives birth.
"""


class Fault(NamedTuple):
    """The `at`-th `call` of a class of process in a scenario fails with `error`."""

    who: str
    scenario: str
    call: str
    error: str
    at: int

    def __str__(self) -> str:
        return "/".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Fault:
        who, scenario, call, error, at = text.split("/")
        return cls(who, scenario, call, error, int(at))


class Verdict(NamedTuple):
    fault: Fault
    is_met: bool
    wrong: str
    """Why it did not hold; "" when it did."""
    answer: str
    seconds: float


def call_numbers() -> dict[str, int]:
    lines = re.findall(r"#define __NR_(\w+) (\d+)", Path(_HEADER).read_text())
    return {name: int(number) for name, number in lines}


def build_tracer(directory: Path) -> Path:
    program = directory / "tracer"
    subprocess.run(["cc", "-O1", "-o", program, HERE / "tracer.c"], check=True)
    return program


def class_name(number: int, scenario: str) -> str:
    name = _TRACED[number]
    if name == "init" and scenario in ("cold", "birth"):
        return "clone"
    if name == "worker" and scenario in ("run", "freeze"):
        return "command"
    return name


class Program:
    """A host whose system calls, and those of all that it starts, can be made to fail."""

    def __init__(self, tracer: Path) -> None:
        self._tracer = tracer
        self._numbers = call_numbers()
        self._counts = Path(tempfile.mkstemp(prefix="counts-")[1])
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def counts(self, scenario: str) -> dict[str, dict[str, int]]:
        """Return how often each class makes each call in a scenario."""
        told = self._ask([scenario])
        if told is None or "not held" in told:
            raise AssertionError(f"{scenario} without a fault: {told}")
        names = {number: name for name, number in self._numbers.items()}
        found: dict[str, dict[str, int]] = {}
        for line in self._counts.read_text().splitlines():
            class_, call, times = map(int, line.split())
            if class_ and call in names:
                found.setdefault(class_name(class_, scenario), {})[names[call]] = times
        return found

    def meet(self, fault: Fault) -> Verdict:
        verdict = self._meet(fault)
        # Twice, or it was another program that had the processors.
        return self._meet(fault) if verdict.wrong.startswith("took") else verdict

    def _meet(self, fault: Fault) -> Verdict:
        number = next(
            number for number in _TRACED if class_name(number, fault.scenario) == fault.who
        )
        error = getattr(errno, fault.error)
        told = self._ask([fault.scenario, number, self._numbers[fault.call], error, fault.at])
        if told is None:
            return Verdict(fault, True, "the host has ended, or hangs", "", HANGS)
        answer = told.get("answer", "")
        wrong = told.get("not held", "") or judge(fault, told)
        return Verdict(fault, bool(told.get("met")), wrong, answer, told.get("seconds", 0.0))

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(30 * PATIENCE)
            except subprocess.TimeoutExpired:
                self._kill()
            self._forget()
        self._counts.unlink()

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, and wait until it can be asked."""
        path = os.pathsep.join([SOURCE, *filter(None, sys.path)])
        self._process = subprocess.Popen(
            [self._tracer, self._counts, sys.executable, HERE / "subject.py"],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._rest = b""
        assert self._hear() == "ready"
        return self._process

    def _ask(self, what: object) -> Any:
        process = self._process or self.start()
        assert process.stdin is not None
        process.stdin.write(json.dumps(what).encode() + b"\n")
        process.stdin.flush()
        answer = self._hear()
        if answer is None:
            self._kill()
            self._forget()
        return answer

    def _hear(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], HANGS)
            data = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def _kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)  # and with the tracer all that it traces
        self._process.wait()

    def _forget(self) -> None:
        assert self._process is not None
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process = None


def judge(fault: Fault, told: dict[str, Any]) -> str:
    """Say what is wrong with how the call that met a fault ended, or ""."""
    answer, seconds = told["answer"], told["seconds"]
    if answer.startswith(("untyped", "wrong")):
        return "not a typed error"
    if seconds > SLOW + 5 * told["usual"]:
        return f"took {seconds:.1f} s"
    if told.get("met") and not answer and fault.call in ESSENTIAL[fault.who]:
        return "an environment without it"
    return ""


def describe(verdict: Verdict) -> str:
    """Return a line about it, which begins with what repeats it."""
    met = "" if verdict.is_met else " (not met)"
    told = verdict.answer or "succeeded"
    return f"--fault={verdict.fault}{met}: {verdict.wrong or 'held'}; {told}; {verdict.seconds} s"


def choose(
    counts: dict[str, dict[str, int]], scenario: str, seed: int, occurrences: int
) -> list[Fault]:
    """Return each call with each of its errors: the first occurrence, and later ones by chance."""
    chosen = []
    for who, calls in counts.items():
        for call, times in calls.items():
            if (who, call) == ("host", "prlimit64"):
                continue  # it asks for its own limits, which cannot fail
            for error in ERRNOS.get(call, "").split():
                if (who, call) == ("launcher", "write") and error in ("ENOSPC", "EDQUOT"):
                    continue  # its files are the kernel's, which are never full
                chance = random.Random(f"{seed}/{who}/{scenario}/{call}/{error}")
                later = chance.sample(range(2, times + 1), min(occurrences, times) - 1)
                for at in (1, *sorted(later)):
                    chosen.append(Fault(who, scenario, call, error, at))
    return chosen


def each(
    tracer: Path, groups: Iterable[list[Fault]], programs: int, tell: Callable[[Verdict], None]
) -> None:
    """Have so many programs meet all faults, a group (of one scenario) at a time."""
    todo: queue.SimpleQueue[list[Fault]] = queue.SimpleQueue()
    for group in groups:
        todo.put(group)

    def work() -> None:
        program = Program(tracer)
        try:
            while True:
                try:
                    group = todo.get_nowait()
                except queue.Empty:
                    return
                for fault in group:
                    tell(program.meet(fault))
        finally:
            program.close()

    threads = [threading.Thread(target=work) for _ in range(programs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def table(verdicts: Iterable[Verdict]) -> str:
    """Return held/of of each class in each scenario, as text."""
    cells: dict[tuple[str, str], list[int]] = {}
    for verdict in verdicts:
        if verdict.is_met:
            for scenario in (verdict.fault.scenario, "all"):
                cell = cells.setdefault((verdict.fault.who, scenario), [0, 0])
                cell[0] += not verdict.wrong
                cell[1] += 1
    columns = (*SCENARIOS, "all")
    lines = ["".join(f"{word:>12}" for word in ("", *columns))]
    for who in CLASSES:
        row = [cells.get((who, scenario)) for scenario in columns]
        words = [f"{cell[0]}/{cell[1]}" if cell else "-" for cell in row]
        lines.append(f"{who:>12}" + "".join(f"{word:>12}" for word in words))
    return "\n".join(lines)
