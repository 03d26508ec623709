# SPDX-License-Identifier: Apache-2.0
"""What a pool does to its environments: gives birth, judges, freezes, keeps them ready, tells."""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import threading
import time
from collections.abc import Sequence
from typing import Final

from nsbox.environment.environment import ExecutionEnvironment, State
from nsbox.errors import (
    EnvironmentDied,
    EnvironmentStateError,
    InvokeError,
    NsboxError,
    PoolClosed,
)
from nsbox.functions.deployment import kind_of
from nsbox.functions.function import FunctionVersion
from nsbox.launcher.protocol import BLANK_LIFE
from nsbox.linux.proc import has_pending
from nsbox.pool import members
from nsbox.pool.accounts import FunctionQueue, Lease, Resolve, Slot, Waiter
from nsbox.pool.endings import Endings
from nsbox.pool.events import PoolEvent, Retirement
from nsbox.pool.judgement import Source, doubt_of, memory_of, weightless
from nsbox.pool.maintenance import Watch
from nsbox.pool.pressure import Pressure
from nsbox.pool.scheduler import Scheduler
from nsbox.pool.settings import Settings
from nsbox.supervisor import standby
from nsbox.values.config import Config

PoolLease = Lease[ExecutionEnvironment, Source]
PoolSlot = Slot[ExecutionEnvironment, Source]
PoolScheduler = Scheduler[ExecutionEnvironment, Source]
PoolQueue = FunctionQueue[ExecutionEnvironment, Source]
PoolWaiter = Waiter[ExecutionEnvironment, Source]

_log: Final = logging.getLogger("nsbox.pool")
_FREEZES_AT_ONCE: Final = 8  # a millisecond or two each, and deaths are to be seen meanwhile
_WISH_SECONDS: Final = BLANK_LIFE / 3
_FILL_AGAIN: Final = 0.2  # seconds until a thread to fill the pool is asked for again
RETURN_DEADLINE: Final = 10.0
"""Seconds in which a killed call must have given its lease back."""


