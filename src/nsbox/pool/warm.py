# SPDX-License-Identifier: Apache-2.0
"""`WarmPool`: environments kept warm for a function version or a `Config`, one call each at a time.

The pool decides who gets which environment and when one goes (`nsbox.pool.leases` has that state);
everything else is the environment's.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Final, Self, Unpack

from nsbox.config import Config, make_config, parse_seconds
from nsbox.credentials import Credentials, Provider, check_credentials, resolve
from nsbox.environment import ExecutionEnvironment
from nsbox.errors import (
    ConfigError,
    NsboxError,
)
from nsbox.function import Function, FunctionVersion
from nsbox.invocation import Invocation
from nsbox.pool.events import PoolEvent
from nsbox.pool.house import RETURN_DEADLINE, PoolGrant, PoolLeases, PoolWaiter, Source, Use
from nsbox.pool.jobs import Jobs
from nsbox.pool.leases import Leases, Resolve
from nsbox.pool.loop import PoolCalls
from nsbox.request import CallOptions, PoolOptions, TimedCallOptions

_TENANTS_KEPT: Final = 1024  # versions of tenants that need not be made again


class WarmPool(PoolCalls):
    """Keeps environments warm and gives each of them to one call at a time.

    Use it as a context manager, from any number of threads; not from a forked child. The with
    statement waits for running calls at its end, and kills them when it ends by an exception.

    An environment belongs to one function version and one tenant. A call gets an idle one of its
    own, the last used first; else one is born, up to `max_environments`; else the one that has
    been idle longest makes room; else the call waits for its turn.

    It is no `concurrent.futures.Executor`, whose `submit` takes what is to be called: here that is
    the function. `submit` and `map` take events, and otherwise do as an executor's; so does
    `shutdown`.

    Attributes:
        max_environments: The most at a time.
    """

    def __init__(
        self,
        source: Function | FunctionVersion | Config | None = None,
        *,
        provisioned: int = 0,
        max_environments: int = 8,
        acquire_timeout: float | None = 10.0,
        max_waiting: int = 1000,
        idle_timeout: float = 600.0,
        max_lifetime: float = 14 * 3600.0,
        max_invocations: int | None = None,
        reuse: str = "keep",
        credentials: Provider | None = None,
        on_event: Callable[[PoolEvent], object] | None = None,
    ) -> None:
        """Make the pool, and wait until `provisioned` environments are ready.

        Args:
            source: A function, which is published, or a version; for `invoke` and `submit`. Or a
                `Config` (None: the default one), for `acquire`.
            provisioned: Environments kept ready, initialised; a lost one is replaced.
            max_environments: The most at a time, births under way counted.
            acquire_timeout: Seconds a call waits for its turn; None waits as long as it takes.
            max_waiting: Calls that may wait; 0: none does.
            idle_timeout: Seconds after which one that nobody uses is closed.
            max_lifetime: Seconds after which one gets no other call.
            max_invocations: Calls after which one is replaced.
            reuse: For a `Config`: ``"keep"``, ``"reset"`` (`ExecutionEnvironment.reset` after each
                lease) or ``"never"``. A function has its own.
            credentials: Called with the name of a role, in the thread of the call that needs them
                first; returns `Credentials`, or a mapping with the names of AWS STS. They are
                asked for anew five minutes before they expire; a `CredentialCache` has others.
            on_event: Called with a `PoolEvent`, from whichever thread it happens in; it is to
                return soon, and not to close the pool. What it raises is logged.

        Raises:
            ConfigError: A value is wrong.
            NsboxError: A provisioned environment cannot be made, or its function does not start.
        """
        _check_count(max_environments, "max_environments", 1)
        _check_count(provisioned, "provisioned", 0)
        if provisioned > max_environments:
            raise ConfigError("provisioned: more than max_environments")
        self._acquire_timeout = acquire_timeout
        if acquire_timeout is not None and acquire_timeout != 0:
            self._acquire_timeout = parse_seconds(acquire_timeout, "acquire_timeout")
        if max_invocations is not None:
            _check_count(max_invocations, "max_invocations", 1)
        if reuse not in ("keep", "reset", "never"):
            raise ConfigError(f"reuse: must be 'keep', 'reset' or 'never', got {reuse!r}")
        self._credentials = check_credentials(credentials)
        if isinstance(source, Function):
            source = source.publish()
        self._name = source.name if isinstance(source, FunctionVersion) else ""
        if isinstance(source, FunctionVersion):
            if reuse != "keep":
                raise ConfigError("reuse: give it to the Function")
            reuse = source.function.reuse
            resolve = _resolver(source)
        else:
            resolve = _config_resolver(make_config(source, {}))
        leases: PoolLeases = Leases(
            resolve,
            most=max_environments,
            max_waiting=_check_count(max_waiting, "max_waiting", 0),
            max_lifetime=parse_seconds(max_lifetime, "max_lifetime"),
            max_invocations=max_invocations,
            spills=provisioned > 0,
        )
        super().__init__(
            leases,
            provisioned=provisioned,
            idle_timeout=parse_seconds(idle_timeout, "idle_timeout"),
            reuse=reuse,
            is_function=isinstance(source, FunctionVersion),
            on_event=on_event,
        )
        self.max_environments = max_environments
        self._close_lock = threading.Lock()
        self._jobs = Jobs(max_environments)
        try:
            self._fill()
        except BaseException:
            self.close(drain=False)
            raise
        self._is_filled = True  # from now on the thread that keeps house sees to it
        self._ring()
        _pools.add(self)

    # -- calls ---------------------------------------------------------------------------------

    def invoke(
        self,
        event: object,
        *,
        timeout: float | None = None,
        tenant: str | None = None,
        env: Mapping[str, str] | None = None,
        files: Mapping[str, bytes] | None = None,
        credentials: Credentials | Provider | None = None,
        role: str | None = None,
    ) -> Any:  # noqa: ANN401 - any JSON value
        """Call the function with an event and return its answer; both are JSON values.

        Args:
            event: What json.dumps takes.
            timeout: Seconds for the handler, instead of the function's; waiting does not count.
            tenant: On whose behalf: no environment ever serves two.
            env: Variables over the function's, for this call alone; as are `files`: see
                `ExecutionEnvironment.invoke`.
            files: Bytes by names below /tmp.
            credentials: Those of this call, or what gives them, instead of the pool's provider.
            role: What the provider is asked for; the function's name by default.

        Raises:
            PoolTimeout: No environment was free within `acquire_timeout`.
            Throttled: Too many calls wait, or environments do not start.
            PoolClosed: The pool is closed, or was meanwhile.
            CredentialsError: There are none; the call is not counted, and nothing was run.
            InvokeError, SetupError, ConfigError: As `ExecutionEnvironment` and its `invoke`.
        """
        found = resolve(self._provider(credentials), self._role(role))
        grant = self._take(tenant, self._acquire_timeout, is_function=True)
        with Use(self, grant) as one:
            return one.invoke(event, timeout=timeout, env=env, files=files, credentials=found)

    def invoke_bytes(
        self,
        payload: bytes,
        *,
        tenant: str | None = None,
        credentials: Credentials | Provider | None = None,
        role: str | None = None,
        **options: Unpack[PoolOptions],
    ) -> Invocation:
        """Call the function with an event in JSON and return the `Invocation`; see `invoke`."""
        found = resolve(self._provider(credentials), self._role(role))
        grant = self._take(tenant, self._acquire_timeout, is_function=True)
        with Use(self, grant) as env:
            return env.invoke_bytes(payload, credentials=found, **options)

    def submit(self, event: object, **options: Unpack[TimedCallOptions]) -> Future[Any]:
        """Do as `invoke` in a thread of the pool, and return a future of the answer.

        As many run at a time as the pool may have environments. Those submitted above that wait
        in the order of their submission, without limit: `acquire_timeout` begins after that.
        Such a one can still be cancelled; `Future.cancel` of a running one returns False, as ever,
        and its `timeout` ends it.
        """
        self._check_usable(is_function=True)
        return self._jobs.submit(lambda: self.invoke(event, **options))

    def map(
        self,
        events: Iterable[object],
        *,
        timeout: float | None = None,
        **options: Unpack[CallOptions],
    ) -> Iterator[Any]:
        """Submit every event, and return an iterator of the answers in the order of the events.

        As `concurrent.futures.Executor.map`: all events are taken now. What a call raises is raised
        in its place; then, and when the iterator is closed, those that have not started are
        cancelled.

        Args:
            events: What json.dumps takes each.
            timeout: Seconds from now in which an answer that is asked for must be there. The
                handler's time is the function's `timeout`.
            options: As of `invoke`, for each call.

        Raises:
            TimeoutError: By the iterator: it was not.
            As `submit`; by the iterator, as `invoke`.
        """
        seconds = None if timeout is None else parse_seconds(timeout, "timeout")
        end = None if seconds is None else time.monotonic() + seconds
        futures: deque[Future[Any]] = deque()
        try:
            for event in events:
                futures.append(self.submit(event, **options))
        except BaseException:
            _cancel(futures)
            raise
        return _answers(futures, end)

    @contextlib.contextmanager
    def acquire(self, *, timeout: float | None = None) -> Iterator[ExecutionEnvironment]:
        """Lease an environment of a pool of a `Config`, for the body of a with statement.

        With reuse "keep" the next one finds the files in /tmp, with "reset" nothing: the statement
        ends when all is gone. When the body raises, the environment is destroyed.

        Args:
            timeout: Seconds to wait for one, instead of `acquire_timeout`.

        Raises:
            As `invoke`.
        """
        with Use(self, self._take(None, self._patience(timeout), is_function=False)) as env:
            yield env

    # -- leases --------------------------------------------------------------------------------

    def _role(self, role: str | None) -> str:
        return self._name if role is None else role

    def _take(self, tenant: str | None, seconds: float | None, *, is_function: bool) -> PoolGrant:
        """Return a lease with a living environment."""
        self._check_usable(is_function=is_function)
        deadline = None if seconds is None else time.monotonic() + seconds
        is_counted = False
        while True:
            waiter = PoolWaiter(tenant)
            grant = self._leases.ask(waiter, again=is_counted)
            if grant is None:
                self._wait(waiter, deadline)
                grant = self._leave_queue(waiter, seconds)
            is_counted = True
            if grant.is_birth:
                self._give_birth(grant)
                return grant
            if not self._is_dead(grant):
                return grant

    def _wait(self, waiter: PoolWaiter, deadline: float | None) -> None:
        try:
            if deadline is None:
                waiter.wait(threading.TIMEOUT_MAX)
            else:
                waiter.wait(max(0.0, deadline - time.monotonic()))
        except BaseException:
            self._drop(self._leases.withdraw(waiter))
            raise

    # -- keeping house -------------------------------------------------------------------------

    def publish(self, source: Function | FunctionVersion) -> FunctionVersion:
        """Let the next call run another version, and return that.

        Running calls end on the old one. Its idle environments are closed now, the others when
        their call ends. Provisioned ones of the new version are born at once.
        """
        self._check_usable(is_function=True)
        version = source.publish() if isinstance(source, Function) else source
        if not isinstance(version, FunctionVersion):
            raise ConfigError(f"publish: must be a function or a version of one, got {version!r}")
        if version.function.reuse != self._reuse:
            raise ConfigError(f"publish: reuse {version.function.reuse!r} was {self._reuse!r}")
        self._name = version.name
        for entry in self._leases.publish(_resolver(version)):
            self._dispose(entry)
        self._ring()
        return version

    def stats(self) -> dict[str, float]:
        """Return the numbers of one moment, under AWS Lambda's names where it has one.

        Calls is Invocations (answers and Errors), Throttles and what is under way. Duration and
        InitDuration are sums in milliseconds.
        """
        return self._leases.stats()

    # -- the end -------------------------------------------------------------------------------

    def close(self, *, drain: bool = True) -> None:
        """End the pool and every environment. May be called again.

        Args:
            drain: Let running and waiting calls end first; new ones are refused. Otherwise
                running ones are killed, and they and the waiting ones raise `PoolClosed`.

        Raises:
            CleanupError: Something of an environment could not be removed.
        """
        if self._owner != os.getpid():
            return
        with self._close_lock:
            if self._is_closed:
                return
            self._jobs.close(drain=drain)
            failure = self._end_leases(kill=None if drain else _kill)
            self._is_closed = True
            filler = self._filler
            if filler is not None:
                filler.join(RETURN_DEADLINE)
            self._jobs.join()
            if self._watch is not None:
                self._watch.close()
                self._watch = None
            _pools.discard(self)
        if failure is not None:
            raise failure

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the pool as `concurrent.futures.Executor.shutdown` does: `close` with its words.

        Args:
            wait: Return when every call has ended. Otherwise that happens in a thread: from now on
                `submit` refuses, and so does the rest when those submitted are over.
            cancel_futures: Cancel the futures whose calls have not started.

        Raises:
            CleanupError: As `close`; not with ``wait=False``.
        """
        self._jobs.refuse(cancel=cancel_futures)
        if wait:
            self.close()
        else:
            threading.Thread(target=self.close, name="nsbox-pool-close", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)


