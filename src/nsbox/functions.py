# SPDX-License-Identifier: Apache-2.0
"""Invocations in an environment that belongs to a function version: init, invoke, reuse.

A handler's are the `Invoker`'s; a plain program (``Function(command=...)``) is one command for each
event, with the same errors and the same record of what it was.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from nsbox import blanks
from nsbox.aio import LoopCalls
from nsbox.config import check_text, parse_seconds
from nsbox.errors import (
    ConfigError,
    EnvironmentDied,
    EnvironmentStateError,
    FunctionError,
    InvokeTimeout,
)
from nsbox.function import FunctionVersion
from nsbox.guest import protocol as p
from nsbox.guest import python_runtime as runtime
from nsbox.invocation import Invocation
from nsbox.invoker import Answer, Invoker, check_payload, error_payload, finish_reset
from nsbox.launcher.client import Launcher
from nsbox.link import Link
from nsbox.result import Outcome, Protections, Result
from nsbox.worker import Call, OnLog

if TYPE_CHECKING:
    from nsbox.environment import ExecutionEnvironment

_REQUEST_ID_MAX: Final = 256
_CLIENT_CONTEXT_MAX: Final = 32 << 10  # bytes; AWS Lambda has 3583 in base64
_LAST_WORDS: Final = 10.0  # seconds in which an invocation sees that its environment is killed
_SIGNALED: Final = "Runtime exited with error: signal"


class Invocations:
    """What an `ExecutionEnvironment` of a function version does besides running commands."""

    def __init__(
        self,
        env: ExecutionEnvironment,
        version: FunctionVersion,
        link: Link,
        protections: Callable[[], Protections],
    ) -> None:
        self._env = env
        self._version = version
        self._function = version.function
        self._link = link
        self._busy = threading.Lock()
        self._holder = 0  # the thread that has it
        self.is_used = False  # an invocation is over
        # Whom to ask for a blank environment, and for which kind; and its sockets.
        self.next_kind: tuple[Launcher, Mapping[str, Any]] | None = None
        self._spare: Link | None = None
        self._loop: LoopCalls | None = None
        self._last: Invocation | Answer | None = None
        self._invoker: Invoker | None = None
        if self._function.handler is not None:
            self._invoker = Invoker(link, version, protections)

    def close(self) -> None:
        """Let go of worker and sockets."""
        if self._loop is not None and not self._loop.loop.is_closed():
            self._loop.close()
        if self._invoker is not None:
            self._invoker.close()

    def await_idle(self) -> None:
        """Wait until no other thread is in an invocation of this killed environment."""
        # This thread may be in one itself, on a loop or in a callback: it will see by itself.
        if self._holder != threading.get_ident() and self._busy.acquire(timeout=_LAST_WORDS):
            self._busy.release()

    def _prepare_spare(self) -> None:
        """Do the part of a refill of the blanks that can be done while an answer is waited for."""
        if self.next_kind is not None:
            self._spare, self.next_kind = blanks.prepare(*self.next_kind), None

    def take_spare(self) -> Link | None:
        """Return the sockets made for the next blank, if they were, for the caller to close."""
        spare, self._spare = self._spare, None
        return spare

    # -- in turn -------------------------------------------------------------------------------

    def init(self) -> None:
        """Import the module, unless that was done; see `ExecutionEnvironment.init`."""
        self._take()
        try:
            self._init()
        finally:
            self._busy.release()

    def _init(self) -> None:
        if self._invoker is not None and self._invoker.init_seconds is None:
            call = self._start_worker(self._invoker)
            self._invoker.finish_start(call, self._invoker.exchange(call))

    def prepare(self) -> None:
        """Tell the worker what it may know before the function's code is in its place."""
        if self._invoker is not None:
            self._invoker.prepare(self._env.base_environment())

    def _start_worker(self, invoker: Invoker) -> Call:
        python = sys.executable if self._function.rootfs is None else "python3"
        return invoker.start(self._env.base_environment(), python)

    def invoke(
        self,
        payload: bytes,
        timeout: float | None,
        request_id: str | None,
        client_context: Mapping[str, Any] | None,
        on_log: OnLog | None,
    ) -> Invocation | Answer:
        """Serve one event; see `ExecutionEnvironment.invoke_bytes`."""
        data = check_payload(payload)
        limit = None if timeout is None else parse_seconds(timeout, "timeout")
        context = _check_words(request_id, client_context)
        self._take()
        try:
            if self._invoker is None:
                return self._keep(self._run_command(data, limit, request_id, on_log))
            invoker = self._invoker
            if invoker.init_seconds is None and invoker.worker is not None:
                call = self._send_first(invoker, data, limit, request_id, context, on_log)
            else:
                self._init()
                call = invoker.send(data, limit, request_id, context, on_log)
                self._prepare_spare()
            frame = invoker.exchange(call)
            return self._keep(invoker.finish(call, frame))
        except BaseException as error:
            self._note_failure(error)
            raise
        finally:
            self._end()

    def _send_first(
        self,
        invoker: Invoker,
        data: bytes,
        limit: float | None,
        request_id: str | None,
        context: str,
        on_log: OnLog | None,
    ) -> Call:
        """Let a prepared worker import the module and go on to the event by itself."""
        start, call = invoker.start_with(data, limit, request_id, context, on_log)
        self._prepare_spare()
        if call is None:
            invoker.finish_start(start, invoker.exchange(start))
            call = invoker.send(data, limit, request_id, context, on_log)
        elif not invoker.exchange_start(start, call):
            invoker.send_again(call, context, data)
        return call

    async def invoke_async(
        self,
        payload: bytes,
        timeout: float | None,  # noqa: ASYNC109 - it kills, and is not of this task alone
        request_id: str | None,
        client_context: Mapping[str, Any] | None,
        on_log: OnLog | None,
    ) -> Invocation | Answer:
        """Serve one event on the running loop."""
        invoker = self._invoker
        if invoker is None:
            return await asyncio.to_thread(
                self.invoke, payload, timeout, request_id, client_context, on_log
            )
        data = check_payload(payload)
        limit = None if timeout is None else parse_seconds(timeout, "timeout")
        context = _check_words(request_id, client_context)
        self._take()
        try:
            calls = self._calls_on(invoker, asyncio.get_running_loop())
            if invoker.init_seconds is None:
                call, frame = await calls.exchange(lambda: self._start_worker(invoker))
                invoker.finish_start(call, frame)
            call, frame = await calls.exchange(
                lambda: invoker.send(data, limit, request_id, context, on_log)
            )
            return self._keep(invoker.finish(call, frame))
        except BaseException as error:
            self._note_failure(error)
            raise
        finally:
            self._end()

    def _calls_on(self, invoker: Invoker, loop: asyncio.AbstractEventLoop) -> LoopCalls:
        if self._loop is None or self._loop.loop is not loop:
            if self._loop is not None and not self._loop.loop.is_closed():
                self._loop.forget()
            self._loop = LoopCalls(invoker, loop)
        return self._loop

    def _take(self) -> None:
        """Begin an invocation: there is at most one at a time, by construction."""
        if not self._busy.acquire(blocking=False):
            raise EnvironmentStateError(
                f"environment {self._env.id} is busy with another invocation; "
                "an environment serves one at a time"
            )
        self._holder = threading.get_ident()

    def _end(self) -> None:
        self.is_used = True
        self._busy.release()

    def _note_failure(self, error: BaseException) -> None:
        """Keep the record of an invocation that failed; without a verdict end its environment.

        Its answer may be on the way still, so that the environment serves no other.

        Raises:
            EnvironmentDied: Another thread has closed it, and with it what was waited on.
        """
        if isinstance(error, FunctionError | InvokeTimeout):
            self._last = error.invocation
            return
        if self._link.closing and isinstance(error, OSError | ValueError):
            raise EnvironmentDied(
                f"environment {self._env.id}: {self._link.describe_end()}"
            ) from error
        self._link.kill()

    def _keep(self, answer: Invocation | Answer) -> Invocation | Answer:
        self._last = answer
        return answer

    def last(self) -> Invocation | None:
        """Return the record of the last invocation, None before the first."""
        if isinstance(self._last, Answer):
            self._last = self._last.invocation()
        return self._last

    # -- a plain program -----------------------------------------------------------------------

    def _run_command(
        self, payload: bytes, timeout: float | None, request_id: str | None, on_log: OnLog | None
    ) -> Invocation:
        request_id = str(uuid.uuid4()) if request_id is None else request_id
        limit = self._function.timeout if timeout is None else timeout
        begin = time.monotonic()
        variables = {**dict(self._version.env), "AWS_REQUEST_ID": request_id}
        result = self._env.run(
            self._function.command or (), input=payload, timeout=limit, env=variables
        )
        duration = time.monotonic() - begin
        if on_log is not None and result.stderr:
            on_log("stderr", result.stderr)
        kind, message = self._judge(result, request_id, limit)
        answer = result.stdout
        if kind:
            answer = error_payload(kind, message)
        memory = self._function.limits.memory_max
        invocation = Invocation(
            request_id=request_id,
            payload=answer,
            stderr=result.stderr,
            duration_seconds=duration,
            memory_limit_mb=int(memory) >> 20 if memory is not None else None,
            status="timeout" if result.outcome is Outcome.TIMED_OUT else "error" if kind else "",
            error_type=kind,
        )
        if result.outcome is Outcome.TIMED_OUT:
            self._link.kill()
            raise InvokeTimeout(message, invocation)
        if result.outcome is Outcome.OOM_KILLED:
            self._link.kill()
        elif self._function.reuse == "reset":
            channel = self._link.ask(p.RESET, p.PID.pack(0), [])
            with channel.socket:
                finish_reset(self._link, channel)
        if kind:
            raise FunctionError(kind, message, (), invocation)
        return invocation

    def _judge(self, result: Result, request_id: str, limit: float) -> tuple[str, str]:
        """Return the type and message of a program's failure; two empty words for an answer."""
        if result.outcome is Outcome.TIMED_OUT:
            return "Sandbox.Timedout", f"Task timed out after {limit:.2f} seconds"
        prefix = f"RequestId: {request_id} Error: "
        if result.outcome is Outcome.OOM_KILLED:
            return "Runtime.OutOfMemory", f"{prefix}{_SIGNALED}: killed ({result.evidence})"
        if result.outcome is Outcome.OUTPUT_LIMIT or len(result.stdout) > runtime.ANSWER_MAX:
            return "Function.ResponseSizeTooLarge", (
                "Response payload size exceeded maximum allowed payload size "
                f"({runtime.ANSWER_MAX} bytes)."
            )
        if result.returncode < 0:
            return "Runtime.ExitError", f"{prefix}{_SIGNALED} {-result.returncode}"
        if result.returncode:
            status = f"exit status {result.returncode}"
            return "Runtime.ExitError", f"{prefix}Runtime exited with error: {status}"
        try:
            json.loads(result.stdout)
        except (ValueError, RecursionError) as error:
            return "Runtime.MarshalError", f"The answer is no JSON: {error}"
        return "", ""


