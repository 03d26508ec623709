# SPDX-License-Identifier: Apache-2.0
"""The maintenance thread of a pool: it waits on descriptors, and runs tasks when they are due."""

from __future__ import annotations

import logging
import math
import os
import select
import sys
import threading
import time
from _socket import socket as Socket
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Generic

from nsbox.errors import NsboxError, PoolClosed
from nsbox.functions.deployment import kind_of
from nsbox.functions.function import FunctionVersion
from nsbox.launcher.messages import Spec
from nsbox.launcher.protocol import STANDBY_LIFE
from nsbox.linux.descriptors import as_file
from nsbox.pool import pressure
from nsbox.pool.accounts import E, Lease, Slot
from nsbox.pool.pressure import Pressure
from nsbox.pool.scheduler import Scheduler
from nsbox.supervisor import standby
from nsbox.supervisor.launcher import Launcher
from nsbox.values.config import Config

Source = FunctionVersion | Config
"""What the environments of a pool are made of."""

_log: Final = logging.getLogger("nsbox.pool")
_EXIT_DEADLINE: Final = 5.0
_AFTER_ERROR: Final = 1.0  # seconds until a task that raised is run again
_RING: Final = (1).to_bytes(8, sys.byteorder)  # what adds 1 to an eventfd
_FREEZES_AT_ONCE: Final = 8  # a millisecond or two each, and deaths are to be seen meanwhile
_WISH_SECONDS: Final = STANDBY_LIFE / 3
_REFILL_AGAIN: Final = 0.2  # seconds until a thread for a birth is asked for again


class Task:
    """A piece of periodic work. `work` is run by the maintenance thread alone."""

    def __init__(self) -> None:
        self._next = math.inf
        self._is_requested = True

    def request(self) -> None:
        """Have it run when the thread wakes up; from any thread."""
        self._is_requested = True

    def due(self) -> float:
        """Return in how many seconds it is to run; 0 or less: now."""
        return 0.0 if self._is_requested else self._next - time.monotonic()

    def run(self) -> None:
        """Run it, and note when it is due again."""
        self._is_requested = False  # before it looks: a request meanwhile is another one
        self._next = time.monotonic() + _AFTER_ERROR
        self._next = time.monotonic() + self.work()

    def work(self) -> float:
        """Do what is due; return in how many seconds to do so again, or math.inf."""
        raise NotImplementedError


class ExpireIdle(Task, Generic[E]):
    """Retires idle environments whose time is over, and freezes those that idle for long.

    After each run `refill` is due: what it needs may be there now.
    """

    def __init__(
        self,
        scheduler: Scheduler[E, Source],
        retire: Callable[[Slot[E, Source]], object],
        freeze: Callable[[Slot[E, Source]], object],
        drop: Callable[[Lease[E, Source]], object],
        refill: Task,
    ) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._retire = retire
        self._freeze = freeze
        self._drop = drop
        self._refill = refill

    def work(self) -> float:
        """See `Task.work`."""
        self._refill.request()
        due = self._scheduler.sweep()
        for slot in due.over:
            self._retire(slot)
        for lease in due.orphans:
            self._drop(lease)
        for slot in due.cold[:_FREEZES_AT_ONCE]:
            self._freeze(slot)
        return 0.0 if len(due.cold) > _FREEZES_AT_ONCE else due.seconds


class RelieveMemory(Task, Generic[E]):
    """Retires idle environments when memory is short."""

    def __init__(
        self,
        scheduler: Scheduler[E, Source],
        memory: Pressure,
        retire_all: Callable[[Sequence[Slot[E, Source]]], object],
    ) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._memory = memory
        self._retire_all = retire_all

    def due(self) -> float:
        """Return when to look; while the pool has no idle environment, not at all."""
        rests = self._scheduler.wants_sweep and not self._scheduler.has_idle
        return math.inf if rests else super().due()

    def work(self) -> float:
        """See `Task.work`."""
        if self._memory.is_low():
            self._retire_all(self._scheduler.relieve())
        return pressure.LOOK_SECONDS

    def on_alarm(self) -> None:
        """Look now: the kernel has told that tasks wait for memory."""
        if self._memory.is_alarming():
            self._retire_all(self._scheduler.relieve())


class KeepStandby(Task, Generic[E]):
    """Says again and again which standby environments the pool wants, or the launcher ends them."""

    def __init__(self, scheduler: Scheduler[E, Source], owner: object, count: int) -> None:
        """`count` of each kind, on behalf of `owner`."""
        super().__init__()
        self._scheduler = scheduler
        self._owner = owner
        self._count = count

    def work(self) -> float:
        """See `Task.work`."""
        try:
            by_launcher: dict[Launcher, list[Spec]] = {}
            for launcher, spec in map(kind_of, self._scheduler.sources()):
                specs = by_launcher.setdefault(launcher, [])
                if spec is not None:
                    specs.append(spec)
            for launcher, specs in by_launcher.items():
                standby.wish(self._owner, launcher, specs, self._count)
        except (NsboxError, OSError) as error:
            # Environments that are needed will say so, too.
            _log.debug("no standby environments: %s", error)
        return _WISH_SECONDS


