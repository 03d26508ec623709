# SPDX-License-Identifier: Apache-2.0
"""Operations of PID 1, each with a socket of its own; requests to run; a worker's endpoints.

Answers come from inside: frames of fixed size (`nsbox.guest.protocol`), checked and not trusted.
"""

from __future__ import annotations

import os
import socket
import time
from _socket import socket as Socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO
from typing import IO, Final, Self

from nsbox.errors import SetupError, SyscallError
from nsbox.guest import protocol as p
from nsbox.launcher import protocol
from nsbox.linux.descriptors import pipe_files, send_bytes
from nsbox.linux.owned import Descriptor, Inbox

ANSWER_DEADLINE: Final = 30.0
"""Seconds PID 1 may take to start a command, or for a file operation: all of it."""
_MALFORMED: Final = "PID 1 sent a malformed answer"

Reply = tuple[bytes, int, int, int, list[Descriptor]]
"""The kind, three numbers and the descriptors (`Inbox.ends`) of an answer of PID 1."""


class BrokenAnswer(ConnectionError):
    """PID 1 has sent what `nsbox.guest.protocol` does not allow."""


class Channel:
    """The host's end of one operation of PID 1. What it reads is not trusted."""

    def __init__(
        self,
        control: Socket,
        operation: bytes,
        request: bytes,
        fds: Sequence[int] = (),
        *,
        waits: bool = True,
    ) -> None:
        """Ask for `operation`; raises OSError when PID 1 is gone.

        Without `waits` what is read afterwards is what is there.
        """
        self._inbox = Inbox()  # what has come of an answer that was not taken
        self._deadline = time.monotonic() + ANSWER_DEADLINE
        self.socket, theirs = make_socket()
        is_short = len(request) + 2 <= p.LARGEST_MESSAGE
        message = operation + (p.HERE + request if is_short else p.ON_CHANNEL)
        try:
            try:
                self._wait_for(0.0 if is_short and not waits else ANSWER_DEADLINE)
                send_bytes(control, message, [theirs.fileno(), *fds])
            finally:
                theirs.close()
            if not is_short:
                self.send_all(p.LENGTH.pack(len(request)) + request)
                if not waits:
                    self.never_wait()
        except OSError:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; may be called again."""
        self.socket.close()
        self._inbox.close()

    def send_all(self, data: bytes) -> None:
        """Send what belongs to the request. Raises TimeoutError: PID 1 does not read it."""
        # A broken pipe: it refused the request before reading all of it, and its answer says why;
        # or it is gone, which reading that tells.
        with suppress(ConnectionError):
            self.socket.sendall(data)

    def receive_answer(self) -> Reply:
        """Wait for the next answer and return it.

        Raises:
            ConnectionError: PID 1 is gone.
            BrokenAnswer: It has said what it may not say.
            TimeoutError: It is not there `ANSWER_DEADLINE` seconds after the request.
        """
        while (answer := self.feed()) is None:
            self._limit_wait()
        return answer

    def receive_numbers(self) -> tuple[bytes, int, int]:
        """Do as `receive_answer` for an answer with which no descriptor belongs."""
        while (answer := self.feed_numbers()) is None:
            self._limit_wait()
        return answer

    def receive_data(self, size: int) -> bytearray:
        """Wait for the `size` bytes that an answer has announced. Raises as `receive_answer`."""
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self.socket.recv_into(view)
            if not count:
                raise ConnectionError("PID 1 is gone")
            view = view[count:]
            self._limit_wait()
        return data

    def _limit_wait(self) -> None:
        """Have the next read wait no longer than all of it may take."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._wait_for(left)

    def never_wait(self) -> None:
        """Have `feed` read what is there, and nothing wait for more."""
        self._wait_for(0.0)

    def _wait_for(self, seconds: float) -> None:
        try:
            self.socket.settimeout(seconds)
        except OSError as error:
            raise SyscallError("ioctl", error.errno or 0) from error

    def feed(self) -> Reply | None:
        """Read what has come of the next answer; None: not all of it. Raises as `receive_answer`.

        At most one descriptor comes with it. Interrupted, it is there to be read again.
        """
        try:
            if not self.is_answered:
                self._inbox.receive(self.socket, p.ANSWER.size - len(self._inbox.data), 1)
        except BlockingIOError:
            return None
        try:
            ends = self._inbox.ends
            self._inbox.check(1)
            if not self._inbox[-1][0]:
                raise ConnectionError("PID 1 is gone")
            if len(ends) > 1:
                raise BrokenAnswer(_MALFORMED)
            if not self.is_answered:
                return None
            kind, first, second, third = p.ANSWER.unpack(self._inbox.data)
            if kind == p.FAILED and not (0 <= second < len(p.STAGES) and 0 < first < 4096):
                raise BrokenAnswer(_MALFORMED)
        except OSError:
            self._inbox.close()
            raise
        next_inbox = Inbox()
        # Nothing is called from here on: no interrupt comes in between.
        self._inbox = next_inbox
        return kind, first, second, third, ends

    def feed_numbers(self) -> tuple[bytes, int, int] | None:
        """Do as `feed` for an answer with which no descriptor belongs."""
        answer = self.feed()
        if answer is None:
            return None
        for end in answer[4]:
            end.close()
        return answer[:3]

    @property
    def is_answered(self) -> bool:
        """Whether `feed` has an answer, and reads nothing."""
        return len(self._inbox.data) == p.ANSWER.size


