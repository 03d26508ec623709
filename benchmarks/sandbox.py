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
import contextlib
import importlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from harness import MICROSECONDS, PER_SECOND, Case, Report, Target, describe, measure_interleaved
from peers import (
    FloorServer,
    UnavailableError,
    bubblewrap_argv,
    check_runs,
    compile_floor,
    crun_argv,
    crun_prefix,
    run_subprocess,
)

COMMAND = ["/bin/true"]
STARTERS = (2, 8)
SANDBOXES_PER_STARTER = 4
FEWEST_ROUNDS = 30
QUICK_ROUNDS = 8
CASE_NAMES = ("floor", "bwrap", "crun", "subprocess", "nsbox-fresh", "nsbox-run", "nsbox-existing")
RATE_NAMES = tuple(f"{peer}-rate-{n}" for n in STARTERS for peer in ("floor", "bwrap", "nsbox"))

TARGETS = (
    Target("nsbox-fresh", "floor", 2.0),
    Target("nsbox-fresh", "bwrap", 1.0),
    Target("nsbox-existing", "subprocess", 2.5),
    Target("nsbox-rate-8", "floor-rate-8", 0.5, PER_SECOND),
    Target("nsbox-rate-2", "floor-rate-2", unit=PER_SECOND),
    Target("nsbox-rate-8", "bwrap-rate-8", unit=PER_SECOND),
    Target("nsbox-run", "floor"),
    Target("bwrap", "floor"),
    Target("crun", "floor"),
)