class GracefulExits(Task, Generic[E]):
    """Healthy environments on their way out: SIGTERM, time to end by themselves, then the end.

    Their slots are taken until they are closed.
    """

    def __init__(
        self,
        grace: float,
        ask: Callable[[Slot[E, Source]], Socket | None],
        close: Callable[[Slot[E, Source]], object],
        watch: Callable[[int, object, Callable[[], object]], object],
        unwatch: Callable[[int, object], object],
    ) -> None:
        """Take what the manager does.

        Args:
            grace: Seconds that one has.
            ask: Sends SIGTERM; returns what is readable when nothing runs any more, if anything.
            close: Closes one.
            watch: As `Maintenance.watch`.
            unwatch: As `Maintenance.unwatch`.
        """
        super().__init__()
        self._grace = grace
        self._ask = ask
        self._close = close
        self._watch = watch
        self._unwatch = unwatch
        self._is_hurried = False
        self._asked: deque[tuple[Slot[E, Source], Socket, float]] = deque()
        # The maintenance thread's alone: no descriptor is closed under it.
        self._leaving: dict[Slot[E, Source], tuple[Socket, float]] = {}

    def begin(self, slot: Slot[E, Source]) -> bool:
        """Ask one to end, from any thread; False when there is nothing to wait for."""
        exit_notice = self._ask(slot)
        if exit_notice is None:
            return False
        self._asked.append((slot, exit_notice, time.monotonic() + self._grace))
        self.request()
        return True

    def hurry(self) -> None:
        """Give them no more time."""
        self._is_hurried = True
        self.request()

    def work(self) -> float:
        """See `Task.work`."""
        while self._asked:
            slot, exit_notice, deadline = self._asked.popleft()
            self._leaving[slot] = exit_notice, deadline
            self._watch(exit_notice.fileno(), slot, lambda slot=slot: self._end(slot))  # type: ignore[misc]
        now = math.inf if self._is_hurried else time.monotonic()
        for slot in [slot for slot, (_, end) in self._leaving.items() if end <= now]:
            self._end(slot)
        return min((end - now for _, end in self._leaving.values()), default=math.inf)

    def _end(self, slot: Slot[E, Source]) -> None:
        exit_notice, _ = self._leaving.pop(slot)
        self._unwatch(exit_notice.fileno(), slot)
        exit_notice.close()
        self._close(slot)


class Refill(Task, Generic[E]):
    """Has provisioned environments born that are missing, in a thread of their own, one by one.

    A birth may take long, and deaths are to be seen meanwhile.
    """

    def __init__(
        self,
        scheduler: Scheduler[E, Source],
        start: Callable[[Lease[E, Source]], object],
        drop: Callable[[Lease[E, Source]], object],
        wake: Callable[[], object],
    ) -> None:
        """Take what the manager does.

        Args:
            scheduler: Knows which are missing.
            start: Has the environment of a lease born, and gives the lease back.
            drop: Gives back a lease of which nothing came.
            wake: Wakes the maintenance thread, to look for more.
        """
        super().__init__()
        self._scheduler = scheduler
        self._start = start
        self._drop = drop
        self._wake = wake
        self._thread: threading.Thread | None = None
        self._is_filling = self._is_stopped = False
        self._warned: object = None

    def due(self) -> float:
        """Return when to look for one that is missing; not while one is being born."""
        return math.inf if self._is_filling or self._is_stopped else super().due()

    def work(self) -> float:
        """See `Task.work`."""
        lease = self._scheduler.reserve()
        if lease is None:
            return math.inf
        thread = threading.Thread(
            target=self._fill, args=(lease,), name="nsbox-pool-fill", daemon=True
        )
        self._is_filling = True
        try:
            thread.start()
        except RuntimeError as error:  # "can't start new thread"
            self._is_filling = False
            self._warn(error)
            self._scheduler.failed(lease, error)
            self._drop(lease)
            return _REFILL_AGAIN
        self._thread = thread
        return math.inf

    def _fill(self, lease: Lease[E, Source] | None) -> None:
        try:
            while lease is not None:
                self._start(lease)
                self._warned = None
                lease = None if self._is_stopped else self._scheduler.reserve()
        except (NsboxError, OSError) as error:
            if not isinstance(error, PoolClosed):  # else nobody needs it any more
                self._warn(error)
        finally:
            self._is_filling = False  # another may begin while this one ends
            self.request()
            self._wake()

    def _warn(self, error: Exception) -> None:
        """Warn once of starts that fail, until one succeeds. Text keeps no frames alive."""
        before, self._warned = self._warned, (type(error), getattr(error, "error_type", ""))
        if before != self._warned:
            _log.warning("an environment to be kept ready does not start: %s", str(error))

    def stop(self, seconds: float) -> None:
        """Begin no more; wait at most `seconds` for the one that is being born."""
        self._is_stopped = True
        thread = self._thread
        if thread is not None:
            thread.join(seconds)


