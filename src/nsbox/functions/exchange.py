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

from nsbox.errors import SyscallError
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


def poll_failure(error: BaseException) -> BaseException:
    """Return what to raise when poll(2) fails."""
    return SyscallError("poll", error.errno or 0) if isinstance(error, OSError) else error


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
                step = steps.throw(poll_failure(error) if type(step) is Wait else error)
            else:
                step = steps.send(value)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


class WorkerEnded(Exception):
    """The worker has ended instead of answering.

    Attributes:
        result: Its end, by PID 1's answer and the cgroup's counters.
    """

    def __init__(self, result: Result) -> None:
        super().__init__(result.evidence)
        self.result = result


class WorkerSilent(Exception):
    """The deadline has passed."""


class WorkerOver(Exception):
    """The worker or its environment has ended; `WorkerConnection.end_of` returns the reason."""


class PendingCall:
    """An event sent, or a worker's start, until its answer has come; with the log so far.

    Attributes:
        number: The frame number that its answer must have; random for events.
        timeout: Seconds from `begin` to `deadline`.
        request_id: The invocation's; "" for a start.
        room: Bytes of each of stdout and stderr that are kept.
        rooms: Bytes still to be kept, by stream; set with `logs`.
        logs: What was kept, by stream; None while nothing was written.
        on_log: Called with all that is written, or None.
        begin, deadline: By `time.monotonic`.
        is_first: Whether it is the environment's first event.
        start: Of the first event: the start of its worker, whose log goes with it.
        is_unsent: Whether no byte of it has reached the worker, nor will.
        left_running: Processes killed after it, where that is asked for and known.
        answered: Time of the answer, by `time.monotonic`; 0 before.
        rest: What is still to be sent: socket, two parts of the frame, bytes of them sent.
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
        """Have `begin` be now, and `deadline` `timeout` seconds later."""
        self.begin = time.monotonic()
        self.deadline = self.begin + self.timeout

    def log(self, name: str, data: bytes) -> None:
        """Keep `data` of stream `name` up to the limit; `on_log` gets all of it."""
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
        """Attach this start to the first event; its `on_log` gets what the start has written."""
        event.start = self
        if self.on_log is None and event.on_log is not None and self.logs is not None:
            for name, data in self.logs.items():
                if data:
                    event.on_log(name, bytes(data))

    def logged(self, name: str) -> bytes:
        """Return what was kept of ``"stdout"`` or ``"stderr"``."""
        return bytes(self.logs[name]) if self.logs is not None else b""


class InvocationResponse:
    """A function's answer; its `Invocation` is made on demand.

    Attributes:
        data: The JSON, in bytes.
    """

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
    """Return the JSON of an error, with Lambda's ``errorType`` and ``errorMessage``."""
    return json.dumps({"errorType": kind, "errorMessage": message}).encode()
