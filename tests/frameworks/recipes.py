# SPDX-License-Identifier: Apache-2.0
"""The recipes of docs/frameworks.md as files, and what is started with them."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.leaks import processes
from tests.support import PATIENCE, SOURCE, family_of, name_of, wait_until

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "frameworks.md"
_BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.M | re.S)

_ENVIRONMENT = re.compile(r"nsbox-[0-9a-f]{8}")
_HANGING = "hanging"  # the name of a worker of a function that does not answer

HANDLER = f"""
import time
def handler(event, context):
    while event == ["hang"]:
        with open("/proc/self/comm", "w") as name:
            name.write("{_HANGING}")
        time.sleep(0.1)
    return sorted(event)
"""


class Place:
    """A directory with the files of a recipe, and the processes that are started there.

    Attributes:
        files: What the recipe has, by name.
        words: The command line that the recipe says, without the program.
    """

    def __init__(self, directory: Path, heading: str) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.words: list[str] = []
        self.files: dict[str, str] = {}
        self._mark = f"NSBOX_TEST_MARK={uuid.uuid4()}"
        section = DOCUMENT.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
        for language, text in _BLOCK.findall(section):
            if language == "console":
                self.words = shlex.split(text.removeprefix("$ "))[1:]
            else:
                name, _, code = text.removeprefix("# ").partition("\n")
                self.files[name] = code
                (directory / name).write_text(code)
        (directory / "handlers").mkdir()
        (directory / "handlers" / "app.py").write_text(HANDLER)
        (directory / "tmp").mkdir()

    @contextlib.contextmanager
    def start(self, *words: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
        """Start Python with `words`, and wait for its end; what it prints is in `log`."""
        name, _, value = self._mark.partition("=")
        path = os.pathsep.join([str(self.directory), SOURCE])
        own = {"PYTHONPATH": path, "HOME": str(self.directory), "TMPDIR": f"{self.directory}/tmp"}
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=self.directory,
                env={**os.environ, **own, name: value, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        with process:
            try:
                yield process
                process.wait(60 * PATIENCE)
            except BaseException:
                self.kill()
                raise

    def run(self, *words: str, **variables: str) -> str:
        """Run Python with `words` to a good end; return what it has printed."""
        begin = self.log.stat().st_size if self.log.exists() else 0
        with self.start(*words, **variables) as process:
            status = process.wait(100 * PATIENCE)
        printed = self.log.read_bytes()[begin:].decode()
        assert status == 0, printed
        return printed

    def run_code(self, code: str, **variables: str) -> str:
        """Run a program that is written into a file first: workers import it again."""
        (self.directory / "program.py").write_text(textwrap.dedent(code))
        return self.run("program.py", **variables)

    def processes(self) -> list[int]:
        """Return what was started here and is not over: by a variable that all inherit."""
        return [pid for pid in _processes_alive() if self._mark in _variables(pid)]

    def kill(self) -> None:
        """SIGKILL all that was started here."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def check_empty(self) -> None:
        """Wait until nothing of it runs; nsbox must have no file there."""
        wait_until(lambda: not self.processes(), "all has ended", 20)
        assert not [path for path in (self.directory / "tmp").rglob("*nsbox*")]


@contextlib.contextmanager
def place_of(directory: Path, heading: str) -> Iterator[Place]:
    """A `Place` in which nothing is left at the end."""
    place = Place(directory, heading)
    try:
        yield place
        place.check_empty()
    except BaseException:
        if place.log.exists():
            print(place.log.read_text(errors="replace")[-20_000:])
        raise
    finally:
        place.kill()


def _processes_alive() -> list[int]:
    return [process.pid for process in processes().values() if process.state != "Z"]


def _variables(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []


def workers_of(pid: int) -> set[int]:
    """Return the children of a server that are its workers."""
    found = {process.pid for process in processes().values() if process.parent == pid}
    return {child for child in found if b"resource_tracker" not in _command_line(child)}


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def environments_of(pid: int) -> list[int]:
    """Return the PID 1s of what a process has had made."""
    return [member for member in family_of(pid) if _ENVIRONMENT.fullmatch(name_of(member))]


def kill_busy(server: int) -> None:
    """SIGKILL the worker whose call hangs; wait until it and its environments are gone."""
    busy: list[int] = []

    def is_busy() -> bool:
        inside = {p.parent for p in processes().values() if p.name == _HANGING}
        busy[:] = [worker for worker in workers_of(server) if inside & set(family_of(worker))]
        return bool(busy)

    wait_until(is_busy, "a worker has a call that hangs", 30)
    os.kill(busy[0], signal.SIGKILL)
    wait_until(lambda: not family_of(busy[0]), "its environments have ended", 10)
