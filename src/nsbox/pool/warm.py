# SPDX-License-Identifier: Apache-2.0
"""`WarmPool`: environments kept warm for a function version or a `Config`, one call each at a time.

The pool decides who gets which environment and when one goes (`nsbox.pool.leases` has that state);
everything else is the environment's.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from typing import Any, Final, Self

from nsbox.config import Config, make_config, parse_seconds
from nsbox.environment import ExecutionEnvironment
from nsbox.errors import (
    ConfigError,
    NsboxError,
)
from nsbox.function import Function, FunctionVersion
from nsbox.invocation import Invocation
from nsbox.pool.entries import Waiter
from nsbox.pool.events import PoolEvent
from nsbox.pool.house import House, PoolGrant, PoolShare, Source, env_of
from nsbox.pool.jobs import Jobs
from nsbox.pool.loop import PoolCalls
from nsbox.pool.settings import check_count, check_settings
from nsbox.pool.shares import Resolve

_TENANTS_KEPT: Final = 1024  # versions of tenants that need not be made again


class PoolFunction(PoolCalls):
    """One function of a pool: its calls, its version, its numbers. Made by `WarmPool.function`."""

    def __init__(self, house: House, share: PoolShare, most: int) -> None:
        """`most`: as many of its submitted calls run at a time."""
        super().__init__(house, share)
        self._jobs = Jobs(most)

    # -- calls ---------------------------------------------------------------------------------

    def invoke(
        self, event: object, *, timeout: float | None = None, tenant: str | None = None
    ) -> Any:  # noqa: ANN401 - any JSON value
        """Call the function with an event and return its answer; both are JSON values.

        Args:
            event: What json.dumps takes.
            timeout: Seconds for the handler, instead of the function's; waiting does not count.
            tenant: On whose behalf: no environment ever serves two.

        Raises:
            PoolTimeout: No environment was free within `acquire_timeout`.
            Throttled: Too many calls wait, or environments do not start.
            PoolClosed: The pool is closed, or was meanwhile.
            InvokeError, SetupError, ConfigError: As `ExecutionEnvironment` and its `invoke`.
        """
        grant = self._take(tenant, self._acquire_timeout, is_function=True)
        try:
            answer = env_of(grant).invoke(event, timeout=timeout)
        except BaseException as error:
            self._fail(grant, error)
            raise
        self._finish(grant, None)
        return answer

    def invoke_bytes(
        self, payload: bytes, *, timeout: float | None = None, tenant: str | None = None
    ) -> Invocation:
        """Call the function with an event in JSON and return the `Invocation`; see `invoke`."""
        grant = self._take(tenant, self._acquire_timeout, is_function=True)
        try:
            invocation = env_of(grant).invoke_bytes(payload, timeout=timeout)
        except BaseException as error:
            self._fail(grant, error)
            raise
        self._finish(grant, None)
        return invocation

    def submit(
        self, event: object, *, timeout: float | None = None, tenant: str | None = None
    ) -> Future[Any]:
        """Do as `invoke` in a thread of the pool, and return a future of the answer.

        As many run at a time as the pool may have environments. Those submitted above that wait
        in the order of their submission, without limit: `acquire_timeout` begins after that.
        """
        self._check_usable(is_function=True)
        return self._jobs.submit(lambda: self.invoke(event, timeout=timeout, tenant=tenant))

    @contextlib.contextmanager
    def acquire(self, *, timeout: float | None = None) -> Iterator[ExecutionEnvironment]:
        """Lease an environment of a pool of a `Config`, for the body of a with statement.

        With reuse "keep" the next one finds the files in /tmp. When the body raises, the
        environment is destroyed.

        Args:
            timeout: Seconds to wait for one, instead of `acquire_timeout`.

        Raises:
            As `invoke`.
        """
        seconds = self._acquire_timeout if timeout is None else parse_seconds(timeout, "timeout")
        grant = self._take(None, seconds, is_function=False)
        try:
            yield env_of(grant)
        except BaseException as error:
            self._finish(grant, error)
            raise
        self._finish(grant, None)

    # -- leases --------------------------------------------------------------------------------

    def _take(self, tenant: str | None, seconds: float | None, *, is_function: bool) -> PoolGrant:
        """Return a lease with a living environment."""
        self._check_usable(is_function=is_function)
        deadline = None if seconds is None else time.monotonic() + seconds
        is_counted = False
        while True:
            waiter = Waiter[ExecutionEnvironment, Source](tenant)
            grant = self._leases.ask(waiter, self._share, again=is_counted)
            if grant is None:
                grant = self._await(waiter, deadline)
            is_counted = True
            if grant.is_birth:
                self._give_birth(grant)
                return grant
            if not self._is_dead(grant):
                return grant

    def _await(
        self, waiter: Waiter[ExecutionEnvironment, Source], deadline: float | None
    ) -> PoolGrant:
        is_over = False
        try:
            if deadline is None:
                waiter.wait(threading.TIMEOUT_MAX)
            else:
                is_over = not waiter.wait(max(0.0, deadline - time.monotonic()))
        except BaseException:
            self._drop(self._leases.withdraw(waiter))
            raise
        grant = self._leases.withdraw(waiter) if is_over else waiter.grant
        if waiter.error is not None:
            raise waiter.error
        if grant is None:
            raise self._timed_out()
        return grant

    # -- keeping house -------------------------------------------------------------------------

    def publish(self, source: Function | FunctionVersion) -> FunctionVersion:
        """Let the next call run another version, and return that.

        Running calls end on the old one. Its idle environments are closed now, the others when
        their call ends. Provisioned ones of the new version are born at once.
        """
        self._check_usable(is_function=True)
        version = _version_of(source, "publish")
        before = self._share.resolve(None)[1]
        if isinstance(before, FunctionVersion) and before.function.reuse != version.function.reuse:
            reuse = version.function.reuse
            raise ConfigError(f"publish: reuse {reuse!r} was {before.function.reuse!r}")
        self._house.dispose_all(self._leases.publish(self._share, _resolver(version)))
        return version

    def provision(self, count: int) -> None:
        """Set how many environments are kept ready; `provisioned` was how many from the start.

        Those that are missing are born by and by. With fewer than before, idle ones are closed.

        Raises:
            ConfigError: There are not as many places, or not that much memory.
        """
        self._check_usable(is_function=self._is_function)
        count = check_count(count, "provisioned", 0)
        self._house.dispose_all(self._leases.provision(self._share, count))

    def stats(self) -> dict[str, float]:
        """Return the numbers of one moment, under AWS Lambda's names where it has one.

        Calls is Invocations (answers and Errors), Throttles and what is under way. Duration and
        InitDuration are sums in milliseconds. Those of a `WarmPool` are of all its functions.
        """
        return self._leases.stats(self._share)


class WarmPool(PoolFunction):
    """Keeps environments warm and gives each of them to one call at a time.

    Use it as a context manager, from any number of threads; not from a forked child. The with
    statement waits for running calls at its end, and kills them when it ends by an exception.

    An environment belongs to one function version and one tenant. A call gets an idle one of its
    own, the last used first; else one is born, up to `max_environments`; else the one that has
    been idle longest makes room; else the call waits for its turn.
    """

    def __init__(
        self,
        source: Function | FunctionVersion | Config | None = None,
        *,
        provisioned: int = 0,
        max_environments: int = 8,
        blank: int = 0,
        memory_budget: int | str | None = None,
        acquire_timeout: float | None = 10.0,
        max_waiting: int = 1000,
        idle_timeout: float = 600.0,
        freeze_after: float | None = 1.0,
        max_lifetime: float = 14 * 3600.0,
        max_invocations: int | None = None,
        shutdown_grace: float = 0.5,
        min_available: float | None = 0.05,
        reuse: str = "keep",
        on_event: Callable[[PoolEvent], object] | None = None,
    ) -> None:
        """Make the pool, and wait until `provisioned` environments are ready.

        Args:
            source: A function, which is published, or a version; for `invoke` and `submit`. Or a
                `Config` (None: the default one), for `acquire`.
            provisioned: Environments kept ready, initialised; a lost one is replaced.
            max_environments: The most at a time, births under way counted.
            blank: Blank environments of each kind of the pool kept ready, from which a birth takes
                only the rest (`nsbox.set_blanks`).
            memory_budget: Bytes, or such as "4G", that the memory limits of all may sum up to.
            acquire_timeout: Seconds a call waits for its turn; None waits as long as it takes.
            max_waiting: Calls of each function that may wait; 0: none does.
            idle_timeout: Seconds after which one that nobody uses is closed.
            freeze_after: Seconds after which one that nobody uses is frozen; None: never.
            max_lifetime: Seconds after which one gets no other call.
            max_invocations: Calls after which one is replaced.
            shutdown_grace: Seconds a healthy one has to end after SIGTERM; 0: none.
            min_available: Share of the memory; when less is available, or less than twice that and
                the kernel tells of pressure, idle ones are closed. None: do not look.
            reuse: For a `Config`: ``"keep"`` or ``"never"``. A function has its own.
            on_event: Called with a `PoolEvent`, from whichever thread it happens in; it is to
                return soon, to wait for no call, and not to close the pool. What it raises is
                logged.

        Raises:
            ConfigError: A value is wrong.
            NsboxError: A provisioned environment cannot be made, or its function does not start.
        """
        settings = check_settings(
            max_environments=max_environments,
            blank=blank,
            memory_budget=memory_budget,
            acquire_timeout=acquire_timeout,
            max_waiting=max_waiting,
            idle_timeout=idle_timeout,
            freeze_after=freeze_after,
            max_lifetime=max_lifetime,
            max_invocations=max_invocations,
            shutdown_grace=shutdown_grace,
            min_available=min_available,
            reuse=reuse,
            on_event=on_event,
        )
        provisioned = check_count(provisioned, "provisioned", 0)
        if provisioned > max_environments:
            raise ConfigError("provisioned: more than max_environments")
        resolve: Resolve[Source]
        if isinstance(source, Function | FunctionVersion):
            if reuse != "keep":
                raise ConfigError("reuse: give it to the Function")
            resolve = _resolver(_version_of(source, "source"))
        else:
            resolve = _config_resolver(make_config(source, {}))
        house = House(settings)
        share = house.add(resolve, reserved=None, provisioned=provisioned, optional=source is None)
        super().__init__(house, share, max_environments)
        self._functions: list[PoolFunction] = [self]
        self._close_lock = threading.Lock()
        self._is_closed = False
        try:
            house.open(share)
        except BaseException:
            self.close(drain=False)
            raise
        _pools.add(self)

    def function(
        self,
        source: Function | FunctionVersion,
        *,
        reserved: int | None = None,
        provisioned: int = 0,
    ) -> PoolFunction:
        """Have the pool serve another function, and return what it is called by.

        All have their environments in this one pool. Those without reserved places share what is
        left: what becomes free goes to the function whose calls wait and that has the fewest.

        Args:
            source: A function, which is published, or a version.
            reserved: So many places are this function's, and no others: as reserved concurrency of
                AWS Lambda it is a guarantee and a limit. With 0 every call is `Throttled`.
            provisioned: Environments of it that are kept ready.

        Raises:
            ConfigError: There are not as many places, or not that much memory.
            PoolClosed: The pool is closed.
            NsboxError: A provisioned environment cannot be made, or the function does not start.
        """
        version = _version_of(source, "function")
        if reserved is not None:
            reserved = check_count(reserved, "reserved", 0)
        provisioned = check_count(provisioned, "provisioned", 0)
        self._check_usable(is_function=self._is_function)
        share = self._house.add(_resolver(version), reserved=reserved, provisioned=provisioned)
        most = self._house.settings.max_environments if reserved is None else max(1, reserved)
        function = PoolFunction(self._house, share, most)
        try:
            self._house.open(share)
        except BaseException:
            self._house.withdraw(share)
            raise
        with self._close_lock:
            self._functions.append(function)
        return function

    def stats(self) -> dict[str, float]:
        """Return the numbers of all functions of the pool; see `PoolFunction.stats`."""
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
        if self._house.owner != os.getpid():
            return
        with self._close_lock:
            if self._is_closed:
                return
            for function in self._functions:
                function._jobs.close(drain=drain)
            failure = self._house.end(drain=drain)
            self._is_closed = True
            for function in self._functions:
                function._jobs.join()
            self._house.end_watch()
            _pools.discard(self)
        if failure is not None:
            raise failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)


def _version_of(source: object, what: str) -> FunctionVersion:
    version = source.publish() if isinstance(source, Function) else source
    if not isinstance(version, FunctionVersion):
        raise ConfigError(f"{what}: must be a function or a version of one, got {version!r}")
    return version


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


_pools: set[WarmPool] = set()


@atexit.register
def _close_pools() -> None:
    for pool in list(_pools):
        with contextlib.suppress(NsboxError):
            pool.close(drain=False)
