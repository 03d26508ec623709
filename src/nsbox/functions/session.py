# SPDX-License-Identifier: Apache-2.0
"""One function version in one environment: its worker's start, one event at a time, what is left.

Each sequence is written once (`Steps`), for threads and for event loops. How a worker ended is told
by its environment's PID 1 and cgroup (`nsbox.supervisor.process`), never by itself. After anything
doubtful the environment is killed, and what is raised says why. A plain program
(``Function(command=...)``) is one command for each event, with the same errors and records.
"""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
import uuid
from _socket import socket as Socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from nsbox.errors import EnvironmentStateError, InvokeError
from nsbox.functions.deployment import Deployment
from nsbox.functions.exchange import (
    Frame,
    InvocationResponse,
    OnLog,
    PendingCall,
    Steps,
    WorkerEnded,
    WorkerOver,
    WorkerSilent,
    drive,
    error_payload,
)
from nsbox.functions.function import FunctionVersion
from nsbox.functions.leftovers import Leftovers
from nsbox.functions.program import StartCommand, run_program
from nsbox.functions.request import InvocationRequest
from nsbox.functions.worker import WorkerConnection
from nsbox.guest import runtime
from nsbox.guest.executed import executed_worker
from nsbox.launcher.messages import Spec
from nsbox.supervisor import files, standby
from nsbox.supervisor.channel import RunRequest, make_socket
from nsbox.supervisor.connection import EnvironmentConnection
from nsbox.supervisor.evidence import describe_exit
from nsbox.supervisor.launcher import Launcher
from nsbox.supervisor.plan import interpreter
from nsbox.supervisor.process import PIPE, RunningCommand
from nsbox.supervisor.reports import exit_code
from nsbox.values.counters import oom_evidence
from nsbox.values.invocation import (
    FunctionError,
    Invocation,
    InvokeTimeout,
    LeftRunning,
)
from nsbox.values.json_text import decode_answer
from nsbox.values.result import EnvironmentDied, Outcome, Protections, Result

if TYPE_CHECKING:
    import asyncio

    from nsbox.functions.loop import LoopDriver

_T = TypeVar("_T")
_LOG_SHOWN: Final = 2000  # bytes of the log that an error of the start quotes
_START: Final = 1  # number of the call that starts the worker
_FIRST: Final = 2  # number of the first event
_QUIET: Final = 0.02  # seconds in which the log of a start is not read
_NUMBERS: Final = struct.Struct("!16Q")
_SENT_ALONG: Final = 1 << 15  # bytes that a socket surely takes before anybody reads (unix(7))
_LAST_WORDS: Final = 10.0  # seconds in which a call sees that its environment is killed
_AT_ONCE: Final = (False,)  # what `map` gives acquire(): no interrupt comes before it is kept


