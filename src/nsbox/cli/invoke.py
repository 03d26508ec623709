# SPDX-License-Identifier: Apache-2.0
"""``nsbox invoke``: one function, one event, its answer on stdout and its log on stderr.

Exit statuses are 0, 1 for an error of the function's, 124 for a timeout, and 125 for nsbox's own
failures and for an event or option that is wrong.
"""

from __future__ import annotations

import codecs
import json
import math
import sys
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import click

from nsbox.cli.app import echo, say_missing
from nsbox.cli.options import function_options, make_fields
from nsbox.environment.environment import ExecutionEnvironment
from nsbox.environment.managed import State
from nsbox.errors import ConfigError, EnvironmentStateError
from nsbox.functions.function import Function, FunctionVersion
from nsbox.functions.request import check_payload
from nsbox.guest.runtime import PAYLOAD_MAX
from nsbox.supervisor.standby import set_standby
from nsbox.values.invocation import FunctionError, Invocation, InvokeTimeout

_FUNCTION_ERROR: Final = 1
_TIMEOUT: Final = 124
_BORROWED: Final = ("timeout", "init_timeout", "start", "reuse", "preload", "code")


@click.command("invoke")
@click.option("--code", metavar="DIR|ZIP", help="What becomes /var/task; default: the module.")
@click.option("--layer", "layers", multiple=True, metavar="DIR|ZIP", help="Laid into /opt.")
@click.option("--event", metavar="FILE|-", help="JSON; - is stdin. Default {}.")
@click.option("--timeout", type=float, metavar="S", help="Of an invocation; default 3 (124).")
@click.option("--init-timeout", type=float, metavar="S", help="Of the import; default 10 (124).")
@click.option("--start", type=click.Choice(["clone", "exec"]), help="Default clone.")
@click.option("--reuse", type=click.Choice(["keep", "reset", "never"]), help="Default keep.")
@click.option("--preload", multiple=True, metavar="MODULE", help="A module you trust.")
@click.option("--repeat", type=click.IntRange(1), default=1, metavar="N", help="Invoke N times.")
@click.option("--report", is_flag=True, help="Print the line of duration and memory on stderr.")
@click.option("--command", "is_command", is_flag=True, help="A program instead of a handler.")
@function_options
@click.option("--quiet", "-q", is_flag=True, help="Say nothing about limits.")
@click.argument(
    "words",
    nargs=-1,
    type=click.UNPROCESSED,
    required=True,
    metavar="MODULE.FUNCTION | --command -- PROGRAM...",
)
def invoke_command(words: tuple[str, ...], **options: Any) -> int:  # noqa: ANN401 - as declared
    """Call a function with an event, in an environment of its own; print its answer.

    The answer is one line of JSON on stdout, errors of the function too; its log is on stderr.
    With --repeat the invocations follow one another, until one fails. The exit status is 0, 1 when
    the function failed, 124 timeout, 125 nsbox's own failure.
    """
    event = _read_event(options["event"])
    version = _make_function(words, options).publish()
    repeat = options["repeat"]
    if repeat == 1 or version.function.reuse != "never":
        set_standby(0)  # there is no next environment
    runner = _Runner(version, report=options["report"], quiet=options["quiet"])
    try:
        for _ in range(repeat):
            status = runner.invoke(event)
            if status:
                return status
    finally:
        runner.close()
    return 0


def _make_function(words: tuple[str, ...], options: dict[str, Any]) -> Function:
    fields = make_fields(options)
    fields |= {name: options[name] for name in _BORROWED if options[name]}
    for name in ("timeout", "init_timeout"):
        if options[name] is not None:
            fields[name] = options[name]
    if options["is_command"]:
        return Function(command=words, layers=options["layers"], **fields)
    if len(words) > 1:
        raise ConfigError(
            f"{words[1]!r}: give one handler, or '--command -- PROGRAM...' for a program"
        )
    return Function(words[0], layers=options["layers"], **fields)


