# SPDX-License-Identifier: Apache-2.0
"""The slots of a pool and what is counted of them, so kept that no interrupt loses a place.

An interrupt (a KeyboardInterrupt, whatever a signal's handler raises) comes where Python calls
something or jumps back (CHECK_EVAL_BREAKER, Python/ceval.c), and nowhere else:

- Who has a slot is a weak reference to its lease, which the call has made before. When the last
  reference to that is gone and the slot was not given back, it is lost, and is retired.
- A method that is interrupted leaves each slot's own fields true, as each is one store; what is
  counted of them is counted anew by whoever takes the lock next.
- What a call that raises has by its lease is ended by `Scheduler.abandon`, wherever that was.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Concatenate, Final, Generic, ParamSpec, TypeVar

from nsbox.errors import NsboxError
from nsbox.pool.accounts import (
    E,
    FunctionQueue,
    Lease,
    Phase,
    Places,
    Resolve,
    Retired,
    Slot,
    W,
    Waiter,
    check_promises,
    coldness,
)
from nsbox.pool.events import Retirement

_LOOK_SECONDS: Final = 1.0  # between looks for what is lost, while an end is waited for

_P = ParamSpec("_P")
_T = TypeVar("_T")
_S = TypeVar("_S", bound="Ledger[Any, Any]")


def locked(method: Callable[Concatenate[_S, _P], _T]) -> Callable[Concatenate[_S, _P], _T]:
    """Have a method take the lock, and note when it was not gone through to its end."""

    @functools.wraps(method)
    def whole(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with self._lock:
            if self._is_torn:
                self._mend()
            try:
                return method(self, *args, **kwargs)
            except NsboxError:
                raise  # it has changed nothing by half
            except BaseException:
                self._is_torn = True
                raise

    return whole


class Ledger(Generic[E, W]):
    """The state of a `Scheduler`, its steps, and where there is room for a birth."""

    def __init__(
        self,
        most: int,
        memory_budget: int | None,
        weigh: Callable[[W], int],
        clock: Callable[[], float],
        on_lost: Callable[[], object],
    ) -> None:
        """See `Scheduler`."""
        self._most = most
        self._memory_budget = memory_budget
        self._weigh = weigh
        self._clock = clock
        self._tell_lost = on_lost
        self._lock = threading.Lock()
        self._is_torn = False  # a method was interrupted: nothing counted is to be believed
        self._has_lost = False  # there may be slots that nobody has
        self._lost: Retired[E, W] = Retired()  # those that were, to be closed
        self._closers: list[threading.Lock] = []  # who waits for the end
        self._is_killed = False
        self._tokens = 0
        self._orphans: list[Lease[E, W]] = []
        self._slots: set[Slot[E, W]] = set()
        self._queues: list[FunctionQueue[E, W]] = []
        self._shared = Places[E, W](most)
        self._parts = [self._shared]

    def await_empty(self, seconds: float) -> bool:
        """Wait until every environment is closed; False when it takes too long.

        For as long as that takes while calls are let end; `seconds` at most once they are killed.
        """
        turn = threading.Lock()
        turn.acquire()
        self._closers.append(turn)
        try:
            deadline = math.inf
            while not self._is_empty():
                now = self._clock()
                if self._is_killed:
                    deadline = min(deadline, now + seconds)
                if deadline <= now:
                    return False
                turn.acquire(timeout=min(deadline - now, _LOOK_SECONDS))
            return True
        finally:
            self._closers.remove(turn)

    @locked
    def _is_empty(self) -> bool:
        self._retire_lost()
        return not self._slots

    def _tell_closers(self) -> None:
        for turn in list(self._closers):
            if turn.locked():
                turn.release()

    @locked
    def pass_on(self, lease: Lease[E, W], other: Lease[E, W]) -> None:
        """Let `other` be the lease of the slot: who has the first has nothing any more."""
        holder = weakref.ref(other, self._on_lost)
        slot = other.slot = lease.slot
        other.token = lease.token
        other.is_birth, other.is_cold = lease.is_birth, lease.is_cold
        slot.holder = holder

    # -- steps; the lock is held ------------------------------------------------------------------

    def _hold(self, lease: Lease[E, W], slot: Slot[E, W]) -> None:
        holder = weakref.ref(lease, self._on_lost)
        lease.slot = slot
        slot.holder = holder
        slot.token = lease.token = self._tokens = self._tokens + 1

    def _wake(self, waiter: Waiter[E, W]) -> None:
        """Tell a call that waits what it has got; it is in the queue until it was told."""
        if not waiter.wake() and waiter.lease is not None:
            # Its loop is closed: `sweep` has the lease, and the caller has not.
            self._orphans.append(waiter.lease)
            waiter.lease = None
        waiter.queue.remove_waiter(waiter)

    def _reserve(
        self,
        lease: Lease[E, W],
        queue: FunctionQueue[E, W],
        key: Hashable,
        what: W,
        memory: int,
        victims: list[Slot[E, W]],
        reason: Retirement,
    ) -> Lease[E, W]:
        slot: Slot[E, W] = Slot(queue, key, what, memory, self._clock())
        slot.victims = tuple(victims)  # whoever has it has them, too
        slot.serves = reason is Retirement.DEMAND
        self._hold(lease, slot)
        lease.is_birth, lease.is_cold = True, False
        self._slots.add(slot)
        for victim in victims:
            self._take_out(victim, reason, slot.holder)
            self._forget(victim)
        queue.taken += 1
        queue.places.taken += 1
        queue.places.memory += memory
        queue.breaker.begin(slot)
        return lease

    def _forget(self, slot: Slot[E, W]) -> None:
        """Free the place of an environment."""
        if slot in self._slots:
            self._slots.remove(slot)
            slot.queue.taken -= 1
            slot.queue.places.taken -= 1
            slot.queue.places.memory -= slot.memory

    def _take_out(
        self, slot: Slot[E, W], reason: Retirement, holder: weakref.ref[Any] | None
    ) -> None:
        """Retire an idle one, for `holder` to close."""
        slot.holder = holder
        slot.phase, slot.reason = Phase.RETIRED, reason
        slot.queue.remove_idle(slot)

    def _retire_idle(
        self, idle: list[Slot[E, W]], reason: Retirement = Retirement.DEMAND
    ) -> Retired[E, W]:
        retired = Retired(idle)
        holder = weakref.ref(retired, self._on_lost)
        for slot in idle:
            self._take_out(slot, reason, holder)
        return retired

    # -- places --------------------------------------------------------------------------------

    def _check_room(
        self, queues: list[FunctionQueue[E, W]], change: Resolve[W] | None = None
    ) -> None:
        """Raise ConfigError unless each function gets what it is promised, and a place at least.

        `change` is what the last of `queues` is to be.
        """
        weighed = []
        for queue in queues:
            resolve = change if change is not None and queue is queues[-1] else queue.resolve
            weighed.append((queue, self._weigh(resolve(None)[1])))
        check_promises(weighed, self._shared, self._most, self._memory_budget)

    def _may_have_one(self, queue: FunctionQueue[E, W], what: W) -> bool:
        """Whether there can be an environment of it at all: `_check_room` has not seen to that."""
        if not queue.is_optional or self._memory_budget is None:
            return queue.places.most > 0
        aside = sum(part.aside for part in self._parts if part is not queue.places)
        return queue.places.most > 0 and self._weigh(what) <= self._memory_budget - aside

    def _kept_ready(self, queue: FunctionQueue[E, W]) -> list[Slot[E, W]]:
        """Return the provisioned ones of a function, births counted."""
        return [
            slot
            for slot in self._slots
            if slot.queue is queue and slot.is_provisioned and slot.phase is not Phase.RETIRED
        ]

    def _find_room(
        self, queue: FunctionQueue[E, W], memory: int, reason: Retirement
    ) -> list[Slot[E, W]] | None:
        """Return which idle ones have to go for a birth, or None if there is no room anyhow."""
        places = queue.places
        over = 1 + max(places.taken - places.most, len(self._slots) - self._most)
        lacking = 0
        if self._memory_budget is not None:
            others = sum(max(part.memory, part.aside) for part in self._parts if part is not places)
            lacking = memory + others + places.memory - self._memory_budget
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

    # -- what an interrupt leaves --------------------------------------------------------------

    def _on_lost(self, _holder: object) -> None:
        """Note that a holder is no more; from wherever its last reference was, in any state."""
        self._has_lost = True
        self._tell_lost()

    def _retire_lost(self) -> None:
        """Retire what nobody has."""
        if self._has_lost:
            self._has_lost = False
            for slot in [slot for slot in self._slots if slot.is_lost]:
                self._lose(slot)

    def _lose(self, slot: Slot[E, W]) -> None:
        """Retire a slot whose holder does nothing for it any more."""
        if slot.phase is not Phase.RETIRED:
            if slot.serves:
                slot.queue.counters.errors += 1
                slot.serves = False
            slot.phase, slot.reason, slot.token = Phase.RETIRED, Retirement.FAILURE, 0
            slot.queue.breaker.end(slot)
        if slot.env is None:
            self._forget(slot)
        else:
            self._lost.append(slot)
        self._lost += [victim for victim in slot.victims if victim.phase is Phase.RETIRED]
        slot.victims = ()
        for each in self._lost:
            each.holder = None

    def _take_lost(self) -> Retired[E, W]:
        """Return what nobody has, for the caller to close."""
        self._retire_lost()
        lost = Retired(self._lost)
        holder = weakref.ref(lost, self._on_lost)
        for slot in lost:
            slot.holder = holder
        self._lost = Retired()
        return lost

    def _mend(self) -> None:
        """Count anew, from the slots' and the waiting calls' own fields."""
        queues = {*self._queues, *(slot.queue for slot in self._slots)}
        self._parts = [self._shared]
        self._shared.most = self._most
        self._shared.queues = []
        for queue in queues:
            queue.taken = queue.places.taken = queue.places.memory = queue.places.waiters = 0
            queue.idle.clear()
        for queue in self._queues:
            if queue.places is self._shared:
                self._shared.queues.append(queue)
            else:
                self._parts.append(queue.places)
                self._shared.most -= queue.places.most
        for slot in sorted(self._slots, key=coldness):
            slot.queue.taken += 1
            slot.queue.places.taken += 1
            slot.queue.places.memory += slot.memory
            if slot.phase is Phase.IDLE:
                slot.queue.put_idle(slot)
            elif slot.phase is not Phase.RETIRED and slot.holder is None:
                self._lose(slot)
        serving = [slot.queue for slot in self._slots if slot.serves and slot.token]
        for queue in self._queues:
            queue.places.waiters += len(queue.waiters)
            for waiter in list(queue.waiters):
                if waiter.lease is not None or waiter.error is not None:
                    self._wake(waiter)  # it is counted by what it has got
            counters = queue.counters
            counters.calls = counters.answers + counters.errors + counters.throttles
            counters.calls += serving.count(queue) + len(queue.waiters)
        self._has_lost = True
        self._is_torn = False
        self._tell_closers()
        self._tell_lost()