class RunRequest:
    """A request to run a command, apart from argv and streams.

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
        text = "\0".join([f"{name}={value}" for name, value in self.env.items()])
        environment = os.fsencode(text).split(b"\0") if text else []
        flags = p.ANNOUNCE if self.is_announced else 0
        given = [*stdio, self.extra is not None]
        return p.run_request(words, environment, os.fsencode(self.cwd), given, flags, self.tty)

    def arrange(self, given: list[int]) -> list[int]:
        """Return the descriptors to send, for those that are given as streams."""
        return given if self.extra is None else [*given, self.extra]


def make_pipe(*, to_guest: bool) -> tuple[FileIO, FileIO]:
    """Return this process's end of a pipe and the other one, which a guest may have.

    Each is closed when it is dropped: an interrupt in between leaves none.

    Raises:
        SyscallError: There is no room for it.
    """
    read, write = pipe_files()
    ours, theirs = (write, read) if to_guest else (read, write)
    # So that the command, which has another uid, may open it again as /dev/stdout. Nobody else
    # gets at it: a pipe has no name but in the /proc/PID/fd of who holds it (proc(5)).
    try:
        os.fchmod(theirs.fileno(), 0o666)
    except OSError as error:
        read.close()
        write.close()
        raise SyscallError("fchmod", error.errno or 0) from error
    return ours, theirs


def make_socket() -> tuple[Socket, Socket]:
    """Return this process's end of a stream and the other one, as `protocol.raw_pair` does."""
    return protocol.raw_pair(socket.SOCK_STREAM)


def unblock(*ends: Socket | int) -> None:
    """Have nothing wait on these ends of sockets, or of pipes by their descriptors.

    Raises:
        SyscallError: The kernel has no memory for it.
    """
    try:
        for end in ends:
            if isinstance(end, Socket):
                end.setblocking(False)
            else:
                os.set_blocking(end, False)
    except OSError as error:
        raise SyscallError("ioctl", error.errno or 0) from error


class WorkerEndpoints:
    """The host's ends of a worker's socket and log.

    PID 1 of a function's environment gets the other ends with its birth.

    Attributes:
        socket: The worker's (`nsbox.guest.runtime`).
        stdout, stderr: What it writes, unbuffered.
    """

    stdout: IO[bytes]
    stderr: IO[bytes]

    def __init__(self, control: Socket) -> None:
        """Send the other ends to the PID 1 that has, or will have, the other end of `control`.

        Raises:
            ConnectionError: Nobody has it any more.
            SetupError: This process has no room for it.
        """
        kept: list[Socket | FileIO] = []
        sent: list[Socket | FileIO] = []
        try:
            self.socket, theirs = make_socket()
            kept.append(self.socket)
            sent.append(theirs)
            for name in ("stdout", "stderr"):
                ours, other = make_pipe(to_guest=False)
                sent.append(other)
                kept.append(ours)
                setattr(self, name, ours)
            send_bytes(control, p.WORK, [end.fileno() for end in sent])
        except BaseException as error:
            for end in kept:
                end.close()
            if not isinstance(error, OSError) or isinstance(error, ConnectionError):
                raise
            what = f"the worker's sockets: {error}"
            raise SetupError("birth", what, errno=error.errno or 0) from error
        finally:
            for end in sent:
                end.close()

    def close(self) -> None:
        """Close all of it; may be called again."""
        for end in (self.socket, self.stdout, self.stderr):
            end.close()


class InvocationEndpoints:
    """The host's ends of the socket and log of one event, where a fork serves each.

    Made for each event: flags, owners, locks, sizes and contents of open files pass to no other.

    Attributes:
        socket: Event and answer (`nsbox.guest.runtime`).
        logs: The pipes' descriptors, and of which stream they are.
        is_unread: Whether it was closed before the event was read whole.
    """

    __slots__ = ("_ours", "_theirs", "is_unread", "logs", "socket")

    def __init__(self) -> None:
        """Make it; `send` is next.

        Raises:
            SyscallError: This process has no room for it.
        """
        self.logs: dict[int, str] = {}
        self.is_unread = False
        self.socket, theirs = make_socket()
        self._ours: list[FileIO] = []
        self._theirs: list[Socket | FileIO] = [theirs]
        try:
            unblock(self.socket)
            for name in ("stdout", "stderr"):
                ours, other = make_pipe(to_guest=False)
                self._ours.append(ours)
                self._theirs.append(other)
                self.logs[ours.fileno()] = name
                unblock(ours.fileno())
        except BaseException:
            self.close()
            raise

    @property
    def is_sent(self) -> bool:
        """Whether the other ends are gone."""
        return not self._theirs

    def send(self, to: Socket, frame: bytes) -> None:
        """Send the other ends along with `frame`.

        Raises:
            OSError: As `send_bytes`.
        """
        try:
            send_bytes(to, frame, [end.fileno() for end in self._theirs])
        finally:
            self._close_theirs()

    def _close_theirs(self) -> None:
        theirs, self._theirs = self._theirs, []
        for end in theirs:
            end.close()

    def close(self) -> None:
        """Close all of it."""
        self._close_theirs()
        self.socket.close()
        for end in self._ours:
            end.close()
        self.logs = {}
