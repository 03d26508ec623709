# SPDX-License-Identifier: Apache-2.0
"""What a call through a warm pool costs, beside one on a held environment and process pools.

    python benchmarks/pool.py                    # JSON lines on stdout, the table on stderr
    python benchmarks/pool.py --json FILE        # JSON lines in FILE, the table on stdout
    python benchmarks/pool.py --idle 100         # grow to 100 idle environments, not to 500

Nothing is asserted: a target that is not met is a line in the table, and the exit status is 0.
See benchmarks/README.md for what each series is.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import queue
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.commands import QUICK_ROUNDS, positive, write_report
from benchmarks.echo import PoolEcho
from benchmarks.functions import HANDLER, event_of, expect, timed_calls
from benchmarks.growth import raise_descriptor_limit
from benchmarks.harness import (
    MICROSECONDS,
    PER_SECOND,
    Case,
    Report,
    Target,
    describe,
    measure_interleaved,
    progress,
)
from benchmarks.subject import import_nsbox, microseconds, rate
from benchmarks.suite import Suite

CALLERS = (1, 2, 8, 32)
WORKERS = 8
"""Environments of the pool, and processes of its peer."""
CALLS = 20
CALLS_OF_ALL = 480
"""Of all callers of one sample together; a multiple of each number of them."""
IDLE = (1, 10, 100, 500)
BLOCKS = 15
"""Samples of `CALLS` calls at each number of idle environments."""
SMALL = "64M"
NO_CASE = "-"


def _rates(peer: str) -> list[str]:
    return [f"{peer}-rate-{callers}" for callers in CALLERS]


PEERS = {
    "held": ["held"],
    "held-async": ["held-async"],
    "pooled": ["pooled"],
    "pooled-async": ["pooled-async"],
    "pooled-rate": _rates("pooled"),
    "queue-rate": _rates("queue"),
    "executor-rate": _rates("executor"),
}
PREFIXES = ("held", "pooled", "queue", "executor")
"""Of the series of calls."""
CASE_NAMES = [name for names in PEERS.values() for name in names]

TARGETS = (
    Target("pooled", "held", 1.5),
    Target("pooled-async", "held", 2.5),
    Target("pooled-rate-8", "executor-rate-8", 3.0, PER_SECOND),
    Target(f"pooled-at-{IDLE[-1]}", "pooled-at-1", 1.25),
)
# Told without a bound.
RATIOS = (
    Target("pooled-async", "held-async"),
    *(Target(f"pooled-rate-{n}", f"executor-rate-{n}", unit=PER_SECOND) for n in (1, 2, 32)),
    *(Target(f"pooled-rate-{n}", f"queue-rate-{n}", unit=PER_SECOND) for n in CALLERS),
    *(Target(f"pooled-call-{n}", f"executor-call-{n}") for n in CALLERS),
    Target(f"held-at-{IDLE[-1]}", "held-at-1"),
)


class PoolSuite(Suite):
    """A handler that returns its event, called through a pool; the peers do the same without."""

    def __init__(self, wanted: Sequence[str], report: Report) -> None:
        """Nothing is started yet. `wanted` are prefixes of case names; empty means all."""
        super().__init__(wanted, report)
        self._nsbox = import_nsbox()
        self._event = event_of("100B")
        self._shared: Any = None

    def _add_all(self) -> None:
        add: dict[str, Callable[[], None]] = {
            "held": lambda: self._add_calls("held", self._held().invoke),
            "held-async": lambda: self._add_awaited("held-async", self._held().invoke_async),
            "pooled": lambda: self._add_calls("pooled", self._pool().invoke),
            "pooled-async": lambda: self._add_awaited("pooled-async", self._pool().invoke_async),
            "pooled-rate": lambda: self._add_callers("pooled", self._pool().invoke),
            "queue-rate": lambda: self._add_callers("queue", self._queue()),
            "executor-rate": lambda: self._add_callers("executor", self._executor().call),
        }
        for peer, names in PEERS.items():
            self._attempt(peer, names, add[peer])

    # -- what is called ---------------------------------------------------------------------------

    def _version(self, **fields: Any) -> Any:  # noqa: ANN401 - dynamic
        code = self._directory / "code"
        code.mkdir(exist_ok=True)
        (code / "app.py").write_text(HANDLER, encoding="utf-8")
        function = self._nsbox.Function("app.handler", code=code, timeout=60, **fields)
        return function.publish(store=self._directory / "store")

    def _held(self) -> Any:  # noqa: ANN401 - dynamic
        environment = self._nsbox.ExecutionEnvironment(self._version())
        self._stack.enter_context(environment).invoke(self._event)
        return environment

    def _pool(self) -> Any:  # noqa: ANN401 - dynamic
        """The one pool of all cases but those of `Idle`."""
        if self._shared is None:
            pool = self._nsbox.WarmPool(
                self._version(),
                provisioned=WORKERS,
                max_environments=WORKERS,
                acquire_timeout=60.0,
            )
            self._shared = self._stack.enter_context(pool)
        return self._shared

    def _queue(self) -> Callable[[Any], Any]:
        """The least that a pool can do: environments go round, and nobody looks after them."""
        idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(WORKERS):
            idle.put(self._held())

        def call(event: Any) -> Any:  # noqa: ANN401 - a JSON value
            environment = idle.get()
            try:
                return environment.invoke(event)
            finally:
                idle.put(environment)

        return call

    def _executor(self) -> PoolEcho:
        return self._stack.enter_context(PoolEcho(WORKERS))

    # -- how it is called -------------------------------------------------------------------------

    def _add_calls(self, name: str, call: Callable[[Any], Any]) -> None:
        self._add(name, partial(timed_calls, call, self._event, 2, CALLS))

    def _add_awaited(self, name: str, call: Callable[[Any], Awaitable[Any]]) -> None:
        runner = self._stack.enter_context(asyncio.Runner())

        async def calls() -> list[float]:
            samples = []
            for _ in range(2 + CALLS):
                begin = time.perf_counter_ns()
                answer = await call(self._event)
                samples.append((time.perf_counter_ns() - begin) / 1e3)
            expect(answer, self._event)
            return samples[2:]

        self._add(name, lambda: runner.run(calls()))

    def _add_callers(self, peer: str, call: Callable[[Any], Any]) -> None:
        for name, callers in zip(_rates(peer), CALLERS, strict=True):
            if self._wants(name):
                wait = f"{peer}-call-{callers}"
                measure = partial(self._measure_callers, call, callers, name, wait)
                self.rates.append(Case(name, measure, PER_SECOND, {wait: MICROSECONDS}))

    def _measure_callers(
        self, call: Callable[[Any], Any], callers: int, name: str, wait: str
    ) -> dict[str, float | Sequence[float]]:
        """Calls a second of so many threads together, and microseconds of each call."""
        waits: list[float] = []

        def one() -> None:
            begin = time.perf_counter_ns()
            answer = call(self._event)
            waits.append((time.perf_counter_ns() - begin) / 1e3)
            expect(answer, self._event)

        return {name: rate(one, CALLS_OF_ALL, callers), wait: waits}

    # -- beside idle ones -------------------------------------------------------------------------

    def measure_idle(self, steps: Sequence[int], advance: Callable[[int], object]) -> None:
        """A warm call through a pool with so many idle environments, and one that is held."""
        small = {}
        if importlib.import_module("nsbox.host.features").probe("cgroup.memory")[0]:
            small = {"limits": self._nsbox.Limits(memory_max=SMALL)}
        for step in steps:
            try:
                self._measure_at(step, small)
            except Exception as error:  # noqa: BLE001 - named, as in every other benchmark
                self._report.missing[f"pooled-at-{step}"] = describe(error)
                return
            advance(step)

    def _measure_at(self, step: int, small: dict[str, Any]) -> None:
        version = self._version(**small)
        begin = time.perf_counter_ns()
        pool = self._nsbox.WarmPool(version, provisioned=step, max_environments=step)
        fill = (time.perf_counter_ns() - begin) / 1e3
        try:
            with self._nsbox.ExecutionEnvironment(version) as held:
                for _ in range(BLOCKS):
                    for name, call in ((f"pooled-at-{step}", pool), (f"held-at-{step}", held)):
                        samples = timed_calls(call.invoke, self._event, 2, CALLS)
                        self._report.add(MICROSECONDS, {name: samples})
        finally:
            close = microseconds(pool.close)
        figures = {f"pool-fill-{step}": fill / step, f"pool-close-{step}": close / step}
        self._report.add(MICROSECONDS, figures)


def idle_up_to(most: int) -> list[int]:
    """The numbers of idle environments to measure at."""
    return [step for step in IDLE if step <= most]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/pool.py", description="What a call through a warm pool costs."
    )
    parser.add_argument("--rounds", type=positive, default=30, help="default: 30")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds: does it run?")
    parser.add_argument(
        "--idle", type=int, default=IDLE[-1], help=f"idle environments at most; default: {IDLE[-1]}"
    )
    parser.add_argument("--json", metavar="FILE", help="JSON lines there, the table on stdout")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark as the command line says; always 0 unless the command line is wrong."""
    options = _parse(arguments)
    rounds = QUICK_ROUNDS if options.quick else options.rounds
    raise_descriptor_limit(options.idle)
    report = Report()
    with PoolSuite([], report) as suite:
        for cases in (suite.single, suite.rates):
            measure_interleaved(cases, report, rounds=rounds, warmup=2, pause=0.003)
    with PoolSuite([NO_CASE], report) as suite:
        suite.measure_idle(idle_up_to(options.idle), lambda step: progress(f"{step} idle"))
    progress("")
    write_report(report, [*TARGETS, *RATIOS], options.json, rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
