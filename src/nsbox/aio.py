# SPDX-License-Identifier: Apache-2.0
"""Invocations on a running asyncio loop: its readers and one future each, and no thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nsbox.invoker import Invoker
from nsbox.worker import Call, Frame, WorkerEnded, WorkerSilent


class LoopCalls:
    """Watches one invoker's descriptors on one loop, for as long as both are used together.

    The readers stay between invocations: adding and removing them would cost more than the rest.
    """

    def __init__(self, invoker: Invoker, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._invoker = invoker
        self._call: Call | None = None
        self.last: Call | None = None
        self._future: asyncio.Future[Frame] | None = None
        self._watched: set[int] = set()
        self._watches_all = False

    async def exchange(self, begin: Callable[[], Call]) -> tuple[Call, Frame]:
        """Send what `begin` sends; return it with the answer.

        Raises:
            As `Invoker.exchange`; `asyncio.CancelledError` after the environment was killed.
        """
        self.last = None
        call = self._call = self.last = begin()
        if not self._watches_all:
            self._watch()
        future = self._future = self.loop.create_future()
        timer = self.loop.call_later(call.timeout, self._on_timeout)
        try:
            frame = await future
        except asyncio.CancelledError:
            self._invoker.kill("an invocation was cancelled")
            self.forget()
            raise
        except (WorkerSilent, WorkerEnded) as error:
            raise self._invoker.judge(call, error) from None
        finally:
            timer.cancel()
            self._call = self._future = None
        self._invoker.drain_logs(call)
        return call, frame

    def _watch(self) -> None:
        for fd in self._invoker.descriptors():
            if fd not in self._watched:
                self._watched.add(fd)
                self.loop.add_reader(fd, self._on_readable, fd)
        self._watches_all = True

    def forget(self) -> None:
        """Watch nothing any more."""
        for fd in list(self._watched):
            self.loop.remove_reader(fd)
        self._watched.clear()
        self._watches_all = False

    def close(self) -> None:
        """Watch nothing any more, and tell who waits on this thread: its environment is closed."""
        self.forget()
        if self._future is not None and not self._future.done():
            self._future.set_exception(ConnectionError("the environment was closed"))

    def _on_readable(self, fd: int) -> None:
        call, future = self._call, self._future
        if call is None or future is None or future.done():
            # Nobody waits: it stays where it is, for the next call to see.
            self.loop.remove_reader(fd)
            self._watched.discard(fd)
            self._watches_all = False
            return
        worker = self._invoker.worker
        if worker is None:
            return
        try:
            answer = worker.advance(call, [fd])
        except Exception as error:  # noqa: BLE001 - handed to who waits
            self.forget()
            future.set_exception(error)
            return
        if answer is not None:
            future.set_result(answer)
        elif fd not in worker.descriptors():
            self.loop.remove_reader(fd)
            self._watched.discard(fd)

    def _on_timeout(self) -> None:
        if self._call is not None and self._future is not None and not self._future.done():
            self.forget()
            self._future.set_exception(WorkerSilent())
