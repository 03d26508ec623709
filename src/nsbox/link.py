# SPDX-License-Identifier: Apache-2.0
"""The host's end of one environment: its sockets to PID 1 and to the launcher, and its counters.

From the launcher come the facts (born, gone, status, OOM); from PID 1 only answers to what was
asked, in frames of fixed size that are checked and not trusted (`nsbox.guest.protocol`).
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from nsbox.errors import EnvironmentDied, LauncherError, SetupError
from nsbox.guest import protocol as p
from nsbox.isolation import audit_log, cgroups, readback
from nsbox.launcher import wire
from nsbox.launcher.client import Launcher
from nsbox.linux.descriptors import close_all, receive_bytes, send_bytes
from nsbox.result import Outcome

BIRTH_DEADLINE: Final = 30.0
"""Seconds a birth may take."""
ANSWER_DEADLINE: Final = 30.0
"""Seconds PID 1 may take to start a command, or to answer a file operation."""
END_DEADLINE: Final = 10.0
"""Seconds a killed environment may take to be gone and removed."""
_READY_MOST: Final = 16  # bytes of PID 1's first and only word on the control socket
_STEP_HINTS: Final = {
    "clone": "'nsbox doctor' tells which namespace this host does not allow",
    "trees": "an idmapped mount needs a file system that supports it (ext4, xfs, btrfs, tmpfs "
    "since Linux 6.3); allow_missing={'idmapped_mounts'} binds without",
}

Counters = dict[str, int | None]
"""What `isolation.cgroups.UsageReader` reads; empty where there is no cgroup."""


class Channel:
    """The host's end of one operation of PID 1. What it reads is not trusted."""

    def __init__(self, control: socket.socket, operation: bytes, fds: list[int]) -> None:
        """Ask for `operation`; raises OSError when PID 1 is gone."""
        self.socket, theirs = socket.socketpair()
        try:
            send_bytes(control, operation, [theirs.fileno(), *fds])
        except OSError:
            self.socket.close()
            raise
        finally:
            theirs.close()
        self.socket.settimeout(ANSWER_DEADLINE)

    def send_request(self, request: Mapping[str, Any]) -> None:
        """Send the request itself."""
        data = json.dumps(request).encode()
        self.socket.sendall(p.LENGTH.pack(len(data)) + data)

    def receive_answer(self) -> tuple[bytes, int, int, int, list[int]]:
        """Return the kind, three numbers and the descriptors of the next answer.

        Raises:
            ConnectionError: PID 1 is gone, or said what it may not say.
        """
        data, fds = receive_bytes(self.socket, p.ANSWER.size)
        while data and len(data) < p.ANSWER.size:
            more = self.socket.recv(p.ANSWER.size - len(data))
            if not more:
                break
            data += more
        if len(data) != p.ANSWER.size:
            close_all(fds)
            raise ConnectionError("PID 1 is gone")
        kind, first, second, third = p.ANSWER.unpack(data)
        if kind == p.FAILED and not (0 <= second < len(p.STAGES) and 0 < first < 4096):
            close_all(fds)
            raise ConnectionError("PID 1 sent a malformed answer")
        return kind, first, second, third, fds


