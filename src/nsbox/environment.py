# SPDX-License-Identifier: Apache-2.0
"""`ExecutionEnvironment`: one isolated environment, from birth to removal; and `run`."""

from __future__ import annotations

import enum
import functools
import os
import secrets
import select
import signal
import socket
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

from nsbox.blueprint import born_layers, plan
from nsbox.command import DEVNULL, KILL_DEADLINE, PIPE, Channel, Process, Stream, usage_between
from nsbox.config import (
    Config,
    check_argv,
    check_environment,
    check_text,
    make_config,
    parse_seconds,
)
from nsbox.errors import (
    CleanupError,
    ConfigError,
    EnvironmentDied,
    EnvironmentStateError,
    LauncherError,
    SetupError,
    SyscallError,
    UnsupportedHostError,
)
from nsbox.guest import protocol as p
from nsbox.isolation import cgroups, readback
from nsbox.launcher import wire
from nsbox.launcher.client import Launcher, get_launcher
from nsbox.result import Outcome, Protections, Result, Usage

BIRTH_DEADLINE: Final = 30.0
"""Seconds a birth may take."""
_CLOSE_DEADLINE: Final = 10.0
_READY_MOST: Final = 16  # bytes of PID 1's first and only word on the control socket
_STEP_HINTS: Final = {
    "clone": "'nsbox doctor' tells which namespace this host does not allow",
    "mounts": "a mount point inside a bound tree must exist there already",
    "trees": "an idmapped mount needs a file system that supports it (ext4, xfs, btrfs, tmpfs "
    "since Linux 6.3); allow_missing={'idmapped_mounts'} binds without",
}


class State(enum.Enum):
    """Where an environment is in its life."""

    READY = "ready"
    FROZEN = "frozen"
    DEAD = "dead"
    """PID 1 is gone, by a limit or from outside; only `close` is left."""
    CLOSED = "closed"


