# SPDX-License-Identifier: Apache-2.0
"""One command in an environment: its channel to PID 1, its streams, and the verdict on its end."""

from __future__ import annotations

import io
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import IO, Any, Final, Self

from nsbox.errors import ConfigError, SyscallError
from nsbox.guest import protocol as p
from nsbox.launcher import protocol
from nsbox.linux.owned import Descriptor
from nsbox.linux.proc import pidfd_number
from nsbox.supervisor.channel import (
    BrokenAnswer,
    Channel,
    Reply,
    RunRequest,
    WorkerEndpoints,
    make_pipe,
    unblock,
)
from nsbox.supervisor.connection import Counters, EnvironmentConnection
from nsbox.supervisor.evidence import Verdict, judge_signal, start_error
from nsbox.supervisor.reports import exit_code
from nsbox.supervisor.streams import NAMES, Relays, descriptor_of, gives_more
from nsbox.values.config import parse_patience
from nsbox.values.counters import oom_evidence, usage_between
from nsbox.values.result import EnvironmentDied, Outcome, Protections, Result

PIPE: Final = -1
"""Make a pipe, whose other end is an attribute of the `Process`."""
DEVNULL: Final = -3
"""Give the command the environment's own /dev/null."""

KILL_DEADLINE: Final = 5.0
"""Seconds PID 1 may take to end a killed command before the whole environment is killed."""
_CHUNK: Final = 1 << 16
_LEAST_CPU_WAIT: Final = 0.01
_LONGEST_WAIT: Final = int(KILL_DEADLINE * 1000)  # ms: a kill by another thread is followed up
_DYING: Final = 10  # ms between looks at a killed PID 1 where there is no room for a pidfd
_CLOSED: Final = "its environment was closed"

Stream = int | IO[Any] | None
Streams = tuple[Stream, Stream, Stream]
"""stdin, stdout and stderr."""