class FunctionMethods:
    """The methods of an `ExecutionEnvironment` that are for function versions alone."""

    id: str
    _frozen: bool
    _environment: Mapping[str, str]
    _version: FunctionVersion | None
    _invocations: Invocations | None

    def _known_link(self) -> Link:
        raise NotImplementedError

    def _replace_blank(self) -> None:
        raise NotImplementedError

    def close(self, *, wait: bool = True) -> None:
        """See `ExecutionEnvironment.close`."""
        raise NotImplementedError

    def init(self) -> None:
        """Import the function's module under its `init_timeout`; else the first `invoke` does.

        Raises:
            FunctionError: It cannot be imported, or has no such handler.
            InvokeTimeout: It took too long; the environment was killed.
            EnvironmentStateError: This is no environment of a function, or it cannot do this now.
        """
        self._function_calls().init()

    def invoke(
        self,
        event: object,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        client_context: Mapping[str, Any] | None = None,
        on_log: OnLog | None = None,
    ) -> Any:  # noqa: ANN401 - any JSON value
        """Call the function with an event and return its answer; both are JSON values.

        One at a time: a second call while one is under way raises. The `Invocation` is `last`.

        Args:
            event: What json.dumps takes, up to 6 MiB of it.
            timeout: Seconds, instead of the function's.
            request_id: The context's aws_request_id; a new one by default.
            client_context: The context's client_context.
            on_log: Called with ``"stdout"`` or ``"stderr"`` and what the function writes.

        Raises:
            FunctionError: The handler raised, answered no JSON or too much, or its process ended.
            InvokeTimeout: It took too long; the environment was killed.
            EnvironmentDied: The environment was ended from outside, or its worker broke the rules.
            EnvironmentStateError: It is busy, closed or dead.
            ConfigError: The event is no JSON value, or too large.
        """
        payload = _encode_event(event)
        calls = self._function_calls()
        try:
            answer = calls.invoke(payload, timeout, request_id, client_context, on_log)
        finally:
            self._end_invocation()
        return answer.json()

    def invoke_bytes(
        self,
        payload: bytes,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        client_context: Mapping[str, Any] | None = None,
        on_log: OnLog | None = None,
    ) -> Invocation:
        """Call the function with an event in JSON and return the `Invocation`; see `invoke`."""
        calls = self._function_calls()
        try:
            answer = calls.invoke(payload, timeout, request_id, client_context, on_log)
        finally:
            self._end_invocation()
        return answer.invocation() if isinstance(answer, Answer) else answer

    async def invoke_async(
        self,
        event: object,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - it kills, and is not of this task alone
        request_id: str | None = None,
        client_context: Mapping[str, Any] | None = None,
        on_log: OnLog | None = None,
    ) -> Any:  # noqa: ANN401 - any JSON value
        """Do as `invoke`, on the running asyncio loop and without a thread.

        A cancelled invocation is killed, and the environment with it.
        """
        payload = _encode_event(event)
        calls = self._function_calls()
        try:
            answer = await calls.invoke_async(payload, timeout, request_id, client_context, on_log)
        finally:
            self._end_invocation()
        return answer.json()

    @property
    def last(self) -> Invocation | None:
        """The last `Invocation`, failed ones too; None before the first."""
        return None if self._invocations is None else self._invocations.last()

    def base_environment(self) -> dict[str, str]:
        """Return the environment variables that every command begins with."""
        return dict(self._environment)

    def _function_calls(self) -> Invocations:
        # An end that nobody has noticed yet is seen at once by who waits for the answer.
        link = self._known_link()
        if self._invocations is None:
            raise EnvironmentStateError(
                f"environment {self.id} belongs to no function; make one of Function(...).publish()"
            )
        if self._frozen:
            link.request("thaw")
            self._frozen = False
        return self._invocations

    def _end_invocation(self) -> None:
        self._replace_blank()
        # Not for a call that was refused before it began, while another may be under way.
        is_used = self._invocations is not None and self._invocations.is_used
        if is_used and self._version is not None and self._version.function.reuse == "never":
            self.close(wait=False)


def _check_words(request_id: object, client_context: Mapping[str, Any] | None) -> str:
    """Check what goes with an event; return the client context in JSON, "" for none."""
    if request_id is not None:
        text = check_text(request_id, "request_id")
        if not text.isprintable() or len(text) > _REQUEST_ID_MAX:
            raise ConfigError(
                f"request_id: must be up to {_REQUEST_ID_MAX} printable characters, got {text!r}"
            )
    if not client_context:
        return ""
    try:
        words = json.dumps(client_context, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"client_context: no JSON value: {error}") from error
    if len(words) > _CLIENT_CONTEXT_MAX:
        raise ConfigError(
            f"client_context: {len(words)} bytes of JSON, more than {_CLIENT_CONTEXT_MAX}"
        )
    return words


def _encode_event(event: object) -> bytes:
    try:
        return json.dumps(event, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"event: no JSON value: {error}") from error
