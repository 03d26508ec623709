# SPDX-License-Identifier: Apache-2.0
"""Who has which environment: the state of a pool, under one lock, without any I/O.

::

    (birth) --born--> LEASED --give_back--> IDLE --ask--> LEASED
       |                 |                    |
       +---give_back-----+------------------> RETIRED --removed--> (its slot is free)

A lease has a token, and what is done with an environment is done with the token of its only lease:
a second lease, or a late word of an earlier one, is refused. An environment counts from before its
birth until it is closed.

There are `most` places. A function with reserved ones has those for itself; the rest is shared.
With a memory budget the memory of reserved places is reserved with them, so that what is promised
to one function never depends on others. An idle environment may be closed to make room: the coldest
of the same places first, one that is kept ready only for its own function's calls.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from typing import Final

from nsbox.errors import ConfigError, EnvironmentStateError, PoolClosed, Throttled
from nsbox.pool.accounts import (
    Due,
    E,
    FunctionQueue,
    Lease,
    Phase,
    Places,
    Resolve,
    Retired,
    Slot,
    V,
    W,
    Waiter,
    coldness,
)
from nsbox.pool.events import Counters, PoolStats, Retirement
from nsbox.pool.ledger import Ledger, locked

_HELD: Final = (Phase.LEASED, Phase.BIRTH)
_IDLE: Final = Phase.IDLE
_LEASED: Final = Phase.LEASED


class Scheduler(Ledger[E, W]):
    """The environments of a pool, whose they are at any moment, and which calls wait.

    Every method takes the one lock and returns at once; only `await_empty` waits.
    """

    def __init__(
        self,
        *,
        most: int,
        max_waiting: int,
        max_lifetime: float,
        max_invocations: int | None,
        idle_timeout: float,
        freeze_after: float | None = None,
        memory_budget: int | None = None,
        weigh: Callable[[W], int] = lambda _what: 0,
        clock: Callable[[], float] = time.monotonic,
        on_lost: Callable[[], object] = lambda: None,
    ) -> None:
        """Take the settings of a pool.

        Args:
            most: Environments at a time.
            max_waiting: Calls of each function that may wait.
            max_lifetime: Seconds after which an environment gets no other call.
            max_invocations: Calls after which one is replaced.
            idle_timeout: Seconds after which an idle one is closed.
            freeze_after: Seconds after which an idle one is frozen.
            memory_budget: Bytes that all may use together.
            weigh: Returns the bytes that an environment of a source may use.
            clock: Returns seconds.
            on_lost: Called, from wherever, when there is something for `sweep` to find.
        """
        super().__init__(most, memory_budget, weigh, clock, on_lost)
        self._max_waiting = max_waiting
        self._max_lifetime = max_lifetime
        self._max_invocations = max_invocations
        self._idle_timeout = idle_timeout
        self._freeze_after = freeze_after
        self._turns = 0
        self._is_closed = False
        self._rests = False  # nothing is due until an environment comes back (`wants_sweep`)

    # -- warm calls ----------------------------------------------------------------------------

    # The two turns of a warm call, in one piece each for speed when nothing is out of the ordinary.
    # Otherwise they do nothing, and `ask` and `give_back` do it in steps.

    def take_idle(self, lease: Lease[E, W], queue: FunctionQueue[E, W], tenant: str | None) -> bool:
        """Give `lease` the idle environment that was used last; False: `ask` for one."""
        with self._lock:
            if self._is_closed or self._is_torn or queue.is_optional or queue.places.waiters:
                return False
            key = queue.key if tenant is None else queue.resolve(tenant)[0]
            stack = queue.idle.get(key)
            if not stack:
                return False
            now = self._clock()
            holder = weakref.ref(lease, self._on_lost)
            # Nothing is called from here on: no interrupt comes in between.
            slot = stack[-1]
            del stack[-1]
            if not stack:
                del queue.idle[key]
            queue.counters.calls += 1
            lease.slot = slot
            slot.holder = holder
            slot.token = lease.token = self._tokens = self._tokens + 1
            slot.phase = _LEASED
            slot.serves = True
            slot.begun = now
            lease.is_birth = False
            lease.is_cold, slot.is_cold = slot.is_cold, False
            return True

    def keep_idle(self, lease: Lease[E, W]) -> bool:
        """End the lease of a call that was answered; False: do so by `give_back`.

        Only for environments that are marked as `is_plain`, and when nobody waits.
        """
        with self._lock:
            slot = lease.slot
            queue = slot.queue
            places = queue.places
            now = self._clock()
            if (
                slot.token != lease.token
                or slot.phase is not _LEASED
                or not slot.is_plain
                or slot.is_dead
                or slot.generation != queue.generation
                or now - slot.born >= self._max_lifetime
                or places.waiters
                or places.taken > places.most
                or self._max_invocations is not None
                or self._is_closed
                or self._is_torn
                or self._rests
                or self._orphans
            ):
                return False
            counters = queue.counters
            if queue.provisioned or slot.is_provisioned:
                counters.served(slot.is_provisioned, queue.provisioned > 0)
            stack = queue.idle.get(slot.key)
            first = deque((slot,)) if stack is None else None
            # Nothing is called from here on, but for the last step.
            counters.answers += 1
            counters.seconds += now - slot.begun
            slot.token = 0
            slot.holder = None
            slot.invocations += 1
            slot.idle_since = now
            slot.phase = _IDLE
            if first is not None:
                queue.idle[slot.key] = first
            elif stack is not None:
                stack.append(slot)
            return True

    # -- functions -----------------------------------------------------------------------------

    @locked
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
        own = None if reserved is None else Places[E, W](reserved, is_reserved=True)
        places = own or self._shared
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

    @locked
    def remove(self, resolve: Resolve[W]) -> list[Slot[E, W]]:
        """Take out the function of `resolve`, if it is there; return idle ones to close."""
        idle: list[Slot[E, W]] = []
        for queue in [queue for queue in self._queues if queue.resolve is resolve]:
            idle += queue.idle_ones()
            queue.generation += 1  # what is being born retires when it comes back
            self._queues.remove(queue)
        retired = self._retire_idle(idle, Retirement.CLOSE)
        self._mend()  # the places are others' now
        return retired

    @locked
    def publish(self, queue: FunctionQueue[E, W], resolve: Resolve[W]) -> list[Slot[E, W]]:
        """Give new calls, and those that wait, another version; return idle ones to close.

        Raises:
            ConfigError: There is not that much memory.
        """
        if resolve(None)[0] == queue.resolve(None)[0]:
            queue.move_to(resolve)
            return []
        others = [other for other in self._queues if other is not queue]
        self._check_room([*others, queue], resolve)
        queue.move_to(resolve)
        if queue.places is not self._shared:
            queue.places.aside = queue.places.most * self._weigh(resolve(None)[1])
        queue.generation += 1
        queue.breaker.reset()
        return self._retire_idle(list(queue.idle_ones()), Retirement.VERSION)

    @locked
    def provision(self, queue: FunctionQueue[E, W], count: int) -> list[Slot[E, W]]:
        """Set how many of a function's are kept ready; return idle ones to close.

        Raises:
            ConfigError: There are not as many places, or not that much memory.
        """
        before, queue.provisioned = queue.provisioned, count
        try:
            if queue.places is not self._shared and count > queue.places.most:
                raise ConfigError(f"provisioned: {count} is more than are reserved")
            self._check_room(self._queues)
        except ConfigError:
            queue.provisioned = before
            raise
        ready = self._kept_ready(queue)
        # Idle ones go first; one that is in a call is from now on one of those on demand.
        ready.sort(key=lambda slot: slot.phase is Phase.IDLE)
        surplus = ready[count:]
        for slot in surplus:
            slot.is_provisioned = False
        idle = [slot for slot in surplus if slot.phase is Phase.IDLE]
        return self._retire_idle(idle, Retirement.PROVISIONED)

    @locked
    def observe(self, tell: Callable[[FunctionQueue[E, W], list[Slot[E, W]]], V]) -> list[V]:
        """Return what `tell` says of each function and its slots, all of one moment."""
        return [
            tell(queue, [slot for slot in self._slots if slot.queue is queue])
            for queue in self._queues
        ]

    @locked
    def stats(self, queue: FunctionQueue[E, W] | None = None) -> PoolStats:
        """Return the numbers of one moment, of one function or of all."""
        queues = self._queues if queue is None else [queue]
        counters = Counters()
        for each in queues:
            counters.add(each.counters)
        slots = [slot for slot in self._slots if queue in (None, slot.queue)]
        phases = [slot.phase for slot in slots]
        busy = sum(slot.serves and slot.phase is Phase.LEASED for slot in slots)
        return PoolStats(
            **counters.as_dict(),
            ConcurrentExecutions=busy,
            Environments=len(phases),
            Idle=phases.count(Phase.IDLE),
            Waiting=sum(len(each.waiters) for each in queues),
        )

    # -- taking --------------------------------------------------------------------------------

    @locked
    def ask(
        self, waiter: Waiter[E, W], queue: FunctionQueue[E, W], *, again: bool = False
    ) -> Lease[E, W] | None:
        """Return `waiter`'s lease, or None: it is in the queue, or has its answer already.

        Args:
            waiter: The call.
            queue: Of which function.
            again: It was counted before: the environment that it had got was dead.

        Raises:
            PoolClosed: The pool is closed; the call is not counted.
            Throttled: Too many wait, environments do not start, or there is no place at all.
        """
        if self._is_closed and not again:
            raise PoolClosed("the pool is closed")
        self._retire_lost()
        key, what = queue.resolve(waiter.tenant)
        if not again:
            queue.counters.calls += 1
        elif waiter.record.token:
            waiter.record.slot.serves = False  # from here on this counts it
        places = queue.places
        if not self._may_have_one(queue, what):
            queue.counters.throttles += 1
            what_lacks = "no place is reserved for it, or left by others"
            raise Throttled(what_lacks, reason="reserved", retry_after=None)
        if queue.waiters and len(queue.waiters) >= self._max_waiting and not again:
            raise self._refuse_full(queue)
        # Whoever waits comes first, each in turn.
        lease = None if places.waiters else self._grant(waiter.record, queue, key, what)
        if lease is None:
            if not self._max_waiting:
                raise self._refuse_full(queue)
            waiter.queue = queue
            self._turns += 1
            waiter.turn = self._turns
            waiter.join()
            queue.put_waiter(waiter)
            self._hand_out(places)
        return lease

    def _refuse_full(self, queue: FunctionQueue[E, W]) -> Throttled:
        queue.counters.throttles += 1
        busy, waiting = queue.places.taken, len(queue.waiters)
        return Throttled(
            f"all {busy} environments are busy and {waiting} calls wait", reason="full",
            retry_after=queue.counters.mean_duration(),
        )  # fmt: skip

    @locked
    def withdraw(self, waiter: Waiter[E, W]) -> Lease[E, W] | None:
        """Let a call wait no more; return the lease that it has got in the same moment."""
        queue = waiter.queue
        if queue.remove_waiter(waiter):
            queue.counters.throttles += 1
            self._hand_out(queue.places)  # it may have held up others
        return waiter.lease

    @locked
    def abandon(self, lease: Lease[E, W]) -> Retired[E, W]:
        """Retire what an interrupted call has by `lease`; return all that is to be closed."""
        for queue in self._queues:
            for waiter in [waiter for waiter in queue.waiters if waiter.record is lease]:
                queue.remove_waiter(waiter)
                queue.counters.throttles += 1
                self._hand_out(queue.places)
        if lease.token and lease.slot.holder is not None and lease.slot.holder() is lease:
            self._lose(lease.slot)
        if lease.token and lease.slot.serves and lease.slot.phase is Phase.RETIRED:
            # Its environment was dead, and it was to have another.
            lease.slot.queue.counters.throttles += 1
            lease.slot.serves = False
        return self._take_lost()

    @locked
    def reserve(
        self, only: FunctionQueue[E, W] | None = None, record: Lease[E, W] | None = None
    ) -> Lease[E, W] | None:
        """Return a place for one more to be kept ready, if one is missing and there is room.

        Of `only` this function, or of any that is open. `record` is the lease that it is to be.
        """
        for queue in self._queues:
            is_meant = queue is only or (only is None and queue.is_open and queue.provisioned)
            if is_meant and not self._is_closed and not queue.places.waiters:
                lease = self._reserve_ready(queue, record or Lease())
                if lease is not None:
                    return lease
        return None

    def _reserve_ready(self, queue: FunctionQueue[E, W], lease: Lease[E, W]) -> Lease[E, W] | None:
        key, what = queue.resolve(None)
        present = sum(slot.key == key for slot in self._kept_ready(queue))
        if present >= queue.provisioned or queue.breaker.pause() > 0:
            return None
        memory = self._weigh(what)
        victims = self._find_room(queue, memory, Retirement.PROVISIONED)
        if victims is None:
            return None
        self._reserve(lease, queue, key, what, memory, victims, Retirement.PROVISIONED)
        lease.slot.is_provisioned = True
        return lease

    def _grant(
        self,
        lease: Lease[E, W],
        queue: FunctionQueue[E, W],
        key: Hashable,
        what: W,
        *,
        bears: bool = True,
        ousts: bool = True,
        only_ready: bool = False,
    ) -> Lease[E, W] | None:
        """Return `lease`, if there is something for it.

        Args:
            lease: The record of the call.
            queue: Of which function.
            key: Of which environments.
            what: What they are made of.
            bears: An environment may be born.
            ousts: Idle ones may be closed for that.
            only_ready: No idle one but a provisioned one is taken.
        """
        slot = queue.take_idle(key, only_ready=only_ready)
        if slot is not None:
            slot.begun = self._clock()
            self._hold(lease, slot)
            slot.phase, slot.serves = Phase.LEASED, True
            lease.is_birth = False
            lease.is_cold, slot.is_cold = slot.is_cold, False
            return lease
        if not bears:
            return None
        memory = self._weigh(what)
        victims = self._find_room(queue, memory, Retirement.DEMAND)
        if victims is None or (victims and not ousts):
            return None
        if queue.breaker.pause() > 0:
            queue.counters.throttles += 1
            raise queue.breaker.refusal()
        return self._reserve(lease, queue, key, what, memory, victims, Retirement.DEMAND)

    def _hand_out(self, places: Places[E, W]) -> None:
        """Give those who wait, in their turn, what there is."""
        while places.waiters and self._serve_one(places.waiting()):
            pass

    def _serve_one(self, waiting: list[FunctionQueue[E, W]]) -> bool:
        needy, *others = waiting
        if self._serve(needy, ousts=False):
            return True
        # Another function keeps its own, unless one that waits has none at all or clearly fewer:
        # to move a place costs a birth.
        for queue in others:
            is_owed = not needy.taken or needy.taken + 2 <= queue.taken
            if self._serve(queue, bears=False, only_ready=is_owed):
                return True
        return self._serve(needy)

    def _serve(
        self,
        queue: FunctionQueue[E, W],
        *,
        bears: bool = True,
        ousts: bool = True,
        only_ready: bool = False,
    ) -> bool:
        """Serve the first call of a function; False if there is nothing for it."""
        waiter = queue.first
        try:
            key, what = queue.resolve(waiter.tenant)
            waiter.lease = self._grant(
                waiter.record, queue, key, what, bears=bears, ousts=ousts, only_ready=only_ready
            )
        except Exception as error:  # noqa: BLE001 - handed to who waits
            waiter.error = error
            if not isinstance(error, Throttled):
                queue.counters.errors += 1
        else:
            if waiter.lease is None:
                return False
        self._wake(waiter)
        return True

    # -- holding -------------------------------------------------------------------------------

    @locked
    def born(self, lease: Lease[E, W], env: E, fd: int) -> None:
        """Put the environment that was born into its place; its holder has the lease.

        Raises:
            PoolClosed: It is of no use any more; `give_back` it.
        """
        slot = self._held(lease, (Phase.BIRTH,))
        slot.env, slot.fd, slot.phase = env, fd, Phase.LEASED
        slot.born = self._clock()
        slot.queue.counters.births += 1
        if self._is_killed:
            raise PoolClosed("the pool was closed during the birth")

    @locked
    def started(self, lease: Lease[E, W], init_seconds: float) -> None:
        """Note that the environment has started, its function's module included."""
        slot = self._held(lease, (Phase.LEASED,))
        slot.begun = self._clock()
        slot.queue.counters.init_seconds += init_seconds
        slot.queue.breaker.reset()

    @locked
    def failed(self, lease: Lease[E, W], error: BaseException) -> None:
        """Note that a start failed; the place is given up by `give_back`."""
        lease.slot.queue.breaker.fail(error)
        lease.slot.queue.breaker.end(lease.slot)

    @locked
    def note_left_running(self, queue: FunctionQueue[E, W]) -> None:
        """Count an invocation that has left processes running, which were killed."""
        queue.counters.left_running += 1

    @locked
    def give_back(
        self,
        lease: Lease[E, W],
        doubt: Retirement | None,
        *,
        answered: bool | None = None,
        has_run: bool = True,
    ) -> Retirement | None:
        """End a lease. Returns why its holder has to close the environment, and say `removed`.

        Args:
            lease: The lease.
            doubt: Why it may not be used again, if so.
            answered: How the call ended; None when there was none, or it is made again.
            has_run: Its function was asked, so that it has a duration.

        Raises:
            EnvironmentStateError: It is not, or no longer, the lease of that environment.
        """
        slot = self._held(lease, _HELD)
        queue, now = slot.queue, self._clock()
        if answered is not None:
            seconds = now - slot.begun if has_run else 0.0
            slot.serves = False  # it is counted once
            queue.counters.end(answered, seconds, slot.is_provisioned, queue.provisioned > 0)
            slot.invocations += 1
        reason = doubt or self._reason_to_go(slot, now)
        if reason is None:
            slot.idle_since = now
            slot.token = 0
            queue.put_idle(slot)
            if queue.places.waiters:
                self._hand_out(queue.places)
            if not self._is_closed or slot.phase is not Phase.IDLE:
                return None
            queue.remove_idle(slot)
            reason = Retirement.CLOSE  # nobody needs it any more
            slot.holder = weakref.ref(lease, self._on_lost)
        # Its holder has it until it is closed.
        slot.phase, slot.reason, slot.token = Phase.RETIRED, reason, 0
        queue.breaker.end(slot)
        return reason

    def _held(self, lease: Lease[E, W], phases: tuple[Phase, ...]) -> Slot[E, W]:
        slot = lease.slot
        if slot.token != lease.token or slot.phase not in phases:
            raise EnvironmentStateError(
                "this lease is over: the environment has been given back, or to another call"
            )
        return slot

    def _reason_to_go(self, slot: Slot[E, W], now: float) -> Retirement | None:
        if slot.env is None or slot.is_dead:
            return Retirement.FAILURE
        queue = slot.queue
        if slot.generation != queue.generation:
            return Retirement.VERSION
        if now - slot.born >= self._max_lifetime:
            return Retirement.LIFETIME
        if self._max_invocations is not None and slot.invocations >= self._max_invocations:
            return Retirement.INVOCATIONS
        if queue.places.taken > queue.places.most:
            return Retirement.DEMAND  # places have been set aside for another function meanwhile
        return None

    @locked
    def removed(self, slot: Slot[E, W]) -> None:
        """Free the place of a retired environment, which has been closed."""
        self._forget(slot)
        slot.holder = None
        # Of the others too: its memory may have been in the way of theirs.
        for places in self._parts:
            self._hand_out(places)
        self._tell_closers()

    # -- maintenance ------------------------------------------------------------------------------

    @locked
    def died(self, slot: Slot[E, W]) -> bool:
        """Note a death; True when it was idle, and is for the caller to close."""
        if slot.phase is not Phase.IDLE:
            slot.is_dead = True  # its holder closes it
            return False
        self._take_out(slot, Retirement.FAILURE, None)
        return True

    @locked
    def sweep(self) -> Due[E, W]:
        """Retire idle ones whose time is over, and tell what else is due."""
        now = self._clock()
        over = self._take_lost()
        holder = weakref.ref(over, self._on_lost)
        cold: list[Slot[E, W]] = []
        freeze_after = math.inf if self._freeze_after is None else self._freeze_after
        due = math.inf
        for slot in [slot for places in self._parts for slot in places.idle()]:
            lifetime = slot.born + self._max_lifetime - now
            idle = slot.idle_since + self._idle_timeout - now
            warm = math.inf if slot.is_cold else slot.idle_since + freeze_after - now
            if lifetime <= 0:
                self._take_out(slot, Retirement.LIFETIME, holder)
                over.append(slot)
                continue
            if idle <= 0 and not slot.is_provisioned:
                self._take_out(slot, Retirement.IDLE, holder)
                over.append(slot)
                continue
            if warm <= 0:
                cold.append(slot)
                warm = math.inf
            due = min(due, lifetime, warm, math.inf if slot.is_provisioned else idle)
        # What is in use now may be due that much after it has come back. When nothing is, and
        # all are frozen, the first that comes back says so.
        due = min(due, self._idle_timeout, self._max_lifetime)
        self._rests = freeze_after < math.inf and all(
            slot.phase is Phase.IDLE and (slot.is_cold or slot in cold) for slot in self._slots
        )
        if not self._rests:
            due = min(due, freeze_after)
        for queue in self._queues:
            if queue.provisioned and queue.breaker.pause() > 0:
                due = min(due, max(queue.breaker.pause(), 0.01))
        orphans, self._orphans = self._orphans, []
        return Due(over, cold, orphans, due)

    @locked
    def begin_freeze(self, slot: Slot[E, W]) -> bool:
        """Note that an environment is being frozen; False when a call was faster.

        From now on its next lease says that it `is_cold`.
        """
        if slot.phase is not Phase.IDLE or slot.is_cold:
            return False
        slot.is_cold = True
        return True

    @locked
    def relieve(self) -> list[Slot[E, W]]:
        """Retire a quarter of the idle ones, the coldest; provisioned ones stay."""
        idle = sorted((slot for places in self._parts for slot in places.on_demand()), key=coldness)
        return self._retire_idle(idle[: -(-len(idle) // 4)], Retirement.PRESSURE)

    @locked
    def begin_close(
        self, kill: Callable[[Slot[E, W]], object] | None
    ) -> tuple[list[Slot[E, W]], list[Lease[E, W]]]:
        """Serve no new calls. With `kill` (given slots) none at all.

        Returns idle ones, for the caller to close, and scheduler that nobody came for.
        """
        self._is_closed = True
        if kill is not None:
            self._is_killed = True
            self._tell_closers()
            for queue in self._queues:
                for waiter in list(queue.waiters):
                    waiter.error = PoolClosed("the pool was closed while the call waited")
                    queue.counters.throttles += 1
                    self._wake(waiter)
            for slot in self._slots:
                if slot.phase is Phase.LEASED:
                    kill(slot)
        orphans, self._orphans = self._orphans, []
        idle = [slot for places in self._parts for slot in places.idle()]
        return self._retire_idle(idle, Retirement.CLOSE), orphans

    @property
    def wants_sweep(self) -> bool:
        """Whether `sweep` is to be called before its time."""
        return self._rests or self._has_lost or bool(self._orphans)

    @property
    def has_idle(self) -> bool:
        """Whether there are idle environments."""
        return any(queue.idle for queue in self._queues)

    @locked
    def sources(self) -> list[W]:
        """Return what the functions' environments are made of."""
        queues = [queue for queue in self._queues if not queue.is_optional] or self._queues
        return [queue.resolve(None)[1] for queue in queues]

    @property
    def is_wanting(self) -> bool:
        """Whether there may be something to do when a place is free."""
        return bool(self._orphans) or any([queue.provisioned for queue in self._queues])

    @property
    def is_killed(self) -> bool:
        """Whether it was closed and running calls were ended."""
        return self._is_killed

    def _mend(self) -> None:
        super()._mend()
        for places in self._parts:
            self._hand_out(places)
