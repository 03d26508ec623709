# SPDX-License-Identifier: Apache-2.0
"""Programs that people run, one data row each; scripts/real-programs runs all of them.

A row is a shell script (`sh -euc`, in a private /tmp) and a regular expression that the whole of
its output must match, stderr included: a warning that a program has only inside is a fault as
well. bubblewrap with the host's /usr, /etc and /var read-only is the measure: what passes there
passes in nsbox. Rows with `small` are tests, too (test_catalogue.py), where their programs are
installed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nsbox


@dataclass(frozen=True, kw_only=True)
class Program:
    """One row."""

    name: str
    packages: str = ""
    """Debian packages, separated by blanks."""
    command: str
    """Text for `sh -euc`."""
    expected: str = ""
    """Regular expression for all of stdout and stderr, blanks at both ends left out."""
    programs: str = ""
    """What must be in PATH to run the row, where that is not the row's name; for `small` rows."""
    small: bool = False
    """Whether the row is a test of the suite."""
    strict: bool = True
    """Whether it works with `strict`, too."""
    memory: str = "1G"
    tmp_size: str = "256M"
    timeout: float = 120.0

    def is_installed(self) -> bool:
        """Whether its programs are in PATH."""
        return all(shutil.which(program) for program in (self.programs or self.name).split())

    def matches(self, output: str) -> bool:
        """Whether `output` is what is expected."""
        return re.fullmatch(self.expected, output.strip(), re.DOTALL) is not None


PROGRAMS: tuple[Program, ...] = (
    Program(
        name="sort",
        packages="coreutils",
        command="seq 20000 | sort -rn | tail -n 1",
        expected="1",
        small=True,
    ),
    Program(
        name="cp",
        packages="coreutils",
        command="echo a > a; cp -p a b; cp -a a /dev/shm/c; cat b /dev/shm/c",
        expected="a\na",
    ),
)


def in_nsbox(program: Program, profile: str = "default") -> tuple[bool, str]:
    """Return whether the row passes in nsbox, and what it printed."""
    result = nsbox.run(
        ["sh", "-euc", f"exec 2>&1\n{program.command}"],
        cwd="/tmp",
        timeout=program.timeout,
        seccomp=profile,
        tmp_size=program.tmp_size,
        limits=nsbox.Limits(memory_max=program.memory),
        allow_missing={"cgroup.memory"},
    )
    output = result.text()
    if not result.ok:
        return False, f"{output.strip()}\n[{result.outcome.value}, exit code {result.exit_code}]"
    return program.matches(output), output


def in_bubblewrap(program: Program) -> tuple[bool, str]:
    """Return whether the row passes in bubblewrap, and what it printed."""
    words = [
        *(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] * (os.geteuid() == 0)),
        *("bwrap", "--unshare-all", "--die-with-parent", "--uid", "1000", "--gid", "1000"),
        *(word for path in ("/usr", "/etc", "/var") for word in ("--ro-bind", path, path)),
        *("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--clearenv", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"),
        *("--setenv", "PATH", "/usr/local/bin:/usr/bin:/bin"),
    ]
    for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if Path(path).is_symlink():
            words += ["--symlink", os.readlink(path), path]
        elif Path(path).is_dir():
            words += ["--ro-bind", path, path]
    try:
        done = subprocess.run(
            [*words, "sh", "-euc", f"exec 2>&1\n{program.command}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=program.timeout,
        )
    except subprocess.TimeoutExpired:
        return False, f"[not done after {program.timeout:g} s]"
    output = done.stdout.decode(errors="replace")
    if done.returncode:
        return False, f"{output.strip()}\n[exit code {done.returncode}]"
    return program.matches(output), output


def is_there(program: Program) -> bool:
    """Whether the row's packages are installed."""
    words = ["dpkg-query", "--show", "--showformat", "${Status}\n", *program.packages.split()]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.count("ok installed") == done.stdout.count("\n")


def install(programs: Sequence[Program]) -> None:
    """Install what the rows need, by apt."""
    packages = sorted({name for program in programs for name in program.packages.split()})
    words = ["apt-get", "-o", "DPkg::Lock::Timeout=600", "install", "-qq", "-y"]
    subprocess.run(
        [*words, "--no-install-recommends", *packages, "bubblewrap"],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def main() -> int:
    """Print the table; 1 if a row passes in bubblewrap and not in nsbox."""
    parser = argparse.ArgumentParser(prog="scripts/real-programs", description=main.__doc__)
    parser.add_argument("--install", action="store_true", help="install their packages, as root")
    parser.add_argument("--seccomp", default="default", help="profile (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="print output of rows that fail")
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows to run (default: all)")
    chosen = parser.parse_args()
    known = {program.name for program in PROGRAMS}
    if unknown := set(chosen.names) - known:
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    rows = [program for program in PROGRAMS if not chosen.names or program.name in chosen.names]
    if chosen.install:
        install(rows)
    if not shutil.which("bwrap"):
        parser.error("bwrap is not installed: --install, or the package bubblewrap")
    width = max(len(program.name) for program in rows)
    worse = missing = 0
    for program in rows:
        if not is_there(program):
            missing += 1
            print(f"{program.name:{width}}  not installed: {program.packages}")
            continue
        outside, told_outside = in_bubblewrap(program)
        inside, told_inside = in_nsbox(program, chosen.seccomp)
        worse += outside and not inside
        words = ["pass" if passed else "FAIL" for passed in (outside, inside)]
        print(f"{program.name:{width}}  bubblewrap {words[0]}  nsbox {words[1]}", flush=True)
        for where, passed, told in (
            ("bubblewrap", outside, told_outside),
            ("nsbox", inside, told_inside),
        ):
            if chosen.show and not passed:
                print(
                    f"  {where}, expected {program.expected!r}:", *told.splitlines(), sep="\n    "
                )
    print(f"{len(rows)} rows, {missing} not installed, {worse} worse in nsbox than in bubblewrap")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
