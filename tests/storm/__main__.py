# SPDX-License-Identifier: Apache-2.0
"""Warm pools under everything at once, and a ledger of every call.

    scripts/test --storm                            # a minute
    scripts/test --storm --seconds 180 --seed 7     # other choices
    scripts/test --storm --json FILE                # the ledger's summary

Exits with 1 when anything was not as it is promised: an answer that is wrong, another call's or
given twice, a call that is lost or outlives its deadline, numbers that do not add up, something
left behind, memory that grows. What each check is: CONTRIBUTING.md. tests/pool/test_storm.py runs
it for some seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.growth import raise_descriptor_limit
from benchmarks.harness import host_facts, own_directory, parser_of
from benchmarks.memory import Memory, map_large_blocks
from tests import leaks
from tests.storm.callers import Callers
from tests.storm.chaos import KINDS, Chaos
from tests.storm.ledger import Plan
from tests.storm.pools import POOLS, Subject
from tests.support import PATIENCE

import nsbox

DRAIN = 30.0
"""Seconds, times the plan's patience, in which idle pools are closed."""
SAMPLES_AT = (0.4, 0.6, 0.8, 1.0)
"""When memory is looked at, as parts of the time: after a warm-up."""


class Storm:
    """One run: pools, callers, strikes, and what was found to be wrong."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        """Makes the pools; `directory` is for the functions' code and store."""
        self._plan = plan
        self._subject = Subject(plan, directory)
        self._memory = Memory()
        self._callers = Callers(plan, self._subject)
        self._chaos = Chaos(plan, self._subject, self._callers)

    def run(self) -> list[str]:
        """Let it all happen, from the main thread; return what was wrong, some of each kind."""
        ledger = self._subject.ledger
        before = threading.excepthook

        def note(failed: threading.ExceptHookArgs) -> None:
            name = failed.thread.name if failed.thread else "a thread"
            ledger.wrong("thread", f"{name} ended by {failed.exc_value!r}")
            before(failed)

        threading.excepthook = note
        try:
            self._run()
        finally:
            threading.excepthook = before
        return ledger.violations

    def _run(self) -> None:
        ledger = self._subject.ledger
        with self._subject:
            watch = threading.Thread(target=self._watch, name="storm-watch")
            with self._chaos.raging():
                watch.start()
                self._callers.run_main()
                self._callers.join()
            watch.join()
            ledger.close()
            self._subject.check_sums()
            begin = time.monotonic()
        if time.monotonic() - begin > DRAIN * self._plan.patience:
            ledger.wrong("end", f"closing took {time.monotonic() - begin:.0f} seconds")
        self._subject.check_ends()
        self._chaos.check_killed()
        if self._plan.watches_memory:
            for text in self._memory.growth():
                ledger.wrong("memory", text)

    def _watch(self) -> None:
        """Look at memory now and then, and end it when the time is over."""
        begin = time.monotonic()
        for part in SAMPLES_AT:
            time.sleep(max(0.0, begin + part * self._plan.seconds - time.monotonic()))
            if self._plan.watches_memory:
                with self._callers.paused():
                    launcher = leaks.current_launcher()
                    self._memory.sample(None if launcher is None else launcher.pid)
        self._callers.stop()

    def summary(self) -> dict[str, Any]:
        """Return the ledger, the pools' numbers, the strikes and the memory, for JSON."""
        return {
            **self._subject.ledger.summary(),
            **self._subject.summary(),
            "strikes": dict(sorted(self._chaos.done.items())),
            "calls that kills explain": self._chaos.explained,
            "memory, MB": self._memory.samples,
        }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "scripts/test --storm")
    parser.add_argument("--seconds", type=float, default=60.0, help="default: 60")
    parser.add_argument("--threads", type=int, default=16, help="calling threads; default: 16")
    parser.add_argument("--seed", type=int, default=0, help="of all choices; default: 0")
    parser.add_argument(
        "--without", action="append", default=[], choices=KINDS, help="leave these strikes out"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the summary is written")
    options = parser.parse_args(arguments)
    if options.seconds <= 0 or options.threads < 1:
        parser.error("--seconds and --threads must be positive")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the storm as the command line says; returns 1 when something was wrong."""
    options = _parse(arguments)
    facts: dict[str, Any] = {**host_facts(), "seed": options.seed, "seconds": options.seconds}
    # Starts that fail are what is asked for here, and calls are told of them.
    logging.getLogger("nsbox").setLevel(logging.CRITICAL)
    map_large_blocks()
    raise_descriptor_limit(8 * len(POOLS) * options.threads)
    multiprocessing.current_process()  # what modules open for good when imported is no leak
    with own_directory("nsbox-storm-") as directory:
        look = partial(leaks.snapshot, str(directory / "tmp"))
        before = look()
        plan = Plan(
            seconds=options.seconds,
            threads=options.threads,
            seed=options.seed,
            patience=PATIENCE,
            without=tuple(options.without),
        )
        storm = Storm(plan, directory)
        violations = storm.run()
        summary = {"host": facts, **storm.summary()}
        # A version holds a lock in the store for as long as it is there.
        del storm
        gc.collect()
        nsbox.shutdown()
        summary["left"] = leaks.await_clean(before, look, grace=10.0 * PATIENCE)
        violations += [f"left behind: {kind}: {items}" for kind, items in summary["left"].items()]
    text = json.dumps(summary, indent=1)
    if options.json is not None:
        options.json.write_text(text + "\n")
    sys.stdout.write(f"{text}\n")
    for violation in violations:
        sys.stdout.write(f"WRONG: {violation}\n")
    sys.stdout.write("" if violations else "Nothing was wrong.\n")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
