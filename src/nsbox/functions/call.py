# SPDX-License-Identifier: Apache-2.0
"""An event on its way to a worker, or the worker's start; its answer, or how there is none."""

from __future__ import annotations

import time

# The C half: it has no use for the names of families and types.
from _socket import socket as Socket
from collections.abc import Callable
from typing import Any

from nsbox.values.invocation import FunctionError, Invocation, LeftRunning
from nsbox.values.json_text import decode_answer
from nsbox.values.result import Result

OnLog = Callable[[str, bytes], object]
"""Called with ``"stdout"`` or ``"stderr"`` and bytes as they come."""

Frame = tuple[bytes, bytes | memoryview]
"""Kind and body."""


class WorkerEnded(Exception):
    """The worker has ended instead of answering; `result` is what PID 1 and cgroup tell of it."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.evidence)
        self.result = result


class WorkerSilent(Exception):
    """The deadline has passed."""


class WorkerOver(Exception):
    """The worker, or its environment, is over: `Worker.end_of` waits for what PID 1 tells of it."""


class Call:
    """An event on its way, or the start of a worker, and what has come back of it so far.

    Attributes:
        number: What its answer must have. No worker can know that of an event before it has it.
        is_first: Whether it is the environment's first event.
        start: Of the first event: the start of its worker, which may have written something.
        is_unsent: Whether nothing of it has reached the worker, nor ever will.
        left_running: What was killed after it, where that is asked for and known.
        answered: When it was answered, if something has been waited for since then; else 0.
        rest: What is still to be sent of it, for `Worker.send_rest`: the socket, the two parts of
            its frame, and how many bytes of them are sent.
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
        self.start: Call | None = None
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

    def belongs_to(self, event: Call) -> None:
        """Give the first event this start of its worker, and its callback what was written then."""
        event.start = self
        if self.on_log is None and event.on_log is not None and self.logs is not None:
            for name, data in self.logs.items():
                if data:
                    event.on_log(name, bytes(data))

    def logged(self, name: str) -> bytes:
        """Return what was kept of ``"stdout"`` or ``"stderr"``."""
        return bytes(self.logs[name]) if self.logs is not None else b""


class Answer:
    """A function's answer; its `Invocation` is made when somebody asks for it."""

    __slots__ = ("_call", "_describe", "_end", "data")

    def __init__(
        self, describe: Callable[..., Invocation], call: Call, data: bytes | memoryview
    ) -> None:
        """`describe` is `Invoker.describe`."""
        self._describe = describe
        self._call = call
        self._end = call.answered or time.monotonic()
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
        return self._describe(self._call, bytes(self.data), end=self._end)
