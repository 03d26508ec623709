# SPDX-License-Identifier: Apache-2.0
"""What a pool does with its environments: births, verdicts after calls, freezing, ends, events."""

from __future__ import annotations

import functools
import logging
import os
import select
import signal
import threading
import time
from _socket import socket as Socket
from collections.abc import Callable, Sequence
from typing import Final

from nsbox.environment.managed import ManagedEnvironment, State
from nsbox.errors import (
    ConfigError,
    EnvironmentStateError,
    InvokeError,
    NsboxError,
    PoolClosed,
)
from nsbox.functions.function import FunctionVersion
from nsbox.linux.proc import has_pending
from nsbox.pool.accounts import FunctionQueue, Lease, Phase, Resolve, Slot, Waiter
from nsbox.pool.events import (
    EnvironmentSnapshot,
    EnvironmentState,
    EventKind,
    FunctionSnapshot,
    PoolEvent,
    PoolSnapshot,
    Retirement,
)
from nsbox.pool.maintenance import (
    ExpireIdle,
    GracefulExits,
    KeepStandby,
    Maintenance,
    Refill,
    RelieveMemory,
    Source,
    Task,
)
from nsbox.pool.pressure import Pressure
from nsbox.pool.scheduler import Scheduler
from nsbox.pool.settings import Settings
from nsbox.supervisor import standby
from nsbox.supervisor.connection import await_exit_notice
from nsbox.values.config import Config
from nsbox.values.invocation import FunctionError
from nsbox.values.result import EnvironmentDied

PoolLease = Lease[ManagedEnvironment, Source]
PoolSlot = Slot[ManagedEnvironment, Source]
PoolScheduler = Scheduler[ManagedEnvironment, Source]
PoolQueue = FunctionQueue[ManagedEnvironment, Source]
PoolWaiter = Waiter[ManagedEnvironment, Source]

_log: Final = logging.getLogger("nsbox.pool")
RETURN_DEADLINE: Final = 10.0
"""Seconds in which a killed call must have given its lease back."""
_HARMLESS: Final = ("", "Runtime.MarshalError", "Function.ResponseSizeTooLarge")