class PoolManager:
    """The environments of a pool, and the thread that keeps them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._scheduler: PoolScheduler = Scheduler(
            most=settings.max_environments,
            max_waiting=settings.max_waiting,
            max_lifetime=settings.max_lifetime,
            max_invocations=settings.max_invocations,
            idle_timeout=settings.idle_timeout,
            freeze_after=settings.freeze_after,
            memory_budget=settings.memory_budget,
            weigh=memory_of if settings.memory_budget is not None else weightless,
        )
        self.owner = os.getpid()
        self._endings = Endings(settings.shutdown_grace, self._close, self._await_frost)
        self._watched: dict[int, PoolSlot] = {}
        self._watched_lock = threading.Lock()
        self._watch: Watch | None = None
        self._start_lock = threading.Lock()
        # Held while an environment is being frozen. Reentrant: `on_event` is called under it.
        self._frost = threading.RLock()
        self._pressure: Pressure | None = None
        self._next_wish = 0.0
        self._filler: threading.Thread | None = None
        self._is_filling = False
        self._said: object = None
        self._is_closed = False

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
        queue, surplus = self._scheduler.add(
            resolve, reserved=reserved, provisioned=provisioned, optional=optional
        )
        self._endings.see_out(surplus)  # what has been reserved is to be had now
        return queue

    def open(self, queue: PoolQueue) -> None:
        """Have what is to be kept ready of it ready; from now on the thread sees to that."""
        self._fill(queue)
        queue.is_open = True
        if self.settings.blank:
            self._next_wish = 0.0
            self._get_watch()
        self._ring()

    def withdraw(self, queue: PoolQueue) -> None:
        """Take a function out again that could not be opened."""
        self.dispose_all(self._scheduler.remove(queue))

    def dispose_all(self, slots: Sequence[PoolSlot]) -> None:
        """See retired environments out, and have the thread look at what is missing now."""
        for slot in slots:
            self._dispose(slot)
        self._next_wish = 0.0  # another version may be another kind
        self._ring()

    # -- environments ----------------------------------------------------------------------------

    def _is_dead(self, lease: PoolLease) -> bool:
        """Look whether it has died a moment ago; then it is closed. A frozen one is thawed."""
        death, env = lease.slot.death, lease.slot.env
        if env is not None and members.is_closed(env):
            death = None  # and its descriptor's number may be another's
        if death is not None and not death.poll(0) and (not lease.is_cold or self._thaw(lease)):
            return False
        self._give_back(lease, Retirement.FAILURE)
        return True

    def _give_birth(self, lease: PoolLease, *, is_call: bool = True) -> None:
        """Have the environment of a birth's lease born and initialised; else end the lease."""
        slot = lease.slot
        try:
            victims, lease.victims = lease.victims, ()  # whoever drops the lease later has none
            self._endings.see_out(victims)
            env = ExecutionEnvironment(slot.what)
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
            self._scheduler.started(lease, time.monotonic() - begin)
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, PoolClosed):
                self._scheduler.failed(lease, error)
            answered = False if is_call else None
            self._give_back(lease, Retirement.FAILURE, answered=answered, has_run=False)
            self._tell_caller(error, "during the birth")
            raise

    def _adopt(self, lease: PoolLease, env: ExecutionEnvironment) -> None:
        fd = members.death_descriptor(env)
        what = lease.slot.what
        if isinstance(what, FunctionVersion):
            is_told = self.settings.on_event is not None
            lease.slot.is_plain = what.function.reuse != "never" and not is_told
            lease.slot.is_silent = what.function.handler is None
        queue = lease.slot.queue
        members.on_kill_of_left_running(env, lambda: self._scheduler.note_left_running(queue))
        lease.slot.death = _poll_of(fd)
        watch = self._get_watch()
        with self._watched_lock:
            watch.add(fd)
            self._watched[fd] = lease.slot
        self._scheduler.born(lease, env, fd)

    def _drop(self, lease: PoolLease | None, *, answered: bool | None = False) -> None:
        """End a lease that nobody uses any more; its call, if any, is an error. Does not wait."""
        if lease is None:
            return
        for victim in lease.victims:
            self._close(victim)
        self._give_back(lease, None, answered=answered, has_run=False)

    def _finish(self, lease: PoolLease, error: BaseException | None) -> None:
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

    def _fail(self, lease: PoolLease, error: BaseException) -> bool:
        """End the lease of a function's call that has failed so.

        Returns whether the call is to be made again: its environment, which was alive when it
        became idle, has died since then, and has surely got nothing of it. Raises what its caller
        is told, if that is not `error`.
        """
        is_unheard = isinstance(error, EnvironmentStateError) or (
            isinstance(error, InvokeError) and members.heard_nothing(env_of(lease))
        )
        if is_unheard and not lease.is_birth and not self._scheduler.is_killed:
            self._give_back(lease, Retirement.FAILURE)
            return True
        self._finish(lease, error)
        self._tell_caller(error, "while the call ran")
        return False

    def _tell_caller(self, error: BaseException, when: str) -> None:
        if self._scheduler.is_killed and isinstance(error, NsboxError):
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
        retired = self._scheduler.give_back(lease, doubt, answered=answered, has_run=has_run)
        if doubt is not None:
            self._close(lease.slot)
        elif retired is not None:
            self._dispose(lease.slot)
        elif self._scheduler.wants_sweep:
            self._ring()

    # -- ends ------------------------------------------------------------------------------------

    def _dispose(self, slot: PoolSlot) -> None:
        """See a retired environment out, in order if nothing is amiss; nobody waits for that."""
        is_healthy = slot.reason is not Retirement.FAILURE and not self._scheduler.is_killed
        if is_healthy and self._endings.begin(slot):
            self._ring()
        else:
            self._close(slot)

    def _close(self, slot: PoolSlot, *, wait: bool = False) -> None:
        """Close a retired environment and free its place."""
        try:
            if slot.env is not None:
                if slot.is_cold:
                    self._await_frost()
                watch = self._watch
                with self._watched_lock:
                    # The number is another's, perhaps, where it was closed by who had it.
                    if watch is not None and self._watched.get(slot.fd) is slot:
                        del self._watched[slot.fd]
                        watch.discard(slot.fd)
                slot.env.close(wait=wait)
                self._tell("retired", slot, reason=slot.reason)
        finally:
            self._scheduler.removed(slot)
            if self._scheduler.is_wanting:
                self._ring()

    # -- maintenance ------------------------------------------------------------------------------

    def _ring(self) -> None:
        """Have the thread look at what is due now."""
        watch = self._watch
        if watch is not None and not self._is_closed:
            watch.ring()

    def _get_watch(self) -> Watch:
        with self._start_lock:
            if self._watch is None:
                if self.settings.min_available is not None:
                    self._pressure = Pressure(self.settings.min_available)
                self._watch = Watch(self._on_ready, self._on_time)
                for fd in self._pressure.triggers if self._pressure is not None else ():
                    self._watch.add_trigger(fd)
            return self._watch

    def _on_ready(self, fd: int) -> None:
        """Note a death, the end of one that was asked to end, or that memory is short."""
        watch = self._watch
        if watch is not None and self._endings.is_leaving(fd):
            watch.discard(fd)
            self._endings.end(fd)
            return
        if self._pressure is not None and fd in self._pressure.triggers:
            if self._pressure.is_alarming():
                self.dispose_all(self._scheduler.relieve())
            return
        slot = self._watched.get(fd)
        # The number may be another environment's since the kernel told it. A poll object is of one
        # thread at a time, and `slot.death` is that of whoever holds the lease.
        if slot is None or not _poll_of(fd).poll(0):
            return
        if self._scheduler.died(slot):
            self._close(slot)

    def _on_time(self) -> float:
        due = self._scheduler.sweep()
        for slot in due.over:
            self._dispose(slot)
        for lease in due.orphans:
            self._drop(lease)
        for slot in due.cold[:_FREEZES_AT_ONCE]:
            self._freeze(slot)
        left = 0.0 if len(due.cold) > _FREEZES_AT_ONCE else math.inf
        seconds = min(due.seconds, left, self._look_at_memory(), self._keep_blanks())
        if self._watch is not None:
            for fd in self._endings.arrivals():
                self._watch.add(fd)
        for fd, left in self._endings.deadlines():
            if left > 0:
                seconds = min(seconds, left)
            else:
                self._on_ready(fd)
        filler = self._filler
        is_filling = self._is_filling and filler is not None and filler.is_alive()
        if not self._is_closed and not is_filling:
            place = self._scheduler.reserve()
            if place is not None:
                # A birth may take long, and deaths are to be seen meanwhile.
                self._filler = threading.Thread(
                    target=self._refill, args=(place,), name="nsbox-pool-fill", daemon=True
                )
                self._is_filling = True
                try:
                    self._filler.start()
                except RuntimeError as error:  # "can't start new thread"
                    self._filler, self._is_filling = None, False
                    self._give_up(place, error)
                    seconds = _FILL_AGAIN
        return seconds

    def _give_up(self, place: PoolLease, error: RuntimeError) -> None:
        self._say_not_ready(error)
        self._scheduler.failed(place, error)
        self._drop(place, answered=None)

    def _look_at_memory(self) -> float:
        """Close idle ones when memory is short; return in how many seconds to look again."""
        if self._pressure is None or (self._scheduler.wants_sweep and not self._scheduler.has_idle):
            return math.inf
        is_low, seconds = self._pressure.look()
        if is_low:
            self.dispose_all(self._scheduler.relieve())
        return seconds

    def _keep_blanks(self) -> float:
        """Say again which blanks are wanted; return in how many seconds to do so again."""
        left = self._next_wish - time.monotonic()
        if not self.settings.blank or self._is_closed or left > 0:
            return left if self.settings.blank else math.inf
        self._next_wish = time.monotonic() + _WISH_SECONDS
        try:
            kinds = [kind_of(source) for source in self._scheduler.sources()]
            for launcher in {launcher for launcher, _ in kinds}:
                specs = [spec for _, spec in kinds if spec is not None]
                standby.wish(self, launcher, specs, self.settings.blank)
        except (NsboxError, OSError) as error:
            # Environments that are needed will say so, too.
            _log.debug("no blank environments: %s", error)
        return _WISH_SECONDS

    def _freeze(self, slot: PoolSlot) -> None:
        """Freeze an idle one, unless a call is faster."""
        with self._frost:
            if slot.env is None or not self._scheduler.begin_freeze(slot):
                return
            try:
                slot.env.freeze()
            except NsboxError as error:
                # It is dying, or makes processes faster than they can be stopped.
                _log.debug("environment %s is not frozen: %s", slot.env.id, error)
            else:
                self._tell("frozen", slot)
                return
        if self._scheduler.died(slot):
            self._close(slot)

    def _thaw(self, lease: PoolLease) -> bool:
        """Thaw what was frozen for nobody used it; False when it is dead."""
        env = env_of(lease)
        self._await_frost()
        if has_pending(env.pid, signal.SIGKILL):
            return False  # v1's freezer holds up even that
        try:
            if env.state is State.FROZEN:
                env.thaw()
                self._tell("thawed", lease.slot)
        except NsboxError:
            return False
        return True

    def _await_frost(self) -> None:
        """Wait until what is just being frozen stands still."""
        with self._frost:
            pass

    def _fill(self, queue: PoolQueue | None = None, lease: PoolLease | None = None) -> None:
        """Give birth to the provisioned environments that are missing."""
        place = lease or self._scheduler.reserve(queue)
        while place is not None:
            self._give_birth(place, is_call=False)
            self._said = None
            self._give_back(place, None)
            place = self._scheduler.reserve(queue)

    def _say_not_ready(self, error: Exception) -> None:
        """Warn once of starts that fail, until one succeeds. Text keeps no frames alive."""
        said, self._said = self._said, (type(error), getattr(error, "error_type", ""))
        if said != self._said:
            _log.warning("an environment to be kept ready does not start: %s", str(error))

    def _refill(self, lease: PoolLease) -> None:
        try:
            self._fill(lease=lease)
        except (NsboxError, OSError) as error:
            if not isinstance(error, PoolClosed):  # else nobody needs it any more
                self._say_not_ready(error)
        self._is_filling = False  # another may begin while this thread ends
        self._ring()

    def _tell(
        self, kind: str, slot: PoolSlot, *, reason: Retirement | None = None, error: str = ""
    ) -> None:
        on_event = self.settings.on_event
        if on_event is None or slot.env is None:
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
            left_running=members.left_running_of_last(slot.env) if kind == "invoked" else None,
        )
        try:
            on_event(event)
        except Exception:  # noqa: BLE001 - the caller's; the pool's own work goes on
            _log.exception("on_event raised for %s", event)

    def end(self, *, drain: bool) -> Exception | None:
        """Close every environment; return what could not be removed, if anything."""
        idle, orphans = self._scheduler.begin_close(None if drain else _kill)
        failure = self._endings.see_out(idle, wait=True, is_hasty=not drain)
        for lease in orphans:
            self._drop(lease)
        if not drain:
            self._endings.hasten()
            self._ring()
        self._scheduler.await_empty(None if drain else RETURN_DEADLINE)
        self._is_closed = True
        filler = self._filler
        if filler is not None:
            filler.join(RETURN_DEADLINE)
        return failure

    def end_watch(self) -> None:
        """End the thread, when every environment is closed."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        standby.forget(self)
        if self._pressure is not None:
            self._pressure.close()


def _poll_of(fd: int) -> select.poll:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return poll


def env_of(lease: PoolLease) -> ExecutionEnvironment:
    """Return the environment of a lease."""
    if lease.slot.env is None:
        raise EnvironmentStateError("this lease has no environment yet")
    return lease.slot.env


def _kill(slot: PoolSlot) -> None:
    if slot.env is not None:
        members.send_kill(slot.env)
