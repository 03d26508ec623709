# SPDX-License-Identifier: Apache-2.0
"""The host's end of a worker's socket and streams: frames out, frames and log in, with deadlines.

Nothing the worker sends is believed beyond being the function's own: kinds and sizes have limits,
the number of an answer must be that of its event, and anything else ends the environment.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from _socket import socket as Socket
from contextlib import suppress
from typing import Final

from nsbox.errors import SyscallError
from nsbox.functions.call import Call, Frame, WorkerEnded, WorkerOver, WorkerSilent
from nsbox.guest import runtime as runtime
from nsbox.linux.sending import send_at_once
from nsbox.supervisor.channel import EventPlace
from nsbox.supervisor.connection import EnvironmentConnection
from nsbox.supervisor.process import Process
from nsbox.values.result import EnvironmentDied

_HEADER_SIZE: Final = runtime.HEADER.size
_CHUNK: Final = 1 << 16
_LOG_READS: Final = 32  # of `_CHUNK` each, at most: a pipe has up to 1 MiB (pipe(7))
_END_DEADLINE: Final = 2.0  # seconds in which a worker whose socket has closed must have ended
_MOST: Final = {
    runtime.READY: len(runtime.GOES_ON),
    runtime.BROKEN: runtime.ANSWER_MAX,
    runtime.ANSWER: runtime.ANSWER_MAX,
    runtime.ERROR: runtime.ANSWER_MAX,
    runtime.ENDED: 16,
}


class Worker:
    """A worker that was started.

    Where a fork serves each event, that and its answer have a socket of their own. On the other one
    the worker itself says how a fork ended that gave no whole answer.
    """

    def __init__(self, link: EnvironmentConnection, process: Process, channel: Socket) -> None:
        """`channel` is this end of its socket; both are closed by `close`."""
        self._link = link
        self.process = process
        self._base = channel  # the worker's
        self._socket: Socket = channel  # the one that is answered on
        self._event: EventPlace | None = None
        self._buffer = self._words = b""
        self._body: memoryview | None = None  # of an answer that has begun to come
        self._kind, self._filled = b"", 0
        self._is_ended = False
        channel.setblocking(False)
        self._base_fd = self._fd = channel.fileno()
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        process.register(self._poll)
        self._logs: dict[int, str] = {}
        for name, stream in (("stdout", process.stdout), ("stderr", process.stderr)):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
                self._logs[stream.fileno()] = name
                self._poll.register(stream.fileno(), select.POLLIN)

    def close(self) -> None:
        """Let go of it, and wait for nothing: its environment is being closed."""
        if self._event is not None:
            self._event.close()
        self._base.close()
        self.process.abandon()

    def end_events(self) -> None:
        """Tell it that there are no more events, which wakes it."""
        with suppress(OSError):  # it is gone
            self._base.shutdown(socket.SHUT_WR)

    def descriptors(self) -> list[int]:
        """Return what becomes readable when there is something to `advance` with."""
        own = [] if self._is_ended else [self._base_fd]
        if self._fd not in (self._base_fd, -1):
            own.append(self._fd)
        return [*own, *self.process.descriptors(), *self._logs]

    def make_event(self) -> None:
        """Make what an event has for itself, for `open_event`.

        Raises:
            SyscallError: There is no room for it.
        """
        self.close_event()
        self._event = EventPlace()

    def open_event(self, call: Call, frame: bytes) -> None:
        """Send `frame` with the other ends; `send_event` is next, then `await_event`.

        Raises:
            SyscallError: There is no room for them.
        """
        if self._event is None or self._event.is_sent:
            self.make_event()
        try:
            self._own.send(self._base, frame)
        except ConnectionError:
            call.is_unsent = True  # it has ended, which is seen by who waits for the answer
        except OSError as error:
            raise SyscallError("sendmsg", error.errno or 0) from error

    def send_event(self, call: Call, first: bytes, body: bytes = b"") -> None:
        """Send a frame on the event's own socket; see `send`."""
        if not call.is_unsent:
            self.send(call, first, body, self._own.socket)

    def await_event(self) -> None:
        """Have answer and log come from the event's own socket and pipes."""
        if (own := self._event) is not None:
            self._words, self._buffer = self._buffer, b""  # behind the answer to the start
            self._socket, self._fd = own.socket, own.socket.fileno()
            self._logs |= own.logs
            for fd in (self._fd, *own.logs):
                self._poll.register(fd, select.POLLIN)

    def close_event(self) -> None:
        """Close what an event had for itself: whoever has the other ends is not heard."""
        if (own := self._event) is not None:
            self._stop_reading()
            for fd in own.logs:
                if self._logs.pop(fd, None) is not None:
                    self._poll.unregister(fd)
            own.close()
            self._event = None
            self._socket, self._fd = self._base, self._base_fd

    def close_logs(self, call: Call) -> None:
        """Take what the import has written and close its pipes: each event has its own."""
        self.drain_logs(call)
        for fd in self._logs:
            self._poll.unregister(fd)
        self._logs = {}
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def event_descriptors(self) -> list[int]:
        """Return those that are closed when an event, or the start, is answered."""
        own = self._event
        return list(self._logs) if own is None else [own.socket.fileno(), *own.logs]

    @property
    def _own(self) -> EventPlace:
        if self._event is None:
            raise AssertionError("an event that was not opened")
        return self._event

    def _stop_reading(self) -> None:
        """Read no more of the event's socket, which has ended or is to be closed."""
        if self._fd not in (self._base_fd, -1):
            self._poll.unregister(self._fd)
            self._fd = -1
        self._buffer, self._body = b"", None

    def send(self, call: Call, first: bytes, body: bytes = b"", own: Socket | None = None) -> None:
        """Send of a frame what the socket takes now; `send_rest` waits until it has all of it.

        Its header and what else is in `first`, and `body`; on the worker's socket or an `own` one.
        """
        to = self._base if own is None else own
        done, size = 0, len(first) + len(body)
        if size <= _CHUNK:
            first, body = first + body, b""
            done = send_at_once(to, first)
            if done == size:
                return
        call.rest = (to, first, body, done)
        self._go_on(call)

    def _go_on(self, call: Call) -> None:
        """Send what the socket takes now."""
        if call.rest is None:
            return
        to, first, body, done = call.rest
        call.rest = None
        try:
            while done < len(first) + len(body):
                rest = memoryview(body)[max(0, done - len(first)) :]
                done += to.sendmsg([first[done:], rest])
        except BlockingIOError:
            call.rest = (to, first, body, done)
        except OSError:
            call.is_unsent = not done  # it has ended, which is seen by who waits for the answer

    def send_rest(self, call: Call) -> None:
        """Wait until a worker that does not read as fast as that has room, or ends.

        Raises:
            WorkerSilent: It does not read it.
        """
        while call.rest is not None:
            fd = call.rest[0].fileno()
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            self.process.register(poll)
            left = call.deadline - time.monotonic()
            ready = {fd for fd, _ in poll.poll(max(0.0, left) * 1000)}
            if not ready:
                raise WorkerSilent
            if fd not in ready:
                call.rest = None
                return
            self._go_on(call)

    def exchange_start(self, call: Call, moment: float) -> Frame:
        """Wait for the answer to a start that an event was sent along with.

        Nothing of the log is read before `moment`, so that a worker that goes on to the event
        before it knows that its import has written nothing (`nsbox.guest.runtime`).

        Raises:
            WorkerSilent, WorkerEnded, EnvironmentDied: As `advance`.
        """
        self.send_rest(call)
        own = self._fd
        poll = select.poll()
        poll.register(own, select.POLLIN)
        self.process.register(poll)
        deadline = min(moment, call.deadline)
        while True:
            left = deadline - time.monotonic()
            ready = [fd for fd, _ in poll.poll(left * 1000)] if left > 0 else []
            if not ready and deadline == call.deadline:
                raise WorkerSilent
            if not ready:
                poll, deadline = self._poll, call.deadline
                continue
            # The answer first: when it goes on, what is in the log now is the event's.
            logs = [fd for fd in ready if fd in self._logs]
            ready = [own, *(fd for fd in ready if fd not in (own, *logs))]
            answer = self._advance(call, ready)
            if answer is not None:
                if answer != (runtime.READY, runtime.GOES_ON):
                    self.drain_logs(call)
                return answer
            for fd in logs:
                self._read_log(call, fd)

    def exchange(self, call: Call) -> Frame:
        """Wait for the frame that answers `call`.

        Raises:
            WorkerSilent, WorkerEnded, EnvironmentDied: As `advance`.
        """
        if call.rest is not None:
            self.send_rest(call)
        if self._buffer or self._words:
            answer = self._parse(call, b"") if self._buffer else self._parse_words(call)
            if answer is not None:
                self.drain_logs(call)  # written before it
                return answer
        while True:
            left = call.deadline - time.monotonic()
            ready = self._poll.poll(left * 1000) if left > 0 else []
            if not ready:
                raise WorkerSilent
            try:
                if len(ready) == 1 and ready[0][0] == self._fd:
                    answer = self._read_frame(call)
                    if answer is None and self._is_ended:
                        raise WorkerOver
                else:
                    answer = self.advance(call, [fd for fd, _ in ready])
            except WorkerOver:
                raise self.end_of(call) from None
            if answer is not None:
                return answer

    def _advance(self, call: Call, ready: list[int]) -> Frame | None:
        """Do as `advance`, and wait for what is told of its end."""
        try:
            return self.advance(call, ready)
        except WorkerOver:
            raise self.end_of(call) from None

    def advance(self, call: Call, ready: list[int]) -> Frame | None:
        """Read from what is ready; return the answer when it is whole.

        Raises:
            WorkerOver: It has ended, or its environment: `end_of` says why.
            EnvironmentDied: It broke the rules.
        """
        answer = None
        has_word = is_over = False
        for fd in ready:
            if fd == self._fd:
                answer = self._read_frame(call)
            elif fd == self._base_fd:
                has_word = True
            elif fd in self._logs:
                self._read_log(call, fd)
            else:
                is_over = True
        if has_word and answer is None:
            answer = self._read_word(call)
        if answer is None and (is_over or self._is_ended):
            raise WorkerOver
        return answer

    def check_silent(self) -> None:
        """Make sure that what is read next was written after this.

        Raises:
            EnvironmentDied: There is something: an invocation must not answer the next one's event.
        """
        try:
            data = self._buffer or self._base.recv(1, socket.MSG_PEEK)
        except OSError:
            return  # nothing; or it has ended, which is seen by who waits for the answer
        if data:
            raise self.violation("it answers before it was asked")

    def drain_logs(self, call: Call) -> None:
        """Take what has been written to the log by now."""
        for fd, _ in self._poll.poll(0):
            if fd in self._logs:
                self._read_log(call, fd)

    def violation(self, what: str) -> EnvironmentDied:
        """Kill the environment and return what to raise: its worker broke the rules."""
        self._link.kill(f"its worker broke the rules: {what}")
        return EnvironmentDied(f"environment {self._link.env_id}: {self._link.describe_end()}")

    def end_of(self, call: Call) -> Exception:
        """Wait for what PID 1 or the launcher tells of its end; return what to raise."""
        try:
            result = self.process.wait(_END_DEADLINE)
        except TimeoutError:
            return self.violation("it has closed its socket")
        except EnvironmentDied as error:
            return error
        self.drain_logs(call)
        if self._event is not None:
            try:
                self._event.socket.recv(1, socket.MSG_PEEK)
            except OSError as error:
                self._note_reset(error)
            call.is_unsent |= self._event.is_unread
        self._link.kill(f"its worker had ended ({result.evidence})")
        return WorkerEnded(result)

    def _read_log(self, call: Call, fd: int) -> None:
        for _ in range(_LOG_READS):
            data = _read(fd)
            if data:
                call.log(self._logs[fd], data)
            elif data is not None:
                self._poll.unregister(fd)
                del self._logs[fd]
            if len(data or b"") < _CHUNK:
                return

    def _read_frame(self, call: Call) -> Frame | None:
        if self._body is not None:
            return self._read_body(call)
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return None
        except OSError as error:
            self._note_reset(error)
            data = b""
        if not data:
            return self._on_end_of_socket(call)
        size = len(data)
        if size >= _HEADER_SIZE and not self._buffer:
            kind, length, number = runtime.HEADER.unpack_from(data)
            if number == call.number and length == size - _HEADER_SIZE and kind == runtime.ANSWER:
                return kind, data[_HEADER_SIZE:]
        return self._parse(call, data)

    def _note_reset(self, error: OSError) -> None:
        """Note that the event's socket was closed with something in it that nobody had read.

        A fork reads the event whole before it does anything else.
        """
        if self._event is not None and error.errno == errno.ECONNRESET:
            self._event.is_unread = True

    def _on_end_of_socket(self, call: Call) -> Frame | None:
        if self._event is None:
            self._is_ended = True
            return None
        # The worker has an end of it, too, until it has said how the fork ended.
        self._stop_reading()
        word = self._read_word(call)
        if word is None and not self._is_ended:
            raise WorkerOver
        return word

    def _parse(self, call: Call, data: bytes) -> Frame | None:
        data = self._buffer + data if self._buffer else data
        if len(data) < _HEADER_SIZE:
            self._buffer = data
            return None
        kind, length, number = runtime.HEADER.unpack_from(data)
        if kind == runtime.ENDED:
            raise self.violation("it answers what was not asked")
        if length > _MOST.get(kind, -1):
            raise self.violation(f"its answer of kind {kind!r} has {length} bytes")
        if number != call.number:
            raise self.violation(f"its answer has the number {number} and not {call.number}")
        end = _HEADER_SIZE + length
        if len(data) < end:
            self._buffer = b""
            whole = bytearray(length)
            self._filled = len(data) - _HEADER_SIZE
            whole[: self._filled] = data[_HEADER_SIZE:]
            self._kind, self._body = kind, memoryview(whole)
            return self._read_body(call)
        if len(data) > end and not (kind == runtime.READY and length):
            raise self.violation("it says more than its answer")
        self._buffer = data[end:]
        return kind, data[_HEADER_SIZE:end]

    def _read_body(self, call: Call) -> Frame | None:
        """Read the rest of an answer into one buffer of its size, as far as it has come."""
        body = self._body or memoryview(b"")
        while self._filled < len(body):
            try:
                count = self._socket.recv_into(body[self._filled :])
            except BlockingIOError:
                return None
            except OSError:
                count = 0
            if not count:
                return self._on_end_of_socket(call)
            self._filled += count
        self._body = None
        return self._kind, body

    def _read_word(self, call: Call) -> Frame | None:
        """Read what the worker itself says while a fork of it is to answer."""
        try:
            data = self._base.recv(_CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            self._is_ended = True
            return None
        self._words += data
        return self._parse_words(call)

    def _parse_words(self, call: Call) -> Frame | None:
        data = self._words
        while len(data) >= _HEADER_SIZE:
            kind, length, number = runtime.HEADER.unpack_from(data)
            if kind != runtime.ENDED or length > _MOST[runtime.ENDED]:
                raise self.violation(f"it says {kind!r} of {length} bytes while a fork answers")
            end = _HEADER_SIZE + length
            if len(data) < end:
                break
            body, data = data[_HEADER_SIZE:end], data[end:]
            if number == call.number:
                self._words = data
                return kind, body
        self._words = data
        return None


def _read(fd: int) -> bytes | None:
    """Return what a pipe has, up to a chunk; None when it has nothing now."""
    try:
        return os.read(fd, _CHUNK)
    except BlockingIOError:
        return None