def _read_event(path: str | None) -> bytes:
    """Return the event.

    Raises:
        ConfigError: It cannot be read, is no JSON, or too large.
    """
    if path is None:
        return b"{}"
    try:
        if path == "-":
            data = sys.stdin.buffer.read(PAYLOAD_MAX + 1) if sys.stdin is not None else b""
        else:
            with open(path, "rb") as file:
                data = file.read(PAYLOAD_MAX + 1)
    except OSError as error:
        what = "give a file that has the event in JSON, or - and the event on stdin"
        raise ConfigError(f"--event {path!r}: {error.strerror}; {what}") from error
    if len(data) > PAYLOAD_MAX:
        raise ConfigError(f"--event {path!r}: more than {PAYLOAD_MAX} bytes; pass data by a file")
    try:
        json.loads(data.decode())
        check_payload(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--event {path!r}: no JSON: {error}") from error
    return data


class _Runner:
    """Invokes one version, in the same environment for as long as its reuse policy has it."""

    def __init__(self, version: FunctionVersion, *, report: bool, quiet: bool) -> None:
        self._version = version
        self._report = report
        self._quiet = quiet
        self._environment: ExecutionEnvironment | None = None

    def close(self) -> None:
        """End the environment."""
        if self._environment is not None:
            self._environment.close(wait=False)

    def invoke(self, event: bytes) -> int:
        """Invoke once, print what comes of it, and return the exit status."""
        environment = self._ready()
        status = 0
        invocation: Invocation | None = None
        try:
            invocation = environment.invoke_bytes(event, on_log=_Log())
            answer = _one_line(invocation)
        except (FunctionError, InvokeTimeout) as error:
            status = _TIMEOUT if isinstance(error, InvokeTimeout) else _FUNCTION_ERROR
            invocation = error.invocation
            answer = _describe(error)
            if isinstance(error, FunctionError) and not _is_logged(error):
                _tell(error)
        echo(answer)
        if self._report and invocation is not None:
            click.echo(_with_memory(invocation, environment).report(), err=True)
        return status

    def _ready(self) -> ExecutionEnvironment:
        environment = self._environment
        if environment is None or environment.state is State.CLOSED:
            first = environment is None
            environment = self._environment = ExecutionEnvironment(self._version)
            if first and not self._quiet:
                say_missing(environment.protections)
        return environment


class _Log:
    """Writes a function's log to stderr: its bytes, or at a terminal what is harmless of them."""

    def __init__(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._decoders = {name: decoder("backslashreplace") for name in ("stdout", "stderr")}

    def __call__(self, stream: str, data: bytes) -> None:
        if self._is_terminal:
            echo(self._decoders[stream].decode(data), nl=False, err=True)
        else:
            click.echo(data, nl=False, err=True)


def _one_line(invocation: Invocation) -> str:
    """Return the answer as one line.

    Raises:
        FunctionError: It is no JSON: a worker may send anything.
    """
    invocation.json()
    # In strings JSON has no line breaks, so these stand between its tokens.
    return invocation.payload.decode().strip().replace("\r", " ").replace("\n", " ")


def _describe(error: FunctionError | InvokeTimeout) -> str:
    """Return what AWS Lambda answers for an error."""
    if isinstance(error, FunctionError):
        told: dict[str, Any] = {"errorType": error.error_type, "errorMessage": error.message}
        told["stackTrace"] = list(error.stack_trace)
    else:
        told = {"errorType": "Sandbox.Timedout", "errorMessage": str(error)}
    if error.invocation is not None:
        told["requestId"] = error.invocation.request_id
    return json.dumps(told)


def _is_logged(error: FunctionError) -> bool:
    """Whether the function's worker has written it to the log: not what was seen from outside."""
    if error.invocation is not None:
        return not error.invocation.error_type
    return error.error_type not in ("Runtime.ExitError", "Runtime.OutOfMemory")


def _tell(error: FunctionError) -> None:
    """Write an error to the log as AWS Lambda's runtime does."""
    echo(f"[ERROR] {error.error_type}: {error.message}", err=True)


def _with_memory(invocation: Invocation, environment: ExecutionEnvironment) -> Invocation:
    peak = None
    if invocation.memory_peak_mb is None:
        with suppress(EnvironmentStateError):  # it is gone, and its counters with it
            peak = environment.usage().memory_peak_bytes
    if peak is None:
        return invocation
    return replace(invocation, memory_peak_mb=math.ceil(peak / (1 << 20)))
