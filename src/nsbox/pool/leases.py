# SPDX-License-Identifier: Apache-2.0
"""Who has which environment: the state of a pool, under one lock, without any I/O.

::

    (birth) --born--> LEASED --give_back--> IDLE --ask--> LEASED
       |                 |                    |
       +---give_back-----+------------------> RETIRED --removed--> (its place is free)

A lease has a token, and what is done with an environment is done with the token of its only lease:
a second lease, or a late word of an earlier one, is refused. An environment counts from before its
birth until it is closed.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Final, Generic

from nsbox.errors import EnvironmentStateError, PoolClosed, Throttled
from nsbox.pool.entries import E, Entry, Grant, Phase, W, Waiter
from nsbox.pool.events import Counters, Retirement

Resolve = Callable[[str | None], tuple[Hashable, W]]
"""From a tenant to the key of its environments, and what they are made of."""

FAILURES_MAX: Final = 3
"""Starts that fail in a row before the pool stops starting for a while."""
PAUSE_MIN: Final = 1.0
PAUSE_MAX: Final = 30.0


class Leases(Generic[E, W]):
    """The entries, the idle ones by key, the calls that wait, and the numbers."""

    def __init__(
        self,
        resolve: Resolve[W],
        *,
        most: int,
        max_waiting: int,
        max_lifetime: float,
        max_invocations: int | None,
        spills: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._resolve = resolve
        self._most = most
        self._max_waiting = max_waiting
        self._max_lifetime = max_lifetime
        self._max_invocations = max_invocations
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._tokens = 0
        self._generation = 0
        self._entries: set[Entry[E, W]] = set()
        self._idle: dict[Hashable, deque[Entry[E, W]]] = {}
        self._waiters: OrderedDict[Waiter[E, W], None] = OrderedDict()
        self._is_closed = False
        self._failures = 0
        self._failure = ""
        self._paused_until = 0.0
        self._trial: Entry[E, W] | None = None
        self._is_killed = False
        self._orphans: list[Grant[E, W]] = []
        self._counters = Counters(spills=spills)

    # -- taking --------------------------------------------------------------------------------

    def ask(self, waiter: Waiter[E, W], *, again: bool = False) -> Grant[E, W] | None:
        """Return a lease, or None: then `waiter` is in the queue, or has its error already.

        Args:
            waiter: The call.
            again: It was counted before: the environment that it had got was dead.

        Raises:
            PoolClosed: The pool is closed; the call is not counted.
            Throttled: Too many wait, or environments do not start.
        """
        with self._lock:
            if self._is_closed and not again:
                raise PoolClosed("the pool is closed")
            key, what = self._resolve(waiter.tenant)
            if not again:
                self._counters.calls += 1
            if self._waiters and len(self._waiters) >= self._max_waiting and not again:
                raise self._refuse_full()
            # Whoever waits comes first: when somebody does, there is nothing to be had now.
            grant = None if self._waiters else self._grant(key, what)
            if grant is None:
                if not self._max_waiting:
                    raise self._refuse_full()
                waiter.join()
                self._waiters[waiter] = None
            return grant

    def _refuse_full(self) -> Throttled:
        self._counters.throttles += 1
        busy, waiting = len(self._entries), len(self._waiters)
        return Throttled(
            f"all {busy} environments are busy and {waiting} calls wait", reason="full",
            retry_after=self._counters.mean_duration(),
        )  # fmt: skip

    def withdraw(self, waiter: Waiter[E, W]) -> Grant[E, W] | None:
        """Let a call wait no more; return the lease that it has got in the same moment."""
        with self._lock:
            if self._waiters.pop(waiter, self) is None:
                self._counters.throttles += 1
            return waiter.grant

    def reserve(self, count: int) -> Grant[E, W] | None:
        """Return a place for one more to be kept ready, if fewer than `count` are."""
        with self._lock:
            if self._is_closed or len(self._entries) >= self._most or self._pause() > 0:
                return None
            key, what = self._resolve(None)
            present = sum(
                entry.key == key and entry.is_provisioned and entry.phase is not Phase.RETIRED
                for entry in self._entries
            )
            if present >= count:
                return None
            grant = self._reserve(key, what, None)
            grant.entry.is_provisioned = True
            return grant

    def _grant(self, key: Hashable, what: W) -> Grant[E, W] | None:
        stack = self._idle.get(key)
        if stack:
            entry = stack.pop()
            if not stack:
                del self._idle[key]
            self._tokens += 1
            entry.token = self._tokens
            entry.phase = Phase.LEASED
            entry.begun = self._clock()
            return Grant(entry)
        is_full = len(self._entries) >= self._most
        if is_full and not self._idle:
            return None
        pause = self._pause()
        if pause > 0:
            self._counters.throttles += 1
            raise Throttled(
                f"the last {self._failures} starts of an environment failed: {self._failure}",
                reason="start failures",
                retry_after=pause,
            )
        victim = None
        if is_full:
            # The coldest one makes room.
            victim = min((stack[0] for stack in self._idle.values()), key=lambda e: e.idle_since)
            self._take_out(victim, Retirement.DEMAND)
            self._entries.discard(victim)
        return self._reserve(key, what, victim)

    def _reserve(self, key: Hashable, what: W, victim: Entry[E, W] | None) -> Grant[E, W]:
        self._tokens += 1
        entry = Entry[E, W](key, what, self._generation, self._tokens, self._clock())
        self._entries.add(entry)
        if self._failures >= FAILURES_MAX:
            self._trial = entry
        return Grant(entry, is_birth=True, victim=victim)

    def _pause(self) -> float:
        """Return for how long no environment may be started."""
        if self._failures < FAILURES_MAX:
            return 0.0
        left = self._paused_until - self._clock()
        # One at a time is tried after the pause.
        return max(left, PAUSE_MIN) if self._trial is not None else left

    def _hand_out(self) -> None:
        """Give those who wait, in their order, what there is."""
        while self._waiters:
            waiter = next(iter(self._waiters))
            try:
                grant = self._grant(*self._resolve(waiter.tenant))
            except Exception as error:  # noqa: BLE001 - handed to who waits
                waiter.error = error
                if not isinstance(error, Throttled):
                    self._counters.errors += 1
            else:
                if grant is None:
                    return
                waiter.grant = grant
            del self._waiters[waiter]
            if not waiter.wake() and waiter.grant is not None:
                # Its loop is closed: `sweep` has the lease, and the caller has not.
                self._orphans.append(waiter.grant)
                waiter.grant = None

    # -- holding -------------------------------------------------------------------------------

    def born(self, grant: Grant[E, W], env: E, fd: int) -> None:
        """Put the environment that was born into its place; its holder has the lease.

        Raises:
            PoolClosed: It is of no use any more; `give_back` it.
        """
        with self._lock:
            entry = self._held(grant, Phase.BIRTH)
            entry.env, entry.fd, entry.phase = env, fd, Phase.LEASED
            entry.born = self._clock()
            self._counters.births += 1
            if self._is_killed:
                raise PoolClosed("the pool was closed during the birth")

    def started(self, grant: Grant[E, W], init_seconds: float) -> None:
        """Note that the environment has started, its function's module included."""
        with self._lock:
            self._held(grant, Phase.LEASED).begun = self._clock()
            self._counters.init_seconds += init_seconds
            self._failures, self._trial = 0, None

    def failed(self, grant: Grant[E, W], error: BaseException) -> None:
        """Note that a start failed; the place is given up by `give_back`."""
        with self._lock:
            self._failures += 1
            self._failure = f"{type(error).__name__}: {error}"
            pause = PAUSE_MIN * 2.0 ** min(max(0, self._failures - FAILURES_MAX), 16)
            self._paused_until = self._clock() + min(pause, PAUSE_MAX)
            if self._trial is grant.entry:
                self._trial = None

    def give_back(
        self,
        grant: Grant[E, W],
        doubt: Retirement | None,
        *,
        answered: bool | None = None,
        seconds: float = 0.0,
    ) -> Retirement | None:
        """End a lease. Returns why its holder has to close the environment, and say `removed`.

        Args:
            grant: The lease.
            doubt: Why it may not be used again, if so.
            answered: How the call ended; None when there was none.
            seconds: How long it took.

        Raises:
            EnvironmentStateError: It is not, or no longer, the lease of that environment.
        """
        with self._lock:
            entry = self._held(grant, None)
            entry.token = 0
            if answered is not None:
                self._counters.end(answered, seconds, entry.is_provisioned)
                entry.invocations += 1
            reason = doubt or self._reason_to_go(entry)
            if reason is None:
                self._put_idle(entry)
                if self._waiters:
                    self._hand_out()
                return None
            if self._trial is entry:
                self._trial = None
            self._retire(entry, reason)
            return reason

    def _held(self, grant: Grant[E, W], phase: Phase | None) -> Entry[E, W]:
        entry = grant.entry
        held = (Phase.LEASED, Phase.BIRTH) if phase is None else (phase,)
        if entry.token != grant.token or entry.phase not in held:
            raise EnvironmentStateError(
                "this lease is over: the environment has been given back, or to another call"
            )
        return entry

    def _reason_to_go(self, entry: Entry[E, W]) -> Retirement | None:
        if entry.env is None or entry.is_dead:
            return Retirement.FAILURE
        if entry.generation != self._generation:
            return Retirement.VERSION
        if self._is_closed:
            first = next(iter(self._waiters), None)
            if first is None or self._resolve(first.tenant)[0] != entry.key:
                return Retirement.CLOSE
        if self._clock() - entry.born >= self._max_lifetime:
            return Retirement.LIFETIME
        if self._max_invocations is not None and entry.invocations >= self._max_invocations:
            return Retirement.INVOCATIONS
        return None

    def _put_idle(self, entry: Entry[E, W]) -> None:
        entry.phase = Phase.IDLE
        entry.idle_since = self._clock()
        stack = self._idle.get(entry.key)
        if stack is None:
            stack = self._idle[entry.key] = deque()
        stack.append(entry)

    def _retire(self, entry: Entry[E, W], reason: Retirement) -> None:
        entry.phase, entry.reason = Phase.RETIRED, reason

    def _take_out(self, entry: Entry[E, W], reason: Retirement) -> None:
        """Retire an idle one."""
        stack = self._idle[entry.key]
        stack.remove(entry)
        if not stack:
            del self._idle[entry.key]
        self._retire(entry, reason)

    def removed(self, entry: Entry[E, W]) -> None:
        """Free the place of a retired environment, which has been closed."""
        with self._lock:
            self._entries.discard(entry)
            self._hand_out()
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

    def sweep(self, idle_timeout: float) -> tuple[list[Entry[E, W]], list[Grant[E, W]], float]:
        """Retire idle ones whose time is over.

        Returns them for the caller to close; leases that nobody came for; and the seconds until
        the next one may be due.
        """
        with self._lock:
            now = self._clock()
            due = min(idle_timeout, self._max_lifetime)
            over = []
            for entry in [entry for stack in self._idle.values() for entry in stack]:
                lifetime = entry.born + self._max_lifetime - now
                idle = entry.idle_since + idle_timeout - now
                if lifetime <= 0:
                    self._take_out(entry, Retirement.LIFETIME)
                elif idle <= 0 and not entry.is_provisioned:
                    self._take_out(entry, Retirement.IDLE)
                else:
                    due = min(due, lifetime if entry.is_provisioned else min(lifetime, idle))
                    continue
                over.append(entry)
            if self._failures >= FAILURES_MAX:
                due = min(due, max(self._pause(), 0.01))
            orphans, self._orphans = self._orphans, []
            return over, orphans, due

    def publish(self, resolve: Resolve[W]) -> list[Entry[E, W]]:
        """Give new calls, and those that wait, another version; return idle ones to close."""
        with self._lock:
            key = self._resolve(None)[0]
            self._resolve = resolve
            if resolve(None)[0] == key:
                return []
            self._generation += 1
            self._failures = 0
            return self._retire_all_idle(Retirement.VERSION)

    def _retire_all_idle(self, reason: Retirement) -> list[Entry[E, W]]:
        idle = [entry for stack in self._idle.values() for entry in stack]
        for entry in idle:
            self._take_out(entry, reason)
        return idle

    def begin_close(
        self, kill: Callable[[int], object] | None
    ) -> tuple[list[Entry[E, W]], list[Grant[E, W]]]:
        """Serve no new calls. With `kill` (given descriptors) none at all.

        Returns idle ones, for the caller to close, and leases that nobody came for.
        """
        with self._lock:
            self._is_closed = True
            if kill is not None:
                self._is_killed = True
                for waiter in self._waiters:
                    waiter.error = PoolClosed("the pool was closed while the call waited")
                    self._counters.throttles += 1
                    waiter.wake()
                self._waiters.clear()
                for entry in self._entries:
                    if entry.phase is Phase.LEASED:
                        kill(entry.fd)
            orphans, self._orphans = self._orphans, []
            return self._retire_all_idle(Retirement.CLOSE), orphans

    def await_empty(self, seconds: float | None) -> bool:
        """Wait until every environment is closed; False when the time is over."""
        with self._lock:
            return self._changed.wait_for(lambda: not self._entries, seconds)

    @property
    def has_orphans(self) -> bool:
        """Whether there are leases that nobody came for."""
        return bool(self._orphans)

    @property
    def is_killed(self) -> bool:
        """Whether it was closed and running calls were ended."""
        return self._is_killed

    def stats(self) -> dict[str, float]:
        """Return the numbers of one moment."""
        with self._lock:
            phases = [entry.phase for entry in self._entries]
            return {
                **self._counters.as_dict(),
                "ConcurrentExecutions": phases.count(Phase.LEASED),
                "Environments": len(phases),
                "Idle": phases.count(Phase.IDLE),
                "Waiting": len(self._waiters),
            }
