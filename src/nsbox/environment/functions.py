# SPDX-License-Identifier: Apache-2.0
"""Invocations in an environment that belongs to a function version: init, invoke, reuse.

A handler's are the `Invoker`'s; a plain program (``Function(command=...)``) is one command for each
event, with the same errors and the same record of what it was.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn, Unpack

from nsbox.environment.program import run_program
from nsbox.errors import EnvironmentStateError, refuse_pickling
from nsbox.functions.call import Answer, Call, OnLog
from nsbox.functions.credentials import Credentials, Provider, resolve, resolve_async
from nsbox.functions.function import FunctionVersion
from nsbox.functions.left_running import Sweep, count
from nsbox.functions.request import Options, Request, check_payload, encode_event
from nsbox.functions.session import Invoker
from nsbox.guest.runtime import ENDED
from nsbox.launcher import messages
from nsbox.launcher.messages import Spec
from nsbox.supervisor import standby
from nsbox.supervisor.channel import Channel
from nsbox.supervisor.connection import EnvironmentConnection
from nsbox.supervisor.files import finish_reset, place_files, remove_files
from nsbox.supervisor.launcher import Launcher
from nsbox.supervisor.plan import interpreter
from nsbox.values.invocation import FunctionError, Invocation, InvokeTimeout, LeftRunning
from nsbox.values.result import EnvironmentDied, Protections

if TYPE_CHECKING:
    import asyncio

    from nsbox.environment.environment import ExecutionEnvironment
    from nsbox.functions.loop import LoopCalls

_LAST_WORDS: Final = 10.0  # seconds in which an invocation sees that its environment is killed


class Invocations:
    """What an `ExecutionEnvironment` of a function version does besides running commands."""

    def __init__(
        self,
        env: ExecutionEnvironment,
        version: FunctionVersion,
        link: EnvironmentConnection,
        protections: Callable[[], Protections],
    ) -> None:
        self._env = env
        self._version = version
        self._function = version.function
        self._link = link
        self._busy = threading.Lock()
        self._holder = 0  # the thread that has it
        self.is_used = False  # an invocation is over
        self.is_unsent = False  # the last one, which failed, has not reached the worker
        # Whom to ask for a blank environment, and for which kind; and its sockets.
        self.next_kind: tuple[Launcher, Spec] | None = None
        self._spare: EnvironmentConnection | None = None
        # Whether there is something to do when an invocation is over.
        self.has_end = self._function.reuse == "never"
        self._loop: LoopCalls | None = None
        self._removal: Channel | None = None  # of the last invocation's files
        self._last: Invocation | Answer | None = None
        self.sweep = Sweep(link, version) if version.kills_left_running else None
        self._invoker: Invoker | None = None
        if self._function.handler is not None:
            self._invoker = Invoker(link, version, protections)

    def close(self) -> None:
        """Let go of worker and sockets."""
        if self._loop is not None and not self._loop.loop.is_closed():
            self._loop.close()
        if self._removal is not None:
            self._removal.socket.close()
        if self.sweep is not None:
            self.sweep.close()
        if self._invoker is not None:
            self._invoker.close()

    def end_events(self) -> None:
        """Wake the worker, so that it runs its handler of SIGTERM; one that works will by itself.

        A signal that comes just before a system call that waits does not interrupt it.
        """
        if self._invoker is not None and self._busy.acquire(blocking=False):
            self._invoker.end_events()
            self._busy.release()

    def await_idle(self) -> None:
        """Wait until no other thread is in an invocation of this killed environment."""
        # This thread may be in one itself, on a loop or in a callback: it will see by itself.
        if self._holder != threading.get_ident() and self._busy.acquire(timeout=_LAST_WORDS):
            self._busy.release()

    def _prepare_spare(self) -> None:
        """Do the part of a refill of the blanks that can be done while an answer is waited for."""
        if self.next_kind is not None:
            self._spare, self.next_kind = standby.prepare(*self.next_kind), None
            self.has_end = True

    def take_spare(self) -> EnvironmentConnection | None:
        """Return the sockets made for the next blank, if they were, for the caller to close."""
        spare, self._spare = self._spare, None
        self.has_end = self._function.reuse == "never"
        return spare

    # -- in turn -------------------------------------------------------------------------------

    def init(self, *, provisioned: bool) -> None:
        """Import the module, unless that was done; see `ExecutionEnvironment.init`."""
        self._take()
        if self._invoker is not None and self._invoker.init_seconds is None:
            self._invoker.is_provisioned = provisioned
        try:
            self._init()
        finally:
            self._busy.release()

    def _init(self, on_log: OnLog | None = None) -> None:
        if self._invoker is not None and self._invoker.init_seconds is None:
            call = self._start_worker(self._invoker, on_log)
            self._invoker.finish_start(call, self._invoker.exchange(call))

    def prepare(self) -> None:
        """Tell the worker what it may know before the function's code is in its place."""
        if self._invoker is not None:
            self._invoker.prepare(self._env.base_environment())

    def _start_worker(self, invoker: Invoker, on_log: OnLog | None) -> Call:
        python = interpreter() if self._function.rootfs is None else "python3"
        return invoker.start(self._env.base_environment(), python, on_log)

    def invoke(self, request: Request) -> Invocation | Answer:
        """Serve one event; see `ExecutionEnvironment.invoke_bytes`."""
        if not self._busy.acquire(blocking=False):
            raise self._refusal()
        self._holder = threading.get_ident()
        call = None
        try:
            invoker = self._invoker
            if invoker is None:
                self._await_removal()
                place_files(self._link, request.files)
                self._last = run_program(self._link, self._version, request, self._env._start)
                self._env._replace_blank()
                return self._last
            if invoker.init_seconds is not None and self._removal is None and not request.files:
                call = invoker.send(request)
                if self.next_kind is not None:
                    self._prepare_spare()
            elif invoker.init_seconds is None and invoker.worker and not request.files:
                call = self._send_first(invoker, request)
            else:
                self._init(request.on_log)
                self._await_removal()
                place_files(self._link, request.files)
                call = invoker.send(request)
                self._prepare_spare()
            frame = invoker.exchange(call)
            if self.sweep is not None:
                self.sweep.run(call, invoker.worker)
            answer = self._last = invoker.finish(call, frame)
            return answer
        except BaseException as error:
            self._note_failure(error, call)
            raise
        finally:
            self._end(request)

    def _send_first(self, invoker: Invoker, request: Request) -> Call:
        """Let a prepared worker import the module and go on to the event by itself."""
        start, call = invoker.start_with(request)
        self._prepare_spare()
        if call is None:
            invoker.finish_start(start, invoker.exchange(start))
            call = invoker.send(request)
        elif not invoker.exchange_start(start, call):
            invoker.send_again(call, request)
        return call

    async def invoke_async(self, request: Request) -> Invocation | Answer:
        """Serve one event on the running loop."""
        import asyncio  # 25 ms at the start of every program, and most need none of it

        invoker = self._invoker
        if invoker is None:
            return await asyncio.to_thread(self.invoke, request)
        self._take()
        calls = None
        try:
            calls = self._calls_on(invoker, asyncio.get_running_loop())
            calls.last = None
            if invoker.init_seconds is None:
                call, frame = await calls.exchange(
                    lambda: self._start_worker(invoker, request.on_log)
                )
                invoker.finish_start(call, frame)
            if self._removal is not None:
                await asyncio.to_thread(self._await_removal)
            if invoker.resets:
                await calls.await_reset()
            if request.files:
                await asyncio.to_thread(place_files, self._link, request.files)
            call, frame = await calls.exchange(lambda: invoker.send(request))
            if self.sweep is not None:
                await calls.sweep(call, self.sweep)
            if frame[0] == ENDED:
                await asyncio.to_thread(invoker.finish, call, frame)  # raises what PID 1 tells
            answer = self._last = invoker.finish(call, frame)
            return answer
        except BaseException as error:
            self._note_failure(error, None if calls is None else calls.last)
            raise
        finally:
            self._end(request)

    def _calls_on(self, invoker: Invoker, loop: asyncio.AbstractEventLoop) -> LoopCalls:
        if self._loop is None or self._loop.loop is not loop:
            if self._loop is not None and not self._loop.loop.is_closed():
                self._loop.forget()
            from nsbox.functions.loop import LoopCalls

            self._loop = LoopCalls(invoker, loop)
        return self._loop

    def _take(self) -> None:
        """Begin an invocation: there is at most one at a time, by construction."""
        if not self._busy.acquire(blocking=False):
            raise self._refusal()
        self._holder = threading.get_ident()

    def _refusal(self) -> EnvironmentStateError:
        return EnvironmentStateError(
            f"environment {self._env.id} is busy with another invocation; "
            "an environment serves one at a time"
        )

    def _end(self, request: Request) -> None:
        self.is_used = True
        if request.files and self._function.reuse == "keep":
            self._remove(request.files)
        self._busy.release()

    def _remove(self, files: Mapping[str, bytes]) -> None:
        # Whatever PID 1 is asked next comes after it; the next event waits for its answer.
        if not self._link.closing and not self._link.is_killed:
            try:
                self._removal = remove_files(self._link, files)
            except (EnvironmentDied, OSError):
                # The next event is not to find them.
                self._link.kill("an invocation's files could not be removed")

    def _await_removal(self) -> None:
        removal, self._removal = self._removal, None
        if removal is not None:
            finish_reset(self._link, removal)

    def _note_failure(self, error: BaseException, call: Call | None) -> None:
        """Keep the record of an invocation that failed; without a verdict end its environment.

        Its answer may be on the way still, so that the environment serves no other.

        Raises:
            EnvironmentDied: Another thread has closed it, and with it what was waited on.
        """
        if call is not None:
            self.is_unsent = call.is_unsent
        else:  # it was ready, and died before it was sent anything
            is_ready = self._invoker is not None and self._invoker.init_seconds is not None
            self.is_unsent = is_ready and isinstance(error, EnvironmentDied)
        if isinstance(error, FunctionError | InvokeTimeout):
            self._last = error.invocation
            return
        if self._link.closing and isinstance(error, OSError | ValueError):
            raise EnvironmentDied(
                f"environment {self._env.id}: {self._link.describe_end()}"
            ) from error
        self._link.kill(f"an invocation was ended by {type(error).__name__}")

    def left_running(self) -> LeftRunning:
        """See `ExecutionEnvironment.left_running`."""
        self._take()
        try:
            return count(self._link, None if self._invoker is None else self._invoker.worker)
        finally:
            self._busy.release()

    def last(self) -> Invocation | None:
        """Return the record of the last invocation, None before the first."""
        if isinstance(self._last, Answer):
            self._last = self._last.invocation()
        return self._last


