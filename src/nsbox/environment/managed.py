# SPDX-License-Identifier: Apache-2.0
"""`ManagedEnvironment`: one isolated environment, from birth to removal, below its public face."""

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

from nsbox.environment.command import Command
from nsbox.errors import (
    CleanupError,
    EnvironmentStateError,
    LauncherError,
    NsboxError,
    UnsupportedHostError,
)
from nsbox.functions.deployment import Deployment, deployment_of
from nsbox.functions.exchange import InvocationResponse, drive
from nsbox.functions.function import FunctionVersion
from nsbox.functions.request import InvocationRequest
from nsbox.functions.session import Session
from nsbox.launcher import messages
from nsbox.supervisor import standby
from nsbox.supervisor.channel import RunRequest
from nsbox.supervisor.connection import EnvironmentConnection, await_exit_notice
from nsbox.supervisor.files import reset
from nsbox.supervisor.launcher import get_launcher
from nsbox.supervisor.plan import Plan, born_layers, interpreter, make_plan
from nsbox.supervisor.process import RunningCommand, Streams
from nsbox.values.config import Config, Word, make_config, parse_seconds
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


class ManagedEnvironment:
    """What an `ExecutionEnvironment` shows to users, and pools use as it is: all but its face.

    Attributes:
        id, config, pid: As of `ExecutionEnvironment`.
        variables: Those of the environment that every command begins with.
        version: Whose environment it is, or None.
    """

    def __init__(
        self,
        config: Config | FunctionVersion | None,
        fields: Mapping[str, object] | None = None,
        *,
        is_brief: bool = False,
    ) -> None:
        """Take what `ExecutionEnvironment` takes, and raise as it does.

        With `is_brief` it is for one command, and has room where no other is born any more
        (`protocol.scarcity`).
        """
        self._owner = os.getpid()
        self._connection: EnvironmentConnection | None = None
        self._frozen = False
        self._protections: Protections | None = None
        self._close_lock = threading.Lock()
        self._session: Session | None = None
        self.version = version = config if isinstance(config, FunctionVersion) else None
        deployment = None
        if isinstance(config, FunctionVersion):
            deployment = deployment_of(config)
            config = deployment.config
        self.config = make_config(config, fields or {})
        plan, connection = self._give_birth(deployment, is_brief=is_brief)
        self._kind = plan.spec if plan.may_stand_by else None
        self.id = connection.env_id
        self.pid = connection.pid
        self._accounts_cpu = plan.accounts_cpu
        self.variables = plan.environment
        self._describe = functools.partial(
            born_layers, self.config, self._launcher.hello, connection, plan.layers
        )
        self._connection = connection
        if version is not None and deployment is not None:
            # In no cycle: a closed environment would hold on to its code until a collection.
            own = weakref.proxy(self)

            def start(
                argv: Sequence[Word], env: Mapping[str, str], streams: Streams
            ) -> RunningCommand:
                command = Command(argv, env, None, streams, None)
                return own.start(command)  # type: ignore[no-any-return]

            session = self._session = Session(
                connection,
                version,
                deployment,
                self.variables,
                protections=lambda: own.protections,
                start_command=start,
                next_kind=None if self._kind is None else (self._launcher, self._kind),
            )
            try:
                session.prepare()
                # While the launcher binds it to its place; nothing of it is run before.
                version.verify()
                connection.await_attached()
            except BaseException:
                self.close()
                raise

    def _give_birth(
        self, deployment: Deployment | None, *, is_brief: bool
    ) -> tuple[Plan, EnvironmentConnection]:
        self._launcher = get_launcher()
        try:
            return self._take(deployment, is_brief=is_brief)
        except LauncherError:
            if self._launcher.alive:
                raise
        # It died under a birth, of which nothing is left: another one is started.
        self._launcher = get_launcher()
        return self._take(deployment, is_brief=is_brief)

    def _take(
        self, deployment: Deployment | None, *, is_brief: bool
    ) -> tuple[Plan, EnvironmentConnection]:
        launcher = self._launcher
        if deployment is None:
            plan = make_plan(self.config, launcher.hello)
            return plan, standby.take(launcher, plan.spec, is_brief=is_brief)
        plan = make_plan(self.config, launcher.hello, deployment.runtime)
        lends = deployment.lends_control(launcher.hello)
        connection = standby.take(launcher, plan.spec, deployment.attachments, lends_control=lends)
        if deployment.is_program:
            connection.drop_endpoints()  # nobody needs its worker, which ends then
        return plan, connection

    # -- states --------------------------------------------------------------------------------

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

    @property
    def is_closed(self) -> bool:
        """Whether whoever had it has closed it."""
        return self._connection is None

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
        if connection.supervision.end is not None or connection.is_killed:
            raise EnvironmentStateError(
                f"environment {self.id} is dead: {connection.describe_end()}; make a new one"
            )
        return connection

    def _live_connection(self) -> EnvironmentConnection:
        connection = self._known_connection()
        return self._known_connection() if connection.note_end() else connection

    def ready_connection(self) -> EnvironmentConnection:
        """Return the connection, unless the environment cannot run anything now."""
        connection = self._live_connection()
        if self._frozen:
            raise EnvironmentStateError(f"environment {self.id} is frozen; call thaw() first")
        return connection

    # -- commands ------------------------------------------------------------------------------

    def run(self, command: Command) -> Result:
        """Run a command to its end."""
        process = self.start(command)
        output_max = self.config.limits.output_max
        try:
            result = process.communicate(command.input, command.timeout, output_max)
        except BaseException:
            # KeyboardInterrupt and the like: the command must not outlive the call.
            process.close()
            raise
        self._replace_standby()
        return result

    def start(
        self, command: Command, tty: tuple[int, int] | None = None, *, announced: bool = False
    ) -> RunningCommand:
        """Start a command; `announced`: return only when its program runs."""
        argv, limit = command.argv, self.config.limits.cpu_time
        if argv[0] == sys.executable and self.config.rootfs is None:
            argv = (interpreter(), *argv[1:])
        if command.cpu_time is not None:
            limit = command.cpu_time
            if not self._accounts_cpu and "cpu_time" not in self.config.allow_missing:
                layer = "this host gives no cgroup that counts its CPU time"
                raise UnsupportedHostError("cpu_time", layer, "See 'nsbox doctor'.")
        variables = {**self.variables, **command.env} if command.env else self.variables
        request = RunRequest(variables, command.cwd or self.config.cwd, tty, announced=announced)
        return RunningCommand(
            self.ready_connection(),
            argv,
            request,
            command.streams,
            protections=lambda: self.protections,
            cpu_time=limit,
        )

    # -- calls ---------------------------------------------------------------------------------

    def init(self, *, provisioned: bool = False) -> None:
        """See `ExecutionEnvironment.init`."""
        drive(self._ready_session().init(provisioned=provisioned))

    def call(self, request: InvocationRequest) -> Invocation | InvocationResponse:
        """Serve what was checked: by a pool, before it takes an environment for it."""
        session = self._ready_session()
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

            await aside(self._ready_session)
        session = self._ready_session()
        try:
            driver = session.driver_on(asyncio.get_running_loop())
            return await driver.run(session.serve(request))
        finally:
            if self._kind is not None or session.has_end:
                self._end_invocation(session)

    def _ready_session(self) -> Session:
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

    def left_running(self) -> LeftRunning:
        """See `ExecutionEnvironment.left_running`."""
        return drive(self._ready_session().count_left())

    @property
    def last(self) -> Invocation | None:
        """See `ExecutionEnvironment.last`."""
        return None if self._session is None else self._session.last()

    def left_running_of_last(self) -> LeftRunning | None:
        """Return what the last invocation has left running, as far as that is known."""
        return None if self._session is None else self._session.left_running_of_last()

    def on_kill_of_left_running(self, tell: Callable[[], object]) -> None:
        """Have `tell` called when an invocation has left processes running that were killed."""
        if self._session is not None:
            self._session.leftovers.on_kill = tell

    @property
    def heard_nothing(self) -> bool:
        """Whether nothing of its last invocation, which has failed, has reached the function."""
        return self._session is not None and self._session.is_unsent

    # -- between commands and calls ------------------------------------------------------------

    def freeze(self) -> None:
        """See `ExecutionEnvironment.freeze`."""
        connection = self.ready_connection()
        try:
            # Before: one that an interrupt finds half frozen is thawed.
            self._frozen = True
            connection.request(messages.Freeze(id=self.id))
        except NsboxError:
            self._frozen = False
            raise

    def thaw(self) -> None:
        """See `ExecutionEnvironment.thaw`."""
        connection = self._live_connection()
        if self._frozen:
            connection.request(messages.Thaw(id=self.id))
            self._frozen = False

    def reset(self) -> None:
        """See `ExecutionEnvironment.reset`."""
        if self._session is not None:
            raise EnvironmentStateError(
                f"environment {self.id} is a function's: give the Function reuse='reset'"
            )
        reset(self.ready_connection(), self.config)

    def usage(self) -> Usage:
        """See `ExecutionEnvironment.usage`."""
        connection = self._own_connection()
        if connection.is_killed:
            connection.await_end()
        return usage_between({}, connection.usage(), None)

    # -- the end -------------------------------------------------------------------------------

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

    def close(self, *, wait: bool = True, grace: float = 0.0) -> None:
        """See `ExecutionEnvironment.close`."""
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

    def _replace_standby(self) -> None:
        """Have another environment of this kind born, now that this one has been of use."""
        kind, self._kind = self._kind, None
        spare = None if self._session is None else self._session.take_spare()
        # While the interpreter finalizes nothing is needed next, and nothing can be imported.
        if kind is not None and not sys.is_finalizing():
            standby.refill(self._launcher, kind, spare)
        elif spare is not None:
            spare.close()

    def __del__(self) -> None:
        if getattr(self, "_connection", None) is not None:
            try:
                if self._owner == os.getpid():
                    warnings.warn(f"{self!r} was not closed", ResourceWarning, 2, source=self)
            finally:  # where warnings are errors, too
                self.close(wait=False)

    def __repr__(self) -> str:
        return f"<nsbox.ExecutionEnvironment {self.id} {self.state.value}>"
