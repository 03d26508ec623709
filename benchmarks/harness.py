# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: cases measured in turn, statistics, host facts, output.

A benchmark is a list of `Case` objects. `measure_interleaved` runs one of each per round, in an
order that changes every round, so that a noisy moment of the machine strikes all of them alike and
a ratio between two cases of one run means something even where the absolute numbers do not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import pwd
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

MICROSECONDS = "us"
PER_SECOND = "1/s"
MEGABYTES = "MB"
COUNT = "count"
LARGE_IS_GOOD = frozenset({PER_SECOND, COUNT})


@dataclass
class Series:
    """The samples of one named figure, in `unit`."""

    name: str
    unit: str
    samples: list[float] = field(default_factory=list)

    def quantile(self, fraction: float) -> float:
        """The value below which `fraction` of the samples lie (linear between neighbours)."""
        ordered = sorted(self.samples)
        position = fraction * (len(ordered) - 1)
        low = math.floor(position)
        high = math.ceil(position)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    @property
    def median(self) -> float:
        """The middle sample."""
        return self.quantile(0.5)

    @property
    def best_tenth(self) -> float:
        """What the thing costs undisturbed: p10 of a duration, p90 of a rate."""
        return self.quantile(0.9 if self.unit in LARGE_IS_GOOD else 0.1)


@dataclass(frozen=True)
class Case:
    """One thing to measure: `measure` returns {series name: sample or samples, in `unit`}.

    `units` are those of series that are in another one.
    """

    name: str
    measure: Callable[[], Mapping[str, float | Sequence[float]]]
    unit: str = MICROSECONDS
    units: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """`name`'s median over `reference`'s: at most `bound` for durations, at least for rates.

    Without a reference the bound is on the median itself, in the unit of the series.
    """

    name: str
    reference: str | None
    bound: float | None = None
    unit: str = MICROSECONDS

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return self.unit in LARGE_IS_GOOD


class Report:
    """The series of one run, what could not be measured and why, and the host it ran on."""

    def __init__(self) -> None:
        """An empty report; the host facts are read now."""
        self.series: dict[str, Series] = {}
        self.missing: dict[str, str] = {}
        self.host = host_facts()

    def add(
        self, unit: str, samples: Mapping[str, float | Sequence[float]], *, counted: bool = True
    ) -> None:
        """Appends to each named series; what is not `counted` only fixes the order."""
        for name, sample in samples.items():
            series = self.series.setdefault(name, Series(name, unit))
            if counted:
                series.samples.extend([sample] if isinstance(sample, int | float) else sample)

    def drop_empty(self) -> None:
        """Forgets the series that have no samples: their case failed before the first round."""
        self.series = {name: series for name, series in self.series.items() if series.samples}

    def write_json_lines(self, stream: TextIO) -> None:
        """One object a line: name, unit, samples, host."""
        for series in self.series.values():
            samples = [round(sample, 1) for sample in series.samples]
            record = {"name": series.name, "unit": series.unit, "samples": samples}
            stream.write(json.dumps({**record, "host": self.host}) + "\n")

    def write_table(self, targets: Sequence[Target], stream: TextIO) -> None:
        """A Markdown table: quantiles of each series, then each ratio next to its target."""
        facts = ", ".join(f"{key} {value}" for key, value in self.host.items())
        stream.write(f"Host: {facts}\n\n")
        header = ["series", "unit", "median", "p10", "p90", "p95", "p99", "n"]
        rows = [
            [
                series.name,
                series.unit,
                *(f"{series.quantile(q):.0f}" for q in (0.5, 0.1, 0.9, 0.95, 0.99)),
                str(len(series.samples)),
            ]
            for series in self.series.values()
        ]
        write_markdown(header, rows, stream)
        stream.write("\n")
        self.write_verdicts(targets, stream)

    def write_verdicts(self, targets: Sequence[Target], stream: TextIO) -> None:
        """A Markdown table of ratios and bounds, and what is missing."""
        header = ["ratio", "of medians", "undisturbed", "target", "verdict"]
        write_markdown(header, [self.judge(target).cells() for target in targets], stream)
        for name, reason in self.missing.items():
            stream.write(f"\n{name}: {reason}")
        stream.write("\n" if self.missing else "")

    def judge(self, target: Target) -> Verdict:
        """Sets a target beside what was measured."""
        ours = self.series.get(target.name)
        theirs = None if target.reference is None else self.series.get(target.reference)
        if ours is None or (theirs is None and target.reference is not None):
            return Verdict(target, None, None, None)
        median, best = ours.median, ours.best_tenth
        if theirs is not None:
            median, best = median / theirs.median, best / theirs.best_tenth
        met = None
        if target.bound is not None:
            met = median >= target.bound if target.at_least else median <= target.bound
        return Verdict(target, median, best, met)