class RunningCommand:
    """A command in an environment, or the worker of its function, until its `Result`.

    Attributes:
        argv, pid, stdin, stdout, stderr, tty: As of `nsbox.Process`, which users have of it.
    """

    def __init__(
        self,
        connection: EnvironmentConnection,
        argv: tuple[str, ...],
        request: RunRequest | WorkerEndpoints,
        streams: Streams = (None, None, None),
        *,
        protections: Callable[[], Protections],
        cpu_time: float | None = None,
    ) -> None:
        """Start `argv` with `streams`; or, given endpoints, take their worker for the command."""
        self._protections = protections
        self._connection = connection
        self.argv = argv
        self.pid = 0
        self.tty = -1
        self._terminal: Descriptor | None = None  # what has that descriptor
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        self.stderr: IO[bytes] | None = None
        self._verdict: Verdict | None = None
        self._result: Result | None = None
        self._death: Exception | None = None
        self._killed_at: float | None = None  # None for a verdict: it is still to be killed
        self._answer: Reply | None = None  # PID 1's, until it has been acted on
        self._cpu_time = cpu_time
        self._next_cpu_check = 0.0
        self._lock = threading.RLock()
        self._heard = 0  # what PID 1 and the launcher have said; it is not there to be read again
        self._host_pid: int | None = None  # told only of a command that SIGSYS has ended
        self._is_shown = False  # it was told, and taken
        self._request: RunRequest | None = None
        self._relays = Relays()
        self._channel: Channel | None = None  # a worker's is made when its end is asked for
        if isinstance(request, WorkerEndpoints):
            self._before: Counters = {}  # all that was used since the birth is the worker's
            self._started_at = time.monotonic()
            self.stdout, self.stderr = request.stdout, request.stderr
        else:
            self._request = request
            self._before = connection.counters()
            self._started_at = time.monotonic()
            self._start(request, streams)
        if cpu_time is not None:
            self._next_cpu_check = self._started_at + self._cpu_wait(cpu_time)

    def _start(self, request: RunRequest, streams: Streams) -> None:
        inside: list[io.FileIO] = []
        given: list[int] = []
        try:
            stdio = []
            for number, stream in enumerate(streams):
                if stream == PIPE:
                    ours, theirs = make_pipe(to_guest=number == 0)
                    inside.append(theirs)
                    given.append(theirs.fileno())
                    setattr(self, NAMES[number], ours)
                elif stream is not None and stream != DEVNULL:
                    fd = descriptor_of(stream, NAMES[number])
                    if gives_more(fd, NAMES[number], is_own=self._connection.has_callers_id):
                        fd = self._relays.add(fd, NAMES[number])
                    given.append(fd)
                stdio.append(stream is not None and stream != DEVNULL)
            frame = request.encode(self.argv, stdio)
            self._connection.running.add(id(self))
            self._channel = self._connection.ask(request.operation, frame, request.arrange(given))
            self._relays.start()
            if request.is_announced:
                self._await_start(request, self._channel)
            if request.extra is None:
                self._channel.never_wait()
            else:  # it is a worker
                self._close_channel()
                self._channel = None
        except BaseException:
            self._connection.running.discard(id(self))
            self._close_channel()  # which ends a command that has begun
            self._close_streams()
            raise
        finally:
            for end in inside:
                end.close()

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()

    def _await_start(self, request: RunRequest, channel: Channel) -> None:
        try:
            kind, first, stage, _, ends = channel.receive_answer()
            if ends:
                self._terminal = ends[0]
                self.tty = ends[0].fileno()
            if kind not in (p.FAILED, p.STARTED):
                raise BrokenAnswer("PID 1 sent a malformed answer")
        except OSError as error:
            channel.close()
            raise self._connection.failed(error) from error
        if kind == p.FAILED:
            channel.close()
            raise start_error(self._connection, self.argv[0], request, first, p.STAGES[stage])
        self.pid = first

    # -- what a caller does ---------------------------------------------------------------------

    def poll(self) -> Result | None:
        """Return the result when the command is over, else None. Does not wait."""
        return self._advance(0.0)

    def wait(self, timeout: float | None = None) -> Result:
        """See `Process.wait`."""
        if timeout is not None:
            timeout = parse_patience(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left < 0:
                raise TimeoutError(f"{self.argv[0]!r} is not over after {timeout:g} seconds")
            result = self._advance(left)
            if result is not None:
                return result

    def kill(self) -> None:
        """SIGKILL the command and everything it started. The outcome will be KILLED."""
        self.kill_with_verdict(Outcome.KILLED, "the caller asked for it")

    def send_signal(self, number: int, *, group: bool = False) -> None:
        """See `Process.send_signal`."""
        if not isinstance(number, int) or number not in signal.valid_signals():
            raise ConfigError(f"signal: must be a number such as signal.SIGTERM, got {number!r}")
        try:
            self._send(p.SIGNAL_GROUP if group else p.SIGNAL_MAIN, number)
        except OSError as error:
            is_full = isinstance(error, BlockingIOError)
            note = "PID 1 has not read the signals before: is it frozen?" if is_full else ""
            raise SyscallError("sendto", error.errno or 0, note=note) from error

    def close(self) -> None:
        """See `Process.close`."""
        try:
            if self._result is None and self._death is None:
                self.kill()
                with suppress(EnvironmentDied):  # then it is gone too
                    self.wait(KILL_DEADLINE * 2)
        except Exception:  # after an interrupt it is closed again, and its end is to be heard
            self.abandon()
            raise
        self._connection.running.discard(id(self))
        self.abandon()

    def abandon(self) -> None:
        """Close pipes and channel, and wait for nothing: its environment is being closed."""
        self._close_channel()
        self._close_streams()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the engine ----------------------------------------------------------------------------

    def communicate(
        self,
        data: bytes,
        timeout: float | None,
        output_max: int,
        on_stderr: Callable[[bytes], object] | None = None,
    ) -> Result:
        """Feed `data`, read both pipes as they come, enforce the limits, return the result.

        With `on_stderr` stderr is a log: all of it goes there as it comes, the first `output_max`
        bytes are kept, and more is no reason to kill.
        """
        deadline = None if timeout is None else self._started_at + timeout
        outputs = {
            stream.fileno(): (name, io.BytesIO(), hear)
            for name, stream, hear in (
                ("stdout", self.stdout, None),
                ("stderr", self.stderr, on_stderr),
            )
            if stream is not None
        }
        captured = {name: buffer for name, buffer, _ in outputs.values()}
        poller = select.poll()
        for fd in outputs:
            unblock(fd)
            poller.register(fd, select.POLLIN)
        view = memoryview(data)
        if self.stdin is not None:
            if view:
                unblock(self.stdin.fileno())
                poller.register(self.stdin.fileno(), select.POLLOUT)
            else:
                self.stdin.close()
        self.register(poller)
        result = None
        while result is None:
            wait = self.poll_milliseconds(deadline)
            ready = _poll(poller, _LONGEST_WAIT if wait is None else wait)
            # Only output, and no clock that runs: then there is no end to look for yet.
            is_due = wait is not None or not ready
            for fd, _ in ready:
                if fd in outputs:
                    if not self._read_some(fd, output_max, *outputs[fd]):
                        poller.unregister(fd)
                        del outputs[fd]
                elif self.stdin is not None and fd == self.stdin.fileno():
                    view = self._write_some(fd, view)
                    if not view:
                        poller.unregister(fd)
                        self.stdin.close()
                        self.stdin = None
                else:
                    is_due = True
            if deadline is not None and time.monotonic() >= deadline:
                self.kill_with_verdict(Outcome.TIMED_OUT, f"not over after {timeout:g} s")
            if is_due or self._killed_at is not None:
                result = self._advance(0.0)
        # Every process that could write is gone: what is in the pipes now is all there will be.
        # Not "read until EOF": a descriptor may have been sent to a command that still runs.
        for fd, output in outputs.items():
            while self._read_some(fd, output_max, *output):
                if not protocol.is_readable(fd, 0):
                    break
        if self._verdict is not None and self._verdict.outcome is Outcome.OUTPUT_LIMIT:
            result = self._with_verdict(result)
        self._close_streams()
        # BytesIO gives away what it holds without a copy: the cap is the whole cost.
        whole = {name: buffer.getvalue() for name, buffer in captured.items()}
        return replace(result, stdout=whole.get("stdout", b""), stderr=whole.get("stderr", b""))

    def register(self, poller: select.poll) -> None:
        """Register with `poller` what becomes readable when `poll` may have an answer."""
        for fd in self.descriptors():
            poller.register(fd, select.POLLIN)

    def descriptors(self) -> list[int]:
        """Return the descriptors that become readable when `poll` may have an answer."""
        # The connection has none after the environment's close; the channel tells its end too.
        own = -1 if self._channel is None else self._channel.socket.fileno()
        return [fd for fd in (own, self._connection.fileno()) if fd >= 0]

    def _read_some(
        self,
        fd: int,
        limit: int,
        name: str,
        buffer: io.BytesIO,
        hear: Callable[[bytes], object] | None,
    ) -> bool:
        """Read once; False at the end of the stream. Bytes over the limit are dropped.

        They end the command, unless the stream is one that `hear` is given all of.
        """
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return True
        except OSError as error:
            raise SyscallError("read", error.errno or 0, name) from error
        if not data:
            return False
        room = limit - buffer.tell()
        buffer.write(data[:room])
        if hear is not None:
            hear(data)
        elif len(data) > room:
            self.kill_with_verdict(Outcome.OUTPUT_LIMIT, f"{name} is over {limit} bytes")
        return True

    def _write_some(self, fd: int, view: memoryview) -> memoryview:
        try:
            return view[os.write(fd, view[:_CHUNK]) :]
        except BlockingIOError:
            return view
        except BrokenPipeError:
            return view[:0]  # it does not read its input, which is its right
        except OSError as error:
            raise SyscallError("write", error.errno or 0, "stdin") from error

    def poll_milliseconds(self, deadline: float | None) -> int | None:
        """Return how long to wait before `poll` is due: CPU time to check, a kill to follow up."""
        moments = [deadline] if deadline is not None and self._killed_at is None else []
        if self._cpu_time is not None and self._killed_at is None:
            moments.append(self._next_cpu_check)
        if self._killed_at is not None:
            moments.append(self._killed_at + KILL_DEADLINE)
        if not moments:
            return None
        return max(0, int((min(moments) - time.monotonic()) * 1000) + 1)

    def _advance(self, timeout: float | None) -> Result | None:
        """Wait up to `timeout` for the end; look after CPU time and the kill deadline."""
        with self._lock:
            if self._death is not None:
                raise self._death
            if self._result is not None:
                return self._result
            poller = select.poll()
            channel = self._channel or self._ask_for_end()
            self.register(poller)
            self._see_to_kill()
            has_answer = channel is not None and (self._answer is not None or channel.is_answered)
            wait = 0 if has_answer else self.poll_milliseconds(None)
            heard = self._heard
        # Outside the lock: another thread may kill it meanwhile, or hear the answer.
        wait = _LONGEST_WAIT if wait is None else wait
        if timeout is not None:
            wait = min(wait, max(0, int(timeout * 1000) + (timeout > 0)))
        if channel is None:  # PID 1 is gone or killed, and there may be nothing here to poll
            wait = 0 if self._connection.has_ended(wait / 1000) else min(wait, _DYING)
        ready = {fd for fd, _ in _poll(poller, wait)}
        with self._lock:
            if heard != self._heard:
                return self._advance(0.0)
            try:
                if channel is not None and (has_answer or channel.socket.fileno() in ready):
                    self._finish_from_channel(channel)
                elif (
                    ready or channel is None or self._connection.closing
                ) and self._connection.note_end():
                    self._finish_from_end()
            finally:
                if self._result is not None or self._death is not None:
                    self._connection.running.discard(id(self))
                    self._end_relays()
            self._check_cpu_time()
            if self._killed_at is not None and self._result is None:
                late = time.monotonic() - self._killed_at - KILL_DEADLINE
                if late > 0:
                    self._connection.kill("PID 1 did not end a killed command")
            return self._result

    def _ask_for_end(self) -> Channel | None:
        """Ask PID 1 how a worker ends; None when PID 1 is gone, too."""
        with suppress(EnvironmentDied):
            self._channel = self._connection.ask(p.END, b"", [])
            self._channel.never_wait()
        return self._channel

    def _end_relays(self) -> None:
        try:
            self._relays.finish()
        except SyscallError as error:
            if self._death is None:
                self._death = error
                raise

    def _check_cpu_time(self) -> None:
        if self._cpu_time is None or self._result is not None or self._killed_at is not None:
            return
        if time.monotonic() < self._next_cpu_check:
            return
        used = self._cpu_used()
        if used >= self._cpu_time:
            self.kill_with_verdict(
                Outcome.CPU_TIMED_OUT,
                f"used {used:.3f} s of CPU of {self._cpu_time:g} s",
            )
        self._next_cpu_check = time.monotonic() + self._cpu_wait(self._cpu_time - used)

    def _cpu_used(self) -> float:
        now = self._connection.cpu_usec()
        before = self._before.get("cpu_usec")
        return 0.0 if now is None or before is None else (now - before) / 1e6

    def _cpu_wait(self, left: float) -> float:
        """Return how long the limit cannot be reached: all CPUs would have to run for it."""
        return max(left / (os.cpu_count() or 1), _LEAST_CPU_WAIT)

    def kill_with_verdict(self, outcome: Outcome, evidence: str) -> None:
        """Note the verdict, then kill. The first verdict stands.

        Args:
            outcome: What it will be, if it does not end by itself before the signal arrives.
            evidence: Why, as a fact: what was measured.
        """
        with self._lock:
            if self._result is not None or self._verdict is not None:
                if self._verdict is None and outcome is Outcome.OUTPUT_LIMIT:
                    self._verdict = Verdict(outcome, evidence)
                self._see_to_kill()
                return
            self._verdict = Verdict(outcome, evidence)
            self._see_to_kill()

    def _see_to_kill(self) -> None:
        """Do what a verdict asks for, which an interrupt may have come before."""
        if self._verdict is not None and self._killed_at is None and self._result is None:
            try:
                self._send(p.SIGNAL_ALL, signal.SIGKILL)
            except BlockingIOError:
                pass  # PID 1 is frozen, or stopped, and has its time to read it
            except OSError as error:
                self._connection.kill(f"PID 1 could not be told to kill a command ({error})")
            self._killed_at = time.monotonic()

    def _send(self, kind: bytes, number: int) -> None:
        with self._lock:
            if self._result is None and self._channel is not None:
                with suppress(ConnectionError):  # it has just ended; the answer is there to be read
                    self._channel.socket.send(p.SIGNAL.pack(kind, number))

    # -- the verdict ---------------------------------------------------------------------------

    def _finish_from_channel(self, channel: Channel) -> None:
        try:
            self._heard += 1
            self._answer = answer = self._answer or channel.feed()
            if answer is None:
                return
            kind, status, user, system, ends = answer
            if kind == p.SHOWN and not self._is_shown and len(ends) == 1:
                if self._host_pid is None:
                    self._host_pid = pidfd_number(ends[0].fileno())
                ends[0].close()
                with suppress(OSError):
                    self._send(p.SEEN, 0)
                self._is_shown = True
                self._answer = None
                return
            for end in ends:
                end.close()
            unstarted = self._request if kind == p.FAILED and not self.pid else None
            code = None if kind not in (p.EXITED, p.SWEPT) else exit_code(status)
            if unstarted is None and code is None:
                raise BrokenAnswer("PID 1 sent a malformed answer")
        except OSError as error:
            if not isinstance(error, ConnectionError):  # not heard: PID 1 ends the command
                self._close_channel()
                self._death = self._connection.failed(error)
                raise self._death from error
            self._connection.kill_for(error)
            if self._connection.await_end() or self._connection.closing:
                self._finish_from_end()
                return
            self._death = self._connection.died(error)
            raise self._death from error
        if unstarted is not None:
            self._close_channel()
            self._death = start_error(
                self._connection, self.argv[0], unstarted, status, p.STAGES[user]
            )
            raise self._death
        returncode = code or 0
        after = dict(self._connection.usage())
        if after.get("cpu_user_usec") is None:
            # Nobody else counts it, or the cgroup has gone with the environment just now.
            after["cpu_user_usec"] = user + (self._before.get("cpu_user_usec") or 0)
            after["cpu_system_usec"] = system + (self._before.get("cpu_system_usec") or 0)
        if evidence := oom_evidence(self._before, after):
            # v1 kills one process; the environment's memory is as good as gone all the same.
            self._connection.kill(evidence)
            self._conclude(Outcome.OOM_KILLED, returncode, evidence, after)
        elif self._verdict is not None and self._verdict.holds(returncode):
            self._conclude(self._verdict.outcome, returncode, self._verdict.say(returncode), after)
        elif self._connection.closing and returncode in (-signal.SIGTERM, -signal.SIGKILL):
            self._conclude(Outcome.KILLED, returncode, _CLOSED, after)
        elif kind == p.SWEPT and returncode == -signal.SIGKILL:
            evidence = "its environment was reset; nsbox killed it"
            self._conclude(Outcome.KILLED, returncode, evidence, after)
        elif returncode >= 0:
            self._conclude(Outcome.EXITED, returncode, f"exit status {returncode}", after)
        else:
            outcome, evidence = judge_signal(-returncode, self._host_pid or 0, self._started_at)
            self._conclude(outcome, returncode, evidence, after)

    def _finish_from_end(self) -> None:
        """Conclude from the launcher's report on the end of the whole environment."""
        self._heard += 1
        after = self._connection.usage()
        if evidence := oom_evidence(self._before, after):
            self._conclude(Outcome.OOM_KILLED, -signal.SIGKILL, evidence, after)
        elif self._verdict is not None:
            evidence = f"{self._verdict.say(-signal.SIGKILL)} with its whole environment"
            self._conclude(self._verdict.outcome, -signal.SIGKILL, evidence, after)
        elif self._connection.closing:
            self._conclude(Outcome.KILLED, -signal.SIGKILL, _CLOSED, after)
        else:
            self._close_channel()
            what = f"{self.argv[0]!r}: {self._connection.describe_end()}"
            self._death = EnvironmentDied(what, self._connection.end_outcome())
            raise self._death

    def _conclude(
        self, outcome: Outcome, returncode: int, evidence: str, after: dict[str, int | None]
    ) -> None:
        usage = usage_between(self._before, after, time.monotonic() - self._started_at)
        self._result = Result(
            argv=self.argv,
            outcome=outcome,
            returncode=returncode,
            evidence=evidence,
            usage=usage,
            protections=self._protections(),
        )
        self._close_channel()

    def _with_verdict(self, result: Result) -> Result:
        if self._verdict is None or result.outcome not in (Outcome.EXITED, Outcome.SIGNALED):
            return result
        evidence = self._verdict.say(result.returncode)
        return replace(result, outcome=self._verdict.outcome, evidence=evidence)

    def _close_streams(self) -> None:
        self._relays.finish(drains=False)
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.tty = -1
        if self._terminal is not None:
            self._terminal.close()


def _poll(poller: select.poll, milliseconds: int) -> list[tuple[int, int]]:
    try:
        return poller.poll(milliseconds)
    except OSError as error:
        raise SyscallError("poll", error.errno or 0) from error
