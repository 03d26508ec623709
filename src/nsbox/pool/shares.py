# SPDX-License-Identifier: Apache-2.0
"""What each function of a pool has: its places, its queue, its idle environments, its numbers."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from typing import Final, Generic

from nsbox.errors import Throttled
from nsbox.pool.accounts import E, Phase, Slot, W, Waiter
from nsbox.pool.events import Counters

Resolve = Callable[[str | None], tuple[Hashable, W]]
"""From a tenant to the key of its environments, and what they are made of."""

FAILURES_MAX: Final = 3
"""Starts that fail in a row before a function's are stopped for a while."""
PAUSE_MIN: Final = 1.0
PAUSE_MAX: Final = 30.0


class Breaker:
    """Stops the births of a function whose environments do not start."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures = 0
        self._last = ""
        self._paused_until = 0.0
        self._trial: object = None

    def pause(self) -> float:
        """Return for how long no environment may be started."""
        if self._failures < FAILURES_MAX:
            return 0.0
        left = self._paused_until - self._clock()
        # One at a time is tried after the pause.
        return max(left, PAUSE_MIN) if self._trial is not None else left

    def refusal(self) -> Throttled:
        """Return what to raise during a pause."""
        return Throttled(
            f"the last {self._failures} starts of an environment failed: {self._last}",
            reason="start failures",
            retry_after=self.pause(),
        )

    def begin(self, slot: object) -> None:
        """Note a start."""
        if self._failures >= FAILURES_MAX:
            self._trial = slot

    def end(self, slot: object) -> None:
        """Note that a start is over, or was given up."""
        if self._trial is slot:
            self._trial = None

    def fail(self, error: BaseException) -> None:
        """Note that a start has failed."""
        self._failures += 1
        self._last = f"{type(error).__name__}: {error}"
        pause = PAUSE_MIN * 2.0 ** min(max(0, self._failures - FAILURES_MAX), 16)
        self._paused_until = self._clock() + min(pause, PAUSE_MAX)

    def reset(self) -> None:
        """Forget the failures."""
        self._failures, self._trial = 0, None


class Places(Generic[E, W]):
    """The places of a function that has some reserved, or those that all others share.

    Attributes:
        most: How many there are.
        aside: Bytes of memory that are set aside with them.
        taken: Environments in them, births counted.
        memory: Bytes of memory that those may use.
        waiters: Calls that wait for one.
        queues: Whose they are.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.aside = self.taken = self.memory = self.waiters = 0
        self.queues: list[FunctionQueue[E, W]] = []

    def waiting(self) -> list[FunctionQueue[E, W]]:
        """Return those for whom calls wait, in their turn.

        It is the turn of who has the fewest places, and then of who has waited longest.
        """
        waiting = [queue for queue in self.queues if queue.waiters]
        if len(waiting) > 1:
            waiting.sort(key=lambda queue: (queue.taken, queue.first.turn))
        return waiting

    def idle(self) -> Iterator[Slot[E, W]]:
        """Yield the idle ones."""
        for queue in self.queues:
            yield from queue.idle_ones()

    def on_demand(self) -> list[Slot[E, W]]:
        """Return the idle ones that need not be kept ready, the coldest first."""
        idle = [slot for slot in self.idle() if not slot.is_provisioned]
        return sorted(idle, key=lambda slot: slot.idle_since)


class FunctionQueue(Generic[E, W]):
    """What a pool has of one function.

    Attributes:
        resolve: From a tenant to the key of its environments, and what they are made of.
        places: Where its environments have their places.
        is_optional: Whether it may be left without a place.
        provisioned: How many environments are to be kept ready.
        is_open: Whether the thread that keeps manager sees to those; before, who makes it does.
        generation: Grows with each version that is published.
        taken: Its environments, births counted.
        idle: Its idle environments by key, the one used last at the end.
        waiters: Its calls that wait, in their order.
    """

    def __init__(
        self,
        resolve: Resolve[W],
        places: Places[E, W],
        provisioned: int,
        clock: Callable[[], float],
        *,
        is_optional: bool,
    ) -> None:
        self.resolve = resolve
        self.places = places
        self.is_optional = is_optional
        self.is_open = False
        self.provisioned = provisioned
        self.generation = self.taken = 0
        self.idle: dict[Hashable, deque[Slot[E, W]]] = {}
        self.waiters: OrderedDict[Waiter[E, W], None] = OrderedDict()
        self.breaker = Breaker(clock)
        self.counters = Counters()

    @property
    def first(self) -> Waiter[E, W]:
        """The call that has waited longest."""
        return next(iter(self.waiters))

    def put_waiter(self, waiter: Waiter[E, W]) -> None:
        """Let a call wait."""
        self.waiters[waiter] = None
        self.places.waiters += 1

    def remove_waiter(self, waiter: Waiter[E, W]) -> bool:
        """Let a call wait no more; False when it did not."""
        if waiter not in self.waiters:
            return False
        del self.waiters[waiter]
        self.places.waiters -= 1
        return True

    def put_idle(self, slot: Slot[E, W]) -> None:
        """Keep an environment for the next call."""
        slot.phase = Phase.IDLE
        stack = self.idle.get(slot.key)
        if stack is None:
            stack = self.idle[slot.key] = deque()
        stack.append(slot)

    def idle_ones(self) -> Iterator[Slot[E, W]]:
        """Yield its idle ones."""
        for stack in self.idle.values():
            yield from stack

    def take_idle(self, key: Hashable, *, only_ready: bool = False) -> Slot[E, W] | None:
        """Return the idle one of `key` that was used last, or None; or only a provisioned one."""
        stack = self.idle.get(key)
        if not stack:
            return None
        if not only_ready:
            slot = stack.pop()
            if not stack:
                del self.idle[key]
            return slot
        for slot in reversed(stack):
            if slot.is_provisioned:
                self.remove_idle(slot)
                return slot
        return None

    def remove_idle(self, slot: Slot[E, W]) -> None:
        """Take an idle one out."""
        stack = self.idle[slot.key]
        stack.remove(slot)
        if not stack:
            del self.idle[slot.key]
