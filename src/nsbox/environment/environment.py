# SPDX-License-Identifier: Apache-2.0
"""`ExecutionEnvironment`: one isolated environment, from birth to removal."""

from __future__ import annotations

import enum
import functools
import os
import sys
import threading
import warnings
import weakref
from _socket import socket as Socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self, Unpack

from nsbox.errors import (
    CleanupError,
    ConfigError,
    EnvironmentStateError,
    LauncherError,
    NsboxError,
    UnsupportedHostError,
    refuse_pickling,
)
from nsbox.functions.credentials import Credentials, Provider, resolve, resolve_async
from nsbox.functions.deployment import Deployment, deployment_of
from nsbox.functions.exchange import InvocationResponse, OnLog, drive
from nsbox.functions.function import FunctionVersion
from nsbox.functions.request import InvocationRequest, Options, check_payload, encode_event
from nsbox.functions.session import Session
from nsbox.launcher import messages
from nsbox.supervisor import standby
from nsbox.supervisor.channel import RunRequest
from nsbox.supervisor.connection import EnvironmentConnection, await_exit_notice
from nsbox.supervisor.files import read_file, reset, write_file
from nsbox.supervisor.launcher import get_launcher
from nsbox.supervisor.plan import Plan, born_layers, interpreter, make_plan
from nsbox.supervisor.process import DEVNULL, PIPE, Process, Stream, Streams
from nsbox.supervisor.streams import NAMES, descriptor_of
from nsbox.values.config import (
    Config,
    ConfigFields,
    Word,
    check_argv,
    check_environment,
    check_text,
    check_window_size,
    make_config,
    parse_seconds,
)
from nsbox.values.counters import usage_between
from nsbox.values.invocation import Invocation, LeftRunning
from nsbox.values.result import Protections, Result, Usage


class State(enum.Enum):
    """Where an environment is in its life."""

    READY = "ready"
    FROZEN = "frozen"
    DEAD = "dead"
    """PID 1 is gone, by a limit or from outside; only `close` is left."""
    CLOSED = "closed"


class Command:
    """A command line and its options, checked before anything is made for it.

    Attributes:
        argv: Its words; the program is the first.
        env: Variables over those of the environment.
        cwd: Working directory inside; None: that of the Config.
        streams: stdin, stdout and stderr: `PIPE`, `DEVNULL`, None, a file or a descriptor.
        cpu_time: Seconds of CPU time; None: those of the Config.
        input: What is written to stdin.
        timeout: Seconds of wall-clock time, or None.
    """

    __slots__ = ("argv", "cpu_time", "cwd", "env", "input", "streams", "timeout")

    def __init__(
        self,
        argv: Sequence[Word],
        env: Mapping[str, str] | None,
        cwd: str | None,
        streams: Streams,
        cpu_time: float | None,
    ) -> None:
        """Take what `ExecutionEnvironment.popen` takes.

        Raises:
            ConfigError: A value is wrong.
        """
        self.argv = check_argv(argv)
        self.env = {} if env is None else check_environment(env)
        self.cwd = None if cwd is None else check_text(cwd, "cwd")
        if self.cwd is not None and not self.cwd.startswith("/"):
            raise ConfigError(f"cwd: must be absolute, got {cwd!r}")
        for name, stream in zip(NAMES, streams, strict=True):
            if stream not in (None, PIPE, DEVNULL):
                descriptor_of(stream, name)
        self.streams = streams
        self.cpu_time = None if cpu_time is None else parse_seconds(cpu_time, "cpu_time")
        self.input = b""
        self.timeout: float | None = None

    @classmethod
    def captured(
        cls,
        argv: Sequence[Word],
        input: bytes | None,
        timeout: float | None,
        env: Mapping[str, str] | None,
        cwd: str | None,
        streams: Streams,
        cpu_time: float | None,
    ) -> Command:
        """Take what `ExecutionEnvironment.run` takes: None of `streams` is its default there."""
        stdin, stdout, stderr = streams
        if input is not None and stdin is not None:
            raise ConfigError("input and stdin: give one of them")
        if input is not None and not isinstance(input, bytes | bytearray | memoryview):
            raise ConfigError(f"input: must be bytes, got {type(input).__name__}; encode it")
        for name, stream in zip(NAMES, streams, strict=True):
            if stream == PIPE and not isinstance(stream, bool):
                raise ConfigError(f"{name}: PIPE is for popen; run captures what it is not given")
        if input:
            stdin = PIPE
        filled = (
            DEVNULL if stdin is None else stdin,
            PIPE if stdout is None else stdout,
            PIPE if stderr is None else stderr,
        )
        command = cls(argv, env, cwd, filled, cpu_time)
        command.input = bytes(input or b"")
        command.timeout = None if timeout is None else parse_seconds(timeout, "timeout")
        return command


