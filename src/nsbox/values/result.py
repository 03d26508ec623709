# SPDX-License-Identifier: Apache-2.0
"""What came of a command, and what was in force while it ran: frozen values."""

from __future__ import annotations

import enum
import os
import signal as _signal
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nsbox.errors import InvokeError, NsboxError


class Outcome(enum.Enum):
    """How a command ended, as judged from outside the environment."""

    EXITED = "exited"
    """It called exit; `Result.exit_code` has the code."""
    SIGNALED = "signaled"
    """A signal that nsbox did not send ended it."""
    TIMED_OUT = "timed_out"
    """nsbox killed it at the wall-clock limit."""
    CPU_TIMED_OUT = "cpu_timed_out"
    """nsbox killed it at the CPU-time limit."""
    OOM_KILLED = "oom_killed"
    """The kernel killed it at the memory limit; the whole environment is gone."""
    OUTPUT_LIMIT = "output_limit"
    """nsbox killed it for writing more than `Limits.output_max`."""
    SECCOMP_KILLED = "seccomp_killed"
    """It died of SIGSYS, and the kernel's log says that the filter killed this very process."""
    KILLED = "killed"
    """The caller killed it (`Process.kill`, `close`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Resources used. None where the host does not tell.

    CPU times, throttled time and io are of the command in `Result.usage`, and of the whole life
    so far in `ExecutionEnvironment.usage()`. Peaks cover the life of the environment, for the
    kernel keeps one peak per cgroup.

    Attributes:
        wall_seconds: From the start of the command to its end.
        cpu_user_seconds: CPU time in user mode, of all processes.
        cpu_system_seconds: CPU time in the kernel.
        memory_current_bytes: Memory in use, page cache and /tmp included.
        memory_peak_bytes: The most of it.
        pids_current: Processes and threads, PID 1 included.
        pids_peak: The most of them.
        io_read_bytes: Read from block devices.
        io_write_bytes: Written to block devices.
        throttled_seconds: Time in which `Limits.cpu_max` let nothing run.
        oom_kills: Kills at the memory limit.
    """

    wall_seconds: float | None = None
    cpu_user_seconds: float | None = None
    cpu_system_seconds: float | None = None
    memory_current_bytes: int | None = None
    memory_peak_bytes: int | None = None
    pids_current: int | None = None
    pids_peak: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    throttled_seconds: float | None = None
    oom_kills: int | None = None

    @property
    def cpu_seconds(self) -> float | None:
        """User plus system CPU time."""
        if self.cpu_user_seconds is None or self.cpu_system_seconds is None:
            return None
        return self.cpu_user_seconds + self.cpu_system_seconds


@dataclass(frozen=True, slots=True)
class Protection:
    """One layer: whether it is in force, and how or why not.

    Attributes:
        name: What it is, as `ExecutionEnvironment.protections` has it: ``"seccomp"``.
        in_force: Whether it is.
        detail: By what, or why not.
        wanted: False where the configuration does without it: no limit named, the host's
            network.
    """

    name: str
    in_force: bool
    detail: str
    wanted: bool = True


@dataclass(frozen=True, slots=True)
class Protections(Mapping[str, Protection]):
    """What is in force, layer by layer; a read-only mapping from name to `Protection`."""

    layers: tuple[Protection, ...] = ()

    def __getitem__(self, name: str) -> Protection:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def missing(self) -> tuple[Protection, ...]:
        """The layers that are wanted and not in force."""
        return tuple(layer for layer in self.layers if layer.wanted and not layer.in_force)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The end of a command. Nothing in it comes from the command but its two streams.

    Attributes:
        argv: The command line.
        outcome: How it ended, as judged from outside.
        returncode: Exit code, or minus the signal number, as in `subprocess`.
        stdout: What was captured, up to `Limits.output_max` bytes; empty where a file was given.
        stderr: As `stdout`.
        evidence: What the outcome was concluded from.
        usage: Resources used by this command and all it started.
        protections: What was in force while it ran.
    """

    argv: tuple[str, ...]
    outcome: Outcome
    returncode: int
    stdout: bytes = b""
    stderr: bytes = b""
    evidence: str = ""
    usage: Usage = field(default_factory=Usage)
    protections: Protections = field(default_factory=Protections, repr=False)

    @property
    def exit_code(self) -> int | None:
        """The exit code, or None when a signal ended the command."""
        return self.returncode if self.returncode >= 0 else None

    @property
    def signal(self) -> _signal.Signals | int | None:
        """The signal that ended the command, or None when it exited."""
        if self.returncode >= 0:
            return None
        try:
            return _signal.Signals(-self.returncode)
        except ValueError:  # real-time signals have no name
            return -self.returncode

    @property
    def ok(self) -> bool:
        """Whether the command exited with code 0."""
        return self.outcome is Outcome.EXITED and self.returncode == 0

    def text(self, errors: str = "replace") -> str:
        """Return stdout as text (UTF-8; undecodable bytes are replaced unless told otherwise)."""
        return self.stdout.decode(errors=errors)

    def stderr_text(self, errors: str = "replace") -> str:
        """Return stderr as text, as `text` does for stdout."""
        return self.stderr.decode(errors=errors)

    def check(self) -> Result:
        """Return self when the command exited with 0, else raise `CommandFailed`."""
        if not self.ok:
            raise CommandFailed(self)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the whole result as JSON-able values.

        Streams and words of argv are text where they are UTF-8, else ``{"base64": ...}``.
        """
        signal = self.signal
        return {
            "argv": [_json_bytes(os.fsencode(word)) for word in self.argv],
            "outcome": self.outcome.value,
            "returncode": self.returncode,
            "exit_code": self.exit_code,
            "signal": getattr(signal, "name", signal),
            "stdout": _json_bytes(self.stdout),
            "stderr": _json_bytes(self.stderr),
            "evidence": self.evidence,
            "usage": asdict(self.usage),
            "protections": {layer.name: asdict(layer) for layer in self.protections.layers},
        }


def _json_bytes(data: bytes) -> str | dict[str, str]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        import base64

        return {"base64": base64.b64encode(data).decode()}


class CommandFailed(NsboxError):
    """Raised by `Result.check()` when the command did not exit with 0.

    Attributes:
        result: The whole result.
    """

    def __init__(self, result: Result) -> None:
        super().__init__(f"{result.argv[0]!r} failed: {result.evidence}")
        self.result = result


class EnvironmentDied(InvokeError):
    """The environment ended under a running command, by no verdict of nsbox.

    Attributes:
        outcome: The `Outcome` that describes its end, or None when nothing is known.
    """

    def __init__(self, message: str, outcome: Outcome | None = None) -> None:
        super().__init__(message)
        self.outcome = outcome
