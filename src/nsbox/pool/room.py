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
from nsbox.pool.entries import E, Entry, Grant, Phase, W
from nsbox.pool.events import Counters, Retirement
from nsbox.pool.shares import Places, Resolve, Share


class Room(Generic[E, W]):
    """The entries of a pool, its functions, and their places; with the lock for them all."""

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
        self._entries: set[Entry[E, W]] = set()
        self._shares: list[Share[E, W]] = []
        self._shared = Places[E, W](most)
        self._parts = [self._shared]

    # -- functions -----------------------------------------------------------------------------

    def add(
        self, resolve: Resolve[W], *, reserved: int | None, provisioned: int, optional: bool = False
    ) -> tuple[Share[E, W], list[Entry[E, W]]]:
        """Return the share of another function, and idle ones of others that are to be closed.

        Args:
            resolve: See `Share`.
            reserved: Places that it has for itself, and no others; None: it shares the rest.
            provisioned: Environments to be kept ready.
            optional: It may be left without a place.

        Raises:
            ConfigError: There are no such places, or not that much memory.
        """
        with self._lock:
            places = self._shared if reserved is None else Places[E, W](reserved)
            share = Share(resolve, places, provisioned, self._clock, is_optional=optional)
            if reserved is not None and provisioned > reserved:
                raise ConfigError(
                    f"provisioned: {provisioned} is more than the {reserved} that are reserved"
                )
            self._check_room([*self._shares, share])
            if self._is_closed:
                raise PoolClosed("the pool is closed")
            self._shares.append(share)
            places.shares.append(share)
            if reserved is not None:
                self._parts.append(places)
                self._shared.most -= reserved
                places.aside = reserved * self._weigh(resolve(None)[1])
            surplus = self._shared.taken - self._shared.most
            return share, self._retire_idle(self._shared.on_demand()[: max(0, surplus)])

    def remove(self, share: Share[E, W]) -> list[Entry[E, W]]:
        """Take out a function that nobody calls any more; return idle ones to close."""
        with self._lock:
            self._shares.remove(share)
            if share.places is not self._shared:
                self._parts.remove(share.places)
                self._shared.most += share.places.most
            else:
                self._shared.shares.remove(share)
            return self._retire_idle(list(share.idle_ones()), Retirement.CLOSE)

    def _check_room(self, shares: list[Share[E, W]], change: Resolve[W] | None = None) -> None:
        """Raise ConfigError unless each function gets what it is promised, and a place at least.

        `change` is what the last of `shares` is to be.
        """
        reserved = kept = kept_memory = reserved_memory = least = least_memory = 0
        for share in shares:
            resolve = change if change is not None and share is shares[-1] else share.resolve
            memory = self._weigh(resolve(None)[1])
            if share.places is not self._shared:
                reserved += share.places.most
                reserved_memory += share.places.most * memory
            elif share.provisioned:
                kept += share.provisioned
                kept_memory += share.provisioned * memory
            elif not share.is_optional:
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

    def publish(self, share: Share[E, W], resolve: Resolve[W]) -> list[Entry[E, W]]:
        """Give new calls, and those that wait, another version; return idle ones to close.

        Raises:
            ConfigError: There is not that much memory.
        """
        with self._lock:
            if resolve(None)[0] == share.resolve(None)[0]:
                share.resolve = resolve
                return []
            others = [other for other in self._shares if other is not share]
            self._check_room([*others, share], resolve)
            share.resolve = resolve
            if share.places is not self._shared:
                share.places.aside = share.places.most * self._weigh(resolve(None)[1])
            share.generation += 1
            share.breaker.reset()
            return self._retire_idle(list(share.idle_ones()), Retirement.VERSION)

    def provision(self, share: Share[E, W], count: int) -> list[Entry[E, W]]:
        """Set how many of a function's are kept ready; return idle ones to close.

        Raises:
            ConfigError: There are not as many places, or not that much memory.
        """
        with self._lock:
            before, share.provisioned = share.provisioned, count
            try:
                if share.places is not self._shared and count > share.places.most:
                    raise ConfigError(f"provisioned: {count} is more than are reserved")
                self._check_room(self._shares)
            except ConfigError:
                share.provisioned = before
                raise
            ready = [entry for entry in self._entries if entry.share is share]
            ready = [
                entry
                for entry in ready
                if entry.is_provisioned and entry.phase is not Phase.RETIRED
            ]
            # Idle ones go first; one that is in a call is from now on one of those on demand.
            ready.sort(key=lambda entry: entry.phase is Phase.IDLE)
            surplus = ready[count:]
            for entry in surplus:
                entry.is_provisioned = False
            idle = [entry for entry in surplus if entry.phase is Phase.IDLE]
            return self._retire_idle(idle, Retirement.PROVISIONED)

    def stats(self, share: Share[E, W] | None = None) -> dict[str, float]:
        """Return the numbers of one moment, of one function or of all."""
        with self._lock:
            shares = self._shares if share is None else [share]
            counters = Counters()
            for each in shares:
                counters.add(each.counters)
            entries = [entry for entry in self._entries if share in (None, entry.share)]
            phases = [entry.phase for entry in entries]
            return {
                **counters.as_dict(),
                "ConcurrentExecutions": sum(
                    entry.serves and entry.phase is Phase.LEASED for entry in entries
                ),
                "Environments": len(phases),
                "Idle": phases.count(Phase.IDLE),
                "Waiting": sum(len(each.waiters) for each in shares),
            }

    # -- room ----------------------------------------------------------------------------------

    def _may_have_one(self, share: Share[E, W], what: W) -> bool:
        """Whether there can be an environment of it at all: `_check_room` has not seen to that."""
        aside = sum(part.aside for part in self._parts if part is not share.places)
        is_light = (
            not share.is_optional
            or self._memory_budget is None
            or self._weigh(what) <= self._memory_budget - aside
        )
        return share.places.most > 0 and is_light

    def _find_room(
        self, share: Share[E, W], memory: int, reason: Retirement
    ) -> list[Entry[E, W]] | None:
        """Return which idle ones have to go for a birth, or None if there is no room anyhow."""
        places = share.places
        over = 1 + max(places.taken - places.most, len(self._entries) - self._most)
        lacking = memory - self._memory_left(places)
        victims: list[Entry[E, W]] = []
        if over <= 0 and lacking <= 0:
            return victims
        idle = places.on_demand()
        if reason is Retirement.DEMAND:
            # For a call even those that are kept ready for its own function.
            idle += sorted((e for e in share.idle_ones() if e.is_provisioned), key=coldness)
        for entry in idle:
            victims.append(entry)
            over, lacking = over - 1, lacking - entry.memory
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
        share: Share[E, W],
        key: Hashable,
        what: W,
        victims: list[Entry[E, W]],
        reason: Retirement,
    ) -> Grant[E, W]:
        for victim in victims:
            self._take_out(victim, reason)
            self._forget(victim)
        self._tokens += 1
        memory = self._weigh(what)
        entry = Entry[E, W](share, key, what, memory, self._tokens, self._clock())
        entry.serves = reason is Retirement.DEMAND
        self._entries.add(entry)
        share.taken += 1
        share.places.taken += 1
        share.places.memory += memory
        share.breaker.begin(entry)
        return Grant(entry, is_birth=True, victims=tuple(victims))

    def _forget(self, entry: Entry[E, W]) -> None:
        """Free the place of an environment."""
        if entry in self._entries:
            self._entries.remove(entry)
            entry.share.taken -= 1
            entry.share.places.taken -= 1
            entry.share.places.memory -= entry.memory

    def _take_out(self, entry: Entry[E, W], reason: Retirement) -> None:
        """Retire an idle one."""
        entry.share.remove_idle(entry)
        entry.phase, entry.reason = Phase.RETIRED, reason

    def _retire_idle(
        self, idle: list[Entry[E, W]], reason: Retirement = Retirement.DEMAND
    ) -> list[Entry[E, W]]:
        for entry in idle:
            self._take_out(entry, reason)
        return idle


def coldness(entry: Entry[E, W]) -> float:
    """Return what idle ones are sorted by, so that the coldest comes first."""
    return entry.idle_since