def _answers(futures: deque[Future[Any]], end: float | None) -> Iterator[Any]:
    """Yield what becomes of `futures`, in their order."""
    try:
        while futures:
            # Nothing holds on to an answer that the caller has let go of.
            left = None if end is None else end - time.monotonic()
            yield futures.popleft().result(left)
    finally:
        _cancel(futures)


def _cancel(futures: Iterable[Future[Any]]) -> None:
    for future in futures:
        future.cancel()


def _kill(fd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(fd, signal.SIGKILL)


def _check_count(value: object, what: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{what}: must be a number from {least}, got {value!r}")
    return value


def _config_resolver(config: Config) -> Resolve[Source]:
    return lambda _tenant: ("", config)


def _resolver(version: FunctionVersion) -> Resolve[Source]:
    versions: dict[str | None, tuple[Hashable, Source]] = {None: (version.key, version)}

    def resolve(tenant: str | None) -> tuple[Hashable, Source]:
        found = versions.get(tenant)
        if found is None:
            if len(versions) >= _TENANTS_KEPT:
                versions.clear()
                versions[None] = (version.key, version)
            own = version.for_tenant(tenant)
            found = versions[tenant] = (own.key, own)
        return found

    return resolve


_pools: weakref.WeakSet[WarmPool] = weakref.WeakSet()


@atexit.register
def _close_pools() -> None:
    for pool in list(_pools):
        with contextlib.suppress(NsboxError):
            pool.close(drain=False)
