# SPDX-License-Identifier: Apache-2.0
"""How healthy environments end: SIGTERM, time to end by themselves, then the end."""

from __future__ import annotations

import math
import time
from _socket import socket as Socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from nsbox.environment.environment import ask_to_end
from nsbox.errors import NsboxError
from nsbox.supervisor.connection import await_farewell

if TYPE_CHECKING:
    from nsbox.pool.manager import PoolSlot


class Close(Protocol):
    """Closes a retired environment and frees its place."""

    def __call__(self, slot: PoolSlot, *, wait: bool = False) -> None:
        """With `wait`, raise CleanupError when something could not be removed."""


class Endings:
    """Environments on their way out. Their places are taken until they are closed."""

    def __init__(self, grace: float, close: Close, await_frost: Callable[[], None]) -> None:
        """Take what the manager does.

        Args:
            grace: Seconds that one has; 0: none.
            close: Closes one.
            await_frost: Waits until what is just being frozen stands still.
        """
        self._grace = grace
        self._close = close
        self._await_frost = await_frost
        self._is_hasty = False
        self._asked: deque[tuple[PoolSlot, Socket, float]] = deque()
        # What is in it is the watching thread's alone: no descriptor is closed under it.
        self._leaving: dict[int, tuple[PoolSlot, Socket, float]] = {}

    def begin(self, slot: PoolSlot) -> bool:
        """Ask one to end; False when there is nothing to wait for. The thread does the rest."""
        farewell = self._ask(slot)
        if farewell is None:
            return False
        self._asked.append((slot, farewell, time.monotonic() + self._grace))
        return True

    def arrivals(self) -> list[int]:
        """Return descriptors of those asked since the last time: `end` them when readable."""
        arrivals = []
        while self._asked:
            slot, farewell, deadline = self._asked.popleft()
            self._leaving[farewell.fileno()] = (slot, farewell, deadline)
            arrivals.append(farewell.fileno())
        return arrivals

    def _ask(self, slot: PoolSlot) -> Socket | None:
        if slot.env is None or not self._grace:
            return None
        if slot.is_cold:
            self._await_frost()
        return ask_to_end(slot.env)

    def is_leaving(self, fd: int) -> bool:
        """Whether it is the descriptor of one."""
        return fd in self._leaving

    def end(self, fd: int) -> None:
        """Close the one of this descriptor, and that."""
        slot, farewell, _ = self._leaving.pop(fd)
        farewell.close()
        self._close(slot)

    def deadlines(self) -> list[tuple[int, float]]:
        """Return the descriptor of each, and how many seconds it has left."""
        now = math.inf if self._is_hasty else time.monotonic()
        return [(fd, deadline - now) for fd, (_, _, deadline) in self._leaving.items()]

    def hasten(self) -> None:
        """Give them no more time."""
        self._is_hasty = True

    def see_out(
        self, slots: Sequence[PoolSlot], *, wait: bool = False, is_hasty: bool = False
    ) -> Exception | None:
        """Ask all of `slots` to end, wait until they have or their time is over, close them.

        Args:
            slots: Which.
            wait: Return only when nothing is left of them.
            is_hasty: Do not ask.

        Returns what could not be removed, if anything.
        """
        failure: Exception | None = None
        farewells = [None if is_hasty else self._ask(slot) for slot in slots]
        deadline = time.monotonic() + self._grace
        for slot, farewell in zip(slots, farewells, strict=True):
            await_farewell(farewell, max(0.0, deadline - time.monotonic()))
            try:
                self._close(slot, wait=wait)
            except NsboxError as error:
                failure = failure or error
        return failure