class Session:
    """Made with the environment of a `FunctionVersion`. Serves one call at a time.

    Attributes:
        worker: Its connection; None of a plain program, and before the start of an executed one.
        reuse: The function's policy.
        init_seconds: What importing the module took; None before.
        is_provisioned: Whether that is done with nobody waiting for it.
        is_used: Whether a call is over.
        is_unsent: Whether the last one, which failed, has not reached the worker.
        has_end: Whether there is something to do when a call is over.
        leftovers: What events leave behind.
    """

    def __init__(
        self,
        connection: EnvironmentConnection,
        version: FunctionVersion,
        deployment: Deployment,
        environment: Mapping[str, str],
        *,
        protections: Callable[[], Protections],
        start_command: StartCommand,
        next_kind: tuple[Launcher, Spec] | None,
    ) -> None:
        """Take what belongs to the environment.

        Args:
            connection: Its connection.
            version: Whose it is.
            deployment: The version's.
            environment: Variables besides the function's own.
            protections: Tells what is in force.
            start_command: Starts a command in it, for `run_program`.
            next_kind: Whom to ask for the next standby environment, and for which kind.
        """
        self._connection = connection
        self._version = version
        self._deployment = deployment
        self._function = version.function
        self._environment = environment
        self._protections = protections
        self._start_command = start_command
        self._busy = threading.Lock()
        self._holder = 0  # the thread that has it
        self._loop: LoopDriver | None = None
        self._count = 0  # of events
        self._numbers: list[int] = []
        self._id_prefix = str(uuid.uuid4())[:24]
        self._room = self._function.limits.output_max
        self._timeout = self._function.timeout
        self.reuse = self._function.reuse
        self._resets = self.reuse == "reset" and self._function.handler is not None
        limit = self._function.limits.memory_max
        self._memory_mb = limit >> 20 if limit is not None else None
        self._quiet_until = 0.0
        self._is_begun = False
        self._start: PendingCall | None = None  # until the first event has it
        # Of the last call: its record, or what that is made of. An answer would make a cycle.
        self._last: Invocation | tuple[PendingCall, bytes | memoryview] | None = None
        self._spare: EnvironmentConnection | None = None
        self.leftovers = Leftovers(connection, version, deployment)
        self.worker: WorkerConnection | None = None
        self.init_seconds: float | None = None
        self.is_provisioned = self.is_used = self.is_unsent = False
        self._next_kind = next_kind
        self.has_end = self._function.reuse == "never"

    def close(self) -> None:
        """Close worker and sockets."""
        driver, self._loop = self._loop, None
        if driver is not None and not driver.loop.is_closed():
            driver.close()
        self.leftovers.close()
        if self.worker is not None:
            self.worker.close()

    def end_events(self) -> None:
        """Wake the worker, so that it runs its handler of SIGTERM; one that works will by itself.

        A signal that comes just before a system call that waits does not interrupt it.
        """
        if self.worker is not None and not self._busy.locked():
            self.worker.end_events()

    def await_idle(self) -> None:
        """Wait until no other thread is in a call of this killed environment."""
        # This thread may be in one itself, on a loop or in a callback: it will see by itself.
        if self._holder != threading.get_ident() and self._busy.acquire(timeout=_LAST_WORDS):
            self._busy.release()

    def take_spare(self) -> EnvironmentConnection | None:
        """Return the sockets made for the next standby environment, for the caller to close."""
        spare, self._spare = self._spare, None
        self.has_end = self._function.reuse == "never"
        return spare

    def driver_on(self, loop: asyncio.AbstractEventLoop) -> LoopDriver:
        """Return what takes steps on a loop; its readers stay from call to call."""
        driver = self._loop
        if driver is None or driver.loop is not loop:
            if driver is not None and not driver.loop.is_closed():
                driver.forget()
            from nsbox.functions.loop import LoopDriver  # asyncio: 25 ms, and most need none of it

            driver = self._loop = LoopDriver(loop, self._connection.kill)
        return driver

    def last(self) -> Invocation | None:
        """Return the record of the last call, None before the first."""
        last = self._last
        if not isinstance(last, tuple):
            return last
        record = self.describe(last[0], bytes(last[1]))
        if self._busy.locked() or self._last is not last:
            return replace(record, memory_peak_mb=None)  # what was read may be the next event's
        self._last = record
        return record

    # -- the start -----------------------------------------------------------------------------

    def prepare(self) -> None:
        """Send START to the worker that waits since the birth, before its code is attached.

        Raises:
            InvokeTimeout: It does not listen.
        """
        if self._function.handler is not None and self._function.start == "clone":
            drive(self._tell(*self._take_worker()))

    def init(self, *, provisioned: bool) -> Steps[None]:
        """Import the module, unless that was done; see `ExecutionEnvironment.init`."""
        return self._alone(self._init(provisioned=provisioned))

    def _init(self, on_log: OnLog | None = None, *, provisioned: bool = False) -> Steps[None]:
        """Let the worker import the handler's module; raises as `ExecutionEnvironment.init`."""
        if self._function.handler is None or self.init_seconds is not None:
            return
        self.is_provisioned = provisioned
        if self.worker is None:
            yield from self._tell(*(yield self._execute))
        elif self.is_provisioned and not self._is_begun:
            yield from self._tell_again()
        self._begin_once()
        call = self._start_call(on_log)
        yield from self._send_start(call, runtime.LOAD, b"")
        self._finish_start(call, (yield from self._exchange(call)))

    def _tell(self, process: RunningCommand, channel: Socket) -> Steps[None]:
        self.worker = WorkerConnection(self._connection, process, channel)
        yield from self._tell_again()

    def _tell_again(self) -> Steps[None]:
        data = self._deployment.start_text(
            self._version, self._environment, self._connection.env_id, self._initialization_type
        )
        yield from self._send_start(self._start_call(), runtime.START, data)

    def _begin_once(self) -> None:
        """A start that has failed is not tried again: its environment was killed."""
        if self._is_begun:
            self._connection.kill()
            raise self._connection.death()
        self._is_begun = True

    def _start_call(self, on_log: OnLog | None = None) -> PendingCall:
        return PendingCall(_START, self._function.init_timeout, "", self._room, on_log)

    def _send_start(
        self, call: PendingCall, kind: bytes, data: bytes, more: bytes = b""
    ) -> Steps[None]:
        header = runtime.HEADER.pack(kind, len(data) + len(more), call.number)
        (self.worker or self._known_worker).send(call, header + data, more)
        if call.rest is not None:
            yield from self._send_rest(call)

    def _take_worker(self) -> tuple[RunningCommand, Socket]:
        """Return the worker that PID 1 has forked, and this end of its socket."""
        endpoints = self._connection.endpoints
        if endpoints is None:
            raise EnvironmentStateError(f"environment {self._connection.env_id} has no worker")
        argv = (f"the worker of {self._function.name}",)
        process = RunningCommand(self._connection, argv, endpoints, protections=self._protections)
        return process, endpoints.socket

    def _execute(self) -> tuple[RunningCommand, Socket]:
        """Return a worker in an interpreter of its own, and this end of its socket."""
        python = interpreter() if self._function.rootfs is None else "python3"
        self._connection.drop_endpoints()
        ours, theirs = make_socket()
        try:
            argv = (python, "-I", "-S", "-c", *executed_worker(3))
            request = RunRequest(self._environment, "/", announced=True, extra=theirs.fileno())
            streams = (None, PIPE, PIPE)
            return RunningCommand(
                self._connection, argv, request, streams, protections=self._protections
            ), ours
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()

    def _finish_start(self, call: PendingCall, frame: Frame) -> None:
        """Take the worker's answer to its start."""
        kind, data = frame
        if kind == runtime.READY:
            self.init_seconds = time.monotonic() - call.begin
            self._start = call
            if self._resets:
                self._unwatch_event()
                self._known_worker.close_logs(call)
            return
        if kind != runtime.BROKEN:
            raise self._violation("it is ready before it was asked")
        error = self._function_error(bytes(data), None)
        self._connection.kill(f"its module was not imported ({str(error)[:_LOG_SHOWN]})")
        raise error

    # -- an event ------------------------------------------------------------------------------

    def serve(self, request: InvocationRequest) -> Steps[Invocation | InvocationResponse]:
        """Serve one event; see `ExecutionEnvironment.invoke_bytes`."""
        is_taken, call = False, None
        answer: Invocation | InvocationResponse
        try:
            (is_taken,) = map(self._busy.acquire, _AT_ONCE)
            if not is_taken:
                raise self._refusal()
            self._holder = threading.get_ident()
            if self._function.handler is None:
                yield from self._place(request)
                start = self._start_command
                program = partial(run_program, self._connection, self._version, request, start)
                record: Invocation = yield program
                self._last = answer = record
                if request.files and self._function.reuse == "keep":
                    yield from self.leftovers.remove(request.files)
            else:
                frame = None
                count = self._count = self._count + 1
                timeout = self._timeout if request.timeout is None else request.timeout
                request_id = request.request_id
                if request_id is None:
                    request_id = f"{self._id_prefix}{count:012x}"
                if self.init_seconds is None:
                    if self.worker is not None and not request.files:
                        call, frame = yield from self._send_first(request, timeout, request_id)
                    else:
                        yield from self._init(request.on_log)
                if call is None:
                    if self.leftovers.cleanup is not None or request.files:
                        yield from self._place(request)
                    call = self._send(request, timeout, request_id)
                if self._next_kind is not None:
                    self._prepare_spare()
                worker = self.worker or self._known_worker
                worker.wait.deadline = call.deadline
                try:
                    if call.rest is not None:
                        yield from self._send_rest(call)
                    while frame is None:
                        frame = worker.feed(call, (yield worker.wait))
                except (WorkerSilent, WorkerOver) as error:
                    raise (yield from self._judge(call, error)) from None
                if self.leftovers.are_killed:
                    yield from self.leftovers.kill(call, worker.process.pid)
                if request.files and self._function.reuse == "keep":
                    yield from self.leftovers.remove(request.files)
                if not call.answered:
                    call.answered = time.monotonic()
                if frame[0] == runtime.ANSWER:
                    answer = InvocationResponse(self.describe, call, frame[1])
                    self._last = call, frame[1]
                    if self._resets:
                        yield from self._begin_reset()
                else:
                    raise (yield from self._failure(call, frame))
            return answer
        except BaseException as error:
            if is_taken:
                self._note_failure(error, call)
            raise
        finally:
            if is_taken:
                self.is_used = True
                self._busy.release()

    def _alone(self, steps: Steps[_T]) -> Steps[_T]:
        """Take `steps` as a call: there is at most one at a time, by construction."""
        is_taken = False
        try:
            (is_taken,) = map(self._busy.acquire, _AT_ONCE)
            if not is_taken:
                raise self._refusal()
            self._holder = threading.get_ident()
            return (yield from steps)
        finally:
            if is_taken:
                self._busy.release()

    def _refusal(self) -> EnvironmentStateError:
        what = f"environment {self._connection.env_id} is busy with another invocation"
        return EnvironmentStateError(f"{what}; an environment serves one at a time")

    def _prepare_spare(self) -> None:
        """Do the part of a refill of standby environments that needs no answer."""
        if self._next_kind is not None:
            self._spare, self._next_kind = standby.prepare(*self._next_kind), None
            self.has_end = True

    def _place(self, request: InvocationRequest) -> Steps[None]:
        """Wait until the last call's files are removed, and write those of `request`."""
        if self._resets and self.worker is not None:
            self._unwatch_event()
            self.worker.make_event()  # while PID 1 is busy
        yield from self.leftovers.await_cleanup()
        if request.files:
            yield partial(files.place_files, self._connection, request.files)

    def _send_first(
        self, request: InvocationRequest, timeout: float, request_id: str
    ) -> Steps[tuple[PendingCall, Frame | None]]:
        """Let a prepared worker import the module and go on to the event by itself.

        Returns the event with its answer, if that has come already.

        An event that is too large to be sent before it is read is sent afterwards.
        """
        self._begin_once()
        worker = self._known_worker
        start = self._start_call(request.on_log)
        call = PendingCall(
            _FIRST, timeout, request_id, self._room, request.on_log, is_first=self._count == 1
        )
        words = request.words(call)
        if len(words) + len(request.payload) > _SENT_ALONG:
            yield from self._send_start(start, runtime.LOAD, b"")
            self._prepare_spare()
            self._finish_start(start, (yield from self._exchange(start)))
            return self._send(request, timeout, request_id), None
        self._quiet_until = start.begin + _QUIET
        moment = runtime.MOMENT.pack(self._quiet_until)
        if self._resets:
            load = runtime.HEADER.pack(runtime.LOAD, len(moment), _START) + moment
            worker.open_event(start, load)
            first = request.frame(call)
            worker.send_event(start, first, request.payload)
            if start.rest is not None:
                yield from self._send_rest(start)
        else:
            head = moment + runtime.INVOCATION.pack(call.timeout, len(words)) + words
            yield from self._send_start(start, runtime.LOAD, head, request.payload)
        self._prepare_spare()
        frame = yield from self._exchange_start(start)
        self._finish_start(start, frame)
        call.restart()
        if frame[1]:
            worker.await_event()
            self._start = None  # it has written nothing
            return call, worker.begun(call)
        worker.check_silent()  # it has seen this number
        self._send_event(call, request)
        return call, None

    def _exchange_start(self, call: PendingCall) -> Steps[Frame]:
        """Wait for the answer to a start that an event was sent along with.

        Nothing of the log is read before the moment, so that a worker that goes on to the event
        before it knows that its import has written nothing (`nsbox.guest.runtime`).
        """
        worker = self._known_worker
        wait = worker.start_wait(min(self._quiet_until, call.deadline))
        try:
            while True:
                ready = yield wait
                if ready:
                    frame = worker.feed_start(call, ready)
                    if frame is not None:
                        return frame
                elif wait is worker.wait or wait.deadline == call.deadline:
                    raise WorkerSilent
                else:
                    wait = worker.wait
                    wait.deadline = call.deadline
        except (WorkerSilent, WorkerOver) as error:
            raise (yield from self._judge(call, error)) from None

    def _send(self, request: InvocationRequest, timeout: float, request_id: str) -> PendingCall:
        """Send an event, as much of it as there is room for.

        Nobody looks whether the worker has said something before: it cannot have known the number.
        """
        if not self._numbers:
            self._numbers += _NUMBERS.unpack(os.urandom(_NUMBERS.size))
        number, is_first = self._numbers.pop(), self._count == 1
        call = PendingCall(
            number, timeout, request_id, self._room, request.on_log, is_first=is_first
        )
        if self._resets or self._start is not None or self.worker is None:
            self._send_event(call, request)
        else:
            self.worker.send(call, request.frame(call), request.payload)
        return call

    def _send_event(self, call: PendingCall, request: InvocationRequest) -> None:
        if self._start is not None:
            start, self._start = self._start, None
            start.belongs_to(call)
        worker = self._known_worker if self.worker is None else self.worker
        if self._resets:
            worker.open_event(call, runtime.HEADER.pack(runtime.FORK, 0, call.number))
            worker.send_event(call, request.frame(call), request.payload)
            worker.await_event()
        else:
            worker.send(call, request.frame(call), request.payload)

    def _send_rest(self, call: PendingCall) -> Steps[None]:
        """Wait until a worker that does not read as fast as that has room, or ends."""
        worker = self._known_worker
        while call.rest is not None:
            wait = worker.room(call)
            ready = yield wait
            if not ready:
                raise self._timeout_error(call)
            if not any(fd == wait.write for fd, _ in ready):
                call.rest = None  # it has ended, which is seen by who waits for the answer
                return
            worker.send_rest(call)

    def _exchange(self, call: PendingCall) -> Steps[Frame]:
        """Wait for the answer to a start."""
        worker = self.worker or self._known_worker
        worker.wait.deadline = call.deadline
        frame = None
        try:
            while frame is None:
                frame = worker.feed(call, (yield worker.wait))
        except (WorkerSilent, WorkerOver) as error:
            raise (yield from self._judge(call, error)) from None
        return frame

    def _failure(self, call: PendingCall, frame: Frame) -> Steps[Exception]:
        """Return what to raise when the handler has raised, or its fork has ended."""
        kind, data = frame
        if kind == runtime.ERROR:
            payload = bytes(data)
            invocation = self.describe(call, payload, "error")
            if self._resets:
                yield from self._begin_reset()
            return self._function_error(payload, invocation)
        status = bytes(data or b"0")
        if kind != runtime.ENDED or not self._resets or not status.isdigit():
            return self._violation("it answers what was not asked")
        if (code := exit_code(int(status))) is None:
            return self._violation(f"the status of its fork is {int(status)}")
        how = describe_exit(code) if data else "nobody knows how"
        self._connection.kill(f"the fork of its worker had ended ({how})")
        return (yield partial(self._fork_error, call, code))  # type: ignore[no-any-return]

    def describe(
        self,
        call: PendingCall,
        payload: bytes,
        status: str = "",
        error_type: str = "",
    ) -> Invocation:
        """Return the record of a call that is over, when it was answered or now."""
        peak = self._connection.memory_peak()
        return Invocation(
            request_id=call.request_id,
            payload=payload,
            stdout=call.logged("stdout"),
            stderr=call.logged("stderr"),
            init_stdout=call.start.logged("stdout") if call.start is not None else b"",
            init_stderr=call.start.logged("stderr") if call.start is not None else b"",
            duration_seconds=(call.answered or time.monotonic()) - call.begin,
            init_seconds=self.init_seconds if call.is_first and not self.is_provisioned else None,
            initialization_type=self._initialization_type,
            memory_limit_mb=self._memory_mb,
            memory_peak_mb=None if peak is None else -(-peak >> 20),
            status=status,
            error_type=error_type,
            left_running=self.leftovers.of_call(call),
        )

    @property
    def _initialization_type(self) -> str:
        return "provisioned-concurrency" if self.is_provisioned else "on-demand"

    # -- failures ------------------------------------------------------------------------------

    @property
    def _known_worker(self) -> WorkerConnection:
        if self.worker is None:
            raise EnvironmentStateError(f"environment {self._connection.env_id} has no worker yet")
        return self.worker

    def _violation(self, what: str) -> EnvironmentDied:
        return self._known_worker.violation(what)

    def _judge(self, call: PendingCall, error: Exception) -> Steps[Exception]:
        """Return what to raise for a call that got no answer; its environment is killed."""
        if isinstance(error, WorkerSilent):
            return self._timeout_error(call)
        return (yield partial(self._judge_end, call))  # type: ignore[no-any-return]

    def _judge_end(self, call: PendingCall) -> Exception:
        """Wait for the report on the worker's end, and return what to raise."""
        error = self._known_worker.end_of(call)
        return self._end_error(call, error.result) if isinstance(error, WorkerEnded) else error

    def _timeout_error(self, call: PendingCall) -> InvokeTimeout:
        """Return what to raise for a worker that gave no answer in time; it is killed."""
        worker = self._known_worker
        worker.drain_logs(call)
        worker.process.kill_with_verdict(Outcome.TIMED_OUT, f"not over after {call.timeout:g} s")
        what = "its import" if call.number == _START else "an invocation"
        self._connection.kill(f"{what} timed out after {call.timeout:.2f} seconds")
        if call.number == _START:
            return InvokeTimeout(f"init timed out after {call.timeout:.2f} seconds")
        what = f"Task timed out after {call.timeout:.2f} seconds"
        kind = "Sandbox.Timedout"
        payload = error_payload(kind, f"RequestId: {call.request_id} Error: {what}")
        return InvokeTimeout(what, self.describe(call, payload, "timeout", kind))

    def _end_error(self, call: PendingCall, result: Result) -> InvokeError:
        if result.outcome is Outcome.KILLED or (call.is_unsent and call.number != _START):
            # By its caller; or it had ended before, and nothing was run.
            return self._connection.death(result.outcome)
        if result.outcome is Outcome.OOM_KILLED:
            return self._out_of_memory(call, result.evidence)
        return self._exit_error(call, result.returncode)

    def _fork_error(self, call: PendingCall, returncode: int) -> FunctionError:
        """Return what to raise for the end of a fork, of which its worker tells."""
        if returncode == -signal.SIGKILL:
            # v1's OOM killer takes one process. Its worker may be quicker than the launcher.
            self._connection.await_end()
            after = self._connection.end.usage if self._connection.end is not None else {}
            if evidence := oom_evidence({}, after):
                return self._out_of_memory(call, evidence)
        return self._exit_error(call, returncode)

    def _out_of_memory(self, call: PendingCall, evidence: str) -> FunctionError:
        what = f"Runtime exited with error: signal: killed ({evidence})"
        return self._ended(call, "Runtime.OutOfMemory", what)

    def _exit_error(self, call: PendingCall, returncode: int) -> FunctionError:
        what = "Runtime exited without providing a reason"
        if returncode:
            what = f"Runtime exited with error: {describe_exit(returncode)}"
        return self._ended(call, "Runtime.ExitError", what)

    def _ended(self, call: PendingCall, kind: str, what: str) -> FunctionError:
        if call.number == _START:
            log = call.logged("stderr")[-_LOG_SHOWN:]
            text = log.decode(errors="replace").strip()
            return FunctionError(kind, f"{what}. {text}" if text else what)
        message = f"RequestId: {call.request_id} Error: {what}"
        payload = error_payload(kind, message)
        return FunctionError(kind, message, (), self.describe(call, payload, "error", kind))

    def _note_failure(self, error: BaseException, call: PendingCall | None) -> None:
        """Keep the record of a call that failed; without a verdict end its environment.

        Its answer may be on the way still, so that the environment serves no other.

        Raises:
            EnvironmentDied: Another thread has closed it, and with it what was waited on.
        """
        if call is not None:
            self.is_unsent = call.is_unsent
        else:  # it was ready, and died before it was sent anything
            is_ready = self.init_seconds is not None
            self.is_unsent = is_ready and isinstance(error, EnvironmentDied)
        if isinstance(error, FunctionError | InvokeTimeout):
            self._last = error.invocation
            return
        if self._connection.closing and isinstance(error, OSError | ValueError):
            raise self._connection.death() from error
        self._connection.kill(f"an invocation was ended by {type(error).__name__}")

    def _function_error(
        self, data: bytes, invocation: Invocation | None
    ) -> FunctionError | EnvironmentDied:
        try:
            told = decode_answer(data)
            kind, message = str(told["errorType"]), str(told["errorMessage"])
            trace = [str(line) for line in told.get("stackTrace", ())]
        except (ValueError, TypeError, KeyError, AttributeError):
            return self._violation("its error is no error")
        return FunctionError(kind, message, trace, invocation)

    # -- what is left --------------------------------------------------------------------------

    def _begin_reset(self) -> Steps[None]:
        """Have all taken away that an event has left; the next one waits for that."""
        worker = self._known_worker
        self._unwatch_event()
        worker.close_event()
        yield from self.leftovers.begin_reset(worker.process.pid)

    def _unwatch_event(self) -> None:
        """Remove an event's socket and pipes from the loop's readers, before they are closed."""
        if self._loop is not None and self.worker is not None:
            self._loop.unwatch(self.worker.event_descriptors())

    def count_left(self) -> Steps[LeftRunning]:
        """Count what runs besides the worker; see `ExecutionEnvironment.left_running`."""
        worker = 0 if self.worker is None else self.worker.process.pid
        return self._alone(self.leftovers.count(worker))

    def left_running_of_last(self) -> LeftRunning | None:
        """Return what the last call has left running, as far as that is known."""
        last = self._last
        if isinstance(last, tuple):
            return self.leftovers.of_call(last[0])
        return None if last is None else last.left_running