class ExecutionEnvironment:
    """A complete sandbox in which many commands run, one after another or at once.

    Files in its /tmp stay until it is closed; processes do not outlive their command. Use it as a
    context manager. It may be used from several threads; not from a forked child.

    Attributes:
        id: Eight hexadecimal digits, as `nsbox ps` shows them.
        config: What it was made from.
        pid: Process id of its PID 1, on the host.
    """

    def __init__(self, config: Config | None = None, **fields: Any) -> None:
        """Give birth to an environment and wait until it is locked in.

        Args:
            config: A `Config`; None is the default one.
            fields: Fields of `Config`, over those of `config`.

        Raises:
            ConfigError: A value is wrong.
            UnsupportedHostError: A protection asked for cannot be enforced on this host.
            SetupError: A step of the birth failed; nothing is left of it.
            LauncherError: The launcher cannot be started.
        """
        self._owner = os.getpid()
        self._state = State.CLOSED
        self._lock = threading.Lock()
        self._end: dict[str, Any] | None = None
        self._closed_by_caller = False
        self._pidfd = -1
        self.config = make_config(config, fields)
        self.id = secrets.token_hex(4)
        launcher = get_launcher()
        blueprint = plan(self.config, launcher.hello)
        spec = {**blueprint.spec, "id": self.id}
        self._control, control = wire.pair()
        self._supervision, supervision = wire.pair()
        try:
            try:
                launcher.request_birth(spec, control.fileno(), supervision.fileno())
            finally:
                control.close()
                supervision.close()
            born = self._await_birth(launcher)
            self.pid: int = born["pid"]
            self._verify(filtered=bool(blueprint.program))
        except BaseException:
            self._release()
            raise
        self._host_id: int = born["host_id"] if launcher.hello["ids"] != "own" else 0
        self._accounts_cpu = blueprint.accounts_cpu
        self._reader = cgroups.UsageReader(born["cgroup"]) if born["cgroup"] else None
        self._environment = blueprint.environment
        self._describe = functools.partial(
            born_layers, self.config, launcher.hello, born, blueprint.layers
        )
        self._state = State.READY

    def _await_birth(self, launcher: Launcher) -> dict[str, Any]:
        """Wait until the environment is cloned (from the launcher) and locked in (from itself)."""
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
                    born["proc"] = word.decode()
                    return born
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
            raise SetupError("birth", "the environment was killed before it was ready")
        step = message["step"]
        raise SetupError(
            step, message["message"], errno=message["errno"], hint=_STEP_HINTS.get(step, "")
        )

    def _verify(self, *, filtered: bool) -> None:
        try:
            missing = readback.missing_lock(self.pid, filtered=filtered)
        except OSError:
            self._request("verify")  # /proc hides it from us (hidepid), not from its launcher
            return
        if missing:
            raise SetupError("verify", f"its status does not say {missing!r}")

    # -- what users do -------------------------------------------------------------------------

    @functools.cached_property
    def protections(self) -> Protections:
        """What is in force, layer by layer."""
        return Protections(tuple(self._describe()))

    @property
    def state(self) -> State:
        """The state now; a death is noticed when it is asked for."""
        if self._state in (State.READY, State.FROZEN) and self._owner == os.getpid():
            self._note_end()
        return self._state

    def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes | None = None,  # noqa: A002 - subprocess.run's name
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
        cpu_time: float | None = None,
        check: bool = False,
    ) -> Result:
        """Run a command to its end and return its `Result`.

        When this returns, no process of the command is left, daemons included.

        Args:
            argv: The command line; the program is looked for in the environment's PATH.
            input: What the command reads on stdin; nothing by default.
            timeout: Seconds of wall-clock time, after which it is killed (TIMED_OUT).
            env: Variables over those of the environment.
            cwd: Working directory inside, instead of `Config.cwd`.
            stdin: A file or descriptor for the command, instead of `input`.
            stdout: A file or descriptor to write to, or `DEVNULL`; captured by default.
            stderr: As `stdout`.
            cpu_time: Seconds of CPU time, instead of `Limits.cpu_time` (CPU_TIMED_OUT).
            check: Raise `CommandFailed` unless it exits with 0.

        Raises:
            CommandStartError: The program does not exist inside, or cannot be executed.
            EnvironmentStateError: The environment is closed, frozen or dead.
            EnvironmentDied: It was ended from outside while the command ran.
        """
        if input is not None and stdin is not None:
            raise ConfigError("input and stdin: give one of them")
        if input is not None and not isinstance(input, bytes | bytearray | memoryview):
            raise ConfigError(f"input: must be bytes, got {type(input).__name__}; encode it")
        seconds = None if timeout is None else parse_seconds(timeout, "timeout")
        if input:
            stdin = PIPE
        streams = (
            DEVNULL if stdin is None else stdin,
            PIPE if stdout is None else stdout,
            PIPE if stderr is None else stderr,
        )
        process = self._start(argv, env, cwd, streams, None, cpu_time)
        output_max = self.config.limits.output_max
        try:
            result = process.communicate(bytes(input or b""), seconds, int(output_max))
        except BaseException:
            # KeyboardInterrupt and the like: the command must not outlive the call.
            process.close()
            raise
        return result.check() if check else result

    def popen(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: Stream = PIPE,
        stdout: Stream = PIPE,
        stderr: Stream = PIPE,
        tty: tuple[int, int] | None = None,
        cpu_time: float | None = None,
    ) -> Process:
        """Start a command and return it while it runs; several may run at once.

        With `tty` (rows, columns) it gets a terminal of the environment's own as stdin, and as
        stdout and stderr unless a descriptor is given for them; its master end is `Process.tty`.
        Raises as `run` does.

        When a command ends, everything is killed that is no descendant of one still running.
        """
        if tty is not None:
            stdin = None
            stdout, stderr = (None if item == PIPE else item for item in (stdout, stderr))
        return self._start(argv, env, cwd, (stdin, stdout, stderr), tty, cpu_time)

    def _start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None,
        cwd: str | None,
        streams: tuple[Stream, Stream, Stream],
        tty: tuple[int, int] | None,
        cpu_time: float | None,
    ) -> Process:
        command = check_argv(argv)
        limit = self.config.limits.cpu_time
        if cpu_time is not None:
            limit = parse_seconds(cpu_time, "cpu_time")
            if not self._accounts_cpu and "cpu_time" not in self.config.allow_missing:
                layer = "this host gives no cgroup that counts its CPU time"
                raise UnsupportedHostError("cpu_time", layer, "See 'nsbox doctor'.")
        request = {
            "argv": list(command),
            "env": {**self._environment, **check_environment(env)},
            "cwd": check_text(self.config.cwd if cwd is None else cwd, "cwd"),
            "tty": tty is not None,
        }
        if not str(request["cwd"]).startswith("/"):
            raise ConfigError(f"cwd: must be absolute, got {cwd!r}")
        self._require_ready()
        process = Process(self, command, request, streams, cpu_time=limit)
        if tty is not None:
            from nsbox.terminal import set_window_size

            set_window_size(process.tty, *tty)
        return process

    def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a regular file inside, as the environment's user.

        It is done by PID 1 within the environment, follows no symbolic link anywhere in `path`
        and opens no special file.

        Raises:
            SyscallError: As open(2) or write(2) inside; ELOOP for a link, ENOSPC when /tmp is full.
            ConfigError: `path` is not absolute, or `mode` has more than permission bits.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise ConfigError(f"data: must be bytes, got {type(data).__name__}; encode it")
        if isinstance(mode, bool) or not isinstance(mode, int) or mode & ~0o777:
            raise ConfigError(f"mode: must be permission bits such as 0o644, got {mode!r}")
        request = {"path": self._inside(path), "mode": mode, "size": len(data)}
        channel = self._ask(p.WRITE, request, [])
        with channel.socket:
            try:
                channel.socket.sendall(data)
            except BrokenPipeError:
                pass  # it has answered with an error already
            except OSError as error:
                raise self._died(error) from error
            self._expect_ok(channel, path)

    def read_file(self, path: str, *, max_bytes: int = 16 << 20) -> bytes:
        """Read a regular file inside; see `write_file` for what is refused.

        Raises:
            SyscallError: As open(2) or read(2) inside; EFBIG when it has more than `max_bytes`.
        """
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ConfigError(f"max_bytes: must not be negative, got {max_bytes!r}")
        channel = self._ask(p.READ, {"path": self._inside(path), "most": max_bytes}, [])
        with channel.socket:
            size = self._expect_ok(channel, path)
            if not 0 <= size <= max_bytes:
                self._kill()
                raise EnvironmentDied("PID 1 sent a malformed answer")
            data = bytearray()
            while len(data) < size:
                chunk = channel.socket.recv(min(size - len(data), 1 << 20))
                if not chunk:
                    break
                data += chunk
        return bytes(data)

    def freeze(self) -> None:
        """Stop every process of the environment; nothing in it runs until `thaw`.

        By the cgroup freezer where there is one, else by SIGSTOP to every process.
        """
        self._require_ready()
        self._request("freeze")
        self._state = State.FROZEN

    def thaw(self) -> None:
        """Let a frozen environment run again; does nothing to one that is not frozen."""
        self._require_alive()
        if self._state is State.FROZEN:
            self._request("thaw")
            self._state = State.READY

    def usage(self) -> Usage:
        """Return the resources used since birth, by everything in the environment."""
        self._require_alive()
        return usage_between({}, self._read_usage(), None)

    def close(self, *, wait: bool = True) -> None:
        """Kill everything in it and remove it. May be called again, and in any state.

        Args:
            wait: Return only when its processes, mounts and cgroups are gone. Otherwise that
                happens soon after.

        Raises:
            CleanupError: Something could not be removed.
        """
        if self._owner != os.getpid():
            self._release()  # a forked child's copies of the descriptors; it is not its own
            return
        with self._lock:
            if self._state is State.CLOSED:
                return
            self._closed_by_caller = True
        self._kill()
        leaked: list[str] = []
        if wait:
            if not self._await_end():
                leaked.append(f"process {self.pid}")
            leaked += (self._end or {}).get("leaked", [])
        self._state = State.CLOSED
        self._release()
        if leaked:
            raise CleanupError(leaked)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_state", State.CLOSED) is not State.CLOSED:
            if self._owner == os.getpid():
                warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self)
                self._kill()
            self._state = State.CLOSED
            self._release()

    def __repr__(self) -> str:
        return f"<nsbox.ExecutionEnvironment {self.id} {self._state.value}>"

    # -- states --------------------------------------------------------------------------------

    def _require_alive(self) -> None:
        if self._owner != os.getpid():
            raise EnvironmentStateError(
                f"environment {self.id} belongs to process {self._owner}; this is its forked "
                f"child {os.getpid()}: make an environment of its own here"
            )
        if self._state is State.CLOSED:
            raise EnvironmentStateError(f"environment {self.id} is closed; make a new one")
        if self._state is State.DEAD or self._note_end():
            raise EnvironmentStateError(
                f"environment {self.id} is dead: {self._describe_end()}; make a new one"
            )

    def _require_ready(self) -> None:
        self._require_alive()
        if self._state is State.FROZEN:
            raise EnvironmentStateError(f"environment {self.id} is frozen; call thaw() first")

    def _inside(self, path: str) -> str:
        self._require_ready()
        text = check_text(path, "path")
        if not text.startswith("/"):
            raise ConfigError(f"path: must be absolute inside the environment, got {path!r}")
        return text

    def _release(self) -> None:
        self._control.close()
        self._supervision.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    # -- PID 1 ---------------------------------------------------------------------------------

    def _ask(self, operation: bytes, request: dict[str, Any], fds: list[int]) -> Channel:
        try:
            channel = Channel(self._control, operation, fds)
        except OSError as error:
            if self._note_end() or not isinstance(error, ConnectionError):
                raise self._died(error) from error
            raise self._died(error) from error
        try:
            channel.send_request(request)
        except BrokenPipeError:
            pass  # it refused the request before reading all of it: its answer says why
        except OSError as error:
            channel.socket.close()
            raise self._died(error) from error
        return channel

    def _expect_ok(self, channel: Channel, path: str) -> int:
        try:
            kind, first, stage, _, fds = channel.receive_answer()
        except OSError as error:
            raise self._died(error) from error
        wire.close_all(fds)
        if kind == p.FAILED:
            what = {"open": "openat2", "kind": "open (regular files only)", "size": "read"}
            raise SyscallError(what.get(p.STAGES[stage], p.STAGES[stage]), first, path)
        return first

    def _died(self, cause: OSError) -> EnvironmentDied:
        """Return the exception for an operation under which PID 1 went away or fell silent."""
        if isinstance(cause, TimeoutError):
            self._kill()
            return EnvironmentDied(f"environment {self.id}: PID 1 did not answer; it was killed")
        self._await_end()
        return EnvironmentDied(f"environment {self.id}: {self._describe_end()}", Outcome.SIGNALED)

    def _kill(self) -> None:
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass

    # -- supervision ---------------------------------------------------------------------------

    @property
    def _supervision_fd(self) -> int:
        return self._supervision.fileno()

    def _request(self, kind: str) -> None:
        with self._lock:
            try:
                wire.send(self._supervision, {"kind": kind})
                answer = self._receive(_CLOSE_DEADLINE)
            except OSError:
                answer = None
        if answer is None or answer["kind"] == "gone":
            raise EnvironmentDied(f"environment {self.id}: {self._describe_end()}")
        if answer["kind"] == "failed":
            raise SetupError(kind, answer["message"], errno=answer["errno"])

    def _receive(self, timeout: float) -> dict[str, Any] | None:
        """Return the launcher's next message; notes the end of the environment. Needs the lock."""
        if self._end is not None:
            return self._end
        poll = select.poll()
        poll.register(self._supervision.fileno(), select.POLLIN)
        if not poll.poll(timeout * 1000):
            return None
        received = wire.receive(self._supervision)
        message = {"kind": "gone", "launcher": True} if received is None else received[0]
        if message["kind"] == "gone":
            self._end = message
            if self._state is not State.CLOSED:
                self._state = State.DEAD
        return message

    def _note_end(self) -> bool:
        """Whether the environment is gone, as far as the launcher has said by now."""
        with self._lock:
            if self._end is None and self._supervision.fileno() >= 0:
                self._receive(0)
            return self._end is not None

    def _await_end(self) -> bool:
        """Wait for the end of a killed environment; False when it does not come."""
        deadline = time.monotonic() + _CLOSE_DEADLINE
        with self._lock:
            while self._end is None and time.monotonic() < deadline:
                self._receive(max(0.0, deadline - time.monotonic()))
        if self._end is not None and "launcher" in self._end:
            return self._await_death_without_launcher()
        return self._end is not None

    def _await_death_without_launcher(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(KILL_DEADLINE * 1000))

    def _describe_end(self) -> str:
        end = self._end or {}
        if self._state is State.CLOSED or self._closed_by_caller:
            return "it was closed"
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

    # -- accounting ----------------------------------------------------------------------------

    def _read_usage(self) -> dict[str, int | None]:
        try:
            return {} if self._reader is None else self._reader.read()
        except OSError:
            return {}  # its cgroup has just been removed

    def _read_counters(self) -> dict[str, int | None]:
        try:
            return {} if self._reader is None else self._reader.counters()
        except OSError:
            return {}

    def _read_cpu_usec(self) -> int | None:
        try:
            return None if self._reader is None else self._reader.cpu_usec()
        except OSError:
            return None

    def _judge_signal(self, number: int) -> tuple[Outcome, str]:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        if number == signal.SIGSYS:
            # A filter's kill and a SIGSYS that a program sends itself have the same wait status.
            return Outcome.SIGNALED, f"{name}: by the system call filter, or sent by a process inside"
        return Outcome.SIGNALED, f"{name}, not sent by nsbox"


def run(
    argv: Sequence[str],
    *,
    config: Config | None = None,
    input: bytes | None = None,  # noqa: A002 - subprocess.run's name
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    stdin: Stream = None,
    stdout: Stream = None,
    stderr: Stream = None,
    cpu_time: float | None = None,
    check: bool = False,
    **fields: Any,
) -> Result:
    """Run one command in a fresh environment of its own and return its `Result`.

    Takes what `ExecutionEnvironment.run` takes, and the fields of `Config`: ``limits=``,
    ``mounts=``, ``tmp_size=``, ``network=``, ``seccomp=``, ``rootfs=``, ``allow_missing=``...
    The environment is dead when this returns, and removed soon after.

    Raises:
        As `ExecutionEnvironment` and `ExecutionEnvironment.run`.
    """
    check_argv(argv)
    environment = ExecutionEnvironment(config, **fields)
    try:
        return environment.run(
            argv,
            input=input,
            timeout=timeout,
            env=env,
            cwd=cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cpu_time=cpu_time,
            check=check,
        )
    finally:
        environment.close(wait=False)
