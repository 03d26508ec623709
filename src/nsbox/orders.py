# SPDX-License-Identifier: Apache-2.0
"""What the host may ask PID 1 to start: a command, or the worker that waits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from nsbox.guest import protocol as p


class RunRequest:
    """What PID 1 is asked to run, apart from argv and streams.

    Attributes:
        env: All its environment variables.
        cwd: Its working directory inside.
        tty: Rows and columns of its terminal, or None.
        is_announced: Whether the start is waited for, and not only the end.
        extra: A descriptor that it gets as number 3, or None.
    """

    __slots__ = ("cwd", "env", "extra", "is_announced", "tty")
    operation = p.RUN

    def __init__(
        self,
        env: Mapping[str, str],
        cwd: str,
        tty: tuple[int, int] | None = None,
        *,
        announced: bool,
        extra: int | None = None,
    ) -> None:
        self.env = env
        self.cwd = cwd
        self.tty = tty
        self.extra = extra
        self.is_announced = announced or tty is not None

    def encode(self, argv: Sequence[str | bytes], stdio: list[bool]) -> bytes:
        """Return the frame (`guest.protocol.run_request`)."""
        words = [os.fsencode(word) for word in argv]
        environment = [os.fsencode(f"{name}={value}") for name, value in self.env.items()]
        flags = p.ANNOUNCE if self.is_announced else 0
        given = [*stdio, self.extra is not None]
        return p.run_request(words, environment, os.fsencode(self.cwd), given, flags, self.tty)

    def arrange(self, given: list[int]) -> list[int]:
        """Return the descriptors to send, for those that are given as streams."""
        return given if self.extra is None else [*given, self.extra]


class WorkRequest:
    """What asks PID 1 to let its waiting worker serve; see `RunRequest`."""

    __slots__ = ("cwd", "env", "is_announced", "worker")
    operation = p.WORK

    def __init__(self, worker: int) -> None:
        """`worker` is the worker's end of its socket."""
        self.worker = worker
        self.is_announced = False
        self.cwd = "/"
        self.env: Mapping[str, str] = {}

    def encode(self, _argv: Sequence[str | bytes], _stdio: list[bool]) -> bytes:
        """Return the frame, which is empty."""
        return b""

    def arrange(self, given: list[int]) -> list[int]:
        """Return the descriptors to send: the worker's socket, then its streams."""
        return [self.worker, *given]
