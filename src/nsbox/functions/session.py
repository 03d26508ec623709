# SPDX-License-Identifier: Apache-2.0
"""One function version in one environment: start its worker, send events, judge what comes back.

How a worker ended is told by its environment's PID 1 and cgroup (`nsbox.supervisor.process`), never
by itself.
After anything doubtful the environment is killed, and what is raised says why.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import time
import uuid
from _socket import socket as Socket
from collections.abc import Callable, Mapping
from typing import Final

from nsbox.errors import EnvironmentStateError, InvokeError, SyscallError
from nsbox.functions import left_running
from nsbox.functions.call import Answer, Call, Frame, OnLog, WorkerEnded, WorkerSilent
from nsbox.functions.deployment import outfit_of
from nsbox.functions.function import FunctionVersion
from nsbox.functions.request import Request
from nsbox.functions.worker import Worker
from nsbox.guest import runtime as runtime
from nsbox.guest.executed import executed_worker
from nsbox.supervisor.channel import Channel, RunRequest, make_socket
from nsbox.supervisor.connection import EnvironmentConnection
from nsbox.supervisor.evidence import describe_exit
from nsbox.supervisor.files import begin_reset, finish_reset
from nsbox.supervisor.process import PIPE, Process
from nsbox.supervisor.reports import exit_code
from nsbox.values.counters import oom_evidence
from nsbox.values.invocation import FunctionError, Invocation, InvokeTimeout
from nsbox.values.json_text import decode_answer
from nsbox.values.result import EnvironmentDied, Outcome, Protections, Result

_Started = tuple[Process, Socket]
_LOG_SHOWN: Final = 2000  # bytes of the log that an error of the start quotes
_START: Final = 1  # number of the call that starts the worker
_FIRST: Final = 2  # number of the first event
_QUIET: Final = 0.02  # seconds in which the log of a start is not read
_NUMBERS: Final = struct.Struct("!16Q")
_SENT_ALONG: Final = 1 << 15  # bytes that a socket surely takes before anybody reads (unix(7))


class Invoker:
    """Made with the environment of a `FunctionVersion` that has a handler.

    Attributes:
        init_seconds: What importing the module took; None before.
        is_provisioned: Whether that is done with nobody waiting for it.
        resets: Whether each event is served by a fork, with a socket of its own.
    """

    def __init__(
        self,
        link: EnvironmentConnection,
        version: FunctionVersion,
        protections: Callable[[], Protections],
    ) -> None:
        self._link = link
        self._version = version
        self._function = version.function
        self._protections = protections
        self._count = 0  # of events
        self._numbers: list[int] = []
        self._room = self._function.limits.output_max
        self._timeout = self._function.timeout
        self.resets = self._function.reuse == "reset"
        self._quiet_until = 0.0
        self._is_begun = False
        self._start: Call | None = None  # until the first event has it
        self._reset: Channel | None = None
        self._id_prefix = str(uuid.uuid4())[:24]
        self.worker: Worker | None = None
        self.init_seconds: float | None = None
        self.is_provisioned = False
        limit = self._function.limits.memory_max
        self._memory_mb = int(limit) >> 20 if limit is not None else None

    def close(self) -> None:
        """Let go of worker and sockets."""
        if self._reset is not None:
            self._reset.socket.close()
        if self.worker is not None:
            self.worker.close()

    def end_events(self) -> None:
        """Wake a worker that waits for an event which will not come."""
        if self.worker is not None:
            self.worker.end_events()

    def kill(self, cause: str) -> None:
        """Kill the whole environment."""
        self._link.kill(cause)

    def descriptors(self) -> list[int]:
        """Return what becomes readable when the worker has something to say."""
        return [] if self.worker is None else self.worker.descriptors()

    def event_descriptors(self) -> list[int]:
        """Return those that are the event's own."""
        return [] if self.worker is None else self.worker.event_descriptors()

    def drain_logs(self, call: Call) -> None:
        """Take what has been written to the log by now."""
        self._worker.drain_logs(call)

    # -- the start -----------------------------------------------------------------------------

    def prepare(self, environment: Mapping[str, str]) -> None:
        """Tell a worker that waits since the birth all that it can know before its code is there.

        Args:
            environment: Environment variables besides the function's own.

        Raises:
            InvokeTimeout: It does not listen.
        """
        if self._function.start == "clone":
            self._tell(*self._take_worker(), environment)

    def start(
        self, environment: Mapping[str, str], python: str, on_log: OnLog | None = None
    ) -> Call:
        """Let the worker import the handler's module; its answer is for `finish_start`.

        Args:
            environment: As for `prepare`.
            python: The interpreter, for ``start="exec"``.
            on_log: Hears what the import writes.
        """
        if self.worker is None:
            self._tell(*self._execute(environment, python), environment)
        elif self.is_provisioned and not self._is_begun:
            self._tell_again(environment)
        self._begin_once()
        call = self._start_call(on_log)
        self._send_start(call, runtime.LOAD, b"")
        return call

    def _tell(self, process: Process, channel: Socket, environment: Mapping[str, str]) -> None:
        self.worker = Worker(self._link, process, channel)
        self._tell_again(environment)

    def _tell_again(self, environment: Mapping[str, str]) -> None:
        outfit = outfit_of(self._version)
        text = outfit.start_text(
            self._version, environment, self._link.env_id, self._initialization_type
        )
        self._send_start(self._start_call(), runtime.START, text.encode())

    def _begin_once(self) -> None:
        """A start that has failed is not tried again: its environment was killed."""
        if self._is_begun:
            raise self._link.died(ConnectionError("its worker did not start"))
        self._is_begun = True

    def _start_call(self, on_log: OnLog | None = None) -> Call:
        return Call(_START, self._function.init_timeout, "", self._room, on_log)

    def _send_start(self, call: Call, kind: bytes, data: bytes, more: bytes = b"") -> None:
        header = runtime.HEADER.pack(kind, len(data) + len(more), call.number)
        self._worker.send(call, header + data, more)
        self.send_rest(call)

    def send_rest(self, call: Call) -> None:
        """Wait until the worker has room for what is left of an event, or of its start.

        Raises:
            InvokeTimeout: It does not read it.
        """
        try:
            self._worker.send_rest(call)
        except WorkerSilent as error:
            raise self.judge(call, error) from None

    def _take_worker(self) -> _Started:
        """Return the worker that waits since the birth, and this end of its socket."""
        workplace = self._link.workplace
        if workplace is None:
            raise EnvironmentStateError(f"environment {self._link.env_id} has no worker")
        argv = (f"the worker of {self._function.name}",)
        process = Process(self._link, argv, workplace, protections=self._protections)
        return process, workplace.socket

    def _execute(self, environment: Mapping[str, str], python: str) -> _Started:
        """Return a worker in an interpreter of its own, and this end of its socket."""
        self._link.drop_workplace()
        ours, theirs = make_socket()
        try:
            argv = (python, "-I", "-S", "-c", executed_worker(3))
            request = RunRequest(environment, "/", announced=True, extra=theirs.fileno())
            streams = (None, PIPE, PIPE)
            return Process(self._link, argv, request, streams, protections=self._protections), ours
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()

    def finish_start(self, call: Call, frame: Frame) -> None:
        """Take the worker's answer to its start.

        Raises:
            FunctionError: The module cannot be imported, or has no such handler.
        """
        kind, data = frame
        if kind == runtime.READY:
            self.init_seconds = time.monotonic() - call.begin
            self._start = call
            if self.resets:
                self._worker.close_logs(call)
            return
        if kind != runtime.BROKEN:
            raise self._violation("it is ready before it was asked")
        error = self._function_error(bytes(data), None)
        self._link.kill(f"its module was not imported ({str(error)[:_LOG_SHOWN]})")
        raise error

    # -- an event ------------------------------------------------------------------------------

    def start_with(self, request: Request) -> tuple[Call, Call | None]:
        """Do as `start`, of a worker that was prepared, and send the first event along.

        Returns the start, for `exchange_start`, and the event; None in its place when the event is
        too large to be sent before it is read.
        """
        self._begin_once()
        start = self._start_call(request.on_log)
        call = self._call_of(request, _FIRST)
        words = request.words(call.request_id)
        if len(words) + len(request.payload) > _SENT_ALONG:
            self._count = 0  # it is made anew
            self._send_start(start, runtime.LOAD, b"")
            return start, None
        self._quiet_until = start.begin + _QUIET
        moment = runtime.MOMENT.pack(self._quiet_until)
        if self.resets:
            load = runtime.HEADER.pack(runtime.LOAD, len(moment), _START) + moment
            self._worker.open_event(start, load)
            first = request.frame(call.number, call.timeout, words)
            self._worker.send_event(start, first, request.payload)
            return start, call
        head = moment + runtime.INVOCATION.pack(call.timeout, len(words)) + words
        self._send_start(start, runtime.LOAD, head, request.payload)
        return start, call

    def exchange_start(self, start: Call, call: Call) -> bool:
        """Wait for the answer to `start`; return whether the worker goes on to `call`.

        Raises:
            As `exchange` and `finish_start`.
        """
        try:
            frame = self._worker.exchange_start(start, self._quiet_until)
        except (WorkerSilent, WorkerEnded) as error:
            raise self.judge(start, error) from None
        self.finish_start(start, frame)
        call.restart()
        if goes_on := bool(frame[1]):
            self._worker.await_event()
        return goes_on

    def send(self, request: Request) -> Call:
        """Send an event; what comes back is for `finish`.

        Nobody looks whether the worker has said something before: it cannot have known the number.
        """
        if self.resets:
            worker = self._worker
            worker.make_event()  # while PID 1 is busy
            self.finish_reset()
        if not self._numbers:
            self._numbers += _NUMBERS.unpack(os.urandom(_NUMBERS.size))
        call = self._call_of(request, self._numbers.pop())
        self._send_event(call, request)
        return call

    def send_again(self, call: Call, request: Request) -> None:
        """Send an event that the worker has not gone on to."""
        self._worker.check_silent()  # it has seen this number
        self._send_event(call, request)

    def _send_event(self, call: Call, request: Request) -> None:
        if self._start is not None:
            start, self._start = self._start, None
            start.belongs_to(call)
        worker = self.worker or self._worker
        payload = request.payload
        first = request.frame(call.number, call.timeout, request.words(call.request_id))
        if self.resets:
            worker.open_event(call, runtime.HEADER.pack(runtime.FORK, 0, call.number))
            worker.send_event(call, first, payload)
            worker.await_event()
        else:
            worker.send(call, first, payload)

    def _call_of(self, request: Request, number: int) -> Call:
        count = self._count = self._count + 1
        timeout, request_id = request.timeout, request.request_id
        if timeout is None:
            timeout = self._timeout
        if request_id is None:
            request_id = f"{self._id_prefix}{count:012x}"
        return Call(number, timeout, request_id, self._room, request.on_log, is_first=count == 1)

    def exchange(self, call: Call) -> Frame:
        """Wait for the answer.

        Raises:
            InvokeTimeout, FunctionError, EnvironmentDied: As `judge`.
        """
        worker = self.worker or self._worker
        try:
            return worker.exchange(call)
        except (WorkerSilent, WorkerEnded) as error:
            raise self.judge(call, error) from None

    def finish(self, call: Call, frame: Frame) -> Answer:
        """Judge the worker's answer to an event and return it.

        Raises:
            FunctionError: The handler raised, or its forked worker ended.
        """
        kind, data = frame
        if kind == runtime.ANSWER:
            answer = Answer(self.describe, call, data)
            if self.resets:
                self._begin_reset()
            return answer
        if kind == runtime.ERROR:
            payload = bytes(data)
            invocation = self.describe(call, payload, "error")
            if self.resets:
                self._begin_reset()
            raise self._function_error(payload, invocation)
        status = bytes(data)
        if kind != runtime.ENDED or not self.resets or not status.isdigit():
            raise self._violation("it answers what was not asked")
        code = exit_code(int(status))
        if code is None:
            raise self._violation(f"the status of its fork is {int(status)}")
        self._link.kill(f"the fork of its worker had ended ({describe_exit(code)})")
        raise self._fork_error(call, code)

    def describe(
        self,
        call: Call,
        payload: bytes,
        status: str = "",
        error_type: str = "",
        end: float | None = None,
    ) -> Invocation:
        """Return the record of a call that is over, at the moment `end` or now."""
        peak = self._link.memory_peak()
        return Invocation(
            request_id=call.request_id,
            payload=payload,
            stdout=call.logged("stdout"),
            stderr=call.logged("stderr"),
            init_stdout=call.start.logged("stdout") if call.start is not None else b"",
            init_stderr=call.start.logged("stderr") if call.start is not None else b"",
            duration_seconds=(end or call.answered or time.monotonic()) - call.begin,
            init_seconds=self.init_seconds if call.is_first and not self.is_provisioned else None,
            initialization_type=self._initialization_type,
            memory_limit_mb=self._memory_mb,
            memory_peak_mb=None if peak is None else -(-peak >> 20),
            status=status,
            error_type=error_type,
            left_running=left_running.known(self._link, self._version, call),
        )

    @property
    def _initialization_type(self) -> str:
        return "provisioned-concurrency" if self.is_provisioned else "on-demand"

    # -- failures ------------------------------------------------------------------------------

    @property
    def _worker(self) -> Worker:
        if self.worker is None:
            raise EnvironmentStateError(f"environment {self._link.env_id} has no worker yet")
        return self.worker

    def _violation(self, what: str) -> EnvironmentDied:
        return self._worker.violation(what)

    def judge(self, call: Call, error: WorkerSilent | WorkerEnded) -> InvokeError:
        """Return what to raise for a worker that gave no answer; its environment is killed."""
        if isinstance(error, WorkerEnded):
            return self._end_error(call, error.result)
        worker = self._worker
        worker.drain_logs(call)
        worker.process.kill_with_verdict(Outcome.TIMED_OUT, f"not over after {call.timeout:g} s")
        what = "its import" if call.number == _START else "an invocation"
        self._link.kill(f"{what} timed out after {call.timeout:.2f} seconds")
        if call.number == _START:
            return InvokeTimeout(f"init timed out after {call.timeout:.2f} seconds")
        what = f"Task timed out after {call.timeout:.2f} seconds"
        kind = "Sandbox.Timedout"
        payload = error_payload(kind, f"RequestId: {call.request_id} Error: {what}")
        return InvokeTimeout(what, self.describe(call, payload, "timeout", kind))

    def _end_error(self, call: Call, result: Result) -> InvokeError:
        if result.outcome is Outcome.KILLED or (call.is_unsent and call.number != _START):
            # By its caller; or it had ended before, and nothing was run.
            what = f"environment {self._link.env_id}: {self._link.describe_end()}"
            return EnvironmentDied(what, result.outcome)
        if result.outcome is Outcome.OOM_KILLED:
            return self._out_of_memory(call, result.evidence)
        return self._exit_error(call, result.returncode)

    def _fork_error(self, call: Call, returncode: int) -> FunctionError:
        """Return what to raise for the end of a fork, of which its worker tells."""
        if returncode == -signal.SIGKILL:
            # v1's OOM killer takes one process. Its worker may be quicker than the launcher.
            self._link.await_end()
            after = self._link.end.usage if self._link.end is not None else {}
            if evidence := oom_evidence({}, after):
                return self._out_of_memory(call, evidence)
        return self._exit_error(call, returncode)

    def _out_of_memory(self, call: Call, evidence: str) -> FunctionError:
        what = f"Runtime exited with error: signal: killed ({evidence})"
        return self._ended(call, "Runtime.OutOfMemory", what)

    def _exit_error(self, call: Call, returncode: int) -> FunctionError:
        what = "Runtime exited without providing a reason"
        if returncode:
            what = f"Runtime exited with error: {describe_exit(returncode)}"
        return self._ended(call, "Runtime.ExitError", what)

    def _ended(self, call: Call, kind: str, what: str) -> FunctionError:
        if call.number == _START:
            log = call.logged("stderr")[-_LOG_SHOWN:]
            text = log.decode(errors="replace").strip()
            return FunctionError(kind, f"{what}. {text}" if text else what)
        message = f"RequestId: {call.request_id} Error: {what}"
        payload = error_payload(kind, message)
        return FunctionError(kind, message, (), self.describe(call, payload, "error", kind))

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

    # -- reset ---------------------------------------------------------------------------------

    def _begin_reset(self) -> None:
        """Have PID 1 clean up; its answer is waited for before the next event is sent."""
        worker = self._worker
        worker.close_event()
        try:
            self._reset = begin_reset(self._link, self._version.config, worker.process.pid)
        except (EnvironmentDied, SyscallError) as error:
            # The answer is there; whoever comes next is told.
            self._link.kill(f"its reset could not be asked for ({error})")

    def reset_descriptor(self) -> int:
        """Return what is readable when the last reset is over; -1 when none is under way."""
        return -1 if self._reset is None else self._reset.socket.fileno()

    def finish_reset(self) -> None:
        """Wait for the end of the last reset.

        Raises:
            EnvironmentDied: PID 1 is gone.
            EnvironmentStateError: Something could not be taken away.
        """
        if (channel := self._reset) is not None:
            self._reset = None
            finish_reset(self._link, channel)


def error_payload(kind: str, message: str) -> bytes:
    """Return the answer that tells of an error, in Lambda's words."""
    return json.dumps({"errorType": kind, "errorMessage": message}).encode()
