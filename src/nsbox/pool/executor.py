# SPDX-License-Identifier: Apache-2.0
"""The threads behind `WarmPool.submit`: started when needed, kept while there is work.

They are daemons: those of concurrent.futures would hold up the end of the interpreter until the
last call has ended.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final

from nsbox.errors import PoolClosed

NO_THREAD: Final = "can't start new thread"
"""What Thread.start says where there can be no more (thread_PyThread_start_new_thread)."""
_IDLE_SECONDS: Final = 5.0
_JOIN_SECONDS: Final = 5.0


class CallExecutor:
    """A queue of calls, and up to `most` threads that make them in their order."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._queue: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._is_closed = False

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Have `call` made, and return a future of what it returns.

        Raises:
            PoolClosed: `close` was called.
            RuntimeError: There is no thread yet, and this process can have none.
        """
        job = future, _ = Future[Any](), call
        try:
            with self._lock:
                if self._is_closed:
                    raise PoolClosed("the pool is closed")
                self._queue.append(job)
                self._have_it_made()
            return future
        except BaseException:
            # Nobody has the future: no thread could be had, or this was interrupted.
            future.cancel()
            with suppress(ValueError):
                self._queue.remove(job)
            raise

    def _have_it_made(self) -> None:
        if self._idle >= len(self._queue):
            self._changed.notify()
        elif len(self._threads) < self.most:
            thread = threading.Thread(target=self._run, name="nsbox-pool-call", daemon=True)
            try:
                self._threads.add(thread)
                thread.start()
            except BaseException as error:
                # One that was interrupted may have started all the same, and says so itself.
                self._threads.discard(thread)
                if not self._threads or str(error) != NO_THREAD:
                    raise

    def refuse(self, *, cancel: bool) -> None:
        """Take no more; with `cancel`, cancel what is queued."""
        for future in self._stop(drop=cancel):
            future.cancel()
            future.set_running_or_notify_cancel()  # tell who waits for it

    def close(self, *, drain: bool) -> None:
        """Take no more; wait for what is queued, or let it fail."""
        for future in self._stop(drop=not drain):
            if future.set_running_or_notify_cancel():
                future.set_exception(PoolClosed("the pool was closed while the call waited"))
        if drain:
            self.join(None)

    def _stop(self, *, drop: bool) -> list[Future[Any]]:
        with self._lock:
            self._is_closed = True
            dropped: list[Future[Any]] = []
            if drop:
                dropped = [future for future, _ in self._queue]
                self._queue.clear()
            self._changed.notify_all()
        return dropped

    def join(self, seconds: float | None = _JOIN_SECONDS) -> None:
        """Wait until the threads have ended, `seconds` for each at most; their calls have."""
        with self._lock:
            threads = [t for t in self._threads if t is not threading.current_thread()]
        for thread in threads:
            thread.join(seconds)

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        with self._lock:
            self._idle += 1
            self._changed.wait_for(lambda: self._queue or self._is_closed, _IDLE_SECONDS)
            self._idle -= 1
            if self._queue:
                return self._queue.popleft()
            self._threads.discard(threading.current_thread())
            return None

    def _run(self) -> None:
        with self._lock:
            self._threads.add(threading.current_thread())
        while (job := self._next()) is not None:
            future, call = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                answer = call()
            except BaseException as error:  # noqa: BLE001 - handed to who waits
                future.set_exception(error)
            else:
                future.set_result(answer)
            # Neither is to be kept alive by a thread that waits for the next.
            del job, future, call
