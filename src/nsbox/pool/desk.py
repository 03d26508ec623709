# SPDX-License-Identifier: Apache-2.0
"""Where the calls of one function of a pool are served: a pool has a desk for each."""

from __future__ import annotations

import os
from typing import NoReturn

from nsbox.errors import PoolError, PoolTimeout, refuse_pickling
from nsbox.functions.credentials import Credentials, Provider, resolve
from nsbox.functions.function import FunctionVersion
from nsbox.pool.manager import PoolLease, PoolManager, PoolQueue, PoolWaiter
from nsbox.values.config import parse_seconds


class Desk:
    """One function, or one `Config`, of a pool; what is done with environments the manager does."""

    def __init__(self, manager: PoolManager, queue: PoolQueue) -> None:
        self._manager = manager
        self._queue = queue
        self._scheduler = manager._scheduler
        self._acquire_timeout = manager.settings.acquire_timeout
        self._is_function = isinstance(queue.resolve(None)[1], FunctionVersion)
        self._has_provider = manager.settings.credentials is not None
        self._is_dead = manager._is_dead
        self._give_birth = manager._give_birth
        self._finish = manager._finish
        self._fail = manager._fail
        self._keep_idle = manager._scheduler.keep_idle
        self._drop = manager._drop

    def _check_usable(self, *, is_function: bool) -> None:
        if self._manager.owner != os.getpid():
            raise PoolError(
                f"this pool belongs to process {self._manager.owner}, and this is {os.getpid()}: "
                "make another one here, after the fork"
            )
        if is_function is not self._is_function:
            has = "a function: use invoke" if self._is_function else "a Config: use acquire"
            raise PoolError(f"this pool is of {has}")

    def __reduce__(self) -> NoReturn:
        refuse_pickling("a pool", "make one there, from the Function or Config")

    def _patience(self, timeout: float | None) -> float | None:
        """Return for how many seconds a call waits for an environment."""
        return self._acquire_timeout if timeout is None else parse_seconds(timeout, "timeout")

    def _looks_dead(self, lease: PoolLease) -> bool:
        """Whether an environment that was idle cannot be used; then its lease is over.

        The death of one with a worker is seen when that is sent an event.
        """
        return (lease.is_cold or lease.slot.is_silent) and self._is_dead(lease)

    def _credentials(
        self, credentials: Credentials | Provider | None, role: str | None
    ) -> Credentials | None:
        """Return those of a call, if it is to have some."""
        given = self._provider(credentials)
        return None if given is None else resolve(given, self._role(role))

    def _provider(
        self, credentials: Credentials | Provider | None
    ) -> Credentials | Provider | None:
        """Return where a call's credentials come from."""
        return self._manager.settings.credentials if credentials is None else credentials

    def _role(self, role: str | None) -> str:
        """Return the role of a call's credentials; the function's name, unless it is given."""
        if role is not None:
            return role
        what = self._queue.resolve(None)[1]
        return what.name if isinstance(what, FunctionVersion) else ""

    def _leave_queue(self, waiter: PoolWaiter, seconds: float | None) -> PoolLease:
        """Return the lease of a call that has waited for `seconds` at most.

        Raises:
            PoolTimeout: It has got none.
            PoolClosed, Throttled: It was told that it gets none.
        """
        lease = self._scheduler.withdraw(waiter)
        if waiter.error is not None:
            raise waiter.error
        if lease is None:
            raise PoolTimeout(f"no environment was free within {seconds} seconds")
        return lease
