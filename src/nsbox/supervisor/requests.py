# SPDX-License-Identifier: Apache-2.0
"""What the launcher is asked about one environment that was born, and what it says of its end.

Nothing stays open for that: each request brings the socket that its answer comes on.
"""

from __future__ import annotations

import threading
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, Final

from nsbox.errors import SyscallError
from nsbox.launcher import protocol

if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Mapping

    from nsbox.supervisor.launcher import Launcher

END_DEADLINE: Final = 10.0
"""Seconds in which the launcher answers, and a killed environment is gone and removed."""


class Supervision:
    """The launcher's word on one environment. Safe to use from many threads.

    Attributes:
        end: What the launcher has said of its end; None before.
    """

    def __init__(self, launcher: Launcher, env_id: str) -> None:
        self._launcher = launcher
        self._env_id = env_id
        self._lock = threading.Lock()
        self._report: Socket | None = None  # where the end will be told
        self._is_asked = self._is_let_go = False
        self.end: dict[str, Any] | None = None

    def ask_for_birth(
        self, spec: Mapping[str, Any], fds: list[int], awaits: str, *, is_brief: bool
    ) -> None:
        """Ask for the environment; see `Launcher.request_birth`."""
        self._launcher.request_birth(self._env_id, spec, fds, awaits, is_brief=is_brief)
        self._is_asked = True

    def tell(self, kind: str) -> None:
        """Have the launcher do something that it does not answer. OSError: it is gone."""
        self._launcher.ask(kind, self._env_id)

    def request(self, kind: str) -> dict[str, Any] | None:
        """Have it do something; return its answer, None when it gives none.

        Raises:
            SyscallError: This process has no room for a socket.
        """
        ours, theirs = _pair()
        with closing(ours):
            try:
                with closing(theirs):
                    self._launcher.ask(kind, self._env_id, theirs)
                return _receive(ours, END_DEADLINE)
            except OSError:
                return None

    def begin_end(self, *, is_reported: bool) -> None:
        """Have it kill the environment and tell when that is gone; `await_end` waits for that.

        `is_reported` asks for the last counters, too, which cost it seven files.
        """
        with self._lock:
            self._begin_end(is_reported=is_reported)

    def _begin_end(self, *, is_reported: bool) -> None:
        if self.end is not None or self._report is not None:
            return
        if not self._is_asked or self._is_let_go:
            return
        try:
            self._report, theirs = _pair()
        except SyscallError:
            self._let_go()  # that it has hung up is all that is seen of it
            return
        try:
            with closing(theirs):
                self._launcher.ask("close", self._env_id, theirs, is_reported=is_reported)
        except OSError:
            self.end = {"kind": "gone", "launcher": True}

    def await_end(self) -> None:
        """Wait until `end` is told, or `END_DEADLINE` is over."""
        with self._lock:
            self._begin_end(is_reported=True)
            if self.end is not None or self._report is None or self._report.fileno() < 0:
                return
            fd = self._report.fileno()
        if protocol.is_readable(fd, END_DEADLINE):
            with self._lock:  # another thread may have read it meanwhile
                if self.end is None and self._report.fileno() >= 0:
                    received = protocol.receive(self._report)
                    self.end = received[0] if received else {"kind": "gone", "launcher": True}

    def close(self) -> None:
        """Let go of the environment: the launcher ends what is left of it, and forgets it."""
        with self._lock:
            if self._report is not None:
                self._report.close()
            if self.end is None and self._is_asked:
                self._let_go()

    def _let_go(self) -> None:
        if not self._is_let_go:
            self._is_let_go = True
            with suppress(OSError):  # it is gone, and the environment with it
                self.tell("close")


def _pair() -> tuple[Socket, Socket]:
    try:
        return protocol.raw_pair()
    except OSError as error:
        raise SyscallError("socketpair", error.errno or 0) from error


def _receive(channel: Socket, timeout: float) -> dict[str, Any] | None:
    if not protocol.is_readable(channel.fileno(), timeout):
        return None
    received = protocol.receive(channel)
    return None if received is None else received[0]