class _CooperativeEpoll:
    """Stands in for `select.epoll` in a program from which gevent has taken it.

    What waits is select.poll, which gevent has in its own way: the real one's poll() would hold up
    all greenlets. But that looks into the epoll descriptor, and a look takes the event of a PSI
    trigger away (psi_trigger_poll, kernel/sched/psi.c): pressure is seen by the pool's own looks.
    """

    def __init__(self) -> None:
        self._real = sys.modules["gevent.monkey"].get_original("select", "epoll")()
        self._waiter = select.poll()
        self._waiter.register(self._real, select.POLLIN)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._real, name)

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        """Wait at most `timeout` seconds."""
        self._waiter.poll(timeout * 1000)
        return self._real.poll(0)  # type: ignore[no-any-return]


class Maintenance:
    """The thread: it calls handlers of descriptors that are readable, and runs due tasks."""

    def __init__(self) -> None:
        self._tasks: tuple[Task, ...] = ()
        self._epoll = select.epoll() if hasattr(select, "epoll") else _CooperativeEpoll()
        self._bell = as_file(os.eventfd, 0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._handlers: dict[int, tuple[object, Callable[[], object]]] = {}
        self._triggers: dict[int, Callable[[], object]] = {}
        self._is_over = False
        # No number is used once its descriptor is closed. Reentrant: a lease may be found to be
        # lost, and the thread be woken, wherever memory is given back.
        self._lock = threading.RLock()
        self._thread = threading.Thread(target=self._run, name="nsbox-pool", daemon=True)

    def start(self, tasks: Iterable[Task], triggers: Mapping[int, Callable[[], object]]) -> None:
        """Start the thread.

        Args:
            tasks: Run in this order when they are due.
            triggers: Called for each exceptional condition of their descriptor (poll(2)).

        Raises:
            RuntimeError: This process can have no more threads. Then, and after an interrupt,
                `close` it.
        """
        self._tasks = tuple(tasks)
        self._triggers = dict(triggers)
        for fd in triggers:
            self._epoll.register(fd, select.EPOLLPRI)
        self._thread.start()

    def watch(
        self,
        fd: int,
        owner: object,
        handler: Callable[[], object],
        *,
        events: int = select.EPOLLIN,
    ) -> None:
        """Have `handler` called, once, when `fd` is readable; without `events`, at its hang-up."""
        with self._lock:
            self._epoll.register(fd, events | select.EPOLLONESHOT)
            self._handlers[fd] = owner, handler

    def unwatch(self, fd: int, owner: object) -> None:
        """Watch it no more, unless its number is another owner's by now."""
        with self._lock:
            if self._handlers.get(fd, (None, None))[0] is owner:
                del self._handlers[fd]
                try:
                    self._epoll.unregister(fd)
                except (OSError, ValueError):
                    return  # the descriptor, or all of this, has been closed

    def wake(self) -> None:
        """Have the thread look now at which tasks are due; under any lock of the pool's."""
        with self._lock:
            if not self._bell.closed:
                self._bell.write(_RING)

    def close(self) -> None:
        """End the thread, when every descriptor has been unwatched."""
        self._is_over = True
        self.wake()
        # Not one that has not begun: it ends by itself then.
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(_EXIT_DEADLINE)
        with self._lock:
            if not self._thread.is_alive():
                self._epoll.close()
                self._bell.close()

    def dispatch(self, fd: int) -> None:
        """Call the handler of a descriptor that the kernel has told of."""
        handler = self._triggers.get(fd) or self._handlers.get(fd, (None, None))[1]
        if handler is not None:
            _try(handler, "handler of a descriptor")

    def _run(self) -> None:
        while not self._is_over:
            for task in self._tasks:
                if task.due() <= 0:
                    _try(task.run, type(task).__name__)
            # A timeout of weeks does not fit into the kernel's int.
            seconds = min([86_400.0, *(task.due() for task in self._tasks)])
            for fd, events in self._epoll.poll(max(seconds, 0.001)):
                if fd == self._bell.fileno():
                    self._bell.read(len(_RING))
                elif events & select.EPOLLERR and fd in self._triggers:
                    self._epoll.unregister(fd)  # the cgroup that it was of is gone
                elif not self._is_over:
                    self.dispatch(fd)


def _try(work: Callable[[], object], what: str) -> None:
    try:
        work()
    except Exception:  # noqa: BLE001 - a pool must not lose the thread that sees deaths
        _log.exception("a pool's maintenance: %s failed", what)