class Link:
    """Made with the birth, closed with the environment. Safe to use from many threads.

    Attributes:
        env_id: The environment's id.
        pid: Process id of its PID 1, on the host.
        host_id: Uid and gid it has outside, as the launcher's user namespace counts them.
        proc: How much of a /proc it has.
        end: What the launcher said of its end; None while it lives.
        closing: Whether the caller has asked for the end.
    """

    def __init__(self, launcher: Launcher, spec: Mapping[str, Any]) -> None:
        """Ask `launcher` for a birth and wait until the environment is locked in.

        Raises:
            SetupError: A step failed; nothing is left of it.
            LauncherError: The launcher is gone.
        """
        self.env_id = str(spec["id"])
        self.end: dict[str, Any] | None = None
        self.closing = False
        self._lock = threading.Lock()
        self._pidfd = -1
        self._control, control = wire.pair()
        self._supervision, supervision = wire.pair()
        try:
            try:
                fds = control.fileno(), supervision.fileno()
                launcher.request_birth({**spec}, *fds)
            finally:
                control.close()
                supervision.close()
            born, self.proc = self._await_birth(launcher)
            self.pid: int = born["pid"]
            self._verify(filtered=bool(spec["seccomp"]))
        except BaseException:
            self.close()
            raise
        self.host_id: int = born["host_id"]
        self._has_own_id = launcher.hello["ids"] == "range"
        self._reader = cgroups.UsageReader(born["cgroup"]) if born["cgroup"] else None

    # -- birth ---------------------------------------------------------------------------------

    def _await_birth(self, launcher: Launcher) -> tuple[dict[str, Any], str]:
        """Wait until it is cloned (says the launcher) and locked in (says it itself)."""
        deadline = time.monotonic() + BIRTH_DEADLINE
        poll = select.poll()
        poll.register(self._supervision, select.POLLIN)
        poll.register(self._control, select.POLLIN)
        born: dict[str, Any] = {}
        while True:
            left = deadline - time.monotonic()
            ready = {fd for fd, _ in poll.poll(max(0.0, left) * 1000)}
            if not ready:
                raise SetupError("birth", f"not over after {BIRTH_DEADLINE:g} seconds")
            if self._supervision.fileno() in ready:
                born.update(self._hear_of_birth(launcher))
            elif born:
                try:
                    word = self._control.recv(_READY_MOST)
                except ConnectionError:
                    word = b""
                if word:
                    return born, word.decode()
                # It ended: why stands on the supervision socket.
                poll.unregister(self._control)

    def _hear_of_birth(self, launcher: Launcher) -> dict[str, Any]:
        received = wire.receive(self._supervision)
        if received is None:
            raise LauncherError(f"the launcher died during the birth. {launcher.last_words()}")
        message, fds = received
        if message["kind"] == "born":
            self._pidfd = fds[0]
            return message
        if message["kind"] == "gone":
            raise SetupError("birth", f"{self._describe_gone(message)} before it was ready")
        step = message["step"]
        raise SetupError(
            step, message["message"], errno=message["errno"], hint=_STEP_HINTS.get(step, "")
        )

    def _verify(self, *, filtered: bool) -> None:
        try:
            missing = readback.missing_lock(self.pid, filtered=filtered)
        except OSError:
            self.request("verify")  # /proc hides it from us (hidepid), not from its launcher
            return
        if missing:
            raise SetupError("verify", f"its status does not say {missing!r}")

    # -- PID 1 ---------------------------------------------------------------------------------

    def ask(self, operation: bytes, request: Mapping[str, Any], fds: list[int]) -> Channel:
        """Ask PID 1 for an operation; its answer is on the channel.

        Raises:
            EnvironmentDied: PID 1 is gone, or does not listen.
        """
        try:
            channel = Channel(self._control, operation, fds)
        except ConnectionError as error:
            raise self.died(error) from error
        try:
            channel.send_request(request)
        except BrokenPipeError:
            pass  # it refused the request before reading all of it: its answer says why
        except OSError as error:
            channel.socket.close()
            raise self.died(error) from error
        return channel

    def died(self, cause: OSError) -> EnvironmentDied:
        """Return the exception for an operation under which PID 1 went away or fell silent."""
        if isinstance(cause, TimeoutError):
            self.kill()
            return EnvironmentDied(
                f"environment {self.env_id}: PID 1 did not answer; it was killed"
            )
        self.kill()  # a broken frame, or it is gone already
        self.await_end()
        killed_by_limit = (self.end or {}).get("usage", {}).get("oom_kills")
        outcome = Outcome.OOM_KILLED if killed_by_limit else Outcome.SIGNALED
        return EnvironmentDied(f"environment {self.env_id}: {self.describe_end()}", outcome)

    def kill(self) -> None:
        """SIGKILL PID 1, and so everything in the environment."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    # -- the launcher --------------------------------------------------------------------------

    def fileno(self) -> int:
        """Descriptor that is readable when the launcher has something to say."""
        return self._supervision.fileno()

    def request(self, kind: str) -> None:
        """Have the launcher do something to the environment.

        Raises:
            SetupError: It could not.
            EnvironmentDied: The environment is gone.
        """
        with self._lock:
            try:
                wire.send(self._supervision, {"kind": kind})
                answer = self._receive(END_DEADLINE)
            except OSError:
                answer = None
        if answer is None or answer["kind"] == "gone":
            raise EnvironmentDied(f"environment {self.env_id}: {self.describe_end()}")
        if answer["kind"] == "failed":
            raise SetupError(kind, answer["message"], errno=answer["errno"])

    def _receive(self, timeout: float) -> dict[str, Any] | None:
        """Return the launcher's next message; notes the end. Needs the lock."""
        if self.end is not None:
            return self.end
        if self._supervision.fileno() < 0:
            return None
        if not _is_readable(self._supervision.fileno(), timeout):
            return None
        received = wire.receive(self._supervision)
        message = {"kind": "gone", "launcher": True} if received is None else received[0]
        if message["kind"] == "gone":
            self.end = message
        return message

    def note_end(self) -> bool:
        """Whether the environment is gone, as far as the launcher has said by now."""
        with self._lock:
            self._receive(0)
            return self.end is not None

    def await_end(self) -> bool:
        """Wait for the end of a killed environment; False when it does not come."""
        deadline = time.monotonic() + END_DEADLINE
        with self._lock:
            while self.end is None and (left := deadline - time.monotonic()) > 0:
                if self._receive(left) is None:
                    break
        if self.end is not None and "launcher" in self.end and self._pidfd >= 0:
            return _is_readable(self._pidfd, END_DEADLINE)  # nobody else can say it
        return self.end is not None

    def describe_end(self) -> str:
        """Say how the environment ended, for people."""
        if self.closing:
            return "it was closed"
        return self._describe_gone(self.end or {})

    @staticmethod
    def _describe_gone(end: Mapping[str, Any]) -> str:
        if "launcher" in end:
            return "the launcher died, and the environment with it"
        if (end.get("usage") or {}).get("oom_kills"):
            return "the kernel killed it at the memory limit"
        status = end.get("status")
        if status is None:
            return "PID 1 is gone"
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            return f"PID 1 was killed from outside by {signal.Signals(-code).name}"
        return f"PID 1 ended with status {code}"

    def close(self) -> None:
        """Close the descriptors; the launcher then kills and removes what is left."""
        self._control.close()
        self._supervision.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    # -- accounting ----------------------------------------------------------------------------

    def usage(self) -> Counters:
        """Return everything that can be read of its cgroups now."""
        try:
            return {} if self._reader is None else self._reader.read()
        except OSError:
            return {}  # they have just been removed

    def counters(self) -> Counters:
        """Return what only grows, and what it costs less to read."""
        try:
            return {} if self._reader is None else self._reader.counters()
        except OSError:
            return {}

    def filter_kill(self, age: float) -> str:
        """Return what the kernel's log says of a filter kill in it in `age` seconds, or ""."""
        # By its uid: no other process of the host has it. Without one nothing can be said.
        return audit_log.filter_kill(self.host_id, age) if self._has_own_id else ""

    def cpu_usec(self) -> int | None:
        """Return the CPU time used so far, in microseconds."""
        try:
            return None if self._reader is None else self._reader.cpu_usec()
        except OSError:
            return None


def _is_readable(fd: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))