class PoolManager:
    """The environments of a pool, and the maintenance thread.

    Attributes:
        settings: Those of the pool.
        scheduler: Who has which environment.
        owner: Process id of the program that made the pool.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._maintenance: Maintenance | None = None
        self._is_closed = False
        self.scheduler: PoolScheduler = Scheduler(
            most=settings.max_environments,
            max_waiting=settings.max_waiting,
            max_lifetime=settings.max_lifetime,
            max_invocations=settings.max_invocations,
            idle_timeout=settings.idle_timeout,
            freeze_after=settings.freeze_after,
            memory_budget=settings.memory_budget,
            weigh=memory_of if settings.memory_budget is not None else weightless,
            on_lost=self._wake,
        )
        self.owner = os.getpid()
        self._start_lock = threading.Lock()
        self._memory: Pressure | None = None
        # Held while an environment is being frozen. Reentrant: `on_event` is called under it.
        self._freezing = threading.RLock()
        self._refill = Refill(
            self.scheduler,
            start=self._start_ready,
            drop=functools.partial(self.drop, answered=None),
            wake=self._wake,
        )
        self._expire = ExpireIdle(
            self.scheduler, self._retire, self._freeze, self.drop, self._refill
        )
        self._exits = GracefulExits(
            settings.shutdown_grace, self._ask_to_end, self._close, self._watch, self._unwatch
        )
        self._standby = KeepStandby(self.scheduler, self, settings.standby)

    # -- functions -------------------------------------------------------------------------------

    def add(
        self,
        resolve: Resolve[Source],
        *,
        reserved: int | None,
        provisioned: int,
        optional: bool = False,
    ) -> PoolQueue:
        """Return the queue of another function; see `Scheduler.add`."""
        queue, surplus = self.scheduler.add(
            resolve, reserved=reserved, provisioned=provisioned, optional=optional
        )
        self._end_all(surplus)  # what has been reserved is to be had now
        return queue

    def open(self, queue: PoolQueue) -> None:
        """Have its provisioned environments born; from now on maintenance replaces them.

        Raises:
            NsboxError: One cannot be made, or does not start.
        """
        lease: PoolLease = Lease()
        try:
            while self.scheduler.reserve(queue, lease) is not None:
                self._start_ready(lease)
        except BaseException:
            self.abandon(lease)
            raise
        queue.is_open = True
        if self.settings.standby:
            self._standby.request()
            self._get_maintenance()
        self._wake()

    def withdraw(self, resolve: Resolve[Source]) -> None:
        """Take a function out again that could not be added, or opened."""
        self.retire_all(self.scheduler.remove(resolve))

    def retire_all(self, slots: Sequence[PoolSlot]) -> None:
        """Close retired environments, and have maintenance look at what is missing now."""
        for slot in slots:
            self._retire(slot)
        self._standby.request()  # another version may be another kind
        self._wake()

    # -- births ----------------------------------------------------------------------------------

    def start(self, lease: PoolLease, *, is_call: bool = True) -> None:
        """Have the environment of a birth's lease born and initialised; else end the lease."""
        slot = lease.slot
        try:
            if slot.victims:
                self._end_all(slot.victims)
                slot.victims = ()
            env = ManagedEnvironment(slot.what)
            try:
                self._adopt(lease, env)
            except BaseException:
                if slot.env is None:
                    env.close(wait=False)
                raise
            reason = Retirement.PROVISIONED if slot.is_provisioned else Retirement.DEMAND
            self._tell("created", slot, reason=reason)
            begin = time.monotonic()
            if isinstance(slot.what, FunctionVersion):
                env.init(provisioned=slot.is_provisioned)
                self._tell("initialised", slot)
            self.scheduler.started(lease, time.monotonic() - begin)
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, PoolClosed):
                self.scheduler.failed(lease, error)
            answered = False if is_call else None
            self._give_back(lease, Retirement.FAILURE, answered=answered, has_run=False)
            self._tell_caller(error, "during the birth")
            raise

    def _start_ready(self, lease: PoolLease) -> None:
        """Have a provisioned environment born, for whoever calls next."""
        self.start(lease, is_call=False)
        self._give_back(lease, None)

    def _adopt(self, lease: PoolLease, env: ManagedEnvironment) -> None:
        slot = lease.slot
        queue = slot.queue
        fd = env.death_descriptor()
        if isinstance(slot.what, FunctionVersion):
            function = slot.what.function
            slot.is_plain = function.reuse != "never" and self.settings.on_event is None
            slot.is_silent = function.handler is None
        env.on_kill_of_left_running(lambda: self.scheduler.note_left_running(queue))
        slot.death = _poll_of(fd)
        on_death = functools.partial(self._on_death, slot, fd)
        self._get_maintenance().watch(fd, slot, on_death, events=0)
        self.scheduler.born(lease, env, fd)

    # -- calls -----------------------------------------------------------------------------------

    def is_dead(self, lease: PoolLease) -> bool:
        """Look whether it has died a moment ago; then it is closed. A frozen one is thawed."""
        if lease.is_cold:
            self._await_freezing()
        death, env = lease.slot.death, lease.slot.env
        if env is not None and env.is_closed:
            death = None  # and its descriptor's number may be another's
        if death is not None and not death.poll(0) and (not lease.is_cold or self._thaw(lease)):
            return False
        self._give_back(lease, Retirement.FAILURE)
        return True

    def drop(self, lease: PoolLease | None, *, answered: bool | None = False) -> None:
        """End a lease that nobody uses any more; its call, if any, is an error. Does not wait."""
        if lease is not None:
            self._give_back(lease, None, answered=answered, has_run=False)

    def abandon(self, lease: PoolLease) -> None:
        """End what a call has by this lease that was interrupted, wherever that was.

        There is nothing left to do where it has ended its lease by itself.
        """
        for slot in self.scheduler.abandon(lease):
            self._close(slot)

    def finish(self, lease: PoolLease, error: BaseException | None) -> None:
        """End the lease of a call that ended so."""
        slot = lease.slot
        doubt = doubt_of(slot.what, error, self.settings.reuse)
        if doubt is None and self.settings.reuse == "reset" and isinstance(slot.what, Config):
            doubt = self._reset(lease)
        if self.settings.on_event is not None:
            self._tell("invoked", slot, error=type(error).__name__ if error else "")
        self._give_back(lease, doubt, answered=error is None)

    def _reset(self, lease: PoolLease) -> Retirement | None:
        try:
            env_of(lease).reset()
        except (NsboxError, OSError) as failure:
            # The call is over and has all it wanted; the next one gets another environment.
            _log.warning("an environment is given up: %s", failure)
            return Retirement.FAILURE
        return None

    def fail(self, lease: PoolLease, error: BaseException) -> bool:
        """End the lease of a function's call that has failed so.

        Returns whether the call is to be made again: its environment, which was alive when it
        became idle, has died since then, and has surely got nothing of it. Raises what its caller
        is told, if that is not `error`.
        """
        is_unheard = isinstance(error, EnvironmentStateError) or (
            isinstance(error, InvokeError) and env_of(lease).heard_nothing
        )
        if is_unheard and not lease.is_birth and not self.scheduler.is_killed:
            self._give_back(lease, Retirement.FAILURE)
            return True
        self.finish(lease, error)
        self._tell_caller(error, "while the call ran")
        return False

    def _tell_caller(self, error: BaseException, when: str) -> None:
        if self.scheduler.is_killed and isinstance(error, NsboxError):
            raise PoolClosed(f"the pool was closed {when}") from error
        if isinstance(error, EnvironmentStateError):
            # It has died since it was born or taken: for the caller of a pool no state of theirs.
            raise EnvironmentDied(f"nothing of the call was run: {error}") from error

    def _give_back(
        self,
        lease: PoolLease,
        doubt: Retirement | None,
        *,
        answered: bool | None = None,
        has_run: bool = True,
    ) -> None:
        retired = self.scheduler.give_back(lease, doubt, answered=answered, has_run=has_run)
        if doubt is not None:
            self._close(lease.slot)
        elif retired is not None:
            self._retire(lease.slot)
        elif self.scheduler.wants_sweep:
            self._wake()

    # -- ends ------------------------------------------------------------------------------------

    def _retire(self, slot: PoolSlot) -> None:
        """End a retired environment, gracefully if it is healthy; waits for nothing."""
        is_healthy = slot.reason is not Retirement.FAILURE and not self.scheduler.is_killed
        if is_healthy and self._exits.begin(slot):
            slot.holder = None  # the maintenance thread has it
            self._wake()
        else:
            self._close(slot)

    def _ask_to_end(self, slot: PoolSlot) -> Socket | None:
        """Send SIGTERM inside; return the exit notice, or None: there is nothing to wait for."""
        if slot.env is None or not self.settings.shutdown_grace:
            return None
        if slot.is_cold:
            self._await_freezing()
        return slot.env.ask_to_end()

    def _end_all(
        self, slots: Sequence[PoolSlot], *, wait: bool = False, is_hurried: bool = False
    ) -> Exception | None:
        """Ask all of `slots` to end, wait until they have or their time is over, close them.

        Args:
            slots: Retired ones.
            wait: Return only when nothing is left of them.
            is_hurried: Do not ask.

        Returns what could not be removed, if anything.
        """
        failure: Exception | None = None
        notices = [None if is_hurried else self._ask_to_end(slot) for slot in slots]
        deadline = time.monotonic() + self.settings.shutdown_grace
        for slot, notice in zip(slots, notices, strict=True):
            await_exit_notice(notice, max(0.0, deadline - time.monotonic()))
            try:
                self._close(slot, wait=wait)
            except NsboxError as error:
                failure = failure or error
        return failure

    def _close(self, slot: PoolSlot, *, wait: bool = False) -> None:
        """Close a retired environment, and what was to be closed before it, and free its slot."""
        try:
            for victim in slot.victims:
                self._close(victim)
            slot.victims = ()
            if slot.env is not None:
                if slot.is_cold:
                    self._await_freezing()
                self._unwatch(slot.fd, slot)
                slot.env.close(wait=wait)
        finally:
            # One that an interrupt has kept open is closed by whoever finds that nobody has it.
            if slot.env is None or slot.env.is_closed or slot.holder is None:
                self._tell("retired", slot, reason=slot.reason)
                self.scheduler.removed(slot)
            if self.scheduler.is_wanting:
                self._wake()

    # -- maintenance -----------------------------------------------------------------------------

    def _wake(self) -> None:
        """Have the maintenance thread look at everything now."""
        maintenance = self._maintenance
        if maintenance is not None and not self._is_closed:
            self._expire.request()
            maintenance.wake()

    def _get_maintenance(self) -> Maintenance:
        with self._start_lock:
            if self._maintenance is None:
                tasks: list[Task] = [self._expire]
                triggers = {}
                if self.settings.min_available is not None:
                    self._memory = self._memory or Pressure(self.settings.min_available)
                    relief = RelieveMemory(self.scheduler, self._memory, self.retire_all)
                    triggers = dict.fromkeys(self._memory.triggers, relief.on_alarm)
                    tasks.append(relief)
                if self.settings.standby:
                    tasks.append(self._standby)
                maintenance = Maintenance()
                try:
                    maintenance.start([*tasks, self._exits, self._refill], triggers)
                    self._maintenance = maintenance
                except BaseException:
                    maintenance.close()
                    raise
            return self._maintenance

    def _watch(self, fd: int, owner: object, handler: Callable[[], object]) -> None:
        self._get_maintenance().watch(fd, owner, handler)

    def _unwatch(self, fd: int, owner: object) -> None:
        if self._maintenance is not None:
            self._maintenance.unwatch(fd, owner)

    def _on_death(self, slot: PoolSlot, fd: int) -> None:
        # The number may be another environment's since the kernel told it. A poll object is of one
        # thread at a time, and `slot.death` is that of whoever holds the lease.
        if _poll_of(fd).poll(0) and self.scheduler.died(slot):
            self._close(slot)

    def _freeze(self, slot: PoolSlot) -> None:
        """Freeze an idle one, unless a call is faster."""
        with self._freezing:
            if slot.env is None or not self.scheduler.begin_freeze(slot):
                return
            try:
                slot.env.freeze()
            except NsboxError as error:
                # It is dying, or makes processes faster than they can be stopped.
                _log.debug("environment %s is not frozen: %s", slot.env.id, error)
            else:
                self._tell("frozen", slot)
                return
        if self.scheduler.died(slot):
            self._close(slot)

    def _thaw(self, lease: PoolLease) -> bool:
        """Thaw what was frozen while nobody used it; False when it is dead."""
        env = env_of(lease)
        if has_pending(env.pid, signal.SIGKILL):
            return False  # v1's freezer holds up even that
        try:
            if env.state is State.FROZEN:
                env.thaw()
                self._tell("thawed", lease.slot)
        except NsboxError:
            return False
        return True

    def _await_freezing(self) -> None:
        """Wait until what is just being frozen stands still."""
        with self._freezing:
            pass

    # -- events and the end ----------------------------------------------------------------------

    def _tell(
        self, kind: EventKind, slot: PoolSlot, *, reason: Retirement | None = None, error: str = ""
    ) -> None:
        on_event = self.settings.on_event
        if on_event is None or slot.env is None or not (slot.is_told or kind == "created"):
            return
        version = slot.what if isinstance(slot.what, FunctionVersion) else None
        event = PoolEvent(
            kind=kind,
            environment=slot.env.id,
            function=version.name if version else "",
            version=version.id if version else "",
            tenant=version.tenant if version else None,
            provisioned=slot.is_provisioned,
            reason=reason,
            error=error,
            left_running=slot.env.left_running_of_last() if kind == "invoked" else None,
        )
        try:
            # An interrupt finds the birth told and noted, or neither; and so the end.
            slot.is_told = kind != "retired"
            on_event(event)
        except Exception:  # noqa: BLE001 - the caller's; the pool's own work goes on
            _log.exception("on_event raised for %s", event)

    def snapshot(self) -> PoolSnapshot:
        """Return what there is now; see `WarmPool.snapshot`."""
        return PoolSnapshot(
            functions=tuple(self.scheduler.observe(_describe)),
            max_environments=self.settings.max_environments,
            memory_budget=self.settings.memory_budget,
        )

    def begin_close(self, *, drain: bool) -> Exception | None:
        """Close idle environments, and have the others closed when their calls end.

        Without `drain`, calls that wait are refused and those that run are killed.

        Returns what could not be removed, if anything.
        """
        idle, orphans = self.scheduler.begin_close(None if drain else _kill)
        failure = self._end_all(idle, wait=True, is_hurried=not drain)
        for lease in orphans:
            self.drop(lease)
        if not drain:
            self._exits.hurry()
            self._wake()
        return failure

    def stop(self) -> None:
        """End the maintenance thread, when every environment is closed."""
        self._is_closed = True
        self._refill.stop(RETURN_DEADLINE)
        if self._maintenance is not None:
            self._maintenance.close()
        standby.forget(self)
        if self._memory is not None:
            self._memory.close()


