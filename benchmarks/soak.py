# SPDX-License-Identifier: Apache-2.0
"""Thousands of calls one after another: what host and launcher have stays flat.

    scripts/test --soak                            # 10,000 warm and 2,000 cold invocations
    scripts/test --soak --warm 1000 --cold 200 --output DIRECTORY

Writes soak.json and, where matplotlib is installed, soak.png and soak.svg. Exits with 1 when
descriptors, threads, children, mounts, cgroups or temporary files differ by more than 3 between
two looks, or memory grows by 16 MiB. The p99 of the last calls beside that of the first is told and
not judged: it is the machine's, too.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Series, host_facts, own_directory, parser_of, progress
from benchmarks.memory import map_large_blocks, pss, resident, trim
from benchmarks.peers import UnavailableError
from benchmarks.subject import import_nsbox, launcher_process

LOOKS = 20
"""At each kind of calls, after a twentieth of them as a warm-up."""
MOST_DIFFERENCE = 3
MOST_GROWTH = 16 * 1.048576
"""Megabytes."""
HANDLER = "def handler(event, context): return event"
Sample = dict[str, float]


def look(directory: str) -> Sample:
    """What there is now, by name: megabytes and numbers. What this user may not see is left out."""
    gc.collect()
    trim()
    found: Sample = {"temporary files": len(os.listdir(directory))}
    launcher = launcher_process()
    for name, pid in {"host": os.getpid(), "launcher": launcher.pid if launcher else 0}.items():
        if not pid:
            continue
        found[f"RSS of the {name}"] = resident(pid)
        found[f"mounts of the {name}"] = _lines(f"/proc/{pid}/mountinfo")
        found[f"children of the {name}"] = len(psutil.Process(pid).children())
        for what, place in (("descriptors", "fd"), ("threads", "task")):
            with suppress(PermissionError):
                found[f"{what} of the {name}"] = len(os.listdir(f"/proc/{pid}/{place}"))
        with suppress(UnavailableError):
            found[f"PSS of the {name}"] = pss(pid)
    if launcher is not None:
        mark = f"/nsbox.{launcher.pid}."
        found["cgroups"] = sum(mark in place for place, _, _ in os.walk("/sys/fs/cgroup"))
    return found


def _lines(path: str) -> int:
    return len(Path(path).read_text().splitlines())


class Soak:
    """Calls of one function, one after another, and looks in between.

    Attributes:
        samples: The looks, by kind of calls: how many there had been, and what was found.
        times: Microseconds of each call, by kind.
    """

    def __init__(self, directory: Path) -> None:
        """Publishes the function below `directory`; temporary files are in `directory`/tmp."""
        self._nsbox = import_nsbox()
        self._directory = directory
        code = directory / "code"
        code.mkdir()
        (code / "app.py").write_text(HANDLER)
        function = self._nsbox.Function("app.handler", code=code)
        self._version = function.publish(store=directory / "store")
        self.samples: dict[str, list[tuple[int, Sample]]] = {}
        self.times: dict[str, Series] = {}

    def run(self, warm: int, cold: int) -> list[str]:
        """Make so many calls; return what was not flat."""
        self._nsbox.set_standby(0)
        with self._nsbox.WarmPool(self._version, max_environments=1, freeze_after=None) as pool:
            self._repeat("warm", warm, pool.invoke)
        self._repeat("cold", cold, self._call_cold)
        return [text for name in self.samples for text in uneven(name, self.samples[name])]

    def _call_cold(self, event: object) -> object:
        with self._nsbox.ExecutionEnvironment(self._version) as env:
            return env.invoke(event)

    def _repeat(self, name: str, count: int, call: Callable[[object], object]) -> None:
        times = self.times[name] = Series(name, "us")
        samples = self.samples[name] = []
        due = [max(1, count * number // LOOKS) for number in range(1, LOOKS + 1)]
        for number in range(1, count + 1):
            begin = time.perf_counter_ns()
            answer = call({"number": number})
            times.samples.append((time.perf_counter_ns() - begin) / 1e3)
            if answer != {"number": number}:
                raise UnavailableError(f"call {number} was answered with {answer!r}")
            if number in due:
                _settle(name)
                samples.append((number, look(str(self._directory / "tmp"))))
                progress(f"{name}: {number} of {count}")
        progress("")

    def summary(self) -> dict[str, Any]:
        """Return the looks and the times of the first and last calls, for JSON."""
        told: dict[str, Any] = {}
        for name, samples in self.samples.items():
            part = max(1, min(1000, len(self.times[name].samples) // 2))
            first = Series("", "us", self.times[name].samples[:part]).quantile(0.99)
            last = Series("", "us", self.times[name].samples[-part:]).quantile(0.99)
            told[name] = {
                "calls": len(self.times[name].samples),
                "p99 of the first, us": round(first, 1),
                "p99 of the last, us": round(last, 1),
                "last of first": round(last / first, 2),
                "samples": [{"calls": number, **sample} for number, sample in samples],
            }
        return told


def _settle(name: str) -> None:
    """Wait until what the last cold call has left is gone: the launcher removes it afterwards."""
    launcher = launcher_process()
    deadline = time.monotonic() + 5.0
    helpers = {"nsbox-template", "nsbox-janitor"}
    while name == "cold" and launcher is not None and time.monotonic() < deadline:
        if {child.name() for child in launcher.children()} <= helpers:
            return
        time.sleep(0.005)


def uneven(name: str, samples: Sequence[tuple[int, Mapping[str, float]]]) -> list[str]:
    """Tell what differs by more than it may between looks at calls of one kind."""
    found = []
    for what in samples[0][1]:
        values = [sample[what] for _, sample in samples if what in sample]
        if what.startswith(("RSS", "PSS")):
            if values[-1] - values[0] >= MOST_GROWTH:
                found.append(f"{name}: {what} grew from {values[0]:.1f} to {values[-1]:.1f} MB")
        elif max(values) - min(values) > MOST_DIFFERENCE:
            found.append(f"{name}: {what}: {min(values):g} to {max(values):g}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the soak as the command line says; returns 1 when something was not flat."""
    parser = parser_of(__doc__, "scripts/test --soak")
    parser.add_argument("--warm", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--cold", type=int, default=2_000, help="default: 2000")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"), metavar="DIR")
    options = parser.parse_args(arguments)
    if min(options.warm, options.cold) < LOOKS:
        parser.error(f"--warm and --cold must be {LOOKS} at least")
    map_large_blocks()
    facts = host_facts()
    with own_directory("nsbox-soak-") as directory:
        soak = Soak(directory)
        violations = soak.run(options.warm, options.cold)
        result = {"host": facts, **soak.summary(), "not flat": violations}
        import_nsbox().shutdown()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    try:
        from benchmarks.plots import draw_soak

        draw_soak(soak.samples, facts, options.output)
    except UnavailableError as error:
        sys.stdout.write(f"no plot: {error}\n")
    for name in soak.samples:
        told = {key: value for key, value in result[name].items() if key != "samples"}
        sys.stdout.write(f"{name}: {told}\n")
        first, last = soak.samples[name][0][1], soak.samples[name][-1][1]
        for what, value in first.items():
            sys.stdout.write(f"  {what}: {value:.4g} -> {last.get(what, 0.0):.4g}\n")
    for violation in violations:
        sys.stdout.write(f"NOT FLAT: {violation}\n")
    sys.stdout.write("" if violations else "All of it was flat.\n")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
