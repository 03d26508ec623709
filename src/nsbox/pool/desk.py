# SPDX-License-Identifier: Apache-2.0
"""Where the calls of one function of a pool are served: a pool has a desk for each."""

from __future__ import annotations

import os

from nsbox.errors import PoolError, PoolTimeout
from nsbox.function import FunctionVersion
from nsbox.pool.house import House, PoolShare


class Desk:
    """One function, or one `Config`, of a pool; what is done with environments the house does."""

    def __init__(self, house: House, share: PoolShare) -> None:
        self._house = house
        self._share = share
        self._leases = house._leases
        self._acquire_timeout = house.settings.acquire_timeout
        self._is_function = isinstance(share.resolve(None)[1], FunctionVersion)
        self._is_dead = house._is_dead
        self._give_birth = house._give_birth
        self._finish = house._finish
        self._fail = house._fail
        self._drop = house._drop

    def _check_usable(self, *, is_function: bool) -> None:
        if self._house.owner != os.getpid():
            raise PoolError(
                f"this pool belongs to process {self._house.owner}; make another one here"
            )
        if is_function is not self._is_function:
            has = "a function: use invoke" if self._is_function else "a Config: use acquire"
            raise PoolError(f"this pool is of {has}")

    def _timed_out(self) -> PoolTimeout:
        return PoolTimeout(f"no environment was free within {self._acquire_timeout} seconds")
