# SPDX-License-Identifier: Apache-2.0
"""A function's cold start, its warm call and its reuse, beside those of the peers."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.echo import PoolEcho, SocketEcho, answer_argv, subprocess_answer
from benchmarks.growth import Growth
from benchmarks.harness import Report
from benchmarks.peers import (
    FloorServer,
    UnavailableError,
    bubblewrap_argv,
    check_runs,
    crun_argv,
    crun_prefix,
)
from benchmarks.subject import Standby, import_nsbox, rate
from benchmarks.suite import Suite, rate_names

SIZES = {"100B": 100, "64KiB": 64 << 10, "1MiB": 1 << 20, "6MiB": 6 << 20, "rows": 1 << 20}
# Calls of one sample: a first one that is not counted, where that is cheap, and the counted ones.
CALLS = {"100B": (2, 20), "64KiB": (1, 10), "1MiB": (0, 2), "6MiB": (0, 1), "rows": (0, 2)}
HEAVY = "numpy"
LIBRARY = "msgspec"  # decodes large events where it is preloaded, and answers where it is there
HANDLER = "def handler(event, context):\n    return event\n"
HEAVY_HANDLER = f"import {HEAVY}\n" + HANDLER
FLOOR_STEP = "floor-step-"
COLD_STEP = "cold-step-"


def event_of(name: str) -> dict[str, str] | list[dict[str, Any]]:
    """One of `SIZES`: a JSON object whose text has that many bytes, or a list of small ones."""
    size = SIZES[name]
    if name == "rows":
        return [row_of(number) for number in range(size // len(json.dumps(row_of(size))))]
    empty = len(json.dumps({"x": ""}))
    return {"x": "." * (size - empty)}


def row_of(number: int) -> dict[str, Any]:
    """A small object, as rows of a table are."""
    price = number % 10_000 / 100
    return {"id": number, "name": f"item {number}", "price": price, "sold": None, "tags": ["a"]}


def _sizes(prefix: str) -> list[str]:
    return [f"{prefix}-{size}" for size in SIZES]


PEERS = {
    "floor-answer": ["floor-answer"],
    "floor-rate": rate_names("floor"),
    "bwrap-answer": ["bwrap-answer"],
    "crun-answer": ["crun-answer"],
    "subprocess-answer": ["subprocess-answer"],
    "echo": _sizes("echo"),
    "pool": _sizes("pool"),
    "cold": ["cold"],
    "cold-steps": ["cold-steps"],
    "cold-standby": ["cold-standby"],
    "cold-exec": ["cold-exec"],
    "warm": _sizes("warm"),
    f"warm-rows-{LIBRARY}": [f"warm-rows-{LIBRARY}"],
    "async": _sizes("async"),
    "reset": ["reset"],
    "never": ["never"],
    f"{HEAVY}-cold": [f"{HEAVY}-cold"],
    f"{HEAVY}-preload": [f"{HEAVY}-preload"],
    "nsbox-rate": rate_names("nsbox"),
}
CASE_NAMES = [name for names in PEERS.values() for name in names]


class FunctionSuite(Suite):
    """A handler that returns its event; everywhere else a program that does the same."""

    def __init__(self, wanted: Sequence[str], report: Report) -> None:
        """Nothing is started yet. `wanted` are prefixes of case names; empty means all."""
        super().__init__(wanted, report)
        self._nsbox = import_nsbox()
        self._standby = Standby(self._nsbox)
        self._event = event_of("100B")
        self._line = json.dumps(self._event)
        self._floor: Callable[[], float] | None = None

    def _add_all(self) -> None:
        self._stack.callback(self._standby.default)
        add: dict[str, Callable[[], None]] = {
            "floor-answer": self._add_floor,
            "floor-rate": self._add_floor_rate,
            "bwrap-answer": self._add_bubblewrap,
            "crun-answer": self._add_crun,
            "subprocess-answer": self._add_subprocess,
            "echo": lambda: self._add_echo("echo", self._stack.enter_context(SocketEcho()).call),
            "pool": lambda: self._add_echo("pool", self._stack.enter_context(PoolEcho()).call),
            "cold": lambda: self._add_cold("cold"),
            "cold-steps": self._add_cold_steps,
            "cold-standby": self._add_cold_standby,
            "cold-exec": lambda: self._add_cold("cold-exec", start="exec"),
            "warm": lambda: self._add_echo("warm", self._warm_environment().invoke),
            f"warm-rows-{LIBRARY}": self._add_library,
            "async": self._add_async,
            "reset": self._add_reset,
            "never": self._add_never,
            f"{HEAVY}-cold": self._add_heavy,
            f"{HEAVY}-preload": self._add_preloaded,
            "nsbox-rate": self._add_rate,
        }
        for peer, names in PEERS.items():
            self._attempt(peer, names, add[peer])

    def growth(self) -> Growth:
        """Environments of the plain handler, to be made many."""
        make = self._make(self._version())
        return Growth(make, self._event, self._standby, self._report, self._floor)

    # -- peers ------------------------------------------------------------------------------------

    def _answering(
        self, argv: list[str], *, spawn: bool = False, prefix: Sequence[str] = ()
    ) -> FloorServer:
        server = FloorServer(self._compiled(), argv, spawn=spawn, prefix=prefix, event=self._line)
        self._stack.enter_context(server).answer()
        return server

    def _add_floor(self) -> None:
        server = self._answering(answer_argv())
        self._floor = server.answer

        def measure() -> dict[str, float]:
            total = server.answer()
            steps = {FLOOR_STEP + name: time for name, time in server.steps().items()}
            return {"floor-answer": total, **steps}

        self._add_case("floor-answer", measure)

    def _add_floor_rate(self) -> None:
        server = self._stack.enter_context(FloorServer(self._compiled(), ["/bin/true"]))
        self._add_rates("floor", server.rate)

    def _add_bubblewrap(self) -> None:
        argv = bubblewrap_argv(answer_argv())
        check_runs(argv, self._line)
        server = self._answering(argv, spawn=True)
        self._add("bwrap-answer", server.answer)

    def _add_crun(self) -> None:
        argv, prefix = crun_argv(self._directory, answer_argv()), crun_prefix()
        check_runs([*prefix, *argv], self._line)
        server = self._answering(argv, spawn=True, prefix=prefix)
        self._add("crun-answer", server.answer)

    def _add_subprocess(self) -> None:
        argv = answer_argv()
        self._add("subprocess-answer", lambda: subprocess_answer(argv, self._line))

    def _add_echo(self, peer: str, call: Callable[[Any], Any]) -> None:
        for size in SIZES:
            self._add(f"{peer}-{size}", partial(timed_calls, call, event_of(size), *CALLS[size]))

    def _add_library(self) -> None:
        if importlib.util.find_spec(LIBRARY) is None:
            raise UnavailableError(f"{LIBRARY} is not installed for this interpreter")
        call = self._warm_environment(preload=[LIBRARY]).invoke
        measure = partial(timed_calls, call, event_of("rows"), *CALLS["rows"])
        self._add(f"warm-rows-{LIBRARY}", measure)

    # -- nsbox ------------------------------------------------------------------------------------

    def _version(self, source: str = HANDLER, **fields: Any) -> Any:  # noqa: ANN401 - dynamic
        code = self._directory / ("heavy" if source == HEAVY_HANDLER else "plain")
        code.mkdir(exist_ok=True)
        (code / "app.py").write_text(source, encoding="utf-8")
        function = self._nsbox.Function("app.handler", code=code, **{"timeout": 60, **fields})
        return function.publish(store=self._directory / "store")

    def _make(self, version: Any) -> Callable[[], Any]:  # noqa: ANN401 - dynamic
        return lambda: self._nsbox.ExecutionEnvironment(version)

    def _answer(self, environment: Any) -> None:  # noqa: ANN401 - dynamic
        expect(environment.invoke(self._event), self._event)

    def _warm_environment(self, **fields: Any) -> Any:  # noqa: ANN401 - dynamic
        environment = self._stack.enter_context(self._make(self._version(**fields))())
        self._answer(environment)
        return environment

    def _cold(self, make: Callable[[], Any]) -> tuple[float, float]:
        """Microseconds from nothing to the answer, and of the close after it."""
        begin = time.perf_counter_ns()
        with make() as environment:
            answer = environment.invoke(self._event)
            done = time.perf_counter_ns()
        closed = time.perf_counter_ns()
        expect(answer, self._event)
        return (done - begin) / 1e3, (closed - done) / 1e3

    def _add_cold(
        self,
        name: str,
        source: str = HANDLER,
        **fields: Any,  # noqa: ANN401 - dynamic
    ) -> None:
        make = self._make(self._version(source, **fields))

        def measure() -> dict[str, float]:
            self._standby.none(make)
            answered, closed = self._cold(make)
            return {name: answered, **({"cold-close": closed} if name == "cold" else {})}

        measure()
        self._add_case(name, measure)

    def _add_cold_steps(self) -> None:
        make = self._make(self._version())

        def measure() -> dict[str, float]:
            self._standby.none(make)
            times = [time.perf_counter_ns()]
            environment = make()
            times.append(time.perf_counter_ns())
            environment.init()
            times.append(time.perf_counter_ns())
            environment.invoke(self._event)
            times.append(time.perf_counter_ns())
            environment.close()
            times.append(time.perf_counter_ns())
            return {
                COLD_STEP + step: (times[n + 1] - times[n]) / 1e3
                for n, step in enumerate(("birth", "init", "invoke", "close"))
            }

        measure()
        self._add_case("cold-steps", measure)

    def _add_cold_standby(self) -> None:
        make = self._make(self._version())

        def measure() -> float:
            self._standby.ready(make)
            return self._cold(make)[0]

        measure()
        self._add("cold-standby", measure)

    def _add_async(self) -> None:
        environment = self._warm_environment()
        runner = self._stack.enter_context(asyncio.Runner())

        async def calls(event: object, first: int, count: int) -> list[float]:
            samples = []
            for _ in range(first + count):
                begin = time.perf_counter_ns()
                answer = await environment.invoke_async(event)
                samples.append((time.perf_counter_ns() - begin) / 1e3)
            expect(answer, event)
            return samples[first:]

        runner.run(calls(self._event, 0, 1))
        for size in SIZES:
            measure = partial(_run, runner, calls, event_of(size), *CALLS[size])
            self._add(f"async-{size}", measure)

    def _add_reset(self) -> None:
        environment = self._warm_environment(reuse="reset")
        # Back to back: what a reset leaves for later falls on the call after it.
        self._add("reset", partial(timed_calls, environment.invoke, self._event, 1, 5))

    def _add_never(self) -> None:
        make = self._make(self._version(reuse="never"))

        def call(event: object) -> object:
            with make() as environment:
                return environment.invoke(event)

        def measure() -> list[float]:
            self._standby.ready(make)
            return timed_calls(call, self._event, 1, 3)

        measure()
        self._add("never", measure)

    def _heavy_layer(self) -> Path:
        spec = importlib.util.find_spec(HEAVY)
        if spec is None or not spec.submodule_search_locations:
            raise UnavailableError(f"{HEAVY} is not installed for this interpreter")
        package = Path(spec.submodule_search_locations[0])
        layer = self._directory / "layer"
        # A wheel keeps its shared libraries beside the package.
        for source in (package, package.with_name(f"{HEAVY}.libs")):
            target = layer / "python" / source.name
            if source.is_dir() and not target.exists():
                ignored = shutil.ignore_patterns("tests", "__pycache__")
                shutil.copytree(source, target, ignore=ignored)
        return layer

    def _add_heavy(self) -> None:
        self._add_cold(f"{HEAVY}-cold", HEAVY_HANDLER, layers=[self._heavy_layer()])

    def _add_preloaded(self) -> None:
        self._heavy_layer()
        self._add_cold(f"{HEAVY}-preload", HEAVY_HANDLER, preload=[HEAVY])

    def _add_rate(self) -> None:
        make = self._make(self._version())

        def start() -> None:
            with make() as environment:
                self._answer(environment)

        def measure(count: int, starters: int) -> float:
            self._standby.ready(make)
            return rate(start, count, starters)

        start()
        self._add_rates("nsbox", measure)


def _run(
    runner: asyncio.Runner,
    calls: Callable[[object, int, int], Coroutine[None, None, list[float]]],
    event: object,
    first: int,
    count: int,
) -> list[float]:
    return runner.run(calls(event, first, count))


def expect(answer: object, event: object) -> None:
    """Refuses an answer that is not the event."""
    if answer != event:
        raise UnavailableError(f"the answer was {str(answer)[:100]}")


def timed_calls(call: Callable[[Any], Any], event: object, first: int, count: int) -> list[float]:
    """Microseconds of `count` calls, after `first` that are not counted."""
    samples = []
    for _ in range(first + count):
        begin = time.perf_counter_ns()
        answer = call(event)
        samples.append((time.perf_counter_ns() - begin) / 1e3)
    expect(answer, event)
    return samples[first:]
