# SPDX-License-Identifier: Apache-2.0
"""One function of a pool, or its one `Config`: calls from threads, versions, numbers."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Final, Unpack

from nsbox.environment.environment import ExecutionEnvironment
from nsbox.errors import ConfigError
from nsbox.functions.call import Answer
from nsbox.functions.credentials import Credentials, Provider
from nsbox.functions.function import Function, FunctionVersion
from nsbox.functions.request import (
    CallOptions,
    PoolOptions,
    Request,
    TimedCallOptions,
    check_payload,
    encode_event,
)
from nsbox.pool.accounts import Resolve, Waiter
from nsbox.pool.executor import CallExecutor
from nsbox.pool.judgement import Source
from nsbox.pool.loop import PoolCalls
from nsbox.pool.manager import PoolLease, PoolManager, PoolQueue, PoolWaiter, env_of
from nsbox.pool.settings import check_count
from nsbox.values.config import Config, parse_seconds
from nsbox.values.invocation import Invocation

_TENANTS_KEPT: Final = 1024  # versions of tenants that need not be made again


class PoolFunction(PoolCalls):
    """One function of a pool: its calls, its version, its numbers. Made by `WarmPool.function`."""

    def __init__(self, manager: PoolManager, queue: PoolQueue, most: int) -> None:
        """`most`: as many of its submitted calls run at a time."""
        super().__init__(manager, queue)
        self._executor = CallExecutor(most)

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
        payload, found = encode_event(event), None
        if self._has_provider or credentials is not None:
            found = self._credentials(credentials, role)
        request = Request(payload, found, timeout=timeout, env=env, files=files)
        begin = time.monotonic()
        lease = self._take_function(tenant, begin)
        while True:
            try:
                answer = env_of(lease).call(request).json()
            except BaseException as error:
                if not self._fail(lease, error):
                    raise
            else:
                if not self._keep_idle(lease):
                    self._finish(lease, None)
                return answer
            lease = self._take(tenant, self._acquire_timeout, begin, again=True)

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
        data = check_payload(payload)
        request = Request(data, self._credentials(credentials, role), **options)
        begin = time.monotonic()
        lease = self._take_function(tenant, begin)
        while True:
            try:
                answer = env_of(lease).call(request)
                invocation = answer.invocation() if isinstance(answer, Answer) else answer
            except BaseException as error:
                if not self._fail(lease, error):
                    raise
            else:
                if not self._keep_idle(lease):
                    self._finish(lease, None)
                return invocation
            lease = self._take(tenant, self._acquire_timeout, begin, again=True)

    def submit(self, event: object, **options: Unpack[TimedCallOptions]) -> Future[Any]:
        """Do as `invoke` in a thread of the pool, and return a future of the answer.

        As many run at a time as the pool may have environments. Those submitted above that wait
        in the order of their submission, without limit: `acquire_timeout` begins after that.
        Such a one can still be cancelled; `Future.cancel` of a running one returns False, as ever,
        and its `timeout` ends it.
        """
        self._check_usable(is_function=True)
        return self._executor.submit(lambda: self.invoke(event, **options))

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
        self._check_usable(is_function=False)
        lease = self._take(None, self._patience(timeout))
        try:
            yield env_of(lease)
        except BaseException as error:
            self._finish(lease, error)
            raise
        self._finish(lease, None)

    # -- leases -----------------------------------------------------------------------------------

    def _take_function(self, tenant: str | None, begin: float) -> PoolLease:
        """Return a lease for a call of a function; what has died is seen when it is used."""
        if not self._is_function or self._manager.owner != os.getpid():
            self._check_usable(is_function=True)
        lease = self._scheduler.take_idle(self._queue, tenant)
        if lease is None:
            return self._take(tenant, self._acquire_timeout, begin)
        if self._looks_dead(lease):
            return self._take(tenant, self._acquire_timeout, begin, again=True)
        return lease

    def _take(
        self,
        tenant: str | None,
        seconds: float | None,
        begin: float | None = None,
        *,
        again: bool = False,
    ) -> PoolLease:
        """Return a lease with a living environment.

        Args:
            tenant: Whose it is to be.
            seconds: How long to wait for one since `begin`; None: as long as it takes.
            begin: When the call began; now by default.
            again: It has been counted.
        """
        deadline = None
        if seconds is not None:
            deadline = (time.monotonic() if begin is None else begin) + seconds
        while True:
            waiter: PoolWaiter = Waiter(tenant)
            lease = self._scheduler.ask(waiter, self._queue, again=again)
            if lease is None:
                self._wait(waiter, deadline)
                lease = self._leave_queue(waiter, seconds)
            again = True
            if lease.is_birth:
                self._give_birth(lease)
                return lease
            if not self._looks_dead(lease):
                return lease

    def _wait(self, waiter: PoolWaiter, deadline: float | None) -> None:
        try:
            if deadline is None:
                waiter.wait(threading.TIMEOUT_MAX)
            else:
                waiter.wait(max(0.0, deadline - time.monotonic()))
        except BaseException:
            self._drop(self._scheduler.withdraw(waiter))
            raise

    # -- maintenance ------------------------------------------------------------------------------

    def publish(self, source: Function | FunctionVersion) -> FunctionVersion:
        """Let the next call run another version, and return that.

        Running calls end on the old one. Its idle environments are closed now, the others when
        their call ends. Provisioned ones of the new version are born at once.
        """
        self._check_usable(is_function=True)
        version = version_of(source, "publish")
        before = self._queue.resolve(None)[1]
        if isinstance(before, FunctionVersion) and before.function.reuse != version.function.reuse:
            reuse = version.function.reuse
            raise ConfigError(f"publish: reuse {reuse!r} was {before.function.reuse!r}")
        self._manager.dispose_all(self._scheduler.publish(self._queue, version_resolver(version)))
        return version

    def provision(self, count: int) -> None:
        """Set how many environments are kept ready; `provisioned` was how many from the start.

        Those that are missing are born by and by. With fewer than before, idle ones are closed.

        Raises:
            ConfigError: There are not as many places, or not that much memory.
        """
        self._check_usable(is_function=self._is_function)
        count = check_count(count, "provisioned", 0)
        self._manager.dispose_all(self._scheduler.provision(self._queue, count))

    def stats(self) -> dict[str, float]:
        """Return the numbers of one moment, under AWS Lambda's names where it has one.

        Calls is Invocations (answers and Errors), Throttles and what is under way. Duration and
        InitDuration are sums in milliseconds. Those of a `WarmPool` are of all its functions.
        """
        return self._scheduler.stats(self._queue)


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


def version_of(source: object, what: str) -> FunctionVersion:
    """Return the version that `source` is, or has published; ConfigError names `what`."""
    version = source.publish() if isinstance(source, Function) else source
    if not isinstance(version, FunctionVersion):
        raise ConfigError(f"{what}: must be a function or a version of one, got {version!r}")
    return version


def config_resolver(config: Config) -> Resolve[Source]:
    """Return what has environments made of `config`, whoever asks."""
    return lambda _tenant: ("", config)


def version_resolver(version: FunctionVersion) -> Resolve[Source]:
    """Return what has environments made of `version`, those of a tenant of its own."""
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