class ExecutionEnvironment:
    """A complete sandbox in which many commands run, one after another or at once.

    Files in its /tmp stay until it is closed; processes do not outlive their command. Use it as a
    context manager. It may be used from several threads; not from a forked child.

    Attributes:
        id: Eight hexadecimal digits, as `nsbox ps` shows them.
        config: What it was made from.
        pid: Process id of its PID 1, on the host.
    """

    _is_brief = False

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
        self._owner = os.getpid()
        self._connection: EnvironmentConnection | None = None
        self._frozen = False
        self._protections: Protections | None = None
        self._close_lock = threading.Lock()
        self._session: Session | None = None
        self._version = version = config if isinstance(config, FunctionVersion) else None
        deployment = None
        if isinstance(config, FunctionVersion):
            deployment = deployment_of(config)
            config = deployment.config
        self.config = make_config(config, fields)
        plan, connection = self._give_birth(deployment)
        self._kind = plan.spec if plan.may_stand_by else None
        self.id = connection.env_id
        self.pid = connection.pid
        self._accounts_cpu = plan.accounts_cpu
        self._environment = plan.environment
        self._describe = functools.partial(
            born_layers, self.config, self._launcher.hello, connection, plan.layers
        )
        self._connection = connection
        if version is not None and deployment is not None:
            # In no cycle: a closed environment would hold on to its code until a collection.
            own = weakref.proxy(self)

            def start(argv: Sequence[Word], env: Mapping[str, str], streams: Streams) -> Process:
                command = Command(argv, env, None, streams, None)
                return own._start(command, announced=False)  # type: ignore[no-any-return]

            session = self._session = Session(
                connection,
                version,
                deployment,
                self._environment,
                protections=lambda: own.protections,
                start_command=start,
            )
            if self._kind is not None:
                session.next_kind = (self._launcher, self._kind)
            try:
                session.prepare()
                # While the launcher binds it to its place; nothing of it is run before.
                version.verify()
                connection.await_attached()
            except BaseException:
                self.close()
                raise

    def _give_birth(self, deployment: Deployment | None) -> tuple[Plan, EnvironmentConnection]:
        self._launcher = get_launcher()
        try:
            return self._take(deployment)
        except LauncherError:
            if self._launcher.alive:
                raise
        # It died under a birth, of which nothing is left: another one is started.
        self._launcher = get_launcher()
        return self._take(deployment)

    def _take(self, deployment: Deployment | None) -> tuple[Plan, EnvironmentConnection]:
        launcher = self._launcher
        if deployment is None:
            plan = make_plan(self.config, launcher.hello)
            return plan, standby.take(launcher, plan.spec, is_brief=self._is_brief)
        plan = make_plan(self.config, launcher.hello, deployment.runtime)
        lends = deployment.lends_control(launcher.hello)
        connection = standby.take(launcher, plan.spec, deployment.attachments, lends_control=lends)
        if deployment.is_program:
            connection.drop_endpoints()  # nobody needs its worker, which ends then
        return plan, connection

    # -- what users do -------------------------------------------------------------------------

    @property
    def protections(self) -> Protections:
        """What is in force, layer by layer."""
        # No cached_property: before Python 3.12 it has one lock for all threads, which a forked
        # child finds held for ever when another thread was in it.
        if self._protections is None:
            self._protections = Protections(tuple(self._describe()))
        return self._protections

    @property
    def state(self) -> State:
        """The state now; a death is noticed when it is asked for."""
        if self._connection is None:
            return State.CLOSED
        if self._owner == os.getpid() and (
            self._connection.is_killed or self._connection.note_end()
        ):
            return State.DEAD
        return State.FROZEN if self._frozen else State.READY

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
        return self._run(command, check=check)

    def _run(self, command: Command, *, check: bool) -> Result:
        process = self._start(command, announced=False)
        output_max = self.config.limits.output_max
        try:
            result = process.communicate(command.input, command.timeout, output_max)
        except BaseException:
            # KeyboardInterrupt and the like: the command must not outlive the call.
            process.close()
            raise
        self._replace_standby()
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
        return self._start(command, tty, announced=True)

    def _start(
        self, command: Command, tty: tuple[int, int] | None = None, *, announced: bool
    ) -> Process:
        argv, limit = command.argv, self.config.limits.cpu_time
        if argv[0] == sys.executable and self.config.rootfs is None:
            argv = (interpreter(), *argv[1:])
        if command.cpu_time is not None:
            limit = command.cpu_time
            if not self._accounts_cpu and "cpu_time" not in self.config.allow_missing:
                layer = "this host gives no cgroup that counts its CPU time"
                raise UnsupportedHostError("cpu_time", layer, "See 'nsbox doctor'.")
        variables = {**self._environment, **command.env} if command.env else self._environment
        request = RunRequest(variables, command.cwd or self.config.cwd, tty, announced=announced)
        return Process(
            self._ready_connection(),
            argv,
            request,
            command.streams,
            protections=lambda: self.protections,
            cpu_time=limit,
        )

    def base_environment(self) -> dict[str, str]:
        """Return the environment variables that every command begins with."""
        return dict(self._environment)

    # -- files ---------------------------------------------------------------------------------

    def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a regular file inside, as the environment's user.

        It is done by PID 1 within the environment, follows no symbolic link anywhere in `path`
        and opens no special file.

        Raises:
            SyscallError: As open(2) or write(2) inside; ELOOP for a link, ENOSPC when /tmp is full.
            ConfigError: `path` is not absolute, or `mode` has more than permission bits.
        """
        write_file(self._ready_connection, path, data, mode)

    def read_file(self, path: str, *, max_bytes: int = 16 << 20) -> bytes:
        """Read a regular file inside; see `write_file` for what is refused.

        Raises:
            SyscallError: As open(2) or read(2) inside; EFBIG when it has more than `max_bytes`.
        """
        return read_file(self._ready_connection, path, max_bytes)

    def freeze(self) -> None:
        """Stop every process of the environment; nothing in it runs until `thaw`.

        By the cgroup freezer where there is one, else by SIGSTOP to every process.
        """
        connection = self._ready_connection()
        try:
            # Before: one that an interrupt finds half frozen is thawed.
            self._frozen = True
            connection.request(messages.Freeze(id=self.id))
        except NsboxError:
            self._frozen = False
            raise

    def thaw(self) -> None:
        """Let a frozen environment run again; does nothing to one that is not frozen."""
        connection = self._live_connection()
        if self._frozen:
            connection.request(messages.Thaw(id=self.id))
            self._frozen = False

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
        if self._session is not None:
            raise EnvironmentStateError(
                f"environment {self.id} is a function's: give the Function reuse='reset'"
            )
        reset(self._ready_connection(), self.config)

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
        drive(self._function_session().init(provisioned=provisioned))

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
        return self.call(request).json()

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
        answer = self.call(InvocationRequest(data, found, **options))
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
        return (await self.call_async(InvocationRequest(payload, found, **options))).json()

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
        answer = await self.call_async(InvocationRequest(data, found, **options))
        return answer.invocation() if isinstance(answer, InvocationResponse) else answer

    def call(self, request: InvocationRequest) -> Invocation | InvocationResponse:
        """Serve what was checked: by a pool, before it takes an environment for it."""
        session = self._function_session()
        try:
            return drive(session.serve(request))
        finally:
            if self._kind is not None or session.has_end:
                self._end_invocation(session)

    async def call_async(self, request: InvocationRequest) -> Invocation | InvocationResponse:
        """Do as `call`, on the running asyncio loop."""
        import asyncio  # 25 ms at the start of every program, and most need none of it

        if self._frozen:
            from nsbox.functions.loop import aside

            await aside(self._function_session)
        session = self._function_session()
        try:
            driver = session.driver_on(asyncio.get_running_loop())
            return await driver.run(session.serve(request))
        finally:
            if self._kind is not None or session.has_end:
                self._end_invocation(session)

    def left_running(self) -> LeftRunning:
        """Return what the function has running between invocations, as PID 1 counts it now.

        Raises:
            EnvironmentDied: PID 1 is gone, or has no /proc to count by; the environment is killed.
            EnvironmentStateError: This is no environment of a function, or it is busy, or dead.
        """
        return drive(self._function_session().count_left())

    def _role(self, role: str | None) -> str:
        return self._version.name if role is None and self._version is not None else role or ""

    @property
    def last(self) -> Invocation | None:
        """The last `Invocation`, failed ones too; None before the first."""
        return None if self._session is None else self._session.last()

    def _function_session(self) -> Session:
        """Return the session of an environment that can serve a call; a frozen one is thawed."""
        # An end that nobody has noticed yet is seen at once by who waits for the answer.
        session, connection = self._session, self._connection
        is_alive = (
            connection is not None
            and connection.supervision.end is None  # one call less than by `end`
            and not connection.is_killed
        )
        if session is not None and is_alive and self._owner == os.getpid() and not self._frozen:
            return session
        connection = self._known_connection()
        if session is None:
            raise EnvironmentStateError(
                f"environment {self.id} belongs to no function; make one of Function(...).publish()"
            )
        if self._frozen:
            connection.request(messages.Thaw(id=connection.env_id))
            self._frozen = False
        return session

    def _end_invocation(self, session: Session) -> None:
        self._replace_standby()
        # Not for a call that was refused before it began, while another may be under way.
        if session.is_used and session.reuse == "never":
            self.close(wait=False)

    # -- the end -------------------------------------------------------------------------------

    def _replace_standby(self) -> None:
        """Have another environment of this kind born, now that this one has been of use."""
        kind, self._kind = self._kind, None
        spare = None if self._session is None else self._session.take_spare()
        # While the interpreter finalizes nothing is needed next, and nothing can be imported.
        if kind is not None and not sys.is_finalizing():
            standby.refill(self._launcher, kind, spare)
        elif spare is not None:
            spare.close()

    def usage(self) -> Usage:
        """Return the resources used since birth, or until its end, by everything in it."""
        connection = self._own_connection()
        if connection.is_killed:
            connection.await_end()
        return usage_between({}, connection.usage(), None)

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
        if grace != 0:
            seconds = parse_seconds(grace, "grace")
            await_exit_notice(self.ask_to_end(), seconds)
        connection = None
        try:
            with self._close_lock:
                connection, self._connection = self._connection, None
            if connection is not None:
                self._end(connection, wait=wait)
        except BaseException:
            # Interrupted: nothing is waited for any more, and nothing kept.
            if connection is not None:
                connection.closing = True
                connection.close()
                self._let_go()
            raise

    def _end(self, connection: EnvironmentConnection, *, wait: bool) -> None:
        """Do as `close`, once."""
        if self._owner != os.getpid():
            if self._session is not None:
                self._session.close()
            connection.close()  # a forked child's copies of the descriptors; it is not its own
            return
        if wait:
            connection.begin_end()
        else:
            connection.closing = True
            connection.kill()
        if self._session is not None:
            self._session.await_idle()
        self._let_go()
        leaked: list[str] = []
        if wait:
            if not connection.await_end():
                leaked.append(f"process {self.pid}")
            leaked += connection.end.leaked if connection.end is not None else []
        connection.close()
        if leaked:
            raise CleanupError(leaked)

    def _let_go(self) -> None:
        if self._session is not None:
            self._session.close()
        self._replace_standby()

    def __reduce__(self) -> NoReturn:
        refuse_pickling("an environment", "make one there, from the Config or FunctionVersion")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_connection", None) is not None:
            try:
                if self._owner == os.getpid():
                    warnings.warn(f"{self!r} was not closed", ResourceWarning, 2, source=self)
            finally:  # where warnings are errors, too
                self.close(wait=False)

    def __repr__(self) -> str:
        return f"<nsbox.ExecutionEnvironment {self.id} {self.state.value}>"

    # -- what a pool asks for ------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """Whether whoever had it has closed it."""
        return self._connection is None

    @property
    def heard_nothing(self) -> bool:
        """Whether nothing of its last invocation, which has failed, has reached the function."""
        return self._session is not None and self._session.is_unsent

    def death_descriptor(self) -> int:
        """Return what hangs up once PID 1 has ended; it is this environment's until `close`.

        An environment of a function may have but the worker's socket for that, which is of no use
        after it has hung up. What else is to be read on it is not this descriptor's.

        Raises:
            EnvironmentStateError: It is closed, or known to have ended; else it hangs up.
        """
        return self._known_connection().death_descriptor()

    def send_kill(self) -> None:
        """SIGKILL PID 1, unless it is closed; who waits for an answer sees that."""
        if (connection := self._connection) is not None:
            connection.send_kill()

    def on_kill_of_left_running(self, tell: Callable[[], object]) -> None:
        """Have `tell` called when an invocation has left processes running that were killed."""
        if self._session is not None:
            self._session.on_kill = tell

    def left_running_of_last(self) -> LeftRunning | None:
        """Return what the last invocation has left running, as far as that is known."""
        return None if self._session is None else self._session.left_running_of_last()

    def ask_to_end(self) -> Socket | None:
        """SIGTERM everything inside, before `close`; a frozen one is thawed for that.

        Returns what `await_exit_notice` takes; None when there is nothing to wait for.
        """
        try:
            self.thaw()
            notice = self._live_connection().ask_to_end()
        except NsboxError:
            return None  # it is gone, or does not thaw, or is another process's
        if self._session is not None:
            self._session.end_events()
        return notice

    # -- states --------------------------------------------------------------------------------

    def _own_connection(self) -> EnvironmentConnection:
        """Return the connection, unless the environment is closed or another process's."""
        if self._owner != os.getpid():
            raise EnvironmentStateError(
                f"environment {self.id} belongs to process {self._owner}; this is its forked "
                f"child {os.getpid()}: make an environment of its own here"
            )
        connection = self._connection
        if connection is None:
            raise EnvironmentStateError(f"environment {self.id} is closed; make a new one")
        return connection

    def _known_connection(self) -> EnvironmentConnection:
        """Return the connection, unless the environment is known to be of no use."""
        connection = self._own_connection()
        if connection.end is not None or connection.is_killed:
            raise EnvironmentStateError(
                f"environment {self.id} is dead: {connection.describe_end()}; make a new one"
            )
        return connection

    def _live_connection(self) -> EnvironmentConnection:
        connection = self._known_connection()
        return self._known_connection() if connection.note_end() else connection

    def _ready_connection(self) -> EnvironmentConnection:
        connection = self._live_connection()
        if self._frozen:
            raise EnvironmentStateError(f"environment {self.id} is frozen; call thaw() first")
        return connection
