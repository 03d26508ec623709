# SPDX-License-Identifier: Apache-2.0
"""Descriptions and outcomes of the ends of processes and environments."""

from __future__ import annotations

import os
import signal

from nsbox.launcher.messages import Gone
from nsbox.values.counters import oom_evidence
from nsbox.values.result import Outcome


def describe_end(end: Gone | None, unsaid: str, cause: str, *, closing: bool) -> str:
    """Say how the environment ended, for people."""
    if closing:
        return "it was closed"
    if cause:
        return f"{cause}; nsbox killed it"
    if unsaid:
        return unsaid
    if end is None or end.status is None:
        return "PID 1 is gone"
    if oom_evidence({}, end.usage):
        return "the kernel killed it at the memory limit"
    code = os.waitstatus_to_exitcode(end.status)
    if code < 0:
        return f"PID 1 was killed from outside by {signal_name(-code)}"
    return f"PID 1 ended with status {code}"


def end_outcome(end: Gone | None, cause: str) -> Outcome | None:
    """Return the outcome of its end, by the launcher's report; None: there is none."""
    if end is None or end.status is None:
        return None
    if oom_evidence({}, end.usage):
        return Outcome.OOM_KILLED
    return Outcome.KILLED if cause else outcome_of(end.status)


def exit_code(status: int) -> int | None:
    """Return the exit code of a wait status, or minus the signal; None: no process ends so."""
    if not 0 <= status < 1 << 16 or not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
        return None
    return os.waitstatus_to_exitcode(status)


def outcome_of(status: int) -> Outcome:
    """Return SIGNALED or EXITED, by a wait status."""
    return Outcome.SIGNALED if os.WIFSIGNALED(status) else Outcome.EXITED


def signal_name(number: int) -> str:
    """Return a signal's name; real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
