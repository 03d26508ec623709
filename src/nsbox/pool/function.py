# SPDX-License-Identifier: Apache-2.0
"""`PoolFunction`: one function of a pool, or its one `Config`: its calls, its version, its numbers.

A call, from a thread or on an asyncio loop, takes a lease, uses the environment, and gives it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import operator
import os
import threading
import time
from collections import deque
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
)
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, Generic, NoReturn, TypeVar, Unpack

from nsbox.environment.environment import EnvironmentFace, ExecutionEnvironment
from nsbox.errors import ConfigError, PoolError, PoolTimeout, refuse_pickling
from nsbox.functions.credentials import Credentials, Provider, resolve, resolve_async
from nsbox.functions.exchange import InvocationResponse
from nsbox.functions.function import Function, FunctionVersion
from nsbox.functions.request import (
    CallOptions,
    InvocationRequest,
    PoolOptions,
    TimedCallOptions,
    check_payload,
    encode_event,
)
from nsbox.pool.accounts import Lease, Resolve, Waiter
from nsbox.pool.events import PoolStats
from nsbox.pool.executor import CallExecutor
from nsbox.pool.maintenance import Source
from nsbox.pool.manager import PoolLease, PoolManager, PoolQueue, PoolWaiter, env_of
from nsbox.pool.settings import check_count
from nsbox.values.config import Config, parse_seconds
from nsbox.values.invocation import Invocation

T = TypeVar("T")
if TYPE_CHECKING:
    from typing_extensions import TypeVar as DefaultingTypeVar  # PEP 696

    Served = DefaultingTypeVar("Served", bound=Function | Config, default=Function)
    PoolServed = DefaultingTypeVar("PoolServed", bound=Function | Config, default=Any)
else:
    Served, PoolServed = TypeVar("Served"), TypeVar("PoolServed")

_TENANTS_KEPT: Final = 1024  # versions of tenants that need not be made again


class PoolFunction(Generic[Served]):
    """One function of a pool: its calls, its version, its numbers. Made by `WarmPool.function`.

    The methods ending in ``_async`` do on an asyncio loop what the others do in a thread.
    """

    def __init__(
        self,
        manager: PoolManager,
        queue: PoolQueue,
        executor: CallExecutor,
        pool: PoolFunction[Any] | None = None,
    ) -> None:
        """`executor` makes its submitted calls; `pool` stays open while this is kept."""
        self._manager = manager
        self._queue = queue
        self._scheduler = manager.scheduler
        self._executor = executor
        self._acquire_timeout = manager.settings.acquire_timeout
        self._is_function = isinstance(queue.resolve(None)[1], FunctionVersion)
        self._has_provider = manager.settings.credentials is not None
        self._pool = pool

    def __reduce__(self) -> NoReturn:
        refuse_pickling("a pool", "make one there, from the Function or Config")

    # -- calls ---------------------------------------------------------------------------------

    def invoke(
        self: PoolFunction[Function],
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
        request = InvocationRequest(payload, found, timeout=timeout, env=env, files=files)
        return self._call(request, tenant, _JSON)

    def invoke_bytes(
        self: PoolFunction[Function],
        payload: bytes,
        *,
        tenant: str | None = None,
        credentials: Credentials | Provider | None = None,
        role: str | None = None,
        **options: Unpack[PoolOptions],
    ) -> Invocation:
        """Call the function with an event in JSON and return the `Invocation`; see `invoke`."""
        data, found = check_payload(payload), None
        if self._has_provider or credentials is not None:
            found = self._credentials(credentials, role)
        return self._call(InvocationRequest(data, found, **options), tenant, _invocation_of)

    def _call(
        self,
        request: InvocationRequest,
        tenant: str | None,
        read: Callable[[InvocationResponse | Invocation], T],
    ) -> T:
        """Have an environment serve a request, and return what `read` makes of the answer.

        What has died is seen when it is used; what has surely got nothing of it is another one's.
        """
        if not self._is_function or self._manager.owner != os.getpid():
            self._check_usable(is_function=True)
        lease: PoolLease = Lease()
        begin = time.monotonic()
        try:
            is_again = has_one = self._scheduler.take_idle(lease, self._queue, tenant)
            if has_one and (lease.is_cold or lease.slot.is_silent):
                has_one = not self._manager.is_dead(lease)
            while True:
                if not has_one:
                    self._take(lease, tenant, self._acquire_timeout, begin, again=is_again)
                try:
                    answer = read((lease.slot.env or env_of(lease)).call(request))
                except BaseException as error:
                    if not self._manager.fail(lease, error):
                        raise
                else:
                    if not self._scheduler.keep_idle(lease):
                        self._manager.finish(lease, None)
                    return answer
                has_one, is_again = False, True
        except BaseException:
            self._manager.abandon(lease)
            raise

    def submit(
        self: PoolFunction[Function], event: object, **options: Unpack[TimedCallOptions]
    ) -> Future[Any]:
        """Do as `invoke` in a thread of the pool, and return a future of the answer.

        As many run at a time as the pool may have environments. Those submitted above that wait
        in the order of their submission, without limit: `acquire_timeout` begins after that.
        Such a one can still be cancelled; `Future.cancel` of a running one returns False, as ever,
        and its `timeout` ends it.
        """
        self._check_usable(is_function=True)
        return self._executor.submit(lambda: self.invoke(event, **options))

    def map(
        self: PoolFunction[Function],
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
            ConfigError: `events` cannot be iterated over.
            As `submit`; by the iterator, as `invoke`.
        """
        seconds = None if timeout is None else parse_seconds(timeout, "timeout")
        end = None if seconds is None else time.monotonic() + seconds
        futures: deque[Future[Any]] = deque()
        try:
            for event in _iterable(events):
                futures.append(self.submit(event, **options))
        except BaseException:
            _cancel(futures)
            raise
        return _answers(futures, end)

    async def invoke_async(
        self: PoolFunction[Function],
        event: object,
        *,
        tenant: str | None = None,
        credentials: Credentials | Provider | None = None,
        role: str | None = None,
        **options: Unpack[PoolOptions],
    ) -> Any:  # noqa: ANN401 - any JSON value
        """Do as `invoke` on the running asyncio loop.

        Threads are started for births, thaws, files, programs, ends and providers of credentials. A
        cancelled call leaves the queue, or its environment is killed.
        """
        payload = encode_event(event)
        return await self._call_on_loop(payload, _JSON, tenant, credentials, role, options)

    async def invoke_bytes_async(
        self: PoolFunction[Function],
        payload: bytes,
        *,
        tenant: str | None = None,
        credentials: Credentials | Provider | None = None,
        role: str | None = None,
        **options: Unpack[PoolOptions],
    ) -> Invocation:
        """Do as `invoke_bytes` on the running asyncio loop; see `invoke_async`."""
        data = check_payload(payload)
        return await self._call_on_loop(data, _invocation_of, tenant, credentials, role, options)

    async def _call_on_loop(
        self,
        payload: bytes,
        read: Callable[[InvocationResponse | Invocation], T],
        tenant: str | None,
        credentials: Credentials | Provider | None,
        role: str | None,
        options: PoolOptions,
    ) -> T:
        """Call the function with an event and return what `read` makes of the answer."""
        found = None
        if self._has_provider or credentials is not None:
            provider = self._provider(credentials)
            found = None if provider is None else await resolve_async(provider, self._role(role))
        request = InvocationRequest(payload, found, **options)
        self._check_usable(is_function=True)
        begin = time.monotonic()
        lease: PoolLease = Lease()
        try:
            is_again = has_one = self._scheduler.take_idle(lease, self._queue, tenant)
            while True:
                is_plain = has_one and not lease.is_cold and not lease.slot.is_silent
                if not has_one or (not is_plain and await self._looks_dead_on_loop(lease)):
                    await self._take_on_loop(
                        lease, tenant, self._acquire_timeout, begin, again=is_again
                    )
                try:
                    environment = lease.slot.env or env_of(lease)
                    answer = read(await environment.call_async(request))
                except BaseException as error:
                    if not self._manager.fail(lease, error):
                        raise
                else:
                    if not self._scheduler.keep_idle(lease):
                        self._manager.finish(lease, None)
                    return answer
                has_one, is_again = False, True
        except BaseException:
            self._manager.abandon(lease)
            raise

    async def map_async(
        self: PoolFunction[Function],
        events: Iterable[object] | AsyncIterable[object],
        **options: Unpack[TimedCallOptions],
    ) -> AsyncIterator[Any]:
        """Yield the answers to `events`, in their order; events are taken as calls can be made.

        As many are under way at a time as the function may have environments. What a call raises
        is raised in its place; then, and when the iterator is closed, those under way are
        cancelled. `timeout` is the handler's; `asyncio.timeout` is there for the answers.
        """
        calls: deque[asyncio.Task[Any]] = deque()
        try:
            async for event in _each(events):
                calls.append(asyncio.ensure_future(self.invoke_async(event, **options)))
                if len(calls) >= self._executor.most:
                    yield await calls.popleft()
            while calls:
                yield await calls.popleft()
        finally:
            for task in calls:
                task.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    def acquire(self: PoolFunction[Config], *, timeout: float | None = None) -> Acquisition:
        """Lease an environment of a pool of a `Config`, for the body of a with statement.

        With reuse "keep" the next one finds the files in /tmp, with "reset" nothing: the statement
        ends when all is gone. When the body raises, the environment is destroyed.

        Args:
            timeout: Seconds to wait for one, instead of `acquire_timeout`.

        Raises:
            As `invoke`; but for a bad `timeout`, when the statement is entered.
        """
        enter = functools.partial(self._enter, seconds=self._patience(timeout))
        return Acquisition(self._manager, enter)

    @contextlib.asynccontextmanager
    async def acquire_async(
        self: PoolFunction[Config],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - of the wait, as that of `acquire`
    ) -> AsyncIterator[ExecutionEnvironment]:
        """Do as `acquire`, for an async with statement; what comes after it is done in a thread.

        The environment's own methods wait: `await asyncio.to_thread(env.run, argv)`.
        """
        self._check_usable(is_function=False)
        lease: PoolLease = Lease()
        patience = self._patience(timeout)
        try:
            await self._take_on_loop(lease, None, patience, time.monotonic())
            try:
                yield EnvironmentFace(env_of(lease))
            except BaseException as error:
                await self._finish_on_loop(lease, error)
                raise
            await self._finish_on_loop(lease, None)
        except BaseException:
            self._manager.abandon(lease)
            raise

    async def _finish_on_loop(self, lease: PoolLease, error: BaseException | None) -> None:
        def finish(lease: PoolLease) -> bool:
            self._manager.finish(lease, error)
            return False

        await _LeaseThread(self._manager, lease, finish).wait()

    def _enter(self, lease: PoolLease, seconds: float | None) -> ExecutionEnvironment:
        self._check_usable(is_function=False)
        try:
            self._take(lease, None, seconds)
            return EnvironmentFace(env_of(lease))
        except BaseException:
            self._manager.abandon(lease)
            raise

    # -- leases -----------------------------------------------------------------------------------

    def _take(
        self,
        lease: PoolLease,
        tenant: str | None,
        seconds: float | None,
        begin: float | None = None,
        *,
        again: bool = False,
    ) -> None:
        """Have `lease` be that of a living environment.

        Args:
            lease: The record of the call; whoever made it abandons it when this raises.
            tenant: Whose it is to be.
            seconds: How long to wait for one since `begin`; None: as long as it takes.
            begin: When the call began; now by default.
            again: It has been counted.
        """
        deadline = None
        if seconds is not None:
            deadline = (time.monotonic() if begin is None else begin) + seconds
        while True:
            waiter: PoolWaiter = Waiter(tenant, lease)
            if self._scheduler.ask(waiter, self._queue, again=again) is None:
                if deadline is None:
                    waiter.wait(threading.TIMEOUT_MAX)
                else:
                    waiter.wait(max(0.0, deadline - time.monotonic()))
                self._leave_queue(waiter, seconds)
            again = True
            if lease.is_birth:
                self._manager.start(lease)
                return
            if not self._looks_dead(lease):
                return

    def _leave_queue(self, waiter: PoolWaiter, seconds: float | None) -> None:
        """Take what a call has got that has waited for `seconds` at most.

        Raises:
            PoolTimeout: It has got none.
            PoolClosed, Throttled: It was told that it gets none.
        """
        lease = self._scheduler.withdraw(waiter)
        if waiter.error is not None:
            raise waiter.error
        if lease is None:
            raise PoolTimeout(f"no environment was free within {seconds} seconds")

    async def _take_on_loop(
        self,
        lease: PoolLease,
        tenant: str | None,
        seconds: float | None,
        begin: float,
        *,
        again: bool = False,
    ) -> None:
        """Do as `_take`, on the running loop."""
        loop = asyncio.get_running_loop()
        left = None if seconds is None else max(0.0, begin + seconds - time.monotonic())
        deadline = None if left is None else loop.time() + left
        while True:
            waiter = LoopWaiter(tenant, lease, loop)
            if self._scheduler.ask(waiter, self._queue, again=again) is None:
                await self._wait_on_loop(waiter, deadline)
                self._leave_queue(waiter, seconds)
            again = True
            if lease.is_birth:
                await _LeaseThread(self._manager, lease, self._start).wait()
                return
            if not await self._looks_dead_on_loop(lease):
                return

    async def _looks_dead_on_loop(self, lease: PoolLease) -> bool:
        """Do as `_looks_dead`; a thaw takes as long as the launcher does."""
        if lease.is_cold:
            return not await _LeaseThread(self._manager, lease, self._is_alive).wait()
        return self._looks_dead(lease)

    def _is_alive(self, lease: PoolLease) -> bool:
        return not self._looks_dead(lease)

    def _start(self, lease: PoolLease) -> bool:
        self._manager.start(lease)
        return True

    async def _wait_on_loop(self, waiter: LoopWaiter, deadline: float | None) -> None:
        loop = asyncio.get_running_loop()
        timer = None if deadline is None else loop.call_at(deadline, _settle, waiter.future)
        try:
            await waiter.future
        except BaseException:
            # Closing its victims, if any, waits for nothing.
            self._manager.drop(self._scheduler.withdraw(waiter))
            raise
        finally:
            if timer is not None:
                timer.cancel()

    # -- checks --------------------------------------------------------------------------------

    def _check_usable(self, *, is_function: bool) -> None:
        if self._manager.owner != os.getpid():
            raise PoolError(
                f"this pool belongs to process {self._manager.owner}, and this is {os.getpid()}: "
                "make another one here, after the fork"
            )
        if is_function is not self._is_function:
            has = "a function: use invoke" if self._is_function else "a Config: use acquire"
            raise PoolError(f"this pool is of {has}")

    def _patience(self, timeout: float | None) -> float | None:
        """Return for how many seconds a call waits for an environment."""
        return self._acquire_timeout if timeout is None else parse_seconds(timeout, "timeout")

    def _looks_dead(self, lease: PoolLease) -> bool:
        """Whether an environment that was idle cannot be used; then its lease is over.

        The death of one with a worker is seen when that is sent an event.
        """
        return (lease.is_cold or lease.slot.is_silent) and self._manager.is_dead(lease)

    def _credentials(
        self, credentials: Credentials | Provider | None, role: str | None
    ) -> Credentials | None:
        """Return those of a call, if it is to have some."""
        given = self._provider(credentials)
        return None if given is None else resolve(given, self._role(role))

    def _provider(
        self, credentials: Credentials | Provider | None
    ) -> Credentials | Provider | None:
        """Return where a call's credentials come from."""
        return self._manager.settings.credentials if credentials is None else credentials

    def _role(self, role: str | None) -> str:
        """Return the role of a call's credentials; the function's name, unless it is given."""
        if role is not None:
            return role
        what = self._queue.resolve(None)[1]
        return what.name if isinstance(what, FunctionVersion) else ""

    # -- versions and numbers ------------------------------------------------------------------

    def publish(
        self: PoolFunction[Function], source: Function | FunctionVersion
    ) -> FunctionVersion:
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
        self._manager.retire_all(self._scheduler.publish(self._queue, version_resolver(version)))
        return version

    def provision(self, count: int) -> None:
        """Set how many environments are kept ready; `provisioned` was how many from the start.

        Those that are missing are born by and by. With fewer than before, idle ones are closed.

        Raises:
            ConfigError: There are not as many places, or not that much memory.
        """
        self._check_usable(is_function=self._is_function)
        count = check_count(count, "provisioned", 0)
        self._manager.retire_all(self._scheduler.provision(self._queue, count))

    def stats(self) -> PoolStats:
        """Return the numbers of one moment; those of a `WarmPool` are of all its functions.

        Calls is Invocations (answers and Errors), Throttles and what is under way.
        """
        return self._scheduler.stats(self._queue)