_STATES: Final[dict[tuple[Phase, bool], EnvironmentState]] = {
    (Phase.BIRTH, False): "starting",
    (Phase.LEASED, False): "busy",
    (Phase.IDLE, False): "idle",
    (Phase.IDLE, True): "frozen",
    (Phase.RETIRED, False): "ending",
    (Phase.RETIRED, True): "ending",
}


def _describe(queue: PoolQueue, slots: list[PoolSlot]) -> FunctionSnapshot:
    """Return what a function has; the scheduler's lock is held."""
    what = queue.resolve(None)[1]
    return FunctionSnapshot(
        name=what.name if isinstance(what, FunctionVersion) else "",
        version=what.id if isinstance(what, FunctionVersion) else "",
        environments=tuple(
            EnvironmentSnapshot(
                id="" if slot.env is None else slot.env.id,
                pid=0 if slot.env is None else slot.env.pid,
                state=_STATES[slot.phase, slot.is_cold],
                tenant=slot.what.tenant if isinstance(slot.what, FunctionVersion) else None,
                provisioned=slot.is_provisioned,
                invocations=slot.invocations,
            )
            for slot in sorted(slots, key=lambda slot: slot.born)
        ),
        waiting=len(queue.waiters),
        reserved=queue.places.most if queue.places.is_reserved else None,
        provisioned=queue.provisioned,
    )


