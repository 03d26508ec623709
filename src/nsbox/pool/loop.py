# SPDX-License-Identifier: Apache-2.0
"""Calls through a pool on a running asyncio loop; only a birth takes a thread."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from nsbox.environment import ExecutionEnvironment
from nsbox.pool.desk import Desk
from nsbox.pool.entries import Waiter
from nsbox.pool.house import PoolGrant, Source, env_of


class LoopWaiter(Waiter[ExecutionEnvironment, Source]):
    """A call that waits on a loop."""

    __slots__ = ("_loop", "future")

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

    def __init__(self, calls: PoolCalls, grant: PoolGrant, loop: asyncio.AbstractEventLoop) -> None:
        self._calls = calls
        self._grant = grant
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
        timeout: float | None = None,  # noqa: ASYNC109 - the handler's, as that of `invoke`
        tenant: str | None = None,
    ) -> Any:  # noqa: ANN401 - any JSON value
        """Do as `invoke` on the running asyncio loop; a thread is started for a birth only.

        A cancelled call leaves the queue, or its environment is killed.
        """
        grant = await self._take_on_loop(tenant)
        try:
            answer = await env_of(grant).invoke_async(event, timeout=timeout)
        except BaseException as error:
            self._fail(grant, error)
            raise
        self._finish(grant, None)
        return answer

    async def _take_on_loop(self, tenant: str | None) -> PoolGrant:
        self._check_usable(is_function=True)
        loop = asyncio.get_running_loop()
        seconds = self._acquire_timeout
        deadline = None if seconds is None else loop.time() + seconds
        is_counted = False
        while True:
            waiter = LoopWaiter(tenant, loop)
            grant = self._leases.ask(waiter, self._share, again=is_counted)
            if grant is None:
                grant = await self._wait_on_loop(waiter, deadline)
            is_counted = True
            if grant.is_birth:
                await _Birth(self, grant, loop).wait()
                return grant
            if not self._is_dead(grant):
                return grant

    async def _wait_on_loop(self, waiter: LoopWaiter, deadline: float | None) -> PoolGrant:
        loop = asyncio.get_running_loop()
        timer = None if deadline is None else loop.call_at(deadline, _finish, waiter.future)
        try:
            await waiter.future
        except BaseException:
            grant = self._leases.withdraw(waiter)
            if grant is not None:
                # Closing its victims, if any, waits for nothing.
                self._drop(grant)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        grant = self._leases.withdraw(waiter)
        if waiter.error is not None:
            raise waiter.error
        if grant is None:
            raise self._timed_out()
        return grant
