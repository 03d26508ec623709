# SPDX-License-Identifier: Apache-2.0
"""Warm pools under everything at once: many callers, failures of every kind, kills from outside.

    python benchmarks/soak.py                        # three minutes
    python benchmarks/soak.py --minutes 1 --seed 7   # other choices
    python benchmarks/soak.py --threads 8

Exits with 1 when anything was not as it is promised: an answer that is wrong or another call's, a
call that outlived its deadline, numbers that do not add up, something left behind, memory that
grows. What each check is: benchmarks/README.md. tests/pool/test_soak.py runs it for some seconds.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.chaos import Chaos
from benchmarks.growth import raise_descriptor_limit
from benchmarks.harness import host_facts, write_markdown
from benchmarks.memory import Memory, map_large_blocks
from benchmarks.soaked import HOUSE, Ledger, Plan, Subject
from benchmarks.subject import import_nsbox
from benchmarks.users import Users

DRAIN = 30.0
"""Seconds, times the plan's patience, in which idle pools are closed."""


SAMPLES_AT = (0.4, 0.6, 0.8, 1.0)
"""When memory is looked at, as parts of the time: after a warm-up and the launcher's end."""


class Soak:
    """One run: pools, callers, kills, and what was found to be wrong."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        """Makes the pools; `directory` is for the functions' code and store."""
        self._plan = plan
        self.subject = Subject(plan, directory)
        self.memory = Memory()
        self._chaos = Chaos(plan, self.subject)
        self._users = Users(plan, self.subject)

    def run(self) -> list[str]:
        """Lets it all happen; returns what was wrong, at most some of each kind."""
        ledger = self.subject.ledger
        before = threading.excepthook

        def note(failed: threading.ExceptHookArgs) -> None:
            name = failed.thread.name if failed.thread else "a thread"
            ledger.wrong("thread", f"{name} ended by {failed.exc_value!r}")
            before(failed)

        threading.excepthook = note
        try:
            self._run(ledger)
        finally:
            threading.excepthook = before
        return ledger.violations

    def _run(self, ledger: Ledger) -> None:
        with self.subject:
            end = time.monotonic() + self._plan.seconds
            self._users.start()
            due = list(SAMPLES_AT)
            for part in self._chaos.moments(end):
                if due and part >= due[0]:
                    del due[0]
                    with self._users.paused():
                        self.memory.sample()
            self._users.stop()
            self.subject.check_sums()
            begin = time.monotonic()
        if time.monotonic() - begin > DRAIN * self._plan.patience:
            ledger.wrong("end", f"closing took {time.monotonic() - begin:.0f} seconds")
        self.subject.check_ends()
        allowed = self._chaos.kills + self._chaos.shared
        if ledger.killed > allowed:
            ledger.wrong("killed", f"{ledger.killed} calls died, of {allowed} that kills explain")
        if self._plan.watches_memory:
            for text in self.memory.growth():
                ledger.wrong("memory", text)

    def rows(self) -> list[list[str]]:
        """What happened, as rows of a table: name and value."""
        return [*self.subject.rows(), *self._chaos.rows(), *self.memory.rows()]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="default: 3")
    parser.add_argument("--threads", type=int, default=32, help="calling threads; default: 32")
    parser.add_argument("--seed", type=int, default=0, help="of all choices; default: 0")
    options = parser.parse_args(arguments)
    if options.minutes <= 0 or options.threads < 1:
        parser.error("--minutes and --threads must be positive")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the soak as the command line says; returns 1 when something was wrong."""
    options = _parse(arguments)
    facts = {**host_facts(), "seed": options.seed, "minutes": f"{options.minutes:g}"}
    nsbox = import_nsbox()
    leaks = importlib.import_module("tests.leaks")
    # Failed starts are what is asked for here, and calls are told of them.
    logging.getLogger("nsbox.pool").setLevel(logging.ERROR)
    map_large_blocks()
    raise_descriptor_limit(8 * len(HOUSE) * options.threads)
    for name in ("multiprocessing", "psutil"):
        importlib.import_module(name)  # what they open for good is no leak
    with tempfile.TemporaryDirectory(prefix="nsbox-soak-") as own:
        directory = Path(own)
        directory.chmod(0o755)
        os.environ["TMPDIR"] = tempfile.tempdir = str(directory / "tmp")
        Path(tempfile.tempdir).mkdir()
        before = leaks.snapshot(tempfile.tempdir)
        plan = Plan(seconds=options.minutes * 60, threads=options.threads, seed=options.seed)
        soak = Soak(plan, directory)
        violations = soak.run()
        rows = soak.rows()
        # A version holds a lock in the store for as long as it is there.
        del soak
        gc.collect()
        nsbox.shutdown()
        for kind, items in leaks.await_clean(before, tempfile.tempdir, grace=10.0).items():
            violations.append(f"left behind: {kind}: {items}")
        tempfile.tempdir = None
    sys.stdout.write(f"Host: {', '.join(f'{key} {value}' for key, value in facts.items())}\n\n")
    write_markdown(["what", "found"], rows, sys.stdout)
    for text in violations:
        sys.stdout.write(f"\nWRONG: {text}")
    sys.stdout.write("\n" if violations else "\nNothing was wrong.\n")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
