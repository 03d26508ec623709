# SPDX-License-Identifier: Apache-2.0
"""The two turns of a warm call: an idle environment is taken, and it is kept for the next.

Each does in one piece what `Leases` does in steps, when nothing is out of the ordinary; then a call
has half of the work. Otherwise it does nothing, and `Leases` is asked.
"""

from __future__ import annotations

from typing import Final

from nsbox.pool.entries import E, Grant, Phase, W
from nsbox.pool.leases import Leases
from nsbox.pool.shares import Share

_IDLE: Final = Phase.IDLE
_LEASED: Final = Phase.LEASED


class QuickLeases(Leases[E, W]):
    """`Leases` with a short way for warm calls."""

    def take_idle(self, share: Share[E, W], tenant: str | None) -> Grant[E, W] | None:
        """Return a lease of the idle environment that was used last; None: `ask` for one."""
        with self._lock:
            if self._is_closed or share.is_optional or share.places.waiters:
                return None
            entry = share.take_idle(share.resolve(tenant)[0])
            if entry is None:
                return None
            share.counters.calls += 1
            token = self._tokens = self._tokens + 1
            entry.token = token
            entry.phase = _LEASED
            entry.serves = True
            entry.begun = self._clock()
            is_cold, entry.is_cold = entry.is_cold, False
            return Grant(entry, is_cold=is_cold)

    def keep_idle(self, grant: Grant[E, W]) -> bool:
        """End the lease of a call that was answered; False: do so by `give_back`.

        Only for environments that are marked as `is_plain`, and when nobody waits.
        """
        with self._lock:
            entry = grant.entry
            share = entry.share
            places = share.places
            now = self._clock()
            if (
                entry.token != grant.token
                or entry.phase is not _LEASED
                or not entry.is_plain
                or entry.is_dead
                or entry.generation != share.generation
                or now - entry.born >= self._max_lifetime
                or places.waiters
                or places.taken > places.most
                or self._max_invocations is not None
                or self._is_closed
                or self.wants_sweep
            ):
                return False
            entry.token = 0
            entry.invocations += 1
            entry.idle_since = now
            share.counters.end(True, now - entry.begun, entry.is_provisioned, share.provisioned > 0)
            share.put_idle(entry)
            return True
