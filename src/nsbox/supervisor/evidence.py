# SPDX-License-Identifier: Apache-2.0
"""Why a command ended: by nsbox's own kill, noted before it was sent, or by a signal of others;
and why it was not started."""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import Final

from nsbox.errors import CommandStartError, SetupError
from nsbox.supervisor import kernel_log
from nsbox.supervisor.channel import RunRequest
from nsbox.supervisor.connection import EnvironmentConnection
from nsbox.supervisor.files import missing_interpreter
from nsbox.supervisor.reports import signal_name
from nsbox.values.result import Outcome

_SIGNAL_WORDS: Final = {6: "aborted", 9: "killed", 11: "segmentation fault", 15: "terminated"}


class Verdict:
    """Why nsbox killed a command, noted before the signal is sent."""

    __slots__ = ("_evidence", "outcome")

    def __init__(self, outcome: Outcome, evidence: str) -> None:
        self.outcome = outcome
        self._evidence = evidence

    def holds(self, returncode: int) -> bool:
        """Whether it is the reason of an end: not when the command had ended by itself.

        Too much output is that all the same, for what is over the limit was dropped.
        """
        return returncode == -signal.SIGKILL or self.outcome is Outcome.OUTPUT_LIMIT

    def say(self, returncode: int) -> str:
        """Return the evidence, and whether the kill has ended the command."""
        if returncode == -signal.SIGKILL:
            return f"{self._evidence}; nsbox killed it"
        return f"{self._evidence}; it ended by itself with {returncode}"


def judge_signal(number: int, host_pid: int, started_at: float) -> tuple[Outcome, str]:
    """Return the verdict on a command that a signal ended which nsbox did not send.

    Args:
        number: The signal.
        host_pid: The command's number outside, 0 where it is unknown.
        started_at: When it was started, by the monotonic clock.
    """
    name = signal_name(number)
    if number == signal.SIGSYS:
        age = time.monotonic() - started_at
        record = kernel_log.filter_kill(host_pid, age) if host_pid else ""
        if record:
            return Outcome.SECCOMP_KILLED, f"the kernel's log: {record}"
        # A filter's kill and a SIGSYS that a program sends itself have the same wait status.
        return Outcome.SIGNALED, f"{name}: by the system call filter, or sent by a process inside"
    return Outcome.SIGNALED, f"{name}, not sent by nsbox"


def start_error(
    connection: EnvironmentConnection, name: str, request: RunRequest, error: int, stage: str
) -> Exception:
    """Return the exception for a command that was not started, by the error number of `stage`."""
    text = os.strerror(error)
    if stage == "cwd":
        return SetupError("cwd", f"{request.cwd!r}: {text}", errno=error)
    if stage == "tty":
        return SetupError("tty", f"no terminal could be opened: {text}", errno=error)
    if stage == "room":
        text = "as many commands run at once as open_files leaves PID 1 room for; raise it"
        return CommandStartError(name, error, text)
    path = request.env.get("PATH", "")
    places = [""] if "/" in name else [f"{place}/" for place in path.split(":")]
    if error == errno.ENOENT:
        for place in places:
            missing = missing_interpreter(connection, os.path.join(request.cwd, place + name))
            if missing:
                return CommandStartError(name, error, f"{missing} inside the environment")
    where = f" in PATH={path}" if error == errno.ENOENT and "/" not in name else ""
    return CommandStartError(name, error, f"{text}{where}, inside the environment")


def describe_exit(returncode: int) -> str:
    """Return AWS Lambda's words for how a process has ended."""
    if returncode >= 0:
        return f"exit status {returncode}"
    return f"signal: {_SIGNAL_WORDS.get(-returncode, f'signal {-returncode}')}"
