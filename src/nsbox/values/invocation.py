# SPDX-License-Identifier: Apache-2.0
"""What one invocation of a function was: its answer, its log, and what it took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from nsbox.errors import InvokeError
from nsbox.values.json_text import decode_answer


@dataclass(frozen=True, slots=True)
class LeftRunning:
    """What an invocation has left running in its environment. False when that is nothing.

    Attributes:
        processes: Besides PID 1 and the worker.
        threads: Besides the first of each process that goes on; of the worker too.
    """

    processes: int = 0
    threads: int = 0

    def __bool__(self) -> bool:
        return self.processes > 0 or self.threads > 0


NOTHING: Final = LeftRunning()


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """One call of a function that ended with an answer, or with an error of the function's.

    Attributes:
        request_id: A UUID, or what the caller gave.
        payload: The answer, JSON as the function gave it; of a failed one, errorType and
            errorMessage.
        stdout: What it wrote, up to `Limits.output_max` bytes.
        stderr: As `stdout`.
        init_stdout: What the module wrote while it was imported, in the first invocation of an
            environment.
        init_stderr: As `init_stdout`.
        duration_seconds: From the event's being sent to the answer's arrival.
        init_seconds: What importing the module took, in the first invocation of an environment;
            else None, and of a provisioned one always: nobody waited for that.
        initialization_type: ``on-demand``, or ``provisioned-concurrency``: the environment was
            initialised before it was needed.
        memory_limit_mb: MiB of `Limits.memory_max`; None without that limit.
        memory_peak_mb: MiB that the whole environment has used at most so far; None where the
            host does not count, and of `env.last` asked for while the next event is served.
        status: Empty, or why it failed: ``error`` or ``timeout``, as AWS Lambda's report line
            has it.
        error_type: Empty, or the class of the error, as `FunctionError.error_type`.
        left_running: What it has left running: of processes those that were killed after it,
            where they are (``Function(left_running="kill")``), else those that ran when this
            record was made. None: nobody has counted, as without cgroups and with
            ``start="exec"``, or nothing goes on, with another `reuse` than "keep".
            `ExecutionEnvironment.left_running` counts everywhere.
    """

    request_id: str
    payload: bytes = field(repr=False)
    stdout: bytes = field(default=b"", repr=False)
    stderr: bytes = field(default=b"", repr=False)
    init_stdout: bytes = field(default=b"", repr=False)
    init_stderr: bytes = field(default=b"", repr=False)
    duration_seconds: float
    init_seconds: float | None = None
    initialization_type: str = "on-demand"
    memory_limit_mb: int | None = None
    memory_peak_mb: int | None = None
    status: str = ""
    error_type: str = ""
    left_running: LeftRunning | None = None

    @property
    def billed_milliseconds(self) -> int:
        """The duration, with that of the init, rounded up to whole milliseconds."""
        return math.ceil((self.duration_seconds + (self.init_seconds or 0)) * 1000)

    def json(self) -> Any:  # noqa: ANN401 - any JSON value
        """Return the answer as a value.

        Raises:
            FunctionError: It is no JSON (`Runtime.MarshalError`): a worker may send anything.
        """
        try:
            return decode_answer(self.payload)
        except ValueError as error:
            what = f"The answer is no JSON: {error}"
            broken = replace(self, status="error", error_type="Runtime.MarshalError")
            raise FunctionError("Runtime.MarshalError", what, (), broken) from error

    def report(self) -> str:
        """Return the line AWS Lambda writes after an invocation, fields divided by tabs."""
        parts = [
            f"REPORT RequestId: {self.request_id}",
            f"Duration: {self.duration_seconds * 1000:.2f} ms",
            f"Billed Duration: {self.billed_milliseconds} ms",
        ]
        if self.memory_limit_mb is not None:
            parts.append(f"Memory Size: {self.memory_limit_mb} MB")
        if self.memory_peak_mb is not None:
            parts.append(f"Max Memory Used: {self.memory_peak_mb} MB")
        if self.init_seconds is not None:
            parts.append(f"Init Duration: {self.init_seconds * 1000:.2f} ms")
        if self.status:
            parts.append(f"Status: {self.status}")
        if self.error_type:
            parts.append(f"Error Type: {self.error_type}")
        return "\t".join(parts) + "\t"


class FunctionError(InvokeError):
    """The function failed: its handler raised, its module cannot be imported, it exited...

    Attributes:
        error_type: Name of the exception's class, or ``Runtime.ExitError`` and the like, as AWS
            Lambda names them.
        message: What it said.
        stack_trace: Lines of its own frames, as `traceback.format_list` gives them.
        invocation: The `Invocation`, with its log; None when the module was being imported.
    """

    def __init__(
        self,
        error_type: str,
        message: str,
        stack_trace: Sequence[str] = (),
        invocation: Invocation | None = None,
    ) -> None:
        super().__init__(f"{error_type}: {message}")
        self.error_type = error_type
        self.message = message
        self.stack_trace = tuple(stack_trace)
        self.invocation = invocation


class InvokeTimeout(InvokeError, TimeoutError):
    """An invocation, or the import before the first, took too long; its environment was killed.

    Attributes:
        invocation: The `Invocation`, with its log; None when the module was being imported.
    """

    def __init__(self, message: str, invocation: Invocation | None = None) -> None:
        super().__init__(message)
        self.invocation = invocation