def doubt_of(what: Source, error: BaseException | None, reuse: str) -> Retirement | None:
    """Return why an environment may not be used again after a call that ended so, or None.

    Args:
        what: What it is of.
        error: What the call has raised.
        reuse: The policy of a `Config`; a function has its own.
    """
    function = what.function if isinstance(what, FunctionVersion) else None
    if function is not None:
        reuse = function.reuse
    if error is not None and not isinstance(error, ConfigError):
        if not isinstance(error, FunctionError) or error.invocation is None:
            return Retirement.FAILURE
        # The host's own word on how it failed; what the function says is `error.error_type`.
        kind = error.invocation.error_type
        is_command = function is not None and function.command
        if kind not in _HARMLESS and not (is_command and kind == "Runtime.ExitError"):
            return Retirement.FAILURE
    return Retirement.INVOCATIONS if reuse == "never" else None


def weightless(_source: Source) -> int:
    """Return 0, the memory of an environment where no budget is kept."""
    return 0


def memory_of(source: Source) -> int:
    """Return the bytes an environment may use; ConfigError where there is no limit."""
    limits = source.function.limits if isinstance(source, FunctionVersion) else source.limits
    if limits.memory_max is None:
        raise ConfigError(
            "memory_budget: it sums up memory limits, and there is one without; give it "
            "limits=Limits(memory_max=...), or leave memory_budget out"
        )
    return limits.memory_max


def _poll_of(fd: int) -> select.poll:
    """Return what tells of a hang-up, whatever there is to read."""
    poll = select.poll()
    poll.register(fd, 0)
    return poll


def env_of(lease: PoolLease) -> ManagedEnvironment:
    """Return the environment of a lease."""
    if lease.slot.env is None:
        raise EnvironmentStateError("this lease has no environment yet")
    return lease.slot.env


def _kill(slot: PoolSlot) -> None:
    if slot.env is not None:
        slot.env.send_kill()