class Acquisition:
    """What `PoolFunction.acquire` returns: a context manager, entered once.

    Not of contextlib: between its generator and its caller there is room for an interrupt.
    """

    def __init__(
        self, manager: PoolManager, enter: Callable[[PoolLease], ExecutionEnvironment]
    ) -> None:
        """`enter` has its lease be that of the environment that it returns."""
        self._manager = manager
        self._enter = enter
        self._lease: PoolLease = Lease()

    def __enter__(self) -> ExecutionEnvironment:
        return self._enter(self._lease)

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            self._manager.finish(self._lease, error)
        except BaseException:
            self._manager.abandon(self._lease)
            raise


class LoopWaiter(PoolWaiter):
    """A call that waits on a loop.

    Attributes:
        future: Done once the call is served or refused, or its time is over.
    """

    def __init__(
        self, tenant: str | None, record: PoolLease, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(tenant, record)
        self._loop = loop
        self.future: asyncio.Future[None]

    def join(self) -> None:
        """See `Waiter.join`."""
        self.future = self._loop.create_future()

    def wake(self) -> bool:
        """See `Waiter.wake`."""
        return _wake(self._loop, self.future)


def _wake(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> bool:
    try:
        loop.call_soon_threadsafe(_settle, future)
    except RuntimeError:
        return False  # it is closed
    return True


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _LeaseThread:
    """Work on a lease in a thread, for a task that may be cancelled before it is over."""

    def __init__(
        self, manager: PoolManager, lease: PoolLease, work: Callable[[PoolLease], bool]
    ) -> None:
        """`work` returns whether the lease goes on; it does not when that raises."""
        self._manager = manager
        self._lease = lease
        self._own: PoolLease = Lease()  # the thread's: the task may end before
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()
        self._lock = threading.Lock()
        self._is_held = self._is_unwanted = False
        self._error: BaseException | None = None

    async def wait(self) -> bool:
        """Return whether the lease goes on."""
        try:
            self._manager.scheduler.pass_on(self._lease, self._own)
            threading.Thread(target=self._run, name="nsbox-pool-lease", daemon=True).start()
        except BaseException:
            self._manager.abandon(self._own)
            raise
        try:
            await self._future
            if self._error is not None:
                raise self._error
            if self._is_held:
                self._manager.scheduler.pass_on(self._own, self._lease)
            return self._is_held
        except BaseException:
            with self._lock:
                self._is_unwanted = True
                is_held = self._is_held
            if is_held:
                self._manager.drop(self._own)
            raise

    def _run(self) -> None:
        try:
            is_held = self._work(self._own)
        except BaseException as error:  # noqa: BLE001 - handed to the task
            self._error = error
            is_held = False
        with self._lock:
            is_unwanted = self._is_unwanted
            if not is_unwanted:
                self._is_held = is_held
                is_unwanted = not _wake(self._loop, self._future)
        if is_unwanted and is_held:
            self._manager.drop(self._own)


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


async def _each(events: Iterable[object] | AsyncIterable[object]) -> AsyncIterator[object]:
    if isinstance(events, AsyncIterable):
        async for event in events:
            yield event
    else:
        for event in _iterable(events):
            yield event


def _iterable(events: Iterable[object]) -> Iterator[object]:
    try:
        return iter(events)
    except TypeError as error:
        raise ConfigError(f"events: must be an iterable of events, got {events!r}") from error


_JSON: Final[Callable[[InvocationResponse | Invocation], Any]] = operator.methodcaller("json")


def _invocation_of(answer: InvocationResponse | Invocation) -> Invocation:
    return answer.invocation() if isinstance(answer, InvocationResponse) else answer


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
        if tenant is not None and not isinstance(tenant, str):
            raise ConfigError(f"tenant: must be text, got {tenant!r}")
        found = versions.get(tenant)
        if found is None:
            if len(versions) >= _TENANTS_KEPT:
                versions.clear()
                versions[None] = (version.key, version)
            own = version.for_tenant(tenant)
            found = versions[tenant] = (own.key, own)
        return found

    return resolve
