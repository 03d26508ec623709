# SPDX-License-Identifier: Apache-2.0
"""What a sandbox costs: `/bin/true` in nsbox, against a C floor, bubblewrap, crun and subprocess.

    python benchmarks/sandbox.py                    # JSON lines on stdout, the table on stderr
    python benchmarks/sandbox.py --json FILE        # JSON lines in FILE, the table on stdout
    python benchmarks/sandbox.py --quick --only floor,nsbox

Nothing is asserted: a target that is not met is a line in the table, and the exit status is 0.
See benchmarks/README.md for what each series is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    PER_SECOND,
    Report,
    Target,
    measure_interleaved,
    parser_of,
)
from benchmarks.peers import (
    BareServer,
    FloorServer,
    UnavailableError,
    bubblewrap_argv,
    check_runs,
    crun_argv,
    crun_prefix,
    run_subprocess,
)
from benchmarks.subject import Standby, import_nsbox, rate
from benchmarks.suite import STARTERS, Suite, rate_names

COMMAND = ["/bin/true"]
FEWEST_ROUNDS = 30
QUICK_ROUNDS = 8
PEERS = {
    "floor": ["floor", *rate_names("floor")],
    "bwrap": ["bwrap", *rate_names("bwrap")],
    "bare": [*rate_names("bare-steps"), *rate_names("bare")],
    "crun": ["crun"],
    "subprocess": ["subprocess"],
    "nsbox": [
        *("nsbox-fresh", "nsbox-cold", "nsbox-run", "nsbox-existing"),
        *rate_names("nsbox"),
    ],
}
CASE_NAMES = [name for names in PEERS.values() for name in names]

TARGETS = (
    Target("nsbox-fresh", "floor", 2.0),
    Target("nsbox-cold", "floor", 2.0),
    Target("nsbox-fresh", "bwrap", 1.0),
    Target("nsbox-cold", "bwrap", 1.0),
    Target("nsbox-existing", "subprocess", 2.5),
    Target("nsbox-rate-8", "floor-rate-8", 0.5, PER_SECOND),
    Target("bare-steps-rate-8", "floor-rate-8", unit=PER_SECOND),
    Target("bare-rate-8", "floor-rate-8", unit=PER_SECOND),
    Target("nsbox-rate-8", "bare-rate-8", unit=PER_SECOND),
    Target("nsbox-rate-2", "floor-rate-2", unit=PER_SECOND),
    Target("nsbox-rate-8", "bwrap-rate-8", unit=PER_SECOND),
    Target("nsbox-run", "floor"),
    Target("bwrap", "floor"),
    Target("crun", "floor"),
)


class CommandSuite(Suite):
    """`/bin/true`, by each peer."""

    def _add_all(self) -> None:
        add = {
            "floor": self._add_floor,
            "bwrap": self._add_bubblewrap,
            "bare": self._add_bare,
            "crun": self._add_crun,
            "subprocess": lambda: self._add("subprocess", lambda: run_subprocess(COMMAND)),
            "nsbox": self._add_nsbox,
        }
        for peer, names in PEERS.items():
            self._attempt(peer, names, add[peer])

    def _add_floor(self) -> None:
        server = self._stack.enter_context(FloorServer(self._compiled(), COMMAND))
        server.one()
        self._add("floor", server.one)
        self._add_rates("floor", server.rate)

    def _add_bubblewrap(self) -> None:
        argv = bubblewrap_argv(COMMAND)
        check_runs(argv)
        # From C, as the floor is: Python's own cost is nsbox's alone to bear, and Python threads
        # that start bubblewrap would queue for the interpreter lock.
        server = self._stack.enter_context(FloorServer(self._compiled(), argv, spawn=True))
        self._add("bwrap", server.one)
        self._add_rates("bwrap", server.rate)

    def _add_crun(self) -> None:
        argv = crun_argv(self._directory, COMMAND)
        prefix = crun_prefix()
        check_runs([*prefix, *argv])
        program = self._compiled()
        server = self._stack.enter_context(FloorServer(program, argv, spawn=True, prefix=prefix))
        self._add("crun", server.one)

    def _add_bare(self) -> None:
        import_nsbox()
        for name, kind in (("bare-steps", "steps"), ("bare", "whole")):
            server = BareServer(kind, STARTERS[-1])
            self._stack.callback(server.close)
            self._add_rates(name, server.rate)

    def _add_nsbox(self) -> None:
        nsbox = import_nsbox()
        standby = Standby(nsbox)
        self._stack.callback(standby.default)
        make = nsbox.ExecutionEnvironment
        existing = self._stack.enter_context(make())
        _expect_success(existing.run(COMMAND))

        def fresh() -> dict[str, float]:
            standby.ready(make)
            used, closed = _timed_environment(make)
            return {"nsbox-fresh": used, "nsbox-teardown": closed}

        def cold() -> dict[str, float]:
            standby.none(make)
            return {"nsbox-cold": _timed_environment(make)[0]}

        def run_once() -> float:
            standby.ready(make)
            return _timed_run(nsbox.run)

        def start() -> None:
            with make() as environment:
                result = environment.run(COMMAND)
            _expect_success(result)

        def starts(count: int, starters: int) -> float:
            standby.ready(make)
            return rate(start, count, starters)

        self._add_case("nsbox-fresh", fresh)
        self._add_case("nsbox-cold", cold)
        self._add("nsbox-run", run_once)
        self._add("nsbox-existing", lambda: _timed_run(existing.run))
        self._add_rates("nsbox", starts)


def _timed_environment(make: Callable[[], Any]) -> tuple[float, float]:
    """Microseconds of making an environment and running in it, and of closing it."""
    begin = time.perf_counter_ns()
    with make() as environment:
        result = environment.run(COMMAND)
        done = time.perf_counter_ns()
    closed = time.perf_counter_ns()
    _expect_success(result)
    return (done - begin) / 1e3, (closed - done) / 1e3


def _expect_success(result: object) -> None:
    if getattr(result, "returncode", None) != 0:
        raise UnavailableError(f"{COMMAND[0]} did not end with status 0: {result!r}"[:500])


def _timed_run(run: Callable[[list[str]], object]) -> float:
    begin = time.perf_counter_ns()
    result = run(COMMAND)
    duration = time.perf_counter_ns() - begin
    _expect_success(result)
    return duration / 1e3


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the JSON lines there, not to stdout")
    parser.add_argument("--rounds", type=positive, default=60, help="measured rounds (default 60)")
    parser.add_argument("--warmup", type=positive, default=3, help="rounds before (default 3)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds: a smoke test")
    parser.add_argument(
        "--pause", type=float, default=0.003, help="seconds between measurements (default 0.003)"
    )
    parser.add_argument(
        "--only",
        metavar="NAME[,NAME]",
        default="",
        help=f"only the cases that begin so: {', '.join(CASE_NAMES)}",
    )
    options = parser.parse_args(arguments)
    for prefix in filter(None, options.only.split(",")):
        if not any(name.startswith(prefix) for name in CASE_NAMES):
            parser.error(f"--only: no case begins with {prefix!r}")
    if options.pause < 0:
        parser.error(f"--pause: expected seconds, not {options.pause}")
    return options


def positive(text: str) -> int:
    """A number of the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, not {text}")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark as the command line says; always 0 unless the command line is wrong."""
    options = _parse(arguments)
    rounds = QUICK_ROUNDS if options.quick else options.rounds
    report = Report()
    wanted = [prefix for prefix in options.only.split(",") if prefix]
    with CommandSuite(wanted, report) as suite:
        for cases in (suite.single, suite.rates):
            measure_interleaved(
                cases, report, rounds=rounds, warmup=options.warmup, pause=options.pause
            )
    write_report(report, TARGETS, options.json, rounds)
    return 0


def write_report(report: Report, targets: Sequence[Target], path: str | None, rounds: int) -> None:
    """Writes JSON lines to `path` and the table to stdout, or to stdout and stderr."""
    if path is None:
        report.write_json_lines(sys.stdout)
        table = sys.stderr
    else:
        with Path(path).open("w", encoding="utf-8") as stream:
            report.write_json_lines(stream)
        table = sys.stdout
    report.write_table(
        [t for t in targets if t.bound is not None or t.name in report.series], table
    )
    if rounds < FEWEST_ROUNDS:
        table.write(f"\nOnly {rounds} rounds: publish nothing below {FEWEST_ROUNDS}.\n")


if __name__ == "__main__":
    sys.exit(main())
