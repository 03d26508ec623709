# SPDX-License-Identifier: Apache-2.0
"""The one thread of a pool that keeps house: it sees deaths at once, and when time is over."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

_log: Final = logging.getLogger("nsbox.pool")
_EXIT_DEADLINE: Final = 5.0
_AFTER_ERROR: Final = 1.0  # seconds until it looks again


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


class Watch:
    """Waits on descriptors that become readable when something ends, and on time."""

    def __init__(self, on_ready: Callable[[int], None], on_time: Callable[[], float]) -> None:
        """`on_time` does what is due, and returns in how many seconds it is to be called again."""
        self._on_ready = on_ready
        self._on_time = on_time
        self._epoll = select.epoll() if hasattr(select, "epoll") else _CooperativeEpoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._triggers: set[int] = set()
        self._is_over = False
        self._lock = threading.Lock()  # no number is used once its descriptor is closed
        self._thread = threading.Thread(target=self._run, name="nsbox-pool", daemon=True)
        self._thread.start()

    def add(self, fd: int) -> None:
        """Watch a descriptor until it has been readable once."""
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLONESHOT)

    def add_trigger(self, fd: int) -> None:
        """Watch a descriptor for exceptional conditions, as often as there are some (poll(2))."""
        self._triggers.add(fd)
        self._epoll.register(fd, select.EPOLLPRI)

    def discard(self, fd: int) -> None:
        """Watch it no more."""
        with self._lock:
            if not self._epoll.closed:
                with contextlib.suppress(OSError):  # it has been closed
                    self._epoll.unregister(fd)

    def ring(self) -> None:
        """Have `on_time` called now."""
        with self._lock:
            if not self._epoll.closed:
                os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """End the thread, when every descriptor has been discarded."""
        self._is_over = True
        self.ring()
        if threading.current_thread() is not self._thread:
            self._thread.join(_EXIT_DEADLINE)
        with self._lock:
            if not self._thread.is_alive() and not self._epoll.closed:
                self._epoll.close()
                os.close(self._bell)

    def _run(self) -> None:
        while not self._is_over:
            try:
                # A timeout of weeks does not fit into the kernel's int.
                seconds = min(self._on_time(), 86_400.0)
            except Exception:  # noqa: BLE001 - a pool must not lose the thread that sees deaths
                _log.exception("a pool could not do what was due")
                seconds = _AFTER_ERROR
            for fd, events in self._epoll.poll(max(seconds, 0.001)):
                if fd == self._bell:
                    os.eventfd_read(fd)
                elif events & select.EPOLLERR and fd in self._triggers:
                    self._epoll.unregister(fd)  # the cgroup that it was of is gone
                elif not self._is_over:
                    self._end(fd)

    def _end(self, fd: int) -> None:
        try:
            self._on_ready(fd)
        except Exception:  # noqa: BLE001 - as above
            _log.exception("a pool could not see to an environment that has ended")
