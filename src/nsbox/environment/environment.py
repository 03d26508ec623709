# SPDX-License-Identifier: Apache-2.0
"""`ExecutionEnvironment`: one isolated environment, as its users see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Self, Unpack

from nsbox.environment.command import Command
from nsbox.environment.managed import ManagedEnvironment, State
from nsbox.environment.process import Process
from nsbox.errors import refuse_pickling
from nsbox.functions.credentials import Credentials, Provider, resolve, resolve_async
from nsbox.functions.exchange import InvocationResponse, OnLog
from nsbox.functions.function import FunctionVersion
from nsbox.functions.request import InvocationRequest, Options, check_payload, encode_event
from nsbox.supervisor.files import read_file, write_file
from nsbox.supervisor.process import PIPE, Stream
from nsbox.values.config import Config, ConfigFields, Word, check_window_size
from nsbox.values.invocation import Invocation, LeftRunning
from nsbox.values.result import Protections, Result, Usage


class ExecutionEnvironment:
    """A complete sandbox in which many commands run, one after another or at once.

    Files in its /tmp stay until it is closed; processes do not outlive their command. Use it as a
    context manager. It may be used from several threads; not from a forked child.

    Attributes:
        id: Eight hexadecimal digits, as `nsbox ps` shows them.
        config: What it was made from.
        pid: Process id of its PID 1, on the host.
    """

    def __init__(
        self, config: Config | FunctionVersion | None = None, **fields: Unpack[ConfigFields]
    ) -> None:
        """Give birth to an environment and wait until it is locked in.

        Args:
            config: A `Config`; None is the default one. Or a `FunctionVersion`, to which the
                environment then belongs for all its life: for `init` and `invoke`.
            fields: Fields of `Config`, over those of `config`.

        Raises:
            ConfigError: A value is wrong.
            UnsupportedHostError: A protection asked for cannot be enforced on this host.
            SetupError: A step of the birth failed; nothing is left of it.
            LauncherError: The launcher cannot be started.
        """
        self._show(ManagedEnvironment(config, fields))

    def _show(self, managed: ManagedEnvironment) -> None:
        self._managed = managed
        self.id, self.pid, self.config = managed.id, managed.pid, managed.config

    @property
    def protections(self) -> Protections:
        """What is in force, layer by layer."""
        return self._managed.protections

    @property
    def state(self) -> State:
        """The state now; a death is noticed when it is asked for."""
        return self._managed.state

    # -- commands ------------------------------------------------------------------------------

    def run(
        self,
        argv: Sequence[Word],
        *,
        input: bytes | None = None,
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
        streams = (stdin, stdout, stderr)
        command = Command.captured(argv, input, timeout, env, cwd, streams, cpu_time)
        result = self._managed.run(command)
        return result.check() if check else result

    def popen(
        self,
        argv: Sequence[Word],
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
            tty = check_window_size(tty)
            stdin = None
            stdout, stderr = (None if item == PIPE else item for item in (stdout, stderr))
        command = Command(argv, env, cwd, (stdin, stdout, stderr), cpu_time)
        return Process(self._managed.start(command, tty, announced=True))

    def base_environment(self) -> dict[str, str]:
        """Return the environment variables that every command begins with."""
        return dict(self._managed.variables)

    def reset(self) -> None:
        """Take away everything that commands have left, so that others find nothing of theirs.

        Commands that run are killed (KILLED), and every process but PID 1; /tmp, /dev/shm, the
        tmpfs mounts of the configuration and POSIX queues are emptied; System V ipc and keys are
        removed. docs/api.md tells what stays. What cannot be taken away ends the environment.

        Raises:
            EnvironmentStateError: It could not be reset, and was killed; or it is a function's,
                which has its policy (``Function(reuse="reset")``); or closed, frozen or dead.
            EnvironmentDied: It was ended from outside meanwhile.
        """
        self._managed.reset()

    def usage(self) -> Usage:
        """Return the resources used since birth, or until its end, by everything in it."""
        return self._managed.usage()

    def freeze(self) -> None:
        """Stop every process of the environment; nothing in it runs until `thaw`.

        By the cgroup freezer where there is one, else by SIGSTOP to every process.
        """
        self._managed.freeze()

    def thaw(self) -> None:
        """Let a frozen environment run again; does nothing to one that is not frozen."""
        self._managed.thaw()

    # -- files ---------------------------------------------------------------------------------

    def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a regular file inside, as the environment's user.

        It is done by PID 1 within the environment, follows no symbolic link anywhere in `path`
        and opens no special file.

        Raises:
            SyscallError: As open(2) or write(2) inside; ELOOP for a link, ENOSPC when /tmp is full.
            ConfigError: `path` is not absolute, or `mode` has more than permission bits.
        """
        write_file(self._managed.ready_connection, path, data, mode)

    def read_file(self, path: str, *, max_bytes: int = 16 << 20) -> bytes:
        """Read a regular file inside; see `write_file` for what is refused.

        Raises:
            SyscallError: As open(2) or read(2) inside; EFBIG when it has more than `max_bytes`.
        """
        return read_file(self._managed.ready_connection, path, max_bytes)

    # -- functions -----------------------------------------------------------------------------

    def init(self, *, provisioned: bool = False) -> None:
        """Import the function's module under its `init_timeout`; else the first `invoke` does.

        Args:
            provisioned: It is kept ready, with nobody waiting for it: the function is told so in
                AWS_LAMBDA_INITIALIZATION_TYPE, and no invocation's report has its Init Duration.

        Raises:
            FunctionError: It cannot be imported, or has no such handler.
            InvokeTimeout: It took too long; the environment was killed.
            EnvironmentStateError: This is no environment of a function, or it cannot do this now.
        """
        self._managed.init(provisioned=provisioned)

    def invoke(
        self,
        event: object,
        *,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        files: Mapping[str, bytes] | None = None,
        credentials: Credentials | Provider | None = None,
        role: str | None = None,
        request_id: str | None = None,
        client_context: Mapping[str, Any] | None = None,
        on_log: OnLog | None = None,
    ) -> Any:  # noqa: ANN401 - any JSON value
        """Call the function with an event and return its answer; both are JSON values.

        One at a time: a second call while one is under way raises. The `Invocation` is `last`.

        Args:
            event: What json.dumps takes, up to 6 MiB of it.
            timeout: Seconds, instead of the function's.
            env: Variables over those of the function, for this invocation alone; 4 KiB in all.
            files: Bytes by names such as ``"in/data.csv"``, for this invocation alone: they are
                below /tmp before its time begins. Up to 256 of them and 64 MiB.
            credentials: `Credentials`, or a mapping with the names of AWS STS, for this invocation
                alone: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN. Or what gives
                them, called with `role`: a function, or a `CredentialCache` of one.
            role: The role that credentials are asked for; the function's name by default.
            request_id: The context's aws_request_id; a new one by default.
            client_context: The context's client_context.
            on_log: Called with ``"stdout"`` or ``"stderr"`` and what the function writes; first,
                in the first invocation, with what its module has written in its import.

        Raises:
            FunctionError: The handler raised, answered no JSON or too much, or its process ended.
            InvokeTimeout: It took too long; the environment was killed.
            EnvironmentDied: The environment was ended from outside, or its worker broke the rules.
            EnvironmentStateError: It is busy, closed or dead.
            SyscallError: A file cannot be written (ENOSPC, when /tmp is full); it was killed.
            CredentialsError: There are none for the role; nothing was run.
            ConfigError: A value is wrong, or too large.
        """
        payload = encode_event(event)
        found = None if credentials is None else resolve(credentials, self._role(role))
        request = InvocationRequest(
            payload, found, timeout=timeout, env=env, files=files,
            request_id=request_id, client_context=client_context, on_log=on_log,
        )  # fmt: skip
        return self._managed.call(request).json()

    def invoke_bytes(
        self,
        payload: bytes,
        *,
        credentials: Credentials | Provider | None = None,
        role: str | None = None,
        **options: Unpack[Options],
    ) -> Invocation:
        """Call the function with an event in JSON and return the `Invocation`; see `invoke`."""
        data = check_payload(payload)
        found = resolve(credentials, self._role(role))
        answer = self._managed.call(InvocationRequest(data, found, **options))
        return answer.invocation() if isinstance(answer, InvocationResponse) else answer

    async def invoke_async(
        self,
        event: object,
        *,
        credentials: Credentials | Provider | None = None,
        role: str | None = None,
        **options: Unpack[Options],
    ) -> Any:  # noqa: ANN401 - any JSON value
        """Do as `invoke`, on the running asyncio loop.

        Threads serve providers of credentials, files, programs, and ends, alone. A cancelled
        invocation is killed, and the environment with it.
        """
        payload = encode_event(event)
        found = None
        if credentials is not None:
            found = await resolve_async(credentials, self._role(role))
        return (await self._managed.call_async(InvocationRequest(payload, found, **options))).json()

    async def invoke_bytes_async(
        self,
        payload: bytes,
        *,
        credentials: Credentials | Provider | None = None,
        role: str | None = None,
        **options: Unpack[Options],
    ) -> Invocation:
        """Do as `invoke_bytes`, on the running asyncio loop; see `invoke_async`."""
        data, found = check_payload(payload), None
        if credentials is not None:
            found = await resolve_async(credentials, self._role(role))
        answer = await self._managed.call_async(InvocationRequest(data, found, **options))
        return answer.invocation() if isinstance(answer, InvocationResponse) else answer

    def _role(self, role: str | None) -> str:
        version = self._managed.version
        return version.name if role is None and version is not None else role or ""

    @property
    def last(self) -> Invocation | None:
        """The last `Invocation`, failed ones too; None before the first."""
        return self._managed.last

    def left_running(self) -> LeftRunning:
        """Return what the function has running between invocations, as PID 1 counts it now.

        Raises:
            EnvironmentDied: PID 1 is gone, or has no /proc to count by; the environment is killed.
            EnvironmentStateError: This is no environment of a function, or it is busy, or dead.
        """
        return self._managed.left_running()

    # -- the end -------------------------------------------------------------------------------

    def close(self, *, wait: bool = True, grace: float = 0.0) -> None:
        """Kill everything in it and remove it. May be called again, and in any state.

        Args:
            wait: Return only when its processes, mounts and cgroups are gone. Otherwise that
                happens soon after.
            grace: Seconds that its commands, and the function's worker, have to end by themselves
                before that: they get SIGTERM, and are waited for no longer than necessary. A frozen
                one is thawed for it. What a function then writes to its log is not kept.

        Raises:
            CleanupError: Something could not be removed.
            ConfigError: `grace` is no number of seconds.
        """
        self._managed.close(wait=wait, grace=grace)

    def __reduce__(self) -> NoReturn:
        refuse_pickling("an environment", "make one there, from the Config or FunctionVersion")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._managed)


class EnvironmentFace(ExecutionEnvironment):
    """The face of an environment that a pool has made, or the command line, and that it closes."""

    def __init__(self, managed: ManagedEnvironment) -> None:
        self._show(managed)
