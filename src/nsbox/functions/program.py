# SPDX-License-Identifier: Apache-2.0
"""A plain program as a function: the event is its input, what it writes is the answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from nsbox.functions.exchange import error_payload
from nsbox.functions.function import FunctionVersion
from nsbox.functions.request import InvocationRequest
from nsbox.guest import runtime
from nsbox.supervisor.connection import EnvironmentConnection
from nsbox.supervisor.files import reset
from nsbox.supervisor.process import DEVNULL, PIPE, RunningCommand, Streams
from nsbox.values.config import Word
from nsbox.values.invocation import FunctionError, Invocation, InvokeTimeout
from nsbox.values.json_text import decode_answer
from nsbox.values.result import Outcome, Result

StartCommand = Callable[[Sequence[Word], Mapping[str, str], Streams], RunningCommand]
"""Starts a command line with variables over the environment's; waits for no answer."""
_SIGNALED: Final = "Runtime exited with error: signal"


def run_program(
    connection: EnvironmentConnection,
    version: FunctionVersion,
    request: InvocationRequest,
    start: StartCommand,
) -> Invocation:
    """Serve one event with a run of the function's command; stderr is its log.

    Args:
        connection: The environment.
        version: Whose command it is.
        request: The event.
        start: Starts a command and waits for no answer.

    Raises:
        FunctionError: It failed, or what it wrote is no answer.
        InvokeTimeout: It took too long; the environment was killed.
        EnvironmentDied, SetupError: As `ExecutionEnvironment.run`.
    """
    function = version.function
    request_id = str(uuid.uuid4()) if request.request_id is None else request.request_id
    limit = function.timeout if request.timeout is None else request.timeout
    begin = time.monotonic()
    variables = {**dict(version.env), **request.env, "AWS_REQUEST_ID": request_id}
    hear = None if request.on_log is None else partial(request.on_log, "stderr")
    streams = (PIPE if request.payload else DEVNULL, PIPE, PIPE)
    process = start(function.command or (), variables, streams)
    try:
        kept = function.limits.output_max
        result = process.communicate(request.payload, limit, kept, hear or _nobody)
    except BaseException:
        process.close()
        raise
    duration = time.monotonic() - begin
    kind, message = _judge(result, request_id, limit)
    memory = function.limits.memory_max
    invocation = Invocation(
        request_id=request_id,
        payload=error_payload(kind, message) if kind else result.stdout,
        stderr=result.stderr,
        duration_seconds=duration,
        memory_limit_mb=memory >> 20 if memory is not None else None,
        status="timeout" if result.outcome is Outcome.TIMED_OUT else "error" if kind else "",
        error_type=kind,
    )
    if result.outcome is Outcome.TIMED_OUT:
        connection.kill(f"an invocation timed out after {limit:.2f} seconds")
        raise InvokeTimeout(message, invocation)
    if result.outcome is Outcome.OOM_KILLED:
        connection.kill(result.evidence)
    elif function.reuse == "reset":
        reset(connection, version.config)
    if kind:
        raise FunctionError(kind, message, (), invocation)
    return invocation


def _nobody(_data: bytes) -> None:
    """Drop the log: the caller gave no `on_log`."""


def _judge(result: Result, request_id: str, limit: float) -> tuple[str, str]:
    """Return the type and message of a program's failure; two empty words for an answer."""
    if result.outcome is Outcome.TIMED_OUT:
        return "Sandbox.Timedout", f"Task timed out after {limit:.2f} seconds"
    prefix = f"RequestId: {request_id} Error: "
    if result.outcome is Outcome.OOM_KILLED:
        return "Runtime.OutOfMemory", f"{prefix}{_SIGNALED}: killed ({result.evidence})"
    if result.outcome is Outcome.OUTPUT_LIMIT:
        return "Function.ResponseSizeTooLarge", f"The answer is too large: {result.evidence}"
    if len(result.stdout) > runtime.ANSWER_MAX:
        return "Function.ResponseSizeTooLarge", runtime.TOO_LARGE
    if result.returncode < 0:
        return "Runtime.ExitError", f"{prefix}{_SIGNALED} {-result.returncode}"
    if result.returncode:
        status = f"exit status {result.returncode}"
        return "Runtime.ExitError", f"{prefix}Runtime exited with error: {status}"
    try:
        decode_answer(result.stdout)
    except ValueError as error:
        return "Runtime.MarshalError", f"The answer is no JSON: {error}"
    return "", ""
