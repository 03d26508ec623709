# SPDX-License-Identifier: Apache-2.0
"""Which environments a pool has, and whether there is room for another.

There are `most` places. A function with reserved ones has those for itself; the rest is shared.
With a memory budget the memory of reserved places is set aside with them, so that what is promised
to one function never depends on others. An idle environment may be closed to make room: the coldest
of the same places first, one that is kept ready only for its own function's calls.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from typing import Generic

from nsbox.errors import ConfigError, PoolClosed
from nsbox.pool.accounts import E, Lease, Phase, Slot, W
from nsbox.pool.events import Counters, Retirement
from nsbox.pool.shares import FunctionQueue, Places, Resolve


class Room(Generic[E, W]):
    """The slots of a pool, its functions, and their places; with the lock for them all."""

    def __init__(
        self,
        most: int,
        memory_budget: int | None,
        weigh: Callable[[W], int],
        clock: Callable[[], float],
    ) -> None:
        """`weigh` tells the bytes of memory that an environment may use."""
        self._most = most
        self._memory_budget = memory_budget
        self._weigh = weigh
        self._clock = clock
        self._lock = threading.Lock()
        self._is_closed = False
        self._tokens = 0
        self._slots: set[Slot[E, W]] = set()
        self._queues: list[FunctionQueue[E, W]] = []
        self._shared = Places[E, W](most)
        self._parts = [self._shared]

    # -- functions -----------------------------------------------------------------------------

    def add(
        self, resolve: Resolve[W], *, reserved: int | None, provisioned: int, optional: bool = False
    ) -> tuple[FunctionQueue[E, W], list[Slot[E, W]]]:
        """Return the queue of another function, and idle ones of others that are to be closed.

        Args:
            resolve: See `FunctionQueue`.
            reserved: Places that it has for itself, and no others; None: it queues the rest.
            provisioned: Environments to be kept ready.
            optional: It may be left without a place.

        Raises:
            ConfigError: There are no such places, or not that much memory.
        """
        with self._lock:
            places = self._shared if reserved is None else Places[E, W](reserved)
            queue = FunctionQueue(resolve, places, provisioned, self._clock, is_optional=optional)
            if reserved is not None and provisioned > reserved:
                raise ConfigError(
                    f"provisioned: {provisioned} is more than the {reserved} that are reserved"
                )
            self._check_room([*self._queues, queue])
            if self._is_closed:
                raise PoolClosed("the pool is closed")
            self._queues.append(queue)
            places.queues.append(queue)
            if reserved is not None:
                self._parts.append(places)
                self._shared.most -= reserved
                places.aside = reserved * self._weigh(resolve(None)[1])
            surplus = self._shared.taken - self._shared.most
            return queue, self._retire_idle(self._shared.on_demand()[: max(0, surplus)])

    def remove(self, queue: FunctionQueue[E, W]) -> list[Slot[E, W]]:
        """Take out a function that nobody calls any more; return idle ones to close."""
        with self._lock:
            self._queues.remove(queue)
            if queue.places is not self._shared:
                self._parts.remove(queue.places)
                self._shared.most += queue.places.most
            else:
                self._shared.queues.remove(queue)
            return self._retire_idle(list(queue.idle_ones()), Retirement.CLOSE)

    def _check_room(
        self, queues: list[FunctionQueue[E, W]], change: Resolve[W] | None = None
    ) -> None:
        """Raise ConfigError unless each function gets what it is promised, and a place at least.

        `change` is what the last of `queues` is to be.
        """
        reserved = kept = kept_memory = reserved_memory = least = least_memory = 0
        for queue in queues:
            resolve = change if change is not None and queue is queues[-1] else queue.resolve
            memory = self._weigh(resolve(None)[1])
            if queue.places is not self._shared:
                reserved += queue.places.most
                reserved_memory += queue.places.most * memory
            elif queue.provisioned:
                kept += queue.provisioned
                kept_memory += queue.provisioned * memory
            elif not queue.is_optional:
                least, least_memory = 1, max(least_memory, memory)
        need = reserved + kept + least
        if need > self._most:
            raise ConfigError(
                f"max_environments: {self._most} are too few for {reserved} reserved, {kept} "
                f"provisioned and {least} for functions that have neither; give at least {need}"
            )
        need = reserved_memory + kept_memory + least_memory
        if self._memory_budget is not None and need > self._memory_budget:
            raise ConfigError(
                f"memory_budget: {self._memory_budget} bytes are too few for the memory limits of "
                f"what is reserved, provisioned and least needed; give at least {need}, or lower "
                "limits"
            )

    def publish(self, queue: FunctionQueue[E, W], resolve: Resolve[W]) -> list[Slot[E, W]]:
        """Give new calls, and those that wait, another version; return idle ones to close.

        Raises:
            ConfigError: There is not that much memory.
        """
        with self._lock:
            if resolve(None)[0] == queue.resolve(None)[0]:
                queue.resolve = resolve
                return []
            others = [other for other in self._queues if other is not queue]
            self._check_room([*others, queue], resolve)
            queue.resolve = resolve
            if queue.places is not self._shared:
                queue.places.aside = queue.places.most * self._weigh(resolve(None)[1])
            queue.generation += 1
            queue.breaker.reset()
            return self._retire_idle(list(queue.idle_ones()), Retirement.VERSION)

    def provision(self, queue: FunctionQueue[E, W], count: int) -> list[Slot[E, W]]:
        """Set how many of a function's are kept ready; return idle ones to close.

        Raises:
            ConfigError: There are not as many places, or not that much memory.
        """
        with self._lock:
            before, queue.provisioned = queue.provisioned, count
            try:
                if queue.places is not self._shared and count > queue.places.most:
                    raise ConfigError(f"provisioned: {count} is more than are reserved")
                self._check_room(self._queues)
            except ConfigError:
                queue.provisioned = before
                raise
            ready = [slot for slot in self._slots if slot.queue is queue]
            ready = [
                slot for slot in ready if slot.is_provisioned and slot.phase is not Phase.RETIRED
            ]
            # Idle ones go first; one that is in a call is from now on one of those on demand.
            ready.sort(key=lambda slot: slot.phase is Phase.IDLE)
            surplus = ready[count:]
            for slot in surplus:
                slot.is_provisioned = False
            idle = [slot for slot in surplus if slot.phase is Phase.IDLE]
            return self._retire_idle(idle, Retirement.PROVISIONED)

    def stats(self, queue: FunctionQueue[E, W] | None = None) -> dict[str, float]:
        """Return the numbers of one moment, of one function or of all."""
        with self._lock:
            queues = self._queues if queue is None else [queue]
            counters = Counters()
            for each in queues:
                counters.add(each.counters)
            slots = [slot for slot in self._slots if queue in (None, slot.queue)]
            phases = [slot.phase for slot in slots]
            return {
                **counters.as_dict(),
                "ConcurrentExecutions": sum(
                    slot.serves and slot.phase is Phase.LEASED for slot in slots
                ),
                "Environments": len(phases),
                "Idle": phases.count(Phase.IDLE),
                "Waiting": sum(len(each.waiters) for each in queues),
            }

    # -- room ----------------------------------------------------------------------------------

    def _may_have_one(self, queue: FunctionQueue[E, W], what: W) -> bool:
        """Whether there can be an environment of it at all: `_check_room` has not seen to that."""
        aside = sum(part.aside for part in self._parts if part is not queue.places)
        is_light = (
            not queue.is_optional
            or self._memory_budget is None
            or self._weigh(what) <= self._memory_budget - aside
        )
        return queue.places.most > 0 and is_light

    def _find_room(
        self, queue: FunctionQueue[E, W], memory: int, reason: Retirement
    ) -> list[Slot[E, W]] | None:
        """Return which idle ones have to go for a birth, or None if there is no room anyhow."""
        places = queue.places
        over = 1 + max(places.taken - places.most, len(self._slots) - self._most)
        lacking = memory - self._memory_left(places)
        victims: list[Slot[E, W]] = []
        if over <= 0 and lacking <= 0:
            return victims
        idle = places.on_demand()
        if reason is Retirement.DEMAND:
            # For a call even those that are kept ready for its own function.
            idle += sorted((e for e in queue.idle_ones() if e.is_provisioned), key=coldness)
        for slot in idle:
            victims.append(slot)
            over, lacking = over - 1, lacking - slot.memory
            if over <= 0 and lacking <= 0:
                return victims
        return None

    def _memory_left(self, places: Places[E, W]) -> float:
        if self._memory_budget is None:
            return math.inf
        others = sum(max(part.memory, part.aside) for part in self._parts if part is not places)
        return self._memory_budget - others - places.memory

    def _reserve(
        self,
        queue: FunctionQueue[E, W],
        key: Hashable,
        what: W,
        victims: list[Slot[E, W]],
        reason: Retirement,
    ) -> Lease[E, W]:
        for victim in victims:
            self._take_out(victim, reason)
            self._forget(victim)
        self._tokens += 1
        memory = self._weigh(what)
        slot = Slot[E, W](queue, key, what, memory, self._tokens, self._clock())
        slot.serves = reason is Retirement.DEMAND
        self._slots.add(slot)
        queue.taken += 1
        queue.places.taken += 1
        queue.places.memory += memory
        queue.breaker.begin(slot)
        return Lease(slot, is_birth=True, victims=tuple(victims))

    def _forget(self, slot: Slot[E, W]) -> None:
        """Free the place of an environment."""
        if slot in self._slots:
            self._slots.remove(slot)
            slot.queue.taken -= 1
            slot.queue.places.taken -= 1
            slot.queue.places.memory -= slot.memory

    def _take_out(self, slot: Slot[E, W], reason: Retirement) -> None:
        """Retire an idle one."""
        slot.queue.remove_idle(slot)
        slot.phase, slot.reason = Phase.RETIRED, reason

    def _retire_idle(
        self, idle: list[Slot[E, W]], reason: Retirement = Retirement.DEMAND
    ) -> list[Slot[E, W]]:
        for slot in idle:
            self._take_out(slot, reason)
        return idle


def coldness(slot: Slot[E, W]) -> float:
    """Return what idle ones are sorted by, so that the coldest comes first."""
    return slot.idle_since
