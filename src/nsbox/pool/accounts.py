# SPDX-License-Identifier: Apache-2.0
"""What `nsbox.pool.scheduler` keeps account of: places of environments, leases of them, calls."""

from __future__ import annotations

import enum
import select
import threading
from collections.abc import Hashable
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from nsbox.pool.events import Retirement

if TYPE_CHECKING:
    from nsbox.pool.shares import FunctionQueue


class Closable(Protocol):
    """What a pool keeps: an `ExecutionEnvironment`."""

    def close(self, *, wait: bool = True) -> None:
        """End it."""


E = TypeVar("E", bound=Closable)
W = TypeVar("W")


class Phase(enum.Enum):
    """Where an environment of a pool is."""

    BIRTH = "birth"
    LEASED = "leased"
    IDLE = "idle"
    RETIRED = "retired"


class Slot(Generic[E, W]):
    """The place of one environment. Only `Scheduler` changes it."""

    __slots__ = (
        "begun",
        "born",
        "death",
        "env",
        "fd",
        "generation",
        "idle_since",
        "invocations",
        "is_cold",
        "is_dead",
        "is_plain",
        "is_provisioned",
        "is_silent",
        "key",
        "memory",
        "phase",
        "queue",
        "reason",
        "serves",
        "token",
        "what",
    )  # fmt: skip

    def __init__(
        self,
        queue: FunctionQueue[E, W],
        key: Hashable,
        what: W,
        memory: int,
        token: int,
        now: float,
    ) -> None:
        self.queue = queue
        self.key = key
        self.what = what
        self.memory = memory
        self.generation = queue.generation
        self.phase = Phase.BIRTH
        self.token = token
        self.env: E | None = None
        self.fd = -1
        self.death: select.poll | None = None
        self.begun = self.born = self.idle_since = now
        self.invocations = 0
        self.is_cold = self.is_dead = self.is_provisioned = False
        self.is_silent = True  # its death is only seen by looking, not by who sends an event
        self.is_plain = False  # an answer leaves nothing to do or to tell, whichever it is
        self.serves = False  # its lease is a call's
        self.reason: Retirement | None = None


class Lease(Generic[E, W]):
    """A lease of a slot's environment, or of a place in which one is to be born.

    Attributes:
        is_birth: Whether the holder has to give birth (`Scheduler.born`).
        victims: What the holder has to close before that.
        is_cold: Whether the holder has to thaw it: it is frozen, or just being frozen.
    """

    __slots__ = ("is_birth", "is_cold", "slot", "token", "victims")

    def __init__(
        self,
        slot: Slot[E, W],
        *,
        is_birth: bool = False,
        is_cold: bool = False,
        victims: tuple[Slot[E, W], ...] = (),
    ) -> None:
        self.slot = slot
        self.token = slot.token
        self.is_birth = is_birth
        self.is_cold = is_cold
        self.victims = victims


class Waiter(Generic[E, W]):
    """A call that waits for its turn.

    Attributes:
        queue: What its function has; set when it joins the queue.
        turn: Its number among all that wait.
    """

    queue: FunctionQueue[E, W]

    __slots__ = ("_turn", "error", "lease", "queue", "tenant", "turn")

    def __init__(self, tenant: str | None) -> None:
        self.tenant = tenant
        self.turn = 0
        self.lease: Lease[E, W] | None = None
        self.error: Exception | None = None
        self._turn: threading.Lock | None = None

    def join(self) -> None:
        """Get ready to be woken: there is nothing for it now."""
        self._turn = threading.Lock()
        self._turn.acquire()

    def wake(self) -> bool:
        """Tell the caller that `lease` or `error` is set; False when nobody is there any more."""
        if self._turn is not None:
            self._turn.release()
        return True

    def wait(self, seconds: float) -> bool:
        """Wait for that; False when the time is over."""
        return self._turn is None or self._turn.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))
