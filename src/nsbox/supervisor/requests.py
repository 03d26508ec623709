# SPDX-License-Identifier: Apache-2.0
"""Requests to the launcher about one environment, and its report on the environment's end.

No connection is kept: each request carries the socket for its answer.
"""

from __future__ import annotations

import errno
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Final

from nsbox.errors import SyscallError
from nsbox.launcher import messages, protocol
from nsbox.linux.descriptors import pipe_files
from nsbox.linux.owned import Descriptor

if TYPE_CHECKING:
    from _socket import socket as Socket
    from io import FileIO

    from nsbox.launcher.messages import Spec
    from nsbox.supervisor.launcher import Launcher

Answer = tuple[messages.Message, list[Descriptor]]
"""What the launcher says, and the descriptors that come with it (`Inbox.ends`)."""
END_DEADLINE: Final = 10.0
"""Seconds in which the launcher answers, and a killed environment is gone and removed."""
_ATTEMPTS: Final = 3
"""How often it is asked while it lives and the socket of its answer is lost: no room, no memory."""


class Supervision:
    """Requests to the launcher about one environment. Safe to use from many threads.

    Attributes:
        end: The launcher's report on its end; None while it lives.
        is_let_go: Whether the launcher was told that nobody awaits its end.
        unsaid: Why `end` has no wait status, for people, or "".
    """

    def __init__(self, launcher: Launcher, env_id: str) -> None:
        self._launcher = launcher
        self._env_id = env_id
        self._lock = threading.Lock()
        self._report: FileIO | None = None  # a pipe, where the end will be told
        self._is_asked = self.is_let_go = False
        self.end: messages.Gone | None = None
        self.unsaid = ""

    def ask_for_birth(self, spec: Spec, fds: list[int], awaits: str, *, is_brief: bool) -> None:
        """Ask for the environment; see `Launcher.request_birth`."""
        self._launcher.request_birth(self._env_id, spec, fds, awaits, is_brief=is_brief)
        self._is_asked = True

    def tell(self, request: messages.Request) -> None:
        """Send a request without an answer. Raises OSError: the launcher is gone."""
        self._launcher.ask(request)

    def request(self, request: messages.Request) -> Answer | None:
        """Send a request, which may be done twice; return its answer, None: the launcher is gone.

        Raises:
            SyscallError: This process could not ask, or has no room for the answer's descriptor.
            TimeoutError: No answer within `END_DEADLINE`; it may act on the request later.
        """
        for _ in range(_ATTEMPTS):
            ours, theirs = protocol.raw_pair()
            with closing(ours):
                with closing(theirs):
                    try:
                        self._launcher.ask(request, theirs.fileno())
                    except OSError as error:
                        if is_gone(error):
                            return None
                        raise SyscallError("sendmsg", error.errno or 0) from error
                try:
                    answer = receive(ours, END_DEADLINE)
                except TimeoutError:
                    raise
                except OSError as error:
                    raise SyscallError("recvmsg", error.errno or 0) from error
            if answer is not None or not self._launcher.alive:
                return answer
        raise TimeoutError(errno.ETIMEDOUT, "the launcher does not answer")

    def begin_end(self, *, is_reported: bool) -> None:
        """Have the environment killed and its end reported; `await_end` waits for the report.

        `is_reported` asks for the last counters, too, which cost it seven files.
        """
        with self._lock:
            self._begin_end(is_reported=is_reported)

    def _begin_end(self, *, is_reported: bool) -> None:
        if self.end is not None or self._report is not None:
            return
        if not self._is_asked or self.is_let_go:
            return
        try:
            # To make and close a pair of sockets takes twice as long.
            self._report, theirs = pipe_files()
        except SyscallError:
            self._let_go()  # there is no report then: the control socket's end tells
            return
        try:
            request = messages.Close(id=self._env_id, is_reported=is_reported)
            self._launcher.ask(request, theirs.fileno())
        except OSError as error:
            if is_gone(error):
                self._end_with_launcher()
            else:  # it is asked again by who waits
                self._report.close()
                self._report = None
        finally:
            theirs.close()

    def _end_with_launcher(self) -> None:
        self.unsaid = "the launcher died, and the environment with it"
        self.end = messages.Gone(status=None, usage={}, leaked=[])

    def end_unsaid(self) -> None:
        """Note that PID 1 has ended and that the launcher has not reported it in time."""
        late = f"the launcher did not say within {END_DEADLINE:g} seconds"
        with self._lock:
            if self.end is None:
                self.unsaid = f"PID 1 is gone; {late} how it ended"
                left = f"cgroups of environment {self._env_id}: {late} that they are removed"
                self.end = messages.Gone(status=None, usage={}, leaked=[left])

    def await_end(self) -> None:
        """Wait until `end` is told, or `END_DEADLINE` is over."""
        for _ in range(_ATTEMPTS):
            with self._lock:
                self._begin_end(is_reported=True)
                report = self._report
                if self.end is not None or self.is_let_go or not self._is_asked:
                    return
                if report is None:
                    continue  # it could not be asked
                fd = report.fileno()
            if not protocol.is_readable(fd, END_DEADLINE):
                return
            with self._lock:  # another thread may have read it meanwhile
                if self.end is None and self._report is report:
                    self._read_end(report)

    def _read_end(self, report: FileIO) -> None:
        try:
            said = protocol.read(report.fileno())
        except OSError:
            return  # no memory: it is there to be read again
        if isinstance(said, messages.Gone):
            self.end = said
        elif self._launcher.alive:  # the pipe was lost on its way: ask once more
            report.close()
            self._report = None
        else:
            self._end_with_launcher()

    def close(self) -> None:
        """Let go of the environment: the launcher ends what is left of it, and forgets it."""
        with self._lock:
            if self._report is not None:
                self._report.close()
                self._report = None
            if (self.end is None or self.unsaid) and self._is_asked:
                self._let_go()

    def _let_go(self) -> None:
        if not self.is_let_go:
            self.is_let_go = True
            try:
                self._launcher.ask(messages.Close(id=self._env_id, is_reported=False))
            except OSError:
                return  # it is gone, and the environment with it


def is_gone(error: OSError) -> bool:
    """Whether a message was not sent because its receiver is gone, or this end of the socket."""
    return isinstance(error, ConnectionError | ProcessLookupError) or error.errno == errno.EBADF


def receive(channel: Socket, timeout: float) -> Answer | None:
    """Return the launcher's answer; None when it is gone.

    Raises:
        TimeoutError: There is none yet.
    """
    if not protocol.is_readable(channel.fileno(), timeout):
        raise TimeoutError(errno.ETIMEDOUT, "the launcher is silent")
    return protocol.hear(channel)
