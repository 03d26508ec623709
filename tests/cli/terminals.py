# SPDX-License-Identifier: Apache-2.0
"""Run the command line in a process of its own, through pipes or at a real terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support import PATIENCE

import nsbox

NSBOX = (sys.executable, "-m", "nsbox")
_SOURCE = str(Path(nsbox.__file__).parent.parent)
ENVIRONMENT = {**os.environ, "PYTHONPATH": _SOURCE, "TERM": "vt100", "SHELL": "/bin/sh"}


def nsbox_run(
    *words: str, command: Sequence[str] = (), data: bytes = b"", timeout: float = 60
) -> subprocess.CompletedProcess[bytes]:
    """Run ``nsbox WORDS -- COMMAND`` with pipes."""
    tail = ["--", *command] if command else []
    return subprocess.run(
        [*NSBOX, *words, *tail],
        input=data,
        capture_output=True,
        env=ENVIRONMENT,
        timeout=timeout * PATIENCE,
    )


class Started(subprocess.Popen[bytes]):
    """A process that ends with its `with` block, also when the test fails in it."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Popen waits here, for ever when the process is stopped or waits for its test.
        if error is not None:
            self.kill()
        super().__exit__(kind, error, trace)


def start(*words: str, **keywords: int) -> Started:
    """Start ``nsbox WORDS`` with pipes where `keywords` say no other."""
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return Started(  # type: ignore[call-overload,no-any-return]
        [*NSBOX, *words], env=ENVIRONMENT, **{**streams, **keywords}
    )


class Terminal:
    """A program at a terminal of its own, as its session leader."""

    def __init__(
        self, argv: Sequence[str], size: tuple[int, int] = (24, 80), env: Mapping[str, str] = {}
    ) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            # Only until exec: a failure here must not run the rest of the tests a second time.
            try:
                fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
                os.execvpe(argv[0], list(argv), {**ENVIRONMENT, **env})  # noqa: S606 - no shell is meant
            finally:
                os._exit(99)
        self.seen = b""

    def enter(self, data: bytes) -> None:
        os.write(self.master, data)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def local_flags(self) -> int:
        flags: int = termios.tcgetattr(self.master)[3]
        return flags

    def expect(self, text: bytes, timeout: float = 20) -> bytes:
        """Read until `text` comes; what was read up to its end."""
        deadline = time.monotonic() + timeout * PATIENCE
        while text not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} did not come, but {self.seen!r}"
            if select.select([self.master], [], [], left)[0]:
                try:
                    data = os.read(self.master, 65536)
                except OSError:
                    data = b""
                assert data, f"{text!r} did not come before the end, but {self.seen!r}"
                self.seen += data
        end = self.seen.index(text) + len(text)
        read, self.seen = self.seen[:end], self.seen[end:]
        return read

    def wait(self, timeout: float = 20) -> int:
        """Return the exit status, reading on meanwhile."""
        deadline = time.monotonic() + timeout * PATIENCE
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline, f"still running; seen {self.seen!r}"
            if select.select([self.master], [], [], 0.02)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.master, 65536)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.master)
