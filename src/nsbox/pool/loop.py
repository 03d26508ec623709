# SPDX-License-Identifier: Apache-2.0
"""Calls through a pool on a running asyncio loop; only a birth takes a thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from typing import Any, Unpack

from nsbox.environment.environment import ExecutionEnvironment
from nsbox.functions.credentials import Credentials, Provider, resolve_async
from nsbox.functions.request import PoolOptions, Request, encode_event
from nsbox.pool.accounts import Waiter
from nsbox.pool.desk import Desk
from nsbox.pool.judgement import Source
from nsbox.pool.manager import PoolLease, env_of


class LoopWaiter(Waiter[ExecutionEnvironment, Source]):
    """A call that waits on a loop."""

    def __init__(self, tenant: str | None, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(tenant)
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
        loop.call_soon_threadsafe(_finish, future)
    except RuntimeError:
        return False  # it is closed
    return True


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _Birth:
    """A birth in a thread, for a task that may be cancelled before it is over."""

    def __init__(self, calls: PoolCalls, lease: PoolLease, loop: asyncio.AbstractEventLoop) -> None:
        self._calls = calls
        self._grant = lease
        self._loop = loop
        self._future: asyncio.Future[None] = loop.create_future()
        self._lock = threading.Lock()
        self._is_born = self._is_unwanted = False
        self._error: BaseException | None = None

    async def wait(self) -> None:
        try:
            threading.Thread(target=self._run, name="nsbox-pool-birth", daemon=True).start()
        except BaseException:
            self._calls._drop(self._grant)
            raise
        try:
            await self._future
        except BaseException:
            with self._lock:
                self._is_unwanted = True
                is_born = self._is_born
            if is_born:
                self._calls._drop(self._grant)
            raise
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._calls._give_birth(self._grant)
        except BaseException as error:  # noqa: BLE001 - handed to the task
            self._error = error
            _wake(self._loop, self._future)
            return
        with self._lock:
            is_unwanted = self._is_unwanted
            if not is_unwanted:
                self._is_born = True
                is_unwanted = not _wake(self._loop, self._future)
        if is_unwanted:
            self._calls._drop(self._grant)


class PoolCalls(Desk):
    """The asynchronous methods of a `WarmPool`."""

    async def invoke_async(
        self,
        event: object,
        *,
        tenant: str | None = None,
        credentials: Credentials | Provider | None = None,
        role: str | None = None,
        **options: Unpack[PoolOptions],
    ) -> Any:  # noqa: ANN401 - any JSON value
        """Do as `invoke` on the running asyncio loop.

        Threads are started for births, and for files and providers of credentials. A cancelled call
        leaves the queue, or its environment is killed.
        """
        payload = encode_event(event)
        found = await resolve_async(self._provider(credentials), self._role(role))
        request = Request(payload, found, **options)
        self._check_usable(is_function=True)
        begin = time.monotonic()
        lease = self._scheduler.take_idle(self._queue, tenant)
        is_again = lease is not None
        while True:
            if lease is None or self._looks_dead(lease):
                lease = await self._take_on_loop(
                    tenant, self._acquire_timeout, begin, again=is_again
                )
            try:
                answer = (await env_of(lease).call_async(request)).json()
            except BaseException as error:
                if not self._fail(lease, error):
                    raise
            else:
                if not self._keep_idle(lease):
                    self._finish(lease, None)
                return answer
            lease, is_again = None, True

    @contextlib.asynccontextmanager
    async def acquire_async(
        self,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - of the wait, as that of `acquire`
    ) -> AsyncIterator[ExecutionEnvironment]:
        """Do as `acquire`, for an async with statement; what comes after it is done in a thread.

        The environment's own methods wait: `await asyncio.to_thread(env.run, argv)`.
        """
        self._check_usable(is_function=False)
        lease = await self._take_on_loop(None, self._patience(timeout), time.monotonic())
        try:
            yield env_of(lease)
        except BaseException as error:
            await asyncio.to_thread(self._finish, lease, error)
            raise
        await asyncio.to_thread(self._finish, lease, None)

    async def _take_on_loop(
        self, tenant: str | None, seconds: float | None, begin: float, *, again: bool = False
    ) -> PoolLease:
        """Do as `WarmPool._take`, on the running loop."""
        loop = asyncio.get_running_loop()
        left = None if seconds is None else max(0.0, begin + seconds - time.monotonic())
        deadline = None if left is None else loop.time() + left
        while True:
            waiter = LoopWaiter(tenant, loop)
            lease = self._scheduler.ask(waiter, self._queue, again=again)
            if lease is None:
                await self._wait_on_loop(waiter, deadline)
                lease = self._leave_queue(waiter, seconds)
            again = True
            if lease.is_birth:
                await _Birth(self, lease, loop).wait()
                return lease
            if not self._looks_dead(lease):
                return lease

    async def _wait_on_loop(self, waiter: LoopWaiter, deadline: float | None) -> None:
        loop = asyncio.get_running_loop()
        timer = None if deadline is None else loop.call_at(deadline, _finish, waiter.future)
        try:
            await waiter.future
        except BaseException:
            # Closing its victims, if any, waits for nothing.
            self._drop(self._scheduler.withdraw(waiter))
            raise
        finally:
            if timer is not None:
                timer.cancel()
