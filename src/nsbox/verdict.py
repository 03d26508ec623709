# SPDX-License-Identifier: Apache-2.0
"""Why a command ended: by nsbox's own kill, noted before it was sent, or by a signal of others."""

from __future__ import annotations

import signal
import time
from typing import Final

from nsbox.link import Link
from nsbox.reports import signal_name
from nsbox.result import Outcome

_SIGNAL_WORDS: Final = {6: "aborted", 9: "killed", 11: "segmentation fault", 15: "terminated"}


class Verdict:
    """Why nsbox killed a command, noted before the signal is sent."""

    __slots__ = ("_evidence", "outcome")

    def __init__(self, outcome: Outcome, evidence: str) -> None:
        self.outcome = outcome
        self._evidence = evidence

    def holds(self, returncode: int) -> bool:
        """Whether it is the reason for an end: not when the command had ended by itself.

        Too much output is that all the same, for what is over the limit was dropped.
        """
        return returncode == -signal.SIGKILL or self.outcome is Outcome.OUTPUT_LIMIT

    def say(self, returncode: int) -> str:
        """Return the evidence, with what became of the kill."""
        if returncode == -signal.SIGKILL:
            return f"{self._evidence}; nsbox killed it"
        return f"{self._evidence}; it ended by itself with {returncode}"


def judge_signal(number: int, link: Link, started_at: float) -> tuple[Outcome, str]:
    """Return the verdict on a command that a signal ended which nsbox did not send."""
    name = signal_name(number)
    if number == signal.SIGSYS:
        record = link.filter_kill(time.monotonic() - started_at)
        if record:
            return Outcome.SECCOMP_KILLED, f"the kernel's log: {record}"
        # A filter's kill and a SIGSYS that a program sends itself have the same wait status.
        return Outcome.SIGNALED, f"{name}: by the system call filter, or sent by a process inside"
    return Outcome.SIGNALED, f"{name}, not sent by nsbox"


def describe_exit(returncode: int) -> str:
    """Return AWS Lambda's words for how a process has ended."""
    if returncode >= 0:
        return f"exit status {returncode}"
    return f"signal: {_SIGNAL_WORDS.get(-returncode, f'signal {-returncode}')}"