class Suite:
    """The cases that were asked for and can run here; holds their servers and environments open."""

    def __init__(self, wanted: list[str], report: Report) -> None:
        """Nothing is started yet. `wanted` are prefixes of case names; empty means all."""
        self._wanted = wanted
        self._report = report
        self._stack = contextlib.ExitStack()
        self._directory = Path()
        self._program: Path | None = None
        self.single: list[Case] = []
        self.rates: list[Case] = []

    def __enter__(self) -> Suite:
        """Starts every peer; one that cannot run is named in the report."""
        with contextlib.ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="nsbox-bench-")
            self._directory = Path(stack.enter_context(temporary))
            self._directory.chmod(0o755)  # crun enters its bundle as the container's user
            self._stack = stack
            self._attempt("floor", self._add_floor)
            self._attempt("bwrap", self._add_bubblewrap)
            self._attempt("crun", self._add_crun)
            self._add("subprocess", lambda: run_subprocess(COMMAND))
            self._attempt("nsbox", self._add_nsbox)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends every peer and removes the temporary directory."""
        self._stack.close()

    def _wants(self, name: str) -> bool:
        return not self._wanted or any(name.startswith(prefix) for prefix in self._wanted)

    def _attempt(self, name: str, add: Callable[[], None]) -> None:
        cases = [case for case in (*CASE_NAMES, *RATE_NAMES) if case.startswith(name)]
        if not any(map(self._wants, cases)):
            return
        try:
            add()
        except Exception as error:  # noqa: BLE001 - whatever a peer raises, it is named and left out
            text = str(error) if isinstance(error, UnavailableError) else describe(error)
            self._report.missing[name] = text

    def _add(self, name: str, measure: Callable[[], float]) -> None:
        if self._wants(name):
            self.single.append(Case(name, lambda: {name: measure()}, MICROSECONDS))

    def _add_rates(self, peer: str, measure: Callable[[int, int], float]) -> None:
        for starters in STARTERS:
            name = f"{peer}-rate-{starters}"
            if self._wants(name):
                count = starters * SANDBOXES_PER_STARTER
                self.rates.append(_rate_case(name, measure, count, starters))

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

    def _compiled(self) -> Path:
        if self._program is None:
            self._program = compile_floor(self._directory)
        return self._program

    def _add_nsbox(self) -> None:
        nsbox = _import_nsbox()
        existing = self._stack.enter_context(nsbox.ExecutionEnvironment())
        _expect_success(existing.run(COMMAND))

        def fresh() -> dict[str, float]:
            begin = time.perf_counter_ns()
            with nsbox.ExecutionEnvironment() as environment:
                result = environment.run(COMMAND)
                done = time.perf_counter_ns()
            closed = time.perf_counter_ns()
            _expect_success(result)
            return {"nsbox-fresh": (done - begin) / 1e3, "nsbox-teardown": (closed - done) / 1e3}

        if self._wants("nsbox-fresh"):
            self.single.append(Case("nsbox-fresh", fresh, MICROSECONDS))
        self._add("nsbox-run", lambda: _timed_run(nsbox.run))
        self._add("nsbox-existing", lambda: _timed_run(existing.run))
        self._add_rates("nsbox", lambda count, starters: _nsbox_rate(nsbox, count, starters))


def _rate_case(name: str, measure: Callable[[int, int], float], count: int, starters: int) -> Case:
    return Case(name, lambda: {name: measure(count, starters)}, PER_SECOND)


def _import_nsbox() -> ModuleType:
    """The installed nsbox, else the one of this checkout."""
    try:
        return importlib.import_module("nsbox")
    except ModuleNotFoundError as error:
        if error.name != "nsbox":
            raise
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
    return importlib.import_module("nsbox")


def _expect_success(result: object) -> None:
    if getattr(result, "returncode", None) != 0:
        raise UnavailableError(f"{COMMAND[0]} did not end with status 0: {result!r}"[:500])


def _timed_run(run: Callable[[list[str]], object]) -> float:
    begin = time.perf_counter_ns()
    result = run(COMMAND)
    duration = time.perf_counter_ns() - begin
    _expect_success(result)
    return duration / 1e3


def _nsbox_rate(nsbox: ModuleType, count: int, starters: int) -> float:
    """`count` environments, each made, used and closed, by `starters` threads; per second."""
    barrier = threading.Barrier(starters + 1)
    errors: list[Exception] = []
    each = count // starters

    def start() -> None:
        barrier.wait()
        try:
            for _ in range(each):
                with nsbox.ExecutionEnvironment() as environment:
                    result = environment.run(COMMAND)
                _expect_success(result)
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


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the JSON lines there, not to stdout")
    parser.add_argument("--rounds", type=_positive, default=60, help="measured rounds (default 60)")
    parser.add_argument("--warmup", type=_positive, default=3, help="rounds before (default 3)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds: a smoke test")
    parser.add_argument(
        "--pause", type=float, default=0.003, help="seconds between measurements (default 0.003)"
    )
    parser.add_argument(
        "--only",
        metavar="NAME[,NAME]",
        default="",
        help=f"only the cases that begin so: {', '.join((*CASE_NAMES, *RATE_NAMES))}",
    )
    options = parser.parse_args(arguments)
    for prefix in filter(None, options.only.split(",")):
        if not any(name.startswith(prefix) for name in (*CASE_NAMES, *RATE_NAMES)):
            parser.error(f"--only: no case begins with {prefix!r}")
    if options.pause < 0:
        parser.error(f"--pause: expected seconds, not {options.pause}")
    return options


def _positive(text: str) -> int:
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
    with Suite(wanted, report) as suite:
        for cases in (suite.single, suite.rates):
            measure_interleaved(
                cases, report, rounds=rounds, warmup=options.warmup, pause=options.pause
            )
    targets = [t for t in TARGETS if t.bound is not None or t.name in report.series]
    if options.json is None:
        report.write_json_lines(sys.stdout)
        table = sys.stderr
    else:
        with Path(options.json).open("w", encoding="utf-8") as stream:
            report.write_json_lines(stream)
        table = sys.stdout
    report.write_table(targets, table)
    if rounds < FEWEST_ROUNDS:
        table.write(f"\nOnly {rounds} rounds: publish nothing below {FEWEST_ROUNDS}.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
