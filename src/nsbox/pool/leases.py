# SPDX-License-Identifier: Apache-2.0
"""Who has which environment: the state of a pool, under one lock, without any I/O.

::

    (birth) --born--> LEASED --give_back--> IDLE --ask--> LEASED
       |                 |                    |
       +---give_back-----+------------------> RETIRED --removed--> (its place is free)

A lease has a token, and what is done with an environment is done with the token of its only lease:
a second lease, or a late word of an earlier one, is refused. An environment counts from before its
birth until it is closed. `nsbox.pool.shares` has what each function has.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable
from typing import Final, Generic, NamedTuple

from nsbox.errors import EnvironmentStateError, PoolClosed, Throttled
from nsbox.pool.entries import E, Entry, Grant, Phase, W, Waiter
from nsbox.pool.events import Retirement
from nsbox.pool.room import Room, coldness
from nsbox.pool.shares import Places, Share

_HELD: Final = (Phase.LEASED, Phase.BIRTH)


class Due(NamedTuple, Generic[E, W]):
    """What is due in a pool."""

    over: list[Entry[E, W]]
    """Retired; to be closed."""
    cold: list[Entry[E, W]]
    """Idle for so long that they are to be frozen (`Leases.begin_freeze`)."""
    orphans: list[Grant[E, W]]
    """Leases that nobody came for."""
    seconds: float
    """Until something may be due again."""


class Leases(Room[E, W]):
    """The environments of a pool, whose they are at any moment, and who waits."""

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
    ) -> None:
        """`weigh` tells the bytes of memory that an environment may use."""
        super().__init__(most, memory_budget, weigh, clock)
        self._max_waiting = max_waiting
        self._max_lifetime = max_lifetime
        self._max_invocations = max_invocations
        self._idle_timeout = idle_timeout
        self._freeze_after = freeze_after
        self._changed = threading.Condition(self._lock)
        self._turns = 0
        self._is_killed = False
        self._rests = False  # the thread that keeps house waits for `wants_sweep`
        self._orphans: list[Grant[E, W]] = []

    # -- taking --------------------------------------------------------------------------------

    def ask(
        self, waiter: Waiter[E, W], share: Share[E, W], *, again: bool = False
    ) -> Grant[E, W] | None:
        """Return a lease, or None: then `waiter` is in the queue, or has its answer already.

        Args:
            waiter: The call.
            share: Of which function.
            again: It was counted before: the environment that it had got was dead.

        Raises:
            PoolClosed: The pool is closed; the call is not counted.
            Throttled: Too many wait, environments do not start, or there is no place at all.
        """
        with self._lock:
            if self._is_closed and not again:
                raise PoolClosed("the pool is closed")
            key, what = share.resolve(waiter.tenant)
            if not again:
                share.counters.calls += 1
            places = share.places
            if not self._may_have_one(share, what):
                share.counters.throttles += 1
                raise Throttled(
                    "no place is reserved for it, or left by others",
                    reason="reserved",
                    retry_after=math.inf,
                )
            if share.waiters and len(share.waiters) >= self._max_waiting and not again:
                raise self._refuse_full(share)
            # Whoever waits comes first, each in turn.
            grant = None if places.waiters else self._grant(share, key, what)
            if grant is None:
                if not self._max_waiting:
                    raise self._refuse_full(share)
                waiter.share = share
                self._turns += 1
                waiter.turn = self._turns
                waiter.join()
                share.put_waiter(waiter)
                self._hand_out(places)
            return grant

    def _refuse_full(self, share: Share[E, W]) -> Throttled:
        share.counters.throttles += 1
        busy, waiting = share.places.taken, len(share.waiters)
        return Throttled(
            f"all {busy} environments are busy and {waiting} calls wait", reason="full",
            retry_after=share.counters.mean_duration(),
        )  # fmt: skip

    def withdraw(self, waiter: Waiter[E, W]) -> Grant[E, W] | None:
        """Let a call wait no more; return the lease that it has got in the same moment."""
        with self._lock:
            share = waiter.share
            if share.remove_waiter(waiter):
                share.counters.throttles += 1
                self._hand_out(share.places)  # it may have held up others
            return waiter.grant

    def reserve(self, only: Share[E, W] | None = None) -> Grant[E, W] | None:
        """Return a place for one more to be kept ready, if one is missing and there is room.

        Of `only` this function, or of any that is open.
        """
        with self._lock:
            for share in self._shares:
                is_meant = share is only or (only is None and share.is_open and share.provisioned)
                if is_meant and not self._is_closed and not share.places.waiters:
                    grant = self._reserve_ready(share)
                    if grant is not None:
                        return grant
            return None

    def _reserve_ready(self, share: Share[E, W]) -> Grant[E, W] | None:
        key, what = share.resolve(None)
        present = sum(
            entry.share is share
            and entry.key == key
            and entry.is_provisioned
            and entry.phase is not Phase.RETIRED
            for entry in self._entries
        )
        if present >= share.provisioned or share.breaker.pause() > 0:
            return None
        victims = self._find_room(share, self._weigh(what), Retirement.PROVISIONED)
        if victims is None:
            return None
        grant = self._reserve(share, key, what, victims, Retirement.PROVISIONED)
        grant.entry.is_provisioned = True
        return grant

    def _grant(
        self,
        share: Share[E, W],
        key: Hashable,
        what: W,
        *,
        bears: bool = True,
        ousts: bool = True,
        only_ready: bool = False,
    ) -> Grant[E, W] | None:
        """Return a lease, if there is one.

        Args:
            share: Of which function.
            key: Of which environments.
            what: What they are made of.
            bears: An environment may be born.
            ousts: Idle ones may be closed for that.
            only_ready: No idle one but a provisioned one is taken.
        """
        entry = share.take_idle(key, only_ready=only_ready)
        if entry is not None:
            self._tokens += 1
            entry.token = self._tokens
            entry.phase, entry.serves = Phase.LEASED, True
            entry.begun = self._clock()
            is_cold, entry.is_cold = entry.is_cold, False
            return Grant(entry, is_cold=is_cold)
        victims = self._find_room(share, self._weigh(what), Retirement.DEMAND) if bears else None
        if victims is None or (victims and not ousts):
            return None
        if share.breaker.pause() > 0:
            share.counters.throttles += 1
            raise share.breaker.refusal()
        return self._reserve(share, key, what, victims, Retirement.DEMAND)

    def _hand_out(self, places: Places[E, W]) -> None:
        """Give those who wait, in their turn, what there is."""
        while places.waiters and self._serve_one(places.waiting()):
            pass

    def _serve_one(self, waiting: list[Share[E, W]]) -> bool:
        needy, *others = waiting
        if self._serve(needy, ousts=False):
            return True
        # Another function keeps its own, unless one that waits has none at all or clearly fewer:
        # to move a place costs a birth.
        for share in others:
            is_owed = not needy.taken or needy.taken + 2 <= share.taken
            if self._serve(share, bears=False, only_ready=is_owed):
                return True
        return self._serve(needy)

    def _serve(
        self,
        share: Share[E, W],
        *,
        bears: bool = True,
        ousts: bool = True,
        only_ready: bool = False,
    ) -> bool:
        """Serve the first call of a function; False if there is nothing for it."""
        waiter = share.first
        try:
            key, what = share.resolve(waiter.tenant)
            waiter.grant = self._grant(
                share, key, what, bears=bears, ousts=ousts, only_ready=only_ready
            )
        except Exception as error:  # noqa: BLE001 - handed to who waits
            waiter.error = error
            if not isinstance(error, Throttled):
                share.counters.errors += 1
        else:
            if waiter.grant is None:
                return False
        share.remove_waiter(waiter)
        if not waiter.wake() and waiter.grant is not None:
            # Its loop is closed: `sweep` has the lease, and the caller has not.
            self._orphans.append(waiter.grant)
            waiter.grant = None
        return True

    # -- holding -------------------------------------------------------------------------------

    def born(self, grant: Grant[E, W], env: E, fd: int) -> None:
        """Put the environment that was born into its place; its holder has the lease.

        Raises:
            PoolClosed: It is of no use any more; `give_back` it.
        """
        with self._lock:
            entry = self._held(grant, (Phase.BIRTH,))
            entry.env, entry.fd, entry.phase = env, fd, Phase.LEASED
            entry.born = self._clock()
            entry.share.counters.births += 1
            if self._is_killed:
                raise PoolClosed("the pool was closed during the birth")

    def started(self, grant: Grant[E, W], init_seconds: float) -> None:
        """Note that the environment has started, its function's module included."""
        with self._lock:
            entry = self._held(grant, (Phase.LEASED,))
            entry.begun = self._clock()
            entry.share.counters.init_seconds += init_seconds
            entry.share.breaker.reset()

    def failed(self, grant: Grant[E, W], error: BaseException) -> None:
        """Note that a start failed; the place is given up by `give_back`."""
        with self._lock:
            grant.entry.share.breaker.fail(error)
            grant.entry.share.breaker.end(grant.entry)

    def note_left_running(self, share: Share[E, W]) -> None:
        """Count an invocation that has left processes running, which were killed."""
        with self._lock:
            share.counters.left_running += 1

    def give_back(
        self,
        grant: Grant[E, W],
        doubt: Retirement | None,
        *,
        answered: bool | None = None,
        has_run: bool = True,
    ) -> Retirement | None:
        """End a lease. Returns why its holder has to close the environment, and say `removed`.

        Args:
            grant: The lease.
            doubt: Why it may not be used again, if so.
            answered: How the call ended; None when there was none, or it is made again.
            has_run: Its function was asked, so that it has a duration.

        Raises:
            EnvironmentStateError: It is not, or no longer, the lease of that environment.
        """
        with self._lock:
            entry = self._held(grant, _HELD)
            entry.token = 0
            share, now = entry.share, self._clock()
            if answered is not None:
                seconds = now - entry.begun if has_run else 0.0
                share.counters.end(answered, seconds, entry.is_provisioned, share.provisioned > 0)
                entry.invocations += 1
            reason = doubt or self._reason_to_go(entry, now)
            if reason is None:
                entry.idle_since = now
                share.put_idle(entry)
                if share.places.waiters:
                    self._hand_out(share.places)
                if not self._is_closed or entry.phase is not Phase.IDLE:
                    return None
                share.remove_idle(entry)
                reason = Retirement.CLOSE  # nobody needs it any more
            share.breaker.end(entry)
            entry.phase, entry.reason = Phase.RETIRED, reason
            return reason

    def _held(self, grant: Grant[E, W], phases: tuple[Phase, ...]) -> Entry[E, W]:
        entry = grant.entry
        if entry.token != grant.token or entry.phase not in phases:
            raise EnvironmentStateError(
                "this lease is over: the environment has been given back, or to another call"
            )
        return entry

    def _reason_to_go(self, entry: Entry[E, W], now: float) -> Retirement | None:
        if entry.env is None or entry.is_dead:
            return Retirement.FAILURE
        share = entry.share
        if entry.generation != share.generation:
            return Retirement.VERSION
        if now - entry.born >= self._max_lifetime:
            return Retirement.LIFETIME
        if self._max_invocations is not None and entry.invocations >= self._max_invocations:
            return Retirement.INVOCATIONS
        if share.places.taken > share.places.most:
            return Retirement.DEMAND  # places have been set aside for another function meanwhile
        return None

    def removed(self, entry: Entry[E, W]) -> None:
        """Free the place of a retired environment, which has been closed."""
        with self._lock:
            self._forget(entry)
            # Of the others too: its memory may have been in the way of theirs.
            for places in self._parts:
                self._hand_out(places)
            self._changed.notify_all()

    # -- keeping house -------------------------------------------------------------------------

    def died(self, entry: Entry[E, W]) -> bool:
        """Note a death; True when it was idle, and is for the caller to close."""
        with self._lock:
            if entry.phase is not Phase.IDLE:
                entry.is_dead = True  # its holder closes it
                return False
            self._take_out(entry, Retirement.FAILURE)
            return True

    def sweep(self) -> Due[E, W]:
        """Retire idle ones whose time is over, and tell what else is due."""
        with self._lock:
            now = self._clock()
            over: list[Entry[E, W]] = []
            cold: list[Entry[E, W]] = []
            freeze_after = math.inf if self._freeze_after is None else self._freeze_after
            due = math.inf
            for entry in [entry for places in self._parts for entry in places.idle()]:
                lifetime = entry.born + self._max_lifetime - now
                idle = entry.idle_since + self._idle_timeout - now
                warm = math.inf if entry.is_cold else entry.idle_since + freeze_after - now
                if lifetime <= 0:
                    self._take_out(entry, Retirement.LIFETIME)
                    over.append(entry)
                    continue
                if idle <= 0 and not entry.is_provisioned:
                    self._take_out(entry, Retirement.IDLE)
                    over.append(entry)
                    continue
                if warm <= 0:
                    cold.append(entry)
                    warm = math.inf
                due = min(due, lifetime, warm, math.inf if entry.is_provisioned else idle)
            # What is in use now may be due that much after it has come back. When nothing is, and
            # all are frozen, the first that comes back says so.
            due = min(due, self._idle_timeout, self._max_lifetime)
            self._rests = freeze_after < math.inf and all(
                entry.phase is Phase.IDLE and (entry.is_cold or entry in cold)
                for entry in self._entries
            )
            if not self._rests:
                due = min(due, freeze_after)
            for share in self._shares:
                if share.provisioned and share.breaker.pause() > 0:
                    due = min(due, max(share.breaker.pause(), 0.01))
            orphans, self._orphans = self._orphans, []
            return Due(over, cold, orphans, due)

    def begin_freeze(self, entry: Entry[E, W]) -> bool:
        """Note that an environment is being frozen; False when a call was faster.

        From now on its next lease says that it `is_cold`.
        """
        with self._lock:
            if entry.phase is not Phase.IDLE or entry.is_cold:
                return False
            entry.is_cold = True
            return True

    def relieve(self) -> list[Entry[E, W]]:
        """Retire a quarter of the idle ones, the coldest; provisioned ones stay."""
        with self._lock:
            idle = sorted(
                (entry for places in self._parts for entry in places.on_demand()), key=coldness
            )
            return self._retire_idle(idle[: -(-len(idle) // 4)], Retirement.PRESSURE)

    def begin_close(
        self, kill: Callable[[Entry[E, W]], object] | None
    ) -> tuple[list[Entry[E, W]], list[Grant[E, W]]]:
        """Serve no new calls. With `kill` (given entries) none at all.

        Returns idle ones, for the caller to close, and leases that nobody came for.
        """
        with self._lock:
            self._is_closed = True
            if kill is not None:
                self._is_killed = True
                for share in self._shares:
                    for waiter in list(share.waiters):
                        waiter.error = PoolClosed("the pool was closed while the call waited")
                        share.counters.throttles += 1
                        share.remove_waiter(waiter)
                        waiter.wake()
                for entry in self._entries:
                    if entry.phase is Phase.LEASED:
                        kill(entry)
            orphans, self._orphans = self._orphans, []
            idle = [entry for places in self._parts for entry in places.idle()]
            return self._retire_idle(idle, Retirement.CLOSE), orphans

    def await_empty(self, seconds: float | None) -> bool:
        """Wait until every environment is closed; False when the time is over."""
        with self._lock:
            return self._changed.wait_for(lambda: not self._entries, seconds)

    @property
    def wants_sweep(self) -> bool:
        """Whether `sweep` is to be called before its time."""
        return self._rests or bool(self._orphans)

    @property
    def has_idle(self) -> bool:
        """Whether there are idle environments."""
        return any(share.idle for share in self._shares)

    def sources(self) -> list[W]:
        """Return what the functions' environments are made of."""
        with self._lock:
            shares = [share for share in self._shares if not share.is_optional] or self._shares
            return [share.resolve(None)[1] for share in shares]

    @property
    def is_wanting(self) -> bool:
        """Whether there may be something to do when a place is free."""
        return bool(self._orphans) or any(share.provisioned for share in self._shares)

    @property
    def is_killed(self) -> bool:
        """Whether it was closed and running calls were ended."""
        return self._is_killed
