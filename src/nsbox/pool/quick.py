# SPDX-License-Identifier: Apache-2.0
"""The two turns of a warm call: an idle environment is taken, and it is kept for the next.

Each does in one piece what `Scheduler` does in steps, when nothing is out of the ordinary; then a
call has half of the work. Otherwise it does nothing, and `Scheduler` is asked.
"""

from __future__ import annotations

from typing import Final

from nsbox.pool.accounts import E, Lease, Phase, W
from nsbox.pool.scheduler import Scheduler
from nsbox.pool.shares import FunctionQueue

_IDLE: Final = Phase.IDLE
_LEASED: Final = Phase.LEASED


class QuickScheduler(Scheduler[E, W]):
    """`Scheduler` with a short way for warm calls."""

    def take_idle(self, queue: FunctionQueue[E, W], tenant: str | None) -> Lease[E, W] | None:
        """Return a lease of the idle environment that was used last; None: `ask` for one."""
        with self._lock:
            if self._is_closed or queue.is_optional or queue.places.waiters:
                return None
            slot = queue.take_idle(queue.resolve(tenant)[0])
            if slot is None:
                return None
            queue.counters.calls += 1
            token = self._tokens = self._tokens + 1
            slot.token = token
            slot.phase = _LEASED
            slot.serves = True
            slot.begun = self._clock()
            is_cold, slot.is_cold = slot.is_cold, False
            return Lease(slot, is_cold=is_cold)

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
                or self.wants_sweep
            ):
                return False
            slot.token = 0
            slot.invocations += 1
            slot.idle_since = now
            queue.counters.end(True, now - slot.begun, slot.is_provisioned, queue.provisioned > 0)
            queue.put_idle(slot)
            return True
