# SPDX-License-Identifier: Apache-2.0
"""Invocations on a running asyncio loop: its readers and one future each.

A thread waits where a guest decides how long that takes and no reader can tell: for room in the
socket of an event, and for what is told of the end of a worker or an environment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nsbox.functions.call import Call, Frame, WorkerEnded, WorkerOver, WorkerSilent
from nsbox.functions.left_running import Sweep
from nsbox.functions.session import Invoker
from nsbox.supervisor.channel import ANSWER_DEADLINE


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
        self._has_own = invoker.resets  # each event has a socket of its own

    async def await_reset(self) -> None:
        """Wait until the reset after the last event is over; PID 1 has its time for that."""
        fd = self._invoker.reset_descriptor()
        if fd >= 0:
            await self._await_readable(fd)

    async def sweep(self, call: Call, sweep: Sweep) -> None:
        """Do as `Sweep.run`."""
        channel = sweep.begin(call, self._invoker.worker)
        if channel is None:
            return
        try:
            await self._await_readable(channel.socket.fileno())
        except BaseException:
            channel.socket.close()
            raise
        if channel.has_answer():
            sweep.finish(call, channel)
        else:
            await asyncio.to_thread(sweep.finish, call, channel)  # it is gone, or does not answer

    async def _await_readable(self, fd: int) -> None:
        """Wait for a word of PID 1, or as long as it may take."""
        future = self.loop.create_future()
        self.loop.add_reader(fd, _finish, future)
        # Its end closes the channel, which is readable then.
        timer = self.loop.call_later(ANSWER_DEADLINE, self._invoker.kill, "PID 1 did not answer")
        try:
            await future
        except asyncio.CancelledError:
            self._invoker.kill("an invocation was cancelled")
            raise
        finally:
            timer.cancel()
            self.loop.remove_reader(fd)

    async def exchange(self, begin: Callable[[], Call]) -> tuple[Call, Frame]:
        """Send what `begin` sends; return it with the answer.

        What the socket does not take at once a thread sends: a worker may be slow to read it, or
        not read it at all.

        Raises:
            As `Invoker.exchange`; `asyncio.CancelledError` after the environment was killed.
        """
        self.last = None
        try:
            call = self.last = begin()
            if call.rest is not None:
                await asyncio.to_thread(self._invoker.send_rest, call)
        except asyncio.CancelledError:
            self._invoker.kill("an invocation was cancelled")
            self.forget()
            raise
        self._call = call
        if self._has_own or not self._watches_all:
            self._watch()
        future = self._future = self.loop.create_future()
        timer = self.loop.call_later(call.timeout, self._on_timeout)
        try:
            frame = await future
        except asyncio.CancelledError:
            self._invoker.kill("an invocation was cancelled")
            self.forget()
            raise
        except WorkerOver:
            raise await _in_thread(self._judge_end, call) from None
        except WorkerSilent as error:
            raise await _in_thread(self._invoker.judge, call, error) from None
        finally:
            timer.cancel()
            self._call = self._future = None
            if self._has_own:
                self._unwatch_event()
        self._invoker.drain_logs(call)
        return call, frame

    def _judge_end(self, call: Call) -> Exception:
        worker = self._invoker.worker
        error = WorkerSilent() if worker is None else worker.end_of(call)
        if isinstance(error, WorkerEnded | WorkerSilent):
            return self._invoker.judge(call, error)
        return error

    def _unwatch_event(self) -> None:
        """Let go of an event's own socket and pipes before they are closed."""
        for fd in self._invoker.event_descriptors():
            self.loop.remove_reader(fd)
            self._watched.discard(fd)

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


async def _in_thread(judge: Callable[..., Exception], *args: object) -> Exception:
    """Return what is concluded, which may take a while."""
    try:
        future = asyncio.get_running_loop().run_in_executor(None, judge, *args)
    except RuntimeError:  # the interpreter ends, and starts no thread any more
        return judge(*args)
    return await future


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
