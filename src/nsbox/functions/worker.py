# SPDX-License-Identifier: Apache-2.0
"""The host's end of a worker's socket and streams: frames out, frames and log in; it never waits.

What is half sent or half read is kept. Nothing the worker sends is believed beyond being the
function's own: kinds and sizes have limits, the number of an answer must be that of its event, and
anything else ends the environment.
"""

from __future__ import annotations

import errno
import os
import socket
from _socket import socket as Socket
from contextlib import suppress
from typing import Final

from nsbox.errors import SyscallError
from nsbox.functions.exchange import (
    Frame,
    PendingCall,
    Ready,
    Wait,
    WorkerEnded,
    WorkerOver,
    WorkerSilent,
    poll_failure,
)
from nsbox.guest import runtime
from nsbox.linux.sending import AT_ONCE, send
from nsbox.supervisor.channel import InvocationEndpoints, unblock
from nsbox.supervisor.connection import EnvironmentConnection
from nsbox.supervisor.process import RunningCommand
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


class WorkerConnection:
    """A worker that was started: what was half sent to it or half read from it, and its log.

    Where a fork serves each event, that and its answer have a socket of their own. On the other one
    the worker itself says how a fork ended that gave no whole answer.

    Attributes:
        process: The worker.
        wait: What it says something on; its deadline is that of the call under way.
    """

    def __init__(
        self, connection: EnvironmentConnection, process: RunningCommand, channel: Socket
    ) -> None:
        """`channel` is this end of its socket; both are closed by `close`."""
        self._connection = connection
        self.process = process
        self._base = channel  # the worker's
        self._socket: Socket = channel  # the one that is answered on
        self._event: InvocationEndpoints | None = None
        self._buffer = self._words = b""
        self._body: memoryview | None = None  # of an answer that has begun to come
        self._kind, self._filled = b"", 0
        self._is_ended = False
        self._base_fd = self._fd = channel.fileno()
        self._logs: dict[int, str] = {}
        for name, stream in (("stdout", process.stdout), ("stderr", process.stderr)):
            if stream is not None:
                self._logs[stream.fileno()] = name
        unblock(channel, *self._logs)
        self.wait = Wait([self._fd, *process.descriptors(), *self._logs], 0.0, is_lasting=True)

    def close(self) -> None:
        """Close sockets and streams without waiting: the environment is being closed."""
        if self._event is not None:
            self._event.close()
        self._base.close()
        self.process.abandon()

    def end_events(self) -> None:
        """Shut the socket down for writing: the worker reads its end and exits."""
        with suppress(OSError):  # it is gone
            self._base.shutdown(socket.SHUT_WR)

    def make_event(self) -> None:
        """Make the endpoints of the next event, for `open_event`.

        Raises:
            SyscallError: There is no room for it.
        """
        self.close_event()
        self._event = InvocationEndpoints()

    def open_event(self, call: PendingCall, frame: bytes) -> None:
        """Send `frame` with the worker's ends of the event's endpoints; then `send_event`.

        Raises:
            SyscallError: There is no room for them.
        """
        if self._event is None or self._event.is_sent:
            self.make_event()
        try:
            self._own.send(self._base, frame)
        except ConnectionError:
            call.is_unsent = True  # it has ended, which reading the answer tells
        except OSError as error:
            raise SyscallError("sendmsg", error.errno or 0) from error

    def send_event(self, call: PendingCall, first: bytes, body: bytes = b"") -> None:
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
                self.wait.add(fd)

    def close_event(self) -> None:
        """Close the event's endpoints: processes with the other ends are no longer read from."""
        if (own := self._event) is not None:
            self._stop_reading()
            for fd in own.logs:
                if self._logs.pop(fd, None) is not None:
                    self.wait.discard(fd)
            own.close()
            self._event = None
            self._socket, self._fd = self._base, self._base_fd

    def close_logs(self, call: PendingCall) -> None:
        """Take what the import has written and close its pipes: each event has its own."""
        self.drain_logs(call)
        for fd in self._logs:
            self.wait.discard(fd)
        self._logs = {}
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def event_descriptors(self) -> list[int]:
        """Return those that are closed when an event, or the start, is answered."""
        own = self._event
        return list(self._logs) if own is None else [own.socket.fileno(), *own.logs]

    @property
    def _own(self) -> InvocationEndpoints:
        if self._event is None:
            raise AssertionError("an event that was not opened")
        return self._event

    def _stop_reading(self) -> None:
        """Read no more of the event's socket, which has ended or is to be closed."""
        if self._fd not in (self._base_fd, -1):
            self.wait.discard(self._fd)
            self._fd = -1
        self._buffer, self._body = b"", None

    def send(
        self, call: PendingCall, first: bytes, body: bytes = b"", own: Socket | None = None
    ) -> None:
        """Send of a frame what the socket takes now; `send_rest` goes on with the rest.

        Its header and what else is in `first`, and `body`; on the worker's socket or an `own` one.
        """
        to = self._base if own is None else own
        done, size = 0, len(first) + len(body)
        if size <= _CHUNK:
            first, body = first + body, b""
            done = max(0, send(to.fileno(), first, size, AT_ONCE))
            if done == size:
                return
        call.rest = (to, first, body, done)
        self.send_rest(call)

    def room(self, call: PendingCall) -> Wait:
        """Return what is waited for before `send_rest`: room in the socket, or the worker's end."""
        write = -1 if call.rest is None else call.rest[0].fileno()
        if write < 0:
            raise ValueError("its environment was closed")
        return Wait(self.process.descriptors(), call.deadline, write)

    def send_rest(self, call: PendingCall) -> None:
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
            call.is_unsent = not done  # it has ended, which reading the answer tells

    def start_wait(self, deadline: float) -> Wait:
        """Return what the answer to a start comes on, without the log."""
        return Wait([self._fd, *self.process.descriptors()], deadline)

    def feed_start(self, call: PendingCall, ready: Ready) -> Frame | None:
        """Do as `feed` for the answer to a start that an event was sent along with.

        The answer first: when the worker goes on, what is in the log then is the event's.
        """
        logs = [item for item in ready if item[0] in self._logs]
        others = [item for item in ready if item[0] != self._fd and item not in logs]
        answer = self.feed(call, [(self._fd, 0), *others])
        if answer is None:
            for fd, _ in logs:
                self._read_log(call, fd)
        elif answer != (runtime.READY, runtime.GOES_ON):
            self.drain_logs(call)
        return answer

    def begun(self, call: PendingCall) -> Frame | None:
        """Return the answer if it has come with what was read before."""
        if not self._buffer and not self._words:
            return None
        answer = self._parse(call, b"") if self._buffer else self._parse_words(call)
        if answer is not None:
            self.drain_logs(call)  # written before it
        return answer

    def feed(self, call: PendingCall, ready: Ready) -> Frame | None:
        """Read from what is ready; return the answer when it is whole.

        Raises:
            WorkerSilent: Nothing is: the deadline has passed.
            WorkerOver: It has ended, or its environment: `end_of` says why.
            EnvironmentDied: It broke the rules.
        """
        if not ready:
            raise WorkerSilent
        if len(ready) == 1 and ready[0][0] == self._fd:  # as a rule
            answer = self._read_frame(call)
            if answer is None and self._is_ended:
                raise WorkerOver
            return answer
        answer = None
        has_word = is_over = False
        for fd, _ in ready:
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
            return  # nothing; or it has ended, which reading the answer tells
        if data:
            raise self.violation("it answers before it was asked")

    def drain_logs(self, call: PendingCall) -> None:
        """Take what has been written to the log by now."""
        try:
            ready = self.wait.poll.poll(0)
        except OSError as error:
            raise poll_failure(error) from error
        for fd, _ in ready:
            if fd in self._logs:
                self._read_log(call, fd)

    def violation(self, what: str) -> EnvironmentDied:
        """Kill the environment and return what to raise: its worker broke the rules."""
        self._connection.kill(f"its worker broke the rules: {what}")
        return self._connection.death()

    def end_of(self, call: PendingCall) -> Exception:
        """Wait for what PID 1 or the launcher tells of its end; return what to raise.

        This takes as long as they take, and up to `_END_DEADLINE`.
        """
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
        self._connection.kill(f"its worker had ended ({result.evidence})")
        return WorkerEnded(result)

    def _read_log(self, call: PendingCall, fd: int) -> None:
        for _ in range(_LOG_READS):
            data = _read(fd)
            if data:
                call.log(self._logs[fd], data)
            elif data is not None:
                self.wait.discard(fd)
                del self._logs[fd]
            if len(data or b"") < _CHUNK:
                return

    def _read_frame(self, call: PendingCall) -> Frame | None:
        if self._body is not None:
            return self._read_body(call)
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return None
        except OSError as error:
            self._note_reset(error)
            data = _end_of(error)
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

    def _on_end_of_socket(self, call: PendingCall) -> Frame | None:
        if self._event is None:
            self._note_end()
            return None
        # The worker has an end of it, too, until it has said how the fork ended.
        self._stop_reading()
        word = self._read_word(call)
        if word is None and not self._is_ended:
            raise WorkerOver
        return word

    def _note_end(self) -> None:
        self._is_ended = True
        self.wait.discard(self._base_fd)

    def _parse(self, call: PendingCall, data: bytes) -> Frame | None:
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

    def _read_body(self, call: PendingCall) -> Frame | None:
        """Read the rest of an answer into one buffer of its size, as far as it has come."""
        body = self._body or memoryview(b"")
        while self._filled < len(body):
            try:
                count = self._socket.recv_into(body[self._filled :])
            except BlockingIOError:
                return None
            except OSError as error:
                count = len(_end_of(error))
            if not count:
                return self._on_end_of_socket(call)
            self._filled += count
        self._body = None
        return self._kind, body

    def _read_word(self, call: PendingCall) -> Frame | None:
        """Read what the worker itself says while a fork of it is to answer."""
        try:
            data = self._base.recv(_CHUNK)
        except BlockingIOError:
            return None
        except OSError as error:
            data = _end_of(error)
        if not data:
            self._note_end()
            return None
        self._words += data
        return self._parse_words(call)

    def _parse_words(self, call: PendingCall) -> Frame | None:
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


def _end_of(error: OSError) -> bytes:
    """Return what was read, nothing, when the other end is gone."""
    if isinstance(error, ConnectionError):
        return b""
    raise SyscallError("recvfrom", error.errno or 0) from error


def _read(fd: int) -> bytes | None:
    """Return what a pipe has, up to a chunk; None when it has nothing now."""
    try:
        return os.read(fd, _CHUNK)
    except BlockingIOError:
        return None
    except OSError as error:
        raise SyscallError("read", error.errno or 0, "the log") from error
