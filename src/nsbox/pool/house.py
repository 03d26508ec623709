# SPDX-License-Identifier: Apache-2.0
"""What a pool does to its environments: gives birth, judges, closes, keeps them ready, tells."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Final

from nsbox.config import Config
from nsbox.environment import ExecutionEnvironment, death_descriptor
from nsbox.errors import (
    ConfigError,
    EnvironmentStateError,
    FunctionError,
    NsboxError,
    PoolClosed,
    PoolError,
    PoolTimeout,
)
from nsbox.function import FunctionVersion
from nsbox.pool.entries import Entry, Grant, Waiter
from nsbox.pool.events import PoolEvent, Retirement
from nsbox.pool.leases import Leases
from nsbox.pool.watch import Watch

Source = FunctionVersion | Config
PoolGrant = Grant[ExecutionEnvironment, Source]
PoolEntry = Entry[ExecutionEnvironment, Source]
PoolLeases = Leases[ExecutionEnvironment, Source]
PoolWaiter = Waiter[ExecutionEnvironment, Source]

_log: Final = logging.getLogger("nsbox.pool")
_HARMLESS: Final = ("", "Runtime.MarshalError", "Function.ResponseSizeTooLarge")
RETURN_DEADLINE: Final = 10.0
"""Seconds in which a killed call must have given its lease back."""


class House:
    """The environments of a pool, and the thread that keeps them."""

    def __init__(
        self,
        leases: PoolLeases,
        *,
        provisioned: int,
        idle_timeout: float,
        reuse: str,
        is_function: bool,
        on_event: Callable[[PoolEvent], object] | None,
    ) -> None:
        self._leases = leases
        self._provisioned = provisioned
        self._idle_timeout = idle_timeout
        self._reuse = reuse
        self._is_function = is_function
        self._on_event = on_event
        self._owner = os.getpid()
        self._watched: dict[int, PoolEntry] = {}
        self._watch: Watch | None = None
        self._start_lock = threading.Lock()
        self._filler: threading.Thread | None = None
        self._is_closed = self._is_filled = False

    def _check_usable(self, *, is_function: bool) -> None:
        if self._owner != os.getpid():
            raise PoolError(f"this pool belongs to process {self._owner}; make another one here")
        if is_function is not self._is_function:
            has = "a function: use invoke" if self._is_function else "a Config: use acquire"
            raise PoolError(f"this pool is of {has}")

    def _leave_queue(self, waiter: PoolWaiter, seconds: float | None) -> PoolGrant:
        """Return the lease of a call that has waited for `seconds` at most.

        Raises:
            PoolTimeout: It has got none.
            PoolClosed, Throttled: It was told that it gets none.
        """
        grant = self._leases.withdraw(waiter)
        if waiter.error is not None:
            raise waiter.error
        if grant is None:
            raise PoolTimeout(f"no environment was free within {seconds} seconds")
        return grant

    # -- environments ----------------------------------------------------------------------------

    def _is_dead(self, grant: PoolGrant) -> bool:
        """Look whether it has died a moment ago; then it is closed."""
        death = grant.entry.death
        if death is not None and not death.poll(0):
            return False
        self._give_back(grant, Retirement.FAILURE)
        return True

    def _give_birth(self, grant: PoolGrant, *, is_call: bool = True) -> None:
        """Have the environment of a birth's lease born and initialised; else end the lease."""
        entry = grant.entry
        try:
            if grant.victim is not None:
                self._dispose(grant.victim)
            env = ExecutionEnvironment(entry.what)
            try:
                self._adopt(grant, env)
            except BaseException:
                if entry.env is None:
                    env.close(wait=False)
                raise
            self._tell("created", entry)
            begin = time.monotonic()
            if self._is_function:
                env.init()
                self._tell("initialised", entry)
            self._leases.started(grant, time.monotonic() - begin)
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, PoolClosed):
                self._leases.failed(grant, error)
            self._give_back(grant, Retirement.FAILURE, answered=False if is_call else None)
            if self._leases.is_killed and isinstance(error, NsboxError):
                raise PoolClosed("the pool was closed during the birth") from error
            raise

    def _adopt(self, grant: PoolGrant, env: ExecutionEnvironment) -> None:
        fd = death_descriptor(env)
        death = grant.entry.death = select.poll()
        death.register(fd, select.POLLIN)
        self._watched[fd] = grant.entry
        try:
            self._get_watch().add(fd)
        except BaseException:
            del self._watched[fd]
            os.close(fd)
            raise
        self._leases.born(grant, env, fd)

    def _drop(self, grant: PoolGrant | None) -> None:
        """End a lease that nobody uses any more; its call counts as an error."""
        if grant is None:
            return
        if grant.victim is not None:
            self._dispose(grant.victim)
        self._give_back(grant, None, answered=False)

    def _finish(self, grant: PoolGrant, error: BaseException | None) -> None:
        """End the lease of a call that ended so; raises PoolClosed if that is why it failed."""
        entry = grant.entry
        doubt = self._doubt(entry, error)
        if doubt is None and self._reuse == "reset" and not self._is_function:
            try:
                env_of(grant).reset()
            except (NsboxError, OSError) as failure:
                # The call is over and has all it wanted; the next one gets another environment.
                _log.warning("an environment is given up: %s", failure)
                doubt = Retirement.FAILURE
        self._tell("invoked", entry, error=type(error).__name__ if error else "")
        self._give_back(
            grant,
            doubt,
            answered=error is None,
            seconds=time.monotonic() - entry.begun,
        )
        if self._leases.is_killed and isinstance(error, NsboxError):
            raise PoolClosed("the pool was closed while the call ran") from error

    def _doubt(self, entry: PoolEntry, error: BaseException | None) -> Retirement | None:
        """Return why the environment may not be used again after a call that ended so."""
        if error is None or isinstance(error, ConfigError):
            return Retirement.INVOCATIONS if self._reuse == "never" else None
        if not isinstance(error, FunctionError) or error.invocation is None:
            return Retirement.FAILURE
        # The host's own word on how it failed; what the function says is `error.error_type`.
        kind = error.invocation.error_type
        is_command = isinstance(entry.what, FunctionVersion) and entry.what.function.command
        if kind not in _HARMLESS and not (is_command and kind == "Runtime.ExitError"):
            return Retirement.FAILURE
        return Retirement.INVOCATIONS if self._reuse == "never" else None

    def _give_back(
        self,
        grant: PoolGrant,
        doubt: Retirement | None,
        *,
        answered: bool | None = None,
        seconds: float = 0.0,
    ) -> None:
        retired = self._leases.give_back(grant, doubt, answered=answered, seconds=seconds)
        if retired is not None:
            self._dispose(grant.entry)
        elif self._leases.has_orphans:
            self._ring()

    def _dispose(self, entry: PoolEntry, *, wait: bool = False) -> None:
        """Close a retired environment and free its place."""
        try:
            if entry.env is not None:
                watch = self._watch
                if watch is not None:
                    watch.discard(entry.fd)
                self._watched.pop(entry.fd, None)
                os.close(entry.fd)
                entry.env.close(wait=wait)
                self._tell("retired", entry, reason=entry.reason)
        finally:
            self._leases.removed(entry)
            if self._provisioned or self._leases.has_orphans:
                self._ring()

    # -- keeping house ---------------------------------------------------------------------------

    def _ring(self) -> None:
        """Have the thread look at what is due now."""
        watch = self._watch
        if watch is not None and not self._is_closed:
            watch.ring()

    def _get_watch(self) -> Watch:
        with self._start_lock:
            if self._watch is None:
                self._watch = Watch(self._on_death, self._on_time)
            return self._watch

    def _on_death(self, fd: int) -> None:
        entry = self._watched.get(fd)
        # The number may be another environment's since the kernel told it.
        if entry is None or entry.death is None or not entry.death.poll(0):
            return
        if self._leases.died(entry):
            self._dispose(entry)

    def _on_time(self) -> float:
        over, orphans, due = self._leases.sweep(self._idle_timeout)
        for entry in over:
            self._dispose(entry)
        for grant in orphans:
            self._drop(grant)
        if (
            self._provisioned
            and self._is_filled
            and not self._is_closed
            and not (self._filler is not None and self._filler.is_alive())
        ):
            place = self._leases.reserve(self._provisioned)
            if place is not None:
                # A birth may take long, and deaths are to be seen meanwhile.
                self._filler = threading.Thread(
                    target=self._refill, args=(place,), name="nsbox-pool-fill", daemon=True
                )
                self._filler.start()
        return due

    def _fill(self, grant: PoolGrant | None = None) -> None:
        """Give birth to the provisioned environments that are missing."""
        place = grant or self._leases.reserve(self._provisioned)
        while place is not None:
            self._give_birth(place, is_call=False)
            self._give_back(place, None)
            place = self._leases.reserve(self._provisioned)

    def _refill(self, grant: PoolGrant) -> None:
        try:
            self._fill(grant)
        except PoolClosed:
            pass  # nobody needs it any more
        except (NsboxError, OSError) as error:
            # It is tried again; calls that need one meanwhile are told why there is none.
            _log.warning("an environment to be kept ready does not start: %s", error)
        self._filler = None
        self._ring()

    def _tell(
        self, kind: str, entry: PoolEntry, *, reason: Retirement | None = None, error: str = ""
    ) -> None:
        if self._on_event is None or entry.env is None:
            return
        event = PoolEvent(
            kind=kind,
            environment=entry.env.id,
            version=entry.what.id if isinstance(entry.what, FunctionVersion) else "",
            tenant=entry.what.tenant if isinstance(entry.what, FunctionVersion) else None,
            provisioned=entry.is_provisioned,
            reason=reason,
            error=error,
        )
        try:
            self._on_event(event)
        except Exception:  # noqa: BLE001 - the caller's; the pool's own work goes on
            _log.exception("on_event raised for %s", event)

    def _end_leases(self, kill: Callable[[int], object] | None) -> Exception | None:
        failure: Exception | None = None
        idle, orphans = self._leases.begin_close(kill)
        for entry in idle:
            try:
                self._dispose(entry, wait=True)
            except NsboxError as error:
                failure = failure or error
        for grant in orphans:
            self._drop(grant)
        self._leases.await_empty(None if kill is None else RETURN_DEADLINE)
        return failure


class Use:
    """A lease for the body of a with statement: the call ends as that does."""

    __slots__ = ("_grant", "_house")

    def __init__(self, house: House, grant: PoolGrant) -> None:
        self._house = house
        self._grant = grant

    def __enter__(self) -> ExecutionEnvironment:
        return env_of(self._grant)

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._house._finish(self._grant, error)


def env_of(grant: PoolGrant) -> ExecutionEnvironment:
    """Return the environment of a lease."""
    if grant.entry.env is None:
        raise EnvironmentStateError("this lease has no environment yet")
    return grant.entry.env