class FunctionMethods:
    """The methods of an `ExecutionEnvironment` that are for function versions alone."""

    id: str
    _owner: int
    _link: EnvironmentConnection | None
    _frozen: bool
    _kind: Spec | None
    _environment: Mapping[str, str]
    _version: FunctionVersion | None
    _invocations: Invocations | None

    def __reduce__(self) -> NoReturn:
        refuse_pickling("an environment", "make one there, from the Config or FunctionVersion")

    def _known_link(self) -> EnvironmentConnection:
        raise NotImplementedError

    def _replace_blank(self) -> None:
        raise NotImplementedError

    def close(self, *, wait: bool = True) -> None:
        """See `ExecutionEnvironment.close`."""
        raise NotImplementedError

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
        self._function_calls().init(provisioned=provisioned)

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
        request = Request(
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
        answer = self.call(Request(data, found, **options))
        return answer.invocation() if isinstance(answer, Answer) else answer

    async def invoke_async(
        self,
        event: object,
        *,
        credentials: Credentials | Provider | None = None,
        role: str | None = None,
        **options: Unpack[Options],
    ) -> Any:  # noqa: ANN401 - any JSON value
        """Do as `invoke`, on the running asyncio loop.

        Threads serve files, and providers of credentials, alone. A cancelled invocation is killed,
        and the environment with it.
        """
        payload = encode_event(event)
        found = await resolve_async(credentials, self._role(role))
        return (await self.call_async(Request(payload, found, **options))).json()

    def left_running(self) -> LeftRunning:
        """Return what the function has running between invocations, as PID 1 counts it now.

        Raises:
            EnvironmentDied: PID 1 is gone, or has no /proc to count by; the environment is killed.
            EnvironmentStateError: This is no environment of a function, or it is busy, or dead.
        """
        return self._function_calls().left_running()

    def call(self, request: Request) -> Invocation | Answer:
        """Serve what was checked: by a pool, before it takes an environment for it."""
        calls = self._function_calls()
        try:
            return calls.invoke(request)
        finally:
            if self._kind is not None or calls.has_end:
                self._end_invocation()

    async def call_async(self, request: Request) -> Invocation | Answer:
        """Do as `call`, on the running asyncio loop."""
        calls = self._function_calls()
        try:
            return await calls.invoke_async(request)
        finally:
            if self._kind is not None or calls.has_end:
                self._end_invocation()

    def _role(self, role: str | None) -> str:
        return self._version.name if role is None and self._version is not None else role or ""

    @property
    def last(self) -> Invocation | None:
        """The last `Invocation`, failed ones too; None before the first."""
        return None if self._invocations is None else self._invocations.last()

    def base_environment(self) -> dict[str, str]:
        """Return the environment variables that every command begins with."""
        return dict(self._environment)

    def _function_calls(self) -> Invocations:
        # An end that nobody has noticed yet is seen at once by who waits for the answer.
        calls, link = self._invocations, self._link
        is_alive = link is not None and link.end is None and not link.is_killed
        if calls is not None and is_alive and self._owner == os.getpid() and not self._frozen:
            return calls
        link = self._known_link()
        if self._invocations is None:
            raise EnvironmentStateError(
                f"environment {self.id} belongs to no function; make one of Function(...).publish()"
            )
        if self._frozen:
            link.request(messages.Thaw(id=link.env_id))
            self._frozen = False
        return self._invocations

    def _end_invocation(self) -> None:
        self._replace_blank()
        # Not for a call that was refused before it began, while another may be under way.
        is_used = self._invocations is not None and self._invocations.is_used
        if is_used and self._version is not None and self._version.function.reuse == "never":
            self.close(wait=False)
