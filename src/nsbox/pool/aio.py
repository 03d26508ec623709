# SPDX-License-Identifier: Apache-2.0
"""`AsyncWarmPool`: a `WarmPool` for asyncio programs."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any, Self, Unpack

from nsbox.environment.environment import ExecutionEnvironment
from nsbox.errors import PoolError
from nsbox.functions.function import Function, FunctionVersion
from nsbox.functions.request import TimedCallOptions
from nsbox.pool.events import PoolSnapshot, PoolStats
from nsbox.pool.function import PoolFunction
from nsbox.pool.pool import WarmPool
from nsbox.values.config import Config


class AsyncWarmPool:
    """A `WarmPool` whose calls are awaited. Use it with ``async with``.

    Attributes:
        pool: The `WarmPool` behind it, which threads may use at the same time.
    """

    def __init__(
        self,
        source: Function | FunctionVersion | Config | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        """Take what `WarmPool` takes; nothing is made before it is entered."""
        self._source = source
        self._settings = settings
        self._pool: WarmPool | None = None

    @property
    def pool(self) -> WarmPool:
        """The `WarmPool` behind it.

        Raises:
            PoolError: It is not entered.
        """
        if self._pool is None:
            raise PoolError("enter the pool first: async with AsyncWarmPool(...) as pool")
        return self._pool

    async def invoke(self, event: object, **options: Unpack[TimedCallOptions]) -> Any:  # noqa: ANN401 - any JSON value
        """Call the function with an event; see `WarmPool.invoke` and `WarmPool.invoke_async`."""
        return await self.pool.invoke_async(event, **options)

    async def map(
        self,
        events: Iterable[object] | AsyncIterable[object],
        **options: Unpack[TimedCallOptions],
    ) -> AsyncIterator[Any]:
        """Yield the answers to `events`, in their order; events are taken as calls can be made.

        As many are under way at a time as the pool may have environments. What a call raises is
        raised in its place; then, and when the iterator is closed, those under way are cancelled.
        """
        most = self.pool.max_environments
        calls: deque[asyncio.Task[Any]] = deque()
        try:
            async for event in _each(events):
                calls.append(asyncio.ensure_future(self.invoke(event, **options)))
                if len(calls) >= most:
                    yield await calls.popleft()
            while calls:
                yield await calls.popleft()
        finally:
            for task in calls:
                task.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    def acquire(
        self, *, timeout: float | None = None
    ) -> AbstractAsyncContextManager[ExecutionEnvironment]:
        """Lease an environment for an async with statement; see `WarmPool.acquire_async`."""
        return self.pool.acquire_async(timeout=timeout)

    async def function(
        self,
        source: Function | FunctionVersion,
        **settings: Any,  # noqa: ANN401
    ) -> PoolFunction:
        """Have the pool serve another function; see `WarmPool.function`.

        What it returns is called with `PoolFunction.invoke_async`.
        """
        return await asyncio.to_thread(self.pool.function, source, **settings)

    async def publish(self, source: Function | FunctionVersion) -> FunctionVersion:
        """Let the next call run another version; see `WarmPool.publish`."""
        return await asyncio.to_thread(self.pool.publish, source)

    def stats(self) -> PoolStats:
        """Return the numbers of one moment; see `WarmPool.stats`."""
        return self.pool.stats()

    def snapshot(self) -> PoolSnapshot:
        """Return what the pool has at this moment; see `WarmPool.snapshot`."""
        return self.pool.snapshot()

    async def close(self, *, drain: bool = True) -> None:
        """End the pool; see `WarmPool.close`."""
        if self._pool is not None:
            await asyncio.to_thread(self._pool.close, drain=drain)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        making = _Making(functools.partial(WarmPool, self._source, **self._settings))
        try:
            await loop.run_in_executor(None, making.run)
        except BaseException:
            loop.run_in_executor(None, making.abandon)  # waits for what is under way
            raise
        self._pool = making.pool
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self.close(drain=kind is None)


async def _each(events: Iterable[object] | AsyncIterable[object]) -> AsyncIterator[object]:
    if isinstance(events, AsyncIterable):
        async for event in events:
            yield event
    else:
        for event in events:
            yield event


class _Making:
    """A pool made in a thread, which cannot be stopped when nobody wants the pool any more."""

    def __init__(self, make: Callable[[], WarmPool]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._is_unwanted = False
        self.pool: WarmPool | None = None

    def run(self) -> None:
        with self._lock:
            if not self._is_unwanted:
                self.pool = self._make()

    def abandon(self) -> None:
        with self._lock:
            self._is_unwanted = True
            if self.pool is not None:
                self.pool.close(drain=False)
