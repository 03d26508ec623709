# SPDX-License-Identifier: Apache-2.0
"""What `nsbox.pool.scheduler` keeps account of: slots, leases, waiting calls, functions' queues."""

from __future__ import annotations

import enum
import select
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

from nsbox.errors import ConfigError, Throttled
from nsbox.pool.events import Counters, Retirement

FAILURES_MAX: Final = 3
"""Starts that fail in a row before those of a function are paused."""
PAUSE_MIN: Final = 1.0
PAUSE_MAX: Final = 30.0


class Closable(Protocol):
    """What a pool keeps: a `ManagedEnvironment`."""

    def close(self, *, wait: bool = True) -> None:
        """End it."""


E = TypeVar("E", bound=Closable)
W = TypeVar("W")
V = TypeVar("V")
Resolve = Callable[[str | None], tuple[Hashable, W]]
"""From a tenant to the key of its environments, and their source."""


class Phase(enum.Enum):
    """Where an environment of a pool is."""

    BIRTH = "birth"
    LEASED = "leased"
    IDLE = "idle"
    RETIRED = "retired"


class Slot(Generic[E, W]):
    """The place of one environment, from before its birth until it is closed.

    Only `Scheduler` changes it, except what is marked with an asterisk.

    Attributes:
        queue: Of which function.
        key: Of which version and tenant.
        what: Its source.
        memory: Bytes that it may use.
        generation: That of the queue when it was made; another one means an older version.
        phase: Where it is.
        token: Number of its lease; 0: none.
        holder: Of what whoever has it holds on to: its lease, or the list with which it is given
            away to be closed. None: it is idle, or the maintenance thread has it.
        victims: What has to be closed before its birth.
        env: The environment, once it is born.
        fd: Readable once its PID 1 has ended; -1 before.
        death: * A poll object on `fd`, for the thread that holds the lease.
        begun: When its call began (seconds of the scheduler's clock; as are the next two).
        born: When it was born.
        idle_since: When it became idle.
        invocations: Calls that it has served.
        is_cold: It is frozen, or just being frozen.
        is_dead: Its death was seen while it was leased.
        is_provisioned: It is one of those that are kept ready.
        is_silent: * Its death is found only by looking, not by sending an event.
        is_plain: * An answer leaves nothing to do and nobody to tell.
        is_told: * Its birth has been told, and its end not yet.
        serves: Its lease is that of a call, not of a birth ahead of need.
        reason: Why it was retired.
    """

    __slots__ = (
        "begun", "born", "death", "env", "fd", "generation", "holder", "idle_since", "invocations",
        "is_cold", "is_dead", "is_plain", "is_provisioned", "is_silent", "is_told", "key", "memory",
        "phase", "queue", "reason", "serves", "token", "victims", "what",
    )  # fmt: skip

    def __init__(
        self,
        queue: FunctionQueue[E, W],
        key: Hashable,
        what: W,
        memory: int,
        now: float,
    ) -> None:
        self.queue = queue
        self.key = key
        self.what = what
        self.memory = memory
        self.generation = queue.generation
        self.phase = Phase.BIRTH
        self.token = 0
        self.holder: weakref.ref[Any] | None = None
        self.victims: tuple[Slot[E, W], ...] = ()
        self.env: E | None = None
        self.fd = -1
        self.death: select.poll | None = None
        self.begun = self.born = self.idle_since = now
        self.invocations = 0
        self.is_cold = self.is_dead = self.is_provisioned = False
        self.is_silent = True
        self.is_plain = self.is_told = False
        self.serves = False
        self.reason: Retirement | None = None

    @property
    def is_lost(self) -> bool:
        """Whether nobody has it any more who would give it back, or close it."""
        return self.holder is not None and self.holder() is None


class Lease(Generic[E, W]):
    """The right to use a slot's environment, or to have one born there, until it is given back.

    A call makes it before it asks for an environment, so that there is no moment at which it has
    one without a record of that.

    Attributes:
        slot: Which; there is none before the first.
        token: Its number; it is over when the slot has another. 0: there was none yet.
        is_birth: Whether the holder has to give birth (`Scheduler.born`).
        is_cold: Whether the holder has to thaw it: it is frozen, or just being frozen.
    """

    # Class attributes: a method would be one more call of each invocation.
    slot: Slot[E, W]
    token = 0
    is_birth = is_cold = False


class Retired(list[Slot[E, W]]):
    """Slots of retired environments, for whoever gets the list to close them."""

    __slots__ = ("__weakref__",)