@dataclass(frozen=True)
class Verdict:
    """A target, the ratio that was found (None: not measured) and whether it is met."""

    target: Target
    ratio: float | None
    undisturbed: float | None
    met: bool | None

    def cells(self) -> list[str]:
        """A row of the table of verdicts."""
        target = self.target
        label = f"{target.name} / {target.reference}" if target.reference else target.name
        sign = ">=" if target.at_least else "<="
        wanted = "" if target.bound is None else f"{sign} {target.bound:.2f}"
        if self.ratio is None or self.undisturbed is None:
            return [label, "-", "-", wanted, "not measured"]
        verdict = "" if self.met is None else "met" if self.met else "NOT MET"
        return [label, f"{self.ratio:.3g}", f"{self.undisturbed:.3g}", wanted, verdict]


def measure_interleaved(
    cases: Iterable[Case],
    report: Report,
    *,
    rounds: int,
    warmup: int,
    pause: float,
    advance: Callable[[int], object] | None = None,
) -> None:
    """Measures every case once per round; `warmup` rounds more come first and are not counted.

    Each round starts with another case, and every second full turn goes backwards, so that no case
    always follows the same other one. `pause` seconds between two measurements let the kernel's
    deferred work (network namespaces are torn down by a worker) end before the next one begins.
    A case that raises is named in the report and left out from there on. `advance` is called with
    the number of measurements of each round, for a progress bar.
    """
    active = list(cases)
    planned = len(active)
    for number in range(warmup + rounds):
        turn, shift = divmod(number, max(1, len(active)))
        order = active[shift:] + active[:shift]
        if turn % 2:
            order.reverse()
        for case in order:
            time.sleep(pause)
            try:
                samples = case.measure()
            except Exception as error:  # noqa: BLE001 - one broken peer must not end the others' run
                report.missing[case.name] = f"failed in round {number + 1}: {describe(error)}"
                active.remove(case)
                continue
            for name, sample in samples.items():
                unit = case.units.get(name, case.unit)
                report.add(unit, {name: sample}, counted=number >= warmup)
        if advance is None:
            progress(f"round {number + 1} of {warmup + rounds}")
        else:
            advance(planned)
    if advance is None:
        progress("")
    report.drop_empty()


def describe(error: BaseException) -> str:
    """The type of an exception and the first line of its text, of which 200 characters will do."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__


def progress(text: str) -> None:
    """Shows `text` in place on a terminal; says nothing in a log file."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def parser_of(document: str | None, program: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of a command line whose help is a module's docstring."""
    summary, _, details = (document or "").partition("\n")
    return argparse.ArgumentParser(
        prog=program,
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


@contextlib.contextmanager
def own_directory(prefix: str) -> Iterator[Path]:
    """Give a new directory, in whose "tmp" all temporary files of this process are meanwhile."""
    with tempfile.TemporaryDirectory(prefix=prefix) as own:
        directory = Path(own)
        directory.chmod(0o755)
        os.environ["TMPDIR"] = tempfile.tempdir = str(directory / "tmp")
        Path(tempfile.tempdir).mkdir()
        try:
            yield directory
        finally:
            tempfile.tempdir = None


def host_facts() -> dict[str, str]:
    """Kernel, CPU, Python, commit, user, load: what every published number has to name."""
    return {
        "kernel": platform.release(),
        "cpu": f"{os.cpu_count()} x {_cpu_model()}",
        "python": platform.python_version(),
        "commit": _commit(),
        "user": _user(),
        "scheduler": _scheduler(),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def _scheduler() -> str:
    # On a machine with other work, chrt -f keeps that out of the clock; a table has to say so.
    names = {os.SCHED_OTHER: "other", os.SCHED_FIFO: "fifo", os.SCHED_RR: "rr"}
    policy = os.sched_getscheduler(0)
    priority = os.sched_getparam(0).sched_priority
    return f"{names.get(policy, str(policy))}{f' {priority}' if priority else ''}"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    # safe.directory: git refuses another user's repository, and CI runs this as nobody as well.
    git = ["git", "-c", "safe.directory=*", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
        )
        state = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown (git is not installed)"
    if head.returncode != 0:
        return "none"
    return head.stdout.strip() + ("-dirty" if state.stdout.strip() else "")


def _user() -> str:
    # Not getpass.getuser(): it believes LOGNAME, which setpriv leaves as it was.
    identity = os.geteuid()
    try:
        return f"{pwd.getpwuid(identity).pw_name} ({identity})"
    except KeyError:
        return str(identity)


def write_markdown(header: list[str], rows: list[list[str]], stream: TextIO) -> None:
    """A table whose columns are aligned for a reader of the source, too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    for row in [header, rule, *rows]:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        stream.write("| " + " | ".join(cells) + " |\n")
