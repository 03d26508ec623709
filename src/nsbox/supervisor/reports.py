# SPDX-License-Identifier: Apache-2.0
"""What ends are, in words and as outcomes: of processes, and of environments."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

from nsbox.values.counters import oom_evidence
from nsbox.values.result import Outcome


def describe_end(end: Mapping[str, Any], cause: str, *, closing: bool) -> str:
    """Say how the environment ended, for people."""
    if closing:
        return "it was closed"
    if cause:
        return f"{cause}; nsbox killed it"
    if "launcher" in end:
        return "the launcher died, and the environment with it"
    if oom_evidence({}, end.get("usage") or {}):
        return "the kernel killed it at the memory limit"
    status = end.get("status")
    if status is None:
        return "PID 1 is gone"
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"PID 1 was killed from outside by {signal_name(-code)}"
    return f"PID 1 ended with status {code}"


def end_outcome(end: Mapping[str, Any], cause: str) -> Outcome | None:
    """Return what its end was, as far as the launcher has told; None: it has not."""
    if oom_evidence({}, end.get("usage") or {}):
        return Outcome.OOM_KILLED
    status = end.get("status")
    if status is None:
        return None
    return Outcome.KILLED if cause else outcome_of(status)


def exit_code(status: int) -> int | None:
    """Return the exit code of a wait status, or minus the signal; None: no process ends so."""
    if not 0 <= status < 1 << 16 or not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
        return None
    return os.waitstatus_to_exitcode(status)


def outcome_of(status: int) -> Outcome:
    """Return what a wait status tells."""
    return Outcome.SIGNALED if os.WIFSIGNALED(status) else Outcome.EXITED


def signal_name(number: int) -> str:
    """Return a signal's name; real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