class Waiter(Generic[E, W]):
    """A call in a queue; its thread sleeps until it is served or refused.

    Attributes:
        tenant: Whose call it is.
        queue: That of its function; set when it joins.
        turn: Its number among all calls that wait.
        record: The lease that it is to get, made before.
        lease: What it has got.
        error: Why it gets none.
    """

    queue: FunctionQueue[E, W]

    __slots__ = ("_turn", "error", "lease", "queue", "record", "tenant", "turn")

    def __init__(self, tenant: str | None, record: Lease[E, W] | None = None) -> None:
        self.tenant = tenant
        self.turn = 0
        self.record: Lease[E, W] = Lease() if record is None else record
        self.lease: Lease[E, W] | None = None
        self.error: Exception | None = None
        self._turn: threading.Lock | None = None

    def join(self) -> None:
        """Get ready to be woken: there is nothing for it now."""
        self._turn = threading.Lock()
        self._turn.acquire()

    def wake(self) -> bool:
        """Tell the caller that `lease` or `error` is set; False when nobody is there any more."""
        if self._turn is not None and self._turn.locked():
            self._turn.release()
        return True

    def wait(self, seconds: float) -> bool:
        """Sleep until `wake`; False when `seconds` are over first."""
        return self._turn is None or self._turn.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))


class Due(NamedTuple, Generic[E, W]):
    """What `Scheduler.sweep` has found."""

    over: Retired[E, W]
    """Retired; to be closed."""
    cold: list[Slot[E, W]]
    """Idle for so long that they are to be frozen (`Scheduler.begin_freeze`)."""
    orphans: list[Lease[E, W]]
    """Leases whose caller's event loop is closed; to be dropped."""
    seconds: float
    """Until something may be due again."""


