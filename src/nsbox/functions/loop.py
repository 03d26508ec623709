# SPDX-License-Identifier: Apache-2.0
"""Steps on a running asyncio loop: readers and writers, one timer, and threads for what takes long.

The loop itself waits for no guest, and the threads are none of its own executor's: that is the host
program's, and a few guests would hold all of it.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from nsbox.functions.exchange import Step, Steps, Wait, poll_failure

_T = TypeVar("_T")


async def aside(work: Callable[..., _T], *args: object) -> _T:
    """Return what `work` returns, in a thread of its own."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def finish(value: Any, error: BaseException | None) -> None:  # noqa: ANN401
        if future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    _start(loop, lambda: work(*args), finish)
    return await future


def _start(
    loop: asyncio.AbstractEventLoop,
    work: Callable[[], Any],
    finish: Callable[[Any, BaseException | None], object],
) -> None:
    """Have `finish` called on the loop with what `work` returns or raises in a thread."""

    def run() -> None:
        told: tuple[Any, BaseException | None]
        try:
            told = work(), None
        except BaseException as error:  # noqa: BLE001 - handed to who waits
            told = None, error
        with suppress(RuntimeError):  # it is closed
            loop.call_soon_threadsafe(finish, *told)
        del told  # an error has this frame

    try:
        threading.Thread(target=run, name="nsbox-aside", daemon=True).start()
    except RuntimeError:
        if not sys.is_finalizing():
            raise
        run()  # no thread is started any more


class LoopDriver:
    """Takes the steps of one session's calls on one loop, for as long as both are used together.

    Readers stay between calls: adding and removing them would cost more than the rest. So does the
    timer, which looks for the deadline that holds when it fires.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, kill: Callable[[str], object]) -> None:
        """`kill` ends the environment of a call that is cancelled."""
        self.loop = loop
        self._kill = kill
        self._steps: Steps[Any] | None = None  # until they are over
        self._future: asyncio.Future[Any] | None = None
        self._wait: Wait | None = None
        self._watched: set[int] = set()
        self._brief: Wait | None = None  # one whose descriptors are watched no longer than needed
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    async def run(self, steps: Steps[_T]) -> _T:
        """Take all steps and return what they come to; a call that is cancelled is killed."""
        if self._steps is not None:
            return await LoopDriver(self.loop, self._kill).run(steps)  # it is refused
        self._steps = steps
        future = self._future = self.loop.create_future()
        try:
            self._go_on(steps.send, None)
            return await future  # type: ignore[no-any-return]
        except BaseException as error:
            if future.done() and not future.cancelled():
                future.exception()  # it is raised already
            if self._steps is steps:  # they are not over: cancelled, or the environment is closed
                self.forget()
                self._steps = self._wait = None
                if isinstance(error, asyncio.CancelledError):
                    self._kill("an invocation was cancelled")
                steps.throw(error)
            raise
        finally:
            self._future = None
            del future  # an error has this frame

    def _go_on(self, advance: Callable[[Any], Step], value: Any) -> None:  # noqa: ANN401
        future = self._future
        if self._brief is not None:
            self._end_brief(self._brief)
        self._wait = None
        try:
            step = advance(value)
        except StopIteration as end:
            self._steps = None
            if future is not None and not future.done():
                future.set_result(end.value)
            return
        except BaseException as error:
            self._steps = value = None  # an error has this frame
            if future is not None and not future.done():
                future.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        if type(step) is Wait:
            self._wait = step
            if not step.is_lasting or not step.fds <= self._watched:
                self._watch(step)
            if self._timer is None or step.deadline < self._timer_at:
                self._set_timer(step.deadline)
        else:
            steps = self._steps
            _start(self.loop, step, lambda *told: self._on_done(steps, *told))  # type: ignore[arg-type]

    def _on_done(self, steps: object, value: Any, error: BaseException | None) -> None:  # noqa: ANN401
        if self._steps is steps and self._steps is not None and self._is_awaited:
            if error is None:
                self._go_on(self._steps.send, value)
            else:
                self._go_on(self._steps.throw, error)

    @property
    def _is_awaited(self) -> bool:
        return self._future is not None and not self._future.done()

    # -- descriptors ---------------------------------------------------------------------------

    def _watch(self, wait: Wait) -> None:
        if not wait.is_lasting:
            self._brief = wait
            if wait.write >= 0:
                self.loop.add_writer(wait.write, self._on_ready, wait.write)
        for fd in wait.fds - self._watched:
            self._watched.add(fd)
            self.loop.add_reader(fd, self._on_ready, fd)

    def _end_brief(self, wait: Wait) -> None:
        self._brief = None
        if wait.write >= 0:
            self.loop.remove_writer(wait.write)
        self.unwatch(wait.fds)

    def unwatch(self, fds: Iterable[int]) -> None:
        """Remove descriptors from the loop's readers, before they are closed."""
        for fd in self._watched.intersection(fds):
            self._watched.discard(fd)
            self.loop.remove_reader(fd)

    def forget(self) -> None:
        """Remove all readers."""
        if self._brief is not None:
            self._end_brief(self._brief)
        self.unwatch(self._watched)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Remove all readers, and fail a call that waits: its environment is closed."""
        self.forget()
        if self._future is not None and not self._future.done():
            self._future.set_exception(ValueError("the environment was closed"))

    def _on_ready(self, fd: int) -> None:
        wait, steps, future = self._wait, self._steps, self._future
        if wait is None or steps is None or future is None or future.done():
            self.unwatch((fd,))  # no call is under way: the next one reads it
        elif fd not in wait.fds and fd != wait.write:
            self.unwatch((fd,))
        else:
            try:
                ready = wait.poll.poll(0)  # all there is, as a thread sees it
            except OSError as error:
                self._go_on(steps.throw, poll_failure(error))
            else:
                if ready:
                    self._go_on(steps.send, ready)

    # -- the deadline --------------------------------------------------------------------------

    def _set_timer(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self.loop.call_later(deadline - time.monotonic(), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        wait, steps = self._wait, self._steps
        if wait is None or steps is None or not self._is_awaited:
            return
        if wait.deadline > time.monotonic():
            self._set_timer(wait.deadline)
        else:
            self._go_on(steps.send, [])
