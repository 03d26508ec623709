# SPDX-License-Identifier: Apache-2.0
"""`AsyncWarmPool`: a `WarmPool` for asyncio programs."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, Literal, Self, TypeVar, Unpack, overload

from nsbox.environment.environment import ExecutionEnvironment
from nsbox.errors import PoolError
from nsbox.functions.credentials import Credentials, Provider
from nsbox.functions.function import Function, FunctionVersion, ReuseChoice
from nsbox.functions.loop import aside
from nsbox.functions.request import PoolOptions, TimedCallOptions
from nsbox.pool.events import PoolSnapshot, PoolStats
from nsbox.pool.function import PoolFunction, PoolServed
from nsbox.pool.pool import WarmPool, withdraw
from nsbox.pool.settings import PoolSettings
from nsbox.values.config import Config
from nsbox.values.invocation import Invocation

_T = TypeVar("_T")


class AsyncWarmPool(Generic[PoolServed]):
    """A `WarmPool` whose calls are awaited. Use it with ``async with``.

    To type checkers it is an ``AsyncWarmPool[Function]`` or an ``AsyncWarmPool[Config]``, as
    `WarmPool` is.

    Attributes:
        pool: The `WarmPool` behind it, which threads may use at the same time.
        max_environments: The most at a time.
    """

    @overload
    def __init__(
        self: AsyncWarmPool[Function],
        source: Function | FunctionVersion,
        *,
        reuse: Literal["keep"] = "keep",
        **settings: Unpack[PoolSettings],
    ) -> None: ...

    @overload
    def __init__(
        self: AsyncWarmPool[Config],
        source: Config | None = None,
        *,
        reuse: ReuseChoice = "keep",
        **settings: Unpack[PoolSettings],
    ) -> None: ...

    def __init__(
        self,
        source: Function | FunctionVersion | Config | None = None,
        *,
        reuse: ReuseChoice = "keep",
        **settings: Unpack[PoolSettings],
    ) -> None:
        """Take what `WarmPool` takes; nothing is made before it is entered."""
        make: Any = WarmPool
        self._make: Callable[[], WarmPool[PoolServed]]
        self._make = functools.partial(make, source, reuse=reuse, **settings)
        self._pool: WarmPool[PoolServed] | None = None

    @property
    def pool(self) -> WarmPool[PoolServed]:
        """The `WarmPool` behind it.

        Raises:
            PoolError: It is not entered.
        """
        if self._pool is None:
            raise PoolError("enter the pool first: async with AsyncWarmPool(...) as pool")
        return self._pool

    @property
    def max_environments(self) -> int:
        """The most at a time."""
        return self.pool.max_environments

    async def invoke(
        self: AsyncWarmPool[Function], event: object, **options: Unpack[TimedCallOptions]
    ) -> Any:  # noqa: ANN401 - any JSON value
        """Call the function with an event; see `WarmPool.invoke` and `WarmPool.invoke_async`."""
        return await (self._pool or self.pool).invoke_async(event, **options)

    async def invoke_bytes(
        self: AsyncWarmPool[Function],
        payload: bytes,
        *,
        tenant: str | None = None,
        credentials: Credentials | Provider | None = None,
        role: str | None = None,
        **options: Unpack[PoolOptions],
    ) -> Invocation:
        """Call the function with an event in JSON; see `WarmPool.invoke_bytes`."""
        return await self.pool.invoke_bytes_async(
            payload, tenant=tenant, credentials=credentials, role=role, **options
        )

    def submit(
        self: AsyncWarmPool[Function], event: object, **options: Unpack[TimedCallOptions]
    ) -> asyncio.Future[Any]:
        """Do as `WarmPool.submit`, and return a future of the running loop.

        To cancel it drops a call that has not started; one that runs goes on until it answers or
        its time is over. A task of `invoke` is killed.
        """
        return asyncio.wrap_future(self.pool.submit(event, **options))

    def map(
        self: AsyncWarmPool[Function],
        events: Iterable[object] | AsyncIterable[object],
        **options: Unpack[TimedCallOptions],
    ) -> AsyncIterator[Any]:
        """Yield the answers to `events`, in their order; see `WarmPool.map_async`."""
        return self.pool.map_async(events, **options)

    def acquire(
        self: AsyncWarmPool[Config], *, timeout: float | None = None
    ) -> AbstractAsyncContextManager[ExecutionEnvironment]:
        """Lease an environment for an async with statement; see `WarmPool.acquire_async`."""
        return self.pool.acquire_async(timeout=timeout)

    async def function(
        self,
        source: Function | FunctionVersion,
        *,
        reserved: int | None = None,
        provisioned: int = 0,
    ) -> PoolFunction[Function]:
        """Have the pool serve another function; see `WarmPool.function`.

        What it returns is called with its methods ending in ``_async``: `PoolFunction.invoke_async`
        and so on.
        """
        pool = self.pool
        make = functools.partial(pool.function, source, reserved=reserved, provisioned=provisioned)
        return await _Making[PoolFunction[Function]](make, functools.partial(withdraw, pool)).wait()

    async def publish(
        self: AsyncWarmPool[Function], source: Function | FunctionVersion
    ) -> FunctionVersion:
        """Let the next call run another version; see `WarmPool.publish`."""
        return await asyncio.to_thread(self.pool.publish, source)

    async def provision(self, count: int) -> None:
        """Set how many environments are kept ready; see `WarmPool.provision`."""
        await asyncio.to_thread(self.pool.provision, count)

    def stats(self) -> PoolStats:
        """Return the numbers of one moment; see `WarmPool.stats`."""
        return self.pool.stats()

    def snapshot(self) -> PoolSnapshot:
        """Return what the pool has at this moment; see `WarmPool.snapshot`."""
        return self.pool.snapshot()

    async def close(self, *, drain: bool = True) -> None:
        """End the pool; see `WarmPool.close`. Cancelled, it goes on as with ``drain=False``."""
        if self._pool is not None:
            await self._end(self._pool, functools.partial(self._pool.close, drain=drain))

    async def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the pool; see `WarmPool.shutdown`, and `close`."""
        if self._pool is not None:
            work = functools.partial(self._pool.shutdown, wait, cancel_futures=cancel_futures)
            await self._end(self._pool, work)

    async def _end(self, pool: WarmPool[PoolServed], work: Callable[[], None]) -> None:
        try:
            await aside(work)
        except asyncio.CancelledError:
            # That thread goes on to let calls end, for as long as they take.
            kill = functools.partial(pool.close, drain=False)
            threading.Thread(target=kill, name="nsbox-pool-close", daemon=True).start()
            raise

    async def __aenter__(self) -> Self:
        self._pool = await _Making(self._make, lambda pool: pool.close(drain=False)).wait()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self.close(drain=kind is None)


class _Making(Generic[_T]):
    """Something made in a thread, which cannot be stopped when nobody wants it any more."""

    def __init__(self, make: Callable[[], _T], undo: Callable[[_T], object]) -> None:
        self._make = make
        self._undo = undo
        self._lock = threading.Lock()
        self._is_unwanted = False
        self._made: list[_T] = []

    async def wait(self) -> _T:
        """Have it made, and return it; cancelled, have it undone."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(None, self._run)
        except BaseException:
            loop.run_in_executor(None, self._abandon)  # waits for what is under way
            raise
        return self._made.pop()

    def _run(self) -> None:
        with self._lock:
            if not self._is_unwanted:
                self._made.append(self._make())

    def _abandon(self) -> None:
        with self._lock:
            self._is_unwanted = True
            while self._made:
                self._undo(self._made.pop())
