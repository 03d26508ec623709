# SPDX-License-Identifier: Apache-2.0
"""One exchange with a worker: the event or start sent, its answer, and how it is waited for.

What waits for a guest is written once, as a generator (`Steps`). It yields a `Wait` and is sent
what is ready then; or a callable that may take long, and is sent what that returns. `drive` runs it
in a thread; `nsbox.functions.loop` on an event loop, where callables get a thread of their own.
"""

from __future__ import annotations

import json
import select
import time

# The C half: it has no use for the names of families and types.
from _socket import socket as Socket
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from nsbox.values.invocation import FunctionError, Invocation, LeftRunning
from nsbox.values.json_text import decode_answer
from nsbox.values.result import Result

OnLog = Callable[[str, bytes], object]
"""Called with ``"stdout"`` or ``"stderr"`` and bytes as they come."""

Frame = tuple[bytes, bytes | memoryview]
"""Kind and body."""
Ready = list[tuple[int, int]]
"""Descriptors and what poll(2) says of them; empty: the deadline has passed."""

_T = TypeVar("_T")


class Wait:
    """Descriptors of which one is to be readable, or one writable, before a deadline.

    Attributes:
        fds: Those to read from.
        write: The one to write to, or -1.
        deadline: By `time.monotonic`.
        is_lasting: Whether it is waited for again and again, so that a loop keeps its readers.
        poll: Has all of them.
    """

    __slots__ = ("deadline", "fds", "is_lasting", "poll", "write")

    def __init__(
        self, fds: Iterable[int], deadline: float, write: int = -1, *, is_lasting: bool = False
    ) -> None:
        self.fds = set(fds)
        self.deadline = deadline
        self.write = write
        self.is_lasting = is_lasting
        self.poll = select.poll()
        for fd in self.fds:
            self.poll.register(fd, select.POLLIN)
        if write >= 0:
            self.poll.register(write, select.POLLOUT)

    def add(self, fd: int) -> None:
        """Wait for one more to be readable."""
        self.fds.add(fd)
        self.poll.register(fd, select.POLLIN)

    def discard(self, fd: int) -> None:
        """Wait for one no more, if it is waited for; before it is closed."""
        if fd in self.fds:
            self.fds.discard(fd)
            self.poll.unregister(fd)


Step = Wait | Callable[[], Any]
Steps = Generator[Step, Any, _T]


def drive(steps: Steps[_T]) -> _T:
    """Take all steps in this thread, and return what they come to."""
    try:
        step = next(steps)
        while True:
            try:
                if type(step) is Wait:
                    left = step.deadline - time.monotonic()
                    value = step.poll.poll(left * 1000) if left > 0 else []
                else:
                    value = step()  # type: ignore[operator]
            except BaseException as error:  # noqa: BLE001 - handed to the steps
                step = steps.throw(error)
            else:
                step = steps.send(value)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


class WorkerEnded(Exception):
    """The worker has ended instead of answering; `result` is what PID 1 and cgroup tell of it."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.evidence)
        self.result = result


class WorkerSilent(Exception):
    """The deadline has passed."""


class WorkerOver(Exception):
    """The worker, or its environment, is over: `WorkerConnection.end_of` tells why."""


class PendingCall:
    """An event on its way, or the start of a worker, and what has come back of it so far.

    Attributes:
        number: What its answer must have. No worker can know that of an event before it has it.
        is_first: Whether it is the environment's first event.
        start: Of the first event: the start of its worker, which may have written something.
        is_unsent: Whether nothing of it has reached the worker, nor ever will.
        left_running: What was killed after it, where that is asked for and known.
        answered: When it was answered; 0 before.
        rest: What is still to be sent of it: the socket, the two parts of its frame, and how many
            bytes of them are sent.
    """

    __slots__ = (
        "answered", "begin", "deadline", "is_first", "is_unsent", "left_running", "logs",
        "number", "on_log", "request_id", "rest", "room", "rooms", "start", "timeout",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        timeout: float,
        request_id: str,
        room: int,
        on_log: OnLog | None,
        *,
        is_first: bool = False,
    ) -> None:
        self.number = number
        self.timeout = timeout
        self.request_id = request_id
        self.room = room
        self.logs: dict[str, bytearray] | None = None
        self.on_log = on_log
        self.is_first = is_first
        self.start: PendingCall | None = None
        self.is_unsent = False
        self.left_running: LeftRunning | None = None
        self.answered = 0.0
        self.rest: tuple[Socket, bytes, bytes, int] | None = None
        self.begin = time.monotonic()
        self.deadline = self.begin + timeout

    def restart(self) -> None:
        """Count from now on."""
        self.begin = time.monotonic()
        self.deadline = self.begin + self.timeout

    def log(self, name: str, data: bytes) -> None:
        """Keep what was written, up to the limit; all of it goes to the callback."""
        if self.logs is None:
            self.logs = {"stdout": bytearray(), "stderr": bytearray()}
            self.rooms = {"stdout": self.room, "stderr": self.room}
        room = self.rooms[name]
        if room > 0:
            # One buffer: an object for each read would take 50 bytes for a guest's one.
            self.logs[name] += data[:room]
            self.rooms[name] = room - len(data)
        if self.on_log is not None:
            self.on_log(name, data)

    def belongs_to(self, event: PendingCall) -> None:
        """Give the first event this start of its worker, and its callback what was written then."""
        event.start = self
        if self.on_log is None and event.on_log is not None and self.logs is not None:
            for name, data in self.logs.items():
                if data:
                    event.on_log(name, bytes(data))

    def logged(self, name: str) -> bytes:
        """Return what was kept of ``"stdout"`` or ``"stderr"``."""
        return bytes(self.logs[name]) if self.logs is not None else b""


class InvocationResponse:
    """A function's answer; its `Invocation` is made when somebody asks for it."""

    __slots__ = ("_call", "_describe", "data")

    def __init__(
        self, describe: Callable[..., Invocation], call: PendingCall, data: bytes | memoryview
    ) -> None:
        """`describe` is `Session.describe`."""
        self._describe = describe
        self._call = call
        self.data = data

    def json(self) -> Any:  # noqa: ANN401 - any JSON value
        """Return the answer as a value.

        Raises:
            FunctionError: It is no JSON, which takes a worker that was tampered with.
        """
        try:
            return decode_answer(self.data)
        except ValueError as error:
            what = f"The answer is no JSON: {error}"
            raise FunctionError("Runtime.MarshalError", what, (), self.invocation()) from error

    def invocation(self) -> Invocation:
        """Return the record of the call."""
        return self._describe(self._call, bytes(self.data))


def error_payload(kind: str, message: str) -> bytes:
    """Return the answer that tells of an error, in Lambda's words."""
    return json.dumps({"errorType": kind, "errorMessage": message}).encode()