class Breaker:
    """Pauses the births of a function whose environments do not start."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures = 0
        self._last = ""
        self._paused_until = 0.0
        self._trial: object = None

    def pause(self) -> float:
        """Return for how many seconds no environment may be started."""
        if self._failures < FAILURES_MAX:
            return 0.0
        left = self._paused_until - self._clock()
        # One at a time is tried after the pause.
        return max(left, PAUSE_MIN) if self._trial is not None else left

    def refusal(self) -> Throttled:
        """Return what to raise during a pause."""
        return Throttled(
            f"the last {self._failures} starts of an environment failed: {self._last}",
            reason="start failures",
            retry_after=self.pause(),
        )

    def begin(self, slot: object) -> None:
        """Note a start."""
        if self._failures >= FAILURES_MAX:
            self._trial = slot

    def end(self, slot: object) -> None:
        """Note that a start is over, or was given up."""
        if self._trial is slot:
            self._trial = None

    def fail(self, error: BaseException) -> None:
        """Note that a start has failed."""
        self._failures += 1
        self._last = f"{type(error).__name__}: {error}"
        pause = PAUSE_MIN * 2.0 ** min(max(0, self._failures - FAILURES_MAX), 16)
        self._paused_until = self._clock() + min(pause, PAUSE_MAX)

    def reset(self) -> None:
        """Forget the failures."""
        self._failures, self._trial = 0, None


class Places(Generic[E, W]):
    """The slots that one function has reserved, or those that all others share.

    Attributes:
        most: How many there are.
        aside: Bytes of memory that are reserved with them.
        taken: Environments in them, births counted.
        memory: Bytes of memory that those may use.
        waiters: Calls that wait for one.
        queues: The functions whose they are.
        is_reserved: Whether they are one function's.
    """

    def __init__(self, most: int, *, is_reserved: bool = False) -> None:
        self.most = most
        self.is_reserved = is_reserved
        self.aside = self.taken = self.memory = self.waiters = 0
        self.queues: list[FunctionQueue[E, W]] = []

    def waiting(self) -> list[FunctionQueue[E, W]]:
        """Return the functions whose calls wait, the next to be served first.

        It is the turn of who has the fewest places, and then of who has waited longest.
        """
        waiting = [queue for queue in self.queues if queue.waiters]
        if len(waiting) > 1:
            waiting.sort(key=lambda queue: (queue.taken, queue.first.turn))
        return waiting

    def idle(self) -> Iterator[Slot[E, W]]:
        """Yield the idle ones."""
        for queue in self.queues:
            yield from queue.idle_ones()

    def on_demand(self) -> list[Slot[E, W]]:
        """Return the idle ones that need not be kept ready, the coldest first."""
        idle = [slot for slot in self.idle() if not slot.is_provisioned]
        return sorted(idle, key=coldness)


class FunctionQueue(Generic[E, W]):
    """One function of a pool: its waiting calls, its idle environments, its numbers.

    Attributes:
        resolve: From a tenant to the key of its environments, and their source.
        key: That of calls without a tenant.
        places: Where its environments have their slots.
        is_optional: Whether it may be left without a slot.
        provisioned: How many environments are to be kept ready.
        is_open: Whether maintenance keeps those ready; before, whoever adds the function does.
        generation: Grows with each version that is published.
        taken: Its environments, births counted.
        idle: Its idle environments by key, the one used last at the end.
        waiters: Its calls that wait, in their order.
        breaker: Pauses its births.
        counters: Its numbers.
    """

    def __init__(
        self,
        resolve: Resolve[W],
        places: Places[E, W],
        provisioned: int,
        clock: Callable[[], float],
        *,
        is_optional: bool,
    ) -> None:
        self.move_to(resolve)
        self.places = places
        self.is_optional = is_optional
        self.is_open = False
        self.provisioned = provisioned
        self.generation = self.taken = 0
        self.idle: dict[Hashable, deque[Slot[E, W]]] = {}
        self.waiters: OrderedDict[Waiter[E, W], None] = OrderedDict()
        self.breaker = Breaker(clock)
        self.counters = Counters()

    def move_to(self, resolve: Resolve[W]) -> None:
        """Have new environments made of what `resolve` says."""
        self.resolve = resolve
        self.key = resolve(None)[0]

    @property
    def first(self) -> Waiter[E, W]:
        """The call that has waited longest."""
        return next(iter(self.waiters))

    def put_waiter(self, waiter: Waiter[E, W]) -> None:
        """Let a call wait."""
        self.waiters[waiter] = None
        self.places.waiters += 1

    def remove_waiter(self, waiter: Waiter[E, W]) -> bool:
        """Let a call wait no more; False when it did not."""
        if waiter not in self.waiters:
            return False
        del self.waiters[waiter]
        self.places.waiters -= 1
        return True

    def put_idle(self, slot: Slot[E, W]) -> None:
        """Keep an environment for the next call."""
        slot.phase, slot.holder = Phase.IDLE, None
        stack = self.idle.get(slot.key)
        if stack is None:
            stack = self.idle[slot.key] = deque()
        stack.append(slot)

    def idle_ones(self) -> Iterator[Slot[E, W]]:
        """Yield its idle ones."""
        for stack in self.idle.values():
            yield from stack

    def take_idle(self, key: Hashable, *, only_ready: bool = False) -> Slot[E, W] | None:
        """Return the idle one of `key` that was used last, or None; or only a provisioned one."""
        stack = self.idle.get(key)
        if not stack:
            return None
        if not only_ready:
            slot = stack.pop()
            if not stack:
                del self.idle[key]
            return slot
        for slot in reversed(stack):
            if slot.is_provisioned:
                self.remove_idle(slot)
                return slot
        return None

    def remove_idle(self, slot: Slot[E, W]) -> None:
        """Take an idle one out."""
        stack = self.idle[slot.key]
        stack.remove(slot)
        if not stack:
            del self.idle[slot.key]


def coldness(slot: Slot[E, W]) -> float:
    """Return what idle ones are sorted by, so that the coldest comes first."""
    return slot.idle_since


def check_promises(
    queues: Iterable[tuple[FunctionQueue[E, W], int]],
    shared: Places[E, W],
    most: int,
    memory_budget: int | None,
) -> None:
    """Raise ConfigError unless each function gets what it is promised, and a place at least.

    Args:
        queues: The functions, and the bytes that an environment of each may use.
        shared: The places of those that have none reserved.
        most: All places.
        memory_budget: Bytes for all.
    """
    reserved = kept = kept_memory = reserved_memory = least = least_memory = 0
    for queue, memory in queues:
        if queue.places is not shared:
            reserved += queue.places.most
            reserved_memory += queue.places.most * memory
        elif queue.provisioned:
            kept += queue.provisioned
            kept_memory += queue.provisioned * memory
        elif not queue.is_optional:
            least, least_memory = 1, max(least_memory, memory)
    need = reserved + kept + least
    if need > most:
        raise ConfigError(
            f"max_environments: {most} are too few for {reserved} reserved, {kept} "
            f"provisioned and {least} for functions that have neither; give at least {need}"
        )
    need = reserved_memory + kept_memory + least_memory
    if memory_budget is not None and need > memory_budget:
        raise ConfigError(
            f"memory_budget: {memory_budget} bytes are too few for the memory limits of "
            f"what is reserved, provisioned and least needed; give at least {need}, or lower "
            "limits"
        )
